"""What the first page shows of the whole course: its picture, and how long each page takes.

    picture  nbs/course.png, drawn from the list of chapters
    times    nbs/runs/times.json: seconds that the tests of each page take, one page at a time, in the quick tier
"""
import argparse
import io
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault('OMP_NUM_THREADS', '2')

SOURCE = 'a raw text file'
PRODUCTS = {'Text': 'documents, tokens, vectors', 'Model': 'an untrained GPT that can write', 'Training': 'a trained, measured checkpoint',
            'Alignment': 'a model that answers as asked', 'Inference': 'fast, small, exported, served', 'Understanding and shipping': 'one command, and a look inside'}


def status() -> str:
    "Which chapters there are, as the picture shows it."
    from llm_course.core import CHAPTERS, chapter_exists
    return ' '.join(f'{c.number}{"" if chapter_exists(c) else "?"}' for c in CHAPTERS)


def picture(out: Path) -> None:
    "One row a part, one box a chapter; what goes in stands above it, what comes out below."
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo
    from llm_course.core import CHAPTERS, chapter_exists
    fig, ax = plt.subplots(figsize=(9.2, 8.6))
    colors, per_row, y = plt.get_cmap('tab10').colors, 7, 0.
    for (part, product), color in zip(PRODUCTS.items(), colors):
        mine = [c for c in CHAPTERS if c.part == part]
        rows = [mine[i:i + per_row] for i in range(0, len(mine), per_row)]
        ax.text(-.15, y - .5 * len(rows) + .08, part.replace(' and ', '\nand '), ha='right', va='center', fontsize=10, weight='bold', color=color)
        for row in rows:
            for x, c in enumerate(row):
                there = chapter_exists(c)
                ax.add_patch(FancyBboxPatch((x + .04, y - .8), .92, .66, boxstyle='round,pad=0,rounding_size=.12', fc=(*color, .2) if there else 'white', ec=(*color, 1 if there else .35), lw=1, ls='-' if there else '--'))
                ax.text(x + .5, y - .35, c.number, ha='center', va='center', fontsize=9, weight='bold', color='black' if there else 'gray')
                ax.text(x + .5, y - .6, c.about.replace('encoder decoder', 'enc-decoder'), ha='center', va='center', fontsize=6.5, color='black' if there else 'gray')
            y -= 1
        ax.annotate('', (per_row / 2, y - .42), (per_row / 2, y + .12), arrowprops={'arrowstyle': '-|>', 'color': '.45'})
        ax.text(per_row / 2 + .12, y - .14, product, va='center', fontsize=9, style='italic', color='.3')
        y -= .5
    ax.annotate('', (per_row / 2, 0), (per_row / 2, .45), arrowprops={'arrowstyle': '-|>', 'color': '.45'})
    ax.text(per_row / 2 + .12, .25, SOURCE, va='center', fontsize=9, style='italic', color='.3')
    ax.set_xlim(-1.6, per_row + .1); ax.set_ylim(y, .6); ax.axis('off')
    drawn, note = io.BytesIO(), PngInfo()
    fig.savefig(drawn, dpi=110, bbox_inches='tight')
    note.add_text('Description', status())                                    # by which a test sees that the picture is stale
    Image.open(drawn).convert('RGB').quantize(64, method=Image.Quantize.FASTOCTREE).save(out, optimize=True, pnginfo=note)


def seconds(page: Path) -> float:
    "Wall-clock seconds of one page in a process of its own: importing, and all cells but slow ones."
    code = ('import sys, time; start = time.perf_counter(); from pathlib import Path; from nbdev.test import test_nb\n'
            'ok, _ = test_nb(Path(sys.argv[1]), skip_flags=["slow", "cuda"]); print(time.perf_counter() - start); sys.exit(not ok)')
    run = subprocess.run([sys.executable, '-c', code, str(page)], capture_output=True, text=True, env=os.environ | {'LLM_COURSE_TIER': 'quick', 'TQDM_DISABLE': '1'})
    if run.returncode: raise SystemExit(f'{page.name} failed:\n{run.stderr[-3000:]}')
    return float(run.stdout.split()[-1])


def times(out: Path) -> None:
    "Measure every page and write the numbers."
    from tqdm import tqdm
    found = {}
    for page in tqdm(sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))): found[page.stem] = round(seconds(page), 1)
    out.write_text(json.dumps({'threads': int(os.environ['OMP_NUM_THREADS']), 'seconds': found}, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('picture', 'times'))
    what = parser.parse_args().what
    sys.path.insert(0, str(ROOT))
    if what == 'picture': picture(ROOT/'nbs/course.png')
    else: times(ROOT/'nbs/runs/times.json')
