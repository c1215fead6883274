"""What a train step needs, told beforehand: bytes by part and operations, from shapes alone.

The plan is the step itself, run by the real learner on tensors that have a shape and a place but no memory (torch's
fake tensors): nothing is computed, read or fetched, and whatever policy, rewards, window and optimizer an experiment
names is in it. `benchmarks/memory_plan.py` compares it with what is measured.

The figures are of tensors. Allocators, kernels' scratch memory and the device's own context come on top: `RESERVE`.
So does what bounded caches keep of other micro-batches: encodings in CPU memory, references and positions on the
device. Pictures as a dataset reads them are not counted, for they lie in CPU memory; what a step makes of them is.
Arithmetic is planned as on the CPU, whose autocast casts slightly less to float32 than CUDA's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewardgen.base_policy import split_state
from rewardgen.config import Experiment
from rewardgen.distributed import Processes
from rewardgen.dry_run import Observer, dry
from rewardgen.errors import ConfigError, UserError
from rewardgen.learner import Learner, MicroBatch
from rewardgen.measure import LiveBytes
from rewardgen.objective import FLOW_MATCHING, Objective
from rewardgen.planned import (
    any_noise,
    at_once,
    examples_for,
    image_size,
    make_policy,
    make_rewards,
    make_witnesses,
    pictures_of,
    takes_styles,
)
from rewardgen.planned_draws import draw, size_of
from rewardgen.reward import Reward

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
        operations: multiplications and additions of a whole training step, with recomputed activations; of all its
            updates, where several are made on the same samples.
        encoding_operations: of encoding one batch, which is done once for each prompt and picture.
        offloaded: bytes of weights in CPU memory, on top of all that; each pass of the model copies them over.
        drawn: bytes that are kept of all that is drawn for a step, within `peak`.
        assumed: what the plan took for granted, in words.
        uncounted: what comes on top and is in none of the figures, in words.
    """

    resident: Mapping[str, int]
    gradients: int
    peak: int
    encoding_peak: int
    operations: float
    encoding_operations: float
    assumed: tuple[str, ...]
    offloaded: int = 0
    drawn: int = 0
    uncounted: tuple[str, ...] = ()

    @property
    def needed(self) -> int:
        """Bytes of tensors, the larger of the two peaks."""
        return max(self.peak, self.encoding_peak)

    def fits(self, device_bytes: float) -> bool:
        """Whether it goes on a device of so many bytes, with `RESERVE` left over."""
        return self.needed <= (1 - RESERVE) * device_bytes


def plan(experiment: Experiment) -> Plan:
    """Plan a train step of one process of an experiment, with one content and one style reference for each example.

    A policy whose `takes_styles` is False gets no style reference. All terms of the objective that ever take part are
    taken to do so in this step (`planned.at_once`).

    Raises:
        UserError: the policy cannot say its sizes without its weights, or something does not fit together.
    """
    train = experiment.train
    with dry(), any_noise():
        policy = make_policy(experiment.policy)
        policy.enable_checkpointing(train.gradient_checkpointing)
        rewards, unasked = make_rewards(experiment)
        witnesses, unmade = make_witnesses(experiment)
        learner = Learner(
            policy,
            Objective(at_once(experiment.objective), rewards),
            optimizer=experiment.optimizer,
            window=experiment.rollout.window,
            precision=train.precision,
            ema_decay=train.ema_decay,
            # The one micro-batch that is walked stands for several, which never share a backward pass.
            term_grad_norms=train.term_grad_norms or train.accumulation > 1,
            processes=(mark := _Mark()),
        )
        try:
            found = _walk(experiment, learner, witnesses, mark)
        except UserError:
            raise
        except Exception as error:
            # A plug-in that looks at its numbers in a way that made-up ones do not satisfy.
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ConfigError(f"a step cannot be planned from shapes alone: {reason}") from error
        assumed, uncounted = tuple(_assumed(experiment, learner)), (*unasked, *unmade, *_left_out(experiment))
        return dataclasses.replace(found, assumed=assumed, uncounted=uncounted)


def _assumed(experiment: Experiment, learner: Learner) -> Iterator[str]:
    taken = "content and one style" if takes_styles(learner.policy) else "content"
    yield f"one {taken} reference for each example"
    if len(learner.objective.rewards) > 1:
        yield "every term of the objective at once"
    if experiment.rollout.buckets:
        yield f"every picture of {' x '.join(map(str, image_size(experiment)))} pixels"
    if experiment.train.strategy == "fsdp":
        yield "the model whole on one device, where fsdp holds a part on each"
    if experiment.train.compile:
        yield "blocks that are not compiled"


def _left_out(experiment: Experiment) -> Iterator[str]:
    at_a_time = experiment.evaluation.batch_size
    if at_a_time > experiment.train.batch_size:
        yield f"evaluation, which draws {at_a_time} pictures at a time without gradient (evaluation.batch_size)"


def render(found: Plan, *, device_bytes: float, rate: float = RATE) -> list[str]:
    """The plan in lines of text, for a device of so many bytes and so many operations a second."""
    rest = max(0, found.peak - sum(found.resident.values()) - found.gradients - found.drawn)
    rows = {**found.resident, "gradients, by term of the loss": found.gradients}
    rows |= {"what is drawn for a step": found.drawn} if found.drawn else {}
    rows |= {"activations and temporaries": rest}
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
        f"  it {fits} {device_bytes / 1e9:.0f} GB, {100 * RESERVE:.0f} % of it left to allocator and libraries"
        + (", as far as it is counted" if found.uncounted else ""),
        f"  {_operations(found.operations)} a step: {_duration(found.operations / rate)} at an assumed"
        f" {rate / 1e12:.0f} TFLOP/s",
        f"  predicted from shapes, not measured; assumed: {', '.join(found.assumed)}",
    ]
    return [*lines, *(f"  NOT COUNTED: {what}" for what in found.uncounted)]


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:8.3f} GB"


def _operations(number: float) -> str:
    return f"{number / 1e15:.1f} PFLOP" if number >= 1e15 else f"{number / 1e12:.3g} TFLOP"


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s"


class _Mark(Processes):
    """The only process of a plan, which notices where a step has all its sums and only the update is left."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: LiveBytes | None = None
        self.peak = 0
        """Most bytes alive before the update of the latest step that was watched."""

    def exchange(self, topic: str, value: Any = None) -> list[Any]:
        if self.memory is not None and topic.startswith("the sums of"):
            self.peak = self.memory.peak
            self.memory.reset_peak()
        return super().exchange(topic, value)


def _walk(experiment: Experiment, learner: Learner, witnesses: Mapping[str, Reward], mark: _Mark) -> Plan:
    """Encode, draw one denoising step and one sample without gradient, learn."""
    train, policy, objective = experiment.train, learner.policy, learner.objective
    _begin_optimizer(learner)
    size = image_size(experiment)
    examples = examples_for(policy, train.batch_size, size)
    known = [
        tensor for module in (policy, *objective.rewards.values(), *witnesses.values()) for tensor in _tensors(module)
    ]
    with Observer([*known, *learner.state()[0].values()], elsewhere=pictures_of(examples)) as observer:
        policy.encode(examples)
        encoding, encoding_peak = observer.take_operations(), observer.memory.peak
        if release := getattr(policy, "release_encoders", None):
            release()
        resident, before = _resident(learner, witnesses), observer.memory.live
        observer.memory.reset_peak()
        drawn = draw(experiment, learner, examples, size, observer)
        samples = () if drawn.sample is None else (drawn.sample,) * 2  # one alone has nobody to be compared with
        batch = MicroBatch(
            examples=examples,
            seed_B=tuple(range(len(examples))),
            image_size=size,
            rollout=drawn.prefix,
            samples=samples,
        )
        mark.memory = observer.memory
        learner.step([batch], step=0)
        everything, update_peak, mark.memory = observer.take_operations(), observer.memory.peak, None
        if samples:
            learner.step([dataclasses.replace(batch, rollout=None)], step=1)
        replays = observer.take_operations()
    if samples and not replays:
        raise ConfigError("a step cannot be planned from shapes alone: no sample was learned from")
    trained = sum(size_of(p) for p in policy.trainable().values())
    held = trained * _terms(experiment, learner)
    kept = drawn.kept(experiment)
    operations = drawn.operations(experiment, everything - replays, replays / max(1, len(samples)))
    # While a second micro-batch makes its gradients, the sums of the first one's are there too.
    making_peak = (mark.peak or update_peak) + (held if train.accumulation > 1 else 0)
    return Plan(
        resident=resident | {"encodings of the batch": before - sum(resident.values())},
        gradients=held * (1 + (train.accumulation > 1)),
        drawn=kept,
        peak=max(making_peak, update_peak) + kept - drawn.walked,
        encoding_peak=encoding_peak,
        operations=train.accumulation * operations,
        encoding_operations=encoding,
        assumed=(),
        offloaded=int(getattr(policy, "offloaded_bytes", 0)),
    )


def _terms(experiment: Experiment, learner: Learner) -> int:
    """How many gradients of the trained parameters are kept while a step is made."""
    train, objective = experiment.train, learner.objective
    rewards = sum(objective.weight(name, 0) > 0 for name in objective.active_rewards(0))
    apart = train.term_grad_norms or experiment.objective.conflicts == "project"
    shared = train.accumulation == 1 and not apart and experiment.rollout.entries_per_rollout == 1
    others = (objective.weight(FLOW_MATCHING, 0) > 0) + bool(objective.active_samples(0))
    return (min(1, rewards) if shared else rewards) + others


def _begin_optimizer(learner: Learner) -> None:
    """Give AdamW the state that it has from its second step on."""
    tensors, state = learner.state()
    moments = {f"adamw/step/{name}": torch.zeros(()) for name in learner.policy.trainable()}
    for name, parameter in learner.policy.trainable().items():
        moments |= {f"adamw/{key}/{name}": torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
    learner.load_state(tensors | moments, state)


def _resident(learner: Learner, witnesses: Mapping[str, Reward]) -> dict[str, int]:
    """Bytes by part: the policy's modules, what is trained of them, the optimizer's moments, averages, rewards.

    Witnesses too: they lie there while the policy trains.
    """
    trained = {id(parameter) for parameter in learner.policy.trainable().values()}
    parts: dict[str, int] = {}
    for name, child in learner.policy.named_children():
        if size := sum(size_of(tensor) for tensor in _tensors(child) if id(tensor) not in trained):
            parts[f"{name}, frozen"] = size
    parts["trained parameters"] = sum(size_of(p) for p in learner.policy.trainable().values())
    tensors = learner.state()[0]
    for label, prefix in (("AdamW's moments", "adamw/"), ("averaged weights", "average/")):
        if size := sum(size_of(tensor) for name, tensor in tensors.items() if name.startswith(prefix)):
            parts[label] = size
    if size := sum(map(size_of, split_state(tensors)[1].values())):
        parts["trained parameters, as at the start"] = size
    for kind, rewards in (("reward", learner.objective.rewards), ("witness", witnesses)):
        for name, reward in rewards.items():
            if size := sum(map(size_of, _tensors(reward))):
                parts[f"{kind} {name}"] = size
    return parts


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
