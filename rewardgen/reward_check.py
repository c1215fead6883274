"""`rewardgen reward check`: a reward as an experiment would make it, put through `check_reward`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewardgen import build, strict_yaml
from rewardgen.data.jsonl import JsonlDataset
from rewardgen.errors import ConfigError
from rewardgen.reward import Reward, check_reward
from rewardgen.settings import Plugin

NUM_EXAMPLES = 4
"""How many examples of a dataset a reward is checked on."""


def check_spec(use: str, given: Sequence[str] = (), data: Path | None = None) -> tuple[str, ...]:
    """Make a reward as experiments do, and check it.

    Args:
        use: as in an experiment.
        given: `name=value` with the value in YAML, the reward's `args`.
        data: JSON Lines file whose first examples are used, for rewards that need certain references or columns.

    Returns:
        What was found to hold, one line each.

    Raises:
        UserError: the reward cannot be made, the dataset not be read, or (`ScoringError`) a promise is broken.
    """
    plugin = Plugin(use=use, args=_parse(given))
    reward: Reward = build.make("reward", "rewards", plugin).requires_grad_(False).eval()
    if data is None:
        return check_reward(reward)
    dataset = JsonlDataset(str(data), limit=NUM_EXAMPLES)
    return check_reward(reward, examples=[dataset[index] for index in range(len(dataset))])


def _parse(given: Sequence[str]) -> dict[str, Any]:
    args = {}
    for text in given:
        name, equals, written = text.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"argument '{text}': expected 'name=value', as in 'level=0.4'")
        if name in args:
            raise ConfigError(f"argument '{text}': '{name}' is given twice")
        args[name] = strict_yaml.load(written, f"argument '{text}'")[0]
    return args
