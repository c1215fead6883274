"""HPSv3 (Ma et al., arXiv 2508.03789): human preference for a picture, given its prompt, as Qwen2-VL sees it.

B pictures.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from rewardgen.errors import CheckpointError, ConfigError
from rewardgen.reward import Reward
from rewardgen.rewards.hpsv3_model import PreferenceModel, blank_head, load_hpsv3, round_angles
from rewardgen.rewards.judging.preprocess import Preprocess
from rewardgen.rewards.judging.recompute import go_on_recomputing, recompute_layers
from rewardgen.rewards.loading import is_safetensors, load_pretrained
from rewardgen.rewards.preprocess import CLIP_MEAN, CLIP_STD
from rewardgen.rewards.sizes import LetterTokenizer, config_of
from rewardgen.transfer import to_device
from rewardgen.types import Example, Score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIXELS = 256 * 28 * 28
"""Of a picture once it is resized, the release's fewest and most: 256 of the model's tokens, or a few less or more."""
REWARD_TOKEN = "<|Reward|>"
"""Added behind the tokenizer's own tokens; the score is read at its place."""
PROMPT = "{text_prompt}"
"""Where an instruction has the prompt."""
_IMAGE = "<|image_pad|>"
_CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{picture}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
)
"""Qwen2-VL's chat format of one picture and a text."""


class Hpsv3Reward(Reward):
    """The mean of the distribution that the model gives for a picture's score; unbounded, higher is better.

    In the authors' benchmark the means of models lie between -0.24 (SD2) and 10.55 (Kolors). Valid where there is a
    prompt. `Score.metrics` has `sigma`, the mean of the distributions' standard deviations.

    Args:
        model: patches and tokens to mean and log of the standard deviation.
        tokenizer: Qwen2-VL's, with `REWARD_TOKEN`.
        instruction: what is put to the model, with `PROMPT` and `REWARD_TOKEN` (`read_instruction`).
        preprocess: pictures to patches, differentiable.
        checkpointing: recompute layers in the backward pass instead of keeping their activations.
    """

    differentiable = True

    def __init__(
        self,
        model: PreferenceModel,
        tokenizer: PreTrainedTokenizerBase,
        instruction: str,
        preprocess: Preprocess,
        *,
        checkpointing: bool = True,
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.tokenizer, self.instruction, self.preprocess = tokenizer, instruction, preprocess
        self._checkpointing = checkpointing
        if checkpointing:
            recompute_layers(model.backbone)
        self.eval()
        # A prompt that has one of them would be taken for a picture, the end of a turn or the place of the score.
        self._marks = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str,
        *,
        instruction: str,
        backbone: str = "Qwen/Qwen2-VL-7B-Instruct",
        dtype: Literal["float32", "bfloat16"] = "bfloat16",
        checkpointing: bool = True,
    ) -> Hpsv3Reward:
        """Read the released file.

        Args:
            checkpoint: `MizzenAI/HPSv3:HPSv3.safetensors` or a copy.
            instruction: the text that the model was taught with, which is not part of rewardgen: the file
                `hpsv3/dataset/data_collator_qwen.py` of the authors' package, of which nothing is run, or a text file
                with `{text_prompt}` and `<|Reward|>`.
            backbone: folder or hub repository whose config, tokenizer and image processor are taken; no weights.
            dtype: of all weights but the head's, which are float32 as in the release.
            checkpointing: recompute layers in the backward pass instead of keeping their activations.

        Raises:
            ConfigError: the instruction cannot be used, or the image processor has no gradient here.
            CheckpointError: something is missing, damaged or of another layout.
        """
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

        asked = read_instruction(instruction)
        is_safetensors(
            "HPSv3 checkpoint", Path(checkpoint).expanduser()
        )  # a missing file is told before a host is asked
        config = load_pretrained(AutoConfig, backbone)
        tokenizer = load_pretrained(AutoTokenizer, backbone)
        tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
        try:
            prepared = Preprocess.of(load_pretrained(AutoImageProcessor, backbone, backend="pil"), name=backbone)
        except ConfigError as error:
            raise ConfigError(f"backbone: the image processor of {backbone} is not Qwen2-VL's ({error})") from error
        model = load_hpsv3(checkpoint, config, getattr(torch, dtype))
        round_angles(model.backbone)
        token = int(tokenizer.convert_tokens_to_ids(REWARD_TOKEN))
        if token != model.tokens - 1:
            raise CheckpointError(
                f"HPSv3 checkpoint {checkpoint} knows {model.tokens} tokens, of which the last is for the score; in the"
                f" tokenizer of {backbone} that is number {token}"
            )
        prepared = replace(prepared, size=(PIXELS, PIXELS))
        return cls(model, tokenizer, asked, prepared, checkpointing=checkpointing)

    @classmethod
    def check_arguments(cls, *, instruction: str, **_: Any) -> None:
        """Refuse an instruction that is here and cannot be used, before any weight is read. Raises ConfigError."""
        if Path(instruction).expanduser().exists():
            read_instruction(instruction)

    @classmethod
    def blueprint(
        cls,
        checkpoint: str,
        *,
        instruction: str,
        backbone: str = "Qwen/Qwen2-VL-7B-Instruct",
        dtype: Literal["float32", "bfloat16"] = "bfloat16",
        checkpointing: bool = True,
    ) -> Hpsv3Reward:
        """A reward of the right sizes whose weights mean nothing; nothing is fetched.

        Raises:
            ConfigError: the instruction cannot be used.
            CheckpointError: the backbone's sizes are not known.
        """
        from transformers import Qwen2VLModel

        config = config_of(backbone)
        vision, text = config.vision_config, config.text_config
        network = Qwen2VLModel(config).to(getattr(torch, dtype)).eval()
        round_angles(network)
        patches = (int(vision.patch_size), int(vision.spatial_merge_size), int(vision.temporal_patch_size))
        prepared = Preprocess(
            size=(PIXELS, PIXELS), kernel="bicubic", crop=(), mean=CLIP_MEAN, std=CLIP_STD, patches=patches
        )
        special = {_IMAGE: int(config.image_token_id), REWARD_TOKEN: int(text.vocab_size) - 1}
        model = PreferenceModel(network, blank_head(int(text.hidden_size)), special[REWARD_TOKEN])
        tokenizer = cast(Any, LetterTokenizer(special))
        return cls(model, tokenizer, read_instruction(instruction), prepared, checkpointing=checkpointing)

    def train(self, mode: bool = True) -> Hpsv3Reward:
        """As of any module; but layers go on recomputing in evaluation, where transformers would not."""
        super().train(mode)
        if self._checkpointing and not mode:
            go_on_recomputing(self.model.backbone)
        return self

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        weight = self.model.backbone.get_input_embeddings().weight
        rows, columns = self.grid(*pixels_B3HW.shape[-2:])
        texts = [self.text(example.prompt, rows, columns) for example in examples]
        tokens = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        with torch.autocast(weight.device.type, enabled=False):
            shown = [self.preprocess(picture) for picture in to_device(pixels_B3HW, weight.device)]
            mean_B, log_sigma_B = self.model(
                tokens["input_ids"],
                tokens["attention_mask"],
                self.preprocess.batch(shown).to(weight.dtype),
                torch.tensor([[1, rows, columns]] * len(examples)),
            ).unbind(-1)
        says_something = torch.tensor([bool(example.prompt.strip()) for example in examples])
        valid_B = to_device(says_something, mean_B.device) & mean_B.detach().isfinite()
        sigma = log_sigma_B.detach().exp().where(valid_B, 0.0).sum() / valid_B.sum().clamp(min=1)
        return Score(value_B=mean_B, valid_B=valid_B, metrics={"sigma": sigma})

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of a picture."""
        assert self.preprocess.patches is not None
        rows, columns = (side // self.preprocess.patches[0] for side in self.preprocess.resized(height, width))
        return rows, columns

    def text(self, prompt: str, rows: int, columns: int) -> str:
        """What is put to the model about a picture of so many patches, whose tokens stand for merged ones."""
        assert self.preprocess.patches is not None
        for mark in self._marks:
            prompt = prompt.replace(mark, " ")
        picture = _IMAGE * (rows * columns // self.preprocess.patches[1] ** 2)
        return _CHAT.format(picture=picture, text=self.instruction.replace(PROMPT, prompt))


def read_instruction(path: str) -> str:
    """The instruction of a text file, or of the authors' Python file, whose two texts are read and nothing is run.

    Raises:
        ConfigError: there is no such file, or not `PROMPT` and `REWARD_TOKEN` once each in it.
    """
    try:
        content = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"instruction: {path} cannot be read ({getattr(error, 'strerror', None) or 'it is no text'}); it is"
            " hpsv3/dataset/data_collator_qwen.py of the authors' package (pip download --no-deps hpsv3==1.0.0)"
        ) from error
    if path.endswith(".py"):
        content = _texts_of(path, content)
    for part in (PROMPT, REWARD_TOKEN):
        if (times := content.count(part)) != 1:
            raise ConfigError(f"instruction: {path} has '{part}' {times} times; once is needed")
    return content


def _texts_of(path: str, source: str) -> str:
    """`INSTRUCTION` followed by `prompt_with_special_token`."""
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise ConfigError(f"instruction: {path} is no Python ({error.msg}, line {error.lineno})") from error
    texts = {
        target.id: statement.value.value
        for statement in statements
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)
        for target in statement.targets
        if isinstance(target, ast.Name) and isinstance(statement.value.value, str)
    }
    try:
        return texts["INSTRUCTION"] + texts["prompt_with_special_token"]
    except KeyError as error:
        raise ConfigError(f"instruction: {path} has no text {error}; it is not the authors' file") from error
