"""The baselines that a reviewer asks for first, from one base and at equal DiT evaluations, three seeds.

    python benchmarks/baselines.py                                # train what is missing, then write the table
    python benchmarks/baselines.py --arm "draft, last 2 steps" --seed 1 --seed 2           # only these cells
    python benchmarks/baselines.py --check                        # train nothing: are the committed cells current?

**The unit** is one forward pass of the DiT on one picture, without gradient: 1. A backward pass is 2 more (the usual
count: a product for the gradient of the inputs and one for that of the weights, though with LoRA the second is
smaller), and 1 more where it computes activations again. So a step costs, for each picture of the batch,

    flow matching   1 + 2
    refl            (mean of entry_range) + 1 + 2
    draft           (num_steps - k) + k (1 + 2)
    samples         N (num_steps + S (1 + 2)), S + S where the base is asked too; N drawn, S places learned from in each

(all but drawing and the base's pass as often as there are updates on the same samples), and best of N costs, before its
training, N * num_steps for each example drawn. The budget is that of the SRL arm; the other arms get the number of
steps that comes nearest to it. Entry steps enter with their mean, not as a seed drew them. Not counted: encoders,
autoencoder, rewards, optimizer and the evaluation on held-out pairs.

All arms have the experiment's own settings, which were chosen for SRL; only what an arm is named after differs.
A schedule of the learning rate is stretched with the number of steps.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for a caller that is no neighbour

import cells as shared
import srl_table
from cells import METRICS, key_of

from rewardgen import plugins
from rewardgen.config import Experiment
from rewardgen.objective import FLOW_MATCHING, FlowMatchingConfig, TermConfig, learns_from_samples
from rewardgen.policy_gradient import GrpoConfig, NftConfig

CELLS = shared.RESULTS / "baselines"
TABLE = shared.RESULTS / "baselines.md"
STYLE_ALONE = "objective.rewards.content.weight=0"
DRAWS = 4
"""N of best of N: its best picture is on average about one standard deviation better than a single one."""
DRAWN_SHARE = 0.5
"""The part of the budget that best of N spends on drawing; the other goes into training on what was kept."""
SRL, BEST = "SRL", f"supervised, best of {DRAWS} by CSD"
ALONE, FREE = "SRL, style reward alone", "style reward alone, no flow matching"
ARMS: Mapping[str, tuple[str, ...]] = {
    "supervised, more steps": srl_table.NO_REWARD,
    BEST: srl_table.NO_REWARD,
    SRL: (),
    ALONE: (STYLE_ALONE,),
    "draft, last 2 steps": ("rollout.window={kind: draft, k: 2}",),  # with one it would be refl at the last step
    FREE: (STYLE_ALONE, "objective.flow_matching.weight=0"),
}
SECONDS_PER_EVALUATION = 0.01
"""On two cores, for the ledger only: 130 steps of SRL take four minutes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """Best of N before training: `n` pictures for each of the first `num_examples` training examples."""

    n: int
    num_examples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a cell trains. `evaluations` is its expected cost, drawing included, in the unit above."""

    arm: str
    seed: int
    experiment: Experiment
    evaluations: float
    drawing: Drawing | None = None

    @property
    def path(self) -> Path:
        """The cell's file; the SRL arm has the headline table's."""
        if self.arm == SRL:
            return srl_table.path_of(SRL, self.seed)
        return CELLS / f"{re.sub('[^a-z0-9]+', '_', self.arm.lower())}-{self.seed}.json"

    @property
    def key(self) -> str:
        return key_of(self.experiment, best_of_n=asdict(self.drawing)) if self.drawing else key_of(self.experiment)

    @property
    def seconds(self) -> float:
        """A rough guess, with the evaluations before and after training."""
        judged = 2 * self.experiment.evaluation.num_examples * self.experiment.rollout.num_steps
        return SECONDS_PER_EVALUATION * (self.evaluations + judged)


def step_evaluations(experiment: Experiment, step: int) -> float:
    """Expected DiT evaluations of one optimizer step, in the unit of this file."""
    objective, train, window = experiment.objective, experiment.train, experiment.rollout.window
    pictures, backward = train.batch_size * train.accumulation, 2 + train.gradient_checkpointing
    terms: dict[str, FlowMatchingConfig | TermConfig] = {FLOW_MATCHING: objective.flow_matching, **objective.rewards}
    active = {name for name, term in terms.items() if term.weight > 0 and step >= term.start_step}
    sampled: set[str] = set()
    drawn, updates = 0.0, 1
    if objective.policy_gradient is not None:
        reward_of = {name: plugins.resolve("rewards", term.use) for name, term in objective.rewards.items()}
        sampled = {name for name, term in objective.rewards.items() if learns_from_samples(term, reward_of[name])}
    if active & sampled and objective.policy_gradient is not None:
        drawn, updates = _sample_evaluations(objective.policy_gradient, experiment.rollout.num_steps, backward)
    cost = 0.0
    if FLOW_MATCHING in active:
        cost += updates * (1 + backward)
    rewards = len(active - sampled - {FLOW_MATCHING})
    if rewards:
        entry = sum(window.entry_bounds(experiment.rollout.num_steps)) / 2
        chained = window.kind != "refl"
        length = experiment.rollout.num_steps - entry if chained else 1
        # Rewards share a backward pass through the policy only where their gradients need not be told apart.
        passes = rewards if train.term_grad_norms or train.accumulation > 1 else 1
        cost += entry + updates * length * (1 + passes * (backward + (chained and window.checkpoint_steps)))
    return pictures * (cost + drawn)


def _sample_evaluations(config: GrpoConfig | NftConfig, num_steps: int, backward: int) -> tuple[float, int]:
    """What the samples of one example cost in a step, and the number of updates on them."""
    if isinstance(config, GrpoConfig):
        places = config.window.size if config.window else num_steps - 1
    else:
        places = config.times_per_sample
    learned = places * (config.num_iterations * (1 + backward) + (config.beta > 0))
    return config.num_generations * (num_steps + learned), config.num_iterations


def plan(arm: str, seed: int, overrides: Sequence[str] = ()) -> Plan:
    """Choose a cell's number of steps such that it costs what the SRL arm costs, as nearly as whole steps allow.

    Args:
        overrides: of the SRL arm, for tests; the other arms follow from it.
    """
    srl = srl_table.experiment_of(SRL, seed, overrides)
    budget = sum(step_evaluations(srl, step) for step in range(srl.train.num_steps))
    if arm == SRL:
        return Plan(arm=arm, seed=seed, experiment=srl, evaluations=budget)
    experiment = shared.load(seed, [*overrides, *ARMS[arm]])
    drawing, spent = None, 0.0
    if arm == BEST:
        each = DRAWS * experiment.rollout.num_steps
        whole = int(experiment.data.train.args["size"])
        drawing = Drawing(n=DRAWS, num_examples=max(1, min(whole, int(DRAWN_SHARE * budget / each))))
        spent = float(each * drawing.num_examples)
    num_steps = 0
    while spent + (cost := step_evaluations(experiment, num_steps)) / 2 <= budget or not num_steps:
        spent, num_steps = spent + cost, num_steps + 1
    lengths = [f"train.num_steps={num_steps}"]
    if srl.optimizer.decay_steps is not None:
        decay_steps = math.ceil(srl.optimizer.decay_steps * num_steps / srl.train.num_steps)
        lengths.append(f"optimizer.decay_steps={decay_steps}")
    experiment = shared.load(seed, [*overrides, *ARMS[arm], *lengths])
    return Plan(arm=arm, seed=seed, experiment=experiment, evaluations=spent, drawing=drawing)


def run_cell(cell: Plan, runs: Path) -> None:
    """Train one cell and write its file."""
    folder = runs / cell.path.stem
    experiment = cell.experiment
    drawn: dict[str, Any] = {}
    if cell.drawing:
        data, drawn = draw(experiment, cell.seed, cell.drawing, folder.with_name(f"{folder.name}-data"))
        source = {"use": "jsonl", "args": {"path": str(data)}}
        experiment = Experiment.model_validate(
            experiment.model_dump() | {"data": experiment.data.model_dump() | {"train": source}}
        )
    comparison = shared.train(experiment, folder)
    found = {"arm": cell.arm, "seed": cell.seed, "key": cell.key, **drawn, "comparison": comparison}
    shared.write(cell.path, found)


def draw(experiment: Experiment, seed: int, drawing: Drawing, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Draw with the base, keep the best, write them as a dataset; returns its file and what is worth telling."""
    from rewardgen import build
    from rewardgen.curation.best_of_n import best_of_n, save_choices

    parts = build.assemble(experiment)
    choices = best_of_n(
        parts.policy,
        parts.metrics["style"],
        [parts.train_data[index] for index in range(drawing.num_examples)],
        n=drawing.n,
        seed=seed,
        image_size=experiment.rollout.image_size,
        num_steps=experiment.rollout.num_steps,
        batch_size=experiment.train.batch_size,
        precision=experiment.train.precision,
    )
    scores = [choice.score for choice in choices if choice.score is not None]
    told = {"examples": len(choices), "without_a_score": len(choices) - len(scores)}
    mean = sum(scores) / len(scores) if scores else None
    return save_choices(choices, folder), {"best_of_n": told | {"mean_score": mean}}


def render(plans: Sequence[Plan], found: Sequence[Mapping[str, Any]]) -> str:
    """Tables in Markdown: each arm's mean over its seeds; folded, every cell. `found` are the cells of `plans`."""
    pairs = list(zip(plans, map(shared.rows_of, found), strict=True))
    first = pairs[0][1]
    ceiling, base = ([f"{first[metric][which]:.3f}" for metric in METRICS] for which in ("ceiling", "base"))
    rows = [["truth", "", "", *ceiling, ""], ["base", "", "", *base, ""]]
    for arm in dict.fromkeys(cell.arm for cell in plans):
        group = [(cell, rows) for cell, rows in pairs if cell.arm == arm]
        rows.append([arm, *_cost(group[0][0]), *shared.changes(_mean([rows for _, rows in group]))])
    every = [[f"{cell.arm}, seed {cell.seed}", *_cost(cell), *shared.changes(rows)] for cell, rows in pairs]
    seeds = ", ".join(map(str, sorted({cell.seed for cell in plans})))
    note = (
        f"Means over seeds {seeds}; {found[0]['comparison']['num_examples']} held-out pairs. In brackets the change"
        " from the base with its paired 95 % interval: the mean of the seeds' limits, which is no narrower than an"
        " interval of the mean would be. All arms cost the same DiT evaluations (a forward pass of one picture is 1,"
        f' with its backward pass 3), as nearly as whole steps allow. "{FREE}" has nothing that holds it to the data:'
        f" it is the arm that may hack the reward, to be read by its witnesses. {shared.WITNESSES}"
    )
    header = shared.header("steps", "DiT evaluations")
    folded = ["<details><summary>Seed by seed</summary>", "", *header, *map(shared.line, every), "", "</details>"]
    return "\n".join([*header, *map(shared.line, rows), "", note, "", *folded]) + "\n"


def _cost(cell: Plan) -> list[str]:
    return [str(cell.experiment.train.num_steps), f"{cell.evaluations:,.0f}"]


def _mean(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean over seeds, number by number. The standard deviation of a mean is at most the mean of the deviations."""

    def mean(values: Sequence[Any]) -> Any:
        if isinstance(values[0], Mapping):
            return {name: mean([value[name] for value in values]) for name in values[0]}
        numbers = all(isinstance(value, int | float) for value in values)
        return sum(values) / len(values) if numbers else values[0]

    averaged: dict[str, Any] = mean(tables)
    return averaged


def main() -> None:
    description = (__doc__ or "").splitlines()[0]
    shared.make_table(description, TABLE, ARMS, plan=plan, run_cell=run_cell, render=render)


if __name__ == "__main__":
    main()
