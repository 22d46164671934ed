"""What pages are made of in tests: a report with every section, hostile text in it, and a reader of pages."""

from html.parser import HTMLParser

import numpy as np

from dqo.report.predictors import IMPLICIT, VALUE

HOSTILE = '<script>alert("1 & 2")</script> <b>&amp; $x_1^{$ #0072b2 id="k" 日本'
VOID = {"meta", "br", "link", "img"}


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; unclosed or crossed tags are an error."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.open, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def scores(problems=400, k=4, skill=0.0, seed=0):
    """Greedy and sampling scores of problems whose difficulty is the same for every seed and skill."""
    difficulty = np.random.default_rng(99).normal(size=problems)
    rng = np.random.default_rng(seed)
    chance = 1 / (1 + np.exp(difficulty - skill))
    greedy = (rng.uniform(size=problems) < chance).astype(int)
    sampling = (rng.uniform(size=(problems, k)) < chance[:, None]).astype(int)
    return {"greedy": greedy.tolist(), "sampling": sampling.tolist()}


def trace(reward=1.0, wrong=None, tokens=("1+2=3", "\n", HOSTILE, "3+3=6"), **more):
    """`more`: such as of `credit`."""
    values = [0.5 + 0.1 * i for i in range(len(tokens))]
    return {
        "prompt": HOSTILE,
        "tokens": list(tokens),
        "values": values,
        "reward": reward,
        "step_ends": [2, len(tokens)],
        "first_wrong_step": wrong,
        **more,
    }


def credit(advantages=(0.1, 0.0, 0.05, -0.3)):
    """What the policy says of the tokens of a trace."""
    implied = [0.5, *(0.5 + np.cumsum(advantages)).tolist()]
    start = {"value": 0.5, "origin": "other responses to the prompt", "responses": 3}
    return {"advantages": list(advantages), "implied": implied, "start": start}


def full_report():
    rng = np.random.default_rng(3)
    predicted = rng.uniform(size=200)
    return {
        "title": f"A report on {HOSTILE}",
        "command": f"dqo-train demo --title '{HOSTILE}'",
        "created": "2026-01-02T03:04:05+00:00",
        "device": "2 cores",
        "seed": 2048,
        "wall_seconds": 281.3,
        "versions": {"torch": "2.13.0"},
        "options": {"beta": 0.1, "learning_rate": 3e-4},
        "baseline": "base",
        "headline": "dqo",
        "methods": [
            {"name": "base", **scores(seed=1)},
            {"name": "dpo <&>", **scores(skill=0.8, seed=2), "seconds": 45.2, "extra": {"memory, GB": 1.5}},
            {"name": "dqo", **scores(skill=2.0, seed=3), "seconds": 58.0, "updates": 2560},
        ],
        "curves": [
            {"name": "loss", "method": "dqo", "x": list(range(500)), "y": rng.uniform(size=500).tolist()},
            {"name": "loss", "method": "dpo <&>", "x": [1, 2, 3], "y": [1.0, None, 0.5]},
            {
                "name": "a <b> of mine",
                "method": "dqo",
                "x": [1, 2],
                "y": [1, 2],
                "how_to_read": f"See {HOSTILE}.",
            },
        ],
        "value_calibration": {
            "predicted": predicted.tolist(),
            "observed": (rng.uniform(size=200) < predicted).astype(int).tolist(),
        },
        "value_auc": {"at_end": 0.941, "at_half": 0.783, "n": 200, "interval": [0.921, 0.957]},
        "value_traces": [trace(), trace(0.0, wrong=1, **credit()), trace(0.0, wrong=0)],
        "flips": {
            "fixed": [{"prompt": HOSTILE, "before": f"same\n{HOSTILE}", "after": "same\nother\nend"}],
            "broken": [{"prompt": "p", "before": "", "after": "x"}],
        },
        "warnings": [f"Mind {HOSTILE}."],
        "changes": [
            {
                "name": "Held-out loss",
                "better": "lower",
                "how_to_read": HOSTILE,
                "methods": {"dqo": [[0.5, 0.25]], "dpo <&>": [[0.7, None]]},
            }
        ],
        "predictors": [
            {
                **{"name": IMPLICIT, "method": "dqo", "auc": 0.853, "interval": [0.831, 0.872], "n": 200},
                **{"within": [0.8, 0.7, 0.9], "found": [0.703, 0.65, 0.75], "found_in_half": [0.71, 0.66, 0.76]},
            },
            {
                **{"name": VALUE, "method": "dqo", "auc": 0.941, "interval": [0.921, 0.957], "n": 200},
                **{"within": None, "found": [0.143, 0.12, 0.17], "found_in_half": None},
            },
            {"name": HOSTILE, "method": "", "auc": 0.66, "interval": None, "n": 200},
        ],
        "chance": {"found": [0.112, 0.108, 0.117], "found_in_half": [0.2, 0.19, 0.21], "n": 71},
        "penalised": {
            **{
                "rows": 70,
                "of_rows": 100,
                "steps": 81,
                "of_steps": 400,
                "mean_reward": -1.0,
                "process_reward": "additive",
            },
            "examples": [
                {
                    "prompt": HOSTILE,
                    "before": "fine\n",
                    "text": HOSTILE,
                    "after": "",
                    "step": 2,
                    "steps": 2,
                    "reward": -1.0,
                    "source": "a.jsonl:3",
                }
            ],
        },
        "data": {"dqo": {"rows": 12288, "share_correct": 0.3127}, "dpo <&>": {"rows": 5004}},
        "data_sets": [{"name": HOSTILE, "sha256": "ab" * 32, "of": "file"}],
        "parameters": {"dqo": {"policy": 123456}},
        "options_of": {"dqo": {"lam": 0.95}},
        "runs": [
            {"directory": HOSTILE, "method": "dqo", "seed": 1, "state": "finished", "seconds": 58.0},
            {"directory": "b", "method": "unknown", "seed": 2, "state": "not finished: step 3 of 9"},
        ],
        "notes": [f"Only {HOSTILE}."],
    }
