"""Where a value model comes from that was fitted elsewhere: a run, its critic/, or a classifier of transformers with one label.

    RUN                           its critic/, or that of a checkpoint in it
    RUN/critic                    separate (a token classifier), head (value_head.safetensors) or implicit (implicit_value.json)
    a foreign reward model        AutoModelForSequenceClassification or AutoModelForTokenClassification, one label; the score that
                                  it gives a last token is read as V of every state

Read without torch, so that a directory of something else is refused at once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dqo.errors import UserError

HEAD_FILE, IMPLICIT_FILE, Q_FILE = "value_head.safetensors", "implicit_value.json", "q_model.json"
FORM_FILE = "value_form.safetensors"  # of a separate one: its value_loss and value_input
_CLASSIFIERS = ("ForTokenClassification", "ForSequenceClassification")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class ValueSource:
    path: Path  # of the value model's files
    form: str  # "separate", "head", "implicit" or "q_model"
    tokenizer: Path | None  # a directory that has its tokenizer, where one is known


def find_value_model(directory: str | Path) -> ValueSource:
    """What is in `directory`.

    Raises:
        UserError: for a directory that holds no value model; it says what it holds.
    """
    given = Path(directory)
    if not given.is_dir():
        what = "is a file" if given.exists() else "there is no such directory"
        raise UserError(f"value_model {given}: {what}; name a run's output_dir, its critic/, or a model with one label")
    inner = given / "critic"
    path = inner if inner.is_dir() else given
    if path is given and ((given / "config.yaml").exists() or (given / "dqo_state.json").exists()):
        saved = sorted(
            given.glob("checkpoint-*/critic"), key=lambda folder: int(folder.parent.name.partition("-")[2] or 0)
        )
        other = f"; {saved[-1]} is there" if saved else ""
        raise UserError(f"value_model {given} has no critic/: the run is not finished, or has no value model{other}")
    form = _form(path)
    places = [place for place in (path, path.parent) if any((place / name).is_file() for name in _TOKENIZER_FILES)]
    return ValueSource(path, form, places[0] if places else None)


def _form(path: Path) -> str:
    for form, name in (("head", HEAD_FILE), ("implicit", IMPLICIT_FILE), ("q_model", Q_FILE)):
        if (path / name).is_file():
            return form
    if not (path / "config.json").is_file():
        what = (
            "an adapter"
            if (path / "adapter_config.json").is_file()
            else f"no config.json, {HEAD_FILE} or {IMPLICIT_FILE}"
        )
        raise UserError(
            f"value_model {path} holds {what}; name a run's output_dir, its critic/, or a model with one label"
        )
    try:
        config = json.loads((path / "config.json").read_text())
        names = [str(name) for name in config.get("architectures") or ()]
        labels = config.get("num_labels", len(config.get("id2label") or "01"))  # transformers' default is two
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"value_model {path}: its config.json cannot be read ({error}); copy it again") from error
    if not any(name.endswith(_CLASSIFIERS) for name in names):
        what = " or ".join(names) or "a model that does not say its class"
        raise UserError(
            f"value_model {path} is {what}, which gives no value to a state; "
            "name a run's output_dir, its critic/, or a model for token or sequence classification with one label"
        )
    if labels != 1 and not (path / FORM_FILE).is_file():  # of hl_gauss they are bins
        raise UserError(f"value_model {path} is {names[0]} with {labels} labels; a value model has one")
    return "separate"
