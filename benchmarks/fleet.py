"""What the fleet gains and costs on this machine, as ratios within one run.

* `scaling`: rollouts only, one thread each: two workers against one, drawing the tiny world and sleeping.
* `staleness`: seconds per step at staleness 1 against 0, training on the tiny world and with a learner and workers that
  sleep; for the latter also what the pool on a virtual clock says.
* `weights`: share of a step that goes into making weights available and loading them.
* `dispatcher`: how much of the time many sleeping workers are kept busy.

Rollouts need a core for each worker, and nothing else that runs: look at the load average in the result.

    python benchmarks/fleet.py [--parts scaling staleness weights dispatcher] [--small] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))  # for a caller that is no neighbour

import cells  # noqa: E402
import torch  # noqa: E402

from rewardgen import build  # noqa: E402
from rewardgen.config import Experiment  # noqa: E402
from rewardgen.fleet.pool import FleetConfig, Pool  # noqa: E402
from rewardgen.fleet.ray_pool import RayPool  # noqa: E402
from rewardgen.fleet.schedule import Ahead  # noqa: E402
from rewardgen.fleet.sim import SimPool, VirtualClock, step_seconds  # noqa: E402
from rewardgen.measure import Clock  # noqa: E402
from rewardgen.rollout import RolloutWorker, Weights  # noqa: E402
from rewardgen.trainer import Trainer  # noqa: E402
from rewardgen.types import Rollout, RolloutRequest  # noqa: E402
from rewardgen.workers import RolloutFactory  # noqa: E402

TARGETS = (
    "two workers against one at least 1.7x drawing and 1.9x sleeping",
    "under 5 % of a step spent on weights",
    "32 sleeping workers busy for at least 95 % of the time",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much is measured."""

    rounds: int = 5
    requests: int = 8
    steps: int = 8
    workers: int = 32
    tasks_per_worker: int = 5


SMALL = Size(rounds=1, requests=2, steps=2, workers=2, tasks_per_worker=2)


class Sleeper:
    """A worker that takes its time and nothing else."""

    def rollout(self, seconds: float, weights: Weights | None = None) -> None:
        time.sleep(seconds)


class Timed:
    """A rollout worker that notes how long it loads weights."""

    def __init__(self, inner: RolloutWorker) -> None:
        self.inner = inner
        self.loads: list[float] = []

    def rollout(self, request: RolloutRequest, weights: Weights) -> Rollout:
        begin = time.perf_counter()
        with self.inner._with(weights):
            self.loads.append(time.perf_counter() - begin)
        return self.inner.rollout(request, weights)

    def loading_seconds(self) -> float:
        return sum(self.loads)


@dataclass(frozen=True)
class TimedFactory:
    inner: RolloutFactory

    def __call__(self) -> Timed:
        return Timed(self.inner())


def tiny(size: Size) -> Experiment:
    """The bundled experiment in batches of 4, long enough that its learning rate does not fall."""
    length = f"train.num_steps={1000 * size.steps}"
    changes = ["train.batch_size=4", length, "optimizer.decay_steps=null", "evaluation.grid_examples=0"]
    return cells.load(0, changes, examples=1)


def pool_of(factory: Callable[[], Any], workers: int) -> RayPool:
    """A pool whose workers are all up. They reserve next to nothing: a benchmark may have more of them than cores."""
    config = FleetConfig(pool="ray", workers=workers, cpus_per_worker=0.01, threads_per_worker=1)
    pool = RayPool(factory, config)
    while pool.figures()["workers"] < workers:
        if pool.submit("__repr__").exception(config.start_timeout_seconds):
            break  # the first request tells what is wrong
        time.sleep(0.05)
    return pool


def seconds_for(pool: Pool, number: int, *args: Any) -> float:
    begin = time.perf_counter()
    for future in [pool.submit("rollout", *args) for _ in range(number)]:
        future.result().get()
    return time.perf_counter() - begin


def ratio(pools: Sequence[RayPool], size: Size, args: Sequence[Any]) -> dict[str, Any]:
    """Seconds of equal work on two pools, taking turns."""
    for pool in pools:
        seconds_for(pool, pool.size, *args)  # warm, and with the weights loaded
    seconds: list[list[float]] = [[], []]
    for _ in range(size.rounds):
        for found, pool in zip(seconds, pools, strict=True):
            found.append(seconds_for(pool, size.requests, *args))
    one, two = map(statistics.median, seconds)
    return {"seconds_one": seconds[0], "seconds_two": seconds[1], "speedup": one / two}


def scaling(size: Size) -> dict[str, Any]:
    """Rollouts only, on one and on two workers."""
    experiment = tiny(size)
    factory = RolloutFactory(policy=experiment.policy, precision="fp32", device="cpu")
    found = {}
    with TemporaryDirectory() as folder:
        trainer = make_trainer(experiment, None, 0, Path(folder))
        (request,) = trainer.batches.requests(trainer.batches.plan(0))
        weights = trainer.learner.publish()  # with one key: each worker loads them once
    for name, make, args in (("drawing", factory, (request, weights)), ("sleeping", Sleeper, (1.0,))):
        pools = [pool_of(make, 1), pool_of(make, 2)]
        try:
            found[name] = ratio(pools, size, args)
        finally:
            for pool in pools:
                pool.close()
    return found


def make_trainer(experiment: Experiment, pool: Pool | None, staleness: int, folder: Path) -> Trainer:
    parts = build.assemble(experiment)
    return Trainer(
        parts.learner,
        pool or build.inline_workers(experiment, parts.policy),
        parts.train_data,
        rollout=experiment.rollout,
        config=experiment.train,
        seed=0,
        staleness=staleness,
        folder=folder,
        reporter=_Silent(),
    )


class _Silent:
    def step(self, report: Any) -> None:
        """Nobody listens."""


def training(size: Size) -> dict[str, Any]:
    """Steps on the tiny world with one worker, in turns at staleness 0 and 1, and what they spend on weights."""
    experiment = tiny(size)
    factory = RolloutFactory(policy=experiment.policy, precision="fp32", device="cpu")
    pool = pool_of(TimedFactory(factory), 1)
    seconds: dict[int, list[float]] = {0: [], 1: []}
    publishing = total = 0.0
    with TemporaryDirectory() as folder:
        trainers = {staleness: make_trainer(experiment, pool, staleness, Path(folder)) for staleness in seconds}
        done = dict.fromkeys(seconds, 0)
        for _ in range(size.rounds):
            for staleness, trainer in trainers.items():
                for number in range(size.steps + 1):
                    begin = time.perf_counter()
                    report = trainer.step(done[staleness])
                    taken = time.perf_counter() - begin
                    done[staleness] += 1
                    if number:  # before the first of a turn there was time to draw ahead
                        seconds[staleness].append(taken)
                    publishing += report.seconds_by_phase["weights"]
                    total += taken
    loading = pool.submit("loading_seconds").result().get()
    pool.close()
    old, new = (statistics.median(seconds[staleness]) for staleness in (0, 1))
    return {
        "seconds_per_step": {str(staleness): found for staleness, found in seconds.items()},
        "speedup": old / new,
        "weights_share": (publishing + loading) / total,
        "publishing_seconds": publishing,
        "loading_seconds": loading,
        "all_steps_seconds": total,
    }


def sleeping(size: Size) -> dict[str, Any]:
    """A learner that sleeps for 1 s, and two workers that sleep for 1 s at each of two requests a step."""
    pool = pool_of(Sleeper, 2)
    found: dict[str, Any] = {}
    for staleness in (0, 1):
        ahead: Ahead[int] = Ahead(
            put=pool.put,
            plan=lambda step: step,
            needs_weights=lambda step: True,
            submit=lambda step, weights: [pool.submit("rollout", 1.0, weights) for _ in range(2)],
            publish=lambda: Weights(version=0, tensors={}),
            staleness=staleness,
            num_steps=size.steps + 1,
        )
        begin = 0.0
        for step in range(size.steps + 1):
            begin = begin if step > 1 else time.perf_counter()  # the first step is of another kind
            for future in ahead.ask(step, Clock(torch.device("cpu"))).futures:
                future.result()
            time.sleep(1.0)
        measured = (time.perf_counter() - begin) / size.steps
        clock = VirtualClock()
        virtual = SimPool(clock, size=2, seconds=lambda *_: 1.0)
        options = {"requests_per_step": 2, "staleness": staleness, "learner_seconds": 1.0}
        said = step_seconds(virtual, clock, num_steps=size.steps + 1, **options)  # type: ignore[arg-type]
        simulated = sum(said[1:]) / size.steps
        found[str(staleness)] = {"measured": measured, "simulated": simulated, "error": simulated / measured - 1}
    pool.close()
    return found | {"speedup": found["0"]["measured"] / found["1"]["measured"]}


def dispatcher(size: Size) -> dict[str, Any]:
    """Many workers that sleep for 1 s."""
    pool = pool_of(Sleeper, size.workers)
    seconds_for(pool, size.workers, 0.01)
    seconds = seconds_for(pool, size.workers * size.tasks_per_worker, 1.0)
    pool.close()
    return {"workers": size.workers, "seconds": seconds, "efficiency": size.tasks_per_worker / seconds}


def run(parts: Sequence[str], size: Size) -> dict[str, Any]:
    """What was asked for, by part."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"small": size == SMALL, "cores": os.cpu_count(), "load_average_before": os.getloadavg()[0]}
    if "scaling" in parts:
        found["scaling"] = scaling(size)
    if {"staleness", "weights"} & set(parts):
        found["training"] = training(size)
    if "staleness" in parts:
        found["sleeping"] = sleeping(size)
    if "dispatcher" in parts:
        found["dispatcher"] = dispatcher(size)
    return found | {"load_average_after": os.getloadavg()[0]}


def render(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = []
    if "scaling" in found:
        rows += [("two workers against one, drawing the tiny world", f"{found['scaling']['drawing']['speedup']:.2f}x")]
        rows += [("two workers against one, sleeping", f"{found['scaling']['sleeping']['speedup']:.2f}x")]
    if "training" in found:
        rows += [("staleness 1 against 0, training on the tiny world", f"{found['training']['speedup']:.2f}x")]
        rows += [("share of these steps spent on weights", f"{100 * found['training']['weights_share']:.2f} %")]
    if "sleeping" in found:
        errors = ", ".join(f"{100 * found['sleeping'][key]['error']:+.1f} %" for key in ("0", "1"))
        rows += [("staleness 1 against 0, sleeping", f"{found['sleeping']['speedup']:.2f}x (simulated: {errors})")]
    if "dispatcher" in found:
        name = f"{found['dispatcher']['workers']} sleeping workers of 1 s kept busy"
        rows += [(name, f"{100 * found['dispatcher']['efficiency']:.1f} % of the time")]
    table = [cells.line(["", "measured"]), "|---|---|", *(cells.line(row) for row in rows)]
    load = f"load average {found['load_average_before']:.1f} before and {found['load_average_after']:.1f} after"
    return "\n".join(
        [*table, "", f"`python benchmarks/fleet.py`: {found['cores']} cores, {load}, one thread each.", ""]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = ("scaling", "staleness", "weights", "dispatcher")
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--small", action="store_true", help="see that it runs; the numbers mean nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of fleet.json, .md")
    options = parser.parse_args()
    options.out = options.out.absolute()
    os.chdir(ROOT)
    from rewardgen.fleet.cluster import connect

    connect(None)  # one Ray for all pools
    found = run(options.parts, SMALL if options.small else Size())
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "fleet.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.out / "fleet.md").write_text(render(found), encoding="utf-8")
    print("\n" + render(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
