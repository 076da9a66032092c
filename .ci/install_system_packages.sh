#!/usr/bin/env bash
# Installs the Debian packages that the tests of Slurm, MPI and several hosts need; they skip without. Only what is missing.
set -euo pipefail

packages=(slurm-wlm munge openmpi-bin libopenmpi-dev pdsh openssh-server iproute2 gcc chromium)

if ! command -v apt-get >/dev/null; then
    echo "no apt-get here: install ${packages[*]} by hand, or those tests skip"
    exit 0
fi

missing=()
for package in "${packages[@]}"; do
    [[ $(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
done
if [[ ${#missing[@]} -eq 0 ]]; then
    echo "system packages: all there"
    exit 0
fi

as_root=()
[[ $EUID -eq 0 ]] || as_root=(sudo)
log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() {
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq "$@" >>"$log" 2>&1 || {
        cat "$log"
        echo "system packages: apt-get $1 failed"
        exit 1
    }
}
apt update
apt install --yes --no-install-recommends "${missing[@]}"
echo "system packages: installed ${missing[*]}"
