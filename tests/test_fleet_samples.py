"""Learning from samples on Ray, drawn by workers and scored by judges: as in the learner's process, bit for bit."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from rewardgen.build import train
from rewardgen.checkpoint import latest_checkpoint, load_checkpoint
from rewardgen.config import load_experiment
from rewardgen.distributed import Processes
from rewardgen.errors import ConfigError
from rewardgen.fleet.inline import InlinePool
from rewardgen.fleet.payload import Packed
from rewardgen.fleet.pool import FleetConfig, Pool
from rewardgen.fleet.ray_handle import RayHandle
from rewardgen.fleet.ray_pool import RayPool
from rewardgen.learner import Learner, OptimizerConfig
from rewardgen.objective import Objective, ObjectiveConfig
from rewardgen.policy_gradient import GrpoConfig
from rewardgen.reward import Reward, RewardWarning
from rewardgen.rollout import RolloutConfig, RolloutWorker, to_eight_bit
from rewardgen.samples import sample_requests, submit_samples
from rewardgen.scoring import ScoringWorker
from rewardgen.trainer import TrainConfig, Trainer
from rewardgen.types import Rollout, StepReport
from rewardgen.workers import ray_judges, ray_workers
from tests.fleet_workers import (
    PATIENCE,
    Broken,
    JudgeFactory,
    NoRoomError,
    Touchy,
    ToyFactory,
    ray_session,
    toy_policy,
)
from tests.test_rollout import weights_of
from tests.toys import ToyDataset, ToyPolicy, ToyReward

NUM_CPUS = 6
SIZE = (40, 40)  # pictures large enough to travel as bytes
FAILING = ("toy-002",)
ROLLOUT = RolloutConfig.model_validate(
    {"image_size": SIZE, "num_steps": 5, "window": {"kind": "refl", "entry_range": [2, 4]}}
)
GRPO: dict[str, Any] = {"kind": "grpo", "num_generations": 3, "window": {"size": 2, "range": [0, 2]}, "beta": 0.1}
NFT: dict[str, Any] = {"kind": "nft", "num_generations": 3}


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with ray_session(NUM_CPUS):
        yield


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the judges are told by."""
    return tmp_path_factory.mktemp("notes")


@pytest.fixture(scope="module")
def pools(session: None, notes: Path) -> Iterator[dict[str | int, RayPool]]:
    """Of one and of three workers, and two judges, for all tests."""
    config = FleetConfig(pool="ray", cpus_per_worker=0.25)
    made: dict[str | int, RayPool] = {}
    made[1] = RayPool(ToyFactory(), config)
    made[3] = RayPool(ToyFactory(seconds=0.02), config.model_copy(update={"workers": 3}))
    made["judges"] = RayPool(JudgeFactory(notes, FAILING), config.model_copy(update={"workers": 2}))
    yield made
    for pool in made.values():
        pool.close()


# --- pictures of eight bits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pictures_are_rounded_as_a_file_would(dtype: torch.dtype) -> None:
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    pixels.view(-1)[:2] = torch.tensor([0.0, 1.0], dtype=dtype)
    found = to_eight_bit(pixels)
    assert found.dtype == torch.float32
    wanted = [round(value * 255) / 255 for value in pixels.float().flatten().tolist()]
    torch.testing.assert_close(found.flatten(), torch.tensor(wanted), rtol=0, atol=1e-7)
    assert torch.equal(to_eight_bit(found), found)
    assert torch.equal((found * 255).round().to(torch.uint8).float() / 255, found), "what is read back from bytes"
    assert bool(to_eight_bit(torch.tensor([float("nan")])).isnan()), "a spoiled picture stays one"


# --- one batch --------------------------------------------------------------------------------------------------------


def batch_of(pool: Pool, scoring: Pool) -> list[Rollout]:
    """The scored samples of four examples, of which the third one is never scored."""
    batch = list(enumerate(ToyDataset(4).examples))
    requests = sample_requests(batch, GrpoConfig.model_validate(GRPO), ROLLOUT, step=3, seed=1)
    weights = pool.put(weights_of(toy_policy(5), 7))
    futures = submit_samples(requests, weights, pool=pool, scoring=scoring)
    return [future.result(PATIENCE).get() for future in futures]


def tensors_of(rollout: Rollout) -> list[Tensor]:
    trajectory, score = rollout.trajectory, rollout.scores["judge"]
    assert trajectory.steps_SBLC is not None
    assert trajectory.log_prob_BS is not None
    return [trajectory.entry_BLC, trajectory.steps_SBLC, trajectory.log_prob_BS, score.value_B, score.valid_B]


def test_trajectories_and_scores_are_the_inline_ones_and_pictures_never_come_here(
    pools: dict[str | int, RayPool], notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(RewardWarning, match="no opinion of toy-002"):
        inline = batch_of(InlinePool(RolloutWorker(toy_policy(99))), InlinePool(JudgeFactory(notes, FAILING)()))
    arrived: list[Packed] = []
    unpack = RayHandle.get.__globals__["unpack"]

    def spy(packed: Packed, *args: Any, **rest: Any) -> Any:
        arrived.append(packed)
        return unpack(packed, *args, **rest)

    monkeypatch.setattr("rewardgen.fleet.ray_handle.unpack", spy)
    with pytest.warns(RewardWarning, match="no opinion of toy-002"):  # the judge's, in another process
        drawn = batch_of(pools[3], pools["judges"])
    assert len(drawn) == len(inline) == GRPO["num_generations"]
    for found, wanted in zip(drawn, inline, strict=True):
        for a, b in zip(tensors_of(found), tensors_of(wanted), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a.nan_to_num(), b.nan_to_num())
        assert found.scores["judge"].valid_B.tolist() == [True, True, False, True]
        assert found.pixels_B3HW is None
        assert (found.policy_version, found.group_B) == (7, (0, 1, 2, 3))
        assert found.trajectory.stochastic == wanted.trajectory.stochastic
    assert len(arrived) == len(drawn), "nothing but what the judges gave back"
    assert all(packed.skeleton.fields["pixels_B3HW"] is None for packed in arrived)


def test_pictures_travel_to_the_judge_as_bytes(pools: dict[str | int, RayPool]) -> None:
    batch = list(enumerate(ToyDataset(4).examples))
    request = sample_requests(batch, GrpoConfig.model_validate(GRPO), ROLLOUT, step=0, seed=1)[0]
    handle = pools[1].submit("rollout", request, pools[1].put(weights_of(toy_policy(5)))).result(PATIENCE)
    assert isinstance(handle, RayHandle)
    slot = ray.get(handle.ref).skeleton.fields["pixels_B3HW"]
    assert (slot.as_bytes, slot.shape, slot.size) == (True, (4, 3, *SIZE), 4 * 3 * 40 * 40)


# --- a whole run ------------------------------------------------------------------------------------------------------


class Reports(list[StepReport]):
    def step(self, report: StepReport) -> None:
        self.append(report)


def run(
    folder: Path,
    settings: dict[str, Any],
    pool: Pool | None,
    scoring: Pool | None,
    *,
    staleness: int = 0,
    after_step: Callable[[int], None] | None = None,
) -> tuple[Learner, Reports]:
    """Train on samples and through a gradient, with the pools, or in the learner's process where there are none."""
    rewards: dict[str, Reward] = {"style": ToyReward(), "judge": Touchy(folder, FAILING)}
    config = ObjectiveConfig.model_validate(
        {
            "flow_matching": {"weight": 0.0},
            "rewards": {name: {"use": "toy"} for name in rewards},
            "max_failed_share": 1.0,
            "policy_gradient": settings,
        }
    )
    learner = Learner(
        ToyPolicy(), Objective(config, rewards), optimizer=OptimizerConfig(lr=1e-2), window=ROLLOUT.window
    )
    reports = Reports()
    trainer = Trainer(
        learner,
        pool or InlinePool(RolloutWorker(learner.policy, colocated=True), copies=staleness > 0),
        ToyDataset(7),
        rollout=ROLLOUT,
        config=TrainConfig(num_steps=3, batch_size=2, accumulation=2, checkpoint_every=0),
        seed=0,
        staleness=staleness,
        folder=folder,
        reporter=reports,
        scoring=scoring or InlinePool(ScoringWorker(learner.objective.sampled)),
    )
    inner = trainer.step

    def observed(step: int) -> StepReport:
        report = inner(step)
        if after_step is not None:
            after_step(step)
        return report

    trainer.step = observed  # type: ignore[method-assign]
    trainer.run()
    return learner, reports


def same(found: tuple[Learner, Reports], wanted: tuple[Learner, Reports]) -> bool:
    """Weights, optimizer, objective and everything that was reported of them, counts of failed scores included."""
    (ours, state), (theirs, other) = found[0].state(), wanted[0].state()
    return (
        ours.keys() == theirs.keys()
        and all(torch.equal(ours[name], theirs[name]) for name in ours)
        and state == other
        and [said(report) for report in found[1]] == [said(report) for report in wanted[1]]
    )


def said(report: StepReport) -> StepReport:
    metrics = {name: v for name, v in report.metrics.items() if not name.startswith(("fleet/", "judges/"))}
    return dataclasses.replace(report, seconds_by_phase={}, peak_memory_bytes=0, metrics=metrics)


@pytest.mark.filterwarnings("ignore::rewardgen.reward.RewardWarning")
@pytest.mark.parametrize(("settings", "staleness"), [(GRPO, 0), (GRPO, 1), (NFT, 0)], ids=["grpo", "ahead", "nft"])
def test_a_run_is_the_same_inline_and_on_one_and_three_workers(
    tmp_path: Path, pools: dict[str | int, RayPool], settings: dict[str, Any], staleness: int
) -> None:
    inline = run(tmp_path / "inline", settings, None, None, staleness=staleness)
    for number in (1, 3):
        fleet = run(tmp_path / str(number), settings, pools[number], pools["judges"], staleness=staleness)
        assert same(fleet, inline)
        for report in fleet[1]:
            assert report.metrics["judges/workers"] == 2
            assert report.metrics["fleet/workers"] == number
    # Twelve pictures a step, three of each of four examples; in some steps the failing one is among these.
    counts = [report.valid_counts["judge"] for report in inline[1]]
    assert min(counts) == 9
    assert max(counts) == 12
    assert all(report.metrics["policy_gradient/taking_part"] > 0 for report in inline[1]), "or nothing was compared"
    if staleness:
        assert not same(run(tmp_path / "synchronous", settings, None, None), inline)


@pytest.mark.filterwarnings("ignore::rewardgen.reward.RewardWarning")
def test_a_judge_that_is_killed_changes_nothing(tmp_path: Path, pools: dict[str | int, RayPool], notes: Path) -> None:
    inline = run(tmp_path / "inline", GRPO, None, None, staleness=1)
    before = pools["judges"].figures()
    killed = run(
        tmp_path / "killed",
        GRPO,
        pools[3],
        pools["judges"],
        staleness=1,
        after_step=lambda step: (notes / "die").touch() if step == 0 else None,
    )
    assert not (notes / "die").exists(), "one has found it"
    assert same(killed, inline)
    after = pools["judges"].figures()
    assert after["lost_workers"] == before["lost_workers"] + 1
    assert after["retries"] == before["retries"] + 1


def test_what_a_judge_raises_keeps_its_type_and_the_judges_go_on(
    tmp_path: Path, pools: dict[str | int, RayPool], notes: Path
) -> None:
    (notes / "raise").touch()
    try:
        with pytest.raises(NoRoomError, match="for doubts") as raised:
            run(tmp_path, GRPO, pools[1], pools["judges"])
    finally:
        (notes / "raise").unlink()
    assert 'raise NoRoomError("for doubts")' in str(raised.value.__cause__), "the traceback there"
    with pytest.warns(RewardWarning):
        assert len(batch_of(pools[1], pools["judges"])) == 3


def test_a_judge_that_cannot_be_made_ends_the_run_with_its_error(
    tmp_path: Path, pools: dict[str | int, RayPool]
) -> None:
    judges = RayPool(Broken(tmp_path), FleetConfig(pool="ray", cpus_per_worker=0.25))
    try:
        with pytest.raises(NoRoomError, match="no weights here") as raised:
            run(tmp_path / "run", GRPO, pools[1], judges)
        assert "fleet_workers.py" in str(raised.value.__cause__)
        assert len(list(tmp_path.glob("broken-*"))) == 1, "made once, not time and again"
    finally:
        judges.close()


# --- from an experiment -----------------------------------------------------------------------------------------------

EXPERIMENT = """\
name: samples
policy: {use: "tests.toys:ToyPolicy"}
data:
  train: {use: "tests.toys:ToyDataset"}
  held_out: {use: "tests.toys:ToyDataset"}
rollout: {image_size: [8, 8], num_steps: 4, window: {kind: refl, entry_range: [1, 3]}}
objective:
  flow_matching: {weight: 0.5}
  max_failed_share: 1.0
  rewards:
    judge: {use: "tests.toys:ToyJudge", args: {fail_ids: [toy-002]}}
  policy_gradient: {kind: grpo, num_generations: 3, window: {size: 2, range: [0, 2]}}
train: {num_steps: 2, batch_size: 2, accumulation: 2, device: cpu}
evaluation: {num_examples: 1, grid_examples: 0}
report: {tensorboard: false}
"""


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    path = tmp_path / "samples.yaml"
    path.write_text(EXPERIMENT)
    return path


def test_an_experiment_trains_the_same_on_workers_and_judges(experiment: Path, tmp_path: Path) -> None:
    found = []
    for name, overrides in (
        ("inline", []),
        ("fleet", ["fleet=ray", "fleet.workers=2", "fleet.judges.cpus_per_worker=0.5"]),
    ):
        assert train(load_experiment(experiment, overrides=overrides), folder=tmp_path / name)
        checkpoint = latest_checkpoint(tmp_path / name / "checkpoints")
        assert checkpoint is not None
        found.append(load_checkpoint(checkpoint)[0])
    inline, fleet = found
    assert inline.keys() == fleet.keys()
    assert all(torch.equal(inline[name], fleet[name]) for name in inline)
    assert '"judges/workers": 1.0' in (tmp_path / "fleet" / "metrics.jsonl").read_text()


def test_a_judge_is_made_of_the_rewards_alone_and_what_they_occupy_is_counted(
    experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    monkeypatch.setattr("rewardgen.fleet.ray_pool.RayPool", lambda *args, **rest: made.append((*args, rest)))
    overrides = ["fleet=ray", "fleet.workers=13", "fleet.min_workers=1", "fleet.staleness=1", "fleet.max_tries=5"]
    loaded = load_experiment(experiment, overrides=[*overrides, "fleet.judges={workers: 4, cpus_per_worker: 0.1}"])
    with pytest.warns(UserWarning, match="of 13 workers no more than 12 are ever busy: a step draws 6 micro-batches"):
        ray_workers(loaded, Processes())
    ray_judges(loaded)
    (factory, config, rest) = made[1]
    assert (config.workers, config.cpus_per_worker, config.min_workers, config.max_tries) == (4, 0.1, 1, 5)
    assert (rest["section"], rest["beside"].section, rest["beside"].number) == ("fleet.judges", "fleet", 1)
    assert b"ToyJudge" in pickle.dumps(factory)
    assert b"ToyPolicy" not in pickle.dumps(factory)
    worker = factory()
    assert isinstance(worker, ScoringWorker)
    assert worker.rewards["judge"].fail_ids == {"toy-002"}
    assert ray_judges(load_experiment(experiment)) is None
    without = load_experiment(experiment, overrides=["fleet=ray"])
    assert "judges" not in without.model_dump()["fleet"], "experiments that say nothing of them are dumped as before"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["fleet.judges.gpus_per_worker=1"],
            r"fleet\.judges\.workers: 1 workers of 1 CPUs and 1 GPUs each do not fit beside fleet\.workers, 1 of 1"
            r" CPUs, the cluster has room for 0: 1 x 6 CPUs and 0 GPUs; .*fleet\.judges\.gpus_per_worker",
        ),
        (
            ["fleet.workers=3", "fleet.judges={workers: 2, cpus_per_worker: 2}"],
            r"fleet\.judges\.workers: 2 workers of 2 CPUs .* beside fleet\.workers, 3 of 1 CPUs, .* room for 1:",
        ),
    ],
)
def test_judges_for_whom_there_is_no_room_are_refused_at_once(
    experiment: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ray_judges(load_experiment(experiment, overrides=["fleet=ray", *overrides]))
