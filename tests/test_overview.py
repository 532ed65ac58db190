"The first page: its picture and its table of times know every chapter, and the table is made from the pages."
import importlib.util
import json

import pytest
from course import ROOT
from PIL import Image

from llm_course.core import CHAPTERS, chapter_exists

PAGES = sorted(p.stem for p in (ROOT/'nbs').glob('[0-9]*.ipynb'))

@pytest.fixture(scope='module')
def overview():
    spec = importlib.util.spec_from_file_location('overview', ROOT/'tools/overview.py')
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_picture_shows_the_chapters_there_are(overview):
    assert Image.open(ROOT/'nbs/course.png').text['Description'] == overview.status(), 'run python tools/overview.py picture'
    assert (ROOT/'nbs/course.png').stat().st_size < 60_000

def test_every_chapter_has_a_row_in_the_picture(overview):
    assert {c.part for c in CHAPTERS} == set(overview.PRODUCTS)

def test_times_of_all_pages():
    times = json.loads((ROOT/'nbs/runs/times.json').read_text())
    assert sorted(times['seconds']) == PAGES, 'run python tools/overview.py times on an idle machine'
    assert all(0 < s < 60 for s in times['seconds'].values())                      # the limit of a page in the quick tier

def test_first_page_lists_every_page():
    nb = json.loads((ROOT/'nbs/index.ipynb').read_text())
    table = next(''.join(o['data']['text/markdown']) for c in nb['cells'] for o in c.get('outputs', []) if '| page | about |' in ''.join(o.get('data', {}).get('text/markdown', '')))
    for c in CHAPTERS:
        row = next(r for r in table.splitlines() if f'{c.number} {c.about}' in r)
        assert ('to come' in row) != chapter_exists(c), row
