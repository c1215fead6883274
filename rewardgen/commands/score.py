"""`rewardgen score`: pictures that are there already, scored with any reward.

Metrics are rewards: what is computed here is `rewardgen.reward.score`, as in training and evaluation.
"""

from __future__ import annotations

import glob
import json
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image
from torch import Tensor

from rewardgen import build, plugins, strict_yaml
from rewardgen.commands import common
from rewardgen.config import Experiment, load_experiment, overlay
from rewardgen.data.images import KINDS, ImageError, load_image
from rewardgen.errors import ConfigError, ScoringError, UserError, nearest
from rewardgen.evaluation.score import score_pictures
from rewardgen.manifest import redact
from rewardgen.reward import Reward
from rewardgen.settings import Plugin
from rewardgen.trainer import choose_device
from rewardgen.types import Example

TINY_ARGS: Mapping[str, Mapping[str, Any]] = {"csd": {"checkpoint": "world:csd.safetensors"}}
"""Arguments of bundled rewards that need weights, as the bundled experiments have them, which no wheel carries."""
BATCH_SIZE, BATCH_PIXELS = 8, 32_000_000
"""Pictures scored at once, fewer where they are so large that they have more pixels together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A picture's scores by reward, None where a reward is not applicable or failed; or why it could not be read."""

    path: str
    scores: Mapping[str, float | None]
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"path": self.path, "scores": dict(self.scores)}
        return found if self.error is None else found | {"error": self.error}


def run(
    given: Sequence[str],
    *,
    rewards: Sequence[str],
    prompt: str = "",
    content: Sequence[Path] = (),
    style: Sequence[Path] = (),
    identity: Sequence[Path] = (),
    experiment: Path | None = None,
    flavor: str | None = None,
    as_json: bool = False,
) -> None:
    """Score pictures and print a table or JSON. Unreadable ones are named on stderr, counted and left without score.

    Args:
        given: pictures, folders, patterns, and arguments of rewards as `NAME.KEY=VALUE`, in any order.
        rewards: bundled names, plug-ins, or names of the experiment's; none takes all of the experiment's.
        prompt: given to the rewards with each picture; likewise
        content: pictures,
        style: pictures,
        identity: pictures.
        experiment: experiment file or run folder, where rewards have their arguments from.
        flavor: of the experiment.
        as_json: print one JSON document in place of a table.

    Raises:
        UserError: no reward, an unknown or unfit one, an unreadable reference, or no picture that can be read.
    """
    if flavor is not None and experiment is None:
        raise ConfigError("--flavor chooses a flavor of an experiment: give --experiment FILE too")
    with common.chatter_to_stderr():
        loaded = None if experiment is None else load_experiment(common.experiment_file(experiment), flavor)
        plan = choose_rewards(rewards, loaded)
        arguments, pictures = split(given, list(plan))
        plan = {name: _with_arguments(name, plugin, arguments.get(name, {})) for name, plugin in plan.items()}
        example = common.request(prompt, content=content, style=style, identity=identity)
        paths = expand(pictures)
        made = {name: _make(name, plugin) for name, plugin in plan.items()}
        rows = [row for batch in _batches(paths) for row in _score(batch, made, example)]
    unread = [row for row in rows if row.error is not None]
    if len(unread) == len(rows):
        raise UserError(f"none of the {len(rows)} pictures could be read")
    for name in plan:
        if all(row.scores[name] is None for row in rows):
            _note(f"{name} applies to none of the pictures; does it need --style, --content, --identity or --prompt?")
    if as_json:
        print(json.dumps(_document(rows, plan), indent=1, allow_nan=False))
    else:
        print(render(rows, list(plan)))


def choose_rewards(specs: Sequence[str], experiment: Experiment | None) -> dict[str, Plugin]:
    """The rewards by the names that arguments and columns have: the bundled name, or the class or function.

    `NAME=REWARD` gives it a name of one's own, so that one reward can be asked for twice with other arguments.

    Raises:
        ConfigError: none is named, one is named twice, or the experiment has several that could be meant.
    """
    terms: dict[str, Plugin] = {}
    if experiment is not None:
        terms = {name: Plugin(use=term.use, args=term.args) for name, term in experiment.objective.rewards.items()}
        terms |= experiment.evaluation.witnesses
    if not specs and not terms:
        raise ConfigError("name what to score with: --reward csd, or --experiment FILE for all of its rewards")
    chosen: dict[str, Plugin] = {}
    for written in specs or list(terms):
        own, equals, spec = written.partition("=")
        if not equals or not own.isidentifier():
            own, spec = "", written
        alike = [name for name, term in terms.items() if term.use == spec]
        if spec not in terms and len(alike) > 1:
            raise ConfigError(f"--reward {spec}: the experiment has several; name one of {', '.join(alike)}")
        name = own or (spec if spec in terms else spec.rpartition(":")[2])
        if name in chosen:
            raise ConfigError(f"--reward {spec}: there is a reward '{name}' already")
        chosen[name] = terms[spec] if spec in terms else terms[alike[0]] if alike else Plugin(use=spec)
    return chosen


def split(given: Sequence[str], names: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Tell arguments of rewards (`csd.checkpoint=FILE`, the value in YAML) from pictures.

    Returns:
        The arguments by reward, and the pictures as written.

    Raises:
        ConfigError: an argument of a reward that is not asked for, or one that does not parse.
    """
    arguments: dict[str, dict[str, Any]] = {}
    pictures = []
    for text in given:
        key, equals, written = text.partition("=")
        name, *parts = key.split(".")
        if not equals or name not in names:
            looks_like_one = bool(equals) and re.fullmatch(r"[\w-]+(\.\w+)+", key)
            if looks_like_one and not Path(text).exists():
                guess = nearest(name, names) or f" There are: {', '.join(names)}."
                raise ConfigError(f"'{text}': no reward '{name}' is asked for.{guess}")
            pictures.append(text)
            continue
        if not parts or not all(parts):
            raise ConfigError(f"'{text}': expected 'NAME.KEY=VALUE', as in 'csd.checkpoint=FILE'")
        place = arguments.setdefault(name, {})
        for part in parts[:-1]:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ConfigError(f"'{text}': another argument has given '{part}' a value of its own")
        place[parts[-1]] = strict_yaml.load(written, f"'{text}'")[0]
    return arguments, pictures


def expand(given: Sequence[str]) -> list[Path]:
    """Picture files: of a folder those directly in it, of a pattern (`*`, `**`, `?`) what it matches, both sorted.

    A name that is not there stays, and is reported with the pictures that cannot be read.

    Raises:
        ConfigError: nothing is given, or a folder or pattern without pictures.
    """
    if not given:
        raise ConfigError("name at least one picture, folder or pattern to score")
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in KINDS}
    found: list[Path] = []
    for text in given:
        path = Path(text).expanduser()
        if path.is_dir():
            inside = [p for p in path.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith(".")]
            matched = sorted(p for p in inside if p.is_file())
        elif glob.has_magic(text) and not path.exists():
            matched = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        else:
            matched = [path]
        if not matched:
            raise ConfigError(f"{text}: {'the folder holds no pictures' if path.is_dir() else 'matches no files'}")
        found += matched
    return found


def render(rows: Sequence[Row], names: Sequence[str]) -> str:
    """A plain table: a line for each picture, then the mean of the valid scores and their count."""
    body = [[row.path, *(_cell(row, name) for name in names)] for row in rows]
    valid = {name: _valid(rows, name) for name in names}
    means = [f"{fmean(values):.4f}" if values else "n.a." for values in valid.values()]
    counts = [f"{len(values)}/{len(rows)}" for values in valid.values()]
    table = [["picture", *names], *body, ["mean", *means], ["valid", *counts]]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))])
        for cells in table
    ]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-2], rule, *lines[-2:]])


def _with_arguments(name: str, plugin: Plugin, arguments: Mapping[str, Any]) -> Plugin:
    """The plug-in with the given arguments over its own, checked; the tiny world's where weights are missing."""
    args = overlay(plugin.args, arguments)
    tiny = TINY_ARGS.get(plugin.use, {})
    if tiny and not tiny.keys() & args.keys():
        args = {**tiny, **args}
        settings = " ".join(f"{name}.{key}=FILE" for key in tiny)
        _note(
            f"{name} is scored with the bundled tiny world's weights, which know its 64x64 scenes and nothing else;"
            f" for real pictures give {settings}, or --experiment FILE"
        )
    target = plugins.factory(plugins.resolve("rewards", plugin.use))
    plugins.check_args(target, args, name)
    return Plugin(use=plugin.use, args=args)


def _make(name: str, plugin: Plugin) -> Reward:
    reward: Reward = build.make(name, "rewards", plugin)
    return reward.requires_grad_(False).eval().to(choose_device("auto"))


def _batches(paths: Sequence[Path]) -> Iterator[list[tuple[Path, Tensor | ImageError]]]:
    """Pictures in their order, read only when they are needed."""
    batch: list[tuple[Path, Tensor | ImageError]] = []
    pixels = 0
    for path in paths:
        picture: Tensor | ImageError
        try:
            picture = load_image(path)
        except ImageError as error:
            print(f"error: {error}", file=sys.stderr)
            picture = error
        else:
            pixels += picture[0].numel()
        batch.append((path, picture))
        if len(batch) == BATCH_SIZE or pixels >= BATCH_PIXELS:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch


def _score(
    batch: Sequence[tuple[Path, Tensor | ImageError]], rewards: Mapping[str, Reward], example: Example
) -> list[Row]:
    read = [(path, picture) for path, picture in batch if not isinstance(picture, ImageError)]
    examples = [replace(example, id=str(path)) for path, _ in read]
    columns: dict[str, list[float | None]] = {}
    for name, reward in rewards.items():
        try:
            scored = score_pictures(examples, [picture for _, picture in read], {name: reward}) if read else None
        except UserError:
            raise
        except Exception as error:
            # It is the reward's author who reads this.
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise ScoringError(
                f"{name} failed: {type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"
            ) from error
        columns[name] = scored.to_json()["scores"][name] if scored else []
    values = {path: {name: column[i] for name, column in columns.items()} for i, (path, _) in enumerate(read)}
    nothing: dict[str, float | None] = dict.fromkeys(rewards)
    return [
        Row(path=str(path), scores=nothing, error=str(picture))
        if isinstance(picture, ImageError)
        else Row(path=str(path), scores=values[path])
        for path, picture in batch
    ]


def _document(rows: Sequence[Row], plan: Mapping[str, Plugin]) -> dict[str, Any]:
    rewards: dict[str, Any] = {}
    for name, plugin in plan.items():
        valid = _valid(rows, name)
        mean = fmean(valid) if valid else None
        rewards[name] = {"use": plugin.use, "args": redact(plugin.args), "mean": mean, "valid": len(valid)}
    return {
        "num_pictures": len(rows),
        "num_unreadable": sum(row.error is not None for row in rows),
        "rewards": rewards,
        "pictures": [row.to_json() for row in rows],
    }


def _valid(rows: Sequence[Row], name: str) -> list[float]:
    return [value for row in rows if (value := row.scores[name]) is not None]


def _cell(row: Row, name: str) -> str:
    if row.error is not None:
        return "unreadable"
    value = row.scores[name]
    return "n.a." if value is None else f"{value:.4f}"


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
