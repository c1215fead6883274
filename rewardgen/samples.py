"""Samples to learn from: what is asked of the rollout workers, and the way from them through the judges to the learner.

Each example of a micro-batch is drawn `num_generations` times, one time in each of as many requests: a request is the
micro-batch once more with other seeds, so that the learner's memory holds no more pictures at a time than it does for
any other term, and a group of samples stays with the process that has the example.

Pictures are rounded to 8 bits where they are drawn, in the learner's process too. So a judge sees what a file of the
picture would hold, as the judges of Flow-GRPO's release do, and a picture travels to a judge in another process as one
byte per value without changing its score.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from rewardgen.fleet.pool import Handle, Pool, then
from rewardgen.flow.stochastic import noisy_steps
from rewardgen.policy_gradient import GrpoConfig, NftConfig
from rewardgen.rollout import RolloutConfig, Weights
from rewardgen.seeds import derive_seed
from rewardgen.types import Example, Rollout, RolloutRequest, Stochastic


def sample_requests(
    batch: Sequence[tuple[int, Example]],
    config: GrpoConfig | NftConfig,
    rollout: RolloutConfig,
    *,
    step: int,
    seed: int,
) -> list[RolloutRequest]:
    """The requests for the samples of one micro-batch, `num_generations` of them.

    Args:
        batch: (place in the batch of all processes, example); the place is the group.
        config: how many samples, and which steps are noisy.
        rollout: size and steps of the pictures.
        step: training step.
        seed: the run's seed.
    """
    steps: tuple[int, ...] = ()
    if isinstance(config, GrpoConfig):
        drawn = derive_seed(seed, "noisy_steps", step)
        steps = noisy_steps(config.window, rollout.num_steps, training_step=step, seed=drawn)
    requests = []
    for generation in range(config.num_generations):
        seed_B = _seeds(seed, step, generation, batch)
        stochastic = None
        if isinstance(config, GrpoConfig):
            stochastic = Stochastic(steps=steps, noise_level=config.noise_level, seed_B=seed_B)
            seed_B = _seeds(seed, step, 0, batch) if config.same_noise else seed_B
        requests.append(
            RolloutRequest(
                step=step,
                examples=[example for _, example in batch],
                seed_B=seed_B,
                image_size=rollout.image_size,
                num_steps=rollout.num_steps,
                stop_step=rollout.num_steps,
                decode=True,
                eight_bit=True,
                stochastic=stochastic,
                group_B=tuple(place for place, _ in batch),
            )
        )
    return requests


def submit_samples(
    requests: Sequence[RolloutRequest],
    weights: Handle[Weights],
    *,
    pool: Pool,
    scoring: Pool,
    names: Sequence[str] | None = None,
) -> list[Future[Handle[Rollout]]]:
    """Ask for scored samples, in the order of the requests; nothing is waited for.

    Each rollout goes on to a judge as soon as it is there, by its handle: its pictures never pass through here. In this
    process rewards that mostly wait (`Reward.begin`) do so until a handle's value is asked for, while more is drawn.

    Args:
        requests: what to draw.
        weights: to draw it with.
        pool: replicas of `RolloutWorker`.
        scoring: replicas of `ScoringWorker`.
        names: of the rewards to ask; None asks all that `scoring` has.
    """
    asked = None if names is None else tuple(names)

    def judge(drawn: Handle[Rollout]) -> Future[Handle[Rollout]]:
        return scoring.submit("begin", drawn, asked, about="the scores of samples")

    return [
        then(pool.submit("rollout", request, weights, about=f"samples of step {request.step}"), judge)
        for request in requests
    ]


def _seeds(seed: int, step: int, generation: int, batch: Sequence[tuple[int, Example]]) -> tuple[int, ...]:
    return tuple(derive_seed(seed, "samples", step, example.id, place, generation) for place, example in batch)
