"""What a run's files say of its judges: how many answers came by log-probabilities, by text, and not at all."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from rewardgen import build
from rewardgen.config import load_experiment
from rewardgen.evaluation.compare import compare
from rewardgen.evaluation.evaluate import Evaluation, evaluate, join
from rewardgen.evaluation.monitor import read
from rewardgen.held_out import Tally
from rewardgen.manifest import MANIFEST, write_counts, write_manifest
from rewardgen.report import METRICS
from rewardgen.rewards.vlm_judge import VlmJudge
from rewardgen.types import Score
from tests.judge_servers import JudgeServer, chosen
from tests.toys import ToyDataset, ToyPolicy, ToyReward

STEPS, EXAMPLES, GENERATIONS, HELD_OUT = 2, 2, 4, 6


def experiment_of(objective: JudgeServer, witness: JudgeServer) -> str:
    """GRPO on a judge, with another one as a witness."""

    def judge(server: JudgeServer) -> dict[str, object]:
        args = {"question": "style", "urls": [server.url], "served_model": "tiny", "max_attempts": 1}
        return {"use": "vlm_judge", "args": args}

    return yaml.safe_dump(
        {
            "name": "judged",
            "policy": {"use": "tests.toys:ToyPolicy", "args": {"hidden": 4}},
            "data": {
                "train": {"use": "tests.toys:ToyDataset", "args": {"size": 4}},
                "held_out": {"use": "tests.toys:ToyDataset", "args": {"size": HELD_OUT, "seed": 1}},
            },
            "rollout": {"image_size": [8, 8], "num_steps": 3, "window": {"kind": "refl", "entry_range": [1, 2]}},
            "objective": {
                "flow_matching": {"weight": 0.1},
                "rewards": {"judge": judge(objective), "toy": {"use": "tests.toys:ToyReward"}},
                "max_failed_share": 1.0,
                "policy_gradient": {"kind": "grpo", "num_generations": GENERATIONS},
            },
            "train": {"num_steps": STEPS, "batch_size": EXAMPLES, "checkpoint_every": 0, "device": "cpu"},
            "evaluation": {"num_examples": HELD_OUT, "grid_examples": 0, "witnesses": {"watch": judge(witness)}},
            "report": {"tensorboard": False, "console": False},
        }
    )


def test_a_run_says_which_way_its_judges_answered(tmp_path: Path) -> None:
    """The objective's judge knows no log-probabilities and fails at times, the witness returns them."""
    faults = {"plan": lambda code, _before: "unsure" if chosen(code, 0.3) else None}
    with JudgeServer(logprobs=False, **faults) as objective, JudgeServer() as witness, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (tmp_path / "judged.yaml").write_text(experiment_of(objective, witness))
        folder = tmp_path / "run"
        assert build.train(load_experiment(tmp_path / "judged.yaml", None, []), folder=folder)
    counts = json.loads((folder / MANIFEST).read_text())["counts"]
    assert set(counts["training"]) == {"judge"}, "the witness takes no part, the toy counts nothing"
    assert set(counts["evaluation"]) == {"judge", "watch"}
    trained, evaluated, watched = (
        counts["training"]["judge"],
        counts["evaluation"]["judge"],
        counts["evaluation"]["watch"],
    )
    assert trained["by_text"] + trained["failed"] == STEPS * EXAMPLES * GENERATIONS
    assert evaluated["by_text"] + evaluated["failed"] == 2 * HELD_OUT
    assert trained["by_logprob"] == evaluated["by_logprob"] == 0
    assert (watched["by_logprob"], watched["by_text"], watched["failed"]) == (2 * HELD_OUT, 0, 0)

    rows = {row["name"]: row for row in json.loads((folder / "comparison.json").read_text())["rows"]}
    sides = rows["judge"]["counts"]
    assert set(sides) == set(rows["watch"]["counts"]) == {"base", "trained", "ceiling"}
    assert rows["toy"]["counts"] == {}
    for side in sides.values():
        assert side["by_text"] + side["failed"] == HELD_OUT
    assert sides["base"]["by_text"] == rows["judge"]["base_valid"]
    assert sides["base"]["by_text"] + sides["trained"]["by_text"] == evaluated["by_text"]
    assert trained["failed"] + evaluated["failed"] + sides["ceiling"]["failed"] == objective.faults["unsure"] > 0
    assert all(side["by_logprob"] == HELD_OUT for side in rows["watch"]["counts"].values())
    last = max(read(folder / "monitor.json", "it").items())[1]
    assert last.counts()["watch"]["by_logprob"] == HELD_OUT


def test_counts_of_batches_add_up_and_survive_the_file() -> None:
    examples = ToyDataset(5).examples
    with JudgeServer() as server:
        judge = VlmJudge("style", (server.url,), "tiny")
        drawn = evaluate(
            ToyPolicy(),
            examples,
            {"judge": judge, "toy": ToyReward()},
            image_size=(8, 8),
            num_steps=2,
            batch_size=2,
            seed=0,
        )
    assert drawn.counts().keys() == {"judge"}
    assert (drawn.scores["judge"].counts["by_logprob"], drawn.scores["judge"].counts["attempts"]) == (5, 5)
    again = Evaluation.from_json(json.loads(json.dumps(drawn.to_json(), allow_nan=False)))
    assert again.counts() == drawn.counts()


def test_batches_may_count_different_things() -> None:
    one = Score(value_B=torch.ones(1), valid_B=torch.ones(1, dtype=torch.bool), counts={"a": 1})
    two = Score(value_B=torch.ones(2), valid_B=torch.ones(2, dtype=torch.bool), counts={"a": 2, "b": 5})
    none = Score(value_B=torch.ones(1), valid_B=torch.ones(1, dtype=torch.bool))
    assert join([one, none, two]).counts == {"a": 3, "b": 5}


def test_what_was_written_before_there_were_counts_is_read(tmp_path: Path) -> None:
    old = {"example_ids": ["a"], "scores": {"judge": [0.5]}}
    (tmp_path / "monitor.json").write_text(json.dumps({"evaluations": {"0": old}}))
    evaluation = read(tmp_path / "monitor.json", "it")[0]
    assert evaluation.counts() == {}
    (row,) = compare(evaluation, evaluation).rows
    assert row.counts == {}


class TestTally:
    def test_training_is_the_whole_run_and_only_what_counts(self, tmp_path: Path) -> None:
        write_manifest(tmp_path, experiment={"seed": 1})
        steps = [{"reward/judge/by_text": 3, "reward/judge/mass": 0.5}, {"reward/judge/by_text": None}, {"x": 1}]
        lines = [json.dumps({"kind": "step", "step": i, "metrics": told}) for i, told in enumerate(steps)]
        lines += [json.dumps({"kind": "evaluation", "step": 1, "values": {"judge": 1}}), '{"kind": "st']
        (tmp_path / METRICS).write_text("\n".join([*lines, json.dumps({"metrics": {"reward/judge/by_text": 4}})]))
        tally = Tally(tmp_path)
        tally.add(None)
        for number in (2.0, 5.0):
            score = Score(value_B=torch.ones(1), valid_B=torch.ones(1, dtype=torch.bool), counts={"by_text": number})
            tally.add(Evaluation(example_ids=("a",), scores={"judge": score}))
        tally.write()
        tally.write()
        found = json.loads((tmp_path / MANIFEST).read_text())
        assert found["counts"] == {"training": {"judge": {"by_text": 7}}, "evaluation": {"judge": {"by_text": 7}}}
        assert found["experiment"] == {"seed": 1}
        assert sorted(path.name for path in tmp_path.iterdir()) == [MANIFEST, METRICS]

    @pytest.mark.parametrize("content", [None, "{", "[]"])
    def test_a_manifest_that_is_not_there_or_damaged_is_left_alone(self, tmp_path: Path, content: str | None) -> None:
        if content is not None:
            (tmp_path / MANIFEST).write_text(content)
        write_counts(tmp_path, {"training": {}})
        assert [path.read_text() for path in tmp_path.iterdir()] == ([] if content is None else [content])
