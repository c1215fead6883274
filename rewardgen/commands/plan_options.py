"""The command `plan`, as the command line sees it. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from rewardgen.commands.options import AsJson, ExperimentFile, Flavor, Overrides


def plan(
    experiment: ExperimentFile,
    gpus: Annotated[int, typer.Option("--gpus", metavar="N", min=1, help="GPUs to split, at most.")],
    overrides: Overrides = None,
    flavor: Flavor = None,
    costs: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--costs", metavar="FILE", help="JSON that states the seconds of each part.", show_default="none"),
    ] = None,
    from_run: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--from-run", metavar="DIR", help="A run's folder: its metrics.jsonl says them.", show_default="none"
        ),
    ] = None,
    price: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--price-per-gpu-hour", metavar="X", min=0, help="Adds what it costs.", show_default="no cost"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find the best split of N GPUs into learners, rollout workers and judges.

    Runs the loop of training on a virtual clock: seconds per step, how busy
    each kind of GPU is, and the keys that set the best split. What the parts
    of a step take is read from a run or stated: rollout_seconds and
    learner_seconds of one micro-batch on one GPU; judge_seconds,
    fixed_seconds, weights_seconds.

    Examples:
      rewardgen plan experiments/uso_srl.yaml --gpus 8 --costs costs.json
      rewardgen plan experiments/uso_srl.yaml --gpus 64 --from-run runs/uso_srl \\
        --price-per-gpu-hour 2.5 train.batch_size=1 train.accumulation=64
    """
    from rewardgen import config
    from rewardgen.commands import plan as command

    loaded = config.load_experiment(experiment, flavor, overrides or ())
    command.run(loaded, gpus=gpus, costs=costs, from_run=from_run, price=price, as_json=as_json)
