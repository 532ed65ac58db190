"What the cells of 05c check on chosen sizes, checked on sizes that nobody chose, and at the edges."
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from llm_course.attention import attention, causal_mask, padding_mask
from llm_course.flash import flash_attention, merge, tile_side, tiles

quickly = settings(max_examples=60, deadline=None)


@st.composite
def problems(draw, causal=None):
    "Tensors in float64, the options of flash_attention, and the mask that says the same."
    B, H_kv, group, D, D_v = (draw(st.integers(1, n)) for n in (3, 3, 3, 5, 5))
    T_k = draw(st.integers(1, 40))
    is_causal = draw(st.booleans()) if causal is None else causal
    T_q = draw(st.integers(1, T_k if is_causal else 40))
    window = draw(st.none() | st.integers(1, 45)) if is_causal else None
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    q, k, v = (torch.randn(B, h, t, d, generator=g, dtype=torch.float64) for h, t, d in ((H_kv * group, T_q, D), (H_kv, T_k, D), (H_kv, T_k, D_v)))
    keep = torch.rand(B, T_k, generator=g) < draw(st.sampled_from([.1, .5, .9])) if draw(st.booleans()) else None
    mask = causal_mask(T_k, window=window)[T_k - T_q:] if is_causal else torch.ones(T_q, T_k, dtype=torch.bool)
    mask = mask.expand(B, 1, T_q, T_k) if keep is None else mask & padding_mask(keep)
    blocks = dict(block_q=draw(st.integers(1, 45)), block_k=draw(st.integers(1, 45)))
    return (q, k, v), dict(is_causal=is_causal, window=window, keep=keep, **blocks), mask

def with_gradients(fn, *tensors, d_out=None):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = fn(*leaves)
    if d_out is None: d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]

def assert_close(got, want): assert all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(got, want, strict=True))


@quickly
@given(problems(), st.sampled_from([None, .8, 30.]), st.sampled_from([None, .3, 4.]))
def test_output_and_gradients_are_those_of_attention(problem, softcap, scale):
    t3, options, mask = problem
    assert_close(with_gradients(lambda *t: flash_attention(*t, **options, softcap=softcap, scale=scale), *t3),
                 with_gradients(lambda *t: attention(*t, mask=mask, softcap=softcap, scale=scale), *t3))

@quickly
@given(problems())
def test_output_and_gradients_are_those_of_sdpa_where_something_is_visible(problem):
    t3, options, mask = problem
    sees = mask.any(-1)[..., None]                                   # (B, 1, T_q, 1)
    d_out = torch.ones(*t3[0].shape[:3], t3[2].shape[-1], dtype=torch.float64) * sees
    got = with_gradients(lambda *t: flash_attention(*t, **options), *t3, d_out=d_out)
    mask = mask | ~sees                                              # SDPA gets something to look at in the other rows, which count for nothing
    want = with_gradients(lambda *t: F.scaled_dot_product_attention(*t, attn_mask=mask, enable_gqa=True), *t3, d_out=d_out)
    assert_close([got[0] * sees, *got[1:]], [want[0] * sees, *want[1:]])
    assert not (got[0] * ~sees).any()

@quickly
@given(problems(causal=True), st.data())
def test_no_position_sees_the_future_nor_what_the_window_has_passed(problem, data):
    (q, k, v), options, mask = problem
    s = data.draw(st.integers(0, k.shape[2] - 1))
    k2, v2 = k.clone(), v.clone(); k2[:, :, s] += 3.; v2[:, :, s] -= 5.
    before, after = flash_attention(q, k, v, **options), flash_attention(q, k2, v2, **options)
    moved = (before != after).any(-1).any(1)                         # (B, T_q)
    assert torch.equal(moved, mask[:, 0, :, s])                      # exactly those who may look at s, to the last bit

@quickly
@given(problems(), st.floats(-1e3, 1e3))
def test_what_stands_in_the_padding_does_not_matter(problem, rubbish):
    (q, k, v), options, _ = problem
    if options['keep'] is None: options['keep'] = torch.arange(k.shape[2]).expand(len(k), -1) % 2 > 0
    k2, v2 = (torch.where(options['keep'][:, None, :, None], t, rubbish) for t in (k, v))
    run = functools.partial(with_gradients, lambda *t: flash_attention(*t, **options))
    for a, b in zip(run(q, k, v), run(q, k2, v2)): assert torch.equal(a, b)

@quickly
@given(problems(causal=False), st.data())
def test_any_split_of_the_keys_merges_to_the_whole(problem, data):
    (q, k, v), options, mask = problem
    T_k, keep = k.shape[2], options.pop('keep')
    cuts = sorted({0, T_k, *data.draw(st.lists(st.integers(0, T_k), max_size=4))})
    keep = torch.ones(len(k), T_k, dtype=torch.bool) if keep is None else keep
    def in_parts(q, k, v):
        parts = [flash_attention(q, k[:, :, a:b], v[:, :, a:b], keep=keep[:, a:b], **options, return_lse=True) for a, b in zip(cuts, cuts[1:])]
        return functools.reduce(merge, parts)[0]
    assert_close(with_gradients(in_parts, q, k, v), with_gradients(lambda *t: attention(*t, mask=mask), q, k, v))

@settings(max_examples=400, deadline=None)
@given(st.integers(1, 14), st.integers(0, 14), st.booleans(), st.none() | st.integers(1, 30), st.integers(1, 16), st.integers(1, 16))
def test_tiles_hold_each_visible_pair_once(T_q, more, is_causal, window, block_q, block_k):
    T_k = T_q + more
    window = window if is_causal else None
    may = causal_mask(T_k, window=window)[more:] if is_causal else torch.ones(T_q, T_k, dtype=torch.bool)
    times = torch.zeros(T_q, T_k, dtype=torch.int64)
    for t in tiles(T_q, T_k, is_causal, window, block_q, block_k):
        times[t.rows, t.cols] += 1
        assert may[t.rows, t.cols].any() and may[t.rows, t.cols].all() != t.border
    assert times.max() == 1 and times[may].min() == 1

@pytest.mark.parametrize('side', [64, 128, 256, 512])
@pytest.mark.parametrize('heads', [1, 3, 4, 100])
def test_the_tile_just_fits(heads, side):
    fast = 4 * heads * side**2
    assert (tile_side(heads, fast), tile_side(heads, fast - 1)) == (side, side // 2)
    assert tile_side(heads, 1) == 32 and tile_side(heads, 2**60) == 512


class Largest(TorchDispatchMode):
    "Numbers in the largest tensor that is made inside the block."
    numel = 0
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor): self.numel = max(self.numel, t.numel())
        return out

@pytest.mark.parametrize('options', [{}, dict(window=100), dict(keep=torch.arange(512)[None] > 99), dict(softcap=5.)], ids=lambda o: '-'.join(o) or 'causal')
def test_nothing_quadratic_is_made(options):
    t3 = [torch.randn(1, h, 512, 8, requires_grad=True) for h in (4, 2, 2)]
    with Largest() as seen: flash_attention(*t3, is_causal=True, block_q=32, block_k=32, **options).sum().backward()
    assert seen.numel == 4 * 512 * 8                                 # the queries; 4 * 512 * 512 would be 64 times as many

def test_grouped_heads_copy_no_keys():
    q, k, v = (torch.randn(1, h, 64, 8) for h in (64, 1, 1))
    with Largest() as seen: flash_attention(q[:, :, :1], k, v, block_q=1, block_k=32)
    assert seen.numel < 64 * 64 * 8                                  # keys repeated for 64 heads

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_come_back_as_they_went_in(dtype):
    t3 = [torch.randn(2, 4, 30, 8, generator=torch.Generator().manual_seed(i)).to(dtype).requires_grad_() for i in range(3)]
    out, lse = flash_attention(*t3, is_causal=True, return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.promote_types(dtype, torch.float32)
    got = with_gradients(functools.partial(flash_attention, is_causal=True), *t3)
    want = with_gradients(functools.partial(attention, is_causal=True), *(t.double() for t in t3), d_out=torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=dtype).double())
    assert all(a.dtype == dtype for a in got)
    for a, b in zip(got, want): assert (a - b).norm() < 4 * torch.finfo(dtype).eps * b.norm() + 1e-12

@pytest.mark.parametrize('B, T_q, T_k', [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)])
def test_empty_tensors(B, T_q, T_k):
    t3 = [torch.ones(B, h, t, 3, requires_grad=True) for h, t in ((4, T_q), (2, T_k), (2, T_k))]
    out, lse = flash_attention(*t3, return_lse=True)
    assert out.shape == (B, 4, T_q, 3) and not out.any() and (lse == -math.inf).all() if T_k == 0 else out.numel() == 0
    out.sum().backward()
    assert all(t.grad.shape == t.shape and not t.grad.any() for t in t3)

def test_views_and_partial_gradients():
    x = torch.randn(2, 30, 3, 4, 8)                                  # (B, T, 3, H, D), as one projection gives it
    q, k, v = x.permute(2, 0, 3, 1, 4)
    want = attention(q, k, v, is_causal=True)
    assert torch.allclose(flash_attention(q, k, v, is_causal=True, block_q=8, block_k=8), want, atol=1e-5)
    v = v.detach().requires_grad_()
    flash_attention(q, k, v, is_causal=True).sum().backward()        # only the values learn
    assert q.grad is None and v.grad is not None
    one = torch.randn(1, 1, 30, 8).expand(2, 4, 30, 8)               # keys shared by a stride of 0
    assert torch.allclose(flash_attention(q, one, v), attention(q, one, v), atol=1e-5)

def test_a_row_without_keys_gives_zeros_and_no_gradient():
    t3 = [torch.randn(2, 2, 20, 4) for _ in range(3)]
    keep = torch.stack((torch.zeros(20, dtype=torch.bool), torch.arange(20) >= 7))
    for kw in (dict(), dict(is_causal=True), dict(is_causal=True, window=3), dict(is_causal=True, softcap=1.)):
        out, dq, dk, dv = with_gradients(lambda *t: flash_attention(*t, keep=keep, block_q=4, block_k=8, **kw), *t3)
        assert not out[0].any() and not dq[0].any() and not dk[0].any() and not dv[0].any()
        assert all(t.isfinite().all() for t in (out, dq, dk, dv)) and out[1, :, 7:].any()

def test_the_same_bits_each_time():
    t3 = [torch.randn(2, 4, 200, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    runs = [with_gradients(functools.partial(flash_attention, is_causal=True, block_q=32, block_k=64), *t3) for _ in range(3)]
    for again in runs[1:]: assert all(torch.equal(a, b) for a, b in zip(runs[0], again))

def test_recomputing_a_layer_gives_the_same_gradients():
    from torch.utils.checkpoint import checkpoint
    t3 = [torch.randn(1, 2, 50, 8) for _ in range(3)]
    fn = functools.partial(flash_attention, is_causal=True)
    for a, b in zip(with_gradients(fn, *t3), with_gradients(lambda *t: checkpoint(fn, *t, use_reentrant=False), *t3)): assert torch.equal(a, b)

def test_padding_that_is_changed_in_between_is_noticed():
    t3 = [torch.randn(1, 1, 8, 4, requires_grad=True) for _ in range(3)]
    keep = torch.ones(1, 8, dtype=torch.bool)
    out = flash_attention(*t3, keep=keep)
    keep[0, 3] = False
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): out.sum().backward()
