"What the cells of 02_corpus cannot hold: hypothesis, endless repetitions, a line of 50 MB, processes that are killed, memory limits."
import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import unicodedata
from html.parser import HTMLParser

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_course import corpus
from llm_course.core import Document, read_documents
from llm_course.corpus import (Datasheet, Filter, LanguageClassifier, Removed, Rewrite, find_pii, html_to_text, length_problem, mask_pii, ngram_repetition,
                               normalise, prepare_corpus, read_stream, repetition_problem, split_documents, split_of, strip_wiki, symbols_problem, words_problem)

many = settings(max_examples=150, deadline=None)
NASTY = 'a e\u0301\u0300\u0344\u0316\ufeff\u200b\u00a8 \n\r\t\u0130IjJ\u030c\u03a3\u2121\ufdfa\u00b4.\'’-\u1100\u1161\u11a8\U0001d15e\ud800\xa0\x85\u00c5\u212b\xad\x00\u2028'
texts = st.one_of(st.text(), st.text(alphabet=st.sampled_from(NASTY), max_size=40))
markup = st.lists(st.sampled_from(['<', '>', 'a', 'p', '/', '"', "'", ' ', '!--', '-->', '&', 'amp;', 'lt;', '#', '9', 'script', '{{', '}}', '{|', '|}', '[[', ']]', '|',
                                           'File:', '[http:', '=', '\n', '*', 'ref', '@', '.', '0', '1', '+', '(', ':', '-']), max_size=60).map(''.join)


# ---- properties

@settings(max_examples=600, deadline=None)
@given(texts, st.sampled_from(['NFC', 'NFKC']), st.booleans(), st.booleans(), st.booleans())
@example('a' + '\u0344' * 9, 'NFC', False, True, True)                # each of these marks becomes two
@example('J\u030c', 'NFC', True, True, True)                         # composes only as a small letter
@example('e\u200b\u0301', 'NFC', False, True, True)                  # composes only without what stands between
def test_normalising_twice_is_normalising_once(text, form, lower, punctuation, squeeze):
    once = normalise(text, form, lower, punctuation, squeeze)
    assert normalise(once, form, lower, punctuation, squeeze) == once
    assert unicodedata.is_normalized(form, once) and not re.search('[\x00-\x08\xad\u200b\ufeff\r\ud800-\udfff]', once)
    once.encode()

@many
@given(st.one_of(texts, markup, st.lists(st.sampled_from(['a@b.example', '+44 20 7946 0958', '192.0.2.1', 'fe80::1', ' ', ', ', '-', '<EMAIL>', '1', ':'])).map(''.join)))
@example('0::0@0.AA@0.AA')                                              # the second address overlaps the first, which overlaps the machine's
def test_masking_twice_is_masking_once(text):
    once = mask_pii(text)
    assert mask_pii(once) == once and not find_pii(once)

@many
@given(markup)
def test_decoders_take_anything_and_invent_nothing(text):
    for fn in (html_to_text, strip_wiki):
        assert len(fn(text)) <= len(text) + text.count('<')            # a tag becomes at most a line break
    assert set(strip_wiki(text)) <= set(text) | set('&<\ufffd')

@many
@example([(False, '&lt;'), (True, '<b>')])
@given(st.lists(st.tuples(st.booleans(), st.text(alphabet='ab <&>"\';lt', max_size=8))))
def test_html_gives_back_the_text_that_was_escaped(parts):
    import html
    page = ''.join(f'<b title="a > b">{html.escape(t)}</b>' if tag else html.escape(t) for tag, t in parts)
    assert html_to_text(page) == re.sub(r'\s+', ' ', ''.join(t for _, t in parts)) or re.sub(r'\s+', ' ', html_to_text(page)) == re.sub(r'\s+', ' ', ''.join(t for _, t in parts))

def test_html_agrees_with_the_standard_parser_on_ordinary_pages():
    class Text(HTMLParser):
        out = ''
        def handle_data(self, data): self.out += data
    page = ''.join(f'<div class="c{i}" id=\'x\'><p>one &amp; two {i}<br/><i>three</i> &lt;4&gt; caf&eacute; &#8217;<!-- no --></p></div>' for i in range(50))
    parser = Text(); parser.feed(page); parser.close()
    assert html_to_text(page).split() != [] and ''.join(html_to_text(page).split()) == ''.join(parser.out.split())

def brute_repetition(words: list[str], n: int) -> float:
    groups = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
    inside = {j for i, g in enumerate(groups) if groups.count(g) > 1 for j in range(i, i + n)}
    return sum(len(words[i]) for i in inside) / sum(map(len, words))

@many
@given(st.lists(st.sampled_from(['a', 'bb', 'ccc']), min_size=5, max_size=30))
def test_repetition_is_its_definition(words):
    got = ngram_repetition(' '.join(words))
    assert sorted(got) == list(range(2, min(10, len(words)) + 1))
    for n in range(5, len(got) + 2): assert abs(got[n] - brute_repetition(words, n)) < 1e-12

@many
@given(st.lists(st.text(max_size=4), min_size=1, max_size=30), st.floats(.01, .6), st.floats(0, .3), st.integers(0, 99), st.sampled_from([None, 2, 5]))
def test_a_split_keeps_groups_together_and_loses_nothing(names, val, test, seed, n_groups):
    docs = [Document(n, str(i)) for i, n in enumerate(names)]
    group = (lambda d: str(int(d.text) % n_groups)) if n_groups else None
    units = len({group(d) for d in docs}) if group else len(docs)
    if len(docs) == 1 or units < 2 + (test > 0):
        with pytest.raises(ValueError): split_documents(docs, val, seed, test, group)
        return
    sides = split_documents(docs, val, seed, test, group)
    assert len(sides) == 2 + (test > 0) and all(sides) and sorted(sum(sides, [])) == sorted(docs)
    if group:
        for a in sides:
            for b in sides: assert a is b or not {group(d) for d in a} & {group(d) for d in b}

def test_a_single_document_is_cut_between_lines():
    for text in ('a\nb', '\n a\nb\n\n', 'a\n' * 50):
        (first,), (last,) = split_documents([Document('a', text)], .1)
        assert first.text + last.text == text and first.text.strip() and last.text.strip()
    for text in ('one line', '\none line\n', ''):
        with pytest.raises(ValueError, match='no line break inside'): split_documents([Document('a', text)])

def test_two_way_split_has_not_changed():
    docs = [Document(f'd{i}', 'x') for i in range(300)]
    held = [d.name for d in split_documents(docs, .05, seed=3)[1]]
    want = [d.name for d in docs if int.from_bytes(hashlib.sha256(f'3:{d.name}'.encode()).digest()[:6], 'big') / 2**48 < .05]
    assert held == want and held == [d.name for d in docs if split_of(d.name, .05, seed=3) == 'val']
    assert split_documents(docs, .05, seed=3) == split_documents(docs, .05, 3, 0., None)


# ---- no input hangs

REPEATED = ['a', '<', '&', '<!--', '<a', '<a ', '</', '<b>', '&amp;', ' ', '<script>', '<a href="', '<"', '<p>hello ', '&#', '&#9', '9', '{{', '}}', '{{}}', '{|', '[[', '[[a|', '[http:', '=',
            '\n=', '== ', '\n', ' \n', '\n ', '*', "'", '__A', 'a@', 'a.', '@', '@a.', '1.', '1-', '1 ', '(1', '::', ':', 'a:', '.', 'é', '\u0301', '\u0316\u0300', '\xa0', '[[File:',
            '<ref>', '<ref', '0 ', '+1 ', 'ab cd. ', '\u0344', 'ab\n\n', '# ', '…\n', '<"<\'', '\ufeff', '.\ud800']
FUNCTIONS = [html_to_text, strip_wiki, normalise, mask_pii, length_problem, words_problem, symbols_problem, repetition_problem, LanguageClassifier().problem]

@pytest.mark.parametrize('fn', FUNCTIONS, ids=lambda f: f.__name__)
def test_time_is_linear(fn):
    def cpu(text): start = time.process_time(); fn(text); return time.process_time() - start
    for unit in REPEATED:
        if '\ud800' in unit and fn not in (normalise,): continue
        n = 10_000 // len(unit)
        if (small := cpu(unit * n)) > .02:                            # what is quick need not be timed twice
            assert cpu(unit * 4 * n) < 10 * small, f'{fn.__name__} on {unit!r}: four times the text takes more than ten times as long'
        assert (large := cpu(unit * 8 * n)) < 2, f'{fn.__name__} takes {large:.1f} s for 80 kB of {unit!r}'

def test_a_line_of_50_megabytes(tmp_path):
    line = json.dumps({'name': 'huge', 'text': '<p>' + 'The lamp is lit and all is well. ' * 1_500_000})
    (tmp_path/'in.jsonl').write_text(line + '\n{"name": "after", "text": "' + 'The lamp and the gull have that. ' * 10 + '"}\n')
    assert len(line) > 49_000_000
    start = time.process_time()
    recipe = [Rewrite('html', html_to_text), Rewrite('unicode', normalise), Filter('length', length_problem)]
    sheet = prepare_corpus(read_stream(tmp_path/'in.jsonl'), recipe, tmp_path/'out.jsonl')
    assert time.process_time() - start < 30
    assert sheet.steps[-1].removed == {'more than 100,000 words': 1}
    assert [d.name for d in read_stream(tmp_path/'out.jsonl')] == ['after'] and len(sheet.steps[-1].examples['more than 100,000 words'][0]) < 200
    with pytest.raises(ValueError, match='line 1 is longer than 1,000,000 bytes'): list(read_stream(tmp_path/'in.jsonl', max_bytes=1_000_000))


# ---- reading and writing

@many
@given(st.binary(max_size=80))
def test_any_bytes_are_read_or_refused(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp()/'any.jsonl'
    for name, content in (('any.jsonl', raw), ('any.jsonl.gz', raw), ('any.jsonl.gz', gzip.compress(raw)), ('any.txt', raw)):
        (path.parent/name).write_bytes(content)
        for errors in ('strict', 'replace'):
            try: assert all(isinstance(d, Document) for d in read_stream(path.parent/name, errors))
            except ValueError as e: assert name in str(e)

def no_zeros(text): return text.replace('0', '')

@many
@example([('a', '0'), ('b', 'text'), ('c', '')])
@given(st.lists(st.tuples(st.text(max_size=5), st.text(alphabet=st.characters(exclude_categories=['Cs'])))))
def test_what_is_written_is_read_and_the_ledger_adds_up(tmp_path_factory, pairs):
    path, docs = tmp_path_factory.getbasetemp()/'round.jsonl', [Document(*p) for p in pairs]
    path.unlink(missing_ok=True)
    kept = [d._replace(text=d.text.replace('0', '')) for d in docs if d.text.replace('0', '').strip()]
    try: sheet = prepare_corpus(docs, [Rewrite('no zeros', no_zeros)], path)
    except ValueError as e: assert not kept and 'no document is left' in str(e) and not path.exists() or 'surrogate' in str(e); return
    assert list(read_stream(path)) == kept and Datasheet.load(path) == sheet
    for c in sheet.steps: assert c.docs_in == c.docs_out + sum(c.removed.values())
    for a, b in zip(sheet.steps, sheet.steps[1:]): assert (a.docs_out, a.chars_out) == (b.docs_in, b.chars_in)
    assert sheet.steps[0].docs_in == len(docs) and sheet.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()

class Seen:
    "A step that remembers."
    name = 'seen'
    def __init__(self): self.texts = set()
    def __call__(self, document):
        if document.text in self.texts: return Removed('seen before')
        self.texts.add(document.text)
        return document

def boom(text): raise KeyError('lamp')
def dies(text): os.kill(os.getpid(), signal.SIGKILL)

def test_processes_give_the_same_bytes_and_memory_stays_in_one(tmp_path):
    docs = [Document(str(i), f'{d.text * 8} {i % 4}') for i in range(8) for d in read_documents('tiny')] + [Document('blank', '')]
    steps = lambda: [Rewrite('unicode', normalise), Filter('length', length_problem), Seen(), Rewrite('pii', mask_pii)]
    one, two = (prepare_corpus(docs, steps(), tmp_path/f'{n}.jsonl', num_proc=n) for n in (1, 2))
    assert one == two and (tmp_path/'1.jsonl').read_bytes() == (tmp_path/'2.jsonl').read_bytes()
    assert one.steps[3].removed == {'seen before': 120} and one.steps[0].removed == {'empty': 1}

def test_errors_in_a_process_arrive_with_their_names(tmp_path):
    with pytest.raises(RuntimeError, match="step 'boom' failed on document 'a': KeyError: 'lamp'"):
        prepare_corpus([Document('a', 'x')], [Rewrite('boom', boom)], tmp_path/'o.jsonl', num_proc=2)
    with pytest.raises(Exception, match='terminated abruptly|process pool'):
        prepare_corpus([Document('a', 'x')], [Rewrite('dies', dies)], tmp_path/'o.jsonl', num_proc=2)
    assert list(tmp_path.iterdir()) == []

def test_no_more_than_a_few_blocks_are_under_way():
    taken = []
    def source():
        for i in range(30): taken.append(i); yield Document(str(i), 'x' * 2**20)
    results = corpus._results(corpus._blocks(source()), [Rewrite('same', str)], 3, 2)
    next(results)
    assert len(taken) <= 6
    results.close()

def test_a_killed_process_leaves_the_old_corpus(tmp_path):
    out = tmp_path/'o.jsonl'
    prepare_corpus([Document('old', 'x')], [], out)
    before = sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir())
    script = ('import sys\nfrom llm_course.core import Document\nfrom llm_course.corpus import prepare_corpus\n'
              'def docs():\n    yield Document("new", "y" * 3_000_000)\n    print("writing", flush=True)\n    import time; time.sleep(60)\n    yield Document("z", "z")\n'
              'prepare_corpus(docs(), [], sys.argv[1])')
    p = subprocess.Popen([sys.executable, '-c', script, str(out)], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline().strip() == 'writing'
    p.kill(); p.wait()
    left = sorted((q.name, q.read_bytes()) for q in tmp_path.iterdir() if not q.name.endswith('.tmp'))
    assert left == before
    assert prepare_corpus([Document('old', 'x')], [], out, resume=True).steps[0].docs_in == 1

@pytest.mark.skipif(sys.platform != 'linux', reason='needs /proc and RLIMIT_AS')
def test_a_corpus_larger_than_memory(tmp_path):
    script = '''
import resource, sys
from llm_course.core import Document
from llm_course.corpus import Filter, length_problem, prepare_corpus
used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 30_000_000,) * 2)
docs = (Document(str(i), f'{i} ' + 'and so it was that the lamp of the house ' * 500) for i in range(2_500))
try: print(prepare_corpus(list(docs) if sys.argv[2] == 'list' else docs, [Filter('length', length_problem)], sys.argv[1]).bytes)
except MemoryError: print('MemoryError')
'''
    def run(how): return subprocess.run([sys.executable, '-c', script, str(tmp_path/'o.jsonl'), how], capture_output=True, text=True).stdout.strip()
    assert int(run('stream')) > 50_000_000
    assert run('list') == 'MemoryError'                               # the limit is real
