# Makes .venv with what a run needs, and offers set_up_tests for the rest. Sourced by quickstart.sh and test.sh; leaves the
# shell in the repository's root with .venv on the PATH. A second time it only compares a checksum.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export PIP_DISABLE_PIP_VERSION_CHECK=1
TORCH="torch==2.13.0" # the newest release that setup.cfg admits

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "smolds needs Python 3.11 or newer; install it, or name it: PYTHON=/path/to/python3.11 $0" >&2
    exit 2
}

install_torch() {
    if [ "$(uname)" != Linux ] || command -v nvidia-smi >/dev/null; then
        echo "  torch: the build that pip chooses for this machine"
        pip install -qq "$TORCH"
        return
    fi
    # No NVIDIA GPU: pip's usual Linux build would bring several GB of CUDA libraries.
    local version
    version=$(pip install -qq --dry-run --no-deps --ignore-installed --report - "$TORCH" 2>/dev/null |
        python -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])' || true)
    if [[ "$version" == *+cpu ]]; then
        echo "  torch: CPU build"
        pip install -qq "$TORCH"
    else
        echo "  torch: CPU build, fetched by uv"
        pip install -qq uv
        uv pip install --quiet --torch-backend cpu "$TORCH" || {
            echo "  torch: no CPU build to be had, taking the usual one with CUDA libraries"
            pip install -qq "$TORCH"
        }
    fi
}

# An environment beside the other, whose packages it sees, for what only a few tests need.
install_beside() {
    local name=$1 packages
    shift
    packages=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    python -m venv ".venv/$name"
    echo "import site; site.addsitedir('$packages')" >"${packages/.venv/.venv/$name}/main.pth"
    # pip tells on standard error what of the other environment these packages don't go with.
    ".venv/$name/bin/pip" install -qq "$@" 2>.venv/pip.log || {
        cat .venv/pip.log >&2
        exit 1
    }
}

install_extras() {
    # In the environment itself, accelerate would make every import of transformers import DeepSpeed, and scikit-learn
    # would make it slow.
    echo "  accelerate, PEFT and lm-evaluation-harness"
    install_beside extras "accelerate>=1.1,<2" "peft>=0.17,<1" "lm_eval[hf]>=0.4.9,<0.5"
    echo "  Weights & Biases, MLflow and Trackio"
    install_beside trackers "wandb>=0.20,<1" "mlflow-skinny>=3,<4" "sqlalchemy>=2,<3" "alembic<2" "trackio>=0.20,<1"
    echo "  transformers 4, which has to read what is exported"
    install_beside transformers4 "transformers>=4.57,<4.58"
    if [ "$(uname)" = Linux ]; then
        echo "  llama.cpp and mlx-lm, which have to read it too"
        install_beside readers "mlx-lm[cpu]>=0.32,<0.33" "xllamacpp>=2026.10"
    fi
}

# Whether something has been installed as these files say, and the note that it has.
WANTED="$TORCH $(cat setup.cfg pyproject.toml launch/setup_env.sh | cksum)"
is_installed() { [ "$(cat ".venv/installed-$1" 2>/dev/null)" = "$WANTED" ]; }
note_installed() { echo "$WANTED" >".venv/installed-$1"; }

# What a run needs.
set_up() {
    if [ ! -f .venv/bin/activate ] || ! is_installed run; then
        local python
        python=$(find_python)
        echo "Setting up .venv (a few minutes the first time)"
        "$python" -m venv .venv
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
    is_installed run && return
    install_torch
    echo "  smolds and its other requirements"
    pip install -qq --editable .
    note_installed run
}

# What only tests need, on top.
set_up_tests() {
    is_installed tests && return
    echo "  what tests need"
    pip install -qq --editable ".[test]"
    install_extras
    note_installed tests
}

set_up
