"""The full-size benchmark: its formulas against torch's own counter, and every line of it at toy size."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import flops
import full_scale
import full_scale_models as models
from full_scale_models import TOY

from rewardgen.gradients import differentiate
from rewardgen.measure import OperationCounter
from rewardgen.policies import shapes
from rewardgen.policy import noise_like_request
from rewardgen.rewards.csd import CsdConfig, CsdModel, CsdReward
from rewardgen.types import Example

SIDE = 48
CPU = torch.device("cpu")
AS_COUNTED = {"attention_backward": 2.5}
"""torch counts a flash kernel's backward pass with the scores that it computes again."""


@pytest.mark.parametrize("references", [0, 1])
def test_dit_formula_agrees_with_the_counter(references: int) -> None:
    policy = models.make_policy(TOY, CPU, torch.float32)
    picture = models.Pictures(SIDE, TOY.content_side).example
    example = Example(id="0", prompt=picture.prompt, content_refs=picture.content_refs[:references])
    condition = policy.encode([example])
    latents_BLC = noise_like_request(policy, [0], (SIDE, SIDE))
    tokens = flops.Tokens(
        context=TOY.text_tokens, target=(SIDE // 16) ** 2, references=references * (TOY.content_side // 16) ** 2
    )
    expected = flops.dit(TOY.configs["transformer"], tokens, rank=TOY.rank, **AS_COUNTED)
    velocity = policy.velocity_fn(condition, mode="sample", image_size=(SIDE, SIDE))
    with OperationCounter() as forward:
        out = velocity(latents_BLC, torch.full((1,), 0.5))
    with OperationCounter() as backward:
        differentiate(out.square().sum(), list(policy.trainable().values()))
    assert forward.total == expected.forward
    assert backward.total == expected.backward


def test_vae_formulas_agree_with_the_counter() -> None:
    policy = models.make_policy(TOY, CPU, torch.float32)
    expected = flops.vae(TOY.configs["vae"], (SIDE, 2 * SIDE), **AS_COUNTED)
    with OperationCounter() as encoding:
        clean_BLC = policy.encode_pixels(torch.rand(1, 3, SIDE, 2 * SIDE))
    clean_BLC.requires_grad_()
    with OperationCounter() as forward:
        pixels = policy.decode(clean_BLC, (SIDE, 2 * SIDE))
    with OperationCounter() as backward:
        torch.autograd.grad(pixels.sum(), clean_BLC)
    assert encoding.total == expected["encode"].forward
    assert forward.total == expected["decode"].forward
    assert backward.total == expected["decode"].backward


def test_csd_formula_agrees_with_the_counter() -> None:
    reward = CsdReward(CsdModel(TOY.csd))
    sizes = {name: getattr(TOY.csd, name) for name in CsdConfig.__slots__ if name != "heads"}
    expected = flops.csd(**sizes, pixels=(SIDE, SIDE), **AS_COUNTED)
    pixels = torch.rand(1, 3, SIDE, SIDE, requires_grad=True)
    with OperationCounter() as forward:
        style_BD = reward.embed(pixels)
    with OperationCounter() as backward:
        torch.autograd.grad(style_BD.sum(), pixels)
    assert forward.total == expected.forward
    assert backward.total == expected.backward


def test_a_whole_step_agrees_with_the_counter(tmp_path: Path) -> None:
    """Recomputation stops early where nothing more is needed, so that the sum is an upper bound, and a close one."""
    policy = models.make_policy(TOY, CPU, torch.float32)
    trainer = models.make_trainer(policy, TOY, SIDE, tmp_path)
    trainer.learner._model.precision = trainer.pool.worker.precision = "fp32"  # type: ignore[attr-defined]
    trainer.step(0)
    with OperationCounter() as counted:
        trainer.step(1)
    expected = sum(full_scale.operations(TOY, SIDE)["hardware"].values())
    assert 0.9 * expected < counted.total <= expected


def test_full_size_is_that_of_the_release() -> None:
    """The parameters that the released files have."""
    with torch.device("meta"):
        parts = shapes.make_parts({"transformer": shapes.FLUX, "vae": shapes.FLUX_VAE})
    assert sum(p.numel() for p in parts.transformer.parameters()) == 11_901_408_320
    assert sum(p.numel() for p in parts.vae.parameters()) == 83_819_683


def test_toy_runs_every_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found" / "full_scale.json"
    full_scale.main(["--toy", "--steps", "1", "--output", str(path)])
    result: dict[str, Any] = json.loads(path.read_text())
    table = capsys.readouterr().out
    assert set(result["sizes"]) == {str(side) for side in models.TOY_SIZES}
    for found in result["sizes"].values():
        assert set(found["seconds_by_phase"]) == set(full_scale.PHASES)
        assert all(found["operations"]["model"][name] > 0 for name in full_scale.PHASES[1:-1])
        assert sum(found["seconds_by_phase"].values()) <= found["seconds"][0]
        assert found["gradient"]["finite"]
        assert found["gradient"]["zero"] == 0
        assert found["gradient"]["tensors"] == 2 * 12 + 3 * 6
    assert 0.99 < result["bf16_cosine"] <= 1
    assert all(f"| {name} |" in table for name in (*full_scale.PHASES, "step"))
    assert "mean nothing" in table


def test_without_a_gpu_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "full_scale.json"
    full_scale.main(["--output", str(path)])
    assert "no CUDA device" in capsys.readouterr().out
    assert not path.exists()


def test_a_gradient_that_points_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_scale, "bf16_cosine", lambda *_: 0.2)
    with pytest.raises(SystemExit, match=r"cosine of 0\.2000"):
        full_scale.run(TOY, (SIDE,), 1, CPU)
