"The optimizers of chapter 10b against PyTorch's, on problems that hypothesis makes up, and a run that is resumed in the middle."
import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llm_course.core import generator
from llm_course.gpt import GPT, GPTConfig
from llm_course.optimizers import EMA, SGD, AdamW, Muon, newton_schulz, noise_scale, param_groups, smoothed_loss, wsd
from llm_course.pretraining import TrainConfig, Trainer, lr_at, make_optimizer

shapes = st.lists(st.lists(st.integers(1, 7), max_size=3).map(tuple), min_size=1, max_size=5)
matrices = st.lists(st.tuples(st.integers(1, 24), st.integers(1, 24)), min_size=1, max_size=5)
rates = st.floats(1e-4, .3)
few = settings(max_examples=40, deadline=None)

def problem(shapes, dtype, seed, device='cpu'):
    g = generator(seed)
    return [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes]

def run(params, optimizer, steps, seed, skip=False):
    "The same gradients for the same seed, of very different sizes. With `skip`, the first parameter gets none in every second step."
    g = generator(seed)
    for step in range(steps):
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, generator=g, dtype=torch.float64) * 10.**(i - 2)
            p.grad = None if skip and i == 0 and step % 2 else grad.to(p.dtype)
        optimizer.step()
    return params

def apart(a, b, start):
    return max(((p - q).norm() / ((q - s).norm() + 1e-30)).item() for p, q, s in zip(a, b, start))

def compare(ours, theirs, shapes, dtype, steps, seed, skip=False):
    a, b, start = (problem(shapes, dtype, seed) for _ in range(3))
    return apart(run(a, ours(a), steps, seed, skip), run(b, theirs(b), steps, seed, skip), start)


@few
@given(shapes, st.sampled_from([torch.float32, torch.float64]), rates, st.floats(0, .99), st.floats(0, .999), st.floats(0, 1), st.integers(1, 20), st.booleans(), st.integers(0, 99))
def test_adamw_is_pytorchs(shapes, dtype, lr, b1, b2, decay, steps, skip, seed):
    options = dict(lr=lr, betas=(b1, b2), weight_decay=decay)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    assert compare(lambda p: AdamW(p, **options), lambda p: torch.optim.AdamW(p, **options), shapes, dtype, steps, seed, skip) < tolerance

@few
@given(shapes, st.sampled_from([torch.float32, torch.float64]), st.floats(1e-4, .1), st.floats(0, .99), st.booleans(), st.floats(0, 1), st.integers(1, 20), st.integers(0, 99))
def test_sgd_is_pytorchs(shapes, dtype, lr, momentum, nesterov, decay, steps, seed):
    options = dict(lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0, weight_decay=decay)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    assert compare(lambda p: SGD(p, **options), lambda p: torch.optim.SGD(p, **options), shapes, dtype, steps, seed) < tolerance

lopsided = st.lists(st.tuples(st.integers(1, 8), st.integers(16, 24), st.booleans()).map(lambda s: (s[1], s[0]) if s[2] else s[:2]), min_size=1, max_size=5)

@few     # no square matrices: a tiny singular value turns a last bit of bfloat16 into a visible difference on a processor that adds in another order
@given(lopsided, rates, st.floats(0, .99), st.booleans(), st.floats(0, 1), st.sampled_from(['original', 'match_rms_adamw']), st.integers(0, 5), st.integers(1, 8), st.integers(0, 99))
def test_muon_is_pytorchs_in_bfloat16(shapes, lr, momentum, nesterov, decay, adjust, ns_steps, steps, seed):
    options = dict(lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=decay, ns_steps=ns_steps)
    error = compare(lambda p: Muon(p, ns_dtype=torch.bfloat16, adjust_lr=adjust, **options), lambda p: torch.optim.Muon(p, adjust_lr_fn=adjust, **options),
                    shapes, torch.float32, steps, seed)
    assert error < .05                # bfloat16 rounds by 2^-9, and five iterations multiply a difference in a small singular value by up to 3.4 each

@few
@given(matrices, rates, st.floats(0, .99), st.booleans(), st.floats(0, 1), st.integers(1, 8), st.integers(0, 99))
def test_muon_apart_from_the_precision_of_its_iteration(shapes, lr, momentum, nesterov, decay, steps, seed):
    "PyTorch's optimizer with the iteration in float64 put in its place: what is left must agree to many digits."
    import torch.optim._muon as theirs
    options = dict(lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=decay)
    def in_float64(grad, coefficients, steps, eps):
        a, b, c = coefficients
        X = grad / grad.norm().clamp(min=eps)
        for _ in range(steps): X = a * X + (b * X @ X.T + c * X @ X.T @ X @ X.T) @ X
        return X
    with pytest.MonkeyPatch.context() as m:
        m.setattr(theirs, '_zeropower_via_newtonschulz', in_float64)
        assert compare(lambda p: Muon(p, **options), lambda p: torch.optim.Muon(p, **options), shapes, torch.float64, steps, seed) < 1e-7

@few
@given(st.lists(st.integers(1, 4), max_size=2), st.integers(1, 30), st.integers(1, 30), st.integers(0, 99))
def test_newton_schulz_keeps_singular_vectors_and_lifts_values(batch, r, c, seed):
    G = torch.randn(*batch, r, c, generator=generator(seed), dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    x = S / S.norm(dim=-1, keepdim=True)
    for _ in range(5): x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    torch.testing.assert_close(newton_schulz(G), U @ torch.diag_embed(x) @ Vh, atol=1e-6, rtol=1e-6)
    assert x.max() < 1.21


OPTIMIZERS = {'sgd': lambda p: SGD(p, lr=.1, momentum=.9, weight_decay=.1), 'adamw': lambda p: AdamW(p), 'muon': lambda p: Muon(p),
              'both': lambda p: Muon([{'params': p[:1]}, {'params': p[1:], 'kind': 'adamw', 'lr': 1e-3, 'lr_scale': .05}])}

@pytest.mark.parametrize('name', OPTIMIZERS)
def test_state_dict_round_trip_through_a_file(name, tmp_path):
    make, shape = OPTIMIZERS[name], [(8, 3), (4, 4), (3, 8)]
    a = problem(shape, torch.float32, 0); first = make(a); run(a, first, 4, 1)
    b = [nn.Parameter(p.detach().clone()) for p in a]; second = make(b)
    torch.save(first.state_dict(), tmp_path/'state.pt')
    second.load_state_dict(torch.load(tmp_path/'state.pt', weights_only=True))
    for p, q in zip(run(a, first, 4, 2), run(b, second, 4, 2)): assert torch.equal(p, q)
    c = [nn.Parameter(p.detach().clone()) for p in problem(shape, torch.float32, 0)]; run(c, make(c), 4, 1)
    for p, q in zip(run(c, make(c), 4, 2), a): assert not torch.equal(p, q)          # without its state it would have gone elsewhere

def test_closure_and_missing_gradients():
    w, frozen = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(2, 2))
    for cls in (SGD, AdamW, Muon):
        opt = cls([w, frozen])
        def closure(): opt.zero_grad(); loss = (w**2).sum(); loss.backward(); return loss
        before = w.detach().clone(); assert opt.step(closure) == (before**2).sum()
        assert not torch.equal(w, before) and torch.equal(frozen, torch.ones(2, 2)) and frozen not in opt.state
    sparse = nn.Embedding(4, 2, sparse=True); sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match='sparse or complex'): AdamW(sparse.parameters()).step()

TINY = GPTConfig(vocab_size=16, max_seq_len=16, n_layer=2, n_head=2, d_model=16, qk_norm=True)
text = np.random.default_rng(0).integers(16, size=4000)

@pytest.mark.parametrize('name,args', [('muon', {'matrix_lr': .05, 'ns_steps': 4, 'adjust_lr': 'match_rms_adamw'}), ('sgd', {'momentum': .8, 'nesterov': True})])
def test_resume_is_exact(name, args, tmp_path):
    config = TrainConfig(max_steps=12, batch_size=4, optimizer=name, optimizer_args=args, schedule='wsd', eval_every=12, checkpoint_every=4, lr=.02)
    whole = Trainer(GPT(TINY), text, text[:500], config, tmp_path/'whole'); want = whole.fit(progress=False)
    Trainer(GPT(TINY), text, text[:500], config, tmp_path/'part').fit(until=7, progress=False)
    part = Trainer(GPT(TINY), text, text[:500], config, tmp_path/'part'); assert part.resume() and part.step == 4
    got = part.fit(progress=False)
    assert [r['loss'] for r in got if 'loss' in r] == [r['loss'] for r in want if 'loss' in r]
    for p, q in zip(whole.model.parameters(), part.model.parameters()): assert torch.equal(p, q)

def test_param_groups_cover_each_parameter_once():
    for config in (TINY, GPTConfig(vocab_size=16, max_seq_len=16, n_layer=1, n_head=2, d_model=16, tie_embeddings=False, position='learned', norm='layernorm', bias=True)):
        model = GPT(config); groups = param_groups(model, TrainConfig(lr=.01))
        found = [id(p) for g in groups for p in g['params']]
        assert sorted(found) == sorted(id(p) for p in model.parameters())
        hidden = {id(p) for p in groups[0]['params']}
        assert hidden == {id(p) for n, p in model.named_parameters() if n.startswith('blocks.') and p.dim() == 2}
        assert [g['weight_decay'] for g in groups] == [.1, .1, 0.] and groups[0]['lr_scale'] == 2.

@few
@given(st.integers(1, 400), st.floats(0, .5), st.floats(0, .5), st.floats(0, 1))
def test_wsd_falls_in_the_last_share_of_the_steps(steps, warmup, decay, final):
    c = TrainConfig(max_steps=steps, warmup=warmup, decay=decay, schedule='wsd', lr=1., final_lr=final)
    rates, rise = [lr_at(t, c) for t in range(steps)], round(warmup * steps)
    assert all(a >= b for a, b in zip(rates[rise:], rates[rise + 1:])) and all(final - 1e-9 <= r <= 1 for r in rates[rise:])
    assert all(r == 1 for r in rates[rise:math.floor(steps * (1 - decay)) - 1])
    if final < 1 and decay * steps > 3 and steps > 10: assert rates[-1] == pytest.approx(final) and rates[math.ceil(steps * (1 - decay)) + 1] < 1
    assert wsd(0., c) == 1. or decay + warmup >= 1

def test_ema_survives_an_exception_and_tied_weights():
    model = GPT(TINY); ema = EMA(model, .9); own = model.embed.weight.detach().clone()
    model.embed.weight.data.add_(1.); ema.update(model)
    with pytest.raises(KeyError), ema.applied(model):
        assert not torch.equal(model.embed.weight, own + 1.) and model.head.weight is model.embed.weight
        raise KeyError
    assert torch.equal(model.embed.weight, own + 1.)
    other = EMA(GPT(TINY, seed=1), .5); other.load_state_dict(copy.deepcopy(ema.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(other.average.values(), ema.average.values())) and other.updates == 1
    with pytest.raises(ValueError, match='has shape'): EMA(GPT(GPTConfig(**{**TINY.to_dict(), 'vocab_size': 17})), .5).load_state_dict(ema.state_dict())

@few
@given(st.floats(0, .9), st.floats(0, .1), st.integers(0, 99))
def test_smoothed_loss_gradient(smoothing, z, seed):
    g = generator(seed)
    logits = (4 * torch.randn(2, 3, 7, generator=g, dtype=torch.float64)).requires_grad_()
    y = torch.randint(7, (2, 3), generator=g); y[0, 0] = -100
    ours = torch.autograd.grad(smoothed_loss(smoothing, z)(lambda ids: (logits, None), None, y), logits)[0]
    plain = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), label_smoothing=smoothing)
    Z = logits.logsumexp(-1)[y != -100]
    torch.testing.assert_close(ours, torch.autograd.grad(plain + z * (Z**2).mean(), logits)[0])

def test_the_trainer_takes_the_loss_and_saves_the_average(tmp_path):
    c = TrainConfig(max_steps=4, batch_size=4, eval_every=4, checkpoint_every=4, optimizer='muon', accumulate=2)
    model = GPT(TINY); ema = EMA(model, .9)
    run = Trainer(model, text, text[:500], c, tmp_path/'run', loss_fn=smoothed_loss(.1, 1e-4), extras={'ema': ema})
    run.optimizer.register_step_post_hook(lambda *_: ema.update(model)); run.fit(progress=False)
    fresh = GPT(TINY); saved = EMA(fresh, .5)
    again = Trainer(fresh, text, text[:500], c, tmp_path/'run', loss_fn=smoothed_loss(.1, 1e-4), extras={'ema': saved}); assert again.resume()
    assert saved.updates == 4 and all(torch.equal(a, b) for a, b in zip(saved.average.values(), ema.average.values()))
    batches = [(torch.from_numpy(text[i:i + 64].reshape(4, 16)), torch.from_numpy(text[i + 1:i + 65].reshape(4, 16))) for i in range(0, 640, 64)]
    model.zero_grad()
    assert noise_scale(model, batches).trace > 0 and all(p.grad is None for p in model.parameters())


def test_a_number_format_that_there_is_not():
    model = GPT(GPTConfig(vocab_size=11, max_seq_len=4, n_layer=1, n_head=1, d_model=8))
    for bad in ('bf16', 'nn'):
        with pytest.raises(ValueError, match=f"ns_dtype='{bad}' is no number format"): make_optimizer(model, TrainConfig(optimizer='muon', optimizer_args={'ns_dtype': bad}))
    make_optimizer(model, TrainConfig(optimizer='muon', optimizer_args={'ns_dtype': 'bfloat16'}))
