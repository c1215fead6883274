"""The command line: parses arguments, nothing else. torch is imported only once a command needs it."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Optional

import typer

from rewardgen.commands import cluster, plan_options
from rewardgen.commands.judge_options import judge_app
from rewardgen.commands.options import (
    AsJson,
    CheckpointFolder,
    Content,
    ExperimentFile,
    ExperimentOption,
    ExperimentOrRun,
    Explain,
    Flavor,
    Grid,
    Identity,
    Images,
    NumSteps,
    Overrides,
    PictureFolder,
    Prompt,
    Rewards,
    RunFolder,
    Seeds,
    Size,
    Style,
)
from rewardgen.commands.reward import reward_app
from rewardgen.errors import UserError

HELP = """Reward-feedback training for image-customisation diffusion transformers.

Every command says more with --help. Bad input is one message on stderr and
exit code 2.

Examples:
  rewardgen check experiments/uso_srl.yaml
  rewardgen train experiments/uso_srl.yaml train.num_steps=20
  rewardgen --install-completion
"""
WORLD_HELP = """The bundled tiny world: generated scenes and small trained parts.

Experiments name its parts as world:NAME.

Examples:
  rewardgen world build --list
"""
app = typer.Typer(
    name="rewardgen",
    help=HELP,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
world_app = typer.Typer(help=WORLD_HELP, no_args_is_help=True)
app.add_typer(world_app, name="world")
app.add_typer(reward_app, name="reward")
app.add_typer(cluster.jobs_app, name="jobs")
app.add_typer(judge_app, name="judge")


@app.command()
def train(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    flavor: Flavor = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", metavar="DIR", help="The run's folder.", show_default="runs/NAME"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's latest checkpoint.")] = False,
) -> None:
    """Train, and compare held-out pictures before and after.

    The run's folder holds the resolved config.yaml, manifest.json, metrics.jsonl,
    checkpoints, the trained weights in their official format, and the comparison.
    Ctrl-C ends a run with a checkpoint; --resume goes on from there and gives
    what an undisturbed run would have given.

    Examples:
      rewardgen train experiments/uso_srl.yaml
      rewardgen train experiments/uso_srl.yaml train.num_steps=20 -o runs/short
      rewardgen train experiments/uso_srl.yaml -o runs/short --resume
    """
    from rewardgen import build, config

    loaded = config.load_experiment(experiment, flavor, overrides or ())
    if not build.train(loaded, folder=output, resume=resume):
        raise typer.Exit(130)


@app.command()
def check(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    flavor: Flavor = None,
    plan: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--plan/--no-plan",
            help="Predict memory and time of a train step.",
            show_default="if weights of the policy are not here",
        ),
    ] = None,
    memory: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--memory", metavar="GB", help="Memory to fit into.", show_default="the device's, else 80"),
    ] = None,
) -> None:
    """Check an experiment without training: its keys, what it reads and whether that is here.

    Prints the experiment as it would run, and fetches nothing. Without --flavor
    the other flavors are checked too. A plan comes from shapes alone.

    Examples:
      rewardgen check experiments/uso_srl.yaml
      rewardgen check experiments/uso_srl.yaml --flavor flux-dev optimizer.lr=1e-5
      rewardgen check experiments/uso_srl.yaml --flavor flux-dev --memory 48
    """
    from rewardgen import build, config

    loaded = config.load_experiment(experiment, flavor, overrides or ())
    build.check(loaded, plan=plan, device_bytes=memory and memory * 1e9)
    for other in config.flavors_of(experiment) if flavor is None else []:
        config.load_experiment(experiment, other, overrides or ())


@app.command()
def encode(experiment: ExperimentFile, overrides: Overrides = None, flavor: Flavor = None) -> None:
    """Encode all prompts and pictures of an experiment's data ahead of training.

    They go to the folder that policy.args.encodings names, for training to read.

    Examples:
      rewardgen encode experiments/uso_srl.yaml policy.args.encodings=encodings
      rewardgen encode experiments/uso_srl.yaml --flavor flux-dev
    """
    from rewardgen import config
    from rewardgen.commands import encode as command

    command.run(config.load_experiment(experiment, flavor, overrides or ()))


@app.command("eval")
def evaluate(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    flavor: Flavor = None,
    run: RunFolder = None,
    checkpoint: CheckpointFolder = None,
    as_json: AsJson = False,
) -> None:
    """Compare a trained checkpoint with the experiment's starting point on held-out examples.

    Both draw from the same noise; the table shows each reward and witness with
    the paired interval of its change. Give either --run or --checkpoint.

    Examples:
      rewardgen eval experiments/uso_srl.yaml --run runs/uso_srl
      rewardgen eval experiments/uso_srl.yaml --run runs/uso_srl --json
    """
    from rewardgen import build, config

    loaded = config.load_experiment(experiment, flavor, overrides or ())
    build.evaluate_checkpoint(loaded, run=run, checkpoint=checkpoint, as_json=as_json)


@app.command()
def sample(
    experiment: ExperimentOrRun,
    overrides: Overrides = None,
    flavor: Flavor = None,
    run: RunFolder = None,
    checkpoint: CheckpointFolder = None,
    prompt: Prompt = "",
    content: Content = None,
    style: Style = None,
    identity: Identity = None,
    seeds: Seeds = "0",
    num_steps: NumSteps = None,
    size: Size = None,
    output: PictureFolder = None,
    grid: Grid = False,
    as_json: AsJson = False,
) -> None:
    """Draw pictures with an experiment's policy, as it starts or as a run left it.

    Writes seed-NNNN.png for each seed, over what has that name, and prints the
    paths. A seed always draws the same picture, however many are drawn with it.
    The weights are the experiment's own; with --run or --checkpoint they are the
    averaged ones of a run. A run's folder as EXPERIMENT stands for its
    config.yaml and its newest weights.

    Examples:
      rewardgen sample experiments/uso_srl.yaml -p "a circle top left"
      rewardgen sample runs/uso_srl -p "a ring middle centre" --style look.png
      rewardgen sample experiments/uso_srl.yaml --run runs/uso_srl --grid \\
        --seeds 0-3 --content scene.png --style look.png --style more.png
    """
    from rewardgen.commands import sample as command

    options = command.Options(
        prompt=prompt,
        content=content or (),
        style=style or (),
        identity=identity or (),
        seeds=seeds,
        num_steps=num_steps,
        size=size,
        output=output,
        grid=grid,
        as_json=as_json,
    )
    command.run(experiment, options, flavor=flavor, overrides=overrides or (), run_folder=run, checkpoint=checkpoint)


@app.command()
def score(
    images: Images,
    rewards: Rewards = None,
    prompt: Prompt = "",
    content: Content = None,
    style: Style = None,
    identity: Identity = None,
    experiment: ExperimentOption = None,
    flavor: Flavor = None,
    as_json: AsJson = False,
    explain: Explain = None,
) -> None:
    """Score pictures with any reward: the same code that trains and evaluates.

    Prompt and references go to the rewards with every picture. A reward that does
    not apply to a picture gives n.a. (null in JSON); the mean is over the others,
    whose number is shown. A picture that cannot be read is named on stderr and
    has no scores; the others are scored, and only if none can be read is it an
    error (exit code 2). A bundled reward that is given no weights takes those of
    the tiny world, and says so on stderr.

    Examples:
      rewardgen score a.png b.png --reward csd --style look.png --json
      rewardgen score samples/uso_srl/seed* -s a.png -e experiments/uso_srl.yaml
      rewardgen score out -r csd -s look.png csd.checkpoint=csd.safetensors
      rewardgen score "out/**/*.png" -r ./my_reward.py:Warmth -r brightness
      rewardgen score group.png -r matching -i a.png -i b.png --explain faces.png
      rewardgen score out -r dino --content cat.png dino.model=./dino-vits16
    """
    from rewardgen.commands import score as command

    command.run(
        images,
        rewards=rewards or (),
        prompt=prompt,
        content=content or (),
        style=style or (),
        identity=identity or (),
        experiment=experiment,
        flavor=flavor,
        as_json=as_json,
        explain=explain,
    )


class ExportFormat(StrEnum):
    """File formats of `export`."""

    USO = "uso"
    UNO = "uno"
    PEFT = "peft"
    DIFFUSERS = "diffusers"


class ExportWeights(StrEnum):
    """Which of a checkpoint's weights `export` takes."""

    EMA = "ema"
    TRAINED = "trained"


@app.command()
def export(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run's folder (its latest checkpoint) or one checkpoint."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write, new or empty.")],
    file_format: Annotated[
        ExportFormat,
        typer.Option(
            "--format", help="USO's or UNO's own files, a PEFT adapter, or a LoRA for diffusers' FluxPipeline."
        ),
    ],
    weights: Annotated[
        Optional[ExportWeights],  # noqa: UP045
        typer.Option("--weights", help="Averaged or last.", show_default="ema where the run kept an average"),
    ] = None,
) -> None:
    """Write the trained LoRA and style projector of a run in a format that others load.

    The base weights are not read.

    Examples:
      rewardgen export runs/uso_srl --format uso --output exported
      rewardgen export runs/uso_srl --format diffusers -o lora --weights trained
    """
    from rewardgen.commands import export as command

    command.export(source, file_format=file_format, output=output, weights=weights)


@world_app.command("build")
def world_build(
    pieces: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="PIECE", help="Pieces to make again.", show_default="all that are outdated"),
    ] = None,
    only_list: Annotated[bool, typer.Option("--list", help="Only say which pieces are outdated.")] = False,
) -> None:
    """Make the bundled world from its recipes.

    Pieces whose recipe has not changed are left alone.

    Examples:
      rewardgen world build --list
      rewardgen world build vae
    """
    from rewardgen.world import build

    if only_list:
        for name, piece in build.pieces().items():
            typer.echo(f"{name}: {build.stale(name, piece) or 'up to date'}")
    else:
        made = build.build_world(pieces or ())
        typer.echo(f"made: {', '.join(made) or 'nothing, all pieces are up to date'}")


app.command()(cluster.submit)
app.command()(plan_options.plan)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a `UserError` becomes one message on stderr and exit code 2."""
    try:
        app(arguments)
    except UserError as error:
        from rewardgen.manifest import blot  # imports torch, which a command that fails has mostly done

        typer.echo(f"error: {blot(str(error))}", err=True)
        sys.exit(2)
