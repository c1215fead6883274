"""Qwen2-VL with HPSv3's head (Ma et al., arXiv 2508.03789): the released file in, and how its weights were taught.

B pictures, T tokens of a text, N patches of all pictures, P values of a patch, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rewardgen.rewards.loading import check_tensors, model_from, read_tensors, size_of
from rewardgen.transfer import to_device

if TYPE_CHECKING:
    from transformers import Qwen2VLModel

_NAMES = (
    ("backbone.visual.", "visual."),
    ("backbone.language_model.", "model."),
    ("head.", "rm_head."),
)
"""Beginnings of our names, and of the file's, which are those of transformers 4.45."""


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
        whole = nn.ModuleDict({"backbone": Qwen2VLModel(config), "head": blank_head(width)})
    names = {_released(name): name for name in whole.state_dict()}
    check_tensors(what, found, {old: tuple(whole.state_dict()[new].shape) for old, new in names.items()})
    parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "head": {}}
    for old, new in names.items():
        part, _, name = new.partition(".")
        parts[part][name] = found.pop(old)
    head = blank_head(width)
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


def blank_head(width: int) -> nn.Sequential:
    """As released; the dropout, which keeps its place among the names, plays no part when scoring."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Identity(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )
