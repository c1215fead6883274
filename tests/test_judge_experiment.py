"""The bundled experiment with a judge, shortened to two steps: the judge, CSD and the floor's reward each take part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rewardgen import build
from rewardgen.adaptive import OfBase
from rewardgen.checkpoint import latest_checkpoint, load_checkpoint
from rewardgen.config import load_experiment

EXPERIMENT = Path(__file__).resolve().parent.parent / "experiments" / "uso_vlm_judge.yaml"
BATCH, INITIAL = 2, 2.0
SHORT = (
    "train.num_steps=2",
    f"train.batch_size={BATCH}",
    "train.ema_decay=null",
    "optimizer.decay_steps=null",
    "data.train.args.size=4",
    "data.held_out.args.size=2",
    "rollout.num_steps=3",
    "rollout.window.entry_range=[1,2]",
    "objective.rewards.content.floor.steps=1",
    f"objective.rewards.content.multiplier.initial={INITIAL}",
    "evaluation.num_examples=2",
    "evaluation.batch_size=2",
    "evaluation.grid_examples=0",
    "monitor.enabled=false",
    "report.tensorboard=false",
    "report.console=false",
)


def test_two_steps_with_judge_style_and_floor(tmp_path: Path) -> None:
    """The first step measures the base, in the second all three rewards train and the multiplier moves."""
    experiment = load_experiment(EXPERIMENT, "tiny", list(SHORT))
    assert build.train(experiment, folder=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, second = (line for line in lines if line["kind"] == "step")
    rewards = experiment.objective.rewards
    assert set(rewards) == {"judge", "style", "content"}
    for line in (first, second):
        assert line["valid_counts"] == dict.fromkeys(["flow_matching", *rewards], BATCH)
        assert set(line["reward_means"]) == set(rewards)
        assert all(0 < mean < 1 for mean in line["reward_means"].values())
        assert not line["skipped"]
        # The bundled judge understands its question: far from the share below which it would have said nothing.
        assert 0.9 < line["metrics"]["reward/judge/answer_mass"] <= 1
        assert line["metrics"]["reward/judge/by_logprob"] == BATCH
    assert {name: first["terms"][name] for name in rewards} == dict.fromkeys(rewards, 0)
    assert first["terms"]["flow_matching"] > 0

    means, metrics = second["reward_means"], second["metrics"]
    assert metrics["multiplier/content"] == first["metrics"]["multiplier/content"] == INITIAL
    floor = rewards["content"].floor
    assert isinstance(floor, OfBase)
    assert floor.base_percent is not None
    assert metrics["bound/content"] == pytest.approx((1 + floor.base_percent / 100) * first["reward_means"]["content"])
    assert metrics["slack/content"] == pytest.approx(means["content"] - metrics["bound/content"])
    for name in ("judge", "style"):
        assert second["terms"][name] == pytest.approx(-rewards[name].weight * means[name], rel=1e-4)
    assert second["terms"]["content"] == pytest.approx(-INITIAL * metrics["slack/content"], rel=1e-4)
    path = latest_checkpoint(tmp_path / "checkpoints")
    assert path is not None
    state = load_checkpoint(path)[1]["learner"]["objective"]["constraints"]["content"]
    rate = rewards["content"].multiplier.rate
    assert 0 < state["multiplier"] != INITIAL
    assert state["multiplier"] == pytest.approx(INITIAL - rate * metrics["slack/content"])

    names = {row["name"] for row in json.loads((tmp_path / "comparison.json").read_text())["rows"]}
    assert names == {*rewards, "palette_texture", "layout"}
    counts = json.loads((tmp_path / "manifest.json").read_text())["counts"]
    assert counts["training"]["judge"] == {"by_logprob": 2 * BATCH, "not_applicable": 0}
    assert counts["evaluation"]["judge"] == {"by_logprob": 4, "not_applicable": 0}
