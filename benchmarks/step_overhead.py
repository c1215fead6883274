"""What the engine costs: our train step against a bare loop that makes the same DiT, autoencoder and CSD calls.

    python benchmarks/step_overhead.py [--pairs 40] [--write]

`bare_step.py` is the bare loop. First both take a step from the same weights and must come to the same gradient. Then
they take turns in one process: pair by pair the same examples, noise and entry step, the order alternating, and the
ratio of their times is averaged over the pairs (geometric mean, Student's t on the logarithms). All encodings are
warm on both sides. The target: the interval's upper bound at most 1.05.

Memory is measured in a child process for each variant, which makes the same objects and then steps with one of them:
the tensors that are alive at once within a step, exactly, as torch's profiler sees every allocation (malloc and the
allocations before the step take no part); and the process's largest resident set, which holds everything else too.
The target: both within 3 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from scipy.stats import t as student
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for a caller that is no neighbour

import cells as shared
from bare_step import BareStep, Inputs

from rewardgen import build
from rewardgen.fleet.inline import InlinePool
from rewardgen.fleet.pool import Handle, Here
from rewardgen.flow.loss import draw_times_and_noise
from rewardgen.measure import Clock
from rewardgen.policy import noise_like_request
from rewardgen.rollout import RolloutWorker
from rewardgen.trainer import Trainer
from rewardgen.types import Example, StepReport

TARGET_TIME, TARGET_MEMORY = 1.05, 1.03
GRADIENT_TOLERANCE = 1e-4
"""Largest difference over the largest entry: float32 sums in another order."""
WARM_UP = 3
EXAMPLES = 32


class Silent:
    """A reporter that keeps the last report."""

    def step(self, report: StepReport) -> None:
        self.last = report


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Both variants, each with models of its own, from the same weights."""

    trainer: Trainer
    bare: BareStep
    examples: list[Example]


def make(overrides: Sequence[str] = (), *, folder: Path) -> Pair:
    """The bundled experiment, without what only evaluation needs."""
    small = [f"data.train.args.size={EXAMPLES}", "evaluation.grid_examples=0", *overrides]
    experiment = shared.load(0, small, examples=1)
    ours, theirs = build.assemble(experiment), build.assemble(experiment)
    trainer = Trainer(
        ours.learner,
        InlinePool(RolloutWorker(ours.policy, precision=experiment.train.precision)),
        ours.train_data,
        rollout=experiment.rollout,
        config=experiment.train,
        seed=experiment.seed,
        folder=folder,
        reporter=Silent(),
    )
    examples = [ours.train_data[index] for index in range(len(ours.train_data))]
    with torch.no_grad():  # from here on nothing has to be encoded any more
        ours.policy.encode([*examples, dataclasses.replace(examples[0], prompt="")])
        ours.metrics["style"].score(torch.stack([example.style_refs[0] for example in examples]), examples)
    with torch.random.fork_rng():
        bare = BareStep(theirs.policy, theirs.metrics["style"], examples, experiment)
    return Pair(trainer=trainer, bare=bare, examples=examples)


class _Recorded(Exception):
    """Ends a step that is only looked at."""


class _Requests:
    """A pool that draws nothing and keeps what it was asked for."""

    size = 1

    def put(self, value: Any) -> Handle[Any]:
        return Here(value)

    def submit(self, method: str, request: Any, weights: Any, about: str = "") -> mock.Mock:
        self.request = request
        return mock.Mock(**{"result.return_value": Here(None)})

    def figures(self) -> dict[str, float]:
        return {}


def inputs_of(pair: Pair, step: int) -> Inputs:
    """What our step is going to see and draw, found by letting it run up to its first computation."""
    trainer, pool = pair.trainer, _Requests()
    with (
        mock.patch.object(trainer, "pool", pool),
        mock.patch.object(trainer.learner, "step", side_effect=_Recorded) as called,
        suppress(_Recorded),
    ):
        trainer.step(step)
    ((batch,),) = called.call_args.args
    places = {example.id: place for place, example in enumerate(pair.examples)}
    policy, size = trainer.learner.policy, trainer.batches.rollout.image_size
    noise_BLP = noise_like_request(policy, pool.request.seed_B, size)
    t_B, fm_noise_BLP = draw_times_and_noise(batch.seed_B, noise_BLP, policy.training_sigmas(size))
    return Inputs(
        index_B=torch.tensor([places[example.id] for example in batch.examples]),
        no_prompt_B=torch.tensor([not example.prompt for example in batch.examples]),
        t_B=t_B,
        fm_noise_BLP=fm_noise_BLP,
        noise_BLP=noise_BLP,
        entry_step=pool.request.stop_step,
    )


def gradient_difference(pair: Pair) -> float:
    """Both take step 0; the largest difference between the clipped gradients, over the largest entry.

    AdamW's first moment after one step is the gradient times a constant, so that nothing has to be hooked.
    """
    inputs = inputs_of(pair, 0)
    report = pair.trainer.step(0)
    fm_loss, reward = pair.bare.step(inputs, 0)
    tensors, _ = pair.trainer.learner.state()
    ours = [tensor for name, tensor in tensors.items() if name.startswith("adamw/exp_avg/")]
    theirs: list[Tensor] = [pair.bare.adamw.state[parameter]["exp_avg"] for parameter in pair.bare.parameters]
    if len(ours) != len(theirs) or report.skipped:
        raise SystemExit(f"our step has {len(ours)} gradients, the bare one {len(theirs)}")
    differences = [float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)]
    losses = abs(report.terms["flow_matching"] / pair.bare.fm_weight / fm_loss - 1)
    rewards = abs(report.reward_means["style"] / reward - 1)
    return max(max(differences) / max(float(b.abs().max()) for b in theirs), losses, rewards)


def measure(pair: Pair, pairs: int) -> dict[str, Any]:
    """Time `pairs` steps of each, taking turns. Seconds of wall clock and of CPU (all threads), in order."""
    plans = {step: inputs_of(pair, step) for step in range(1, WARM_UP + pairs + 1)}
    for step in range(1, WARM_UP + 1):
        pair.trainer.step(step)
        pair.bare.step(plans[step], step)
    wall: dict[str, list[float]] = {"ours": [], "bare": []}
    cpu: dict[str, list[float]] = {"ours": [], "bare": []}
    phases: dict[str, float] = {}
    for turn, step in enumerate(range(WARM_UP + 1, WARM_UP + pairs + 1)):

        def ours(step: int = step) -> None:
            for name, seconds in pair.trainer.step(step).seconds_by_phase.items():
                phases[name] = phases.get(name, 0.0) + seconds / pairs

        def bare(step: int = step) -> None:
            pair.bare.step(plans[step], step)

        for name, run in [("ours", ours), ("bare", bare)][:: 1 if turn % 2 == 0 else -1]:
            begin, begin_cpu = time.perf_counter(), time.process_time()
            run()
            wall[name].append(time.perf_counter() - begin)
            cpu[name].append(time.process_time() - begin_cpu)
    return {"wall_seconds": wall, "cpu_seconds": cpu, "seconds_by_phase": phases}


def ratio(ours: Sequence[float], bare: Sequence[float], confidence: float = 0.95) -> dict[str, float]:
    """Geometric mean of the ratios pair by pair, its interval by Student's t on the logarithms, and the median."""
    logs = torch.tensor([math.log(a / b) for a, b in zip(ours, bare, strict=True)], dtype=torch.float64)
    half = student.ppf((1 + confidence) / 2, len(logs) - 1) * float(logs.std()) / math.sqrt(len(logs))
    mean = float(logs.mean())
    return {
        "value": math.exp(mean),
        "low": math.exp(mean - half),
        "high": math.exp(mean + half),
        "median": math.exp(float(logs.quantile(0.5))),
    }


def live_bytes(run: Callable[[], object]) -> int:
    """The most bytes of CPU tensors alive at once while `run` runs, above those alive before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def memory_of(variant: str, steps: int, overrides: Sequence[str] = ()) -> dict[str, int]:
    """In a process of its own: make both variants, step with one of them."""
    with tempfile.TemporaryDirectory() as folder:
        pair = make(overrides, folder=Path(folder))
        plans = {step: inputs_of(pair, step) for step in range(steps + 1)}
        run: Callable[[int], object] = (
            pair.trainer.step if variant == "ours" else lambda step: pair.bare.step(plans[step], step)
        )
        for step in range(steps):
            run(step)
        resident = Clock(torch.device("cpu")).peak_memory_bytes()
        return {"resident_bytes": resident, "live_bytes": live_bytes(lambda: run(steps))}


def memory(steps: int, repeats: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Both variants, in `repeats` child processes each, taking turns; the median of each figure."""
    found: dict[str, list[dict[str, int]]] = {"ours": [], "bare": []}
    for variant in ["ours", "bare"] * repeats:
        command = [sys.executable, __file__, "--child", variant, "--memory-steps", str(steps), *overrides]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[variant].append(json.loads(output.splitlines()[-1]))
    medians = {
        variant: {name: sorted(row[name] for row in rows)[len(rows) // 2] for name in rows[0]}
        for variant, rows in found.items()
    }
    ratios = {name: medians["ours"][name] / medians["bare"][name] for name in medians["ours"]}
    return {"medians": medians, "ratios": ratios, "children": found}


def render(result: dict[str, Any]) -> str:
    """The figures in Markdown."""
    milliseconds = {name: 1000 * sum(values) / len(values) for name, values in result["wall_seconds"].items()}
    rows = [
        ["wall clock, ms", *(f"{milliseconds[name]:.1f}" for name in ("ours", "bare")), _ratio(result["wall"])],
        ["CPU, all threads", "", "", _ratio(result["cpu"])],
    ]
    names = {"live_bytes": "tensors alive at once in a step, MB", "resident_bytes": "largest resident set, MB"}
    for name, label in names.items():
        medians = [f"{result['memory']['medians'][variant][name] / 1e6:.1f}" for variant in ("ours", "bare")]
        rows.append([label, *medians, f"{result['memory']['ratios'][name]:.3f}"])
    phases = ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in result["seconds_by_phase"].items())
    machine = result["machine"]
    number = len(result["wall_seconds"]["ours"])
    notes = [
        f"{number} interleaved pairs, geometric mean of the ratios with its 95 % interval; {machine['threads']} threads"
        f" on {machine['cpus']} CPUs ({machine['processor']}), torch {machine['torch']}. The gradients of the first"
        f" step differ by at most {result['gradient_difference']:.0e} of the largest entry. Target: time at most"
        f" {TARGET_TIME} at the upper end, memory at most {TARGET_MEMORY}: **{'met' if met(result) else 'not met'}**.",
        f"Our step, milliseconds by phase: {phases}.",
    ]
    table = [shared.line(["a train step", "rewardgen", "bare loop", "ratio"]), "|" + "---|" * 4]
    return "\n".join([*table, *map(shared.line, rows), "", notes[0], "", notes[1]]) + "\n"


def met(result: dict[str, Any]) -> bool:
    """Whether time and memory are within the targets."""
    return bool(result["wall"]["high"] <= TARGET_TIME and max(result["memory"]["ratios"].values()) <= TARGET_MEMORY)


def _ratio(limits: dict[str, float]) -> str:
    return f"{limits['value']:.3f} [{limits['low']:.3f}, {limits['high']:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=40, help="at least 30 for a figure to be told")
    parser.add_argument("--threads", type=int, help="of torch; its own choice by default")
    parser.add_argument("--memory-steps", type=int, default=4, help="steps of a child process before it is measured")
    parser.add_argument("--repeats", type=int, default=3, help="child processes of each variant")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/step_overhead.{json,md}")
    parser.add_argument("--child", choices=("ours", "bare"), help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="of the experiment, such as train.batch_size=2")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.child:
        print(json.dumps(memory_of(arguments.child, arguments.memory_steps, arguments.overrides)))
        return
    with tempfile.TemporaryDirectory() as folder:
        pair = make(arguments.overrides, folder=Path(folder))
        difference = gradient_difference(pair)
        if not difference <= GRADIENT_TOLERANCE:
            raise SystemExit(f"the two steps do not compute the same: relative difference {difference:.1e}")
        result = measure(pair, arguments.pairs)
    result |= {name: ratio(*result[f"{name}_seconds"].values()) for name in ("wall", "cpu")}
    result["memory"] = memory(arguments.memory_steps, arguments.repeats, arguments.overrides)
    result["gradient_difference"] = difference
    result["machine"] = {
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "processor": platform.machine(),
        "torch": torch.__version__,
    }
    print(render(result))
    if arguments.write:
        (shared.RESULTS / "step_overhead.json").write_text(json.dumps(result, indent=1) + "\n")
        (shared.RESULTS / "step_overhead.md").write_text(render(result))


if __name__ == "__main__":
    main()
