#!/usr/bin/env python
"""The docs site and the README of the course.

    build    the site into _docs/, with Quarto when it is installed, otherwise with a renderer in pure Python
    readme   README.md from nbs/index.ipynb
    check    a built site: links, anchors, pictures, alt texts, divs, cross-references, raw markup, sidebar

Nothing here needs a network. `build` works on a copy of the notebooks, so it never changes a file of yours except in
the output folder.
"""
import argparse
import ast
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import yaml
from bs4 import BeautifulSoup
from bs4.element import Comment, NavigableString, Tag

ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------------------------------------------------------------
# Notebooks
# ---------------------------------------------------------------------------------------------------------------------

def read_notebook(path: Path) -> dict:
    "A notebook as a dictionary, the source of every cell joined to one string."
    nb = json.loads(path.read_text(encoding='utf-8'))
    for cell in nb['cells']: cell['source'] = joined(cell['source'])
    return nb

def joined(text: str|list[str]) -> str:
    "A notebook stores a text as one string or as a list of lines: one string."
    return text if isinstance(text, str) else ''.join(text)

def chapters(nbs: Path) -> list[str]:
    "File names of the notebooks that are pages of the site, in order."
    return sorted(p.name for p in nbs.glob('*.ipynb') if not p.name.startswith(('.', '_')))

def split_directives(source: str) -> tuple[list[str], str]:
    "The `#|` lines at the top of a code cell (without `#|`), and the code below them."
    lines = source.split('\n')
    n = next((i for i, line in enumerate(lines) if line.strip() and not line.lstrip().startswith('#|')), len(lines))
    return [line.strip()[2:].strip() for line in lines[:n] if line.strip()], '\n'.join(lines[n:])

def cell_options(directives: list[str]) -> dict[str, str]:
    "Directives as a dictionary: `code-fold: true` becomes {'code-fold': 'true'}, `hide` becomes {'hide': ''}."
    return {k.strip(): v.strip() for k, _, v in (d.partition(':') for d in directives)}

def merge_streams(nb: dict) -> None:
    "Join the pieces of printed text that Jupyter stored one after the other, as Jupyter itself shows them."
    for cell in nb['cells']:
        merged: list[dict] = []
        for output in cell.get('outputs', []):
            same = merged and output['output_type'] == 'stream' and merged[-1].get('name') == output['name']
            if same: merged[-1]['text'] = joined(merged[-1]['text']) + joined(output['text'])
            else: merged.append(dict(output))
        if 'outputs' in cell: cell['outputs'] = merged

def output_markdown(output: dict) -> str|None:
    "The Markdown of an output, if it has any."
    text = output.get('data', {}).get('text/markdown')
    return None if text is None else joined(text)


# ---------------------------------------------------------------------------------------------------------------------
# build: a copy of the project in which the notebooks show the code that they export
# ---------------------------------------------------------------------------------------------------------------------

def show_exports(nb: dict) -> None:
    """Make a notebook show on the site the code that it exports. nbdev replaces that code by the signatures, which suits
    an API reference; in a course the code is the text. So exported cells stay where they are, import cells folded, and
    the documentation that nbdev makes follows in a section of its own at the end."""
    names: list[str] = []
    cells: list[dict] = []
    for cell in nb['cells']:
        directives, code = split_directives(cell['source'])
        kinds = {d.split()[0] for d in directives if d} & {'export', 'exports', 'exporti', 'hide'}
        if cell['cell_type'] != 'code' or not kinds or 'hide' in kinds: cells.append(cell); continue
        run = code_cell(f'#| exporti\n{code}')         # nbdev runs it, for the documentation, and removes it
        cells += [run, code_cell('\n'.join([*_shown_directives(directives, code), code]), cell['outputs'])]
        if 'exporti' not in kinds: names += public_names(code)
    by_hand = {m for c in cells for m in re.findall(r'^show_doc\((\w[\w.]*)', c['source'], re.M)}
    nb['cells'] = cells + _reference(nb, [n for n in dict.fromkeys(names) if n not in by_hand])

def code_cell(source: str, outputs: list|None = None) -> dict:
    "A code cell."
    return {'cell_type': 'code', 'execution_count': None, 'metadata': {}, 'outputs': outputs or [], 'source': source}

def _shown_directives(directives: list[str], code: str) -> list[str]:
    "Directives of the copy of an exported cell that is shown: its Quarto options, and a fold if it only imports."
    shown = ['#| eval: false', *(f'#| {d}' for d in directives if ':' in d)]
    imports = all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(code).body)
    if imports and 'code-fold' not in cell_options(directives): shown += ['#| code-fold: true', '#| code-summary: "Imports"']
    return shown

def public_names(code: str) -> list[str]:
    "Names of the public functions and classes that `code` defines, as show_doc wants them; `Class.name` for a @patch."
    from nbdev.showdoc import showdoc_nm
    found = [n for n in ast.parse(code).body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
    return [showdoc_nm(n) for n in found if not n.name.startswith('_')]

def _reference(nb: dict, names: list[str]) -> list[dict]:
    "The section that documents `names`."
    if not names: return []
    module = next((d.split()[1] for c in nb['cells'] for d in split_directives(c['source'])[0] if d.startswith('default_exp ')), None)
    text = f'## Reference\n\nWhat this chapter adds to the library, as `llm_course.{module}`.'
    return [{'cell_type': 'markdown', 'metadata': {}, 'source': text}, *(code_cell(f'show_doc({name})') for name in names)]

def stage(root: Path, work: Path) -> None:
    "Copy what the site is made of from `root` to the empty folder `work`, notebooks with their exported code shown."
    for name in ('settings.ini', '_quarto.yml'): shutil.copy(root/name, work/name)
    shutil.copytree(root/'llm_course', work/'llm_course', ignore=shutil.ignore_patterns('__pycache__'))
    (work/'nbs').mkdir()
    for path in (root/'nbs').iterdir():             # nbdev reads no subfolders: `recursive = False` in settings.ini
        if path.is_file() and not path.name.startswith('.'): shutil.copy(path, work/'nbs')
    for name in chapters(work/'nbs'):
        nb = read_notebook(work/'nbs'/name)
        merge_streams(nb)
        show_exports(nb)
        (work/'nbs'/name).write_text(json.dumps(nb), encoding='utf-8')
    (work/'README.md').write_text('')               # newer than index.ipynb, so nbdev_docs does not ask Quarto for another

def run(command: list, cwd: Path) -> None:
    "Run a command; if it fails, stop with what it said, without the frames of Python's tracebacks."
    env = os.environ | {'TQDM_DISABLE': '1', 'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = done.stdout.splitlines()
    if done.returncode:
        said = [x for x in dict.fromkeys(lines) if x.strip() and not x.startswith((' ', '"""', 'Traceback', 'The above', 'During handling'))]
        raise SystemExit('\n'.join([*said[-25:], f'{Path(command[0]).name} failed with exit code {done.returncode}']))
    for line in lines:
        if line.startswith('warning:'): print(line, file=sys.stderr)

def render_with_quarto(work: Path) -> Path:
    "Render the staged project with nbdev and Quarto. Returns the folder of the site."
    run(['nbdev_docs'], cwd=work)
    return work/'_docs'

def render_without_quarto(work: Path) -> Path:
    "Render the staged project with nbdev and smalldocs. Returns the folder of the site."
    proc = work/'_proc'
    run([sys.executable, '-c', 'from nbdev.serve import proc_nbs; proc_nbs(force=True)'], cwd=work)
    missing = set(chapters(work/'nbs')) - set(chapters(proc))
    if missing: raise SystemExit(f'nbdev left out {sorted(missing)}')
    names = {Path(name).stem: drop_output_file(proc/name) for name in chapters(proc)}
    (proc/'_quarto.yml').write_text(yaml.safe_dump(smalldocs_config(work/'_quarto.yml'), sort_keys=False), encoding='utf-8')
    run(['smalldocs', 'render', '--quiet', proc], cwd=work)
    rename_pages(proc/'_docs', {old: new for old, new in names.items() if new != old})
    return proc/'_docs'

def drop_output_file(path: Path) -> str:
    "Remove `output-file` from the front matter of a processed notebook, where smalldocs does not read it. Returns its stem."
    nb, name = read_notebook(path), path.stem
    for cell in nb['cells']:
        if cell['cell_type'] != 'raw' or not cell['source'].startswith('---'): continue
        if found := re.search(r'^output-file: *(\S+)\.html *\n', cell['source'], re.M):
            name, cell['source'] = found[1], cell['source'].replace(found[0], '')
    path.write_text(json.dumps(nb), encoding='utf-8')
    return name

def smalldocs_config(path: Path) -> dict:
    "The options of the site without the three that smalldocs does not know; their part is done in `finish_page`."
    config = yaml.safe_load(path.read_text(encoding='utf-8'))
    config.pop('execute', None)
    html = config['format']['html']
    html.pop('html-math-method', None)
    width = html.pop('grid', {}).get('body-width')
    if width: html['max-width'] = width
    return config

def rename_pages(site: Path, names: dict[str, str]) -> None:
    "Give pages the names that nbdev and Quarto give them, such as core.html for 00_core, and change every link to them."
    old = '|'.join(map(re.escape, names)) or '(?!)'
    link = re.compile(rf'((?:href="(?:\./)?|"objectID": "|"href": "))({old})\.(?:html|ipynb)(?=["#?])')
    for path in [*site.glob('*.html'), site/'search.json']:
        if not path.exists(): continue
        path.write_text(link.sub(lambda m: f'{m[1]}{names[m[2]]}.html', path.read_text(encoding='utf-8')), encoding='utf-8')
    for name, new in names.items(): (site/f'{name}.html').rename(site/f'{new}.html')


# ---------------------------------------------------------------------------------------------------------------------
# build: what both renderers need afterwards
# ---------------------------------------------------------------------------------------------------------------------

MATH = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)
KATEX = re.compile(r'<link[^>]*?katex[^>]*?>|<script[^>]*?katex[^>]*?></script>')

def tex_to_mathml(page: str) -> str:
    "Replace the TeX of a page by MathML, which browsers draw by themselves, and drop the scripts that would have drawn it."
    from math_core import LatexError, LatexToMathML
    converter = LatexToMathML(fancy_error=False)
    def convert(m: re.Match) -> str:
        tex = unescape(m[2])
        try: mathml = converter.convert_with_local_state(tex, displaystyle=m[1] == 'display')
        except LatexError as e: raise ValueError(f'cannot read the formula ${tex}$: {e}') from e
        return f'<span class="math {m[1]}">{mathml}</span>'
    return KATEX.sub('', MATH.sub(convert, page))

CODE = re.compile(r'(<code class="sourceCode[^"]*">)(.*?)(</code>)', re.S)

def hang_wrapped_lines(page: str) -> str:
    "Put each line of code into a span that knows its indent, so that the rest of a wrapped line is indented further."
    return CODE.sub(lambda m: m[1] + '\n'.join(_code_lines(m[2])) + m[3], page)

def _code_lines(code: str) -> Iterator[str]:
    "Lines of highlighted code, each complete in itself: a span that runs over several lines is opened anew in each."
    opened: list[str] = []
    for line in code.split('\n'):
        start = ''.join(opened)
        for tag in re.findall(r'<span[^>]*>|</span>', line): opened = opened[:-1] if tag == '</span>' else [*opened, tag]
        indent = len(line) - len(line.lstrip(' ')) + 4
        yield f'<span class="code-line" style="--hang: {indent}ch">{start}{line}{"</span>" * len(opened)}</span>'

def own_links(page: str, base: str, ids: dict[str, set[str]]) -> str:
    """Make the links relative which nbdev sets on names in backticks. A name without an anchor of its own, such as a
    method, is linked to the longest part of it that has one."""
    def relative(m: re.Match) -> str:
        anchor = m[2] or ''
        while anchor and anchor not in ids.get(m[1], ()): anchor = anchor.rpartition('.')[0]
        return f'href="{m[1]}{"#" + anchor if anchor else ""}"'
    return re.sub(rf'href="{re.escape(base)}/+([\w.-]+\.html)(?:#([^"]*))?"', relative, page)

def finish(site: Path, base: str, hang: bool) -> None:
    "Post-process all pages of a site that is deployed at `base`; `hang` indents the rest of wrapped lines of code."
    pages = {p.name: p.read_text(encoding='utf-8') for p in site.glob('*.html')}
    ids = {name: set(re.findall(r'\bid="([^"]+)"', text)) for name, text in pages.items()}
    for name, text in pages.items():
        try: text = tex_to_mathml(own_links(text, base, ids))
        except ValueError as e: raise SystemExit(f'{name}: {e}') from e
        (site/name).write_text(hang_wrapped_lines(text) if hang else text, encoding='utf-8')

def doc_base(root: Path) -> str:
    "The address that settings.ini gives the site, for example https://user.github.io/llm_course."
    from configparser import ConfigParser
    config = ConfigParser()
    config.read(root/'settings.ini', encoding='utf-8')
    return (config['DEFAULT']['doc_host'] + config['DEFAULT']['doc_baseurl']).rstrip('/')

def replace_site(site: Path, out: Path) -> None:
    "Put `site` in the place of `out`. Refuses a folder that holds something else than a site."
    if out.exists() and (not out.is_dir() or any(out.iterdir()) and not (out/'site_libs').is_dir()):
        raise SystemExit(f'{out} is not empty and is not a built site: give another folder with --out, or remove it')
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(site, out)

def build(out: Path, quarto: bool, root: Path = ROOT) -> int:
    "Build the site of the project in `root` into the folder `out`. Returns the number of pages."
    with tempfile.TemporaryDirectory(prefix='llm_course-docs-') as tmp:
        work = Path(tmp)
        stage(root, work)
        site = render_with_quarto(work) if quarto else render_without_quarto(work)
        finish(site, doc_base(root), hang=not quarto)          # Quarto does it by itself
        replace_site(site, out)
    return len(list(out.glob('*.html')))


# ---------------------------------------------------------------------------------------------------------------------
# readme
# ---------------------------------------------------------------------------------------------------------------------

README_NOTE = '<!-- Made from nbs/index.ipynb by `make prepare`; edit the notebook, not this file. -->'

def readme(nbs: Path) -> str:
    "README.md: the cells of nbs/index.ipynb and their outputs, without hidden cells and directives, links seen from the root."
    parts = [README_NOTE]
    for cell in read_notebook(nbs/'index.ipynb')['cells']:
        if cell['cell_type'] == 'markdown': parts.append(links_from_root(cell['source'], nbs))
        if cell['cell_type'] == 'code': parts += _readme_code(cell, nbs)
    return '\n\n'.join(p.strip('\n') for p in parts if p.strip()) + '\n'

def _readme_code(cell: dict, nbs: Path) -> Iterator[str]:
    "The code of one cell and its outputs as Markdown."
    directives, code = split_directives(cell['source'])
    options = cell_options(directives)
    if 'hide' in options or options.get('include') == 'false' or not code.strip(): return
    if options.get('echo') != 'false': yield f'```python\n{code.strip()}\n```'
    if options.get('output') == 'false': return
    for output in cell['outputs']:
        data, markdown = output.get('data', {}), output_markdown(output)
        if markdown is not None: yield links_from_root(markdown, nbs)
        elif any(kind.startswith('image/') for kind in data):
            raise SystemExit('nbs/index.ipynb draws a picture, which README.md cannot hold: save it in nbs/ and show it with ![alt](file.png)')
        else: yield f'```text\n{joined(output.get("text") or data.get("text/plain", "")).rstrip()}\n```'

def links_from_root(markdown: str, nbs: Path) -> str:
    "Change the targets of links and pictures, which are relative to the notebook, so that they work in the root folder."
    def move(m: re.Match) -> str:
        if re.match(r'[a-z]+:|#|/', m[2]): return m[0]
        return m[1] + posixpath.normpath(posixpath.join(nbs.name, m[2]))
    return re.sub(r'(\]\()([^)\s]+)', move, markdown)

def write_readme(root: Path, check: bool) -> None:
    "Write README.md, or with `check` only compare it with what would be written."
    want, path = readme(root/'nbs'), root/'README.md'
    if path.exists() and path.read_text(encoding='utf-8') == want: return
    if check: raise SystemExit('README.md is not what nbs/index.ipynb says: run `make prepare` and commit')
    path.write_text(want, encoding='utf-8')


# ---------------------------------------------------------------------------------------------------------------------
# check: pages
# ---------------------------------------------------------------------------------------------------------------------

CODE_TAGS = ('pre', 'code', 'script', 'style', 'math', 'textarea')
RAW_MARKUP = {                                       # what must not be left in running text: a pattern, and what it is
    r'#\|': 'a cell directive',
    r'%%\w*': 'a cell magic',
    r'\*\*|(?<!\w)__\w': 'bold type',
    r'\$\S[^$\n]*\$': 'a formula',
    r'\\[(\[]': 'a formula',
    r'\{\{[<%]': 'a shortcode',
    r'`': 'a backtick',
    r'\]\(': 'a link',
    r'\{[.#][\w-]+[^}]*\}': 'attributes',
    r'(?m)^ *#{1,6} \S': 'a heading',
    r'(?m)^ *\|.*\| *$': 'a table',
    r'(?m)^ *[-*+] \S': 'a list',
    r':::': 'a div that is opened or closed once too often',
    r'(?<!\w)@(?:fig|tbl|sec|eq|lst|thm)-\w+': 'an unresolved cross-reference',
    r'\?@\S+': 'an unresolved cross-reference',
    r'</?(?:div|span|details|summary|img|a|p|br|table)\b[^>]*>': 'an HTML tag'}

class Page:
    "One page of the site, parsed."
    def __init__(self, path: Path, site: Path):
        self.path, self.name, self.html = path, path.relative_to(site).as_posix(), path.read_text(encoding='utf-8')
        self.soup = BeautifulSoup(self.html, 'html.parser')
        self.ids = {t.get('id') or t.get('name') for t in self.soup.find_all(lambda t: t.get('id') or t.name == 'a' and t.get('name'))}
        self.sidebar: Tag|None = self.soup.find(id='quarto-sidebar')
        self.main: Tag = self.soup.find('main') or self.soup.body or self.soup

def read_site(site: Path) -> dict[str, Page]:
    "All pages below the folder `site`, by their path in it."
    pages = [Page(p, site) for p in sorted(site.rglob('*.html')) if 'site_libs' not in p.relative_to(site).parts]
    return {p.name: p for p in pages}

def target_of(page: Page, href: str) -> tuple[str, str]:
    "The file (relative to the site) and the anchor that a relative link of `page` points to."
    path, _, anchor = href.partition('#')
    path = unquote(path.partition('?')[0])
    name = posixpath.normpath(posixpath.join(posixpath.dirname(page.name), path)) if path else page.name
    if path.endswith('/') or name == '.': name = posixpath.normpath(posixpath.join(name, 'index.html'))
    return name, unquote(anchor)

def is_external(href: str) -> bool: return bool(re.match(r'[A-Za-z][\w+.-]*:|//', href))

def check_links(page: Page, pages: dict[str, Page], site: Path) -> Iterator[str]:
    "Links to pages, files and anchors that do not exist. Those of the sidebar, which every page has, are left to `check_sidebar`."
    for a in page.soup.find_all('a', href=True):
        href = a['href'].strip()
        if is_external(href) or href in ('', '#', '#top') or page.sidebar and page.sidebar in a.parents: continue
        name, anchor = target_of(page, href)
        if name not in pages and not (site/name).is_file(): yield f'broken link {href}'
        elif anchor and name in pages and anchor not in pages[name].ids: yield f'broken anchor {href}'

def check_sidebar(pages: dict[str, Page], site: Path) -> Iterator[str]:
    "Entries of the sidebar whose page does not exist, each once."
    entries = {(target_of(p, a['href'])[0], a.get_text(' ', strip=True)) for p in pages.values() if p.sidebar
               for a in p.sidebar.find_all('a', href=True) if not is_external(a['href']) and a['href'].strip('#')}
    return (f'entry {text!r} has no page {name}' for name, text in sorted(entries) if not (site/name).exists())

def check_resources(page: Page, site: Path) -> Iterator[str]:
    "Pictures, scripts and styles that are missing or that lie on another host, and pictures without alt text."
    loaded = [(t, t.get('src')) for t in page.soup.find_all(['img', 'script', 'iframe', 'video', 'source']) if t.get('src') is not None or t.name == 'img']
    loaded += [(t, t['href']) for t in page.soup.find_all('link', href=True) if set(t.get('rel', [])) & {'stylesheet', 'icon'}]
    for tag, src in loaded:
        what = 'picture' if tag.name == 'img' else tag.name
        if not src: yield f'missing {what}: it has no source'
        elif src.startswith('data:'): pass
        elif is_external(src): yield f'{what} is loaded from another host: {src}'
        elif not (site/target_of(page, src)[0]).is_file(): yield f'missing {what} {src}'
        if tag.name == 'img' and not (tag.get('alt') or '').strip(): yield f'picture without alt text (#| fig-alt: "..."): {(src or "")[:40]}'
    for script in page.soup.find_all('script', src=False):
        for url in re.findall(r'''(?:from|import)\s*\(?['"](https?://[^'"]+)''', script.get_text()): yield f'script is loaded from another host: {url}'

def check_text(page: Page) -> Iterator[str]:
    "Markup that was not rendered, and formulas that no renderer will draw."
    for text in page.main.find_all(string=True):
        if type(text) is not NavigableString or any(p.name in CODE_TAGS or 'math' in p.get('class', ()) for p in text.parents if isinstance(p, Tag)): continue
        for pattern, what in RAW_MARKUP.items():
            if found := re.search(pattern, text): yield f'raw markup, {what}: {_around(text, found)!r}'
    for span in page.main.find_all(class_='math'):
        if not span.find('math') and span.name != 'math': yield f'formula that is not MathML: {span.get_text()[:60]!r}'
    for tag in page.main.find_all(['math', 'merror']):
        if tag.name == 'merror' or re.search(r'\\[a-zA-Z]', tag.get_text()): yield f'formula with TeX that was not understood: {tag.get_text()[:60]!r}'

def _around(text: str, m: re.Match) -> str:
    "A few words around what was found."
    return ' '.join(text[max(0, m.start() - 25):m.end() + 25].split())

class _DivBalance(HTMLParser):
    "Counts <div> against </div>."
    def __init__(self): super().__init__(); self.depth = self.lowest = 0
    def handle_starttag(self, tag: str, attrs: list) -> None: self.depth += tag == 'div'
    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag == 'div'
        self.lowest = min(self.depth, self.lowest)

def check_divs(page: Page) -> Iterator[str]:
    "HTML divs that are not closed, or closed too often."
    count = _DivBalance()
    count.feed(page.html)
    if count.lowest < 0: yield f'{-count.lowest} </div> without <div>'
    if count.depth > count.lowest: yield f'{count.depth - count.lowest} <div> without </div>'

def check_not_empty(page: Page) -> Iterator[str]:
    "A page whose body has neither words nor pictures below its title."
    around = [page.main.find(id='title-block-header'), *page.main.find_all('nav')]
    texts = [t for t in page.main.find_all(string=True) if type(t) is NavigableString and not any(p is a for p in t.parents for a in around)]
    words = ' '.join(''.join(texts).split())
    if len(words) < 20 and not page.main.find(['img', 'svg']): yield 'empty page'


# ---------------------------------------------------------------------------------------------------------------------
# check: sources, for what a renderer hides
# ---------------------------------------------------------------------------------------------------------------------

FENCE = re.compile(r' {0,3}(`{3,}|~{3,})')
DIV = re.compile(r' {0,3}(:{3,})\s*(.*)$')
BLOCK = re.compile(r' {0,3}(?:[-*+] |\d+[.)] |#{1,6} |\|.*\|$|> |\$\$)')

def prose_lines(markdown: str) -> Iterator[tuple[str, str]]:
    "Lines of Markdown outside fenced code, each with the line before it."
    fence, before = None, ''
    for line in markdown.split('\n'):
        m = FENCE.match(line)
        if fence is None and not m: yield before, line
        if m and fence is None: fence = m[1]
        elif m and fence and m[1].startswith(fence): fence = None
        before = line

def shown_markdown(nb: dict) -> Iterator[str]:
    "Everything in a notebook that is rendered as Markdown: text cells and Markdown outputs."
    for cell in nb['cells']:
        if cell['cell_type'] == 'markdown': yield cell['source']
        yield from filter(None, map(output_markdown, cell.get('outputs', [])))

def check_source_divs(nb: dict) -> Iterator[str]:
    "Quarto divs (`:::`) that stay open to the end of a notebook or close what is not open."
    opened = []
    for markdown in shown_markdown(nb):
        for _, line in prose_lines(markdown):
            if not (m := DIV.match(line)): continue
            if m[2]: opened.append(line.strip())
            elif opened: opened.pop()
            else: yield 'unbalanced div: ::: closes what is not open'
    yield from (f'unbalanced div: {line} is never closed' for line in opened)

def check_source_blocks(nb: dict) -> Iterator[str]:
    "Lists, headings, tables and quotes that follow a line of text: Quarto needs an empty line before them."
    for cell in nb['cells'][1:]:                     # the first cell is `# Title` and `> subtitle`, which nbdev reads
        if cell['cell_type'] != 'markdown': continue
        for before, line in prose_lines(cell['source']):
            text_before = before.strip() and not BLOCK.match(before) and not before.startswith((' ', ':::')) and not FENCE.match(before)
            if text_before and BLOCK.match(line): yield f'needs an empty line before it: {line.strip()[:60]!r}'

def sidebar_entries(node: object) -> Iterator[str]:
    "All pages that the sidebar of _quarto.yml names."
    if isinstance(node, str): yield node
    elif isinstance(node, list): yield from (e for item in node for e in sidebar_entries(item))
    elif isinstance(node, dict): yield from (e for key in ('href', 'file', 'contents') for e in sidebar_entries(node.get(key)))

def check_sources(nbs: Path, config: Path) -> Iterator[str]:
    "Findings in the notebooks, and in the sidebar that is to name each of them."
    for name in chapters(nbs):
        nb = read_notebook(nbs/name)
        yield from (f'{name}: {what}' for check in (check_source_divs, check_source_blocks) for what in check(nb))
    listed = list(sidebar_entries(yaml.safe_load(config.read_text(encoding='utf-8'))['website']['sidebar']))
    yield from (f'sidebar: {name} is not in nbs/' for name in listed if not (nbs/name).is_file())
    yield from (f'sidebar: chapter {name} has no entry' for name in chapters(nbs) if name not in listed)
    yield from (f'sidebar: {name} is named twice' for name in sorted(set(listed)) if listed.count(name) > 1)


# ---------------------------------------------------------------------------------------------------------------------
# check: all of it
# ---------------------------------------------------------------------------------------------------------------------

def check_pages(site: Path) -> Iterator[str]:
    "Findings in the pages of a built site, each as `page: what`."
    pages = read_site(site)
    if not pages: yield f'{site}: no pages; build the site first'
    checks: list[Callable[[Page], Iterator[str]]] = [
        lambda p: check_links(p, pages, site), lambda p: check_resources(p, site), check_text, check_divs, check_not_empty]
    for page in pages.values(): yield from (f'{page.name}: {what}' for check in checks for what in check(page))
    yield from (f'sidebar: {what}' for what in check_sidebar(pages, site))

def check_site(site: Path, root: Path = ROOT) -> list[str]:
    "All findings in the built site `site` and in the sources in `root`."
    return [*check_sources(root/'nbs', root/'_quarto.yml'), *check_pages(site)]


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------

def parser() -> argparse.ArgumentParser:
    "The commands and their options."
    p = argparse.ArgumentParser(prog='tools/docs.py', description='The docs site and the README of the course.')
    commands = p.add_subparsers(dest='command', required=True)
    b = commands.add_parser('build', help='build the site, with Quarto when it is installed')
    b.add_argument('--out', type=Path, default=ROOT/'_docs', help='folder of the site (default: _docs)')
    b.add_argument('--no-quarto', action='store_true', help='use the renderer in pure Python even when Quarto is installed')
    r = commands.add_parser('readme', help='write README.md from nbs/index.ipynb')
    r.add_argument('--check', action='store_true', help='write nothing; exit 1 when README.md is out of date')
    c = commands.add_parser('check', help='look for defects in a built site; exit 1 when there are any')
    c.add_argument('dir', type=Path, nargs='?', default=ROOT/'_docs', help='folder of the site (default: _docs)')
    return p

def main(argv: list[str]|None = None) -> int:
    "Run one command; returns its exit code."
    args = parser().parse_args(argv)
    if args.command == 'readme': write_readme(ROOT, args.check)
    if args.command == 'build':
        quarto = not args.no_quarto and shutil.which('quarto') is not None
        pages = build(args.out.resolve(), quarto)
        print(f'{pages} pages, made with {"Quarto" if quarto else "smalldocs (Quarto is not used)"}: open {args.out/"index.html"}')
    if args.command == 'check':
        findings = check_site(args.dir.resolve())
        print('\n'.join(findings) if findings else f'{args.dir}: nothing found')
        return bool(findings)
    return 0

if __name__ == '__main__': sys.exit(main())
