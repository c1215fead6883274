"""`rewardgen export`: what a run trained, in files that others load."""

from __future__ import annotations

import hashlib
import importlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import rewardgen
from rewardgen import sources, strict_yaml
from rewardgen.checkpoint import STATE, latest_checkpoint, load_checkpoint
from rewardgen.errors import CheckpointError, ConfigError, nearest
from rewardgen.run_folder import CONFIG

CARD = "README.md"
WEIGHTS = {"ema": "average/", "trained": "trainable/"}
"""Prefix of the tensors of a checkpoint (`rewardgen.optimizer`)."""
_WRITING = ".writing"
_FLUX_DEV = "black-forest-labs/FLUX.1-dev"
_FLUX_DEV_LICENCE = (
    "FLUX.1-dev is under the FLUX.1 [dev] Non-Commercial License, whose terms also cover derivatives of the model"
)
_UNSHARED = {"world": "rewardgen's bundled tiny world", "": "unknown"}
_USE = {
    "uso": ["USO's own file format. In an experiment of rewardgen: `policy.args.lora` and `policy.args.projector`."],
    "peft": [
        "```python",
        'transformer = FluxTransformer2DModel.from_pretrained(base, subfolder="transformer")',
        "model = peft.PeftModel.from_pretrained(transformer, folder)",
        "```",
    ],
    "diffusers": [
        "```python",
        "pipeline = FluxPipeline.from_pretrained(base)",
        'pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")',
        "```",
    ],
}
"""How each format is loaded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where exported tensors come from.

    Args:
        weights: "ema" or "trained".
        step: completed training steps, None where the checkpoint does not say.
        config: the run's resolved experiment; empty where the checkpoint lies outside of its run.
        config_sha256: of that file.
    """

    weights: str
    step: int | None
    config: Mapping[str, Any]
    config_sha256: str | None

    @property
    def base(self) -> str | None:
        """The base model as the experiment names it."""
        base = self.config.get("policy", {}).get("args", {}).get("base")
        return base if isinstance(base, str) else None

    @property
    def hub_base(self) -> str | None:
        """The base model where it is a hub id: a path of this machine says nothing elsewhere."""
        found = next(sources.find_sources(self.base, "policy.args.base"), None)
        return self.base if found is not None and found.kind == "hub repository" else None

    def describe(self) -> str:
        """The kind of weights and their step, in words."""
        kind = {"ema": "averaged weights (EMA)", "trained": "trained weights"}[self.weights]
        return kind if self.step is None else f"{kind} after step {self.step}"


def export(source: Path, *, file_format: str, output: Path, weights: str | None = None) -> None:
    """Write the trained LoRA and style projector of a checkpoint, and a model card; print what was written.

    Args:
        source: a run's folder, whose latest whole checkpoint is taken, or the folder of one checkpoint.
        file_format: "uso", "peft" or "diffusers", see `rewardgen.policies.exports`.
        output: folder that does not exist yet or is empty.
        weights: "ema" (the averaged weights) or "trained"; None takes the average where the run kept one.

    Raises:
        UserError: no checkpoint there, nothing in it that the format holds, or `output` cannot be written. Then
            nothing is left in `output`.
    """
    _require_empty(output)
    # Policies are reached by name. No model is made: the tensors' names tell the parts.
    exports: Any = importlib.import_module("rewardgen.policies.exports")
    checkpoint = find_checkpoint(source)
    tensors, origin = read_origin(checkpoint, weights)
    with _filled(output) as folder:
        made = exports.write_export(tensors, file_format, folder, source=str(checkpoint), base=origin.hub_base)
        (folder / CARD).write_text(_card(file_format, made, origin), encoding="utf-8")
    print(f"{checkpoint}: {origin.describe()}")
    for part, path in made.files.items():
        print(f"  {part}: {output / path.name}")
    for note in made.notes:
        print(f"note: {note}")


def find_checkpoint(source: Path) -> Path:
    """The checkpoint folder meant by a run's folder, its folder of checkpoints, or a checkpoint.

    Raises:
        CheckpointError: it is none of them, or none of the run's checkpoints is whole.
    """
    if not source.is_dir():
        fault = "is a file" if source.exists() else "there is no such folder"
        raise CheckpointError(f"{source}: {fault}; name a run's folder or one of its checkpoints")
    if (source / STATE).is_file():
        return source
    for folder in (source / "checkpoints", source):
        if any(folder.glob("step-*")):
            found = latest_checkpoint(folder)
            if found is None:
                raise CheckpointError(f"{folder}: none of the checkpoints is whole")
            return found
    raise CheckpointError(f"{source}: neither a run's folder nor a checkpoint: no '{STATE}' and no checkpoints/ in it")


def read_origin(checkpoint: Path, weights: str | None) -> tuple[dict[str, Tensor], Origin]:
    """The chosen weights of a checkpoint by parameter name, and where they come from.

    Raises:
        CheckpointError: the checkpoint is damaged or not of a training run.
        ConfigError: no such kind of weights, or the run kept no average.
    """
    if weights is not None and weights not in WEIGHTS:
        guess = nearest(weights, WEIGHTS) or f" There are: {', '.join(WEIGHTS)}."
        raise ConfigError(f"there are no weights '{weights}'.{guess}")
    tensors, state = load_checkpoint(checkpoint)
    has_average = any(name.startswith(WEIGHTS["ema"]) for name in tensors)
    if weights == "ema" and not has_average:
        raise ConfigError(f"{checkpoint}: the run kept no average (train.ema_decay); use --weights trained")
    weights = weights or ("ema" if has_average else "trained")
    prefix = WEIGHTS[weights]
    chosen = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not chosen:
        raise CheckpointError(f"{checkpoint}: not a checkpoint of a training run: it holds no trained weights")
    path = checkpoint.resolve().parent.parent / CONFIG
    known = path.is_file()
    step = state.get("completed_steps")
    return chosen, Origin(
        weights=weights,
        step=step if isinstance(step, int) else None,
        config=strict_yaml.load_file(path)[0] if known else {},
        config_sha256=hashlib.sha256(path.read_bytes()).hexdigest() if known else None,
    )


def _require_empty(output: Path) -> None:
    """Raise ConfigError unless `output` is an empty folder or nothing; what a dead export left does not count."""
    try:
        occupied = any(path.name != _WRITING for path in output.iterdir())
    except FileNotFoundError:
        return
    except NotADirectoryError:
        which = "that" if output.exists() else "a part of that path"
        raise ConfigError(f"--output {output}: {which} is a file; name a new or an empty folder") from None
    except OSError as error:
        raise ConfigError(f"--output {output}: the folder cannot be read: {error.strerror}") from None
    if occupied:
        raise ConfigError(f"--output {output}: the folder is not empty; name a new or an empty one")


@contextmanager
def _filled(output: Path) -> Iterator[Path]:
    """A folder whose files become those of `output` when the block ends well; else `output` is as it was.

    It lies within `output`, so that they only need to be renamed, whatever file system `output` is on.
    """
    made, folder = not output.exists(), output / _WRITING
    try:
        output.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder
        for path in sorted(folder.iterdir()):
            path.rename(output / path.name)
        folder.rmdir()
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if made:
            with suppress(OSError):
                output.rmdir()
        if isinstance(error, OSError):
            raise CheckpointError(f"{output}: the export cannot be written: {error.strerror or error}") from error
        raise


def _card(file_format: str, made: Any, origin: Origin) -> str:
    """The model card: facts of the run, how to load the files, what they lack."""
    name = origin.config.get("name", "unknown")
    facts = {
        "base model": origin.hub_base or _UNSHARED.get((origin.base or "").partition(":")[0], "a local folder"),
        "format": file_format,
        "LoRA": "none" if made.rank is None else f"rank {made.rank}, scale 1 (no alpha, or alpha = rank)",
        "weights": origin.describe(),
        "experiment": f"{name}, SHA-256 of its resolved {CONFIG}: {origin.config_sha256 or 'unknown'}",
        "written by": f"rewardgen {rewardgen.__version__}",
    }
    front = ["---", *([f"base_model: {origin.hub_base}"] if origin.hub_base else []), "tags: [lora, rewardgen]", "---"]
    table = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items())]
    notes = [*made.notes, *([_FLUX_DEV_LICENCE] if origin.hub_base == _FLUX_DEV else [])]
    told = [f"- {note[:1].upper()}{note[1:]}." for note in notes]
    parts = [front, [f"# {name}, trained by rewardgen"], table, _USE[file_format], told]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"
