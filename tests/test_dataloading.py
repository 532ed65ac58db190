"Chapter 09, what a cell cannot hold: dying writers, full disks, other processes, and streams of every shape."
import json, os, signal, subprocess, sys, tempfile, time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st

from llm_course.core import Document
from llm_course.dataloading import HEADER, Batches, open_tokens, split_documents, token_dtype, write_tokens

@dataclass
class Tok:
    "What a token file needs from a tokenizer: id i stands for i % 4 bytes."
    vocab_size: int = 1000
    fingerprint: str = '0123456789abcdef'
    special_tokens: dict = field(default_factory=dict)
    def decode_bytes(self, ids): return b''.join(b'x' * (i % 4) for i in ids)

def start(script, *args, **env):
    return subprocess.Popen([sys.executable, '-c', 'from tests.test_dataloading import Tok\n' + script, *map(str, args)], text=True,
                            cwd=Path(__file__).parents[1], env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def finish(process):
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out

# --- writers that die

def test_kill_9_while_writing_leaves_no_file(tmp_path):
    path = tmp_path/'tokens.bin'
    writer = start('import sys, time\nfrom llm_course.dataloading import write_tokens\n'
                   'def endless():\n    while True: yield [7] * 10_000; time.sleep(.002)\n'
                   'write_tokens(sys.argv[1], endless(), Tok())', path)
    limit = time.time() + 60
    while not (parts := [p for p in tmp_path.iterdir() if p.stat().st_size > 200_000]):
        assert writer.poll() is None and time.time() < limit, writer.stderr.read() if writer.poll() is not None else 'the writer did not begin'
        time.sleep(.01)
    writer.send_signal(signal.SIGKILL); writer.communicate()
    assert writer.returncode == -signal.SIGKILL
    assert not path.exists()
    with pytest.raises(ValueError, match='not a token file'): open_tokens(parts[0])   # nor does the half under its other name pass for one
    assert len(write_tokens(path, [[1, 2, 3]], Tok())) == 3                           # and the next writer is not disturbed

@pytest.mark.skipif(sys.platform == 'win32', reason='limits on the size of a file need Unix')
def test_disk_full_in_the_middle_keeps_the_old_file(tmp_path):
    path = tmp_path/'tokens.bin'
    write_tokens(path, [[1, 2, 3]], Tok())
    before = path.read_bytes()
    out = finish(start('import resource, signal, sys\nfrom llm_course.dataloading import write_tokens\n'
                       'signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n'
                       'try: write_tokens(sys.argv[1], ([7] * 10_000 for _ in range(50)), Tok())\n'
                       'except OSError as e: print(type(e).__name__, e.errno)', path))
    assert out.startswith('OSError')
    assert [p.name for p in tmp_path.iterdir()] == ['tokens.bin'] and path.read_bytes() == before

def test_an_open_file_survives_its_replacement(tmp_path):
    old = write_tokens(tmp_path/'t.bin', [list(range(1000))], Tok())
    write_tokens(tmp_path/'t.bin', [[5]], Tok())
    assert old.ids.tolist() == list(range(1000)) and len(open_tokens(tmp_path/'t.bin')) == 1

# --- round trips

documents = (st.integers(1, 70_000) | st.sampled_from([65_535, 65_536, 65_537])).flatmap(lambda v: st.tuples(st.just(v), st.lists(st.lists(st.integers(0, v - 1), max_size=30), max_size=8)))

@settings(max_examples=150, deadline=None)
@given(documents, st.sampled_from([list, np.array, torch.tensor]))
def test_what_was_written_is_what_is_read(case, kind):
    vocab_size, docs = case
    tok = Tok(vocab_size)
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp)/'t.bin'
        made = (kind(d) if d else [] for d in docs)
        if not any(docs):
            with pytest.raises(ValueError, match='no ids to write'): write_tokens(path, made, tok)
            assert not list(Path(tmp).iterdir())
            return
        write_tokens(path, made, tok)
        file = open_tokens(path, tok)
        flat = [i for d in docs for i in d]
        assert file.ids.tolist() == flat and file.ids.itemsize == token_dtype(vocab_size).itemsize == (2 if vocab_size <= 65_536 else 4)
        assert (len(file), file.n_documents, file.vocab_size) == (len(flat), len(docs), vocab_size)
        assert file.n_bytes == len(tok.decode_bytes(flat)) and path.stat().st_size == HEADER.size + file.ids.nbytes

@settings(max_examples=100, deadline=None)
@given(st.integers(0, 9), st.integers(-2**40, 2**40) | st.integers(0, 2**17), st.integers(1, 2**17))
def test_no_id_wraps(position, bad, vocab_size):
    ids = np.zeros(10, dtype=np.int64)
    ids[position] = bad
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp)/'t.bin'
        if 0 <= bad < vocab_size: assert write_tokens(path, [ids], Tok(vocab_size)).ids[position] == bad
        else:
            with pytest.raises(ValueError, match=f'id {bad} is not in'): write_tokens(path, [ids], Tok(vocab_size))
            assert not path.exists()

@settings(max_examples=100, deadline=None)
@given(st.integers(0, 83))
def test_a_file_cut_anywhere_is_refused(size):
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp)/'t.bin'
        write_tokens(path, [list(range(10))], Tok())
        os.truncate(path, size)
        with pytest.raises(ValueError, match='cut off'): open_tokens(path)

# --- batches

shapes = dict(n=st.integers(2, 300), T=st.integers(1, 40), B=st.integers(1, 12), seed=st.integers(0, 2**40))

def batches(n, T, B, seed, shuffle=True):
    T = min(T, n - 1)
    return Batches(np.arange(n), B, T, seed=seed, shuffle=shuffle), T

@settings(max_examples=150, deadline=None)
@given(**shapes, shuffle=st.booleans(), k=st.integers(0, 40), moved=st.integers(0, 5))
def test_resume_is_exact(n, T, B, seed, shuffle, k, moved):
    (whole, _), (first, _), (second, _) = (batches(n, T, B, seed, shuffle) for _ in range(3))
    sequence = [next(whole)[0] for _ in range(k + 12)]
    for _ in range(k): next(first)
    for _ in range(moved): next(second)                             # what it did before does not matter
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for want in sequence[k:]: assert torch.equal(next(second)[0], want)
    assert second.state_dict() == whole.state_dict()

@settings(max_examples=150, deadline=None)
@given(**shapes, epoch=st.integers(0, 2**40))
def test_an_epoch_shows_each_token_at_most_once_and_nearly_all(n, T, B, seed, epoch):
    loader, T = batches(n, T, B, seed)
    passed = list(loader.epoch(epoch))
    targets = torch.cat([yb.flatten() for _, yb in passed])
    assert len(passed) == loader.n_batches and all(torch.equal(xb + 1, yb) and xb.shape == yb.shape for xb, yb in passed)
    assert len(targets.unique()) == len(targets) > n - 2 * T

@settings(max_examples=100, deadline=None)
@given(**shapes)
def test_evaluation_sees_every_target_once_in_order(n, T, B, seed):
    loader, T = batches(n, T, B, seed, shuffle=False)
    passed = list(loader.epoch())
    assert torch.equal(torch.cat([yb.flatten() for _, yb in passed]), torch.arange(1, n)) and len(passed) == loader.n_batches

def test_endless_batches_are_the_epochs_one_after_the_other():
    loader, _ = batches(200, 7, 5, seed=3)
    rows = torch.cat([next(loader)[0] for _ in range(30)])
    passes = torch.cat([xb for e in range(6) for xb, _ in loader.epoch(e)])
    assert torch.equal(rows, passes[:len(rows)])

def test_another_process_draws_the_same(tmp_path):
    docs = [Document(f'd{i}', f'text {i}') for i in range(50)]
    script = ('import numpy as np, torch\nfrom llm_course.core import Document\nfrom llm_course.dataloading import Batches, split_documents\n'
              'torch.manual_seed(99)\nb = Batches(np.arange(500), 4, 9, seed=2)\n'
              'print([next(b)[0].tolist() for _ in range(30)])\n'
              'print([d.name for d in split_documents([Document(f"d{i}", f"text {i}") for i in range(50)], .2)[1]])')
    b = Batches(np.arange(500), 4, 9, seed=2)
    want = f'{[next(b)[0].tolist() for _ in range(30)]}\n{[d.name for d in split_documents(docs, .2)[1]]}\n'
    assert finish(start(script, PYTHONHASHSEED='7')) == want

@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=5), min_size=2, max_size=20), st.floats(.001, .999), st.integers(0, 1000))
def test_a_split_loses_nothing_and_leaves_something_on_each_side(names, fraction, seed):
    docs = [Document(n, str(i)) for i, n in enumerate(names)]
    train, val = split_documents(docs, fraction, seed)
    assert train and val and sorted(train + val) == sorted(docs)
