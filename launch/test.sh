#!/usr/bin/env bash
# Sets everything up and runs the tests; with --all also those marked long. Options go through to pytest, for instance:
#   ./launch/test.sh -k config
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
set_up_tests

# Two files at a time: much of the time goes into waiting for processes to start and end. tests/conftest.py orders them.
python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 10 "$@"
