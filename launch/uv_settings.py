"""Prints, as lines for a shell, what uv has to know of pip's settings: uv reads none of them. Input: `pip config list`."""

import ast
import os
import shlex
import sys

# What uv calls each, and what it wants between several values.
NAMES = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "constraint": ("UV_CONSTRAINT", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "no-index": ("UV_NO_INDEX", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "proxy": ("ALL_PROXY", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
    "default-timeout": ("UV_HTTP_TIMEOUT", " "),
}


def main() -> None:
    settings = {"UV_INDEX_STRATEGY": "unsafe-best-match"}  # as pip: the best version of all indexes
    lines = [line.partition("=") for line in sys.stdin.read().splitlines()]
    # pip lists files and the environment by name, and the environment counts more than its files.
    for name, _, value in sorted(lines, key=lambda line: line[0].startswith(":env:")):
        section, _, option = name.rpartition(".")
        if option in NAMES and section in ("global", "install", ":env:"):
            variable, between = NAMES[option]
            settings[variable] = between.join(str(ast.literal_eval(value)).split())
    for variable, value in settings.items():
        if variable not in os.environ:
            print(f"export {variable}={shlex.quote(value)}")


if __name__ == "__main__":
    main()
