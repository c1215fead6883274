"""Tar shards: members become examples, faults are named, and a killed run goes on with the very next example."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from rewardgen.data.images import ImageError
from rewardgen.data.jsonl import DatasetError
from rewardgen.data.shards import ShardDataset
from rewardgen.fleet.inline import InlinePool
from rewardgen.learner import Learner, OptimizerConfig
from rewardgen.objective import Objective, ObjectiveConfig
from rewardgen.rollout import RolloutConfig, RolloutWorker
from rewardgen.trainer import TrainConfig, Trainer
from rewardgen.types import Example
from tests.toys import ToyPolicy, ToyReward


def png(value: int, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 255 - value, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def write(path: Path, members: dict[str, bytes | str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shards(folder: Path, each: int = 3, number: int = 3) -> str:
    for shard in range(number):
        members: dict[str, bytes | str] = {}
        for place in range(each):
            key, value = f"{shard:02d}/{place:03d}", 40 * shard + place
            members |= {
                f"{key}.json": json.dumps({"prompt": f"thing {value}"}),
                f"{key}.target.png": png(value),
                f"{key}.style.png": png(value + 100),
            }
        write(folder / f"train-{shard:04d}.tar", members)
    return str(folder / f"train-{{0000..{number - 1:04d}}}.tar")


def test_members_become_examples(tmp_path: Path) -> None:
    members = {
        "a.json": json.dumps({"id": "first", "prompt": "ein Bär", "extras": {"stars": 3}}),
        "a.style.1.jpg": png(2),
        "a.style.0.png": png(1),
        "a.content.png": png(3, (6, 4)),
        "a.identity.png": png(4),
        "a.target.png": png(5, (10, 12)),
        "b.txt": "only words\n",
        "folder/c.target.png": png(6),
    }
    path = str(write(tmp_path / "x.tar", members))
    data = ShardDataset(path)
    first, second, third = (data[index] for index in range(3))
    assert (first.id, first.prompt, first.extras) == ("first", "ein Bär", {"stars": 3})
    assert [round(float(style[0, 0, 0]) * 255) for style in first.style_refs] == [1, 2]
    assert first.content_refs[0].shape == (3, 4, 6)
    assert len(first.identity_refs) == 1
    assert (second.id, second.prompt, second.target) == ("b", "only words", None)
    assert third.id == "folder/c"
    assert [data.target_size(index) for index in range(3)] == [(12, 10), None, (8, 8)]
    assert len(ShardDataset(path, limit=2)) == 2


def test_shards_by_range_and_pattern(tmp_path: Path) -> None:
    written = shards(tmp_path)
    by_range, by_pattern = ShardDataset(written), ShardDataset(str(tmp_path / "*.tar"))
    assert len(by_range) == len(by_pattern) == 9
    assert [by_range[i].id for i in range(9)] == [by_pattern[i].id for i in range(9)]
    assert by_range[4].prompt == "thing 41"
    with pytest.raises(DatasetError, match=r"train-0003\.tar: there is no such shard"):
        ShardDataset(written.replace("0002}", "0003}"))
    with pytest.raises(DatasetError, match="there are no such shards"):
        ShardDataset(str(tmp_path / "none-*.tar"))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": png(1)}, "'a.png' is neither KEY.json"),
        ({"a.json": "{}", "a.txt": "x"}, "are one example's"),
        ({"a.style.png": png(1), "a.style.0.png": png(2)}, "has the number of"),
        ({"a.style.1.png": png(1)}, "not numbered 0, 1, 2"),
        ({"a.json": "{"}, "is not what its name says"),
        ({"a.json": "[]"}, "must hold an object"),
        ({"a.json": '{"promt": "x"}'}, "'promt' must be one of"),
        ({"a.json": '{"prompt": 3}'}, "'prompt' must be one of"),
    ],
)
def test_faults_name_shard_and_member(members: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", members)
    with pytest.raises(DatasetError, match=r"x\.tar") as caught:
        ShardDataset(str(path))[0]
    assert message in str(caught.value)


def test_damaged_shards_and_pictures_are_told(tmp_path: Path) -> None:
    (tmp_path / "no.tar").write_bytes(b"no tar file" * 100)
    with pytest.raises(DatasetError, match=r"no\.tar: no readable uncompressed tar"):
        ShardDataset(str(tmp_path / "no.tar"))
    path = write(tmp_path / "x.tar", {"a.target.png": png(1)[:40], "b.target.png": png(2)})
    with pytest.raises(ImageError, match=r"x\.tar: a\.target\.png"):
        ShardDataset(str(path))[0]
    data = ShardDataset(str(path))
    path.write_bytes(path.read_bytes()[:1100])
    with pytest.raises(ImageError, match=r"x\.tar: .*b\.target\.png' is cut off"):
        data[1]
    twin = write(tmp_path / "y.tar", {"b.target.png": png(3)})
    write(path, {"b.target.png": png(3)})
    with pytest.raises(DatasetError, match=rf"the example 'b' stands in .*{path.name}"):
        ShardDataset(str(twin.parent / "[xy].tar"))


class Killed(BaseException):
    """As sudden as a signal: nothing catches it."""


class Counting:
    """A dataset that notes what is asked of it, and dies at some request."""

    def __init__(self, data: ShardDataset, dies_at: int | None = None) -> None:
        self.data, self.dies_at, self.asked = data, dies_at, []  # type: ignore[var-annotated]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Example:
        if self.dies_at is not None and len(self.asked) == self.dies_at:
            raise Killed
        self.asked.append(self.data[index].id)
        return self.data[index]


def make(folder: Path, data: Counting) -> Trainer:
    policy = ToyPolicy()
    rollout = RolloutConfig.model_validate(
        {"image_size": (8, 8), "num_steps": 4, "window": {"kind": "refl", "entry_range": [1, 3]}}
    )

    class Silent:
        def step(self, report: object) -> None:
            pass

    learner = Learner(
        policy,
        Objective(ObjectiveConfig.model_validate({"rewards": {"style": {"use": "toy"}}}), {"style": ToyReward()}),
        optimizer=OptimizerConfig(lr=1e-2),
        window=rollout.window,
    )
    return Trainer(
        learner,
        InlinePool(RolloutWorker(policy)),
        data,
        rollout=rollout,
        config=TrainConfig(num_steps=10, batch_size=2, checkpoint_every=1),
        seed=4,
        folder=folder,
        reporter=Silent(),
    )


def test_a_run_killed_within_a_shard_goes_on_with_the_very_next_example(tmp_path: Path) -> None:
    written = shards(tmp_path)
    whole = Counting(ShardDataset(written))
    undisturbed = make(tmp_path / "whole", whole)
    undisturbed.run()
    assert len(whole.asked) == 20
    assert set(whole.asked[:9]) == {f"{shard:02d}/{place:03d}" for shard in range(3) for place in range(3)}
    assert whole.asked[:9] != sorted(whole.asked[:9])
    for dies_at in (5, 8, 13):
        folder = tmp_path / f"killed-{dies_at}"
        first = Counting(ShardDataset(written), dies_at)
        with pytest.raises(Killed):
            make(folder, first).run()
        second = Counting(ShardDataset(written))
        resumed = make(folder, second)
        completed = resumed.resume()
        assert completed == dies_at // 2  # the step that died is drawn again, from its first example
        resumed.run()
        assert first.asked[: 2 * completed] + second.asked == whole.asked
        ours, theirs = resumed.learner.state()[0], undisturbed.learner.state()[0]
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
