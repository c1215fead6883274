"""Schedules, packing, position ids, preprocessing and noise against the reference code."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from PIL import Image
from torch import Tensor

from rewardgen.flow.schedule import official_sigmas, official_token_count, token_count_sigmas
from rewardgen.policies.packing import image_ids, pack, preprocess_reference, unpack

from .conftest import FixtureSet, set_of

Record = Callable[[str, float], None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    golden = set_of(metafunc.config)
    numbers = golden.json("uso_sampling")
    for name in ("get_schedule", "pipeline_schedule", "preprocess_ref_sizes"):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, numbers[name], ids=lambda entry: "-".join(map(str, list(entry.values())[:3])))
    if "prepared" in metafunc.fixturenames:
        modes = {match[1] for key in golden.tensors("uso_sampling") if (match := re.match(r"prepare\.(\w+)\.", key))}
        metafunc.parametrize("prepared", sorted(modes))


def max_error(ours: Tensor, reference: Tensor) -> float:
    assert ours.shape == reference.shape
    return float((ours - reference).abs().max())


def test_token_count_schedule(record_error: Record, get_schedule: dict) -> None:
    options = {key: get_schedule[key] for key in ("base_shift", "max_shift", "shift") if key in get_schedule}
    sigmas = token_count_sigmas(get_schedule["num_steps"], get_schedule["image_seq_len"], **options)
    error = max_error(sigmas, torch.tensor(get_schedule["timesteps"]))
    record_error("schedule", error)
    assert error <= 1e-6


def test_pipeline_schedule(record_error: Record, pipeline_schedule: dict) -> None:
    image_size = (pipeline_schedule["height"], pipeline_schedule["width"])
    assert official_token_count(image_size) == pipeline_schedule["image_seq_len"]
    sigmas = official_sigmas(pipeline_schedule["num_steps"], image_size)
    error = max_error(sigmas, torch.tensor(pipeline_schedule["timesteps"]))
    record_error("schedule of the pipeline", error)
    assert error <= 1e-6


def test_preprocess_sizes(preprocess_ref_sizes: dict) -> None:
    entry = preprocess_ref_sizes
    result = preprocess_reference(Image.new("RGB", (entry["width"], entry["height"])), entry["long_size"], 16)
    assert result.size == (entry["out_width"], entry["out_height"])


def test_preprocess_pixels(fixture_set: FixtureSet, record_error: Record) -> None:
    tensors = fixture_set.tensors("uso_sampling")
    cases = [key for key in tensors if re.fullmatch(r"preprocess_ref\.long\d+_output_hwc_u8", key)]
    assert cases
    image = Image.fromarray(tensors["preprocess_ref.input_hwc_u8"].numpy())
    for key in cases:
        long_side = int(key.split(".long")[1].split("_")[0])
        result = torch.frombuffer(bytearray(preprocess_reference(image, long_side, 16).tobytes()), dtype=torch.uint8)
        error = max_error(result.reshape(tensors[key].shape).int(), tensors[key].int())
        record_error("preprocessing (8-bit levels)", error)
        assert error == 0


def test_packing_and_ids(fixture_set: FixtureSet, record_error: Record, prepared: str) -> None:
    tensors, prefix = fixture_set.tensors("uso_sampling"), f"prepare.{prepared}"
    target = tensors[f"{prefix}.img_latent"]
    count = sum(1 for key in tensors if re.fullmatch(rf"prepare\.{prepared}\.ref\d+\.latent", key))
    references = [tensors[f"{prefix}.ref{index}.latent"] for index in range(count)]
    grids = [(latent.shape[2] // 2, latent.shape[3] // 2) for latent in (target, *references)]
    ids = image_ids(grids[0], grids[1:], prepared)
    names = ["img_ids", *(f"ref{index}.ids" for index in range(count))]
    for ours, name in zip(ids, names, strict=True):
        error = max_error(ours.expand_as(tensors[f"{prefix}.{name}"]), tensors[f"{prefix}.{name}"])
        record_error("position ids", error)
        assert error == 0
    packed_names = ["img", *(f"ref{index}.img" for index in range(count))]
    for latent, name, grid in zip((target, *references), packed_names, grids, strict=True):
        error = max_error(pack(latent), tensors[f"{prefix}.{name}"])
        record_error("packing", error)
        assert error == 0
        assert torch.equal(unpack(pack(latent), grid), latent)


def test_forward_cases_share_ids(fixture_set: FixtureSet) -> None:
    """The ids that the DiT cases were run with are the ones made here."""
    tensors = fixture_set.tensors("uso_forward")
    for name, case in fixture_set.config["forward_cases"].items():
        latents = [tensors[f"{name}.img_latent"], *(tensors[f"{name}.ref{i}.latent"] for i in range(case["refs"]))]
        grids = [(latent.shape[2] // 2, latent.shape[3] // 2) for latent in latents]
        keys = [f"{name}.img_ids", *(f"{name}.ref{i}.ids" for i in range(case["refs"]))]
        for ids, key in zip(image_ids(grids[0], grids[1:]), keys, strict=True):
            assert torch.equal(ids.expand_as(tensors[key]), tensors[key])


def test_noise(fixture_set: FixtureSet, record_error: Record) -> None:
    """The reference draws its noise unpacked, for an autoencoder of factor 8 with 16 channels."""
    settings = fixture_set.json("uso_sampling")["get_noise"]
    rows, columns = (2 * -(-settings[side] // 16) for side in ("height", "width"))
    generator = torch.Generator(settings["device"]).manual_seed(settings["seed"])
    noise = torch.randn(settings["num_samples"], 16, rows, columns, generator=generator)
    error = max_error(noise, fixture_set.tensors("uso_sampling")["get_noise.float32"])
    record_error("noise", error)
    assert error == 0
