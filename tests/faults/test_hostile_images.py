"""Pictures as they come: each gives the right values, or one line that names the file."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rewardgen.data.images import ImageError, load_image
from rewardgen.data.jsonl import JsonlDataset

GREY, GREY_ALPHA, RGB, RGBA = 0, 4, 2, 6  # PNG's colour types


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG written by hand: Pillow writes neither 16-bit colour nor files that lie."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def row_16(*values: int) -> bytes:
    return b"\0" + struct.pack(f">{len(values)}H", *values)


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def load(tmp_path: Path, content: bytes, name: str = "picture.png") -> torch.Tensor:
    (tmp_path / name).write_bytes(content)
    pixels = load_image(tmp_path / name)
    assert pixels.dtype == torch.float32
    assert pixels.ndim == 3
    assert len(pixels) == 3
    assert ((pixels >= 0) & (pixels <= 1)).all()
    return pixels


def refusal(path: Path) -> str:
    """The one line that refuses a file; it begins with its path."""
    with pytest.raises(ImageError) as caught:
        load_image(path)
    told = str(caught.value)
    assert told.startswith(f"{path}: ")
    assert told.isprintable()
    assert len(told) < len(str(path)) + 200
    return told


def close(pixels: torch.Tensor, expected: list[list[float]], tolerance: float = 1e-6) -> None:
    """Compare the first row of pixels, each written as (red, green, blue)."""
    torch.testing.assert_close(pixels[:, 0].T, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=tolerance)


def test_sixteen_bit_grey_is_exact(tmp_path: Path) -> None:
    pixels = load(tmp_path, png(3, 1, 16, GREY, row_16(1, 33023, 65535)))
    close(pixels, [[v / 65535] * 3 for v in (1, 33023, 65535)])


def test_sixteen_bit_grey_with_a_transparent_number(tmp_path: Path) -> None:
    transparent = chunk(b"tRNS", struct.pack(">H", 200))
    close(load(tmp_path, png(2, 1, 16, GREY, row_16(201, 200), transparent)), [[201 / 65535] * 3, [1, 1, 1]])


def test_sixteen_bit_colour_is_right_to_the_eighth_bit(tmp_path: Path) -> None:
    pixels = load(tmp_path, png(2, 1, 16, RGB, row_16(0, 257, 32768, 33023, 65535, 40000)))
    close(pixels, [[0, 257 / 65535, 32768 / 65535], [33023 / 65535, 1, 40000 / 65535]], tolerance=1 / 255)


def test_sixteen_bit_alpha_is_put_on_white(tmp_path: Path) -> None:
    pixels = load(tmp_path, png(2, 1, 16, RGBA, row_16(0, 0, 65535, 0, 0, 32768, 65535, 32768)))
    close(pixels, [[1, 1, 1], [0.5, 0.75, 1]], tolerance=2 / 255)
    pixels = load(tmp_path, png(2, 1, 16, GREY_ALPHA, row_16(0, 32768, 65535, 0)))
    close(pixels, [[0.5] * 3, [1, 1, 1]], tolerance=2 / 255)


@pytest.mark.parametrize(
    ("ink", "colour"),
    [
        ((0, 255, 255, 0), (1, 0, 0)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((0, 0, 0, 0), (1, 1, 1)),
        ((255, 0, 0, 0), (0, 1, 1)),
    ],
)
def test_cmyk_jpeg_is_not_inverted(tmp_path: Path, ink: tuple[int, ...], colour: tuple[float, ...]) -> None:
    pixels = load(tmp_path, encoded(Image.new("CMYK", (8, 8), ink), "JPEG", quality=100), "cmyk.jpg")
    close(pixels[:, :1, :1], [list(colour)], tolerance=0.02)


def test_greyscale_and_bilevel(tmp_path: Path) -> None:
    close(load(tmp_path, encoded(Image.new("L", (1, 1), 51), "PNG")), [[0.2] * 3])
    close(load(tmp_path, encoded(Image.new("1", (1, 1), 1), "PNG")), [[1.0] * 3])


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_put_on_white(tmp_path: Path, kind: str) -> None:
    picture = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 102, 255)):
        picture.putpixel((x, 0), (255, 0, 51, alpha))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    close(load(tmp_path, encoded(picture, kind, **options)), [[1, 1, 1], [1, 0.6, 0.4 * 0.2 + 0.6], [1, 0, 0.2]])


def test_a_palette_with_an_alpha_of_each_colour(tmp_path: Path) -> None:
    palette = Image.new("P", (3, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.putdata([0, 1, 2])
    pixels = load(tmp_path, encoded(palette, "PNG", transparency=bytes([0, 51, 255])))
    close(pixels, [[1, 1, 1], [0.8, 1, 0.8], [0, 0, 1]])


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    close(load(tmp_path, content), [[1, 0, 0]] * 2)


def with_orientation(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_camera_was_on_its_side(tmp_path: Path, kind: str, mode: str) -> None:
    """Orientation 6: the stored left is the top of the scene, so the stored bottom row becomes the left column."""
    stored = Image.new(mode, (16, 8), 0)
    stored.paste(255 if mode == "L" else (255, 255, 255), (0, 0, 8, 8))
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    pixels = load(tmp_path, encoded(stored, kind, exif=with_orientation(6), **options))
    assert pixels.shape == (3, 16, 8)
    expected = torch.cat([torch.ones(3, 8, 8), torch.zeros(3, 8, 8)], dim=1)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=0.05)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage that is no TIFF",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12",
        b"",
        with_orientation(9),
        with_orientation(0),
    ],
    ids=["garbage", "offset beyond the end", "cut", "empty", "orientation 9", "orientation 0"],
)
def test_damaged_exif_costs_the_rotation_alone(tmp_path: Path, exif: bytes) -> None:
    picture = Image.new("RGB", (16, 8), "white")
    pixels = load(tmp_path, encoded(picture, "JPEG", exif=exif, quality=100), "exif.jpg")
    assert pixels.shape == (3, 8, 16)
    torch.testing.assert_close(pixels, torch.ones(3, 8, 16), rtol=0, atol=0.02)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_one_pixel(tmp_path: Path, kind: str) -> None:
    close(load(tmp_path, encoded(Image.new("RGB", (1, 1), (255, 0, 0)), kind)), [[1, 0, 0]], tolerance=0.02)


def test_a_picture_that_claims_to_be_enormous(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(30_000, 30_000, 8, RGB, b""))
    assert len(path.read_bytes()) < 100
    assert "more pixels than the limit of 100,000,000" in refusal(path)
    # Below the size at which Pillow refuses by itself, and above ours.
    path.write_bytes(png(11_000, 10_000, 8, RGB, b""))
    with pytest.warns(Image.DecompressionBombWarning):
        assert "11000 x 10000 pixels is more than the limit of 100,000,000" in refusal(path)


def test_text_within_that_would_fill_the_memory(tmp_path: Path) -> None:
    """300 MB of zeros in a comment of 300 kB."""
    squeezer = zlib.compressobj(9)
    squeezed = b"".join(squeezer.compress(bytes(2**20)) for _ in range(300)) + squeezer.flush()
    path = tmp_path / "comment.png"
    path.write_bytes(png(1, 1, 8, RGB, bytes(4), chunk(b"zTXt", b"note\0\0" + squeezed)))
    assert "comment.png" in refusal(path)


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0)])
def test_a_picture_without_pixels(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "empty.png"
    path.write_bytes(png(width, height, 8, RGB, b""))
    refusal(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "JPEG2000"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated(tmp_path: Path, kind: str, share: float) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(pixels), kind)
    path = tmp_path / f"cut.{kind.lower()}"
    path.write_bytes(content[: int(share * len(content))])
    refusal(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a picture of a kind that is read: PNG, JPEG, "),
        (b"this is a text\n" * 20, "not a picture of a kind"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "not a picture of a kind"),
        (b'{"prompt": "x"}', "not a picture of a kind"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture of a kind"),
        (b"PK\x03\x04" + bytes(60), "not a picture of a kind"),
        (bytes(400), "not a picture of a kind"),
    ],
    ids=["zero bytes", "text", "pointer of git-lfs", "JSON", "SVG", "zip", "zeros"],
)
def test_what_is_no_picture(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.png").write_bytes(content)
    assert message in refusal(tmp_path / "a.png")


def test_postscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would hand it to an interpreter, if there is one."""
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **_: pytest.fail(f"a process was started: {args}"))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    for name in ("a.eps", "a.png"):
        (tmp_path / name).write_bytes(postscript)
        assert "not a picture of a kind" in refusal(tmp_path / name)


def test_a_folder_nothing_and_names_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    assert "is a directory" in refusal(tmp_path / "folder.png")
    assert "there is no such picture" in refusal(tmp_path / "none.png")
    assert "file name too long" in refusal(tmp_path / f"{'x' * 300}.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    assert "too many levels of symbolic links" in refusal(tmp_path / "loop.png")


def test_numbers_without_a_white(tmp_path: Path) -> None:
    """TIFF holds 32-bit and floating-point numbers; what has no place in [0, 1] is not guessed at."""
    path = tmp_path / "numbers.tif"

    def save(numbers: list[float], kind: type) -> Path:
        Image.fromarray(np.array([numbers], dtype=kind)).save(path)
        return path

    close(load_image(save([0, 65535], np.int32)), [[0, 0, 0], [1, 1, 1]])
    assert "numbers from 0 to 65536 do not fit into 16 bits" in refusal(save([0, 65536], np.int32))
    assert "numbers from -1 to 5 do not fit into 16 bits" in refusal(save([-1, 5], np.int32))
    close(load_image(save([0.25, 1.5], np.float32)), [[0.25] * 3, [1, 1, 1]])
    assert "not finite" in refusal(save([0.25, np.nan], np.float32))
    assert "not finite" in refusal(save([0.25, np.inf], np.float32))


def test_in_a_dataset_the_line_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"text")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"content": "bad.png"}))
    rows = JsonlDataset(str(tmp_path / "rows.jsonl"))
    with pytest.raises(ImageError, match=r"bad\.png: not a picture"):
        rows[0]
