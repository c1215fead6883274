"""The composition root: an experiment becomes objects, and the objects a run."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from rewardgen import fitting, sources
from rewardgen.checkpoint import has_checkpoints, latest_checkpoint, load_checkpoint
from rewardgen.config import Experiment, plugins_in
from rewardgen.construct import make as make
from rewardgen.data.buckets import BucketedDataset
from rewardgen.distributed import Processes, launched
from rewardgen.errors import CheckpointError, ConfigError, nearest
from rewardgen.evaluation.compare import Comparison, compare, render_markdown, render_table
from rewardgen.evaluation.evaluate import Evaluation
from rewardgen.evaluation.faces_grid import save_faces_grid
from rewardgen.evaluation.grid import save_grid
from rewardgen.evaluation.monitor import DriftError, without_statistics
from rewardgen.evaluation.score import target_scores
from rewardgen.fleet.inline import InlinePool
from rewardgen.fleet.pool import Pool
from rewardgen.held_out import Tally, evaluate_held_out, open_monitor, warn
from rewardgen.interrupt import resumable
from rewardgen.learner import Learner
from rewardgen.learners import train_on_cluster
from rewardgen.manifest import write_manifest
from rewardgen.objective import Objective
from rewardgen.policy import Policy
from rewardgen.report import Reporter
from rewardgen.reward import Reward
from rewardgen.run_folder import as_yaml, open_folder, resolved_settings, resume_command
from rewardgen.scoring import ScoringWorker
from rewardgen.sharding import ShardedPolicy, spread
from rewardgen.trainer import Dataset, Trainer, choose_device
from rewardgen.types import Example
from rewardgen.workers import inline_workers, ray_judges, ray_workers, share_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What an experiment is made of, on its device. `metrics` are the objective's rewards and the witnesses."""

    policy: Policy
    learner: Learner
    train_data: Dataset
    held_out: list[Example]
    metrics: dict[str, Reward]


def require_sources(experiment: Experiment) -> None:
    """Refuse an experiment whose bundled assets are not there, before anything is read. Raises ConfigError."""
    for path, _, plugin in plugins_in(experiment):
        for source in sources.find_sources(plugin.args, f"{path}.args"):
            sources.require(source)


def assemble(experiment: Experiment, processes: Processes | None = None) -> Parts:
    """Make everything an experiment names. Data come first: they are cheap, and their faults are the common ones.

    Args:
        processes: those that train together; each must call this.

    Raises:
        UserError: something is missing, damaged or does not fit.
    """
    require_sources(experiment)
    processes = processes or Processes()
    device = processes.device or choose_device(experiment.train.device)
    train_data: Dataset = make("data.train", "data", experiment.data.train)
    if experiment.rollout.buckets is not None:
        train_data = BucketedDataset(train_data, experiment.rollout.buckets)
    held_out = _first(make("data.held_out", "data", experiment.data.held_out), experiment.evaluation.num_examples)
    rewards = {
        name: make(f"objective.rewards.{name}", "rewards", term) for name, term in experiment.objective.rewards.items()
    }
    witnesses = {
        name: make(f"evaluation.witnesses.{name}", "rewards", plugin).requires_grad_(False).eval().to(device)
        for name, plugin in experiment.evaluation.witnesses.items()
    }
    objective = Objective(experiment.objective, rewards).to(device)
    policy: Policy = make("policy", "policies", experiment.policy)
    policy = spread(policy, processes, experiment.train.strategy).to(device)
    for size in (experiment.rollout.image_size, *(experiment.rollout.buckets or ())):
        policy.latent_shape(size)  # refuses what the model cannot draw
    policy.enable_checkpointing(experiment.train.gradient_checkpointing)
    if experiment.train.compile:
        policy.compile_blocks()
    learner = Learner(
        policy,
        objective,
        optimizer=experiment.optimizer,
        window=experiment.rollout.window,
        precision=experiment.train.precision,
        ema_decay=experiment.train.ema_decay,
        max_nonfinite_steps=experiment.train.max_nonfinite_steps,
        term_grad_norms=experiment.train.term_grad_norms,
        processes=processes,
    )
    return Parts(
        policy=policy, learner=learner, train_data=train_data, held_out=held_out, metrics=objective.rewards | witnesses
    )


def train(experiment: Experiment, *, folder: Path | None = None, resume: bool = False) -> bool:
    """Train, evaluate before and after, and leave everything in the run's folder.

    The folder holds the resolved experiment, `manifest.json`, `metrics.jsonl`, checkpoints, the trained parts in
    their official format (`weights/`), the comparison and the picture grid.

    Several processes, started by a launcher, each call this. The first one writes, prints and evaluates; where the
    model is sharded all draw the evaluation's pictures, and only the first says what they are worth. With
    `fleet.placement: colocated` one process calls it, and starts them on a Ray cluster.

    Returns:
        Whether the run is finished; False where a signal ended it early.

    Raises:
        UserError: bad input, or a run that cannot go on.
    """
    _check_keep_best(experiment)
    require_sources(experiment)
    folder = folder or Path("runs") / experiment.name
    if experiment.fleet.places_learners:
        learner = partial(_train_here, experiment, folder, resume=True)
        return train_on_cluster(experiment, learner, folder, resume=resume)
    return _train_here(experiment, folder, resume=resume)


def _train_here(experiment: Experiment, folder: Path, *, resume: bool) -> bool:
    with launched(choose_device(experiment.train.device), experiment.train.strategy) as processes, ExitStack() as stack:
        return _train(experiment, folder, processes, stack, resume=resume)


def _train(experiment: Experiment, folder: Path, processes: Processes, stack: ExitStack, *, resume: bool) -> bool:
    """One process's share of `train`. What must be closed in the end goes onto the stack."""
    console = _console(quiet=not processes.is_first)
    resolved = resolved_settings(experiment)
    reporter = Reporter(folder, experiment.report, num_steps=experiment.train.num_steps, experiment=resolved)
    if processes.is_first:
        open_folder(folder, experiment, resume=resume)
    monitor = open_monitor(experiment, folder) if processes.is_first else None
    # They load their weights while this process does.
    remote = _closed_by(stack, ray_workers(share_of(experiment, processes), processes))
    judges = _closed_by(stack, ray_judges(experiment))
    parts = assemble(experiment, processes)
    pool = remote or inline_workers(experiment, parts.policy)
    scoring = judges or _closed_by(stack, InlinePool(ScoringWorker(parts.learner.objective.sampled)))
    if processes.is_first:
        write_manifest(folder, experiment=resolved, weights=_weight_files(experiment), seeds={"run": experiment.seed})
    tally = Tally(folder)
    if processes.is_first:
        stack.enter_context(tally)  # written however the run ends
    console.print(f"{experiment.name}: {_count(parts.policy)} parameters trained, run folder {folder}")
    evaluates = processes.is_first or isinstance(parts.policy, ShardedPolicy)
    start = _evaluate(experiment, parts, averaged=False, monitored=True) if evaluates else None
    tally.add(start)
    base = start and without_statistics(start)
    made: dict[int, Evaluation | None] = {}  # the latest alone: it holds pictures

    def evaluate_now(step: int) -> dict[str, float]:
        made.clear()
        whole = _evaluate(experiment, parts, monitored=True) if evaluates else None
        tally.add(whole)
        made[step] = evaluation = whole and without_statistics(whole)
        found: list[str] = []
        if processes.is_first and whole is not None and evaluation is not None:
            reporter.evaluation(step, evaluation.means())
            found = warn(monitor, step, whole, parts.held_out, console)
        said = processes.exchange("an evaluation", [evaluation and dict(evaluation.means()), found])[0]
        means: dict[str, float] = said[0]
        if said[1] and experiment.monitor.stop_on_drift and step < experiment.train.num_steps:
            trainer.save(means)
            raise DriftError(f"stopped, because monitor.stop_on_drift is set: {'; '.join(said[1])}")
        return means

    trainer = Trainer(
        parts.learner,
        pool,
        parts.train_data,
        rollout=experiment.rollout,
        config=experiment.train,
        seed=experiment.seed,
        staleness=experiment.fleet.staleness,
        folder=folder,
        reporter=reporter,
        evaluate=evaluate_now,
        evaluate_every=experiment.evaluation.every,
        scoring=scoring,
    )
    first = trainer.resume() if resume and has_checkpoints(trainer.checkpoints) else 0
    command = resume_command(experiment, folder, processes.size)
    with resumable(trainer.checkpoints, command):
        with reporter:
            if processes.is_first and base is not None:
                reporter.start(first)
                reporter.evaluation(0, base.means())
                if monitor is not None and start is not None:
                    monitor.begin(start, first)
            outcome = trainer.run()
            if not outcome.interrupted and outcome.completed_steps not in made:
                evaluate_now(outcome.completed_steps)
        if outcome.interrupted:
            console.print(f"stopped after step {outcome.completed_steps}; go on with --resume --output {folder}:")
            console.print(f"  {command}", highlight=False, markup=False)
            return False
        trained = made[outcome.completed_steps]
        if base is not None and trained is not None:
            _finish(experiment, parts, base, trained, folder)
    return True


def _closed_by(stack: ExitStack, pool: Pool | None) -> Pool | None:
    return None if pool is None else stack.enter_context(closing(pool))


def evaluate_checkpoint(
    experiment: Experiment, *, run: Path | None, checkpoint: Path | None, as_json: bool = False
) -> None:
    """Compare a checkpoint with the experiment's starting point on held-out examples, and print it.

    Args:
        run: a run's folder, whose latest whole checkpoint is taken; or else
        checkpoint: the folder of one checkpoint.

    Raises:
        UserError: not exactly one of the two, or a checkpoint that does not belong to the experiment.
    """
    if (run is None) == (checkpoint is None):
        raise ConfigError("name what to evaluate: either --run DIR or --checkpoint DIR")
    require_sources(experiment)
    path = checkpoint or latest_checkpoint((run or Path()) / "checkpoints")
    if path is None:
        raise CheckpointError(f"{run} holds no whole checkpoint")
    tensors, state = load_checkpoint(path)
    parts = assemble(experiment)
    base = _evaluate(experiment, parts, averaged=False)
    parts.learner.load_state(tensors, state.get("learner", {}))
    comparison = _compare(experiment, parts, base, _evaluate(experiment, parts))
    if as_json:
        print(json.dumps({"checkpoint": str(path), "comparison": comparison.to_json()}, indent=1))
    else:
        console = _console()
        console.print(f"{path} against the starting point")
        console.print(render_table(comparison))


def check(experiment: Experiment, *, plan: bool | None = None, device_bytes: float | None = None) -> None:
    """Print the resolved experiment, what it reads and whether that is here, and what would be trained.

    Nothing is fetched. Weights are read only where all of the policy's are here. `plan` adds what a step needs
    (`fitting.describe`); None does where weights are not here. Raises UserError: an asset or weights do not fit.
    """
    console = _console()
    console.print(as_yaml(experiment), markup=False, highlight=False, end="\n\n")
    _check_keep_best(experiment)
    require_sources(experiment)
    console.print("what it reads:")
    missing = []
    for path, _, plugin in plugins_in(experiment):
        for source in sources.find_sources(plugin.args, f"{path}.args"):
            place = f"in {source.location}" if source.location else "not here"
            console.print(f"  {source.path}: {source.text} ({source.kind}), {place}", highlight=False, markup=False)
            missing += [source] if source.location is None else []
    hub = [source.text for source in missing if source.kind.startswith("hub")]
    local = [source.text for source in missing if source.kind == "local"]
    if hub:
        console.print(f"to be fetched from the hub when training starts: {', '.join(hub)}")
    if local:
        console.print(f"to be put in place before training: {', '.join(local)}")
    if not (absent := any(source.path.startswith("policy.") for source in missing)):
        policy = make("policy", "policies", experiment.policy)
        policy.latent_shape(experiment.rollout.image_size)
        console.print(f"trained: {_count(policy)} parameters in {len(policy.trainable())} tensors")
    if plan or (plan is None and absent):
        lines = fitting.describe(experiment, device_bytes, required=bool(plan))
        console.print("\n".join(lines), highlight=False, markup=False)


def _finish(experiment: Experiment, parts: Parts, base: Evaluation, trained: Evaluation, folder: Path) -> None:
    console = _console()
    with parts.learner.averaged():
        weights = parts.policy.save(folder / "weights")
    if not parts.learner.processes.is_first:
        return
    comparison = _compare(experiment, parts, base, trained)
    (folder / "comparison.json").write_text(json.dumps(comparison.to_json(), indent=1) + "\n", encoding="utf-8")
    (folder / "comparison.md").write_text(render_markdown(comparison), encoding="utf-8")
    console.print(render_table(comparison))
    if experiment.evaluation.grid_examples:
        shown = parts.held_out[: experiment.evaluation.grid_examples]
        console.print(f"pictures: {save_grid(folder / 'grid.png', shown, base, trained)}")
        if faces := save_faces_grid(folder / "faces.png", shown, base, trained, parts.metrics):
            console.print(f"matched faces: {faces}")
    console.print(f"weights: {', '.join(str(path) for path in weights.values())}")


def _evaluate(experiment: Experiment, parts: Parts, *, averaged: bool = True, monitored: bool = False) -> Evaluation:
    # With a sharded model all processes draw; what the pictures are worth is asked once, also of a judge who is paid.
    held_out = (parts.held_out, parts.metrics if parts.learner.processes.is_first else {})
    return evaluate_held_out(experiment, parts.learner, *held_out, averaged=averaged, monitored=monitored)


def _compare(experiment: Experiment, parts: Parts, base: Evaluation, trained: Evaluation) -> Comparison:
    ceiling = target_scores(parts.held_out, parts.metrics, batch_size=experiment.evaluation.batch_size)
    return compare(base, trained, ceiling=ceiling)


def _check_keep_best(experiment: Experiment) -> None:
    """Refuse to keep the best by a metric that nobody measures during training. Raises ConfigError."""
    settings, every = experiment.train, experiment.evaluation.every
    metrics = [*experiment.objective.rewards, *experiment.evaluation.witnesses]
    metric = settings.keep_best_metric
    if metric is not None and metric not in metrics:
        hint = nearest(metric, metrics) or f" There are: {', '.join(metrics) or 'none'}."
        raise ConfigError(f"train.keep_best_metric: the evaluation has no metric '{metric}'.{hint}")
    if settings.keep_best and not 0 < every <= settings.num_steps:
        raise ConfigError(
            f"train.keep_best: nothing is evaluated during {settings.num_steps} steps of training with"
            f" evaluation.every = {every}; set that to the number of steps between evaluations"
        )


def _first(dataset: Dataset, number: int) -> list[Example]:
    if len(dataset) < number:
        raise ConfigError(f"evaluation.num_examples is {number}, but data.held_out has only {len(dataset)} examples")
    return [dataset[index] for index in range(number)]


def _weight_files(experiment: Experiment) -> dict[str, Path]:
    found = {
        source.path: source.location
        for path, _, plugin in plugins_in(experiment)
        for source in sources.find_sources(plugin.args, f"{path}.args")
    }
    return {path: place for path, place in found.items() if place is not None}


def _console(*, quiet: bool = False) -> Console:
    """Lines are left whole, and what is not read on a terminal has room for tables."""
    return Console(width=None if sys.stdout.isatty() else 160, soft_wrap=True, quiet=quiet)


def _count(policy: Policy) -> str:
    return f"{sum(parameter.numel() for parameter in policy.trainable().values()):,}"
