"""The options' benchmark: every line at its smallest, ratios alone on a CPU, and options that leave no trace."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import full_scale_models as models
import options

CPU = torch.device("cpu")


def test_toy_runs_every_option_and_tells_ratios_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found" / "options.json"
    arguments = ["--toy", "--rounds", "2", "--attention", "_native_math", "flashh", "--output", str(path)]
    options.main(arguments)
    result, said = json.loads(path.read_text()), capsys.readouterr().out
    (found,) = result["sizes"].values()
    assert set(found) == {"decoder_channels_last", "read ahead (the default)", "attention: _native_math"}
    for of in found.values():
        assert 0 < of["time"]["low"] <= of["time"]["value"] <= of["time"]["high"]
        assert of["rounds"] == 2
        assert "seconds" not in of
    assert "left out: attention: 'flashh' is no back end" in said
    assert "the ratios mean nothing" in said
    assert "| 32 x 32 | decoder_channels_last |" in said
    assert all(line.endswith("|  |  |") for line in said.splitlines() if line.startswith("| 32 x 32"))


def test_without_a_gpu_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "options.json"
    options.main(["--output", str(path)])
    assert "no CUDA device" in capsys.readouterr().out
    assert not path.exists()


def test_an_option_is_really_on_and_leaves_no_trace(tmp_path: Path) -> None:
    policy = models.make_policy(models.TOY, CPU, torch.float32)
    trainer = models.make_trainer(policy, models.TOY, 32, tmp_path)
    trainer.batches.dataset = options.on_disk(tmp_path, 32, 32)
    first, *_ = options.options_of(trainer, policy, [], compile_too=True)
    conv = policy.vae.decoder.conv_in
    assert conv.weight.is_contiguous()
    first.on(0)
    assert policy.decoder_channels_last
    assert not conv.weight.is_contiguous()
    first.off(0)
    assert not policy.decoder_channels_last
    assert conv.weight.is_contiguous()

    ahead = options.reading_ahead(trainer)
    ahead.on(5)
    assert trainer.batches._reading is not None
    ahead.off(5)
    assert trainer.batches._reading is None

    processor = policy.transformer.transformer_blocks[0].attn.processor
    math = options.attention(policy, "_native_math")
    assert processor._attention_backend is None
    math.on(0)
    assert processor._attention_backend == "_native_math"
    math.off(0)
    assert processor._attention_backend is None

    compiled, block = options.compiled(policy), policy.transformer.transformer_blocks[0]
    compiled.on(0)
    assert block._compiled_call_impl is not None
    compiled.off(0)
    assert block._compiled_call_impl is None
