"""UMO in the tiny world: the single identity reward, the matching reward, and our options of it. Three seeds.

    python benchmarks/umo_table.py                                # train what is missing, then write the table
    python benchmarks/umo_table.py --arm SIR --seed 1             # only these cells
    python benchmarks/umo_table.py --check                        # train nothing: are the committed cells current?

Four arms start from one base, are trained for as many steps as each other on groups of one to six people, and are
judged on pictures of 2, 4 and 6 held-out people (`PICTURES` of each number) by ID-Sim, ID-Conf and its coverage, faces
missing and too many, and three witnesses that share nothing with the rewards' face network. All draw from the same
noise, so that every change is a paired one. The identities and pictures of the table are of data seeds of their own;
what settings are chosen on is the experiment's own held-out data.

A cell's file has each score of each picture, for whatever is paired later. `umo_verdicts.py` says what they show.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for a caller that is no neighbour

import cells as shared
import umo_verdicts
from baselines import step_evaluations
from umo_verdicts import MIMR, OURS, SIR, SUPERVISED, Scores

from rewardgen import build
from rewardgen.checkpoint import latest_checkpoint, load_checkpoint
from rewardgen.config import Experiment
from rewardgen.evaluation.compare import compare
from rewardgen.evaluation.evaluate import Evaluation
from rewardgen.evaluation.score import target_scores
from rewardgen.held_out import evaluate_held_out
from rewardgen.reward import Reward
from rewardgen.types import Example
from rewardgen.world.people_dataset import TinyPeople

CELLS = shared.RESULTS / "umo_tiny"
TABLE = shared.RESULTS / "umo_tiny.md"
EXPERIMENT = shared.EXPERIMENT.with_name("umo_matching.yaml")
PIECES = ("base", "encoders", "people_vae", "detector", "embedder", "traits", "uno")
"""What of the bundled world the experiment reads."""
NUMBERS = (2, 4, 6)
PICTURES = 100
"""Of each number of people."""
SEEDS_OF_DATA = {2: 12, 4: 14, 6: 16}
"""Of the held-out groups; the experiment's own, on which settings are chosen, is 0."""
COMMON = ("evaluation.grid_examples=6", "monitor.enabled=false")
"""Of every arm."""
OWN_EXAMPLES = 6
"""Held-out examples of the run's own evaluation, which is only looked at (`faces.png`)."""

_REWARD = "objective.rewards.people"
ARMS: Mapping[str, tuple[str, ...]] = {
    SUPERVISED: (f"{_REWARD}.weight=0",),
    SIR: (
        f"{_REWARD}.use=identity",
        f"{_REWARD}.args.checkpoint=world:people/embedder.safetensors",
        f"{_REWARD}.args.detector=world:people/detector.safetensors",
    ),
    MIMR: (),
    OURS: (f"{_REWARD}.args.normalise=each", f"{_REWARD}.args.floor=0.0"),
}
SECONDS_PER_EVALUATION = 0.035
"""A guess for the ledger only: longer sequences than in `baselines.py`, and rewards that look for faces."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a cell trains, and on how many pictures of each number of people it is judged."""

    arm: str
    seed: int
    experiment: Experiment
    pictures: int = PICTURES

    @property
    def path(self) -> Path:
        return CELLS / f"{re.sub('[^a-z0-9]+', '_', self.arm.lower()).strip('_')}-{self.seed}.json"

    @property
    def key(self) -> str:
        return shared.key_of(self.experiment, of_the_world=PIECES, held_out=self.data)

    @property
    def data(self) -> dict[str, list[int]]:
        """What it is judged on: for each number of people the data's seed and the number of pictures."""
        return {str(people): [SEEDS_OF_DATA[people], self.pictures] for people in NUMBERS}

    @property
    def seconds(self) -> float:
        """A rough guess on two cores."""
        trained = self.experiment.train.num_steps * step_evaluations(self.experiment, 0)
        judged = (len(NUMBERS) * self.pictures + 2 * OWN_EXAMPLES) * self.experiment.rollout.num_steps
        return SECONDS_PER_EVALUATION * (trained + judged)


def settings(arm: str, seed: int, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of an arm: the bundled one with what the arm is named after."""
    return shared.load(seed, [*COMMON, *overrides, *ARMS[arm]], examples=OWN_EXAMPLES, path=EXPERIMENT)


def plan(arm: str, seed: int, overrides: Sequence[str] = (), *, pictures: int = PICTURES) -> Plan:
    """A cell's settings.

    Args:
        overrides: of every arm, for tests.
        pictures: see `Plan`, for tests.
    """
    return Plan(arm=arm, seed=seed, experiment=settings(arm, seed, overrides), pictures=pictures)


def run_cell(cell: Plan, runs: Path) -> None:
    """Train one cell, judge it on every number of people, and write its file."""
    base_of(cell)  # what is not there is told before the training
    shared.train(cell.experiment, runs / cell.path.stem)
    judge_cell(cell, runs / cell.path.stem)


def judge_cell(cell: Plan, folder: Path) -> None:
    """Judge the trained policy of a run's folder and write the cell's file."""
    base = base_of(cell)["scores"]
    path = latest_checkpoint(folder / "checkpoints")
    if path is None:
        raise SystemExit(f"{folder} holds no checkpoint")
    tensors, state = load_checkpoint(path)
    parts = assemble(cell)
    parts.learner.load_state(tensors, state["learner"])
    scores = judge(cell, parts, averaged=True)
    changes = {
        people: compare(_evaluation(base[people]), _evaluation(scores[people]), method="bootstrap").to_json()
        for people in scores
    }
    found = {"arm": cell.arm, "seed": cell.seed, "key": cell.key, "comparisons": changes, "scores": scores}
    write(cell.path, found)


def assemble(cell: Plan) -> build.Parts:
    """The cell's models without its training data, of which one example has to do."""
    train = cell.experiment.data.train
    one = train.model_copy(update={"args": {**train.args, "size": 1}})
    data = cell.experiment.data.model_copy(update={"train": one})
    return build.assemble(cell.experiment.model_copy(update={"data": data}))


def base_of(cell: Plan) -> dict[str, Any]:
    """Scores of the common base, and of the true pictures, made where they are missing or outdated.

    LoRA changes nothing before it is trained: any arm's start is the base.
    """
    path = CELLS / "base.json"
    if not shared.is_current(path, key := base_key(cell)):
        parts = assemble(cell)
        scores = judge(cell, parts, averaged=False)
        truth = {
            str(people): columns(target_scores(held_out(people, cell.pictures), witnesses(cell, parts)))
            for people in NUMBERS
        }
        write(path, {"key": key, "scores": scores, "truth": truth})
    return shared.read(path)


def base_key(cell: Plan) -> str:
    """What the base's scores depend on: how pictures are drawn and judged, and not how any arm is trained."""
    sections, experiment = ("policy", "rollout", "evaluation"), cell.experiment
    used = {name: getattr(experiment, name).model_dump(mode="json") for name in sections}
    everything = [used, experiment.train.precision, cell.data, shared.files_of(PIECES)]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def judge(cell: Plan, parts: build.Parts, *, averaged: bool) -> Scores:
    """Draw the held-out groups with the policy as it is and score them."""
    metrics = witnesses(cell, parts)
    return {
        str(people): columns(
            evaluate_held_out(
                cell.experiment, parts.learner, held_out(people, cell.pictures), metrics, averaged=averaged
            )
        )
        for people in NUMBERS
    }


def witnesses(cell: Plan, parts: build.Parts) -> dict[str, Reward]:
    """The experiment's metrics without its reward."""
    return {name: parts.metrics[name] for name in cell.experiment.evaluation.witnesses}


def held_out(people: int, pictures: int) -> list[Example]:
    """Groups of so many held-out people that nothing was chosen on."""
    world = TinyPeople("held_out", pictures, seed=SEEDS_OF_DATA[people], people=people)
    return [world[index] for index in range(pictures)]


def columns(evaluation: Evaluation) -> dict[str, list[float | None]]:
    """Each picture's scores by the names of `umo_verdicts.METRICS`: counts of faces are positive, and coverage is 100
    where ID-Conf applies and 0 where it does not."""
    found = evaluation.to_json()["scores"]
    counts = {
        name: [None if value is None else abs(value) for value in found[name]]
        for name in ("missing_faces", "extra_faces")
    }
    coverage = [
        None if sim is None else 100.0 * (conf is not None)
        for sim, conf in zip(found["id_sim"], found["id_conf"], strict=True)
    ]
    same = ("id_sim", "id_conf", "likeness", "apart", "layout")
    exact = {name: found[name] for name in same} | counts | {"coverage": coverage}
    return {
        name: [None if value is None else round(value, 5) for value in exact[name]] for name in umo_verdicts.METRICS
    }


def _evaluation(scores: Mapping[str, Sequence[float | None]]) -> Evaluation:
    numbers = range(len(next(iter(scores.values()))))
    return Evaluation.from_json({"example_ids": [str(number) for number in numbers], "scores": scores})


def write(path: Path, cell: Mapping[str, Any]) -> None:
    """A line for each key: the scores are many and nobody reads them by eye."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in cell.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def render(plans: Sequence[Plan], found: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown with its verdicts. `found` are the cells of `plans`."""
    arms: dict[str, list[Scores]] = {}
    for cell in found:
        arms.setdefault(cell["arm"], []).append(cell["scores"])
    base = base_of(plans[0])
    return umo_verdicts.render(arms, base["scores"], base["truth"], steps=plans[0].experiment.train.num_steps)


def main() -> None:
    description = (__doc__ or "").splitlines()[0]
    shared.make_table(description, TABLE, ARMS, plan=plan, run_cell=run_cell, render=render)


if __name__ == "__main__":
    main()
