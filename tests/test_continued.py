"Pages are cut without loss; mixtures are exact; a broken run goes on as if nothing had happened; no checkpoint that forgot too much is ever written."
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st

import llm_course.continued as continued
from llm_course.continued import (Forgetting, Guard, GuardedTrainer, MixedBatches, PageScores, Snapshot, check_held_out, continue_pretraining, cut_pages, frozen, gentle_config,
                                  neighbour_agreement, project, score_pages, split_pages, surprises)
from llm_course.core import Document, generator, read_documents
from llm_course.gpt import GPT, GPTConfig
from llm_course.pretrained import Pretrained
from llm_course.pretraining import Trainer, list_checkpoints, load_checkpoint, read_log
from llm_course.tokenization import BPETokenizer

few = settings(max_examples=60, deadline=None)
texts = st.text(st.characters(blacklist_categories=('Cs',)), max_size=200) | st.text('ab \n', max_size=200)

TOKENIZER = BPETokenizer([], special_tokens=('<|endoftext|>',))
STORIES = read_documents('tiny')
OTHER = split_pages(STORIES[20:24], chars=300, share=.3)[1]
TRAIN, HELD = split_pages(STORIES[:6], chars=300, share=.3)

def tiny(seed: int = 0) -> Pretrained:
    return Pretrained(GPT(GPTConfig(vocab_size=257, max_seq_len=32, n_layer=2, n_head=2, d_model=16), seed=seed), TOKENIZER)

def weights(p: Pretrained) -> list: return [w.detach().clone() for w in p.model.parameters()]

def same(a: list, b: list) -> bool: return all(torch.equal(x, y) for x, y in zip(a, b))

def config(**changes): return gentle_config(**dict(max_steps=12, lr=1e-3, batch_size=2, seq_len=32, eval_every=3, checkpoint_every=3, eval_batches=2) | changes)


@few
@given(texts, st.integers(1, 60))
def test_cut_pages_loses_nothing(text, chars):
    pages = cut_pages(text, chars)
    assert ''.join(pages) == text and all(0 < len(p) <= chars for p in pages)

@few
@given(texts, st.integers(4, 40), st.floats(.05, .95), st.integers(0, 9))
def test_split_pages_is_a_partition(text, chars, share, seed):
    docs = [Document('a', text), Document('b', text[::-1])]
    try: kept, held = split_pages(docs, chars, share, seed)
    except ValueError: assume(False)
    assert Counter(''.join(d.text for d in kept + held)) == Counter(text + text[::-1])
    assert 1 <= len(held) and kept and all(len(h.text) <= chars for h in held) and (kept, held) == split_pages(docs, chars, share, seed)
    cut = {d.name: cut_pages(d.text, chars) for d in docs}
    for h in held:                                                       # the name says which page it is
        name, n = h.name.split()
        assert cut[name][int(n) - 1] == h.text
    for k in kept:
        name, span = k.name.split()
        first, last = map(int, span.split('-'))
        assert ''.join(cut[name][first - 1:last]) == k.text


@few
@given(st.floats(0, .99), st.integers(1, 5), st.integers(1, 12))
def test_a_mixture_has_its_share_at_any_time(share, batch_size, n):
    mixed = MixedBatches(np.zeros(40, int), np.ones(50, int), share, batch_size, 4)
    old = sum(next(mixed)[0][:, 0].sum().item() for _ in range(n))
    assert old == math.floor(n * batch_size * share)

@few
@given(st.floats(0, .99), st.integers(1, 4), st.integers(0, 9), st.integers(0, 3))
def test_a_mixture_goes_on_where_it_was(share, batch_size, n, seed):
    a, b = (MixedBatches(np.arange(60), np.arange(100, 190), share, batch_size, 5, seed) for _ in range(2))
    for _ in range(n): next(a)
    b.load_state_dict(json.loads(json.dumps(a.state_dict())))
    for _ in range(6): assert all(torch.equal(x, y) for x, y in zip(next(a), next(b)))


@few
@given(st.lists(st.tuples(st.floats(1, 900), st.floats(1, 900), st.integers(1, 400)), min_size=2, max_size=12))
def test_change_is_that_of_the_means_and_stays_between_the_pages(rows):
    before, after, counts = (np.array(x) for x in zip(*rows))
    got = PageScores(before, counts).change(PageScores(after, counts))
    assert got.mean == pytest.approx((after.sum() - before.sum()) / counts.sum(), abs=1e-9)
    per_page = (after - before) / counts
    assert per_page.min() - 1e-9 <= got.low <= got.high <= per_page.max() + 1e-9

def test_pages_that_are_hard_in_different_degrees_do_not_blur_the_change():
    "Each page became better by exactly 0.1 nats a token, though they differ by ten times in perplexity."
    counts, level = np.full(8, 100), np.linspace(2, 5, 8)
    before, after = (PageScores(100 * x, counts) for x in (level, level - .1))
    assert before.change(after) == pytest.approx((-.1, -.1, -.1))
    assert before.perplexity.high > 1.5 * before.perplexity.low

def test_scores_are_those_of_the_model():
    p, page = tiny(), Document('page', STORIES[0].text[:70])
    ids = torch.tensor([[256] + TOKENIZER.encode(page.text)])
    want = 0.
    with torch.no_grad():
        for t in range(1, ids.shape[1]):                                 # windows of 8, a new one every 4 tokens
            start = 0 if t <= 8 else 4 * math.ceil((t - 8) / 4)
            want -= p.model(ids[:, start:t])[0][0, -1].log_softmax(-1)[ids[0, t]].item()
    got = score_pages(p, [page, page], seq_len=8)
    assert got.nats == pytest.approx([want] * 2, abs=1e-3) and got.counts.tolist() == [70, 70]


@few
@given(st.integers(2, 12), st.integers(1, 6), st.integers(0, 99))
def test_projection_and_neighbours_are_those_of_the_definition(n, d, seed):
    x = torch.randn(n, d, generator=generator(seed)) + 1
    flat = project(x, min(n, d))
    assert torch.allclose(torch.pdist(flat.points), torch.pdist(x), atol=1e-3) and flat.share.sum().item() == pytest.approx(1, abs=1e-3)
    spread = torch.linalg.eigvalsh((x - x.mean(0)).T @ (x - x.mean(0))).flip(0)[:min(n, d)]
    assert torch.allclose(flat.share, spread / spread.sum(), atol=1e-3)
    labels = [i % 2 for i in range(n)]
    cosine = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)
    near = [max((j for j in range(n) if j != i), key=lambda j: cosine[i, j]) for i in range(n)]
    got = neighbour_agreement(x, labels)
    assert all(cosine[i, a] == pytest.approx(cosine[i, b].item(), abs=1e-5) for i, (a, b) in enumerate(zip(got.neighbours, near)))

def test_surprises_of_a_text_with_more_bytes_than_characters():
    found = surprises(tiny(), 'né 語')
    assert len(found) == len('né 語'.encode()) and all(s.bits > 0 and len(s.candidates) == 3 for s in found)


class Crash(Exception): pass

@pytest.mark.parametrize('replay', [(), STORIES[10:14]], ids=['alone', 'replay'])
def test_a_broken_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, replay):
    options = dict(config=config(), other=OTHER, max_forgetting=9., replay=replay, progress=False)
    whole = tiny(); done = continue_pretraining(whole, TRAIN, HELD, tmp_path/'whole', **options)
    step = Trainer.train_step
    def crash(self):
        if self.step == 8: raise Crash
        return step(self)
    monkeypatch.setattr(Trainer, 'train_step', crash)
    with pytest.raises(Crash): continue_pretraining(tiny(), TRAIN, HELD, tmp_path/'broken', **options)
    monkeypatch.undo()
    assert list_checkpoints(tmp_path/'broken')[-1].name == 'step-000006'
    again = tiny(seed=5); rest = continue_pretraining(again, TRAIN, HELD, tmp_path/'broken', **options)      # its weights do not matter any more
    assert same(weights(whole), weights(again)) and not same(weights(whole), weights(tiny()))
    timeless = [[{k: v for k, v in r.items() if k != 'seconds'} for r in x.log] for x in (done, rest)]
    assert timeless[0] == timeless[1]
    with pytest.raises(ValueError, match='another text'):
        continue_pretraining(tiny(), TRAIN, HELD, tmp_path/'broken', **options | dict(other=HELD))

@pytest.mark.parametrize('lr', [1e-3, 1e-2, 1e-1])
def test_no_checkpoint_has_forgotten_more_than_allowed(tmp_path, lr):
    "And what comes back is the last of them."
    p, most = tiny(), .02
    start = weights(p)
    digits = [Document(f'digits {n}', ' '.join(str(i) for i in torch.randint(0, 1000, (400,), generator=generator(n)).tolist())) for n in range(2)]
    done = continue_pretraining(p, digits[:1], digits[1:], tmp_path/'run', config(lr=lr, keep_checkpoints=9), other=OTHER, max_forgetting=most, progress=False)
    stream = continued._stream(OTHER, TOKENIZER)
    first = Guard(stream, 32, batch_size=2).look(tiny().model, 0)
    found = [Guard(stream, 32, batch_size=2).look(load_checkpoint(c).model, 0) - first for c in list_checkpoints(tmp_path/'run')]
    assert found[0] == 0 and max(found) <= most
    assert same(weights(p), weights(Pretrained(load_checkpoint(done.checkpoint).model, TOKENIZER)))
    assert bool(done.stopped) == (done.log[-1]['step'] < 12 or done.log[-1]['other_loss'] - first > most)
    if lr == 1e-1: assert done.stopped and same(weights(p), start)       # not one checkpoint was good enough

def test_after_a_break_the_guard_still_compares_with_the_beginning(tmp_path):
    options = dict(other=OTHER, progress=False)
    half = config(lr=1e-2, eval_every=6, checkpoint_every=6)
    first = continue_pretraining(tiny(), TRAIN, HELD, tmp_path/'run', half, until=6, max_forgetting=9., **options)
    losses = [r['other_loss'] for r in first.log if 'other_loss' in r]
    guard = Guard(continued._stream(OTHER, TOKENIZER), 32)
    guard.load_state_dict(load_checkpoint(first.checkpoint, with_state=True).state['extras']['guard'])
    guard.look(first.pretrained.model, 6)
    assert guard.start == losses[0] != losses[1] and guard.loss == pytest.approx(losses[1], abs=1e-4)

def test_a_step_that_nobody_validated_is_judged_before_it_is_saved(tmp_path):
    ids = continued._stream(STORIES[:6], TOKENIZER)
    t = GuardedTrainer(tiny().model, ids, ids[:200], config(lr=1e-1), tmp_path/'run', TOKENIZER, guard=Guard(ids[:300], 32, 0.))
    t.save()
    with torch.no_grad():
        for w in t.model.parameters(): w.add_(torch.randn(w.shape, generator=generator(1)))
    t.step = 2                                                            # as after Ctrl-C between two validations
    with pytest.raises(continued.ForgettingError): t.save()
    assert [c.name for c in list_checkpoints(tmp_path/'run')] == ['step-000000']

def test_nothing_is_written_when_it_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(continued, 'available_memory', lambda device: 10_000)
    with pytest.raises(MemoryError): continue_pretraining(tiny(), TRAIN, HELD, tmp_path/'run', config(), progress=False)
    assert not (tmp_path/'run').exists()

def test_frozen_parts_need_less_memory(monkeypatch, tmp_path):
    plans = []
    monkeypatch.setattr(continued, 'check_fits', lambda plan, available: plans.append(plan))
    for options in ({}, dict(freeze_embedding=True, freeze_blocks=2)): continue_pretraining(tiny(), TRAIN, HELD, tmp_path/str(len(plans)), config(max_steps=1), progress=False, **options)
    n, left = (sum(w.numel() for w in part) for part in (tiny().model.parameters(), tiny().model.norm.parameters()))
    assert [(p.gradients, p.optimizer) for p in plans] == [(4 * n, 8 * n), (4 * left, 8 * left)]

def test_frozen_is_undone_by_an_error_too():
    m = tiny().model
    m.norm.weight.requires_grad_(False)
    with pytest.raises(Crash):
        with frozen(m, 2, True): raise Crash
    assert [n for n, w in m.named_parameters() if not w.requires_grad] == ['norm.weight']           # as it was before


def test_one_repeated_line_is_no_leak_and_a_copied_page_is():
    line = 'to be or not to be that is the question whether it is nobler in the mind '
    page = Document('page', STORIES[8].text + line)
    assert 0 < check_held_out([Document('book', STORIES[9].text + line)], [page]) < .06
    with pytest.raises(ValueError, match="'page' in 'book'"): check_held_out([Document('book', STORIES[8].text)], [page])

def test_the_stored_runs_belong_together():
    path = Path(__file__).resolve().parents[1]/'nbs/runs/continued.jsonl'
    if not path.exists(): pytest.skip('the real runs have not been made yet')
    first, *runs = map(json.loads, path.read_text(encoding='utf-8').splitlines())
    before = Snapshot.from_dict(first['after'])
    assert first['steps'] == 0 and len(runs) >= 4
    assert len({(r['lr'], r['share'], r['seed'], r['seq_len'], r['batch_size'], r.get('freeze_blocks'), r.get('max_forgetting')) for r in runs}) == len(runs)
    for r in runs:
        report = Forgetting(before, Snapshot.from_dict(r['after']))
        assert all(math.isfinite(report.change(name).mean) for name in before.scores) and len(r['after']['answers']) == len(first['after']['answers'])
        if r.get('max_forgetting') and r['stopped']: assert r['curve'][-1]['other_loss'] - r['curve'][0]['other_loss'] > r['max_forgetting']
