"""Run smolds commands one after the other in this process; print a line of JSON for each: exit code and output.

Usage: cli_worker.py '[["eval", "runs/one"], ...]'
"""

import contextlib
import io
import json
import sys

from smolds_dist import cli


def outcome_of(command: list[str]) -> dict:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(command)
        except SystemExit as end:
            code = end.code or 0
    return {"returncode": code, "stdout": out.getvalue(), "stderr": err.getvalue()}


for command in json.loads(sys.argv[1]):
    print("\n" + json.dumps(outcome_of(command)), flush=True)
