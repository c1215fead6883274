"""Reporting: one line for each step, whatever died in between; the console; the manifest without secrets."""

from __future__ import annotations

import hashlib
import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

import rewardgen
from rewardgen import manifest
from rewardgen.errors import UserError
from rewardgen.manifest import redact, write_manifest
from rewardgen.report import ReportConfig, Reporter, WandbConfig
from rewardgen.types import StepReport

FILE_ONLY = ReportConfig(tensorboard=False, console=False)


def report_of(step: int, **changes: Any) -> StepReport:
    report = StepReport(
        step=step,
        policy_version=step,
        loss=0.5 + step,
        terms={"flow_matching": 0.75, "style": -0.25},
        reward_means={"style": 0.625},
        valid_counts={"style": 15},
        grad_norm=2.0,
        grad_norms={"style": 1.5},
        lr=1e-3,
        entry_step=7,
        skipped=False,
        seconds_by_phase={"rollout": 0.25, "backward": 0.5},
        peak_memory_bytes=1 << 30,
        metrics={"cosine": 0.1},
    )
    return replace(report, **changes)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stations(folder: Path) -> list[tuple[str, int]]:
    return [(line["kind"], line["step"]) for line in lines(folder)]


def test_a_line_holds_the_whole_report_and_is_there_at_once(tmp_path: Path) -> None:
    with Reporter(tmp_path / "new" / "run", FILE_ONLY, num_steps=2) as reporter:
        reporter.start()
        reporter.step(report_of(0))
        (line,) = lines(tmp_path / "new" / "run")
    expected = {name: getattr(report_of(0), name) for name in StepReport.__slots__}
    assert line == {"kind": "step", **expected}


def test_numbers_that_are_none_are_null(tmp_path: Path) -> None:
    with Reporter(tmp_path, ReportConfig(console=False), num_steps=1) as reporter:
        reporter.step(report_of(0, loss=math.nan, grad_norm=math.inf, entry_step=None, terms={"style": math.nan}))
        reporter.evaluation(1, {"style": math.nan})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    step, evaluation = lines(tmp_path)
    assert step["loss"] is step["grad_norm"] is step["entry_step"] is step["terms"]["style"] is None
    assert evaluation == {"kind": "evaluation", "step": 1, "values": {"style": None}}


def run(folder: Path, first: int, last: int, every: int = 2) -> None:
    """As the trainer does: step of index i, then an evaluation after i + 1 steps; the first one before all."""
    with Reporter(folder, FILE_ONLY, num_steps=10) as reporter:
        reporter.start(first)
        reporter.evaluation(0, {"style": 0.0})
        for step in range(first, last):
            reporter.step(report_of(step))
            if (step + 1) % every == 0:
                reporter.evaluation(step + 1, {"style": float(step)})


@pytest.mark.parametrize("checkpoint", range(6))
def test_no_step_stands_twice_after_resuming(tmp_path: Path, checkpoint: int) -> None:
    run(tmp_path, 0, 6)
    run(tmp_path, checkpoint, 8)
    run(tmp_path / "straight", 0, 8)
    assert sorted(stations(tmp_path)) == sorted(stations(tmp_path / "straight"))
    assert len(set(stations(tmp_path))) == len(stations(tmp_path))


def test_a_run_that_starts_anew_keeps_nothing(tmp_path: Path) -> None:
    run(tmp_path, 0, 6)
    run(tmp_path, 0, 1)
    assert stations(tmp_path) == [("evaluation", 0), ("step", 0)]


def test_half_a_line_of_a_dead_writer_goes(tmp_path: Path) -> None:
    run(tmp_path, 0, 3)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "step", "step": 3, "lo\xff')
    run(tmp_path, 3, 4)
    assert [step for kind, step in stations(tmp_path) if kind == "step"] == [0, 1, 2, 3]


def test_a_full_disk_says_which_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written"):
        Reporter(tmp_path / "file", FILE_ONLY, num_steps=1).start()

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    reporter = Reporter(tmp_path, FILE_ONLY, num_steps=1)
    reporter.start()
    monkeypatch.setattr(reporter, "_file", Full())
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written: No space left"):
        reporter.step(report_of(0))


def test_tensorboard_draws_each_step_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = ReportConfig(console=False)
    for first, last in ((0, 4), (2, 5)):
        with Reporter(tmp_path, config, num_steps=5) as reporter:
            reporter.start(first)
            for step in range(first, last):
                reporter.step(report_of(step))
            reporter.evaluation(last, {"style": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [0, 1, 2, 3, 4]
    assert events.Scalars("reward_means/style")[0].value == 0.625
    assert events.Scalars("evaluation/style")[-1].step == 5
    assert "step" not in events.Tags()["scalars"]


class FakeWandb(ModuleType):
    """Remembers what it was told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.finished = 0

    def init(self, **options: Any) -> FakeWandb:
        self.runs.append(options)
        return self

    def define_metric(self, name: str, *, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1


def test_wandb_gets_the_numbers_and_a_resumed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = ReportConfig(tensorboard=False, console=False, wandb=WandbConfig(project="p", mode="offline", tags=("t",)))
    for step in (0, 1):
        with Reporter(tmp_path, config, num_steps=2, experiment={"api_key": "hush", "seed": 3}) as reporter:
            reporter.start(step)
            reporter.step(report_of(step))
    first, second = fake.runs
    assert first["id"] == second["id"]
    assert (first["project"], first["mode"], first["tags"], first["resume"]) == ("p", "offline", ["t"], "allow")
    assert first["config"] == {"api_key": "***", "seed": 3}
    assert [line["step"] for line in fake.logged] == [0, 1]
    assert fake.logged[0]["reward_means/style"] == 0.625
    assert fake.finished == 2


def test_what_is_not_installed_is_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = ReportConfig(wandb=WandbConfig(project="p"))
    with pytest.raises(UserError, match=r"report\.wandb is asked for.*pip install -e '\.\[wandb\]'"):
        Reporter(tmp_path, config, num_steps=1)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"report\.tensorboard is asked for.*pip install tensorboard"):
        Reporter(tmp_path, ReportConfig(), num_steps=1)


def test_without_a_terminal_there_are_lines(tmp_path: Path) -> None:
    out = io.StringIO()
    config = ReportConfig(tensorboard=False, log_every=3)
    with Reporter(tmp_path, config, num_steps=8, console=Console(file=out, width=40)) as reporter:
        reporter.start()
        for step in range(8):
            reporter.step(report_of(step, skipped=step == 3, reward_means={"[bold]style": 0.625}))
        reporter.evaluation(8, {"style": 0.75})
    said = out.getvalue().splitlines()
    assert [line.split()[1] for line in said[:-1]] == ["3/8", "4/8", "6/8", "8/8"], "every third, the skipped, the last"
    assert "loss 2.5000  [bold]style 0.6250" in said[0]
    assert [("skipped" in line) for line in said[:-1]] == [False, True, False, False]
    assert said[-1] == "evaluation after 8 steps  style 0.7500"


def test_on_a_terminal_there_is_a_bar(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True)
    with Reporter(tmp_path, ReportConfig(tensorboard=False), num_steps=8, console=console) as reporter:
        reporter.start(5)
        reporter.step(report_of(5))
    assert "6/8" in out.getvalue()
    assert "style 0.6250" in out.getvalue()


def test_the_configuration_is_strict() -> None:
    with pytest.raises(ValidationError):
        ReportConfig(log_every=0)
    with pytest.raises(ValidationError):
        ReportConfig.model_validate({"tensorbord": True})


def test_the_manifest_says_what_made_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "weights"
    (weights / "vae").mkdir(parents=True)
    (weights / "a.bin").write_bytes(b"abc")
    (weights / "vae" / "b.bin").write_bytes(b"")
    monkeypatch.setattr(sys, "argv", ["rewardgen", "train", "x.yaml", "judge.args.api_key=hush", "seed=3"])
    monkeypatch.setenv("HF_TOKEN", "hush")
    path = write_manifest(
        tmp_path / "run",
        experiment={"seed": 3, "judge": {"api_key": "hush"}},
        weights={"one": weights / "a.bin", "all": weights},
        seeds={"evaluation": 0},
    )
    found = json.loads(path.read_text())
    assert "hush" not in path.read_text()
    assert found["experiment"] == {"seed": 3, "judge": {"api_key": "***"}}
    assert found["command"][-2:] == ["judge.args.api_key=***", "seed=3"]
    sha = hashlib.sha256(b"abc").hexdigest()
    assert found["weights"]["one"]["sha256"] == sha
    assert found["weights"]["all"]["sha256"] == {"a.bin": sha, "vae/b.bin": hashlib.sha256(b"").hexdigest()}
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["versions"]["rewardgen"] == rewardgen.__version__
    assert {"torch", "diffusers", "transformers", "peft"} <= found["versions"].keys()
    assert found["seeds"] == {"evaluation": 0}


def test_an_older_manifest_is_kept(tmp_path: Path) -> None:
    for seed in range(3):
        write_manifest(tmp_path, experiment={"seed": seed})
    seeds = {path.name: json.loads(path.read_text())["experiment"]["seed"] for path in tmp_path.iterdir()}
    assert seeds == {"manifest-001.json": 0, "manifest-002.json": 1, "manifest.json": 2}


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: there are no weights"):
        write_manifest(tmp_path, experiment={}, weights={"vae": tmp_path / "nowhere"})


def test_what_is_no_secret_stays() -> None:
    kept = {"schedule": "token_count", "tokenizer": "t5", "max_tokens": 3, "token": 5, "key": "x"}
    assert redact(kept) == kept
    assert redact({"a": [{"hub_token": "x", "password": ["y"]}], "hub-token": None}) == {
        "a": [{"hub_token": "***", "password": ["***"]}],
        "hub-token": None,
    }


def test_the_commit_is_of_the_projects_own_checkout(tmp_path: Path) -> None:
    def git(*command: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        done = subprocess.run(["git", "-C", str(tmp_path), *identity, *command], capture_output=True, check=True)
        return done.stdout.decode().strip()

    assert manifest._git(tmp_path) is None
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    assert manifest._git(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "file").write_text("2")
    assert manifest._git(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": True}
    (tmp_path / "site-packages").mkdir()
    assert manifest._git(tmp_path / "site-packages") is None, "the package lies within somebody else's repository"


def test_the_console_tells_of_the_fleet_and_of_losses_where_there_were_any(tmp_path: Path) -> None:
    figures = {"workers": 8.0, "queue_depth": 3.0, "retries": 0.0, "lost_workers": 0.0, "busy_share": 0.5}
    shown = io.StringIO()
    console = Console(file=shown, width=200)
    config = ReportConfig(tensorboard=False, log_every=1)
    with Reporter(tmp_path, config, num_steps=3, console=console) as reporter:
        reporter.step(report_of(0))
        reporter.step(report_of(1, metrics={f"fleet/{name}": value for name, value in figures.items()}))
        lost = figures | {"lost_workers": 2.0, "retries": 1.0}
        judges = {f"judges/{name}": value for name, value in (figures | {"workers": 2.0}).items()}
        reporter.step(report_of(2, metrics={f"fleet/{name}": value for name, value in lost.items()} | judges))
    first, second, third = shown.getvalue().splitlines()
    assert "workers" not in first
    assert second.endswith("8 workers 50 % busy, 3 queued")
    assert third.endswith("8 workers 50 % busy, 3 queued, 2 lost, 1 retries  2 judges 50 % busy, 3 queued")
