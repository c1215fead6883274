"""Weight files that are not what they should be: refused by the name of the file and of the tensor, nothing executed.

What is found: a damaged header, a cut file, a tensor that is missing, extra, of another shape, no floating-point
numbers or not finite. What cannot be found in files of others, which carry no checksum, is a changed value that is
still a finite number; the last test of the official files says so. Our own checkpoints carry one.
"""

from __future__ import annotations

import argparse
import collections
import copy
import functools
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from rewardgen.checkpoint import STATE, TENSORS, load_checkpoint, save_checkpoint
from rewardgen.errors import CheckpointError
from rewardgen.policies import official
from rewardgen.rewards.csd import CsdConfig, CsdModel, load_csd, save_csd

SET = Path(__file__).parent.parent / "fixtures" / "dev"
AXES = (8, 8, 8)
TINY = CsdConfig(image_size=16, patch_size=4, width=32, layers=2, heads=2, output_dim=12)


@functools.cache
def base() -> FluxTransformer2DModel:
    return official.load_transformer(SET / "uso_dit.safetensors", axes_dims_rope=AXES)


def load_lora(path: Path) -> None:
    official.load_lora(copy.deepcopy(base()), path)


def load_transformer(path: Path) -> None:
    official.load_transformer(path, axes_dims_rope=AXES)


@pytest.fixture(scope="module")
def csd_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("csd") / "csd.safetensors"
    save_csd(CsdModel(TINY), path)
    return path


# Loader, a whole file, a tensor that tells a size, and one that tells none.
FORMATS: dict[str, tuple[Callable[[Path], Any], str, str, str]] = {
    "transformer": (load_transformer, "uso_dit", "img_in.weight", "double_blocks.1.txt_attn.qkv.bias"),
    "autoencoder": (official.load_vae, "vae", "decoder.conv_in.weight", "decoder.mid.block_1.norm1.bias"),
    "LoRA": (
        load_lora,
        "uso_lora",
        "double_blocks.0.processor.qkv_lora1.down.weight",
        "single_blocks.1.processor.qkv_lora.up.weight",
    ),
    "projector": (
        official.load_projector,
        "uso_projector",
        "feature_embedder.high_projection.weight",
        "feature_embedder.high_layer_norm.bias",
    ),
    "CSD": (load_csd, "csd", "last_layer_style", "backbone.ln_pre.bias"),
}


@pytest.fixture(params=FORMATS)
def case(request: pytest.FixtureRequest, csd_file: Path) -> tuple[Callable[[Path], Any], Path, str, str]:
    load, stem, telling, other = FORMATS[request.param]
    return load, csd_file if stem == "csd" else SET / f"{stem}.safetensors", telling, other


def refused(load: Callable[[Path], Any], path: Path, *parts: str) -> str:
    """The one line that refuses a file."""
    with pytest.raises(CheckpointError) as caught:
        load(path)
    told = str(caught.value)
    for part in (str(path), *parts):
        assert part in told
    assert "\n" not in told
    # torch's own advice would switch the protection off.
    assert "weights_only" not in told
    return told


def metadata_of(path: Path) -> dict[str, str]:
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata: dict[str, str] = header.get("__metadata__", {})
    return metadata


Change = Callable[[dict[str, Tensor], str], None]


def spoil(value: float) -> Change:
    def change(tensors: dict[str, Tensor], key: str) -> None:
        tensors[key] = tensors[key].clone()
        tensors[key].view(-1)[-1] = value

    return change


CHANGES: dict[str, tuple[Change, str]] = {
    "missing": (lambda tensors, key: tensors.__delitem__(key), "missing|lacks"),
    "another shape": (lambda tensors, key: tensors.update({key: tensors[key][..., None].clone()}), "shape|dimensions"),
    "one row less": (lambda tensors, key: tensors.update({key: tensors[key][1:].contiguous()}), ""),
    "empty": (lambda tensors, key: tensors.update({key: tensors[key][:0]}), ""),
    "a single number": (lambda tensors, key: tensors.update({key: torch.tensor(1.0)}), ""),
    "NaN": (spoil(float("nan")), "not finite"),
    "infinite": (spoil(float("-inf")), "not finite"),
    "whole numbers": (lambda tensors, key: tensors.update({key: tensors[key].to(torch.int32)}), "floating-point"),
}  # fmt: skip


@pytest.mark.parametrize("which", ["a tensor that tells a size", "another"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_wrong_tensor_is_named(
    case: tuple[Callable[[Path], Any], Path, str, str], change: str, which: str, tmp_path: Path
) -> None:
    load, whole, telling, other = case
    key = other if which == "another" else telling
    apply, words = CHANGES[change]
    tensors = load_file(whole)
    apply(tensors, key)
    save_file(tensors, tmp_path / "wrong.safetensors", metadata=metadata_of(whole))
    told = refused(load, tmp_path / "wrong.safetensors")
    # With another size at the root, the tensors that no longer fit may be told instead of the one that says it.
    assert key in told or (which != "another" and change in ("one row less",))
    assert any(word in told for word in words.split("|"))


def test_an_extra_tensor_is_named(case: tuple[Callable[[Path], Any], Path, str, str], tmp_path: Path) -> None:
    load, whole, *_ = case
    save_file(
        load_file(whole) | {"double_blocks.99.x": torch.ones(1)}, tmp_path / "extra.safetensors", metadata_of(whole)
    )
    refused(load, tmp_path / "extra.safetensors", "double_blocks.99.x")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_cut_file(case: tuple[Callable[[Path], Any], Path, str, str], share: float, tmp_path: Path) -> None:
    load, whole, *_ = case
    content = whole.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: int(share * len(content))])
    refused(load, tmp_path / "cut.safetensors")


def test_a_file_with_something_after_its_end(
    case: tuple[Callable[[Path], Any], Path, str, str], tmp_path: Path
) -> None:
    load, whole, *_ = case
    (tmp_path / "long.safetensors").write_bytes(whole.read_bytes() + b"\0" * 8)
    refused(load, tmp_path / "long.safetensors")


def header(description: dict[str, Any], content: bytes = b"") -> bytes:
    text = json.dumps(description).encode()
    return struct.pack("<Q", len(text)) + text + content


HEADERS = {
    "of a petabyte": struct.pack("<Q", 2**50) + b"{}",
    "that is no JSON": struct.pack("<Q", 8) + b"{nothing",
    "with an offset beyond the end": header({"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}, bytes(4)),
    "with overlapping tensors": header(
        {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "xy"}, bytes(4)
    ),
    "with a shape that is not its size": header(
        {"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}, bytes(4)
    ),
    "with an unknown type": header({"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "with a negative shape": header({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)),
    "of nothing": header({}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header(case: tuple[Callable[[Path], Any], Path, str, str], name: str, tmp_path: Path) -> None:
    load, *_ = case
    (tmp_path / "header.safetensors").write_bytes(HEADERS[name])
    refused(load, tmp_path / "header.safetensors")


def test_sizes_that_would_fill_the_memory(tmp_path: Path) -> None:
    """4 MB that ask for a transformer of a million channels, and blocks that are numbered into the thousands."""
    tensors = load_file(SET / "uso_dit.safetensors")
    tensors["img_in.weight"] = torch.zeros(10**6, 1)
    save_file(tensors, tmp_path / "wide.safetensors")
    refused(load_transformer, tmp_path / "wide.safetensors")
    tensors = load_file(SET / "uso_dit.safetensors")
    tensors["double_blocks.100000.img_attn.qkv.bias"] = torch.zeros(1)
    save_file(tensors, tmp_path / "deep.safetensors")
    refused(load_transformer, tmp_path / "deep.safetensors", "double_blocks.100000.img_attn.qkv.bias")


def test_a_folder_and_nothing(case: tuple[Callable[[Path], Any], Path, str, str], tmp_path: Path) -> None:
    load, *_ = case
    assert "folder" in refused(load, tmp_path) or "is no file" in refused(load, tmp_path)
    refused(load, tmp_path / "nowhere.safetensors")
    refused(load, tmp_path / f"{'x' * 300}.safetensors")


def test_a_changed_number_is_not_noticed_in_files_of_others(tmp_path: Path) -> None:
    """The formats have no checksum. The manifest keeps the file's SHA-256, with which it can be told afterwards."""
    content = bytearray((SET / "uso_projector.safetensors").read_bytes())
    content[-2] ^= 1  # within the mantissa of the last number
    (tmp_path / "changed.safetensors").write_bytes(bytes(content))
    official.load_projector(tmp_path / "changed.safetensors")


# -- pickles -----------------------------------------------------------------------------------------------------


class Runs:
    """Unpickled by Python's own reader it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


class RunsByEval(Runs):
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"__import__('os').mkdir({str(self.folder)!r})",)


class RunsByBuiltins(Runs):
    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.folder), "w")


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {f"module.{name}": tensor for name, tensor in CsdModel(TINY).state_dict().items()}


def poisoned(kind: type[Runs], where: str, mark: Path) -> Any:
    """A CSD checkpoint as the authors write it, with code in one place."""
    state: Any = collections.OrderedDict(weights())
    content: dict[Any, Any] = {"model_state_dict": state, "iter": 3, "args": argparse.Namespace(lr=0.1)}
    if where == "beside the weights":
        content["optimizer"] = kind(mark)
    elif where == "for a tensor":
        state["module.last_layer_style"] = kind(mark)
    elif where == "within the arguments":
        content["args"].callback = kind(mark)
    else:
        return kind(mark)
    return content


PLACES = ["beside the weights", "for a tensor", "within the arguments", "in place of everything"]
WRITERS: dict[str, Callable[[Any, Path], object]] = {
    "zip": lambda content, path: torch.save(content, path),
    "old torch": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "pickle": lambda content, path: Path(path).write_bytes(pickle.dumps(content, protocol=2)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weights_only.*")
@pytest.mark.parametrize("kind", [Runs, RunsByEval, RunsByBuiltins])
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("writer", WRITERS)
def test_code_in_a_pickle_is_not_run(tmp_path: Path, kind: type[Runs], where: str, writer: str) -> None:
    path, mark = tmp_path / "evil.pth", tmp_path / "broken-in"
    WRITERS[writer](poisoned(kind, where, mark), path)
    told = refused(lambda place: load_csd(place, heads=2), path)
    if writer != "pickle":  # torch's reader stops at the protocol of a bare one
        assert "could run code; nothing of it was run" in told
        assert {Runs: "mkdir", RunsByEval: "eval", RunsByBuiltins: "open"}[kind] in told
    path = path.rename(tmp_path / "evil.safetensors")
    assert "only safetensors files are" in refused(official.read_tensors, path)
    assert not mark.exists()


def test_a_pickle_in_place_of_safetensors(case: tuple[Callable[[Path], Any], Path, str, str], tmp_path: Path) -> None:
    load, *_ = case
    torch.save({"x": Runs(tmp_path / "broken-in")}, tmp_path / "evil.safetensors")
    refused(load, tmp_path / "evil.safetensors", "could run code" if load is load_csd else "can run code")
    assert not (tmp_path / "broken-in").exists()


def test_the_payload_would_have_worked(tmp_path: Path) -> None:
    """Without this the test above would show nothing."""
    for number, kind in enumerate((Runs, RunsByEval, RunsByBuiltins)):
        mark = tmp_path / str(number)
        pickle.loads(pickle.dumps(kind(mark)))
        assert mark.exists()


def test_the_released_checkpoint_is_converted(tmp_path: Path) -> None:
    """As released: a torch file with the weights under 'model_state_dict' and the script's arguments beside them."""
    content = {"model_state_dict": weights(), "iter": 7, "args": argparse.Namespace(lr=0.1, arch="vit"), "best": 0.5}
    torch.save(content, tmp_path / "checkpoint.pth")
    model = load_csd(tmp_path / "checkpoint.pth", heads=2)
    save_csd(model, tmp_path / "csd.safetensors")
    again = load_csd(tmp_path / "csd.safetensors")
    assert again.config == model.config == TINY
    for name, tensor in weights().items():
        assert torch.equal(again.state_dict()[name.removeprefix("module.")], tensor)


def test_tensors_that_are_none(tmp_path: Path) -> None:
    """Each is something that torch's reader of plain weights accepts."""
    name, path = "last_layer_content", tmp_path / "odd.pth"
    shape = (32, 12)
    odd = {
        "sparse": torch.zeros(shape).to_sparse(),
        "without memory": torch.zeros(shape, device="meta"),
        "whole numbers": torch.zeros(shape, dtype=torch.int64),
        "complex": torch.zeros(shape, dtype=torch.complex64),
        "one number for all": torch.ones(1).expand(shape),
        "not finite": torch.full(shape, float("nan")),
    }
    for tensor in odd.values():
        torch.save({"model_state_dict": weights() | {f"module.{name}": tensor}}, path)
        refused(lambda place: load_csd(place, heads=2), path, f"'{name}'")


@pytest.mark.parametrize(
    "state",
    [{1: torch.zeros(1)}, {"x": 3}, {"x": [torch.zeros(1)]}, None, "weights", {}],
    ids=["a number as name", "a number", "a list", "nothing", "a word", "no tensor"],
)
def test_other_things_than_weights(tmp_path: Path, state: Any) -> None:
    torch.save({"model_state_dict": state}, tmp_path / "other.pth")
    refused(load_csd, tmp_path / "other.pth")


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    torch.save(weights() | {"last_layer_style": torch.zeros(32, 12)}, tmp_path / "twice.pth")
    refused(lambda place: load_csd(place, heads=2), tmp_path / "twice.pth", "with and without 'module.'")


@pytest.mark.parametrize("heads", ["1e999", "[[", '{"heads": 1e999}', '{"heads": null}', "[" * 5000])
def test_metadata_that_state_no_heads(tmp_path: Path, csd_file: Path, heads: str) -> None:
    save_file(load_file(csd_file), tmp_path / "odd.safetensors", metadata={"rewardgen.csd": heads})
    refused(load_csd, tmp_path / "odd.safetensors", "states no heads")


@pytest.mark.filterwarnings("ignore:.*TorchScript", "ignore::DeprecationWarning")
def test_a_program_of_torch(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "program.pt"))
    assert "TorchScript" in refused(load_csd, tmp_path / "program.pt")


# -- our own checkpoints -----------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tensors = {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(2)}
    return save_checkpoint(tmp_path, step=3, tensors=tensors, state={"completed_steps": 3})


def test_every_flipped_byte_of_a_checkpoint_is_found(checkpoint: Path) -> None:
    for name in (TENSORS, STATE):
        whole = (checkpoint / name).read_bytes()
        for place in range(0, len(whole), 7):
            damaged = bytearray(whole)
            damaged[place] ^= 0x20
            (checkpoint / name).write_bytes(bytes(damaged))
            if name == TENSORS or not same_json(whole, bytes(damaged)):
                refused(load_checkpoint, checkpoint, name)
        (checkpoint / name).write_bytes(whole)
    load_checkpoint(checkpoint)


def same_json(first: bytes, second: bytes) -> bool:
    """A space between two values may become another sign of the same meaning."""
    try:
        return bool(json.loads(first) == json.loads(second))
    except ValueError:
        return False


@pytest.mark.parametrize("other", ["missing", "extra", "shape", "pickle"])
def test_other_tensors_in_a_checkpoint_are_found(checkpoint: Path, other: str) -> None:
    tensors = load_file(checkpoint / TENSORS)
    changed = {
        "missing": {"a": tensors["a"]},
        "extra": tensors | {"c": torch.ones(1)},
        "shape": tensors | {"a": tensors["a"].view(4, 3)},
    }
    if other == "pickle":
        torch.save({"a": Runs(checkpoint / "broken-in")}, checkpoint / TENSORS)
    else:
        save_file(changed[other], checkpoint / TENSORS)
    refused(load_checkpoint, checkpoint, TENSORS, "damaged")
    assert not (checkpoint / "broken-in").exists()
