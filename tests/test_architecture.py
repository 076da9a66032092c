"""A folder imports only from folders above it in README's list (below it in LAYERS), without import cycles."""

import ast
from collections.abc import Iterator
from pathlib import Path

from ranks import ROOT

PACKAGE = ROOT / "smolds_dist"
# From the top layer down. Modules of one layer may not import each other.
LAYERS = (
    ("__main__",),
    ("cli", "__init__"),
    ("ladder",),
    ("planner",),
    ("bench",),
    ("training",),
    ("inference",),
    ("interchange",),
    ("observe",),
    ("launching",),
    ("checkpoint",),
    ("parallel",),
    ("costs",),
    ("data",),
    ("config",),
    ("rules", "schedule"),
    ("stages",),
    ("settings",),
    ("model",),
    ("rows",),
    ("inputs",),
    ("architecture", "errors", "files", "progress"),
    ("activity",),
)
LAYER = {module: number for number, modules in enumerate(LAYERS) for module in modules}


def imports(path: Path, package: Path) -> Iterator[tuple[str, int]]:
    """Yield the modules of `package` that a file imports, also in functions and for type checkers, each with its line."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from package.folder import name`, where the name is a module or something in the folder's __init__
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] != package.name:
                continue
            while len(parts) > 1 and not (package.parent / Path(*parts)).with_suffix(".py").exists():
                if (package.parent / Path(*parts) / "__init__.py").exists():
                    break
                parts.pop()
            yield ".".join(parts[1:]) or "__init__", node.lineno


def module_of(path: Path, package: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def violations(package: Path = PACKAGE) -> list[str]:
    """Describe each import that violates the layers, and each import cycle."""
    found, graph = [], {}
    for path in sorted(package.rglob("*.py")):
        module = module_of(path, package)
        folder = module.split(".")[0]
        graph[module] = {}
        for target, line in imports(path, package):
            graph[module].setdefault(target, line)
            other = target.split(".")[0]
            if folder == other and "." in module + target:
                continue
            if LAYER[other] <= LAYER[folder]:
                found.append(
                    f"{path.relative_to(package.parent)}:{line}: {folder} is below {other} and imports {target}"
                )
    return found + import_cycles(graph)


def import_cycles(graph: dict[str, dict[str, int]]) -> list[str]:
    """Describe every import that closes a cycle."""
    found, done = [], set()

    def visit(module: str, path: list[str]) -> None:
        for target, line in graph.get(module, {}).items():
            if target in path:
                found.append(f"{module} line {line}: import cycle {' -> '.join([*path[path.index(target) :], target])}")
            elif target not in done:
                visit(target, [*path, target])
        done.add(module)

    for module in graph:
        if module not in done:
            visit(module, [module])
    return found


def test_every_folder_has_its_layer():
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/__init__.py")
    }
    assert modules == LAYER.keys()


def test_imports_point_down_without_cycles():
    assert not violations()


def test_an_invalid_import_is_reported_by_file_and_line(tmp_path):
    package = tmp_path / "smolds_dist"
    for path, text in {
        "costs/memory.py": "import math\n\n\ndef f():\n    from smolds_dist.parallel.topology import Topology\n",
        "parallel/topology.py": "from smolds_dist.costs import memory\nfrom smolds_dist.errors import ConfigError\n",
        "parallel/rendezvous.py": "import smolds_dist.parallel.ranks\n",
        "parallel/ranks.py": "from smolds_dist.parallel.rendezvous import WaitPolicy\n",
        "errors.py": "from smolds_dist import progress\n",
        "progress.py": "",
    }.items():
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_text(text)
        (package / path).with_name("__init__.py").touch()
    assert violations(package) == [
        "smolds_dist/costs/memory.py:5: costs is below parallel and imports parallel.topology",
        "smolds_dist/errors.py:1: errors is below progress and imports progress",
        "parallel.topology line 1: import cycle costs.memory -> parallel.topology -> costs.memory",
        "parallel.rendezvous line 1: import cycle parallel.ranks -> parallel.rendezvous -> parallel.ranks",
    ]
