"""What was encoded before: a bounded memory of it, and below that a folder of files that outlives the process."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from rewardgen.errors import CheckpointError

CACHE_BYTES = 1 << 30
SAMPLES, SAMPLE_BYTES = 256, 4096
"""How much of each weight file a fingerprint looks at: so many pieces, evenly spread, of so many bytes."""

_DIGESTS: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Digests of the tensors that are alive, with the version at which each was taken."""


def content_hash(image_3HW: Tensor) -> str:
    """A digest of a picture's values, shape and precision; taken again only after the tensor was changed in place."""
    # Tensors of inference mode do not count their changes.
    version = None if image_3HW.is_inference() else image_3HW._version
    known = _DIGESTS.get(image_3HW)
    if version is not None and known is not None and known[0] == version:
        return str(known[1])
    tensor = image_3HW.detach().to("cpu").contiguous()
    digest = hashlib.blake2b(f"{tuple(tensor.shape)}{tensor.dtype}".encode(), digest_size=16)
    digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    found = digest.hexdigest()
    if version is not None:
        _DIGESTS[image_3HW] = (version, found)
    return found


def fingerprint(*sources: object) -> str:
    """A digest of what encodings depend on: values by their text, folders by names, sizes and samples of their files.

    A changed weight file is noticed by its size or its sampled bytes; a hub id stands for itself.
    """
    digest = hashlib.blake2b(digest_size=16)
    for source in sources:
        digest.update(repr(source if not isinstance(source, Path) else "path").encode())
        if isinstance(source, Path):
            files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
            for file in files:
                digest.update(repr((file.name, file.stat().st_size)).encode())
                _sample(file, digest.update)
    return digest.hexdigest()


def _sample(file: Path, update: Callable[[bytes], None]) -> None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= SAMPLES * SAMPLE_BYTES:
            update(stream.read())
            return
        for index in range(SAMPLES):
            stream.seek(index * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            update(stream.read(SAMPLE_BYTES))


class EncodingStore:
    """Encodings as safetensors files, each under the digest of what was encoded and by what.

    A file appears whole or not at all, so that several processes may share a folder. One that cannot be read counts as
    absent and is written again.

    Args:
        folder: made when the first encoding is written.
        fingerprints: of each kind's encoder and settings; what another encoder made is never found.
    """

    def __init__(self, folder: Path, fingerprints: Mapping[str, str]) -> None:
        self.folder, self._fingerprints = folder, dict(fingerprints)

    def path(self, kind: str, key: str) -> Path:
        """The file of an encoding, there or not."""
        digest = hashlib.blake2b(repr((self._fingerprints[kind], key)).encode(), digest_size=20).hexdigest()
        return self.folder / kind / digest[:2] / f"{digest[2:]}.safetensors"

    def read(self, kind: str, key: str) -> tuple[Tensor, ...] | None:
        """The encoding of (kind, key), None where it is not here."""
        path = self.path(kind, key)
        try:
            tensors = load_file(path)
            return tuple(tensors[str(index)] for index in range(len(tensors)))
        except (OSError, SafetensorError, KeyError):
            return None

    def write(self, kind: str, key: str, entry: tuple[Tensor, ...]) -> None:
        """Keep an encoding. Raises CheckpointError where the folder cannot be written."""
        path = self.path(kind, key)
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({str(index): tensor.contiguous() for index, tensor in enumerate(entry)}, temporary)
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise CheckpointError(f"{path}: the encoding cannot be written: {reason}") from error


class EncodingCache:
    """Tensors by kind and key, at rest on the CPU. The least recently used go once all exceed `max_bytes`.

    One thread may read ahead while another asks.

    Args:
        store: where encodings outlive this cache; None where they do not.
    """

    def __init__(self, max_bytes: int = CACHE_BYTES, store: EncodingStore | None = None) -> None:
        self.max_bytes, self.store = max_bytes, store
        self._entries: OrderedDict[tuple[str, str], tuple[Tensor, ...]] = OrderedDict()
        self._bytes = 0
        self._unasked: dict[tuple[str, str], int] = {}  # bytes of what was read ahead, until somebody asks for it
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, kind: str, key: str, encode: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The entry of (kind, key), made by `encode` where it is neither remembered nor stored."""
        with self._lock:
            self._unasked.pop((kind, key), None)
            if (kind, key) in self._entries:
                self._entries.move_to_end((kind, key))
                return self._entries[kind, key]
        entry = self.store.read(kind, key) if self.store else None
        if entry is None:
            entry = tuple(tensor.detach().to("cpu") for tensor in encode())
            if self.store:
                self.store.write(kind, key, entry)
        with self._lock:
            self._remember((kind, key), entry)
        return entry

    def read_ahead(self, kind: str, key: str) -> None:
        """Remember the entry of (kind, key) if it is stored, for a `get` to come.

        What waits for one takes a quarter of the memory at most: it must not push out what the present step needs.
        """
        with self._lock:
            if (kind, key) in self._entries or 4 * sum(self._unasked.values()) > self.max_bytes:
                return
        entry = self.store.read(kind, key) if self.store else None
        with self._lock:
            if entry is not None and (kind, key) not in self._entries:
                self._unasked[kind, key] = _size(entry)
                self._remember((kind, key), entry)

    def _remember(self, place: tuple[str, str], entry: tuple[Tensor, ...]) -> None:
        if place in self._entries:  # the other thread was quicker
            return
        self._entries[place] = entry
        self._bytes += _size(entry)
        while self._bytes > self.max_bytes:
            oldest, gone = self._entries.popitem(last=False)
            self._unasked.pop(oldest, None)
            self._bytes -= _size(gone)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._unasked.clear()
            self._bytes = 0


def _size(entry: tuple[Tensor, ...]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in entry)
