"""Properties of attention and GPT that must hold for any shape: hypothesis draws the shapes."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm_course.attention import ConcatCache, attention, causal_mask, padding_mask
from llm_course.core import generator
from llm_course.gpt import ACTIVATIONS, GPT, GPTConfig, count_params

few = settings(max_examples=25, deadline=None)


@st.composite
def configs(draw):
    kv, group, half = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([2, 3, 4]))
    window = draw(st.sampled_from([None, 1, 2, 5]))
    return GPTConfig(vocab_size=23, max_seq_len=16, n_layer=draw(st.sampled_from([1, 2, 3])), n_head=kv * group, n_kv_head=kv, head_dim=2 * half,
                     d_model=draw(st.sampled_from([8, 12])), d_ff=16, activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
                     norm=draw(st.sampled_from(['rmsnorm', 'layernorm'])), norm_position=draw(st.sampled_from(['pre', 'post', 'sandwich'])),
                     position=draw(st.sampled_from(['rope', 'learned'])), qk_norm=draw(st.booleans()), bias=draw(st.booleans()),
                     qkv_bias=draw(st.sampled_from([None, True, False])), window=window, global_every=draw(st.sampled_from([None, 2])) if window else None,
                     attn_softcap=draw(st.sampled_from([None, 2.])), logit_softcap=draw(st.sampled_from([None, 3.])),
                     attn_scale=draw(st.sampled_from([None, .3])), scale_embeddings=draw(st.booleans()), tie_embeddings=draw(st.booleans()))


def model_of(config, seed=0):
    model = GPT(config, seed).eval()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()): p.add_(torch.randn(p.shape, generator=generator(i)) * .2)    # biases and norms are not trivial
    return model


def ids_of(seed, B=2, T=12): return torch.randint(23, (B, T), generator=generator(seed))


@few
@given(configs(), st.integers(0, 10**6), st.integers(1, 11))
def test_no_position_sees_the_future(config, seed, t):
    model, ids = model_of(config), ids_of(seed)
    other = ids.clone(); other[:, t:] = (other[:, t:] + 1) % 23
    with torch.no_grad(): a, b = model(ids)[0], model(other)[0]
    assert torch.equal(a[:, :t], b[:, :t])
    assert not torch.equal(a[:, t], b[:, t])


@few
@given(configs(), st.integers(0, 10**6), st.lists(st.integers(1, 12), min_size=3, max_size=3), st.sampled_from(['left', 'right']))
def test_padding_and_batching_change_nothing(config, seed, lengths, side):
    model, T = model_of(config), 12
    ids, n = ids_of(seed, 3, T), torch.tensor(lengths)[:, None]
    real = torch.arange(T) < n if side == 'right' else torch.arange(T) >= T - n
    mask, places = padding_mask(real) & causal_mask(T), (real.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        batch = model(ids, mask=mask, positions=places)[0]
        other = torch.where(real, ids, (ids + 5) % 23)                                  # other words as padding
        assert torch.equal(model(other, mask=mask, positions=places)[0][real], batch[real])
        for row in range(3):
            alone = model(ids[row:row + 1, real[row]])[0][0]
            torch.testing.assert_close(batch[row, real[row]], alone, atol=2e-4, rtol=1e-3)


@few
@given(configs(), st.integers(0, 10**6), st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_in_pieces_with_a_cache_as_at_once(config, seed, sizes):
    model, ids = model_of(config), ids_of(seed, 2, sum(sizes[:5]) if sum(sizes) > 16 else sum(sizes))
    if ids.shape[1] > 16: ids = ids[:, :16]
    cache, out, start = ConcatCache(), [], 0
    with torch.no_grad():
        for size in sizes:
            if start >= ids.shape[1]: break
            piece = ids[:, start:start + size]; start += size
            out.append(model(piece, cache=cache)[0])
        torch.testing.assert_close(torch.cat(out, 1), model(ids)[0], atol=2e-4, rtol=1e-3)


@few
@given(configs())
def test_parameters_by_formula(config):
    assert sum(count_params(config).values()) == sum(p.numel() for p in GPT(config).parameters())
    assert GPTConfig.from_dict(config.to_dict()) == config


@few
@given(st.integers(0, 10**6), st.integers(0, 8), st.integers(1, 3))
def test_rope_models_see_distances_only(seed, shift, layers):
    model = model_of(GPTConfig(vocab_size=23, max_seq_len=24, n_layer=layers, n_head=2, d_model=12, d_ff=16))
    ids = ids_of(seed)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, positions=torch.arange(12) + shift)[0], model(ids)[0], atol=2e-4, rtol=1e-3)
        assert (model(ids, positions=2 * torch.arange(12))[0] - model(ids)[0]).abs().max() > 1e-4


@few
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(0, 5), st.sampled_from([1, 2]), st.sampled_from([1, 3]), st.floats(0, 1), st.booleans())
def test_attention_equals_pytorch_for_any_mask(seed, T_q, more, kv, group, density, with_bias):
    g, T_k = generator(seed), T_q + more
    q, k, v = torch.randn(2, kv * group, T_q, 4, generator=g), *(torch.randn(2, kv, T_k, 4, generator=g) for _ in 'kv')
    mask = torch.rand(2, 1, T_q, T_k, generator=g) < density                            # rows without any True are among them
    bias = torch.randn(kv * group, T_q, T_k, generator=g) if with_bias else None
    def run(fn):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = fn(*leaves); out.pow(2).sum().backward()
        return [out.detach(), *(t.grad for t in leaves)]
    ours = run(lambda *t: attention(*t, mask=mask, bias=bias))
    added = torch.zeros(2, kv * group, T_q, T_k).masked_fill(~mask, -math.inf) + (0 if bias is None else bias)
    with sdpa_kernel(SDPBackend.MATH): theirs = run(lambda *t: F.scaled_dot_product_attention(*t, attn_mask=added, enable_gqa=True))
    for a, b in zip(ours, theirs): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert ours[0][~mask.any(-1).expand(2, kv * group, T_q)].eq(0).all()                # who may look nowhere hears nothing


@pytest.mark.parametrize('window', [0, -3, 2.5, True])
def test_windows_that_are_none(window):
    with pytest.raises(ValueError, match='window='): GPTConfig(vocab_size=9, max_seq_len=4, n_layer=1, n_head=1, d_model=4, window=window)
    with pytest.raises(ValueError, match='window='): causal_mask(4, window=window)
