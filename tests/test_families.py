"What the cells of 07 check on chosen texts, checked on batches that nobody chose."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.families import Bert, BertConfig, family_mask, mask_tokens, pair_inputs
from llm_course.subwords import WordTokenizer

V, CONFIG = 23, BertConfig(23, 16, 2, 2, 8, dropout=0., init_std=.4)
BERT = Bert(CONFIG).eval()
quickly = settings(max_examples=40, deadline=None)
seeds, lengths = st.integers(0, 2**31), st.lists(st.integers(1, 10), min_size=1, max_size=5)


def random_batch(lengths, seed, width=None):
    "ids, segments and keep for texts of these lengths, with arbitrary ids and segments in the padding."
    g, T = torch.Generator().manual_seed(seed), width or max(lengths)
    ids, segments = (torch.randint(n, (len(lengths), T), generator=g) for n in (V, CONFIG.n_types))
    return ids, segments, torch.arange(T) < torch.tensor(lengths)[:, None]

@quickly
@given(lengths, st.integers(0, 6), seeds)
def test_padding_says_nothing_however_much_and_whatever_it_holds(lengths, more, seed):
    ids, segments, keep = random_batch(lengths, seed)
    wider = random_batch(lengths, seed + 1, width=max(lengths) + more)
    for t, real in zip(wider[:2], (ids, segments)): t[wider[2]] = real[keep]
    with torch.no_grad():
        h, longer = BERT.hidden(ids, segments, keep), BERT.hidden(*wider)
        assert torch.allclose(h[keep], longer[wider[2]], atol=1e-5)
        for n, T in enumerate(lengths): assert torch.allclose(h[n, :T], BERT.hidden(ids[n:n + 1, :T], segments[n:n + 1, :T])[0], atol=1e-5)

@quickly
@given(st.integers(2, 10), seeds, st.data())
def test_every_real_token_is_heard_everywhere(T, seed, data):
    ids, segments, keep = random_batch([T], seed, width=T + 2)
    at = data.draw(st.integers(0, T - 1))
    other = ids.clone(); other[0, at] = (ids[0, at] + 1 + data.draw(st.integers(0, V - 2))) % V
    with torch.no_grad(): moved = (BERT.hidden(other, segments, keep) - BERT.hidden(ids, segments, keep)).abs().amax(-1)[0]
    assert (moved[:T] > 1e-6).all()
    with torch.no_grad(): moved = (BERT.hidden(other[:, :T]) - BERT.hidden(ids[:, :T])).abs().amax(-1)[0]        # without any mask
    assert (moved > 1e-6).all()

@quickly
@given(lengths, seeds, st.randoms())
def test_rows_do_not_meet(lengths, seed, random):
    ids, segments, keep = random_batch(lengths, seed)
    order = list(range(len(lengths))); random.shuffle(order)
    with torch.no_grad(): h, shuffled = BERT.hidden(ids, segments, keep), BERT.hidden(ids[order], segments[order], keep[order])
    assert torch.allclose(h[order][keep[order]], shuffled[keep[order]], atol=1e-5)

@quickly
@given(st.integers(1, 6), st.integers(1, 30), st.sets(st.integers(0, V - 2), max_size=8), st.floats(.01, .99), seeds)
def test_masking_changes_only_what_it_asks_for(B, T, special, p, seed):
    ids = torch.randint(V - 1, (B, T), generator=torch.Generator().manual_seed(seed))
    before, mask_id = ids.clone(), V - 1
    inputs, labels = mask_tokens(ids, special, V, mask_id, p, generator=torch.Generator().manual_seed(seed))
    asked, fixed = labels != -100, torch.isin(ids, torch.tensor(sorted(special)))
    assert torch.equal(ids, before)                                         # the corpus is left alone
    assert torch.equal(labels[asked], ids[asked]) and torch.equal(inputs[~asked], ids[~asked])
    assert not (asked & fixed).any()
    changed = inputs != ids
    assert not torch.isin(inputs[changed], torch.tensor(sorted(special))).any()     # a random word is a word
    again = mask_tokens(ids, special, V, mask_id, p, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(again[0], inputs) and torch.equal(again[1], labels)

@pytest.mark.parametrize('p', [.05, .15, .4])
@pytest.mark.parametrize('vocab', [7, 40])
def test_shares_of_masking(p, vocab):
    special, mask_id = {0, 1}, 2
    ids = torch.randint(3, vocab, (1000, 1000), generator=torch.Generator().manual_seed(vocab))
    inputs, labels = mask_tokens(ids, special, vocab, mask_id, p, generator=torch.Generator().manual_seed(1))
    asked, W = labels != -100, vocab - 3
    masked, same = inputs == mask_id, inputs == ids
    for hits, of, share in ((asked, torch.ones_like(asked), p), (masked, asked, .8), (same, asked, .1 + .1 / W), (~masked & ~same, asked, .1 - .1 / W)):
        assert abs(hits[of].float().mean() - share) < 5 * (share * (1 - share) / of.sum())**.5
    swapped = inputs[asked & ~masked & ~same]
    counts = torch.bincount(swapped, minlength=vocab)[3:].float()
    assert (counts > 0).all() and counts.std() < 6 * counts.mean()**.5      # all words are drawn, none is preferred

@quickly
@given(st.integers(2, 12), st.data())
def test_family_masks_are_closed(T, data):
    n = data.draw(st.integers(1, T - 1))
    for family, source in (('encoder', 0), ('decoder', 0), ('encoder-decoder', n)):
        mask = family_mask(family, T, source)
        assert torch.equal((mask.float() @ mask.float()) > 0, mask)        # what two steps reach, one step reaches
        assert mask.diagonal().all()

@quickly
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=5))
def test_pairs_come_back(sizes):
    tok = WordTokenizer.train(['a b c d e'])
    texts = [('a ' * m, 'b ' * n) if n else 'a ' * m for m, n in sizes]
    ids, segments, keep = pair_inputs(tok, texts)
    s = tok.special_tokens
    for (m, n), row, kinds, real in zip(sizes, ids, segments, keep):
        want = [s['[CLS]'], *tok.encode('a ' * m), s['[SEP]']] + ([*tok.encode('b ' * n), s['[SEP]']] if n else [])
        assert row[real].tolist() == want and real[:len(want)].all()
        assert kinds[real].tolist() == [0] * (m + 2) + [1] * (n + 1 if n else 0)
        assert (row[~real] == s['[PAD]']).all() and not kinds[~real].any()
