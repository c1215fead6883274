"""What each option of speed does to a train step at full size: with it against without it, taking turns in one run.

    python benchmarks/options.py [--sizes 512 1024] [--rounds 3] [--compile]   # one GPU with 80 GB or more
    python benchmarks/options.py --toy                                         # every line of it on the CPU

The models are those of `full_scale.py`, of random weights, in one process; an option is switched on and off between
steps of the same trainer, round by round in alternating order. The ratio is the geometric mean over the rounds, its
interval by Student's t on the logarithms: below 1 the option is quicker. Peak memory is told beside it. The pictures
lie on disk, so that reading them ahead has something to do; for that option the pictures of the measured step were
read before, as they would have been during the step before.

Seconds are told of a GPU alone. Without one it says so and ends with 0; at toy size the ratios mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for a caller that is no neighbour

from full_scale import machine, now
from full_scale_models import FULL, PROMPTS, TOY, TOY_SIZES, Scale, make_policy, make_trainer
from step_overhead import ratio

from rewardgen.data.jsonl import JsonlDataset
from rewardgen.errors import ConfigError
from rewardgen.policies.attention import BackEnd, check_backend
from rewardgen.policies.uso import UsoPolicy
from rewardgen.trainer import Trainer

PICTURES = 2
ATTENTION = ("_native_flash", "_native_cudnn", "flash", "_flash_3")


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """Something to switch on and off before a step."""

    name: str
    on: Callable[[int], None]
    off: Callable[[int], None]


def attention(policy: UsoPolicy, name: str) -> Option:
    """A back end of diffusers. Raises ConfigError where it cannot be used here."""
    check_backend(name)
    transformer = policy.transformer

    def off(_step: int) -> None:
        transformer.reset_attention_backend()
        for module in transformer.modules():
            if isinstance(module, torch.nn.RMSNorm):
                module._forward_hooks.clear()

    def on(step: int) -> None:
        off(step)
        BackEnd(name, transformer)

    with torch.autocast(policy.device.type, dtype=torch.bfloat16):
        try:
            BackEnd(name, transformer).try_on(transformer, policy.device)
        finally:
            off(0)
    return Option(name=f"attention: {name}", on=on, off=off)


def channels_last(policy: UsoPolicy) -> Option:
    """The VAE decoder's tensors with their channels last."""

    def switch(flag: bool) -> None:
        policy.decoder_channels_last = flag
        policy.vae.decoder.to(memory_format=torch.channels_last if flag else torch.contiguous_format)

    return Option(name="decoder_channels_last", on=lambda _: switch(True), off=lambda _: switch(False))


def reading_ahead(trainer: Trainer) -> Option:
    """The next step's pictures read by a thread."""
    batches, dataset = trainer.batches, trainer.batches.dataset

    def on(step: int) -> None:
        dataset.read_ahead = True  # type: ignore[attr-defined]
        batches.read_ahead(step)
        assert batches._reading is not None
        batches._reading._done.wait()

    def off(_step: int) -> None:
        dataset.read_ahead = False  # type: ignore[attr-defined]
        batches.close()

    return Option(name="read ahead (the default)", on=on, off=off)


def compiled(policy: UsoPolicy) -> Option:
    """`train.compile`."""
    blocks = [*policy.transformer.transformer_blocks, *policy.transformer.single_transformer_blocks]
    programs: list[Any] = []

    def on(_step: int) -> None:
        if not programs:
            policy.compile_blocks()
            programs.extend(block._compiled_call_impl for block in blocks)
        for block, program in zip(blocks, programs, strict=True):
            block._compiled_call_impl = program

    def off(_step: int) -> None:
        for block in blocks:
            block._compiled_call_impl = None

    return Option(name="train.compile", on=on, off=off)


def options_of(trainer: Trainer, policy: UsoPolicy, back_ends: Sequence[str], *, compile_too: bool) -> list[Option]:
    """Those that can be used here; says which cannot."""
    found = [channels_last(policy), reading_ahead(trainer)]
    for name in back_ends:
        try:
            found.append(attention(policy, name))
        except ConfigError as error:
            print(f"left out: {error}")
    return [*found, compiled(policy)] if compile_too else found


def on_disk(folder: Path, side: int, content_side: int) -> JsonlDataset:
    """A few examples of random pictures as files."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(PICTURES):
        row = {"id": str(number), "prompt": PROMPTS[1]}
        for kind, length in (("content", content_side), ("style", content_side), ("target", side)):
            pixels = torch.randint(0, 256, (length, length, 3), generator=generator).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"{number}-{kind}.png")
            row[kind] = f"{number}-{kind}.png"
        rows.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return JsonlDataset(str(folder / "rows.jsonl"))


def compare(trainer: Trainer, option: Option, rounds: int, first: int, device: torch.device) -> dict[str, Any]:
    """Steps `first` and on, with and without, after one of each that warms up."""
    seconds: dict[str, list[float]] = {"on": [], "off": []}
    memory: dict[str, int] = {"on": 0, "off": 0}
    step = first
    for turn in range(rounds + 1):
        for state in ("on", "off") if turn % 2 else ("off", "on"):
            (option.on if state == "on" else option.off)(step)
            begin = now(device)
            report = trainer.step(step)
            took = now(device) - begin
            if report.skipped:
                raise SystemExit(f"{option.name}, {state}: the gradient is not finite")
            if turn:
                seconds[state].append(took)
                memory[state] = max(memory[state], report.peak_memory_bytes)
            step += 1
    option.off(step)
    found: dict[str, Any] = {"time": ratio(seconds["on"], seconds["off"]), "rounds": rounds}
    if device.type == "cuda":
        found |= {"seconds": seconds, "memory": memory["on"] / memory["off"]}
    return found


def run(
    scale: Scale,
    sides: Sequence[int],
    rounds: int,
    device: torch.device,
    back_ends: Sequence[str],
    *,
    compile_too: bool,
) -> dict[str, Any]:
    """Measure every option at every size."""
    policy = make_policy(scale, device, torch.bfloat16)
    sizes: dict[str, Any] = {}
    for side in sides:
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(policy, scale, side, Path(folder))
            trainer.batches.dataset = data = on_disk(Path(folder), side, scale.content_side)
            policy.encode([data[index] for index in range(len(data))])
            options = options_of(trainer, policy, back_ends, compile_too=compile_too)
            for option in options:
                option.off(0)
            for step in range(PICTURES):  # every picture's embeddings are known before anything is measured
                trainer.step(step)
            step, found = PICTURES, {}
            for option in options:
                found[option.name] = compare(trainer, option, rounds, step, device)
                step += 2 * (rounds + 1)
            sizes[str(side)] = found
    return {"machine": machine(device), "sizes": sizes}


def render(result: dict[str, Any], *, toy: bool) -> str:
    """The table in Markdown."""
    where = result["machine"]
    lines = ["Toy sizes on the CPU: this shows that every line runs; the ratios mean nothing.", ""] if toy else []
    lines += [
        f"{where['card']}, torch {where['torch']}, {where['date']}. A step with the option over one without it.",
        "",
    ]
    lines += ["| picture | option | time | peak memory | seconds without |", "|---" * 5 + "|"]
    for side, options in result["sizes"].items():
        for name, found in options.items():
            time = found["time"]
            interval = f"{time['value']:.3f} [{time['low']:.3f}, {time['high']:.3f}]"
            memory = f"{found['memory']:.3f}" if "memory" in found else ""
            without = found.get("seconds", {}).get("off")
            seconds = f"{sum(without) / len(without):.3f}" if without else ""
            lines.append(f"| {side} x {side} | {name} | {interval} | {memory} | {seconds} |")
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--sizes", type=int, nargs="+", help="sides of the pictures in pixels")
    parser.add_argument("--rounds", type=int, default=3, help="steps with and without each option, at least 2")
    parser.add_argument("--attention", nargs="*", help="back ends of diffusers to compare with its default")
    parser.add_argument("--compile", action="store_true", help="compile too, which takes minutes at the start")
    parser.add_argument("--output", type=Path, default=Path("runs/options.json"), help="JSON file to write")
    chosen = parser.parse_args(arguments)
    if chosen.rounds < 2:
        parser.error("--rounds: an interval needs at least 2")
    if not chosen.toy and not torch.cuda.is_available():
        print("options: torch sees no CUDA device here, so nothing was measured; --toy runs every line on the CPU")
        return
    device = torch.device("cpu" if chosen.toy else "cuda:0")
    scale, sides, back_ends = (TOY, TOY_SIZES[:1], ("_native_math",)) if chosen.toy else (FULL, (512, 1024), ATTENTION)
    back_ends = back_ends if chosen.attention is None else chosen.attention
    result = run(scale, chosen.sizes or sides, chosen.rounds, device, back_ends, compile_too=chosen.compile)
    print(render(result, toy=chosen.toy))
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(result | {"toy": chosen.toy}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
