"""Page 03b: what a notebook cell cannot hold. Thousands of invented strings against the production library, fifty megabytes, and damaged files."""
import json, math, pickle, random, time, warnings

import pytest, sentencepiece, tokenizers
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from tokenizers import decoders, models, pre_tokenizers

from llm_course import subwords
from llm_course.core import read_documents
from llm_course.subwords import (HFTokenizer, SentencePieceTokenizer, UnigramTokenizer, WordPieceTokenizer, WordTokenizer, count_words, learn_unigram,
                                 learn_wordpieces, pad_batch, seed_pieces, show_tokens, split_words, tokenizer_report)
from llm_course.tokenization import GPT2_PATTERN, BPETokenizer, load_tokenizer

TEXTS = [d.text for d in read_documents('tiny')]
WORD, PIECE, UNI = WordTokenizer.train(TEXTS), WordPieceTokenizer.train(TEXTS, 1000), UnigramTokenizer.train(TEXTS, 1000)
PLAIN = UnigramTokenizer.train(TEXTS, 700, byte_fallback=False)                       # <unk> instead of bytes
SP = SentencePieceTokenizer.train(TEXTS, 900)
ALL = [WORD, PIECE, UNI, PLAIN, SP]
quick = settings(deadline=None, suppress_health_check=list(HealthCheck))
assigned = st.characters(codec='utf-8', exclude_categories=['Cn', 'Cs', 'Co'])        # libraries differ in their version of Unicode
strings = st.one_of(st.text(assigned), st.text(st.sampled_from("the and ferry's, .?!'n\n  ▁éÉ日本🙂#12"), max_size=60), st.text('abehnrt ', max_size=80))


@pytest.fixture(scope='module')
def oracle(tmp_path_factory):
    "The same tokenizers, read by `tokenizers` from the files that we write."
    def read(tokenizer, path=tmp_path_factory.mktemp('hf')/'tokenizer.json'):
        tokenizer.save(path)
        return tokenizers.Tokenizer.from_file(str(path))
    return {id(t): read(t) for t in (WORD, PIECE, UNI, PLAIN)}


# ---- equal to `tokenizers`

BERT = pre_tokenizers.BertPreTokenizer()
def cut_alike(text: str) -> bool:
    "Whether each character is punctuation, white space or neither in both versions of Unicode: that of BERT's rule in `tokenizers` is from 2015."
    return all([w for w, _ in BERT.pre_tokenize_str(f'a{c}a')] == list(split_words(f'a{c}a')) for c in set(text) if not c.isascii())

def test_versions_of_unicode_differ_in_few_characters():
    strange = [c for c in map(chr, (*range(0x80, 0x3100), *range(0xfe00, 0xff70))) if not cut_alike(c)]
    assert len(strange) < 60 and '—' not in strange and '。' not in strange

@settings(quick, max_examples=2000)
@given(strings)
def test_words_and_wordpiece_equal_tokenizers(oracle, text):
    assume(cut_alike(text))
    for t in (WORD, PIECE):
        ids = t.encode(text, allowed_special='all')
        assert ids == oracle[id(t)].encode(text).ids
        assert t.decode(ids) == oracle[id(t)].decode(ids, skip_special_tokens=False) == ''.join(t.decode_stream(ids))

@settings(quick, max_examples=2000)
@given(strings)
def test_unigram_equals_tokenizers(oracle, text):
    for t in (UNI, PLAIN):
        ids = t.encode(text, allowed_special='all')
        assert ids == oracle[id(t)].encode(text).ids
        assert t.decode(ids) == oracle[id(t)].decode(ids, skip_special_tokens=False) == ''.join(t.decode_stream(ids))

@settings(quick, max_examples=300)
@given(st.data())
def test_decoding_any_ids_equals_tokenizers(oracle, data):
    for t, skip in ((WORD, 0), (PIECE, 0), (UNI, 259), (PLAIN, 3)):                  # bytes in any order need not be text
        ids = data.draw(st.lists(st.integers(skip, t.vocab_size - 1), max_size=30))
        assert t.decode(ids) == oracle[id(t)].decode(ids, skip_special_tokens=False)

@settings(quick, max_examples=300)
@given(st.lists(st.tuples(st.text('ab', min_size=1, max_size=4), st.integers(-40, -1)), min_size=1, max_size=8, unique_by=lambda x: x[0]), st.text('abc', max_size=30))
def test_ties_fall_as_in_tokenizers(vocab, text):
    ours = UnigramTokenizer([('<unk>', 0.), *((x, s / 4) for x, s in vocab)], special_tokens=['<unk>'], byte_fallback=False)   # quarters: many sums are equal
    theirs = tokenizers.Tokenizer(models.Unigram(ours.vocab, 0, False))
    assert ours.encode(text) == theirs.encode(text).ids

def test_on_shakespeare(tmp_path):
    try: works = [d.text for d in read_documents('shakespeare')]
    except ConnectionError as e: pytest.skip(str(e))
    for t in (WordPieceTokenizer.train(works[:1], 1500), UnigramTokenizer.train(works[:1], 1500)):
        t.save(tmp_path/'tokenizer.json')
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path/'tokenizer.json'))
        for text in works[1:7]:
            ids = t.encode(text)
            assert ids == theirs.encode(text).ids and t.decode(ids) == theirs.decode(ids, skip_special_tokens=False)

def test_a_typed_byte_token_stays_text():
    "The one difference that is meant: `tokenizers` takes the six characters <0x41> for the byte."
    assert UNI.decode(UNI.encode('<0x41>')) == '<0x41>' and UNI.encode('<0x41>') != [UNI._byte_ids[0x41]]


# ---- nothing is lost

@settings(quick, max_examples=1000)
@given(st.text(st.characters(codec='utf-8', exclude_characters='▁')), st.integers(0, 9))
def test_round_trip(text, seed):
    for t in (UNI, SP): assert t.decode(t.encode(text, disallowed_special=())) == text
    assert UNI.decode(UNI.sample(text, seed)) == text

@settings(quick, max_examples=300)
@given(st.text(assigned))
def test_sentencepiece_is_the_library(text):
    assert SP.encode(text, disallowed_special=()) == sentencepiece.SentencePieceProcessor(model_proto=SP.model).encode(text)

def test_every_token_is_encoded_as_itself():
    for t in (WORD, PIECE): assert [w for w, i in t._id.items() if not w.startswith('##') and t.encode(w) != [i]] == []

def test_special_tokens_are_out_of_reach(oracle):
    for t in [*ALL, *map(HFTokenizer, oracle.values())]:
        name, i = list(t.special_tokens.items())[-1]
        assert i not in t.encode(f'a {name} b', disallowed_special=()) and i in t.encode(f'a {name} b', allowed_special='all')
        with pytest.raises(ValueError, match='holds the special token'): t.encode(f'a {name} b')


@pytest.mark.parametrize('tokenizer', ALL, ids=lambda t: f'{type(t).__name__}-{t.vocab_size}')
def test_half_a_surrogate_pair(tokenizer, oracle):
    for t in (tokenizer, HFTokenizer(oracle.get(id(tokenizer)) or oracle[id(UNI)])):
        with pytest.raises(ValueError, match='character 1 is U\\+D83D, half of a surrogate pair'): t.encode('a\ud83d')

def test_sentencepiece_skips_no_long_line():
    "The library itself leaves out a line of more than 4,192 bytes, and says nothing."
    text = 'the cat sat on the mat. ' * 400
    assert SentencePieceTokenizer.train([text, 'x'], 272).vocab_size == 272


# ---- training, against the definition

def all_cuts(text, known):
    if not text: return [[]]
    return [[text[:n], *rest] for n in range(1, len(text) + 1) if text[:n] in known for rest in all_cuts(text[n:], known)]

@settings(quick, max_examples=150)
@given(st.lists(st.text('abc', min_size=1, max_size=9), min_size=1, max_size=6, unique=True), st.randoms(use_true_random=False))
def test_the_lattice_equals_enumeration(words, rng):
    pieces = ['a', 'b', 'c', *{w[i:i + n] for w in words for n in (2, 3) for i in range(len(w) - n + 1)}]
    score = subwords.np.array([math.log(rng.random() + .01) for _ in pieces])
    weight = subwords.np.array([float(rng.randrange(1, 5)) for _ in words])
    p, want, total = dict(zip(pieces, score)), dict.fromkeys(pieces, 0.), 0.
    for w, n in zip(words, weight):
        cuts = [(c, math.exp(sum(p[x] for x in c))) for c in all_cuts(w, p)]
        Z = sum(v for _, v in cuts)
        total += n * math.log(Z)
        for c, v in cuts:
            for x in c: want[x] += n * v / Z
    lattice = subwords._Lattice(words, pieces)
    got, log_z = lattice.expected(score, weight)
    assert subwords.np.allclose(got, [want[x] for x in pieces]) and math.isclose(log_z, total, rel_tol=1e-9, abs_tol=1e-9)
    best = lattice.paths(score, best=True)[lattice.last]
    assert subwords.np.allclose(best, [max(sum(p[x] for x in c) for c in all_cuts(w, p)) for w in words])

@settings(quick, max_examples=100)
@given(st.dictionaries(st.text('abc', min_size=1, max_size=10), st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 3))
def test_wordpieces_equal_a_slow_implementation(counts, min_count):
    for score, value in (('gain', lambda n, a, b, N: n * math.log(n * N / (a * b))), ('ratio', lambda n, a, b, N: n / (a * b)), ('count', lambda n, a, b, N: n)):
        words = {w: [w[0]] + ['##' + c for c in w[1:]] for w in counts}
        N, learnt = sum(len(w) * n for w, n in counts.items()), []
        while True:
            single, pairs = {}, {}
            for w, word in words.items():
                for s in word: single[s] = single.get(s, 0) + counts[w]
                for p in zip(word, word[1:]): pairs[p] = pairs.get(p, 0) + counts[w]
            good = sorted((-value(n, single[a], single[b], N), (a, b)) for (a, b), n in pairs.items() if n >= min_count)
            if not good: break
            a, b = good[0][1]
            learnt.append(a + b[2:])
            for word in words.values():
                i = 0
                while i + 1 < len(word):
                    if word[i] == a and word[i + 1] == b: word[i:i + 2] = [a + b[2:]]
                    i += 1
        assert learn_wordpieces(counts, 999, score, min_count) == learnt

def test_unigram_pieces_are_worth_their_place():
    "Trained pieces cut the text they come from into fewer tokens, at a higher likelihood, than the most frequent seeds do."
    counts = {p: n for t in TEXTS for p, n in subwords.count_pieces([t]).items()}
    learnt, seeds = learn_unigram(counts, 600), seed_pieces(counts, 600 - 70)
    total = sum(seeds.values())
    def likelihood(scores):
        lattice = subwords._Lattice(list(counts), list(scores))
        return subwords.np.array(list(counts.values())) @ lattice.paths(subwords.np.array(list(scores.values())))[lattice.last]
    assert len(learnt) == 600 and set(''.join(counts)) <= set(learnt)
    assert likelihood(learnt) > likelihood({x: math.log(n / total) for x, n in seeds.items()})
    assert math.isclose(sum(map(math.exp, learnt.values())), 1, rel_tol=1e-9)


# ---- large input

def test_a_line_of_fifty_megabytes():
    line = ' '.join(TEXTS).replace('\n', ' ') + ' '
    once, times, start = UNI.encode(line), 50_000_000 // len(line) + 1, time.process_time()
    ids = UNI.encode(line * times)
    assert time.process_time() - start < 60
    assert len(ids) >= times * (len(once) - 1) and ids[:len(once) - 1] == once[:-1]

def test_fifty_megabytes_without_a_space():
    for t in (WORD, PIECE): assert t.encode('x' * 50_000_000) == [1]               # one word, unknown

def test_unigram_takes_linear_time():
    letters = ''.join(random.Random(0).choices('etaoinshr', k=400_000))            # one piece: no space anywhere
    def seconds(n): start = time.process_time(); ids = UNI.encode(letters[:n]); return time.process_time() - start, ids
    (half, _), (whole, ids) = seconds(100_000), seconds(400_000)
    assert whole < 8 * half and UNI.decode(ids) == letters                         # sixteen times, if it were quadratic

def test_unigram_training_is_bounded():
    with pytest.raises(ValueError, match='5,000,000 characters, more than max_chars=4,000,000'):
        UnigramTokenizer.train([''.join(random.Random(0).choices('abcdefgh', k=5_000_000))], 300)
    UnigramTokenizer.train(['ab' * 100_000], 265)                                  # long, but all its parts are alike


# ---- files

@pytest.mark.parametrize('tokenizer', [*ALL, WordPieceTokenizer({'<x>': 7, 'a': 2, '##b': 9}, ['<x>'], '<x>', 5)], ids=lambda t: f'{type(t).__name__}-{t.vocab_size}')
def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path/'tokenizer.json')
    again = load_tokenizer(tmp_path/'tokenizer.json')
    assert type(again) is type(tokenizer) and again.fingerprint == tokenizer.fingerprint and again.special_tokens == tokenizer.special_tokens
    assert again.encode(TEXTS[2]) == tokenizer.encode(TEXTS[2]) == pickle.loads(pickle.dumps(tokenizer)).encode(TEXTS[2])
    again.save(tmp_path/'again.json')
    assert (tmp_path/'again.json').read_bytes() == (tmp_path/'tokenizer.json').read_bytes()

def test_damaged_files_are_never_taken_for_a_tokenizer(tmp_path):
    path, rng = tmp_path/'tokenizer.json', random.Random(0)
    for t in (WORD, PIECE, PLAIN):
        t.save(path)
        whole, refused = path.read_text('utf-8'), 0
        for n in (*range(0, len(whole), len(whole) // 40), len(whole) - 1):
            path.write_text(whole[:n], 'utf-8')
            with pytest.raises(ValueError, match='tokenizer.json is not a tokenizer'): load_tokenizer(path)
        for at in rng.sample(range(len(whole)), 60):
            path.write_text(whole[:at] + rng.choice('aZ0 9"{') + whole[at + 1:], 'utf-8')
            try: again = load_tokenizer(path)
            except ValueError: refused += 1; continue
            assert again.fingerprint == t.fingerprint and again.special_tokens == t.special_tokens
        assert refused > 20

@pytest.mark.parametrize('part, value', [('normalizer', {'type': 'BertNormalizer', 'lowercase': True}), ('pre_tokenizer', {'type': 'Whitespace'}), ('decoder', None),
                                         ('post_processor', {'type': 'BertProcessing'}), ('truncation', {'max_length': 8}), ('padding', {'pad_id': 0})])
def test_steps_that_we_do_not_do_are_refused(part, value, tmp_path):
    for t in (WORD, PIECE, UNI):
        (tmp_path/'tokenizer.json').write_text(json.dumps(t._to_dict() | {part: value}), 'utf-8')
        with pytest.raises(ValueError, match=f'its {part} is'): load_tokenizer(tmp_path/'tokenizer.json')

def test_any_file_through_the_library(tmp_path):
    PIECE.save(tmp_path/'tokenizer.json')
    data = json.loads((tmp_path/'tokenizer.json').read_text('utf-8')) | {'normalizer': {'type': 'Lowercase'}}
    (tmp_path/'lower.json').write_text(json.dumps(data), 'utf-8')
    t = HFTokenizer.from_file(tmp_path/'lower.json')
    assert t.encode('THE ferry') == PIECE.encode('the ferry') and ''.join(t.decode_stream(t.encode(TEXTS[0]))) == t.decode(t.encode(TEXTS[0]))
    assert pickle.loads(pickle.dumps(t)).encode('A ferry') == t.encode('A ferry')

def test_the_wrapper_never_cuts_off(tmp_path):
    t = tokenizers.Tokenizer(models.WordLevel({'[UNK]': 0, 'a': 1}, unk_token='[UNK]'))
    t.pre_tokenizer, t.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    t.enable_truncation(3); t.enable_padding(length=9)
    assert len(t.encode('a ' * 20).ids) == 9 and len(HFTokenizer(t).encode('a ' * 20)) == 20


# ---- bad input, each with its message

@pytest.mark.parametrize('call, message', [
    (lambda: WordTokenizer.train([]), 'corpus is empty'),
    (lambda: WordPieceTokenizer.train([' ', '[SEP]'], 300), 'corpus is empty'),
    (lambda: UnigramTokenizer.train([], 300), 'corpus is empty'),
    (lambda: SentencePieceTokenizer.train([''], 300), 'corpus is empty'),
    (lambda: WordPieceTokenizer.train(TEXTS, 50), 'vocab_size 50 is too small'),
    (lambda: UnigramTokenizer.train(TEXTS, 300), 'vocab_size 300 is too small'),
    (lambda: SentencePieceTokenizer.train(TEXTS, 300), 'vocab_size 300 is too small'),
    (lambda: WordPieceTokenizer.train(['seal seal sea'], 90), r'cannot be reached.*after \d+ tokens. Use vocab_size='),
    (lambda: UnigramTokenizer.train(['seal seal sea'], 900), r'cannot be reached.*Use vocab_size=\d+ or less'),
    (lambda: SentencePieceTokenizer.train(['seal seal sea'], 900), r'cannot be reached. Use vocab_size=\d+ or less'),
    (lambda: WordPieceTokenizer.train(TEXTS, 300, score='best'), "score 'best'"),
    (lambda: WordPieceTokenizer.train(['a\udc80'], 300), 'half of a surrogate pair'),
    (lambda: SentencePieceTokenizer.train(['a\udc80'], 300), 'half of a surrogate pair'),
    (lambda: UnigramTokenizer([('a', 0.)], special_tokens=[]), 'special_tokens is empty'),
    (lambda: UnigramTokenizer([('<unk>', 0.)], '(a)', ['<unk>'], False), 'capturing group'),
    (lambda: SentencePieceTokenizer(b''), 'not a SentencePiece model'),
    (lambda: SentencePieceTokenizer(b'<html>' * 99), 'not a SentencePiece model'),
    (lambda: PIECE.decode([1000]), 'id 1000 is not in this vocabulary'),
    (lambda: SP.decode([-1]), 'id -1 is not in this vocabulary'),
    (lambda: UNI.sample('a', 0, float('nan')), 'alpha nan'),
    (lambda: pad_batch([], 0), 'at least one sequence'),
    (lambda: tokenizer_report(UNI, ''), 'empty text'),
    (lambda: show_tokens(UNI, 'x' * 3000), '3,000 characters are too many'),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call()

def test_the_reached_size_works():
    for kind, text in ((WordPieceTokenizer, 'seal seal sea'), (UnigramTokenizer, 'seal seal sea'), (SentencePieceTokenizer, 'seal seal sea')):
        with pytest.raises(ValueError) as e: kind.train([text], 900)
        size = int(str(e.value).split('vocab_size=')[1].split()[0])
        assert kind.train([text], size).vocab_size == size

def test_missing_libraries_are_named(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'sentencepiece', None)
    with pytest.raises(ImportError, match=r"pip install 'llm_course\[text\]'"): SentencePieceTokenizer(SP.model)

def test_wrong_types():
    for call in (lambda: WordTokenizer.train('one text'), lambda: UnigramTokenizer.train([b'bytes'], 300), lambda: PIECE.encode(b'bytes'), lambda: count_words('one')):
        with pytest.raises(TypeError, match='str'): call()

def test_pictures_need_no_font_for_a_script():
    view = show_tokens({'BPE': BPETokenizer([], GPT2_PATTERN), 'Unigram': UNI}, '日本 🙂\n$x^2$ ' + 'w' * 99)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert view._repr_png_().startswith(b'\x89PNG')
    assert 'E6|97|A5' in repr(view)
