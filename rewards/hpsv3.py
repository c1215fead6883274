"""HPSv3 (Ma et al., arXiv 2508.03789): human preference for a picture, given its prompt, as Qwen2-VL sees it.

B pictures, T tokens of a text, N patches of all pictures, P values of a patch, D width.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from rewardgen.errors import CheckpointError, ConfigError
from rewardgen.reward import Reward
from rewardgen.rewards.judging.preprocess import Preprocess
from rewardgen.rewards.judging.recompute import go_on_recomputing, recompute_layers
from rewardgen.rewards.loading import check_tensors, load_pretrained, model_from, read_tensors, size_of
from rewardgen.rewards.preprocess import CLIP_MEAN, CLIP_STD
from rewardgen.rewards.sizes import LetterTokenizer, config_of
from rewardgen.transfer import to_device
from rewardgen.types import Example, Score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen2VLModel

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
_NAMES = (
    ("backbone.visual.", "visual."),
    ("backbone.language_model.", "model."),
    ("head.", "rm_head."),
)
"""Beginnings of our names, and of the file's, which are those of transformers 4.45."""


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
        model = PreferenceModel(network, _blank_head(int(text.hidden_size)), special[REWARD_TOKEN])
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


class PreferenceModel(nn.Module):
    """Qwen2-VL without its last layer, and a head where the score's token stands.

    Args:
        backbone: of pictures and texts.
        head: [B, D] to [B, 2], float32.
        reward_token: number of the token whose state the head reads.
    """

    def __init__(self, backbone: Qwen2VLModel, head: nn.Module, reward_token: int) -> None:
        super().__init__()
        self.backbone, self.head, self.reward_token = backbone, head, reward_token

    @property
    def tokens(self) -> int:
        """Tokens that it knows."""
        return int(self.backbone.get_input_embeddings().weight.shape[0])

    def forward(self, ids_BT: Tensor, mask_BT: Tensor, patches_NP: Tensor, grid_B3: Tensor) -> Tensor:
        """Mean and log of the standard deviation, [B, 2].

        Args:
            ids_BT: on the CPU, padded on the right; the score's token once in each row.
            mask_BT: 0 where they are padded.
            patches_NP: of all pictures.
            grid_B3: (1, rows, columns) of patches.
        """
        device = patches_NP.device
        places_B = to_device((ids_BT == self.reward_token).int().argmax(-1), device)
        # Plain positions, without Qwen2-VL's rows and columns: the authors' forward pass hands none to the language
        # model, whose default in their transformers (4.45.2) these are. The release was taught so.
        positions_3BT = torch.arange(ids_BT.shape[1]).expand(3, *ids_BT.shape)
        states_BTD = self.backbone(
            input_ids=to_device(ids_BT, device),
            attention_mask=to_device(mask_BT, device),
            position_ids=to_device(positions_3BT, device),
            pixel_values=patches_NP,
            image_grid_thw=to_device(grid_B3, device),
            use_cache=False,
        ).last_hidden_state
        state_BD = states_BTD.gather(1, places_B[:, None, None].expand(-1, 1, states_BTD.shape[-1]))[:, 0]
        found_B2: Tensor = self.head(state_BD.to(torch.promote_types(state_BD.dtype, torch.float32)))
        return found_B2


def load_hpsv3(checkpoint: str, config: Any, dtype: torch.dtype) -> PreferenceModel:
    """Read the released names: transformers' of Qwen2-VL before its version 5, and `rm_head`.

    Args:
        config: of the backbone; the file may know another number of tokens, since one was added for the score.
        dtype: of the backbone's weights.

    Raises:
        CheckpointError: the file is missing, damaged or holds code, or a tensor is missing, unknown, of a wrong shape
            or not finite.
    """
    from transformers import Qwen2VLModel

    what = f"HPSv3 checkpoint {checkpoint}"
    found, _ = read_tensors("HPSv3 checkpoint", checkpoint, under="model")
    tokens, width = size_of(what, found, "model.embed_tokens.weight", 2, "HPSv3")
    found.pop("lm_head.weight", None)  # the layer that would speak
    config.text_config.vocab_size = tokens
    with torch.device("meta"):
        whole = nn.ModuleDict({"backbone": Qwen2VLModel(config), "head": _blank_head(width)})
    names = {_released(name): name for name in whole.state_dict()}
    check_tensors(what, found, {old: tuple(whole.state_dict()[new].shape) for old, new in names.items()})
    parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "head": {}}
    for old, new in names.items():
        part, _, name = new.partition(".")
        parts[part][name] = found.pop(old)
    head = _blank_head(width)
    head.load_state_dict({name: tensor.float() for name, tensor in parts["head"].items()})
    backbone = model_from(Qwen2VLModel, config, parts["backbone"], what, dtype=dtype)
    return PreferenceModel(backbone, head.eval(), tokens - 1)


def _released(name: str) -> str:
    """What the file calls a tensor of backbone or head."""
    new, old = next(pair for pair in _NAMES if name.startswith(pair[0]))
    return old + name.removeprefix(new)


def round_angles(backbone: Qwen2VLModel) -> None:
    """Compute the angles of positions as the release was taught and is used, in place, whatever the weights' type.

    The authors cast the whole model to bfloat16, in transformers 4.45 also what the angles are made of: the
    frequencies, and in the vision tower angles, cosines and sines too. After some hundred tokens the angles are off by
    a large part of a turn, but by the same one as in training.
    """
    language: Any = backbone.language_model.rotary_emb
    language.inv_freq = language.inv_freq.bfloat16().to(language.inv_freq.dtype)
    vision: Any = backbone.visual
    vision.rotary_pos_emb = _RoundedAngles(vision.rotary_pos_emb)


class _RoundedAngles(nn.Module):
    """What gives the vision tower its angles, computed in bfloat16."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner: Any = inner

    def forward(self, x: Any, position_ids: Tensor | None = None) -> Any:
        """As the inner module, which since some version of transformers 5 is given places in place of their number."""
        frequencies = self.inner.inv_freq.bfloat16()
        if position_ids is None:
            return torch.outer(torch.arange(x, device=frequencies.device, dtype=frequencies.dtype), frequencies)
        angles = position_ids[..., None].bfloat16() * frequencies
        return tuple(self.inner.recomposition_frequencies(part) for part in (angles.cos(), angles.sin()))


def _blank_head(width: int) -> nn.Sequential:
    """As released; the dropout, which keeps its place among the names, plays no part when scoring."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Identity(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )


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
