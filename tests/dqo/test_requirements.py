"""An incompatible set of packages is one line with the cure, before torch is imported."""

import re
import subprocess
import sys
from importlib import metadata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.version import Version

from dqo import requirements
from dqo.errors import UserError
from dqo.requirements import check_packages

REQUIRES = {
    "dqo": [
        "torch<2.16,>=2.11",
        "transformers>=5.5",
        'triton>=3.6; platform_system == "Nowhere"',
        'peft>=0.18; extra == "peft"',
        'flash-attn>=2.7; extra == "flash"',
    ],
    "transformers": ["huggingface-hub<3,>=1.3", "unrelated>=99", 'torch>=2.4; extra == "torch"'],
    "peft": ["transformers>=4.30", "torch>=1.13"],
}
VERSIONS = {"torch": "2.13.0+cpu", "transformers": "5.24.0", "peft": "0.21.2", "huggingface_hub": "2.4.0"}
VERSIONS |= {"unrelated": "1.0"}


@pytest.fixture(autouse=True)
def compared_anew():
    """An answer is kept for the whole process, and these tests change what is installed."""
    requirements._compare.cache_clear()
    yield
    requirements._compare.cache_clear()


@pytest.fixture
def installed(monkeypatch):
    """{name: version} and {name: requirements} that importlib.metadata answers with."""
    versions, requires = dict(VERSIONS), {name: list(lines) for name, lines in REQUIRES.items()}

    def find(table, name):
        table = {key.replace("_", "-"): value for key, value in table.items()}
        if name.replace("_", "-") not in table:
            raise metadata.PackageNotFoundError(name)
        return table[name.replace("_", "-")]

    monkeypatch.setattr(metadata, "version", lambda name: find(versions, name))
    monkeypatch.setattr(
        metadata, "requires", lambda name: find(requires | dict.fromkeys(versions.keys() - requires), name)
    )
    return versions, requires


def says(extras, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        check_packages(extras)
    assert "\n" not in str(error.value)


def test_what_fits_passes(installed):
    check_packages()
    check_packages(["peft"])


@pytest.mark.parametrize("version", ["2.10.1", "2.16.0", "2.11.0rc1", "1.0"])
def test_a_version_outside_of_the_bounds_is_named_with_the_cure(installed, version):
    installed[0]["torch"] = version
    says([], f"dqo needs torch<2.16,>=2.11, and torch {version} is installed: pip install 'torch<2.16,>=2.11'")


@pytest.mark.parametrize("version", ["2.11.0", "2.15.1+cu130", "2.14.0.dev20261101"])
def test_builds_and_previews_within_the_bounds_pass(installed, version):
    installed[0]["torch"] = version
    check_packages()


def test_an_extra_is_looked_at_only_where_it_is_used(installed):
    del installed[0]["peft"], installed[1]["peft"]
    check_packages()
    says(["peft"], "dqo needs peft>=0.18, and peft is not installed: pip install 'peft>=0.18'")
    says(["flash"], "dqo needs flash-attn>=2.7, and flash-attn is not installed: pip install 'flash-attn>=2.7'")


def test_a_pair_that_does_not_fit_is_named(installed):
    installed[1]["peft"].append("transformers<5.20")
    check_packages()  # peft is not used
    says(
        ["peft"],
        "peft 0.21.2 needs transformers<5.20, and transformers 5.24.0 is installed: pip install 'transformers<5.20'",
    )
    requirements._compare.cache_clear()
    installed[0]["huggingface_hub"] = "1.2"
    says([], "transformers 5.24.0 needs huggingface-hub<3,>=1.3, and huggingface-hub 1.2 is installed")


@given(st.tuples(*[st.integers(0, 40)] * 3))
def test_the_bounds_are_those_of_the_metadata(parts):
    version = ".".join(map(str, parts))
    requirement = Requirement("torch<2.16,>=2.11")
    table = {"dqo": [str(requirement)], "torch": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata, "requires", table.__getitem__)
        patch.setattr(metadata, "version", lambda name: version)
        requirements._compare.cache_clear()
        if Version("2.11") <= Version(version) < Version("2.16"):
            check_packages()
        else:
            says([], f"torch {version} is installed")


def test_the_files_of_the_packages_are_read_once_in_a_process(installed, monkeypatch):
    check_packages(["peft"])
    monkeypatch.setattr(metadata, "requires", lambda name: pytest.fail("read again"))
    check_packages(["peft"])
    with pytest.raises(pytest.fail.Exception, match="read again"):  # for another extra
        check_packages(["flash"])


def test_a_distribution_that_is_not_installed_has_no_bounds(installed):
    del installed[1]["dqo"]
    check_packages()


def test_a_run_says_so_before_it_reads_anything(tmp_path):
    """Without torch, and before the data set is looked for."""
    program = (
        "import sys\n"
        "from importlib import metadata\n"
        "real = metadata.version\n"
        "metadata.version = lambda name: '1.9' if name == 'torch' else real(name)\n"
        "metadata.requires = {'dqo': ['torch>=2.11']}.get\n"
        "sys.argv = ['dqo-train', '--dataset_name', 'nowhere.jsonl', '--model_name_or_path', 'nowhere']\n"
        "from dqo.commands.train import main\n"
        "try:\n    main()\n"
        "finally:\n    print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout.strip() == "False"
    assert done.stderr.strip() == "error: dqo needs torch>=2.11, and torch 1.9 is installed: pip install 'torch>=2.11'"
