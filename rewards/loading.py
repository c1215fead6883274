"""Weights of reward models from files and from folders of transformers: one clear error, no code of others is run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rewardgen import hub
from rewardgen.errors import CheckpointError


def read_tensors(
    what: str, path: str | Path, *, under: str | None = None, plain: Sequence[type] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors by name from a safetensors file, or from a torch file with torch's reader of plain weights.

    The format is told by the content: hub files may have any name. Of a torch file nothing is run; whatever is not
    tensors, containers and plain values is refused. Neither format has a checksum.

    Args:
        what: what the file should be, for messages.
        path: the file.
        under: key of a torch file under which the tensors may lie, if not at its top.
        plain: classes of mere values that a torch file may hold besides.

    Returns:
        The tensors, and the metadata of a safetensors file.

    Raises:
        CheckpointError: the file is missing, damaged or holds code, or no tensors by name.
    """
    path = Path(os.path.expanduser(path))
    if is_safetensors(what, path):
        return _read_safetensors(what, path)
    return _read_torch(what, path, under, plain), {}


def is_safetensors(what: str, path: Path) -> bool:
    """Whether a file is one of safetensors. Raises CheckpointError where it is missing or cannot be read."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{what} {path} {'is no file' if path.exists() else 'does not exist'}")
        with path.open("rb") as file:
            # A safetensors file starts with the length of its JSON header in 8 bytes.
            return file.read(9)[8:] == b"{"
    except OSError as error:
        raise CheckpointError(f"{what} {path} cannot be read: {error.strerror}") from error


def read_shapes(what: str, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As `read_tensors` of a safetensors file, but only the shapes: the tensors lie on the meta device."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a mapping
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{what} {path} is damaged: {error}") from error
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, metadata


def check_tensors(
    what: str, found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], *, counters: Sequence[str] = ()
) -> None:
    """Raise CheckpointError for the first tensor that is missing, unknown, of another shape or not finite.

    Args:
        what: the file, for messages.
        found: what it holds.
        expected: shapes by name.
        counters: those that may be whole numbers.
    """
    for name in sorted(expected.keys() - found.keys()):
        raise CheckpointError(f"{what} lacks the tensor '{name}'")
    for name in sorted(found.keys() - expected.keys()):
        raise CheckpointError(f"{what} holds the unknown tensor {name!r}")
    for name, shape in expected.items():
        if tuple(found[name].shape) != shape:
            raise CheckpointError(f"{what}: '{name}' has shape {tuple(found[name].shape)}; expected {shape}")
    check_values(what, found, counters=counters)


def check_values(what: str, found: Mapping[str, Tensor], *, counters: Sequence[str] = ()) -> None:
    """Raise CheckpointError for a tensor that is no ordinary one of finite floating-point numbers."""
    for name, tensor in found.items():
        ordinary = tensor.device.type == "cpu" and tensor.layout == torch.strided
        right_kind = tensor.is_floating_point() or name in counters
        # A few bytes can be described as a tensor that would fill the memory.
        if not ordinary or not right_kind or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize:
            raise CheckpointError(f"{what}: '{name}' is no ordinary tensor of floating-point numbers")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{what}: '{name}' holds values that are not finite")


def size_of(what: str, tensors: Mapping[str, Tensor], name: str, ndim: int, kind: str = "") -> tuple[int, ...]:
    """The shape of a tensor that tells a size; CheckpointError if it is missing, empty or of other dimensions.

    Args:
        what: the file, for messages.
        tensors: what it holds.
        name: of the tensor.
        ndim: its number of dimensions.
        kind: of model that has such a tensor, asked about where it is missing ("an IResNet").
    """
    if name not in tensors:
        raise CheckpointError(f"{what} lacks the tensor '{name}'" + (f"; is it {kind}?" if kind else ""))
    if tensors[name].ndim != ndim:
        raise CheckpointError(f"{what}: '{name}' should have {ndim} dimensions")
    if not tensors[name].numel():
        raise CheckpointError(f"{what}: '{name}' is empty")
    return tuple(tensors[name].shape)


def without_prefix(what: str, tensors: Mapping[str, Tensor], prefix: str = "module.") -> dict[str, Tensor]:
    """Names without what a wrapper put before them. Raises CheckpointError where one tensor is there both ways."""
    named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if len(named) < len(tensors):
        raise CheckpointError(f"{what} holds tensors twice, with and without '{prefix}'")
    return named


def load_pretrained(kind: Any, source: str, **options: Any) -> Any:
    """`kind.from_pretrained` of a folder or a hub repository; code that lies in it is not run.

    Raises:
        CheckpointError: the folder is missing, or the library cannot make a `kind` of it; with its first line.
    """
    place = os.path.expanduser(source)
    there = os.path.exists(place)
    if not there and source.startswith(("./", "../", "/", "~")):
        raise CheckpointError(f"{place} does not exist; a {kind.__name__} was to be read from it")
    if kind.__name__.startswith("Auto"):
        options["trust_remote_code"] = False  # unsaid, it asks whoever sits at the terminal
    try:
        # An existing folder comes before a hub repository of that name.
        return kind.from_pretrained(place if there else source, **options)
    except Exception as error:  # of JSON, of tensors, of pickles, of the network: there is no common one
        reason = _why(error) or f": {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        advice = "" if there else hub.remedy(source, error)
        raise CheckpointError(
            f"{source}: cannot load a {kind.__name__} from it{reason}{advice and '; ' + advice}"
        ) from error


def load_model(kind: Any, source: str, **options: Any) -> Any:
    """A transformers model in float32 and evaluation mode. Safetensors are preferred; a `.bin` is read as weights only.

    Raises:
        CheckpointError: as `load_pretrained`, or a tensor is missing or not finite.
    """
    options = {"dtype": torch.float32, "weights_only": True, **options}
    with _quietly():
        model, info = load_pretrained(kind, source, output_loading_info=True, **options)
    return _whole(model, info, source)


def model_from(kind: Any, config: Any, tensors: Mapping[str, Tensor], what: str, **options: Any) -> Any:
    """A transformers model in float32 and evaluation mode, of exactly these tensors by its own names.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape or not finite.
    """
    check_values(what, tensors)
    options = {"dtype": torch.float32, "output_loading_info": True, **options}
    try:
        with _quietly():
            model, info = kind.from_pretrained(None, config=config, state_dict=dict(tensors), **options)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{what} does not fit a {kind.__name__} ({str(error).strip().splitlines()[0]})"
        ) from error
    if unknown := sorted(info["unexpected_keys"]):
        raise CheckpointError(f"{what} holds the unknown tensor '{unknown[0]}'")
    return _whole(model, info, what)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the library's table of tensors that it has no use for; `_whole` looks at what matters."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _whole(model: Any, info: Mapping[str, Any], what: str) -> Any:
    """The model, if each of its tensors was found and is finite: transformers only warns about random ones."""
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{what} lacks the tensor '{missing[0]}' ({len(missing)} are missing in all)")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"{what}: '{name}' holds values that are not finite")
    return model.eval()


def _read_safetensors(what: str, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{what} {path} is damaged: {error}") from error


def _read_torch(what: str, path: Path, under: str | None, plain: Sequence[type]) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals(list(plain)), path.open("rb") as file:
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle is a program for the reader: it ends in any error there is
        raise CheckpointError(
            f"{what} {path} is neither safetensors nor a torch file of plain weights{_why(error)}"
        ) from error
    nested = isinstance(content, Mapping) and under is not None and under in content
    state = content[under] if nested else content
    named = isinstance(state, Mapping) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        beside = "" if under is None else f", neither at its top nor under '{under}'"
        raise CheckpointError(f"{what} {path} holds no tensors by name{beside}")
    return dict(state)


def _why(error: Exception) -> str:
    """In our words: torch's message advises to switch its protection off."""
    text = str(error)
    if wanted := re.search(r"GLOBAL ([\w.]+)", text):
        return f": it asks for '{wanted[1]}', which could run code; nothing of it was run"
    if "TorchScript" in text:
        return ": it is a TorchScript program"
    if not isinstance(error, RuntimeError) or not text.strip():
        return ""
    return ": " + "".join(character for character in text.strip().splitlines()[0] if character.isprintable())
