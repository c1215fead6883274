"""Options and arguments that several commands have, and the longer ones of single commands. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from rewardgen.commands import completion

# typer reads Optional[...] on every supported Python; `X | None` in an alias is evaluated at once.
_Text = Optional[str]  # noqa: UP045
_Number = Optional[int]  # noqa: UP045
_Path = Optional[Path]  # noqa: UP045
_Texts = Optional[list[str]]  # noqa: UP045
_Paths = Optional[list[Path]]  # noqa: UP045

ExperimentFile = Annotated[Path, typer.Argument(metavar="EXPERIMENT", help="Experiment file (YAML).")]
ExperimentOrRun = Annotated[
    Path, typer.Argument(metavar="EXPERIMENT", help="Experiment file (YAML), or a run's folder.")
]
Overrides = Annotated[
    _Texts,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Overrides of the experiment, values in YAML: train.num_steps=20 'rollout.image_size=[64, 64]'.",
        show_default="none",
    ),
]
Flavor = Annotated[
    _Text,
    typer.Option(
        "--flavor",
        "-f",
        metavar="NAME",
        help="One of the file's flavors, which set sizes and sources.",
        show_default="tiny, else the file's first",
        autocompletion=completion.flavors,
    ),
]
RunFolder = Annotated[
    _Path,
    typer.Option(
        "--run", metavar="DIR", help="A run of this experiment: its newest whole checkpoint.", show_default="none"
    ),
]
CheckpointFolder = Annotated[
    _Path,
    typer.Option(
        "--checkpoint",
        metavar="DIR",
        help="One checkpoint, such as RUN/checkpoints/step-000100.",
        show_default="none",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document in place of text.")]

Prompt = Annotated[
    str, typer.Option("--prompt", "-p", metavar="TEXT", help="What the picture shows.", show_default="no text")
]
Content = Annotated[
    _Paths,
    typer.Option(
        "--content",
        "-c",
        metavar="IMAGE",
        help="Picture whose subject or layout is kept. Repeat for several.",
        show_default="none",
    ),
]
Style = Annotated[
    _Paths,
    typer.Option(
        "--style",
        "-s",
        metavar="IMAGE",
        help="Picture whose look is taken over. Repeat for several.",
        show_default="none",
    ),
]
Identity = Annotated[
    _Paths,
    typer.Option(
        "--identity",
        "-i",
        metavar="IMAGE",
        help="Picture of a person who appears. Repeat for several.",
        show_default="none",
    ),
]

Seeds = Annotated[
    str, typer.Option("--seeds", metavar="SEEDS", help="One picture each: 7, or 0,1,2, or 0-3 with both ends.")
]
NumSteps = Annotated[
    _Number, typer.Option("--num-steps", metavar="N", min=1, help="Denoising steps.", show_default="the experiment's")
]
Size = Annotated[
    _Text, typer.Option("--size", metavar="HxW", help="Height x width in pixels.", show_default="the experiment's")
]
PictureFolder = Annotated[
    _Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the pictures.", show_default="samples/NAME")
]
Grid = Annotated[bool, typer.Option("--grid", help="Also write grid.png: references and pictures, labelled.")]

Images = Annotated[
    list[str],
    typer.Argument(
        metavar="IMAGE",
        help="Pictures, folders of pictures and quoted patterns such as 'out/**/*.png'. Arguments of rewards go here"
        " too, as REWARD.KEY=VALUE with the value in YAML.",
    ),
]
Rewards = Annotated[
    _Texts,
    typer.Option(
        "--reward",
        "-r",
        metavar="REWARD",
        help="A bundled reward such as csd, package.module:Class, ./file.py:Class, or the name of one in the"
        " experiment; NAME=REWARD names it anew. Repeat for several.",
        show_default="all of the experiment's",
        autocompletion=completion.rewards,
    ),
]
ExperimentOption = Annotated[
    _Path,
    typer.Option(
        "--experiment",
        "-e",
        metavar="FILE",
        help="Experiment file or run folder: rewards and witnesses named there have their arguments from it.",
        show_default="none",
    ),
]

Address = Annotated[
    _Text,
    typer.Option(
        "--address",
        metavar="URL",
        help="The cluster's job server: the dashboard of its head node.",
        show_default="RAY_API_SERVER_ADDRESS, else http://localhost:8265",
    ),
]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="As `rewardgen jobs` lists it.")]
