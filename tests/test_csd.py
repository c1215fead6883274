"""Reading and writing CSD checkpoints, and the style reward."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rewardgen.errors import CheckpointError
from rewardgen.rewards import csd
from rewardgen.rewards.csd import CsdConfig, CsdModel, CsdReward, load_csd, save_csd
from rewardgen.types import Example

TINY = CsdConfig(image_size=16, patch_size=4, width=32, layers=2, heads=2, output_dim=12)


def tiny_model(config: CsdConfig = TINY) -> CsdModel:
    torch.manual_seed(0)
    return CsdModel(config).eval()


def same_weights(a: CsdModel, b: CsdModel) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def prefixed(model: CsdModel) -> dict[str, Tensor]:
    return {f"module.{name}": tensor for name, tensor in model.state_dict().items()}


class TestModel:
    def test_full_size_has_the_parameters_of_clip_vit_l_14(self):
        with torch.device("meta"):
            model = CsdModel(CsdConfig())
        assert sum(p.numel() for p in model.backbone.parameters()) == 303_179_776
        assert model.last_layer_style.shape == (1024, 768)

    def test_descriptors_have_unit_length_and_do_not_depend_on_the_mode(self):
        model = tiny_model().train()
        images = torch.randn(3, 3, 16, 16)
        feature, content, style = model(images)
        assert feature.shape == (3, 32)
        assert torch.allclose(content.norm(dim=-1), torch.ones(3))
        assert torch.allclose(style.norm(dim=-1), torch.ones(3))
        with torch.no_grad():
            assert torch.equal(model.eval()(images)[2], style)

    def test_sizes_that_do_not_divide_are_refused(self):
        with pytest.raises(ValueError, match="multiple"):
            CsdModel(CsdConfig(image_size=15, patch_size=4, width=32, layers=1, heads=2, output_dim=4))


class TestCheckpoints:
    def test_what_is_saved_is_loaded(self, tmp_path):
        model = tiny_model()
        save_csd(model, tmp_path / "csd.safetensors")
        loaded = load_csd(tmp_path / "csd.safetensors")
        assert loaded.config == TINY
        assert same_weights(loaded, model)

    @pytest.mark.parametrize("nested", [True, False])
    def test_the_authors_torch_file(self, tmp_path, nested):
        model = tiny_model()
        state = prefixed(model)
        content = {"model_state_dict": state, "iter": 7, "args": argparse.Namespace(lr=0.1)} if nested else state
        torch.save(content, tmp_path / "checkpoint.pth")
        loaded = load_csd(str(tmp_path / "checkpoint.pth"), heads=2)
        assert loaded.config == TINY
        assert same_weights(loaded, model)

    def test_the_format_is_told_by_content_and_half_precision_becomes_float32(self, tmp_path):
        model = tiny_model()
        save_file({name: tensor.half() for name, tensor in prefixed(model).items()}, tmp_path / "blob")
        loaded = load_csd(tmp_path / "blob", heads=2)
        assert all(p.dtype == torch.float32 for p in loaded.parameters())
        assert torch.allclose(loaded.last_layer_style, model.last_layer_style, atol=1e-3)

    def test_code_in_a_torch_file_is_refused_and_not_run(self, tmp_path):
        class Payload:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "broken-in"),)

        torch.save({"model_state_dict": prefixed(tiny_model()), "args": Payload()}, tmp_path / "evil.pth")
        with pytest.raises(CheckpointError, match=r"evil\.pth"):
            load_csd(tmp_path / "evil.pth", heads=2)
        assert not (tmp_path / "broken-in").exists()

    @pytest.mark.parametrize("content", [{"model_state_dict": [1, 2]}, {"epoch": 3}, [torch.zeros(1)]])
    def test_a_torch_file_without_named_tensors(self, tmp_path, content):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match="no tensors by name"):
            load_csd(tmp_path / "other.pth")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s.pop("last_layer_style"), "lacks the tensor 'last_layer_style'"),
            (lambda s: s.pop("backbone.ln_pre.bias"), r"lacks the tensor 'backbone\.ln_pre\.bias'"),
            (lambda s: s.update({"backbone.proj": torch.zeros(2)}), r"unknown tensor 'backbone\.proj'"),
            (
                lambda s: s.update({"last_layer_content": torch.zeros(32, 5)}),
                r"'last_layer_content' has shape \(32, 5\)",
            ),
            (lambda s: s.update({"last_layer_style": torch.zeros(32)}), "'last_layer_style' should have 2 dimensions"),
        ],
    )
    def test_a_wrong_tensor_is_named_with_its_file(self, tmp_path, change, message):
        state = dict(tiny_model().state_dict())
        change(state)
        save_file(state, tmp_path / "wrong.safetensors")
        with pytest.raises(CheckpointError, match=rf"wrong\.safetensors.*{message}"):
            load_csd(tmp_path / "wrong.safetensors", heads=2)

    def test_a_file_that_is_missing_cut_off_or_no_checkpoint(self, tmp_path):
        with pytest.raises(CheckpointError, match="does not exist"):
            load_csd(tmp_path / "nowhere.safetensors")
        save_csd(tiny_model(), tmp_path / "whole.safetensors")
        (tmp_path / "cut").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-100])
        torch.save(tiny_model().state_dict(), tmp_path / "whole.pth")
        (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:-100])
        (tmp_path / "text").write_text("version https://git-lfs.github.com/spec/v1")
        (tmp_path / "empty").write_bytes(b"")
        for name in ("cut", "cut.pth", "text", "empty"):
            with pytest.raises(CheckpointError, match=name) as caught:
                load_csd(tmp_path / name)
            assert "\n" not in str(caught.value)


class TestHeads:
    def save(self, path: Path, config: CsdConfig) -> Path:
        save_file(tiny_model(config).state_dict(), path)
        return path

    def test_unstated_they_follow_clips_convention(self, tmp_path):
        wide = CsdConfig(image_size=8, patch_size=4, width=128, layers=1, heads=2, output_dim=4)
        assert load_csd(self.save(tmp_path / "wide.safetensors", wide)).config == wide

    def test_a_width_beside_the_convention_needs_them(self, tmp_path):
        path = self.save(tmp_path / "narrow.safetensors", TINY)
        with pytest.raises(CheckpointError, match="pass heads="):
            load_csd(path)
        with pytest.raises(CheckpointError, match="cannot be split into 5 heads"):
            load_csd(path, heads=5)
        assert load_csd(path, heads=4).config.heads == 4

    def test_the_file_is_not_overruled(self, tmp_path):
        save_csd(tiny_model(), tmp_path / "csd.safetensors")
        with pytest.raises(CheckpointError, match="states 2 heads; leave out heads=4"):
            load_csd(tmp_path / "csd.safetensors", heads=4)

    def test_unreadable_metadata(self, tmp_path):
        save_csd(tiny_model(), tmp_path / "csd.safetensors")
        tensors = load_file(tmp_path / "csd.safetensors")
        for text in ("{", "[]", json.dumps({"width": 3})):
            save_file(tensors, tmp_path / "odd.safetensors", metadata={csd.METADATA_KEY: text})
            with pytest.raises(CheckpointError, match="states no heads"):
                load_csd(tmp_path / "odd.safetensors")


def picture(seed: int, height: int = 24, width: int = 20) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def reward() -> CsdReward:
    return CsdReward(tiny_model())


class TestReward:
    def test_a_picture_has_its_own_style(self, reward):
        score = reward.score(picture(1)[None], [Example(id="a", style_refs=(picture(1),))])
        assert score.value_B[0].item() == pytest.approx(1, abs=1e-6)

    def test_value_is_the_mean_cosine_with_references_of_any_size(self, reward):
        pixels = torch.stack([picture(1), picture(2)])
        refs = (picture(3, 30, 40), picture(4, 16, 16), picture(5, 9, 11))
        score = reward.score(pixels, [Example(id="a", style_refs=refs), Example(id="b", style_refs=refs[:1])])
        style = [reward.embed(p[None])[0] for p in (*pixels, *refs)]
        expected = [sum(float(style[0] @ s) for s in style[2:]) / 3, float(style[1] @ style[2])]
        assert score.value_B.tolist() == pytest.approx(expected, abs=1e-6)
        assert score.valid_B.tolist() == [True, True]

    def test_without_a_style_reference_it_is_not_valid_and_gives_no_gradient(self, reward):
        pixels = torch.stack([picture(1), picture(2)]).requires_grad_()
        score = reward.score(pixels, [Example(id="a", style_refs=(picture(3),)), Example(id="b")])
        assert score.valid_B.tolist() == [True, False]
        score.value_B.sum().backward()
        assert pixels.grad[0].abs().max() > 0
        assert pixels.grad[1].abs().max() == 0

    @pytest.mark.parametrize("round_8bit", [False, True])
    def test_gradient_matches_finite_differences(self, round_8bit):
        smooth = CsdReward(tiny_model().double())
        example = [Example(id="a", style_refs=(picture(3),))]
        pixels = (0.2 + 0.6 * picture(1))[None].double().requires_grad_()
        # Rounding leaves the value within a fraction of a level, so its gradient is close to that of the smooth value.
        reward = CsdReward(tiny_model().double(), round_8bit=round_8bit)
        (grad,) = torch.autograd.grad(reward.score(pixels, example).value_B.sum(), pixels)
        direction = grad / grad.norm()
        with torch.no_grad():
            ahead, behind = (smooth.score(pixels + step * direction, example).value_B for step in (1e-2, -1e-2))
        assert float(ahead - behind) / 2e-2 == pytest.approx(float(grad.norm()), rel=2e-2)

    def test_beyond_the_range_it_scores_the_clamped_picture_and_still_has_a_gradient(self, reward):
        example = [Example(id="a", style_refs=(picture(3),))]
        stray = (3 * picture(1, 20, 20) - 1)[None].requires_grad_()
        score = reward.score(stray, example)
        assert torch.equal(score.value_B, reward.score(stray.clamp(0, 1), example).value_B)
        (grad,) = torch.autograd.grad(score.value_B.sum(), stray)
        assert (grad[(stray < 0) | (stray > 1)] != 0).all()

    def test_climbing_the_gradient_raises_the_score(self, reward):
        example = [Example(id="a", style_refs=(picture(3),))]
        pixels = picture(1)[None].requires_grad_()
        values = []
        for _ in range(8):
            score = reward.score(pixels, example)
            (grad,) = torch.autograd.grad(score.value_B.sum(), pixels)
            values.append(score.value_B.item())
            pixels = (pixels.detach() + 0.1 * grad / grad.norm()).requires_grad_()
        assert values == sorted(values)
        assert values[-1] > values[0] + 0.01

    def test_rounding_scores_the_picture_as_saved(self):
        reward = CsdReward(tiny_model(), round_8bit=True)
        example = [Example(id="a", style_refs=(picture(3),))]
        saved = (picture(1)[None] * 255).round() / 255
        assert torch.equal(reward.score(picture(1)[None], example).value_B, reward.score(saved, example).value_B)

    def test_autocast_does_not_coarsen_the_score(self, reward):
        example = [Example(id="a", style_refs=(picture(3),))]
        expected = reward.score(picture(1)[None], example).value_B
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(reward.score(picture(1)[None], example).value_B, expected)

    def test_the_model_is_frozen(self):
        model = tiny_model().train()
        CsdReward(model)
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())

    def test_from_pretrained(self, tmp_path):
        save_csd(tiny_model(), tmp_path / "csd.safetensors")
        reward = CsdReward.from_pretrained(str(tmp_path / "csd.safetensors"), round_8bit=True)
        assert reward.round_8bit
        assert same_weights(reward.model, tiny_model())


class TestReferenceCache:
    @pytest.fixture
    def calls(self, reward) -> list[int]:
        batches: list[int] = []
        reward.model.register_forward_hook(lambda _m, args, _out: batches.append(len(args[0])))
        return batches

    def test_equal_content_is_embedded_once(self, reward, calls):
        examples = [Example(id=str(i), style_refs=(picture(3), picture(4))) for i in range(3)]
        pixels = torch.rand(3, 3, 16, 16)
        reward.score(pixels, examples)
        assert calls == [3, 1, 1]
        reward.score(pixels, examples)
        assert calls == [3, 1, 1, 3]

    def test_a_reference_changed_in_place_is_embedded_anew(self, reward, calls):
        ref = picture(3)
        reward.score(picture(1)[None], [Example(id="a", style_refs=(ref,))])
        ref.mul_(0.5)
        reward.score(picture(1)[None], [Example(id="a", style_refs=(ref,))])
        assert calls == [1, 1, 1, 1]

    def test_the_same_numbers_in_another_shape_are_another_picture(self, reward, calls):
        ref = picture(3, 12, 20)
        for shaped in (ref, ref.reshape(3, 20, 12)):
            reward.score(picture(1)[None], [Example(id="a", style_refs=(shaped,))])
        assert calls == [1, 1, 1, 1]

    def test_references_carry_no_gradient_whatever_the_mode(self, reward):
        ref = picture(3).requires_grad_()
        pixels = picture(1)[None].requires_grad_()
        with torch.inference_mode():
            reward.score(picture(1)[None], [Example(id="a", style_refs=(ref,))])
        reward.score(pixels, [Example(id="a", style_refs=(ref,))]).value_B.sum().backward()
        assert ref.grad is None
        assert pixels.grad is not None

    def test_the_least_recently_used_is_dropped(self, reward, calls, monkeypatch):
        monkeypatch.setattr(csd, "CACHED_REFERENCES", 2)
        for seed in (3, 4, 3, 5, 3):
            reward.score(picture(1)[None], [Example(id="a", style_refs=(picture(seed),))])
        assert len(calls) == 5 + 3
        reward.score(picture(1)[None], [Example(id="a", style_refs=(picture(4),))])
        assert len(calls) == 5 + 3 + 2
