"""The commands of `rewardgen reward`: parses arguments, nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

REWARD_HELP = """A reward of one's own: write one, check one.

Experiments name it under `use:`, as ./file.py:Class or package.module:Class.

Examples:
  rewardgen reward new edge_sharpness
  rewardgen reward check ./edge_sharpness.py:EdgeSharpness
"""
reward_app = typer.Typer(help=REWARD_HELP, no_args_is_help=True)


@reward_app.command("new")
def reward_new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="In lower case, such as edge_sharpness.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for NAME.py.")] = Path("."),
    function: Annotated[bool, typer.Option("--function", help="A plain function instead of a class.")] = False,
) -> None:
    """Write NAME.py: a whole reward to start from.

    It passes `rewardgen reward check` as it stands.

    Examples:
      rewardgen reward new edge_sharpness
      rewardgen reward new edge_sharpness --function --output rewards_of_mine
    """
    from rewardgen.reward_template import write_reward

    path, symbol = write_reward(name, output, function=function)
    use = f"{path if path.is_absolute() else f'./{path}'}:{symbol}"
    typer.echo(f"wrote {path}")
    typer.echo(f"check it:  rewardgen reward check {use}")
    places = "evaluation.witnesses" if function else "objective.rewards or evaluation.witnesses"
    typer.echo(f"use it:    {name}: {{use: {use}}}, under {places}")


@reward_app.command("check")
def reward_check(
    use: Annotated[str, typer.Argument(metavar="REWARD", help="As under `use:`, such as ./mine.py:Mine.")],
    args: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="NAME=VALUE", help="Its arguments, such as level=0.4.", show_default="none"),
    ] = None,
    data: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--data", metavar="FILE", help="JSON Lines file to take examples from.", show_default="made-up examples"
        ),
    ] = None,
) -> None:
    """Make a reward as an experiment would, and check that it keeps the contract.

    One line for each promise kept; the first that is broken is the error.

    Examples:
      rewardgen reward check ./edge_sharpness.py:EdgeSharpness
      rewardgen reward check csd checkpoint=csd.safetensors --data pairs.jsonl
    """
    from rewardgen.reward_check import check_spec

    for line in check_spec(use, args or (), data):
        typer.echo(f"ok: {line}")
