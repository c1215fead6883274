"""Encodings on disk: identical with and without them, whole or absent, and never another encoder's."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rewardgen import sources
from rewardgen.config import load_experiment
from rewardgen.errors import CheckpointError
from rewardgen.policies.conditions import UsoCondition
from rewardgen.policies.encodings import EncodingStore, content_hash, fingerprint
from rewardgen.policies.uso import UsoPolicy
from rewardgen.types import Example
from tests.test_uso_policy import EXAMPLES, SIZE, make_policy, make_tokenizer, picture

EXPERIMENTS = sorted((Path(__file__).resolve().parent.parent / "experiments").glob("*.yaml"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy in the released layout: a pipeline's folder and SigLIP beside it."""
    folder, policy = tmp_path_factory.mktemp("saved"), make_policy("projector")
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        if name != "transformer":
            getattr(policy, name).save_pretrained(folder / "base" / name)
    from rewardgen.policies import official

    official.save_transformer(policy.transformer, folder / "base" / "transformer")
    policy.siglip.save_pretrained(folder / "siglip")
    for name in ("tokenizer", "tokenizer_2"):
        make_tokenizer().save_pretrained(folder / "base" / name)
    policy.save(folder)
    return folder


def load(saved: Path, **options: Any) -> UsoPolicy:
    given = {"content_long_side": 16, "max_text_tokens": 5, "train": ("lora",), "lora_rank": 2, **options}
    return UsoPolicy.from_pretrained(
        str(saved / "base"), siglip=str(saved / "siglip"), projector=str(saved / "projector.safetensors"), **given
    )


def tensors(condition: UsoCondition) -> list[Tensor]:
    references = [reference for references in condition.references_B for reference in references]
    styles = [style for styles in condition.styles_B for style in styles]
    return [
        *condition.text_B,
        *condition.pooled_B,
        *styles,
        *(reference.tokens_NP for reference in references),
        *(torch.tensor(reference.grid) for reference in references),
    ]


def test_stored_encodings_are_the_same_and_need_no_encoders(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target = picture(9, *SIZE)[None]
    plain = load(saved)
    expected, clean = tensors(plain.encode(EXAMPLES)), plain.encode_pixels(target)
    first = load(saved, encodings=str(tmp_path / "kept"))
    assert first.siglip is None
    assert first.text_encoder is None
    made = tensors(first.encode(EXAMPLES))
    assert "rewardgen encode" in caplog.text
    assert first.encoder.parts.siglip is not None
    first.release_encoders()
    assert first.encoder.parts.siglip is None
    assert first.encoder.parts.text_encoder_2 is None
    stored_target = first.encode_pixels(target)

    second = load(saved, encodings=str(tmp_path / "kept"))
    monkeypatch.setattr(second.vae, "encode", None)
    for loader in ("_load_text", "_load_siglip"):
        monkeypatch.setattr(second.encoder, loader, lambda: pytest.fail("an encoder was loaded"))
    found = tensors(second.encode([replace(example, id="again") for example in EXAMPLES]))
    for one, other, again in zip(expected, made, found, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, again)
        assert one.dtype == again.dtype
    assert torch.equal(clean, stored_target)
    assert torch.equal(clean, second.encode_pixels(target))


def test_another_encoder_or_setting_finds_nothing(saved: Path, tmp_path: Path) -> None:
    load(saved, encodings=str(tmp_path / "kept")).encode(EXAMPLES[:3])
    number = len(list((tmp_path / "kept").rglob("*.safetensors")))
    assert number == 3 + 2 + 1  # prompts, style pictures, content pictures
    load(saved, encodings=str(tmp_path / "kept"), max_text_tokens=6).encode(EXAMPLES[:1])
    assert len(list((tmp_path / "kept" / "text").rglob("*.safetensors"))) == 3 + 1
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    # The same weights elsewhere are the same encoder; one changed bit is another.
    load(copy, encodings=str(tmp_path / "kept")).encode(EXAMPLES[:3])
    assert len(list((tmp_path / "kept").rglob("*.safetensors"))) == number + 1
    weights = copy / "siglip" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    load(copy, encodings=str(tmp_path / "kept")).encode(EXAMPLES[:3])
    assert len(list((tmp_path / "kept" / "style").rglob("*.safetensors"))) == 2 + 2
    assert len(list((tmp_path / "kept" / "text").rglob("*.safetensors"))) == 3 + 1


def test_damaged_files_are_made_again_and_no_half_ones_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = EncodingStore(tmp_path / "kept", {"text": "a"})
    assert store.read("text", "key") is None
    entry = (torch.rand(2, 3), torch.arange(4))
    store.write("text", "key", entry)
    path = store.path("text", "key")
    assert all(map(torch.equal, entry, store.read("text", "key") or ()))
    assert EncodingStore(tmp_path / "kept", {"text": "b"}).read("text", "key") is None
    path.write_bytes(path.read_bytes()[:-3])
    assert store.read("text", "key") is None
    store.write("text", "key", entry)
    assert all(map(torch.equal, entry, store.read("text", "key") or ()))

    def fail(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        store.write("text", "other", entry)
    assert [found.name for found in (tmp_path / "kept").rglob("*") if found.is_file()] == [path.name]


def test_digests_follow_changes_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(1)
    first = content_hash(image)
    monkeypatch.setattr(Tensor, "numpy", None)
    assert content_hash(image) == first  # remembered: nothing was read
    monkeypatch.undo()
    image[0, 0, 0] += 1
    assert content_hash(image) != first
    image[0, 0, 0] = picture(1)[0, 0, 0]
    assert content_hash(image) == first == content_hash(picture(1))
    with torch.inference_mode():
        free = picture(1)
        free[0] = 0
        assert content_hash(free) != first


def test_fingerprints_see_files_and_values(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "weights").write_bytes(bytes(5_000_000))
    before = fingerprint("fp32", tmp_path / "a")
    assert before == fingerprint("fp32", tmp_path / "a") != fingerprint("bf16", tmp_path / "a")
    with (tmp_path / "a" / "weights").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"1")
    assert fingerprint("fp32", tmp_path / "a") != before


def test_the_folder_is_no_source() -> None:
    args = {"encodings": "encodings/uso", "lora": "owner/name:file.safetensors"}
    assert [source.text for source in sources.find_sources(args, "policy.args")] == ["owner/name:file.safetensors"]
    assert sources.materialise(args, "policy.args", fetch=False) == args


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_full_scale_flavor_keeps_its_encoders_on_disk(path: Path) -> None:
    """T5-XXL alone has 9.5 GB beside a DiT of 24 GB."""
    assert load_experiment(path, "flux-dev").policy.args["encodings"]


def test_a_prompt_nobody_encoded_is_named() -> None:
    policy = make_policy("lora")
    policy.encoder.parts = replace(policy.encoder.parts, text_encoder=None)
    policy.encoder.remember_text("a cat", torch.zeros(5, 8), torch.zeros(10))
    policy.encode([Example(id="known", prompt="a cat")])
    with pytest.raises(Exception, match=r"'a dog' was not encoded ahead"):
        policy.encode([Example(id="unknown", prompt="a dog")])
