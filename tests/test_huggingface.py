"Hugging Face folders on any configuration and on damaged files: what loads is exact, what is wrong is a ValueError; the library loads every family without a warning; the harness agrees."
import contextlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import llm_course.huggingface as H
from llm_course.core import generator, read_documents
from llm_course.gpt import GPT, GPTConfig
from llm_course.huggingface import FAMILIES, config_from_hf, from_hf, hf_config, hf_family, safetensors_header, save_hf
from llm_course.pretrained import ChatTemplate, ChatTemplateError, Pretrained, load_pretrained
from llm_course.pretraining import save_checkpoint
from llm_course.tokenization import CL100K_PATTERN, BPETokenizer, CharTokenizer, load_tokenizer

few = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much])
TOK = BPETokenizer.train([d.text for d in read_documents('tiny')], vocab_size=300)
SMALL = dict(vocab_size=310, max_seq_len=24, n_layer=2, n_head=4, d_model=16, d_ff=24)
SETTINGS = {
    'gpt2': [dict(norm='layernorm', activation='gelu_tanh', position='learned', bias=True), dict(norm='layernorm', activation='gelu', position='learned', bias=True, tie_embeddings=False)],
    'llama': [dict(n_kv_head=2, head_dim=6, rope_theta=5e5), dict(bias=True, tie_embeddings=False, activation='geglu')],
    'mistral': [dict(n_kv_head=1, window=7, tie_embeddings=False), dict(window=30, head_dim=10)],
    'qwen2': [dict(n_kv_head=2, qkv_bias=True, rope_theta=1e6), dict(qkv_bias=True, window=5, global_every=2, tie_embeddings=False)],
    'qwen3': [dict(n_kv_head=2, head_dim=8, qk_norm=True), dict(qk_norm=True, activation='relu2', window=6, tie_embeddings=False)]}


def model_of(config, seed=0):
    model = GPT(config, seed).eval()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()): p.add_(torch.randn(p.shape, generator=generator(i)) * .2)    # biases and norms are not trivial
    return model


def same(a, b): return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@contextlib.contextmanager
def silent():
    "What the libraries say at level WARNING or above is an error here."
    said, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    loggers = [logging.getLogger(n) for n in ('transformers', 'huggingface_hub', '')]
    import transformers
    transformers.logging.set_verbosity_warning(); transformers.logging.disable_progress_bar()
    for x in loggers: x.addHandler(handler)
    try: yield
    finally:
        for x in loggers: x.removeHandler(handler)
    assert said == []


@st.composite
def configs(draw):
    family, kv = draw(st.sampled_from(sorted(FAMILIES))), draw(st.sampled_from([1, 2, 4]))
    own = {'gpt2': dict(norm='layernorm', position='learned', bias=True, activation=draw(st.sampled_from(sorted(H._ACTS)))),
           'llama': dict(n_kv_head=kv, bias=draw(st.booleans())), 'mistral': dict(n_kv_head=kv, window=draw(st.sampled_from([None, 1, 9]))),
           'qwen2': dict(n_kv_head=kv, qkv_bias=True, window=draw(st.sampled_from([None, 3]))), 'qwen3': dict(n_kv_head=kv, qk_norm=True)}[family]
    if family != 'gpt2': own |= dict(activation=draw(st.sampled_from(sorted(H._GATED_ACTS))), head_dim=draw(st.sampled_from([2, 4, 6])), rope_theta=draw(st.sampled_from([1e4, 123.5])))
    if own.get('window') and family == 'qwen2': own['global_every'] = draw(st.sampled_from([None, 2]))
    return family, GPTConfig(**SMALL | own | dict(n_layer=draw(st.integers(2 if own.get('global_every') else 1, 3)), tie_embeddings=draw(st.booleans()), norm_eps=draw(st.sampled_from([1e-5, 1e-6]))))


@few
@given(configs(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.sampled_from([3000, 10**9]))
def test_ours_to_theirs_to_ours(tmp_path, drawn, dtype, most):
    (family, config), at = drawn, tmp_path/'m'
    model = model_of(config).to(dtype)
    shutil.rmtree(at, ignore_errors=True)
    save_hf(model, TOK, at, family, max_shard_bytes=most)
    back = from_hf(at, None)
    assert back.model.config == config and same(back.model, model) and back.tokenizer.fingerprint == TOK.fingerprint
    if config.position == 'rope': assert back.model.rope_cos.dtype == torch.float32
    assert config_from_hf(json.loads((at/'config.json').read_text())) == config


@few
@given(configs(), st.sampled_from(sorted(FAMILIES)))
def test_a_family_says_no_or_says_everything(drawn, family):
    try: hf_family(drawn[1], family)
    except ValueError as e: assert 'no place for' in str(e)
    else: assert config_from_hf(hf_config(drawn[1], family=family)) == drawn[1]


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('n', [0, 1])
def test_the_library_loads_it_without_a_word(tmp_path, family, n):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    model = model_of(GPTConfig(**SMALL | SETTINGS[family][n]))
    save_hf(model, TOK, tmp_path/'m', family, max_shard_bytes=6000 if n else 10**9, chat_template=ChatTemplate('{{ messages[0].content }}'))
    with silent():
        theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path/'m', output_loading_info=True)
        library, generation = AutoTokenizer.from_pretrained(tmp_path/'m'), GenerationConfig.from_pretrained(tmp_path/'m')
    ids = torch.randint(300, (2, 20), generator=generator(n))
    with torch.no_grad(): torch.testing.assert_close(theirs.eval()(ids).logits, model(ids)[0], atol=1e-4, rtol=1e-4)
    assert not any(report.values()) and generation.eos_token_id == TOK.special_tokens['<|endoftext|>']
    for d in read_documents('tiny')[:5]: assert library(d.text)['input_ids'] == TOK.encode(d.text)
    theirs.save_pretrained(tmp_path/'theirs', max_shard_size='8KB')
    assert same(from_hf(tmp_path/'theirs').model, model)


@pytest.mark.parametrize('scaling', [{'type': 'linear', 'factor': 4.}, {'rope_type': 'yarn', 'factor': 4., 'original_max_position_embeddings': 6},
                                     {'rope_type': 'llama3', 'factor': 4., 'original_max_position_embeddings': 8, 'low_freq_factor': 1., 'high_freq_factor': 4.}])
def test_stretched_rope_without_a_word(tmp_path, scaling):
    from transformers import AutoModelForCausalLM
    save_hf(model_of(GPTConfig(**SMALL)), None, tmp_path/'m')
    content = json.loads((tmp_path/'m'/'config.json').read_text()) | {'rope_scaling': scaling}
    del content['rope_parameters']
    (tmp_path/'m'/'config.json').write_text(json.dumps(content))
    stretched = from_hf(tmp_path/'m').model
    save_hf(stretched, None, tmp_path/'again')
    with silent(): theirs = AutoModelForCausalLM.from_pretrained(tmp_path/'again').eval()
    ids = torch.randint(300, (2, 24), generator=generator(0))
    with torch.no_grad(): torch.testing.assert_close(theirs(ids).logits, stretched(ids)[0], atol=1e-4, rtol=1e-4)
    assert from_hf(tmp_path/'again').model.rope_scaling == stretched.rope_scaling
    with pytest.raises(ValueError, match='save it with save_hf'): save_checkpoint(tmp_path/'c', stretched)


def test_old_names_of_gpt2(tmp_path):
    model = model_of(GPTConfig(**SMALL | SETTINGS['gpt2'][0]))
    save_hf(model, None, tmp_path/'m')
    old = {n.removeprefix('transformer.'): t for n, t in load_file(tmp_path/'m'/'model.safetensors').items()}
    old |= {f'h.{i}.attn.bias': torch.ones(1, 1, 24, 24).tril() for i in range(2)} | {'h.0.attn.masked_bias': torch.tensor(-1e4)}
    save_file(old, tmp_path/'m'/'model.safetensors')
    assert same(from_hf(tmp_path/'m').model, model)


@pytest.mark.parametrize('family', ['gpt2', 'qwen2'])
def test_a_pattern_of_your_own_is_kept(tmp_path, family):                      # the library's GPT2Tokenizer would put its own in place of it
    from transformers import AutoTokenizer
    texts = [d.text for d in read_documents('tiny')]
    tok = BPETokenizer.train(texts, vocab_size=300, pattern=CL100K_PATTERN)
    theirs = AutoTokenizer.from_pretrained(save_hf(GPT(GPTConfig(**SMALL | SETTINGS[family][0])), tok, tmp_path/'m', family))
    for text in texts: assert theirs(text)['input_ids'] == tok.encode(text)


def test_characters(tmp_path):
    from transformers import AutoTokenizer
    text = read_documents('tiny')[0].text
    tok = CharTokenizer.train([text + '\r\n\t é🦉'], special_tokens=('<|endoftext|>',))
    save_hf(GPT(GPTConfig(**SMALL)), tok, tmp_path/'m')
    theirs, back = AutoTokenizer.from_pretrained(tmp_path/'m'), from_hf(tmp_path/'m').tokenizer
    for t in (text, 'a b\r\n\té🦉<|endoftext|>', ''): assert theirs(t)['input_ids'] == tok.encode(t, allowed_special='all') == back.encode(t, allowed_special='all')
    assert theirs.decode(tok.encode(text)) == text == back.decode(tok.encode(text))
    with pytest.raises(Exception, match='(?i)unk'): theirs('ß')                # not in the vocabulary: an error, as ours


def test_a_checkpoint_of_ours_becomes_a_folder(tmp_path):
    model = model_of(GPTConfig.from_name('course-tiny', vocab_size=300, max_seq_len=16, n_layer=2))
    save_checkpoint(tmp_path/'checkpoint', model, TOK)
    loaded = load_pretrained(tmp_path/'checkpoint')
    back = load_pretrained(save_hf(loaded, None, tmp_path/'m'))
    assert same(back.model, model) and back.end_ids == loaded.end_ids and replace(back.model.config, residual_init='zero') == model.config


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    at = tmp_path_factory.mktemp('hf')/'good'
    model = model_of(GPTConfig(**SMALL | dict(n_kv_head=2)))
    return save_hf(Pretrained(model, TOK, ChatTemplate('{{ messages }}'), (TOK.special_tokens['<|endoftext|>'],)), None, at, max_shard_bytes=4000)


plain = st.recursive(st.none() | st.booleans() | st.integers(-2, 2**40) | st.floats() | st.text(max_size=4), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3), max_leaves=5)


@pytest.mark.parametrize('name', ['config.json', 'generation_config.json', 'tokenizer_config.json', 'model.safetensors.index.json'])
def test_any_value_in_a_file_loads_or_is_a_clear_error(good, tmp_path, name):
    at, content = shutil.copytree(good, tmp_path/'m'), json.loads((good/name).read_text())
    keys = sorted(content) + (['rope_scaling', 'layer_types', 'quantization_config'] if name == 'config.json' else [])
    @settings(max_examples=60, deadline=None)
    @given(st.sampled_from(keys), plain)
    def change(key, value):
        assume(not (key == 'num_hidden_layers' and isinstance(value, int) and 1000 < value <= 10_000))
        if key == 'rope_scaling' and isinstance(value, dict): value = {'rope_type': 'llama3', 'factor': 2.} | value
        rest = {k: v for k, v in content.items() if not (key == 'rope_scaling' and k == 'rope_parameters')}    # or the two contradict each other, and nothing else is reached
        (at/name).write_text(json.dumps(rest | {key: value}))
        try: from_hf(at)
        except (ValueError, FileNotFoundError): pass
    change()


@few
@given(st.data())
def test_any_damage_to_a_header_is_a_value_error(good, tmp_path, data):
    raw = bytearray(min(good.glob('*.safetensors')).read_bytes())
    length = int.from_bytes(raw[:8], 'little')
    for _ in range(data.draw(st.integers(1, 3))): raw[data.draw(st.integers(0, 8 + length - 1))] = data.draw(st.integers(0, 255))
    (tmp_path/'x.safetensors').write_bytes(raw[:data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    try: found = safetensors_header(tmp_path/'x.safetensors')
    except ValueError: return
    assert sum(t.n_bytes for t in found.values()) + 8 + length == len((tmp_path/'x.safetensors').read_bytes())


@pytest.mark.parametrize('value, says', [(3, 'its chat_template is no text'), ([{'name': 'default', 'template': ['x']}], 'its chat_template is no text')])
def test_a_template_that_is_no_text(good, tmp_path, value, says):
    at = shutil.copytree(good, tmp_path/'m')
    (at/'chat_template.jinja').unlink()
    (at/'tokenizer_config.json').write_text(json.dumps({'chat_template': value}))
    with pytest.raises(ValueError, match=says): from_hf(at)


def test_nothing_is_left_of_a_folder_that_could_not_be_written(tmp_path):
    model = model_of(GPTConfig(**SMALL))
    with mock.patch.object(H, '_write_tokenizer', side_effect=OSError('disk full')), pytest.raises(OSError): save_hf(model, TOK, tmp_path/'m')
    assert list(tmp_path.iterdir()) == []


def test_code_in_a_folder_is_never_run(good, tmp_path):
    at = shutil.copytree(good, tmp_path/'m')
    (at/'modeling.py').write_text(f'open({str(tmp_path/"ran")!r}, "w")')
    content = json.loads((at/'config.json').read_text())
    (at/'config.json').write_text(json.dumps(content | {'auto_map': {'AutoModelForCausalLM': 'modeling.Model'}}))
    (at/'chat_template.jinja').write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    loaded = from_hf(at)
    with pytest.raises(ChatTemplateError): loaded.chat_template.render([{'role': 'user', 'content': 'Hi'}])
    torch.save({}, at/'pytorch_model.bin')
    for f in at.glob('*.safetensors*'): f.unlink()
    with mock.patch('torch.load', side_effect=AssertionError), mock.patch('pickle.load', side_effect=AssertionError), pytest.raises(ValueError, match='refused. Convert it once'): from_hf(at)
    assert not (tmp_path/'ran').exists()


def test_tokenizers_that_only_the_library_reads(good, tmp_path):
    at = shutil.copytree(good, tmp_path/'m')
    content = json.loads((at/'tokenizer.json').read_text()) | {'normalizer': {'type': 'NFC'}}
    del content['model']['fingerprint']
    (at/'tokenizer.json').write_text(json.dumps(content))
    with pytest.raises(ValueError, match='normalizer'): load_tokenizer(at/'tokenizer.json')
    loaded = from_hf(at)
    assert loaded.tokenizer.encode('cafe\u0301') == TOK.encode('café') and loaded.end_ids == (TOK.special_tokens['<|endoftext|>'],)
    save_hf(loaded, None, tmp_path/'again')
    assert json.loads((tmp_path/'again'/'tokenizer.json').read_text())['normalizer'] == {'type': 'NFC'}
    from transformers import AutoTokenizer
    assert AutoTokenizer.from_pretrained(tmp_path/'again')('cafe\u0301')['input_ids'] == TOK.encode('café')


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='resident memory as Linux counts it')
def test_loading_peaks_little_above_the_weights(tmp_path):
    save_hf(GPT(GPTConfig(vocab_size=20_000, max_seq_len=64, n_layer=8, n_head=8, d_model=512)), None, tmp_path/'m')
    code = '''if True:
        import sys, torch
        from llm_course.core import Budget
        from llm_course.huggingface import from_hf
        with Budget('load') as b: model = from_hf(sys.argv[1], torch.bfloat16).model
        print(b.measured['memory'] / sum(p.nbytes for p in model.parameters()))'''
    ratio = float(subprocess.run([sys.executable, '-c', code, str(tmp_path/'m')], capture_output=True, text=True, check=True).stdout)
    assert ratio < 1.3, ratio                                                  # from a file twice as large; read whole it would be 3


def test_the_harness_gives_the_same_numbers_with_both_backends(tmp_path):
    lm_eval = pytest.importorskip('lm_eval')
    import datasets
    import lm_eval.tasks
    from lm_eval.models.huggingface import HFLM

    from llm_course.benchmarks import as_lm_eval
    model = model_of(GPTConfig.from_name('course-tiny', vocab_size=300, max_seq_len=64, n_layer=2))
    save_hf(model, TOK, tmp_path/'m')
    text = read_documents('tiny')[0].text
    rows = [{'q': text[i:i + 40] if i else '', 'c': [text[i + 40:i + 60], ' the end', ' Ida'], 'a': 0} for i in range(0, 600, 60)]
    (tmp_path/'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    (tmp_path/'tasks').mkdir()
    (tmp_path/'tasks'/'go_on.yaml').write_text(json.dumps(dict(
        task='go_on', dataset_path='json', dataset_kwargs={'data_files': {'test': str(tmp_path/'rows.jsonl')}, 'cache_dir': str(tmp_path/'cache')}, test_split='test',
        output_type='multiple_choice', doc_to_text='{{q}}', doc_to_choice='{{c}}', doc_to_target='{{a}}', metric_list=[{'metric': 'acc'}])))
    def nats(lm):
        manager = lm_eval.tasks.TaskManager(include_path=str(tmp_path/'tasks'), include_defaults=False)
        with contextlib.redirect_stderr(io.StringIO()), mock.patch.dict(os.environ, HF_DATASETS_OFFLINE='1', HF_HUB_OFFLINE='1'):
            datasets.disable_progress_bars()
            found = lm_eval.simple_evaluate(lm, tasks=['go_on'], task_manager=manager, bootstrap_iters=0)
        return [tuple(x) for s in sorted(found['samples']['go_on'], key=lambda s: s['doc_id']) for (x,) in s['resps']]
    ours, theirs = nats(as_lm_eval(model, TOK)), nats(HFLM(pretrained=str(tmp_path/'m'), device='cpu', dtype='float32', batch_size=4))
    assert len(ours) == 30 and [g for _, g in ours] == [g for _, g in theirs]
    assert max(abs(a - b) for (a, _), (b, _) in zip(ours, theirs)) < 1e-3
