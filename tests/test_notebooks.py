"Rules that hold for every chapter, read off the notebooks without running them."
import ast
import re

import pytest
from course import CHAPTERS, NBS, NUMBER, cells, directives, is_exported, module, number, only_imports

every_chapter = pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
every_notebook = pytest.mark.parametrize('path', sorted(NBS.glob('*.ipynb')), ids=lambda p: p.stem)
TEST = re.compile(r'\b(test_\w+|assert|check_\w+)\b')


def public_definitions(source: str):
    "Functions and classes at the top of a cell, and public methods of those classes, with the name that a test must mention."
    for node in ast.parse(source).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith('_'): continue
        yield node.name, node
        if isinstance(node, ast.ClassDef):
            yield from ((m.name, m) for m in node.body if isinstance(m, ast.FunctionDef) and not m.name.startswith('_') and m.name != 'forward')

def missing_annotations(node) -> list[str]:
    if isinstance(node, ast.ClassDef):
        init = next((m for m in node.body if isinstance(m, ast.FunctionDef) and m.name in ('__init__', 'forward')), None)
        return missing_annotations(init) if init else []
    a = node.args
    everything = a.posonlyargs + a.args + a.kwonlyargs + [x for x in (a.vararg, a.kwarg) if x and x.arg != 'options']
    missing = [x.arg for x in everything if x.arg not in ('self', 'cls') and not x.annotation and not (x is a.kwarg)]
    return missing + (['return'] if node.returns is None and node.name != '__init__' else [])

def undocumented(path) -> list[str]:
    "Names without docstring, annotations or a test in the next eight code cells."
    found, code = [], [c['source'] for c in cells(path) if c['cell_type'] == 'code']
    exported = [bool(directives(s) & {'export', 'exports'}) for s in code]
    for i, source in enumerate(code):
        if not exported[i]: continue
        near = [s for s, e in zip(code[i + 1:i + 9], exported[i + 1:i + 9]) if not e and TEST.search(s)]
        for name, node in public_definitions(source):
            trivial = isinstance(node, ast.FunctionDef) and any(getattr(d, 'id', '') == 'property' for d in node.decorator_list)
            if not ast.get_docstring(node) and not trivial: found.append(f'{name} has no docstring')
            if missing := missing_annotations(node): found.append(f'{name}: {", ".join(missing)} without annotation')
            if not any(re.search(rf'\b{name}\b', s) for s in near):
                found.append(f'{name} is not tested in the cells that follow it')
    return found


@every_chapter
def test_every_exported_name_is_documented_annotated_and_tested(path): assert undocumented(path) == []

@every_chapter
def test_imports_go_to_lower_chapters(path):
    for c in cells(path):
        if c['cell_type'] != 'code': continue
        for name in re.findall(r'(?:from|import) (?:llm_course)?\.(\w+)', c['source']):
            assert NUMBER[name] < number(path), f'{path.stem} imports {name}'

@every_chapter
def test_export_cells_hold_imports_or_code_not_both(path):
    for c in cells(path):
        if is_exported(c) and not only_imports(c['source']):
            assert not any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(c['source']).body), c['source'][:200]

@every_chapter
def test_anatomy(path):
    found = cells(path)
    prose = '\n'.join(c['source'] for c in found if c['cell_type'] == 'markdown')
    assert re.match(r'# .+\n\n> .+', found[0]['source'])
    assert '#| default_exp' in found[1]['source']
    here = int(number(path)) if number(path).isdigit() else repr(number(path))
    assert any(c['source'].strip() == f'CourseMap(here={here})' for c in found), 'no course map'
    for heading in ('## Bug clinic', '## Recap'): assert re.search(rf'^{heading}', prose, flags=re.M), heading
    assert '**Further reading.**' in prose and '*Budget:*' in prose and 'You will be able to' in prose
    assert len(re.findall(r'^## Exercise \d+: ', prose, flags=re.M)) >= 3
    assert 'nbdev_export()' in found[-1]['source']

@every_notebook
def test_outputs_are_stored_and_clean(path):
    code = [c for c in cells(path) if c['cell_type'] == 'code']
    shown = '\n'.join(str(o) for c in code for o in c['outputs'])
    assert not any(c['execution_count'] for c in code)
    assert not any(o['output_type'] == 'error' for c in code for o in c['outputs'])
    assert not any(o.get('name') == 'stderr' for c in code for o in c['outputs'])
    assert not re.search(r'(/(root|home|tmp|work|Users|mnt|private|var/folders)/|[A-Z]:\\\\)', shown), 'a path of one machine is stored'
    assert not code or sum(bool(c['outputs']) for c in code) >= 2
    for c in code:
        if directives(c['source']) & {'slow', 'cuda'} and 'print(' in c['source'] and 'cuda' not in directives(c['source']): assert c['outputs'], c['source'][:100]

@every_notebook
def test_pictures_are_small_and_described(path):
    for c in cells(path):
        for o in c.get('outputs', []):
            if png := o.get('data', {}).get('image/png'):
                assert len(''.join(png)) * 3 / 4 < 60_000
                assert re.search(r'#\| fig-alt: .{20,}', c['source']), c['source'][:100]

@every_chapter
def test_there_is_a_picture(path):
    assert any('image/png' in o.get('data', {}) for c in cells(path) for o in c.get('outputs', []))
