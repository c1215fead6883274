"""docs/rewards.md: every bundled reward is there, and what it shows would be accepted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from rewardgen import plugins
from rewardgen.commands import completion
from rewardgen.sources import find_sources

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "rewards.md").read_text(encoding="utf-8")


def terms() -> dict[str, dict[str, Any]]:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    shown = yaml.safe_load(block)
    found: dict[str, dict[str, Any]] = shown["objective"]["rewards"] | shown["evaluation"]["witnesses"]
    return found


def test_the_table_has_every_bundled_reward() -> None:
    assert set(re.findall(r"^\| `(\w+)`", PAGE, re.MULTILINE)) - {"use"} == set(completion.rewards())


def test_the_arguments_shown_fit_their_rewards_and_name_their_sources() -> None:
    for name, term in terms().items():
        args = term["args"]
        plugins.check_args(plugins.factory(plugins.resolve("rewards", term["use"])), args, name)
        for key, text in args.items():
            if key not in ("against", "size"):
                assert [source.path for source in find_sources({key: text}, name)] == [f"{name}.{key}"]
    assert {term["use"] for term in terms().values()} == set(completion.rewards()) - {
        "brightness",
        "identity",
        "matching",
        "vlm_judge",
        "vlm_judge_local",
    }
