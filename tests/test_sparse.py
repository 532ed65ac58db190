"What the cells of 05b check on chosen sizes, checked on sizes, masks and groups that nobody chose."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.attention import attention, causal_mask, padding_mask
from llm_course.sparse import (EMPTY, FULL, BlockMask, attention_with_sink, block_sparse_attention, document_ids, document_mask,
                               document_positions, local_attention, prefix_mask, reachable, sink_mask, strided_mask)

sizes, windows, seeds = st.integers(1, 40), st.integers(1, 45), st.integers(0, 2**31)
quickly = settings(max_examples=40, deadline=None)
tiny = dict(atol=1e-10, rtol=1e-10)


def draw(seed, T_q, T_k=None, B=2, H_kv=2, group=1, D=4, D_v=4):
    g, T_k = torch.Generator().manual_seed(seed), T_q if T_k is None else T_k
    shapes = (B, H_kv * group, T_q, D), (B, H_kv, T_k, D), (B, H_kv, T_k, D_v)
    return g, [torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes]

def same(ours, want, leaves, seed):
    "Equal outputs and equal gradients, in float64."
    assert ours.shape == want.shape and torch.allclose(ours, want, **tiny)
    up = torch.randn(want.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(ours, leaves, up), torch.autograd.grad(want, leaves, up)): assert torch.allclose(a, b, **tiny)


@quickly
@given(sizes, windows, st.integers(1, 50) | st.none(), st.integers(1, 3), st.integers(1, 3), st.sampled_from([4, 3]), seeds)
def test_local_equals_dense(T, window, block, H_kv, group, D_v, seed):
    _, qkv = draw(seed, T, H_kv=H_kv, group=group, D_v=D_v)
    same(local_attention(*qkv, window, block), attention(*qkv, is_causal=True, window=window), qkv, seed)

@quickly
@given(sizes, sizes, st.integers(1, 17), st.integers(1, 3), st.tuples(st.booleans(), st.booleans()), st.floats(0, 1), seeds)
def test_block_sparse_equals_dense_for_random_masks(T_q, T_k, block, group, shared, share, seed):
    g, qkv = draw(seed, T_q, T_k, group=group)
    shape = 1 if shared[0] else 2, 1 if shared[1] else 2 * group, T_q, T_k
    mask = torch.rand(shape, generator=g) < share**3                # often very thin: many rows see nobody
    same(block_sparse_attention(*qkv, mask, block), attention(*qkv, mask=mask), qkv, seed)

@quickly
@given(sizes, sizes, st.integers(1, 17), st.floats(0, 1), seeds)
def test_the_table_of_squares(T_q, T_k, block, share, seed):
    mask = torch.rand(T_q, T_k, generator=torch.Generator().manual_seed(seed)) < share
    cut = BlockMask.from_mask(mask, block)
    for i in range(cut.table.shape[2]):
        for j in range(cut.table.shape[3]):
            square = mask[i * block:(i + 1) * block, j * block:(j + 1) * block]
            assert (cut.table[0, 0, i, j] != EMPTY) == square.any()
            assert (cut.table[0, 0, i, j] == FULL) == (square.all() and square.shape == (block, block))
    assert sum(keys.numel() for _, keys, _ in cut.groups) == len(cut.squares) == (cut.table != EMPTY).sum()
    function = BlockMask.from_mod(lambda b, h, t, s: mask[t, s], T_q, T_k, block)
    assert torch.equal(function.table, cut.table) and torch.equal(function.squares, cut.squares)

@quickly
@given(st.integers(2, 40), windows, st.integers(1, 9), seeds)
def test_no_position_sees_the_future(T, window, block, seed):
    g, (q, k, v) = draw(seed, T)
    cut = int(torch.randint(1, T, (1,), generator=g))
    k2, v2 = k.detach().clone(), v.detach().clone(); k2[:, :, cut:] += 9; v2[:, :, cut:] -= 9
    sink, documents = torch.zeros(2, dtype=torch.float64), torch.randint(0, 2, (2, T), generator=g).cumsum(1)
    for f in (lambda k, v: local_attention(q, k, v, window, block),
              lambda k, v: block_sparse_attention(q, k, v, document_mask(documents), block),
              lambda k, v: block_sparse_attention(q, k, v, strided_mask(T, window), block),
              lambda k, v: attention_with_sink(q, k, v, sink, sink_mask(T, window, 2))):
        assert torch.allclose(f(k2, v2)[:, :, :cut], f(k, v)[:, :, :cut], **tiny)
        assert not torch.allclose(f(k2, v2)[:, :, cut:], f(k, v)[:, :, cut:], **tiny)

@quickly
@given(st.integers(2, 40), st.integers(1, 9), seeds)
def test_what_stands_in_the_padding_changes_nothing(T, block, seed):
    g, (q, k, v) = draw(seed, T)
    keep = torch.rand(2, T, generator=g) < .6
    mask = causal_mask(T) & padding_mask(keep)
    order = [torch.cat((keep[b].nonzero()[:, 0], (~keep[b]).nonzero()[:, 0][torch.randperm(int((~keep[b]).sum()), generator=g)])) for b in range(2)]
    back = [torch.cat((keep[b].nonzero()[:, 0], (~keep[b]).nonzero()[:, 0])).argsort() for b in range(2)]
    k2, v2 = (torch.stack([x[b][:, order[b]][:, back[b]] for b in range(2)]) for x in (k, v))  # padding permuted, the rest in its place
    assert torch.equal(block_sparse_attention(q, k2, v2, mask, block), block_sparse_attention(q, k, v, mask, block))
    k3, v3 = (torch.where(keep[:, None, :, None], x, 77.) for x in (k, v))
    assert torch.equal(block_sparse_attention(q, k3, v3, mask, block), block_sparse_attention(q, k, v, mask, block))

@quickly
@given(st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=5))
def test_packing_is_concatenation(texts):
    packed = torch.tensor([[x for text in texts for x in (*text, 0)]])
    documents, lengths = document_ids(packed, 0), [len(text) + 1 for text in texts]
    assert documents[0].bincount().tolist() == lengths
    assert torch.equal(document_mask(documents)[0, 0], torch.block_diag(*(causal_mask(n) for n in lengths)).bool())
    assert document_positions(documents)[0].tolist() == [t for n in lengths for t in range(n)]

@quickly
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 8))
def test_reach_of_a_window(T, window, layers):
    assert torch.equal(reachable(causal_mask(T, window=window), layers), causal_mask(T, window=layers * (window - 1) + 1))

@quickly
@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 70), st.integers(0, 60))
def test_patterns_pair_by_pair(T, window, n_sink, prefix):
    prefix = min(prefix, T)
    for mask, rule in ((sink_mask(T, window, n_sink), lambda t, s: s <= t and (s > t - window or s < n_sink)), (prefix_mask(T, prefix), lambda t, s: s <= t or s < prefix),
                       (strided_mask(T, window), lambda t, s: s <= t and (t - s < window or (t - s) % window == 0))):
        assert mask.tolist() == [[rule(t, s) for s in range(T)] for t in range(T)]

@quickly
@given(sizes, st.integers(1, 3), st.floats(-5, 5), seeds)
def test_a_sink_is_a_zero_key_with_a_bias(T, group, s, seed):
    g, (q, k, v) = draw(seed, T, group=group)
    sink, mask = torch.full((2 * group,), s, dtype=torch.float64), torch.rand(T, T, generator=g) < .5
    got = attention_with_sink(q, k, v, sink, mask)
    x = (q @ k.repeat_interleave(group, 1).mT / 2).masked_fill(~mask, -torch.inf)
    want = x.exp() / (x.exp().sum(-1, keepdim=True) + sink[:, None, None].exp()) @ v.repeat_interleave(group, 1)
    assert torch.allclose(got, want, **tiny)

def test_documents_that_make_no_sense_are_refused():
    for bad, what in ((torch.tensor([[0, 1, 0]]), 'documents.0. goes from 1 to 0 at position 2'), (torch.tensor([0, 1]), 'give .B, T.'), ([[0., 1.]], 'float32')):
        with pytest.raises((TypeError, ValueError), match=what): document_mask(torch.as_tensor(bad))

def test_a_long_text_needs_no_square_of_memory():
    q, k, v = torch.randn(3, 1, 1, 200_000, 8, generator=torch.Generator().manual_seed(0))     # dense: 160 GB of scores
    got = local_attention(q, k, v, 16)
    for t in (0, 15, 16, 100_001, 199_999):
        a = max(0, t - 15)
        assert torch.allclose(got[:, :, t:t + 1], attention(q[:, :, t:t + 1], k[:, :, a:t + 1], v[:, :, a:t + 1]), atol=1e-5)
