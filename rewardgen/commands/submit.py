"""`rewardgen submit`: a run on a Ray cluster, from a laptop. What can be refused is refused before anything is sent."""

from __future__ import annotations

import json
import os
import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import typer

from rewardgen import __version__, build, config
from rewardgen.commands import jobs
from rewardgen.errors import ConfigError
from rewardgen.fleet import job, packing, server, submit
from rewardgen.manifest import is_secret


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options of the command; see its help."""

    address: str | None
    output: str | None
    resume: bool
    num_cpus: float | None
    num_gpus: float | None
    wait: bool
    installed: bool
    any_version: bool
    detach: bool
    dry_run: bool


def run(experiment: Path, options: Options, *, flavor: str | None, overrides: Sequence[str]) -> int:
    """Check, pack, upload, and follow until the job ends or is left; returns the exit code.

    Raises:
        UserError: the experiment is faulty, what it names cannot travel, too much would, or the cluster refuses.
    """
    # Before any plug-in may import ray, which reads this once.
    server.use_token(os.environ, Path.home())
    _refuse_secrets(overrides)
    root, address = Path.cwd(), server.cluster_address(options.address, os.environ)
    loaded = config.load_experiment(experiment, flavor, overrides)
    output = run_folder(options.output, loaded.name)
    build.require_sources(loaded)
    found = packing.needs(config.plugins_in(loaded), root)
    packing.refuse(found, str(experiment))

    inside = packing.within(root, experiment)
    name = inside.relative_to(root.resolve()).as_posix() if inside else f"{submit.JOB_FOLDER}/{experiment.name}"
    working = packing.working_files(root, [*found.files, *([inside] if inside else [])])
    own = None if options.installed else packing.own_package()
    packing.check_size(working, str(root))
    _say_what_travels(root, working, own, found, output)
    if options.dry_run:
        for file, path in working.files.items():
            typer.echo(f"  {packing.show_size(path.stat().st_size):>10}  {file}")
        return 0

    extra = {submit.SUBMITTED: json.dumps(job.describe(any_version=options.any_version), indent=1).encode()}
    if inside is None:
        extra[name] = experiment.read_bytes()
    again = _again(experiment, options, flavor, overrides, address=address, output=output)
    request = submit.Request(
        job_id=f"{loaded.name}-{secrets.token_hex(3)}",
        arguments=["train", *_words(name, flavor, overrides, resume=options.resume)],
        output=output,
        working=working,
        own=own,
        extra=extra,
        metadata={"rewardgen": __version__, "experiment": loaded.name, "output": output, jobs.AGAIN: again},
        num_cpus=options.num_cpus,
        num_gpus=options.num_gpus,
    )
    client = server.connect(address)
    if not options.wait:
        server.require_node(address, num_cpus=options.num_cpus, num_gpus=options.num_gpus)
    with server.explained(address):
        job_id = submit.submit(client, request)
    typer.echo(f"submitted {job_id} to {address}")
    if options.detach:
        jobs.say_how_to_follow(address, job_id)
        return 0
    return jobs.watch(client, address, job_id)


def run_folder(given: str | None, name: str) -> str:
    """The run's folder on the cluster. Raises ConfigError for a path that would be gone with the job."""
    output = given or f"~/runs/{name}"
    if not (output.startswith("~/") or PurePosixPath(output).is_absolute()):
        raise ConfigError(
            f"--output {output}: a job's own folder is deleted with it; give an absolute path that the cluster sees,"
            " or '~/...' in quotes for the home folder there"
        )
    return output


def _refuse_secrets(overrides: Sequence[str]) -> None:
    for override in overrides:
        key = override.partition("=")[0]
        if is_secret(key):
            raise ConfigError(
                f"{key} is a secret, and a job's command line is shown to everyone who sees the cluster; put it into"
                " the environment of the cluster's nodes or a file there"
            )


def _words(experiment: str, flavor: str | None, overrides: Sequence[str], *, resume: bool) -> list[str]:
    flags = (["--flavor", flavor] if flavor else []) + (["--resume"] if resume else [])
    return [experiment, *overrides, *flags]


def _again(
    experiment: Path, options: Options, flavor: str | None, overrides: Sequence[str], *, address: str, output: str
) -> str:
    """The command that goes on with the run, from the same folder."""
    flags = [("--installed", options.installed), ("--any-version", options.any_version), ("--wait", options.wait)]
    numbers = [("--cpus", options.num_cpus), ("--gpus", options.num_gpus)]
    return shlex.join(
        [
            "rewardgen",
            "submit",
            *_words(str(experiment), flavor, overrides, resume=True),
            *("--address", address, "--output", output),
            *(word for name, number in numbers if number is not None for word in (name, f"{number:g}")),
            *(name for name, given in flags if given),
        ]
    )


def _say_what_travels(
    root: Path, working: packing.Package, own: packing.Package | None, found: packing.Needs, output: str
) -> None:
    typer.echo(f"travels: {len(working.files)} files of {root}, {packing.show_size(working.num_bytes())}")
    if own is not None:
        typer.echo(f"travels: rewardgen {__version__}, {packing.show_size(own.num_bytes())}")
    if working.left_out:
        typer.echo(f"stays here: {', '.join(working.left_out)}")
    for line in found.elsewhere:
        typer.echo(f"the cluster must have {line}")
    typer.echo(f"run folder on the cluster: {output}")
