"What the cells of 07b check on chosen shapes, checked on shapes that nobody chose."
import subprocess
import sys

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llm_course.attention import MultiHeadAttention
from llm_course.encoder_decoder import CrossAttention, EncoderDecoder, EncoderDecoderConfig, encoder_decoder_flops, pad_right, shift_right

V = 13
quickly = settings(max_examples=25, deadline=None)
seeds, lengths = st.integers(0, 2**31), st.lists(st.integers(1, 9), min_size=1, max_size=4)

@st.composite
def configs(draw):
    heads, size = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    return EncoderDecoderConfig(V, draw(st.integers(1, 2)), heads, 2 * heads * draw(st.integers(3, 4)), draw(st.integers(1, 2)), size, d_ff=8,
                                norm=draw(st.sampled_from(['rmsnorm', 'layernorm'])), norm_position=draw(st.sampled_from(['pre', 'post'])),
                                activation=draw(st.sampled_from(['relu', 'geglu_tanh'])), position=draw(st.sampled_from(['relative', 'sinusoidal'])),
                                max_distance=20, bias=draw(st.booleans()), attn_scale=draw(st.sampled_from([None, 1.])), tie_embeddings=draw(st.booleans()),
                                scale_embeddings=draw(st.booleans()), scale_head=draw(st.booleans()))

def lively(config, seed):
    "A model none of whose parts is the identity: biases and norms at random, too."
    model, g = EncoderDecoder(config, seed), torch.Generator().manual_seed(seed)
    for p in model.parameters(): p.data.add_(torch.randn(p.shape, generator=g), alpha=.3)
    return model.double()

def random_ids(seed, *shape): return torch.randint(2, V, shape, generator=torch.Generator().manual_seed(seed))

def batch(lengths, seed): return pad_right([random_ids(seed + i, n).tolist() for i, n in enumerate(lengths)], 0)

def same(a, b): return torch.allclose(a, b, atol=1e-8, rtol=1e-6)


@quickly
@given(configs(), lengths, st.integers(2, 7), seeds)
@torch.no_grad()
def test_the_decoder_sees_all_of_the_source_and_nothing_of_its_future(config, lengths, T, seed):
    model, (source, keep), target_in = lively(config, seed), batch(lengths, seed), random_ids(seed + 99, len(lengths), T)
    want = model(source, target_in, source_keep=keep)[0]
    for t in range(1, T):
        other = target_in.clone(); other[:, t:] = (other[:, t:] - 1) % V
        assert same(model(source, other, source_keep=keep)[0][:, :t], want[:, :t])
    for s in range(lengths[0]):
        other = source.clone(); other[0, s] = (other[0, s] - 1) % V
        now = model(other, target_in, source_keep=keep)[0]
        assert (now[0] != want[0]).any(-1).all() and same(now[1:], want[1:])        # every place hears it, no other row does

@quickly
@given(configs(), lengths, st.integers(1, 6), st.integers(0, 5), seeds)
@torch.no_grad()
def test_padding_does_not_exist(config, lengths, T, more, seed):
    model, (source, keep), target_in = lively(config, seed), batch(lengths, seed), random_ids(seed + 99, len(lengths), T)
    want = model(source, target_in, source_keep=keep)[0]
    rubbish = random_ids(seed + 7, len(lengths), more)
    longer = torch.cat((source.where(keep, random_ids(seed + 5, *source.shape)), rubbish), 1)
    longer_keep = torch.cat((keep, torch.zeros_like(rubbish, dtype=torch.bool)), 1)
    assert same(model(longer, torch.cat((target_in, rubbish), 1), source_keep=longer_keep)[0][:, :T], want)
    for i, n in enumerate(lengths): assert same(model(source[i:i+1, :n], target_in[i:i+1])[0][0], want[i])

@quickly
@given(configs(), lengths, seeds)
def test_generation_is_the_same_batched_alone_and_without_a_cache(config, lengths, seed):
    model, (source, keep) = lively(config, seed), batch(lengths, seed)
    written = model.generate(source, 7, keep)
    assert written == model.generate(source, 7, keep, cache=False)
    assert written == [model.generate(source[i:i+1, :n], 7)[0] for i, n in enumerate(lengths)]
    for row, answer in zip(range(len(lengths)), written):                           # greedy: the likeliest token, given what was written
        if not answer: continue
        forced = model(source[row:row+1], shift_right(torch.tensor([answer]), 0), source_keep=keep[row:row+1])[0]
        assert forced[0].argmax(-1).tolist() == answer

@quickly
@given(configs(), lengths, st.integers(1, 6), seeds)
@torch.no_grad()
def test_cross_weights_are_weights_and_ignore_padding(config, lengths, T, seed):
    model, (source, keep) = lively(config, seed), batch(lengths, seed)
    w = model.cross_weights(source, random_ids(seed + 99, len(lengths), T), keep)
    assert w.shape == (config.n_decoder_layer, len(lengths), config.n_head, T, source.shape[1])
    assert same(w.sum(-1), torch.ones(w.shape[:-1], dtype=w.dtype)) and (w[:, ~keep[:, None, None].expand(w.shape[1:])] == 0).all()

@quickly
@given(st.integers(1, 3), st.integers(1, 4), lengths, st.integers(1, 6), seeds)
@torch.no_grad()
def test_cross_attention_ignores_the_order_of_the_source(heads, size, lengths, T, seed):
    torch.manual_seed(seed)
    cross, S = CrossAttention(heads * size, heads, causal=False).double(), max(lengths)
    x, memory = torch.randn(len(lengths), T, heads * size).double(), torch.randn(len(lengths), S, heads * size).double()
    mask, order = (torch.arange(S) < torch.tensor(lengths)[:, None])[:, None, None], torch.randperm(S)
    assert same(cross(x, memory=memory[:, order], mask=mask[..., order]), cross(x, memory=memory, mask=mask))
    assert same(cross.read(x, *cross.keys_values(memory), mask), cross(x, memory=memory, mask=mask))

@quickly
@given(configs(), st.integers(1, 9), st.integers(1, 9))
@torch.no_grad()
def test_flops_by_formula_are_those_that_are_counted(config, S, T):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        EncoderDecoder(config)(random_ids(0, 1, S), random_ids(1, 1, T))
    assert counter.get_total_flops() == sum(encoder_decoder_flops(config, S, T).values())

@quickly
@given(lengths, seeds)
def test_shifted_targets_are_the_targets_one_place_later(lengths, seed):
    ids, real = batch(lengths, seed)
    shifted = shift_right(ids.masked_fill(~real, -100), 1, 0)
    for row, n, out in zip(ids.tolist(), lengths, shifted.tolist()): assert out[:n] == [1, *row[:n - 1]] and -100 not in out

def test_dropout_acts_in_training_only_and_the_seed_decides():
    config = EncoderDecoderConfig(V, 2, 2, 8, dropout=.5)
    a, b = EncoderDecoder(config, seed=3), EncoderDecoder(config, seed=3)
    source, target_in = random_ids(0, 2, 5), random_ids(1, 2, 4)
    assert torch.equal(a.eval()(source, target_in)[0], b.eval()(source, target_in)[0])
    assert not torch.equal(a.train()(source, target_in)[0], a(source, target_in)[0])
    for m in a.modules():
        if isinstance(m, MultiHeadAttention): m.dropout = 0.
    assert not torch.equal(a(source, target_in)[0], a(source, target_in)[0])       # what the sublayers add is dropped, too
    assert not torch.equal(EncoderDecoder(config, seed=4).eval()(source, target_in)[0], b(source, target_in)[0])

def test_what_is_only_read_is_read_without_dropout():
    model = EncoderDecoder(EncoderDecoderConfig(V, 2, 2, 8, dropout=.5))
    source, target_in = random_ids(0, 2, 5), random_ids(1, 2, 4)
    written, weights = model.generate(source, 6), model.cross_weights(source, target_in)
    assert model.training and written == model.generate(source, 6, cache=False) and torch.equal(weights, model.cross_weights(source, target_in))
    model.eval().generate(source, 2); model.cross_weights(source, target_in)
    assert not model.training

def test_half_precision():
    model = EncoderDecoder(EncoderDecoderConfig(V, 1, 2, 8)).bfloat16()
    assert model(random_ids(0, 1, 4), random_ids(1, 1, 3))[0].dtype == torch.bfloat16
    assert len(model.generate(random_ids(0, 1, 4), 3)) == 1

def test_no_heavy_import():
    code = "import sys, llm_course.encoder_decoder; print([m for m in ('transformers', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
