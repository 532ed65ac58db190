"The sandbox under attack, layer by layer; readers and answers on odd input; the harness and the command where a page is too short."
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llm_course.benchmarks as B
from llm_course.benchmarks import (BENCHMARKS, CodeItem, SandboxError, boxed, cut_at, evaluate_code, gsm8k_answer, math_answer, number, pass_at_k, read_benchmark,
                                   run_many, run_python, sandbox_layers)
from llm_course.evaluation import Interval

needs_linux = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='foreign code is run on Linux only')
ENDLESS = {
    'loop': 'while True: pass',
    'catches': 'while True:\n    try:\n        while True: pass\n    except BaseException: pass',
    'sleeps': 'import time; time.sleep(99)',
    'deaf': 'import signal, time\nfor s in (1, 2, 15): signal.signal(s, signal.SIG_IGN)\ntime.sleep(99)',
    'own session': 'import os\nos.setsid()\nwhile True: pass',
    'daemon': 'import os\nif os.fork() == 0: os.setsid()\nwhile True: pass',
    'fork bomb': 'import os\nwhile True:\n    try: os.fork()\n    except OSError: pass',
    'thread bomb': 'import threading\nwhile True:\n    try: threading.Thread(target=lambda: [None for _ in iter(int, 1)]).start()\n    except RuntimeError: pass',
    'kills its parent, then sleeps': 'import os, time\ntry: os.kill(os.getppid(), 9)\nexcept OSError: pass\ntime.sleep(99)'}
STOPPED = {
    'memory': 'x = bytearray(10 << 30)',
    'memory by and by': 'x = []\nwhile True: x.append(bytearray(1 << 20))',
    'output': 'while True: print("x" * 1000)',
    'errors': 'import sys\nwhile True: sys.stderr.write("x" * 1000)',
    'recursion': 'def f(): f()\nf()',
    'exit 0': 'import sys\nsys.exit(0)', 'exit()': 'raise SystemExit', 'hard exit': 'import os\nos._exit(0)', 'abort': 'import os\nos.abort()',
    'claims': 'print("passed")\nraise SystemExit(0)', 'atexit': 'import atexit\natexit.register(print, "passed")\nassert False',
    'closes all': 'import os\nfor f in range(32):\n    try: os.close(f)\n    except OSError: pass',
    'input': 'input()', 'stdin': 'import sys\nassert sys.stdin.read()',
    'passwd': 'open("/etc/passwd").read()', 'symlink': 'import os\nos.symlink("/etc/passwd", "p")\nopen("p").read()',
    'dots': 'import os\nopen(os.__file__[:os.__file__.rindex("/")] + "/../../../../../../../../etc/passwd").read()',
    'environment': 'import os\nassert set(os.environ) <= {"LC_CTYPE"}\nopen(f"/proc/{os.getppid()}/environ").read()',
    'deletes': 'import shutil, sys\nshutil.rmtree(sys.prefix)', 'removes': 'import os\nos.remove(os.__file__)', 'writes': 'open("x", "w").write("x")',
    'renames': 'import os\nos.rename(os.__file__, "x")',
    'tcp': 'import socket\nsocket.create_connection(("192.0.2.1", 80), timeout=.5)', 'udp': 'import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 9))',
    'shell': 'import os\nassert os.system("true") == 0', 'subprocess': 'import subprocess, sys\nsubprocess.run([sys.executable, "-c", ""], check=True)',
    'exec': 'import os, sys\nos.execv(sys.executable, [sys.executable, "-c", "1"])', 'kills all': 'import os\nos.kill(-1, 9)',
    'ctypes': 'import ctypes\nctypes.string_at(0)', 'syntax': 'def', 'null': 'x = "\0"\nassert False', 'surrogate': 'print("\\ud800")'}

BLINDS = {                                                                     # each got past an earlier form of the hook
    'replaces type': 'import builtins\nreal, builtins.type = type, lambda x: int\ntry: open("/usr/lib/os-release")\nfinally: builtins.type = real\nassert False',
    'through a traceback': 'try: open("/usr/lib/os-release")\nexcept PermissionError as e: t = e.__traceback__\nwhile t.tb_next: t = t.tb_next\nt.tb_frame.f_locals.update(quiet=("open",), stdlib="/", kind=lambda x: int)\nopen("/usr/lib/os-release")\nassert False',
    'another kind of str': 'class S(str):\n    def partition(self, x): return "a", "", ""\n    def split(self, x): return ["a"]\n    __hash__ = str.__hash__\n__import__(S("_posixsubprocess"))\nassert False',
    'the module below': 'import _signal\nassert False', 'shared memory': 'import _posixshmem\nassert False'}
STOPPED |= BLINDS
HARMFUL = ('deletes', 'removes', 'renames', 'kills all')                       # if nothing stopped them, they would hit this machine


def processes_of_the_sandbox(mark: str) -> set[int]: return {p.pid for p in psutil.process_iter(['cmdline']) if any(mark in a for a in p.info['cmdline'] or [])}

@pytest.fixture
def mark(monkeypatch) -> str:
    "A text that stands in the command line of every process of the sandbox that this test starts, and of no other."
    text = f'mark-{os.getpid()}-{time.monotonic_ns()}'
    monkeypatch.setattr(B, '_source', lambda *functions, call, real=B._source: real(*functions, call=f'{call}  # {text}'))
    return text

def both_layers(programs: dict[str, str], **options) -> dict:
    "Results by (name, hook). Without the hook only where the kernel grants namespaces; what could do harm only there, too."
    if not sandbox_layers()['namespaces']: programs = {name: code for name, code in programs.items() if os.geteuid() == 0 or name not in HARMFUL}
    cases = [(name, guard) for guard in (True, False) if guard or sandbox_layers()['namespaces'] for name in programs]
    found = {}
    for guard in (True, False):
        here = [c for c in cases if c[1] == guard]
        if here: found |= dict(zip(here, run_many([programs[n] for n, _ in here], workers=6, guard=guard, **options)))
    return found


@needs_linux
def test_what_never_ends_is_ended_and_leaves_nothing_behind(mark):
    found = both_layers(ENDLESS, timeout=1.)
    for case, r in found.items():
        assert not r.passed and r.status in ('timeout', 'failed', 'killed'), (case, r)
        assert r.seconds < 30, case                                               # they wanted 99
    assert all(found[name, g].status == 'timeout' for name, g in found if name in ('loop', 'catches', 'sleeps'))
    for _ in range(200):
        if not processes_of_the_sandbox(mark): break
        time.sleep(.05)
    assert not processes_of_the_sandbox(mark)

@needs_linux
def test_a_killed_parent_takes_the_sandbox_with_it():
    mark = f'mark-{os.getpid()}-{time.monotonic_ns()}'
    parent = subprocess.Popen([sys.executable, '-c', f"""
import llm_course.benchmarks as B
real = B._source
B._source = lambda *functions, call: real(*functions, call=call + '  # {mark}')
B.run_python('import time; time.sleep(99)', timeout=99.)"""])
    try:
        wanted = 3 if sandbox_layers()['namespaces'] else 2
        for _ in range(1200):
            if len(processes_of_the_sandbox(mark) - {parent.pid}) >= wanted: break
            time.sleep(.05)
        else: pytest.fail('the sandbox did not start')
    finally: parent.kill(); parent.wait()
    for _ in range(400):
        if not processes_of_the_sandbox(mark): break
        time.sleep(.05)
    assert not processes_of_the_sandbox(mark)

@needs_linux
def test_no_attack_reaches_its_goal():
    keep = open('/etc/passwd').read() if os.path.exists('/etc/passwd') else None
    for case, r in both_layers(STOPPED, timeout=15.).items():
        assert not r.passed, (case, r)
        assert r.status in ('failed', 'exited', 'killed', 'output'), (case, r)
        assert len(r.stdout) <= 1 << 16 and len(r.stderr) <= 1 << 16
        if case[0] in BLINDS and case[1]: assert 'is not allowed in the sandbox' in r.stderr, (case, r)
    assert os.path.exists(os.__file__) and (keep is None or open('/etc/passwd').read() == keep)

@needs_linux
def test_statuses():
    programs = ['x = 1', 'import sys; sys.exit(0)', 'assert False', 'import os; os.abort()', 'print("x" * 70_000)', 'print("é", end="")', 'import sys; sys.exit(1)']
    found = run_many(programs, workers=4, timeout=15.)
    assert [r.status for r in found] == ['passed', 'exited', 'failed', 'killed', 'output', 'passed', 'exited']
    assert found[5].stdout == 'é' and len(found[4].stdout) <= 1 << 16

@needs_linux
def test_a_program_larger_than_a_pipe_and_one_that_does_not_read():
    assert run_python('x = "' + 'y' * 1_000_000 + '"\nassert len(x) == 1_000_000', timeout=15.).passed

@needs_linux
@pytest.mark.skipif(not sandbox_layers()['namespaces'], reason='the kernel grants no namespaces')
def test_the_world_of_a_program():
    seen = run_python('import os, socket\nprint(os.getpid(), os.getuid() == 0, os.getcwd(), os.listdir("/work"), [n for _, n in socket.if_nameindex()], sorted(os.listdir("/")))', guard=False, timeout=15.)
    pid, root, rest = seen.stdout.split(' ', 2)
    assert seen.passed and pid == '2' and root == 'False'
    assert rest.startswith("/work [] ['lo'") and "'etc'" not in rest and "'proc'" not in rest and "'tmp'" not in rest
    secret = str(os.getpid())
    assert not run_python(f'import os\nos.kill({secret}, 0)', guard=False, timeout=15.).passed

@needs_linux
@pytest.mark.skipif(not os.path.exists('/usr/bin/python3'), reason='needs a Python that every user may read')
def test_the_hook_alone(monkeypatch):
    "As on a machine without namespaces. Root would need a Python that nobody may read: take that of the system."
    stdlib = subprocess.run(['/usr/bin/python3', '-IS', '-c', 'import sysconfig; print(sysconfig.get_path("stdlib"))'], capture_output=True, text=True).stdout.strip()
    monkeypatch.setattr(B, '_interpreter', lambda: (os.path.realpath('/usr/bin/python3'), stdlib))
    assert run_python('import math, collections, typing, dataclasses', namespaces=False, timeout=15.).passed
    tried = {name: code for name, code in STOPPED.items() if os.geteuid() == 0 or name not in HARMFUL}        # root becomes nobody, who can do no harm
    for name, r in zip(tried, run_many(list(tried.values()), workers=6, namespaces=False, timeout=30.)):
        assert not r.passed, (name, r)
        if name in BLINDS: assert 'is not allowed in the sandbox' in r.stderr, (name, r)
    for name, r in zip(ENDLESS, run_many(list(ENDLESS.values()), workers=6, namespaces=False, timeout=1.)): assert not r.passed and r.seconds < 30, (name, r)

@needs_linux
def test_a_sandbox_that_cannot_be_built_is_an_error_and_not_a_verdict(monkeypatch):
    monkeypatch.setattr(B, '_needed', lambda python, stdlib: ['/nowhere'])
    with pytest.raises(SandboxError, match='could not be set up'): run_python('1', namespaces=True)

@needs_linux
@pytest.mark.parametrize('raises', (True, False))
def test_without_namespaces_it_says_so(monkeypatch, caplog, raises):
    def refuse(*args, **kwargs):
        if raises: raise SandboxError('unshare: not permitted')
        return B.RunResult(False, 'timeout', '', '', 20.)
    monkeypatch.setattr(B, 'run_python', refuse)
    sandbox_layers.cache_clear()
    try:
        assert sandbox_layers() == {'limits': True, 'namespaces': False, 'guard': True}
        assert 'only limits and an audit hook' in caplog.text
    finally: sandbox_layers.cache_clear()

def test_other_systems_are_refused(monkeypatch):
    for system in ('darwin', 'win32'):
        monkeypatch.setattr(sys, 'platform', system)
        with pytest.raises(SandboxError, match=f'Linux only, and this is {system}'): run_python('1')


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_pass_at_k_is_the_mean_over_subsets(data):
    n = data.draw(st.integers(1, 9)); c = data.draw(st.integers(0, n)); k = data.draw(st.integers(1, n))
    subsets = [any(s) for s in itertools.combinations([1] * c + [0] * (n - c), k)]
    assert math.isclose(pass_at_k(n, c, k), sum(subsets) / len(subsets), abs_tol=1e-12)

@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.data())
def test_pass_at_k_agrees_with_exact_binomials(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    exact = 1 - math.comb(n - c, k) / math.comb(n, k)
    assert 0 <= pass_at_k(n, c, k) <= 1 and math.isclose(pass_at_k(n, c, k), exact, abs_tol=1e-9)

@settings(max_examples=200, deadline=None)
@given(st.integers(-10**12, 10**12), st.integers(1, 10**6))
def test_numbers_have_one_form(a, b):
    from fractions import Fraction
    want = str(Fraction(a, b))
    assert number(f'{a}/{b}') == number(f' ${a:,} / {b}.') == want
    assert math_answer(rf'\boxed{{\dfrac{{{a}}}{{{b}}}}}') == math_answer(rf'x = \frac{{{a}}}{{{b}}}') == want
    assert gsm8k_answer(f'so 1 + 1 = 2\n#### {a:,}\n\nQuestion: 5') == number(str(a)) == str(a)

@settings(max_examples=300, deadline=None)
@given(st.text(), st.lists(st.text(min_size=1)))
def test_answers_never_raise(text, stop):
    for f in (number, gsm8k_answer, boxed, math_answer, B.bbh_answer): f(text); f(r'\boxed{' + text)
    cut = cut_at(text, stop)
    assert text.startswith(cut) and not any(s in cut for s in stop)

@given(st.recursive(st.just('x'), lambda inner: st.builds(lambda a, b: a + '{' + b + '}', inner, inner)))
@settings(max_examples=100, deadline=None)
def test_boxed_balances_braces(content): assert boxed(f'a {{b}} \\boxed{{{content}}} c}}') == content


ROWS = {'mmlu': {'question': 'q', 'choices': list('abcd'), 'answer': 1}, 'arc-easy': {'question': 'q', 'choices': {'text': ['a', 'b'], 'label': ['A', 'B']}, 'answerKey': 'B'},
        'arc-challenge': {'question': {'stem': 'q', 'choices': [{'text': 'a', 'label': '1'}, {'text': 'b', 'label': '2'}]}, 'answerKey': '2'},
        'hellaswag': {'activity_label': 'a', 'ctx_a': 'b', 'ctx_b': 'c', 'endings': ['x', 'y'], 'label': '1'}, 'gsm8k': {'question': 'q', 'answer': '#### 1'},
        'math': {'problem': 'p', 'solution': r'\boxed{1}'}, 'bbh': {'input': 'i', 'target': 't'},
        'humaneval': {'task_id': 't', 'prompt': 'p', 'entry_point': 'f', 'canonical_solution': 's', 'test': 't'},
        'mbpp': {'task_id': 11, 'text': 't', 'code': 'c', 'test_list': ['assert True']}}

def test_every_benchmark_has_a_row_here(): assert set(ROWS) == set(BENCHMARKS)

@pytest.mark.parametrize('name', ROWS)
def test_each_missing_or_wrong_field_is_named(name):
    assert len(read_benchmark(name, [ROWS[name]])) == 1
    for field in ROWS[name]:
        for row in ({k: v for k, v in ROWS[name].items() if k != field}, ROWS[name] | {field: None}, ROWS[name] | {field: 2.5}):
            said = 'A' if (name, field) == ('mmlu', 'choices') and field not in row else field           # without it, a row is in the authors' layout
            with pytest.raises(ValueError, match=f'{name} row 2.*{said}'): read_benchmark(name, [ROWS[name], row])
    with pytest.raises(ValueError, match='row 1 is .*not an object'): read_benchmark(name, [['no', 'object']])

@pytest.mark.parametrize('name', ROWS)
def test_files_and_hub_layouts(name, tmp_path, monkeypatch):
    datasets = pytest.importorskip('datasets')
    path = tmp_path/'rows.jsonl'; path.write_text('﻿' + json.dumps(ROWS[name]) + '\n\n' + json.dumps(ROWS[name]), encoding='utf-8')
    assert len(read_benchmark(name, path)) == 2 and len(read_benchmark(name, str(path), limit=1)) == 1
    path.write_text(json.dumps(ROWS[name]) + '\n{"cut": ', encoding='utf-8')
    with pytest.raises(ValueError, match='rows.jsonl, line 2 is not JSON'): read_benchmark(name, path)
    asked = []
    monkeypatch.setattr(datasets, 'get_dataset_config_names', lambda repo: ['one', 'two'])
    monkeypatch.setattr(datasets, 'load_dataset', lambda repo, config, split: asked.append((repo, config, split)) or datasets.Dataset.from_list([ROWS[name]]))
    rows = list(B._hub_rows(BENCHMARKS[name], 'validation'))
    assert [a[0] for a in asked] == [BENCHMARKS[name].hub] * len(asked) and len(rows) == len(asked) == (2 if BENCHMARKS[name].config == '*' else 1)
    def offline(*args, **kwargs): raise OSError('no network')
    monkeypatch.setattr(datasets, 'load_dataset', offline)
    with pytest.raises(ConnectionError, match='name a local file'): list(B._hub_rows(BENCHMARKS[name], 'test'))

def test_damaged_files(tmp_path):
    (tmp_path/'a.jsonl.gz').write_bytes(b'\x1f\x8b no')
    with pytest.raises(ValueError, match='a.jsonl.gz cannot be read'): read_benchmark('humaneval', tmp_path/'a.jsonl.gz')
    (tmp_path/'b.csv').write_bytes(b'q,\xff,b,c,d,A')
    with pytest.raises(ValueError, match='b.csv cannot be read'): read_benchmark('mmlu', tmp_path/'b.csv')
    (tmp_path/'c.csv').write_text('"two\nlines",a,b,c,d,A\nq,a,b,c,d,X')
    with pytest.raises(ValueError, match="c.csv, line 3: field 'answer' is 'X'"): read_benchmark('mmlu', tmp_path/'c.csv')
    with pytest.raises(ValueError, match='row 1, choice 1: field .label. is missing'): read_benchmark('arc-easy', [ROWS['arc-challenge'] | {'question': {'stem': 'q', 'choices': [{'text': 'a'}]}}])

@needs_linux
def test_broken_solutions_fail_and_counts_are_checked():
    items = [CodeItem('def f(x):\n', 'assert f(2) == 4', '    return x * x', name='square')]
    scores = evaluate_code(items, [['    return x * x', '    return 4', '    return x', '    retur', '']], k=(1, 5), timeout=15.)
    assert [r.passed for r in scores.results[0]] == [True, True, False, False, False]
    assert scores.pass_at(1) == Interval(*scores.pass_at(1)) and scores.pass_at(5).mean == 1
    with pytest.raises(TypeError, match='one str'): evaluate_code(items, ['return'])


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run folder with an untrained model."
    from llm_course.core import read_documents
    from llm_course.dataloading import encode_documents, open_tokens, write_tokens
    from llm_course.gpt import GPT, GPTConfig
    from llm_course.pretraining import TrainConfig, Trainer
    from llm_course.tokenization import BPETokenizer
    folder, docs = tmp_path_factory.mktemp('runs')/'a', read_documents('tiny')[:6]
    tok = BPETokenizer.train([d.text for d in docs], vocab_size=300, special_tokens=('<|endoftext|>',))
    for name, part in (('train', docs[:4]), ('val', docs[4:])): write_tokens(folder/f'{name}.bin', encode_documents(part, tok), tok)
    config = GPTConfig.from_name('gpt2', vocab_size=tok.vocab_size, max_seq_len=48, n_layer=2, n_head=2, d_model=32, init_std=.2)
    tokens = [open_tokens(folder/f'{n}.bin', tok) for n in ('train', 'val')]
    trainer = Trainer(GPT(config), *tokens, TrainConfig(max_steps=2, batch_size=2, eval_every=100), folder, tok)
    trainer.fit(progress=False)
    return folder, trainer.model, tok, docs

def test_a_stopped_evaluation_goes_on(run, tmp_path, monkeypatch):
    folder, *_ = run
    calls, real = [], B._measure
    def dies(model, tok, name, *rest):
        calls.append(name)
        if name == 'continuations' and calls.count(name) == 1: raise KeyboardInterrupt
        return real(model, tok, name, *rest)
    monkeypatch.setattr(B, '_measure', dies)
    options = dict(out=str(tmp_path/'out'), limit=4, device='cpu', progress=False)
    with pytest.raises(KeyboardInterrupt): B.eval_command(str(folder), **options)
    assert list(json.loads((tmp_path/'out'/'evaluation_results.json').read_text())['tasks']) == ['heldout']
    record = B.eval_command(str(folder), **options)
    assert calls == ['heldout', 'continuations', 'continuations'] and list(record['tasks']) == ['heldout', 'continuations']
    B.eval_command(str(folder), **(options | {'limit': 3}))
    assert calls[3:] == ['heldout', 'continuations']
    B.eval_command(str(folder.parent), ['heldout'], **(options | {'limit': 3}))
    assert len(calls) == 5 and 'continuations' in (tmp_path/'out'/'evaluation_report.md').read_text()
    (tmp_path/'out'/'evaluation_results.json').write_text('{')
    with pytest.raises(ValueError, match='is damaged: delete it'): B.eval_command(str(folder), **options)

def test_results_of_another_model_are_not_kept(run, tmp_path):
    folder, *_ = run
    B.eval_command(str(folder), ['heldout'], out=str(tmp_path), limit=2, device='cpu', progress=False)
    path = tmp_path/'evaluation_results.json'
    old = json.loads(path.read_text()); old['tasks']['heldout']['inputs']['weights'] = 'other'; old['tasks']['bbh'] = old['tasks']['heldout']
    path.write_text(json.dumps(old))
    assert list(B.eval_command(str(folder), ['continuations'], out=str(tmp_path), limit=2, device='cpu', progress=False)['tasks']) == ['continuations']
    assert list(json.loads(path.read_text())['tasks']) == ['continuations']

def test_errors_of_the_command(run, tmp_path):
    folder, *_ = run
    shutil.copytree(folder/'checkpoints', tmp_path/'bare'/'checkpoints')
    with pytest.raises(FileNotFoundError, match='pass data='): B.eval_command(str(tmp_path/'bare'), device='cpu')
    (tmp_path/'text.txt').write_text('The keeper lit the lamp. ' * 100)
    assert B.eval_command(str(tmp_path/'bare'), ['heldout'], data=str(tmp_path/'text.txt'), limit=2, device='cpu', progress=False)['tasks']['heldout']['n'] == 97
    with pytest.raises(FileNotFoundError, match='does not exist'): B.eval_command(str(folder), ['gsm8k=nowhere'], out=str(tmp_path), device='cpu')

def lm_eval_numbers(lm, folder, rows, texts):
    "Accuracies and log-likelihoods of a multiple choice, and perplexities of whole texts, by the harness."
    lm_eval = pytest.importorskip('lm_eval'); from lm_eval.tasks import TaskManager
    for name, data, options in (('ask', rows, dict(output_type='multiple_choice', doc_to_text='{{q}}', doc_to_choice='{{c}}', doc_to_target='{{a}}', metric_list=[{'metric': m} for m in ('acc', 'acc_norm')])),
                                ('roll', texts, dict(output_type='loglikelihood_rolling', doc_to_text='', doc_to_target='{{text}}', metric_list=[{'metric': m} for m in ('word_perplexity', 'byte_perplexity')]))):
        (folder/f'{name}.jsonl').write_text('\n'.join(map(json.dumps, data)))
        (folder/f'{name}.yaml').write_text(json.dumps(options | dict(task=name, dataset_path='json', test_split='test', dataset_kwargs={'data_files': {'test': str(folder/f'{name}.jsonl')}, 'cache_dir': str(folder/'c')})))
    found = lm_eval.simple_evaluate(lm, tasks=['ask', 'roll'], task_manager=TaskManager(include_path=str(folder), include_defaults=False), bootstrap_iters=0)
    numbers = {k: v for t in ('ask', 'roll') for k, v in found['results'][t].items() if isinstance(v, float)}
    return numbers, [x for s in sorted(found['samples']['ask'], key=lambda s: s['doc_id']) for (x, _), in s['resps']]

def questions(docs): return [{'q': i.context, 'c': i.choices, 'a': i.answer} for i in B.continuation_items([d.text for d in docs], n=20, context=8, length=4)]

def test_the_harness_gets_our_numbers(run, tmp_path, monkeypatch):
    from llm_course.evaluation import ChoiceItem, evaluate_choices
    monkeypatch.setenv('HF_DATASETS_OFFLINE', '1')
    _, model, tok, docs = run
    rows = questions(docs) + [{'q': 'Ünïcode and', 'c': ['é', 'a longer one, with 日本'], 'a': 1}]
    numbers, theirs = lm_eval_numbers(B.as_lm_eval(model, tok, batch_size=3), tmp_path, rows, [{'text': docs[0].text}, {'text': 'short'}])
    scores = evaluate_choices(model, tok, [ChoiceItem(r['q'], tuple(r['c']), r['a']) for r in rows], 'none', too_long='cut')
    assert numbers['acc,none'] == scores.accuracy and numbers['acc_norm,none'] == scores.by('characters').accuracy
    assert theirs == pytest.approx([x.nats for row in scores.loglikelihoods for x in row], abs=1e-4)

def test_our_model_and_theirs_in_the_harness(run, tmp_path, monkeypatch):
    "The same weights as GPT2LMHeadModel, through the harness's own class for models of transformers: nothing of it is ours."
    pytest.importorskip('accelerate'); transformers = pytest.importorskip('transformers'); pytest.importorskip('lm_eval')
    from lm_eval.models.huggingface import HFLM
    monkeypatch.setenv('HF_DATASETS_OFFLINE', '1')
    _, model, tok, docs = run
    c = model.config
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=c.vocab_size, n_positions=c.max_seq_len, n_embd=c.d_model, n_layer=c.n_layer, n_head=c.n_head, bos_token_id=0, eos_token_id=0)).eval()
    ours, state = model.state_dict(), {}
    for name in theirs.state_dict():
        part = name.removeprefix('transformer.').replace('wte', 'embed').replace('wpe', 'pos_embed').replace('ln_f', 'norm').replace('lm_head', 'head')
        for a, b in (('h.', 'blocks.'), ('ln_1', 'norm1'), ('ln_2', 'norm2'), ('attn.c_proj', 'attn.o_proj'), ('mlp.c_fc', 'mlp.up_proj'), ('mlp.c_proj', 'mlp.down_proj')): part = part.replace(a, b)
        if 'c_attn' in part:
            import torch
            value = torch.cat([ours[part.replace('c_attn', f'{x}_proj')] for x in 'qkv'])
        else: value = ours[part if part in ours else 'embed.weight']
        state[name] = value.T if value.dim() == 2 and part.startswith('blocks') else value
    theirs.load_state_dict(state)
    tok.save(tmp_path/'tokenizer.json')
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path/'tokenizer.json'), eos_token='<|endoftext|>', bos_token='<|endoftext|>')
    hf = HFLM(pretrained=theirs, tokenizer=fast, batch_size=4, device='cpu', max_length=c.max_seq_len)
    rows, texts = questions(docs), [{'text': docs[0].text}, {'text': docs[1].text}]
    (tmp_path/'a').mkdir(); (tmp_path/'b').mkdir()
    (a, nats_a), (b, nats_b) = lm_eval_numbers(B.as_lm_eval(model, tok), tmp_path/'a', rows, texts), lm_eval_numbers(hf, tmp_path/'b', rows, texts)
    print('largest difference', max(abs(x - y) for x, y in zip(nats_a, nats_b)), a, b)
    assert a == pytest.approx(b, rel=1e-5) and nats_a == pytest.approx(nats_b, abs=1e-4)
