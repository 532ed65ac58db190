"""The glossary: every term that a page introduces in bold has an entry, and every entry leads to a page that uses the term.

Bold type on a page is for terms. Four other uses are told apart by where they stand or how they end: labels, which end
in `.`, `:` or `?`; the beginnings of list items; table rows; and rules to remember, which have more than four words.
Emphasis is italic. So a bold phrase that this test misses needs an entry, or is no term and should be *italic*."""
import re
from collections import Counter
from functools import cache

import pytest
from course import NBS, cells

PAGES = {p.stem: p for p in sorted(NBS.glob('[0-9][0-9]*_*.ipynb'))}
FIXED = {'You will be able to', 'Further reading.'}
BOLD = re.compile(r'\*\*(?! )([^*\n]+?)(?<! )\*\*')
ITEM = re.compile(r' *(?:[-+*]|\d+[.)]) +$')
ENTRY = re.compile(r'\*\*(?P<term>[^*]+)\*\*(?: \(also: (?P<also>.+?)\))?\. (?P<text>.+?[.?]) (?P<links>\[\S+\]\(\S+\)(?:, \[\S+\]\(\S+\))*)')


def plain(name: str) -> str:
    "A term as it is compared: no capitals, hyphens or backticks, and singular by the simplest of rules, one final s less."
    name = ' '.join(name.replace('`', '').replace('-', ' ').casefold().removesuffix("'s").split())
    return name[:-1] if name.endswith('s') and not name.endswith('ss') else name

def introduced(markdown: str) -> list[str]:
    "The bold phrases of a cell that are terms."
    found, text = [], re.sub(r'(?ms)^```.*?^```|`[^`\n]*`', lambda m: '' if '**' in m[0] else m[0], markdown)
    for line in text.split('\n'):
        if line.lstrip().startswith('|'): continue
        for m in BOLD.finditer(line):
            label = m[1][-1] in '.:?' or ITEM.match(line[:m.start()]) or m[1] in FIXED
            if not label and len(m[1].split()) <= 4: found.append(m[1])
    return found

@cache
def markdown(stem: str) -> tuple[str, ...]: return tuple(c['source'] for c in cells(PAGES[stem]) if c['cell_type'] == 'markdown')

@cache
def prose(stem: str) -> str:
    "The text of a page as terms are looked for in it."
    return ' '.join(re.sub(r'[*`]', '', ' '.join(markdown(stem))).replace('-', ' ').casefold().split())

@cache
def paragraphs() -> tuple[tuple[str, str], ...]:
    "What should be entries, each with the heading above it."
    found = []
    for cell in cells(NBS/'glossary.ipynb')[2:]:
        heading, *rest = cell['source'].split('\n\n')
        found += [(heading.removeprefix('## '), text) for text in rest]
    return tuple(found)

@cache
def glossary() -> tuple[dict, ...]:
    "The entries in order: heading, term, names (the term and what it is also called), text and links."
    found = []
    for heading, paragraph in paragraphs():
        if not (m := ENTRY.fullmatch(paragraph)): continue
        names = [m['term'], *(m['also'].split(', ') if m['also'] else [])]
        links = re.findall(r'\[(\S+)\]\((\S+)\)', m['links'])
        found.append({'heading': heading, 'term': m['term'], 'names': names, 'text': m['text'], 'links': links})
    return tuple(found)

def place(term: str) -> str:
    "What the alphabetical order goes by: letters and digits."
    return re.sub(r'[^a-z0-9]', '', term.casefold())

def uses(stem: str, names: list[str]) -> bool:
    "Whether the prose of a page has one of these names, in the singular or the plural."
    return any(re.search(rf'(?<!\w){re.escape(plain(n))}(?:e?s)?(?!\w)', prose(stem)) for n in names)


@pytest.mark.parametrize('stem', PAGES)
def test_terms_in_bold_have_an_entry(stem):
    known = {plain(n) for e in glossary() for n in e['names']}
    missing = sorted({b for source in markdown(stem) for b in introduced(source) if plain(b) not in known})
    assert missing == [], 'no entry in nbs/glossary.ipynb, or emphasis that should be italic'

def test_form_of_an_entry():
    wrong = [text[:80] for _, text in paragraphs() if not ENTRY.fullmatch(text)]
    assert wrong == [], 'an entry is one paragraph: **term** (also: x, y). Sentence. [05](05_attention.ipynb)'

def test_entries_lead_to_pages_that_use_the_term():
    wrong = []
    for e in glossary():
        for label, target in e['links']:
            stem = target.removesuffix('.ipynb')
            if stem not in PAGES: wrong.append(f'{e["term"]}: no notebook {target}')
            elif label != stem.split('_')[0]: wrong.append(f'{e["term"]}: [{label}] leads to {target}')
            elif not uses(stem, e['names']): wrong.append(f'{e["term"]}: none of {e["names"]} is on page {target}')
        if len(set(e['links'])) < len(e['links']): wrong.append(f'{e["term"]}: a link twice')
    assert wrong == []

def test_alphabetical_order():
    terms = [e['term'] for e in glossary()]
    assert terms == sorted(terms, key=place)
    for e in glossary(): assert e['heading'] == (place(e['term'])[0].upper() if place(e['term'])[0].isalpha() else '0 to 9'), e['term']

def test_no_name_twice():
    assert [n for n, k in Counter(plain(n) for e in glossary() for n in e['names']).items() if k > 1] == []

def test_entries_are_short_and_in_sentences():
    for e in glossary():
        assert 1 <= len(re.findall(r'[.!?](?=\s|$)', e['text'])) <= 3, e['term']
        assert len(e['text']) <= 420 and re.match(r'[^a-z]', e['text']), e['term']

def test_the_glossary_is_a_page_without_code():
    found = cells(NBS/'glossary.ipynb')
    assert re.fullmatch(r'# Glossary\n\n> .+', found[0]['source'])
    assert all(c['cell_type'] == 'markdown' for c in found) and len(glossary()) >= 250

def test_what_counts_as_a_term():
    text = 'A **norm** rescales. **Why warmup?** Because. **a rule of more than four words**.\n\n- **RoPE** holds\n1. **Prune**: away\n'
    assert introduced(text + '| **table** | x |\n\nA `**kwargs` and `**options` and **top-k**; **You will be able to**') == ['norm', 'top-k']
    assert plain('Special-Tokens') == plain('special token') and plain('loss') == 'loss' and plain("Nesterov's") == 'nesterov'
