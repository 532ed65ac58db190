"""Chapter 11: properties that a notebook cell cannot hold, on random sizes and settings."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.core import generator
from llm_course.gpt import GPT, GPTConfig
from llm_course.pretraining import TrainConfig, make_optimizer
from llm_course.scaling import (FORMATS, KEPT, LossScaler, PeakBytes, SavedBytes, available_memory, check_fits, checkpoint_activations,
                                chunked_cross_entropy, chunked_loss, lost_share, measure_training, memory_plan, this_hardware)

quickly = settings(max_examples=30, deadline=None)


# -- chunked cross-entropy -------------------------------------------------------------------------------------------
@quickly
@given(n=st.integers(1, 40), v=st.integers(1, 30), d=st.integers(1, 9), chunk=st.integers(1, 50), softcap=st.sampled_from([None, .5, 20.]),
       ignored=st.sampled_from([0., .3, 1.]), seed=st.integers(0, 99), upstream=st.floats(-3, 3))
def test_chunked_loss_equals_the_whole(n, v, d, chunk, softcap, ignored, seed, upstream):
    g = generator(seed)
    h, w = torch.randn(n, d, generator=g).double(), torch.randn(v, d, generator=g).double()
    y = torch.randint(v, (n,), generator=g).masked_fill(torch.rand(n, generator=g) < ignored, -100)

    def whole(h, w):
        z = h @ w.T
        if softcap: z = softcap * (z / softcap).tanh()
        return F.cross_entropy(z, y, reduction='sum', ignore_index=-100) / (y != -100).sum().clamp_min(1)

    results = []
    for f in (whole, lambda h, w: chunked_cross_entropy(h, w, y, chunk, softcap)):
        a, b = h.clone().requires_grad_(), w.clone().requires_grad_()
        loss = f(a, b)
        (upstream * loss).backward()
        results.append((loss.detach(), a.grad, b.grad))
    for a, b in zip(*results): assert torch.allclose(a, b, atol=1e-10, rtol=1e-10)

def test_extreme_scores_do_not_overflow():
    h = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    loss = chunked_cross_entropy(h, torch.tensor([[1.], [-1.]]), torch.tensor([0, 0]), 1)
    loss.backward()
    assert loss.item() == pytest.approx(1e4) and h.grad.isfinite().all()

def test_chunked_loss_survives_float16_where_an_early_division_would_not():
    "2**24 / n rows: the gradient of one row, divided by the number of rows, is below float16; times the scale it is not."
    n, scale = 2**15, 2.**15
    h, w = torch.randn(n, 4, generator=generator(0)).half().requires_grad_(), torch.randn(5, 4, generator=generator(1)).half().requires_grad_()
    y = torch.zeros(n, dtype=torch.int64)
    (chunked_cross_entropy(h, w, y, 1000) * scale).backward()
    a, b = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    (F.cross_entropy(a @ b.T, y) * scale).backward()
    assert ((h.grad.double() - a.grad).norm() / a.grad.norm()).item() < .01

def test_only_what_needs_a_gradient_gets_one():
    h, w, y = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True), torch.tensor([0, 1, 2])
    chunked_cross_entropy(h, w, y).backward()
    assert w.grad is not None and h.grad is None
    with torch.no_grad(): assert not chunked_cross_entropy(h, w, y).requires_grad

def test_mask_and_positions_reach_the_model():
    m = GPT(GPTConfig(vocab_size=20, max_seq_len=8, n_layer=1, n_head=2, d_model=16))
    ids = torch.randint(20, (2, 8), generator=generator(0))
    kwargs = dict(mask=torch.eye(8, dtype=torch.bool), positions=torch.arange(8).flip(0))
    assert torch.allclose(chunked_loss(3)(m, ids, ids, **kwargs), m(ids, ids, **kwargs)[1], atol=1e-6)
    assert not torch.allclose(chunked_loss(3)(m, ids, ids), m(ids, ids, **kwargs)[1], atol=1e-4)


# -- loss scaling ----------------------------------------------------------------------------------------------------
@quickly
@given(events=st.lists(st.sampled_from(['good', 'inf', 'nan']), min_size=1, max_size=30), interval=st.integers(1, 4), power=st.integers(-3, 20),
       clip=st.booleans(), growth=st.sampled_from([2., 4.]), backoff=st.sampled_from([.5, .25]))
def test_scaler_equals_torch(events, interval, power, clip, growth, backoff):
    ours = LossScaler(2.**power, growth, backoff, interval)
    theirs = torch.amp.GradScaler('cpu', init_scale=2.**power, growth_factor=growth, backoff_factor=backoff, growth_interval=interval)
    ws = [torch.ones(3, requires_grad=True) for _ in range(2)]
    opts = [torch.optim.Adam([w], lr=.1) for w in ws]
    for t, event in enumerate(events):
        factor = {'good': 1. + t, 'inf': math.inf, 'nan': math.nan}[event]
        for w, opt, s in zip(ws, opts, (ours, theirs)):
            opt.zero_grad()
            s.scale((w * torch.tensor([1., -2., .5]) * factor).sum()).backward()
            if clip: s.unscale_(opt); torch.nn.utils.clip_grad_norm_([w], 1.)
            s.step(opt); s.update()
        assert ours.factor == theirs.get_scale() and ours.good == theirs.state_dict()['_growth_tracker']
        assert torch.equal(*ws)

def test_scaler_does_not_grow_beyond_float32():
    s, w = LossScaler(2.**127, interval=1), torch.ones(1, requires_grad=True)
    w.grad = torch.zeros(1)
    s.step(torch.optim.SGD([w])); s.update()
    assert s.factor == 2.**127


# -- formats ---------------------------------------------------------------------------------------------------------
@quickly
@given(st.sampled_from(['float16', 'bfloat16']), st.lists(st.floats(-150, 140), min_size=1, max_size=50), st.integers(-20, 20))
def test_lost_share_says_what_conversion_does(name, logs, power):
    x = torch.tensor([2.**v for v in logs], dtype=torch.float64)
    y = (x * 2.**power).to(getattr(torch, name))
    assert lost_share(x, FORMATS[name], 2.**power) == pytest.approx(((y == 0) | y.isinf()).double().mean().item())


# -- checkpointing ---------------------------------------------------------------------------------------------------
@settings(max_examples=12, deadline=None)
@given(every=st.integers(1, 4), dropout=st.sampled_from([0., .2]), layers=st.integers(1, 4), bf16=st.booleans(), norm=st.sampled_from(['pre', 'post', 'sandwich']))
def test_checkpointing_changes_no_gradient(every, dropout, layers, bf16, norm):
    m = GPT(GPTConfig(vocab_size=20, max_seq_len=8, n_layer=layers, n_head=2, d_model=16, dropout=dropout, norm_position=norm))
    ids, got = torch.randint(20, (2, 8), generator=generator(0)), []
    for n in (None, every):
        checkpoint_activations(m, n).zero_grad(); torch.manual_seed(1)
        with torch.autocast('cpu', torch.bfloat16, enabled=bf16): loss = m(ids, ids)[1]
        loss.backward()
        got.append(torch.cat([p.grad.flatten() for p in m.parameters()]))
    assert torch.equal(*got) and got[0].abs().sum() > 0

def test_a_checkpointed_model_can_be_copied_evaluated_and_saved():
    m = checkpoint_activations(GPT(GPTConfig(vocab_size=20, max_seq_len=8, n_layer=2, n_head=2, d_model=16)))
    ids = torch.randint(20, (2, 8), generator=generator(0))
    twin = copy.deepcopy(m)
    with torch.no_grad(): assert torch.equal(twin(ids)[0], m(ids)[0])
    twin.load_state_dict(m.state_dict())
    assert type(twin.blocks[0]).__name__ == 'CheckpointedBlock'


# -- memory ----------------------------------------------------------------------------------------------------------
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_plan_against_count(data):
    pick = lambda *values: data.draw(st.sampled_from(values))
    c = GPTConfig(vocab_size=pick(50, 1000), max_seq_len=64, n_layer=pick(1, 3), n_head=4, d_model=64, n_kv_head=pick(1, 4), norm=pick('rmsnorm', 'layernorm'),
                  activation=pick(*KEPT), position=pick('rope', 'learned'), qk_norm=pick(False, True), bias=pick(False, True), norm_position=pick('pre', 'post', 'sandwich'),
                  dropout=pick(0., .1), logit_softcap=pick(None, 20.), tie_embeddings=pick(False, True))
    t = TrainConfig(batch_size=8, precision=pick('float32', 'bfloat16'), accumulate=pick(1, 2))
    options = dict(checkpoint_every=pick(None, 1, 2), chunk=pick(None, 64))
    plan, m, ids = memory_plan(c, t, **options), checkpoint_activations(GPT(c), options['checkpoint_every']), torch.randint(c.vocab_size, (8, 65), generator=generator(0))
    loss_fn, opt = chunked_loss(64) if options['chunk'] else lambda m, x, y: m(x, y)[1], make_optimizer(m, t)
    xb, yb = ids[:, :-1].clone(), ids[:, 1:].clone()

    def forward():
        with torch.autocast('cpu', torch.bfloat16, enabled=t.precision != 'float32'): return loss_fn(m, xb, yb)

    for p in m.parameters(): p.grad = torch.zeros_like(p)
    opt.step()
    static = sum(p.nbytes for p in m.parameters()) + sum(s.nbytes for v in opt.state.values() for s in v.values() if s.dim())
    assert abs(plan.parameters + plan.optimizer - static) < .001 * static
    with SavedBytes(m) as saved: forward()
    assert .97 < plan.kept / saved.bytes < 1.03
    if t.accumulate == 1: opt.zero_grad(set_to_none=True)
    else: static += sum(p.grad.nbytes for p in m.parameters())
    with PeakBytes() as count: forward().backward()
    assert .85 < plan.peak / (static + count.peak) < 1.2

def test_nothing_of_a_step_stays_behind():
    m = GPT(GPTConfig(vocab_size=20, max_seq_len=8, n_layer=1, n_head=2, d_model=16))
    with PeakBytes() as count:
        m(torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.int64))[1].backward()
        m.zero_grad(set_to_none=True)
        assert count.live == 0 and count.peak > 0

def test_a_config_that_does_not_fit_is_refused_before_it_is_built():
    huge = GPTConfig.from_name('llama-2-70b')
    with pytest.raises(MemoryError, match=r'a step needs [\d.]+ GB, but .* GB are available'): check_fits(memory_plan(huge), available_memory())
    with pytest.raises(MemoryError): measure_training(huge, TrainConfig(), this_hardware())
    plan = memory_plan(GPTConfig(vocab_size=20, max_seq_len=8, n_layer=1, n_head=2, d_model=16))
    check_fits(plan, plan.peak)
    with pytest.raises(MemoryError): check_fits(plan, plan.peak - 1)
