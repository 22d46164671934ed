"""What the layout tests read imports with sees every form of an import, and a circle that only runs through functions."""

import pytest

from tests.import_graph import circle, imports, upward


@pytest.fixture
def package(tmp_path):
    files = {
        "__init__.py": "",
        "low/__init__.py": '"""Low."""',
        "low/a.py": "def late():\n    from p.high import b",
        "low/alone.py": "import os",
        "high/__init__.py": "",
        "high/b.py": "import p.low.a\nimport json",
        "top.py": "from p.low import a, alone as other\nif True:\n    from p.high.b import something",
    }
    for name, text in files.items():
        path = tmp_path / "p" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "p"


def test_every_form_of_an_import_is_an_edge(package):
    graph = imports(package)
    assert graph["p.top"] == {"p.low.a", "p.low.alone", "p.high.b"}
    assert graph["p.low.a"] == {"p.high.b"} and graph["p.high.b"] == {"p.low.a"} and graph["p.low.alone"] == set()


def test_a_circle_through_a_function_is_found(package):
    assert circle(imports(package)) == ["p.high.b", "p.low.a", "p.high.b"]
    (package / "low" / "a.py").write_text("")
    assert circle(imports(package)) == []


def test_an_import_against_the_order_is_told(package):
    assert upward(package, ("low", "high", "")) == ["p.low.a imports p.high.b"]
    assert upward(package, ("high", "low", "")) == ["p.high.b imports p.low.a"]
    assert upward(package, ("low", "")) == ["'high' has no place"]
