"""The docs site: built without Quarto and looked through; and the proof that each of its checks can fail."""
import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location('course_docs', ROOT/'tools/docs.py')
docs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(docs)

def cell(kind: str, source: str, outputs=()) -> dict:
    "One cell of a notebook."
    more = {'outputs': list(outputs), 'execution_count': None} if kind == 'code' else {}
    return {'cell_type': kind, 'metadata': {}, 'source': source} | more

def notebook(*cells: dict) -> dict:
    "A notebook with these cells."
    kernel = {'display_name': 'python3', 'language': 'python', 'name': 'python3'}
    return {'cells': list(cells), 'metadata': {'kernelspec': kernel}, 'nbformat': 4, 'nbformat_minor': 5}

def shown(markdown: str) -> dict:
    "An output that Jupyter shows as Markdown."
    return {'output_type': 'display_data', 'metadata': {}, 'data': {'text/markdown': markdown, 'text/plain': 'x'}}


# ---- the site of the course

def files_of_the_project() -> tuple:
    "What a build could leave behind or change by mistake: names at the root and in nbs/, and README.md."
    names = {p for folder in (ROOT, ROOT/'nbs') for p in folder.iterdir() if p.is_file()}
    return names, (ROOT/'README.md').read_bytes()

@pytest.fixture(scope='module')
def site(tmp_path_factory) -> Path:
    "The site, built once, in a folder of its own."
    out, before = tmp_path_factory.mktemp('docs')/'site', files_of_the_project()
    docs.build(out, quarto=False)
    assert files_of_the_project() == before, 'building changes nothing in the project'
    return out

@pytest.fixture(scope='module')
def core(site: Path) -> str:
    "The page of the first chapter."
    return (site/'core.html').read_text(encoding='utf-8')

def test_site_has_no_defects(site):
    assert docs.check_site(site) == []

def test_every_notebook_is_a_page(site):
    want = {'index.html'} | {name.split('_', 1)[-1].replace('.ipynb', '.html') for name in docs.chapters(ROOT/'nbs') if name != 'index.ipynb'}
    assert {p.name for p in site.glob('*.html')} == want

def test_sidebar_lists_every_notebook_once_and_in_order():
    config = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))
    listed = list(docs.sidebar_entries(config['website']['sidebar']))
    assert listed == ['index.ipynb', *(n for n in docs.chapters(ROOT/'nbs') if n != 'index.ipynb')]

def test_exported_code_is_shown_and_documented(core):
    soup = docs.BeautifulSoup(core, 'html.parser')
    code = [c.get_text() for c in soup.select('.cell-code code')] or [c.get_text() for c in soup.find_all('code')]
    assert any('class CourseMap:' in c and '_repr_markdown_' in c for c in code)
    assert soup.find(id='coursemap').name in ('h3', 'section') and soup.find(id='reference')

def test_directives_hidden_cells_and_folds(core):
    soup = docs.BeautifulSoup(core, 'html.parser')
    text = soup.get_text()
    assert 'nbdev_export()' not in text and 'default_exp' not in text and '#|' not in text
    folds = {d.summary.get_text(strip=True): d for d in soup.find_all('details')}
    assert {'Imports', 'A solution'} <= set(folds)
    assert not any(d.has_attr('open') for d in folds.values()) and 'def solution' in folds['A solution'].get_text()

def test_formulas_and_pictures_need_no_network(core):
    assert '<math' in core and 'katex' not in core.lower() and 'mathjax' not in core.lower()
    assert '<img alt="' in core and 'src="data:image/png;base64' in core

def test_a_folder_that_is_no_site_is_not_overwritten(tmp_path):
    (tmp_path/'thesis.txt').write_text('all my work')
    with pytest.raises(SystemExit, match='not a built site'): docs.replace_site(tmp_path, tmp_path)
    assert (tmp_path/'thesis.txt').exists()


# ---- a project of two pages: what the build does, without and with Quarto

@pytest.fixture
def tiny(tmp_path) -> Path:
    "A project with an index and one chapter."
    root = tmp_path/'tiny'
    (root/'nbs').mkdir(parents=True)
    (root/'llm_course').mkdir()
    (root/'llm_course/__init__.py').write_text('')
    for name in ('settings.ini', 'nbs/_quarto.yml', 'nbs/styles.css'): shutil.copy(ROOT/name, root/name)
    config = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))
    config['website']['sidebar']['contents'] = ['index.ipynb', '00_small.ipynb']
    (root/'_quarto.yml').write_text(yaml.safe_dump(config))
    index = notebook(cell('markdown', '# Start\n\n> of all things'), cell('markdown', 'All of it is in [the small chapter](00_small.ipynb#by-hand).'))
    small = notebook(
        cell('markdown', '# Small\n\n> a page'), cell('code', '#| default_exp small'), cell('code', '#| export\nimport math'),
        cell('markdown', '## By hand\n\nUp: [start](index.ipynb). A root $\\sqrt{x}$ and $$\\begin{aligned} a &= b \\\\ c &= d \\end{aligned}$$'),
        cell('code', '#| export\ndef second(): "It returns 2."; return _one() + 1\ndef first(): "See `second`."; return 1\ndef _one(): return 1'),
        cell('code', '#| export\nfrom fastcore.basics import patch\nclass Box: "A box."'),
        cell('code', '#| export\n@patch\ndef open(self: Box): "Open it."'),
        cell('code', 'print(1); print(2)', [{'output_type': 'stream', 'name': 'stdout', 'text': t} for t in ('1\n', '2\n')]),
        cell('code', 'table', [shown('| a | b |\n|:--|:--|\n| [start](index.ipynb) | **bold** |')]),
        cell('code', '#| hide\nsecret = 1'))
    for name, nb in (('index', index), ('00_small', small)): (root/f'nbs/{name}.ipynb').write_text(json.dumps(nb))
    return root

def test_build_of_a_small_project(tiny, tmp_path):
    out = tmp_path/'out'
    assert docs.build(out, quarto=False, root=tiny) == 2
    assert docs.check_site(out, tiny) == []
    page = (out/'small.html').read_text(encoding='utf-8')
    order = [page.index(f'id="{name}"') for name in ('reference', 'second', 'first', 'box', 'box.open')]
    assert order == sorted(order) and page.count('Open it.') == 2          # once as code, once as documentation
    assert 'href="small.html#by-hand"' in (out/'index.html').read_text(encoding='utf-8')
    assert '1\n2' in page and 'secret' not in page and '<mtable' in page

def test_build_with_quarto_on_the_path(tiny, tmp_path, monkeypatch):
    fake = tmp_path/'bin/quarto'
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\n[ "$1" = render ] && [ "$#" = 2 ] && mkdir -p _docs/site_libs && ls > _docs/index.html && cat _quarto.yml ../_quarto.yml > _docs/conf.html\n')
    fake.chmod(0o755)
    monkeypatch.setenv('PATH', f'{fake.parent}{os.pathsep}{os.environ["PATH"]}')
    before = sorted(p.relative_to(tiny) for p in tiny.rglob('*'))
    docs.build(tmp_path/'out', quarto=True, root=tiny)
    assert '00_small.ipynb' in (tmp_path/'out/index.html').read_text()
    assert 'html-math-method: mathml' in (tmp_path/'out/conf.html').read_text()
    assert sorted(p.relative_to(tiny) for p in tiny.rglob('*')) == before

def test_a_formula_that_cannot_be_read_stops_the_build():
    with pytest.raises(ValueError, match='nonsense'): docs.tex_to_mathml('<span class="math inline">\\(\\nonsense{x}\\)</span>')

def test_own_links_fall_back_to_the_class_and_then_to_the_page():
    page = ''.join(f'<a href="https://x.org/c/gpt.html#{a}">' for a in ('gpt', 'gpt.forward', 'lost'))
    assert docs.own_links(page, 'https://x.org/c', {'gpt.html': {'gpt'}}) == '<a href="gpt.html#gpt"><a href="gpt.html#gpt"><a href="gpt.html">'

def test_lines_of_code_are_complete():
    html = docs.hang_wrapped_lines('<code class="sourceCode python"><span class="st">"""a\n    b"""</span></code>')
    assert html.count('<span') == html.count('</span>') == 4 and '--hang: 8ch' in html
    assert docs.BeautifulSoup(html, 'html.parser').get_text() == '"""a\n    b"""'


# ---- every check can fail

GOOD = '''<html><body><nav id="quarto-sidebar"><a href="index.html">Start</a></nav>
<main><header id="title-block-header"><h1>Title</h1></header><div>
<p id="here">A page with enough words, <code>**code** $x$ `y`</code>, and <a href="#here">a</a> <a href="other.html#there">link</a>.</p>
<pre>#| hide %%time {{&lt; ::: @fig-x</pre>%s</div></main></body></html>'''
OTHER = GOOD.replace('id="here"', 'id="there"').replace('href="#here"', 'href="#there"').replace('other.html#there', 'index.html#here') % ''
FORMULA = '<span class="math inline"><math><mi>x</mi></math></span>'
FINE = ['', FORMULA, '<img src="data:image/png;base64,AAAA" alt="A curve">', '<a href="https://example.org/x#y">out</a>',
        '<p>2 * 3 * 4 costs $5, @someone said; a_b__c.</p>', '<a href="./">home</a>', '<p>80 % and 90 %</p>']
PLANTED = {
    '<a href="nowhere.html">x</a>': 'broken link nowhere.html',
    '<a href="05_attention.ipynb">x</a>': 'broken link 05_attention.ipynb',
    '<a href="./#nowhere">x</a>': 'broken anchor ./#nowhere',
    '<a href="#nowhere">x</a>': 'broken anchor #nowhere',
    '<a href="other.html#nowhere">x</a>': 'broken anchor other.html#nowhere',
    '<img src="lost.png" alt="A curve">': 'missing picture lost.png',
    '<img alt="A curve">': 'missing picture',
    '<img src="data:image/png;base64,AAAA">': 'without alt text',
    '<img src="data:image/png;base64,AAAA" alt=" ">': 'without alt text',
    '<img src="https://example.org/x.png" alt="A curve">': 'another host',
    '<script src="https://example.org/x.js"></script>': 'another host',
    '<script type="module">import m from \'https://example.org/m.mjs\';</script>': 'another host',
    '<link rel="stylesheet" href="https://example.org/x.css">': 'another host',
    '<p>As @fig-loss shows.</p>': 'cross-reference',
    '<p>As ?@fig-loss shows.</p>': 'cross-reference',
    '<p>::: {.callout-note}</p>': 'a div',
    '<p>:::</p>': 'a div',
    '<div>': '1 <div> without </div>',
    '</div></div></div>': '</div> without <div>',
    '<p>#| export</p>': 'a cell directive',
    '<p>%%time</p>': 'a cell magic',
    '<p>this is **bold</p>': 'bold type',
    '<p>__bold__ type</p>': 'bold type',
    '<p>the loss $x^2$ is</p>': 'a formula',
    r'<p>the loss \(x^2\) is</p>': 'a formula',
    '<p>{{&lt; video x &gt;}}</p>': 'a shortcode',
    '<p>a ` backtick</p>': 'a backtick',
    '<p>[text](page.html</p>': 'a link',
    '<p>text{.smaller} here</p>': 'attributes',
    '<p>text\n## A heading</p>': 'a heading',
    '<p>| a | b |</p>': 'a table',
    '<p>text:\n- an item</p>': 'a list',
    '<p>&lt;div class="x"&gt;</p>': 'an HTML tag',
    r'<span class="math inline">\(x\)</span>': 'not MathML',
    r'<span class="math inline"><math><mi>\foo</mi></math></span>': 'not understood'}

def plant(folder: Path, html: str) -> list[str]:
    "Findings in a site of two pages, the first with `html` in it."
    (folder/'index.html').write_text(GOOD % html)
    (folder/'other.html').write_text(OTHER)
    return list(docs.check_pages(folder))

@pytest.mark.parametrize('html', FINE)
def test_a_good_page_is_not_reported(tmp_path, html): assert plant(tmp_path, html) == []

@pytest.mark.parametrize('html', PLANTED)
def test_a_planted_defect_is_reported(tmp_path, html):
    found = plant(tmp_path, html)
    assert any(PLANTED[html] in f and f.startswith('index.html: ') for f in found), found
    assert not any('\n' in f for f in found)

def test_an_empty_page_is_reported(tmp_path):
    (tmp_path/'index.html').write_text('<main><header id="title-block-header"><h1>A long and promising title</h1></header>'
                                       '<nav><a href="index.html">The previous page and the next</a></nav><style>p {}</style></main>')
    assert list(docs.check_pages(tmp_path)) == ['index.html: empty page']

def test_an_empty_site_is_reported(tmp_path): assert 'no pages' in list(docs.check_pages(tmp_path))[0]

def test_a_sidebar_entry_without_page_is_reported_once(tmp_path):
    page = GOOD.replace('<nav id="quarto-sidebar">', '<nav id="quarto-sidebar"><a href="05_lost.html">Lost</a>') % ''
    (tmp_path/'index.html').write_text(page)
    (tmp_path/'other.html').write_text(page.replace('id="here"', 'id="there"').replace('href="#here"', 'href="#there"'))
    assert list(docs.check_pages(tmp_path)) == ["sidebar: entry 'Lost' has no page 05_lost.html"]

SOURCES = {
    '::: {.note}\ntext': 'never closed',
    'text\n\n:::': 'not open',
    'The reasons:\n- one\n- two': 'empty line before it',
    'Some text\n## A heading': 'empty line before it',
    'Some text\n| a | b |\n|---|---|': 'empty line before it'}
FINE_SOURCES = ['::: {.note}\ntext\n:::', ':::: {.a}\n::: {.b}\n:::\n::::', '```\n::: {.note}\ntext\n- x\n```', 'Text\n\n- one\n- two\n  more\n- three',
                '## A heading\n*Text* right below', '| a |\n|---|\n| b |', 'Text\n\n1. one\n2. two']

def sources(root: Path, markdown: str, sidebar: list, outputs=()) -> list[str]:
    "Findings in a project with one chapter that has `markdown` in it."
    (root/'nbs').mkdir()
    nb = notebook(cell('markdown', '# Title\n> subtitle'), cell('markdown', markdown), cell('code', '1', outputs))
    (root/'nbs/00_a.ipynb').write_text(json.dumps(nb))
    (root/'_quarto.yml').write_text(yaml.safe_dump({'website': {'sidebar': {'contents': sidebar}}}))
    return list(docs.check_sources(root/'nbs', root/'_quarto.yml'))

@pytest.mark.parametrize('markdown', SOURCES)
def test_a_defect_in_a_source_is_reported(tmp_path, markdown):
    found = sources(tmp_path, markdown, ['00_a.ipynb'])
    assert len(found) == 1 and found[0].startswith('00_a.ipynb: ') and SOURCES[markdown] in found[0]

@pytest.mark.parametrize('markdown', FINE_SOURCES)
def test_a_good_source_is_not_reported(tmp_path, markdown): assert sources(tmp_path, markdown, ['00_a.ipynb']) == []

def test_an_open_div_in_an_output_is_reported(tmp_path):
    assert 'never closed' in sources(tmp_path, 'Text', ['00_a.ipynb'], [shown('::: {.note}\ntext')])[0]

def test_the_sidebar_must_name_each_chapter_once(tmp_path):
    found = sources(tmp_path, 'Text', [{'href': 'index.ipynb', 'text': 'Start'}, {'section': 'Part', 'contents': ['01_b.ipynb', '01_b.ipynb']}])
    assert found == ['sidebar: index.ipynb is not in nbs/', 'sidebar: 01_b.ipynb is not in nbs/', 'sidebar: 01_b.ipynb is not in nbs/',
                     'sidebar: chapter 00_a.ipynb has no entry', 'sidebar: 01_b.ipynb is named twice']


# ---- README.md and the command line

def test_readme_is_what_the_index_says(): docs.write_readme(ROOT, check=True)

def test_readme_from_a_notebook(tmp_path):
    (tmp_path/'nbs').mkdir()
    png = {'output_type': 'display_data', 'metadata': {}, 'data': {'image/png': 'AAAA'}}
    cells = [cell('markdown', '# Title\n\n> subtitle'), cell('code', '#| hide\nfrom x import y'), cell('code', '#| default_exp all'),
             cell('markdown', '[a](05_a.ipynb#b) [web](https://x.org) [up](../LICENSE) [here](#title) ![p](p.png)'),
             cell('code', '#| echo: false\nCourseMap()', [shown('| [c](00_c.ipynb) |')]),
             cell('code', '#| eval: false\nprint(2)', [{'output_type': 'stream', 'name': 'stdout', 'text': ['2\n']}])]
    (tmp_path/'nbs/index.ipynb').write_text(json.dumps(notebook(*cells)))
    docs.write_readme(tmp_path, check=False)
    assert (tmp_path/'README.md').read_text() == docs.README_NOTE + '''

# Title

> subtitle

[a](nbs/05_a.ipynb#b) [web](https://x.org) [up](LICENSE) [here](#title) ![p](nbs/p.png)

| [c](nbs/00_c.ipynb) |

```python
print(2)
```

```text
2
```
'''
    docs.write_readme(tmp_path, check=True)
    (tmp_path/'README.md').write_text('edited by hand')
    with pytest.raises(SystemExit, match='make prepare'): docs.write_readme(tmp_path, check=True)
    (tmp_path/'nbs/index.ipynb').write_text(json.dumps(notebook(cell('code', 'plot()', [png]))))
    with pytest.raises(SystemExit, match='picture'): docs.write_readme(tmp_path, check=False)

def test_the_command_fails_when_there_are_findings(tmp_path, capsys):
    plant(tmp_path, '<a href="nowhere.html">x</a>')
    assert docs.main(['check', str(tmp_path)]) == 1 and 'index.html: broken link nowhere.html' in capsys.readouterr().out
    with pytest.raises(SystemExit) as e: docs.main(['--help'])
    assert e.value.code == 0 and 'readme' in capsys.readouterr().out
