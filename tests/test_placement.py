"""Learners on a Ray cluster: the run of one process, whoever is lost; what cannot be is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rewardgen import build, learners, run_folder, workers
from rewardgen.checkpoint import load_checkpoint
from rewardgen.config import Experiment, load_experiment
from rewardgen.distributed import ProcessError, Processes
from rewardgen.errors import ConfigError
from rewardgen.fleet import cluster, group
from rewardgen.fleet.cluster import Needs
from rewardgen.fleet.group import Group, LostError
from rewardgen.fleet.member import Relay
from rewardgen.fleet.pool import FleetConfig, FleetError
from rewardgen.workers import ray_workers
from tests.fleet_workers import Failing, NoRoomError, Told, patiently, ray_session

NUM_STEPS = 5
EXPERIMENT = """\
name: placed
policy: {use: "tests.toys:ToyPolicy"}
data:
  train: {use: "tests.toys:ToyDataset", args: {size: 6}}
  held_out: {use: "tests.toys:ToyDataset", args: {size: 2, seed: 1}}
rollout: {image_size: [8, 8], num_steps: 3, window: {kind: refl, entry_range: [1, 2]}}
objective:
  rewards:
    style: {use: "tests.fleet_workers:FatalReward", weight: 0.5, args: {at: 4}}
optimizer: {lr: 1e-2, max_grad_norm: 0.5}
train: {num_steps: 5, batch_size: 2, accumulation: 2, checkpoint_every: 2, ema_decay: 0.5, device: cpu, keep_last: 9}
evaluation: {every: 0, num_examples: 2, grid_examples: 0}
report: {tensorboard: false, console: false}
"""
PLACED = ["fleet.pool=ray", "fleet.placement=colocated"]
TWO = [*PLACED, "fleet.learners=2", "train.accumulation=1"]


def experiment(folder: Path, *overrides: str) -> Experiment:
    path = folder / "placed.yaml"
    path.write_text(EXPERIMENT)
    return load_experiment(path, overrides=overrides)


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"learners": 2}, "set pool: ray, and placement: colocated"),
        ({"learners": 2, "pool": "ray"}, "set pool: ray, and placement: colocated"),
        ({"learners": 2, "pool": "ray", "placement": "disaggregated"}, "each of 2 learners needs one that draws"),
        ({"placement": "disaggregated"}, "pool: inline draws in the learner's process"),
        ({"pool": "ray", "placement": "colocated", "workers": 8}, "set learners, or leave out workers"),
        ({"pool": "ray", "placement": "colocated", "min_workers": 0}, "set learners, or leave out workers"),
        ({"pool": "ray", "placement": "colocated", "gpus_per_learner": 2}, "less than or equal to 1"),
    ],
)
def test_a_placement_that_cannot_be_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        FleetConfig.model_validate(given)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([*PLACED, "train.strategy=fsdp"], "fsdp shards the model over several learners; there is 1"),
        ([*TWO, "train.device=cuda:1"], "Ray gives each learner a GPU of its own"),
        ([*TWO, "train.device=cuda", "fleet.gpus_per_learner=0"], "the learners are to have no GPU"),
        ([*TWO, "fleet.gpus_per_learner=1"], "train.device is cpu"),
        (["fleet=ray", "train.strategy=fsdp"], "a sharded model draws its own rollouts"),
    ],
)
def test_what_learners_on_a_cluster_cannot_have_is_refused(tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        experiment(tmp_path, *overrides)
    assert "\n" not in str(caught.value)


def test_old_experiments_are_written_out_as_before(tmp_path: Path) -> None:
    assert set(experiment(tmp_path).model_dump()["fleet"]) == {"pool", "staleness"}
    assert experiment(tmp_path, "train.strategy=fsdp", *TWO).fleet.learners == 2


def test_learners_that_draw_themselves_have_no_workers_and_resume_without_a_launcher(tmp_path: Path) -> None:
    placed = experiment(tmp_path, *TWO)
    assert ray_workers(placed, Processes(0, 2)) is None
    assert run_folder.resume_command(placed, tmp_path, 2).startswith("rewardgen train ")


@pytest.mark.parametrize("number", [2, 3, 7])
def test_learners_share_all_workers(tmp_path: Path, number: int) -> None:
    placed = experiment(tmp_path, *TWO, "fleet.placement=disaggregated", f"fleet.workers={number}")
    shares = [workers.share_of(placed, Processes(rank, 2)).fleet for rank in range(2)]
    assert sum(fleet.workers for fleet in shares) == number
    assert max(fleet.workers for fleet in shares) - min(fleet.workers for fleet in shares) <= 1
    assert {fleet.min_workers for fleet in shares} == {None}
    assert workers.share_of(placed, Processes()) is placed


def test_workers_have_to_fit_beside_the_learners(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes with two GPUs each: two learners leave room for two workers, and CPUs for no more than one."""
    monkeypatch.setattr(cluster, "alive", lambda: [{"CPU": 3.0, "GPU": 2.0}] * 2)
    gpu = Needs(cpus=1, gpus=1)
    config = FleetConfig(pool="ray", placement="disaggregated", learners=2, workers=2)
    two = Group(size=2, needs=gpu, config=config)
    two.require_room()
    two.require_room_for_workers(gpu)
    with pytest.raises(ConfigError, match=r"3 workers .* beside 2 learners .* room for 2: .* 2 x 3 CPUs and 2 GPUs"):
        dataclasses.replace(two, config=config.model_copy(update={"workers": 3})).require_room_for_workers(gpu)
    with pytest.raises(ConfigError, match="there is room for 1"):
        two.require_room_for_workers(Needs(cpus=2))


def test_a_launcher_and_a_folder_that_holds_another_run_are_refused_before_ray_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learners.cluster, "connect", lambda address: pytest.fail("Ray was asked"))
    placed = experiment(tmp_path, *TWO)
    (tmp_path / "run" / "checkpoints" / "step-000001").mkdir(parents=True)
    with pytest.raises(ConfigError, match="choose another --output"):
        build.train(placed, folder=tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without torchrun"):
        build.train(placed, folder=tmp_path / "other")


def test_a_folder_that_a_learner_does_not_see_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a folder that all machines share"):
        learners._Learner(lambda: True, tmp_path / "elsewhere")()


# --- whose fault it was -----------------------------------------------------------------------------------------------


def test_one_fault_is_the_cause_of_the_others() -> None:
    from ray.exceptions import ActorDiedError, RayTaskError

    def raised(cause: Exception) -> Exception:
        error: Exception = RayTaskError("run", "the traceback there", cause)
        return error

    lost, told = ProcessError("process 0 lost the others"), ProcessError("process 1 failed: KeyError")
    lost.lost = True
    of_the_connection = RuntimeError("connection closed by peer")

    def verdict(*faults: Exception) -> BaseException:
        return group._verdict(dict(enumerate(faults)))

    # Whatever the others say of their connections, one that died is the reason.
    for other in (lost, of_the_connection):
        found = verdict(raised(other), ActorDiedError())
        assert isinstance(found, LostError)
        assert "learner 1 was lost" in str(found)
    own = KeyError("mine")
    assert verdict(raised(told), raised(own)) is own
    assert "the traceback there" in str(own.__cause__)
    assert isinstance(verdict(raised(lost), raised(lost)), LostError)
    assert verdict(raised(told), raised(told)) is told


def test_what_is_printed_can_be_taken_once_and_is_passed_on() -> None:
    inner = StringIO()
    relay = Relay(inner)
    print("a", file=relay)
    print("b", file=relay, flush=True)
    assert relay.take(0) == "a\nb\n" == inner.getvalue()
    assert relay.take(0) == ""
    timer = threading.Timer(0.05, relay.finish)
    timer.start()
    assert relay.take(60) == "", "the end is not waited out"


def test_lost_learners_are_started_again_a_bounded_number_of_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The group is one that is always lost; before its third and fourth loss it has come to another checkpoint."""
    placed, made, starts = experiment(tmp_path, *TWO, "fleet.max_tries=2"), iter("abbc"), []
    latest: list[Path | None] = [None]
    monkeypatch.setattr(learners, "latest_checkpoint", lambda folder: latest[0])
    stopped = threading.Event()

    class Doomed:
        def run(self, program: Any, **rest: Any) -> None:
            starts.append(latest[0])
            if len(starts) in (2, 3):
                latest[0] = Path(next(made) + str(len(starts)))
            raise LostError("learner 1 was lost")

    with pytest.raises(FleetError, match="lost: 2 times in a row without another checkpoint"):
        learners._until_done(placed, Doomed(), learners._Learner(lambda: True, tmp_path), stopped)  # type: ignore[arg-type]
    assert len(starts) == 4
    assert capsys.readouterr().err.count("all learners start again from") == 3
    stopped.set()
    starts.clear()
    with pytest.raises(FleetError, match="the learners were lost: learner 1"):
        learners._until_done(placed, Doomed(), learners._Learner(lambda: True, tmp_path), stopped)  # type: ignore[arg-type]
    assert len(starts) == 1, "after a request to stop nothing is started"


# --- on Ray -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with ray_session():
        yield


def small(size: int = 2, **settings: Any) -> Group:
    config = FleetConfig.model_validate({"pool": "ray", "placement": "colocated", "learners": size} | settings)
    return Group(size=size, needs=Needs(cpus=settings.get("cpus_per_learner", 1.0)), config=config)


@pytest.mark.parametrize("need", [Needs(cpus=9.0), Needs(gpus=1.0)])
def test_what_does_not_fit_is_refused_at_once(session: None, need: Needs) -> None:
    with pytest.raises(ConfigError, match=r"fleet.learners: 2 learners .* do not fit.*1 x 16 CPUs and 0 GPUs"):
        dataclasses.replace(small(), needs=need).require_room()


def test_room_that_others_hold_is_waited_for_and_then_named(session: None) -> None:
    import ray

    held = ray.util.placement_group([{"CPU": 16}])
    try:
        ray.get(held.ready())
        small().require_room()
        with pytest.raises(FleetError, match=r"no room for 2 learners for 0.5 s.*of which"):
            small(start_timeout_seconds=0.5).run(Told(), stopped=threading.Event(), show=print)
        stopped = threading.Event()
        stopped.set()
        assert small().run(Told(), stopped=stopped, show=print) is None
    finally:
        ray.util.remove_placement_group(held)


def test_members_know_who_they_are_and_stop_when_told(session: None) -> None:
    stopped, shown = threading.Event(), StringIO()

    def show(text: str) -> None:
        shown.write(text)
        stopped.set()

    found = patiently(lambda: small().run(Told(), stopped=stopped, show=show), stopped.clear)
    assert found is not None
    assert [env["RANK"] for env in found] == ["0", "1"]
    assert {(env["WORLD_SIZE"], env["LOCAL_RANK"]) for env in found} == {("2", "0")}
    assert len({(env["MASTER_ADDR"], env["MASTER_PORT"]) for env in found}) == 1
    assert shown.getvalue() == "rank 0 is here\nstopped\n", "only the first is shown, to its last word"


def test_an_exception_keeps_its_type_and_is_not_taken_for_a_loss(session: None) -> None:
    with pytest.raises(NoRoomError, match="no weights here") as caught:
        small().run(Failing(), stopped=threading.Event(), show=print)
    assert "fleet_workers.py" in str(caught.value.__cause__)


def final(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return load_checkpoint(folder / "checkpoints" / f"step-{NUM_STEPS:06d}")


@pytest.fixture(scope="module")
def undisturbed(session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two learners that draw for themselves."""
    folder = tmp_path_factory.mktemp("two")
    assert build.train(experiment(folder, *TWO), folder=folder / "run")
    return folder / "run"


def assert_equal(folder: Path, wanted: Path) -> None:
    """Bit for bit."""
    (found, state), (tensors, state_wanted) = final(folder), final(wanted)
    assert state == state_wanted
    assert found.keys() == tensors.keys()
    assert [name for name, tensor in tensors.items() if not torch.equal(found[name], tensor)] == []


def test_two_placed_learners_make_the_run_of_one_with_twice_the_accumulation(undisturbed: Path, tmp_path: Path) -> None:
    assert build.train(experiment(tmp_path), folder=tmp_path / "one")
    (one, state), (two, state_two) = final(tmp_path / "one"), final(undisturbed)
    assert state == state_two
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=0)
    assert (undisturbed / "comparison.json").is_file()


def test_a_run_that_lost_a_learner_is_the_undisturbed_one(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "marker"
    killed = experiment(tmp_path, *TWO, f"objective.rewards.style.args.marker={marker}")
    assert build.train(killed, folder=tmp_path / "killed")
    said = capsys.readouterr()
    assert marker.exists()
    assert "all learners start again from step-000002" in said.err
    assert said.out.count("parameters trained") == 2, "what the first learner prints is passed on"
    assert_equal(tmp_path / "killed", undisturbed)
    lines = [json.loads(line) for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(NUM_STEPS))


def test_learners_with_workers_of_their_own_make_the_same_run(undisturbed: Path, tmp_path: Path) -> None:
    apart = [*TWO, "fleet.placement=disaggregated", "fleet.workers=2"]
    assert build.train(experiment(tmp_path, *apart), folder=tmp_path / "apart")
    assert_equal(tmp_path / "apart", undisturbed)
    lines = [json.loads(line) for line in (tmp_path / "apart" / "metrics.jsonl").read_text().splitlines()]
    assert {line["metrics"]["fleet/workers"] for line in lines if line["kind"] == "step"} == {1.0}
