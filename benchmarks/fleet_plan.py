"""What `rewardgen plan` says of a step against what a Ray fleet takes for it, whose every part only sleeps.

A learner that sleeps, workers that sleep at each request and, in some settings, a judge that sleeps at what they drew,
for several numbers of workers and stalenesses. The error is that of the plan: `planned / measured - 1`, once from what
the parts were to take (`stated`) and once from what they took in the same steps (`timed`: the fleet's own figures and
the learner's clock, as `--from-run` reads them). The difference is what a call costs on this machine, and grows with
its load; what is left checks the schedule and the dispatch. How long real parts take must be measured.

    python benchmarks/fleet_plan.py [--small] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))  # for a caller that is no neighbour

import cells  # noqa: E402
import torch  # noqa: E402

from rewardgen.fleet.costs import Costs, Work  # noqa: E402
from rewardgen.fleet.plan import Split, forecast  # noqa: E402
from rewardgen.fleet.pool import FleetConfig, Handle, Pool, then  # noqa: E402
from rewardgen.fleet.ray_pool import RayPool  # noqa: E402
from rewardgen.fleet.schedule import Ahead  # noqa: E402
from rewardgen.measure import Clock  # noqa: E402
from rewardgen.rollout import Weights  # noqa: E402

TARGET = "every step planned from timed parts within 3 % of the measured one"
WARM_STEPS = 2
STEPS = 6
"""An even number: where workers and requests do not match, long and short steps alternate."""


class Sleeper:
    """A worker or judge that takes its time and nothing else."""

    def rollout(self, seconds: float, weights: Weights | None = None) -> float:
        time.sleep(seconds)
        return seconds

    def score(self, drawn: float, seconds: float) -> None:
        time.sleep(seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One row."""

    workers: int
    staleness: int
    judges: int = 0


SETTINGS = (
    Setting(workers=1, staleness=0),
    Setting(workers=1, staleness=1),
    Setting(workers=2, staleness=0),
    Setting(workers=2, staleness=1),
    Setting(workers=2, staleness=0, judges=1),
    Setting(workers=2, staleness=1, judges=1),
    Setting(workers=3, staleness=0),
    Setting(workers=3, staleness=1),
    Setting(workers=4, staleness=0),
    Setting(workers=4, staleness=1),
    Setting(workers=4, staleness=2),
)
COSTS = Costs(rollout_seconds=2.0, learner_seconds=0.7, judge_seconds=0.8)
REQUESTS = 4


def measure(
    pool: Pool, judges: Pool | None, costs: Costs, staleness: int, *, requests: int, steps: int
) -> tuple[float, Costs]:
    """Mean seconds of a step, after the first ones, and of its parts."""

    def submit(step: int, weights: Handle[Weights]) -> list[Future[Handle[Any]]]:
        drawn = [pool.submit("rollout", costs.rollout_seconds, weights) for _ in range(requests)]
        if judges is None:
            return drawn
        score: Callable[[Handle[Any]], Future[Handle[Any]]] = partial(_score, judges, costs.judge_seconds)
        return [then(future, score) for future in drawn]

    number = WARM_STEPS + steps
    ahead: Ahead[int] = Ahead(
        put=pool.put,
        plan=lambda step: step,
        needs_weights=lambda step: True,
        submit=submit,
        publish=lambda: Weights(version=0, tensors={}),
        staleness=staleness,
        num_steps=number + staleness,  # for the last ones there is nothing more to draw ahead
    )
    begin, clock = 0.0, Clock(torch.device("cpu"))
    for step in range(number):
        if step == WARM_STEPS:
            for each in (pool, judges):
                each and each.figures()  # what follows is since here
            begin, clock = time.perf_counter(), Clock(torch.device("cpu"))
        for future in ahead.ask(step, clock).futures:
            future.result()
        with clock.phase("learner"):
            time.sleep(requests * costs.learner_seconds)
    seconds = (time.perf_counter() - begin) / steps
    timed = Costs(
        rollout_seconds=_busy_seconds(pool, costs.rollout_seconds),
        judge_seconds=_busy_seconds(judges, costs.judge_seconds),
        learner_seconds=clock.seconds_by_phase["learner"] / steps / requests,
        weights_seconds=clock.seconds_by_phase["weights"] / steps,
    )
    for left in range(number, number + staleness):
        for future in ahead.ask(left, Clock(torch.device("cpu"))).futures:
            future.result()
    return seconds, timed


def _busy_seconds(pool: Pool | None, stated: float) -> float:
    """What a request took a worker; what was stated where the pool does not say."""
    figures = {} if pool is None else pool.figures()
    rate = figures.get("requests_per_worker_second")
    return figures["busy_share"] / rate if rate else stated


def _score(judges: Pool, seconds: float, drawn: Handle[Any]) -> Future[Handle[Any]]:
    return judges.submit("score", drawn, seconds)


def planned(setting: Setting, costs: Costs, requests: int) -> float:
    """What the plan says of a setting."""
    work = Work(micro_batches=requests, prefixes=1 - setting.judges, samples=setting.judges)
    split = Split(learners=1, workers=setting.workers, judges=setting.judges)
    return forecast(work, costs, split, setting.staleness).seconds_per_step


def row(
    setting: Setting, pool: Pool, judges: Pool | None, costs: Costs, *, requests: int, steps: int
) -> dict[str, Any]:
    """A setting, measured on pools that have its size."""
    own = judges if setting.judges else None
    measured, timed = measure(pool, own, costs, setting.staleness, requests=requests, steps=steps)
    found: dict[str, Any] = {"workers": setting.workers, "staleness": setting.staleness, "judges": setting.judges}
    found |= {"measured": measured, "timed_parts": timed.model_dump()}
    for name, parts in (("stated", costs), ("timed", timed)):
        said = planned(setting, parts, requests)
        found |= {name: said, f"{name}_error": said / measured - 1}
    return found


def run(settings: Sequence[Setting], costs: Costs, steps: int) -> dict[str, Any]:
    """All settings, on one pool that grows; workers and judges reserve next to nothing."""
    load = os.getloadavg()[0]
    config = FleetConfig(pool="ray", workers=1, cpus_per_worker=0.01, threads_per_worker=1)
    pool, judges = RayPool(Sleeper, config), RayPool(Sleeper, config)
    rows = []
    try:
        for setting in sorted(settings, key=lambda setting: setting.workers):
            pool.grow(setting.workers - pool.size)
            for each in (pool, judges):
                _wait_for(each)
            rows.append(row(setting, pool, judges, costs, requests=REQUESTS, steps=steps))
            print(render_rows(rows[-1:])[0], flush=True)
    finally:
        pool.close()
        judges.close()
    return {
        "requests": REQUESTS,
        "costs": costs.model_dump(),
        "steps": steps,
        "rows": rows,
        "worst": max(abs(found["timed_error"]) for found in rows),
        "worst_stated": max(abs(found["stated_error"]) for found in rows),
        "cores": os.cpu_count(),
        "load_average_before": load,
        "load_average_after": os.getloadavg()[0],
    }


def _wait_for(pool: RayPool) -> None:
    """Until all workers are up; the first request tells what is wrong."""
    while pool.figures()["workers"] < pool.size:
        pool.submit("__repr__").result(pool.config.start_timeout_seconds)
        time.sleep(0.05)


def render_rows(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of the table."""
    return [
        cells.line(
            [
                *(str(found[name]) for name in ("workers", "staleness", "judges")),
                f"{found['measured']:.3f}",
                *(f"{found[name]:.3f} ({100 * found[name + '_error']:+.1f} %)" for name in ("timed", "stated")),
            ]
        )
        for found in rows
    ]


def render(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    costs = found["costs"]
    head = cells.line(
        ["workers", "staleness", "judges", "measured s/step", "planned, timed parts", "planned, stated parts"]
    )
    load = f"load average {found['load_average_before']:.1f} before and {found['load_average_after']:.1f} after"
    return "\n".join(
        [
            head,
            "|---|---|---|---|---|---|",
            *render_rows(found["rows"]),
            "",
            f"`python benchmarks/fleet_plan.py`: {found['requests']} requests of {costs['rollout_seconds']:g} s a step,"
            f" {costs['judge_seconds']:g} s to judge one, a learner of"
            f" {found['requests'] * costs['learner_seconds']:g} s, {found['steps']} steps each; {found['cores']} cores,"
            f" {load}. Largest error {100 * found['worst']:.1f} % from timed parts,"
            f" {100 * found['worst_stated']:.1f} % from stated ones.",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="see that it runs; the numbers mean nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="of fleet_plan.json, .md")
    options = parser.parse_args()
    options.out = options.out.absolute()
    os.chdir(ROOT)
    from rewardgen.fleet.cluster import connect

    connect(None)  # one Ray for both pools
    small = options.small
    found = run(SETTINGS[:2] if small else SETTINGS, COSTS, 2 if small else STEPS)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "fleet_plan.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.out / "fleet_plan.md").write_text(render(found), encoding="utf-8")
    print("\n" + render(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
