#!/usr/bin/env bash
# What `make test` does after installation: the package is what the notebooks say, every notebook runs, then pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" LLM_COURSE_TIER=quick TQDM_DISABLE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
step() { printf '\n== %s (%ss)\n' "$1" "$SECONDS"; }

step 'export and clean leave no difference'
before=$(mktemp -d); trap 'rm -rf "$before"' EXIT
cp -r nbs llm_course README.md "$before/"
nbdev_export; nbdev_clean; python tools/docs.py readme
for f in nbs llm_course README.md; do
  diff -r -q -x __pycache__ -x .ipynb_checkpoints "$before/$f" "$f" || { echo "The notebooks and what is made from them differ: run 'make prepare' and commit."; exit 1; }
done

step 'every notebook runs (nbdev_test)'
nbdev_test --n_workers "$(python -c 'import os; print(min(4, os.cpu_count()))')" --do_print

step 'ruff'
ruff check llm_course tests tools benchmarks setup.py

step 'pytest'
exec pytest -n "$(python -c 'import os; print(min(4, os.cpu_count()))')" --dist loadfile
