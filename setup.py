"Reads everything from settings.ini, so that a version or a requirement is written once."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
cfg = ConfigParser(delimiters=['='])
cfg.read(here / 'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']

train = cfg['train_requirements'].split()
text = cfg['text_requirements'].split()
evaluation = cfg['eval_requirements'].split()
dev = train + text + evaluation + cfg['dev_requirements'].split()
py_versions = ['3.11', '3.12', '3.13', '3.14']
assert cfg['min_python'] in py_versions

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=(here / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    url=cfg['git_url'],
    author=cfg['author'],
    author_email=cfg['author_email'],
    license='Apache-2.0',
    keywords=cfg['keywords'],
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Developers', 'Intended Audience :: Education',
                 'Topic :: Scientific/Engineering :: Artificial Intelligence']
                + [f'Programming Language :: Python :: {v}' for v in py_versions],
    packages=find_packages(include=['llm_course', 'llm_course.*']),
    package_data={'llm_course': ['configs/*.yaml', 'configs/*.json']},
    python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require={'train': train, 'text': text, 'eval': evaluation, 'dev': dev},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
    zip_safe=False,
)
