"""Which module of a package imports which, read from the sources: imports inside of functions count as those above them do."""

import ast
from pathlib import Path


def modules(package: Path) -> dict[str, Path]:
    """{"package.folder.module": file}; a folder's `__init__.py` is "package.folder"."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_names(path: Path) -> set[str]:
    """Every dotted name that a file imports: of `from a import b` both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import, which nothing here reads"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports(package: Path) -> dict[str, set[str]]:
    """{module: the modules of the package that it imports}. A package that only holds the imported module is left out: Python
    runs its `__init__.py` first, whatever is in it."""
    known = modules(package)
    graph = {}
    for module, path in known.items():
        named = imported_names(path) & set(known) - {module}
        graph[module] = {name for name in named if not any(other.startswith(f"{name}.") for other in named)}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, the first again at the end; [] when there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in done:
            for imported in sorted(graph.get(module, ())):
                if found := visit(imported, [*path, module]):
                    return found
            done.add(module)
        return []

    return next(filter(None, (visit(module, []) for module in sorted(graph))), [])


def folder_of(module: str, known: dict[str, Path]) -> str:
    """The folder of a module under its package, "" for what lies in the package itself."""
    parts = module.split(".")[1:]
    return parts[0] if len(parts) > 1 or known[module].name == "__init__.py" and parts else ""


def upward(package: Path, order: tuple[str, ...]) -> list[str]:
    """Imports against the order of the folders, the lowest first; a folder that the order does not name is told too."""
    known = modules(package)
    level = {folder: place for place, folder in enumerate(order)}
    found = [f"{folder!r} has no place" for folder in sorted({folder_of(m, known) for m in known} - set(level))]
    for module, imported in imports(package).items():
        for name in sorted(imported):
            if level.get(folder_of(name, known), 0) > level.get(folder_of(module, known), 0):
                found.append(f"{module} imports {name}")
    return found
