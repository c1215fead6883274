"""The local judge: its preprocessing against the processors themselves, its scores against transformers' own path, its
gradient against finite differences."""

from __future__ import annotations

import json
import warnings
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    LlavaImageProcessorPil,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rewardgen import plugins
from rewardgen.errors import CheckpointError, ConfigError
from rewardgen.reward import RewardWarning, score
from rewardgen.rewards.judging.local import LocalModel, answer_tokens, render, save_model
from rewardgen.rewards.judging.pictures import to_pil
from rewardgen.rewards.judging.preprocess import Preprocess
from rewardgen.rewards.judging.questions import load_question
from rewardgen.rewards.vlm_judge_local import LocalVlmJudge
from rewardgen.types import Example
from rewardgen.world.tiny_vlm import tiny_llava

SIZES = {"vision_width": 24, "vision_layers": 2, "text_width": 24, "text_layers": 2}
PROCESSORS: dict[str, Any] = {
    "clip": lambda: CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 20, "width": 22}),
    "llava": lambda: LlavaImageProcessorPil(size={"shortest_edge": 17}, crop_size={"height": 16, "width": 16}),
    "siglip": lambda: SiglipImageProcessorPil(size={"height": 20, "width": 28}),
    "vit, bilinear": lambda: ViTImageProcessorPil(size={"height": 19, "width": 13}, resample=Image.Resampling.BILINEAR),
    "lanczos": lambda: SiglipImageProcessorPil(size={"height": 20, "width": 20}, resample=Image.Resampling.LANCZOS),
    "qwen": lambda: Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 576, "longest_edge": 1600}),
    "no resize": lambda: SiglipImageProcessorPil(do_resize=False),
}


@cache
def parts_of(checkpointing: bool = False, question: str = "style", image_size: int = 16) -> LocalModel:
    model, processor = tiny_llava(image_size=image_size, **SIZES)
    asked = load_question(question)
    return LocalModel(model, processor, asked, checkpointing=checkpointing, round_8bit=False)


def judge(**args: Any) -> LocalVlmJudge:
    # A model without any training hardly ever means to answer.
    return LocalVlmJudge(parts_of(**args), min_mass=0.0).requires_grad_(False).eval()


def picture(height: int = 20, width: int = 27, seed: int = 0) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def example(n_refs: int = 1, prompt: str = "plums") -> Example:
    refs = tuple(picture(16 + i, 31, seed=10 + i) for i in range(n_refs))
    return Example(id="a", prompt=prompt, style_refs=refs, content_refs=refs)


class TestPreprocess:
    @pytest.mark.parametrize("name", PROCESSORS)
    def test_equals_the_processor_at_any_size(self, name):
        processor = PROCESSORS[name]()
        preprocess = Preprocess.of(processor, name=name)

        @settings(max_examples=15, deadline=None)
        @given(st.integers(24, 60), st.integers(24, 60), st.integers(0, 9999))
        def check(height: int, width: int, seed: int) -> None:
            levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
            expected = processor(images=[Image.fromarray(levels)], return_tensors="pt")["pixel_values"]
            ours = preprocess.batch([preprocess(torch.from_numpy(levels).permute(2, 0, 1) / 255)])
            assert ours.shape == expected.shape
            assert (ours - expected).abs().max() * min(preprocess.std) * 255 <= 1.01

        check()

    def test_a_picture_is_seen_as_its_8_bit_file(self):
        processor = PROCESSORS["clip"]()
        preprocess = Preprocess.of(processor, name="clip")
        pixels = 1.2 * picture() - 0.1
        expected = processor(images=[to_pil(pixels)], return_tensors="pt")["pixel_values"][0]
        assert ((preprocess(pixels) - expected) * torch.tensor(preprocess.std)[:, None, None]).abs().max() * 255 <= 1.01

    def test_rounding_is_straight_through(self):
        preprocess = Preprocess.of(PROCESSORS["llava"](), name="llava")
        probe = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(1))
        grads = []
        for rounded in (False, True):
            pixels = picture().requires_grad_()
            (preprocess(pixels, round_8bit=rounded) * probe).sum().backward()
            grads.append(pixels.grad)
        assert torch.equal(*grads)
        assert grads[0].abs().max() > 0

    def test_gradient_matches_finite_differences(self):
        preprocess = Preprocess.of(SiglipImageProcessorPil(size={"height": 5, "width": 7}), name="siglip")
        pixels = (0.1 + 0.8 * torch.rand(3, 3, 4, dtype=torch.float64)).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: preprocess(x, round_8bit=False), pixels)

    @pytest.mark.parametrize(
        "processor",
        [
            LlavaImageProcessorPil(do_pad=True),
            SiglipImageProcessorPil(do_normalize=False),
            CLIPImageProcessorPil(resample=Image.Resampling.BOX),
            CLIPImageProcessorPil(size={"shortest_edge": 16, "longest_edge": 20}),
            CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 20, "width": 20}),
        ],
    )
    def test_other_processors_are_refused(self, processor):
        with pytest.raises(ConfigError, match="has no gradient here"):
            Preprocess.of(processor, name="model: 'x'")

    def test_a_processor_that_does_something_of_its_own_is_found_out(self):
        class Brighter(CLIPImageProcessorPil):
            def rescale(self, image: Any, scale: float, **kwargs: Any) -> Any:
                return super().rescale(image, 1.02 * scale, **kwargs)

        with pytest.raises(ConfigError, match="pixel values differ by"):
            Preprocess.of(Brighter(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}), name="x")


class TestScores:
    @pytest.mark.parametrize("n_refs", [1, 3])
    @pytest.mark.parametrize("question", ["style", "prompt_rubric"])
    def test_equal_to_the_path_of_transformers(self, question, n_refs):
        """Processor on 8-bit files, one forward, a softmax over all tokens."""
        local = parts_of(question=question)
        rounded = LocalModel(local.model, local.processor, local.question, checkpointing=False)
        parts = rounded.question.put(picture(), example(n_refs))
        inputs = local.processor(
            images=[to_pil(part) for part in parts if isinstance(part, Tensor)],
            text=[render(local.processor, rounded.question, parts)],
            return_tensors="pt",
            add_special_tokens=False,
        )
        with torch.no_grad():
            p_V = local.model(**inputs).logits[0, -1].softmax(-1)
            value, mass = rounded(parts)
        words = local.processor.tokenizer.get_vocab()
        p_A = torch.stack([p_V[words[answer]] for answer in rounded.question.values])
        worth_A = torch.tensor(list(rounded.question.values.values()))
        assert value.item() == pytest.approx(float((p_A * worth_A).sum() / p_A.sum()), abs=2e-4)
        assert mass.item() == pytest.approx(p_A.sum().item(), abs=1e-4)
        assert 0 < value < 1

    def test_what_does_not_apply_is_masked(self):
        pixels = torch.stack([picture(seed=i) for i in range(3)])
        pixels[1, 0, 0, 0] = torch.nan
        pixels.requires_grad_()
        found = score(judge(), pixels, [example(), example(), Example(id="b")], enable_grad=True)
        assert found.valid_B.tolist() == [True, False, False]
        (grad,) = torch.autograd.grad(found.value_B[found.valid_B].sum(), pixels)
        assert grad.isfinite().all()
        assert [bool(row.any()) for row in grad] == [True, False, False]
        assert 0 < found.metrics["answer_mass"] < 1
        # One that is not finite is asked about, as black: only the device knows by then.
        assert found.counts == {"by_logprob": 2, "not_applicable": 1}

    def test_what_is_hardly_an_answer_is_masked_without_harm_to_the_others(self):
        pixels = torch.stack([picture(seed=i) for i in range(5)]).requires_grad_()
        asked = [example()] * 5
        whole = judge()
        with torch.no_grad():
            masses = [float(whole.judge(whole.judge.question.put(p, e))[1]) for p, e in zip(pixels, asked, strict=True)]
        between = sum(sorted(masses)[1:3]) / 2
        strict = LocalVlmJudge(whole.judge, min_mass=between)
        found, every = (score(reward, pixels, asked, enable_grad=True) for reward in (strict, whole))
        assert found.valid_B.tolist() == [mass >= between for mass in masses]
        assert found.valid_B.sum() == 3
        assert torch.equal(found.value_B[found.valid_B], every.value_B[found.valid_B])
        assert found.value_B[~found.valid_B].isnan().all()
        assert every.valid_B.all()
        grads = [torch.autograd.grad(of.value_B[found.valid_B].sum(), pixels)[0] for of in (found, every)]
        assert torch.equal(*grads)
        assert [bool(row.any()) for row in grads[0]] == found.valid_B.tolist()

    def test_a_model_that_does_not_answer_gives_no_score_and_says_so_once(self):
        reward = LocalVlmJudge(parts_of()).requires_grad_(False).eval()
        pixels = torch.stack([picture(seed=i) for i in range(2)])
        with pytest.warns(RewardWarning, match=r"'style' is one of its answers with a probability of 0\.0\d+ only"):
            first = score(reward, pixels, [example()] * 2, enable_grad=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            second = score(reward, pixels, [example()] * 2, enable_grad=False)
        assert not (first.valid_B | second.valid_B).any()

    def test_a_prompt_cannot_pass_for_a_picture(self):
        local = parts_of(question="prompt")
        parts = local.question.put(picture(), example(prompt="plums <image> <image>"))
        ids = local.text_inputs(parts)["input_ids"][0].tolist()
        assert ids.count(local.processor.image_token_id) == 4
        with torch.no_grad():
            assert local(parts)[0].isfinite()

    def test_tokens_of_an_answer_have_no_other_meaning(self):
        tokenizer = parts_of().processor.tokenizer
        found = answer_tokens(tokenizer, {"yes": 1.0, "no": 0.0})
        assert [tokenizer.convert_ids_to_tokens(ids) for ids in found.values()] == [["yes"], ["no"]]
        with pytest.raises(ConfigError, match="no single token for the answer 'perhaps'"):
            answer_tokens(tokenizer, {"yes": 1.0, "perhaps": 0.5})


class QwenProcessor:
    """Qwen-VL's processor without its video part, which wants torchvision; words and chat template are tiny_llava's."""

    image_token = "<image>"

    def __init__(self, words: Any) -> None:
        self.words, self.tokenizer, self.chat_template = words, words.tokenizer, words.chat_template
        self.image_processor = Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 256, "longest_edge": 800})

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        return self.words.apply_chat_template(*args, **kwargs)

    def __call__(self, images: Any, text: Any, **_: Any) -> dict[str, Tensor]:
        seen = self.image_processor(images=images, return_tensors="pt")
        first, *rest = text[0].split(self.image_token)
        counts = (seen["image_grid_thw"].prod(1) // 4).tolist()
        spread = first + "".join(count * self.image_token + part for count, part in zip(counts, rest, strict=True))
        tokens = self.tokenizer(spread, return_tensors="pt", add_special_tokens=False)
        pictures = (tokens["input_ids"] == self.tokenizer.convert_tokens_to_ids(self.image_token)).int()
        return {**tokens, **seen, "mm_token_type_ids": pictures}


def test_qwen_vl_is_read_in_patches() -> None:
    """Two pictures of different sizes: the score is that of the processor's own patches, and every pixel matters."""
    words = tiny_llava(**SIZES)[1]
    processor = QwenProcessor(words)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(words.tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
            "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1],
        },
        image_token_id=words.image_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    local = LocalModel(model, processor, load_question("style"))
    pixels = (picture(20, 27) * 255).round() / 255
    parts = local.question.put(pixels.requires_grad_(), example())
    value, _ = local(parts)
    (grad,) = torch.autograd.grad(value, pixels)
    assert (grad != 0).float().mean() > 0.99
    images = [to_pil(part) for part in parts if isinstance(part, Tensor)]
    with torch.no_grad():
        logits_V = model(**processor(images, [render(processor, local.question, parts)])).logits[0, -1]
    two = logits_V[[local.tokens["yes"][0], local.tokens["no"][0]]].softmax(0)
    assert value.item() == pytest.approx(two[0].item(), abs=1e-4)


class TestGradient:
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_matches_finite_differences(self, checkpointing, monkeypatch):
        """In float64 without rounding, along random directions, through resize, model and softmax."""

        def normalised(self: Any, hidden: Tensor) -> Tensor:
            return self.weight * hidden * (hidden.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

        # The model's own norm computes in float32, which differences of 1e-5 would drown in.
        monkeypatch.setattr(LlamaRMSNorm, "forward", normalised)
        model, processor = tiny_llava(image_size=16, **SIZES)
        local = LocalModel(
            model.double(), processor, load_question("style"), checkpointing=checkpointing, round_8bit=False
        )
        reward = LocalVlmJudge(local, min_mass=0.0).requires_grad_(False).eval()
        rng = torch.Generator().manual_seed(5)
        pixels = 0.1 + 0.8 * torch.rand(2, 3, 20, 27, dtype=torch.float64, generator=rng)

        def value(moved: Tensor) -> Tensor:
            return reward.score(moved, [example(), example(2)]).value_B

        pixels.requires_grad_()
        for row in range(2):
            (grad,) = torch.autograd.grad(value(pixels)[row], pixels)
            assert grad[1 - row].abs().max() == 0
            for _ in range(3):
                direction = torch.randn(pixels.shape, dtype=torch.float64, generator=rng)
                with torch.no_grad():
                    slope = (value(pixels + 1e-5 * direction) - value(pixels - 1e-5 * direction))[row] / 2e-5
                assert abs(slope) > 1e-7
                assert float((grad * direction).sum()) == pytest.approx(float(slope), rel=1e-5)

    def test_checkpointing_keeps_less_and_changes_nothing(self):
        kept, grads = [], []
        for checkpointing in (False, True):
            reward = judge(checkpointing=checkpointing)
            pixels = picture()[None].requires_grad_()
            size = 0

            def pack(tensor: Tensor) -> Tensor:
                nonlocal size
                size += tensor.numel()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                value = reward.score(pixels, [example()]).value_B
            kept.append(size)
            grads.append(torch.autograd.grad(value.sum(), pixels)[0])
        assert torch.equal(*grads)
        assert kept[1] < kept[0] / 2

    def test_evaluation_mode_keeps_recomputing_without_dropout(self):
        reward = judge(checkpointing=True)
        reward.eval()
        training = [type(m).__name__ for m in reward.modules() if m.training]
        assert sorted(set(training)) == ["CLIPEncoderLayer", "LlamaDecoderLayer"]


class TestReading:
    def test_what_is_saved_is_read_again(self, tmp_path):
        local = parts_of()
        save_model(local.model, local.processor, tmp_path)
        cls = plugins.resolve("rewards", "vlm_judge_local")
        made = plugins.factory(cls)(str(tmp_path), "style", checkpointing=False, round_8bit=False, min_mass=0.0)
        pixels = picture()[None]
        assert torch.equal(made.score(pixels, [example()]).value_B, judge().score(pixels, [example()]).value_B)

    def test_a_folder_without_a_model(self, tmp_path):
        with pytest.raises(CheckpointError, match="no image-text model"):
            LocalVlmJudge.from_pretrained(str(tmp_path), "style")

    @pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
    def test_a_processor_that_wants_torchvision(self, tmp_path):
        local = parts_of()
        save_model(local.model, local.processor, tmp_path)
        (tmp_path / "processor_config.json").unlink()
        (tmp_path / "preprocessor_config.json").write_text(
            json.dumps({"processor_class": "Qwen2_5_VLProcessor", "image_processor_type": "Qwen2VLImageProcessor"})
        )
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"processor_class": "Qwen2_5_VLProcessor"}))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
        with pytest.raises(ConfigError, match=r"needs torchvision.*LLaVA's works without"):
            LocalVlmJudge.from_pretrained(str(tmp_path), "style")

    def test_questions_it_cannot_read_are_refused(self):
        local = parts_of()
        with pytest.raises(ConfigError, match="asks for reasons first"):
            LocalModel(local.model, local.processor, load_question("subject_rubric"))
        local.processor.chat_template, kept = None, local.processor.chat_template
        try:
            with pytest.raises(ConfigError, match="no chat template"):
                LocalModel(local.model, local.processor, load_question("style"))
        finally:
            local.processor.chat_template = kept
