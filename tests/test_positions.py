"What the cells of 04b check on chosen sizes, checked on sizes that nobody chose."
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.positions import (T5RelativeBias, alibi_bias, alibi_slopes, apply_rope, apply_rope_interleaved, half_to_interleaved,
                                  interleaved_to_half, inverse_frequencies, mask_future, relative_position_bucket, relative_positions, rope_frequencies,
                                  rope_table, scale_rope, sinusoidal_positions)

halves, heads, seeds = st.integers(2, 20), st.integers(1, 5), st.integers(0, 2**31)
quickly = settings(max_examples=40, deadline=None)


@quickly
@given(halves, heads, st.integers(1, 12), seeds)
def test_the_two_layouts_are_one_permutation_of_rows(half, n_head, d_model, seed):
    D, g = 2 * half, torch.Generator().manual_seed(seed)
    W_q, W_k = torch.randn(2, n_head * D, d_model, generator=g, dtype=torch.float64)
    assert torch.equal(half_to_interleaved(interleaved_to_half(W_q, D), D), W_q)
    assert torch.equal(interleaved_to_half(W_q, D)[:, 0], interleaved_to_half(W_q[:, 0], D))       # a bias moves like the rows
    x, table = torch.randn(1, 6, d_model, generator=g, dtype=torch.float64), [t.double() for t in rope_frequencies(D, 6)]
    def scores(W_q, W_k, rope): q, k = (rope((x @ W.T).view(1, 6, n_head, D).transpose(1, 2), *table) for W in (W_q, W_k)); return q @ k.mT
    want = scores(W_q, W_k, apply_rope_interleaved)
    assert torch.allclose(scores(interleaved_to_half(W_q, D), interleaved_to_half(W_k, D), apply_rope), want)
    if half > 2: assert not torch.equal(interleaved_to_half(W_q, D), half_to_interleaved(W_q, D))  # heads of 4 cannot tell

@quickly
@given(halves, st.integers(0, 900), st.integers(0, 900), st.integers(0, 60), seeds)
def test_rope_scores_depend_on_distance_only(half, a, b, distance, seed):
    D, table = 2 * half, [t.double() for t in rope_frequencies(2 * half, 1000)]
    q, k = torch.randn(2, 1, 1, 1, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    def score(m, n): return (apply_rope(q, *(t[m:m + 1] for t in table)) * apply_rope(k, *(t[n:n + 1] for t in table))).sum()
    assert abs(score(a + distance, a) - score(b + distance, b)) < 1e-3 * q.norm() * k.norm()       # the angles are float32

@quickly
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 30), seeds)
def test_rope_in_pieces_equals_rope_at_once(pieces, start, seed):
    T, table = sum(pieces), rope_frequencies(6, 100)
    x = torch.randn(1, 2, T, 6, generator=torch.Generator().manual_seed(seed))
    whole, at = apply_rope(x, *(t[start:start + T] for t in table)), start
    for piece, want in zip(x.split(pieces, 2), whole.split(pieces, 2)):
        assert torch.equal(apply_rope(piece, *(t[at:at + piece.shape[2]] for t in table)), want)
        at += piece.shape[2]

@quickly
@given(st.booleans(), st.integers(4, 70), st.integers(40, 600))
def test_buckets_grow_with_distance_and_stay_in_range(both, n, last):
    distance = torch.arange(0, 2 * last)
    got = relative_position_bucket(-distance, both, n, last)
    assert 0 <= got.min() and got.max() < n and (got.diff() >= 0).all()
    assert got[0] == 0 and (got[last:] == got[-1]).all()
    future = relative_position_bucket(distance[1:], both, n, last)
    assert (future == got[1:] + n // 2).all() if both else (future == 0).all()

@quickly
@given(st.integers(1, 200), st.integers(1, 30), st.integers(0, 30))
def test_alibi_for_any_number_of_heads(n_head, T_q, more):
    slopes = alibi_slopes(n_head)
    assert slopes.shape == (n_head,) and len(slopes.unique()) == n_head and (slopes > 0).all() and (slopes < 1).all()
    bias = mask_future(alibi_bias(n_head, T_q, T_q + more))
    assert torch.equal(bias[0].isinf(), relative_positions(T_q, T_q + more) > 0) and (bias[:, -1].diff(dim=-1) > 0).all()

@quickly
@given(st.integers(2, 40), st.floats(1, 64), st.integers(8, 10_000), st.sampled_from(['linear', 'ntk', 'yarn', 'llama3']))
def test_stretching_slows_each_pair_by_at_most_the_factor(half, factor, trained, method):
    plain, slow = inverse_frequencies(2 * half), scale_rope(2 * half, factor, method, trained)
    assert (slow <= plain * (1 + 1e-5)).all() and (slow >= plain / factor * (1 - 1e-5)).all()
    assert torch.allclose(torch.stack(rope_table(slow, 5)).square().sum(0), torch.ones(5, half), atol=1e-5)

@pytest.mark.parametrize('T', [1, 2, 4096])
def test_shapes_at_the_edges(T):
    assert sinusoidal_positions(T, 2).shape == (T, 2) and rope_frequencies(2, T)[0].shape == (T, 1)
    assert T5RelativeBias(3)(1, T).shape == (3, 1, T)

def test_attention_still_has_apply_rope_and_positions_needs_no_extras():
    code = ('import sys; from llm_course.attention import apply_rope; import llm_course.positions as p; assert apply_rope is p.apply_rope; '
            'bad = {"transformers", "matplotlib"} & set(sys.modules); assert not bad, bad')
    subprocess.run([sys.executable, '-c', code], check=True)
