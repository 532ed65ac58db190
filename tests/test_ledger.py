"The ledger keeps what it is given, whatever it is given; a crash leaves the old one or the new one; rows do not depend on the order."
import dataclasses
import json
import random

import pytest
from hypothesis import given, settings, strategies as st

from llm_course.ledger import Entry, Ledger, Move, climb, course_moves, course_start, ledger_row, ledger_table
from llm_course.speedrun import change

few = settings(max_examples=50, deadline=None)
names = st.text(st.characters(blacklist_categories=('Cs',)), min_size=1, max_size=12)
losses = st.floats(.1, 20, allow_nan=False)

@few
@given(st.lists(st.tuples(names, st.integers(0, 9), losses, st.text(max_size=30)), min_size=1, max_size=12, unique_by=lambda t: t[:2]))
def test_what_was_added_is_read_back(tmp_path_factory, runs):
    path = tmp_path_factory.mktemp('ledger')/'ledger.jsonl'
    ledger = Ledger(path)
    for name, seed, bits, sample in runs: ledger.add(Entry('10', name, seed, bits, sample=sample))
    assert Ledger(path).entries == ledger.entries and len(ledger) == len(runs)
    assert len(path.read_text().splitlines()) == len(runs)                       # one line a run, whatever the names hold


@few
@given(st.lists(st.tuples(losses, losses), min_size=3, max_size=8), st.integers(0, 10**6))
def test_rows_do_not_depend_on_the_order_of_the_runs(tmp_path_factory, pairs, seed):
    entries = [e for s, (old, new) in enumerate(pairs) for e in (Entry('10', 'old', s, old), Entry('11', 'new', s, new, base='old'))]
    olds, news = entries[::2], entries[1::2]
    random.Random(seed).shuffle(news)
    books = []
    for order in (entries, olds + news):
        books.append(Ledger(tmp_path_factory.mktemp('ledger')/'ledger.jsonl'))
        for e in order: books[-1].add(e)
    a, b = (ledger_row(book, 'new') for book in books)
    assert a.difference.low == pytest.approx(b.difference.low) and a.kept == b.kept and a.bits == pytest.approx(b.bits)
    assert a.kept == (a.difference.high < 0)


def test_a_crash_while_writing_leaves_the_old_ledger(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path/'ledger.jsonl')
    ledger.add(Entry('10', 'first', 0, 2.))
    before = ledger.path.read_bytes()
    monkeypatch.setattr(json, 'dumps', lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError): ledger.add(Entry('10', 'second', 0, 2.))
    monkeypatch.undo()
    assert ledger.path.read_bytes() == before and len(ledger) == 1 and [p.name for p in tmp_path.iterdir()] == ['ledger.jsonl']
    ledger.add(Entry('10', 'second', 0, 2.))                                      # and it goes on
    assert len(Ledger(ledger.path)) == 2


def test_one_seed_proves_nothing(tmp_path):
    ledger = Ledger(tmp_path/'ledger.jsonl')
    ledger.add(Entry('10', 'old', 0, 2.)); ledger.add(Entry('11', 'new', 0, 1., base='old'))
    row = ledger_row(ledger, 'new')
    assert row.difference is None and not row.kept and 'one seed' in ledger_table(ledger)


def test_the_stored_ledger_is_the_climb_of_the_course():
    "Every stored run has the setting that the list of moves gives it now, and the path is the one that the rule makes."
    from course import ROOT
    ledger, (best, setting) = (book := Ledger(ROOT/'nbs/runs/ledger.jsonl')), climb(book, course_start(), course_moves(), {}, range(4), 'a GPT-2 on bytes')
    tried = course_start()
    for m in course_moves():
        if ledger_row(ledger, m.name).kept: tried = change(tried, **m.changes)
    assert tried == setting and ledger_row(ledger, best).kept
    assert {e.made_with['text'] for e in ledger.entries if e.setting.get('tokens') == 'bpe'}.__len__() == 1


def test_a_move_with_a_field_that_there_is_not(tmp_path):
    with pytest.raises(ValueError, match="'layers' is no field"): climb(Ledger(tmp_path/'x.jsonl'), course_start(), [Move('06', 'x', {'layers': 2})], {}, [])


def test_diverged_runs_have_no_line():
    for bad in (float('nan'), float('inf'), 0., -1.):
        with pytest.raises(ValueError, match='bits_per_byte'): Entry('10', 'x', 0, bad)
    assert dataclasses.asdict(Entry('10', 'x', 0, 1.))['curve'] == []
