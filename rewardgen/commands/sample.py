"""`rewardgen sample`: pictures of an experiment's policy, as it starts or as a run left it.

Shape suffixes: B batch, H and W pixels.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from rewardgen import build
from rewardgen.checkpoint import latest_checkpoint, load_checkpoint
from rewardgen.commands import common
from rewardgen.config import Experiment, load_experiment
from rewardgen.errors import CheckpointError, ConfigError, NonFiniteError, UserError
from rewardgen.evaluation.grid import cell_size, draw_grid
from rewardgen.optimizer import Optimizer
from rewardgen.policy import Policy
from rewardgen.rollout import Precision, RolloutWorker, Weights
from rewardgen.trainer import choose_device
from rewardgen.types import Example, RolloutRequest

MAX_PICTURES = 10_000
"""A slip such as `0-99999999` is refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the command line says about the pictures; None takes the experiment's.

    Args:
        prompt: text, may be empty where there are pictures.
        content: pictures whose subject or layout should be kept.
        style: pictures whose look should be taken over.
        identity: pictures of people who should appear.
        seeds: as `parse_seeds` reads them.
        num_steps: denoising steps; by default those of the evaluation, else of the rollout.
        size: as `parse_size` reads it; by default the rollout's.
        output: folder of the pictures; by default `samples/NAME`.
        grid: also write `grid.png`.
        as_json: print one JSON document in place of the paths.
    """

    prompt: str = ""
    content: Sequence[Path] = ()
    style: Sequence[Path] = ()
    identity: Sequence[Path] = ()
    seeds: str = "0"
    num_steps: int | None = None
    size: str | None = None
    output: Path | None = None
    grid: bool = False
    as_json: bool = False


def run(
    source: Path,
    options: Options,
    *,
    flavor: str | None = None,
    overrides: Sequence[str] = (),
    run_folder: Path | None = None,
    checkpoint: Path | None = None,
) -> None:
    """Draw one picture for each seed, write it as `seed-NNNN.png`, and print the paths.

    Args:
        source: experiment file, or a run's folder: then its experiment and its newest weights.
        options: see there.
        flavor: of the experiment.
        overrides: of the experiment.
        run_folder: draw with the averaged weights of a run's newest whole checkpoint; or else
        checkpoint: with those of the checkpoint in this folder; by default with the experiment's own weights.

    Raises:
        UserError: nothing to draw, a bad value, an unreadable file, or a checkpoint of another experiment.
    """
    seeds = parse_seeds(options.seeds)
    image_size = parse_size(options.size) if options.size is not None else None
    _check_request(options, overrides)
    written: dict[int, Path] = {}
    with common.chatter_to_stderr() as answer:
        experiment = load_experiment(common.experiment_file(source), flavor, overrides)
        image_size = image_size or experiment.rollout.image_size
        num_steps = options.num_steps or experiment.evaluation.num_steps or experiment.rollout.num_steps
        weights = _find_weights(source, run_folder, checkpoint)
        example = common.request(
            options.prompt, content=options.content, style=options.style, identity=options.identity
        )
        columns = _references(example)
        folder = _make_folder(options.output or Path("samples") / experiment.name)
        policy = _load_policy(experiment)
        policy.latent_shape(image_size)  # refuses a size the model cannot draw
        with _weights_of(weights, policy, experiment):
            drawn = draw(policy, example, seeds, image_size, num_steps, precision=experiment.train.precision)
            for seed, pixels_3HW in drawn:
                written[seed] = _save(to_image(pixels_3HW), folder / f"seed-{seed:04d}.png")
                if options.grid:
                    columns[f"seed {seed}"] = [(pixels_3HW,)]
                if not options.as_json:
                    print(written[seed], file=answer, flush=True)
    grid: Path | None = None
    if options.grid:
        grid = _save(draw_grid(columns, cell_size(columns[f"seed {seeds[0]}"])), folder / "grid.png")
    if options.as_json:
        document = {
            "experiment": experiment.name,
            "weights": None if weights is None else str(weights),
            "prompt": options.prompt,
            "image_size": list(image_size),
            "num_steps": num_steps,
            "pictures": [{"seed": seed, "path": str(path)} for seed, path in written.items()],
            "grid": None if grid is None else str(grid),
        }
        print(json.dumps(document, indent=1))
    elif grid is not None:
        print(grid)


def draw(
    policy: Policy,
    example: Example,
    seeds: Sequence[int],
    image_size: tuple[int, int],
    num_steps: int,
    *,
    precision: Precision = "fp32",
) -> Iterator[tuple[int, Tensor]]:
    """Yield (seed, picture [3, H, W] in [0, 1], float32 on the CPU) for each seed.

    One picture in a forward pass: in a batch the last bits of a picture depend on how many there are, and a seed
    must always give the same one. The noise is a function of the seed and the size alone.

    Args:
        policy: as it is; the caller sees to its weights and to evaluation mode.
        example: what is drawn.
        seeds: of the noise.
        image_size: (height, width) in pixels.
        num_steps: denoising steps.
        precision: arithmetic of the policy's forward pass.

    Raises:
        NonFiniteError: the policy drew NaN or infinity.
    """
    worker = RolloutWorker(policy, precision=precision)
    weights = Weights(version=0, tensors={name: p.detach() for name, p in policy.trainable().items()})
    for seed in seeds:
        request = RolloutRequest(
            step=0,
            examples=[example],
            seed_B=(seed,),
            image_size=image_size,
            num_steps=num_steps,
            stop_step=num_steps,
            decode=True,
        )
        pixels_B3HW = worker.rollout(request, weights).pixels_B3HW
        assert pixels_B3HW is not None, "it was asked for"
        if not bool(torch.isfinite(pixels_B3HW).all()):
            raise NonFiniteError(f"seed {seed}: the policy drew a picture that is not finite; try train.precision=fp32")
        yield seed, pixels_B3HW[0].float().cpu()


def parse_seeds(text: str) -> list[int]:
    """Seeds from `3`, `0,1,2`, `0-3` (both ends included) or a mixture; each once, in the order written.

    Raises:
        ConfigError: anything else, or more than `MAX_PICTURES`.
    """
    seeds: dict[int, None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18})\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise ConfigError(f"--seeds '{text}': expected whole numbers, as in '7', '0,1,2' or '0-3'")
        if len(seeds) + last - first >= MAX_PICTURES:
            raise ConfigError(f"--seeds '{text}': more than {MAX_PICTURES:,} pictures at once")
        seeds.update(dict.fromkeys(range(first, last + 1)))
    return list(seeds)


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) in pixels from `512x768`. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*[xX×]\s*(\d{1,6})\s*", text)
    if match is None or not int(match[1]) or not int(match[2]):
        raise ConfigError(f"--size '{text}': expected HEIGHTxWIDTH in pixels, as in '512x768'")
    return int(match[1]), int(match[2])


def to_image(pixels_3HW: Tensor) -> Image.Image:
    """A picture [3, H, W] in [0, 1] as 8-bit RGB."""
    return Image.fromarray(pixels_3HW.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy())


def _check_request(options: Options, overrides: Sequence[str]) -> None:
    given = {"content": options.content, "style": options.style, "identity": options.identity}
    if not options.prompt and not any(given.values()):
        raise ConfigError("nothing to draw: give --prompt, --content, --style or --identity")
    stray = next((text for text in overrides if "=" not in text), None)
    name = next((name for name, pictures in reversed(given.items()) if pictures), None)
    if stray is not None and name is not None:
        # `--style a.png b.png` arrives as one picture and an override: to speak of overrides would only puzzle.
        raise ConfigError(
            f"'{stray}' is no KEY=VALUE; each picture needs an option of its own,"
            f" as in --{name} {given[name][0]} --{name} {stray}"
        )


def _find_weights(source: Path, run_folder: Path | None, checkpoint: Path | None) -> Path | None:
    if run_folder is not None and checkpoint is not None:
        raise ConfigError("name the weights once: either --run DIR or --checkpoint DIR")
    if checkpoint is not None:
        return checkpoint
    run_folder = run_folder or (source if source.is_dir() else None)
    if run_folder is None:
        return None
    newest = latest_checkpoint(run_folder / "checkpoints")
    if newest is None:
        raise CheckpointError(f"{run_folder} holds no whole checkpoint")
    return newest


def _load_policy(experiment: Experiment) -> Policy:
    policy: Policy = build.make("policy", "policies", experiment.policy)
    if not policy.trainable():
        raise ConfigError("the policy trains nothing; name at least one of its parts in policy.args.train")
    return policy.to(choose_device(experiment.train.device)).eval()


def _weights_of(
    checkpoint: Path | None, policy: Policy, experiment: Experiment
) -> contextlib.AbstractContextManager[None]:
    """While the block lasts the policy has the averaged weights of a checkpoint, its own where it kept no average."""
    if checkpoint is None:
        return contextlib.nullcontext()
    tensors, _ = load_checkpoint(checkpoint)
    # The moments are as large as the weights twice over, and only a step would need them.
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith("adamw/")}
    optimizer = Optimizer(policy.trainable(), experiment.optimizer, ema_decay=experiment.train.ema_decay)
    optimizer.load_state(weights)
    return optimizer.averaged()


def _references(example: Example) -> dict[str, list[tuple[Tensor, ...]]]:
    """Columns of the grid, for what was given."""
    given = {"content": example.content_refs, "style": example.style_refs, "identity": example.identity_refs}
    return {name: [pictures] for name, pictures in given.items() if pictures}


def _make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: the folder cannot be made: {(error.strerror or '').lower()}") from None
    return folder


def _save(picture: Image.Image, path: Path) -> Path:
    try:
        picture.save(path, format="PNG")
    except OSError as error:
        raise UserError(f"{path}: the picture cannot be written: {(error.strerror or str(error)).lower()}") from None
    return path
