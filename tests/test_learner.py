"""The learner's step against the loss written out, its masks, its counters and its state."""

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from rewardgen.errors import CheckpointError, ConfigError, NonFiniteError
from rewardgen.flow.loss import draw_times_and_noise, flow_matching_loss
from rewardgen.flow.window import WindowConfig, run_window
from rewardgen.learner import Learner, MicroBatch, OptimizerConfig
from rewardgen.objective import Objective, ObjectiveConfig
from rewardgen.optimizer import Optimizer
from rewardgen.rollout import RolloutWorker
from rewardgen.types import Example, RolloutRequest
from tests.toys import IMAGE_SIZE, ToyDataset, ToyPolicy, ToyReward

NUM_STEPS, ENTRY = 4, 2
WINDOW = WindowConfig(kind="refl", entry_range=(ENTRY, ENTRY))
EXAMPLES = ToyDataset(4).examples


def make(
    policy: ToyPolicy | None = None,
    *,
    rewards: dict[str, ToyReward] | None = None,
    fm_weight: float = 1.0,
    lr: float = 1e-2,
    **options: object,
) -> Learner:
    rewards = {"style": ToyReward()} if rewards is None else rewards
    config = ObjectiveConfig.model_validate(
        {
            "flow_matching": {"weight": fm_weight},
            "rewards": {name: {"use": "toy", "weight": 0.3 + i} for i, name in enumerate(rewards)},
            "max_failed_share": 1.0,
        }
    )
    arguments = {"optimizer": OptimizerConfig(lr=lr), "window": WINDOW} | options
    return Learner(policy or ToyPolicy(), Objective(config, rewards), **arguments)  # type: ignore[arg-type]


def micro_batches(learner: Learner, size: int, examples: Sequence[Example] = EXAMPLES) -> list[MicroBatch]:
    batches = []
    for start in range(0, len(examples), size):
        seed_B = tuple(range(start, min(start + size, len(examples))))
        request = RolloutRequest(
            step=0,
            examples=examples[start : start + size],
            seed_B=tuple(seed + 100 for seed in seed_B),
            image_size=IMAGE_SIZE,
            num_steps=NUM_STEPS,
            stop_step=ENTRY,
        )
        worker = RolloutWorker(learner.policy, precision=learner.precision)
        rollout = worker.rollout(request, learner.publish())
        batches.append(MicroBatch(examples=request.examples, seed_B=seed_B, image_size=IMAGE_SIZE, rollout=rollout))
    return batches


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """The gradients that reach the optimizer, before clipping."""
    seen: list[list[Tensor]] = []
    update = Optimizer.update

    def spy(self: Optimizer, gradient: list[Tensor], grad_norm: float, *, step: int) -> None:
        seen.append([grad.clone() for grad in gradient])
        update(self, gradient, grad_norm, step=step)

    monkeypatch.setattr(Optimizer, "update", spy)
    return seen


def written_out(policy: ToyPolicy, batch: MicroBatch, reward_weights: dict[str, float]) -> Tensor:
    """The loss of the paper for one batch, as one expression that autograd differentiates by itself."""
    clean_BLC = policy.encode_pixels(torch.stack([e.target for e in batch.examples if e.target is not None]))
    t_B, noise_BLC = draw_times_and_noise(batch.seed_B, clean_BLC, policy.training_sigmas(IMAGE_SIZE))
    condition = policy.encode(batch.examples)
    l_pre = flow_matching_loss(
        policy.velocity_fn(condition, mode="train", image_size=IMAGE_SIZE), clean_BLC, noise_BLC, t_B
    ).mean()
    assert batch.rollout is not None
    velocity = policy.velocity_fn(condition, mode="sample", image_size=IMAGE_SIZE)
    picture = policy.decode(run_window(velocity, batch.rollout.trajectory, WINDOW, enable_grad=True), IMAGE_SIZE)
    reward = ToyReward().score(picture, batch.examples).value_B.mean()
    return l_pre - sum(reward_weights.values()) * reward


def test_the_gradient_is_that_of_the_loss_written_out(applied: list[list[Tensor]]) -> None:
    learner = make()
    (batch,) = micro_batches(learner, 4)
    loss = written_out(ToyPolicy(), batch, {"style": 0.3})
    policy = ToyPolicy()
    expected = torch.autograd.grad(written_out(policy, batch, {"style": 0.3}), list(policy.trainable().values()))
    report = learner.step([batch], step=0)
    assert report.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    for found, wanted in zip(applied[0], expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-7, rtol=1e-5)
    assert report.loss == pytest.approx(sum(report.terms.values()))
    assert report.terms["style"] == pytest.approx(-0.3 * report.reward_means["style"])
    assert report.entry_step == ENTRY


@pytest.mark.parametrize("fail_ids", [(), ("toy-000",), ("toy-001", "toy-002", "toy-003")])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_accumulation_changes_nothing(size: int, fail_ids: tuple[str, ...], applied: list[list[Tensor]]) -> None:
    """4x1 = 1x4, with failed scores and missing targets spread unevenly over the micro-batches."""
    no_target = Example(id="toy-003", prompt="x", style_refs=EXAMPLES[3].style_refs)
    examples, reports = [*EXAMPLES[:3], no_target], []
    for cut in (4, size):
        learner = make(rewards={"style": ToyReward(fail_ids=fail_ids)})
        reports.append(learner.step(micro_batches(learner, cut, examples), step=0))
    for whole, parts in zip(*applied, strict=True):
        torch.testing.assert_close(whole, parts, atol=1e-6, rtol=1e-5)
    assert reports[0].valid_counts == reports[1].valid_counts == {"flow_matching": 3, "style": 4 - len(fail_ids)}
    assert reports[0].loss == pytest.approx(reports[1].loss, rel=1e-6)
    assert reports[0].grad_norms == pytest.approx(reports[1].grad_norms, rel=1e-5)


def test_a_failed_score_is_as_if_the_example_had_not_been_scored(applied: list[list[Tensor]]) -> None:
    """The toy reward fails with sqrt(-1), whose backward is NaN even for a gradient of 0."""
    learner = make(rewards={"style": ToyReward(fail_ids=["toy-001"])}, fm_weight=0.0)
    report = learner.step(micro_batches(learner, 4), step=0)
    others = make(fm_weight=0.0)
    batches = micro_batches(others, 1)
    others.step([batches[0], *batches[2:]], step=0)
    assert not report.skipped
    for found, wanted in zip(*applied, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-7, rtol=1e-5)


def test_without_a_valid_score_the_term_contributes_nothing() -> None:
    everyone = [example.id for example in EXAMPLES]
    learner, plain = make(rewards={"style": ToyReward(fail_ids=everyone)}), make(rewards={})
    report = learner.step(micro_batches(learner, 2), step=0)
    plain.step(micro_batches(plain, 2), step=0)
    assert report.valid_counts["style"] == 0
    assert "style" not in report.reward_means
    assert "style" not in report.terms
    assert_equal(learner.policy, plain.policy)
    alone = make(rewards={"style": ToyReward(fail_ids=everyone)}, fm_weight=0.0)
    assert alone.step(micro_batches(alone, 2), step=0).skipped
    assert_equal(alone.policy, ToyPolicy())


@pytest.mark.parametrize("window", [WINDOW, WindowConfig(kind="full", checkpoint_steps=True)], ids=["refl", "full"])
def test_several_rewards_in_one_backward_pass_or_in_several(window: WindowConfig, applied: list[list[Tensor]]) -> None:
    reports = []
    for separate in (True, False):
        rewards = {"a": ToyReward(2.0), "b": ToyReward(-0.5, ["toy-002"])}
        learner = make(rewards=rewards, term_grad_norms=separate, window=window)
        reports.append(learner.step(micro_batches(learner, 4), step=0))
    for found, wanted in zip(*applied, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-7, rtol=1e-5)
    assert set(reports[0].grad_norms) == {"flow_matching", "a", "b"}
    assert set(reports[1].grad_norms) == {"flow_matching", "(all rewards)"}
    assert reports[0].metrics["cosine/a/b"] < 0, "the second reward is against what the first is for"


def test_cosines_and_norms_add_up_to_the_gradients_norm() -> None:
    learner = make()
    report = learner.step(micro_batches(learner, 2), step=0)
    a, b = report.grad_norms["flow_matching"], report.grad_norms["style"]
    cosine = report.metrics["cosine/flow_matching/style"]
    assert report.grad_norm**2 == pytest.approx(a * a + b * b + 2 * a * b * cosine, rel=1e-5)


def test_a_chain_of_steps_raises_the_reward() -> None:
    learner = make(fm_weight=0.0)
    means = [learner.step(micro_batches(learner, 4), step=step).reward_means["style"] for step in range(12)]
    assert means[-1] > means[0] + 0.1 * abs(means[0])


def test_nonfinite_steps_change_nothing_and_too_many_stop_the_run() -> None:
    learner = make(max_nonfinite_steps=3)
    learner.step(micro_batches(learner, 4), step=0)
    before = {name: value.clone() for name, value in learner.state()[0].items()}
    broken = [
        *EXAMPLES[:3],
        Example(id="bad", style_refs=EXAMPLES[0].style_refs, target=torch.full((3, 8, 8), math.nan)),
    ]
    for step in (1, 2):
        report = learner.step(micro_batches(learner, 4, broken), step=step)
        assert report.skipped
        assert not math.isfinite(report.grad_norm)
    after = learner.state()[0]
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not learner.step(micro_batches(learner, 4), step=3).skipped
    for step in (4, 5):
        learner.step(micro_batches(learner, 4, broken), step=step)
    with pytest.raises(NonFiniteError, match=r"step 6: .* 3 steps in a row, because of the term flow_matching;"):
        learner.step(micro_batches(learner, 4, broken), step=6)
    assert learner.version == 2


def test_the_learning_rate_falls_to_zero_after_the_warm_up() -> None:
    optimizer = Optimizer({"w": nn.Parameter(torch.zeros(2))}, OptimizerConfig(lr=0.1, warmup_steps=4, decay_steps=12))
    rates = [optimizer.lr(step) for step in range(14)]
    assert rates[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    assert rates[8] == pytest.approx(0.05)
    assert all(a > b for a, b in pairwise(rates[4:13]))
    assert rates[12:] == [0.0, 0.0]


def test_warm_up_clipping_and_average() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    config = OptimizerConfig(lr=0.1, warmup_steps=4, weight_decay=0.0, max_grad_norm=1.0, betas=(0.0, 0.0), eps=1.0)
    optimizer = Optimizer({"w": parameter}, config, ema_decay=0.75)
    assert [optimizer.lr(step) for step in (0, 1, 3, 9)] == pytest.approx([0.025, 0.05, 0.1, 0.1])
    optimizer.update([torch.tensor([30.0, 40.0])], 50.0, step=3)
    # Clipped to (0.6, 0.8); with betas 0 and eps 1, AdamW moves by lr * g / (|g| + 1).
    expected = -0.1 * torch.tensor([0.6 / 1.6, 0.8 / 1.8])
    torch.testing.assert_close(parameter.detach(), expected)
    with optimizer.averaged():
        torch.testing.assert_close(parameter.detach(), 0.25 * expected)
    torch.testing.assert_close(parameter.detach(), expected)
    optimizer.update([torch.tensor([0.3, 0.4])], 0.5, step=0)
    torch.testing.assert_close(parameter.detach(), expected - 0.025 * torch.tensor([0.3 / 1.3, 0.4 / 1.4]))


def test_bf16_gradients_are_close_and_parameters_stay_float32(applied: list[list[Tensor]]) -> None:
    for precision in ("fp32", "bf16"):
        learner = make(precision=precision)
        learner.step(micro_batches(learner, 4), step=0)
    exact, rough = (torch.cat([grad.flatten() for grad in gradient]) for gradient in applied)
    assert not torch.equal(exact, rough)
    assert float(torch.cosine_similarity(exact, rough, dim=0)) > 0.99
    assert all(p.dtype == torch.float32 for p in learner.policy.trainable().values())


def test_state_restores_everything() -> None:
    first = make(ema_decay=0.9)
    for step in range(3):
        first.step(micro_batches(first, 2), step=step)
    tensors, state = first.state()
    second = make(ema_decay=0.9)
    second.step(micro_batches(second, 4), step=0)
    second.load_state({name: value.clone() for name, value in tensors.items()}, state)
    for learner in (first, second):
        learner.step(micro_batches(learner, 2), step=3)
    assert first.version == second.version == 4
    pairs = zip(first.state()[0].items(), second.state()[0].items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    assert first.state()[1] == second.state()[1]


def test_a_state_that_does_not_fit_is_refused_by_name() -> None:
    tensors, state = make(ema_decay=0.9).state()
    with pytest.raises(CheckpointError, match=r"surplus tensor 'average/bias'.*ema_decay"):
        make().load_state(tensors, state)
    with pytest.raises(CheckpointError, match="shape"):
        make(ToyPolicy(hidden=3), ema_decay=0.9).load_state(tensors, state)
    short = {name: value for name, value in tensors.items() if name != "trainable/outer"}
    with pytest.raises(CheckpointError, match="lacks tensor 'trainable/outer'"):
        make(ema_decay=0.9).load_state(short, state)
    with pytest.raises(CheckpointError, match="version"):
        make(ema_decay=0.9).load_state(tensors, {})


def test_targets_of_another_size_and_policies_without_weights_are_refused() -> None:
    learner = make()
    odd = Example(id="odd", target=torch.zeros(3, 4, 4))
    with pytest.raises(ConfigError, match=r"example 'odd': .*\[3, 4, 4\].*\[3, 8, 8\]"):
        learner.step([MicroBatch(examples=[odd], seed_B=[0], image_size=IMAGE_SIZE)], step=0)

    class Frozen(ToyPolicy):
        def trainable(self) -> dict[str, nn.Parameter]:
            return {}

    with pytest.raises(ConfigError, match="trains nothing"):
        make(Frozen())


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
