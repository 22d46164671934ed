"""The pages of the documentation, and what stands in them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, CONTRIBUTING, ROOT / "CHANGELOG.md", *DOCS]
PYPROJECT = (ROOT / "pyproject.toml").read_text()

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.S | re.M)
    return [text for name, text in found if name == language]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)


def commands(page: Path) -> list[str]:
    """Of the shell blocks, one by one, as written."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in re.sub(r"\s+#.*", "", line).split(" && ") if part.strip()]


PLACEHOLDERS = {"X": "lambda_return", "NAME": "dpo", "BACKEND": "cpp"}


def named(page: Path) -> list[str]:
    """Words of the page's code, its placeholders filled in."""
    words = " ".join(re.findall(r"`([^`\n]+)`", prose(page))).split()
    for name, value in PLACEHOLDERS.items():
        words = [re.sub(rf"(?<![A-Za-z0-9]){name}(?![A-Za-z0-9])", value, word) for word in words]
    return words


def source_of(module: str) -> Path | None:
    """The file that `python -m MODULE` runs."""
    path = ROOT / module.replace(".", "/")
    return next((found for found in (path / "__main__.py", path.with_suffix(".py")) if found.exists()), None)
