"""Constrained decoding: whatever the model, the tokenizer and the limit, the text is valid and complete."""
import json

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.constrained import JSON_RULES, Constrain, Grammar, TokenMask, choice_rules, generate_constrained, json_grammar, schema_rules
from llm_course.core import generator, read_documents
from llm_course.generation import SamplingConfig
from llm_course.gpt import GPT, GPTConfig
from llm_course.tokenization import BPETokenizer, CharTokenizer

END = '<|endoftext|>'
GRAMMAR = json_grammar()
BPE = BPETokenizer.train([d.text for d in read_documents('tiny')][:3] + ['{"a": [1, 2.5e3, "x\\n"], "b": {"c": null}}, true]}'] * 20, vocab_size=400, special_tokens=[END])
CHAR = CharTokenizer.train(['{}[]":,. -+eE0123456789aftruelsn\\é€'], special_tokens=[END])
MASKS = {t: TokenMask(GRAMMAR, t) for t in (BPE, CHAR)}
values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(codec='utf-8')),
                      lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec='utf-8'), max_size=5), inner, max_size=4), max_leaves=12)


@settings(max_examples=300, deadline=None)
@given(values, st.booleans(), st.booleans())
def test_what_json_writes_is_accepted(value, ascii_only, tight):
    text = json.dumps(value, ensure_ascii=ascii_only, separators=(',', ':') if tight else None)
    assert GRAMMAR.accepts(text)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=30), st.integers(0, 10**6))
def test_what_is_accepted_json_reads(noise, seed):
    """Walk at random through the grammar, guided by drawn bytes: whatever it accepts, `json` parses."""
    state, out = (GRAMMAR.start,), bytearray()
    for b in noise:
        ways = [c for c in range(256) if GRAMMAR.feed(state, c) is not None]
        if not ways: break
        c = ways[b % len(ways)]; out.append(c); state = GRAMMAR.feed(state, c)
        if GRAMMAR.finished(state): json.loads(out.decode())
    while not GRAMMAR.finished(state):                                                  # and it can always be finished
        best = min((c for c in range(256) if GRAMMAR.feed(state, c) is not None), key=lambda c: MASKS[BPE].need(GRAMMAR.feed(state, c)))
        assert MASKS[BPE].need(GRAMMAR.feed(state, best)) < MASKS[BPE].need(state)
        out.append(best); state = GRAMMAR.feed(state, best)
    json.loads(out.decode())


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([BPE, CHAR]), st.integers(0, 10**6), st.integers(1, 40), st.floats(0, 3))
def test_any_model_any_limit_is_valid(tokenizer, seed, limit, temperature):
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, max_seq_len=48, n_layer=1, n_head=1, d_model=8, d_ff=8), seed % 7)
    with torch.no_grad(): model.embed.weight.mul_(20)                                   # strong and senseless opinions
    text = generate_constrained(model, tokenizer, [tokenizer.special_tokens[END]], MASKS[tokenizer], limit, config=SamplingConfig(temperature=temperature), generator=generator(seed))
    json.loads(text)
    assert GRAMMAR.accepts(text)


@settings(max_examples=60, deadline=None)
@given(st.sets(st.text(st.characters(codec='utf-8', exclude_characters="'"), max_size=4), min_size=1, max_size=8))
def test_a_choice_is_exactly_its_words(words):
    grammar = Grammar({'start': 'word', **choice_rules('word', words)})
    for w in words:
        assert grammar.accepts(w)
        for other in (w + 'x', w[:-1]): assert grammar.accepts(other) == (other in words)


def test_a_form_is_filled_in():
    schema = {'type': 'object', 'properties': {'ok': {'type': 'boolean'}, 'kind': {'enum': ['a', 'ab', 3]}, 'n': {'type': 'array', 'items': {'type': 'integer'}}}}
    mask = TokenMask(Grammar(schema_rules(schema) | JSON_RULES), BPE)
    model = GPT(GPTConfig(vocab_size=BPE.vocab_size, max_seq_len=96, n_layer=1, n_head=1, d_model=8, d_ff=8))
    for seed in range(20):
        made = json.loads(generate_constrained(model, BPE, [BPE.special_tokens[END]], mask, 60, generator=generator(seed)))
        assert list(made) == ['ok', 'kind', 'n'] and type(made['ok']) is bool and made['kind'] in ('a', 'ab', 3) and all(type(i) is int for i in made['n'])


def test_end_is_only_offered_where_the_text_is_complete():
    c = Constrain(MASKS[BPE], BPE.special_tokens[END], 20)
    out = c([0], torch.zeros(BPE.vocab_size))
    assert out[BPE.special_tokens[END]] == -torch.inf
    one = BPE.encode('1')
    assert c([0, *one], torch.zeros(BPE.vocab_size))[BPE.special_tokens[END]] == 0
