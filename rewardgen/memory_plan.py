"""What a train step needs, told beforehand: bytes by part and operations, from shapes alone.

The plan is the step itself, run by the real learner on tensors that have a shape and a place but no memory (torch's
fake tensors): nothing is computed, read or fetched, and whatever policy, rewards, window and optimizer an experiment
names is in it. `benchmarks/memory_plan.py` compares it with what is measured.

The figures are of tensors. Allocators, kernels' scratch memory and the device's own context come on top: `RESERVE`.
Arithmetic is planned as on the CPU, whose autocast casts slightly less to float32 than CUDA's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewardgen import plugins, sources
from rewardgen.config import Experiment
from rewardgen.dry_run import Observer, dry
from rewardgen.errors import ConfigError, UserError
from rewardgen.learner import Learner, MicroBatch
from rewardgen.objective import FLOW_MATCHING, Objective
from rewardgen.policy import Policy
from rewardgen.reward import Reward
from rewardgen.rollout import RolloutWorker
from rewardgen.settings import Plugin
from rewardgen.types import Example, Rollout, RolloutRequest

RESERVE = 0.1
"""Share of a device's memory that a plan leaves to allocators, libraries and the device's context."""
RATE = 400e12
"""Operations a second that a plan's times are told for where none is given: an assumption, not a measurement."""
BANDWIDTH = 25e9
"""Bytes a second from CPU memory to the device, of PCIe 4 with 16 lanes: likewise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a step needs.

    Args:
        resident: bytes that stay between steps, by part.
        gradients: bytes of the gradients that are kept for each term of the loss, at most.
        peak: most bytes alive at once, all of the above included.
        encoding_peak: the same while prompts and references are encoded.
        operations: multiplications and additions of a whole optimizer step, with recomputed activations.
        encoding_operations: of encoding one batch, which is done once for each prompt and picture.
        offloaded: bytes of weights in CPU memory, on top of all that; each pass of the model copies them over.
        assumed: what the plan took for granted, in words.
    """

    resident: Mapping[str, int]
    gradients: int
    peak: int
    encoding_peak: int
    operations: float
    encoding_operations: float
    assumed: tuple[str, ...]
    offloaded: int = 0

    @property
    def needed(self) -> int:
        """Bytes of tensors, the larger of the two peaks."""
        return max(self.peak, self.encoding_peak)

    def fits(self, device_bytes: float) -> bool:
        """Whether it goes on a device of so many bytes, with `RESERVE` left over."""
        return self.needed <= (1 - RESERVE) * device_bytes


def plan(experiment: Experiment) -> Plan:
    """Plan a train step of one process of an experiment, with one content and one style reference for each example.

    A policy whose `takes_styles` is False gets no style reference.

    Raises:
        UserError: the policy cannot say its sizes without its weights, or something does not fit together.
    """
    with dry():
        policy = _policy(experiment.policy)
        policy.enable_checkpointing(experiment.train.gradient_checkpointing)
        taken = "content and one style" if _takes_styles(policy) else "content"
        rewards, assumed = {}, [f"one {taken} reference for each example"]
        if experiment.train.strategy == "fsdp":
            assumed.append("the model whole on one device, where fsdp holds a part on each")
        for name, term in experiment.objective.rewards.items():
            rewards[name] = _reward(f"objective.rewards.{name}", term)
        learner = Learner(
            policy,
            Objective(experiment.objective, rewards),
            optimizer=experiment.optimizer,
            window=experiment.rollout.window,
            precision=experiment.train.precision,
            ema_decay=experiment.train.ema_decay,
            term_grad_norms=experiment.train.term_grad_norms,
        )
        try:
            return _walk(experiment, learner, assumed)
        except UserError:
            raise
        except Exception as error:
            # A plug-in that looks at its numbers in a way that made-up ones do not satisfy.
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ConfigError(f"a step cannot be planned from shapes alone: {reason}") from error


def render(found: Plan, *, device_bytes: float, rate: float = RATE) -> list[str]:
    """The plan in lines of text, for a device of so many bytes and so many operations a second."""
    rest = found.peak - sum(found.resident.values()) - found.gradients
    rows = {**found.resident, "gradients, by term of the loss": found.gradients, "activations and temporaries": rest}
    width = max(map(len, rows))
    lines = [f"  {name:<{width}}  {_gigabytes(size)}" for name, size in rows.items()]
    lines += [f"  {'a train step needs':<{width}}  {_gigabytes(found.peak)}"]
    if found.encoding_peak > found.peak:
        lines += [f"  {'encoding prompts and pictures needs':<{width}}  {_gigabytes(found.encoding_peak)}"]
    if found.offloaded:
        lines += [
            f"  {'weights in CPU memory, besides':<{width}}  {_gigabytes(found.offloaded)}",
            f"  each pass through them copies them over: {_duration(found.offloaded / BANDWIDTH)} at an assumed"
            f" {BANDWIDTH / 1e9:.0f} GB/s",
        ]
    fits = "fits into" if found.fits(device_bytes) else "WILL NOT FIT into"
    lines += [
        f"  it {fits} {device_bytes / 1e9:.0f} GB, {100 * RESERVE:.0f} % of it left to allocator and libraries",
        f"  {_operations(found.operations)} a step: {_duration(found.operations / rate)} at an assumed"
        f" {rate / 1e12:.0f} TFLOP/s",
        f"  predicted from shapes, not measured; assumed: {', '.join(found.assumed)}",
    ]
    return lines


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:8.3f} GB"


def _operations(number: float) -> str:
    return f"{number / 1e15:.1f} PFLOP" if number >= 1e15 else f"{number / 1e12:.3g} TFLOP"


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s"


def _walk(experiment: Experiment, learner: Learner, assumed: Iterable[str]) -> Plan:
    """Encode, draw one step without gradient, learn."""
    rollout, train, policy = experiment.rollout, experiment.train, learner.policy
    _begin_optimizer(learner)
    low, high = rollout.window.entry_bounds(rollout.num_steps)
    examples = [_example(index, rollout.image_size) for index in range(train.batch_size)]
    if not _takes_styles(policy):
        examples = [dataclasses.replace(example, style_refs=()) for example in examples]
    terms: list[Any] = [experiment.objective.flow_matching, *experiment.objective.rewards.values()]
    step = max(term.start_step for term in terms)  # from here on all take part
    rewards = learner.objective.rewards.values()
    known = [*_tensors(policy), *(tensor for reward in rewards for tensor in _tensors(reward))]
    with Observer([*known, *learner.state()[0].values()]) as observer:
        policy.encode(examples)
        encoding, encoding_peak = observer.take_operations(), observer.memory.peak
        if release := getattr(policy, "release_encoders", None):
            release()
        resident, before = _resident(learner), observer.memory.live
        observer.memory.reset_peak()
        drawn = _draw(experiment, learner, examples, low) if learner.objective.needs_rollout(step) else None
        evaluation = observer.take_operations()
        seeds = tuple(range(len(examples)))
        batch = MicroBatch(examples=examples, seed_B=seeds, image_size=rollout.image_size, rollout=drawn)
        learner.step([batch], step=step)
        learning = observer.take_operations()
    operations = train.accumulation * (learning + evaluation * (low + high) / 2)
    trained = sum(_size(p) for p in policy.trainable().values())
    held = len(learner.objective.active_rewards(step)) + (learner.objective.weight(FLOW_MATCHING, step) > 0)
    return Plan(
        resident=resident | {"encodings of the batch": before - sum(resident.values())},
        gradients=held * trained * (1 + (train.accumulation > 1)),
        # While a second micro-batch makes its gradients, the sums of the first one's are there too.
        peak=observer.memory.peak + (held * trained if train.accumulation > 1 else 0),
        encoding_peak=encoding_peak,
        operations=operations,
        encoding_operations=encoding,
        assumed=tuple(assumed),
        offloaded=int(getattr(policy, "offloaded_bytes", 0)),
    )


def _draw(experiment: Experiment, learner: Learner, examples: list[Example], entry: int) -> Rollout:
    """A rollout of a single step that says it has taken as many as the longest window leaves."""
    rollout = experiment.rollout
    request = RolloutRequest(
        step=0,
        examples=examples,
        seed_B=tuple(range(len(examples))),
        image_size=rollout.image_size,
        num_steps=rollout.num_steps,
        stop_step=1,
    )
    worker = RolloutWorker(learner.policy, precision=experiment.train.precision)
    drawn = worker.rollout(request, learner.publish())
    return dataclasses.replace(drawn, trajectory=dataclasses.replace(drawn.trajectory, entry_step=entry))


def _begin_optimizer(learner: Learner) -> None:
    """Give AdamW the state that it has from its second step on."""
    tensors, state = learner.state()
    moments = {f"adamw/step/{name}": torch.zeros(()) for name in learner.policy.trainable()}
    for name, parameter in learner.policy.trainable().items():
        moments |= {f"adamw/{key}/{name}": torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
    learner.load_state(tensors | moments, state)


def _resident(learner: Learner) -> dict[str, int]:
    """Bytes by part: the policy's modules, what is trained of them, the optimizer's moments, averages, rewards."""
    trained = {id(parameter) for parameter in learner.policy.trainable().values()}
    parts: dict[str, int] = {}
    for name, child in learner.policy.named_children():
        if size := sum(_size(tensor) for tensor in _tensors(child) if id(tensor) not in trained):
            parts[f"{name}, frozen"] = size
    parts["trained parameters"] = sum(_size(p) for p in learner.policy.trainable().values())
    tensors = learner.state()[0]
    for label, prefix in (("AdamW's moments", "adamw/"), ("averaged weights", "average/")):
        if size := sum(_size(tensor) for name, tensor in tensors.items() if name.startswith(prefix)):
            parts[label] = size
    for name, reward in learner.objective.rewards.items():
        if size := sum(map(_size, _tensors(reward))):
            parts[f"reward {name}"] = size
    return parts


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _takes_styles(policy: Policy) -> bool:
    return bool(getattr(policy, "takes_styles", True))


def _example(index: int, image_size: tuple[int, int]) -> Example:
    content, style, target = (torch.zeros(3, *image_size) for _ in range(3))
    return Example(id=str(index), prompt="a picture", content_refs=(content,), style_refs=(style,), target=target)


def _policy(plugin: Plugin) -> Policy:
    made: Policy = _blueprint("policy", "policies", plugin)
    return made


def _reward(path: str, plugin: Plugin) -> Reward:
    made: Reward = _blueprint(path, "rewards", plugin)
    return made


def _blueprint(path: str, kind: plugins.Kind, plugin: Plugin) -> Any:
    """A plug-in of the right sizes: its `blueprint` where it has one, else the thing itself, where it is here."""
    cls = plugins.resolve(kind, plugin.use)
    target = plugins.factory(cls)
    args = plugins.check_args(target, sources.materialise(plugin.args, f"{path}.args", fetch=False), f"{path}.args")
    if hasattr(cls, "blueprint"):
        return cls.blueprint(**args)
    missing = [s.text for s in sources.find_sources(plugin.args, f"{path}.args") if s.location is None]
    if missing:
        raise ConfigError(f"{path}: {cls.__name__} cannot be planned before {', '.join(missing)} is here")
    try:
        return target(**args)
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(f"{path}: {cls.__name__} cannot be made without weights ({type(error).__name__})") from error
