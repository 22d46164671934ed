"""Whatever a configuration file holds: the value that its writer meant, or one line with the file and the line."""

import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dqo.config.options import Options, dump_options, load_options
from dqo.errors import UserError

DEEP = "[" * 2000 + "]" * 2000
BOMB = "a: &a [x, x]\n" + "\n".join(f"{b}: &{b} [*{a}, *{a}, *{a}]" for a, b in zip("abcdefghi", "bcdefghij"))

# content -> parts of the message
REFUSED = {
    "a list as method": ("method: [dqo]", "method must be one of .*, got \\['dqo'\\] .from .*c.yaml:1"),
    "a mapping as method": ("method: {a: 1}", "c.yaml:1: 'method' has a mapping"),
    "a number as method": ("method: 3", "method must be one of"),
    "no method": ("method:", "method must be one of .* got None"),
    "a number with two points": ("seed: 1\nbeta: 1.2.3e-6", "c.yaml:2: beta must be float, got '1.2.3e-6'"),
    "a tag of Python": ("beta: !!python/name:os.system", "c.yaml:1: 'beta' has the tag"),
    "a tag of its own": ("beta: !mine 3", "c.yaml:1: 'beta' has the tag '!mine'"),
    "a tagged name": ("!!python/name:os.system beta: 1", "c.yaml:1: the name of an option is a word"),
    "latin-1": (b"seed: 3\nrun_name: caf\xe9", "c.yaml:2: not UTF-8"),
    "half of UTF-16": ("beta: 1".encode("utf-16") + b"x", "c.yaml:1: not UTF-16"),
    "depth": (f"seed: 1\nbeta: {DEEP}", "c.yaml:2: nested 5 levels deep"),
    "an open depth": ("beta: " + "[" * 50_000, "c.yaml:1: nested 5 levels deep"),
    "indented depth": ("\n".join(" " * i + "a:" for i in range(300)), "c.yaml:5: nested 5 levels deep"),
    "one name twice": ("beta: 1\nseed: 2\nbeta: 3", "c.yaml:3: 'beta' is there twice, first at .*c.yaml:1"),
    "a bomb of aliases": (BOMB, "c.yaml:2: 'b' has a list in a list"),
    "an alias of itself": ("lora_target_modules: &a [*a]", "c.yaml:1: 'lora_target_modules' has a list in a list"),
    "an unknown alias": ("beta: *a", "c.yaml:1: not valid YAML: found undefined alias"),
    "a merge": ("<<: {beta: 0.3}", "c.yaml:1: merges .* are not supported"),
    "NUL": ("seed: 1\nbeta: 1\0", "c.yaml:2: not valid YAML: the character .* is not allowed"),
    "NUL in an escape": ('run_name: "a\\0"', "run_name has the control character"),
    "half a surrogate pair": ('run_name: "\\uD800"', "run_name is not valid UTF-8|not valid YAML"),
    "a character beyond Unicode": ('run_name: "\\UFFFFFFFF"', "c.yaml.*not valid YAML"),
    "a set": ("beta: !!set {a, b}", "c.yaml:1: 'beta' has the tag"),
    "binary": ("run_name: !!binary aGVsbG8=", "c.yaml:1: 'run_name' has the tag"),
    "sexagesimal": ("seed: 1:30", "c.yaml:1: seed must be int, got '1:30'"),
    "sexagesimal with a point": ("beta: 1:30.5", "c.yaml:1: beta must be float, got '1:30.5'"),
    "octal": ("seed: 010", "c.yaml:1: seed must be int, got '010'"),
    "infinity": ("beta: .inf", "beta must be a finite float32 number, got inf .from .*c.yaml:1"),
    "not a number": ("beta: .nan", "beta must be a finite float32 number, got nan .from .*c.yaml:1"),
    "a huge number": ("beta: 1" + "0" * 400, "c.yaml:1: beta must be|finite"),
    "more digits than Python reads": ("seed: 1" + "0" * 5000, "c.yaml:1: seed must be int, got inf"),
    "a number of 65 bits": ("seed: 99999999999999999999", "seed must be an integer of 64 bits"),
    "a date for a number": ("seed: 2026-01-01", "c.yaml:1: seed must be int, got '2026-01-01'"),
    "several documents": ("beta: 1\n---\nbeta: 2", "c.yaml:2: not valid YAML"),
    "a list as a name": ("[a, b]: 1", "c.yaml:1: the name of an option is a word, got a sequence"),
    "a mapping as a name": ("{a: b}: 1", "c.yaml:1: the name of an option is a word, got a mapping"),
    "a number as a name": ("seed: 1\n1: x", "c.yaml:2: the name of an option is a word, got '1'"),
    "a bool as a name": ("on: 3", "c.yaml:1: the name of an option is a word, got 'on'"),
    "nothing as a name": ("? : 3", "c.yaml:1: "),
    "a list": ("- beta", "c.yaml:1: expected a mapping"),
    "a word": ("\n\nbeta", "c.yaml:3: expected a mapping"),
    "a tab": ("beta: 1\n\tlam: 1", "c.yaml:2: not valid YAML"),
    "a quoted number": ('beta: "0.3"', "c.yaml:1: beta must be float, got '0.3'"),
    "an unknown option of another trainer": (
        "seed: 1\nlr: 1e-6",
        "c.yaml:2: unknown option 'lr'. Did you mean 'learning_rate'",
    ),
    "a version without end": ("%YAML 1." + "1" * 5000 + "\n---\nbeta: 1", "c.yaml.*not valid YAML"),
    "too long": ("# " + "x" * 100_000, "c.yaml: has more than 100,000 bytes"),
}

READ = {
    "": {},
    "# a comment\n": {},
    "---\n...\n": {},
    "beta: 1e-6": {"beta": 1e-6},
    "beta: 1": {"beta": 1.0},
    "beta: 1_0.5": {"beta": 10.5},
    "beta: .5": {"beta": 0.5},
    "beta: +1.5E+2": {"beta": 150.0},
    "seed: 1_000": {"seed": 1000},
    "run_name: 2026-01-01": {"run_name": "2026-01-01"},
    "run_name: 1e5": {"run_name": "1e5"},
    "run_name: 1:30": {"run_name": "1:30"},
    "run_name: '7'": {"run_name": "7"},
    "run_name: =": {"run_name": "="},
    "run_name: ~": {"run_name": None},
    "run_name: \U0001f600": {"run_name": "\U0001f600"},
    "beta: &b 0.3\nlam: *b": {"beta": 0.3, "lam": 0.3},
    "lora_target_modules: [q_proj, 'v_proj']": {"lora_target_modules": ("q_proj", "v_proj")},
    "bf16: yes": {"bf16": True},
    "is_cap: null\nprocess_reward: none": {"is_cap": None, "process_reward": "none"},
    '{"beta": 0.3, "seed": 4}': {"beta": 0.3, "seed": 4},
}


def load(tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_options([f"--config={path}"])


def assert_one_line(error):
    text = str(error)
    assert len(text.splitlines()) == 1 and len(text) < 600, text


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_option_is_refused_by_its_line(name, tmp_path):
    content, message = REFUSED[name]
    with pytest.raises(UserError) as caught:
        load(tmp_path, content)
    assert re.search(message, str(caught.value)), caught.value
    assert_one_line(caught.value)


@pytest.mark.parametrize("content", READ)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_what_is_meant_is_read(content, encoding, tmp_path):
    options = load(tmp_path, content.encode(encoding)).flat()
    assert {name: options[name] for name in READ[content]} == READ[content]


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "/tmp"])
def test_what_is_no_file_is_refused(path):
    with pytest.raises(UserError, match=f"{path}: is a d"):
        load_options(["--config", path])


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_options_or_one_line(tmp_path_factory, content):
    options_or_one_line(tmp_path_factory, content)


WORDS = (
    "beta seed run_name lora_target_modules method : - ? ! !!int !!float !!bool !!str !!timestamp & * << | > % --- ... "
    "[ ] { } , # ' \" \\ 1 .5 1e9 .inf .nan 0x1f 1:30 2026-01-01 yes ~ null dqo a b"
)
PARTS = st.sampled_from([*WORDS.split(), " ", "\n", "\n  ", "\t", "\0", "\ufeff"])


@given(st.lists(PARTS, max_size=25).map("".join) | st.lists(PARTS, max_size=25).map(" ".join))
@settings(max_examples=300, deadline=None)
def test_any_words_of_yaml_are_options_or_one_line(tmp_path_factory, content):
    options_or_one_line(tmp_path_factory, content.encode())


def options_or_one_line(factory, content):
    try:
        found = load(factory.getbasetemp(), content)
    except UserError as error:
        for line in str(error).splitlines():
            assert_one_line(line)
    else:
        assert isinstance(found, Options)


NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1, max_size=30)


@pytest.mark.slow
@given(run_name=NAMES, modules=st.lists(NAMES, min_size=1, max_size=3), beta=st.floats(1e-30, 1e30))
@settings(max_examples=50, deadline=None)
def test_options_that_were_written_are_read_again(tmp_path_factory, run_name, modules, beta):
    given_options = load_options([f"--run_name={run_name}", f"--beta={beta}", "--lora_target_modules", "q_proj"])
    text = yaml.safe_load(dump_options(given_options)) | {"lora_target_modules": modules}
    again = load(tmp_path_factory.getbasetemp(), yaml.safe_dump(text)).flat()
    assert again == given_options.flat() | {"lora_target_modules": tuple(modules)}
