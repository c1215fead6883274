"""The autoencoder, loaded from its original keys, as the policy encodes and decodes with it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from rewardgen.policies import official
from rewardgen.policies.encoders import vae_latents, vae_pixels

from .conftest import FixtureSet

Record = Callable[[str, float], None]


@pytest.fixture(scope="module")
def vae(fixture_set: FixtureSet) -> AutoencoderKL:
    config = fixture_set.config["vae"]
    path = fixture_set.path("vae.safetensors")
    return official.load_vae(path, scaling_factor=config["scale_factor"], shift_factor=config["shift_factor"])


def check(record_error: Record, group: str, ours: Tensor, reference: Tensor, scale: float = 1.0) -> None:
    assert ours.shape == reference.shape
    error = float((ours - reference).abs().max()) / scale
    record_error(group, error)
    assert error <= 1e-4


def test_encode(fixture_set: FixtureSet, record_error: Record, vae: AutoencoderKL) -> None:
    tensors = fixture_set.tensors("vae_io")
    with torch.no_grad():
        posterior = vae.encode(tensors["image"]).latent_dist
        latents = vae_latents(vae, tensors["image"])
    check(record_error, "VAE moments", posterior.parameters, tensors["encoder_moments"])
    check(record_error, "VAE moments", posterior.mean, tensors["posterior_mean"])
    check(record_error, "VAE latents", latents, tensors["latent_from_mean"])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
def test_decode_and_gradient(
    fixture_set: FixtureSet, record_error: Record, vae: AutoencoderKL, checkpointing: bool
) -> None:
    tensors = fixture_set.tensors("vae_io")
    if checkpointing:
        vae.enable_gradient_checkpointing()
    else:
        vae.disable_gradient_checkpointing()
    latents = tensors["latent_from_mean"].clone().requires_grad_()
    decoded = vae_pixels(vae, latents)
    check(record_error, "VAE decoded", decoded.detach(), tensors["decoded"])
    (decoded * tensors["grad_probe"]).sum().backward()
    assert latents.grad is not None
    reference = tensors["grad_latent"]
    check(record_error, "VAE gradient (relative)", latents.grad, reference, float(reference.abs().max()))


def test_decode_of_denoised(fixture_set: FixtureSet, record_error: Record, vae: AutoencoderKL) -> None:
    final = fixture_set.tensors("uso_sampling")["denoise.final_unpacked"]
    with torch.no_grad():
        decoded = vae_pixels(vae, final)
    check(record_error, "VAE decoded", decoded, fixture_set.tensors("vae_io")["decoded_of_denoise_final"])


def test_export_returns_every_tensor(fixture_set: FixtureSet, vae: AutoencoderKL) -> None:
    stored, exported = fixture_set.tensors("vae"), official.export_vae(vae)
    assert stored.keys() == exported.keys()
    assert all(torch.equal(stored[key], exported[key]) for key in stored)
