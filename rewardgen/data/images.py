"""Pictures from files: whatever the camera or the editor made of them, one kind of tensor comes out."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from rewardgen.errors import UserError

MAX_PIXELS = 100_000_000
"""Larger pictures are refused before they are decoded: a small file can claim a size that fills the memory."""
KINDS = ("PNG", "JPEG", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""What is read, as Pillow calls it; HEIF where a plug-in of Pillow has been registered. Pillow knows more kinds, but
some of those run a program (PostScript), and some take any bytes for a picture."""

_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"
_PNG_TELLS = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
"""Chunks that may say how the camera was held."""
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257
_SIXTEEN_BIT = {"I", "I;16", "I;16L", "I;16B", "I;16N"}
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(UserError):
    """A picture that cannot be read."""


def load_image(path: Path) -> Tensor:
    """Read a picture as float32 [3, H, W] in RGB and [0, 1].

    The camera's rotation is applied (damaged EXIF data count as none), transparency is put on white, of an animation
    the first frame is taken; greyscale, palette and CMYK pictures become RGB. 16-bit greyscale keeps its precision;
    16-bit colour comes as the upper 8 bits, which is all that Pillow reads. Colour profiles are not applied.

    Raises:
        ImageError: the file is missing, truncated, no picture, or larger than `MAX_PIXELS`; names the path.
    """
    with _told(str(path)), path.open("rb") as file:
        # A file and not its path: Pillow maps paths into memory, and then forgets to turn greyscale TIFFs.
        return _read(file, str(path))


def decode_image(content: bytes, name: str) -> Tensor:
    """As `load_image`, from a file's bytes; `name` stands for the path in messages."""
    with _told(name):
        return _read(io.BytesIO(content), name)


def picture_size(file: BinaryIO, name: str) -> tuple[int, int]:
    """(height, width) of a picture as `load_image` gives it, read from its head. Nothing is decoded. Raises ImageError.

    Of a PNG the chunks of pixels are passed over, for what turns a picture may stand behind them. Pillow takes WebP and
    AVIF whole, undecoded.

    Args:
        file: at the picture's beginning; it can be sought in. Unbuffered, no more is read than is needed.
        name: stands for the path in messages.
    """
    with _told(name), Image.open(_without_pixels(file), formats=_readable()) as picture:
        width, height = picture.size
        if isinstance(picture, TiffImageFile):  # Pillow says the turned size, or not: that depends on its version
            width, height = int(picture.tag_v2[_TIFF_WIDTH]), int(picture.tag_v2[_TIFF_HEIGHT])
        return (width, height) if _orientation(picture) >= 5 else (height, width)


def fit(image_3HW: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring a picture [3, H, W] to (height, width): it is resized to cover the size (LANCZOS), then its centre is cut.

    In 8 bits, as pictures are stored. One that has the size already comes back as it is.
    """
    height, width = size
    if tuple(image_3HW.shape[1:]) == size:
        return image_3HW
    scale = max(height / image_3HW.shape[1], width / image_3HW.shape[2])
    rows, columns = (max(least, round(side * scale)) for side, least in zip(image_3HW.shape[1:], size, strict=True))
    levels = (image_3HW.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    resized = Image.fromarray(levels).resize((columns, rows), resample=Image.Resampling.LANCZOS)
    left, top = (columns - width) // 2, (rows - height) // 2
    return _to_tensor(resized.crop((left, top, left + width, top + height)))


def _read(file: BinaryIO, name: str) -> Tensor:
    with Image.open(file, formats=_readable()) as picture:
        width, height = picture.size
        if not width or not height:
            raise ImageError(f"{name}: the picture is empty, {width} x {height} pixels")
        if width * height > MAX_PIXELS:
            raise ImageError(f"{name}: {width} x {height} pixels is more than the limit of {MAX_PIXELS:,}")
        picture.seek(0)
        picture.load()
        return _to_tensor(_upright(picture))


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Whatever goes wrong with a picture becomes an ImageError that names it."""
    try:
        yield
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name}: there is no such picture") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not a picture of a kind that is read: {', '.join(KINDS)}") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{name}: more pixels than the limit of {MAX_PIXELS:,}") from None
    except Exception as error:
        # Decoders meet damage with whatever their arithmetic runs into: KeyError, struct.error, OverflowError.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = " ".join(reason.split()) or type(error).__name__
        raise ImageError(f"{name}: the picture cannot be read: {reason[:1].lower() + reason[1:]}") from None


def _readable() -> list[str]:
    Image.init()
    return [kind for kind in KINDS if kind in Image.OPEN]


def _without_pixels(file: BinaryIO) -> BinaryIO:
    """A PNG with all that `load_image` takes from it but the pixels; any other file is returned as it is.

    Asked for EXIF data, Pillow would decode a PNG to see what stands behind its pixels.
    """
    if file.read(len(_PNG)) != _PNG:
        file.seek(0)
        return file
    kept, pixels = [_PNG], False
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IEND" or (kind == b"fcTL" and pixels):  # the end, of the picture or of its first frame
            break
        pixels |= kind in (b"IDAT", b"fdAT")
        if kind in (b"IDAT", b"fdAT", b"fcTL", b"acTL"):
            file.seek(length + 4, io.SEEK_CUR)
            continue
        content = file.read(length + 4)  # its checksum too
        if not pixels or (kind in _PNG_TELLS and zlib.crc32(kind + content[:-4]) == int.from_bytes(content[-4:])):
            kept.append(head + content)
    return io.BytesIO(b"".join([*kept, _PNG_END]))


def _orientation(picture: Image.Image) -> int:
    """EXIF's number for how the camera was held, 1 where it says nothing that counts."""
    try:
        # A PNG's own method decodes it first. What that would find, `_without_pixels` or decoding has brought.
        exif = Image.Image.getexif(picture) if isinstance(picture, PngImageFile) else picture.getexif()
        orientation = exif.get(ExifTags.Base.Orientation)
    except Exception:  # as above; the pixels are whole, and viewers show such a picture too
        orientation = None
    return orientation if orientation in _UPRIGHT else 1


def _upright(picture: Image.Image) -> Image.Image:
    orientation = _orientation(picture)
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture


def _to_tensor(picture: Image.Image) -> Tensor:
    if picture.mode in _SIXTEEN_BIT:
        return _grey(_sixteen_bit(picture))
    if picture.mode == "F":
        grey = np.array(picture, dtype=np.float32)
        if not np.isfinite(grey).all():
            raise ValueError("it holds values that are not finite")
        # Floating-point greyscale carries no range of its own; [0, 1] is the convention.
        return _grey(grey.clip(0, 1))
    if picture.has_transparency_data:
        values = _eight_bit(picture, "RGBA")
        flat = values[..., :3] * values[..., 3:] + (1 - values[..., 3:])
    else:
        flat = _eight_bit(picture, "RGB")
    return torch.from_numpy(flat).permute(2, 0, 1).contiguous()


def _sixteen_bit(picture: Image.Image) -> NDArray[np.float32]:
    numbers = np.asarray(picture)
    # Mode "I" has 32 bits, and nothing says which number would be white.
    if numbers.min() < 0 or numbers.max() > 65535:
        raise ValueError(f"numbers from {numbers.min()} to {numbers.max()} do not fit into 16 bits")
    values: NDArray[np.float32] = numbers.astype(np.float32) / np.float32(65535)
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        values[numbers == transparent] = 1
    return values


def _eight_bit(picture: Image.Image, mode: str) -> NDArray[np.float32]:
    values: NDArray[np.float32] = np.asarray(picture.convert(mode)).astype(np.float32) / np.float32(255)
    return values


def _grey(values_HW: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(values_HW).expand(3, -1, -1).contiguous()
