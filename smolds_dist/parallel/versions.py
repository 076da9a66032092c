"""The versions that all ranks of a run must share. Imports only the standard library, for the doctor."""

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("smolds-dist", "torch", "deepspeed", "deep_ep", "transformers", "safetensors")


def package_versions() -> dict[str, str]:
    """Return the versions of Python and the packages that a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def source_digest() -> str:
    """Return a digest of this package's source, which may differ between checkouts of one version."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
