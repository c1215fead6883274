"""Kill rollout workers with SIGKILL at random moments of a run at staleness 1, and compare its end: exactly.

Each run trains the toy policy of the tests on two Ray workers; one of them, whichever, dies at an instant drawn by the
seed over the length of an undisturbed run. Equal must be all trained parameters, their average and AdamW's moments, to
those of a run in one process.

    python benchmarks/fleet_kill.py [--times 20] [--seed 0] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for tests.fleet_workers, from wherever this is called

import torch  # noqa: E402

from rewardgen import build  # noqa: E402
from rewardgen.config import load_experiment  # noqa: E402
from rewardgen.fleet.inline import InlinePool  # noqa: E402
from rewardgen.fleet.pool import Pool  # noqa: E402
from rewardgen.fleet.ray_pool import RayPool  # noqa: E402
from rewardgen.rollout import RolloutWorker  # noqa: E402
from rewardgen.trainer import Trainer  # noqa: E402
from tests.fleet_workers import ToyFactory  # noqa: E402

EXPERIMENT = """\
name: fleet_kill
policy: {use: "tests.toys:ToyPolicy"}
data:
  train: {use: "tests.toys:ToyDataset", args: {size: 7}}
  held_out: {use: "tests.toys:ToyDataset", args: {size: 1, seed: 1}}
rollout: {image_size: [8, 8], num_steps: 4, window: {kind: refl, entry_range: [1, 3]}}
objective:
  rewards:
    style: {use: "tests.toys:ToyReward", weight: 0.5}
optimizer: {lr: 1e-2, warmup_steps: 4}
train: {num_steps: 8, batch_size: 1, accumulation: 4, ema_decay: 0.9, device: cpu, checkpoint_every: 0}
evaluation: {num_examples: 1, grid_examples: 0}
fleet: {pool: ray, workers: 2, staleness: 1}
"""
ROLLOUT_SECONDS = 0.1
"""Each rollout sleeps for so long, so that a worker is mostly at one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One run: when its worker was killed, how far it was, what the pool counted, and whether it ended exactly."""

    at_seconds: float
    at_step: int
    lost_workers: int
    retries: int
    exact: bool


class Silent:
    """A reporter that knows how far the run is."""

    def __init__(self) -> None:
        self.completed = 0

    def step(self, report: Any) -> None:
        self.completed = report.step + 1


def train(pool: Pool | None, reporter: Silent, folder: Path) -> str:
    """Train on a pool, or in this process. Returns the SHA-256 of all that is trained and its moments."""
    path = folder / "fleet_kill.yaml"
    path.write_text(EXPERIMENT)
    experiment = load_experiment(path)
    parts = build.assemble(experiment)
    inline = InlinePool(RolloutWorker(parts.policy, colocated=True), copies=True)
    trainer = Trainer(
        parts.learner,
        pool or inline,
        parts.train_data,
        rollout=experiment.rollout,
        config=experiment.train,
        seed=experiment.seed,
        staleness=experiment.fleet.staleness,
        folder=folder,
        reporter=reporter,
    )
    trainer.run()
    digest = hashlib.sha256()
    for name, tensor in sorted(parts.learner.state()[0].items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def killed_run(pool: RayPool, wanted: str, instant: float, generator: random.Random) -> Trial:
    """One run in which a worker dies `instant` seconds after its beginning."""
    reporter, before = Silent(), pool.figures()
    at_step: list[int] = []

    def kill() -> None:
        at_step.append(reporter.completed)
        os.kill(generator.choice(sorted(place.pid for place in pool.places())), signal.SIGKILL)

    timer = threading.Timer(instant, kill)
    timer.start()
    with tempfile.TemporaryDirectory() as folder:
        found = train(pool, reporter, Path(folder))
    timer.join()
    wait_for_all(pool)
    after = pool.figures()
    return Trial(
        at_seconds=round(instant, 3),
        at_step=at_step[0],
        lost_workers=int(after["lost_workers"] - before["lost_workers"]),
        retries=int(after["retries"] - before["retries"]),
        exact=found == wanted,
    )


def wait_for_all(pool: RayPool, patience: float = 600.0) -> None:
    """Until every worker is up, also the one that was just killed."""
    end = time.monotonic() + patience
    for future in [pool.submit("pid") for _ in range(4 * pool.size)]:  # a death is noticed when something is asked
        future.result(patience)
    while pool.figures()["workers"] < pool.size:
        if time.monotonic() > end:
            raise SystemExit(f"not all workers came up within {patience:g} s")
        time.sleep(0.1)


def run(times: int, seed: int, *, pool: RayPool | None = None, report: Callable[[str], None] = print) -> dict[str, Any]:
    """All trials, and how many of them ended exactly.

    Args:
        times: runs in which a worker is killed.
        seed: of the instants.
        pool: of toy workers; None makes one for the length of the trials.
        report: told of each trial.
    """
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "fleet_kill.yaml").write_text(EXPERIMENT)
        config = load_experiment(Path(folder) / "fleet_kill.yaml").fleet
        wanted = train(None, Silent(), Path(folder))
    own = pool is None
    pool = pool or RayPool(ToyFactory(seconds=ROLLOUT_SECONDS), config)
    try:
        wait_for_all(pool)
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            undisturbed = train(pool, Silent(), Path(folder)) == wanted
        seconds = time.monotonic() - start
        report(f"undisturbed: {'exact' if undisturbed else 'DIFFERS'}, {seconds:.2f} s")
        trials = []
        for number in range(times):
            trials.append(killed_run(pool, wanted, generator.uniform(0, seconds), generator))
            report(f"{number + 1}/{times}  {line(trials[-1])}")
    finally:
        if own:
            pool.close()
    return {
        "times": times,
        "seed": seed,
        "undisturbed_exact": undisturbed,
        "seconds_of_undisturbed_run": round(seconds, 2),
        "exact": sum(trial.exact for trial in trials),
        "trials": [asdict(trial) for trial in trials],
    }


def line(trial: Trial) -> str:
    end = "exact" if trial.exact else "DIFFERS"
    lost = f"{trial.lost_workers} lost, {trial.retries} requests done again"
    return f"killed after {trial.at_seconds:.2f} s and {trial.at_step} steps, {lost}: {end}"


def render(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    trials = result["trials"]
    retried = sum(trial["retries"] > 0 for trial in trials)
    return "\n".join(
        [
            "| a worker killed with SIGKILL at a random instant | runs | same final weights, bit for bit |",
            "|---|---|---|",
            f"| amid a request, which was done again | {retried} | {exact(t for t in trials if t['retries'])} |",
            f"| between two | {len(trials) - retried} | {exact(t for t in trials if not t['retries'])} |",
            f"| **all** | {len(trials)} | **{result['exact']}** |",
            "",
            f"`python benchmarks/fleet_kill.py --times {result['times']} --seed {result['seed']}`: toy policy, two Ray"
            " workers, staleness 1, 8 steps of 4 micro-batches; compared with a run in one process.",
            "",
        ]
    )


def exact(trials: Any) -> int:
    return sum(trial["exact"] for trial in trials)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=20, help="runs in which a worker is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    options = parser.parse_args()
    options.out = options.out.absolute()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    result = run(options.times, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "fleet_kill.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (options.out / "fleet_kill.md").write_text(render(result), encoding="utf-8")
    print("\n" + render(result))
    return 0 if result["undisturbed_exact"] and result["exact"] == options.times else 1


if __name__ == "__main__":
    raise SystemExit(main())
