"""The trained parts of a USO policy: which parameters they are, and how they are written."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import nn

from rewardgen.policies import official
from rewardgen.policies.projector import StyleProjector

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

Part = Literal["lora", "projector", "transformer"]


def require_gradients(
    policy: nn.Module,
    transformer: FluxTransformer2DModel,
    projector: StyleProjector | None,
    trained: Collection[Part],
) -> None:
    """Let exactly the parameters of the `trained` parts of a policy require gradients."""
    policy.requires_grad_(False)
    lora = official.lora_parameters(transformer).values()
    if "transformer" in trained:
        transformer.requires_grad_(True)
    for parameter in lora:
        parameter.requires_grad_("lora" in trained)
    if "projector" in trained and projector is not None:
        projector.requires_grad_(True)


def save_trained(
    transformer: FluxTransformer2DModel, projector: StyleProjector | None, trained: Collection[Part], folder: Path
) -> Mapping[str, Path]:
    """Write the `trained` parts: `dit_lora.safetensors` and `projector.safetensors` under the official keys, and the
    base weights as a diffusers folder `transformer/`. Returns what was written."""
    written: dict[str, Path] = {}
    if "lora" in trained:
        written["lora"] = official.write_tensors(official.export_lora(transformer), folder / "dit_lora.safetensors")
    if "projector" in trained and projector is not None:
        tensors = official.export_projector(projector)
        written["projector"] = official.write_tensors(tensors, folder / "projector.safetensors")
    if "transformer" in trained:
        written["transformer"] = official.save_transformer(transformer, folder / "transformer")
    return written
