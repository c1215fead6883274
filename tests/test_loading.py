"""The released layouts: folders and single files of random weights give one and the same policy; faults are told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from rewardgen.errors import CheckpointError, ConfigError
from rewardgen.policies import official, parts, shapes
from rewardgen.policies.parts import FluxParts, Sources, load_parts
from rewardgen.policies.uso import UsoPolicy
from rewardgen.policy import noise_like_request
from rewardgen.types import Example
from tests.test_uso_policy import EXAMPLES, SIZE, TIMES, make_parts, make_tokenizer, velocities

WIDTHS = (32, 64)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same random parts in both released layouts: `base/` of diffusers, and single files beside it."""
    folder = tmp_path_factory.mktemp("released")
    made = make_parts()
    torch.manual_seed(4)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),  # FLUX.1's shares of a head's width
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=WIDTHS,
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer.save_pretrained(folder / "base" / "transformer", max_shard_size="100KB")
    vae.save_pretrained(folder / "base" / "vae")
    for name in ("text_encoder", "text_encoder_2"):
        getattr(made, name).save_pretrained(folder / "base" / name)
        getattr(made, name).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    for name in ("tokenizer", "tokenizer_2"):
        make_tokenizer().save_pretrained(folder / "base" / name)
    made.siglip.save_pretrained(folder / "siglip")
    save_file(official.export_transformer(transformer), folder / "flux1-dev.safetensors")
    save_file(official.export_vae(vae), folder / "ae.safetensors")
    return folder


def policy_of(parts: FluxParts) -> UsoPolicy:
    return UsoPolicy(parts, None, train=("transformer",), content_long_side=16, max_text_tokens=5)


def test_folders_and_single_files_are_one_policy(released: Path) -> None:
    assert len(list((released / "base" / "transformer").glob("*.safetensors"))) > 1  # shards, as released
    files = Sources(
        transformer=str(released / "flux1-dev.safetensors"),
        vae=str(released / "ae.safetensors"),
        text_encoder=str(released / "text_encoder"),
        text_encoder_2=str(released / "text_encoder_2"),
    )
    ours, theirs = policy_of(load_parts(files)), policy_of(load_parts(str(released / "base")))
    plain = [replace(example, style_refs=()) for example in EXAMPLES]
    latents = noise_like_request(ours, range(len(plain)), SIZE)
    pixels = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        for one, other in zip(*(outputs(policy, plain, latents, pixels) for policy in (ours, theirs)), strict=True):
            # The parameters are equal to the last bit (below); where they lie in memory may move a product's last bit.
            torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


def outputs(policy: UsoPolicy, examples: list[Example], latents: Tensor, pixels: Tensor) -> list[Tensor]:
    """Velocities, a decoded picture and an encoded one."""
    return [
        velocities(policy, examples, latents, TIMES),
        policy.decode(latents, SIZE),
        policy.encode_pixels(pixels),
    ]


def test_names_go_there_and_back(released: Path, tmp_path: Path) -> None:
    """diffusers -> Black Forest Labs' names -> diffusers: every tensor as it was, also in bf16."""
    parts = load_parts(str(released / "base"), encoders=False)
    assert parts.text_encoder is None
    for name, load, export in (
        ("flux1-dev", official.load_transformer, official.export_transformer),
        ("ae", official.load_vae, official.export_vae),
    ):
        model = parts.transformer if name == "flux1-dev" else parts.vae
        stored = load_file(released / f"{name}.safetensors")
        again = load(released / f"{name}.safetensors")
        state = model.state_dict()
        assert state.keys() == again.state_dict().keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in again.state_dict().items())
        exported = export(again)
        assert stored.keys() == exported.keys()
        assert all(torch.equal(stored[key], exported[key]) for key in stored)
        half = load(released / f"{name}.safetensors", dtype=torch.bfloat16)
        assert all(torch.equal(state[key].bfloat16(), tensor) for key, tensor in half.state_dict().items())
        pointers = [tensor.untyped_storage().data_ptr() for tensor in half.state_dict().values()]
        assert len(set(pointers)) == len(pointers)  # no two parameters share memory


def test_whole_policy_from_single_files(released: Path) -> None:
    policy = UsoPolicy.from_pretrained(
        None,
        transformer=str(released / "flux1-dev.safetensors"),
        vae=str(released / "ae.safetensors"),
        text_encoder=str(released / "text_encoder"),
        text_encoder_2=str(released / "text_encoder_2"),
        siglip=str(released / "siglip"),
        train=("lora", "projector"),
        lora_rank=2,
        base_dtype="bf16",
        style_tokens_per_level=2,
        max_text_tokens=5,
        content_long_side=16,
    )
    assert policy.transformer.config.axes_dims_rope == (4, 14, 14)
    assert policy.transformer.x_embedder.weight.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in policy.trainable().values())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        velocity = velocities(policy, EXAMPLES[:3], noise_like_request(policy, range(3), SIZE), TIMES[:3])
    assert bool(velocity.isfinite().all())
    with pytest.raises(ConfigError, match="needs `base`, or else `vae`"):
        UsoPolicy.from_pretrained(None, transformer=str(released / "flux1-dev.safetensors"))


def damaged(released: Path, tmp_path: Path, part: str, change: Any) -> Path:
    """A copy of a pipeline's folder with the weights of one part changed."""
    import shutil

    shutil.copytree(released / "base", tmp_path / "base")
    path = next((tmp_path / "base" / part).glob("*.safetensors"))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return tmp_path / "base"


@pytest.mark.parametrize(
    ("part", "key"), [("vae", "decoder.conv_in.weight"), ("text_encoder_2", "encoder.final_layer_norm.weight")]
)
def test_missing_tensors_are_named(released: Path, tmp_path: Path, part: str, key: str) -> None:
    base = damaged(released, tmp_path, part, lambda tensors: tensors.pop(key))
    with pytest.raises(
        CheckpointError, match=rf"{part}: tensor '.*{key.split('.')[-2]}.*' is missing.*fetch"
    ) as caught:
        load_parts(str(base))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "key"), [("vae", "decoder.conv_in.weight"), ("text_encoder", "final_layer_norm.weight")]
)
def test_wrong_shapes_name_the_tensor(released: Path, tmp_path: Path, part: str, key: str) -> None:
    def widen(tensors: dict[str, Any]) -> None:
        name = next(name for name in tensors if name.endswith(key))
        tensors[name] = torch.zeros(*[size + 1 for size in tensors[name].shape])

    base = damaged(released, tmp_path, part, widen)
    with pytest.raises(CheckpointError, match=part) as caught:
        load_parts(str(base))
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_folders_and_closed_repositories_say_what_to_do() -> None:
    with pytest.raises(CheckpointError, match=r"hf auth login|neither a folder here nor"):
        load_parts("owner/closed")

    class Kind:
        @staticmethod
        def from_pretrained(source: str, **_: Any) -> None:
            raise OSError(f"You are trying to access a gated repo.\nMake sure to have access to it at {source}.\n401")

    with pytest.raises(CheckpointError, match=r"accept its licence at https://huggingface\.co/owner/closed") as caught:
        parts._read(Kind, "owner/closed", "vae")
    assert "hf auth login" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sizes_are_known_without_weights(released: Path, tmp_path: Path) -> None:
    assert shapes.config_of("black-forest-labs/FLUX.1-dev", "transformer")["num_single_layers"] == 38
    assert shapes.config_of(str(released / "base"), "transformer")["num_layers"] == 2
    with pytest.raises(
        CheckpointError, match=r"none of the models whose sizes are known: black-forest-labs/FLUX\.1-dev"
    ):
        shapes.config_of("owner/unknown", "vae")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a config"):
        shapes.config_of(str(tmp_path))
    with torch.device("meta"):
        policy = UsoPolicy.blueprint(
            "black-forest-labs/FLUX.1-dev",
            siglip="google/siglip-so400m-patch14-384",
            projector="owner/name:projector.safetensors",
            base_dtype="bf16",
        )
    assert policy.projector is not None
    assert policy.projector.high_projection.weight.shape == (3072, 1152)
    assert sum(p.numel() for p in policy.trainable().values()) == 239_075_328
    assert sum(p.numel() for p in policy.text_encoder_2.parameters()) == 4_762_310_656
    assert sum(p.numel() for p in policy.siglip.parameters()) == 428_225_600


def test_config_of_a_whole_siglip(tmp_path: Path) -> None:
    whole = {"model_type": "siglip", "vision_config": dict(shapes.SIGLIP_SO400M), "text_config": {"hidden_size": 1}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    projector = shapes.make_projector(shapes.config_of(str(tmp_path)), 2, 8)
    assert (projector.num_tokens, projector.token_dim) == (729, 1152)
