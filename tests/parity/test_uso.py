"""The USO policy's own forward path against the reference code: DiT, LoRA, projector, gradients, denoising."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from rewardgen.flow.sampling import sample
from rewardgen.flow.schedule import official_sigmas
from rewardgen.policies import official
from rewardgen.policies.conditions import Reference, UsoCondition
from rewardgen.policies.flux import FluxPolicy
from rewardgen.policies.packing import pack, unpack
from rewardgen.policies.parts import FluxParts
from rewardgen.policies.projector import StyleProjector, select_levels
from rewardgen.policies.uso import UsoPolicy

from .conftest import FixtureSet, set_of

OUTPUT_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-4
Record = Callable[[str, float], None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", list(set_of(metafunc.config).config["forward_cases"]))


def max_error(ours: Tensor, reference: Tensor) -> float:
    assert ours.shape == reference.shape
    return float((ours - reference).abs().max())


def relative_error(ours: Tensor, reference: Tensor) -> float:
    return max_error(ours, reference) / float(reference.abs().max())


@pytest.fixture(scope="module", params=[True, False], ids=["lora", "nolora"])
def lora(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def make_policy(fixture_set: FixtureSet, *, with_lora: bool) -> UsoPolicy:
    config = fixture_set.config
    axes = tuple(config["flux"]["axes_dim"])
    transformer = official.load_transformer(fixture_set.path("uso_dit.safetensors"), axes_dims_rope=axes)
    transformer.pos_embed.theta = config["flux"]["theta"]
    if with_lora:
        official.load_lora(transformer, fixture_set.path("uso_lora.safetensors"))
    vae = official.load_vae(
        fixture_set.path("vae.safetensors"),
        scaling_factor=config["vae"]["scale_factor"],
        shift_factor=config["vae"]["shift_factor"],
    )
    # The set gives text states and SigLIP states as numbers: these encoders are never asked.
    absent = SimpleNamespace(text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None)
    return UsoPolicy(
        FluxParts(transformer=transformer, vae=vae, **vars(absent)),
        official.load_projector(fixture_set.path("uso_projector.safetensors")),
        train=("lora", "projector") if with_lora else ("projector",),
    )


@pytest.fixture(scope="module")
def policy(fixture_set: FixtureSet, lora: bool) -> UsoPolicy:
    return make_policy(fixture_set, with_lora=lora)


@pytest.fixture(scope="module")
def policy_with_lora(fixture_set: FixtureSet) -> UsoPolicy:
    return make_policy(fixture_set, with_lora=True)


def condition_of(tensors: dict[str, Tensor], hidden: dict[str, Tensor], name: str, styles: list[int]) -> UsoCondition:
    """The tensors of one case as the policy's condition."""
    batch = tensors[f"{name}.txt"].shape[0]
    latents = [tensors[key] for key in sorted(tensors) if key.startswith(f"{name}.ref") and key.endswith(".latent")]
    levels = [select_levels(hidden[f"siglip.style{style}.hidden_states"]) for style in styles]
    return UsoCondition(
        text_B=tuple(tensors[f"{name}.txt"]),
        pooled_B=tuple(tensors[f"{name}.y"]),
        references_B=tuple(
            tuple(
                Reference(tokens_NP=pack(latent)[index], grid=(latent.shape[2] // 2, latent.shape[3] // 2))
                for latent in latents
            )
            for index in range(batch)
        ),
        styles_B=tuple(tuple(level[index] for level in levels) for index in range(batch)),
    )


def image_size_of(policy: FluxPolicy, latent: Tensor) -> tuple[int, int]:
    return latent.shape[2] * policy.vae_factor, latent.shape[3] * policy.vae_factor


def official_gradients(policy: UsoPolicy) -> dict[str, Tensor]:
    """Gradients of what is trained, under the official keys: the export itself, run on gradients."""
    gradients: dict[str, Tensor] = {}
    transformer, projector = policy.transformer, policy.projector
    assert isinstance(projector, StyleProjector)
    for module, export in ((transformer, official.export_lora), (projector, official.export_projector)):
        saved = {name: parameter.data for name, parameter in module.named_parameters() if parameter.grad is not None}
        if not saved or (module is transformer and not official.has_lora(transformer)):
            continue
        parameters = dict(module.named_parameters())
        try:
            for name in saved:
                parameters[name].data = parameters[name].grad
            gradients |= export(module)
        finally:
            for name, data in saved.items():
                parameters[name].data = data
    return gradients


def check_gradients(
    policy: UsoPolicy, tensors: dict[str, Tensor], prefix: str, group: str, record_error: Record
) -> list[str]:
    gradients = official_gradients(policy)
    names = [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]
    for name in names:
        error = relative_error(gradients[name], tensors[prefix + name])
        record_error(f"{group} {'projector' if name.startswith('feature_embedder') else 'LoRA'} (relative)", error)
        assert error <= GRADIENT_TOLERANCE, name
    return names


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
def test_forward_and_gradients(
    fixture_set: FixtureSet, record_error: Record, policy: UsoPolicy, lora: bool, case: str, checkpointing: bool
) -> None:
    tensors, styles = fixture_set.tensors("uso_forward"), fixture_set.config["forward_cases"][case]["styles"]
    kind = "lora" if lora else "nolora"
    latents = pack(tensors[f"{case}.img_latent"]).requires_grad_()
    policy.enable_checkpointing(checkpointing)
    policy.zero_grad(set_to_none=True)
    velocity = policy.velocity_fn(
        condition_of(tensors, tensors, case, styles),
        mode="sample",
        image_size=image_size_of(policy, tensors[f"{case}.img_latent"]),
        guidance_B=tensors[f"{case}.guidance"],
    )
    output = velocity(latents, tensors[f"{case}.timesteps"])
    error = max_error(output.detach(), tensors[f"{case}.{kind}.output"])
    record_error(f"DiT output, {kind}", error)
    assert error <= OUTPUT_TOLERANCE

    (output * tensors[f"{case}.grad_probe"]).sum().backward()
    assert latents.grad is not None
    error = relative_error(latents.grad, tensors[f"{case}.{kind}.grad_img"])
    record_error(f"DiT gradient, latents, {kind} (relative)", error)
    assert error <= GRADIENT_TOLERANCE
    names = check_gradients(policy, tensors, f"{case}.{kind}.grad.", "DiT gradient,", record_error)
    if lora:
        assert set(fixture_set.config["grad_lora"]) <= set(names)
        assert not styles or any(name.startswith("feature_embedder.") for name in names)


def test_style_tokens(fixture_set: FixtureSet, record_error: Record, policy_with_lora: UsoPolicy) -> None:
    tensors = fixture_set.tensors("uso_forward")
    styles = sorted({style for case in fixture_set.config["forward_cases"].values() for style in case["styles"]})
    assert styles
    for style in styles:
        projector = policy_with_lora.projector
        assert projector is not None
        tokens = projector(select_levels(tensors[f"siglip.style{style}.hidden_states"]))
        error = max_error(tokens.detach(), tensors[f"siglip.style{style}.tokens"])
        record_error("style projector", error)
        assert error <= OUTPUT_TOLERANCE


def test_denoise(fixture_set: FixtureSet, record_error: Record, policy_with_lora: UsoPolicy) -> None:
    tensors, settings = fixture_set.tensors("uso_sampling"), fixture_set.json("uso_sampling")["denoise"]
    assert settings["lora"]
    hidden = fixture_set.tensors("uso_forward")
    hidden = {key: value[:, :1] for key, value in hidden.items() if key.endswith("hidden_states")}
    policy, noise = policy_with_lora, tensors["denoise.noise_latent"]
    policy.sample_guidance = settings["guidance"]
    policy.zero_grad(set_to_none=True)
    velocity = policy.velocity_fn(
        condition_of(tensors, hidden, "denoise", settings["styles"]),
        mode="sample",
        image_size=image_size_of(policy, noise),
    )
    sigmas = official_sigmas(settings["num_steps"], (settings["height"], settings["width"]))
    assert max_error(sigmas, torch.tensor(settings["timesteps"])) <= 1e-6

    states = [pack(noise)]
    for step in range(settings["num_steps"]):
        states.append(sample(velocity, states[-1], sigmas, start=step, stop=step + 1, enable_grad=True))
    error = max_error(torch.stack(states).detach(), tensors["denoise.trajectory"])
    record_error("denoise, all states", error)
    assert error <= OUTPUT_TOLERANCE
    assert max_error(states[-1].detach(), tensors["denoise.final"]) <= OUTPUT_TOLERANCE
    grid = (noise.shape[2] // 2, noise.shape[3] // 2)
    assert max_error(unpack(states[-1], grid).detach(), tensors["denoise.final_unpacked"]) <= OUTPUT_TOLERANCE

    (states[-1] * tensors["denoise.grad_probe"]).sum().backward()
    names = check_gradients(policy, tensors, "denoise.grad.", "denoise gradient,", record_error)
    assert set(names) == set(fixture_set.config["grad_lora"])
