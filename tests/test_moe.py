"What the cells of 07c check on chosen sizes, checked on sizes that nobody chose."
import copy
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.gpt import GPTConfig
from llm_course.moe import MoE, MoEConfig, Router, balance_loss, expert_capacity, expert_load, moe_flops, moe_gpt, moe_layers, moe_params, plan_dispatch, update_biases

quickly = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31)


@st.composite
def choices(draw):
    "Tokens and the different experts that each has chosen: (N, k), and E."
    E = draw(st.integers(1, 12)); k = draw(st.integers(1, E)); N = draw(st.integers(0, 30))
    return torch.rand(N, E, generator=torch.Generator().manual_seed(draw(seeds))).argsort(-1)[:, :k], E

@quickly
@given(choices(), st.one_of(st.none(), st.integers(1, 8)))
def test_a_plan_is_first_come_first_served(case, capacity):
    experts, E = case
    plan, flat = plan_dispatch(experts, E, capacity), experts.flatten().tolist()
    want = {e: [] for e in range(E)}
    for pair, e in enumerate(flat):                                 # the definition, pair by pair
        if capacity is None or len(want[e]) < capacity: want[e].append(pair)
    assert [p.tolist() for p in plan.pairs.split(plan.counts.tolist())] == list(want.values())
    assert plan.demand.tolist() == [flat.count(e) for e in range(E)] and int(plan.counts.sum()) == len(plan.pairs)

@quickly
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 40), st.data())
def test_grouped_equals_a_loop_over_tokens(d_ff, E, N, data):
    k, seed = data.draw(st.integers(1, E)), data.draw(seeds)
    torch.manual_seed(seed)
    moe, x = MoE(4, d_ff, E, k, normalize=data.draw(st.booleans())).double(), torch.randn(N, 4, dtype=torch.float64)
    capacity = data.draw(st.one_of(st.none(), st.floats(.05, 3)))
    moe.capacity_factor = capacity
    y, (routing, plan) = moe(x), moe.last
    served, want = set(plan.pairs.tolist()), torch.zeros_like(x)
    for n in range(N):
        for j in range(k):
            if n * k + j not in served: continue
            up, down, gate = moe._slices()[routing.experts[n, j]]
            want[n] += routing.weights[n, j] * (down @ (torch.nn.functional.silu(gate @ x[n]) * (up @ x[n])))
    assert torch.allclose(y, want, atol=1e-6)
    assert abs(expert_load(moe)[0].dropped - (1 - len(served) / (N * k))) < 1e-9
    if capacity is None: assert len(served) == N * k

@quickly
@given(st.integers(1, 5), st.integers(1, 8), seeds, st.data())
def test_without_capacity_tokens_are_independent(B, E, seed, data):
    torch.manual_seed(seed)
    moe, x = MoE(6, 4, E, data.draw(st.integers(1, E)), n_shared=data.draw(st.integers(0, 2))), torch.randn(B, 7, 6)
    y, order = moe(x), torch.randperm(B * 7)
    assert torch.allclose(moe(x.flatten(0, 1)[order]), y.flatten(0, 1)[order], atol=1e-5)
    assert torch.allclose(moe(x[:1, 3:4]), y[:1, 3:4], atol=1e-5)

@settings(max_examples=15, deadline=None)
@given(st.integers(1, 14), st.sampled_from([None, .5, 1., 1.5]), st.integers(1, 3), seeds)
def test_no_position_sees_the_future_with_or_without_capacity(at, capacity, k, seed):
    model = moe_gpt(GPTConfig(50, 16, 2, 2, 16, d_ff=16), MoEConfig(4, k, d_ff=8, capacity_factor=capacity), seed)
    ids = torch.randint(50, (1, 16), generator=torch.Generator().manual_seed(seed))
    other = ids.clone(); other[0, at] = (ids[0, at] + 1) % 50
    with torch.no_grad(): moved = (model(ids)[0] - model(other)[0]).abs().amax(-1)[0] > 1e-5
    assert not moved[:at].any() and moved[at]

@quickly
@given(st.integers(1, 300), st.integers(1, 64), st.floats(1e-3, 50), st.data())
def test_capacity_is_the_ceiling_and_never_zero(N, E, factor, data):
    k = data.draw(st.integers(1, E))
    C = expert_capacity(N, E, k, factor)
    assert expert_capacity(N, E, k, 1e-12) == 1
    assert C >= 1 and C >= factor * N * k / E - 1e-6 and (C == 1 or C - 1 < factor * N * k / E)

@quickly
@given(st.integers(2, 8), st.integers(5, 60), seeds, st.data())
def test_padding_changes_no_loss_and_no_bias(E, N, seed, data):
    torch.manual_seed(seed)
    k, n = data.draw(st.integers(1, E)), data.draw(st.integers(1, N))
    moe, x = MoE(5, 3, E, k), torch.randn(N, 5)
    keep = torch.arange(N) < n
    moe(x); padded = balance_loss(moe, keep)
    moe(x[:n]); assert torch.allclose(balance_loss(moe), padded, atol=1e-5)
    twins = [copy.deepcopy(moe) for _ in range(2)]
    for m, batch, mask in zip(twins, (x, x[:n]), (keep, None)): m.balance = 'bias'; m(batch); update_biases(m, .1, mask)
    assert torch.equal(*(m.router.bias for m in twins))

@quickly
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.integers(0, 3), st.integers(0, 2), st.sampled_from(['swiglu', 'relu2']), st.booleans(), st.data())
def test_parameters_by_formula(n_layer, E, every, dense_first, n_shared, activation, bias, data):
    config = GPTConfig(20, 8, n_layer, 2, 8, d_ff=12, activation=activation, bias=bias)
    moe = MoEConfig(E, data.draw(st.integers(1, E)), data.draw(st.one_of(st.none(), st.integers(1, 9))), every, dense_first, n_shared)
    with torch.device('meta'): model = moe_gpt(config, moe)
    n = moe_params(config, moe)
    assert n['total'] == sum(p.numel() for p in model.parameters()) and n['active'] <= n['total'] and moe_flops(config, moe) > 0
    assert len(moe_layers(model)) == len(moe.where(n_layer))

@quickly
@given(st.integers(2, 8), seeds, st.data())
def test_the_bias_acts_on_the_choice_and_not_on_the_weights(E, seed, data):
    torch.manual_seed(seed)
    router = Router(4, E, data.draw(st.integers(1, E)))
    router.bias.normal_(0, .3)
    r = router(torch.randn(9, 4)); k = r.experts.shape[1]
    assert torch.equal(r.experts, (r.probs + router.bias).topk(k).indices)
    bare = r.probs.gather(1, r.experts)
    assert torch.allclose(r.weights, bare / bare.sum(-1, keepdim=True) if k > 1 else bare)

def test_the_bias_evens_out_any_load():
    torch.manual_seed(0)
    moe, x = MoE(16, 4, 8, 2, balance='bias'), torch.randn(400, 16) + 2 * torch.randn(16)
    moe(x); before = expert_load(moe)[0].entropy
    for _ in range(300): moe(x); update_biases(moe, .005)
    assert before < .9 and expert_load(moe)[0].entropy > .99

def test_a_saved_model_remembers_its_biases_and_not_its_last_batch():
    moe = MoE(4, 3, 4, 2, balance='bias'); moe(torch.randn(9, 4)); update_biases(moe, .1)
    twin = MoE(4, 3, 4, 2); twin.load_state_dict(moe.state_dict())
    assert torch.equal(twin.router.bias, moe.router.bias) and twin.router.bias.abs().max() > 0
    assert copy.deepcopy(moe).last is None and moe.last is not None

@pytest.mark.parametrize('make, message', [
    (lambda: MoE(4, 2, 2, 3), 'more than n_expert=2'), (lambda: MoE(4, 2, 0, 0), 'n_expert=0'), (lambda: MoE(4, 2, 3, -1), 'n_expert_active=-1'),
    (lambda: MoE(4, 2, 3, 1, capacity_factor=0.), 'capacity_factor=0.0'), (lambda: MoE(4, 2, 3, 1, capacity_factor=math.inf), 'capacity_factor=inf'),
    (lambda: MoE(4, 0, 3, 1), 'd_ff=0'), (lambda: MoEConfig(4, 2, dense_first=-1), 'dense_first=-1'), (lambda: MoEConfig(4, 2, d_ff=0), 'd_ff=0'),
    (lambda: Router(4, 3, 2)(torch.full((2, 4), math.nan)), 'earlier layer')])
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message): make()

def test_training_a_gpt_with_more_experts_than_tokens():
    model = moe_gpt(GPTConfig(20, 8, 2, 2, 16), MoEConfig(40, 3, d_ff=4, capacity_factor=.1))
    ids = torch.randint(20, (1, 2))
    (model(ids, ids)[1] + balance_loss(model)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(l.entropy < 1 and math.isclose(sum(l.shares), 1, abs_tol=1e-5) for l in expert_load(model))

def test_moe_needs_no_extras():
    code = 'import sys, llm_course.moe; bad = {"transformers", "matplotlib"} & set(sys.modules); assert not bad, bad'
    subprocess.run([sys.executable, '-c', code], check=True)
