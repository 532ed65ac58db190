"""Loading SmolLM2-135M-Instruct and reading a prompt with it: ours and transformers, from the same GGUF file and from the same
folder, which `save_hf` writes.

Each load happens in a process of its own, after the libraries were imported; the sides take turns, and medians over the rounds
are reported. Peak memory is what the process held beyond that moment, divided by the bytes of the weights. Then both models
read the same 512 tokens, in turns in one process.
"""
import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from llm_course.core import Budget, fetch_file, generator
from llm_course.huggingface import from_hf, save_hf
from llm_course.pretrained import load_gguf, load_pretrained

NOTE = ('Ours reads the tokenizer and the chat template with the model, transformers the model alone. Where the file has the dtype asked for, transformers maps it '
        'and reads a page of it when the page is used: neither its time nor its memory holds the weights then.')
NAME, SIDES = 'smollm2-135m-instruct', [(side, source) for source in ('gguf', 'folder') for side in ('llm_course', 'transformers')]

def load(side: str, source: str, folder: str, dtype: torch.dtype) -> nn.Module:
    "One side, one source."
    gguf = Path(fetch_file('smollm2-gguf'))
    if side == 'llm_course': return (load_gguf(gguf, dtype=dtype) if source == 'gguf' else from_hf(folder, dtype=dtype)).model
    from transformers import AutoModelForCausalLM
    if source == 'folder': return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)

def one_load(side: str, source: str, folder: str, dtype: str) -> None:
    "In a process of its own: seconds and peak bytes of one load, as JSON."
    if side == 'transformers':
        import transformers
        transformers.logging.disable_progress_bar()
        from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  imported before the clock starts
    with Budget('load') as budget:
        model = load(side, source, folder, getattr(torch, dtype))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    print(json.dumps({'seconds': budget.measured['seconds'], 'peak': budget.measured['memory'] / weights, 'weights': weights}))

def loads(folder: str, rounds: int) -> str:
    "The table of loading."
    found = {}
    for _ in range(rounds):
        for dtype in ('float32', 'bfloat16'):
            for side, source in SIDES:
                out = subprocess.run([sys.executable, __file__, '--load', side, source, folder, dtype], check=True, capture_output=True, text=True).stdout
                found.setdefault((dtype, source, side), []).append(json.loads(out.splitlines()[-1]))
    median = {k: {m: statistics.median(x[m] for x in v) for m in v[0]} for k, v in found.items()}
    rows = [f'| {dtype} | {source} | {side} | {m["seconds"]:.2f} | {median[dtype, source, "transformers"]["seconds"] / m["seconds"]:.2f} | {m["peak"]:.2f} |'
            for (dtype, source, side), m in median.items()]
    return '\n'.join(['| weights in | from | side | seconds | speed against transformers | peak memory / weights |', '|:--|:--|:--|--:|--:|--:|', *rows])

def reads(folder: str, rounds: int, n: int = 512) -> str:
    "The table of reading a prompt."
    ids = torch.randint(1000, 40_000, (1, n), generator=generator(0))
    ours, theirs = from_hf(folder).model, load('transformers', 'folder', folder, torch.float32).eval()
    sides = {'llm_course': lambda: ours(ids)[0], 'transformers': lambda: theirs(input_ids=ids, use_cache=False).logits}
    times = {k: [] for k in sides}
    with torch.inference_mode():
        gap = (sides['llm_course']() - sides['transformers']()).abs().max().item()          # also warms both up
        for _ in range(rounds):
            for k, f in sides.items():
                start = time.perf_counter(); f(); times[k].append(time.perf_counter() - start)
    rows = [f'| {k} | {n / statistics.median(t):,.0f} | {statistics.median(times["transformers"]) / statistics.median(t):.2f} |' for k, t in times.items()]
    return '\n'.join([f'| {n} tokens, float32 | tokens/s | speed against transformers |', '|:--|--:|--:|', *rows]) + f'\n\nLargest difference of the logits: {gap:.1e}'

def main() -> None:
    "Measure and print."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=5, help='how often the sides alternate (default 5)')
    parser.add_argument('--out', help='also write the tables to this file')
    parser.add_argument('--load', nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load: one_load(*args.load); return
    with tempfile.TemporaryDirectory() as folder:
        folder = str(save_hf(load_pretrained(NAME), None, Path(folder)/'model'))
        text = f'{args.rounds} rounds; {platform.machine()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}\n\n' + loads(folder, args.rounds) + f'\n\n{NOTE}\n\n' + reads(folder, args.rounds)
    print(text)
    if args.out: Path(args.out).write_text(text + '\n', encoding='utf-8')

if __name__ == '__main__': main()
