"""Every exercise, run alone: with what its chapter exports and imports, and nothing else, its stub is 'not solved yet',
its solution 'right', and at least one wrong answer is told what is wrong with it."""
import importlib
import re

import pytest
from course import CHAPTERS, cells, directives, is_exported, module, only_imports

from llm_course.core import Verdict


def exercises(path):
    "The code cells of each exercise section, by its heading."
    found, name = {}, None
    for c in cells(path):
        if c['cell_type'] == 'markdown':
            for heading in re.findall(r'^#+ .*$', c['source'], flags=re.M):
                name = heading if re.match(r'## Exercise \d+: ', heading) else None
            if name: found.setdefault(name, {'prose': c['source'], 'code': []})
        elif name: found[name]['code'].append(c['source'])
    return found

def namespace(path) -> dict:
    "What an exercise may use: everything in the chapter's module, and the chapter's import cells."
    ns = dict(vars(importlib.import_module(f'llm_course.{module(path)}')))
    for c in cells(path):
        if c['cell_type'] == 'code' and only_imports(c['source']) and 'nbdev_export' not in c['source']: exec(c['source'], ns)
    return ns

CASES = [pytest.param(p, name, e, id=f'{p.stem}-{name[3:14].strip()}') for p in CHAPTERS for name, e in exercises(p).items()]


@pytest.mark.parametrize('path, name, exercise', CASES)
def test_exercise(path, name, exercise):
    assert re.search(r'\*Difficulty [1-5] of 5, about \d+ minutes\.\*', exercise['prose'])
    ns, verdicts = namespace(path), []
    class Watched(Verdict):
        def __new__(cls, text): verdicts.append(text); return super().__new__(cls, text)
    stub, check, *solutions = exercise['code']
    assert re.fullmatch(r'(def|class) [\s\S]*\.\.\.\s*', stub), 'the first cell is the stub'
    exec(stub, ns)
    body, last = check.rstrip().rsplit('\n', 1)
    exec(body, ns)
    assert eval(last, ns) == 'not solved yet'
    import llm_course.core as core
    real, core.Verdict = core.Verdict, Watched
    try:
        for s in solutions:
            if 'code-fold' in directives(s): exec(s, ns)
    finally: core.Verdict = real
    assert 'right' in verdicts, 'the folded solution is never shown to be right'
    hints = [v for v in verdicts if v.startswith('hint: ') and 'your code raised' not in v]
    assert hints, 'no wrong answer is shown to get its hint'
