"""`rewardgen encode`: run the frozen encoders over all data, ahead of training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from rich.progress import track

from rewardgen import build, plugins, sources
from rewardgen.config import Experiment
from rewardgen.data.buckets import BucketedDataset
from rewardgen.errors import ConfigError
from rewardgen.policy import Policy
from rewardgen.settings import Plugin
from rewardgen.trainer import choose_device
from rewardgen.types import Example


def run(experiment: Experiment) -> None:
    """Encode what training and evaluation will ask for, into the folder of `policy.args.encodings`.

    Raises:
        UserError: no such folder is named, or an example cannot be read or encoded.
    """
    folder = experiment.policy.args.get("encodings")
    if not folder:
        raise ConfigError("policy.args.encodings names no folder to keep encodings in: give policy.args.encodings=DIR")
    build.require_sources(experiment)
    train = build.make("data.train", "data", experiment.data.train)
    if experiment.rollout.buckets is not None:
        train = BucketedDataset(train, experiment.rollout.buckets)
    held_out = build.make("data.held_out", "data", experiment.data.held_out)
    shown = min(experiment.evaluation.num_examples, len(held_out))
    policy, device = _policy(experiment.policy), choose_device(experiment.train.device)
    policy.to(device)

    def examples() -> Iterator[tuple[Example, bool]]:
        yield from ((train[index], True) for index in range(len(train)))
        yield from ((held_out[index], False) for index in range(shown))

    total = len(train) + shown
    targets = experiment.objective.flow_matching.weight > 0
    if experiment.train.prompt_dropout > 0 and targets:
        policy.encode([Example(id="no prompt")])
    for example, trained in track(examples(), "encoding", total, transient=True):
        _encode(policy, example, device, target=trained and targets)
    print(f"{total} examples are encoded in {folder}")


def _policy(plugin: Plugin) -> Policy:
    """The policy, or of one that offers it (`encoding_only`) what encodes: that may fit where the whole does not."""
    cls = plugins.resolve("policies", plugin.use)
    if not hasattr(cls, "encoding_only"):
        made: Policy = build.make("policy", "policies", plugin)
        return made
    args = sources.materialise(plugin.args, "policy.args")
    part: Policy = cls.encoding_only(**plugins.check_args(plugins.factory(cls), args, "policy.args"))
    return part


def _encode(policy: Policy, example: Example, device: torch.device, *, target: bool) -> None:
    """One at a time, as training does; rewards and flow matching share what is kept."""
    try:
        with torch.no_grad():
            policy.encode([dataclasses.replace(example, target=None)])
            if target and example.target is not None:
                policy.encode_pixels(example.target[None].to(device))
    except ConfigError as error:
        raise ConfigError(f"example '{example.id}': {error}") from error
