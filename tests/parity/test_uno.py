"""The UNO policy against the reference code, on the cases without style pictures, with and without a LoRA."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rewardgen.policies import official
from rewardgen.policies.packing import pack
from rewardgen.policies.parts import FluxParts
from rewardgen.policies.uno import UnoPolicy

from .conftest import FixtureSet, set_of
from .test_uso import OUTPUT_TOLERANCE, Record, condition_of, image_size_of, max_error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = set_of(metafunc.config).config["forward_cases"]
        metafunc.parametrize("case", [name for name, case in cases.items() if not case["styles"]])


@pytest.mark.parametrize("kind", ["lora", "nolora"])
def test_forward(fixture_set: FixtureSet, record_error: Record, kind: str, case: str) -> None:
    config, tensors = fixture_set.config, fixture_set.tensors("uso_forward")
    axes = tuple(config["flux"]["axes_dim"])
    transformer = official.load_transformer(fixture_set.path("uso_dit.safetensors"), axes_dims_rope=axes)
    transformer.pos_embed.theta = config["flux"]["theta"]
    if kind == "lora":
        official.load_lora(transformer, fixture_set.path("uso_lora.safetensors"))
    vae = official.load_vae(fixture_set.path("vae.safetensors"))
    absent = SimpleNamespace(text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None)
    policy = UnoPolicy(FluxParts(transformer=transformer, vae=vae, **vars(absent)), train=())
    latents = pack(tensors[f"{case}.img_latent"])
    velocity = policy.velocity_fn(
        condition_of(tensors, tensors, case, []),
        mode="sample",
        image_size=image_size_of(policy, tensors[f"{case}.img_latent"]),
        guidance_B=tensors[f"{case}.guidance"],
    )
    error = max_error(velocity(latents, tensors[f"{case}.timesteps"]).detach(), tensors[f"{case}.{kind}.output"])
    record_error(f"UNO's DiT output, {kind}", error)
    assert error <= OUTPUT_TOLERANCE
