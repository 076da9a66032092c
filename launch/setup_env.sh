# Creates .venv with the packages of a run; set_up_tests adds those of the tests. quickstart.sh and test.sh source it; it
# leaves the shell in the repository's root with .venv on the PATH. Once installed, it only compares a checksum.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONDONTWRITEBYTECODE # if set, as in many images, every start compiles all imports: 13 s instead of 5
TORCH="torch==2.13.0" # the newest release that setup.cfg admits

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "smolds needs Python 3.11 or newer; install it, or set PYTHON: PYTHON=/path/to/python3.11 $0" >&2
    exit 2
}

# uv downloads packages in parallel, pip one by one; uv leaves compiling to the first import. pip is the fallback.
find_uv() {
    [ -z "${LOOKED_FOR_UV:-}" ] || return 0
    LOOKED_FOR_UV=1
    command -v uv >/dev/null || pip install -qq --no-compile uv 2>/dev/null || return 0
    eval "$(pip config list | python launch/uv_settings.py)"
    [ "$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null || return 0
    # No NVIDIA GPU: the default build would download several GB of CUDA libraries.
    local dry_run=(uv pip install --dry-run --no-deps --reinstall "$TORCH")
    if "${dry_run[@]}" 2>&1 | grep "+cpu" >/dev/null; then
        echo "  torch: CPU build, from pip's index"
    elif UV_TORCH_BACKEND=cpu "${dry_run[@]}" 2>&1 | grep "+cpu" >/dev/null; then
        echo "  torch: CPU build, from PyTorch's index"
        export UV_TORCH_BACKEND=cpu
    else
        echo "  torch: no CPU build found, installing the default one with CUDA libraries"
    fi
}

install() {
    if command -v uv >/dev/null; then
        uv pip install --quiet "$@" && return
        echo "  uv failed, trying pip"
    fi
    pip install -qq "$@"
}

# Create an environment for packages that few tests need. It can import the main environment's packages; only packages or
# versions that the main one lacks are installed.
install_beside() {
    local name=$1 packages wanted=".venv/$1.txt"
    shift
    packages=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    python -m venv --without-pip ".venv/$name"
    echo "import site; site.addsitedir('$packages')" >"${packages/.venv/.venv/$name}/main.pth"
    if command -v uv >/dev/null; then
        # uv prefers the versions that the file already lists.
        cp .venv/main.txt "$wanted"
        printf '%s\n' "$@" | uv pip compile --quiet --no-header --no-annotate --output-file "$wanted" - >/dev/null &&
            grep -vxFf .venv/main.txt "$wanted" |
            uv pip install --quiet --no-deps --python ".venv/$name/bin/python" --requirements - && return
    fi
    # pip lists conflicts with the main environment's packages on standard error.
    pip --python ".venv/$name/bin/python" install -qq "$@" 2>.venv/pip.log || {
        cat .venv/pip.log >&2
        exit 1
    }
}

install_extras() {
    command -v uv >/dev/null && uv pip freeze | grep == >.venv/main.txt
    # In the main environment accelerate would make every import of transformers import DeepSpeed, and scikit-learn would
    # slow it down.
    echo "  accelerate, PEFT and lm-evaluation-harness"
    install_beside extras "accelerate>=1.1,<2" "peft>=0.17,<1" "lm_eval[hf]>=0.4.9,<0.5"
    echo "  Weights & Biases"
    install_beside trackers "wandb>=0.20,<1"
    echo "  transformers 4, which must read exports"
    install_beside transformers4 "transformers>=4.57,<4.58"
    if [ "$(uname)" = Linux ]; then
        echo "  llama.cpp and mlx-lm, which must read exports too"
        install_beside readers "mlx-lm[cpu]>=0.32,<0.33" "xllamacpp>=2026.10"
    fi
}

# Record what was installed, as a checksum of these files, and compare it.
WANTED="$TORCH $(cat setup.cfg pyproject.toml launch/setup_env.sh | cksum)"
is_installed() { [ "$(cat ".venv/installed-$1" 2>/dev/null)" = "$WANTED" ]; }
note_installed() { echo "$WANTED" >".venv/installed-$1"; }

# Install the packages of a run.
set_up() {
    if [ ! -f .venv/bin/activate ] || ! is_installed run; then
        local python
        python=$(find_python)
        echo "Setting up .venv (a minute or two the first time)"
        "$python" -m venv .venv
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
    is_installed run && return
    find_uv
    install "$TORCH" --editable .
    note_installed run
}

# Also install the packages of the tests.
set_up_tests() {
    is_installed tests && return
    echo "  packages of the tests"
    find_uv
    install "$TORCH" --editable ".[test]"
    install_extras
    note_installed tests
}

set_up
