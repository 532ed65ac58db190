"Chapter 09b, what a cell cannot hold: every size and place (hypothesis), writers and training runs that are killed, Ctrl-C."
import gc, itertools, os, pickle, signal, subprocess, sys, tempfile, threading, time
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st

from llm_course.streaming import (BatchStream, CutRows, PackedRows, RandomOrder, StreamingBatches, buffer_shuffle, check_batches, document_mask,
                                  document_spans, open_shards, pack_best_fit, write_shards)

ROOT = Path(__file__).parents[1]
few = settings(max_examples=25, deadline=None)

@dataclass
class Tok:
    "What shards need from a tokenizer; id 0 ends a document."
    vocab_size: int = 1000
    fingerprint: str = '0123456789abcdef'
    special_tokens: dict = field(default_factory=lambda: {'<|endoftext|>': 0})
    def decode_bytes(self, ids): return b'x' * len(ids)

texts = st.lists(st.lists(st.integers(1, 999), max_size=12).map(lambda d: [*d, 0]), min_size=1, max_size=30)

def batches_of(rows, k, **options):
    "The first k batches, bit for bit, and the object."
    b = StreamingBatches(rows, **options)
    return [next(b) for _ in range(k)], b

def same(a, b):
    def flat(batch): return [*batch[:2], *(batch[2][k] for k in sorted(batch[2]))] if len(batch) == 3 else list(batch)
    return len(a) == len(b) and all(len(x) == len(y) and all(torch.equal(s, t) for s, t in zip(flat(x), flat(y))) for x, y in zip(a, b))

# --- the order

@given(n=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 10**9), rounds=st.integers(1, 8))
@settings(max_examples=150, deadline=None)
def test_the_cipher_visits_each_once(n, seed, epoch, rounds):
    assert np.array_equal(np.sort(RandomOrder(n, (seed, epoch), rounds)(np.arange(n))), np.arange(n))

@given(n=st.integers(10**6, 2**62), at=st.integers(0, 10**6 - 300))
@few
def test_the_cipher_of_a_huge_corpus_stays_inside_and_collides_nowhere(n, at):
    got = RandomOrder(n, 5)(np.arange(at, at + 300))
    assert len(set(got.tolist())) == 300 and got.min() >= 0 and got.max() < n

def test_positions_keep_their_shape_and_do_not_depend_on_company():
    order = RandomOrder(777, (1, 2))
    together = order(np.arange(777).reshape(7, 111))
    assert together.shape == (7, 111) and [int(order(np.array([i]))[0]) for i in range(777)] == together.ravel().tolist()

@given(n=st.integers(0, 200), size=st.integers(1, 50), seed=st.integers(0, 99))
@few
def test_a_buffer_loses_nothing_and_lets_nothing_out_too_early(n, size, seed):
    out = list(buffer_shuffle(range(n), size, seed))
    assert sorted(out) == list(range(n)) and all(item - place < size for place, item in enumerate(out))

# --- shards

@given(docs=texts, shard_tokens=st.integers(1, 60), data=st.data())
@few
def test_shards_are_the_joined_stream_however_often_the_writer_died(docs, shard_tokens, data):
    stream = [i for d in docs for i in d]
    with tempfile.TemporaryDirectory() as tmp:
        whole = write_shards(f'{tmp}/whole', docs, Tok(), shard_tokens)
        assert whole[:].tolist() == stream and whole.n_documents == len(docs)
        a, b = sorted(data.draw(st.tuples(*[st.integers(-len(stream), len(stream))] * 2)))
        assert whole[a:b].tolist() == stream[a:b] and whole[a % len(stream)] == stream[a % len(stream)]
        for stop in sorted(data.draw(st.lists(st.integers(0, len(docs)), max_size=3))):
            def dying(start):
                yield from docs[start:stop]
                raise ConnectionError
            with pytest.raises(ConnectionError): write_shards(f'{tmp}/killed', dying, Tok(), shard_tokens)
        again = write_shards(f'{tmp}/killed', docs, Tok(), shard_tokens)
        assert [f.path.read_bytes() for f in again.files] == [f.path.read_bytes() for f in whole.files]
        assert again.sha256 == whole.sha256 and not list(Path(tmp, 'killed').glob('.*'))

def start(script, *args):
    return subprocess.Popen([sys.executable, '-c', script, *map(str, args)], text=True, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, 'PYTHONPATH': f'{ROOT}:{ROOT}/tests', 'OMP_NUM_THREADS': '1'})

WRITER = '''
import sys, time
from test_streaming import Tok
from llm_course.streaming import write_shards
def documents(start):
    for i in range(start, 120):
        time.sleep(float(sys.argv[2])); yield [1 + i % 900] * 500 + [0]
write_shards(sys.argv[1], documents, Tok(), 2000)
'''

@pytest.mark.skipif(sys.platform == 'win32', reason='no SIGKILL')
def test_kill_9_while_writing_shards(tmp_path):
    writer = start(WRITER, tmp_path/'s', .01)
    limit = time.time() + 60
    while len(list((tmp_path/'s').glob('shard-*.bin'))) < 3:
        assert writer.poll() is None and time.time() < limit, writer.stderr.read() if writer.poll() is not None else 'it did not begin'
        time.sleep(.01)
    writer.kill(); writer.communicate()
    with pytest.raises(ValueError, match='never finished'): open_shards(tmp_path/'s')
    documents = lambda start: ([1 + i % 900] * 500 + [0] for i in range(start, 120))
    a, b = (write_shards(tmp_path/name, documents, Tok(), 2000) for name in ('s', 'whole'))
    assert [f.path.read_bytes() for f in a.files] == [f.path.read_bytes() for f in b.files] and a.sha256 == b.sha256

def test_another_process_gets_the_files_not_their_content(tmp_path):
    shards = write_shards(tmp_path/'s', [[i % 999 + 1] * 1000 + [0] for i in range(200)], Tok(), 50_000)
    stream = BatchStream(StreamingBatches(CutRows(shards, 32), 4, workers=0))
    sent = pickle.dumps(stream)                                          # what DataLoader does where processes are not forked
    assert len(sent) < 20_000
    assert same(list(itertools.islice(pickle.loads(sent), 5)), list(itertools.islice(stream, 5)))

# --- packing

@given(lengths=st.lists(st.integers(1, 40), max_size=80), capacity=st.integers(40, 64))
@few
def test_packing_loses_nothing_and_never_opens_a_row_in_vain(lengths, capacity):
    rows = pack_best_fit(lengths, capacity)
    used = sorted(sum(lengths[i] for i in row) for row in rows)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths))) and all(u <= capacity for u in used)
    assert len(used) < 2 or used[0] + used[1] > capacity                 # else the two would be one row

@given(docs=texts, T=st.integers(2, 16))
@few
def test_packed_rows_show_each_target_once_and_cross_no_border(docs, T):
    stream = np.array([i for d in docs for i in d])
    rows = PackedRows(stream, T, end_id=0)
    assert np.array_equal(np.diff(document_spans(stream, 0, block=7)).ravel(), [len(d) for d in docs])
    x, y, positions, documents = rows.batch(np.arange(len(rows)))
    assert sorted(y[y >= 0].tolist()) == sorted(i for d in docs for i in d[1:])
    assert sorted(x[documents >= 0].tolist()) == sorted(stream.tolist())
    if (y != -100).any(): assert check_batches([(x, y, {'mask': document_mask(documents), 'positions': positions})], 1, end_id=0, repeats=1.) == len(rows)

# --- batches

kinds = st.sampled_from([CutRows(np.arange(1, 400), 7), CutRows(np.arange(30), 9), PackedRows(np.arange(300) % 11, 16, end_id=0)])

@given(rows=kinds, B=st.integers(1, 5), ranks=st.integers(1, 4), seed=st.integers(0, 9), shuffle=st.booleans())
@few
def test_ranks_together_are_one_rank_and_an_epoch_shows_no_row_twice(rows, B, ranks, seed, shuffle):
    k = -(-len(rows) // (B * ranks)) + 2
    whole, _ = batches_of(rows, k, batch_size=B * ranks, seed=seed, shuffle=shuffle, workers=0)
    parts = [batches_of(rows, k, batch_size=B, seed=seed, shuffle=shuffle, rank=r, ranks=ranks, workers=0)[0] for r in range(ranks)]
    for i in range(k): assert torch.equal(torch.cat([p[i][0] for p in parts]), whole[i][0]) and torch.equal(torch.cat([p[i][1] for p in parts]), whole[i][1])
    epoch = torch.cat([b[0] for b in whole])[:len(rows)].tolist()
    once = rows.batch(np.arange(len(rows)), 0)[0].tolist()
    if isinstance(rows, PackedRows): assert sorted(epoch) == sorted(once)
    else: assert len(set(map(tuple, epoch))) == len(rows)

@given(rows=kinds, before=st.integers(0, 40), workers=st.tuples(st.integers(0, 3), st.integers(0, 3)), prefetch=st.integers(1, 3),
       split=st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 4), (4, 2), (4, 1)]))
@few
def test_resumed_anywhere_with_other_workers_and_ranks(rows, before, workers, prefetch, split):
    old, new = split
    want, _ = batches_of(rows, before + 6, batch_size=4, seed=2, workers=0)
    _, first = batches_of(rows, before, batch_size=4 // old, seed=2, workers=workers[0], prefetch=prefetch, rank=old - 1, ranks=old)
    state = first.state_dict(); first.close()
    assert all(type(v) is int for v in state.values())
    parts = []
    for r in range(new):
        with StreamingBatches(rows, 4 // new, seed=2, workers=workers[1], rank=r, ranks=new) as b:
            for _ in range(before % 3): next(b)                          # it was somewhere else
            b.load_state_dict(state)
            parts.append([next(b) for _ in range(6)])
    for i in range(6): assert torch.equal(torch.cat([p[i][1] for p in parts]), want[before + i][1])
    if new == 1: assert same(parts[0], want[before:])

def test_no_thread_is_left_when_the_last_reference_goes():
    def count(): return sum(t.name.startswith('batches') for t in threading.enumerate())
    before, b = count(), StreamingBatches(CutRows(np.arange(1000), 8), 4, workers=3)
    next(b); assert count() > before
    del b; gc.collect()
    limit = time.time() + 10
    while count() > before and time.time() < limit: time.sleep(.01)
    assert count() == before

@pytest.mark.skipif(sys.platform == 'win32', reason='signals differ')
def test_ctrl_c_ends_a_process_that_waits_for_a_slow_worker():
    process = start('import numpy as np, time\nfrom llm_course.streaming import CutRows, StreamingBatches\n'
                    'class Slow(CutRows):\n    def batch(self, rows, shift=0): time.sleep(.4); return super().batch(rows, shift)\n'
                    'b = StreamingBatches(Slow(np.arange(1000), 8), 4, workers=2); print("go", flush=True)\nwhile True: next(b)')
    assert process.stdout.readline() == 'go\n'
    time.sleep(.6); began = time.time(); process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode != 0 and 'KeyboardInterrupt' in err and time.time() - began < 5

# --- a training run that is killed

TRAIN = '''
import json, sys, time
import numpy as np, torch
from llm_course.gpt import GPT, GPTConfig
from llm_course.pretraining import TrainConfig, Trainer
from llm_course.streaming import PackedRows, StreamingBatches, open_shards
from test_streaming import Tok
torch.set_num_threads(1)                                                  # the order of sums depends on it
shards, folder, steps, workers = open_shards(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
model = GPT(GPTConfig(vocab_size=1000, max_seq_len=16, n_layer=1, n_head=2, d_model=16, dropout=.1), seed=0)
config = TrainConfig(max_steps=steps, batch_size=4, eval_every=steps, eval_batches=1, checkpoint_every=4, keep_checkpoints=2)
with StreamingBatches(PackedRows(shards, 16, 0), 4, seed=1, workers=workers) as batches:
    run = Trainer(model, shards, np.arange(1, 200), config, folder, batches=batches)
    run.resume()
    run.fit(progress=False, on_step=lambda t, r: (print(r['step'], flush=True), time.sleep(.01)))
'''

def corpus(folder):
    g = np.random.default_rng(0)
    return write_shards(folder, [[*g.integers(1, 1000, size=g.integers(1, 30)).tolist(), 0] for _ in range(200)], Tok(), 500)

def losses(folder):
    from llm_course.pretraining import read_log
    return [(r['step'], r['loss']) for r in read_log(folder/'log.jsonl') if 'loss' in r]

def train_with_kills(folder, shards, steps, kills, seed=0):
    "Kill after a random number of further steps, with a random number of workers; then let it finish. Returns the steps at which it was killed."
    g, at = np.random.default_rng(seed), []
    for _ in range(kills):
        run = start(TRAIN, shards, folder, steps, int(g.integers(1, 4)))
        left = int(g.integers(1, 12))
        for line in run.stdout:
            left -= 1
            if left == 0 or int(line) >= steps - 4: break
        run.kill(); at.append(int(line)); run.communicate()
    run = start(TRAIN, shards, folder, steps, 2)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    return at

@pytest.mark.skipif(sys.platform == 'win32', reason='no SIGKILL')
def test_kill_9_and_resume_of_a_training_run_with_two_workers(tmp_path):
    corpus(tmp_path/'shards')
    threads = torch.get_num_threads()
    with patch.object(sys, 'argv', ['train', str(tmp_path/'shards'), str(tmp_path/'whole'), '24', '0']): exec(TRAIN, {})    # never killed, no workers
    torch.set_num_threads(threads)
    at = train_with_kills(tmp_path/'killed', tmp_path/'shards', 24, 1, seed=3)
    assert 0 < at[0] < 24 and len(losses(tmp_path/'whole')) == 24
    assert losses(tmp_path/'killed') == losses(tmp_path/'whole')
