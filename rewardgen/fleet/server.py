"""The one door to Ray's job server: its address, its token, its refusals.

`ray` is imported when a connection is made and not before, so that help and packing need none.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from rewardgen.errors import ClusterError

DEFAULT_ADDRESS = "http://localhost:8265"
"""Ray's own: the dashboard of a cluster on this machine."""
ENVIRONMENT = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Variables that Ray's client prefers even to an address that it is given."""
_CONNECT_SECONDS = 10.0
_TALKATIVE = ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging")


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
        raise ClusterError("submitting needs Ray: pip install -e '.[ray]' in the checkout") from error
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
    if (kind == "AuthenticationError" and "Authentication failed" in text) or "status code 403" in text:
        return (
            f"{address} refuses the token (403): it is another cluster's. Put this cluster's (`ray get-auth-token`"
            " on its head node) into ~/.ray/auth_token or RAY_AUTH_TOKEN"
        )
    if kind == "AuthenticationError" or "status code 401" in text:
        return (
            f"{address} wants a token (401): set RAY_AUTH_TOKEN to what `ray get-auth-token` prints on the head node,"
            " or put it into ~/.ray/auth_token"
            + ("" if os.environ.get("RAY_AUTH_MODE", "token") == "token" else "; and RAY_AUTH_MODE is not 'token' here")
        )
    if "require the ray[default]" in text:
        return "submitting needs Ray with its job client: pip install -e '.[ray]' in the checkout"
    if job_id is not None and "404" in text and "does not exist" in text:
        return f"there is no job '{job_id}' at {address}; `rewardgen jobs` lists them"
    if "returned 404" in text or isinstance(error, KeyError):
        return f"{address} is no job server of Ray; on the cluster it comes with pip install 'ray[default]'"
    if isinstance(error, OSError):  # requests' errors are OSErrors, with a text that repeats itself
        return _unreachable(address, text[:200] if kind == "HTTPError" else kind)
    if isinstance(error, RuntimeError):
        return f"{address}: {text[:500]}"
    return None
