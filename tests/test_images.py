"""`load_image`: pictures of every odd kind, and faults."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rewardgen.data import images
from rewardgen.data.images import ImageError, load_image
from rewardgen.errors import UserError

RGB = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[10, 20, 30], [40, 50, 60], [70, 80, 90]]], dtype=np.uint8)


def save(tmp_path: Path, picture: Image.Image, name: str, **options: object) -> Path:
    path = tmp_path / name
    picture.save(path, **options)
    return path


def test_rgb_values_channels_and_layout(tmp_path: Path) -> None:
    loaded = load_image(save(tmp_path, Image.fromarray(RGB), "a.png"))
    assert loaded.dtype == torch.float32
    assert loaded.is_contiguous()
    torch.testing.assert_close(loaded, torch.from_numpy(RGB).permute(2, 0, 1) / 255, rtol=0, atol=0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_cameras_rotation_is_applied(tmp_path: Path, orientation: int) -> None:
    """Stored pixels are what EXIF's table says to undo; brute force over the eight orientations."""
    upright = RGB
    # What a camera of this orientation stores: EXIF's (row 0, column 0) sides, written out.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = load_image(save(tmp_path, Image.fromarray(np.ascontiguousarray(stored)), "a.png", exif=exif))
    torch.testing.assert_close(loaded, torch.from_numpy(upright).permute(2, 0, 1) / 255)


def test_sixteen_bits_keep_their_precision(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32768], [32769, 65534, 65535]], dtype=np.uint16)
    loaded = load_image(save(tmp_path, Image.fromarray(values), "a.png"))
    expected = torch.from_numpy(values.astype(np.float32) / 65535).expand(3, -1, -1)
    torch.testing.assert_close(loaded, expected, rtol=0, atol=1e-7)
    assert loaded[0, 0, 2] != loaded[0, 1, 0]


def test_greyscale_palette_bilevel_and_cmyk_become_rgb(tmp_path: Path) -> None:
    grey = Image.fromarray(np.array([[0, 128, 255]], dtype=np.uint8))
    torch.testing.assert_close(load_image(save(tmp_path, grey, "g.png"))[:, 0, 1], torch.full((3,), 128 / 255))
    palette = Image.fromarray(RGB).quantize(8)
    torch.testing.assert_close(
        load_image(save(tmp_path, palette, "p.png")), torch.from_numpy(RGB).permute(2, 0, 1) / 255
    )
    bilevel = Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).convert("1")
    assert load_image(save(tmp_path, bilevel, "b.png"))[:, 0].tolist() == [[0.0, 1.0]] * 3
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    red = load_image(save(tmp_path, cmyk, "c.tif"))[:, 0, 0]
    torch.testing.assert_close(red, torch.tensor([1.0, 0.0, 0.0]))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_put_on_white(tmp_path: Path, mode: str) -> None:
    picture = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 51, 255)):
        picture.putpixel((x, 0), (100, 100, 100, alpha))
    loaded = load_image(save(tmp_path, picture.convert(mode), "a.png"))
    expected = torch.tensor([1.0, 0.2 * 100 / 255 + 0.8, 100 / 255])
    torch.testing.assert_close(loaded[0, 0], expected)


def test_a_transparent_palette_colour_is_put_on_white(tmp_path: Path) -> None:
    palette = Image.fromarray(RGB).quantize(8)
    transparent = palette.getpixel((0, 0))
    loaded = load_image(save(tmp_path, palette, "a.gif", transparency=transparent))
    assert loaded[:, 0, 0].tolist() == [1.0, 1.0, 1.0]
    torch.testing.assert_close(loaded[:, 0, 1], torch.tensor([0.0, 1.0, 0.0]))


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    path = save(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(path)[:, 0, 0].tolist() == [1.0, 0.0, 0.0]


def test_one_pixel_is_enough(tmp_path: Path) -> None:
    assert load_image(save(tmp_path, Image.new("RGB", (1, 1), "white"), "a.png")).tolist() == [[[1.0]]] * 3


def outcome(path: Path) -> torch.Tensor | str:
    """The picture, or the message that refused it; any other exception fails the test."""
    try:
        return load_image(path)
    except ImageError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "tiff", "bmp"])
def test_a_truncated_picture_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    whole = buffer.getvalue()
    path = tmp_path / f"cut.{kind}"
    refused = 0
    for length in range(0, len(whole) - 1, max(1, len(whole) // 40)):
        path.write_bytes(whole[:length])
        result = outcome(path)
        if isinstance(result, str):
            assert str(path) in result
            assert "\n" not in result
            refused += 1
        else:
            # A few bytes of padding or trailer may be missing without harm.
            assert result.shape == (3, 16, 16)
    assert refused >= 35


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "gif", "webp"])
def test_flipped_bytes_never_escape_as_another_error(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(1)
    path = tmp_path / "damaged"
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(buffer, kind)
    for _ in range(40):
        damaged = bytearray(buffer.getvalue())
        damaged[int(rng.integers(len(damaged)))] ^= int(rng.integers(1, 255))
        path.write_bytes(bytes(damaged))
        result = outcome(path)
        assert str(path) in result if isinstance(result, str) else result.shape[0] == 3


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"a\.png: not a picture"):
        load_image(path)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"nowhere\.png: there is no such picture"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match="is a directory"):
        load_image(tmp_path)


def test_an_enormous_picture_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 99)
    with pytest.raises(ImageError, match=r"10 x 10 pixels is more than the limit of 99"):
        load_image(save(tmp_path, Image.new("RGB", (10, 10)), "a.png"))


def test_a_small_file_that_claims_a_huge_size(tmp_path: Path) -> None:
    whole = bytearray(save(tmp_path, Image.new("RGB", (4, 4)), "a.bmp").read_bytes())
    whole[18:26] = (60_000).to_bytes(4, "little") * 2
    path = tmp_path / "bomb.bmp"
    path.write_bytes(bytes(whole))
    with pytest.raises(ImageError, match=r"bomb\.bmp: .*limit of 100,000,000"):
        load_image(path)
