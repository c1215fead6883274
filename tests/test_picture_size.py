"""Sizes of targets without decoding them, and how little is read to know them: bytes and pictures are counted."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from rewardgen.data import huggingface
from rewardgen.data.buckets import BucketedDataset, Size
from rewardgen.data.huggingface import HuggingFaceDataset
from rewardgen.data.images import ImageError, decode_image, picture_size
from rewardgen.data.jsonl import DatasetError, JsonlDataset
from rewardgen.data.shards import ShardDataset

BUCKETS = [(96, 96), (64, 128), (128, 64)]
SIZES: list[Size] = [(300, 310), (240, 480), (500, 260), (256, 256)]
WANTED = [(96, 96), (64, 128), (128, 64), (96, 96)]
HEAD = 4096
"""Bytes of a noisy picture's file that may be read for its size: a tenth to a hundredth of it."""


def noisy(size: Size, kind: str = "JPEG", **options: Any) -> bytes:
    """A file that does not compress, so that its pixels outweigh its head."""
    levels = np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, format=kind, **options)
    return buffer.getvalue()


class Counting(io.FileIO):
    """A file that counts what is read from the disk."""

    read_bytes = 0

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        Counting.read_bytes += len(content)
        return content

    def readinto(self, buffer: Any, /) -> int:
        number = super().readinto(buffer)
        Counting.read_bytes += number
        return number


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Counting]]:
    """Files that are opened through `Path` count; a picture that is decoded is an error."""

    plainly = Path.open

    def opened(self: Path, mode: str = "r", buffering: int = -1, **options: Any) -> Any:
        if mode != "rb":
            return plainly(self, mode, buffering, **options)
        file = Counting(self)
        return file if buffering == 0 else io.BufferedReader(file)

    Counting.read_bytes = 0
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", opened)
        patched.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("a picture was decoded"))
        yield Counting


KINDS = [("JPEG", "jpg"), ("PNG", "png")]


@pytest.mark.parametrize(("kind", "ending"), KINDS)
def test_buckets_over_files_read_heads_only(tmp_path: Path, kind: str, ending: str, counted: type[Counting]) -> None:
    for place, size in enumerate(SIZES):
        (tmp_path / f"{place}.{ending}").write_bytes(noisy(size, kind))
    (tmp_path / "ref.png").write_bytes(noisy((400, 400), "PNG"))
    rows = [{"target": f"{place}.{ending}", "style": ["ref.png"], "content": "ref.png"} for place in range(len(SIZES))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = BucketedDataset(JsonlDataset(str(tmp_path / "rows.jsonl")), BUCKETS)
    assert [data.image_size(index) for index in range(len(SIZES))] == WANTED
    assert 0 < counted.read_bytes <= len(SIZES) * HEAD


@pytest.mark.parametrize(("kind", "ending"), KINDS)
def test_buckets_over_shards_read_heads_only(tmp_path: Path, kind: str, ending: str, counted: type[Counting]) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for place, size in enumerate(SIZES):
            members = {f"{place}.target.{ending}": noisy(size, kind), f"{place}.style.png": noisy((400, 400), "PNG")}
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    data = BucketedDataset(ShardDataset(str(tmp_path / "x.tar")), BUCKETS)
    assert [data.image_size(index) for index in range(len(SIZES))] == WANTED
    assert 0 < counted.read_bytes <= len(SIZES) * HEAD


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.usefixtures("counted")
def test_buckets_over_hugging_face_rows_read_heads_only(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the targets' column alone, and of its bytes only the heads."""
    rows = datasets.Dataset.from_dict(
        {
            "target": [{"bytes": noisy(size, kind), "path": None} for size in SIZES] + [None],
            "style": [[{"bytes": b"never looked at", "path": None}]] * 5,
        },
        features=datasets.Features({"target": datasets.Image(), "style": datasets.List(datasets.Image())}),
    )
    read = 0

    class Reader:
        def __init__(self, file: Any) -> None:
            self.file, self.seek, self.tell = file, file.seek, file.tell

        def read(self, size: int = -1) -> bytes:
            nonlocal read
            content: bytes = self.file.read(size)
            read += len(content)
            return content

    monkeypatch.setattr(huggingface, "picture_size", lambda file, name: picture_size(Reader(file), name))  # type: ignore[arg-type]
    source = HuggingFaceDataset.from_dataset(rows)
    assert [source.target_size(index) for index in range(5)] == [*SIZES, None]
    data = BucketedDataset(source, BUCKETS)
    assert [data.image_size(index) for index in range(5)] == [*WANTED, BUCKETS[0]]
    assert 0 < read <= 2 * len(SIZES) * HEAD
    assert HuggingFaceDataset.from_dataset(rows, target=None).target_size(0) is None


def test_hugging_face_targets_by_path_and_their_faults(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(noisy((20, 30), "PNG"))
    paths = [str(tmp_path / "a.png"), str(tmp_path / "none.png"), None]
    by_path = HuggingFaceDataset.from_dataset(datasets.Dataset.from_dict({"target": paths}))
    assert [by_path.target_size(0), by_path.target_size(2)] == [(20, 30), None]
    with pytest.raises(ImageError, match=r"none\.png"):
        by_path.target_size(1)
    bad = [{"bytes": b"no picture", "path": None}, {"bytes": None, "path": paths[0]}, {"bytes": None, "path": None}]
    by_bytes = HuggingFaceDataset.from_dataset(datasets.Dataset.from_dict({"target": bad}))
    with pytest.raises(ImageError, match="row 000000: target"):
        by_bytes.target_size(0)
    assert by_bytes.target_size(1) == (20, 30)
    with pytest.raises(DatasetError, match="row 000002: target: a dict is no picture"):
        by_bytes.target_size(2)
    with pytest.raises(DatasetError, match="row 000000: target: a int is no picture"):
        HuggingFaceDataset.from_dataset(datasets.Dataset.from_dict({"target": [3]})).target_size(0)


def with_chunks(png: bytes, chunks: list[tuple[bytes, bytes]], place: str) -> bytes:
    """A PNG with further chunks before or behind its pixels."""
    at = png.index(b"IDAT") - 4 if place == "before" else png.rindex(b"IEND") - 4
    made = b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    return png[:at] + made + png[at:]


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def turned(kind: str, orientation: int) -> bytes:
    """A picture of 24 rows and 40 columns in the file, with something that says how the camera was held."""
    exif = exif_of(orientation)
    base = noisy((24, 40), "PNG")
    content = exif.tobytes().removeprefix(b"Exif\0\0")
    xmp = f'<x tiff:Orientation="{orientation}"/>'.encode()
    match kind:
        case "PNG, behind":
            return with_chunks(base, [(b"eXIf", content)], "behind")
        case "PNG, XMP behind":
            return with_chunks(base, [(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)], "behind")
        case "PNG, raw profile":
            profile = b"\nexif\n      %d\n" % len(content) + content.hex().encode()
            return with_chunks(base, [(b"tEXt", b"Raw profile type exif\0" + profile)], "behind")
        case "animated PNG":
            frames = [Image.new("RGB", (40, 24), (shade, 0, 0)) for shade in (9, 90)]
            buffer = io.BytesIO()
            frames[0].save(buffer, format="PNG", save_all=True, append_images=frames[1:], exif=exif)
            return buffer.getvalue()
    return noisy((24, 40), kind, exif=exif)


TURNED = ["JPEG", "PNG", "WEBP", "TIFF", "PNG, behind", "PNG, XMP behind", "PNG, raw profile", "animated PNG"]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("kind", TURNED)
def test_the_size_is_that_of_the_decoded_picture(kind: str, orientation: int) -> None:
    content = turned(kind, orientation)
    decoded = decode_image(content, kind)
    wanted = (40, 24) if orientation >= 5 else (24, 40)
    assert tuple(decoded.shape[1:]) == wanted
    assert picture_size(io.BytesIO(content), kind) == wanted


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_damage_is_told_or_harmless(data: st.DataObject) -> None:
    """Whatever is wrong with a file, there is a size or an ImageError; where it can be decoded, its very size."""
    content = bytearray(turned(data.draw(st.sampled_from(TURNED)), data.draw(st.sampled_from([1, 6]))))
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        found = picture_size(io.BytesIO(cut), "x")
    except ImageError:
        found = None
    try:
        decoded = tuple(decode_image(cut, "x").shape[1:])
    except ImageError:
        return
    assert found == decoded


def test_a_shard_that_is_cut_off_is_told(tmp_path: Path) -> None:
    content = noisy((64, 64), "PNG")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("a.target.png")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    data = ShardDataset(str(tmp_path / "x.tar"))
    assert data.target_size(0) == (64, 64)
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[: 512 + len(content) - 1])
    with pytest.raises(ImageError, match=r"x\.tar: 'a\.target\.png' is cut off"):
        data.target_size(0)
    (tmp_path / "x.tar").unlink()
    with pytest.raises(ImageError, match=r"x\.tar: cannot be read: no such file"):
        data.target_size(0)
