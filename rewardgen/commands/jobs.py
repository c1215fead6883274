"""`rewardgen jobs`: list, follow and stop what was submitted. Also the watching part of `rewardgen submit`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, Literal

import typer

from rewardgen.fleet import server, submit

AGAIN = "again"
"""Key of a job's metadata: the command that goes on with its run."""
STOPPED_EXIT = 130
"""As `rewardgen train` ends when it was told to stop."""


def show(address: str | None, *, as_json: bool) -> None:
    """Print the cluster's rewardgen jobs, newest first. Raises ClusterError."""
    where, client = _connect(address)
    with server.explained(where):
        found = client.list_jobs()
    ours = [info for info in found if "rewardgen" in (info.metadata or {})]
    rows = [_row(info) for info in sorted(ours, key=lambda info: info.start_time or 0, reverse=True)]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    table = [["JOB", "STATUS", "STARTED", "TOOK", "RUN FOLDER"]]
    table += [[row["job"], row["status"].lower(), row["started"], _took(row), row["run_folder"]] for row in rows]
    widths = [max(len(cells[column]) for cells in table) for column in range(len(table[0]) - 1)]
    for cells in table if rows else []:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=False))
        typer.echo("  ".join([*padded, cells[-1]]))
    others = len({info.submission_id or info.job_id for info in found}) - len(rows)
    if not rows or others:
        typer.echo(f"{len(rows) or 'no'} jobs of rewardgen at {where}, {others} others")


def follow(address: str | None, job_id: str) -> int:
    """Show a job's log from its beginning until it ends; returns the exit code. Raises ClusterError."""
    where, client = _connect(address)
    return watch(client, where, job_id)


def stop(address: str | None, job_id: str) -> None:
    """Tell a job to stop, and wait until it has. Raises ClusterError."""
    where, client = _connect(address)
    with server.explained(where, job_id):
        before = submit.status(client, job_id)
        if before in submit.ENDED:
            typer.echo(f"{job_id} has ended already: {before.lower()}")
            return
        client.stop_job(job_id)
        typer.echo(_stopping(job_id))
        ended = submit.wait_until_ended(client, job_id)
        typer.echo(f"{job_id}: {ended.lower()}")
        _say_how_to_go_on(client.get_job_info(job_id).metadata or {})


def watch(client: server.Jobs, address: str, job_id: str) -> int:
    """Write a job's log until it ends; Ctrl-C asks what to do. Returns the exit code.

    Returns:
        0 for a finished job and for one that is left running, 130 for a stopped one, else the job's own.

    Raises:
        ClusterError: there is no such job, or the connection is lost for good.
    """
    log = submit.Log(write=_write)
    with server.explained(address, job_id):
        submit.status(client, job_id)
        while True:
            try:
                ended = submit.follow(client, job_id, log)
                break
            except KeyboardInterrupt:
                wish = _ask()
            if wish == "leave":
                typer.echo(f"{job_id} goes on.")
                say_how_to_follow(address, job_id)
                return 0
            if wish == "stop":
                client.stop_job(job_id)
                typer.echo(_stopping(job_id))
        return _finish(client.get_job_info(job_id), job_id, ended)


def say_how_to_follow(address: str, job_id: str) -> None:
    """The two commands for a job that runs without being watched."""
    typer.echo(f"  rewardgen jobs follow {job_id} --address {address}")
    typer.echo(f"  rewardgen jobs stop {job_id} --address {address}")


def _connect(address: str | None) -> tuple[str, server.Jobs]:
    where = server.cluster_address(address, os.environ)
    return where, server.connect(where)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _stopping(job_id: str) -> str:
    return f"{job_id} is told to stop: it may finish its step and save a checkpoint within {submit.STOP_SECONDS} s"


def _ask() -> Literal["stop", "leave", "watch"]:
    """What Ctrl-C was meant for; without an answer the job is left running."""
    while True:
        try:
            answer = typer.prompt("\nstop the job, leave it running, or go on watching? stop/leave/watch", "leave")
        except (typer.Abort, KeyboardInterrupt):
            return "leave"
        for wish in ("stop", "leave", "watch"):
            if answer and wish.startswith(answer.strip().lower()):
                return wish


def _finish(info: Any, job_id: str, ended: str) -> int:
    metadata = info.metadata or {}
    if ended == "SUCCEEDED":
        typer.echo(f"{job_id} has finished; run folder on the cluster: {metadata.get('output', 'unknown')}")
        return 0
    if ended == "STOPPED":
        typer.echo(f"{job_id} was stopped.")
        _say_how_to_go_on(metadata)
        return STOPPED_EXIT
    code = info.driver_exit_code
    if code is None:  # it did not come to the point of writing a log
        typer.echo(f"error: {job_id} could not be started: {info.message or 'no reason is given'}", err=True)
        return 1
    typer.echo(f"error: {job_id} failed with exit code {code}", err=True)
    return int(code) or 1


def _say_how_to_go_on(metadata: Mapping[str, str]) -> None:
    if AGAIN in metadata:
        typer.echo("go on from its last checkpoint, in the folder that it was submitted from:")
        typer.echo(f"  {metadata[AGAIN]}")


def _row(info: Any) -> dict[str, Any]:
    ended = info.end_time / 1000 if info.end_time else None
    started = info.start_time / 1000 if info.start_time else None
    return {
        "job": info.submission_id,
        "status": str(getattr(info.status, "value", info.status)),
        "started": time.strftime("%Y-%m-%d %H:%M", time.localtime(started)) if started else "",
        "seconds": round((ended or time.time()) - started, 1) if started else None,
        "experiment": info.metadata.get("experiment", ""),
        "run_folder": info.metadata.get("output", ""),
    }


def _took(row: Mapping[str, Any]) -> str:
    if row["seconds"] is None:
        return ""
    minutes, seconds = divmod(round(row["seconds"]), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
