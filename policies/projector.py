"""USO's hierarchical style projector: from three SigLIP layers to style tokens for the DiT.

Shape suffixes: S style images, V SigLIP tokens, D SigLIP width, K style tokens per level, H width of the DiT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rewardgen.errors import CheckpointError

LEVELS: Mapping[str, int] = {"high": -2, "mid": -11, "low": -20}
"""Which entry of SigLIP's list of hidden states (embeddings first) each level reads; in the order of the tokens."""


def select_levels(hidden_states: Sequence[Tensor] | Tensor) -> Tensor:
    """SigLIP's hidden states, each [S, V, D] -> the three levels [S, 3, V, D].

    Raises:
        CheckpointError: the encoder has too few layers to have them all.
    """
    deepest = -min(LEVELS.values())
    if len(hidden_states) < deepest:
        raise CheckpointError(
            f"the style projector reads hidden state {-deepest}, but this SigLIP gives only {len(hidden_states)}: "
            f"it needs at least {deepest} layers"
        )
    return torch.stack([hidden_states[index] for index in LEVELS.values()], dim=1)


class StyleProjector(nn.Module):
    """Per level: Linear over the tokens (V -> K) and SiLU, LayerNorm(D), Linear(D -> H); levels are concatenated.

    The parameters carry the official names, less the prefix `feature_embedder.` (USO, section 3.2 and release).

    Args:
        num_tokens: V, 729 in so400m-patch14-384.
        token_dim: D, 1152 there.
        tokens_per_level: K, 64 in the release, hence 192 style tokens per image.
        hidden_size: H, 3072 in FLUX.1.
    """

    def __init__(self, *, num_tokens: int, token_dim: int, tokens_per_level: int, hidden_size: int) -> None:
        super().__init__()
        self.num_tokens, self.token_dim = num_tokens, token_dim
        self.tokens_per_level, self.hidden_size = tokens_per_level, hidden_size
        for level in LEVELS:
            embedding = nn.Sequential(nn.Linear(num_tokens, tokens_per_level), nn.SiLU())
            self.add_module(f"{level}_embedding_linear", embedding)
            self.add_module(f"{level}_layer_norm", nn.LayerNorm(token_dim))
            self.add_module(f"{level}_projection", nn.Linear(token_dim, hidden_size))

    def forward(self, levels_S3VD: Tensor) -> Tensor:
        """SigLIP levels from `select_levels` -> style tokens [S, 3K, H]."""
        tokens = []
        for index, level in enumerate(LEVELS):
            mixed_SDK = self.get_submodule(f"{level}_embedding_linear")(levels_S3VD[:, index].transpose(1, 2))
            normed_SKD = self.get_submodule(f"{level}_layer_norm")(mixed_SDK.transpose(1, 2))
            tokens.append(self.get_submodule(f"{level}_projection")(normed_SKD))
        return torch.cat(tokens, dim=1)
