"""Which tensor of the official checkpoints is which parameter of diffusers' models: tables, no files.

An entry names one official tensor and the one or more parameters that its rows become, in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rewardgen.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Entry:
    """One official tensor.

    Args:
        official: its key in the official file.
        names: the parameters its rows are split onto.
        swap_halves: the two halves of the rows change places (official [shift, scale], diffusers [scale, shift]).
        pointwise: official 1x1 convolution [out, in, 1, 1], here a linear layer [out, in].
        shared: the names are one and the same parameter; nothing is split.
    """

    official: str
    names: tuple[str, ...]
    swap_halves: bool = False
    pointwise: bool = False
    shared: bool = False


def swap_halves(tensor: Tensor) -> Tensor:
    """Exchange the upper and the lower half of the rows."""
    first, second = tensor.chunk(2, dim=0)
    return torch.cat([second, first])


def from_official(
    entries: list[Entry], tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], source: str
) -> dict[str, Tensor]:
    """Official tensors -> parameters by name, every key and shape accounted for.

    Raises:
        CheckpointError: a tensor is missing, extra or of another shape; the message names it and `source`.
    """
    expected = {entry.official for entry in entries}
    if missing := sorted(expected - tensors.keys()):
        raise CheckpointError(f"{source}: tensor '{missing[0]}' is missing ({len(missing)} missing in all)")
    if extra := sorted(tensors.keys() - expected):
        raise CheckpointError(f"{source}: unexpected tensor '{extra[0]}' ({len(extra)} unexpected in all)")
    state: dict[str, Tensor] = {}
    for entry in entries:
        tensor = tensors[entry.official]
        rows = [shapes[name][0] for name in entry.names[: 1 if entry.shared else None]]
        wanted = (sum(rows), *shapes[entry.names[0]][1:], *((1, 1) if entry.pointwise else ()))
        if tuple(tensor.shape) != wanted:
            raise CheckpointError(
                f"{source}: tensor '{entry.official}' has shape {tuple(tensor.shape)}; this model needs {wanted}"
            )
        if entry.pointwise:
            tensor = tensor[..., 0, 0]
        if entry.swap_halves:
            tensor = swap_halves(tensor)
        parts = [tensor] * len(entry.names) if entry.shared else torch.split(tensor, rows)
        state.update(zip(entry.names, parts, strict=True))
    return state


def to_official(entries: list[Entry], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_official`; every tensor is a contiguous copy of its own on the CPU.

    Raises:
        CheckpointError: parameters that the official layout stores once are not one tensor here.
    """
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        parts = [state[name].detach() for name in entry.names]
        if entry.shared:
            if any(part.data_ptr() != parts[0].data_ptr() for part in parts):
                raise CheckpointError(f"'{entry.official}' is stored once, but its parameters here are not shared")
            parts = parts[:1]
        tensor = torch.cat(parts)
        if entry.swap_halves:
            tensor = swap_halves(tensor)
        tensors[entry.official] = (tensor[..., None, None] if entry.pointwise else tensor).to("cpu", copy=True)
    return tensors


def _with_bias(official: str, *names: str, swap: bool = False, pointwise: bool = False) -> Iterator[Entry]:
    for kind in ("weight", "bias"):
        yield Entry(
            f"{official}.{kind}", tuple(f"{name}.{kind}" for name in names), swap, pointwise and kind == "weight"
        )


def flux_entries(depth: int, single_depth: int, guidance: bool) -> list[Entry]:
    """FLUX.1's own DiT keys onto `FluxTransformer2DModel`."""
    entries: list[Entry] = []
    embedders = {"time_in": "timestep_embedder", "vector_in": "text_embedder"}
    if guidance:
        embedders["guidance_in"] = "guidance_embedder"
    for official, name in embedders.items():
        entries += _with_bias(f"{official}.in_layer", f"time_text_embed.{name}.linear_1")
        entries += _with_bias(f"{official}.out_layer", f"time_text_embed.{name}.linear_2")
    entries += _with_bias("img_in", "x_embedder")
    entries += _with_bias("txt_in", "context_embedder")
    entries += _with_bias("final_layer.linear", "proj_out")
    entries += _with_bias("final_layer.adaLN_modulation.1", "norm_out.linear", swap=True)
    streams = (
        ("img", "", "to_{}", "norm_{}", "to_out.0"),
        ("txt", "_context", "add_{}_proj", "norm_added_{}", "to_add_out"),
    )
    for index in range(depth):
        here, there = f"double_blocks.{index}", f"transformer_blocks.{index}"
        for stream, suffix, qkv, norm, out in streams:
            projections = [f"{there}.attn.{qkv.format(letter)}" for letter in "qkv"]
            entries += _with_bias(f"{here}.{stream}_attn.qkv", *projections)
            entries += _with_bias(f"{here}.{stream}_attn.proj", f"{there}.attn.{out}")
            entries += _with_bias(f"{here}.{stream}_mod.lin", f"{there}.norm1{suffix}.linear")
            entries += _with_bias(f"{here}.{stream}_mlp.0", f"{there}.ff{suffix}.net.0.proj")
            entries += _with_bias(f"{here}.{stream}_mlp.2", f"{there}.ff{suffix}.net.2")
            for kind in ("query", "key"):
                name = f"{there}.attn.{norm.format(kind[0])}.weight"
                entries.append(Entry(f"{here}.{stream}_attn.norm.{kind}_norm.scale", (name,)))
    for index in range(single_depth):
        here, there = f"single_blocks.{index}", f"single_transformer_blocks.{index}"
        projections = [f"{there}.attn.to_{letter}" for letter in "qkv"]
        entries += _with_bias(f"{here}.linear1", *projections, f"{there}.proj_mlp")
        entries += _with_bias(f"{here}.linear2", f"{there}.proj_out")
        entries += _with_bias(f"{here}.modulation.lin", f"{there}.norm.linear")
        for kind in ("query", "key"):
            entries.append(Entry(f"{here}.norm.{kind}_norm.scale", (f"{there}.attn.norm_{kind[0]}.weight",)))
    return entries


def lora_entries(depth: int, single_depth: int, adapter: str) -> list[Entry]:
    """LoRA keys of USO, UNO and UMO (XLabs' format) onto peft parameters; q, k and v share one `down`."""
    entries: list[Entry] = []

    def add(official: str, *modules: str) -> None:
        downs = tuple(f"{module}.lora_A.{adapter}.weight" for module in modules)
        ups = tuple(f"{module}.lora_B.{adapter}.weight" for module in modules)
        entries.append(Entry(f"{official}.down.weight", downs, shared=len(modules) > 1))
        entries.append(Entry(f"{official}.up.weight", ups))

    for index in range(depth):
        here, attn = f"double_blocks.{index}.processor", f"transformer_blocks.{index}.attn"
        add(f"{here}.qkv_lora1", *(f"{attn}.to_{letter}" for letter in "qkv"))
        add(f"{here}.proj_lora1", f"{attn}.to_out.0")
        add(f"{here}.qkv_lora2", *(f"{attn}.add_{letter}_proj" for letter in "qkv"))
        add(f"{here}.proj_lora2", f"{attn}.to_add_out")
    for index in range(single_depth):
        here, block = f"single_blocks.{index}.processor", f"single_transformer_blocks.{index}"
        add(f"{here}.qkv_lora", *(f"{block}.attn.to_{letter}" for letter in "qkv"))
        add(f"{here}.proj_lora", f"{block}.proj_out")
    return entries


def vae_entries(levels: int, layers_per_level: int) -> list[Entry]:
    """The autoencoder's own keys onto `AutoencoderKL`, without the two quantisation convolutions FLUX lacks."""
    entries: list[Entry] = []

    def resnet(official: str, name: str) -> None:
        for layer in ("norm1", "conv1", "norm2", "conv2"):
            entries.extend(_with_bias(f"{official}.{layer}", f"{name}.{layer}"))
        entries.extend(_with_bias(f"{official}.nin_shortcut", f"{name}.conv_shortcut"))

    for side, outer in (("encoder", "down"), ("decoder", "up")):
        for layer, name in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")):
            entries += _with_bias(f"{side}.{layer}", f"{side}.{name}")
        for index in range(2):
            resnet(f"{side}.mid.block_{index + 1}", f"{side}.mid_block.resnets.{index}")
        attention = f"{side}.mid_block.attentions.0"
        entries += _with_bias(f"{side}.mid.attn_1.norm", f"{attention}.group_norm")
        for official, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            entries += _with_bias(f"{side}.mid.attn_1.{official}", f"{attention}.{name}", pointwise=True)
        for level in range(levels):
            # Officially up.0 is the highest resolution; diffusers counts from the lowest.
            block = f"{side}.{outer}_blocks.{level if outer == 'down' else levels - 1 - level}"
            for index in range(layers_per_level + (outer == "up")):
                resnet(f"{side}.{outer}.{level}.block.{index}", f"{block}.resnets.{index}")
            entries += _with_bias(f"{side}.{outer}.{level}.{outer}sample.conv", f"{block}.{outer}samplers.0.conv")
    return entries
