"""Listing, following and stopping jobs with a fake client; a server's refusals; what a job checks before training."""

from __future__ import annotations

import io
import json
import re
import socket
import threading
import tomllib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rewardgen.cli import main
from rewardgen.errors import ClusterError
from rewardgen.fleet import job, server, submit

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = "http://head:8265"
LOG = ["step 1\n", "step 2\nstep 3", "\nstep 4\n"]


class FakeClient:
    """One job whose log comes in pieces; `plan` says how each reading of the log ends.

    A number cuts the connection after so many pieces, an exception is raised after them, None reads to the end.
    """

    def __init__(self, *plan: Any, status: str = "SUCCEEDED", exit_code: int | None = 0) -> None:
        self.plan, self.ended_as, self.exit_code = list(plan), status, exit_code
        self.ended = not plan
        self.stopped = 0

    def info(self) -> Any:
        status = self.ended_as if self.ended else "RUNNING"
        return SimpleNamespace(
            submission_id="toy-1",
            job_id=None,
            status=status,
            metadata={
                "rewardgen": "1",
                "experiment": "toy",
                "output": "/shared/toy",
                "again": "rewardgen submit again",
            },
            driver_exit_code=self.exit_code if self.ended else None,
            message="no such image",
            start_time=1_000_000,
            end_time=1_065_400 if self.ended else None,
        )

    def get_job_info(self, job_id: str) -> Any:
        if job_id != "toy-1":
            raise RuntimeError(f"Request failed with status code 404: Job {job_id} does not exist.")
        return self.info()

    def list_jobs(self) -> list[Any]:
        other = SimpleNamespace(submission_id="other", job_id=None, metadata=None, start_time=5, end_time=None)
        return [other, self.info()]

    def stop_job(self, job_id: str) -> bool:
        self.stopped += 1
        self.ended, self.ended_as = True, "STOPPED"
        return True

    async def tail_job_logs(self, job_id: str) -> Any:
        end = self.plan.pop(0) if self.plan else None
        pieces = 1 if isinstance(end, BaseException) else end
        for text in LOG[:pieces]:
            yield text
        if isinstance(end, BaseException):
            raise end
        if end is None:
            self.ended = True


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run `rewardgen jobs ...` against a client; `answers` are what is typed when it asks."""
    monkeypatch.setattr(submit.time, "sleep", lambda seconds: None)

    def call(client: FakeClient, *arguments: str, answers: str = "") -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(server, "connect", lambda address: client)
        monkeypatch.setattr("sys.stdin", io.StringIO(answers))
        with pytest.raises(SystemExit) as stopped:
            main(["jobs", *arguments, "--address", ADDRESS])
        told = capsys.readouterr()
        return int(stopped.value.code or 0), told.out, told.err

    return call


def test_jobs_are_listed(run: Any) -> None:
    code, out, err = run(FakeClient())
    assert code == 0, err
    head, row, others = out.splitlines()
    assert head.split("  ")[0] == "JOB"
    assert re.fullmatch(r"toy-1 +succeeded +\d{4}-\d\d-\d\d \d\d:\d\d +0:01:05 +/shared/toy", row)
    assert others == f"1 jobs of rewardgen at {ADDRESS}, 1 others"
    code, out, _ = run(FakeClient(), "--json")
    (found,) = json.loads(out)
    assert (found["job"], found["status"], found["seconds"]) == ("toy-1", "SUCCEEDED", 65.4)


def test_a_log_is_followed_to_the_end(run: Any) -> None:
    code, out, err = run(FakeClient(None), "follow", "toy-1")
    assert (code, err) == (0, "")
    assert out == "".join(LOG) + "toy-1 has finished; run folder on the cluster: /shared/toy\n"


@pytest.mark.parametrize("plan", [(1, 2, None), (RuntimeError("closed"), 2, None), (0, OSError("gone"), 0, 3, None)])
def test_a_connection_that_breaks_is_taken_up_where_it_broke(run: Any, plan: tuple[Any, ...]) -> None:
    code, out, _ = run(FakeClient(*plan), "follow", "toy-1")
    assert code == 0
    assert out.startswith("".join(LOG) + "toy-1 has")


def test_a_dashboard_that_is_away_for_a_moment_ends_nothing(run: Any) -> None:
    """Ray's client raises RuntimeError for a proxy's 502."""

    class Away(FakeClient):
        asked = 0

        def get_job_info(self, job_id: str) -> Any:
            self.asked += 1
            if self.asked in (2, 3):
                raise RuntimeError("Request failed with status code 502: Bad Gateway.")
            return super().get_job_info(job_id)

    client = Away(1, 2, None)
    code, out, _ = run(client, "follow", "toy-1")
    assert (code, client.asked > 3) == (0, True)
    assert out.startswith("".join(LOG) + "toy-1 has")


def test_a_connection_that_is_gone_is_given_up(run: Any) -> None:
    code, out, err = run(FakeClient(*[RuntimeError("closed")] * 20), "follow", "toy-1")
    assert code == 2
    assert out == LOG[0]
    assert "the log of toy-1 broke off: closed" in err


@pytest.mark.parametrize(
    ("exit_code", "status", "code", "told"),
    [
        (3, "FAILED", 3, "toy-1 failed with exit code 3"),
        (None, "FAILED", 1, "toy-1 could not be started: no such image"),
        (None, "STOPPED", 130, ""),
    ],
)
def test_a_job_that_ends_otherwise_says_so(run: Any, exit_code: int | None, status: str, code: int, told: str) -> None:
    found, out, err = run(FakeClient(None, status=status, exit_code=exit_code), "follow", "toy-1")
    assert found == code
    assert told in err
    assert ("  rewardgen submit again" in out) == (status == "STOPPED")


def test_ctrl_c_asks_and_stops(run: Any) -> None:
    client = FakeClient(KeyboardInterrupt(), None)
    code, out, _ = run(client, "follow", "toy-1", answers="perhaps\nstop\n")
    assert (code, client.stopped) == (130, 1)
    assert out.count("stop the job, leave it running") == 2
    assert out.index("toy-1 is told to stop") < out.index("step 2") < out.index("toy-1 was stopped.")
    assert out.endswith("  rewardgen submit again\n")


@pytest.mark.parametrize("answers", ["leave\n", "\n", "l\n", ""])
def test_ctrl_c_without_an_answer_leaves_the_job_running(run: Any, answers: str) -> None:
    client = FakeClient(KeyboardInterrupt(), None)
    code, out, _ = run(client, "follow", "toy-1", answers=answers)
    assert (code, client.stopped) == (0, 0)
    assert f"rewardgen jobs follow toy-1 --address {ADDRESS}" in out


def test_ctrl_c_may_have_been_a_mistake(run: Any) -> None:
    client = FakeClient(KeyboardInterrupt(), KeyboardInterrupt(), None)
    code, out, _ = run(client, "follow", "toy-1", answers="w\nwatch\n")
    assert (code, client.stopped) == (0, 0)
    assert out.count("step 1") == out.count("step 4") == 1


def test_a_job_is_stopped_and_says_how_to_go_on(run: Any) -> None:
    client = FakeClient(None)
    code, out, _ = run(client, "stop", "toy-1")
    assert (code, client.stopped) == (0, 1)
    assert "toy-1: stopped\n" in out
    assert out.endswith("  rewardgen submit again\n")
    code, out, _ = run(client, "stop", "toy-1")
    assert (code, client.stopped) == (0, 1)
    assert out == "toy-1 has ended already: stopped\n"


def test_a_job_that_does_not_end_is_said(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient(None)
    monkeypatch.setattr(client, "stop_job", lambda job_id: True)
    clock = iter(range(0, 10_000, 7))
    monkeypatch.setattr(submit.time, "monotonic", lambda: float(next(clock)))
    code, _, err = run(client, "stop", "toy-1")
    assert code == 2
    assert "was told to stop 600 s ago and is still running" in err


@pytest.mark.parametrize("command", ["follow", "stop"])
def test_a_job_that_is_not_there(run: Any, command: str) -> None:
    code, _, err = run(FakeClient(), command, "toy-2")
    assert code == 2
    assert f"there is no job 'toy-2' at {ADDRESS}; `rewardgen jobs` lists them" in err


# --- a job server that refuses ---


@pytest.fixture
def job_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Start an HTTP server that gives one answer to everything; returns its address."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    for name in server.ENVIRONMENT:
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # Ray's client would go there
    running: list[ThreadingHTTPServer] = []

    def start(status: int, body: str) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *arguments: Any) -> None:
                pass

        running.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{running[-1].server_address[1]}"

    yield start
    for one in running:
        one.shutdown()
        one.server_close()


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (401, "Unauthorized: Missing authentication token", "wants a token (401): set RAY_AUTH_TOKEN"),
        (403, "Forbidden: Invalid authentication token", "refuses the token (403)"),
        (404, "what?", "is no job server of Ray"),
        (200, "<html>", "no job server answers"),
        (200, "{}", "is no job server of Ray"),
        (502, "bad gateway", "502 Server Error"),
        (200, '{"ray_version": "1.0", "version": "1"}', "Ray version 1.0 is running on the cluster"),
    ],
)
def test_a_refusal_is_explained(job_server: Any, status: int, body: str, told: str) -> None:
    address = job_server(status, body)
    with pytest.raises(ClusterError, match=re.escape(address)) as refused:
        server.connect(address)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_nobody_there_is_explained() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ClusterError, match=r"no job server answers .*ssh -L 8265"):
            server.connect(address)


def test_a_server_that_answers_gives_a_client(job_server: Any) -> None:
    address = job_server(200, '{"ray_version": "2.60.0", "version": "4"}')
    assert server.connect(address).get_address() == address  # type: ignore[attr-defined]


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray.job_submission", None)
    with pytest.raises(ClusterError, match=r"pip install -e '\.\[ray\]'"):
        server.connect(ADDRESS)


@pytest.mark.parametrize(
    ("num_cpus", "num_gpus", "fits"), [(4, None, True), (5, None, False), (1, 2, True), (4, 2, False)]
)
def test_what_no_node_has_is_refused(
    monkeypatch: pytest.MonkeyPatch, num_cpus: float, num_gpus: float | None, fits: bool
) -> None:
    import ray.util.state

    nodes = [({"CPU": 4.0}, "ALIVE"), ({"CPU": 2.0, "GPU": 2.0}, "ALIVE"), ({"CPU": 64.0, "GPU": 8.0}, "DEAD")]
    found = [SimpleNamespace(resources_total=resources, state=state) for resources, state in nodes]
    monkeypatch.setattr(ray.util.state, "list_nodes", lambda address: found)
    if fits:
        server.require_node(ADDRESS, num_cpus=num_cpus, num_gpus=num_gpus)
        return
    with pytest.raises(ClusterError, match="the nodes have: 4 CPU, 0 GPU; 2 CPU, 2 GPU"):
        server.require_node(ADDRESS, num_cpus=num_cpus, num_gpus=num_gpus)


# --- what a job checks before it trains ---


def check(tmp_path: Path, capsys: pytest.CaptureFixture[str], **changes: Any) -> tuple[int, str, str]:
    path = tmp_path / "submitted.json"
    path.write_text(json.dumps(job.describe() | changes))
    code = job.main([str(path)])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_the_same_rewardgen_may_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = check(tmp_path, capsys)
    assert (code, err) == (0, "")
    assert re.match(r"rewardgen \S+ from \S+/rewardgen/__init__\.py, as submitted\npython 3\.\S+, torch \S+, ", out)
    assert "differs" not in out


@pytest.mark.parametrize("change", [{"rewardgen": "0.0.1"}, {"code": "0" * 64}])
def test_another_rewardgen_is_refused_unless_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, str]
) -> None:
    code, out, err = check(tmp_path, capsys, **change)
    assert code == 2
    assert "error: the cluster runs" in err
    assert "--any-version" in err
    assert "not the submitted" in out
    code, out, err = check(tmp_path, capsys, any_version=True, **change)
    assert (code, err) == (0, "")
    assert "not the submitted" in out


def test_other_libraries_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    versions = job.describe()["versions"] | {"torch": "1.0", "ray": None}
    code, out, _ = check(tmp_path, capsys, python="3.99.0", versions=versions)
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.startswith("differs from where it was submitted: ")]
    assert re.search(r"python 3\.1\S+ here, 3\.99\.0 there; torch \S+ here, 1\.0 there$", line)


def test_missing_libraries_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "REQUIRED", (*job.REQUIRED, "no-such-thing"))
    code, _, err = check(tmp_path, capsys)
    assert code == 2
    assert re.search(r"lacks no-such-thing; install them on every node: \S+ -m pip install no-such-thing", err)


def test_what_is_required_is_what_pyproject_requires() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [re.split(r"[><=~!]", line)[0] for line in project["dependencies"]] == list(job.REQUIRED)
