"Chapter 10c beyond the page: Weights & Biases offline, the watch inside a Trainer, bands under hypothesis, and the bands that ship."
import copy
import json
import math
import sys
from importlib.resources import files

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from llm_course.core import generator
from llm_course.dataloading import Batches
from llm_course.debugging import (CAUSES, WandbTracker, band_steps, check_folder, check_run, load_band, make_band, overfit_batch, silent_parameters, t_quantile,
                                  target_shift, thin_log, watch, window_means)
from llm_course.gpt import GPT, GPTConfig
from llm_course.pretraining import TrainConfig, Trainer

few = settings(max_examples=30, deadline=None)
config = GPTConfig(vocab_size=16, max_seq_len=8, n_layer=2, n_head=2, d_model=16, dropout=.1)
ids = torch.randint(16, (600,), generator=generator(0)).numpy()
brief = TrainConfig(max_steps=6, batch_size=4, eval_every=3, eval_batches=2, checkpoint_every=3, accumulate=2)

def trainer(folder, model=None, config_=brief, **more): return Trainer(model or GPT(config, seed=1), ids, ids[:100], config_, folder, **more)

def made_up(n, steps=30, seed=0, level=3.):
    noise = .05 * np.random.default_rng(seed).normal(size=(n, steps))
    return [[{'step': 0, 'val_loss': 4.}] + [{'step': s + 1, 'loss': level + x, 'lr': 1e-3} for s, x in enumerate(row)] for row in noise.tolist()]


def offline(folder, tmp_path, until):
    tracker = WandbTracker('course', 'a run', dir=str(tmp_path), mode='offline', config={'lr': .1})
    t = trainer(folder, trackers=[tracker], extras={'wandb': tracker})
    t.resume(); t.fit(until=until, progress=False); tracker.close()
    return tracker

def test_wandb_offline_goes_on_in_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline'); monkeypatch.setenv('WANDB_SILENT', 'true')
    first = offline(tmp_path/'run', tmp_path, 3)
    second = offline(tmp_path/'run', tmp_path, 6)
    written = list((tmp_path/'wandb').glob('offline-run-*/*.wandb'))
    assert first.id == second.id and len(written) == 2
    assert {p.name for p in written} == {f'run-{first.id}.wandb'}, written

def test_wandb_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(ImportError, match='pip install wandb'): WandbTracker('course')

def test_wandb_is_not_imported_by_the_module():
    import subprocess
    code = "import sys, llm_course.debugging; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_watch_changes_nothing_in_a_trainer_with_dropout_and_accumulation(tmp_path):
    plain, watched = trainer(tmp_path/'a'), trainer(tmp_path/'b')
    plain.fit(progress=False)
    with watch(watched.model, every=2) as w: watched.fit(progress=False)
    assert all(torch.equal(p, q) for p, q in zip(plain.model.parameters(), watched.model.parameters()))
    assert [r['step'] for r in w.records] == [1, 3, 5]
    assert all(math.isfinite(x) for r in w.records for kind in ('activation', 'gradient', 'update') for x in r[kind].values())

def test_watch_averages_the_micro_batches_and_ignores_validation(tmp_path):
    model = GPT(GPTConfig(**config.to_dict() | {'dropout': 0.}), seed=1)
    t, twin = trainer(tmp_path, model), copy.deepcopy(model)
    batches = Batches(ids, 4, 8, seed=0)
    squares = [twin.embed(next(batches)[0]).square().mean().item() for _ in range(2)]
    with watch(t.model) as w: t.fit(until=1, progress=False)
    assert w.records[0]['activation']['embed'] == pytest.approx(math.sqrt(sum(squares) / 2), rel=1e-5)

def test_watch_counts_only_its_own_model():
    mine, other = GPT(config), GPT(config)
    with watch(mine) as w:
        other(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64))[1].backward()
        torch.optim.SGD(other.parameters(), lr=.1).step()
    assert w.step == 0 and w.records == []


@few
@given(st.floats(.51, .9999), st.integers(1, 200))
def test_quantile_of_t_is_that_of_scipy(p, dof): assert t_quantile(p, dof) == pytest.approx(stats.t.ppf(p, dof), rel=5e-3, abs=1e-3)

@few
@given(st.integers(5, 12), st.integers(1, 90), st.integers(0, 10**6), st.floats(.001, .5))
def test_a_band_holds_the_runs_it_was_made_from(n, steps, seed, miss):
    logs = made_up(n, steps, seed)
    band = make_band(logs, miss=miss)
    assert all(check_run(log, band).in_band for log in logs)
    assert band.steps == band_steps(steps)

@few
@given(st.integers(1, 5000), st.integers(1, 60))
def test_marks_ascend_to_the_end(max_steps, n):
    steps = band_steps(max_steps, n)
    assert steps[-1] == max_steps and steps[0] >= 1 and steps == sorted(set(steps)) and len(steps) <= n

def test_more_seeds_and_more_risk_make_a_narrower_band():
    width = lambda n, miss: np.mean([h - low for low, h in zip(*(getattr(make_band(made_up(n, seed=2), miss=miss), k) for k in ('low', 'high')))])
    assert width(12, .05) < width(5, .05) and width(5, .3) < width(5, .01)

def test_healthy_newcomers_seldom_leave_and_shifted_ones_do():
    bands = [make_band(made_up(5, seed=s)) for s in range(60)]
    alarms = sum(not check_run(made_up(1, seed=1000 + s)[0], b).in_band for s, b in enumerate(bands))
    caught = sum(not check_run(made_up(1, seed=1000 + s, level=4.)[0], b).in_band for s, b in enumerate(bands))
    assert alarms <= 9 and caught == 60            # at most 5 % promised: 3 of 60 expected at the very most, 9 has a probability below 1 %

def test_thinned_logs_say_the_same():
    logs = made_up(6)
    thin = [thin_log(log, band_steps(30)) for log in logs]
    a, b = make_band(logs), make_band(thin)
    assert np.allclose(a.loss, b.loss, atol=1e-4) and a.val_loss == b.val_loss and a.lr == b.lr and len(json.dumps(thin)) < len(json.dumps(logs))

def test_a_log_that_is_cut_short_or_has_holes_or_nan():
    band = make_band(made_up(6))
    log = made_up(1, seed=7)[0]
    assert check_run(log[:10], band).in_band and check_run(log[:10], band).steps == 9
    assert check_run([r for r in log if r['step'] % 7 == 0], band).in_band                # holes are not faults
    assert window_means(log, [40]) == []
    bad = check_run(log[:9] + [{'step': 9, 'loss': math.nan}], band)
    assert not bad.in_band and bad.by == math.inf and bad.cause in CAUSES


def test_checking_leaves_model_batches_and_gradients_alone():
    model, batches = GPT(config), Batches(ids, 4, 8)
    for p in model.parameters(): p.grad = torch.ones_like(p)
    model.blocks[0].eval()
    modes, state, weights = [m.training for m in model.modules()], batches.state_dict(), copy.deepcopy(model.state_dict())
    check_run(made_up(1)[0], make_band(made_up(5)), model, batches)
    overfit_batch(model, next(Batches(ids, 4, 8)), 2)
    assert batches.state_dict() == state and [m.training for m in model.modules()] == modes
    assert all(bool((p.grad == 1).all()) for p in model.parameters())
    assert all(torch.equal(v, weights[n]) for n, v in model.state_dict().items())

@few
@given(st.integers(0, 3), st.integers(0, 1000), st.floats(0, .8))
def test_the_shift_is_found_whatever_is_masked(shift, seed, masked):
    g = generator(seed)
    text = torch.randint(50, (3, 40), generator=g)
    targets = text[:, shift:shift + 30].clone()
    targets[torch.rand(targets.shape, generator=g) < masked] = -100
    assert target_shift((text[:, :30], targets)) == shift

def test_a_model_that_is_frozen_as_a_whole_is_all_silent():
    model, batch = GPT(config).requires_grad_(False), next(Batches(ids, 4, 8))
    assert silent_parameters(model, batch) == [n for n, _ in model.named_parameters()]


def test_a_folder_without_a_log(tmp_path):
    with pytest.raises(FileNotFoundError): check_folder(tmp_path, 'quick')

def test_shipped_bands_belong_to_shipped_recipes():
    shipped = files('llm_course')/'configs'
    for name in json.loads((shipped/'bands.json').read_text()):
        band, recipe = load_band(name), yaml.safe_load((shipped/f'{name}.yaml').read_text())
        assert band.seeds >= 5 and band.name == name and band.steps[-1] <= recipe['train']['max_steps']
        assert all(low < high for low, high in zip(band.low, band.high)) and all(low < high for _, low, high in band.val_loss)
        assert max(lr for _, lr in band.lr) <= recipe['train']['lr'] * (1 + 1e-9)
        assert band.high[-1] < band.unigram + 1 and band.val_loss[0][0] == 0
