#!/usr/bin/env bash
# Sets everything up and runs the tests; with --all also those marked long. Options go through to pytest, for instance:
#   ./launch/test.sh -k config
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
set_up_tests

# Two files at a time: much of the time goes into waiting for processes to start and end. tests/conftest.py orders them.
# A worker that crashes ends the run: pytest-xdist 3.8 waits for ever after it has replaced one (its issue 1378).
python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 --durations 10 "$@"
