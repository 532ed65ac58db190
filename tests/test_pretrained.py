"What the cells of 13_pretrained cannot hold: random bytes, other families, the real tokenizer, memory of a fresh process."
import _thread
import json
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings, strategies as st
from tokenizers import pre_tokenizers
from transformers.utils.chat_template_utils import render_jinja_template

from llm_course.attention import ConcatCache
from llm_course.core import fetch_file, read_documents
from llm_course.generation import SamplingConfig
from llm_course.gpt import GPT, GPTConfig
from llm_course.pretrained import (GGUF, LAYOUTS, Chat, ChatTemplate, ChatTemplateError, GGUFError, Pretrained, dequantize, end_ids,
                                   gguf_config, gguf_tokenizer, load_gguf, load_pretrained)
from llm_course.tokenization import BPETokenizer

quick = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
SPECIAL = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')

@pytest.fixture(scope='module')
def tok(): return BPETokenizer.train([d.text for d in read_documents('tiny')], 352, special_tokens=SPECIAL)

@pytest.fixture(scope='module')
def smollm2():
    try: return fetch_file('smollm2-gguf')
    except ConnectionError as e: pytest.skip(str(e).split('\n')[0])


# ---- blocks

@quick
@given(st.sampled_from(sorted(LAYOUTS)), st.integers(0, 2**32), st.sampled_from([0, 1, 0x03ff, 0x0400, 0x7bff, 0x7c00, 0x8001, 0xfbff, 0xfc00, None]))
def test_blocks_equal_those_of_gguf_bit_for_bit(kind, seed, scale):
    "Random bytes, and scales that are zero, subnormal, the largest or infinite."
    n, layout = LAYOUTS[kind]
    raw = np.random.default_rng(seed).integers(0, 256, (3, 2 * layout.itemsize), dtype=np.uint8)
    if scale is not None and 'd' in layout.names: raw.reshape(-1).view(layout)['d'].view(np.uint16)[:] = scale
    with np.errstate(all='ignore'): ours, theirs = dequantize(raw, kind), np.asarray(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]), np.float32)
    assert ours.shape == theirs.shape == (3, 2 * n)
    assert ((ours.view(np.uint32) == theirs.view(np.uint32)) | np.isnan(ours) & np.isnan(theirs)).all()


# ---- files

def write(path, arch, tensors, tok, d_model=64, heads=4, kv=2, d_ff=96, layers=2, **more):
    w = gguf.GGUFWriter(path, arch)
    w.add_block_count(layers); w.add_context_length(64); w.add_embedding_length(d_model); w.add_feed_forward_length(d_ff); w.add_head_count(heads)
    w.add_head_count_kv(kv); w.add_rope_freq_base(5000.); w.add_layer_norm_rms_eps(1e-5)
    for key, value in more.items(): getattr(w, key)(value)
    file = tok._to_dict()
    w.add_tokenizer_model('gpt2'); w.add_tokenizer_pre('gpt-2'); w.add_token_list(list(file['model']['vocab'])); w.add_token_merges([' '.join(m) for m in file['model']['merges']])
    w.add_token_types([3 if t in tok.special_tokens else 1 for t in file['model']['vocab']]); w.add_eos_token_id(tok.special_tokens['<|im_end|>'])
    for name, (data, kind) in tensors.items(): w.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    return path

def random_tensors(tok, arch, kind='F32', d=64, head=16, heads=4, kv=2, d_ff=96, layers=2, tied=True, seed=0):
    g = np.random.default_rng(seed)
    def matrix(rows, cols):
        x = (g.normal(size=(rows, cols)) * cols**-.5).astype(np.float32)
        if kind in ('Q4_K', 'Q5_K', 'Q6_K'):                                     # gguf cannot write these: random bytes with small scales
            n, layout = LAYOUTS[kind]
            raw = g.integers(0, 256, rows * cols // n * layout.itemsize, dtype=np.uint8).view(layout)
            for field in ('d', 'm'):
                if field in layout.names: raw[field] = g.uniform(1e-4, 3e-4, len(raw))
            return raw.view(np.uint8).reshape(rows, -1), kind
        return gguf.quants.quantize(x, gguf.GGMLQuantizationType[kind]), kind
    def vector(n): return (1 + .3 * g.normal(size=n)).astype(np.float32), 'F32'
    out = {'token_embd.weight': matrix(tok.vocab_size, d), 'output_norm.weight': vector(d)}
    if not tied: out['output.weight'] = matrix(tok.vocab_size, d)
    for b in range(layers):
        for name, rows, cols in (('attn_q', heads * head, d), ('attn_k', kv * head, d), ('attn_v', kv * head, d), ('attn_output', d, heads * head),
                                 ('ffn_gate', d_ff, d), ('ffn_up', d_ff, d), ('ffn_down', d, d_ff)):
            out[f'blk.{b}.{name}.weight'] = matrix(rows, cols)
            if arch == 'qwen2' and name in ('attn_q', 'attn_k', 'attn_v'): out[f'blk.{b}.{name}.bias'] = vector(rows)
        for name, n in (('attn_norm', d), ('ffn_norm', d), *((('attn_q_norm', head), ('attn_k_norm', head)) if arch == 'qwen3' else ())): out[f'blk.{b}.{name}.weight'] = vector(n)
    return out

@pytest.mark.parametrize('arch, tied, kv, kind', [('llama', True, 2, 'F32'), ('llama', False, 4, 'Q8_0'), ('qwen2', True, 2, 'F32'), ('qwen2', False, 1, 'Q4_0'), ('qwen3', True, 2, 'F32'), ('qwen3', False, 4, 'BF16'), ('llama', True, 2, 'Q5_0'), ('llama', True, 2, 'Q5_1')])
def test_families_equal_transformers_loading_the_same_file(arch, tied, kv, kind, tok, tmp_path):
    head = 128 if arch == 'qwen3' else 16                                        # transformers reads no other size of a head for Qwen3
    path = write(tmp_path/'m.gguf', arch, random_tensors(tok, arch, kind, head=head, kv=kv, tied=tied), tok, kv=kv, **({'add_key_length': 128, 'add_value_length': 128} if head == 128 else {}))
    ours, theirs = load_gguf(path).model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file='m.gguf', dtype=torch.float32).eval()
    ids = torch.randint(tok.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): a, b = ours(ids)[0], theirs(ids).logits
    assert b.std() > .3 and (a - b).abs().max() < 1e-4

@pytest.mark.parametrize('kind', ['Q4_K', 'Q5_K', 'Q6_K'])
def test_k_formats_in_a_file(kind, tok, tmp_path):
    path = write(tmp_path/'k.gguf', 'llama', random_tensors(tok, 'llama', kind, d=256, head=64, d_ff=512), tok, d_model=256, d_ff=512)
    file = GGUF(path)
    for t in gguf.GGUFReader(path).tensors:
        assert torch.equal(file.tensor(t.name), torch.tensor(np.array(gguf.quants.dequantize(t.data, t.tensor_type))))
        assert file.tensor(t.name, torch.bfloat16).dtype == torch.bfloat16
    with torch.no_grad(): assert load_gguf(path).model(torch.tensor([[1, 2, 3]]))[0].isfinite().all()

def test_a_damaged_file_gives_its_own_error_and_nothing_else(tok, tmp_path):
    raw = write(tmp_path/'m.gguf', 'llama', random_tensors(tok, 'llama', layers=1), tok, layers=1).read_bytes()
    header = raw.index(b'output_norm.weight') + 400
    @settings(quick, max_examples=200)
    @given(st.lists(st.tuples(st.integers(0, header), st.integers(0, 255)), min_size=1, max_size=4), st.sampled_from([None, *range(0, header, 997)]))
    def check(changes, cut):
        data = bytearray(raw)
        for at, value in changes: data[at] = value
        (tmp_path/'bad.gguf').write_bytes(data[:cut])
        try: load_gguf(tmp_path/'bad.gguf')
        except GGUFError as e: assert len(str(e)) > 20
    check()

def test_values_of_the_wrong_kind_or_size_are_refused_at_once(tok, tmp_path):
    path, start = write(tmp_path/'m.gguf', 'llama', random_tensors(tok, 'llama'), tok), time.perf_counter()
    for key in [k for k in GGUF(path).metadata if k.startswith('llama.')]:
        for bad in (0, -1, 'x', [1, 2], None, float('nan'), 10**9 if 'theta' not in key and 'rope' not in key and 'epsilon' not in key else 0):
            file = GGUF(path); file.metadata[key] = bad
            with pytest.raises(GGUFError):
                with pytest.MonkeyPatch.context() as m:
                    m.setattr('llm_course.pretrained.GGUF', lambda path: file)
                    load_gguf(path)
    assert time.perf_counter() - start < 20

def test_huge_counts_do_not_cost_memory(tmp_path):
    for counts in ((2**63, 0), (0, 2**63), (2**40, 2**40)):
        (tmp_path/'x.gguf').write_bytes(b'GGUF' + struct.pack('<IQQ', 3, *counts) + bytes(100))
        with pytest.raises(GGUFError): GGUF(tmp_path/'x.gguf')


# ---- templates

LLAMA3 = ("{{- bos_token }}\n{%- for message in messages %}\n    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}\n"
          "{%- endfor %}\n{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}")
QWEN = ("{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}{%- set ns = namespace(last=messages|length - 1) %}"
        "{%- for message in messages[::-1] %}{%- if message.role == 'user' %}{%- set ns.last = (messages|length - 1) - loop.index0 %}{%- break %}{%- endif %}{%- endfor %}"
        "{%- for message in messages %}{{- '<|im_start|>' ~ message.role ~ '\n' ~ message.content.strip('\n') ~ (' (last)' if loop.index0 == ns.last else '') ~ '<|im_end|>\n' }}{%- endfor %}")
MISTRAL = ("{{ bos_token }}{% for message in messages %}\n    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\n        {{ raise_exception('roles must alternate') }}\n    {% endif %}\n"
           "    {% if message['role'] == 'user' %}\n{{ '[INST] ' + message['content'] + ' [/INST]' }}\n    {% else %}\n{{ message | tojson + eos_token }}\n    {% endif %}\n{% endfor %}")

@pytest.mark.parametrize('source', [LLAMA3, QWEN, MISTRAL], ids=['llama3', 'qwen', 'mistral'])
def test_templates_render_as_in_transformers(source):
    special = {'bos_token': '<s>', 'eos_token': '</s>'}
    message = st.fixed_dictionaries({'role': st.sampled_from(['system', 'user', 'assistant']), 'content': st.text(st.characters(exclude_categories=['Cs']))})
    @settings(quick, max_examples=60)
    @given(st.lists(message, min_size=1, max_size=5), st.booleans())
    def check(messages, go_on):
        try: want = render_jinja_template([messages], chat_template=source, add_generation_prompt=go_on, **special)[0][0]
        except Exception as e: want = e
        try: assert ChatTemplate(source, special).render(messages, go_on) == want
        except ChatTemplateError as e: assert isinstance(want, Exception) and str(want) in str(e)
    check()

def test_ctrl_c_while_rendering_leaves_no_stale_answer():
    template = ChatTemplate('{% if messages[0].content == "slow" %}{% for i in range(99999) %}{% for j in range(30) %}{% endfor %}{% endfor %}{% endif %}{{ messages[0].content }}', seconds=20.)
    def render(text): return template.render([{'role': 'user', 'content': text}])
    assert render('a') == 'a'
    timer = threading.Timer(.05, _thread.interrupt_main); timer.start()
    with pytest.raises(KeyboardInterrupt): print(render('slow')); time.sleep(1)
    timer.join()
    assert render('b') == 'b'


# ---- chat

def test_chat_with_cache_says_what_it_says_without(tok):
    model = GPT(GPTConfig(vocab_size=tok.vocab_size, max_seq_len=2048, n_layer=2, n_head=4, n_kv_head=2, d_model=64), seed=1).eval()
    p = Pretrained(model, tok, ChatTemplate("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}<|im_start|>assistant\n"), end_ids(tok))
    def talk(texts, forget):
        chat, said = Chat(p, config=SamplingConfig(temperature=.8), max_new_tokens=9), []
        for t in texts:
            if forget: chat._cache = ConcatCache()
            said.append(''.join(chat.ask(t)))
        return said, chat.reused
    @settings(quick, max_examples=8)
    @given(st.lists(st.text('the lamp 12\n', max_size=12), min_size=2, max_size=4))
    def check(texts):
        (a, reused), (b, none) = talk(texts, False), talk(texts, True)
        assert a == b and reused > none == 0
    check()

def test_a_model_without_template_continues_each_text_by_itself(tok):
    p = Pretrained(GPT(GPTConfig(vocab_size=tok.vocab_size, max_seq_len=64, n_layer=1, n_head=2, d_model=32), seed=1).eval(), tok, None, end_ids(tok))
    chat = Chat(p, max_new_tokens=8)
    for _ in range(9): list(chat.ask('the lamp is lit'))                         # would not fit if it remembered
    assert chat._prompt('the') == [tok.special_tokens['<|endoftext|>'], *tok.encode('the')]
    list(Chat(p).ask(''))                                                        # an empty text begins a document


# ---- the real file

def test_tokenizer_of_smollm2(smollm2):
    "The oracle gets the step that `tokenizer.ggml.pre` asks for, which transformers leaves out when it reads a GGUF file."
    ours, theirs = gguf_tokenizer(GGUF(smollm2)), transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    assigned = st.text(st.characters(exclude_categories=['Cs', 'Cn']))
    @settings(quick, max_examples=2000)
    @given(st.one_of(assigned, st.text(' \n\t0123½²٣ab.,_', max_size=30)))
    def check(text): assert ours.encode(text, allowed_special='all') == theirs(text).input_ids
    check()

SCRIPT = '''
import json, re, sys, time, psutil, torch
from llm_course.core import fetch_file
from llm_course.pretrained import load_gguf
def high_water():
    return 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])
path, before, start = fetch_file('smollm2-gguf'), psutil.Process().memory_info().rss, time.perf_counter()
model = load_gguf(path, getattr(torch, sys.argv[1])).model
seconds, weights = time.perf_counter() - start, sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps([weights, (high_water() - before) / weights, seconds]))
'''

@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='asks Linux for the high-water mark')
def test_loading_takes_little_more_than_the_weights(smollm2):
    "In bfloat16, where the bound is the tighter one; the page does float32, too."
    run = subprocess.run([sys.executable, '-c', SCRIPT, 'bfloat16'], capture_output=True, text=True, check=True)
    weights, ratio, seconds = json.loads(run.stdout)
    assert weights == 134_515_008 * 2 and ratio < 1.3 and seconds < 5

def test_the_shape_of_smollm2_and_its_name(smollm2):
    file = GGUF(smollm2)
    assert gguf_config(file).to_dict() | {'norm_eps': 1e-5} == GPTConfig.from_name('smollm2-135m').to_dict()
    assert load_pretrained('smollm2-135m-instruct', torch.bfloat16).end_ids == (0, 2)
