"""What travels with a submitted job: against git's own reading of ignore files, and up to Ray's client (a fake)."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rewardgen import __version__
from rewardgen.cli import main
from rewardgen.errors import ClusterError, ConfigError, UserError
from rewardgen.fleet import ignores, job, packing, server, submit
from rewardgen.settings import Plugin
from tests.test_cli import TOY

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = "http://head:8265"
MINE = """
from rewards.shared import half
from rewardgen.rewards.brightness import Brightness


class Mine(Brightness):
    def score(self, pixels_B3HW, examples):
        return super().score(half(pixels_B3HW), examples)
"""


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def git(folder: Path, *command: str) -> str:
    environment = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    done = subprocess.run(["git", *command], cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


# --- ignore files ---


def test_ignore_files_are_read_as_git_reads_them(tmp_path: Path) -> None:
    """Random trees and patterns: what travels is exactly what `git ls-files` would have added."""
    rng = random.Random(0)
    words = ["a", "b", "ab", "a.txt", "b.py", "x y", "a#b", "!b"]
    globs = [*words, "*", "?", "a*", "*.txt", "[ab]", "[!a]", "[^b]*", "**", r"\!b", r"a\#b", r"x\ y", "*b*"]
    kept = dropped = 0
    git(tmp_path, "init", "-q")
    for trial in range(40):
        root = tmp_path / str(trial)
        root.mkdir()
        places = {"/".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(15)}
        for place in sorted(places):
            target = root / place
            if not any(parent.is_file() for parent in target.parents) and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text("")
        for folder in [root, *(path for path in root.rglob("*") if path.is_dir() and rng.random() < 0.3)]:
            lines = []
            for _ in range(rng.randint(1, 4)):
                line = "/".join(rng.choices(globs, k=rng.randint(1, 3)))
                lines.append(rng.choice(["", "", "!", "/", "#"]) + line + rng.choice(["", "", "/", "  "]))
            (folder / ".gitignore").write_text("\n".join(lines) + "\n")
        wanted = set(filter(None, git(root, "ls-files", "--others", "--exclude-standard", "-z").split("\0")))
        every = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
        assert set(packing.working_files(root).files) == wanted, f"trial {trial}"
        kept, dropped = kept + len(wanted), dropped + len(every - wanted)
    assert min(kept, dropped) > 100


def test_rayignore_decides_after_gitignore_and_the_repository_around_counts(tmp_path: Path) -> None:
    fill(tmp_path, {".gitignore": "*.log\n/top.txt\n", "work/top.txt": "", "work/a.log": "", "work/keep.log": ""})
    fill(tmp_path / "work", {"big.bin": "", ".rayignore": "*.bin\n!keep.log\n", "deep/b.log": ""})
    (tmp_path / ".git").mkdir()
    package = packing.working_files(tmp_path / "work")
    assert set(package.files) == {".rayignore", "top.txt", "keep.log"}
    assert package.left_out == ["a.log", "big.bin", "deep/b.log"]


def test_some_things_never_travel_unless_taken_back(tmp_path: Path) -> None:
    fill(tmp_path, {"a.py": "", "__pycache__/a.pyc": "", ".env": "KEY=1", "mine.pyc": "", "node_modules/x.js": ""})
    fill(tmp_path, {"anything/pyvenv.cfg": "", "anything/lib/x.py": ""})
    fill(tmp_path, {"runs/one/manifest.json": "{}", "runs/one/checkpoints/x": "", "runs/notes.txt": ""})
    assert set(packing.working_files(tmp_path).files) == {"a.py", "runs/notes.txt"}
    (tmp_path / ".rayignore").write_text("!.env\n")
    assert ".env" in packing.working_files(tmp_path).files


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    fill(tmp_path, {"data/a.txt": "there", "work/b.txt": ""})
    (tmp_path / "work" / "data").symlink_to(tmp_path / "data")
    (tmp_path / "work" / "up").symlink_to(tmp_path / "work")
    (tmp_path / "work" / "nowhere").symlink_to(tmp_path / "gone")
    package = packing.working_files(tmp_path / "work")
    assert set(package.files) == {"b.txt", "data/a.txt"}


def test_a_folder_that_is_no_project_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="is no project's folder"):
        packing.working_files(tmp_path)
    monkeypatch.setattr(packing, "MAX_FILES", 3)
    (tmp_path / "work").mkdir()
    fill(tmp_path / "work", {f"{number}.txt": "" for number in range(4)})
    with pytest.raises(UserError, match="more than 3 files"):
        packing.working_files(tmp_path / "work")


def test_an_ignore_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / ".rayignore").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"\.rayignore cannot be read as text"):
        ignores.read(tmp_path)


# --- sizes and archives ---


def test_what_is_too_large_is_refused_with_the_largest_and_the_way_out(tmp_path: Path) -> None:
    fill(tmp_path, {"data/one.bin": "x" * 600, "data/two.bin": "x" * 500, "code.py": "x" * 50})
    package = packing.working_files(tmp_path)
    packing.check_size(package, "it", limit=1150)
    with pytest.raises(UserError) as refused:
        packing.check_size(package, "it", limit=1149)
    rows = [line.split() for line in str(refused.value).splitlines() if line.startswith("  ")]
    assert [row[-1] for row in rows] == ["data/", "data/one.bin", "data/two.bin", "code.py"]
    assert ".rayignore, written as in a .gitignore: data/" in str(refused.value)
    (tmp_path / ".rayignore").write_text("data/\n")
    packing.check_size(packing.working_files(tmp_path), "it", limit=60)


def test_an_archive_depends_on_names_and_contents_alone(tmp_path: Path) -> None:
    fill(tmp_path, {"a.txt": "one", "b/c.txt": "two"})
    files = {"a.txt": tmp_path / "a.txt", "b/c.txt": tmp_path / "b" / "c.txt", "made": b"three"}
    packing.write_zip(files, tmp_path / "first.zip")
    os.utime(tmp_path / "a.txt", (0, 0))
    packing.write_zip(dict(reversed(files.items())), tmp_path / "second.zip")
    assert (tmp_path / "first.zip").read_bytes() == (tmp_path / "second.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "first.zip") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {
            "a.txt": b"one",
            "b/c.txt": b"two",
            "made": b"three",
        }


def test_the_package_travels_as_a_wheel_has_it(tmp_path: Path) -> None:
    """All packages of pyproject.toml; imported elsewhere it is whole, and has the same digest."""
    package = packing.own_package()
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    for name in listed:
        assert f"{name.replace('.', '/')}/__init__.py" in package.files
    assert "rewardgen/world/assets/csd.safetensors" in package.files
    packing.check_size(package, "rewardgen")
    packing.write_tree(package.files, tmp_path / "modules")
    ask = "import rewardgen.policies as p, rewardgen.fleet.job as j; print(p.__file__, j.code_digest())"
    done = subprocess.run(
        [sys.executable, "-c", ask],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "modules")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(tmp_path / "modules/rewardgen/policies/__init__.py"), job.code_digest()]


def test_rewardgens_own_folders_do_not_travel_with_the_working_folder(tmp_path: Path) -> None:
    if (ROOT / "rewardgen").is_dir():  # a checkout; a wheel is tested from a folder without it
        names = packing.working_files(ROOT).files
        assert "tests/toys.py" in names
        assert not [name for name in names if name.startswith(("rewardgen/", "rewards/", "policies/"))]
    fill(tmp_path, {"rewardgen/__init__.py": "", "rewards/mine.py": "", "policies/mine.py": ""})
    assert set(packing.working_files(tmp_path).files) == {"rewards/mine.py", "policies/mine.py"}


# --- what an experiment needs ---


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder: a reward in a file, a package `rewards`, an experiment, and data that git ignores."""
    folder = tmp_path / "work"
    fill(folder, {"mine.py": MINE, "rewards/__init__.py": "", "rewards/shared.py": "def half(x):\n    return x / 2\n"})
    fill(folder, {"data/rows.jsonl": "{}\n", "data/x.png": "x", ".gitignore": "data/\nsecret.txt\n", "secret.txt": "!"})
    fill(folder, {"toy.yaml": TOY.replace("use: brightness", 'use: "./mine.py:Mine"')})
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    for name in server.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in [name for name in sys.modules if name == "rewards" or name.startswith("rewards.")]:
        del sys.modules[name]


def needs(work: Path, use: str = "brightness", **args: Any) -> packing.Needs:
    return packing.needs([("data.train", "data", Plugin(use=use, args=args))], work)


def test_what_an_experiment_names_travels_although_it_is_ignored(work: Path) -> None:
    found = needs(work, "./mine.py:Mine", path="data/rows.jsonl")
    assert found.files == [work / "mine.py", work / "data" / "rows.jsonl"]
    assert not found.faults
    files = packing.working_files(work, found.files).files
    assert "data/rows.jsonl" in files
    assert "data/x.png" not in files
    whole = packing.working_files(work, needs(work, path="./data").files).files
    assert {"data/rows.jsonl", "data/x.png"} < set(whole)
    assert "secret.txt" not in whole


def test_a_module_of_the_users_package_brings_the_package(work: Path) -> None:
    (work / ".gitignore").write_text("rewards/\n")
    assert "rewards/shared.py" not in packing.working_files(work).files
    found = needs(work, "rewards.shared:half")
    assert set(packing.working_files(work, found.files).files) > {"rewards/__init__.py", "rewards/shared.py"}


@pytest.mark.parametrize("use", ["brightness", "uso", "jsonl", "rewardgen.world.dataset:TinyWorld"])
def test_what_rewardgen_brings_needs_nothing(work: Path, use: str) -> None:
    assert needs(work, use, weights="world:csd.safetensors") == packing.Needs()


@pytest.mark.parametrize(
    ("use", "args", "told"),
    [
        ("json:JSONDecoder", {}, "data.train.use: the package 'json'"),
        ("brightness", {"path": "/mnt/rows.jsonl"}, "data.train.args.path: /mnt/rows.jsonl (looked up on the cluster)"),
        ("brightness", {"path": "~/rows.jsonl"}, "data.train.args.path: ~/rows.jsonl (looked up on the cluster)"),
        ("brightness", {"base": "black-forest/FLUX"}, "data.train.args.base: black-forest/FLUX (hub repository)"),
    ],
)
def test_what_the_cluster_must_have_is_said(work: Path, use: str, args: dict[str, Any], told: str) -> None:
    found = needs(work, use, **args)
    assert (found.elsewhere, found.files, found.faults) == ([told], [], [])


@pytest.mark.parametrize(
    ("use", "args", "fault"),
    [
        ("../other.py:Other", {}, "../other.py lies outside of the working folder"),
        ("brightness", {"path": "../rows.jsonl"}, "../rows.jsonl lies outside of the working folder"),
        ("brightness", {"path": "data/gone.jsonl"}, "there is no data/gone.jsonl in"),
    ],
)
def test_what_can_neither_travel_nor_be_there_is_refused(
    work: Path, use: str, args: dict[str, Any], fault: str
) -> None:
    (work.parent / "rows.jsonl").write_text("{}")
    (work.parent / "other.py").write_text("")
    found = needs(work, use, **args)
    assert fault in found.faults[0]
    with pytest.raises(ConfigError, match=r"x\.yaml cannot run as a job"):
        packing.refuse(found, "x.yaml")


# --- the command ---


class FakeClient:
    """Ray's client as far as it is used; the archive is read while it exists."""

    def __init__(self, status: str = "SUCCEEDED", log: str = "") -> None:
        self.status, self.log = status, log
        self.submitted: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.modules: list[str] = []

    def submit_job(self, **given: Any) -> str:
        self.submitted = given
        with zipfile.ZipFile(given["runtime_env"]["working_dir"]) as archive:
            self.files = {name: archive.read(name) for name in archive.namelist()}
        for module in given["runtime_env"].get("py_modules", []):
            self.modules += sorted(path.name for path in Path(module).iterdir())
        return str(given["submission_id"])

    def get_job_info(self, job_id: str) -> Any:
        metadata = self.submitted.get("metadata", {})
        code = {"SUCCEEDED": 0, "FAILED": 3}.get(self.status)
        return SimpleNamespace(status=self.status, metadata=metadata, driver_exit_code=code, message="")

    async def tail_job_logs(self, job_id: str) -> Any:
        yield self.log


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    fake = FakeClient(log="step 1\n")
    monkeypatch.setattr(server, "connect", lambda address: fake)
    return fake


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        told = capsys.readouterr()
        return int(stopped.value.code or 0), told.out, told.err

    return call


def test_a_job_is_submitted_with_what_it_needs(work: Path, client: FakeClient, run: Any) -> None:
    code, out, err = run(
        "submit",
        "toy.yaml",
        "train.num_steps=2",
        "data.train.args.seed=3",
        "--address",
        ADDRESS,
        "--resume",
        "-o",
        "/s p",
    )
    assert code == 0, err
    given = client.submitted
    name = given["submission_id"]
    assert name.startswith("small-")
    command = "train toy.yaml train.num_steps=2 data.train.args.seed=3 --resume --output '/s p'"
    assert given["entrypoint"] == f"exec sh rewardgen_job/start.sh {command}"
    assert given["entrypoint_num_gpus"] is None
    assert {"mine.py", "rewards/shared.py", "toy.yaml", "rewardgen_job/start.sh"} <= set(client.files)
    assert "secret.txt" not in client.files
    assert {"rewards", "policies", "world", "cli.py"} <= set(client.modules)
    submitted = json.loads(client.files["rewardgen_job/submitted.json"])
    assert (submitted["rewardgen"], submitted["code"]) == (__version__, job.code_digest())
    assert f"submitted {name} to {ADDRESS}\nstep 1\n" in out
    assert "stays here: data/, secret.txt" in out
    assert f"{name} has finished; run folder on the cluster: /s p" in out
    again = given["metadata"]["again"]
    assert again.startswith("rewardgen submit toy.yaml train.num_steps=2 data.train.args.seed=3 --resume --address")
    assert again.endswith("--output '/s p'")


def test_an_experiment_from_elsewhere_and_the_folder_of_runs(work: Path, client: FakeClient, run: Any) -> None:
    (work / "toy.yaml").rename(work.parent / "toy.yaml")
    code, out, err = run(
        "submit", "../toy.yaml", "--detach", "--installed", "--gpus", "0.5", "--wait", "--address", "h:1"
    )
    assert code == 0, err
    assert client.files["rewardgen_job/toy.yaml"] == (work.parent / "toy.yaml").read_bytes()
    # The tilde is for the shell there.
    assert client.submitted["entrypoint"].endswith("train rewardgen_job/toy.yaml --output ~/runs/small")
    assert "py_modules" not in client.submitted["runtime_env"]
    assert client.submitted["entrypoint_num_gpus"] == 0.5
    assert f"rewardgen jobs follow {client.submitted['submission_id']} --address http://h:1" in out
    assert "step 1" not in out


def test_a_dry_run_lists_and_asks_no_cluster(work: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "connect", lambda address: pytest.fail("the cluster was asked"))
    code, out, err = run("submit", "toy.yaml", "--dry-run")
    assert code == 0, err
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("  ")] == [
        ".gitignore",
        "mine.py",
        "rewards/__init__.py",
        "rewards/shared.py",
        "toy.yaml",
    ]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train.num_stepz=2"], "Did you mean 'num_steps'?"),
        (["evaluation.witnesses.light.use=./gone.py:Gone"], "there is no file"),
        (["data.train.args.api_key=hush-hush-hush"], "data.train.args.api_key is a secret"),
        (["-o", "runs/here"], "a job's own folder is deleted with it"),
        (["--address", "ray://head:10001"], "no address of a job server"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_sent(
    work: Path, run: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str
) -> None:
    monkeypatch.setattr(server, "connect", lambda address: pytest.fail("the cluster was asked"))
    code, _, err = run("submit", "toy.yaml", *arguments)
    assert code == 2
    assert told in err
    assert "hush" not in err


def test_too_much_is_refused_before_anything_is_sent(work: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "connect", lambda address: pytest.fail("the cluster was asked"))
    with (work / "big.bin").open("wb") as file:
        file.truncate(packing.MAX_BYTES)
    code, _, err = run("submit", "toy.yaml")
    assert code == 2
    assert "big.bin" in err
    assert ".rayignore" in err


# --- addresses, tokens, the cluster's Python ---


@pytest.mark.parametrize(
    ("given", "environ", "address"),
    [
        (None, {}, "http://localhost:8265"),
        ("head:8265", {"RAY_ADDRESS": "http://other:1"}, "http://head:8265"),
        ("https://head/ray/", {}, "https://head/ray"),
        (None, {"RAY_API_SERVER_ADDRESS": "http://a:1", "RAY_ADDRESS": "http://b:1"}, "http://a:1"),
        (None, {"RAY_ADDRESS": "10.0.0.1:6379"}, "http://localhost:8265"),
    ],
)
def test_an_address_is_found(given: str | None, environ: dict[str, str], address: str) -> None:
    assert server.cluster_address(given, environ) == address


@pytest.mark.parametrize("given", ["auto", "ray://head:10001", "http://", "http://head:x", "anyscale://thing"])
def test_other_addresses_are_refused(given: str) -> None:
    with pytest.raises(ClusterError, match="no address of a job server"):
        server.cluster_address(given, {})


def test_a_token_is_used_where_there_is_one(tmp_path: Path) -> None:
    def mode(**environ: str) -> str | None:
        server.use_token(environ, tmp_path)
        return environ.get("RAY_AUTH_MODE")

    assert mode() is None
    assert mode(RAY_AUTH_TOKEN="t") == "token"
    fill(tmp_path, {".ray/auth_token": "t", "elsewhere": "t"})
    assert mode() == "token"
    assert mode(RAY_AUTH_MODE="disabled") == "disabled"
    assert mode(RAY_AUTH_TOKEN_PATH=str(tmp_path / "elsewhere")) == "token"
    assert mode(RAY_AUTH_TOKEN_PATH=str(tmp_path / "gone")) is None


SUPERVISOR = "import subprocess, sys; sys.exit(subprocess.call(['sh', *sys.argv[1:]]))"
RAYLET = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', sys.argv[1], *sys.argv[3:]]))"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the cluster's nodes run Linux")
@pytest.mark.parametrize("check", [0, 2])
def test_the_job_runs_in_the_python_of_the_clusters_workers(tmp_path: Path, check: int) -> None:
    """A process as Ray's raylet, with a child as its job supervisor; `python` on the path is another one."""
    fill(tmp_path, {"start.sh": submit._START_SCRIPT, "venv/python": "", "path/python": "", "path/python3": ""})
    for name in ("venv", "path"):
        for python in (tmp_path / name).iterdir():
            python.write_text(f'#!/bin/sh\necho {name} "$@"\n[ "$2" != rewardgen.fleet.job ] || exit {check}\n')
            python.chmod(0o755)
    worker = f"--python_worker_command={tmp_path}/venv/python setup_worker.py --more=1"
    command = [sys.executable, "-c", RAYLET, SUPERVISOR, worker, "start.sh", "train", "a b.yaml"]
    environment = os.environ | {"PATH": f"{tmp_path}/path:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    lines = ["venv -m rewardgen.fleet.job rewardgen_job/submitted.json", "venv -m rewardgen train a b.yaml"]
    assert done.stdout.splitlines() == lines[: 1 if check else 2]
    assert done.returncode == check
    alone = subprocess.run(
        ["sh", "start.sh", "train"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert alone.stdout.startswith("path -m")
