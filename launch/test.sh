#!/usr/bin/env bash
# Sets up .venv and runs the tests; with --all also those marked long. Options are passed to pytest, for example:
#   ./launch/test.sh -k config
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
set_up_tests

# Two files at a time, because tests often wait for processes to start and end. tests/conftest.py orders the files.
# A crashed worker ends the run: pytest-xdist 3.8 hangs after replacing one (its issue 1378).
python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 --durations 10 "$@"
