#!/usr/bin/env bash
# Runs everything that needs an NVIDIA GPU, in parts of under ten minutes, without network, and installs nothing: python3, or
# PYTHON, must have the packages. Results, logs and a summary go to FOLDER (gpu-results). The exit code is 0 if all parts pass.
#   ./launch/gpu.sh [FOLDER] [PART...]
#   ./launch/gpu.sh --list    the parts, each with its time limit; --dry: their commands; --small: tiny settings on a CPU
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
unset PYTHONDONTWRITEBYTECODE # else every start compiles all imports
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
