"""Aspect-ratio buckets: the nearest size, micro-batches of one size, and an order that is a function of the step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from rewardgen.data.buckets import BucketedDataset, nearest_bucket
from rewardgen.data.images import fit, load_image
from rewardgen.data.jsonl import JsonlDataset
from rewardgen.errors import CheckpointError
from rewardgen.fleet.inline import InlinePool
from rewardgen.learner import Learner, MicroBatch, OptimizerConfig
from rewardgen.objective import Objective, ObjectiveConfig
from rewardgen.rollout import RolloutConfig, RolloutWorker
from rewardgen.trainer import TrainConfig, Trainer
from rewardgen.types import Example, StepReport
from tests.toys import ToyPolicy, ToyReward

BUCKETS = [(8, 8), (8, 16), (16, 8)]
SHAPES = [(9, 9), (10, 22), (30, 12), (8, 8), (16, 8), (40, 41), (7, 15), (100, 90), (20, 9), (8, 17), (12, 12)]
WANTED = [0, 1, 2, 0, 2, 0, 1, 0, 2, 1, 0]


class Pictures:
    """Examples whose targets have the sizes of `SHAPES`; the last of all has none."""

    def __len__(self) -> int:
        return len(SHAPES) + 1

    def __getitem__(self, index: int) -> Example:
        style = torch.full((3, 8, 8), 0.5)
        target = torch.rand(3, *SHAPES[index], generator=torch.Generator().manual_seed(index)) if index < 11 else None
        return Example(id=f"{index}", style_refs=(style,), target=target)


def test_the_nearest_bucket_is_by_proportions_then_by_area() -> None:
    assert [nearest_bucket(shape, BUCKETS) for shape in SHAPES] == WANTED
    assert nearest_bucket((512, 512), [(256, 256), (1024, 1024), (512, 768), (600, 600)]) == 3
    # Equally far in proportions, by their logarithm: twice as wide and twice as high are as far from square.
    assert nearest_bucket((10, 10), [(10, 20), (20, 10)]) == 0
    for height, width in ((3, 7), (1000, 501), (77, 78)):
        best = min(BUCKETS, key=lambda bucket: abs(torch.tensor(bucket[0] * width / (bucket[1] * height)).log()))
        assert BUCKETS[nearest_bucket((height, width), BUCKETS)] == best


def test_fitting_keeps_proportions_and_the_centre() -> None:
    image = torch.zeros(3, 30, 90)
    image[:, :, 30:60] = 1  # the middle third is white
    assert torch.equal(fit(image, (30, 30)), torch.ones(3, 30, 30))
    assert fit(image, (30, 90)) is image
    for size in ((7, 11), (64, 8), (31, 90)):
        assert fit(torch.rand(3, 30, 90), size).shape == (3, *size)
    half = fit(image, (15, 45))
    assert torch.allclose(half[0, 7], torch.tensor([0.0] * 15 + [1.0] * 15 + [0.0] * 15), atol=0.2)


def test_each_epoch_sees_every_example_and_each_micro_batch_one_size() -> None:
    data = BucketedDataset(Pictures(), BUCKETS)
    counts = data.counts()
    assert counts == {(8, 8): 6, (8, 16): 3, (16, 8): 3}
    number = 3 + 2 + 2
    epochs = []
    for epoch in range(2):
        batches = [data.micro_batch(epoch * number + place, 2, seed=5) for place in range(number)]
        assert all(len({data.image_size(index) for index in batch}) == 1 for batch in batches)
        seen = Counter(index for batch in batches for index in batch)
        assert set(seen) == set(range(12))
        assert sorted(seen.values()) == [1] * 10 + [2] * 2  # two buckets of 3 are filled up
        epochs.append(batches)
    assert epochs[0] != epochs[1]
    again = BucketedDataset(Pictures(), BUCKETS)
    assert again.micro_batch(9, 2, seed=5) == epochs[1][2]
    assert [again.micro_batch(place, 2, seed=6) for place in range(number)] != epochs[0]
    assert data[1].target is not None
    assert data[1].target.shape == (3, 8, 16)
    assert data[11].target is None


def test_sizes_come_from_the_heads_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright: the file's columns are the picture's rows
    Image.new("RGB", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (20, 10)).save(tmp_path / "flat.png")
    rows = ['{"target": "turned.jpg"}', '{"target": "flat.png"}', '{"prompt": "none"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    data = JsonlDataset(str(tmp_path / "rows.jsonl"))
    assert [data.target_size(index) for index in range(3)] == [(20, 10), (10, 20), None]
    assert load_image(tmp_path / "turned.jpg").shape == (3, 20, 10)
    monkeypatch.setattr("rewardgen.data.jsonl.load_image", lambda path: pytest.fail("a picture was decoded"))
    bucketed = BucketedDataset(data, BUCKETS)
    assert [bucketed.image_size(index) for index in range(3)] == [(16, 8), (8, 16), (8, 8)]


def make(folder: Path, num_steps: int = 6, batch_size: int = 2) -> tuple[Trainer, list[StepReport]]:
    policy, reports = ToyPolicy(), []
    rollout = RolloutConfig.model_validate(
        {
            "image_size": (8, 8),
            "num_steps": 4,
            "window": {"kind": "refl", "entry_range": [1, 3]},
            "buckets": BUCKETS,
        }
    )

    class Reports:
        def step(self, report: StepReport) -> None:
            reports.append(report)

    learner = Learner(
        policy,
        Objective(ObjectiveConfig.model_validate({"rewards": {"style": {"use": "toy"}}}), {"style": ToyReward()}),
        optimizer=OptimizerConfig(lr=1e-2),
        window=rollout.window,
    )
    trainer = Trainer(
        learner,
        InlinePool(RolloutWorker(policy)),
        BucketedDataset(Pictures(), BUCKETS),
        rollout=rollout,
        config=TrainConfig(num_steps=num_steps, batch_size=batch_size, accumulation=2, checkpoint_every=1),
        seed=1,
        folder=folder,
        reporter=Reports(),
    )
    return trainer, reports


def test_training_draws_each_micro_batch_in_its_size_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[MicroBatch] = []
    step = Learner.step

    def spy(self: Learner, batches: list[MicroBatch], *, step_: object = step, **rest: object) -> StepReport:
        seen.extend(batches)
        return step(self, batches, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Learner, "step", spy)
    whole, _ = make(tmp_path / "whole")
    whole.run()
    assert {batch.image_size for batch in seen} == set(BUCKETS)
    for batch in seen:
        assert batch.rollout is not None
        length = (batch.image_size[0] // 4) * (batch.image_size[1] // 4)
        assert batch.rollout.trajectory.entry_BLC.shape[1] == length
        assert all(e.target is None or e.target.shape[1:] == batch.image_size for e in batch.examples)
    uninterrupted = [[example.id for example in batch.examples] for batch in seen]
    seen.clear()
    make(tmp_path / "part", num_steps=2)[0].run()
    resumed, _ = make(tmp_path / "part")
    assert resumed.resume() == 2
    resumed.run()
    assert [[example.id for example in batch.examples] for batch in seen] == uninterrupted
    tensors = whole.learner.state()[0]
    assert all(torch.equal(tensors[name], tensor) for name, tensor in resumed.learner.state()[0].items())
    other, _ = make(tmp_path / "part", batch_size=4)
    with pytest.raises(CheckpointError, match="examples in a"):
        other.resume()


def test_impossible_buckets_are_refused() -> None:
    settings = {"image_size": (8, 8), "num_steps": 4, "window": {"kind": "full"}}
    for buckets, message in (([(8, 0)], "positive"), ([(8, 8), (8, 8)], "twice"), ([], "at least 1")):
        with pytest.raises(ValidationError, match=message):
            RolloutConfig.model_validate(settings | {"buckets": buckets})
