"""Settings of pip that the setup passes to uv."""

import os
import subprocess
import sys

from ranks import ROOT

SETTINGS = """[global]
index-url = https://user:p$ss@packages.example/simple
extra-index-url = https://one.example/simple
    https://two.example/simple
timeout = 20
[install]
find-links = /in/the/file
[list]
format = columns
"""
NAMES = "UV_DEFAULT_INDEX UV_INDEX UV_FIND_LINKS UV_HTTP_TIMEOUT UV_INDEX_STRATEGY".split()


def test_uv_gets_pips_settings_and_keeps_its_own(tmp_path):
    (tmp_path / "pip.conf").write_text(SETTINGS)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    env |= {"PIP_CONFIG_FILE": str(tmp_path / "pip.conf"), "PIP_FIND_LINKS": "/first /second"}
    env |= {"UV_HTTP_TIMEOUT": "99", "PYTHON": sys.executable}
    show = "printf '%s\\n' " + " ".join(f'"${name}"' for name in NAMES)
    line = f'settings=$("$PYTHON" -m pip config list | "$PYTHON" launch/uv_settings.py) && eval "$settings" && {show}'
    finished = subprocess.run(["bash", "-c", line], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert finished.stdout.splitlines() == [
        "https://user:p$ss@packages.example/simple",
        "https://one.example/simple https://two.example/simple",
        "/first,/second",
        "99",
        "unsafe-best-match",
    ]
