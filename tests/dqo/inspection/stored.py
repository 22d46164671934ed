"""Runs and responses that the tests of inspections share."""

import json
import shutil

import numpy as np
import torch
import yaml

from dqo.credit.implied import OTHERS, Start, implied_values
from dqo.inspection.responses import Inspection, Response
from dqo.models.critic import make_value_model, save_value_model, score_of
from dqo.models.new import new_llama, save
from tests.dqo.helpers import tokenizer

HOSTILE = "\x1b]0;owned\x07<script>alert(1)</script>"


def make_run(folder, tok=None, critic=True, **options):
    """A finished run in folder/out, whose policy is another random model than folder/base, its reference."""
    tok = tok or tokenizer()
    for name, seed in (("base", 0), ("out", 1)):
        shutil.rmtree(folder / name, ignore_errors=True)
        model = new_llama(tok, hidden_size=16, layers=1, heads=2, max_length=512, initializer_range=0.3, seed=seed)
        save(model, tok, folder / name)
    told = {"method": "dqo", "model_name_or_path": str(folder / "base"), "beta": 0.1} | options
    (folder / "out" / "config.yaml").write_text(yaml.safe_dump(told))
    if critic:
        made = make_value_model("separate", model)
        torch.manual_seed(0)
        torch.nn.init.normal_(score_of(made).weight, std=0.1)
        save_value_model(made, made.state_dict(), folder / "out" / "critic")
    return folder / "out"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_with_steps():
    """Two prompts with three responses each, of two steps; line 2 is wrong in its second step."""
    rows = []
    for prompt in ("1+2+3=", "4+2+3="):
        for reward, labels in ((1.0, [0.0, 0.0]), (0.0, [0.0, -1.0]), (0.0, [-1.0, 0.0])):
            text = "1+2=3\n#6"
            rows.append(
                {
                    "prompt": prompt,
                    "completion": text,
                    "reward": reward,
                    "steps": [[0, 6], [6, 8]],
                    "step_rewards": labels,
                }
            )
    return rows


def response(scores, step_ends=(), first_wrong=None, texts=None, env=(), **changes) -> Response:
    """A response of T tokens "a", "b", ...; `env` are the places of the environment's among its texts."""
    scores = np.asarray(scores, np.float32)
    texts = list(texts or map(chr, range(97, 97 + len(scores))))
    rewards = np.zeros(len(scores), np.float32)
    given = {
        "source": "rows.jsonl:1",
        "prompt": "Q?",
        "label": False,
        "reward": 0.0,
        "texts": texts,
        "actions": np.array([i for i in range(len(texts)) if i not in env]),
        "scores": {"advantage": scores, "kl": np.abs(scores), "logprobs": scores - 1, "ref_logprobs": scores - 1},
        "rewards": rewards,
        "step_ends": list(step_ends),
        "first_wrong_step": first_wrong,
        "labelled": first_wrong is not None,
        "implied": implied_values(scores, rewards, 0.5),
        "start": Start(0.5, OTHERS, 3),
        "terminated": True,
    }
    return Response(**given | changes)


def inspection(*responses, **changes) -> Inspection:
    given = {"directory": "out", "method": "dqo", "beta": 0.1, "notes": [], "scales": {"advantage": 1.0, "kl": 1.0}}
    return Inspection(**given | {"responses": list(responses)} | changes)
