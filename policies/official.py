"""Official checkpoint formats in and out: FLUX.1 transformer and autoencoder, USO/UNO/UMO LoRA, USO style projector.

safetensors only. Sizes come from the tensors. Every tensor is accounted for: one that is missing, extra, of another
shape or not finite is a `CheckpointError` naming the tensor and the file. The formats have no checksum: a changed
value that is still a number is not noticed here; the manifest's SHA-256 tells it.

diffusers and peft take seconds to import, so the functions that make models import them, and checking an experiment
does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from rewardgen.errors import CheckpointError
from rewardgen.policies.layouts import Entry, flux_entries, from_official, lora_entries, to_official, vae_entries
from rewardgen.policies.projector import StyleProjector
from rewardgen.policies.reading import check_values, count, need, read_tensors
from rewardgen.policies.reading import resolve_file as resolve_file

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FluxTransformer2DModel

M = TypeVar("M", bound=nn.Module)

LORA_ADAPTER = "default"
LORA_TARGETS = (
    r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    r"|single_transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v)|proj_out)"
)
PROJECTOR_PREFIX = "feature_embedder."


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    # Not `named_parameters`, which lists a shared parameter once.
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _load(
    module: nn.Module,
    entries: list[Entry],
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Put a file's tensors into a module: into its parameters, or with `dtype` in place of them (of one on `meta`)."""
    state = from_official(entries, tensors, _shapes(module), source)
    for key, tensor in tensors.items():
        check_values(key, tensor, source)
    # Loaded parts are often views of one fused tensor; each gets memory of its own.
    if dtype is None:
        module.load_state_dict(state, strict=False)
    else:
        own = {name: tensor.to(dtype, copy=True).contiguous() for name, tensor in state.items()}
        module.load_state_dict(own, strict=True, assign=True)


def _build(
    make: Callable[[], M],
    entries_of: Callable[[M], list[Entry]],
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    dtype: torch.dtype = torch.float32,
) -> M:
    """A module whose sizes the file tells, with the file's tensors in `dtype`.

    It is made without memory: a damaged file may ask for any size, and is to be told before it gets it. Each tensor is
    copied once, straight into its precision.
    """
    try:
        with torch.device("meta"):
            blank = make()
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: the sizes of its tensors make no model ({error})") from error
    _load(blank, entries_of(blank), tensors, source, dtype=dtype)
    return blank


# -- transformer -------------------------------------------------------------------------------------------------


def load_transformer(
    path: Path, *, axes_dims_rope: tuple[int, int, int] | None = None, dtype: torch.dtype = torch.float32
) -> FluxTransformer2DModel:
    """A FLUX.1 transformer file under its original keys (`flux1-dev.safetensors`) as a diffusers model.

    Args:
        axes_dims_rope: widths of the three rotary axes, the one size that no tensor tells; they sum to a head's width.
            None takes FLUX.1's shares of it: 16, 56 and 56 of 128.
        dtype: precision of the result.
    """
    from diffusers import FluxTransformer2DModel

    source, tensors = str(path), read_tensors(path)
    hidden, in_channels = need(tensors, "img_in.weight", source).shape
    head_dim = need(tensors, "double_blocks.0.img_attn.norm.query_norm.scale", source).shape[0]
    if axes_dims_rope is None:
        axes_dims_rope = (head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16)
    if sum(axes_dims_rope) != head_dim:
        raise CheckpointError(f"{source}: rotary axes {axes_dims_rope} do not sum to the head width {head_dim}")
    mlp_width = need(tensors, "double_blocks.0.img_mlp.0.weight", source).shape[0]
    sizes = {
        "in_channels": in_channels,
        "out_channels": need(tensors, "final_layer.linear.weight", source).shape[0],
        "num_layers": count(tensors, r"double_blocks\.(\d+)\."),
        "num_single_layers": count(tensors, r"single_blocks\.(\d+)\."),
        "attention_head_dim": head_dim,
        "num_attention_heads": hidden // head_dim,
        "joint_attention_dim": need(tensors, "txt_in.weight", source).shape[1],
        "pooled_projection_dim": need(tensors, "vector_in.in_layer.weight", source).shape[1],
        "guidance_embeds": "guidance_in.in_layer.weight" in tensors,
        "axes_dims_rope": tuple(axes_dims_rope),
    }

    def make() -> FluxTransformer2DModel:
        model = FluxTransformer2DModel(**sizes)
        if mlp_width != 4 * hidden:
            _resize_mlp(model, hidden, mlp_width)
        return model

    return _build(make, _transformer_entries, tensors, source, dtype=dtype).eval()


def _resize_mlp(model: FluxTransformer2DModel, hidden: int, mlp_width: int) -> None:
    """Give the blocks another MLP width: diffusers knows only the ratio 4 of FLUX.1."""
    for block in model.transformer_blocks:
        for feed_forward in (block.ff, block.ff_context):
            feed_forward.net[0].proj = nn.Linear(hidden, mlp_width)
            feed_forward.net[2] = nn.Linear(mlp_width, hidden)
    for block in model.single_transformer_blocks:
        block.proj_mlp = nn.Linear(hidden, mlp_width)
        block.proj_out = nn.Linear(hidden + mlp_width, hidden)


def _transformer_entries(model: FluxTransformer2DModel) -> list[Entry]:
    config = model.config
    return flux_entries(config.num_layers, config.num_single_layers, config.guidance_embeds)


def plain_state(model: FluxTransformer2DModel) -> dict[str, Tensor]:
    """The base weights under their plain names, whether or not a LoRA is injected."""
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_A." not in name and ".lora_B." not in name
    }


def export_transformer(model: FluxTransformer2DModel) -> dict[str, Tensor]:
    """The base weights of a transformer under FLUX.1's original keys."""
    return to_official(_transformer_entries(model), plain_state(model))


def save_transformer(model: FluxTransformer2DModel, folder: Path) -> Path:
    """The base weights as a folder in diffusers' layout, without a LoRA that may be injected; returns the folder."""
    with torch.device("meta"):
        plain = type(model).from_config(model.config)
    plain.load_state_dict(plain_state(model), assign=True)
    plain.save_pretrained(folder)
    return folder


# -- autoencoder -------------------------------------------------------------------------------------------------


def load_vae(
    path: Path, *, scaling_factor: float = 0.3611, shift_factor: float = 0.1159, dtype: torch.dtype = torch.float32
) -> AutoencoderKL:
    """A FLUX.1 autoencoder file under its original keys (`ae.safetensors`) as a diffusers model in `dtype`."""
    from diffusers import AutoencoderKL

    source, tensors = str(path), read_tensors(path)
    levels = count(tensors, r"encoder\.down\.(\d+)\.")
    widths = [need(tensors, f"encoder.down.{level}.block.0.conv1.weight", source).shape[0] for level in range(levels)]
    sizes = {
        "in_channels": need(tensors, "encoder.conv_in.weight", source).shape[1],
        "out_channels": need(tensors, "decoder.conv_out.weight", source).shape[0],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(widths),
        "layers_per_block": count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": need(tensors, "decoder.conv_in.weight", source).shape[1],
        "scaling_factor": scaling_factor,
        "shift_factor": shift_factor,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return _build(lambda: AutoencoderKL(**sizes), _vae_entries, tensors, source, dtype=dtype).eval()


def _vae_entries(model: AutoencoderKL) -> list[Entry]:
    names = _shapes(model)
    entries = vae_entries(len(model.config.block_out_channels), model.config.layers_per_block)
    # Levels of equal width have no shortcut, and the last level no resampling.
    return [entry for entry in entries if entry.names[0] in names]


def export_vae(model: AutoencoderKL) -> dict[str, Tensor]:
    """An autoencoder under FLUX.1's original keys."""
    return to_official(_vae_entries(model), model.state_dict())


# -- LoRA --------------------------------------------------------------------------------------------------------


def _lora_entries(transformer: FluxTransformer2DModel) -> list[Entry]:
    return lora_entries(transformer.config.num_layers, transformer.config.num_single_layers, LORA_ADAPTER)


def add_lora(transformer: FluxTransformer2DModel, rank: int) -> None:
    """Inject a fresh LoRA into every block: float32, frozen until asked for, scale 1 as released (no alpha).

    The q, k and v of a stream share one `down` module, as the official fused qkv LoRA does, so that what is trained
    exports at its own rank.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS, init_lora_weights=True)
    inject_adapter_in_model(config, transformer, adapter_name=LORA_ADAPTER)
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        attn = block.attn
        attn.to_k.lora_A = attn.to_v.lora_A = attn.to_q.lora_A
        if hasattr(attn, "add_q_proj"):
            attn.add_k_proj.lora_A = attn.add_v_proj.lora_A = attn.add_q_proj.lora_A
    for parameter in lora_parameters(transformer).values():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.float()


def has_lora(transformer: FluxTransformer2DModel) -> bool:
    return bool(lora_parameters(transformer))


def lora_parameters(transformer: FluxTransformer2DModel) -> dict[str, nn.Parameter]:
    """The LoRA's parameters by name, a shared one once."""
    return {
        name: parameter
        for name, parameter in transformer.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


def lora_rank(tensors: Mapping[str, Tensor], source: str) -> int:
    """The rank of an official LoRA file."""
    return int(need(tensors, "double_blocks.0.processor.qkv_lora1.down.weight", source).shape[0])


def load_lora(transformer: FluxTransformer2DModel, path: Path, *, rank: int | None = None) -> None:
    """Put an official LoRA file into a transformer, injecting a LoRA of its rank where there is none yet.

    Raises:
        CheckpointError: the file is not a LoRA for this transformer, or not of the `rank` that was asked for.
    """
    source, tensors = str(path), read_tensors(path)
    found = lora_rank(tensors, source)
    if rank not in (None, found):
        raise CheckpointError(f"{source}: a LoRA of rank {found}, but rank {rank} was asked for")
    if not has_lora(transformer):
        add_lora(transformer, found)
    _load(transformer, _lora_entries(transformer), tensors, source)


def export_lora(transformer: FluxTransformer2DModel) -> dict[str, Tensor]:
    """The LoRA under its official keys and at its own rank."""
    return to_official(_lora_entries(transformer), transformer.state_dict())


# -- style projector ---------------------------------------------------------------------------------------------


def load_projector(path: Path) -> StyleProjector:
    """A style projector file under its official keys, float32."""
    source = str(path)
    tensors = read_tensors(path)
    tokens_per_level, num_tokens = need(tensors, f"{PROJECTOR_PREFIX}high_embedding_linear.0.weight", source).shape
    hidden_size, token_dim = need(tensors, f"{PROJECTOR_PREFIX}high_projection.weight", source).shape

    def make() -> StyleProjector:
        return StyleProjector(
            num_tokens=num_tokens, token_dim=token_dim, tokens_per_level=tokens_per_level, hidden_size=hidden_size
        )

    return _build(make, _projector_entries, tensors, source)


def _projector_entries(projector: StyleProjector) -> list[Entry]:
    return [Entry(PROJECTOR_PREFIX + name, (name,)) for name in projector.state_dict()]


def export_projector(projector: StyleProjector) -> dict[str, Tensor]:
    """A style projector under its official keys."""
    return to_official(_projector_entries(projector), projector.state_dict())


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> Path:
    """Save as safetensors, making the folder; returns the path. Raises CheckpointError where that is impossible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), path)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CheckpointError(f"{path}: cannot be written: {reason}") from error
    return path
