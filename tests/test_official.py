"""Official checkpoint formats: what comes in goes out again, and what does not fit is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from rewardgen.errors import CheckpointError
from rewardgen.policies import official
from rewardgen.policies.layouts import Entry, to_official

SET = Path(__file__).parent / "fixtures" / "dev"
AXES = (8, 8, 8)


@pytest.fixture
def transformer() -> FluxTransformer2DModel:
    return official.load_transformer(SET / "uso_dit.safetensors", axes_dims_rope=AXES)


def test_transformer_goes_out_as_it_came_in(transformer: FluxTransformer2DModel) -> None:
    stored, exported = load_file(SET / "uso_dit.safetensors"), official.export_transformer(transformer)
    assert stored.keys() == exported.keys()
    assert all(torch.equal(stored[key], exported[key]) for key in stored)


def test_lora_round_trip_is_the_same_bytes(transformer: FluxTransformer2DModel, tmp_path: Path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    official.load_lora(transformer, SET / "uso_lora.safetensors")
    official.write_tensors(official.export_lora(transformer), first)
    stored, exported = load_file(SET / "uso_lora.safetensors"), load_file(first)
    assert stored.keys() == exported.keys()
    assert all(torch.equal(stored[key], exported[key]) for key in stored)
    fresh = official.load_transformer(SET / "uso_dit.safetensors", axes_dims_rope=AXES)
    official.load_lora(fresh, first)
    official.write_tensors(official.export_lora(fresh), second)
    assert first.read_bytes() == second.read_bytes()


def test_base_weights_are_reached_through_a_lora(transformer: FluxTransformer2DModel, tmp_path: Path) -> None:
    official.load_lora(transformer, SET / "uso_lora.safetensors")
    stored, exported = load_file(SET / "uso_dit.safetensors"), official.export_transformer(transformer)
    assert all(torch.equal(stored[key], exported[key]) for key in stored)
    again = FluxTransformer2DModel.from_pretrained(official.save_transformer(transformer, tmp_path / "transformer"))
    assert all(torch.equal(stored[key], value) for key, value in official.export_transformer(again).items())


def test_fresh_lora_changes_nothing_and_shares_its_down(transformer: FluxTransformer2DModel) -> None:
    official.add_lora(transformer, 3)
    attn = transformer.transformer_blocks[0].attn
    assert attn.to_q.lora_A is attn.to_k.lora_A is attn.to_v.lora_A
    assert attn.add_q_proj.lora_A is attn.add_k_proj.lora_A is attn.add_v_proj.lora_A
    assert attn.to_q.lora_A is not attn.add_q_proj.lora_A
    x = torch.randn(2, 5, 48)
    assert torch.equal(attn.to_k(x), attn.to_k.base_layer(x))
    torch.nn.init.normal_(attn.to_k.lora_B[official.LORA_ADAPTER].weight)
    down, up = attn.to_q.lora_A[official.LORA_ADAPTER].weight, attn.to_k.lora_B[official.LORA_ADAPTER].weight
    torch.testing.assert_close(attn.to_k(x), attn.to_k.base_layer(x) + x @ down.T @ up.T)  # scale exactly 1


def test_untied_downs_are_not_collapsed(transformer: FluxTransformer2DModel) -> None:
    official.add_lora(transformer, 3)
    attn = transformer.transformer_blocks[0].attn
    attn.to_k.lora_A = torch.nn.ModuleDict({official.LORA_ADAPTER: torch.nn.Linear(48, 3, bias=False)})
    with pytest.raises(CheckpointError, match=r"double_blocks\.0\.processor\.qkv_lora1\.down\.weight"):
        official.export_lora(transformer)


def test_exports_own_their_memory(transformer: FluxTransformer2DModel) -> None:
    official.add_lora(transformer, 3)
    exported = official.export_lora(transformer)
    with torch.no_grad():
        for parameter in official.lora_parameters(transformer).values():
            parameter.fill_(7)
    assert not any(bool((tensor == 7).any()) for tensor in exported.values())


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("double_blocks.1.txt_attn.qkv.bias", "drop", "is missing"),
        ("double_blocks.0.extra", "add", "unexpected tensor"),
        ("single_blocks.2.linear2.weight", "shape", r"\(48, 239\).*needs \(48, 240\)"),
    ],
)
def test_faults_name_tensor_and_file(key: str, change: str, message: str, tmp_path: Path) -> None:
    tensors, path = load_file(SET / "uso_dit.safetensors"), tmp_path / "damaged.safetensors"
    if change == "drop":
        del tensors[key]
    elif change == "add":
        tensors[key] = torch.zeros(1)
    else:
        tensors[key] = tensors[key][:, 1:].contiguous()
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        official.load_transformer(path, axes_dims_rope=AXES)
    assert key in str(caught.value)
    assert "damaged.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path, transformer: FluxTransformer2DModel) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        official.load_vae(tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text("not tensors")
    with pytest.raises(CheckpointError, match=r"text\.safetensors"):
        official.load_projector(tmp_path / "text.safetensors")
    with pytest.raises(CheckpointError, match="owner/repository:path"):
        official.resolve_file("nowhere.safetensors")
    with pytest.raises(CheckpointError, match=r"qkv_lora1\.down\.weight.*missing"):
        official.load_lora(transformer, SET / "uso_projector.safetensors")
    with pytest.raises(CheckpointError, match="rank 4, but rank 8"):
        official.load_lora(transformer, SET / "uso_lora.safetensors", rank=8)


def test_halves_are_swapped_back() -> None:
    entry = Entry("scale_shift", ("norm",), swap_halves=True)
    assert to_official([entry], {"norm": torch.arange(4.0)})["scale_shift"].tolist() == [2, 3, 0, 1]


def test_another_mlp_width_is_read_from_the_tensors(tmp_path: Path) -> None:
    tensors = load_file(SET / "uso_dit.safetensors")
    for index in range(2):
        for stream in ("img", "txt"):
            block = f"double_blocks.{index}.{stream}_mlp"
            tensors[f"{block}.0.weight"], tensors[f"{block}.0.bias"] = torch.randn(72, 48), torch.randn(72)
            tensors[f"{block}.2.weight"] = torch.randn(48, 72)
    for index in range(3):
        block = f"single_blocks.{index}"
        tensors[f"{block}.linear1.weight"], tensors[f"{block}.linear1.bias"] = torch.randn(216, 48), torch.randn(216)
        tensors[f"{block}.linear2.weight"] = torch.randn(48, 120)
    save_file(tensors, tmp_path / "narrow.safetensors")
    model = official.load_transformer(tmp_path / "narrow.safetensors", axes_dims_rope=AXES)
    exported = official.export_transformer(model)
    assert all(torch.equal(tensors[key], exported[key]) for key in tensors)
