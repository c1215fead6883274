"""The style descriptor against the authors' code: values, and gradients in the pictures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rewardgen.rewards.csd import CsdConfig, CsdModel, load_csd


@pytest.fixture(scope="module")
def model(fixture_set) -> CsdModel:
    path = fixture_set.path("csd_checkpoint.safetensors")
    return load_csd(path, heads=fixture_set.config["csd"]["heads"]).requires_grad_(False)


@pytest.fixture(scope="module")
def io(fixture_set) -> dict[str, Tensor]:
    return fixture_set.tensors("csd_io")


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def test_sizes_are_read_off_the_tensors(model, fixture_set):
    sizes = dict(fixture_set.config["csd"])
    assert model.config == CsdConfig(image_size=sizes.pop("input_resolution"), **sizes)


@pytest.mark.parametrize("which", ["", "ref_"])
def test_values(model, io, record_error, which):
    outputs = model(io[f"{which}image"])
    for name, got in zip(("feature", "content", "style"), outputs, strict=True):
        error = float((got - io[f"{which}{name}"]).abs().max())
        record_error(f"csd {name}", error)
        assert error < 1e-4, name


def test_gradient_of_the_cosine_with_a_reference(model, io, record_error):
    image = io["image"].clone().requires_grad_()
    cosine_B = model(image)[2] @ io["ref_style"][0]
    error = float((cosine_B - io["style_cosine"]).detach().abs().max())
    record_error("csd cosine", error)
    assert error < 1e-4
    (grad,) = torch.autograd.grad((io["cosine_weights"] * cosine_B).sum(), image)
    error = relative_error(grad, io["grad_image"])
    record_error("csd gradient (relative)", error)
    assert error < 1e-4


def test_gradient_of_a_cosine_flows_into_both_pictures(model, io, record_error):
    image = io["image"].clone().requires_grad_()
    style = model(image)[2]
    cosine = style[0] @ style[1]
    assert abs(float(cosine.detach() - io["pair01_style_cosine"])) < 1e-4
    (grad,) = torch.autograd.grad(cosine, image)
    error = relative_error(grad, io["grad_image_pair01"])
    record_error("csd pair gradient (relative)", error)
    assert error < 1e-4
