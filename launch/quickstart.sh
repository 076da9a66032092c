#!/usr/bin/env bash
# Sets everything up and trains the `quickstart` model on the modules of Python's standard library, in two ranks that share
# the experts, to show them (one process would be faster): under five minutes on two cores. The training gets what the set-up
# leaves of them. Options go through to it, for instance: ./launch/quickstart.sh --train.steps 50
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

budget=$((225 - SECONDS)) # to start the ranks and to end takes the rest of five minutes
budget=$((budget > 150 ? 150 : budget < 60 ? 60 : budget))
modules=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))') # without its tests, which are most of it
smolds launch -- --preset quickstart --data.source "text:$modules/*.py" --parallel.expert max --train.time_budget "$budget" \
    --run.name "quickstart-$(date +%Y%m%d-%H%M%S)" "$@"

echo "(these commands are in .venv: source .venv/bin/activate)"
