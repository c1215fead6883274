"""Several processes: the same run as one, whatever the strategy; and one that fails takes the others along.

Two processes on this machine do all the jobs of `process_jobs.py` once; the tests look at what they left.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rewardgen.checkpoint import load_checkpoint
from rewardgen.distributed import Processes, Strategy, launched
from rewardgen.errors import ConfigError, ScoringError
from tests import process_jobs
from tests.process_jobs import CUT, STEPS, BlockPolicy, kept, make

ROOT = Path(__file__).resolve().parent.parent
BOTH: tuple[Strategy, ...] = ("ddp", "fsdp")
STRATEGIES = pytest.mark.parametrize("strategy", BOTH)
SECONDS = 600
"""A job takes a second or two; what takes so long hangs."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def two_processes(folder: Path, names: list[tuple[str, Strategy]]) -> list[int | None]:
    """Let two processes do jobs, and return their exit codes; processes that hang are killed, and have none."""
    context = multiprocessing.get_context("spawn")
    arguments = (free_port(), folder, names)
    children = [context.Process(target=process_jobs.child, args=(rank, *arguments)) for rank in range(2)]
    for child in children:
        child.start()
    deadline = time.monotonic() + SECONDS
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    return codes


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all jobs, each done by one process (where it is compared) and by two."""
    folder = tmp_path_factory.mktemp("processes")
    alone = {"whole_run": "alone", "merged_run": "merged", "checkpointed_run": "checkpointed", "uso": "uso"}
    alone |= {"grpo_run": "grpo", "nft_run": "nft"}
    for job, name in alone.items():
        found = process_jobs.JOBS[job](Processes(), folder / name, "ddp")
        (folder / f"{name}.json").write_text(json.dumps(found))
    jobs = [name for name in process_jobs.JOBS if name != "sudden_death"]
    names: list[tuple[str, Strategy]] = [(name, strategy) for name in jobs for strategy in BOTH]
    names.remove(("shards", "ddp"))
    names.remove(("unequal_calls", "ddp"))
    codes = two_processes(folder, names)
    said = "\n".join(path.read_text() for path in sorted(folder.glob("error-*.txt")))
    assert codes == [0, 0], said or "they hang"
    return folder


def told(done: Path, job: str, strategy: str) -> list[dict[str, Any]]:
    """What each of the two processes found."""
    return [json.loads((done / f"{job}-{strategy}-{rank}.json").read_text()) for rank in range(2)]


def assert_same_checkpoint(folder: Path, expected: Path, step: int = STEPS) -> None:
    """All tensors to 1e-6, moments and averages too, and all of the state."""
    (found, state), (wanted, state_alone) = (
        load_checkpoint(f / "checkpoints" / f"step-{step:06d}") for f in (folder, expected)
    )
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name], tensor, atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert state == state_alone


def assert_same_reports(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert len(found) == len(wanted)
    for line, expected in zip(found, wanted, strict=True):
        for key, value in expected.items():
            if isinstance(value, dict):
                assert list(line[key]) == list(value), "terms have one order"
            assert line[key] == pytest.approx(value, abs=1e-6), key


@STRATEGIES
def test_two_processes_equal_one_with_twice_the_accumulation(done: Path, strategy: str) -> None:
    """With failing scores, missing targets and a reward that draws at random; with EMA, warm-up and clipping."""
    first, second = told(done, "whole_run", strategy)
    alone = json.loads((done / "alone.json").read_text())
    for step in (CUT, STEPS):
        assert_same_checkpoint(done / f"whole_run-{strategy}", done / "alone", step)
    assert first["state"] == second["state"] == alone["state"]
    assert_same_reports(first["reports"], alone["reports"])
    norms = [report["grad_norm"] for report in alone["reports"]]
    assert max(norms) > 0.5, "clipping was to act"
    counts = [report["valid_counts"] for report in alone["reports"]]
    assert {0 < count["flow_matching"] < 4 for count in counts} >= {True}
    assert any(count.get("noisy") in (1, 2) for count in counts), "scores were to fail"


@STRATEGIES
@pytest.mark.parametrize("kind", ["grpo", "nft"])
def test_samples_are_learned_from_alike(done: Path, strategy: str, kind: str) -> None:
    """Groups, advantages over the whole step, the base policy and several updates, mixed with a reward's gradient."""
    first, second = told(done, f"{kind}_run", strategy)
    alone = json.loads((done / f"{kind}.json").read_text())
    assert_same_checkpoint(done / f"{kind}_run-{strategy}", done / kind)
    assert first["state"] == second["state"] == alone["state"]
    assert_same_reports(first["reports"], alone["reports"])
    shares = {report["metrics"]["policy_gradient/taking_part"] for report in alone["reports"] if report["step"]}
    assert min(shares) < 1, "some groups were to say nothing"


@STRATEGIES
def test_only_the_first_process_reports_and_writes(done: Path, strategy: str) -> None:
    first, second = told(done, "whole_run", strategy)
    assert (len(first["reports"]), second["reports"]) == (STEPS, [])
    assert (first["saved"], second["saved"]) == (["weights"], [])
    found = load_file(done / f"whole_run-{strategy}" / "weights" / "blocks.safetensors")
    wanted = load_file(done / "alone" / "weights" / "blocks.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0)


@STRATEGIES
def test_two_processes_go_on_from_where_one_was(done: Path, strategy: str) -> None:
    assert_same_checkpoint(done / f"resumed_run-{strategy}", done / "alone")
    assert told(done, "resumed_run", strategy)[0]["state"] == json.loads((done / "alone.json").read_text())["state"]


@STRATEGIES
def test_one_process_goes_on_from_where_two_were(done: Path, strategy: str, tmp_path: Path) -> None:
    trainer, reports = make(tmp_path, Processes())
    trainer.resume(done / f"whole_run-{strategy}" / "checkpoints" / f"step-{CUT:06d}")
    trainer.run()
    assert_same_checkpoint(tmp_path, done / "alone")
    assert_same_reports(
        kept(trainer, reports)["reports"], json.loads((done / "alone.json").read_text())["reports"][CUT:]
    )


@STRATEGIES
@pytest.mark.parametrize("job", ["merged", "checkpointed", "uso"])
def test_so_do_other_kinds_of_runs(done: Path, job: str, strategy: str) -> None:
    """All rewards in one backward pass; activations recomputed, of blocks and of sampling steps; the real policy."""
    name = "uso" if job == "uso" else f"{job}_run"
    first, _ = told(done, name, strategy)
    assert_same_checkpoint(done / f"{name}-{strategy}", done / job, 2 if job == "uso" else STEPS)
    if job != "merged":
        assert_same_reports(first["reports"], json.loads((done / f"{job}.json").read_text())["reports"])
    else:
        assert "(all rewards)" in first["reports"][-1]["grad_norms"]


def test_blocks_are_sharded_and_nothing_else(done: Path) -> None:
    first, second = told(done, "shards", "fsdp")
    blocks = {name: p.numel() for name, p in BlockPolicy().named_parameters() if ".blocks." in name}
    assert first["kind"]
    assert len(first["held"]) == len(blocks) == 10, "the frozen ones too"
    held = [sum(found["held"].values()) for found in (first, second)]
    assert sum(held) == sum(blocks.values())
    assert max(held) < 0.7 * sum(held)
    assert "ConfigError: train.strategy: fsdp shards the blocks" in first["without_blocks"]
    assert "ToyPolicy" in first["without_blocks"]


@STRATEGIES
def test_all_begin_with_the_weights_of_the_first(done: Path, strategy: str) -> None:
    first, second = told(done, "different_start", strategy)
    assert first["outer"] == second["outer"] == BlockPolicy(seed=7).outer.tolist()


@STRATEGIES
def test_a_gradient_that_is_not_finite_in_one_is_skipped_by_all(done: Path, strategy: str, tmp_path: Path) -> None:
    first, second = told(done, "broken_target", strategy)
    trainer, reports = make(tmp_path, Processes(), broken="toy-001", max_nonfinite_steps=2, num_steps=40)
    alone = process_jobs.failing(trainer) | kept(trainer, reports)
    assert alone["kind"] == "NonFiniteError"
    assert "flow_matching" in alone["said"]
    for found in (first, second):
        assert {key: found[key] for key in ("kind", "said", "steps", "state")} == {
            key: alone[key] for key in ("kind", "said", "steps", "state")
        }
    skipped = [report["skipped"] for report in first["reports"]]
    assert skipped == [report.skipped for report in reports]
    assert {True, False} == set(skipped)


@STRATEGIES
def test_failures_are_counted_over_all_processes(done: Path, strategy: str, tmp_path: Path) -> None:
    first, second = told(done, "often_failing_reward", strategy)
    alone = process_jobs.often_failing_reward(Processes(), tmp_path, "ddp")
    assert (alone["kind"], alone["steps"]) == (ScoringError.__name__, first["steps"])
    assert first["said"] == second["said"] == alone["said"]
    assert first["kind"] == second["kind"] == alone["kind"]


@STRATEGIES
def test_an_exception_in_one_ends_the_other_with_its_reason(done: Path, strategy: str) -> None:
    first, second = told(done, "exception", strategy)
    assert (second["kind"], second["said"]) == ("RuntimeError", "boom")
    assert first["kind"] == "ProcessError"
    assert "process 1 failed: RuntimeError: boom" in first["said"]


def test_processes_that_call_a_sharded_policy_unequally_often_are_told(done: Path) -> None:
    for found in told(done, "unequal_calls", "fsdp"):
        assert found["kind"] == "ProcessError"
        assert "out of step: process 0 at" in found["said"]
        assert "batch_size 1" in found["said"]


@STRATEGIES
def test_a_signal_to_one_stops_all_after_the_same_step(done: Path, strategy: str) -> None:
    first, second = told(done, "one_signal", strategy)
    assert first == second == {"interrupted": True, "steps": 2, "saved": "step-000002"}
    assert_same_checkpoint(done / f"one_signal-{strategy}", done / f"one_signal-{strategy}", 2)


def test_the_sudden_death_of_one_is_noticed_by_the_other(tmp_path: Path) -> None:
    codes = two_processes(tmp_path, [("sudden_death", "ddp")])
    assert codes[1] == 9
    (first,) = [json.loads(path.read_text()) for path in tmp_path.glob("sudden_death-ddp-*.json")]
    assert (first["kind"], first["steps"]) == ("ProcessError", 1)
    assert "process 0 lost the others" in first["said"]


EXPERIMENT = """\
name: blocks
policy: {use: "tests.process_jobs:BlockPolicy"}
data:
  train: {use: "tests.toys:ToyDataset", args: {size: 4}}
  held_out: {use: "tests.toys:ToyDataset", args: {size: 3, seed: 1}}
rollout: {image_size: [8, 8], num_steps: 3, window: {kind: refl, entry_range: [1, 2]}}
objective:
  rewards:
    style: {use: "tests.toys:ToyReward", weight: 0.5}
optimizer: {lr: 1e-2}
train: {num_steps: 4, batch_size: 1, accumulation: 2, checkpoint_every: 2, ema_decay: 0.5, device: cpu}
evaluation: {every: 2, num_examples: 3, grid_examples: 1, witnesses: {light: {use: brightness}}}
report: {tensorboard: false}
"""


def command(launcher: list[str], *arguments: str) -> tuple[int, str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    program = [sys.executable, *launcher, "-m", "rewardgen", "train", *arguments]
    done = subprocess.run(
        program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    return done.returncode, done.stdout + done.stderr


TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port"]


def test_torchrun_trains_resumes_and_leaves_what_one_process_leaves(tmp_path: Path) -> None:
    """Two processes with copies, then two with shards go on; one process makes the same run alone."""
    experiment = tmp_path / "blocks.yaml"
    experiment.write_text(EXPERIMENT)
    halved = "train.accumulation=1"
    folder = ["--output", str(tmp_path / "two")]
    code, said = command([*TORCHRUN, str(free_port())], str(experiment), halved, "train.num_steps=2", *folder)
    assert code == 0, said
    assert said.count("parameters trained") == 1, "only the first prints"
    code, said = command(
        [*TORCHRUN, str(free_port())], str(experiment), halved, "train.strategy=fsdp", *folder, "--resume"
    )
    assert code == 0, said
    assert said.count("parameters trained") == 1
    code, said = command([], str(experiment), "--output", str(tmp_path / "one"))
    assert code == 0, said
    assert_same_checkpoint(tmp_path / "two", tmp_path / "one", 4)
    one, two = (load_file(tmp_path / name / "weights" / "blocks.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=0)
    lines = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    }
    kinds = [[(line["kind"], line["step"]) for line in lines[name]] for name in ("one", "two")]
    assert sorted(kinds[0]) == sorted(kinds[1])
    for found, wanted in zip(
        *(sorted(lines[n], key=lambda li: (li["kind"], li["step"])) for n in ("two", "one")), strict=True
    ):
        if wanted["kind"] == "evaluation":
            assert found["values"] == pytest.approx(wanted["values"], abs=1e-5)
    assert (tmp_path / "two" / "grid.png").stat().st_size > 0
    assert json.loads((tmp_path / "two" / "comparison.json").read_text())


def test_what_the_environment_cannot_give_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(ConfigError, match="fsdp needs several processes: start with `torchrun"),
        launched(torch.device("cpu"), "fsdp"),
    ):
        pass
    with launched(torch.device("cpu")) as processes:
        assert (processes.size, processes.is_first, processes.exchange("x", 3)) == (1, True, [3])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="RANK does not say"), launched(torch.device("cpu")):
        pass
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match="cannot all have 'cuda:1'"), launched(torch.device("cuda:1")):
        pass
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(ConfigError, match="more processes on this machine than its"), launched(torch.device("cuda")):
        pass
