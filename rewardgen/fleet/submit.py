"""A job on a Ray cluster: what is uploaded for it, how it starts there, its log until it ends."""

from __future__ import annotations

import asyncio
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewardgen.errors import ClusterError
from rewardgen.fleet.packing import Package, write_tree, write_zip
from rewardgen.fleet.server import Jobs

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
STOP_SECONDS = 3
"""Between SIGTERM and SIGKILL, unless the cluster was started with another RAY_JOB_STOP_WAIT_TIME_S."""
JOB_FOLDER = "rewardgen_job"
"""In the working folder on the cluster: how the job starts, what it expects, an experiment from elsewhere."""
START = f"{JOB_FOLDER}/start.sh"
SUBMITTED = f"{JOB_FOLDER}/submitted.json"

_RECONNECTS = 5
_START_SCRIPT = """\
# `python` may be any Python of this machine. The cluster's own is the one that Ray starts its workers with: the command
# line of the raylet, which is the parent of the process that runs this script, names it.
raylet=$(sed -n 's/^PPid:[[:space:]]*//p' "/proc/$PPID/status" 2>/dev/null)
python=$(tr '\\0' '\\n' <"/proc/$raylet/cmdline" 2>/dev/null | sed -n 's/^--python_worker_command=\\([^ ]*\\).*/\\1/p')
[ -x "$python" ] || python=$(command -v python3 || command -v python)
"$python" -m rewardgen.fleet.job rewardgen_job/submitted.json || exit $?
exec "$python" -m rewardgen "$@"
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One job, ready to be uploaded.

    Args:
        job_id: its name on the cluster, without spaces and slashes.
        arguments: of `rewardgen`, such as `["train", "experiments/uso_srl.yaml"]`.
        output: the run's folder on the cluster; `~` is the home folder there.
        working: the working folder's files.
        own: rewardgen's, or None where the cluster's own is to run.
        extra: further files for `JOB_FOLDER`, by full name.
        metadata: shown by `rewardgen jobs`.
        num_cpus, num_gpus: reserved for the process that trains; None reserves nothing and runs on the head node.
    """

    job_id: str
    arguments: Sequence[str]
    output: str
    working: Package
    own: Package | None
    extra: Mapping[str, bytes]
    metadata: Mapping[str, str]
    num_cpus: float | None = None
    num_gpus: float | None = None

    def entrypoint(self) -> str:
        """The shell command that Ray runs in the working folder."""
        # A tilde in quotes would stay a tilde.
        tilde, output = ("~/", self.output[2:]) if self.output.startswith("~/") else ("", self.output)
        return f"exec sh {START} {shlex.join(self.arguments)} --output {tilde}{shlex.quote(output)}"


def pack(request: Request, scratch: Path) -> dict[str, Any]:
    """Write what travels into an empty folder; returns Ray's runtime environment of it."""
    archive = scratch / "working.zip"
    start = {START: _START_SCRIPT.encode()}
    write_zip({**request.working.files, **request.extra, **start}, archive)
    runtime_env: dict[str, Any] = {"working_dir": str(archive)}
    if request.own is not None:
        # The folder itself: its parent would be no module, and a module object cannot travel.
        write_tree(request.own.files, scratch / "modules")
        runtime_env["py_modules"] = [str(scratch / "modules" / "rewardgen")]
    return runtime_env


def submit(client: Jobs, request: Request) -> str:
    """Upload what travels and start the job; returns its id. What the cluster has from before is not sent again."""
    with tempfile.TemporaryDirectory(prefix="rewardgen-") as scratch:
        return client.submit_job(
            entrypoint=request.entrypoint(),
            submission_id=request.job_id,
            runtime_env=pack(request, Path(scratch)),
            metadata=dict(request.metadata),
            entrypoint_num_cpus=request.num_cpus,
            entrypoint_num_gpus=request.num_gpus,
        )


@dataclass(kw_only=True, slots=True)
class Log:
    """How far a job's log was written: a second `follow` goes on there."""

    write: Callable[[str], None]
    seen: int = 0


def follow(client: Jobs, job_id: str, log: Log) -> str:
    """Write a job's log until the job has ended; a lost connection is taken up again where it broke.

    Returns:
        The job's status.

    Raises:
        ClusterError: the connection was lost several times in a row.
    """
    lost = 0
    while True:
        before, failure = log.seen, None
        try:
            asyncio.run(_tail(client, job_id, log))
        except Exception as error:  # of three libraries, and all mean that no more can be read
            failure = error
        try:
            now = status(client, job_id)
        except (OSError, RuntimeError) as error:  # Ray's client raises the latter for a proxy's 502
            failure = error
        else:
            if failure is None and now in ENDED:
                return now
        lost = 1 if log.seen > before else lost + 1
        if lost > _RECONNECTS:
            raise ClusterError(f"the log of {job_id} broke off: {failure or 'the job goes on without one'}")
        time.sleep(lost)


async def _tail(client: Jobs, job_id: str, log: Log) -> None:
    position = 0  # Ray begins at the log's beginning each time
    async for text in client.tail_job_logs(job_id):
        fresh = text[max(0, log.seen - position) :]
        position += len(text)
        if fresh:
            log.seen = position
            log.write(fresh)


def status(client: Jobs, job_id: str) -> str:
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    found = client.get_job_info(job_id).status
    return str(getattr(found, "value", found))


def wait_until_ended(client: Jobs, job_id: str, *, timeout_s: float = 600.0) -> str:
    """The status of a job that was told to stop. Raises ClusterError where it does not end."""
    deadline = time.monotonic() + timeout_s
    while (now := status(client, job_id)) not in ENDED:
        if time.monotonic() > deadline:
            raise ClusterError(f"{job_id} was told to stop {timeout_s:.0f} s ago and is still {now.lower()}")
        time.sleep(0.3)
    return now
