#!/usr/bin/env bash
# Sets up .venv and trains the `quickstart` model on Python's standard library in under five minutes on two cores, including
# the set-up. Two expert-parallel ranks demonstrate expert parallelism; one process would be faster.
# Options are passed to the training, for example: ./launch/quickstart.sh --train.steps 50
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

budget=$((225 - SECONDS)) # starting the ranks and finishing take the rest of five minutes
budget=$((budget > 150 ? 150 : budget < 60 ? 60 : budget))
modules=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))') # without its tests, most of it
smolds launch -- --preset quickstart --data.source "text:$modules/*.py" --parallel.expert max --train.time_budget "$budget" \
    --run.name "quickstart-$(date +%Y%m%d-%H%M%S)" "$@"

echo "(these commands are in .venv: source .venv/bin/activate)"
