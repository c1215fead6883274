"""Settings that make an experiment fit: which are tried, in which order, and what is said of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from rewardgen import fitting, strict_yaml
from rewardgen.config import Experiment
from rewardgen.errors import ConfigError
from rewardgen.memory_plan import Plan, render
from tests.test_cli import TOY

FOUND = Plan(
    resident={},
    gradients=0,
    peak=0,
    encoding_peak=0,
    operations=1e15,
    encoding_operations=1e12,
    assumed=("nothing",),
)


def experiment(**args: Any) -> Experiment:
    toy = Experiment.model_validate(strict_yaml.load(TOY, "toy.yaml")[0])
    policy = toy.policy.model_copy(update={"args": args})
    return toy.model_copy(update={"policy": policy})


def needing(changed: Experiment) -> Plan:
    """A plan of a made-up model of 40 GB of activations and as many of weights in float32."""
    args = changed.policy.args
    weights = {"fp32": 40e9, "bf16": 20e9, "int8": 10e9}[args.get("base_dtype", "fp32")]
    activations = 4e9 if changed.train.gradient_checkpointing else 40e9
    off = weights if args.get("offload") else 0.0
    return dataclasses.replace(FOUND, peak=int(activations + weights - off), offloaded=int(off))


@pytest.mark.parametrize(
    ("args", "gigabytes", "expected"),
    [
        ({}, 100, []),
        ({}, 50, ["train.gradient_checkpointing=true: 44.000 GB, which fits"]),
        (
            {},
            20,
            [
                "train.gradient_checkpointing=true: 44.000 GB, which does not fit",
                "train.gradient_checkpointing=true policy.args.base_dtype=bf16: 24.000 GB, which does not fit",
                "train.gradient_checkpointing=true policy.args.base_dtype=int8: 14.000 GB, which fits",
            ],
        ),
        (
            {"base_dtype": "int8"},
            10,
            [
                "train.gradient_checkpointing=true: 14.000 GB, which does not fit",
                "train.gradient_checkpointing=true policy.args.offload=true: 4.000 GB, which fits",
            ],
        ),
        (
            {"base_dtype": "bf16", "offload": True},
            2,
            [
                "train.gradient_checkpointing=true: 4.000 GB, which does not fit",
                "train.gradient_checkpointing=true policy.args.base_dtype=int8: 4.000 GB, which does not fit",
                "no setting known here",
            ],
        ),
    ],
)
def test_settings_are_tried_from_the_cheapest_until_one_fits(
    args: dict[str, Any], gigabytes: float, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "plan", needing)
    lines = fitting.describe(experiment(**args), gigabytes * 1e9, required=True)
    verdict = next(index for index, line in enumerate(lines) if f"{gigabytes} GB" in line)
    assert ("WILL NOT FIT" in lines[verdict]) == bool(expected)
    said = [line.strip().removeprefix("with ") for line in lines if line.startswith(("  with", "  no setting"))]
    assert len(said) == len(expected)
    assert all(line.startswith(start) for line, start in zip(said, expected, strict=True))


def test_a_setting_that_the_policy_does_not_have_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def rigid(changed: Experiment) -> Plan:
        if changed.policy.args:
            raise ConfigError("policy.args: no such argument")
        return needing(changed)

    monkeypatch.setattr(fitting, "plan", rigid)
    lines = "\n".join(fitting.remedies(experiment(), 1e9))
    assert "policy.args" not in lines
    assert "no setting known here makes it fit" in lines


def test_what_is_offloaded_is_told_with_its_time() -> None:
    text = "\n".join(render(dataclasses.replace(FOUND, offloaded=int(25e9)), device_bytes=80e9))
    assert "25.000 GB" in text
    assert "1 s at an assumed 25 GB/s" in text
    assert "CPU memory" not in "\n".join(render(FOUND, device_bytes=80e9))
