"""`rewardgen plan`: what an experiment asks of a fleet, and how GPUs are best split for it."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

from rewardgen import config, plugins
from rewardgen.config import Experiment
from rewardgen.errors import ConfigError
from rewardgen.fleet.costs import Costs, Work, measured, stated
from rewardgen.fleet.plan import Forecast, best
from rewardgen.objective import learns_from_samples
from rewardgen.report import METRICS
from rewardgen.run_folder import CONFIG


def run(
    experiment: Experiment,
    *,
    gpus: int,
    costs: Path | None,
    from_run: Path | None,
    price: float | None = None,
    as_json: bool = False,
) -> None:
    """Print the best split of each kind, with the experiment's staleness and, where that is 0, also with 1.

    Raises:
        ConfigError: not exactly one of `costs` and `from_run`, or they do not fit the experiment.
    """
    if (costs is None) == (from_run is None):
        raise ConfigError("say what the parts of a step take: either --costs FILE or --from-run DIR")
    work = work_of(experiment)
    if not work.requests:
        raise ConfigError("the objective needs no rollout: there is nothing to split")
    found = stated(costs) if costs is not None else _costs_of(from_run or Path(), experiment)
    if work.samples and not found.judge_seconds:
        warnings.warn("judge_seconds is 0: scoring samples is counted as part of drawing them", stacklevel=2)
    forecasts = [best(work, found, gpus, experiment.fleet.staleness, colocated=True)]
    forecasts += [best(work, found, gpus, s, colocated=False) for s in sorted({experiment.fleet.staleness, 1})]
    made = [forecast for forecast in forecasts if forecast is not None]
    rows = [_row(experiment, work, forecast, price) for forecast in made]
    # Another staleness is another run: it is shown, not recommended.
    own = [(f.seconds_per_step, i) for i, f in enumerate(made) if f.staleness == experiment.fleet.staleness]
    chosen = rows[min(own)[1]]
    document = {"gpus": gpus, "work": dataclasses.asdict(work), "costs": found.model_dump(), "splits": rows}
    document["best"] = chosen
    print(json.dumps(document, indent=1) if as_json else _text(experiment, work, found, rows, chosen))


def work_of(experiment: Experiment) -> Work:
    """What a step of an experiment asks for, once all of its rewards have started."""
    objective = experiment.objective
    sampled, graded = 0, 0
    for term in objective.rewards.values():
        if learns_from_samples(term, plugins.resolve("rewards", term.use)):
            sampled = objective.policy_gradient.num_generations if objective.policy_gradient else 0
        elif term.weight or term.bound is not None:
            graded = 1
    micro_batches = experiment.train.accumulation * experiment.fleet.learners
    return Work(micro_batches=micro_batches, prefixes=graded, samples=sampled)


def _costs_of(folder: Path, experiment: Experiment) -> Costs:
    """The costs that a run measured, where its micro-batches are the experiment's."""
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder} holds no {CONFIG}: it is no run's folder")
    other = config.load_experiment(folder / CONFIG)
    for key, theirs, ours in (
        ("train.batch_size", other.train.batch_size, experiment.train.batch_size),
        ("rollout.image_size", list(other.rollout.image_size), list(experiment.rollout.image_size)),
        ("rollout.num_steps", other.rollout.num_steps, experiment.rollout.num_steps),
        ("policy.use", other.policy.use, experiment.policy.use),
    ):
        if theirs != ours:
            raise ConfigError(f"{folder} measured {key} = {theirs}, the experiment has {ours}: its seconds are others")
    whole = work_of(other)
    own = dataclasses.replace(whole, micro_batches=whole.micro_batches // other.fleet.learners)
    return measured(folder / METRICS, own, remote=other.fleet.remote_rollouts)


def _row(experiment: Experiment, work: Work, forecast: Forecast, price: float | None) -> dict[str, Any]:
    split, steps = forecast.split, experiment.train.num_steps
    examples = work.micro_batches * experiment.train.batch_size
    row = {
        "placement": "disaggregated" if split.workers else "colocated",
        "staleness": forecast.staleness,
        **dataclasses.asdict(split),
        "gpus": split.gpus,
        "seconds_per_step": forecast.seconds_per_step,
        "examples_per_second": examples / forecast.seconds_per_step if forecast.seconds_per_step else None,
        "learners_busy": forecast.learners_busy,
        "workers_busy": forecast.workers_busy,
        "judges_busy": forecast.judges_busy,
        "hours": steps * forecast.seconds_per_step / 3600,
        "overrides": _overrides(forecast, work),
    }
    return row if price is None else row | {"price": forecast.price(steps, price)}


def _overrides(forecast: Forecast, work: Work) -> list[str]:
    split = forecast.split
    accumulation = f"train.accumulation={work.micro_batches // split.learners}"
    if not split.workers and split.learners == 1:
        return [accumulation]
    placement = "disaggregated" if split.workers else "colocated"
    keys = ["fleet=ray", f"fleet.placement={placement}", f"fleet.learners={split.learners}"]
    keys += [f"fleet.workers={split.workers}", f"fleet.staleness={forecast.staleness}"] if split.workers else []
    keys += [f"fleet.judges.workers={split.judges}"] if split.judges else []
    return [*keys, accumulation]


def _text(experiment: Experiment, work: Work, costs: Costs, rows: list[dict[str, Any]], chosen: dict[str, Any]) -> str:
    parts = [f"{name.removesuffix('_seconds')} {value:.4g} s" for name, value in costs.model_dump().items() if value]
    per_step = f"{work.micro_batches} micro-batches of {experiment.train.batch_size}, {work.requests} requests"
    per_step += f", {work.judged} of them scored" if work.judged else ""
    head = ["placement", "staleness", "learners", "workers", "judges", "s/step", "examples/s"]
    head += ["learners busy", "workers busy", "judges busy"]
    table = [head + [f"price of {experiment.train.num_steps} steps"] * ("price" in chosen)]
    for row in rows:
        staleness = "any" if not row["workers"] else str(row["staleness"])
        numbers = [str(row[name]) for name in ("learners", "workers", "judges")]
        line = [row["placement"], staleness, *numbers, f"{row['seconds_per_step']:.4g}"]
        line += ["" if row["examples_per_second"] is None else f"{row['examples_per_second']:.4g}"]
        line += [_percent(row[name]) for name in ("learners_busy", "workers_busy", "judges_busy")]
        table.append(line + ([f"{row['price']:,.2f}"] if "price" in row else []))
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    setting = " ".join(chosen["overrides"])
    total = f"{chosen['hours']:.3g} hours for {experiment.train.num_steps} steps, evaluations not counted"
    said = [f"a step: {per_step}", f"costs: {', '.join(parts) or 'none'}", "", *lines, ""]
    return "\n".join([*said, f"best at staleness {experiment.fleet.staleness}: {setting}", total])


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"
