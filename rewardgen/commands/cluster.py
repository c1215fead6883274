"""The commands `submit` and `jobs`, as the command line sees them. Imports no torch and no ray."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from rewardgen.commands.options import Address, AsJson, ExperimentFile, Flavor, JobName, Overrides

JOBS_HELP = """List the jobs that were submitted to a Ray cluster, newest first.

Examples:
  rewardgen jobs
  rewardgen jobs --address http://head:8265 --json
"""
jobs_app = typer.Typer(help=JOBS_HELP, invoke_without_command=True)


def submit(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    flavor: Flavor = None,
    address: Address = None,
    output: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="The run's folder, absolute, where the cluster sees it.",
            show_default="~/runs/NAME there",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's latest checkpoint.")] = False,
    cpus: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--cpus", metavar="N", min=0, help="Reserved for the learner's process.", show_default="none"),
    ] = None,
    gpus: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--gpus", metavar="N", min=0, help="Reserved for the learner's process.", show_default="none"),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Submit even if no node has the --cpus and --gpus: the cluster will grow.")
    ] = False,
    installed: Annotated[
        bool, typer.Option("--installed", help="Run the rewardgen that the cluster has, not this one.")
    ] = False,
    any_version: Annotated[
        bool, typer.Option("--any-version", help="With --installed: run it also if it is another version.")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Do not follow the log.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would travel; no cluster.")] = False,
) -> None:
    """Train on a Ray cluster: the working folder and this rewardgen travel along.

    The experiment is checked here before anything is sent. What .gitignore and
    .rayignore name stays here, except files that the experiment itself names.
    The log is shown until the job ends; Ctrl-C asks whether to stop it. A job
    that is stopped saves a checkpoint; the same command with --resume goes on.
    Where the cluster wants a token, it is taken from RAY_AUTH_TOKEN or
    ~/.ray/auth_token.

    Examples:
      rewardgen submit experiments/uso_srl.yaml --address http://head:8265
      rewardgen submit experiments/uso_srl.yaml --dry-run
      rewardgen submit experiments/uso_srl.yaml train.num_steps=20 \\
        --address http://head:8265 --output /shared/runs/short --resume
    """
    from rewardgen.commands import submit as command

    options = command.Options(
        address=address,
        output=output,
        resume=resume,
        num_cpus=cpus,
        num_gpus=gpus,
        wait=wait,
        installed=installed,
        any_version=any_version,
        detach=detach,
        dry_run=dry_run,
    )
    code = command.run(experiment, options, flavor=flavor, overrides=overrides or ())
    if code:
        raise typer.Exit(code)


@jobs_app.callback()
def jobs(context: typer.Context, address: Address = None, as_json: AsJson = False) -> None:
    if context.invoked_subcommand is None:
        from rewardgen.commands import jobs as command

        command.show(address, as_json=as_json)


@jobs_app.command("follow")
def jobs_follow(job: JobName, address: Address = None) -> None:
    """Show a job's log from its beginning, until it ends.

    Ctrl-C asks whether to stop the job or to leave it running. The exit code is
    the job's own, and 130 where it was stopped.

    Examples:
      rewardgen jobs follow uso_srl-1a2b3c --address http://head:8265
    """
    from rewardgen.commands import jobs as command

    code = command.follow(address, job)
    if code:
        raise typer.Exit(code)


@jobs_app.command("stop")
def jobs_stop(job: JobName, address: Address = None) -> None:
    """Stop a job: its trainer saves a checkpoint, if its step ends within three seconds.

    After that time the cluster kills it, unless it was started with another
    RAY_JOB_STOP_WAIT_TIME_S; then the last checkpoint is that of
    train.checkpoint_every.

    Examples:
      rewardgen jobs stop uso_srl-1a2b3c --address http://head:8265
    """
    from rewardgen.commands import jobs as command

    command.stop(address, job)
