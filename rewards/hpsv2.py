"""HPSv2 (Wu et al., arXiv 2306.09341): human preference for a picture, given its prompt."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from rewardgen.errors import CheckpointError
from rewardgen.reward import Reward
from rewardgen.rewards.clip_encoder import ClipEncoder
from rewardgen.rewards.image_processor import ImageProcessor
from rewardgen.rewards.loading import load_pretrained, model_from, read_tensors, size_of, without_prefix
from rewardgen.rewards.sizes import CLIP_H, BlankTokenizer, shapes_in
from rewardgen.types import Example, Score

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel

HEADS = 16
"""Attention heads of both towers of ViT-H/14; the file does not tell."""
_NAMES = (
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.conv1.", "vision_model.embeddings.patch_embedding."),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.", "text_model.final_layer_norm."),
    ("transformer.resblocks.", "text_model.encoder.layers."),
)
"""Beginnings of open_clip's names and of those of transformers (whose spelling of `pre_layrnorm` this is)."""
_WITHIN = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


class Hpsv2Reward(Reward):
    """Cosine of picture and prompt in a CLIP ViT-H/14 that was fine-tuned on preferences: about 0.2 to 0.35.

    This is what the authors' `score` returns; their tables show it times 100. Valid where there is a prompt. A picture
    that is not square is fitted into the square on black, as they do.

    Deviations: computed in float32, not under autocast; texts are not repaired by ftfy before they become tokens.

    Args:
        encoder: the model (`load_hpsv2`).
    """

    differentiable = True

    def __init__(self, encoder: ClipEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    @classmethod
    def from_pretrained(cls, checkpoint: str, *, tokenizer: str) -> Hpsv2Reward:
        """Read the released file.

        Args:
            checkpoint: `xswu/HPSv2:HPS_v2.1_compressed.pt`, `xswu/HPSv2:HPS_v2_compressed.pt` or a copy.
            tokenizer: folder or hub repository with CLIP's tokenizer, such as
                `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`.
        """
        from transformers import AutoTokenizer

        model = load_hpsv2(checkpoint)
        processor = ImageProcessor(long_side=int(model.config.vision_config.image_size))
        return cls(ClipEncoder(model, load_pretrained(AutoTokenizer, tokenizer), processor))

    @classmethod
    def blueprint(cls, checkpoint: str, *, tokenizer: str) -> Hpsv2Reward:
        """A reward of the right sizes whose weights mean nothing; those of the release where the file is not here.

        Raises:
            CheckpointError: a file of another layout.
        """
        from transformers import CLIPConfig, CLIPModel

        what = f"HPSv2 checkpoint {checkpoint}"
        found = shapes_in("HPSv2 checkpoint", checkpoint)
        config = CLIPConfig.from_dict(CLIP_H) if found is None else _infer_config(what, without_prefix(what, found))
        processor = ImageProcessor(long_side=int(config.vision_config.image_size))
        return cls(ClipEncoder(CLIPModel(config), cast(Any, BlankTokenizer()), processor))

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        return self.encoder.compare_prompt(pixels_B3HW, examples)


def load_hpsv2(checkpoint: str) -> CLIPModel:
    """Read a CLIP of open_clip's names with 16 heads, from a torch file (under `state_dict` or not) or safetensors.

    Raises:
        CheckpointError: the file is missing, damaged or holds code, or a tensor is missing, of a wrong shape or not
            finite.
    """
    from transformers import CLIPModel

    found, _ = read_tensors("HPSv2 checkpoint", checkpoint, under="state_dict")
    what = f"HPSv2 checkpoint {checkpoint}"
    tensors = without_prefix(what, found)
    config = _infer_config(what, tensors)
    return model_from(CLIPModel, config, _renamed(tensors), what)


def _infer_config(what: str, tensors: Mapping[str, Tensor]) -> CLIPConfig:
    from transformers import CLIPConfig

    width, _, patch_size, _ = size_of(what, tensors, "visual.conv1.weight", 4, "a CLIP of open_clip")
    positions, _ = size_of(what, tensors, "visual.positional_embedding", 2)
    vocabulary, text_width = size_of(what, tensors, "token_embedding.weight", 2)
    max_tokens, _ = size_of(what, tensors, "positional_embedding", 2)
    _, projection = size_of(what, tensors, "text_projection", 2)
    towers = {
        "visual.transformer": {"hidden_size": width, "image_size": math.isqrt(positions - 1) * patch_size},
        "transformer": {"hidden_size": text_width, "max_position_embeddings": max_tokens, "vocab_size": vocabulary},
    }
    for name, sizes in towers.items():
        if sizes["hidden_size"] % HEADS:
            raise CheckpointError(
                f"{what}: width {sizes['hidden_size']} of '{name}' cannot be split into {HEADS} heads"
            )
        blocks = {key.split(f"{name}.resblocks.")[1].split(".")[0] for key in tensors if key.startswith(f"{name}.res")}
        hidden, _ = size_of(what, tensors, f"{name}.resblocks.0.mlp.c_fc.weight", 2)
        sizes |= {
            "num_hidden_layers": len(blocks),
            "num_attention_heads": HEADS,
            "intermediate_size": hidden,
            "projection_dim": projection,
        }
    common = {"hidden_act": "gelu", "layer_norm_eps": 1e-5}
    vision, text = towers.values()
    return CLIPConfig(
        vision_config={**vision, **common, "patch_size": patch_size},
        # The 2 makes transformers take the token of the highest number for the end of the text, as open_clip does.
        text_config={**text, **common, "eos_token_id": 2, "bos_token_id": None, "pad_token_id": None},
        projection_dim=projection,
    )


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From open_clip's names to those of transformers; fused rows [q; k; v] are split, projections transposed."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in _TRANSPOSED:
            renamed[_TRANSPOSED[name]] = tensor.T.contiguous()
            continue
        new = next((new + name.removeprefix(old) for old, new in _NAMES if name.startswith(old)), name)
        for old, other in _WITHIN.items():
            new = new.replace(old, other)
        if fused := re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", new):
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{fused[1]}.self_attn.{part}_proj.{fused[2]}"] = rows.clone()
        else:
            renamed[new] = tensor
    return renamed
