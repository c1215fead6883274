"""What the processes of test_distributed.py do: a policy with blocks, and jobs that two of them run together."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rewardgen.distributed import Processes, Strategy, launched
from rewardgen.fleet.inline import InlinePool
from rewardgen.learner import Learner, OptimizerConfig
from rewardgen.objective import Objective, ObjectiveConfig
from rewardgen.policy import Mode, Policy
from rewardgen.reward import Reward
from rewardgen.rollout import RolloutConfig, RolloutWorker
from rewardgen.scoring import ScoringWorker
from rewardgen.sharding import ShardedPolicy, is_shard, part, spread
from rewardgen.trainer import TrainConfig, Trainer
from rewardgen.types import Condition, Score, StepReport, VelocityFn
from tests.toys import CHANNELS, ToyDataset, ToyJudge, ToyPolicy, ToyReward

STEPS, CUT = 6, 3
CPU = torch.device("cpu")


class Block(nn.Module):
    """Frozen and trained weights side by side, of sizes that two processes cannot share evenly."""

    def __init__(self, generator: torch.Generator, hidden: int = 5) -> None:
        super().__init__()

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) / shape[-1] ** 0.5)

        self.down, self.up = weight(hidden, CHANNELS), weight(CHANNELS, hidden)
        self.lora_A, self.lora_B, self.scale = weight(3, CHANNELS), weight(CHANNELS, 3), weight(1)
        self.down.requires_grad_(False)
        self.up.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        linear = nn.functional.linear
        return (
            x
            + linear(nn.functional.silu(linear(x, self.down)), self.up)
            + self.scale * linear(linear(x, self.lora_A), self.lora_B)
        )


class Blocks(nn.Module):
    _no_split_modules = ("Block",)

    def __init__(self, number: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.blocks = nn.ModuleList(Block(generator) for _ in range(number))


class BlockPolicy(ToyPolicy):
    """The toy policy, whose velocity then goes through blocks; its own weights, outside of them, are trained too."""

    def __init__(self, hidden: int = 12, seed: int = 0, blocks: int = 2) -> None:
        super().__init__(hidden, seed)
        self.transformer = Blocks(blocks)
        self.checkpointing = False
        self.calls_per_velocity = 1

    def velocity_fn(self, condition: Condition, *, mode: Mode, image_size: tuple[int, int]) -> VelocityFn:
        before = super().velocity_fn(condition, mode=mode, image_size=image_size)

        def velocity(latents_BLC: Tensor, t_B: Tensor) -> Tensor:
            x_BLC = before(latents_BLC, t_B)
            for _ in range(self.calls_per_velocity):
                for block in self.transformer.blocks:
                    if self.checkpointing and torch.is_grad_enabled():
                        x_BLC = checkpoint(block, x_BLC, use_reentrant=False)
                    else:
                        x_BLC = block(x_BLC)
            return x_BLC

        return velocity

    def enable_checkpointing(self, enabled: bool = True) -> None:
        self.checkpointing = enabled

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def save(self, folder: Path) -> dict[str, Path]:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "blocks.safetensors"
        save_file({name: p.detach().clone() for name, p in self.trainable().items()}, path)
        return {"weights": path}


class PatchyDataset(ToyDataset):
    """Seven examples: two without a target, and one whose target may be broken."""

    def __init__(self, broken: str | None = None) -> None:
        super().__init__(7)
        for index in (3, 5):
            self.examples[index] = dataclasses.replace(self.examples[index], target=None)
        for index, example in enumerate(self.examples):
            if example.id == broken:
                self.examples[index] = dataclasses.replace(example, target=torch.full((3, 8, 8), math.nan))


class NoisyReward(ToyReward):
    """Draws from the global generator, as a plug-in may, and reports the mean of the examples' numbers."""

    def score(self, pixels_B3HW: Tensor, examples: Any) -> Score:
        score = super().score(pixels_B3HW, examples)
        number = sum(int(e.id[-3:]) for e, valid in zip(examples, score.valid_B, strict=True) if valid)
        return dataclasses.replace(
            score,
            value_B=score.value_B * (1 + torch.rand(len(examples))),
            metrics={"number": number / max(1, int(score.valid_B.sum()))},
            counts={"asked": len(examples)},
        )


class Reports(list[StepReport]):
    def step(self, report: StepReport) -> None:
        self.append(report)


def make(
    folder: Path,
    processes: Processes,
    strategy: Strategy = "ddp",
    *,
    policy: Policy | None = None,
    broken: str | None = None,
    objective: dict[str, Any] | None = None,
    rewards: Mapping[str, Reward] | None = None,
    window: dict[str, Any] | None = None,
    **train: Any,
) -> tuple[Trainer, Reports]:
    """A run whose step has 4 examples, whatever the number of processes."""
    settings = {"num_steps": STEPS, "batch_size": 2, "accumulation": 2 // processes.size, "ema_decay": 0.9}
    config = TrainConfig.model_validate(settings | {"checkpoint_every": CUT, "keep_last": 9} | train)
    rollout = RolloutConfig.model_validate(
        {"image_size": [8, 8], "num_steps": 4, "window": window or {"kind": "refl", "entry_range": [1, 3]}}
    )
    rewards = rewards or {
        "style": ToyReward(fail_ids=["toy-002"]),
        "noisy": NoisyReward(-0.5, fail_ids=["toy-001", "toy-004", "toy-006"]),
    }
    terms = {name: {"use": "toy", "weight": 0.5 + index, "start_step": index} for index, name in enumerate(rewards)}
    settings = {"rewards": terms, "max_failed_share": 1.0, "failure_window": 5} | (objective or {})
    policy = spread(policy or BlockPolicy(), processes, strategy)
    policy.enable_checkpointing(config.gradient_checkpointing)
    learner = Learner(
        policy,
        Objective(ObjectiveConfig.model_validate(settings), rewards),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=3, max_grad_norm=0.5, decay_steps=20),
        window=rollout.window,
        precision=config.precision,
        ema_decay=config.ema_decay,
        max_nonfinite_steps=config.max_nonfinite_steps,
        term_grad_norms=config.term_grad_norms,
        processes=processes,
    )
    reports = Reports()
    trainer = Trainer(
        learner,
        InlinePool(RolloutWorker(policy, precision=config.precision)),
        PatchyDataset(broken),
        rollout=rollout,
        config=config,
        seed=0,
        folder=folder,
        reporter=reports,
        scoring=InlinePool(ScoringWorker(learner.objective.sampled)),
    )
    return trainer, reports


def kept(trainer: Trainer, reports: Reports) -> dict[str, Any]:
    """What must be the same however many processes there are, and in each of them; reports only in the first."""
    lines = [dataclasses.asdict(report) for report in reports]
    for line in lines:
        del line["seconds_by_phase"], line["peak_memory_bytes"]
    return {"state": trainer.learner.state()[1], "steps": trainer.completed_steps, "reports": lines}


def failing(trainer: Trainer) -> dict[str, Any]:
    """Run, and say how it failed."""
    try:
        trainer.run()
    except Exception as error:
        trainer.processes.announce(error)
        return {"kind": type(error).__name__, "said": str(error), "steps": trainer.completed_steps}
    return {"kind": None}


def whole_run(processes: Processes, folder: Path, strategy: Strategy, **options: Any) -> dict[str, Any]:
    trainer, reports = make(folder, processes, strategy, **options)
    trainer.run()
    saved = trainer.learner.policy.save(folder / "weights") if processes.is_first or strategy == "fsdp" else {}
    return kept(trainer, reports) | {"saved": sorted(saved)}


def resumed_run(processes: Processes, folder: Path, strategy: Strategy) -> dict[str, Any]:
    """Go on from where the single process was at step CUT."""
    trainer, reports = make(folder, processes, strategy)
    trainer.resume(folder.parent / "alone" / "checkpoints" / f"step-{CUT:06d}")
    trainer.run()
    return kept(trainer, reports)


def merged_run(processes: Processes, folder: Path, strategy: Strategy) -> dict[str, Any]:
    return whole_run(processes, folder, strategy, term_grad_norms=False)


def checkpointed_run(processes: Processes, folder: Path, strategy: Strategy) -> dict[str, Any]:
    window = {"kind": "full", "checkpoint_steps": True}
    return whole_run(processes, folder, strategy, window=window, gradient_checkpointing=True)


def _sampled(processes: Processes, folder: Path, strategy: Strategy, config: dict[str, Any]) -> dict[str, Any]:
    """Two examples whose judge fails, so that a process may have nothing to learn from where the other has."""
    settings = {"num_generations": 3, "beta": 0.2, "scale_rewards": "batch", "num_iterations": 2} | config
    rewards = {"style": ToyReward(), "judge": ToyJudge(fail_ids=["toy-001", "toy-004"])}
    return whole_run(processes, folder, strategy, rewards=rewards, objective={"policy_gradient": settings})


def grpo_run(processes: Processes, folder: Path, strategy: Strategy) -> dict[str, Any]:
    return _sampled(processes, folder, strategy, {"kind": "grpo", "window": {"size": 2}})


def nft_run(processes: Processes, folder: Path, strategy: Strategy) -> dict[str, Any]:
    return _sampled(processes, folder, strategy, {"kind": "nft"})


def shards(processes: Processes, folder: Path, strategy: Strategy) -> dict[str, Any]:
    sharded = spread(BlockPolicy(), processes, strategy)
    held = {name: part(p).numel() for name, p in sharded.named_parameters() if is_shard(p)}
    try:
        spread(ToyPolicy(), processes, strategy)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return {"held": held, "kind": isinstance(sharded, ShardedPolicy), "without_blocks": said}


def different_start(processes: Processes, folder: Path, strategy: Strategy) -> dict[str, Any]:
    """Fresh weights that each process drew for itself."""
    policy = spread(BlockPolicy(seed=7 + processes.rank), processes, strategy)
    inner = policy.inner if isinstance(policy, ShardedPolicy) else policy
    assert isinstance(inner, ToyPolicy)
    return {"outer": inner.outer.detach().tolist()}


def broken_target(processes: Processes, folder: Path, strategy: Strategy) -> dict[str, Any]:
    trainer, reports = make(folder, processes, strategy, broken="toy-001", max_nonfinite_steps=2, num_steps=40)
    return failing(trainer) | kept(trainer, reports)


def often_failing_reward(processes: Processes, folder: Path, strategy: Strategy) -> dict[str, Any]:
    rewards = {"style": ToyReward(fail_ids=["toy-000", "toy-002", "toy-005"])}
    trainer, reports = make(folder, processes, strategy, rewards=rewards, objective={"max_failed_share": 0.3})
    return failing(trainer) | {"reports": kept(trainer, reports)["reports"]}


class Boom(ToyReward):
    def score(self, pixels_B3HW: Tensor, examples: Any) -> Score:
        raise RuntimeError("boom")


def exception(processes: Processes, folder: Path, strategy: Strategy) -> dict[str, Any]:
    rewards = {"style": Boom() if processes.rank == 1 else ToyReward()}
    return failing(make(folder, processes, strategy, rewards=rewards)[0])


def unequal_calls(processes: Processes, folder: Path, strategy: Strategy) -> dict[str, Any]:
    policy = BlockPolicy()
    policy.calls_per_velocity = 1 + processes.rank
    return failing(make(folder, processes, strategy, policy=policy)[0])


def one_signal(processes: Processes, folder: Path, strategy: Strategy) -> dict[str, Any]:
    trainer, _ = make(folder, processes, strategy)
    step = trainer.learner.step

    def signalled(*args: Any, **rest: Any) -> StepReport:
        if processes.rank == 1 and rest["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **rest)

    trainer.learner.step = signalled  # type: ignore[method-assign]
    outcome = trainer.run()
    return {"interrupted": outcome.interrupted, "steps": outcome.completed_steps, "saved": outcome.checkpoint.name}


def sudden_death(processes: Processes, folder: Path, strategy: Strategy) -> dict[str, Any]:
    trainer, _ = make(folder, processes, strategy)
    step = trainer.learner.step

    def dying(*args: Any, **rest: Any) -> StepReport:
        if processes.rank == 1 and rest["step"] == 1:
            os._exit(9)
        return step(*args, **rest)

    trainer.learner.step = dying  # type: ignore[method-assign]
    return failing(trainer)


def uso(processes: Processes, folder: Path, strategy: Strategy) -> dict[str, Any]:
    """The real policy as it is trained: LoRA and projector in float32 on a base in bfloat16, activations recomputed."""
    from rewardgen.policies.uso import UsoPolicy
    from tests.test_uso_policy import make_parts, make_projector

    sizes = {"lora_rank": 2, "content_long_side": 8, "max_text_tokens": 4}
    policy = UsoPolicy(make_parts(), make_projector(), train=("lora", "projector"), **sizes)
    generator = torch.Generator().manual_seed(5)
    for parameter in policy.trainable().values():  # a LoRA whose half is 0 would hide what is wrong with the other
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    policy.cast_frozen(torch.bfloat16)
    options = {"num_steps": 2, "precision": "bf16", "gradient_checkpointing": True}
    return whole_run(processes, folder, strategy, policy=policy, **options)


JOBS: dict[str, Callable[[Processes, Path, Strategy], dict[str, Any]]] = {
    job.__name__: job
    for job in (
        whole_run,
        resumed_run,
        merged_run,
        checkpointed_run,
        grpo_run,
        nft_run,
        shards,
        different_start,
        broken_target,
        often_failing_reward,
        exception,
        unequal_calls,
        one_signal,
        sudden_death,
        uso,
    )
}


def child(rank: int, port: int, folder: Path, names: list[tuple[str, Strategy]]) -> None:
    """Do jobs in order; what each returns goes to `folder/JOB-STRATEGY-RANK.json`."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    try:
        with launched(CPU) as processes:
            for name, strategy in names:
                found = JOBS[name](processes, folder / f"{name}-{strategy}", strategy)
                (folder / f"{name}-{strategy}-{rank}.json").write_text(json.dumps(found))
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
        raise
