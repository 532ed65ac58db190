"Properties of chapter 06b on random shapes and on every kind of block."
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.depth import activation_stats, gradient_norms, layer_norm, mup_groups, mup_init, record_stream, rms_norm, rms_norm_backward, tensor_stats
from llm_course.gpt import GPT, GPTConfig

shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 33))
SMALL = dict(vocab_size=20, max_seq_len=12, n_layer=3, n_head=2, d_model=16)
IDS = torch.randint(20, (2, 9), generator=torch.Generator().manual_seed(0))


@settings(max_examples=40, deadline=None)
@given(shape=shapes, scale=st.sampled_from([1e-3, 1., 1e4]), shift=st.sampled_from([0., 100.]), seed=st.integers(0, 99))
def test_norms_equal_torch_for_any_shape_and_size(shape, scale, shift, seed):
    g = torch.Generator().manual_seed(seed)
    x, w, b = scale * torch.randn(shape, generator=g, dtype=torch.float64) + shift, torch.randn(shape[-1], generator=g, dtype=torch.float64), torch.randn(shape[-1], generator=g, dtype=torch.float64)
    torch.testing.assert_close(rms_norm(x, w), F.rms_norm(x, shape[-1:], w, 1e-5), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(layer_norm(x, w, b), F.layer_norm(x, shape[-1:], w, b), atol=1e-6, rtol=1e-6)

@settings(max_examples=30, deadline=None)
@given(shape=shapes, weighted=st.booleans(), seed=st.integers(0, 99))
def test_the_backward_pass_by_hand_is_that_of_autograd(shape, weighted, seed):
    g = torch.Generator().manual_seed(seed)
    x, w, dy = (torch.randn(s, generator=g, dtype=torch.float64) for s in (shape, shape[-1:], shape))
    x.requires_grad_(); w = w.requires_grad_() if weighted else None
    F.rms_norm(x, shape[-1:], w, 1e-5).backward(dy)
    dx, dw = rms_norm_backward(dy, x.detach(), w.detach() if weighted else None)
    torch.testing.assert_close(dx, x.grad, atol=1e-10, rtol=1e-8)
    if weighted: torch.testing.assert_close(dw, w.grad, atol=1e-10, rtol=1e-8)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    x = (8 * torch.randn(64, 512, generator=torch.Generator().manual_seed(0))).to(dtype)
    for got, want in ((rms_norm(x), rms_norm(x.double())), (layer_norm(x), layer_norm(x.double()))):
        assert got.dtype == dtype and ((got.double() - want).abs() <= torch.finfo(dtype).eps * want.abs() + 1e-6).all()

@pytest.mark.parametrize('change', [dict(norm_position=p) for p in ('pre', 'post', 'sandwich')] + [dict(norm='layernorm', bias=True, position='learned'), dict(window=3), dict(scale_embeddings=True, activation='relu2')])
def test_the_recorded_stream_is_the_one_of_the_model(change):
    model = GPT(GPTConfig(**SMALL | change | dict(dropout=.5)))
    model.blocks[1].eval()                                                     # a mixture of modes
    modes = [m.training for m in model.modules()]
    s = record_stream(model, IDS)
    assert [m.training for m in model.modules()] == modes and not any(m._forward_hooks for m in model.modules())
    if model.config.norm_position != 'post': torch.testing.assert_close(s.x[:-1] + s.attn + s.mlp, s.x[1:], atol=1e-5, rtol=1e-5)
    model.eval()
    torch.testing.assert_close(model.norm(s.x[-1]), model.hidden(IDS), atol=1e-5, rtol=1e-5)
    stats = activation_stats(model, IDS)
    assert list(stats)[0] == 'embed' and list(stats)[-1] == 'head' and len(stats) == 2 + 4 * 3

@pytest.mark.parametrize('change', [{}, dict(norm='layernorm', bias=True, position='learned'), dict(qk_norm=True, n_kv_head=1, activation='geglu')])
def test_mup_groups_hold_each_parameter_once(change):
    model = mup_init(GPT(GPTConfig(**SMALL | change | dict(tie_embeddings=False))), 4)
    groups = mup_groups(model, 4, .1)
    ids = [id(p) for q in groups for p in q['params']]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    hidden = {id(p) for n, p in model.named_parameters() if p.dim() == 2 and n.startswith('blocks')}
    assert {id(p) for p in groups[1]['params']} == hidden and groups[1]['lr'] == .1 / 4 and groups[0]['lr'] == .1

def test_frozen_parameters_have_no_gradient_norm():
    model = GPT(GPTConfig(**SMALL))
    model.embed.weight.requires_grad_(False)
    assert 'embed.weight' not in (norms := gradient_norms(model, IDS, IDS)) and len(norms) == len(list(model.parameters())) - 1

@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=30))
def test_tensor_stats_count_every_entry(values):
    s, n = tensor_stats(torch.tensor(values)), len(values)
    finite = [v for v in values if math.isfinite(v)]
    assert s.bad == n - len(finite) and s.counts.sum().item() == sum(v != 0 for v in finite)
    if finite: assert s.largest == max(map(abs, finite)) and abs(s.zeros - finite.count(0.) / len(finite)) < 1e-6
