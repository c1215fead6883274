"""`rewardgen judge fit`: a local judge is taught labelled pictures, and measured on others before and after."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rewardgen import build, plugins, strict_yaml
from rewardgen.commands import common
from rewardgen.errors import ConfigError, nearest
from rewardgen.manifest import redact
from rewardgen.settings import Plugin
from rewardgen.trainer import choose_device
from rewardgen.types import Example

LOCAL_JUDGE = "vlm_judge_local"
REPORT = "fit.json"


def fit(
    model: str,
    *,
    question: str,
    data: str,
    held_out: str,
    output: Path,
    arguments: Sequence[str] = (),
    settings: Mapping[str, Any],
    dtype: str = "float32",
    as_json: bool = False,
) -> None:
    """Fit a judge, write it and `fit.json` to a folder, and print its agreement before and after.

    Args:
        model: folder, `world:NAME` or hub repository.
        question: bundled template or path.
        data: JSON Lines file or dataset plug-in to learn from;
        held_out: likewise, to measure on.
        output: folder to write, new or empty.
        arguments: `data.KEY=VALUE` and `held_out.KEY=VALUE`, the value in YAML.
        settings: of `FitConfig`.
        dtype: of the weights.
        as_json: print `fit.json`.

    Raises:
        UserError: something is missing, of the wrong kind or does not fit.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output} is there already and not an empty folder")
    given = _arguments(arguments)
    with common.chatter_to_stderr() as answer:
        cls = plugins.resolve("rewards", LOCAL_JUDGE)
        config = cls.fit_config(**settings)
        train = _examples("data", data, given["data"])
        unseen = _examples("held_out", held_out, given["held_out"])
        _check_apart(train, unseen)
        before = _judge(model, question, dtype).agreement(unseen)
        _judge(model, question, dtype).fit(train, output, config)
        after = _judge(str(output), question, dtype).agreement(unseen)
        report = {
            "model": model,
            "question": question,
            "data": {"use": data, "args": redact(given["data"]), "size": len(train)},
            "held_out": {"use": held_out, "args": redact(given["held_out"]), "size": len(unseen)},
            "settings": {**settings, "dtype": dtype},
            "before": before.to_json(),
            "after": after.to_json(),
        }
        text = json.dumps(report, indent=1)
        (output / REPORT).write_text(text + "\n", encoding="utf-8")
        print(text if as_json else _table(report, output), file=answer)


def _judge(model: str, question: str, dtype: str) -> Any:
    # What is trained whole keeps its activations: a small model does not need to recompute them.
    args = {"model": model, "question": question, "dtype": dtype, "checkpointing": False}
    judge = build.make("judge", "rewards", Plugin(use=LOCAL_JUDGE, args=args))
    return judge.requires_grad_(False).eval().to(choose_device("auto"))


def _examples(name: str, use: str, args: Mapping[str, Any]) -> list[Example]:
    plugin = Plugin(use=use, args=dict(args))
    if use.endswith(".jsonl"):
        plugin = Plugin(use="jsonl", args={"path": use, **args})
    dataset = build.make(name, "data", plugin)
    return [dataset[index] for index in range(len(dataset))]


def _check_apart(train: Sequence[Example], held_out: Sequence[Example]) -> None:
    """What was learned from says nothing about what was learned."""
    shared = {example.id for example in train} & {example.id for example in held_out}
    if shared:
        raise ConfigError(
            f"{len(shared)} of the held-out pictures are among those to learn from, such as '{sorted(shared)[0]}'"
        )


def _arguments(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {"data": {}, "held_out": {}}
    for text in given:
        key, equals, written = text.partition("=")
        name, dot, argument = key.partition(".")
        if not (equals and dot and argument.isidentifier()):
            raise ConfigError(f"'{text}': expected 'data.KEY=VALUE' or 'held_out.KEY=VALUE'")
        if name not in found:
            raise ConfigError(f"'{text}': there is no '{name}'.{nearest(name, found) or ' There are: data, held_out.'}")
        found[name][argument] = strict_yaml.load(written, f"'{text}'")[0]
    return found


def _table(report: Mapping[str, Any], output: Path) -> str:
    before, after = report["before"], report["after"]
    rows = [
        ("", "before", "after", "held out"),
        ("balanced accuracy", *_shares(before, after, "balanced_accuracy"), str(sum(after["counts"].values()))),
        ("accuracy", *_shares(before, after, "accuracy"), ""),
    ]
    for label, count in after["counts"].items():
        rows.append((f"  of '{label}'", *_shares(before["recalls"], after["recalls"], label), str(count)))
    lines = [f"{name:<18}{a:>8}{b:>8}{count:>10}" for name, a, b, count in rows]
    return "\n".join([*lines, f"judge: {output}"])


def _shares(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> tuple[str, str]:
    return f"{before[key]:.3f}", f"{after[key]:.3f}"
