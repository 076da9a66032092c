#!/usr/bin/env bash
# Runs the GPU tests and a short benchmark on a machine with an NVIDIA GPU, in under ten minutes, without network.
# Installs nothing: python3, or PYTHON, must have the packages. Results go to one folder:
#   ./launch/gpu.sh [FOLDER]
# On one H200 the tests took 140 s, and the benchmark about that long for each size.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
results=${1:-gpu-results}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: $python sees no NVIDIA GPU; run gpu.sh on a machine that has one, with a CUDA build of torch." >&2
    exit 2
fi
mkdir -p "$results"
nvidia-smi >"$results/nvidia-smi.txt" 2>&1
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then workers=(--numprocesses 6); fi # most of a test's time is starting a process
timeout 220 "$python" -m pytest -m gpu -q --durations=10 "${workers[@]}" --junitxml="$results/tests.xml" tests/test_gpu.py 2>&1 |
    tee "$results/tests.txt"
status=$?
for size in "smollm2-deepseek-255m bf16 16 200" "debug fp32 8 160"; do
    read -r preset dtype sequences seconds <<<"$size"
    timeout "$seconds" "$python" -m smolds_dist bench train --preset "$preset" --dtype "$dtype" --sequences "$sequences" --rounds 2 \
        --steps 10 --only smolds transformers --no-compile --json "$results/train_${preset}_$dtype.json" 2>&1 |
        tee "$results/train_${preset}_$dtype.txt" || status=1
done
echo "results are in $results"
exit "$status"
