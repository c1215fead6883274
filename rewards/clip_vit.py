"""CLIP's visual transformer (Radford et al., arXiv 2103.00020) with the parameter names of the OpenAI release.

Written out rather than taken from a library: the CSD checkpoint uses these names, and one attention path in every
mode keeps values with and without gradient equal. Suffixes: B batch, N tokens, D width, K heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ClipVit(nn.Module):
    """Pictures [B, 3, S, S], normalised with CLIP's mean and deviation, to `ln_post` of the class token, [B, width].

    Without CLIP's projection into the space shared with text.

    Args:
        image_size: side S in pixels, a multiple of `patch_size`.
        patch_size: side of a patch in pixels.
        width: channels of a token, a multiple of `heads`.
        layers: number of transformer blocks.
        heads: attention heads.
    """

    def __init__(self, *, image_size: int, patch_size: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        if image_size % patch_size or width % heads:
            raise ValueError(
                f"image_size {image_size} must be a multiple of patch_size {patch_size}, width {width} of heads {heads}"
            )
        num_tokens = (image_size // patch_size) ** 2 + 1
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(num_tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = _Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)

    def forward(self, images_B3SS: Tensor) -> Tensor:
        patches_BND = self.conv1(images_B3SS).flatten(2).transpose(1, 2)
        class_B1D = self.class_embedding.expand(len(patches_BND), 1, -1)
        tokens_BND = torch.cat([class_B1D, patches_BND], dim=1) + self.positional_embedding
        tokens_BND = self.transformer(self.ln_pre(tokens_BND))
        feature_BD: Tensor = self.ln_post(tokens_BND[:, 0])
        return feature_BD


class _Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        # CLIP's initialisation: what a block adds to the residual stream shrinks with the depth.
        out_std = width**-0.5 * (2 * layers) ** -0.5
        self.resblocks = nn.ModuleList(_Block(width, heads, out_std) for _ in range(layers))

    def forward(self, tokens_BND: Tensor) -> Tensor:
        for block in self.resblocks:
            tokens_BND = block(tokens_BND)
        return tokens_BND


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, out_std: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = _Attention(width, heads, out_std)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = _Mlp(width, out_std)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        tokens_BND = tokens_BND + self.attn(self.ln_1(tokens_BND))
        summed_BND: Tensor = tokens_BND + self.mlp(self.ln_2(tokens_BND))
        return summed_BND


class _Attention(nn.Module):
    """Self-attention with the parameters of `nn.MultiheadAttention`: fused rows [q; k; v]."""

    def __init__(self, width: int, heads: int, out_std: float) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(width**-0.5 * torch.randn(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.normal_(self.out_proj.weight, std=out_std)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        batch, num_tokens, _ = tokens_BND.shape
        qkv = F.linear(tokens_BND, self.in_proj_weight, self.in_proj_bias)
        qkv = qkv.view(batch, num_tokens, 3, self.heads, -1)
        q_BKNd, k_BKNd, v_BKNd = qkv.permute(2, 0, 3, 1, 4)
        mixed_BKNd = F.scaled_dot_product_attention(q_BKNd, k_BKNd, v_BKNd)
        mixed_BND: Tensor = self.out_proj(mixed_BKNd.transpose(1, 2).flatten(2))
        return mixed_BND


class _Mlp(nn.Module):
    def __init__(self, width: int, out_std: float) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)
        nn.init.normal_(self.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(self.c_proj.weight, std=out_std)
        nn.init.zeros_(self.c_fc.bias)
        nn.init.zeros_(self.c_proj.bias)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        hidden: Tensor = self.c_fc(tokens_BND)
        # OpenAI's models were trained with this approximation of GELU; the exact one changes their outputs.
        mixed_BND: Tensor = self.c_proj(hidden * torch.sigmoid(1.702 * hidden))
        return mixed_BND
