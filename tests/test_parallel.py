"Ranks as processes: every strategy against one process, ring collectives on three ranks, kill -9 and resume, torchrun, other numbers of ranks."
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from course import ROOT
from hypothesis import given, settings, strategies as st

from llm_course.gpt import GPT, GPTConfig
from llm_course.parallel import Ranks, RankError, _rows, bubble, main, pipeline_schedule
from llm_course.pretraining import TrainConfig, make_optimizer, read_log

COMMON = ['--steps', '20', '--batch-size', '8', '--checkpoint-every', '4', '--eval-every', '20', '--device', 'cpu', '--lr', '1e-3']
ENV = os.environ | {'OMP_NUM_THREADS': '1', 'TQDM_DISABLE': '1', 'PYTHONPATH': str(ROOT)}

def curve(log) -> list[dict]: return [{k: v for k, v in r.items() if k != 'seconds'} for r in log]

@pytest.fixture(scope='module')
def two():
    with Ranks(2, timeout=120) as pool: yield pool

def command(rank, ranks, argv): return main(argv)

def dies(rank, ranks, argv, at, who):
    def on_step(trainer, record):
        if record['step'] != at: return
        dist.barrier()                                                         # rank 0 has written the record before anybody dies
        if rank in who: os.kill(os.getpid(), 9)
    return main(argv, on_step)


def many(rank, ranks, gqa):   # runs in the namespace of llm_course.parallel
    "20 steps of each strategy on a model with grouped heads, gates, biases and LayerNorm, against one process: the largest difference of a weight."
    from llm_course.parallel import GradientBuckets, ZeroOptimizer, differing_parameters, shard_model, tensor_parallel, whole_model
    config = GPTConfig(vocab_size=37, max_seq_len=16, n_layer=2, n_head=4, n_kv_head=2, d_model=24, d_ff=64, norm='layernorm', bias=True, position='learned',
                       activation='swiglu', qk_norm=True, tie_embeddings=False, init_std=.1) if gqa else GPTConfig(vocab_size=37, max_seq_len=16, n_layer=1, n_head=2, d_model=16, activation='relu2', norm_position='sandwich')
    def batches():
        g = torch.Generator().manual_seed(0)
        for _ in range(20):
            xb, yb = torch.randint(37, (2, 6, 16), generator=g)
            yb[:3, 3:] = -100                                                  # rank 0 counts few
            yield xb, yb, (yb != -100).sum()
    def run(divide, gradients, wrap=lambda o: o):
        model = divide(GPT(config, seed=3))
        optimizer = wrap(make_optimizer(model, TrainConfig(lr=1e-3)))
        buckets = GradientBuckets(model, 1000) if gradients == 'buckets' else None
        for xb, yb, total in batches():
            if gradients != 'all': xb, yb = xb.chunk(ranks)[rank], yb.chunk(ranks)[rank]
            optimizer.zero_grad()
            scale = (yb != -100).sum() / total * (ranks if gradients == 'mean' else 1)
            (model(xb, yb)[1] * scale).backward()
            if buckets: buckets.finish()
            if gradients == 'reduce': optimizer.reduce()
            optimizer.step()
        assert differing_parameters(model) == []
        return torch.cat([p.detach().flatten() for p in whole_model(model).parameters()])
    same = lambda m: m
    want = run(same, 'all')
    kinds = {'ddp': (same, 'buckets'), 'zero1': (same, 'reduce', ZeroOptimizer), 'fsdp2': (shard_model, 'mean'), 'tp': (tensor_parallel, 'all')}
    return {k: (run(*how) - want).abs().max().item() for k, how in kinds.items()}

@pytest.mark.parametrize('gqa', (True, False))
def test_twenty_steps_equal_one_process(two, gqa):
    for result in two(many, gqa=gqa):
        assert max(result.values()) < 1e-5, result


def ring(rank, ranks):
    from llm_course.parallel import ring_all_reduce
    worst, sent = 0., []
    for n in (1, 2, 3, 10, 1001):
        t = torch.randn(n, generator=torch.Generator().manual_seed(10 * n + rank), dtype=torch.float64)
        want = t.clone()
        dist.all_reduce(want)
        sent.append(ring_all_reduce(t))
        worst = max(worst, (t - want).abs().max().item())
    return worst, sent

def test_a_ring_of_three_and_uneven_numbers():
    with Ranks(3, timeout=120) as three: results = three(ring)
    for worst, sent in results:
        assert worst < 1e-12
        assert sent == [8 * 4 * -(-n // 3) for n in (1, 2, 3, 10, 1001)]       # 2 (R - 1) parts of n / R numbers, rounded up


def test_a_rank_that_died_before_the_call(tmp_path):
    pool, folder = Ranks(1), tmp_path/'pool'
    folder.mkdir(); (folder/'0.log').write_text('out of memory')
    pool.folder, pool.processes = folder, [subprocess.Popen([sys.executable, '-c', ''], stdin=subprocess.PIPE, text=True)]
    pool.processes[0].wait()
    with pytest.raises(RankError, match='rank 0 of 1 ended with code 0: out of memory'): pool('def main(rank, ranks): return 1')
    assert pool.processes == [] and not folder.exists()


def test_kill_both_ranks_and_resume_bit_for_bit(two, tmp_path):
    ahead = ['--strategy', 'zero1', '--workers']                               # batches are prepared by threads, which die, too
    calm = two(command, argv=[*COMMON, '--folder', str(tmp_path/'calm'), *ahead, '1'])[0]
    argv = [*COMMON, '--folder', str(tmp_path/'rough'), *ahead, '2']
    with pytest.raises(RankError, match='ended with code -9'): two(dies, argv=argv, at=10, who=[0, 1])
    assert len(read_log(tmp_path/'rough/log.jsonl')) == 11
    assert curve(two(command, argv=[*argv, '--resume'])[0]) == curve(calm)


def test_torchrun_restarts_a_rank_that_was_killed(two, tmp_path):
    script = tmp_path/'fragile.py'
    script.write_text('import os\nfrom llm_course.parallel import main\n'
                      'def die_once(trainer, record):\n'
                      '    mark = trainer.folder/"died"\n'
                      '    if trainer.rank == 1 and record["step"] == 6 and not mark.exists(): mark.touch(); os.kill(os.getpid(), 9)\n'
                      'main(on_step=die_once)\n')
    run = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--local-addr', '127.0.0.1', '--nproc-per-node', '2', '--max-restarts', '1', script, *COMMON, '--folder', 'run'],
                         cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and (tmp_path/'run/died').exists(), run.stderr[-3000:]
    log = read_log(tmp_path/'run/log.jsonl')
    assert [r['step'] for r in log] == list(range(21))
    assert curve(log) == curve(two(command, argv=[*COMMON, '--folder', str(tmp_path/'calm')])[0])

def test_refusals_as_a_command(tmp_path):
    run = subprocess.run([sys.executable, '-m', 'llm_course.parallel', *COMMON, '--ranks', '2'], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=300)
    assert run.returncode != 0 and 'there are 1 ranks, and --ranks says 2: start with torchrun --nproc-per-node 2' in run.stderr


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.sampled_from(['gpipe', '1f1b']), st.floats(.1, 5), st.floats(.1, 5))
def test_pipeline(p, m, kind, forward, backward):
    tasks = pipeline_schedule(p, m, kind, forward, backward)
    assert len(tasks) == 2 * p * m
    at = {(t.stage, t.micro, t.backward): t for t in tasks}
    for t in tasks:
        before = at.get((t.stage + 1, t.micro, True) if t.backward else (t.stage - 1, t.micro, False))
        assert before is None or before.end <= t.start + 1e-9
        assert not t.backward or at[t.stage, t.micro, False].end <= t.start + 1e-9
    for s in range(p):
        own = sorted((t for t in tasks if t.stage == s), key=lambda t: t.start)
        assert all(a.end <= b.start + 1e-9 for a, b in zip(own, own[1:]))
    assert abs(bubble(tasks) - (p - 1) / (m + p - 1)) < 1e-6

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4))
def test_rows_are_dealt_once(ranks, each):
    B = ranks * each
    xb, mask, positions = torch.arange(B)[:, None].expand(B, 5), torch.arange(B).view(B, 1, 1, 1).expand(B, 1, 5, 5), torch.arange(B)[:, None].expand(B, 5)
    dealt = [_rows((xb, xb, {'mask': mask, 'positions': positions, 'scale': 2.}), r, ranks) for r in range(ranks)]
    assert torch.equal(torch.cat([d[0] for d in dealt]), xb)
    for x, y, more in dealt:
        assert torch.equal(x, y) and torch.equal(more['mask'][:, 0, 0, 0], x[:, 0]) and torch.equal(more['positions'], x) and more['scale'] == 2.
