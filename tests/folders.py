"""The graph of imports between the folders of dqo, lazy imports included.

python -m tests.folders            what each folder imports, in the order of the data's way
python -m tests.folders MODULE     the modules that one module imports, such as dqo.train.loop
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A folder (or a file beside the folders) imports from the groups before its own; within a group no circle is allowed either.
ORDER = [
    ("errors", "files", "modules", "stats", "signals", "requirements", "environment", "peers", "processes", "grading"),
    ("data", "objectives", "credit"),
    ("config", "convert", "models", "reference"),
    ("sampling",),
    ("train",),
    ("scoring", "evaluation", "zpg"),
    ("report", "inspection"),
    ("api", "comparison", "demo"),
    ("commands",),
]
GROUP = {folder: group for group, folders in enumerate(ORDER) for folder in folders}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(ROOT.glob("dqo/**/*.py"))}


def folder_of(module: str) -> str:
    """`__main__` files are commands, and so is the package itself, which hands out the trainer when it is asked."""
    if module == "dqo" or module.endswith("__main__"):
        return "commands"
    return module.split(".")[1]


def imports_of(path: Path, top_level_only: bool = False) -> set[str]:
    """Names of the modules that a file imports, and of what it takes from them."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            if not all(f"{node.module}.{alias.name}" in MODULES for alias in node.names):
                found.add(node.module)
    return found


def module_graph() -> dict[str, set[str]]:
    """module -> the modules of dqo that it imports, at once or later."""
    return {m: {name for name in imports_of(path) if name in MODULES and name != m} for m, path in MODULES.items()}


def folder_graph() -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {folder_of(module): set() for module in MODULES}
    for module, imported in module_graph().items():
        graph[folder_of(module)] |= {folder_of(name) for name in imported if name != "dqo"} - {folder_of(module)}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Nodes of a circle, from one back to itself; empty where there is none."""
    done: set[str] = set()

    def visit(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node not in done:
            for following in sorted(graph[node]):
                if found := visit(following, [*way, node]):
                    return found
            done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def lines(graph: dict[str, set[str]], order: Iterable[str]) -> Iterable[str]:
    for node in order:
        yield f"{node:<14}{' '.join(name for name in order if name in graph[node]) or '-'}"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print("\n".join(sorted(module_graph()[sys.argv[1]])))
        sys.exit()
    folders = folder_graph()
    print("\n".join(lines(folders, list(GROUP))))
    print("circle: " + (" -> ".join(circle(folders)) or "none"))
