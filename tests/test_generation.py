"What each cut keeps, against its definition written out, on random and on tied scores; penalties; random configurations."
import math
from fractions import Fraction
from itertools import combinations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llm_course.core import generator
from llm_course.generation import (SamplingConfig, frequency_penalty, generate, generate_stream, min_p_filter, next_token_probs, presence_penalty,
                                   repetition_penalty, sample_token, top_k_filter, top_p_filter, typical_filter)
from llm_course.gpt import GPT, GPTConfig

# A few different whole numbers, so that ties are the rule; probabilities are these weights over their sum, exactly.
weights = st.lists(st.integers(1, 6) | st.sampled_from([50, 400]), min_size=1, max_size=8)
shares = st.fractions(min_value=Fraction(1, 100), max_value=1, max_denominator=100)
quick = settings(max_examples=150, deadline=None)

def scores(ws) -> torch.Tensor: return torch.tensor([float(w) for w in ws], dtype=torch.float64).log().float()
def kept(filtered) -> set[int]: return set((filtered > -math.inf).nonzero().flatten().tolist())
def mass(ws, ids) -> Fraction: return Fraction(sum(ws[i] for i in ids), sum(ws))

def by_rank(ws, key, p) -> list[int]:
    "The shortest beginning of the ranking whose probability reaches p, in exact arithmetic; a case that rounding could turn is left out."
    order, got = sorted(range(len(ws)), key=lambda i: (key[i], i)), []
    for i in order:
        if mass(ws, got) >= p: break
        got.append(i)
    assume(all(abs(mass(ws, order[:n]) - p) > Fraction(1, 10**5) for n in range(len(ws))) or p == 1)
    return got


@quick
@given(weights, st.integers(1, 10))
def test_top_k_keeps_the_k_best_and_ties_with_the_last(ws, k):
    assert kept(top_k_filter(scores(ws), k)) == {i for i, w in enumerate(ws) if sum(v > w for v in ws) < k}

@quick
@given(weights, shares)
def test_top_p_keeps_the_smallest_set_that_reaches_p(ws, p):
    want, got = by_rank(ws, [-w for w in ws], p), kept(top_p_filter(scores(ws), float(p)))
    assert got == set(want)                                                    # of equal tokens, the one with the lower id
    everything = (ids for n in range(len(ws) + 1) for ids in combinations(range(len(ws)), n) if mass(ws, ids) >= p)
    if p < 1: assert len(got) == len(next(everything)) and mass(ws, got) == max(mass(ws, ids) for ids in combinations(range(len(ws)), len(got)))

@pytest.mark.parametrize('ws, p, want', [([1, 1, 1, 1], .25, {0}), ([1, 1, 1, 1], .5, {0, 1}), ([1, 2, 1], .5, {1}), ([4, 2, 1, 1], .75, {0, 1}), ([1, 1], 1., {0, 1}), ([7], .1, {0})])
def test_top_p_exactly_on_the_line(ws, p, want): assert kept(top_p_filter(scores(ws), p)) == want

@quick
@given(weights, shares)
def test_min_p_keeps_those_with_a_share_of_the_best(ws, m):
    assume(all(w == max(ws) or abs(w - m * max(ws)) > Fraction(1, 10**5) * max(ws) for w in ws))
    assert kept(min_p_filter(scores(ws), float(m))) == {i for i, w in enumerate(ws) if w >= m * max(ws)}
    assert kept(min_p_filter(scores(ws), 0)) == set(range(len(ws)))

@quick
@given(weights, shares)
def test_typical_keeps_the_smallest_set_near_the_entropy(ws, tau):
    ps = [w / sum(ws) for w in ws]
    H = -math.fsum(p * math.log(p) for p in ps)
    distance = {w: abs(-math.log(w / sum(ws)) - H) for w in set(ws)}
    assume(all(abs(a - b) > 1e-4 for a, b in combinations(distance.values(), 2)))
    assert kept(typical_filter(scores(ws), float(tau))) == set(by_rank(ws, [distance[w] for w in ws], tau)) or tau == 1

@quick
@given(st.lists(weights.filter(lambda ws: len(ws) == 5), min_size=2, max_size=4), shares)
def test_rows_do_not_see_one_another(rows, p):
    batch = torch.stack([scores(ws) for ws in rows])
    for cut in (lambda x: top_k_filter(x, 2), lambda x: top_p_filter(x, float(p)), lambda x: min_p_filter(x, float(p)), lambda x: typical_filter(x, float(p))):
        assert torch.equal(cut(batch), torch.stack([cut(row) for row in batch]))

optional = lambda s: st.none() | s
configs = st.builds(SamplingConfig, st.floats(0, 50), optional(st.integers(1, 20)), optional(st.floats(1e-6, 1)), optional(st.floats(0, 1)), optional(st.floats(1e-6, 1)),
                    st.floats(.1, 5), st.floats(-3, 3), st.floats(-3, 3), optional(st.dictionaries(st.integers(0, 11), st.floats(-100, 100) | st.just(-math.inf), max_size=11)))

@quick
@given(configs, st.integers(0, 10**6), st.lists(st.integers(0, 11), max_size=30), st.floats(.5, 40))
def test_any_configuration_leaves_a_distribution(config, seed, history, spread):
    logits = torch.randn(3, 12, generator=generator(seed)) * spread
    probs = next_token_probs(logits, config, history, prompt_len=len(history) // 2)
    assert (probs >= 0).all() and torch.allclose(probs.sum(-1), torch.ones(3), atol=1e-5)
    for i, x in (config.logit_bias or {}).items():
        if x == -math.inf: assert (probs[:, i] == 0).all()
    if config.top_k and config.temperature: assert ((probs > 0).sum(-1) <= config.top_k).all() or len(logits.unique()) < logits.numel()
    assert 0 <= sample_token(logits[0], config, generator(seed), history) < 12

@quick
@given(st.lists(st.floats(-20, 20), min_size=6, max_size=6), st.lists(st.integers(0, 5), max_size=12), st.floats(-2, 2), st.floats(.2, 4))
def test_penalties_by_definition(xs, history, a, theta):
    x = torch.tensor(xs)
    want = lambda f: torch.tensor([f(v, history.count(i)) for i, v in enumerate(x.tolist())])
    assert torch.allclose(frequency_penalty(x, history, a), want(lambda v, c: v - a * c), atol=1e-4)
    assert torch.allclose(presence_penalty(x, history, a), want(lambda v, c: v - a * (c > 0)), atol=1e-4)
    assert torch.allclose(repetition_penalty(x, history, theta), want(lambda v, c: v if not c else v * theta if v < 0 else v / theta), atol=1e-4)

@pytest.mark.parametrize('seed', range(20))
def test_order_of_the_steps(seed):
    x, past, bias = torch.randn(30, generator=generator(seed)) * 2, [0, 0, 3, 7], torch.zeros(30)
    c = SamplingConfig(1.4, 20, .9, .1, .8, 1.5, .3, .2, {1: 1., 4: 2.})
    bias[1], bias[4] = 1, 2
    y = repetition_penalty(x + bias, past, 1.5)
    y = presence_penalty(frequency_penalty(y, past[1:], .3), past[1:], .2)
    y = typical_filter(min_p_filter(top_p_filter(top_k_filter(y / 1.4, 20), .9), .1), .8)
    assert torch.allclose(next_token_probs(x, c, past, prompt_len=1), y.softmax(-1), atol=1e-6)

def test_ties_in_a_large_vocabulary_go_to_the_lower_id():
    assert kept(top_p_filter(torch.zeros(2, 3000)[0], .25)) == set(range(750))

def test_greedy_takes_one_token_whatever_the_cuts():
    assert next_token_probs(torch.tensor([1., 2., 2.]), SamplingConfig(0)).tolist() == [0, 1, 0]
    assert next_token_probs(torch.tensor([2., 1., 0., -1.]), SamplingConfig(0, typical_p=.2)).tolist() == [1, 0, 0, 0]     # typical alone would drop it

def test_a_configuration_is_a_value():
    bias = {3: 1.}
    a, b = SamplingConfig(.5, logit_bias=bias), SamplingConfig(.5, logit_bias={3: 1.})
    assert a == b and hash(a) == hash(b) and a != SamplingConfig(.5)
    bias[99] = 5.
    assert a.logit_bias == {3: 1.}

def test_penalties_and_processors_in_the_loop():
    model, ids = GPT(GPTConfig(vocab_size=11, max_seq_len=32, n_layer=1, n_head=1, d_model=8)), []
    def keep(so_far, logits): ids.append(so_far); so_far.append(0); return logits         # what it does to its list is its own affair
    got = generate(model, [1, 2], 10, config=SamplingConfig(0, presence_penalty=1000.), processors=iter([keep]))
    assert len(set(got)) == 10                                                 # no token twice; the prompt does not count
    assert [i[2:-1] for i in ids] == [got[:n] for n in range(10)]
    once = generate(model, [1, 2], 9, config=SamplingConfig(0, repetition_penalty=1e6, logit_bias={i: 100. for i in range(11)}))
    assert len({1, 2, *once}) == 11                                            # here it does
    with pytest.raises(ValueError, match=r'logit_bias: id 11 is not in the vocabulary \[0, 11\)'): generate(model, [1], 1, config=SamplingConfig(logit_bias={11: 1.}))
    with pytest.raises(ValueError, match='every token is forbidden'): generate(model, [1], 1, processors=[lambda ids, x: x - math.inf])
    with pytest.raises(ValueError, match=r'processor two returned \(2,\)'):
        def two(ids, logits): return logits[:2]
        generate(model, [1], 1, processors=[two])
    with pytest.raises(ValueError, match='the prompt is empty'): generate_stream(model, [], 5)
