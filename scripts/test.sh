#!/usr/bin/env bash
# Makes the test environment and runs everything: lint, import contracts, all tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONDONTWRITEBYTECODE # see setup.sh; the tests start many processes

bash scripts/setup.sh --test
bash scripts/fetch_smollm2.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/lint-imports
# In the order of tests/conftest.py, slow files first: by default xdist takes those with the fewest tests last.
.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
