"The n-gram model against a slow dictionary version written from the formulas, at any vocabulary; damaged files; speed."
import math
import time
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.ngrams import SMOOTHINGS, NGramModel, byte_ids, nats_per_byte


def discounts(counts, modified):
    "Chen and Goodman (1998): what a count of 1, 2, and 3 or more loses."
    n = Counter(counts)
    if modified:
        if all(n[r] for r in (1, 2, 3)):
            Y = n[1] / (n[1] + 2 * n[2])
            d = [1 - 2 * Y * n[2] / n[1], 2 - 3 * Y * n[3] / n[2], 3 - 4 * Y * n[4] / n[3]]
            if all(0 < x <= r for r, x in enumerate(d, 1)): return d
        return [.5, 1., 1.5]
    return [n[1] / (n[1] + 2 * n[2]) if n[1] and n[2] else .5] * 3

def slow_prob(docs, order, V, smoothing, k, history, w):
    "One probability, from the definitions, recounting everything."
    def level(n):                                                     # context of n tokens -> {token: count}
        found = defaultdict(lambda: defaultdict(set if 'kneser' in smoothing and n < order - 1 else int))
        for d in docs:
            for t in range(n, len(d)):
                h = tuple(d[t - n:t])
                if 'kneser' in smoothing and n < order - 1: found[h][d[t]].add(d[t - n - 1] if t > n else None)
                else: found[h][d[t]] += 1
        return {h: {v: c if isinstance(c, int) else len(c) for v, c in row.items()} for h, row in found.items()}
    p = 1 / V
    for n in range(min(order - 1, len(history)) + 1):
        table = level(n)
        row = table.get(tuple(history[len(history) - n:]), {})
        c, total = row.get(w, 0), sum(row.values())
        if smoothing == 'add-k': p = (c + k) / (total + k * V)
        elif not total: continue
        elif smoothing == 'witten-bell': p = (c + len(row) * p) / (total + len(row))
        else:
            d = discounts([x for r in table.values() for x in r.values()], smoothing == 'modified-kneser-ney')
            p = (c - (d[min(c, 3) - 1] if c else 0) + sum(d[min(x, 3) - 1] for x in row.values()) * p) / total
    return p

documents = st.lists(st.lists(st.integers(0, 4), max_size=25), min_size=1, max_size=4).filter(any)

@settings(max_examples=120, deadline=None)
@given(documents, st.lists(st.integers(0, 5), min_size=1, max_size=8), st.integers(1, 6), st.sampled_from(SMOOTHINGS), st.sampled_from([6, 2**20, 2**31]))
def test_equal_to_the_definitions_at_any_vocabulary(docs, text, order, smoothing, V):
    far = [i * (V - 1) // 5 for i in range(6)]                         # the same documents with ids up to V - 1
    docs, text = [[far[w] for w in d] for d in docs], [far[w] for w in text]
    model = NGramModel(order, V, smoothing, k=.25).fit(docs)
    want = [math.log(slow_prob(docs, order, V, smoothing, .25, text[:t], w)) for t, w in enumerate(text)]
    assert np.allclose(model.log_prob(text), want, rtol=1e-10, atol=1e-10)

@settings(max_examples=80, deadline=None)
@given(documents, st.lists(st.integers(0, 5), max_size=8), st.integers(1, 5), st.sampled_from(SMOOTHINGS))
def test_every_distribution_sums_to_one_and_forbids_nothing(docs, context, order, smoothing):
    model = NGramModel(order, 6, smoothing).fit(docs)
    p = model.next_probs(context)
    assert abs(p.sum() - 1) < 1e-12 and p.min() > 0
    assert np.allclose(np.log(p), [model.log_prob(context + [w])[-1] for w in range(6)], rtol=1e-10, atol=1e-10)

@settings(max_examples=40, deadline=None)
@given(documents, st.randoms(use_true_random=False))
def test_the_order_of_documents_does_not_matter(docs, random):
    shuffled = random.sample(docs, len(docs))
    a, b = (NGramModel(4, 6).fit(d) for d in (docs, shuffled))
    text = [0, 1, 2, 3, 4, 5, 0, 1]
    assert a.n_grams == b.n_grams and np.array_equal(a.log_prob(text), b.log_prob(text))

@pytest.mark.parametrize('dtype', ['uint8', 'int8', 'uint16', '<i4', '>i8', 'uint64'])
def test_every_integer_type_gives_the_same_model(dtype):
    ids = np.random.default_rng(0).integers(0, 100, 2000)
    assert np.array_equal(NGramModel(3, 100).fit(ids).log_prob(ids), NGramModel(3, 100).fit(ids.astype(dtype)).log_prob(ids.astype(dtype)))

def test_a_text_shorter_than_the_order_and_an_empty_document():
    model = NGramModel(6, 4).fit([[1], [], [2, 3]])
    assert model.n_grams == [3, 1, 0, 0, 0, 0]
    assert np.isfinite(model.log_prob([1, 2, 3, 0, 1, 2, 3])).all() and len(model.log_prob([])) == 0
    assert len(model.sample(10, seed=0)) == 10


@pytest.fixture
def stored(tmp_path):
    model = NGramModel(3, 256).fit(byte_ids('the cat sat on the mat and the dog sat on the rug'))
    model.save(tmp_path/'model.npz')
    return model, tmp_path/'model.npz'

def test_a_variant_is_stored_as_what_it_is(stored):
    model, path = stored
    model.variant(2, 'witten-bell').save(path)
    again, text = NGramModel.load(path), byte_ids('the rat')
    assert (again.order, again.smoothing) == (2, 'witten-bell')
    assert np.array_equal(again.log_prob(text), model.variant(2, 'witten-bell').log_prob(text))

def test_every_cut_and_every_damaged_kilobyte_is_refused_or_harmless(stored):
    model, path = stored
    whole, text = path.read_bytes(), byte_ids('the rat')
    for n in range(0, len(whole), 97):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match='is not a stored n-gram model, or is damaged'): NGramModel.load(path)
    for at in range(0, len(whole), 61):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xff]) + whole[at + 1:])
        try: again = NGramModel.load(path)
        except ValueError as e: assert 'is damaged' in str(e)
        else: assert np.array_equal(again.log_prob(text), model.log_prob(text))          # a byte that nobody reads

@pytest.mark.parametrize('change', [lambda a: a[1:], lambda a: a - a, lambda a: a + 100 * (a == a.min()), lambda a: a.astype(np.float64), lambda a: -a])
@pytest.mark.parametrize('name', ['keys2', 'counts2', 'counts3', 'left1'])
def test_tables_that_do_not_fit_together_are_refused(stored, name, change):
    _, path = stored
    with np.load(path) as z: arrays = dict(z)
    arrays[name] = change(arrays[name]); np.savez(path, **arrays)
    with pytest.raises(ValueError, match='damaged'): NGramModel.load(path)

def test_nothing_in_a_file_is_run(stored):
    _, path = stored
    class Trap:
        def __reduce__(self): return (pytest.fail, ('the file was run',))
    with np.load(path) as z: arrays = dict(z)
    np.savez(path, **arrays | {'keys1': np.array([Trap()], dtype=object)})
    with pytest.raises(BaseException, match='the file was run'): np.load(path, allow_pickle=True)['keys1']      # the trap works
    with pytest.raises(ValueError, match='damaged'): NGramModel.load(path)

def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError): NGramModel.load(tmp_path/'nothing.npz')


def test_a_kilobyte_is_scored_in_milliseconds_and_a_megabyte_counted_in_seconds():
    rng = np.random.default_rng(0)
    word = [bytes(rng.integers(97, 123, rng.integers(2, 8)).tolist()).decode() for _ in range(5000)]
    text = ' '.join(word[i] for i in np.minimum(rng.zipf(1.3, 180_000), 5000) - 1)[:1_000_000]
    start = time.perf_counter(); model = NGramModel(5, 256).fit(byte_ids(text)); counting = time.perf_counter() - start
    scoring = math.inf
    for _ in range(5): start = time.perf_counter(); nats_per_byte(model, text[:1000]); scoring = min(scoring, time.perf_counter() - start)
    assert counting < 15 and scoring < .25, (counting, scoring)        # about 1 s and 1 ms; the bounds leave room for a busy machine
    assert model.next_probs(byte_ids('the')).shape == (256,) and sum(model.n_grams) > 50_000
