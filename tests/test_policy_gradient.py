"""Learning from samples: the losses' formulas, what a step does with them, and that a toy policy learns."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from rewardgen.base_policy import BasePolicy
from rewardgen.config import load_experiment
from rewardgen.errors import CheckpointError, ConfigError, ScoringError
from rewardgen.fleet.inline import InlinePool
from rewardgen.flow.loss import draw_times_and_noise
from rewardgen.flow.sampling import sample
from rewardgen.flow.stochastic import kernel
from rewardgen.learner import Learner, MicroBatch, OptimizerConfig
from rewardgen.objective import Objective, ObjectiveConfig
from rewardgen.optimizer import Optimizer
from rewardgen.policies.uso import UsoPolicy
from rewardgen.policy import Policy, noise_like_request
from rewardgen.policy_gradient import GrpoConfig, NftConfig, clipped_loss, nft_loss
from rewardgen.reward import Reward
from rewardgen.rollout import RolloutConfig, RolloutWorker
from rewardgen.samples import sample_requests, submit_samples
from rewardgen.scoring import ScoringWorker
from rewardgen.seeds import derive_seed
from rewardgen.trainer import TrainConfig, Trainer
from rewardgen.types import Example, Rollout, Score, StepReport
from tests.test_uso_policy import make_parts, make_projector
from tests.toys import IMAGE_SIZE, ToyDataset, ToyJudge, ToyPolicy, ToyReward

ROLLOUT = RolloutConfig.model_validate(
    {"image_size": [8, 8], "num_steps": 5, "window": {"kind": "refl", "entry_range": [2, 4]}}
)
EXAMPLES = ToyDataset(4).examples
EXPERIMENT = Path(__file__).resolve().parent.parent / "experiments" / "uso_grpo.yaml"
GRPO: dict[str, Any] = {"kind": "grpo", "num_generations": 3, "window": {"size": 2, "range": [0, 2]}}
NFT: dict[str, Any] = {"kind": "nft", "num_generations": 3}
BOTH = pytest.mark.parametrize("settings", [GRPO, NFT], ids=["grpo", "nft"])


def make(
    settings: dict[str, Any],
    rewards: dict[str, Reward] | None = None,
    *,
    fm_weight: float = 0.0,
    policy: Policy | None = None,
    **options: Any,
) -> Learner:
    rewards = rewards or {"judge": ToyJudge()}
    config = ObjectiveConfig.model_validate(
        {
            "flow_matching": {"weight": fm_weight},
            "rewards": {name: {"use": "toy"} for name in rewards},
            "max_failed_share": 1.0,
            "policy_gradient": settings,
        }
    )
    arguments: dict[str, Any] = {"optimizer": OptimizerConfig(lr=1e-2), "window": ROLLOUT.window} | options
    return Learner(policy or ToyPolicy(), Objective(config, rewards), **arguments)


def drawn(learner: Learner, batch: Sequence[tuple[int, Example]], step: int = 0) -> list[Rollout]:
    config = learner.objective.config.policy_gradient
    assert config is not None
    pool = InlinePool(RolloutWorker(learner.policy, precision=learner.precision))
    scoring = InlinePool(ScoringWorker(learner.objective.sampled))
    requests = sample_requests(batch, config, ROLLOUT, step=step, seed=0)
    futures = submit_samples(requests, pool.put(learner.publish()), pool=pool, scoring=scoring)
    return [future.result().get() for future in futures]


def micro_batches(
    learner: Learner, size: int = 4, examples: Sequence[Example] = EXAMPLES, step: int = 0
) -> list[MicroBatch]:
    places = list(enumerate(examples))
    cuts = [places[start : start + size] for start in range(0, len(places), size)]
    return [
        MicroBatch(
            examples=[example for _, example in cut],
            seed_B=[place for place, _ in cut],
            image_size=IMAGE_SIZE,
            samples=drawn(learner, cut, step),
        )
        for cut in cuts
    ]


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


@given(st.floats(-0.5, 0.5), st.floats(-5, 5), st.sampled_from([1e-4, 0.2]))
def test_the_clipped_objective_is_its_formula(log_ratio: float, advantage: float, epsilon: float) -> None:
    log_ratio_B, advantage_B = torch.tensor([[log_ratio], [advantage]], dtype=torch.float64)
    found = clipped_loss(log_ratio_B, advantage_B, epsilon)
    ratio = math.exp(log_ratio)
    clipped = min(max(ratio, 1 - epsilon), 1 + epsilon)
    assert float(found) == pytest.approx(-min(ratio * advantage, clipped * advantage), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("adaptive", [False, True])
def test_nfts_loss_is_its_formula(adaptive: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    v, old, target = (torch.randn(3, 4, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    t_B, advantage_B, beta = torch.tensor([0.9, 0.4, 0.1]), torch.tensor([-5.0, 0.0, 2.5]), 0.3
    found = nft_loss(v, old, target, t_B, advantage_B, nft_beta=beta, advantage_clip=5.0, adaptive=adaptive)
    for b in range(3):
        r, t = 0.5 + float(advantage_B[b]) / 10, float(t_B[b])
        plus, minus = (1 - beta) * old[b] + beta * v[b], (1 + beta) * old[b] - beta * v[b]
        squares = [(u - target[b]).square().mean() for u in (plus, minus)]
        if adaptive:  # in the space of clean pictures: x_t - t u against x_t - t target
            errors = [t * (u - target[b]) for u in (plus, minus)]
            squares = [error.square().mean() / error.abs().mean() for error in errors]
        expected = (r * squares[0] + (1 - r) * squares[1]) * 5 / beta
        assert float(found[b]) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_where_it_starts_nft_follows_the_advantage(beta: float) -> None:
    """At v = old its gradient is that of A |v - target|^2, whatever nft_beta is."""
    generator = torch.Generator().manual_seed(0)
    old, target = (torch.randn(2, 4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    t_B, advantage_B = torch.tensor([0.5, 0.7]), torch.tensor([1.5, -0.5], dtype=torch.float64)
    v = old.clone().requires_grad_()
    loss_B = nft_loss(v, old, target, t_B, advantage_B, nft_beta=beta, advantage_clip=5.0, adaptive=False)
    (found,) = torch.autograd.grad(loss_B.sum(), v)
    plain_B = advantage_B * (v - target).square().mean(dim=(1, 2))
    torch.testing.assert_close(found, torch.autograd.grad(plain_B.sum(), v)[0])


def test_nfts_fixed_point_is_the_papers() -> None:
    """At one noised state: the loss is least at `old + (2 / beta) E[r (target - old)]`, when old is the mean target.

    With E[r] = alpha and the mean target of the good samples `good`, that is old + (2 alpha / beta) (good - old).
    """
    generator = torch.Generator().manual_seed(3)
    targets = torch.randn(50, 1, 2, generator=generator, dtype=torch.float64)
    advantage_B = torch.rand(50, generator=generator, dtype=torch.float64) * 4 - 2
    old = targets.mean(dim=0, keepdim=True)
    beta, clip = 0.5, 2.0
    r_B = 0.5 + advantage_B / (2 * clip)
    alpha, good = r_B.mean(), (r_B[:, None, None] * targets).sum(0) / r_B.sum()
    best = (old + 2 * alpha / beta * (good - old)).requires_grad_()

    def mean_loss(v: Tensor) -> Tensor:
        options: dict[str, Any] = {"nft_beta": beta, "advantage_clip": clip, "adaptive": False}
        return nft_loss(v.expand(50, 1, 2), old, targets, torch.ones(50), advantage_B, **options).mean()

    (slope,) = torch.autograd.grad(mean_loss(best), best)
    assert float(slope.abs().max()) < 1e-12
    for _ in range(5):
        assert mean_loss(best + 0.1 * torch.randn(1, 1, 2, generator=generator)) > mean_loss(best)


def grpo_written_out(learner: Learner, samples: Sequence[Rollout], epsilon: float, beta: float) -> Tensor:
    """The loss as one expression, density by torch.distributions, base = the policy as it was made."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    value_GB = torch.stack([rollout.scores["judge"].value_B for rollout in samples]).double()
    advantage_GB = ((value_GB - value_GB.mean(0)) / (value_GB.std(0) + 1e-4)).clamp(-5, 5)
    for rollout, advantage_B in zip(samples, advantage_GB, strict=True):
        trajectory = rollout.trajectory
        assert trajectory.stochastic is not None
        assert trajectory.steps_SBLC is not None
        assert trajectory.log_prob_BS is not None
        for place, index in enumerate(trajectory.stochastic.steps):
            x, after = trajectory.steps_SBLC[place], trajectory.steps_SBLC[place + 1]
            form = kernel(trajectory.sigmas_T, index, trajectory.stochastic)
            means = []
            for policy in (learner.policy, ToyPolicy()):
                velocity = policy.velocity_fn(policy.encode(rollout.examples), mode="sample", image_size=IMAGE_SIZE)
                means.append(form.state * x + form.velocity * velocity(x, trajectory.sigmas_T[index].expand(len(x))))
            ours, theirs = (torch.distributions.Normal(mean.double(), form.std) for mean in means)
            elements = x[0].numel()
            old_B = trajectory.log_prob_BS[:, place] / elements
            ratio_B = (ours.log_prob(after.double()).mean(dim=(1, 2)) - old_B).exp()
            clipped_B = ratio_B.clamp(1 - epsilon, 1 + epsilon)
            gain_B = torch.minimum(ratio_B * advantage_B, clipped_B * advantage_B)
            total = total + (
                beta * torch.distributions.kl_divergence(ours, theirs).mean(dim=(1, 2)) - gain_B
            ).sum() / len(trajectory.stochastic.steps)
        count += len(advantage_B)
    return total / count


def test_grpos_gradient_is_that_of_the_loss_written_out(applied: list[list[Tensor]]) -> None:
    """Also after the policy has moved, with a divergence from the base and ratios beside 1."""
    learner = make(GRPO | {"beta": 0.3, "epsilon": 0.01, "weight": 2.0})
    samples = drawn(learner, list(enumerate(EXAMPLES)))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in learner.policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    loss = 2.0 * grpo_written_out(learner, samples, 0.01, 0.3)
    expected = torch.autograd.grad(loss, list(learner.policy.trainable().values()))
    batch = MicroBatch(examples=EXAMPLES, seed_B=range(4), image_size=IMAGE_SIZE, samples=samples)
    report = learner.step([batch], step=0)
    assert report.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    assert 0 < report.metrics["policy_gradient/outside_clip"] < 1
    for found, wanted in zip(applied[0], expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def test_nfts_gradient_is_that_of_the_loss_written_out(applied: list[list[Tensor]]) -> None:
    learner = make(NFT | {"beta": 0.3, "times_per_sample": 2})
    samples = drawn(learner, list(enumerate(EXAMPLES)))
    value_GB = torch.stack([rollout.scores["judge"].value_B for rollout in samples]).double()
    advantage_GB = (value_GB - value_GB.mean(0)) / (value_GB.std(0) + 1e-4)
    total = torch.zeros(())
    policy = learner.policy
    for rollout, advantage_B in zip(samples, advantage_GB, strict=True):
        clean = rollout.trajectory.entry_BLC
        velocity = policy.velocity_fn(policy.encode(rollout.examples), mode="sample", image_size=IMAGE_SIZE)
        for index in range(2):
            seeds = [derive_seed("nft", seed, index) for seed in rollout.trajectory.seed_B]
            t_B, noise = draw_times_and_noise(seeds, clean, policy.training_sigmas(IMAGE_SIZE))
            t = t_B[:, None, None]
            v = velocity((1 - t) * clean + t * noise, t_B)
            options: dict[str, Any] = {"nft_beta": 1.0, "advantage_clip": 5.0, "adaptive": True}
            loss_B = nft_loss(v, v, noise - clean, t_B, advantage_B, **options)
            total = total + loss_B.sum() / 2 / 12
    expected = torch.autograd.grad(total, list(policy.trainable().values()))
    batch = MicroBatch(examples=EXAMPLES, seed_B=range(4), image_size=IMAGE_SIZE, samples=samples)
    report = learner.step([batch], step=0)
    assert report.metrics["policy_gradient/kl"] == 0, "the base is what it starts from"
    for found, wanted in zip(applied[0], expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


@BOTH
def test_a_sample_that_is_not_finite_spoils_no_other(settings: dict[str, Any], applied: list[list[Tensor]]) -> None:
    """Masked, it changes the step by nothing: 0 times it would be NaN, and the whole step lost."""

    def step(spoil: bool) -> None:
        learner = make(settings)
        (batch,) = micro_batches(learner)
        samples = []
        for rollout in batch.samples:
            score, path = rollout.scores["judge"], rollout.trajectory
            valid_B = score.valid_B.clone()
            valid_B[1] = False
            entry, steps, log_prob = (None if t is None else t.clone() for t in (
                path.entry_BLC, path.steps_SBLC, path.log_prob_BS
            ))  # fmt: skip
            if spoil:
                entry[1] = torch.nan  # type: ignore[index]
                if steps is not None and log_prob is not None:
                    steps[:, 1], log_prob[1] = torch.inf, torch.nan
            spoilt = replace(path, entry_BLC=entry, steps_SBLC=steps, log_prob_BS=log_prob)  # type: ignore[arg-type]
            samples.append(replace(rollout, trajectory=spoilt, scores={"judge": replace(score, valid_B=valid_B)}))
        assert not learner.step([replace(batch, samples=samples)], step=0).skipped

    step(spoil=False)
    step(spoil=True)
    for clean, spoilt in zip(*applied, strict=True):
        assert torch.equal(clean, spoilt)


def test_a_picture_that_is_not_finite_has_no_valid_score() -> None:
    """Here dark is good, and no comparison with NaN is true: it would be the best of all."""

    class Darkness(ToyJudge):
        def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
            value_B = 1.0 - (pixels_B3HW > 0.5).flatten(1).float().mean(1)
            return Score(value_B=value_B, valid_B=torch.ones(len(examples), dtype=torch.bool))

    learner = make(GRPO, {"judge": Darkness()})
    rollout = drawn(learner, list(enumerate(EXAMPLES)))[0]
    pixels = torch.rand(4, 3, 8, 8)
    pixels[2, 0, 0, 0] = torch.nan
    again = replace(rollout, pixels_B3HW=pixels, scores={})
    found = ScoringWorker(learner.objective.sampled).score(again).scores["judge"]
    assert found.valid_B.tolist() == [True, True, False, True]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_before_the_first_update_every_ratio_is_exactly_one(precision: str, size: int) -> None:
    learner = make(GRPO | {"beta": 0.1}, precision=precision)
    report = learner.step(micro_batches(learner, size), step=0)
    assert not report.skipped
    assert report.metrics["policy_gradient/ratio_distance"] == 0.0
    assert report.metrics["policy_gradient/kl"] == 0.0
    later = learner.step(micro_batches(learner, size, step=1), step=1)
    assert later.metrics["policy_gradient/ratio_distance"] == 0.0
    assert later.metrics["policy_gradient/kl"] > 0.0, "but the base is left behind"


def test_the_ratio_of_the_real_policy_is_exactly_one_too() -> None:
    """As it is trained: LoRA and projector in float32 on a base in bfloat16, activations recomputed."""
    policy = UsoPolicy(
        make_parts(), make_projector(), train=("lora", "projector"), lora_rank=2, content_long_side=8, max_text_tokens=4
    )
    generator = torch.Generator().manual_seed(5)
    for parameter in policy.trainable().values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    policy.cast_frozen(torch.bfloat16)
    policy.enable_checkpointing()
    learner = make(GRPO, policy=policy, precision="bf16")
    report = learner.step(micro_batches(learner, 2, EXAMPLES[:2]), step=0)
    assert not report.skipped
    assert report.grad_norms["policy_gradient"] > 0
    assert report.metrics["policy_gradient/ratio_distance"] == 0.0


@BOTH
def test_more_iterations_learn_from_the_same_samples(settings: dict[str, Any], applied: list[list[Tensor]]) -> None:
    learner = make(settings | {"num_iterations": 3}, fm_weight=0.5)
    report = learner.step(micro_batches(learner), step=0)
    assert (learner.version, len(applied)) == (3, 3)
    assert report.policy_version == 0
    moved = "ratio_distance" if settings["kind"] == "grpo" else "moved"
    assert report.metrics[f"policy_gradient/{moved}"] > 0
    assert report.valid_counts["judge"] == 12, "scores are counted once"
    single = make(settings, fm_weight=0.5)
    single.step(micro_batches(single), step=0)
    assert all(torch.equal(a, b) for a, b in zip(applied[0], applied[3], strict=True))


@BOTH
@pytest.mark.parametrize(
    "judge", [ToyJudge(sign=0), ToyJudge(fail_ids=[e.id for e in EXAMPLES])], ids=["equal", "failed"]
)
def test_groups_that_say_nothing_change_nothing(settings: dict[str, Any], judge: ToyJudge) -> None:
    learner = make(settings | {"beta": 0.5}, {"judge": judge})
    learner.policy.trainable()["bias"].data.add_(0.1)  # away from the base: the divergence alone must not act either
    before = {name: p.detach().clone() for name, p in learner.policy.trainable().items()}
    report = learner.step(micro_batches(learner), step=0)
    assert report.skipped
    assert learner.version == 0
    assert report.metrics["policy_gradient/taking_part"] == 0
    assert all(torch.equal(p, before[name]) for name, p in learner.policy.trainable().items())


@BOTH
def test_a_group_that_failed_is_as_if_it_had_not_been_drawn(
    settings: dict[str, Any], applied: list[list[Tensor]]
) -> None:
    learner = make(settings, {"judge": ToyJudge(fail_ids=["toy-002"])})
    report = learner.step(micro_batches(learner, 1), step=0)
    assert report.valid_counts["judge"] == 9
    assert report.metrics["policy_gradient/taking_part"] == pytest.approx(9 / 12)
    others = make(settings)
    batches = micro_batches(others, 1)
    others.step([batches[0], batches[1], batches[3]], step=0)
    for found, wanted in zip(*applied, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-7, rtol=1e-5)


@BOTH
@pytest.mark.parametrize("scale", ["group", "batch"])
def test_accumulation_changes_nothing(settings: dict[str, Any], scale: str, applied: list[list[Tensor]]) -> None:
    reports = []
    for size in (4, 1, 3):
        learner = make(settings | {"scale_rewards": scale, "beta": 0.1}, fm_weight=0.5)
        reports.append(learner.step(micro_batches(learner, size), step=0))
    for parts in applied[1:]:
        for whole, part in zip(applied[0], parts, strict=True):
            torch.testing.assert_close(whole, part, atol=1e-6, rtol=1e-4)
    assert reports[0].loss == pytest.approx(reports[1].loss, rel=1e-5)
    assert (
        reports[0].valid_counts == reports[1].valid_counts == {"flow_matching": 4, "policy_gradient": 12, "judge": 12}
    )


def mean_score(policy: ToyPolicy) -> float:
    """By the ODE, as an evaluation draws, on noise that training never saw."""
    condition = policy.encode(EXAMPLES)
    velocity = policy.velocity_fn(condition, mode="sample", image_size=IMAGE_SIZE)
    scores = []
    for seed in range(8):
        noise = noise_like_request(policy, range(9000 + 4 * seed, 9004 + 4 * seed), IMAGE_SIZE)
        clean = sample(velocity, noise, policy.sigmas(5, IMAGE_SIZE), start=0, stop=5, enable_grad=False)
        scores.append(ToyJudge().score(policy.decode(clean, IMAGE_SIZE).clamp(0, 1), EXAMPLES).value_B)
    return float(torch.cat(scores).mean())


@pytest.mark.parametrize(
    ("settings", "sign"),
    [
        ({"kind": "grpo"}, 1),
        ({"kind": "grpo", "window": {"size": 2, "move_every": 3}, "same_noise": True, "num_iterations": 2}, -1),
        ({"kind": "nft"}, 1),
        ({"kind": "nft", "nft_beta": 0.3, "adaptive": False, "num_iterations": 2}, -1),
    ],
    ids=["grpo", "mixgrpo", "nft", "nft-twice"],
)
def test_a_toy_policy_goes_where_a_reward_without_gradient_wants_it(settings: dict[str, Any], sign: int) -> None:
    learner = make(
        settings | {"num_generations": 6}, {"judge": ToyJudge(sign=sign)}, optimizer=OptimizerConfig(lr=2e-2)
    )
    assert isinstance(learner.policy, ToyPolicy)
    before = mean_score(learner.policy)
    for step in range(15):
        learner.step(micro_batches(learner, step=step), step=step)
    gained = sign * (mean_score(learner.policy) - before)
    assert gained > 0.1 * abs(before), f"from {before:.3f}, {gained:+.3f}"


def test_one_step_mixes_rewards_with_and_without_gradient(applied: list[list[Tensor]]) -> None:
    """Each part of the gradient is what it is alone."""
    places = list(enumerate(EXAMPLES))
    rewards: dict[str, Reward] = {"style": ToyReward(), "judge": ToyJudge()}
    learner, alone, rest = make(GRPO, rewards, fm_weight=1.0), make(GRPO), make(GRPO, rewards, fm_weight=1.0)
    request = sample_requests(places, NftConfig(kind="nft"), ROLLOUT, step=0, seed=1)[0]
    prefix = dataclasses.replace(request, stop_step=2, decode=False)
    rollout = RolloutWorker(learner.policy).rollout(prefix, learner.publish())
    (batch,) = micro_batches(learner)
    report = learner.step([dataclasses.replace(batch, rollout=rollout)], step=0)
    assert set(report.terms) == {"flow_matching", "style", "policy_gradient"} == set(report.grad_norms)
    assert set(report.reward_means) == {"style", "judge"}
    assert report.loss == pytest.approx(sum(report.terms.values()))
    assert "cosine/flow_matching/policy_gradient" in report.metrics
    alone.step(micro_batches(alone), step=0)
    silent = drawn(make(GRPO, {"judge": ToyJudge(sign=0)}), places)
    rest.step([dataclasses.replace(batch, rollout=rollout, samples=silent)], step=0)
    for whole, sampled, others in zip(*applied, strict=True):
        torch.testing.assert_close(whole, sampled + others, atol=1e-6, rtol=1e-4)


class Reports(list[StepReport]):
    def step(self, report: StepReport) -> None:
        self.append(report)


def trainer_in(
    folder: Path, settings: dict[str, Any], *, batch_size: int = 2, num_steps: int = 3, staleness: int = 0
) -> Trainer:
    rewards: dict[str, Reward] = {"style": ToyReward(), "judge": ToyJudge(fail_ids=["toy-002"])}
    learner = make(settings, rewards, fm_weight=0.5, ema_decay=0.9)
    config = {"num_steps": num_steps, "batch_size": batch_size, "accumulation": 4 // batch_size, "checkpoint_every": 0}
    return Trainer(
        learner,
        InlinePool(RolloutWorker(learner.policy, colocated=True), copies=staleness > 0),
        ToyDataset(7),
        rollout=ROLLOUT,
        config=TrainConfig.model_validate(config),
        seed=0,
        staleness=staleness,
        folder=folder,
        reporter=Reports(),
        scoring=InlinePool(ScoringWorker(learner.objective.sampled)),
    )


@BOTH
def test_a_resumed_run_equals_the_uninterrupted_one(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = settings | {"beta": 0.2, "num_iterations": 2, "scale_rewards": "batch"}
    whole = trainer_in(tmp_path / "whole", settings)
    whole.run()
    trainer_in(tmp_path / "part", settings, num_steps=1).run()
    resumed = trainer_in(tmp_path / "part", settings)
    # As if the starting weights had been drawn at random and could not be drawn again.
    for parameter in resumed.learner.policy.trainable().values():
        parameter.data.add_(1.0)
    assert resumed.resume() == 1
    resumed.run()
    (tensors, state), (others, other) = whole.learner.state(), resumed.learner.state()
    assert tensors.keys() == others.keys()
    assert any(name.startswith("base/") for name in tensors)
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert state == other
    assert state["version"] == 6


def test_samples_drawn_ahead_are_of_older_weights_and_survive_a_resumption(tmp_path: Path) -> None:
    reports = Reports()
    whole = trainer_in(tmp_path / "whole", GRPO, staleness=1)
    whole._reporter = reports
    whole.run()
    away = [report.metrics["policy_gradient/ratio_distance"] for report in reports]
    assert away[0] == 0.0
    assert min(away[1:]) > 0.0
    assert [report.metrics["fleet/staleness"] for report in reports] == [0, 1, 1]
    trainer_in(tmp_path / "part", GRPO, num_steps=2, staleness=1).run()
    resumed = trainer_in(tmp_path / "part", GRPO, staleness=1)
    assert resumed.resume() == 2
    resumed.run()
    for name, tensor in whole.learner.state()[0].items():
        assert torch.equal(resumed.learner.state()[0][name], tensor)


@BOTH
def test_cutting_the_batch_differently_gives_the_same_run(settings: dict[str, Any], tmp_path: Path) -> None:
    runs = [trainer_in(tmp_path / str(size), settings, batch_size=size) for size in (1, 2, 4)]
    for run in runs:
        run.run()
    for name, tensor in runs[0].learner.state()[0].items():
        for run in runs[1:]:
            torch.testing.assert_close(run.learner.state()[0][name], tensor, atol=1e-4, rtol=1e-3)


def test_requests_say_all_about_the_samples() -> None:
    batch = [(4, EXAMPLES[0]), (5, EXAMPLES[1])]
    config = GrpoConfig.model_validate(GRPO | {"same_noise": True})
    requests = sample_requests(batch, config, ROLLOUT, step=3, seed=1)
    assert [request.group_B for request in requests] == [(4, 5)] * 3
    assert len({request.seed_B for request in requests}) == 1
    noises = [request.stochastic.seed_B for request in requests if request.stochastic is not None]
    assert len({seed for seeds in noises for seed in seeds}) == 6
    assert all(request.decode and request.stop_step == 5 for request in requests)
    windows = {requests[0].stochastic.steps if requests[0].stochastic else ()}
    for step in range(30):
        other = sample_requests(batch, config, ROLLOUT, step=step, seed=1)[1].stochastic
        windows |= {other.steps if other else ()}
    assert windows == {(0, 1), (1, 2)}
    nft = sample_requests(batch, NftConfig(kind="nft", num_generations=4), ROLLOUT, step=3, seed=1)
    assert len({seed for request in nft for seed in request.seed_B}) == 8
    assert all(request.stochastic is None for request in nft)
    # The same samples, however the batch is cut.
    apart = sample_requests(batch[1:], config, ROLLOUT, step=3, seed=1)
    assert [request.seed_B[1:] for request in requests] == [request.seed_B for request in apart]


def test_an_exception_on_the_way_is_the_samples_own() -> None:
    learner = make(GRPO)
    requests = sample_requests(list(enumerate(EXAMPLES)), GrpoConfig.model_validate(GRPO), ROLLOUT, step=0, seed=0)
    pool, scoring = InlinePool(RolloutWorker(learner.policy)), InlinePool(ScoringWorker(learner.objective.sampled))
    weights = pool.put(learner.publish())
    broken = [
        dataclasses.replace(requests[0], decode=False),
        dataclasses.replace(requests[1], stop_step=3),
        requests[2],
    ]
    futures = submit_samples(broken, weights, pool=pool, scoring=scoring)
    errors = [type(future.exception()) for future in futures]
    assert errors == [ScoringError, ValueError, type(None)], "of the judge, of the rollout, none"


def test_the_scoring_worker_masks_what_failed_and_wants_pictures() -> None:
    learner = make(GRPO, {"judge": ToyJudge(fail_ids=["toy-001"])})
    rollout = drawn(learner, list(enumerate(EXAMPLES)))[0]
    assert rollout.pixels_B3HW is None
    assert rollout.scores["judge"].valid_B.tolist() == [True, False, True, True]
    with pytest.raises(ScoringError, match="without pictures"):
        ScoringWorker(learner.objective.sampled).score(rollout)


def test_the_base_is_lent_and_given_back_and_refused_where_it_does_not_fit() -> None:
    policy = ToyPolicy()
    base = BasePolicy(policy.trainable())
    start = {name: p.detach().clone() for name, p in policy.trainable().items()}
    for parameter in policy.trainable().values():
        parameter.data.mul_(2.0)
    with contextlib.suppress(KeyError), base.swapped_in():
        assert all(torch.equal(p, start[name]) for name, p in policy.trainable().items())
        raise KeyError
    assert all(torch.equal(p, 2 * start[name]) for name, p in policy.trainable().items())
    with pytest.raises(CheckpointError, match=r"base/bias.*is missing|base/inner.*is missing"):
        base.load_state({})
    state = make(GRPO).state()
    with pytest.raises(CheckpointError, match=r"base/inner.*beta must stay"):
        make(GRPO | {"beta": 0.1}).load_state(*state)


def test_settings_that_cannot_be_are_refused() -> None:
    for settings, message in (
        ({"kind": "ppo"}, "'grpo'"),
        ({"kind": "nft", "epsilon": 0.1}, "epsilon"),
        ({"kind": "grpo", "num_generations": 1}, "num_generations"),
    ):
        with pytest.raises(ValidationError, match=message):
            ObjectiveConfig.model_validate({"policy_gradient": settings})
    with pytest.raises(ValueError, match="only 4 can be noisy"):
        GrpoConfig.model_validate({"kind": "grpo", "window": {"size": 5}}).check(5)
    with pytest.raises(ValidationError, match="a reward cannot be called 'policy_gradient'"):
        ObjectiveConfig.model_validate({"rewards": {"policy_gradient": {"use": "toy"}}})


@BOTH
def test_names_of_trl_are_understood(settings: dict[str, Any]) -> None:
    for written, meant in ((True, "group"), (False, "none"), ("group", "group"), ("batch", "batch"), ("none", "none")):
        made = ObjectiveConfig.model_validate(
            {"policy_gradient": settings | {"scale_rewards": written}}
        ).policy_gradient
        assert made is not None
        assert made.scale_rewards == meant
        assert made.model_dump()["scale_rewards"] == meant
    for wrong in (1, 0, None, "std"):
        with pytest.raises(ValidationError, match="scale_rewards"):
            ObjectiveConfig.model_validate({"policy_gradient": settings | {"scale_rewards": wrong}})


def test_who_learns_from_what() -> None:
    def objective(judge: dict[str, Any], more: dict[str, Any]) -> Objective:
        rewards = {"style": {"use": "toy"}, "judge": {"use": "toy"} | judge}
        config = ObjectiveConfig.model_validate({"rewards": rewards} | more)
        return Objective(config, {"style": ToyReward(), "judge": ToyJudge()})

    mixed = objective({}, {"policy_gradient": GRPO})
    assert list(mixed.sampled) == ["judge"]
    assert mixed.active_rewards(0) == ("style",)
    assert mixed.active_samples(0) == ("judge",)
    late = objective({"start_step": 3, "weight": 2.0}, {"policy_gradient": GRPO})
    assert (late.active_samples(2), late.active_samples(3)) == ((), ("judge",))
    assert [late.weight("policy_gradient", step) for step in (2, 3)] == [0.0, 1.0]
    with pytest.raises(ConfigError, match=r"objective\.rewards\.judge: ToyJudge has no gradient"):
        objective({}, {})
    with pytest.raises(ConfigError, match=r"objective\.rewards\.judge: ToyJudge has no gradient"):
        objective({"learn_from": "gradient"}, {"policy_gradient": GRPO})
    with pytest.raises(ConfigError, match=r"judge\.learn_from: samples .* objective\.policy_gradient"):
        objective({"learn_from": "samples"}, {})
    config = ObjectiveConfig.model_validate(
        {"rewards": {"s": {"use": "t", "learn_from": "samples"}}, "policy_gradient": NFT}
    )
    assert list(Objective(config, {"s": ToyReward()}).sampled) == ["s"]
    assert config.model_dump()["rewards"]["s"]["learn_from"] == "samples"
    assert ObjectiveConfig.model_validate(config.model_dump(mode="json")) == config


def test_experiments_without_samples_are_dumped_as_before() -> None:
    """Benchmarks hash what an experiment says, and committed cells belong to what was said before."""
    dumped = ObjectiveConfig.model_validate({"rewards": {"style": {"use": "csd"}}}).model_dump(mode="json")
    assert set(dumped) == {"flow_matching", "rewards", "max_failed_share", "failure_window"}
    assert set(dumped["rewards"]["style"]) == {"use", "args", "weight", "start_step", "max_failed_share"}


def test_a_trainer_without_judges_is_refused(tmp_path: Path) -> None:
    learner = make(GRPO)
    with pytest.raises(ConfigError, match="nobody scores"):
        Trainer(
            learner,
            InlinePool(RolloutWorker(learner.policy)),
            ToyDataset(2),
            rollout=ROLLOUT,
            config=TrainConfig(),
            seed=0,
            folder=tmp_path,
            reporter=Reports(),
        )


def test_an_experiment_says_what_cannot_be_before_anything_is_read() -> None:
    tiny, full = (load_experiment(EXPERIMENT, flavor).objective.policy_gradient for flavor in ("tiny", "flux-dev"))
    assert isinstance(tiny, GrpoConfig)
    assert isinstance(full, GrpoConfig)
    assert full.window is not None
    assert full.window.move_every == 25
    unscaled = load_experiment(EXPERIMENT, None, ["objective.policy_gradient.scale_rewards=false"])
    assert unscaled.objective.policy_gradient is not None
    assert unscaled.objective.policy_gradient.scale_rewards == "none"
    nft = load_experiment(EXPERIMENT, None, ["objective.policy_gradient={kind: nft}"]).objective.policy_gradient
    assert nft == NftConfig(kind="nft"), "settings of another kind do not carry over"
    for override, message in (
        ("objective.rewards.style.learn_from=gradient", "objective.policy_gradient.*: no reward is learned from"),
        (
            "rollout={num_steps: 5, window: {entry_range: [1, 2]}}",
            "policy_gradient.window.*: step 4 of 5 cannot be noisy",
        ),
        (
            "objective.policy_gradient=null",
            r"style\.learn_from: samples are learned from by objective\.policy_gradient",
        ),
        ("objective.policy_gradient.epsilom=0.1", r"policy_gradient\.epsilom.*unknown key.*epsilon"),
        ("objective.policy_gradient.kind=ppo", "policy_gradient"),
        ("objective.policy_gradient.reward_weights=[1]", r"reward_weights.*unknown key.*rewards\.NAME\.weight"),
        ("objective.policy_gradient={kind: nft, reward_weights: [1]}", r"reward_weights.*rewards\.NAME\.weight"),
        ("rollout.buckets=[[64, 64], [32, 64]]", "rollout.buckets.*drawn in one size"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_experiment(EXPERIMENT, None, [override])
