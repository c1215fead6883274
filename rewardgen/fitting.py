"""Whether an experiment fits a device, in words, and which settings would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from rewardgen.config import Experiment
from rewardgen.errors import UserError
from rewardgen.memory_plan import plan, render

SAVINGS: tuple[dict[str, Any], ...] = (
    {"base_dtype": "bf16"},
    {"base_dtype": "int8"},
    {"offload": True},
    {"base_dtype": "int8", "offload": True},
)
"""Arguments of policies that take less memory, the one that costs least first."""


def describe(experiment: Experiment, device_bytes: float | None, *, required: bool) -> list[str]:
    """The plan of an experiment as lines of text, or why there is none.

    Args:
        device_bytes: None takes the device's memory, or 80 GB where there is none.
        required: raise the reason instead. Raises UserError then.
    """
    try:
        found = plan(experiment)
    except UserError as error:
        if required:
            raise
        return [f"what a step needs cannot be told yet: {error}"]
    if device_bytes is None:
        there = torch.cuda.is_available() and experiment.train.device != "cpu"
        device_bytes = torch.cuda.get_device_properties(0).total_memory if there else 80e9
    lines = ["what a step needs on each device:", *render(found, device_bytes=device_bytes)]
    return lines if found.fits(device_bytes) else [*lines, *remedies(experiment, device_bytes)]


def remedies(experiment: Experiment, device_bytes: float) -> list[str]:
    """In lines of text: settings with which an experiment needs less, and how much.

    Each is planned in its turn, which takes as long as the plan did, from the one that costs least up to the first
    that fits. Recomputed activations come first, and stay.
    """
    lines = []
    for words, changed in _alternatives(experiment):
        try:
            found = plan(changed)
        except UserError:  # the policy has no such setting, or it does not go with the others
            continue
        fits = found.fits(device_bytes)
        lines.append(f"  with {words}: {found.needed / 1e9:.3f} GB, {'which fits' if fits else 'which does not fit'}")
        if fits:
            return lines
    return [*lines, "  no setting known here makes it fit: smaller pictures or batches, or a larger device"]


def _alternatives(experiment: Experiment) -> Iterator[tuple[str, Experiment]]:
    """Experiments that need less memory, by the settings that differ."""
    changes = []
    if not experiment.train.gradient_checkpointing:
        changes = ["train.gradient_checkpointing=true"]
        train = experiment.train.model_copy(update={"gradient_checkpointing": True})
        experiment = experiment.model_copy(update={"train": train})
        yield changes[0], experiment
    args, tried = experiment.policy.args, []
    for saving in SAVINGS:
        new = {name: value for name, value in saving.items() if args.get(name) != value}
        backwards = new.get("base_dtype") == "bf16" and args.get("base_dtype") == "int8"
        if not new or new in tried or backwards:
            continue
        tried.append(new)
        words = [*changes, *(f"policy.args.{name}={str(value).lower()}" for name, value in new.items())]
        policy = experiment.policy.model_copy(update={"args": {**args, **new}})
        yield " ".join(words), experiment.model_copy(update={"policy": policy})
