"The package as its users meet it: imported module by module, and installed from a wheel."
import ast
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from course import CHAPTERS, NUMBER, ROOT, module

# What only the extras install. Importing any of these while a module is imported is an error.
EXTRAS = ['matplotlib', 'tensorboard', 'jsonargparse', 'yaml', 'transformers', 'tokenizers', 'tiktoken', 'nbdev', 'IPython', 'pytest', 'hypothesis', 'smalldocs',
          'bs4', 'ipywidgets', 'nbconvert', 'math_core', 'execnb', 'ghapi', 'fastgit',
          'datasets', 'pandas', 'pyarrow', 'sentencepiece', 'py3langid', 'gguf', 'gensim', 'datasketch', 'scipy', 'requests']
ALONE = '''
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {extras}: raise ImportError(name + ' is not a core requirement')
sys.meta_path.insert(0, Refuse())
{code}
'''

def run_alone(code: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-c', ALONE.format(extras=set(EXTRAS), code=code)], capture_output=True, text=True, **kwargs)


def test_every_module_imports_alone_without_extras(tmp_path):
    modules = [module(p) for p in CHAPTERS]
    with ThreadPoolExecutor(2) as pool:
        for name, got in zip(modules, pool.map(lambda m: run_alone(f'import llm_course.{m}', cwd=tmp_path), modules)):
            assert got.returncode == 0, f'{name}: {got.stderr[-500:]}'

def test_the_guard_against_extras_works(tmp_path):
    got = run_alone('import matplotlib', cwd=tmp_path)
    assert got.returncode and 'matplotlib is not a core requirement' in got.stderr

@pytest.mark.parametrize('path', sorted((ROOT/'llm_course').glob('[a-z]*.py')), ids=lambda p: p.stem)
def test_modules_depend_on_lower_chapters_only(path):
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom) and (node.level == 1 or (node.module or '').startswith('llm_course')):
            assert NUMBER[node.module.removeprefix('llm_course.')] < NUMBER[path.stem], node.module

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "A wheel, built from a copy of what git would check out."
    base = tmp_path_factory.mktemp('wheel')
    for name in ('llm_course', 'setup.py', 'settings.ini', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE'):
        src = ROOT/name
        if src.is_dir(): shutil.copytree(src, base/'src'/name, ignore=shutil.ignore_patterns('__pycache__'))
        else: (base/'src').mkdir(exist_ok=True); shutil.copy(src, base/'src'/name)
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', base/'out', base/'src'], check=True, capture_output=True)
    return next((base/'out').glob('*.whl'))

def test_wheel_holds_modules_and_configurations(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for p in CHAPTERS: assert f'llm_course/{module(p)}.py' in names
    for p in (ROOT/'llm_course'/'configs').glob('*.yaml'): assert f'llm_course/configs/{p.name}' in names
    assert not any(n.startswith(('nbs/', 'tests/', 'tools/', 'data/')) for n in names)

def test_installed_wheel_works_from_another_folder(wheel, tmp_path):
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', tmp_path/'site', wheel], check=True, capture_output=True)
    (tmp_path/'elsewhere').mkdir()
    code = f'''
sys.path.insert(0, {str(tmp_path/'site')!r})
import torch, llm_course.gpt
assert llm_course.gpt.__file__.startswith({str(tmp_path)!r}), llm_course.gpt.__file__
from llm_course.gpt import GPT, GPTConfig
from llm_course.pipeline import config_path
assert config_path('shakespeare-cpu').is_file()
print(tuple(GPT(GPTConfig.from_name('course-tiny'))(torch.zeros(1, 4, dtype=torch.int64))[0].shape))
'''
    got = run_alone(code, cwd=tmp_path/'elsewhere')
    assert got.stdout.strip() == '(1, 4, 2048)', got.stderr[-800:]
