"""The time of a training step: our `Trainer` with the preset course-tiny, the same model in a bare loop, and the plain
AdamW GPT-2 recipe (LayerNorm, GELU, learned positions) of the same depth, width and context, in ours and in transformers.

The sides alternate in one run, block by block; medians over all steps and ratios within the run are reported. Then the parts
of a step that are neither model nor optimizer (drawing the batch, writing the log), and the memory of our trainer and of the
bare loop, each in a process of its own.
"""
import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from llm_course.core import Budget, generator
from llm_course.dataloading import Batches
from llm_course.gpt import GPT, GPTConfig
from llm_course.pretraining import RunLog, TrainConfig, Trainer, make_optimizer

VOCAB, CONTEXT = 2048, 128


def trainer_side(tokens, batch: int) -> tuple[Callable[[], None], torch.nn.Module]:
    "Our trainer with everything it does in a step: schedule, data, clipping, log."
    trainer = Trainer(GPT(GPTConfig.from_name('course-tiny')), tokens, tokens, TrainConfig(max_steps=10**6, batch_size=batch), tempfile.mkdtemp())
    log = RunLog(trainer.folder)
    return lambda: log.write(trainer.train_step()), trainer.model

def bare_side(model: torch.nn.Module, logits: Callable, tokens, batch: int, fused: bool) -> tuple[Callable[[], None], torch.nn.Module]:
    "Forward, backward, clip, AdamW, and nothing else."
    batches = Batches(tokens, batch, CONTEXT)
    optimizer = make_optimizer(model, TrainConfig()) if fused else torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=.1)
    def step() -> None:
        xb, yb = next(batches)
        loss = F.cross_entropy(logits(model, xb).flatten(0, 1), yb.flatten())
        optimizer.zero_grad(); loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step(); loss.item()
    return step, model

def sides(tokens, batch: int) -> dict[str, tuple[Callable[[], None], torch.nn.Module]]:
    "The four sides of the comparison."
    from transformers import GPT2Config, GPT2LMHeadModel
    gpt2 = GPTConfig.from_name('gpt2', vocab_size=VOCAB, max_seq_len=CONTEXT, n_layer=4, n_head=4, d_model=128)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=128, n_layer=4, n_head=4, attn_pdrop=0, embd_pdrop=0,
                                        resid_pdrop=0, bos_token_id=0, eos_token_id=0))
    ours = lambda m, x: m(x)[0]
    return {'llm_course Trainer, course-tiny': trainer_side(tokens, batch),
            'bare loop, course-tiny': bare_side(GPT(GPTConfig.from_name('course-tiny')), ours, tokens, batch, True),
            'bare loop, GPT-2 recipe in llm_course': bare_side(GPT(gpt2), ours, tokens, batch, False),
            'bare loop, GPT-2 recipe in transformers': bare_side(theirs.train(), lambda m, x: m(input_ids=x, use_cache=False).logits, tokens, batch, False)}

def table(times: dict[str, list[float]], models: dict[str, torch.nn.Module], batch: int) -> str:
    "A Markdown table of medians; ratios are to the last row."
    median = {k: statistics.median(v) for k, v in times.items()}
    reference = list(median.values())[-1]
    rows = [f'| {k} | {sum(p.numel() for p in models[k].parameters()):,} | {1e3 * t:.1f} | {batch * CONTEXT / t:,.0f} | {reference / t:.2f} |' for k, t in median.items()]
    return '\n'.join(['| side | parameters | ms a step | tokens/s | speed against the last row |', '|:--|--:|--:|--:|--:|', *rows])

def parts(tokens, batch: int, rounds: int, step_seconds: float) -> str:
    "A table of what a step costs besides the model: the batch and the log, with TensorBoard."
    trainer = Trainer(GPT(GPTConfig.from_name('course-tiny')), tokens, tokens, TrainConfig(max_steps=10**6, batch_size=batch), tempfile.mkdtemp())
    log, record = RunLog(trainer.folder), trainer.train_step() | {'seconds': 1.}
    def median_ms(f: Callable[[], object]) -> float:
        times = []
        for _ in range(20 * rounds):
            start = time.perf_counter(); f(); times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    found = {'drawing the batch': median_ms(lambda: next(trainer.batches)), 'writing the log': median_ms(lambda: log.write(record))}
    rows = [f'| {name} | {ms:.3f} | {ms / step_seconds / 10:.2f} % |' for name, ms in (found | {'both': sum(found.values())}).items()]
    return '\n'.join(['| part | ms | share of a step |', '|:--|--:|--:|', *rows])

def memory(side: str, batch: int) -> float:
    "Most memory in MB that a process held in 20 steps of one side, beyond what it held before the model was made."
    out = subprocess.run([sys.executable, __file__, '--memory', side, '--batch', str(batch)], check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])

def one_memory(side: str, batch: int) -> None:
    "In a process of its own: what `memory` asks for."
    tokens, config = torch.randint(VOCAB, (200_000,), generator=generator(0)).numpy(), GPTConfig.from_name('course-tiny')
    warm = GPT(GPTConfig.from_name('course-tiny', n_layer=1))
    warm(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64))[1].backward()       # libraries are loaded
    RunLog(tempfile.mkdtemp()).close()
    with Budget('memory') as budget:
        step, _ = trainer_side(tokens, batch) if side == 'trainer' else bare_side(GPT(config), lambda m, x: m(x)[0], tokens, batch, True)
        for _ in range(20): step()
    print(json.dumps(budget.measured['memory'] / 2**20))

def main() -> None:
    "Measure and print."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=8, help='how often the sides alternate (default 8)')
    parser.add_argument('--steps', type=int, default=5, help='steps of a side in a round (default 5)')
    parser.add_argument('--batch', type=int, default=8, help='rows of a batch (default 8)')
    parser.add_argument('--out', help='also write the table to this file')
    parser.add_argument('--memory', choices=('trainer', 'bare'), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory: one_memory(args.memory, args.batch); return
    tokens = torch.randint(VOCAB, (200_000,), generator=generator(0)).numpy()
    all_sides = sides(tokens, args.batch)
    times = {k: [] for k in all_sides}
    for i in range(args.rounds + 1):                       # the first round warms up and does not count
        for name, (step, _) in all_sides.items():
            for _ in range(args.steps):
                start = time.perf_counter(); step()
                if i: times[name].append(time.perf_counter() - start)
    text = (f'{args.rounds} rounds of {args.steps} steps, batch {args.batch} x {CONTEXT}, vocabulary {VOCAB}, float32; '
            f'{platform.machine()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}\n\n')
    text += table(times, {k: m for k, (_, m) in all_sides.items()}, args.batch)
    first = statistics.median(next(iter(times.values())))
    text += f'\n\n{parts(tokens, args.batch, args.rounds, first)}\n\n'
    taken = {side: statistics.median(memory(side, args.batch) for _ in range(3)) for side in ('trainer', 'bare')}
    text += f'Peak memory of 20 steps: Trainer {taken["trainer"]:.0f} MB, bare loop {taken["bare"]:.0f} MB, ratio {taken["trainer"] / taken["bare"]:.2f}'
    print(text)
    if args.out:
        with open(args.out, 'w', encoding='utf-8') as f: f.write(text + '\n')

if __name__ == '__main__': main()
