"""A real cluster, started as its users start one: `rewardgen submit` trains, streams, stops and resumes.

Long (a minute). `.ci/run` runs it from a checkout and again from the wheel.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.test_cli import TOY

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "0123456789abcdef" * 4
WARMTH = """
import time
import torch
from rewards.palette import red_minus_blue
from rewardgen.reward import Reward
from rewardgen.types import Score


class Warmth(Reward):
    differentiable = True

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.seconds = seconds

    def score(self, pixels_B3HW, examples):
        time.sleep(self.seconds)
        return Score(value_B=red_minus_blue(pixels_B3HW), valid_B=torch.ones(len(examples), dtype=torch.bool))
"""
PALETTE = """
import torch
from rewardgen.reward import Reward
from rewardgen.types import Score


def red_minus_blue(pixels_B3HW):
    return (pixels_B3HW[:, 0] - pixels_B3HW[:, 2]).mean((1, 2))


class Cold(Reward):
    def score(self, pixels_B3HW, examples):
        return Score(value_B=-red_minus_blue(pixels_B3HW), valid_B=torch.ones(len(examples), dtype=torch.bool))
"""


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in taken]


@contextlib.contextmanager
def head(home: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """A head node of its own; yields the job server's address. Ended by SIGTERM: `ray stop` would end everyone's."""
    # Short, because Ray keeps sockets in it; not the default, so that no other cluster of this machine is found.
    scratch = Path(tempfile.mkdtemp(prefix="rg", dir="/tmp"))
    log = home / "head.log"
    try:
        for trial in range(3):  # Ray's own start has fixed limits of 15 and 30 s, and a busy machine may need more
            process, address = start_head(scratch / str(trial), log, environment)
            try:
                if answers(address, process):
                    yield address
                    return
            finally:
                end(process)
        pytest.fail(f"no cluster: {log.read_text()[-3000:]}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def start_head(scratch: Path, log: Path, environment: Mapping[str, str]) -> tuple[subprocess.Popen[bytes], str]:
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    names += ("metrics-export-port", "runtime-env-agent-port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=1"]
    command += ["--disable-usage-stats", f"--temp-dir={scratch}", "--object-store-memory=80000000"]
    command += ["--min-worker-port=0", "--max-worker-port=0", *(f"--{name}={port}" for name, port in ports.items())]
    with log.open("a") as file:
        process = subprocess.Popen(command, cwd="/", env=environment, stdout=file, stderr=file, start_new_session=True)
    return process, f"http://127.0.0.1:{ports['dashboard-port']}"


def answers(address: str, process: subprocess.Popen[bytes]) -> bool:
    """Whether the job server comes up before its head node gives up."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=5).close()
            return True
        except urllib.error.HTTPError as error:
            if error.code == 401:  # it wants a token
                return True
        except OSError:
            pass
        time.sleep(0.5)
    return False


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home" / ".ray").mkdir(parents=True)
    return tmp_path / "home"


@pytest.fixture
def environment(home: Path) -> dict[str, str]:
    """Of both sides: no Ray settings of the machine, and no `python` of ours on the path."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    folders = [folder for folder in inherited["PATH"].split(":") if folder != str(Path(sys.executable).parent)]
    return inherited | {"HOME": str(home), "PATH": ":".join(folders), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with a reward in a file, a package `rewards`, a policy and data of one's own, and their experiment."""
    folder = tmp_path / "work"
    (folder / "rewards").mkdir(parents=True)
    (folder / "rewards" / "__init__.py").write_text("")
    (folder / "rewards" / "palette.py").write_text(PALETTE)
    (folder / "warmth.py").write_text(WARMTH)
    shutil.copyfile(ROOT / "tests" / "toys.py", folder / "toy_world.py")
    experiment = TOY.replace("tests.toys:ToyReward", "./warmth.py:Warmth").replace("tests.toys", "toy_world")
    experiment = experiment.replace("light: {use: brightness}", 'cold: {use: "rewards.palette:Cold"}')
    experiment = experiment.replace("{tensorboard: false}", "{tensorboard: false, log_every: 1}")
    (folder / "toy.yaml").write_text(experiment.replace("checkpoint_every: 2", "checkpoint_every: 1000"))
    (folder / ".gitignore").write_text("unwanted.bin\n")
    (folder / "unwanted.bin").write_bytes(bytes(1000))
    return folder


def call(work: Path, environment: Mapping[str, str], *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "rewardgen", *arguments],
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def interrupted(work: Path, environment: Mapping[str, str], *arguments: str) -> tuple[int, str]:
    """Ctrl-C once the second step is seen, and `stop` as the answer."""
    command = [sys.executable, "-m", "rewardgen", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=work, env=environment, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("step 2/"):
                process.send_signal(signal.SIGINT)
                process.stdin.write("stop\n")
                process.stdin.flush()
        return process.wait(60), "".join(lines)


def test_a_job_trains_streams_stops_and_resumes(
    tmp_path: Path, home: Path, work: Path, environment: dict[str, str]
) -> None:
    """Stopped by Ctrl-C and resumed on a cluster that wants a token, it ends as the same run here, undisturbed."""
    (home / ".ray" / "auth_token").write_text(TOKEN)
    output = tmp_path / "run"
    overrides = ["train.num_steps=30", "objective.rewards.style.args.seconds=0.2"]
    with head(home, environment | {"RAY_AUTH_MODE": "token"}) as address:
        at = ["--address", address]
        code, _, err = call(work, environment | {"HOME": str(tmp_path)}, "jobs", *at)
        assert code == 2
        assert "wants a token (401)" in err
        code, _, err = call(work, environment | {"RAY_AUTH_TOKEN": TOKEN[::-1]}, "jobs", *at)
        assert code == 2
        assert "refuses the token (403)" in err

        code, out = interrupted(work, environment, "submit", "toy.yaml", *overrides, *at, "--output", str(output))
        assert code == 130, out
        assert "stays here: unwanted.bin" in out
        assert re.search(
            r"^rewardgen \S+ from \S+/py_modules_files/\S+/rewardgen/__init__\.py, as submitted$", out, re.M
        )
        assert "differs from where it was submitted" not in out
        again = out.splitlines()[-1].split()
        assert again[:3] == ["rewardgen", "submit", "toy.yaml"]
        (checkpoint,) = (output / "checkpoints").glob("step-*")
        reached = int(checkpoint.name.removeprefix("step-"))
        assert 2 <= reached < 30

        code, out, err = call(work, environment, *again[1:])
        assert code == 0, out + err
        assert f"step {reached + 1}/30" in out
        assert f"step {reached}/30" not in out

        code, out, err = call(work, environment, "jobs", *at)
        assert code == 0, err
        assert [line.split()[1] for line in out.splitlines()[1:]] == ["succeeded", "stopped"]

    here = tmp_path / "here"
    code, out, err = call(work, environment, "train", "toy.yaml", "train.num_steps=30", "-o", str(here))
    assert code == 0, err
    there, undisturbed = (load_file(folder / "weights" / "toy.safetensors") for folder in (output, here))
    assert all((there[name] == undisturbed[name]).all() for name in undisturbed)
    assert (output / "comparison.json").read_text() == (here / "comparison.json").read_text()


def test_a_cluster_without_a_token_and_a_job_that_is_left_alone(
    tmp_path: Path, home: Path, work: Path, environment: dict[str, str]
) -> None:
    with head(home, environment) as address:
        at = ["--address", address]
        code, out, err = call(work, environment, "submit", "toy.yaml", "--gpus", "1", *at)
        assert code == 2
        assert "no node has 1 GPU for the job's process; the nodes have: 1 CPU, 0 GPU" in err
        slow = ["train.num_steps=500", "objective.rewards.style.args.seconds=0.2"]
        code, out, err = call(work, environment, "submit", "toy.yaml", *slow, "--detach", *at)
        assert code == 0, err
        (job,) = re.findall(r"^submitted (\S+) to", out, re.M)
        deadline = time.monotonic() + 90
        metrics = home / "runs" / "small" / "metrics.jsonl"  # the default folder: this is the cluster's home too
        while not (metrics.is_file() and '"loss"' in metrics.read_text()) and time.monotonic() < deadline:
            time.sleep(0.5)
        code, out, err = call(work, environment, "jobs", "stop", job, *at)
        assert code == 0, err
        assert f"{job}: stopped" in out
        assert list((home / "runs" / "small" / "checkpoints").glob("step-*"))
        code, out, err = call(work, environment, "jobs", "follow", job, *at)
        assert code == 130, err
        assert "step 1/500" in out
        assert "stopped after step" in out
