"""Pictures as a service takes them."""

from __future__ import annotations

import base64
import hashlib
import io
import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

_KEPT_CHARACTERS = 64 << 20
"""Of encoded pictures, about 25 of 1024x1024 pixels: the references of the questions that are under way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A picture of 8 bits. Equal pixels make equal ones.

    Args:
        code: SHA-256 of its size and pixels.
        levels_HW3: uint8.
    """

    code: str
    levels_HW3: NDArray[np.uint8] = field(compare=False, repr=False)

    @classmethod
    def of(cls, pixels_3HW: Tensor) -> Self:
        """Of pixels in [0, 1] (clamped)."""
        levels_HW3 = _levels(pixels_3HW)
        code = hashlib.sha256(f"{levels_HW3.shape}".encode())
        code.update(levels_HW3.data)
        return cls(code=code.hexdigest(), levels_HW3=levels_HW3)


class DataUrls:
    """Pictures as the PNGs in `data:` URLs. Safe for threads.

    The latest are kept, and one that is asked for by several threads at a time is encoded by the first of them: a
    reference stands in many questions.

    Args:
        max_side: pictures are made smaller until no side is longer; pixels. None leaves them as they are.
        kept_characters: how much of what was encoded is kept.
    """

    def __init__(self, max_side: int | None, *, kept_characters: int = _KEPT_CHARACTERS) -> None:
        self._max_side, self._kept_characters = max_side, kept_characters
        self._lock = threading.Lock()
        self._made: OrderedDict[str, Future[str]] = OrderedDict()
        self._characters = 0

    def __call__(self, picture: Picture) -> str:
        """The picture's URL."""
        with self._lock:
            found = self._made.get(picture.code)
            made: Future[str] = found or self._made.setdefault(picture.code, Future())
            self._made.move_to_end(picture.code)
        if found is not None:
            return found.result()
        try:
            url = _data_url(_shrunk(Image.fromarray(picture.levels_HW3), self._max_side))
        except BaseException as error:
            with self._lock:
                del self._made[picture.code]
            made.set_exception(error)
            raise
        with self._lock:
            made.set_result(url)
            self._characters += len(url)
            self._forget()
        return url

    def _forget(self) -> None:
        """Drop the oldest above the limit. One that is still being encoded counts nothing yet."""
        for code, made in list(self._made.items()):
            if self._characters <= self._kept_characters:
                return
            if made.done():
                del self._made[code]
                self._characters -= len(made.result())


def to_pil(pixels_3HW: Tensor, max_side: int | None = None) -> Image.Image:
    """An 8-bit picture of pixels in [0, 1] (clamped), made smaller until no side is longer than `max_side` pixels."""
    return _shrunk(Image.fromarray(_levels(pixels_3HW)), max_side)


def data_url(pixels_3HW: Tensor, max_side: int | None = None) -> str:
    """A picture as the PNG in a `data:` URL. Equal pixels give equal text."""
    return _data_url(to_pil(pixels_3HW, max_side))


def _levels(pixels_3HW: Tensor) -> NDArray[np.uint8]:
    levels = (pixels_3HW.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    made: NDArray[np.uint8] = levels.permute(1, 2, 0).contiguous().cpu().numpy()
    return made


def _shrunk(picture: Image.Image, max_side: int | None) -> Image.Image:
    if max_side is not None and max(picture.size) > max_side:
        picture.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    return picture


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
