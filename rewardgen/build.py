"""The composition root: an experiment becomes objects, and the objects a run."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rewardgen import plugins, sources, strict_yaml
from rewardgen.checkpoint import has_checkpoints, latest_checkpoint, load_checkpoint
from rewardgen.config import Experiment, plugins_in
from rewardgen.distributed import Processes, launched
from rewardgen.errors import CheckpointError, ConfigError, nearest
from rewardgen.evaluation.compare import Comparison, compare, render_markdown, render_table
from rewardgen.evaluation.evaluate import Evaluation
from rewardgen.evaluation.grid import save_grid
from rewardgen.evaluation.monitor import DriftError, without_statistics
from rewardgen.evaluation.score import target_scores
from rewardgen.fleet.inline import InlinePool
from rewardgen.held_out import evaluate_held_out, open_monitor, warn
from rewardgen.interrupt import resumable
from rewardgen.learner import Learner
from rewardgen.manifest import redact, write_manifest
from rewardgen.objective import Objective
from rewardgen.policy import Policy
from rewardgen.report import Reporter
from rewardgen.reward import Reward
from rewardgen.rollout import RolloutWorker
from rewardgen.scoring import ScoringWorker
from rewardgen.settings import Plugin
from rewardgen.sharding import ShardedPolicy, spread
from rewardgen.trainer import Dataset, Trainer, choose_device
from rewardgen.types import Example

CONFIG = "config.yaml"
_MAY_CHANGE = (
    "train.num_steps",
    "train.checkpoint_every",
    "train.keep_last",
    "train.keep_best",
    "train.keep_best_metric",
    "train.strategy",
    "train.batch_size",  # the trainer sees to it that a step has as many examples as before
    "train.accumulation",
    "evaluation",
    "monitor",
    "report",
)
"""What a resumed run may do differently without being another run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What an experiment is made of, on its device. `metrics` are the objective's rewards and the witnesses."""

    policy: Policy
    learner: Learner
    train_data: Dataset
    held_out: list[Example]
    metrics: dict[str, Reward]


def make(path: str, kind: plugins.Kind, plugin: Plugin) -> Any:
    """Construct a plug-in: fetch what its arguments name, check them against its signature, call it.

    Args:
        path: key path in the experiment, for messages.

    Raises:
        UserError: a source is missing, an argument does not fit, or the plug-in refuses it.
    """
    target = plugins.factory(plugins.resolve(kind, plugin.use))
    args = sources.materialise(plugin.args, f"{path}.args")
    return target(**plugins.check_args(target, args, f"{path}.args"))


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
    train_data = make("data.train", "data", experiment.data.train)
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
    policy.latent_shape(experiment.rollout.image_size)  # refuses a size the model cannot draw
    policy.enable_checkpointing(experiment.train.gradient_checkpointing)
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
    model is sharded all draw the evaluation's pictures, and only the first says what they are worth.

    Returns:
        Whether the run is finished; False where a signal ended it early.

    Raises:
        UserError: bad input, or a run that cannot go on.
    """
    _check_keep_best(experiment)
    require_sources(experiment)
    with launched(choose_device(experiment.train.device), experiment.train.strategy) as processes:
        return _train(experiment, folder or Path("runs") / experiment.name, processes, resume=resume)


def _train(experiment: Experiment, folder: Path, processes: Processes, *, resume: bool) -> bool:
    """One process's share of `train`."""
    console = _console(quiet=not processes.is_first)
    resolved = _resolved(experiment)
    reporter = Reporter(folder, experiment.report, num_steps=experiment.train.num_steps, experiment=resolved)
    if processes.is_first:
        _open_folder(folder, experiment, resume=resume)
    monitor = open_monitor(experiment, folder) if processes.is_first else None
    parts = assemble(experiment, processes)
    if processes.is_first:
        write_manifest(folder, experiment=resolved, weights=_weight_files(experiment), seeds={"run": experiment.seed})
    console.print(f"{experiment.name}: {_count(parts.policy)} parameters trained, run folder {folder}")
    evaluates = processes.is_first or isinstance(parts.policy, ShardedPolicy)
    start = _evaluate(experiment, parts, averaged=False, monitored=True) if evaluates else None
    base = start and without_statistics(start)
    made: dict[int, Evaluation | None] = {}  # the latest alone: it holds pictures

    def evaluate_now(step: int) -> dict[str, float]:
        made.clear()
        whole = _evaluate(experiment, parts, monitored=True) if evaluates else None
        made[step] = evaluation = whole and without_statistics(whole)
        found: list[str] = []
        if processes.is_first and whole is not None and evaluation is not None:
            reporter.evaluation(step, evaluation.means())
            found = warn(monitor, step, whole, parts.held_out, console)
        said = processes.exchange("an evaluation", [evaluation and dict(evaluation.means()), found])[0]
        if said[1] and experiment.monitor.stop_on_drift and step < experiment.train.num_steps:
            raise DriftError(f"stopped, because monitor.stop_on_drift is set: {'; '.join(said[1])}")
        means: dict[str, float] = said[0]
        return means

    trainer = Trainer(
        parts.learner,
        InlinePool(RolloutWorker(parts.policy, precision=experiment.train.precision)),
        parts.train_data,
        rollout=experiment.rollout,
        config=experiment.train,
        seed=experiment.seed,
        folder=folder,
        reporter=reporter,
        evaluate=evaluate_now,
        evaluate_every=experiment.evaluation.every,
        scoring=InlinePool(ScoringWorker(parts.learner.objective.sampled)),
    )
    first = trainer.resume() if resume and has_checkpoints(trainer.checkpoints) else 0
    command = _resume_command(experiment, folder, processes.size)
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
    comparison = _compare(parts, base, _evaluate(experiment, parts))
    if as_json:
        print(json.dumps({"checkpoint": str(path), "comparison": comparison.to_json()}, indent=1))
    else:
        console = _console()
        console.print(f"{path} against the starting point")
        console.print(render_table(comparison))


def check(experiment: Experiment) -> None:
    """Print the resolved experiment, what it reads and whether that is here, and what would be trained.

    Nothing is fetched. Weights are read only where all of the policy's are here.

    Raises:
        UserError: a bundled asset is missing, or local weights do not fit together.
    """
    console = _console()
    console.print(_as_yaml(experiment), markup=False, highlight=False, end="\n\n")
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
    if not any(source.path.startswith("policy.") for source in missing):
        policy = make("policy", "policies", experiment.policy)
        policy.latent_shape(experiment.rollout.image_size)
        console.print(f"trained: {_count(policy)} parameters in {len(policy.trainable())} tensors")


def _finish(experiment: Experiment, parts: Parts, base: Evaluation, trained: Evaluation, folder: Path) -> None:
    console = _console()
    with parts.learner.averaged():
        weights = parts.policy.save(folder / "weights")
    if not parts.learner.processes.is_first:
        return
    comparison = _compare(parts, base, trained)
    (folder / "comparison.json").write_text(json.dumps(comparison.to_json(), indent=1) + "\n", encoding="utf-8")
    (folder / "comparison.md").write_text(render_markdown(comparison), encoding="utf-8")
    console.print(render_table(comparison))
    if experiment.evaluation.grid_examples:
        grid = save_grid(folder / "grid.png", parts.held_out[: experiment.evaluation.grid_examples], base, trained)
        console.print(f"pictures: {grid}")
    console.print(f"weights: {', '.join(str(path) for path in weights.values())}")


def _evaluate(experiment: Experiment, parts: Parts, *, averaged: bool = True, monitored: bool = False) -> Evaluation:
    held_out = (parts.held_out, parts.metrics)
    return evaluate_held_out(experiment, parts.learner, *held_out, averaged=averaged, monitored=monitored)


def _compare(parts: Parts, base: Evaluation, trained: Evaluation) -> Comparison:
    return compare(base, trained, ceiling=target_scores(parts.held_out, parts.metrics))


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


def _resume_command(experiment: Experiment, folder: Path, num_processes: int) -> str:
    """What goes on with a run, from the same working directory: its resolved experiment is an experiment file too."""
    resume = ["--output", str(folder), "--resume"]
    if _resolved(experiment) != experiment.model_dump(mode="json"):  # it lacks the secrets
        return f"the command that began it, and {shlex.join(resume)}"
    program = ["rewardgen"]
    if num_processes > 1:
        program = ["torchrun", "--nproc-per-node", str(num_processes), "-m", "rewardgen"]
    return shlex.join([*program, "train", str(folder / CONFIG), *resume])


def _open_folder(folder: Path, experiment: Experiment, *, resume: bool) -> None:
    """Make the run's folder, or see that the one that is there is this run's."""
    config, checkpoints = folder / CONFIG, folder / "checkpoints"
    begun = has_checkpoints(checkpoints)
    if begun and not resume:
        raise ConfigError(f"{folder} holds a run already: go on with --resume, or choose another --output")
    if resume and not begun and not config.is_file():  # one that died before its first checkpoint begins again
        raise ConfigError(f"{folder} holds no run to resume; start it without --resume")
    if resume and config.is_file():
        changed = _differences(strict_yaml.load_file(config)[0], _resolved(experiment))
        refused = [key for key in changed if not any(f"{key}.".startswith(f"{may}.") for may in _MAY_CHANGE)]
        if refused:
            raise ConfigError(f"{config} is of another experiment, it differs in {', '.join(refused)}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = config.with_name(f".{CONFIG}")  # death amid the write must not cost the run its experiment
        temporary.write_text(_as_yaml(experiment), encoding="utf-8")
        temporary.replace(config)
    except OSError as error:
        raise ConfigError(f"{folder}: the run's folder cannot be written: {(error.strerror or '').lower()}") from None


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Key paths at which two nested mappings differ."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return [] if old == new else [path]
    keys = sorted({*old, *new})
    return [found for key in keys for found in _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]


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


def _resolved(experiment: Experiment) -> dict[str, Any]:
    """Everything an experiment says, secrets blotted out: this is what is shown and kept."""
    resolved: dict[str, Any] = redact(experiment.model_dump(mode="json"))
    return resolved


def _as_yaml(experiment: Experiment) -> str:
    return strict_yaml.dump(_resolved(experiment))


def _count(policy: Policy) -> str:
    return f"{sum(parameter.numel() for parameter in policy.trainable().values()):,}"
