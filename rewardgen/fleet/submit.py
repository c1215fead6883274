"""The one door to Ray's job server: its address, its token, its refusals; a job's logs until it ends.

`ray` is imported when a connection is made and not before, so that help and packing need none.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from rewardgen.errors import ClusterError
from rewardgen.fleet.packing import Package, write_tree, write_zip

DEFAULT_ADDRESS = "http://localhost:8265"
"""Ray's own: the dashboard of a cluster on this machine."""
ENVIRONMENT = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Variables that Ray's client prefers even to an address that it is given."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
STOP_SECONDS = 3
"""Between SIGTERM and SIGKILL, unless the cluster was started with another RAY_JOB_STOP_WAIT_TIME_S."""
JOB_FOLDER = "rewardgen_job"
"""In the working folder on the cluster: how the job starts, what it expects, an experiment from elsewhere."""
START = f"{JOB_FOLDER}/start.sh"
SUBMITTED = f"{JOB_FOLDER}/submitted.json"

_CONNECT_SECONDS = 10.0
_RECONNECTS = 5
_TALKATIVE = ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging")
_START_SCRIPT = """\
# `python` may be any Python of this machine. The cluster's own is the one that Ray starts its workers with: the command
# line of the raylet, which is the parent of the process that runs this script, names it.
raylet=$(sed -n 's/^PPid:[[:space:]]*//p' "/proc/$PPID/status" 2>/dev/null)
python=$(tr '\\0' '\\n' <"/proc/$raylet/cmdline" 2>/dev/null | sed -n 's/^--python_worker_command=\\([^ ]*\\).*/\\1/p')
[ -x "$python" ] || python=$(command -v python3 || command -v python)
"$python" -m rewardgen.fleet.job rewardgen_job/submitted.json || exit $?
exec "$python" -m rewardgen "$@"
"""


class Jobs(Protocol):
    """What is used of `ray.job_submission.JobSubmissionClient`."""

    def submit_job(
        self,
        *,
        entrypoint: str,
        submission_id: str,
        runtime_env: dict[str, Any],
        metadata: dict[str, str],
        entrypoint_num_cpus: float | None,
        entrypoint_num_gpus: float | None,
    ) -> str: ...

    def get_job_info(self, job_id: str) -> Any: ...

    def list_jobs(self) -> list[Any]: ...

    def stop_job(self, job_id: str) -> bool: ...

    def tail_job_logs(self, job_id: str) -> AsyncIterator[str]: ...


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


def cluster_address(given: str | None, environ: Mapping[str, str]) -> str:
    """The job server's URL: what is given, else Ray's environment variables, else this machine's dashboard.

    Raises:
        ClusterError: another kind of address, such as `ray://` or that of the cluster's store.
    """
    from_ray = (environ[name] for name in ENVIRONMENT if environ.get(name, "").startswith(("http://", "https://")))
    address = given or next(from_ray, DEFAULT_ADDRESS)
    address = (address if "://" in address else f"http://{address}").rstrip("/")
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable or address == "http://auto":
        raise ClusterError(f"'{given}' is no address of a job server; it is the dashboard's, such as http://head:8265")
    return address


def use_token(environ: MutableMapping[str, str], home: Path) -> None:
    """Turn token authentication on where there is a token: Ray's client would not send it otherwise.

    Ray reads `RAY_AUTH_MODE` once, when it is first imported. What the user has set stays.
    """
    if "RAY_AUTH_MODE" in environ:
        return
    file = Path(environ.get("RAY_AUTH_TOKEN_PATH") or home / ".ray" / "auth_token")
    if environ.get("RAY_AUTH_TOKEN") or file.is_file():
        environ["RAY_AUTH_MODE"] = "token"


def connect(address: str) -> Jobs:
    """A client of the job server at `address`.

    Raises:
        ClusterError: Ray is not installed here, nothing answers, or the server refuses.
    """
    use_token(os.environ, Path.home())
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise ClusterError("submitting needs Ray: pip install 'rewardgen[ray]'") from error
    _require_listener(address)
    for module in _TALKATIVE:  # what is uploaded was said already
        logging.getLogger(f"ray.{module}").setLevel(logging.WARNING)
    with explained(address), _only_this_address():
        client: Jobs = JobSubmissionClient(address)
        return client


def require_node(address: str, *, num_cpus: float | None, num_gpus: float | None) -> None:
    """Refuse a reservation that no node of the cluster can give: the job would wait for it without a word.

    Raises:
        ClusterError: with what the nodes have.
    """
    wanted = {name: amount for name, amount in (("CPU", num_cpus), ("GPU", num_gpus)) if amount}
    if not wanted:
        return
    from ray.util.state import list_nodes

    with explained(address), _only_this_address():
        nodes = [node.resources_total or {} for node in list_nodes(address=address) if node.state == "ALIVE"]
    if not any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in nodes):
        there = "; ".join(", ".join(f"{node.get(name, 0):g} {name}" for name in ("CPU", "GPU")) for node in nodes)
        asked = " and ".join(f"{amount:g} {name}" for name, amount in wanted.items())
        raise ClusterError(
            f"no node has {asked} for the job's process; the nodes have: {there or 'nothing'}. Reserve less, or give"
            " --wait where the cluster will grow"
        )


@contextlib.contextmanager
def _only_this_address() -> Iterator[None]:
    hidden = {name: os.environ.pop(name) for name in ENVIRONMENT if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextlib.contextmanager
def explained(address: str, job_id: str | None = None) -> Iterator[None]:
    """What goes wrong in Ray's client becomes a ClusterError that says what to do."""
    try:
        yield
    except ClusterError:
        raise
    except Exception as error:
        told = _explain(error, address, job_id)
        if told is None:
            raise
        raise ClusterError(told) from error


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
        except OSError as error:
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


def _require_listener(address: str) -> None:
    """Ray's client has no time limit of its own for a host that does not answer."""
    parts = urlsplit(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((str(parts.hostname), port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise ClusterError(_unreachable(address, error.strerror or str(error))) from error


def _unreachable(address: str, reason: str) -> str:
    return (
        f"no job server answers at {address} ({reason}). It is the dashboard of the head node, port 8265 unless the"
        " cluster was started otherwise; from outside: ssh -L 8265:localhost:8265 HEAD, and --address"
        " http://localhost:8265"
    )


def _explain(error: Exception, address: str, job_id: str | None) -> str | None:
    """What to tell the user, or None for an error of ours."""
    text = " ".join(str(error).split())
    kind = type(error).__name__
    if kind == "AuthenticationError" and "Authentication failed" in text or "status code 403" in text:
        return (
            f"{address} refuses the token (403): it is another cluster's. Put this cluster's token (`ray get-auth-token`"
            " on its head node) into ~/.ray/auth_token or RAY_AUTH_TOKEN"
        )
    if kind == "AuthenticationError" or "status code 401" in text:
        return (
            f"{address} wants a token (401): set RAY_AUTH_TOKEN to what `ray get-auth-token` prints on the head node, or"
            " put it into ~/.ray/auth_token"
            + ("" if os.environ.get("RAY_AUTH_MODE", "token") == "token" else "; and RAY_AUTH_MODE is not 'token' here")
        )
    if "require the ray[default]" in text:
        return "submitting needs Ray with its job client: pip install 'rewardgen[ray]'"
    if job_id is not None and "404" in text and "does not exist" in text:
        return f"there is no job '{job_id}' at {address}; `rewardgen jobs` lists them"
    if "returned 404" in text or isinstance(error, KeyError):
        return f"{address} is no job server of Ray; on the cluster it comes with pip install 'ray[default]'"
    if isinstance(error, OSError):  # requests' errors are OSErrors, with a text that repeats itself
        return _unreachable(address, text[:200] if kind == "HTTPError" else kind)
    if isinstance(error, RuntimeError):
        return f"{address}: {text[:500]}"
    return None
