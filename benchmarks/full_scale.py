"""A train step at full size: FLUX.1 with random weights, LoRA, SigLIP, VAE and a ViT-L CSD, through our own trainer.

    python benchmarks/full_scale.py [--sizes 512 1024] [--steps 2]      # one GPU with 80 GB or more
    python benchmarks/full_scale.py --toy                               # every line of it on the CPU, at toy size

Style Reward Learning with one content reference (512 pixels) and one style reference, batch 1, bf16 base and float32
LoRA, checkpointed blocks, an entry step of 20 of 25, flow matching and CSD. Text encodings are random numbers of the
right size, since they are made ahead. It tells seconds and operations by phase, peak memory, and the share of the rate
that a bf16 matrix product reaches in the same process; `benchmarks/flops.py` counts the operations. Before it measures
it checks that the LoRA's gradient is there and finite, and that bf16 points where float32 does.

Without a GPU it says so and ends with 0. Pictures of a size start only while the time limit leaves room for them.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for a caller that is no neighbour

import flops
from full_scale_models import (
    ENTRY_STEP,
    FULL,
    TOY,
    TOY_SIZES,
    Pictures,
    Scale,
    make_policy,
    make_trainer,
    remember_prompts,
)

from rewardgen.gradients import differentiate
from rewardgen.policies.packing import PATCH
from rewardgen.policies.projector import LEVELS
from rewardgen.policy import noise_like_request
from rewardgen.rewards.csd import CsdConfig
from rewardgen.rollout import velocity_fn
from rewardgen.trainer import Trainer
from rewardgen.types import StepReport

PHASES = ("data", "rollout", "flow_matching", "window", "decode", "score", "backward", "optimizer")
LEAST_COSINE = 0.9
"""Between the LoRA's gradients in bf16 and in float32, on a slice of two blocks."""
TIME_LIMIT = 480.0
"""Seconds after which no further step is begun."""


def gradient_check(trainer: Trainer) -> dict[str, Any]:
    """The LoRA's gradient after the steps taken, as AdamW's first moment shows it: finite, and nowhere 0."""
    tensors, _ = trainer.learner.state()
    moments = {name: tensor for name, tensor in tensors.items() if name.startswith("adamw/exp_avg/")}
    return {
        "tensors": len(moments),
        "finite": all(bool(tensor.isfinite().all()) for tensor in moments.values()),
        "zero": sum(not bool(tensor.any()) for tensor in moments.values()),
    }


def bf16_cosine(scale: Scale, device: torch.device, side: int) -> float:
    """Cosine between the LoRA's gradients in bf16 and float32, on one double and one single block of full width."""
    slices = scale.configs["transformer"] | {"num_layers": 1, "num_single_layers": 1}
    small = {**scale.configs, "transformer": slices}
    coarse, fine = (
        make_policy(
            Scale(**{name: getattr(scale, name) for name in Scale.__slots__} | {"configs": small}), device, dtype
        )
        for dtype in (torch.bfloat16, torch.float32)
    )
    # The same weights: those that bf16 can hold. The difference is then the arithmetic's alone.
    fine.load_state_dict(coarse.state_dict())
    remember_prompts(fine, scale)
    found: list[Tensor] = []
    for policy, precision in ((coarse, "bf16"), (fine, "fp32")):
        examples = [Pictures(side, scale.content_side).example]
        latents_BLC = noise_like_request(policy, [0], (side, side)).to(device)
        with torch.enable_grad():
            velocity = velocity_fn(
                policy,
                policy.encode(examples),
                mode="sample",
                image_size=(side, side),
                precision=precision,  # type: ignore[arg-type]
            )
            loss = velocity(latents_BLC, torch.full((1,), 0.5, device=device)).square().mean()
        gradient = differentiate(loss, list(policy.trainable().values()))
        found.append(torch.cat([grad.flatten().double() for grad in gradient]))
    return float(torch.nn.functional.cosine_similarity(*found, dim=0))


# -- measuring ---------------------------------------------------------------------------------------------------


def product_rate(side: int, device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a square matrix product; the best of some rounds, since the peak is what is asked."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        begin = now(device)
        for _ in range(10):
            a @ b
        best = max(best, 10 * 2 * side**3 / (now(device) - begin))
    return best


def now(device: torch.device) -> float:
    """Seconds on the clock once the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def operations(scale: Scale, side: int) -> dict[str, dict[str, float]]:
    """Operations of a step by phase: `model` and, with recomputed activations and scores, `hardware`."""
    vision, factor = scale.configs["siglip"], 2 ** (len(scale.configs["vae"]["block_out_channels"]) - 1)
    multiple = PATCH * factor
    tokens = flops.Tokens(
        context=scale.text_tokens + len(LEVELS) * scale.style_tokens_per_level,
        target=(side // multiple) ** 2,
        references=(scale.content_side // multiple) ** 2,
    )
    width = scale.configs["transformer"]["attention_head_dim"] * scale.configs["transformer"]["num_attention_heads"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    level = scale.style_tokens_per_level * vision["hidden_size"]
    projector = 2 * len(LEVELS) * (patches * level + level * width)  # once for each velocity function
    result: dict[str, dict[str, float]] = {}
    for kind, attention_backward, again in (("model", 2.0, 0), ("hardware", 2.5, 1)):
        options = {"attention_backward": attention_backward}
        dit = flops.dit(scale.configs["transformer"], tokens, rank=scale.rank, **options)
        vae = flops.vae(scale.configs["vae"], (side, side), **options)
        sizes = {name: getattr(scale.csd, name) for name in CsdConfig.__slots__ if name != "heads"}
        csd = flops.csd(**sizes, pixels=(side, side), **options)
        decode = vae["decode"]
        result[kind] = {
            "data": 0.0,
            "rollout": projector + ENTRY_STEP * dit.forward,
            "flow_matching": vae["encode"].forward + projector + (1 + again) * dit.forward + dit.backward,
            "window": projector + dit.forward,
            "decode": decode.forward,
            "score": csd.forward + csd.backward,
            "backward": decode.backward + dit.backward + again * (decode.forward + dit.forward),
            "optimizer": 0.0,
        }
    return result


def measure(trainer: Trainer, steps: int, deadline: float) -> tuple[list[StepReport], list[float]]:
    """Reports and durations of up to `steps` steps after one that warms up; at least one."""
    device = trainer.learner.policy.device
    trainer.step(0)
    reports, seconds = [], []
    for step in range(1, steps + 1):
        begin = now(device)
        if reports and begin + seconds[-1] > deadline:
            break
        reports.append(trainer.step(step))
        seconds.append(now(device) - begin)
    return reports, seconds


def run(scale: Scale, sides: Sequence[int], steps: int, device: torch.device) -> dict[str, Any]:
    """Check and measure everything. Raises SystemExit where a check fails."""
    deadline = time.perf_counter() + TIME_LIMIT
    cosine = bf16_cosine(scale, device, sides[0])
    if not cosine >= LEAST_COSINE:
        raise SystemExit(f"the LoRA's gradients in bf16 and float32 have a cosine of {cosine:.4f}: something is wrong")
    rate = product_rate(scale.product_side, device, torch.bfloat16)
    policy = make_policy(scale, device, torch.bfloat16)
    sizes: dict[str, Any] = {}
    for side in sides:
        if sizes and time.perf_counter() > deadline:
            print(f"{side} x {side}: left out, the time is over")
            continue
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(policy, scale, side, Path(folder))
            reports, seconds = measure(trainer, steps, deadline)
            gradient = gradient_check(trainer)
        if not gradient["finite"] or gradient["zero"] or any(report.skipped for report in reports):
            raise SystemExit(f"{side} x {side}: the gradient of the LoRA is not as it should be: {gradient}")
        counted = operations(scale, side)
        phases = {name: sum(report.seconds_by_phase[name] for report in reports) / len(reports) for name in PHASES}
        mean = sum(seconds) / len(seconds)
        sizes[str(side)] = {
            "steps": len(seconds),
            "seconds": seconds,
            "seconds_by_phase": phases,
            "operations": counted,
            "peak_memory_bytes": max(report.peak_memory_bytes for report in reports),
            "gradient": gradient,
            "utilisation": sum(counted["model"].values()) / mean / rate,
            "hardware_utilisation": sum(counted["hardware"].values()) / mean / rate,
        }
    return {
        "machine": machine(device),
        "product_rate": rate,
        "bf16_cosine": cosine,
        "parameters": {
            "base": sum(p.numel() for p in policy.parameters() if not p.requires_grad),
            "trained": sum(p.numel() for p in policy.trainable().values()),
        },
        "sizes": sizes,
    }


def machine(device: torch.device) -> dict[str, Any]:
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": device.type, "card": card, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}


def render(result: Mapping[str, Any], *, toy: bool) -> str:
    """The table in Markdown."""
    lines = []
    if toy:
        lines += ["Toy sizes on the CPU: this shows that every line runs; the figures mean nothing.", ""]
    parts, where = result["parameters"], result["machine"]
    lines += [
        f"{where['card']}, torch {where['torch']}, {where['date']}. {parts['base']:,} frozen and {parts['trained']:,}"
        f" trained parameters. bf16 matrix product: {result['product_rate'] / 1e12:.3g} TFLOP/s. Cosine of the LoRA's"
        f" gradients in bf16 and float32, two blocks: {result['bf16_cosine']:.5f}.",
        "",
    ]
    for side, found in result["sizes"].items():
        model, hardware = found["operations"]["model"], found["operations"]["hardware"]
        mean = sum(found["seconds"]) / len(found["seconds"])
        lines += [
            f"| {side} x {side} | seconds | TFLOP | with recomputation | share of the product's rate |",
            "|---" * 5 + "|",
        ]
        for name in (*PHASES, "step"):
            whole = name == "step"
            seconds = mean if whole else found["seconds_by_phase"][name]
            counts = [sum(kind.values()) if whole else kind[name] for kind in (model, hardware)]
            share = f"{100 * counts[0] / seconds / result['product_rate']:.1f} %" if counts[0] else ""
            lines.append(f"| {name} | {seconds:.3f} | {counts[0] / 1e12:.3g} | {counts[1] / 1e12:.3g} | {share} |")
        lines += ["", f"Peak memory {found['peak_memory_bytes'] / 1e9:.2f} GB; {found['steps']} steps.", ""]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--sizes", type=int, nargs="+", help="sides of the pictures in pixels")
    parser.add_argument("--steps", type=int, default=2, help="measured steps at each size, after one that warms up")
    parser.add_argument("--output", type=Path, default=Path("runs/full_scale.json"), help="JSON file to write")
    chosen = parser.parse_args(arguments)
    if not chosen.toy and not torch.cuda.is_available():
        print("full_scale: torch sees no CUDA device here, so nothing was measured; --toy runs every line on the CPU")
        return
    device = torch.device("cpu" if chosen.toy else "cuda")
    scale, sides = (TOY, TOY_SIZES) if chosen.toy else (FULL, (512, 1024))
    result = run(scale, chosen.sizes or sides, chosen.steps, device) | {"toy": chosen.toy}
    print(render(result, toy=chosen.toy))
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
