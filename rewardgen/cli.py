"""The command line: parses arguments, nothing else. torch is imported only once a command needs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from rewardgen.errors import UserError

app = typer.Typer(
    name="rewardgen",
    help="Reward-feedback training for image-customisation diffusion transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
world_app = typer.Typer(help="The bundled tiny world: generated scenes and small trained parts.", no_args_is_help=True)
app.add_typer(world_app, name="world")

ExperimentFile = Annotated[Path, typer.Argument(metavar="EXPERIMENT", help="Experiment file (YAML).")]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads this form on every supported Python
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as train.num_steps=20.", show_default=False),
]
Flavor = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--flavor", "-f", help="One of the file's flavors; `tiny` where it has one.", show_default=False),
]


@app.command()
def train(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    flavor: Flavor = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="The run's folder; runs/NAME by default.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's latest checkpoint.")] = False,
) -> None:
    """Train, and compare held-out pictures before and after."""
    from rewardgen import build, config

    loaded = config.load_experiment(experiment, flavor, overrides or ())
    if not build.train(loaded, folder=output, resume=resume):
        raise typer.Exit(130)


@app.command()
def check(experiment: ExperimentFile, overrides: Overrides = None, flavor: Flavor = None) -> None:
    """Check an experiment without training: its keys, what it reads and whether that is here."""
    from rewardgen import build, config

    build.check(config.load_experiment(experiment, flavor, overrides or ()))
    for other in config.flavors_of(experiment) if flavor is None else []:
        config.load_experiment(experiment, other, overrides or ())


@app.command("eval")
def evaluate(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    flavor: Flavor = None,
    run: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--run", help="A run's folder: its latest checkpoint is judged.", show_default=False),
    ] = None,
    checkpoint: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--checkpoint", help="One checkpoint folder of a run.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare a trained checkpoint with the experiment's starting point on held-out examples."""
    from rewardgen import build, config

    loaded = config.load_experiment(experiment, flavor, overrides or ())
    build.evaluate_checkpoint(loaded, run=run, checkpoint=checkpoint, as_json=as_json)


@world_app.command("build")
def world_build(
    pieces: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[PIECE]...", help="Pieces to make again; all that are outdated by default."),
    ] = None,
    only_list: Annotated[bool, typer.Option("--list", help="Only say which pieces are outdated.")] = False,
) -> None:
    """Make the bundled world from its recipes."""
    from rewardgen.world import build

    if only_list:
        for name, piece in build.pieces().items():
            typer.echo(f"{name}: {build.stale(name, piece) or 'up to date'}")
    else:
        made = build.build_world(pieces or ())
        typer.echo(f"made: {', '.join(made) or 'nothing, all pieces are up to date'}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a `UserError` becomes one message on stderr and exit code 2."""
    try:
        app(arguments)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
