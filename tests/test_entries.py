"""Several entry steps of one prefix: the states are the sampler's, the gradient is the mean, one entry is as before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rewardgen.fleet.inline import InlinePool
from rewardgen.flow.window import WindowConfig, by_entry, draw_entries, draw_entry
from rewardgen.learner import Learner, MicroBatch, OptimizerConfig
from rewardgen.objective import Objective, ObjectiveConfig
from rewardgen.optimizer import Optimizer
from rewardgen.rollout import RolloutConfig, RolloutWorker
from rewardgen.trainer import TrainConfig, Trainer
from rewardgen.types import Rollout, RolloutRequest
from tests.toys import IMAGE_SIZE, ToyDataset, ToyPolicy, ToyReward

NUM_STEPS = 6
WINDOW = WindowConfig(kind="refl", entry_range=(1, 5))
EXAMPLES = ToyDataset(3).examples


def draw(policy: ToyPolicy, stop: int, keep: tuple[int, ...] = ()) -> Rollout:
    request = RolloutRequest(
        step=0,
        examples=EXAMPLES,
        seed_B=(7, 8, 9),
        image_size=IMAGE_SIZE,
        num_steps=NUM_STEPS,
        stop_step=stop,
        keep_steps=keep,
    )
    learner = make(policy)
    return RolloutWorker(policy).rollout(request, learner.publish())


def make(policy: ToyPolicy, fm_weight: float = 0.0, term_grad_norms: bool = True) -> Learner:
    config = ObjectiveConfig.model_validate(
        {
            "flow_matching": {"weight": fm_weight},
            "rewards": {"style": {"use": "toy", "weight": 0.5}},
            "max_failed_share": 1.0,
        }
    )
    return Learner(
        policy,
        Objective(config, {"style": ToyReward()}),
        optimizer=OptimizerConfig(lr=1e-2),
        window=WINDOW,
        term_grad_norms=term_grad_norms,
    )


def gradient(rollout: Rollout, monkeypatch: pytest.MonkeyPatch, *, term_grad_norms: bool = True) -> list[Tensor]:
    seen: list[list[Tensor]] = []
    monkeypatch.setattr(Optimizer, "update", lambda self, found, norm, *, step: seen.append(found))
    learner = make(ToyPolicy(), term_grad_norms=term_grad_norms)
    batch = MicroBatch(examples=EXAMPLES, seed_B=(0, 1, 2), image_size=IMAGE_SIZE, rollout=rollout)
    report = learner.step([batch], step=0)
    assert report.valid_counts["style"] == len(EXAMPLES) * max(1, len(rollout.trajectory.kept_steps))
    return seen[0]


def test_kept_states_are_those_of_shorter_prefixes() -> None:
    rollout = draw(ToyPolicy(), 5, (4, 2, 5))
    entered = list(by_entry(rollout.trajectory))
    assert [trajectory.entry_step for trajectory in entered] == [4, 2, 5]
    for trajectory in entered:
        alone = draw(ToyPolicy(), trajectory.entry_step).trajectory
        assert torch.equal(trajectory.entry_BLC, alone.entry_BLC)
        assert trajectory.steps_SBLC is None
    assert list(by_entry(alone)) == [alone]
    with pytest.raises(ValueError, match=r"states before \[4\] are wanted of 3 steps"):
        draw(ToyPolicy(), 3, (4,))


@pytest.mark.parametrize("term_grad_norms", [True, False])
def test_the_gradient_is_the_mean_over_entries(term_grad_norms: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    both = gradient(draw(ToyPolicy(), 4, (4, 2)), monkeypatch, term_grad_norms=term_grad_norms)
    singles = [gradient(draw(ToyPolicy(), entry), monkeypatch) for entry in (4, 2)]
    for found, first, second in zip(both, *singles, strict=True):
        torch.testing.assert_close(found, (first + second) / 2, rtol=1e-6, atol=1e-9)
        assert float((first - second).abs().max()) > 1e-6


def run(folder: Path, **rollout: object) -> tuple[list[tuple[int, ...]], dict[str, Tensor]]:
    """The kept steps of every rollout of three steps, and where the weights come to."""
    policy, kept = ToyPolicy(), []
    worker = RolloutWorker(policy)

    class Worker:
        def rollout(self, request: RolloutRequest, weights: object) -> Rollout:
            kept.append((request.stop_step, *request.keep_steps))
            return worker.rollout(request, weights)  # type: ignore[arg-type]

    class Silent:
        def step(self, report: object) -> None:
            pass

    trainer = Trainer(
        make(policy, fm_weight=1.0),
        InlinePool(Worker()),
        ToyDataset(4),
        rollout=RolloutConfig.model_validate(
            {"image_size": IMAGE_SIZE, "num_steps": NUM_STEPS, "window": WINDOW.model_dump(), **rollout}
        ),
        config=TrainConfig(num_steps=3, batch_size=2, checkpoint_every=0),
        seed=3,
        folder=folder,
        reporter=Silent(),
    )
    trainer.run()
    return kept, trainer.learner.state()[0]


def test_one_entry_is_the_run_it_was_bit_for_bit(tmp_path: Path) -> None:
    from rewardgen.seeds import derive_seed

    (kept, weights), (again, stated) = run(tmp_path / "a"), run(tmp_path / "b", entries_per_rollout=1)
    assert kept == again == [(draw_entry(WINDOW, NUM_STEPS, derive_seed(3, "entry_step", step)),) for step in range(3)]
    assert all(torch.equal(weights[name], stated[name]) for name in weights)


def test_several_entries_share_a_prefix(tmp_path: Path) -> None:
    kept, weights = run(tmp_path / "a", entries_per_rollout=3)
    singles, before = run(tmp_path / "b")
    for (stop, *entries), (single,) in zip(kept, singles, strict=True):
        assert len(set(entries)) == 3
        assert stop == max(entries)
        assert entries[0] == single
        assert all(1 <= entry <= 5 for entry in entries)
    assert not all(torch.equal(weights[name], before[name]) for name in weights)


def test_entries_are_uniform_and_different() -> None:
    counts = torch.zeros(2, 5)
    for seed in range(2000):
        first, second = draw_entries(WINDOW, NUM_STEPS, (seed, seed + 100_000))
        assert first == draw_entry(WINDOW, NUM_STEPS, seed)
        assert first != second
        counts[0, first - 1] += 1
        counts[1, second - 1] += 1
    assert float(((counts - 400) ** 2 / 400).sum(1).max()) < 20  # chi square of 4 degrees, 0.05 % beyond
    with pytest.raises(ValueError, match="has only 5"):
        draw_entries(WINDOW, NUM_STEPS, range(6))


def test_settings_stay_out_of_the_dump_while_unset() -> None:
    """Committed results are keyed by the dump of their experiment."""
    config = RolloutConfig(image_size=IMAGE_SIZE, num_steps=NUM_STEPS, window=WINDOW)
    assert set(config.model_dump()) == {"image_size", "num_steps", "window"}
    several = RolloutConfig(image_size=IMAGE_SIZE, num_steps=NUM_STEPS, window=WINDOW, entries_per_rollout=2)
    assert several.model_dump(mode="json")["entries_per_rollout"] == 2
    assert RolloutConfig.model_validate(several.model_dump()) == several
    assert "compile" not in TrainConfig().model_dump()
    assert TrainConfig(compile=True).model_dump()["compile"] is True
    with pytest.raises(ValidationError, match="the window has 5 entry steps"):
        RolloutConfig(image_size=IMAGE_SIZE, num_steps=NUM_STEPS, window=WINDOW, entries_per_rollout=6)
