"""Hugging Face datasets: in memory, from folders, with columns of any name; and what is wrong is said in one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from rewardgen.data.huggingface import HuggingFaceDataset
from rewardgen.data.images import ImageError
from rewardgen.data.jsonl import DatasetError
from rewardgen.reward_function import function_reward
from rewardgen.rewards.judging.fit import label_of
from rewardgen.rewards.judging.questions import load_question


def colour(value: int) -> Image.Image:
    return Image.new("RGB", (4, 6), (value, 0, 0))


@pytest.fixture
def rows() -> Any:
    return datasets.Dataset.from_dict(
        {
            "prompt": ["a", None, "c"],
            "content": [colour(1), colour(2), None],
            "style": [[colour(3), colour(4)], [], [colour(5)]],
            "target": [colour(6), None, colour(7)],
            "stars": [1, 2, 3],
        },
        features=datasets.Features(
            {
                "prompt": datasets.Value("string"),
                "content": datasets.Image(),
                "style": datasets.List(datasets.Image()),
                "target": datasets.Image(),
                "stars": datasets.Value("int32"),
            }
        ),
    )


def levels(pictures: tuple[torch.Tensor, ...]) -> list[int]:
    return [round(float(picture[0].mean()) * 255) for picture in pictures]


def check(data: HuggingFaceDataset) -> None:
    first, second, third = (data[index] for index in range(3))
    assert (first.id, first.prompt, levels(first.content_refs), levels(first.style_refs)) == (
        "000000",
        "a",
        [1],
        [3, 4],
    )
    assert first.target is not None
    assert first.target.shape == (3, 6, 4)
    assert first.target.dtype == torch.float32
    assert (second.prompt, levels(second.content_refs), second.style_refs, second.target) == ("", [2], (), None)
    assert (third.content_refs, levels(third.style_refs)) == ((), [5])


def test_in_memory(rows: Any) -> None:
    check(HuggingFaceDataset.from_dataset(rows))
    named = HuggingFaceDataset.from_dataset(rows, id="stars", content="target", target=None)
    assert (named[1].id, named[0].target, levels(named[0].content_refs)) == ("2", None, [6])


def test_local_folders(rows: Any, tmp_path: Path) -> None:
    rows.save_to_disk(str(tmp_path / "saved"))
    check(HuggingFaceDataset(str(tmp_path / "saved")))
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "both"))
    check(HuggingFaceDataset(str(tmp_path / "both")))
    with pytest.raises(DatasetError, match=r"no split 'trian'\. Did you mean 'train'"):
        HuggingFaceDataset(str(tmp_path / "both"), split="trian")
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    found = HuggingFaceDataset(str(tmp_path / "parquet"), limit=3)
    check(found)
    assert len(found) == 3


def test_the_other_columns_are_extras() -> None:
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "target": datasets.Image(),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "stars": datasets.Value("float32"),
            "tags": datasets.List(datasets.Value("string")),
            "mask": datasets.Image(),
            "views": datasets.List(datasets.Image()),
            "extras": {"artist": datasets.Value("string")},
        }
    )
    rows = datasets.Dataset.from_dict(
        {
            "prompt": ["a", "b", "c"],
            "target": [colour(1), colour(2), colour(3)],
            "label": [1, 0, -1],
            "stars": [0.5, None, 2.0],
            "tags": [["x", "y"], [], None],
            "mask": [colour(1)] * 3,
            "views": [[colour(1)]] * 3,
            "extras": [{"artist": "me"}, {"artist": None}, None],
        },
        features=features,
    )
    data = HuggingFaceDataset.from_dataset(rows)
    assert data[0].extras == {"label": "yes", "stars": 0.5, "tags": ["x", "y"], "artist": "me"}
    assert data[1].extras == {"label": "no", "stars": None, "tags": [], "artist": None}
    assert data[2].extras["label"] is None
    assert HuggingFaceDataset.from_dataset(rows, extras=["stars"])[0].extras == {"stars": 0.5}
    assert HuggingFaceDataset.from_dataset(rows, extras=[])[0].extras == {}
    with pytest.raises(DatasetError, match=r"extras: the column 'starz' is not there\. Did you mean 'stars'"):
        HuggingFaceDataset.from_dataset(rows, extras=["starz"])
    with pytest.raises(DatasetError, match="extras: the column 'prompt' is another field's"):
        HuggingFaceDataset.from_dataset(rows, extras=["prompt"])


def test_labels_reach_a_judge_and_columns_a_reward_function(rows: Any) -> None:
    labelled = rows.add_column("label", ["yes", "yes", "no"])
    data = HuggingFaceDataset.from_dataset(labelled)
    question = load_question("style")
    assert [label_of(question, data[index]) for index in (0, 2)] == ["yes", "no"]

    def stars(completions: list[Image.Image], stars: list[int]) -> list[float]:
        return [number / 10 for number in stars]

    reward = function_reward(stars)()
    score = reward.score(torch.zeros(3, 3, 4, 4), [data[index] for index in range(3)])
    torch.testing.assert_close(score.value_B, torch.tensor([0.1, 0.2, 0.3]))


def test_faults_are_told_in_one_line(rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DatasetError, match=r"content: there is no column 'contnt'\. Did you mean 'content'"):
        HuggingFaceDataset.from_dataset(rows, content="contnt")
    with pytest.raises(DatasetError, match="none of its columns is known: stars"):
        HuggingFaceDataset.from_dataset(rows.select_columns(["stars"]))
    with pytest.raises(DatasetError, match="row 000000: stars: a int is no picture"):
        HuggingFaceDataset.from_dataset(rows, target="stars")[0]
    with pytest.raises(DatasetError, match="the dataset has no rows"):
        HuggingFaceDataset.from_dataset(rows.select([]))
    bad = datasets.Dataset.from_dict({"target": [{"bytes": b"no picture", "path": None}]})
    with pytest.raises(ImageError, match="row 000000: target"):
        HuggingFaceDataset.from_dataset(bad)[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="empty: the dataset cannot be loaded") as caught:
        HuggingFaceDataset(str(tmp_path / "empty"))
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DatasetError, match=r"pip install -e '\.\[hub\]'"):
        HuggingFaceDataset(str(tmp_path / "empty"))
