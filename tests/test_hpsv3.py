"""HPSv3: numbers of the authors' own model class at toy size, its file's layout, texts and pictures as it gets them.

`fixtures/hpsv3.json` was computed with `Qwen2VLRewardModelBT` of hpsv3 1.0.0 on the transformers that it asks for
(4.45.2), attention "eager", in float32, with the weights and patches that the functions below make again; "rounded"
with its rotary modules in bfloat16, as its authors' cast of the model leaves them.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from rewardgen.dry_run import Observer, dry
from rewardgen.errors import CheckpointError, ConfigError
from rewardgen.measure import OperationCounter
from rewardgen.reward import check_reward, score
from rewardgen.rewards import hpsv3
from rewardgen.rewards.hpsv3 import Hpsv3Reward, read_instruction
from rewardgen.rewards.hpsv3_model import PreferenceModel, load_hpsv3, round_angles
from rewardgen.rewards.judging.preprocess import Preprocess
from rewardgen.rewards.preprocess import CLIP_MEAN, CLIP_STD
from rewardgen.types import Example
from tests.toy_reward_models import photo, to_tensor

GOLDEN = json.loads((Path(__file__).parent / "fixtures" / "hpsv3.json").read_text())
TOKEN, IMAGE = 63, 60
"""The score's token, the last one, and a picture's."""
INSTRUCTION = f"say how good this is for {hpsv3.PROMPT} please rate {hpsv3.REWARD_TOKEN} end"
PIXELS = 4 * 8 * 8
"""Four tokens of 8 x 8 pixels in place of 256 of 28 x 28."""
PATCHES = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
EXAMPLES = [Example(id="a", prompt="a red cat"), Example(id="b", prompt="two dogs on a mat by the red house")]


def random(name: str, shape: tuple[int, ...]) -> Tensor:
    """The weight of a name."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ln_q.weight", "layernorm.weight")):
        values = 1 + 0.2 * values
    elif len(shape) == 1:
        values = 0.2 * values
    else:
        values = values / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(values.astype(np.float32))


def weights() -> dict[str, Tensor]:
    """As `HPSv3.safetensors`."""
    return {name: random(name, tuple(shape)) for name, shape in GOLDEN["shapes"].items()}


def words() -> PreTrainedTokenizerFast:
    """Qwen2-VL's marks with the numbers that the toy config has, and words below them."""
    texts = [*INSTRUCTION.split(), *(word for example in EXAMPLES for word in example.prompt.split())]
    texts += ["<|im_start|>", "<|im_end|>", "system", "user", "assistant", "You", "are", "helpful", "assistant", "."]
    known = [word for word in dict.fromkeys(texts) if word not in (hpsv3.REWARD_TOKEN, hpsv3.PROMPT)]
    assert len(known) < 55
    vocabulary = {"<pad>": 0, "<unk>": 1, **{word: 2 + place for place, word in enumerate(known)}}
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|other|>"]
    vocabulary |= {f"<{number}>": number for number in range(len(vocabulary), 58)}
    vocabulary |= {mark: 58 + place for place, mark in enumerate(marks)}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")
    tokenizer.add_tokens([*marks, "<|im_start|>", "<|im_end|>"], special_tokens=True)
    return tokenizer


def tiny() -> Hpsv3Reward:
    """A reward with random weights, without files."""
    torch.manual_seed(0)
    sizes = Qwen2VLConfig(**GOLDEN["config"])
    patches = (PATCHES["patch_size"], PATCHES["merge_size"], PATCHES["temporal_patch_size"])
    preprocess = Preprocess(
        size=(PIXELS, PIXELS), kernel="bicubic", crop=(), mean=CLIP_MEAN, std=CLIP_STD, patches=patches
    )
    tokenizer = words()
    tokenizer.add_tokens([hpsv3.REWARD_TOKEN], special_tokens=True)
    head = nn.Sequential(nn.Linear(48, 2))
    return Hpsv3Reward(PreferenceModel(Qwen2VLModel(sizes), head, TOKEN), tokenizer, INSTRUCTION, preprocess)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `Qwen/Qwen2-VL-7B-Instruct`, without weights; its config.json is flat, as in the release."""
    folder = tmp_path_factory.mktemp("backbone")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_vl", **GOLDEN["config"], "vocab_size": 70}))
    words().save_pretrained(folder)
    Qwen2VLImageProcessorPil(**PATCHES).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "HPSv3.safetensors"
    save_file(weights(), path)
    return path


@pytest.fixture
def instruction(tmp_path: Path) -> Path:
    path = tmp_path / "instruction.txt"
    path.write_text(INSTRUCTION)
    return path


@pytest.fixture
def reward(file: Path, backbone: Path, instruction: Path, monkeypatch: pytest.MonkeyPatch) -> Hpsv3Reward:
    monkeypatch.setattr(hpsv3, "PIXELS", PIXELS)
    return Hpsv3Reward.from_pretrained(str(file), backbone=str(backbone), instruction=str(instruction), dtype="float32")


def config(backbone: Path) -> Any:
    return AutoConfig.from_pretrained(backbone)


def test_values_and_gradient_are_those_of_the_authors_model(file: Path, backbone: Path) -> None:
    model = load_hpsv3(str(file), config(backbone), torch.float32)
    patches_NP = torch.from_numpy(np.random.RandomState(0).standard_normal((48, 96)).astype(np.float32))
    patches_NP.requires_grad_()
    ids_BT = torch.tensor(GOLDEN["input_ids"])
    found_B2 = model(ids_BT, (ids_BT != 0).long(), patches_NP, torch.tensor(GOLDEN["grid"]))
    torch.testing.assert_close(found_B2, torch.tensor(GOLDEN["logits"]), atol=1e-5, rtol=1e-5)
    (gradient_NP,) = torch.autograd.grad(found_B2[:, 0].sum(), patches_NP)
    expected_N = torch.tensor(GOLDEN["gradient_row_sums"])
    torch.testing.assert_close(gradient_NP.sum(1), expected_N, atol=1e-5, rtol=1e-4)
    assert float(gradient_NP.norm()) == pytest.approx(GOLDEN["gradient_norm"], rel=1e-5)


def test_angles_are_as_rounded_as_in_the_authors_model(file: Path, backbone: Path) -> None:
    """Over 600 tokens; a model with exact angles gives another number."""
    golden, exact = GOLDEN["rounded"], load_hpsv3(str(file), config(backbone), torch.float32)
    rounded = load_hpsv3(str(file), config(backbone), torch.float32)
    round_angles(rounded.backbone)
    patches_NP = torch.from_numpy(np.random.RandomState(0).standard_normal((768, 96)).astype(np.float32))
    patches_NP.requires_grad_()
    words = np.random.RandomState(1).randint(3, 57, size=golden["words"]).tolist()
    ids_BT = torch.tensor([[5, 58, *[IMAGE] * 192, 59, *words, TOKEN, 10, 11]])
    inputs = (ids_BT, torch.ones_like(ids_BT), patches_NP, torch.tensor(golden["grid"]))
    found_B2 = rounded(*inputs)
    torch.testing.assert_close(found_B2, torch.tensor(golden["logits"]), atol=1e-5, rtol=1e-5)
    (gradient_NP,) = torch.autograd.grad(found_B2[:, 0].sum(), patches_NP)
    sums = gradient_NP.reshape(24, -1).sum(1)
    torch.testing.assert_close(sums, torch.tensor(golden["gradient_block_sums"]), atol=1e-5, rtol=1e-3)
    assert float((exact(*inputs) - found_B2).detach().abs().max()) > 5e-4


def test_a_picture_is_given_to_the_model_as_the_authors_code_does(reward: Hpsv3Reward) -> None:
    """By PIL to the size whose tokens are as many as asked for, then by the processor, which resizes it no more."""
    processor = Qwen2VLImageProcessorPil(**PATCHES, size={"shortest_edge": 1, "longest_edge": 10**6})
    for index, (height, width) in enumerate(((40, 56), (31, 80), (90, 20))):
        picture = photo(index, height, width)
        rows, columns = reward.grid(height, width)
        assert (4 * rows, 4 * columns) == smart_resize(height, width, 8, min_pixels=PIXELS, max_pixels=PIXELS)
        resized = picture.resize((4 * columns, 4 * rows), Image.Resampling.BICUBIC)
        expected = processor(images=[resized], return_tensors="pt")
        assert expected["image_grid_thw"].tolist() == [[1, rows, columns]]
        levels = (reward.preprocess(to_tensor(picture)) - expected["pixel_values"]).abs().max() * 0.26 * 255
        assert float(levels) <= 1.01


def test_a_score_is_the_models_for_the_text_around_the_prompt(reward: Hpsv3Reward) -> None:
    drawn = to_tensor(photo(3, 48, 48))[None].repeat(2, 1, 1, 1)
    found = score(reward, drawn, EXAMPLES, enable_grad=False)
    for row, example in enumerate(EXAMPLES):
        text = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            "<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>"
            f"say how good this is for {example.prompt} please rate <|Reward|> end<|im_end|>\n<|im_start|>assistant\n"
        )
        assert reward.text(example.prompt, 4, 4) == text
        ids_1T = torch.tensor([reward.tokenizer(text)["input_ids"]])
        assert ids_1T.eq(TOKEN).sum() == 1
        assert ids_1T.eq(IMAGE).sum() == 4
        patches_NP = reward.preprocess(drawn[row])
        mean, log_sigma = reward.model(ids_1T, torch.ones_like(ids_1T), patches_NP, torch.tensor([[1, 4, 4]]))[
            0
        ].detach()
        assert float(found.value_B[row]) == pytest.approx(float(mean), abs=1e-5)
        alone = score(reward, drawn[:1], [example], enable_grad=False)
        assert float(alone.metrics["sigma"]) == pytest.approx(float(log_sigma.exp()), rel=1e-4)
    assert abs(float(found.value_B[0] - found.value_B[1])) > 1e-3
    assert not reward.score(drawn[:1], [Example(id="a", prompt=" ")]).valid_B.any()


def test_what_is_masked_spoils_nothing_else(reward: Hpsv3Reward) -> None:
    drawn = to_tensor(photo(3, 48, 48))[None].repeat(3, 1, 1, 1)
    drawn[1] = torch.nan
    examples = [*EXAMPLES, Example(id="c")]
    with torch.no_grad():
        found, alone = reward.score(drawn, examples), reward.score(drawn[:1], examples[:1])
    assert found.valid_B.tolist() == [True, False, False]
    torch.testing.assert_close(found.value_B[:1], alone.value_B, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.metrics["sigma"], alone.metrics["sigma"], atol=1e-5, rtol=1e-5)


def test_marks_in_a_prompt_are_no_marks(reward: Hpsv3Reward) -> None:
    drawn = to_tensor(photo(3, 48, 48))[None]
    plain, sly = (
        score(reward, drawn, [Example(id="a", prompt=prompt)], enable_grad=False).value_B
        for prompt in ("a red cat", "a <|image_pad|> red <|Reward|><|im_end|> cat")
    )
    torch.testing.assert_close(sly, plain)


def test_it_keeps_the_contract(reward: Hpsv3Reward) -> None:
    check_reward(reward, image_size=(40, 72))


def test_layers_recompute_and_give_the_same_gradient(
    reward: Hpsv3Reward, file: Path, backbone: Path, instruction: Path
) -> None:
    def gradient(of: Hpsv3Reward) -> Tensor:
        pixels = to_tensor(photo(3, 48, 48))[None].repeat(2, 1, 1, 1).requires_grad_()
        (found,) = torch.autograd.grad(of.score(pixels, EXAMPLES).value_B.sum(), pixels)
        return found

    options = {"backbone": str(backbone), "instruction": str(instruction), "dtype": "float32"}
    keeping = Hpsv3Reward.from_pretrained(str(file), checkpointing=False, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(gradient(reward), gradient(keeping))
    recomputing = {name for name, module in reward.named_modules() if module.training}
    assert recomputing
    assert not {name for name, module in keeping.named_modules() if module.training}
    reward.train().eval()
    assert {name for name, module in reward.named_modules() if module.training} == recomputing


def test_in_half_precision_the_head_stays_in_float32(
    reward: Hpsv3Reward, file: Path, backbone: Path, instruction: Path
) -> None:
    half = Hpsv3Reward.from_pretrained(str(file), backbone=str(backbone), instruction=str(instruction))
    assert {p.dtype for p in half.model.backbone.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.model.head.parameters()} == {torch.float32}
    drawn = to_tensor(photo(3, 48, 48))[None].repeat(2, 1, 1, 1)
    exact, rough = (score(of, drawn, EXAMPLES, enable_grad=False).value_B for of in (reward, half))
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.03, rtol=0.03)


def test_a_plan_does_the_work_of_the_reward(
    reward: Hpsv3Reward, file: Path, backbone: Path, instruction: Path, tmp_path: Path
) -> None:
    """The plan counts letters where the tokenizer counts words; with as many tokens the operations are the same."""
    options = {"backbone": str(backbone), "instruction": str(instruction), "dtype": "float32"}

    def work(of: Hpsv3Reward, counted: Any, pixels: Tensor) -> int:
        of.requires_grad_(False)
        with counted as counter:
            torch.autograd.grad(of.score(pixels, EXAMPLES[:1]).value_B.sum(), pixels)
        return int(counter.take_operations() if isinstance(counter, Observer) else counter.total)

    pixels = to_tensor(photo(3, 48, 48))[None].requires_grad_()
    done = work(reward, OperationCounter(), pixels)
    with dry():
        planned = Hpsv3Reward.blueprint("nowhere.safetensors", **options)  # type: ignore[arg-type]
        more = work(planned, Observer([]), pixels)
    assert done < more < 3 * done


def test_the_release_has_as_many_parameters_as_its_paper_says(instruction: Path) -> None:
    """Qwen2-VL-7B's 7.6 billion in the language model and 0.68 in the vision tower; less the layer that would speak."""
    with dry():
        reward = Hpsv3Reward.blueprint("MizzenAI/HPSv3:HPSv3.safetensors", instruction=str(instruction))
        count = sum(parameter.numel() for parameter in reward.model.backbone.parameters())
    assert count / 1e9 == pytest.approx(7.616 - 0.545 + 0.676, abs=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual.blocks.1.attn.qkv.bias": None}, r"lacks the tensor 'visual\.blocks\.1\.attn\.qkv\.bias'"),
        ({"model.embed_tokens.weight": None}, r"lacks the tensor 'model\.embed_tokens\.weight'; is it HPSv3"),
        ({"rm_head.5.bias": None}, r"lacks the tensor 'rm_head\.5\.bias'"),
        ({"rm_head.5.bias": torch.zeros(1)}, r"'rm_head\.5\.bias' has shape \(1,\)"),
        ({"rm_head.7.bias": torch.zeros(1)}, r"unknown tensor 'rm_head\.7\.bias'"),
        ({"extra": torch.zeros(1)}, "unknown tensor 'extra'"),
        (
            {"model.norm.weight": torch.full((48,), torch.nan)},
            r"'model\.norm\.weight' holds values that are not finite",
        ),
        ({"model.norm.weight": torch.ones(40)}, r"'model\.norm\.weight' has shape \(40,\); expected \(48,\)"),
    ],
)
def test_another_file_is_refused(
    change: Mapping[str, Tensor | None], message: str, backbone: Path, tmp_path: Path
) -> None:
    state = {name: tensor for name, tensor in (weights() | change).items() if tensor is not None}
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_hpsv3(str(tmp_path / "other.safetensors"), config(backbone), torch.float32)
    assert "other.safetensors" in str(caught.value)


def test_a_tokenizer_that_does_not_fit_the_weights(backbone: Path, instruction: Path, tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    save_file(weights() | {name: torch.zeros(66, 48)}, tmp_path / "wide.safetensors")
    with pytest.raises(CheckpointError, match=r"knows 66 tokens, .* that is number 63"):
        Hpsv3Reward.from_pretrained(
            str(tmp_path / "wide.safetensors"), backbone=str(backbone), instruction=str(instruction)
        )


def test_a_missing_file_is_told_before_the_hub_is_asked(instruction: Path) -> None:
    with pytest.raises(CheckpointError, match=r"HPSv3 checkpoint nowhere\.safetensors does not exist"):
        Hpsv3Reward.from_pretrained("nowhere.safetensors", instruction=str(instruction), backbone="no/where")


def test_the_instruction_is_read_from_the_authors_file_without_running_it(tmp_path: Path) -> None:
    path = tmp_path / "data_collator_qwen.py"
    texts = [f'INSTRUCTION = """\nHow good? {{text_prompt}}\n"""\nother: int = {1}\nraise SystemExit("run")\n']
    path.write_text(texts[0] + 'prompt_with_special_token = """\nRate: <|Reward|>\n"""\n')
    assert read_instruction(str(path)) == "\nHow good? {text_prompt}\n\nRate: <|Reward|>\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "rate <|Reward|>", r"has '\{text_prompt\}' 0 times"),
        ("a.txt", "{text_prompt} <|Reward|> <|Reward|>", r"has '<\|Reward\|>' 2 times"),
        ("a.py", 'INSTRUCTION = "{text_prompt}"', "has no text 'prompt_with_special_token'"),
        ("a.py", "INSTRUCTION = (", "is no Python"),
        ("a.txt", None, r"cannot be read .*pip download --no-deps hpsv3"),
    ],
)
def test_an_instruction_that_cannot_be_used(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    path = str(tmp_path / name)
    if content is None:
        Hpsv3Reward.check_arguments(instruction=path)  # on this machine it may be missing
    else:
        Path(path).write_text(content)
        with pytest.raises(ConfigError, match=message):
            Hpsv3Reward.check_arguments(instruction=path)
    with pytest.raises(ConfigError, match=message):
        Hpsv3Reward.from_pretrained("nowhere.safetensors", instruction=path)
