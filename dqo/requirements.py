"""Whether the installed packages are those that this distribution asks for, by its own metadata. It does not import them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dqo.errors import UserError

DISTRIBUTION = "dqo"
ALSO = {"huggingface-hub", "tokenizers"}  # not ours, but of the packages that break each other


def check_packages(extras: Iterable[str] = ()) -> None:
    """Compares every package that the distribution and `extras` name with what is installed, and these packages with each other.
    Nothing is checked when the distribution itself is not installed: its bounds are unknown then.

    Raises:
        UserError: one line with the cure, when a package is missing or of another version.
    """
    _compare(frozenset(extras))


@functools.cache  # what is installed stays as it is while a process runs, and dozens of files are read for it
def _compare(extras: frozenset[str]) -> None:
    try:
        wanted = list(_requirements(DISTRIBUTION, extras))
    except metadata.PackageNotFoundError:
        return
    for requirement in wanted:
        _check(DISTRIBUTION, requirement)
    named = {canonicalize_name(requirement.name) for requirement in wanted}
    for name in sorted(named):
        for requirement in _requirements(name):
            if canonicalize_name(requirement.name) in named | ALSO and _version(requirement.name) is not None:
                _check(f"{name} {_version(name)}", requirement)


def _requirements(distribution: str, extras: Iterable[str] = ()) -> Iterator[Requirement]:
    for line in metadata.requires(distribution) or ():
        requirement = Requirement(line)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _check(who: str, requirement: Requirement) -> None:
    found = _version(requirement.name)
    if found is None or not requirement.specifier.contains(found, prereleases=True):
        wanted = f"{requirement.name}{requirement.specifier}"
        state = "is not installed" if found is None else f"{found} is installed"
        raise UserError(f"{who} needs {wanted}, and {requirement.name} {state}: pip install '{wanted}'")
