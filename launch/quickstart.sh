#!/usr/bin/env bash
# Sets everything up and trains the `debug` model on the source of Python's standard library: about two minutes on two
# cores, in two ranks that share the experts, to show them (one process would be faster). Options go through to the training, for instance: ./launch/quickstart.sh --train.steps 50
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

smolds launch -- --preset debug --parallel.expert max --run.name "quickstart-$(date +%Y%m%d-%H%M%S)" "$@"

echo "(these commands are in .venv: source .venv/bin/activate)"
