"""What a run trained in the file formats that others read: USO's own, PEFT's and diffusers'.

It works on tensors by parameter name, as checkpoints hold them; no base weights are read. USO's LoRA (XLabs' layout)
stands on the attention of every block: on q, k, v and the output of both streams of a double block, and on q, k, v and
`linear2` (diffusers' `proj_out`) of a single block. q, k and v of a stream have one common `down` of rank r and one
fused `up`, its rows in the order q, k, v. There is no alpha, so that `W + up @ down` is the whole of it:

| format | file | q, k and v | scale |
|---|---|---|---|
| uso, uno | dit_lora.safetensors | one `qkv_lora.down` [r, in], one `qkv_lora.up` [3 out, r] | 1, implied |
| peft | adapter_model.safetensors | a copy of `down` for each, `up` cut in three | lora_alpha / r = r / r |
| diffusers | pytorch_lora_weights.safetensors | the same, under other keys | 1, implied by the absence of alphas |

"uno" is the same file under the name of UNO and UMO, whose releases have no style projector. All keep the rank r and
every bit of the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rewardgen.errors import CheckpointError, ConfigError, nearest
from rewardgen.policies.layouts import Entry, lora_entries, to_official
from rewardgen.policies.official import LORA_ADAPTER, LORA_TARGETS, PROJECTOR_PREFIX, write_tensors
from rewardgen.policies.reading import count

LORA_FILES: Mapping[str, str] = {
    "uso": "dit_lora.safetensors",
    "uno": "dit_lora.safetensors",
    "peft": "adapter_model.safetensors",
    "diffusers": "pytorch_lora_weights.safetensors",
}
"""The LoRA's file in each format."""
PROJECTOR_FILE = "projector.safetensors"
_TRANSFORMER, _PROJECTOR = "transformer.", "projector."
_PREFIXES = {"peft": "base_model.model.", "diffusers": "transformer."}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """The trained tensors of a USO or UNO policy.

    Args:
        lora: LoRA parameters by their name within the transformer; a shared one under each of its names.
        entries: which official tensor they make.
        projector: parameters of the style projector by their name within it.
        others: names of all further trained tensors, which none of the formats can hold.
    """

    lora: Mapping[str, Tensor]
    entries: list[Entry]
    projector: Mapping[str, Tensor]
    others: tuple[str, ...]

    @property
    def rank(self) -> int | None:
        """The LoRA's rank, None where none was trained."""
        return next((tensor.shape[0] for name, tensor in self.lora.items() if ".lora_A." in name), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """What was written: files by part, the LoRA's rank (None without one), and what a reader must be told."""

    files: Mapping[str, Path]
    rank: int | None
    notes: tuple[str, ...]


def sort_tensors(tensors: Mapping[str, Tensor], source: str) -> Trained:
    """Tell the parts apart by the parameter names of `FluxPolicy`; `source` is named in messages.

    Raises:
        CheckpointError: neither a LoRA nor a projector is among them, or the LoRA is not whole.
    """
    lora: dict[str, Tensor] = {}
    projector: dict[str, Tensor] = {}
    others = []
    for name, tensor in tensors.items():
        if name.startswith(_TRANSFORMER) and (".lora_A." in name or ".lora_B." in name):
            lora[name.removeprefix(_TRANSFORMER)] = tensor
        elif name.startswith(_PROJECTOR):
            projector[name.removeprefix(_PROJECTOR)] = tensor
        else:
            others.append(name)
    if not lora and not projector:
        raise CheckpointError(
            f"{source}: neither a LoRA nor a style projector was trained there, only {_list(others)}: nothing to export"
        )
    entries = _entries(lora) if lora else []
    return Trained(lora=_whole(lora, entries, source), entries=entries, projector=projector, others=tuple(others))


def write_export(
    tensors: Mapping[str, Tensor],
    file_format: str,
    folder: Path,
    *,
    source: str,
    base: str | None = None,
    takes_styles: bool = True,
) -> Export:
    """Write trained tensors into a folder. Each file is a contiguous copy on the CPU, in the precision trained in.

    The style projector goes beside the LoRA in USO's format, the only one that has a place for it.

    Args:
        tensors: by parameter name of `FluxPolicy`, a shared one under its first name at least.
        file_format: "uso", "uno", "peft" or "diffusers".
        source: where the tensors come from, for messages.
        base: hub id of the base model, for PEFT's configuration.
        takes_styles: whether the policy takes style pictures; UNO does not.

    Raises:
        ConfigError: no such format.
        CheckpointError: there is nothing that the format can hold, or it cannot be written.
    """
    if file_format not in LORA_FILES:
        guess = nearest(file_format, LORA_FILES) or f" There are: {', '.join(LORA_FILES)}."
        raise ConfigError(f"there is no format '{file_format}'.{guess}")
    trained = sort_tensors(tensors, source)
    if not trained.lora and file_format != "uso":
        raise CheckpointError(
            f"{source}: no LoRA was trained there, only a style projector, which {file_format} cannot hold;"
            " use --format uso"
        )
    files: dict[str, Path] = {}
    if trained.lora:
        path = folder / LORA_FILES[file_format]
        files["lora"] = write_tensors(_lora_tensors(trained, file_format), path)
    if file_format == "peft":
        files["configuration"] = _write_peft_config(trained, base, folder / "adapter_config.json")
    if trained.projector:
        official = {PROJECTOR_PREFIX + name: _copy(tensor) for name, tensor in trained.projector.items()}
        files["projector"] = write_tensors(official, folder / PROJECTOR_FILE)
    return Export(files=files, rank=trained.rank, notes=tuple(_notes(trained, file_format, takes_styles)))


def _entries(lora: Mapping[str, Tensor]) -> list[Entry]:
    """The official tensors of a LoRA; the blocks are counted by its names."""
    depth, single_depth = (
        count(lora, rf"{blocks}\.(\d+)\.") for blocks in ("transformer_blocks", "single_transformer_blocks")
    )
    return lora_entries(depth, single_depth, LORA_ADAPTER)


def _whole(lora: Mapping[str, Tensor], entries: list[Entry], source: str) -> dict[str, Tensor]:
    """The LoRA with shared tensors under all their names, each name accounted for."""
    full = dict(lora)
    for entry in entries:
        if entry.shared:
            for name in entry.names[1:]:
                # Checkpoints hold a shared tensor once, under its first name.
                if name not in full and entry.names[0] in full:
                    full[name] = full[entry.names[0]]
    expected = {name for entry in entries for name in entry.names}
    if wrong := sorted(expected ^ full.keys()):
        fault = "is missing" if wrong[0] in expected else "has no place in USO's layout"
        raise CheckpointError(f"{source}: the LoRA cannot be exported: its tensor '{wrong[0]}' {fault}")
    return full


def _lora_tensors(trained: Trained, file_format: str) -> dict[str, Tensor]:
    if file_format in ("uso", "uno"):
        return to_official(trained.entries, trained.lora)
    # PEFT's own names, less the adapter's; diffusers has taken them over under the pipeline's name for the model.
    prefix = _PREFIXES[file_format]
    return {prefix + name.replace(f".{LORA_ADAPTER}.", "."): _copy(tensor) for name, tensor in trained.lora.items()}


def _write_peft_config(trained: Trained, base: str | None, path: Path) -> Path:
    """Only what defines this LoRA; PEFT fills in the rest, in every version."""
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": trained.rank,
        "lora_alpha": trained.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": LORA_TARGETS,
    }
    try:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path


def _notes(trained: Trained, file_format: str, takes_styles: bool) -> list[str]:
    notes = []
    if trained.projector and file_format != "uso":
        notes.append(
            f"the trained style projector lies in {PROJECTOR_FILE} under USO's keys: {file_format} has no place for it,"
            " and what loads only the LoRA takes no style pictures"
        )
    if not trained.projector and takes_styles:
        notes.append("the style projector was not trained: style pictures need the one that the run began with")
    if not trained.lora:
        notes.append("no LoRA was trained: the policy also needs the one that the run began with, if any")
    if trained.others:
        notes.append(
            f"the run also trained {_list(trained.others)}, which this export does not hold:"
            " without them it is another model"
        )
    return notes


def _list(names: list[str] | tuple[str, ...]) -> str:
    rest = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
    return f"'{names[0]}'{rest}" if names else "nothing"


def _copy(tensor: Tensor) -> Tensor:
    """A copy of its own: safetensors refuses tensors that share memory."""
    return tensor.detach().to("cpu", copy=True).contiguous()
