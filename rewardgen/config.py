"""Experiments: strict YAML -> typed, frozen configuration. Flavors and overrides are overlays on it.

Loading reads the file, imports the plug-ins' modules and compares their signatures. It reads no weight, opens no data
and contacts no host.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, Field, ValidationError

from rewardgen import plugins, strict_yaml
from rewardgen.errors import ConfigError, UserError, nearest
from rewardgen.evaluation.evaluate import EvaluationConfig
from rewardgen.evaluation.monitor import MonitorConfig
from rewardgen.fleet.pool import FleetConfig
from rewardgen.learner import OptimizerConfig
from rewardgen.manifest import blot, blot_entries, is_secret
from rewardgen.objective import ObjectiveConfig, check_learnable, composition_faults, learns_from_samples
from rewardgen.report import ReportConfig
from rewardgen.rollout import RolloutConfig
from rewardgen.settings import Plugin, Settings, SparseSettings
from rewardgen.trainer import TrainConfig

Fault = tuple[str, str]
"""(dotted key path, message)."""

DEFAULT_FLAVOR = "tiny"
_NAME = re.compile(r"[\w.\-]+")
"""Of a reward or witness: it becomes a key of reports, a column of tables and a part of overrides."""
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_LONGEST_FAULT = 500
_WORDS = {"fleet": "pool"}
"""Sections that a word may stand for, and the key it is the value of: `fleet: ray` is `fleet: {pool: ray}`."""


class DataConfig(Settings):
    """The two datasets of a run."""

    train: Plugin
    """What the policy is trained on."""
    held_out: Plugin
    """What it is judged on; no example of it may occur in `train`."""


class Experiment(SparseSettings):
    """Everything a run depends on. One file, one of its flavors, and the overrides."""

    sparse: ClassVar[frozenset[str]] = frozenset({"monitor"})

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Names the run's folder."""
    seed: int = Field(default=0, ge=0)
    """All randomness derives from it."""
    policy: Plugin
    """The model that is trained."""
    data: DataConfig
    rollout: RolloutConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    fleet: FleetConfig = Field(default_factory=FleetConfig)
    report: ReportConfig = Field(default_factory=ReportConfig)
    monitor: MonitorConfig = MonitorConfig()


def flavors_of(path: Path) -> list[str]:
    """The flavors an experiment file offers, in its order; empty where it has none. Raises ConfigError."""
    raw, _ = strict_yaml.load_file(path)
    return list(_flavors(raw, path))


def load_experiment(path: Path, flavor: str | None = None, overrides: Sequence[str] = ()) -> Experiment:
    """Read and check an experiment.

    Args:
        path: YAML file.
        flavor: one of the file's `flavors`; None takes `tiny` where there is one, else the first.
        overrides: `dotted.key=value` with the value in YAML, applied last.

    Raises:
        ConfigError: every fault found, one line each: key path, line in the file, nearest valid key.
    """
    raw, lines = strict_yaml.load_file(path)
    flavors = _flavors(raw, path)
    base = _spelled_out({key: value for key, value in raw.items() if key != "flavors"})
    chosen = flavor or (DEFAULT_FLAVOR if DEFAULT_FLAVOR in flavors else next(iter(flavors), None))
    if chosen is not None and chosen not in flavors:
        guess = nearest(chosen, flavors) or f" There are: {', '.join(flavors) or 'none'}."
        raise ConfigError(f"{path} has no flavor '{chosen}'.{guess}")
    changes = _parse_overrides(overrides)
    merged = overlay(overlay(base, _spelled_out(flavors.get(chosen, {}) if chosen else {})), changes)
    experiment, faults = None, list(strict_yaml.unusable(merged))
    if not faults:
        experiment, faults = _validate(merged)
        faults += _check_plugins(merged)
    if experiment is not None and not faults:
        faults += list(_cross_checks(experiment))
    if faults or experiment is None:
        raise ConfigError(_message(path, chosen, faults, lines, changes))
    return experiment


def overlay(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `top` over `base`, key by key and deeply; lists and values are replaced.

    Where `top` names another plug-in (`use`) the arguments of the old one do not carry over; where it names another
    `kind` nothing does.
    """
    merged = dict(copy.deepcopy(dict(base)))
    if "kind" in top and "kind" in merged and top["kind"] != merged["kind"]:
        merged = {}
    if "use" in top and "use" in merged and top["use"] != merged["use"]:
        merged.pop("args", None)
    for key, value in top.items():
        old = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(old, Mapping)
        merged[key] = overlay(old, value) if both and isinstance(old, Mapping) else copy.deepcopy(value)
    return merged


def plugins_in(experiment: Experiment) -> Iterator[tuple[str, plugins.Kind, Plugin]]:
    """Every plug-in of an experiment with its key path and kind."""
    for path, kind, value in _find_plugins(experiment.model_dump()):
        yield path, kind, Plugin(use=value["use"], args=value["args"])


def _flavors(raw: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    flavors = raw.get("flavors", {})
    if not isinstance(flavors, dict):
        raise ConfigError(f"{path}: flavors: must be a mapping from a name to what it changes")
    for name, changes in flavors.items():
        place = f"{path}: flavors.{strict_yaml.show(name)}"
        if changes is not None and not isinstance(changes, dict):
            raise ConfigError(f"{place}: must be a mapping, not {strict_yaml.describe(changes)}")
        if "flavors" in (changes or {}):
            raise ConfigError(f"{place}.flavors: a flavor has no flavors")
    return {name: changes or {} for name, changes in flavors.items()}


def _spelled_out(tree: Mapping[str, Any]) -> dict[str, Any]:
    """With the sections that a word stands for written out."""
    return {k: {_WORDS[k]: value} if k in _WORDS and isinstance(value, str) else value for k, value in tree.items()}


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for override in overrides:
        key, equals, written = override.partition("=")
        parts = key.strip().split(".")
        text = strict_yaml.show(blot_entries(override))
        if not equals or not all(parts) or len(parts) > strict_yaml.MAX_DEPTH:
            raise ConfigError(f"override '{text}': expected 'dotted.key=value', as in 'train.num_steps=20'")
        if parts[0] == "flavors":
            raise ConfigError(f"override '{text}': choose a flavor with --flavor")
        value, _ = strict_yaml.load(written, f"override '{text}'")
        if isinstance(value, str) and len(parts) == 1 and parts[0] in _WORDS:
            parts.append(_WORDS[parts[0]])
        place = changes
        for part in parts[:-1]:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                given = strict_yaml.show(part)
                raise ConfigError(f"override '{text}': another override has given '{given}' a value of its own")
        place[parts[-1]] = value
    return changes


def _validate(merged: Mapping[str, Any]) -> tuple[Experiment | None, list[Fault]]:
    try:
        # JSON's strict mode: no "3" for 3 and no true for 1, yet lists make tuples and strings make paths.
        return Experiment.model_validate_json(json.dumps(merged), strict=True), []
    except ValidationError as error:
        return None, [_fault(fault, merged) for fault in error.errors(include_url=False)]
    except UserError as error:
        return None, [("", str(error))]


def _fault(error: Any, merged: Any) -> Fault:
    loc, node = [], merged
    for part in error["loc"]:
        inside = isinstance(node, list) and isinstance(part, int) and part < len(node)
        inside |= isinstance(node, Mapping) and part in node
        # The tags of unions are no keys of the file.
        if inside or (part == error["loc"][-1] and error["type"] == "missing"):
            loc.append(str(part))
        node = node[part] if inside else node
    path = ".".join(loc)
    if error["type"] == "extra_forbidden":
        return path, f"unknown key.{_suggest(loc)}"
    if error["type"] == "missing":
        return path, "required key is missing"
    message = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    message = message.replace("an object", "a mapping").replace("a valid array", "a list")
    value = "" if isinstance(error["input"], dict | list) else f", got {_shown(error['input'], path)}"
    return path, message[:1].lower() + message[1:] + value


def _shown(value: Any, path: str) -> str:
    if is_secret(path):
        return "a secret"
    return "nothing" if value is None else strict_yaml.show(repr(value))


def _suggest(loc: Sequence[str]) -> str:
    *parents, key = loc
    model: type[BaseModel] | None = Experiment
    for part in parents:
        model = _section(model, part) if model else None
    siblings = [*(model.model_fields if model else ()), *(() if parents else ("flavors",))]
    if close := getattr(model, "hints", {}).get(key) or nearest(key, siblings):
        return str(close)
    elsewhere = [path for path in _all_keys(Experiment) if path.rpartition(".")[2] == key]
    if elsewhere:
        return f" Did you mean '{elsewhere[0]}'?"
    return f" The keys here are: {', '.join(siblings)}." if siblings else ""


def _section(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The class behind a key: the annotation itself, or the one within `dict[str, X]`, `X | None`, `list[X]`."""
    field = model.model_fields.get(key)
    if field is None:
        return model if key.isidentifier() or key.isdigit() else None
    return next(_models(field.annotation), None)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _all_keys(annotation, f"{prefix}{name}.")


def _find_plugins(tree: Mapping[str, Any]) -> Iterator[tuple[str, plugins.Kind, dict[str, Any]]]:
    def inside(path: str) -> Iterator[tuple[str, Any]]:
        node: Any = tree
        for part in path.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        yield from ((f"{path}.{key}", value) for key, value in (node.items() if isinstance(node, Mapping) else ()))

    places: list[tuple[str, plugins.Kind, Any]] = [("policy", "policies", tree.get("policy"))]
    places += [
        (path, "data", value) for path, value in inside("data") if path.rpartition(".")[2] in DataConfig.model_fields
    ]
    places += [(path, "rewards", value) for path, value in inside("objective.rewards")]
    places += [(path, "rewards", value) for path, value in inside("evaluation.witnesses")]
    for path, kind, value in places:
        if isinstance(value, Mapping) and isinstance(value.get("use"), str):
            args = value.get("args") or {}
            if isinstance(args, Mapping):
                yield path, kind, {"use": value["use"], "args": dict(args)}


def _check_plugins(merged: Mapping[str, Any]) -> list[Fault]:
    faults: list[Fault] = []
    for path, kind, plugin in _find_plugins(merged):
        use = strict_yaml.show(plugin["use"])
        try:
            target = plugins.factory(plugins.resolve(kind, plugin["use"]))
        except ConfigError as error:
            faults.append((f"{path}.use", str(error)))
        except SystemExit:
            faults.append((f"{path}.use", f"'{use}' is a program: importing it ended the process"))
        except (OSError, RuntimeError, ValueError) as error:
            # What the file system and the home folders say of a name that cannot be one.
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            faults.append((f"{path}.use", f"'{use}' cannot be looked up: {reason.lower()}"))
        else:
            found = plugins.collect_args(target, plugin["args"], f"{path}.args")[1]
            faults += [(where, _without_secrets(where, message)) for where, message in found]
    return faults


def _without_secrets(where: str, message: str) -> str:
    text, got, value = message.partition(", got ")
    return text + got + ("a secret" if is_secret(where) else blot_entries(value)) if got else message


def _cross_checks(experiment: Experiment) -> Iterator[Fault]:
    """What no single section can know."""
    objective, num_steps = experiment.objective, experiment.train.num_steps
    flow_matching = objective.flow_matching
    starts = {f"objective.rewards.{name}": term.start_step for name, term in objective.rewards.items() if term.weight}
    if flow_matching.weight:
        starts["objective.flow_matching"] = flow_matching.start_step
    for path, start in starts.items():
        if start >= num_steps:
            yield f"{path}.start_step", f"step {start} is never reached: train.num_steps is {num_steps}"
    decay_steps = experiment.optimizer.decay_steps
    if decay_steps is not None and decay_steps < num_steps:
        reason = f"the learning rate is 0 from step {decay_steps} on: train.num_steps is {num_steps}"
        yield "optimizer.decay_steps", reason
    sampled = []
    for name, term in objective.rewards.items():
        try:
            reward = plugins.resolve("rewards", term.use)
            check_learnable(objective, name, reward)
            sampled += [name] if learns_from_samples(term, reward) else []
        except ConfigError as error:
            yield "", str(error)
    yield from ((f"objective.{path}", message) for path, message in composition_faults(objective, sampled))
    if objective.policy_gradient is not None:
        if not sampled:
            yield "objective.policy_gradient", "no reward is learned from samples; set learn_from: samples in one"
        try:
            objective.policy_gradient.check(experiment.rollout.num_steps)
        except ValueError as error:
            yield "objective.policy_gradient.window", str(error)
        if experiment.rollout.buckets is not None:
            yield "rollout.buckets", "samples (objective.policy_gradient) are drawn in one size; leave out one of both"
    if not sampled and "judges" in experiment.fleet.model_fields_set:
        yield "fleet.judges", "no reward scores samples (objective.policy_gradient): there is nothing to judge"
    if sampled and experiment.fleet.remote_rollouts and experiment.fleet.learners > 1:
        yield "fleet.placement", "several learners score their own samples (objective.policy_gradient); use colocated"
    if "judges" in experiment.fleet.model_fields_set and experiment.fleet.placement == "colocated":
        yield "fleet.judges", "a learner that draws its own samples scores them too; leave it out"
    if set(objective.rewards) & set(experiment.evaluation.witnesses):
        shared = ", ".join(sorted(set(objective.rewards) & set(experiment.evaluation.witnesses)))
        yield "evaluation.witnesses", f"a witness needs a name that no reward has: {shared}"
    if experiment.evaluation.grid_examples > experiment.evaluation.num_examples:
        shown, drawn = experiment.evaluation.grid_examples, experiment.evaluation.num_examples
        yield "evaluation.grid_examples", f"{shown} pictures cannot be shown of evaluation.num_examples = {drawn}"
    if experiment.train.strategy == "fsdp" and (experiment.fleet.remote_rollouts or experiment.fleet.staleness):
        yield "fleet", "a sharded model draws its own rollouts with its newest weights: pool inline, staleness 0"
    if idle := experiment.monitor.never_stops(experiment.evaluation.every, num_steps):
        yield "monitor.stop_on_drift", idle
    yield from _placement_checks(experiment)
    yield from _value_checks(experiment)


def _placement_checks(experiment: Experiment) -> Iterator[Fault]:
    """What learners that are placed on a cluster cannot have."""
    fleet, train = experiment.fleet, experiment.train
    if not fleet.places_learners:
        return
    if train.strategy == "fsdp" and fleet.learners == 1:
        yield "fleet.learners", "train.strategy: fsdp shards the model over several learners; there is 1"
    if ":" in train.device:
        yield "train.device", f"Ray gives each learner a GPU of its own, not all '{train.device}'; use auto or cuda"
    if train.device == "cuda" and fleet.gpus_per_learner == 0:
        yield "fleet.gpus_per_learner", "train.device is cuda, but the learners are to have no GPU"
    if train.device == "cpu" and fleet.gpus_per_learner:
        yield "fleet.gpus_per_learner", "train.device is cpu: the GPUs would be reserved for nothing"


def _value_checks(experiment: Experiment) -> Iterator[Fault]:
    """Ranges that would show only once weights are read, and names that no table can hold."""
    witnesses = experiment.evaluation.witnesses
    for path, names in (("objective.rewards", experiment.objective.rewards), ("evaluation.witnesses", witnesses)):
        for name in names:
            if not _NAME.fullmatch(name):
                yield path, f"names are letters, digits, '_', '-' and '.', got {strict_yaml.show(repr(name))}"
    betas, device = experiment.optimizer.betas, experiment.train.device
    if not all(0 <= beta < 1 for beta in betas):
        yield "optimizer.betas", f"each must be at least 0 and below 1, got {list(betas)}"
    if not _DEVICE.fullmatch(device):
        yield "train.device", f"'{strict_yaml.show(device)}' is no device; use auto, cpu, cuda or cuda:1"


def _message(
    path: Path, flavor: str | None, faults: Sequence[Fault], lines: strict_yaml.Lines, changes: Mapping[str, Any]
) -> str:
    where = f"{path} (flavor {flavor})" if flavor else str(path)
    rows = []
    for key, message in faults:
        source = _origin(tuple(key.split(".")), flavor, lines, changes)
        message = strict_yaml.show(blot(message), _LONGEST_FAULT)
        rows.append(f"{strict_yaml.show(key, 200)}{f' ({source})' if source else ''}: {message}" if key else message)
    if len(rows) == 1:
        return f"{where}: {rows[0]}"
    return "\n  ".join([f"{where}: {len(rows)} faults", *rows])


def _origin(key: tuple[str, ...], flavor: str | None, lines: strict_yaml.Lines, changes: Mapping[str, Any]) -> str:
    """`line N`, or `override`: where the key, or the nearest mapping around it, was written."""
    for length in range(len(key), 0, -1):
        line = lines.get(("flavors", flavor or "", *key[:length])) or lines.get(key[:length])
        overridden = strict_yaml.holds(changes, key[:length])
        if overridden and (length == len(key) or not line):
            return "override"
        if line:
            return f"line {line}"
    return ""
