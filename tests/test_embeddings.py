"Word vectors on any text: equal to loops, the same in every process, and quick with lines that have no end."
import os
import pickle
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.embeddings import (
    GloVeConfig,
    Vocab,
    Word2VecConfig,
    WordVectors,
    bootstrap_interval,
    cooccurrence,
    glove,
    pair_ranks,
    ppmi,
    sentences,
    train_word2vec,
    without_pairs,
)

WORDS = st.sampled_from(['a', 'b', 'c', 'd', 'e'])
TEXTS = st.lists(st.lists(WORDS, min_size=2, max_size=7), min_size=1, max_size=6)

def loop_counts(text, window, by_distance):
    counts = {}
    for words in text:
        for i, a in enumerate(words):
            for j, b in enumerate(words):
                if i != j and abs(i - j) <= window: counts[a, b] = counts.get((a, b), 0) + (1 / abs(i - j) if by_distance else 1)
    return counts


@settings(deadline=None, max_examples=100)
@given(TEXTS, st.integers(1, 8), st.booleans())
def test_cooccurrence_equals_the_loop(text, window, by_distance):
    vocab = Vocab({w: 1 for w in 'abcde'}, min_count=1)
    got = cooccurrence(vocab.encode(text), len(vocab), window, by_distance).to_dense()
    want = torch.zeros(5, 5)
    for (a, b), n in loop_counts(text, window, by_distance).items(): want[vocab.index[a], vocab.index[b]] = n
    torch.testing.assert_close(got, want)

@settings(deadline=None, max_examples=100)
@given(TEXTS, st.lists(st.tuples(WORDS, WORDS).filter(lambda p: p[0] != p[1]), max_size=3))
def test_held_out_pairs_never_meet_and_nothing_else_is_lost(text, pairs):
    left = without_pairs(text, pairs)
    meets = [any(a in words and b in words for a, b in pairs) for words in text]
    assert left == [words for words, m in zip(text, meets) if not m]

@settings(deadline=None, max_examples=200)
@given(st.text())
def test_sentences_of_any_text_are_words_in_lower_case(text):
    for words in sentences(text):
        assert len(words) > 1 and all(w and not any(c.isspace() or c.isdigit() for c in w) for w in words)

@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6))
def test_ranks_equal_a_sort(seed):
    v = WordVectors([f'w{i}' for i in range(12)], torch.randn(12, 3, generator=torch.Generator().manual_seed(seed)))
    order = [w for w, _ in v.nearest('w3', 11)]
    assert pair_ranks(v, [('w3', 'w8')])[0][0, 0] == order.index('w8') + 1

def test_ppmi_of_independent_words_is_empty():
    counts = torch.outer(torch.tensor([1., 2, 3]), torch.tensor([1., 2, 3])).to_sparse().coalesce()
    assert ppmi(counts, context_power=1, shift=1.001).values().numel() == 0

def test_glove_is_the_equation_with_biases_and_adagrad_by_row():
    c = GloVeConfig(dim=2, epochs=3, batch=100, x_max=3.)
    counts = torch.tensor([[0., 4, 1], [4, 0, 2], [1, 2, 0]]).to_sparse().coalesce()
    (row, column), n = counts.indices(), counts.values()
    g = torch.Generator().manual_seed(c.seed)
    x, y = ((torch.rand(3, c.dim + 2, generator=g) - .5) / c.dim for _ in range(2))
    parts = [x[:, :2].clone(), x[:, 2].clone(), y[:, :2].clone(), y[:, 3].clone()]          # vectors and biases, twice
    spent = [torch.full((3,), .1) for _ in range(2)]
    for _ in range(c.epochs):
        w, b, v, d = parts = [p.detach().requires_grad_() for p in parts]
        error = (w[row] * v[column]).sum(1) + b[row] + d[column] - n.log()
        ((n / c.x_max).clamp(max=1) ** c.power * error ** 2).sum().backward()
        slope = 2 * (n / c.x_max).clamp(max=1) ** c.power * error.detach()                     # of each cell
        for s, where, other in zip(spent, (row, column), (v[column], w[row])):
            cells = torch.cat((other.detach(), torch.ones(len(n), 1)), 1) * slope[:, None]
            s.index_add_(0, where, cells.square().sum(1) / (c.dim + 2))
        rates = [c.lr / s.sqrt() for s in spent]
        parts = [p.detach() - rates[i // 2].view(-1, *[1] * (p.dim() - 1)) * p.grad for i, p in enumerate(parts)]
    torch.testing.assert_close(glove(counts, ['a', 'b', 'c'], c).vectors, parts[0] + parts[2])

def test_a_bootstrap_is_repeatable_and_as_wide_as_the_normal_interval():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    mean, low, high = bootstrap_interval(values)
    assert bootstrap_interval(values) == (mean, low, high)
    assert abs((high - low) / (2 * 1.96 * float(values.std()) / 20) - 1) < .1

@pytest.mark.parametrize('line', ['x' * 5_000_000, "a'" * 2_500_000, 'word ' * 1_000_000, '.' * 5_000_000, '\n ' * 2_500_000], ids=['letters', 'apostrophes', 'words', 'stops', 'blanks'])
def test_a_line_without_end(line):
    start = time.perf_counter()
    found = list(sentences(line))
    assert time.perf_counter() - start < 20 and sum(map(len, found)) in (0, 1_000_000, 1_250_000)

def test_a_pickle_is_refused(tmp_path):
    path = tmp_path/'vectors.safetensors'
    path.write_bytes(pickle.dumps({'words': ['a', 'b']}))
    with pytest.raises(ValueError, match='or is damaged'): WordVectors.load(path)

def test_vectors_and_losses_survive_the_file(tmp_path):
    text = [['ünter', 'den', 'linden'], ['den', 'linden', 'ünter']] * 20
    vocab = Vocab.from_sentences(text)
    v = train_word2vec(text, vocab, Word2VecConfig(dim=3, epochs=2))
    v.save(tmp_path/'v.safetensors')
    again = WordVectors.load(tmp_path/'v.safetensors')
    assert again.words == v.words and torch.equal(again.vectors, v.vectors) and torch.equal(again.outputs, v.outputs) and again.losses == v.losses

def test_threads_and_processes_do_not_change_the_vectors():
    code = '''
import hashlib, random, torch
from llm_course.embeddings import *
r = random.Random(0); text = [[f'w{min(r.randrange(50), r.randrange(50))}' for _ in range(8)] for _ in range(500)]
v = train_word2vec(text, Vocab.from_sentences(text), Word2VecConfig(dim=16, epochs=2))
print(hashlib.sha256(v.vectors.numpy().tobytes()).hexdigest(), torch.get_num_threads())
'''
    runs = [subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': n}) for n in ('1', '2')]
    assert all(r.returncode == 0 for r in runs), runs[0].stderr[-500:]
    (one, threads), (two, more) = (r.stdout.split() for r in runs)
    assert one == two and (threads, more) == ('1', '2')               # the trainer gives back the threads it found
