"""Our byte-level BPE beside `tokenizers` and `tiktoken`: one thread, the same text, the same vocabulary, by turns in one process.

    python benchmarks/bench_tokenizer.py --rounds 7 --out tokenizer.md

Training: 8,192 tokens on the complete works of Shakespeare with the GPT-2 pattern. Encoding: the whole text as one string, with the
vocabulary that ours has just learnt, given to `tokenizers` as our `tokenizer.json` and to `tiktoken` as ranks. "Cold" is the first
text that a new object sees, "warm" the same text again. In each round the sides take turns, and the order rotates from round to
round. All ids are compared: a side that gives other ids stops the program.
"""
import os

os.environ |= {'RAYON_NUM_THREADS': '1', 'TOKENIZERS_PARALLELISM': 'false'}     # before the import: one thread for everybody

import argparse, gc, platform, tempfile, time
from collections import defaultdict
from pathlib import Path
from statistics import median

import tiktoken, tokenizers

from llm_course.core import atomic_write, read_documents
from llm_course.tokenization import GPT2_PATTERN, BPETokenizer, load_tokenizer


def timed(fn, *args):
    gc.collect()
    start = time.perf_counter()
    result = fn(*args)
    return time.perf_counter() - start, result


def train_hf(texts, vocab_size):
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=['<|endoftext|>'], show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator(texts, trainer)
    return t


def encoders(path, ranks):
    "New objects, nothing cached: for each side a function from text to ids."
    ours, hf = load_tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    tik = tiktoken.Encoding('ours', pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return {'ours': ours.encode, 'tokenizers': lambda text: hf.encode_batch_fast([text])[0].ids, 'tiktoken': tik.encode_ordinary}


def one_round(n, texts, whole, vocab_size, seconds):
    "Every side does every task once; side number `n` begins."
    def in_turn(sides): names = list(sides); return names[n % len(names):] + names[:n % len(names)]
    trainers, trained = {'ours': lambda: BPETokenizer.train(texts, vocab_size), 'tokenizers': lambda: train_hf(texts, vocab_size)}, {}
    for side in in_turn(trainers):
        took, trained[side] = timed(trainers[side])
        seconds['train', side].append(took)
    assert trained['tokenizers'].get_vocab_size() == trained['ours'].vocab_size == vocab_size
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/'tokenizer.json'
        trained['ours'].save(path)
        ranks = {trained['ours'].decode_bytes([i]): i for i in range(vocab_size - 1)}
        sides, ids = encoders(path, ranks), {}
    for task in ('encode, cold', 'encode, warm'):
        for side in in_turn(sides):
            took, ids[side] = timed(sides[side], whole)
            seconds[task, side].append(took)
        assert ids['ours'] == ids['tokenizers'] == ids['tiktoken'], 'the sides do not give the same ids'


def table(seconds, n_bytes, rounds):
    rows = ['| task | side | median | range | MB/s | ours is faster by |', '|:--|:--|--:|--:|--:|--:|']
    for (task, side), runs in seconds.items():
        m, ours = median(runs), median(seconds[task, 'ours'])
        ratio = '' if side == 'ours' else f'{m / ours:.2f} ×'
        rows.append(f'| {task} | {side} | {m:.3f} s | {min(runs):.3f} to {max(runs):.3f} | {n_bytes / m / 1e6:.1f} | {ratio} |')
    about = (f'{rounds} rounds, one thread, {n_bytes / 1e6:.2f} MB of Shakespeare; Python {platform.python_version()}, tokenizers {tokenizers.__version__}, '
             f'tiktoken {tiktoken.__version__}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}. '
             'A ratio under 1 means that ours is slower. All sides gave the same ids.')
    return '\n'.join([*rows, '', about])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=5, help='how often each side does each task (default 5)')
    parser.add_argument('--vocab-size', type=int, default=8192, help='tokens to learn (default 8192)')
    parser.add_argument('--out', type=Path, help='also write the table to this Markdown file')
    args = parser.parse_args()
    if args.rounds < 1: parser.error(f'--rounds {args.rounds}: at least one round is needed')
    texts = [d.text for d in read_documents('shakespeare')]
    whole, seconds = ''.join(texts), defaultdict(list)
    for n in range(args.rounds): one_round(n, texts, whole, args.vocab_size, seconds)
    in_order = {(t, s): seconds[t, s] for t in ('train', 'encode, cold', 'encode, warm') for s in ('ours', 'tokenizers', 'tiktoken') if (t, s) in seconds}
    result = table(in_order, len(whole.encode()), args.rounds)
    print(result)
    if args.out:
        with atomic_write(args.out, 'w') as f: f.write(result + '\n')


if __name__ == '__main__': main()
