"""Two witnesses that no objective uses: one for style from pixel statistics, one for content from a reader network.

They judge whether a rise of the reward was honest, so they share nothing with CSD: not its weights, not its
training target, not its features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from rewardgen.reward import Reward
from rewardgen.types import Example, Score
from rewardgen.world.scenes import SHAPES, oklab

VERSION = "1"
PALETTE_APART, TEXTURE_APART = 0.1263, 0.4644
"""Mean distances between pictures of one content in two unrelated styles (`unrelated_distances`, 2,000 pairs)."""


class StyleWitness(Reward):
    """Palette and texture against the true picture: 1 = the same, 0 = as far as an unrelated style.

    Palette is the sliced 1-Wasserstein distance of Oklab pixels, texture the mean distance of log energies of
    oriented luminance bands. Neither looks at where a pixel is, so a misplaced shape costs little.
    Applies to examples with `extras["truth"]`.
    """

    differentiable: ClassVar[bool] = False

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        valid_B = torch.tensor(["truth" in example.extras for example in examples])
        value_B = torch.zeros(len(examples))
        parts = {}
        if bool(valid_B.any()):
            truth = torch.stack([e.extras["truth"] for e in examples if "truth" in e.extras])
            drawn = pixels_B3HW.detach().float().cpu()[valid_B].clamp(0, 1)
            palette, texture = palette_distance(drawn, truth), texture_distance(drawn, truth)
            value_B[valid_B] = 1 - 0.5 * (palette / PALETTE_APART + texture / TEXTURE_APART)
            parts = {"palette_distance": float(palette.mean()), "texture_distance": float(texture.mean())}
        return Score(value_B=value_B, valid_B=valid_B, metrics=parts)


class ContentWitness(Reward):
    """What shape is where: shapes read at the right place over all places where either side has a shape, in [0, 1].

    The reader is a small network over the nine cells, trained on the generator alone. Applies to examples with
    `extras["grid"]`.
    """

    differentiable: ClassVar[bool] = False

    def __init__(self, reader: CellReader | None = None) -> None:
        super().__init__()
        self.reader = reader or load_reader(Path(__file__).parent / "assets" / "reader.safetensors")

    @classmethod
    def blueprint(cls, reader: CellReader | None = None) -> ContentWitness:
        """A witness of the right sizes whose weights mean nothing; no file is read."""
        return cls(reader or CellReader())

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        valid_B = torch.tensor(["grid" in example.extras for example in examples])
        value_B = torch.zeros(len(examples))
        if bool(valid_B.any()):
            truth = torch.stack([e.extras["grid"] for e in examples if "grid" in e.extras])
            with torch.no_grad():
                read = self.reader(pixels_B3HW.detach().float().cpu()[valid_B].clamp(0, 1)).argmax(-1)
            value_B[valid_B] = agreement(read, truth)
        return Score(value_B=value_B, valid_B=valid_B)


class CellReader(nn.Module):
    """Pictures [N, 3, 64, 64] -> logits [N, 9, 7] over (empty, six shapes) of the nine cells."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 24, 3, 2, 1), nn.SiLU(), nn.Conv2d(24, 48, 3, 2, 1), nn.SiLU(), nn.Conv2d(48, 64, 3, 1, 1),
            nn.SiLU(), nn.Flatten(), nn.Linear(64 * 36, 96), nn.SiLU(), nn.Linear(96, 1 + len(SHAPES)),
        )  # fmt: skip

    def forward(self, pixels: Tensor) -> Tensor:
        patches = pixels.unfold(2, 24, 20).unfold(3, 24, 20).permute(0, 2, 3, 1, 4, 5)
        logits: Tensor = self.layers(patches.reshape(-1, 3, 24, 24))
        return logits.view(pixels.shape[0], 9, -1)


def load_reader(path: Path) -> CellReader:
    reader = CellReader()
    reader.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return reader.eval()


def agreement(read_N9: Tensor, truth_N9: Tensor) -> Tensor:
    """Right shapes over cells occupied on either side, [N] in [0, 1]."""
    either = ((read_N9 > 0) | (truth_N9 > 0)).sum(1).clamp(min=1)
    return ((read_N9 == truth_N9) & (truth_N9 > 0)).sum(1) / either


def palette_distance(a_N3HW: Tensor, b_N3HW: Tensor, directions: int = 24) -> Tensor:
    """Sliced 1-Wasserstein distance of Oklab pixels, [N], Oklab units; positions of pixels do not count."""
    rng = torch.Generator().manual_seed(0)
    along_3D = F.normalize(torch.randn(3, directions, generator=rng), dim=0)
    a, b = ((oklab(x.flatten(2).transpose(1, 2)) @ along_3D).sort(dim=1).values for x in (a_N3HW, b_N3HW))
    return (a - b).abs().mean((1, 2))


def texture_distance(a_N3HW: Tensor, b_N3HW: Tensor) -> Tensor:
    """Mean distance of log10 energies in 3 bands x 4 directions of the luminance spectrum, [N]."""
    return (_bands(a_N3HW) - _bands(b_N3HW)).abs().mean(1)


def unrelated_distances(n: int = 2000, seed: int = 5) -> tuple[float, float]:
    """The two constants above: distances between one content in two unrelated styles."""
    from rewardgen.world.scenes import draw_contents, draw_styles, render

    content = draw_contents(n, seed)
    a, b = render(content, draw_styles(n, seed + 1)), render(content, draw_styles(n, seed + 2))
    return float(palette_distance(a, b).mean()), float(texture_distance(a, b).mean())


def _bands(pixels_N3HW: Tensor) -> Tensor:
    """log10 spectral energy [N, 12] of luminance: 3 octaves from period 16 to 2 pixels, 4 directions."""
    side = pixels_N3HW.shape[-1]
    light = oklab(pixels_N3HW.permute(0, 2, 3, 1))[..., 0]
    window = torch.hann_window(side, periodic=False)
    light = (light - light.mean((1, 2), keepdim=True)) * torch.outer(window, window)
    power = torch.fft.fft2(light).abs().square() / side**2
    f = torch.fft.fftfreq(side)
    radius, angle = (
        torch.hypot(f[:, None], f[None]),
        torch.atan2(f[:, None].expand(side, side), f[None].expand(side, side)),
    )
    octave = (torch.log2(radius.clamp(min=1e-6) * 16)).floor()
    sector = ((angle % torch.pi) / (torch.pi / 4) + 0.5).floor() % 4
    masks = torch.stack([((octave == o) & (sector == s)).float() for o in range(3) for s in range(4)])
    return torch.log10(torch.einsum("nhw,mhw->nm", power, masks) / masks.sum((1, 2)) + 1e-4)
