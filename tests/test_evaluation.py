"Metrics against sacreBLEU, rouge_score, scipy and scikit-learn on random inputs, and properties that a notebook cell cannot hold."
import itertools
import math
import re
import string
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.evaluation import (ChoiceItem, bits_per_byte, bleu, bootstrap_interval, brier, contamination, encode_pair, evaluate_choices, exact_match,
                                   few_shot, fit_temperature, items_needed, lcs_length, loglikelihoods, mcnemar, n_windows, permutation_test, perplexity,
                                   reliability, rouge_l, token_f1, token_nats, tokenize_13a)
from llm_course.gpt import GPT, GPTConfig
from llm_course.pretraining import UniformModel
from llm_course.tokenization import BPETokenizer, CharTokenizer

few = settings(max_examples=80, deadline=None)
words = st.sampled_from(['the', 'The', 'cat', 'mat.', 'it,', '1,200', '3-4', "don't", 'x&amp;y', '(a)', 'é', '-', '"q"', 'end-\n', '<skipped>', '.5', 'a.b', '_', '٣.'])
sentence = st.lists(words, max_size=9).map(' '.join)


@few
@given(st.text(st.sampled_from('ab1٣ .,-_&;"\'()[]{}~!@\n\té'), max_size=40))
def test_13a_equals_sacrebleu(text):
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    assert tokenize_13a(text) == Tokenizer13a()(text.rstrip()).split()

@few
@given(st.data())
def test_bleu_equals_sacrebleu(data):
    import sacrebleu
    n, m = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    answers = data.draw(st.lists(sentence, min_size=n, max_size=n))
    refs = data.draw(st.lists(st.lists(sentence, min_size=m, max_size=m), min_size=n, max_size=n))
    for smooth in ('exp', 'none'):
        theirs = sacrebleu.corpus_bleu(answers, [list(r) for r in zip(*refs)], smooth_method=smooth)
        ours = bleu(answers, refs, smooth=smooth)
        assert ours.score == pytest.approx(theirs.score, abs=1e-9)
        assert (ours.length, ours.reference_length) == (theirs.sys_len, theirs.ref_len)
        assert ours.brevity_penalty == pytest.approx(theirs.bp, abs=1e-12)
        assert [100 * p for p in ours.precisions] == pytest.approx(theirs.precisions, abs=1e-9)

@few
@given(sentence, st.lists(sentence, min_size=1, max_size=3))
def test_rouge_l_equals_rouge_score(answer, references):
    from rouge_score.rouge_scorer import RougeScorer
    theirs = RougeScorer(['rougeL']).score_multi(references, answer)['rougeL']
    assert rouge_l(answer, references) == pytest.approx(tuple(theirs), abs=1e-12)

@few
@given(st.lists(st.integers(0, 4), max_size=90), st.lists(st.integers(0, 4), max_size=90))
def test_lcs_equals_the_table(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, j in itertools.product(range(len(a)), range(len(b))):
        table[i + 1, j + 1] = table[i, j] + 1 if a[i] == b[j] else max(table[i, j + 1], table[i + 1, j])
    assert lcs_length(a, b) == table[-1, -1] == lcs_length(b, a)

@few
@given(sentence, st.lists(sentence, min_size=1, max_size=3))
def test_answers_by_another_way(answer, references):
    def clean(t): return [w for w in re.split(r'\s+', re.sub(r'\b(a|an|the)\b', ' ', t.lower().translate(str.maketrans('', '', string.punctuation)))) if w]
    def f1(a, r):
        same = sum((Counter(a) & Counter(r)).values())
        if not a or not r: return float(a == r)
        if not same: return 0.
        precision, recall = same / len(a), same / len(r)
        return 2 * precision * recall / (precision + recall)
    assert token_f1(answer, references) == pytest.approx(max(f1(clean(answer), clean(r)) for r in references))
    assert exact_match(answer, references) == float(clean(answer) in [clean(r) for r in references])
    assert token_f1(answer, [answer]) == exact_match(answer, [answer]) == 1


tok = BPETokenizer.train(['the cat sat on the mat and the dog sat on the cat. ' * 5], vocab_size=272, special_tokens=('<|endoftext|>',))
model = GPT(GPTConfig(vocab_size=tok.vocab_size, max_seq_len=24, n_layer=2, n_head=2, d_model=16), seed=3)


def naive(ids, at):
    with torch.no_grad(): return -model(torch.tensor([ids[:at]]))[0][0, -1].log_softmax(-1)[ids[at]].item()

@settings(max_examples=40, deadline=None)
@given(st.data())
def test_sliding_window_is_the_naive_one(data):
    ids = data.draw(st.lists(st.integers(0, tok.vocab_size - 1), min_size=2, max_size=40))
    L = data.draw(st.integers(1, 24)); S = data.draw(st.integers(1, L)); B = data.draw(st.integers(1, 5))
    got = token_nats(model, ids, L, S, B)
    begin = [S * max(0, math.ceil((t - L) / S)) for t in range(1, len(ids))]
    assert got.tolist() == pytest.approx([naive(ids[b:t + 1], t - b) for b, t in zip(begin, range(1, len(ids)))], abs=1e-4)
    assert perplexity(model, ids, L, S, B) == pytest.approx(math.exp(got.mean()))
    assert n_windows(len(ids) - 1, L, S) == len(set(begin))

def test_token_files_and_small_types_are_read_as_they_are():
    ids = np.random.default_rng(0).integers(0, tok.vocab_size, 60).astype(np.uint16)
    assert torch.equal(token_nats(model, ids, 8), token_nats(model, ids.tolist(), 8, 4))

def test_dropout_is_off_and_comes_back():
    noisy = GPT(GPTConfig(vocab_size=tok.vocab_size, max_seq_len=24, n_layer=1, n_head=2, d_model=16, dropout=.5)).train()
    a, b = (token_nats(noisy, list(range(20)), 8) for _ in range(2))
    assert torch.equal(a, b) and noisy.training



@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text('the catsonmé \n.', max_size=9), st.sampled_from([' cat', ' the mat', ' é.', ' sat on'])), min_size=1, max_size=6), st.integers(1, 7))
def test_loglikelihoods_do_not_depend_on_company(pairs, batch_size):
    got = loglikelihoods(model, tok, pairs, batch_size=batch_size)
    for pair, s in zip(pairs, got):
        head, tail = encode_pair(tok, *pair)
        nats = [naive(head + tail, len(head) + i) for i in range(len(tail))]
        assert s.nats == pytest.approx(-sum(nats), abs=1e-3)
        assert (s.tokens, s.bytes) == (len(tail), len(pair[1].encode()))
        with torch.no_grad(): best = model(torch.tensor([head + tail]))[0][0].argmax(-1)
        assert s.greedy == all(best[len(head) - 1 + i] == t for i, t in enumerate(tail))

def test_choices_are_a_distribution_over_single_tokens():
    chars = CharTokenizer('abcd', special_tokens=('<|endoftext|>',))
    small = GPT(GPTConfig(vocab_size=5, max_seq_len=8, n_layer=1, n_head=1, d_model=8), seed=1)
    ends = loglikelihoods(small, chars, [('ab', c) for c in 'abcd'])
    with torch.no_grad(): rest = small(torch.tensor([chars.encode('ab')]))[0][0, -1].softmax(-1)[chars.special_tokens['<|endoftext|>']].item()
    assert sum(math.exp(s.nats) for s in ends) + rest == pytest.approx(1, abs=1e-5)
    assert sum(s.greedy for s in ends) <= 1

@few
@given(st.integers(0, 10**6), st.integers(0, 6), st.permutations(range(7)))
def test_few_shot_never_shows_the_answer_and_not_the_order_of_the_test(seed, shots, order):
    pool = [ChoiceItem(f'question {i}:', ('yes', f'secret {i}'), 1, str(i)) for i in range(7)]
    got = few_shot(pool[3], pool, shots, seed)
    assert 'secret 3' not in got.context and got.context.count('secret') == shots and got.context.endswith('question 3:')
    assert (got.choices, got.answer, got.name) == (pool[3].choices, 1, '3')
    in_order = {i: few_shot(pool[i], pool, shots, seed) for i in order}           # whatever was asked before, the prompt is the same
    assert in_order[3] == got and in_order == {i: few_shot(pool[i], pool, shots, seed) for i in range(7)}

def test_normalisation_by_characters_and_bytes_differ_where_they_should():
    items = [ChoiceItem('the', ('ééé', 'catsat'), 0)]
    r = evaluate_choices(UniformModel(tok.vocab_size), tok, items, 'characters')
    want = [[s.nats / n for s, n in zip(r.loglikelihoods[0], lengths)] for lengths in ((3, 6), (6, 6))]
    assert r.scores[0].tolist() == pytest.approx(want[0]) and r.by('bytes').scores[0].tolist() == pytest.approx(want[1])


probability = st.floats(0, 1) | st.sampled_from([0., .1, .2, .25, .5, .75, 1.])      # also on the edges of bins

@few
@given(st.lists(st.tuples(probability, st.booleans()), min_size=2, max_size=60), st.integers(1, 20))
def test_reliability_equals_sklearn(guesses, bins):
    from sklearn.calibration import calibration_curve
    p, y = np.array([g for g, _ in guesses]), np.array([float(t) for _, t in guesses])
    r = reliability(p, y, bins)
    assert r.count.sum() == len(p)
    by_hand = sum(abs(p[m].mean() - y[m].mean()) * m.sum() for b in range(bins)
                  if (m := ((p > r.edges[b]) | (b == 0)) & ((p <= r.edges[b + 1]) | (b == bins - 1))).any()) / len(p)
    assert r.ece == pytest.approx(by_hand, abs=1e-12)
    if 0 < y.sum() < len(y):
        true, said = calibration_curve(y, p, n_bins=bins)
        full = r.count > 0
        assert r.accuracy[full] == pytest.approx(true) and r.confidence[full] == pytest.approx(said)

def test_brier_equals_sklearn_for_several_classes():
    from sklearn.metrics import brier_score_loss
    rng = np.random.default_rng(0)
    p, y = rng.dirichlet(np.ones(4), 50), rng.integers(0, 4, 50)
    assert brier(p, y) == pytest.approx(brier_score_loss(y, p, labels=range(4), scale_by_half=False))

@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(.3, 4))
def test_the_temperature_is_recovered(seed, T):
    from scipy.optimize import minimize_scalar
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(400, 5, generator=g, dtype=torch.float64) * 2
    y = torch.multinomial((z / T).softmax(-1), 1, generator=g)[:, 0]
    want = minimize_scalar(lambda log_t: torch.nn.functional.cross_entropy(z / math.exp(log_t), y).item(), bounds=(-3, 4), method='bounded', options={'xatol': 1e-9}).x
    assert math.log(fit_temperature(z, y)) == pytest.approx(want, abs=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=50), st.integers(0, 1000), st.sampled_from([.8, .95]))
def test_bootstrap_equals_scipy(values, seed, level):
    import scipy.stats
    theirs = scipy.stats.bootstrap((np.array(values),), np.mean, n_resamples=999, confidence_level=level, method='percentile', rng=np.random.default_rng(seed)).confidence_interval
    assert bootstrap_interval(values, 999, level, seed)[1:] == pytest.approx(tuple(theirs), abs=1e-9)

def test_blocks_of_the_bootstrap_are_one_stream():
    import scipy.stats
    values = np.random.default_rng(1).random(30_000)                  # 133 resamples a block
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=300, method='percentile', rng=np.random.default_rng(5)).confidence_interval
    assert bootstrap_interval(values, 300, seed=5)[1:] == pytest.approx(tuple(theirs), abs=1e-9)

def test_groups_of_one_are_no_groups_and_big_groups_weigh_more():
    values = np.random.default_rng(2).random(200)
    assert bootstrap_interval(values, groups=range(200)) == pytest.approx(bootstrap_interval(values))
    unequal = bootstrap_interval([1.] * 90 + [0.] * 10, groups=[0] * 90 + list(range(1, 11)))
    assert unequal.mean == pytest.approx(.9) and (unequal.low, unequal.high) == (0, pytest.approx(1, abs=.1))

@few
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_equals_scipy(pairs):
    import scipy.stats
    a, b = np.array(pairs, float).T
    won, lost = int((a > b).sum()), int((a < b).sum())
    assert mcnemar(a, b) == pytest.approx(scipy.stats.binomtest(won, won + lost).pvalue if won + lost else 1)
    assert mcnemar(a, b) == mcnemar(b, a)
    if 2**(won + lost) <= 10_000: assert permutation_test(a, b) == pytest.approx(mcnemar(a, b))

@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=9))
def test_exact_permutations_equal_scipy(pairs):
    import scipy.stats
    a, b = np.array(pairs, float).T
    theirs = scipy.stats.permutation_test((a, b), lambda x, y, axis: (x - y).sum(axis), permutation_type='samples', vectorized=True).pvalue
    assert permutation_test(a, b) == pytest.approx(theirs)

def test_false_alarms_are_as_rare_as_promised():
    rng = np.random.default_rng(0)
    p = [permutation_test(*(rng.random((2, 40)) < .6).astype(float), n=400, seed=s) for s in range(400)]
    assert np.mean(np.array(p) < .05) < .08

def test_items_needed_is_monotone_and_symmetric():
    sizes = [items_needed(.6, d) for d in (.01, .02, .05, .2)]
    assert sizes == sorted(sizes, reverse=True) and items_needed(.6, .1) == items_needed(.7, -.1)
    assert items_needed(.6, .1, disagree=.2) < items_needed(.6, .1)


@few
@given(st.data())
def test_contamination_equals_the_naive_search(data):
    text = st.lists(st.sampled_from('abc'), max_size=14).map(' '.join)
    texts, docs, n = data.draw(st.lists(text, max_size=4)), data.draw(st.lists(text, max_size=4)), data.draw(st.integers(1, 5))
    known = {tuple(w[i:i + n]) for w in map(str.split, docs) for i in range(len(w) - n + 1)}
    got = contamination(texts, docs, n)
    want = {}
    for i, w in enumerate(map(str.split, texts)):
        covered = {k for p in range(len(w) - n + 1) if tuple(w[p:p + n]) in known for k in range(p, p + n)}
        if covered: want[i] = covered
    assert {l.item: {k for a, b in l.spans for k in range(a, b)} for l in got.leaks} == want
    assert all(l.share == pytest.approx(len(want[l.item]) / len(texts[l.item].split())) for l in got.leaks)
    assert list(got.unchecked) == [i for i, w in enumerate(texts) if len(w.split()) < n]

def test_memory_of_the_search_does_not_grow_with_the_training_text():
    def docs(n):
        rng = np.random.default_rng(0)
        for _ in range(n): yield ' '.join(f'w{i}' for i in rng.integers(0, 5000, 400))
    exam = [' '.join(f'w{i}' for i in np.random.default_rng(9).integers(0, 5000, 60)) for _ in range(20)]
    peaks = []
    contamination(exam, docs(40))                                   # fills the cache of words
    for n in (40, 400):
        tracemalloc.start(); contamination(exam, docs(n)); peaks.append(tracemalloc.get_traced_memory()[1]); tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 200_000

def test_one_hash_for_two_runs_is_no_leak(monkeypatch):
    import llm_course.evaluation as e
    monkeypatch.setattr(e, 'word_hashes', lambda text: np.full(len(text.split()), 7, np.uint64))
    assert contamination(['a b c d'], ['e f g h i'], n=3).leaks == ()
    assert len(contamination(['a b c d'], ['x b c d'], n=3).leaks) == 1

def test_bits_per_byte_of_a_fair_coin(): assert bits_per_byte(80 * math.log(2), 10) == pytest.approx(8)
