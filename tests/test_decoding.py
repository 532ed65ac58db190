"Stop strings in any cutting, batches against single rows, beams against brute force, bad input."
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.attention import ConcatCache
from llm_course.core import generator
from llm_course.decoding import (StopStrings, beam_search, complete, generate_batch, generate_with_logprobs, left_pad, reorder_cache, score,
                                 stream_until)
from llm_course.generation import SamplingConfig, generate
from llm_course.gpt import GPT, GPTConfig
from llm_course.tokenization import BPETokenizer, CharTokenizer

small = dict(vocab_size=23, max_seq_len=40, n_layer=2, n_head=2, d_model=16, init_std=.6)
MODELS = [GPT(GPTConfig(**small | more), seed=i).eval() for i, more in enumerate((dict(position='learned'), dict(window=5, qk_norm=True), dict(n_kv_head=1, norm='layernorm', bias=True)))]
letters = st.text('ab⚓', max_size=25)
stops = st.lists(st.text('ab⚓', min_size=1, max_size=6), max_size=4)


@settings(max_examples=600, deadline=None)
@given(letters, stops, st.lists(st.integers(0, 25), max_size=8), st.booleans())
def test_stop_strings_are_str_find_for_any_cutting(text, stops, cuts, single):
    cuts = sorted({0, len(text), *(c for c in cuts if c < len(text))}) if not single else range(len(text) + 1)
    pieces, matcher, shown = [text[a:b] for a, b in zip(cuts, list(cuts)[1:])], StopStrings(stops), ''
    want = text[:min((text.find(s) for s in stops if s in text), default=len(text))]
    for piece in stream_until(pieces, matcher):
        assert piece
        shown += piece
        assert want.startswith(shown)                                          # at no time more than the answer
    assert shown == want and (matcher.found is None) == (want == text)
    if matcher.found is not None: assert text[len(want):].startswith(matcher.found) and matcher.feed('more') == matcher.finish() == ''

@settings(max_examples=100, deadline=None)
@given(letters, stops, st.data())
def test_no_piece_is_held_longer_than_a_stop_string_can_explain(text, stops, data):
    matcher, longest = StopStrings(stops), max(map(len, stops), default=1)
    for c in text:
        matcher.feed(c)
        if matcher.found is None: assert len(matcher.held) <= 2 * longest

def test_no_piece_is_asked_for_after_the_stop():
    asked = []
    def pieces():
        for p in 'xSTOPy': asked.append(p); yield p
    assert ''.join(stream_until(pieces(), ['STOP'])) == 'x' and asked == list('xSTOP')

@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2), st.lists(st.lists(st.integers(0, 22), min_size=1, max_size=12), min_size=1, max_size=4), st.integers(0, 1000),
       st.sampled_from([SamplingConfig(0), SamplingConfig(), SamplingConfig(1.3, 9, .9), SamplingConfig(.8, repetition_penalty=1.4, presence_penalty=1.)]), st.sets(st.integers(0, 22), max_size=4))
def test_each_row_is_what_it_would_be_alone(which, prompts, seed, config, stop):
    model, log = MODELS[which], lambda ids, logits: logits + (len(ids) % 2)      # a processor that sees the row, not the batch
    rows = generate_batch(model, prompts, 8, config=config, stop_tokens=stop, generators=[generator(seed + i) for i in range(len(prompts))], processors=[log])
    for i, (p, row) in enumerate(zip(prompts, rows, strict=True)):
        alone = generate_with_logprobs(model, p, 8, config=config, stop_tokens=stop, generator=generator(seed + i), processors=[log], cache=ConcatCache())
        assert row.ids == alone.ids and torch.allclose(torch.tensor(row.logprobs), torch.tensor(alone.logprobs), atol=1e-5)
        assert torch.allclose(torch.tensor(row.logprobs), score(model, p + row.ids, len(p)), atol=1e-5)

def test_what_the_padding_holds_does_not_matter():
    prompts, model = [[1], [2, 3, 4, 5, 6, 7]], MODELS[0]
    import llm_course.decoding as d
    real_pad, got = d.left_pad, []
    for pad in (0, 22):
        d.left_pad = lambda p, pad=pad: real_pad(p, pad)
        try: got.append(generate_batch(model, prompts, 10, config=SamplingConfig(0)))
        finally: d.left_pad = real_pad
    assert got[0] == got[1]

def test_a_batch_leaves_the_model_as_it_was():
    model = GPT(GPTConfig(**small | dict(dropout=.5))).train()
    model.blocks[0].eval()
    before = [m.training for m in model.modules()]
    assert generate_batch(model, [[1], [2, 3]], 5, config=SamplingConfig(0)) == generate_batch(model, [[1], [2, 3]], 5, config=SamplingConfig(0))
    beam_search(model, [1], 3); score(model, [1, 2])
    assert [m.training for m in model.modules()] == before and all(p.grad is None for p in model.parameters())

@pytest.mark.parametrize('seed, alpha', list(enumerate((-.5, 0., 1., 3.))))
def test_a_wide_beam_is_brute_force_and_early_stopping_may_not_lose(seed, alpha):
    model, prompt, stop, n = GPT(GPTConfig(**small | dict(vocab_size=4)), seed=seed).eval(), [0, 1], {2}, 3
    texts = {tuple(ids[:next((i + 1 for i, x in enumerate(ids) if x in stop), n)]) for ids in itertools.product(range(4), repeat=n)}
    want = sorted(((score(model, prompt + list(t), 2).double().sum().item() / len(t)**alpha, list(t)) for t in texts), reverse=True)
    found = beam_search(model, prompt, n, beams=len(texts), alpha=alpha, stop_tokens=stop)
    assert [h.ids for h in found] == [t for _, t in want] and all(abs(h.score - s) < 1e-4 for h, (s, _) in zip(found, want))
    for k in (1, 3):
        quick, exact = (beam_search(model, prompt, n, beams=k, alpha=alpha, stop_tokens=stop, early_stopping=e) for e in (True, False))
        assert exact[0].score >= quick[0].score - 1e-9 and exact[0].score <= want[0][0] + 1e-4 and len(exact) <= k

def search_to_the_end(model, prompt, n, k, alpha, stop):
    "Beam search as it is described, without cache and without an early end: of all extensions of the k texts that go on, those that end and rank among the k best are finished."
    alive, done = [([], 0.)], []
    for step in range(1, n + 1):
        logp = [torch.log_softmax(model(torch.tensor([prompt + ids]))[0][0, -1].double(), -1).tolist() for ids, _ in alive]
        longer = sorted(((ids + [i], lp + q) for (ids, lp), row in zip(alive, logp) for i, q in enumerate(row)), key=lambda x: -x[1])
        ends = [step == n or ids[-1] in stop for ids, _ in longer]
        done += [(lp / len(ids)**alpha, ids) for (ids, lp), end in list(zip(longer, ends))[:k] if end]
        alive = [x for x, end in zip(longer, ends) if not end][:k]
    return [ids for _, ids in sorted(done, reverse=True)[:k]]

@pytest.mark.parametrize('alpha', [-1., 0., 1., 2., 4.])
def test_ending_early_misses_nothing(alpha):
    for seed in range(8):
        model = GPT(GPTConfig(**small | dict(vocab_size=6, init_std=.9)), seed=seed).eval()
        with torch.no_grad(): want = search_to_the_end(model, [1], 7, 3, alpha, {0, 3})
        assert [h.ids for h in beam_search(model, [1], 7, beams=3, alpha=alpha, stop_tokens=[0, 3])] == want

def test_reorder_cache():
    cache = ConcatCache()
    cache.update(0, torch.arange(6.).view(3, 1, 2, 1), -torch.arange(6.).view(3, 1, 2, 1)); cache.update(1, *(torch.ones(3, 1, 2, 1),) * 2)
    reorder_cache(cache, (2, 2, 0, 1))
    assert cache.kept[0][0].flatten().tolist() == [4, 5, 4, 5, 0, 1, 2, 3] and cache.kept[0][1].flatten().tolist() == [-4, -5, -4, -5, 0, -1, -2, -3]
    assert cache.length == 2 and cache.kept[1][0].shape == (4, 1, 2, 1)

def test_complete_with_stop_strings_across_tokens_and_characters():
    text = 'The boat ⚓ went out. "No," said Ida.\n\nEND of the story, and more'
    tok = BPETokenizer.train([text * 3], 290)
    class Says(GPT):
        def hidden(self, ids, cache=None): return torch.tensor([[[float(ids.shape[1])]]])
        def logits(self, h): return torch.nn.functional.one_hot(torch.tensor([self.ids[int(h.item()) - 1]]), tok.vocab_size).float() * 100
    model = Says(GPTConfig(vocab_size=tok.vocab_size, max_seq_len=128, n_layer=1, n_head=1, d_model=2))
    model.ids = tok.encode(text)
    for stop in (['\n\nEND'], ['."', ' "No'], ['⚓'], ['nowhere'], ['T'], ['out. "No," said I', 'd Ida.'], ['e']):
        got = complete(model, tok, '>', len(model.ids), stop=stop)
        cut = min((text.find(s) for s in stop if s in text), default=len(text))
        assert got.text == text[:cut] and got.finish_reason == ('stop' if cut < len(text) else 'length') and got.stopped_by in [*stop, None]
        assert tok.decode(got.ids).startswith(got.text + (got.stopped_by or '')) and len(got.logprobs) == len(got.ids) == len(got.top)
    eos = tok.special_tokens['<|endoftext|>']
    model.ids[5] = eos
    got = complete(model, tok, '>', 20, stop_tokens=[eos])
    assert (got.finish_reason, got.stopped_by, got.text) == ('stop', eos, tok.decode(model.ids[:5])) and got.ids[-1] == eos

@pytest.mark.parametrize('call, message, error', [
    (lambda m: SamplingConfig(temperature=-.5), r'temperature=-0.5: must be 0 \(greedy\) or a positive number', ValueError),
    (lambda m: SamplingConfig(top_p=0), r'top_p=0 is not in \(0, 1\]', ValueError),
    (lambda m: SamplingConfig(top_p=1.01), r'top_p=1.01 is not in \(0, 1\]', ValueError),
    (lambda m: StopStrings(['']), 'a stop string is empty', ValueError),
    (lambda m: StopStrings('stop'), 'give a list of strings', TypeError),
    (lambda m: beam_search(m, [1], 5, beams=0), 'beams=0: keep at least one', ValueError),
    (lambda m: beam_search(m, [1], 5, beams=2.), 'beams=2.0: keep at least one', ValueError),
    (lambda m: beam_search(m, [1], 5, alpha=math.inf), 'alpha=inf', ValueError),
    (lambda m: beam_search(m, [1], 0), 'max_new_tokens=0', ValueError),
    (lambda m: beam_search(m, [1] * 41, 1), 'a prompt of 41 tokens exceeds max_seq_len=40', ValueError),
    (lambda m: beam_search(m, [1], 5, stop_tokens=[99]), 'stop_tokens: id 99', ValueError),
    (lambda m: generate_batch(m, [], 5), 'the batch is empty', ValueError),
    (lambda m: generate_batch(m, [[1], [], [2]], 5), r'prompts\[1\] is empty', ValueError),
    (lambda m: generate_batch(m, [[1], [2] * 41], 1), r'prompts\[1\]: a prompt of 41 tokens exceeds max_seq_len=40', ValueError),
    (lambda m: generate_batch(m, [[1] * 30], 20), r'prompts\[0\]: 30 \+ 20 tokens exceed max_seq_len=40.*at most 11', ValueError),
    (lambda m: generate_batch(m, ['ab'], 1), r"prompts\[0\] is 'ab', not a sequence of ids", TypeError),
    (lambda m: generate_batch(m, [[1]], 0), 'max_new_tokens=0', ValueError),
    (lambda m: generate_batch(m, [[1], [2]], 1, generators=[generator(0)]), '1 generators for 2 prompts', ValueError),
    (lambda m: left_pad([[1.5]]), r'prompts\[0\] is not a flat sequence', TypeError),
    (lambda m: score(m, []), r'nothing to score in \[\]', ValueError),
    (lambda m: score(m, [1] * 42), '42 tokens exceed max_seq_len=40', ValueError),
    (lambda m: generate_with_logprobs(m, [1], 3, top=-2), 'top=-2', ValueError),
    (lambda m: complete(m, CharTokenizer('ab'), 'a', 5, stop=['']), 'a stop string is empty', ValueError),
    (lambda m: complete(m, CharTokenizer('ab'), '', 5), 'the prompt is empty', ValueError)])
def test_bad_input_is_refused_with_what_to_do(call, message, error):
    with pytest.raises(error, match=message): call(MODELS[0])

def test_limits_are_sharp():
    m = MODELS[0]
    assert len(score(m, [1] * 41)) == 40 and len(beam_search(m, [1] * 40, 1)[0].ids) == 1 and len(generate_batch(m, [[1] * 30, [2]], 11)[1].ids) == 11
    assert [i for i in generate(m, [1] * 40, 1, slide=False)] and len(generate_with_logprobs(m, [1], 2, top=99).top[0]) == 23
