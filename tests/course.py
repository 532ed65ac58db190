"What several tests need to know about the notebooks."
import ast
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
CHAPTERS = sorted(p for p in NBS.glob('[0-9][0-9]*_*.ipynb'))

def number(path: Path) -> str:
    "The number of a page, such as 03, or 03b for the second page of a chapter. Their order as text is the order of the course."
    return path.stem.split('_', 1)[0]

def module(path: Path) -> str:
    "The name of the module that a page becomes."
    return path.stem.split('_', 1)[1]

NUMBER = {module(p): number(p) for p in CHAPTERS}


def cells(path: Path) -> list[dict]:
    "The cells of a notebook, each source as one string."
    found = json.loads(path.read_text(encoding='utf-8'))['cells']
    for c in found: c['source'] = ''.join(c['source'])
    return found

def directives(source: str) -> set[str]:
    "The `#|` lines at the top of a cell, without options."
    return {m[1] for line in source.splitlines() if (m := re.match(r'#\|\s*([\w-]+)', line))}

def is_exported(cell: dict) -> bool: return cell['cell_type'] == 'code' and bool(directives(cell['source']) & {'export', 'exports'})

def only_imports(source: str) -> bool:
    "Whether a code cell consists of imports."
    body = ast.parse(source).body
    return bool(body) and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body)
