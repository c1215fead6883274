"""The options of `rewardgen judge`: parses arguments, nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from rewardgen.commands.options import AsJson

JUDGE_HELP = """Vision-language models as judges.

Experiments use one as vlm_judge (behind a service) or as vlm_judge_local
(on this machine, differentiable).

Examples:
  rewardgen judge fit llava-hf/llava-1.5-7b-hf --data pairs.jsonl \\
    --held-out held_out.jsonl --output judges/style
"""
judge_app = typer.Typer(help=JUDGE_HELP, no_args_is_help=True)


@judge_app.callback()
def judge() -> None:
    # With a single command a group would not ask for its name.
    pass


@judge_app.command("fit")
def judge_fit(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, world:NAME, or a repository of the hub.")],
    data: Annotated[str, typer.Option("--data", metavar="DATA", help="Labelled pictures to learn from.")],
    held_out: Annotated[str, typer.Option("--held-out", metavar="DATA", help="Others to be judged by.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write, new or empty.")],
    args: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="NAME.KEY=VALUE", help="Arguments of data or held_out.", show_default="none"),
    ] = None,
    question: Annotated[str, typer.Option("--question", "-q", help="A bundled template or a file.")] = "style",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps.")] = 500,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pictures in a step.")] = 8,
    lr: Annotated[float, typer.Option("--lr", min=0, help="Highest learning rate.")] = 1e-4,
    lora_rank: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--lora-rank", min=0, help="0 trains all.", show_default="16, or 0 below 100 million parameters"),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option("--seed", help="Of the order.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a local judge on labelled pictures, and measure it before and after.

    DATA is a JSON Lines file or a dataset plug-in. Each row has the picture to
    judge as its target, the references that the question needs, and the answer
    as extras.label: yes or no, or a number of the rubric. It needs TRL, which
    comes with the extra `judge`.

    Examples:
      rewardgen judge fit llava-hf/llava-1.5-7b-hf --data pairs.jsonl \\
        --held-out held_out.jsonl --output judges/style --dtype bfloat16
      rewardgen judge fit world:judge -o judges/longer --steps 200 \\
        --data rewardgen.world.pairs:StylePairs data.size=2000 \\
        --held-out rewardgen.world.pairs:StylePairs held_out.split=held_out
    """
    from rewardgen.commands import judge as command

    command.fit(
        model,
        question=question,
        data=data,
        held_out=held_out,
        arguments=args or (),
        output=output,
        settings={"num_steps": steps, "batch_size": batch_size, "lr": lr, "lora_rank": lora_rank, "seed": seed},
        dtype=dtype,
        as_json=as_json,
    )
