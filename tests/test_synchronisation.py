"""Where a train step waits for the device, counted: each wait that is left is named here, with its reason.

The device is torch's `meta`: a real device to autograd and to every operation, without memory. A dispatch mode sees
what crosses between it and the CPU and answers for values that are not there. On a GPU the host would stop at

- a number read from a tensor, a tensor copied to the CPU, two tensors compared by value;
- a choice by a mask, whose size depends on values;
- a copy from the CPU that is not asynchronous, and a tensor made of numbers, which is one too.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rewardgen.fleet.inline import InlinePool
from rewardgen.learner import Learner, OptimizerConfig
from rewardgen.measure import Clock
from rewardgen.objective import Objective, ObjectiveConfig
from rewardgen.policy import Policy
from rewardgen.reward import Reward
from rewardgen.rewards.csd import CsdConfig, CsdModel, CsdReward
from rewardgen.rewards.structure import StructureReward
from rewardgen.rollout import RolloutWorker
from rewardgen.trainer import TrainConfig, Trainer
from rewardgen.transfer import numbers, score_on_host, to_device
from rewardgen.types import Example, Score
from tests.test_trainer import ROLLOUT, Reports
from tests.test_uso_policy import make_policy, picture
from tests.toys import ToyDataset, ToyPolicy, ToyReward

ROOT = Path(__file__).resolve().parent.parent
META = torch.device("meta")
ATEN = torch.ops.aten
BY_VALUE = (ATEN.nonzero, ATEN.masked_select, ATEN._unique2, ATEN.unique_dim, ATEN.repeat_interleave)


class Waits(TorchDispatchMode):
    """Counts the operations for which the host would wait, by the function of ours that asked for them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[str] = Counter()
        self._made = Made(self)

    def __enter__(self) -> Waits:
        super().__enter__()
        self._made.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._made.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet = kwargs or {}, func.overloadpacket
        first = next((arg for arg in args if isinstance(arg, Tensor)), None)
        there = first is not None and first.device.type == "meta"
        if func is ATEN._local_scalar_dense.default and there:
            self.note()
            return True if args[0].dtype == torch.bool else 1.0
        if func is ATEN.equal.default and there:
            self.note()
            return True
        if func is ATEN._to_copy.default and "device" in kwargs:
            target = kwargs["device"].type
            if there and target == "cpu":
                self.note()
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if not there and target == "meta" and not kwargs.get("non_blocking"):
                self.note()
        if func is ATEN.copy_.default and there != (args[1].device.type == "meta"):
            self.note()
            if not there:
                return args[0].fill_(1)
        if packet in (ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_) and there:
            by = [index for index in args[1] if index is not None]
            if any(index.dtype == torch.bool or index.device.type == "cpu" for index in by):
                self.note()
                all_of_it = [i if i is None else torch.arange(len(i), device=META) for i in args[1]]
                args = (args[0], all_of_it, *args[2:])
        if packet in BY_VALUE and there:
            self.note()
            raise AssertionError(f"{func} has no answer here")
        return func(*args, **kwargs)

    def note(self) -> None:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT) and path != Path(__file__) and ".venv" not in path.parts:
                self.seen[f"{path.relative_to(ROOT).with_suffix('')}:{frame.f_code.co_name}"] += 1
                return
            frame = frame.f_back
        raise AssertionError("nobody asked for it")


class Made(TorchFunctionMode):
    """Sees tensors made of numbers on the device, which no dispatch mode sees."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = func in (torch.tensor, torch.as_tensor, Tensor.new_tensor)
        if made and result.device.type == "meta" and not isinstance(args[-1], Tensor):
            self.waits.note()
        return result


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """There is no autocast there."""
    with (
        mock.patch.object(torch, "autocast", return_value=contextlib.nullcontext()),
        mock.patch.object(torch, "is_autocast_enabled", return_value=False),
    ):
        yield


def step_of(
    policy: Policy,
    rewards: dict[str, Reward],
    data: Any,
    folder: Path,
    *,
    objective: dict[str, Any] | None = None,
    image_size: tuple[int, int] = (8, 8),
    **train: Any,
) -> Counter[str]:
    """The waits of the second step: what is made once, and kept, is there."""
    config = TrainConfig.model_validate({"num_steps": 9, "batch_size": 2, "ema_decay": 0.9} | train)
    terms = {name: {"use": "x"} for name in rewards}
    rollout = ROLLOUT.model_copy(update={"image_size": image_size})
    learner = Learner(
        policy.to(META),
        Objective(ObjectiveConfig.model_validate({"rewards": terms} | (objective or {})), rewards).to(META),
        optimizer=OptimizerConfig(),
        window=rollout.window,
        ema_decay=config.ema_decay,
        term_grad_norms=config.term_grad_norms,
    )
    trainer = Trainer(
        learner,
        InlinePool(RolloutWorker(policy)),
        data,
        rollout=rollout,
        config=config,
        seed=0,
        folder=folder,
        reporter=Reports(),
    )
    with on_meta(), Waits() as waits:
        assert not trainer.step(0).skipped
        waits.seen.clear()
        report = trainer.step(1)
    assert not report.skipped
    assert report.terms.keys() == {"flow_matching", *rewards}
    return waits.seen


def score_waits(number: int) -> dict[str, int]:
    """One for each reward and micro-batch: whether there is a valid score at all decides about a backward pass."""
    return {"rewardgen/transfer:score_on_host": number}


END_OF_STEP = {"rewardgen/transfer:numbers": 2}
"""Twice at its end, for what the report says: the sums of the terms, which processes exchange over the CPU; then the
gradient's norm with all norms and angles of its parts, which decides whether the step is taken."""


def own(seen: Counter[str]) -> dict[str, int]:
    """Without what the toys do with their own numbers."""
    return {where: count for where, count in seen.items() if not where.startswith("tests/toys")}


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("names", [["style"], ["style", "other"]])
@pytest.mark.parametrize("term_grad_norms", [False, True])
def test_the_engine_waits_once_for_each_score_and_twice_at_the_end(
    tmp_path: Path, accumulation: int, names: list[str], term_grad_norms: bool
) -> None:
    rewards: dict[str, Reward] = {name: ToyReward() for name in names}
    train = {"accumulation": accumulation, "term_grad_norms": term_grad_norms}
    seen = step_of(ToyPolicy(), rewards, ToyDataset(6), tmp_path, **train)
    assert own(seen) == END_OF_STEP | score_waits(accumulation * len(names))


def test_a_composed_objective_waits_no_more(tmp_path: Path) -> None:
    """Gates, soft minimum and floors work on the scores that were fetched."""
    rewards: dict[str, Reward] = {name: ToyReward() for name in ("style", "other", "floor")}
    terms = {
        "style": {"use": "x", "gate": {"reward": "floor", "above": 0.0, "width": 0.5}},
        "other": {"use": "x"},
        "floor": {"use": "x", "floor": 2.0, "multiplier": {"initial": 1.0}},
    }
    objective = {"rewards": terms, "combine": "softmin", "temperature": 0.1}
    seen = step_of(ToyPolicy(), rewards, ToyDataset(6), tmp_path, objective=objective)
    assert own(seen) == END_OF_STEP | score_waits(3)


class Triplets:
    """What the bundled experiment has: content, style and target."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Example:
        content, style, target = picture(index), picture(index + 10), picture(index + 20, 16, 24)
        return Example(id=str(index), prompt="a cat", content_refs=(content,), style_refs=(style,), target=target)


def test_the_bundled_policy_and_rewards_do_not_wait_either(tmp_path: Path) -> None:
    policy = make_policy("lora", "projector")
    data = Triplets()
    everything = [data[index] for index in range(len(data))]
    policy.encode([*everything, Example(id="no prompt")])  # encoded ahead, as `rewardgen encode` does
    rewards: dict[str, Reward] = {
        "style": CsdReward(CsdModel(CsdConfig(image_size=28, width=32, layers=1, heads=2, output_dim=8))),
        "content": StructureReward(16),
    }
    for reward in rewards.values():
        reward.to(META)
    with on_meta(), Waits(), torch.no_grad():
        for name in rewards:  # and references looked at once
            rewards[name].score(torch.zeros(len(data), 3, 16, 24, device=META), everything)
    seen = step_of(policy, rewards, data, tmp_path, image_size=(16, 24))
    assert dict(seen) == END_OF_STEP | score_waits(2)


def test_the_counter_counts() -> None:
    """Each kind of wait is seen, and what does not wait is not."""
    values, mask = torch.zeros(3, device=META), torch.ones(3, dtype=torch.bool, device=META)
    kinds = [
        lambda: float(values.sum()),
        lambda: values.tolist(),
        lambda: values.cpu(),
        lambda: bool(mask.any()),
        lambda: values[mask],
        lambda: values[torch.tensor([0, 1])],
        lambda: torch.tensor([1.0, 2.0], device=META),
        lambda: values.new_tensor([1.0]),
        lambda: torch.zeros(3).to(META),
        lambda: values.copy_(torch.zeros(3)),
        lambda: torch.equal(values, values),
    ]
    for place, kind in enumerate(kinds):
        with Waits() as waits, mock.patch.object(waits, "note", side_effect=lambda w=waits: w.seen.update(["x"])):
            kind()
        assert waits.seen["x"] == 1, place
    with Waits() as waits:
        to_device(torch.zeros(3), META)
        values.where(mask, 0.0) + 2 * values[0] + torch.zeros(3, device=META)
        values[torch.arange(2, device=META)]
    assert not waits.seen


def test_copies_towards_cuda_go_through_pinned_memory() -> None:
    cuda = torch.device("cuda", 0)
    tensor = mock.MagicMock(spec=Tensor)
    tensor.dtype, tensor.device, tensor.requires_grad = torch.float32, torch.device("cpu"), False
    tensor.to.return_value = tensor
    to_device(tensor, cuda)
    tensor.pin_memory.return_value.to.assert_called_once_with(cuda, non_blocking=True)
    learned = mock.MagicMock(spec=Tensor)
    learned.dtype, learned.device, learned.requires_grad = torch.float32, torch.device("cpu"), True
    learned.to.return_value = learned
    to_device(learned, cuda)
    learned.pin_memory.assert_not_called()
    there = mock.MagicMock(spec=Tensor)
    there.dtype, there.device = torch.float32, cuda
    there.to.return_value = there
    to_device(there, cuda, torch.float32)
    there.pin_memory.assert_not_called()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_numbers_and_scores_come_over_exactly(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, generator=generator, dtype=torch.float64).to(dtype)
    assert numbers(list(values)) == [float(value) for value in values]
    score = Score(value_B=values.clone().requires_grad_(), valid_B=values > 0, metrics={"a": 1.0})
    seen = score_on_host(score)
    assert torch.equal(seen.value_B, values)
    assert not seen.value_B.requires_grad
    assert torch.equal(seen.valid_B, values > 0)
    assert seen.metrics == {"a": 1.0}


class Event:
    """An event of a GPU on which a second passes with every event."""

    recorded = synchronised = 0

    def __init__(self, **_: Any) -> None:
        pass

    def record(self) -> Event:
        Event.recorded += 1
        self.at = Event.recorded
        return self

    def synchronize(self) -> None:
        Event.synchronised += 1

    def elapsed_time(self, other: Event) -> float:
        return 1000.0 * (other.at - self.at)


def test_the_clock_waits_only_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = mock.Mock()
    stream.record_event.side_effect = Event.record
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: stream)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("it waits"))
    Event.recorded = Event.synchronised = 0
    clock = Clock(torch.device("cuda", 0))
    with clock.phase("window"), clock.phase("inner"):
        pass
    with contextlib.suppress(ValueError), clock.phase("window"):
        raise ValueError
    assert Event.synchronised == 0
    assert clock.seconds_by_phase == {"inner": 1.0, "window": 3.0 + 1.0}
    assert clock.seconds_by_phase == {"inner": 1.0, "window": 4.0}
    assert Event.synchronised == 3
