"""DQO's options as one value: from the public functions, which take them one by one, to every backend's kernels."""

from __future__ import annotations

import math
from typing import NamedTuple

from dqo_kernels.core import checks

POLICY_TARGETS = ("return", "td", "one_step")
TARGETS = ("detach", "residual")
IS_LEVELS = ("trajectory", "suffix", "prefix", "token", "none")


class BellmanOptions(NamedTuple):
    """The options that `soft_bellman` documents, in the order of SCHEMA and of SoftBellmanOptions in csrc/."""

    beta: float
    gamma: float
    lam: float
    policy_target: str  # of POLICY_TARGETS
    target: str  # of TARGETS
    is_level: str  # of IS_LEVELS
    is_cap: float | None  # in log space
    is_floor: float | None

    def check(self) -> None:
        """Raises ValueError, which names the option that does not fit."""
        checks.positive("beta", self.beta)
        checks.unit_interval("gamma", self.gamma)
        checks.unit_interval("lam", self.lam)
        checks.one_of("policy_target", self.policy_target, POLICY_TARGETS)
        checks.one_of("target", self.target, TARGETS)
        checks.one_of("is_level", self.is_level, IS_LEVELS)
        checks.log_bound("is_cap", self.is_cap, math.inf)
        checks.log_bound("is_floor", self.is_floor, -math.inf)
        if self.is_cap is not None and self.is_floor is not None and self.is_floor > self.is_cap:
            checks.fail("is_floor", f"at most is_cap = {self.is_cap} (both in log space)", self.is_floor)


SCHEMA = (  # of a registered operation's arguments
    "float beta, float gamma, float lam, str policy_target, str target, str is_level, float? is_cap, float? is_floor"
)
