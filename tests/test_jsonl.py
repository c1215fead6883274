"""`JsonlDataset`: rows become examples, faulty rows are told by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rewardgen.data.images import ImageError
from rewardgen.data.jsonl import DatasetError, JsonlDataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for index, colour in enumerate(("red", "lime", "blue")):
        Image.new("RGB", (index + 1, 2), colour).save(tmp_path / "pictures" / f"{colour}.png")
    return tmp_path


def write(folder: Path, *rows: Any) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def test_rows_become_examples(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = JsonlDataset(
        write(
            folder,
            {
                "id": "a",
                "prompt": "ein Bär",
                "content": "pictures/red.png",
                "style": ["pictures/lime.png", "pictures/blue.png"],
                "target": "pictures/blue.png",
                "extras": {"stars": 3},
            },
            "",
            {"prompt": "no pictures"},
        )
    )
    monkeypatch.chdir("/")
    first, second = rows[0], rows[1]
    assert len(rows) == 2
    assert (first.id, first.prompt, first.extras) == ("a", "ein Bär", {"stars": 3})
    assert [tuple(ref.shape) for ref in first.content_refs] == [(3, 2, 1)]
    assert [tuple(ref.shape) for ref in first.style_refs] == [(3, 2, 2), (3, 2, 3)]
    assert first.content_refs[0][:, 0, 0].tolist() == [1.0, 0.0, 0.0]
    assert first.target is not None
    assert first.target[:, 0, 0].tolist() == [0.0, 0.0, 1.0]
    # Named after its line, which a blank line before it does not change.
    assert (second.id, second.style_refs, second.target) == ("000003", (), None)


def test_absolute_paths_byte_order_mark_and_crlf(folder: Path) -> None:
    row = json.dumps({"content": str(folder / "pictures" / "red.png")})
    path = folder / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\r\n\r\n")
    assert JsonlDataset(str(path))[0].content_refs[0].shape == (3, 2, 1)


def test_limit_takes_the_first_rows(folder: Path) -> None:
    path = write(folder, *[{"id": str(index)} for index in range(5)])
    assert [JsonlDataset(path, limit=2)[index].id for index in range(2)] == ["0", "1"]
    assert len(JsonlDataset(path, limit=9)) == 5
    with pytest.raises(DatasetError, match="limit: 0 examples"):
        JsonlDataset(path, limit=0)


def test_pictures_are_decoded_when_asked_for(folder: Path) -> None:
    (folder / "pictures" / "damaged.png").write_bytes(b"damaged")
    rows = JsonlDataset(write(folder, {"content": "pictures/damaged.png"}, {"content": "pictures/red.png"}))
    assert rows[1].content_refs[0].shape == (3, 2, 1)
    with pytest.raises(ImageError, match=r"damaged\.png"):
        rows[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "a row must be an object"),
        ({"prmpt": "x"}, "unknown key 'prmpt'. Did you mean 'prompt'?"),
        ({"prompt": 3}, "'prompt' must be text"),
        ({"id": None}, "'id' must be text"),
        ({"content": 3}, "'content' must be a path or a list of paths"),
        ({"style": ["pictures/red.png", ""]}, "'style' must be a path or a list of paths"),
        ({"style": "pictures/pink.png"}, "'style': there is no picture"),
        ({"target": ["pictures/red.png"]}, "'target' must be a path"),
        ({"target": "pictures"}, "'target': there is no picture"),
        ({"extras": []}, "'extras' must be an object"),
        ({"id": "good"}, "the id 'good' stands on line 1 already"),
    ],
)
def test_a_faulty_row_is_told_by_its_line(folder: Path, row: Any, message: str) -> None:
    with pytest.raises(DatasetError) as caught:
        JsonlDataset(write(folder, {"id": "good"}, "", row))
    assert "line 3: " + message in str(caught.value)
    assert "rows.jsonl" in str(caught.value)


def test_all_faults_are_told_up_to_ten(folder: Path) -> None:
    with pytest.raises(DatasetError, match=r"line 10: [^\n]*\n  and 5 more faulty lines$"):
        JsonlDataset(write(folder, *["{"] * 15))


def test_missing_empty_and_binary_files(folder: Path) -> None:
    with pytest.raises(DatasetError, match=r"none\.jsonl: there is no such dataset file"):
        JsonlDataset(str(folder / "none.jsonl"))
    with pytest.raises(DatasetError, match="has no rows"):
        JsonlDataset(write(folder, "", " "))
    (folder / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match="not utf-8 text"):
        JsonlDataset(str(folder / "binary.jsonl"))
    with pytest.raises(DatasetError, match="is a directory"):
        JsonlDataset(str(folder))
