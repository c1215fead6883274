"""A judge of whose calls 30 % fail, in every way there is: the counts are right, no score is 0 by accident, and what
did not fail is as it would have been without any fault."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from rewardgen.errors import ScoringError
from rewardgen.objective import Objective, ObjectiveConfig, TermConfig
from rewardgen.reward import RewardWarning, score
from rewardgen.rewards.vlm_judge import VlmJudge
from rewardgen.types import Example, Score
from tests.judge_servers import Fault, FaultPlan, JudgeServer, asked, chosen, digest
from tests.toys import ToyReward

N = 40
SHARE = 0.3
FAULTS: dict[Fault, str] = {
    "429": "rate_limited", "500": "server_error", "hang": "timeout", "cut": "connection", "nonsense": "nonsense",
    "unsure": "nonsense",
}  # fmt: skip
"""What is injected, and the name it is counted under."""
PIXELS = torch.rand(N, 3, 8, 8, generator=torch.Generator().manual_seed(3))
EXAMPLES = [Example(id=str(i), style_refs=(PIXELS[-1 - i],)) for i in range(N)]
RETRY_NEVER = {"429": "3600"}


def permanent(fault: Fault) -> FaultPlan:
    """30 % of the questions fail whenever they are asked."""
    return lambda code, _before: fault if chosen(code, SHARE) else None


def passing(fault: Fault, times: int) -> FaultPlan:
    """30 % of the questions fail so many times, and then no more."""
    return lambda code, before: fault if chosen(code, SHARE) and before < times else None


def judge(server: JudgeServer, **args: Any) -> VlmJudge:
    # A hanging call ends by its timeout alone, and a busy machine must answer the others within it.
    settings = {"backoff_s": 0.01, "timeout_s": 8.0, "max_attempts": 1, "concurrency": 32, **args}
    return VlmJudge("style", (server.url,), "tiny", **settings)


def scored(reward: VlmJudge) -> Score:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RewardWarning)
        return score(reward, PIXELS, EXAMPLES, enable_grad=False)


@pytest.fixture(scope="module")
def undisturbed() -> Tensor:
    with JudgeServer() as server:
        found = scored(judge(server))
    assert found.valid_B.all()
    assert found.value_B.min() > 0
    return found.value_B


def hit(reward: VlmJudge) -> Tensor:
    """Which questions the plan chooses."""
    flags = []
    for pixels_3HW, example in zip(PIXELS, EXAMPLES, strict=True):
        flags.append(chosen(digest(asked(reward, pixels_3HW, example)), SHARE))
    return torch.tensor(flags)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_fails_for_good_is_masked_and_counted(fault: Fault, undisturbed: Tensor) -> None:
    with JudgeServer(plan=permanent(fault)) as server:
        server.retry_after = RETRY_NEVER.get(fault)
        reward = judge(server)
        found = scored(reward)
        hit_B = hit(reward)
    assert 0.15 * N < hit_B.sum() < 0.45 * N
    assert torch.equal(found.valid_B, ~hit_B)
    assert torch.equal(found.value_B[~hit_B], undisturbed[~hit_B])
    assert found.value_B[hit_B].isnan().all()
    assert found.counts["failed"] == found.counts[FAULTS[fault]] == server.faults[fault] == hit_B.sum()
    assert found.counts["by_logprob"] == N - hit_B.sum()
    assert found.counts["attempts"] == sum(server.calls.values()) == N


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "hang"])
def test_what_passes_is_asked_again_and_changes_nothing(fault: Fault, undisturbed: Tensor) -> None:
    with JudgeServer(plan=passing(fault, 2)) as server:
        reward = judge(server, max_attempts=3)
        found = scored(reward)
        hits = int(hit(reward).sum())
    assert found.valid_B.all()
    assert torch.equal(found.value_B, undisturbed)
    assert found.counts["failed"] == 0
    assert found.counts[FAULTS[fault]] == server.faults[fault] == 2 * hits
    assert found.counts["attempts"] == N + 2 * hits


def test_429s_are_not_charged(undisturbed: Tensor) -> None:
    """Seven in a row, with a single attempt allowed."""
    with JudgeServer(plan=passing("429", 7)) as server:
        reward = judge(server)
        found = scored(reward)
        hits = int(hit(reward).sum())
    assert torch.equal(found.value_B, undisturbed)
    assert found.counts["rate_limited"] == 7 * hits
    assert reward.service.limits()[server.url] < 32


def test_attempts_are_as_many_as_stated() -> None:
    with JudgeServer(plan=permanent("500")) as server:
        reward = judge(server, max_attempts=3)
        found = scored(reward)
        hits = int(hit(reward).sum())
    assert found.counts["failed"] == hits
    assert found.counts["server_error"] == 3 * hits
    assert set(server.calls.values()) == {1, 3}


def test_all_faults_at_once(undisturbed: Tensor) -> None:
    kinds: list[Fault] = ["429", "500", "cut", "nonsense", "unsure"]

    def plan(code: str, _before: int) -> Fault | None:
        return kinds[int(code[16:20], 16) % len(kinds)] if chosen(code, SHARE) else None

    with JudgeServer(plan=plan) as server:
        server.retry_after = RETRY_NEVER["429"]
        reward = judge(server)
        found = scored(reward)
        hit_B = hit(reward)
    assert torch.equal(found.valid_B, ~hit_B)
    assert torch.equal(found.value_B[~hit_B], undisturbed[~hit_B])
    injected = {name: sum(server.faults[fault] for fault in kinds if FAULTS[fault] == name) for name in FAULTS.values()}
    assert {name: found.counts[name] for name in injected} == injected


@pytest.mark.parametrize("asked_for", ["0", "Sun, 06 Nov 1994 08:49:37 GMT"])
def test_a_server_that_asks_for_no_wait_is_not_besieged(asked_for: str) -> None:
    """Or a clock that is some seconds off, and dates with it, would switch all backing off off."""
    with JudgeServer(plan=lambda _code, _before: "429") as server:
        server.retry_after = asked_for
        reward = judge(server, backoff_s=0.4, give_up_s=1.5, concurrency=4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RewardWarning)
            found = score(reward, PIXELS[:4], EXAMPLES[:4], enable_grad=False)
    assert not found.valid_B.any()
    assert sum(server.calls.values()) < 40, "four questions that back off, not hundreds of calls"


def test_a_judge_that_is_gone_says_so() -> None:
    server = JudgeServer()
    with server:
        pass
    reward = judge(server)
    with pytest.warns(RewardWarning, match=rf"failed on {N} of {N} pictures.*connection") as caught:
        found = score(reward, PIXELS, EXAMPLES, enable_grad=False)
    assert not found.valid_B.any()
    assert len(caught) == 1


@pytest.mark.parametrize(("allowed", "stops"), [(0.2, True), (0.45, False)])
def test_the_run_stops_above_the_stated_share(allowed: float, stops: bool) -> None:
    config = ObjectiveConfig(rewards={"judge": TermConfig(use="vlm_judge")}, max_failed_share=allowed, failure_window=N)
    objective = Objective(config, {"judge": ToyReward()})
    with JudgeServer(plan=permanent("500")) as server:
        valid_B = scored(judge(server)).valid_B
    if stops:
        with pytest.raises(ScoringError, match=rf"'judge': {N - int(valid_B.sum())} of its last {N} scores failed"):
            objective.observe("judge", valid_B)
    else:
        objective.observe("judge", valid_B)


def test_nothing_waits_for_ever() -> None:
    """A server that always asks for patience: the question ends when its time is over, whatever is not charged."""
    with JudgeServer(plan=lambda _code, _before: "429") as server:
        reward = judge(server, give_up_s=0.3)
        found = scored(reward)
    assert not found.valid_B.any()
    assert found.counts["failed"] == N
    assert found.counts["attempts"] >= 1
    assert all(math.isnan(value) for value in found.value_B.tolist())
