"""What the shell offers while a command is typed. Nothing here imports torch: a key press must not wait for it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import typer

_DEFINES_A_REWARD = re.compile(r"^class \w+\([^)]*Reward\b", re.MULTILINE)


def flavors(ctx: typer.Context) -> list[str]:
    """The flavors of the experiment typed so far; none where there is none yet or it cannot be read."""
    from rewardgen import strict_yaml
    from rewardgen.errors import ConfigError

    # The parser gives up at an option whose value is being typed, and leaves the words before it unassigned.
    words = [ctx.params.get("experiment"), *ctx.args]
    experiment = next((word for word in words if word and Path(word).suffix in (".yaml", ".yml")), None)
    if experiment is None:
        return []
    try:
        found = strict_yaml.load_file(Path(experiment))[0].get("flavors")
    except ConfigError:
        return []
    return [str(name) for name in found] if isinstance(found, dict) else []


def rewards() -> list[str]:
    """The bundled rewards, sorted; files that define none are helpers. The files are read, not imported."""
    spec = importlib.util.find_spec("rewardgen.rewards")
    folders = (spec.submodule_search_locations if spec else None) or []
    files = [path for folder in folders for path in Path(folder).glob("*.py")]
    return sorted(path.stem for path in files if _DEFINES_A_REWARD.search(path.read_text(encoding="utf-8")))
