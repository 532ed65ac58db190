"Page 02b, what a cell cannot hold: other processes, enormous documents, enormous families, and text of every shape."
import os, random, subprocess, sys, time, tracemalloc
from itertools import combinations
from pathlib import Path

import numpy as np, pytest
from hypothesis import given, settings, strategies as st

from llm_course import dedup
from llm_course.core import Document, read_documents
from llm_course.dedup import (_numbers, DropDuplicateLines, DropExactDuplicates, DropNearDuplicates, MinHash, UnionFind, contamination, jaccard,
                              jaccard_hashes, near_duplicates, match_key, shingle_hashes, shingles, words)

def in_time(limit, fn, *args, **kwargs):
    "The result of a call that must not take longer than `limit` seconds. The limits are several times what two busy cores need."
    start = time.perf_counter()
    result = fn(*args, **kwargs)
    assert (took := time.perf_counter() - start) < limit, f'{took:.1f} s'
    return result

# --- the same tomorrow

def test_signatures_of_two_processes_are_equal():
    script = ('from llm_course.core import Document\nfrom llm_course.dedup import *\n'
              'print(MinHash(4).signature(shingle_hashes("Ein Straßenfest, cafe\\u0301!", 2)).tolist(), band_keys(MinHash(4).signature(shingle_hashes("x")), 2, 2).tolist())')
    runs = [subprocess.Popen([sys.executable, '-c', script], env={**os.environ, 'PYTHONHASHSEED': str(salt)}, cwd=Path(__file__).parents[1],
                             stdout=subprocess.PIPE, text=True) for salt in (1, 2)]
    one, two = (r.communicate(timeout=120)[0] for r in runs)
    assert one == two and one.count('[') == 2

# --- enormous

STORIES = ' '.join(d.text for d in read_documents('tiny'))
SIZE = 50_000_000

def test_a_document_of_50_mb_of_words():
    text = STORIES * (SIZE // len(STORIES) + 1)
    hashes = in_time(90, shingle_hashes, text)
    assert np.array_equal(hashes, shingle_hashes(STORIES * 3))      # the same shingles, read once more across each joint
    step = DropNearDuplicates()
    assert isinstance(step(Document('one', STORIES * 3)), Document)
    signature = in_time(10, MinHash().signature, hashes)
    assert step._index.query(signature) == {0}

@pytest.mark.parametrize('unit, length', [('x', SIZE), ('\u0301\u0327', SIZE // 20), (' ', SIZE), ('?', SIZE // 5)], ids=['one word', 'accents', 'spaces', 'marks'])
def test_one_enormous_line(unit, length):
    text = unit * length
    for step in (DropExactDuplicates(), DropDuplicateLines(), DropNearDuplicates()):
        result = in_time(30, step, Document('big', text))
        assert result.text is text
    assert in_time(30, contamination, [Document('big', text)], [Document('x', 'one two three four five six seven eight')])[0].found == 0
    assert len(in_time(30, shingle_hashes, text[:1_000_000], kind='char', n=9)) >= 1

def test_remembered_words_do_not_fill_the_memory():
    _numbers.clear()
    try:
        shingle_hashes('x' * 10_000_000 + ' short')
        assert list(_numbers) == ['short']
        for i in range(1 << 20): _numbers[f'word {i}'] = 0
        shingle_hashes('one more')
        assert list(_numbers) == ['one', 'more']
    finally: _numbers.clear()

def test_blocks_of_a_long_document_overlap():
    text = 'x ' + 'y ' * ((1 << 20) - 2) + 'a b c d e f g h i j'             # the second block begins at b
    assert len(shingle_hashes(text, 5)) == len(shingles(text, 5)) == 12

def test_a_family_of_many_copies_is_not_compared_pair_by_pair(monkeypatch):
    calls, real = [], dedup.jaccard_hashes
    monkeypatch.setattr(dedup, 'jaccard_hashes', lambda a, b: calls.append(1) or real(a, b))
    story = STORIES.split()[:60]
    family = [Document(str(i), ' '.join([*story[:30], f'w{i}', *story[30:]])) for i in range(4000)]      # 8 million pairs
    assert in_time(20, near_duplicates, family, .7, 3) == [list(range(4000))]
    assert len(calls) < 2 * 4000
    assert in_time(20, near_duplicates, [Document('same', 'a b c d e f')] * 10_000) == [list(range(10_000))]

def test_contamination_reads_a_stream_and_keeps_nothing_of_it():
    exam = [Document('exam', STORIES[:2000])]
    def stream(n):
        for i in range(n): yield Document(str(i), f'document {i} ' + STORIES[3000:])
    contamination(stream(2), exam)
    peaks = []
    for n in (10, 60):
        tracemalloc.start(); contamination(stream(n), exam); peaks.append(tracemalloc.get_traced_memory()[1]); tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 1e5

# --- text of every shape

texts = st.text(max_size=30) | st.text('ab \n.é\u0301ﬁ中', max_size=40)

@settings(max_examples=300, deadline=None)
@given(texts, texts, st.integers(1, 4), st.sampled_from(['word', 'char']))
def test_numbers_are_as_good_as_strings(a, b, n, kind):
    sets = [shingles(t, n, kind) for t in (a, b)]
    hashed = [shingle_hashes(t, n, kind) for t in (a, b)]
    assert [len(s) for s in sets] == [len(h) for h in hashed] and min(map(len, sets)) >= 1
    assert jaccard(*sets) == jaccard_hashes(*hashed)
    assert match_key(a) == match_key(f' {a}\n') and words(match_key(a)) == [w for x in words(a) for w in words(x)]

@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from('abcd'), max_size=9).map(' '.join), max_size=12), st.floats(.3, 1), st.integers(1, 3))
def test_groups_are_made_of_true_pairs_and_hold_all_equal_texts(texts, threshold, n):
    docs = [Document(str(i), t) for i, t in enumerate(texts)]
    sets = [shingles(t, n) for t in texts]
    truth, equal = UnionFind(len(docs)), UnionFind(len(docs))
    for i, j in combinations(range(len(docs)), 2):
        if jaccard(sets[i], sets[j]) >= threshold: truth.union(i, j)
        if sets[i] == sets[j]: equal.union(i, j)
    groups = near_duplicates(docs, threshold, n)
    for g in groups: assert len({truth.find(i) for i in g}) == 1
    for g in equal.groups(): assert any(set(g) <= set(h) for h in groups)

@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.sampled_from('abc'), max_size=12).map(' '.join), max_size=4), st.lists(st.lists(st.sampled_from('abc'), max_size=12).map(' '.join), min_size=1, max_size=3), st.integers(1, 6))
def test_contamination_is_what_sets_of_strings_say(train, exam, n):
    got = contamination((Document(f't{i}', t) for i, t in enumerate(train)), [Document('e', t) for t in exam], n=n, shortest=2)
    for row, text in zip(got, exam):
        size = min(n, len(text.split()))
        if size < min(n, 2): assert (row.grams, row.found, row.source) == (0, 0, ''); continue
        grams = shingles(text, size)
        holders = [f't{i}' for i, t in enumerate(train) if len(t.split()) >= size and grams & shingles(t, size)]
        found = {g for t in train if len(t.split()) >= size for g in grams & shingles(t, size)}
        assert (row.grams, row.found, row.source) == (len(grams), len(found), holders[0] if holders else '')

@pytest.mark.parametrize('seed', range(3))
def test_no_kept_document_of_a_stream_has_a_kept_twin(seed):
    rng = random.Random(seed)
    pool = [rng.choices('abcdefghij', k=40) for _ in range(20)]
    docs = [Document(str(i), ' '.join(w if rng.random() > .03 else 'x' for w in rng.choice(pool))) for i in range(200)]
    step = DropNearDuplicates(.7, n=2)
    kept = [d for d in docs if isinstance(step(d), Document)]
    assert 20 <= len(kept) < 200
    pairs = [jaccard(shingles(a.text, 2), shingles(b.text, 2)) for a, b in combinations(kept, 2)]
    assert sum(s >= .7 for s in pairs) <= .01 * len(docs)           # a pair at the threshold is missed once in a hundred times

def test_a_hash_family_that_lost_its_upper_bits_would_be_seen():
    m = MinHash(256)
    x = shingle_hashes(STORIES)
    want = [min((int(a) * (int(v) >> 32) + int(b)) % 2**64 >> 32 for v in x[:50]) for a, b in zip(m.a, m.b)]
    assert m.signature(x[:50]).tolist() == want and len(set(m.signature(x).tolist())) == 256
