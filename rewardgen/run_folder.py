"""A run's folder: the experiment that it holds, and whether a resumed run is the same one."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewardgen import plugins, strict_yaml
from rewardgen.checkpoint import has_checkpoints, latest_checkpoint
from rewardgen.config import Experiment
from rewardgen.errors import ConfigError
from rewardgen.fleet.pool import FleetConfig
from rewardgen.manifest import redact

CONFIG = "config.yaml"
_MAY_CHANGE = (
    "train.num_steps",
    "train.checkpoint_every",
    "train.keep_last",
    "train.keep_best",
    "train.keep_best_metric",
    "train.strategy",
    "train.batch_size",  # the trainer sees to it that a step has as many examples as before
    "train.accumulation",
    "train.max_nonfinite_steps",
    "objective.max_failed_share",
    "objective.failure_window",
    *(f"fleet.{name}" for name in FleetConfig.model_fields if name != "staleness"),
    "evaluation",
    "monitor",
    "report",
)
"""What a resumed run may do differently without being another run; besides, of rewards, how many failures they may have
and what is `Reward.operational`."""
_OF_REWARD = re.compile(r"objective\.rewards\.(?P<name>[^.]+)\.(max_failed_share$|args\.(?P<argument>\w+))")


def resolved_settings(experiment: Experiment) -> dict[str, Any]:
    """Everything an experiment says, secrets blotted out: this is what is shown and kept."""
    resolved: dict[str, Any] = redact(experiment.model_dump(mode="json"))
    return resolved


def as_yaml(experiment: Experiment) -> str:
    """The resolved experiment as an experiment file."""
    return strict_yaml.dump(resolved_settings(experiment))


def resume_command(experiment: Experiment, folder: Path, num_processes: int) -> str:
    """What goes on with a run, from the same working directory: its resolved experiment is an experiment file too."""
    resume = ["--output", str(folder), "--resume"]
    if resolved_settings(experiment) != experiment.model_dump(mode="json"):  # it lacks the secrets
        return f"the command that began it, and {shlex.join(resume)}"
    program = ["rewardgen"]
    if num_processes > 1 and not experiment.fleet.places_learners:
        program = ["torchrun", "--nproc-per-node", str(num_processes), "-m", "rewardgen"]
    return shlex.join([*program, "train", str(folder / CONFIG), *resume])


def open_folder(folder: Path, experiment: Experiment, *, resume: bool) -> None:
    """Make the run's folder, or see that the one that is there is this run's.

    Raises:
        ConfigError: it holds another run, or none to resume, or cannot be written.
    """
    config, checkpoints = folder / CONFIG, folder / "checkpoints"
    begun = has_checkpoints(checkpoints)
    if begun and not resume and latest_checkpoint(checkpoints) is None:
        raise ConfigError(f"{folder}: all checkpoints are damaged; remove {checkpoints}, or choose another --output")
    if begun and not resume:
        raise ConfigError(f"{folder} holds a run already: go on with --resume, or choose another --output")
    if resume and not begun and not config.is_file():  # one that died before its first checkpoint begins again
        raise ConfigError(f"{folder} holds no run to resume; start it without --resume")
    if resume and config.is_file():
        changed = _differences(strict_yaml.load_file(config)[0], resolved_settings(experiment))
        refused = [key for key in changed if not _may_change(key, experiment)]
        if refused:
            raise ConfigError(f"{config} is of another experiment, it differs in {', '.join(refused)}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = config.with_name(f".{CONFIG}")  # death amid the write must not cost the run its experiment
        temporary.write_text(as_yaml(experiment), encoding="utf-8")
        temporary.replace(config)
    except OSError as error:
        raise ConfigError(f"{folder}: the run's folder cannot be written: {(error.strerror or '').lower()}") from None


def _may_change(key: str, experiment: Experiment) -> bool:
    """Whether a resumed run may have another value at a key path."""
    if any(f"{key}.".startswith(f"{may}.") for may in _MAY_CHANGE):
        return True
    of_reward = _OF_REWARD.match(key)
    if of_reward is None or (term := experiment.objective.rewards.get(of_reward["name"])) is None:
        return False
    return of_reward["argument"] is None or of_reward["argument"] in plugins.resolve("rewards", term.use).operational


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Key paths at which two nested mappings differ."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return [] if old == new else [path]
    keys = sorted({*old, *new})
    return [found for key in keys for found in _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]
