"""Whatever bytes or values come, loaders answer with a value or with their own error, never with another one.

`REWARDGEN_FUZZ=100 pytest tests/faults/test_fuzz.py` takes a hundred times as many examples, new ones at each start.
"""

# ruff: noqa: E501 - lists of samples

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from rewardgen import strict_yaml
from rewardgen.checkpoint import STATE, TENSORS, load_checkpoint, save_checkpoint
from rewardgen.config import load_experiment, plugins_in
from rewardgen.data.images import ImageError, load_image
from rewardgen.data.jsonl import DatasetError, JsonlDataset
from rewardgen.errors import CheckpointError, ConfigError
from rewardgen.manifest import redact
from rewardgen.policies.official import export_projector, load_projector
from rewardgen.policies.projector import StyleProjector
from rewardgen.rewards.csd import CsdConfig, CsdModel, load_csd
from rewardgen.sources import find_sources, materialise

ROOT = Path(__file__).resolve().parent.parent.parent
TIMES = int(os.environ.get("REWARDGEN_FUZZ", "1"))


def examples(number: int) -> settings:
    """So many examples, the same ones at each start unless a long run was asked for."""
    return settings(
        max_examples=number * TIMES,
        deadline=None,
        derandomize=TIMES == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def clear(error: Exception, start: str | Path = "") -> None:
    """What a message must be: on one line, or a list under a headline, not the whole input, and of what it speaks."""
    told = str(error)
    assert told
    assert told.removeprefix("CSD checkpoint ").startswith(str(start)), told
    assert all(line.isprintable() for line in told.split("\n")), told
    assert len(told) < 20_000


# -- YAML --------------------------------------------------------------------------------------------------------

PIECES = [
    *"\n\n\n   :-?,[]{}#&*!|>'\"%@`~<=\t\0\x85\ufeff\u2028é😀",
    "a", "b: ", "- ", "\n  ", "\n    c: ", "---\n", "...\n", "%YAML 1.1\n", "%TAG ! x\n", "<<: ", "&x ", "*x ", "!!int ",
    "!<tag> ", "|\n ", ">-\n ", "'x'", '"\\x41"', '"\\ud800"', '"\\U00110000"', "null", "true", ".nan", "-.inf", "1e999",
    "0x1f", "1_000", "1:30", "2024-01-01", "{a: 1}", "[1, 2]", "? ", "? a\n: b", "9" * 5000, "[" * 70, "{" * 70, "- " * 70,
]  # fmt: skip


def plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and plain(inner) for key, inner in value.items())
    return all(map(plain, value)) if isinstance(value, list) else type(value) in (str, int, float, bool, type(None))


@examples(300)
@given(st.text(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
def test_yaml_is_values_of_json_or_one_error(text: str) -> None:
    try:
        value, lines = strict_yaml.load(text, "file")
    except ConfigError as error:
        clear(error, "file")
    else:
        assert plain(value)
        assert all(1 <= line <= len(text.splitlines()) + 1 for line in lines.values())


@examples(60)
@given(content=st.binary(max_size=200))
def test_a_file_of_any_bytes(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = file_for(tmp_path_factory, "experiment.yaml", content)
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)
    clear(caught.value)


def file_for(factory: pytest.TempPathFactory, name: str, content: bytes) -> Path:
    """One file that all examples of a test share."""
    path = folder(factory) / name
    path.write_bytes(content)
    return path


def folder(factory: pytest.TempPathFactory) -> Path:
    path = factory.getbasetemp() / "fuzz"
    path.mkdir(exist_ok=True)
    return path


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.from_regex(r"[-+]?[0-9._:eExof]{1,6}", fullmatch=True),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc1e:# ", min_size=1, max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@examples(200)
@given(json_values)
def test_what_is_dumped_loads_to_the_same(value: Any) -> None:
    found, _ = strict_yaml.load(strict_yaml.dump(value), "file")
    assert found == value
    assert repr(found) == repr(value)


# -- experiments -------------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "policy": {"use": "tests.toys:ToyPolicy", "args": {"hidden": 4}},
    "data": {
        "train": {"use": "rewardgen.world.dataset:TinyWorld", "args": {"split": "train", "size": 4}},
        "held_out": {"use": "jsonl", "args": {"path": "rows.jsonl"}},
    },
    "rollout": {"image_size": [8, 8], "num_steps": 4, "window": {"kind": "refl", "entry_range": [1, 3]}},
    "objective": {
        "flow_matching": {"weight": 1.0, "start_step": 0},
        "rewards": {"style": {"use": "csd", "args": {"checkpoint": "world:csd.safetensors"}, "weight": 0.5}},
    },
    "optimizer": {"lr": 1e-3, "betas": [0.9, 0.999], "warmup_steps": 2},
    "train": {"num_steps": 3, "batch_size": 2, "precision": "fp32", "device": "cpu", "ema_decay": 0.9},
    "evaluation": {"num_examples": 4, "grid_examples": 2, "witnesses": {"light": {"use": "brightness"}}},
    "report": {"tensorboard": False, "wandb": {"project": "x", "tags": ["a"]}},
    "flavors": {"tiny": {}, "large": {"train": {"num_steps": 30}}},
}
WORDS = [
    "", " ", "\0", "\n", "\ud800", "x" * 5000, "~nobody/x.json", "~/x", "world:", "world:..", "world:csd.safetensors",
    "world:" + "x" * 5000, "owner/name", "owner/name:file", "a--b/c..d", "a/b.git:c", "./x.py:Y", "x.py:Y", "::", ":x",
    "a:b", "tests.toys:ToyPolicy", "csd", "uso", "jsonl", "-1", "1e3", "null", "style", "use", "args", "../../x", "\x1b[31m",
]  # fmt: skip
NUMBERS = [0, -1, 1, 2**31, 2**63, 10**400, 0.0, -0.5, 1e-320, 1e308, float("nan"), float("inf")]
words = st.sampled_from(WORDS) | st.text(max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)


def paths(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, inner in inside for found in paths(inner, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """The good experiment after one to three changes somewhere within it."""
    tree: Any = copy.deepcopy(GOOD)
    for _ in range(draw(st.integers(1, 3))):
        *parents, key = draw(st.sampled_from([path for path in paths(tree) if path] or [("name",)]))
        node = tree
        for part in parents:
            node = node[part]
        change = draw(st.sampled_from(["delete", "replace", "rename", "move"]))
        if change == "replace" or isinstance(node, list):
            node[key] = draw(values)
        elif change == "delete":
            del node[key]
        elif change == "rename":
            node[draw(words)] = node.pop(key)
        else:
            tree[draw(words)] = node.pop(key)
    return tree


def text_of(tree: Any) -> bytes:
    """JSON, which is YAML; what JSON has no words for is written as YAML does."""
    text = json.dumps(tree).replace("Infinity", ".inf").replace("NaN", ".nan")
    return text.encode("utf-8", "surrogatepass")


@examples(200)
@given(tree=mutated(), flavor=st.none() | st.sampled_from(["tiny", "large", "huge", ""]))
def test_mutated_experiments(tree: Any, flavor: str | None, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = file_for(tmp_path_factory, "experiment.yaml", text_of(tree))
    try:
        experiment = load_experiment(path, flavor)
    except ConfigError as error:
        clear(error)
        return
    # What was taken for good can be written, looked through and read again.
    resolved = experiment.model_dump(mode="json")
    written = strict_yaml.dump(redact(resolved))
    if redact(resolved) == resolved:
        assert load_experiment(file_for(tmp_path_factory, "again.yaml", written.encode())) == experiment
    for where, _, plugin in plugins_in(experiment):
        for source in find_sources(plugin.args, where):
            assert source.kind in ("world", "hub file", "hub repository", "local")


@examples(120)
@given(
    overrides=st.lists(
        st.tuples(st.sampled_from([".".join(map(str, path)) for path in paths(GOOD)]) | words, values | words).map(
            lambda pair: f"{pair[0]}={pair[1] if isinstance(pair[1], str) else json.dumps(pair[1])}"
        ),
        min_size=1,
        max_size=3,
    )
)
def test_any_override(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = file_for(tmp_path_factory, "good.yaml", text_of(GOOD))
    try:
        load_experiment(path, overrides=overrides)
    except ConfigError as error:
        clear(error)


@examples(150)
@given(args=st.dictionaries(words, values, max_size=4) | words)
def test_any_argument_as_a_source(args: Any) -> None:
    found = list(find_sources(args, "x"))
    # What would be fetched is left out: there is no network in a test.
    if not any(source.kind == "hub file" and source.location is None for source in found):
        try:
            materialise(args, "x")
        except ConfigError as error:
            clear(error)


@examples(100)
@given(
    rows=st.lists(
        st.dictionaries(st.sampled_from(["id", "prompt", "content", "style", "target", "extras"]) | words, values, max_size=4)
        .map(json.dumps)
        .map(str.encode)
        | st.binary(max_size=30),
        min_size=1,
        max_size=3,
    )
)  # fmt: skip
def test_any_dataset(rows: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = file_for(tmp_path_factory, "rows.jsonl", b"\n".join(rows))
    try:
        dataset = JsonlDataset(str(path))
        for index in range(len(dataset)):
            assert dataset[index].id
    except DatasetError as error:
        clear(error, path)


# -- bytes -------------------------------------------------------------------------------------------------------


@st.composite
def damaged(draw: st.DrawFn, whole: bytes, *, within: int | None = None) -> bytes:
    """Some bytes changed, inserted or removed, most often near the beginning, where the structure is."""
    content = bytearray(whole)
    end = min(within or len(whole), len(whole)) - 1
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, end))
        change = draw(st.sampled_from(["set", "flip", "insert", "remove", "cut", "repeat"]))
        if change == "set":
            content[place : place + 1] = bytes([draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))])
        elif change == "flip":
            content[place : place + 1] = bytes(byte ^ (1 << draw(st.integers(0, 7))) for byte in content[place:][:1])
        elif change == "insert":
            content[place:place] = draw(st.binary(min_size=1, max_size=6))
        elif change == "remove":
            del content[place : place + draw(st.integers(1, 8))]
        elif change == "cut":
            del content[draw(st.integers(place, len(whole))) :]
        else:
            content[place:place] = content[place : place + 16]
    return bytes(content)


def encoded(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    picture = Image.effect_noise((9, 7), 80).convert(mode)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a camera"
    buffer = io.BytesIO()
    picture.save(
        buffer, kind, **({"exif": exif.tobytes()} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}) | options
    )
    return buffer.getvalue()


PICTURES: dict[str, bytes] = {
    "PNG": encoded("PNG", "RGBA"),
    "palette": encoded("PNG", "P", transparency=b"\0\x80"),
    "JPEG": encoded("JPEG"),
    "CMYK": encoded("JPEG", "CMYK"),
    "GIF": encoded("GIF", "P", save_all=True, append_images=[Image.new("P", (9, 7))]),
    "WEBP": encoded("WEBP"),
    "TIFF": encoded("TIFF", compression="tiff_lzw"),
    "BMP": encoded("BMP"),
    "PPM": encoded("PPM"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", PICTURES)
def test_damaged_pictures(kind: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    # A hundred megapixels are allowed, but take their time; and Pillow's own limit is twice what it is told.
    monkeypatch.setattr("rewardgen.data.images.MAX_PIXELS", 100_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)

    @examples(60)
    @given(content=damaged(PICTURES[kind]))
    def check(content: bytes) -> None:
        path = file_for(tmp_path_factory, "picture", content)
        try:
            pixels = load_image(path)
        except ImageError as error:
            clear(error, path)
        else:
            assert pixels.shape[0] == 3
            assert ((pixels >= 0) & (pixels <= 1)).all()

    check()


@cache
def weights() -> dict[str, bytes]:
    torch.manual_seed(0)
    projector = StyleProjector(num_tokens=4, token_dim=6, tokens_per_level=2, hidden_size=5)
    model = CsdModel(CsdConfig(image_size=8, patch_size=4, width=8, layers=1, heads=2, output_dim=3))
    new, old = io.BytesIO(), io.BytesIO()
    state = {"model_state_dict": model.state_dict(), "iter": 3, "args": {"lr": 0.1}}
    torch.save(state, new)
    torch.save(state, old, _use_new_zipfile_serialization=False)
    return {
        "projector": save(export_projector(projector)),
        "CSD, zip": new.getvalue(),
        "CSD, old torch": old.getvalue(),
        "CSD, pickle": pickle.dumps({"model_state_dict": {"x": [1.0]}}, protocol=2),
        "CSD, safetensors": save(model.state_dict()),
    }


LOADERS: dict[str, Callable[[Path], Any]] = {
    "projector": load_projector,
    "CSD, zip": lambda path: load_csd(path, heads=2),
    "CSD, old torch": lambda path: load_csd(path, heads=2),
    "CSD, pickle": load_csd,
    "CSD, safetensors": lambda path: load_csd(path, heads=2),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", LOADERS)
def test_damaged_weights(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = weights()[kind]

    @examples(120)
    @given(content=damaged(whole) | damaged(whole, within=600))
    def check(content: bytes) -> None:
        path = file_for(tmp_path_factory, "weights", content)
        try:
            LOADERS[kind](path)
        except CheckpointError as error:
            clear(error, path)

    check()


@examples(200)
@given(data=st.data(), kind=st.sampled_from(["projector", "CSD, safetensors"]))
def test_headers_that_say_something_else(
    data: st.DataObject, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Changes to the header as JSON, which bytes alone seldom bring about."""
    whole = weights()[kind]
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(header)))
    types = st.sampled_from(["F16", "BF16", "F8_E4M3", "F8_E5M2", "F4", "I64", "BOOL", "U8", "C64", "F64"])
    numbers = st.lists(st.sampled_from([0, 1, 2, 8, 3, 2**31, 2**62, 2**64, -1]), max_size=4)
    change = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "name", "fold", "metadata"]))
    if change == "name":
        header[data.draw(words.map(lambda word: word.replace("\ud800", "?")))] = header.pop(name)
    elif change == "fold":
        shape = header[name]["shape"]
        header[name]["shape"] = data.draw(st.sampled_from([[1, *shape], [*shape, 1], shape[::-1], [0, *shape]]))
    elif change == "metadata":
        header["__metadata__"] = data.draw(
            st.dictionaries(st.sampled_from(["rewardgen.csd", "format"]), words) | values
        )
    else:
        header[name][change] = data.draw(types if change == "dtype" else numbers)
    text = json.dumps(header).encode()
    path = file_for(tmp_path_factory, "header", struct.pack("<Q", len(text)) + text + whole[8 + length :])
    try:
        LOADERS[kind](path)
    except CheckpointError as error:
        clear(error, path)


@examples(150)
@given(data=st.data(), name=st.sampled_from([STATE, TENSORS]))
def test_damaged_checkpoints(data: st.DataObject, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    tensors = {"a": torch.arange(3.0)}
    whole = save_checkpoint(folder(tmp_path_factory), step=1, tensors=tensors, state={"x": [1.5, None, "word"]})
    content = (whole / name).read_bytes()
    anything = values.map(json.dumps).map(str.encode) | st.just(b"[" * 100_000) | st.just(b'{"a":' * 100_000)
    within = st.sampled_from([b"NaN", b"1e999", b"Infinity", b"null", b"[]", b"9" * 5000]).map(
        lambda word: content.replace(b"1.5", word).replace(b'"step": 1', b'"step": ' + word)
    )
    changed = data.draw(damaged(content) | anything | within)
    (whole / name).write_bytes(changed)
    try:
        found, state = load_checkpoint(whole)
    except CheckpointError as error:
        clear(error, whole)
    else:
        # The same meaning in other bytes: space between values, or the order of keys.
        assert torch.equal(found["a"], tensors["a"])
        assert state == {"x": [1.5, None, "word"]}
        assert name == STATE or changed == content
