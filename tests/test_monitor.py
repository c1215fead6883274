"""The monitor: effects in closed form, games caught and honest changes not, and a whole run with a planted game."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rewardgen import build
from rewardgen.checkpoint import latest_checkpoint, load_checkpoint
from rewardgen.config import load_experiment
from rewardgen.errors import ConfigError, UserError
from rewardgen.evaluation.evaluate import Evaluation
from rewardgen.evaluation.monitor import (
    DRIFT,
    FILE,
    DriftError,
    Finding,
    Monitor,
    MonitorConfig,
    effect_size,
    find,
    with_diversity,
    without_statistics,
)
from rewardgen.evaluation.statistics import STATISTICS
from rewardgen.types import Example, Score

N = 40
BASE = torch.randn(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BASE = (BASE - BASE.mean()) / BASE.std()
NOISE = 0.05 * torch.randn(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
NOISE = NOISE - NOISE.mean()


def evaluation(valid: torch.Tensor | None = None, **shifts: float) -> Evaluation:
    """Scores that vary with standard deviation 1 between examples, shifted; `_` in a name stands for `/`."""
    known = torch.ones(N, dtype=torch.bool) if valid is None else valid
    scores = {
        name.replace("_", "/"): Score(
            value_B=(BASE + shift + (NOISE if shift else 0)).where(known, math.nan), valid_B=known
        )
        for name, shift in shifts.items()
    }
    return Evaluation(example_ids=tuple(f"e{i}" for i in range(N)), scores=scores)


CONTROL = evaluation(style=0, layout=0, statistic_sharpness=0)


def found(config: MonitorConfig | None = None, **shifts: float) -> list[Finding]:
    config = config or MonitorConfig(drift=1.0, witness_drop=0.5)
    return find(7, evaluation(**shifts), CONTROL, rewards=["style"], witnesses=["layout"], config=config)


def test_effects_are_in_standard_deviations_of_the_control() -> None:
    assert effect_size("style", evaluation(style=0.7), CONTROL) == pytest.approx(0.7)
    few = torch.arange(N) < 20
    assert effect_size("style", evaluation(few, style=0.7), CONTROL) == pytest.approx(
        float((0.7 + NOISE[:20].mean()) / BASE[:20].std())
    )
    assert effect_size("style", evaluation(torch.arange(N) < 1, style=0.7), CONTROL) is None
    assert effect_size("other", CONTROL, CONTROL) is None
    flat = Evaluation(
        example_ids=("a", "b"),
        scores={"x": Score(value_B=torch.zeros(2, dtype=torch.float64), valid_B=torch.ones(2, dtype=torch.bool))},
    )
    assert effect_size("x", flat, flat) == 0
    moved = Score(value_B=torch.ones(2, dtype=torch.float64), valid_B=torch.ones(2, dtype=torch.bool))
    assert effect_size("x", Evaluation(example_ids=("a", "b"), scores={"x": moved}), flat) == math.inf


def test_a_witness_that_falls_while_the_reward_rises_is_named() -> None:
    (finding,) = found(style=0.9, layout=-0.8, statistic_sharpness=0.2)
    assert (finding.kind, finding.name, finding.reward, finding.step) == ("witness", "layout", "style", 7)
    assert finding.effect == pytest.approx(-0.8)
    assert "style rose by 0.9000 while the witness layout changed by -0.8000, -0.80 standard" in str(finding)
    assert finding.examples[0] == f"e{int(NOISE.argmin())}"


@pytest.mark.parametrize(
    "shifts",
    [
        {"style": 0.9, "layout": 0.4},  # both rise
        {"style": 0.9, "layout": -0.3},  # the price is small
        {"style": -0.4, "layout": -0.8},  # nothing was gained
        {"style": 0.9, "layout": 0.0, "statistic_sharpness": 0.9},  # below the threshold
    ],
)
def test_honest_changes_are_not_flagged(shifts: dict[str, float]) -> None:
    assert found(**({"layout": 0.0, "statistic_sharpness": 0.0} | shifts)) == []


@pytest.mark.parametrize("shift", [-1.4, 1.4])
def test_a_statistic_that_drifts_either_way_is_named(shift: float) -> None:
    (finding,) = found(style=0.0, layout=0.0, statistic_sharpness=shift)
    assert (finding.kind, finding.name) == ("drift", "statistic/sharpness")
    assert f"sharpness of the pictures has drifted by {shift:+.4f}" in str(finding)
    assert finding.examples[0] == f"e{int((NOISE * shift).argmax())}"
    assert found(MonitorConfig(drift=2.0), style=0.0, layout=0.0, statistic_sharpness=shift) == []


def test_each_statistic_has_a_threshold_and_may_be_given_another() -> None:
    assert set(DRIFT) == {*STATISTICS, "diversity"}
    config = MonitorConfig(drift={"sharpness": 2.0})
    assert config.drift_of("statistic/sharpness") == 2.0
    assert {name: config.drift_of(name) for name in DRIFT} == {**DRIFT, "sharpness": 2.0}
    assert MonitorConfig(drift=3.0).drift_of("statistic/edge_density") == 3.0
    assert MonitorConfig.model_validate(config.model_dump(mode="json")) == config
    assert found(config, style=0.0, layout=0.0, statistic_sharpness=1.4) == []
    for wrong in ({"sharpnes": 1.0}, {"sharpness": 0.0}, -1.0, "loud"):
        with pytest.raises(ValueError, match="sharpness" if isinstance(wrong, dict) else "drift"):
            MonitorConfig(drift=wrong)  # type: ignore[arg-type]


def test_a_reward_that_the_control_does_not_know_is_compared_with_the_start() -> None:
    now, start = evaluation(game=0.9, layout=-0.8), evaluation(game=0.0, layout=0.0)
    config = MonitorConfig()
    both = {"rewards": ["game"], "witnesses": ["layout"], "config": config}
    assert find(7, now, CONTROL, **both) == []  # type: ignore[arg-type]
    (finding,) = find(7, now, CONTROL, start=start, **both)  # type: ignore[arg-type]
    assert (finding.kind, finding.name, finding.reward) == ("witness", "layout", "game")


def test_a_change_within_chance_is_not_flagged() -> None:
    """A large mean change that two examples make alone: its interval holds 0."""
    wild = torch.zeros(N, dtype=torch.float64)
    wild[:2] = 40.0
    now = Evaluation(
        example_ids=CONTROL.example_ids,
        scores={"statistic/sharpness": Score(value_B=BASE + wild, valid_B=torch.ones(N, dtype=torch.bool))},
    )
    assert (effect_size("statistic/sharpness", now, CONTROL) or 0) > 1.5
    assert find(1, now, CONTROL, rewards=[], witnesses=[], config=MonitorConfig()) == []


def test_other_examples_are_refused() -> None:
    other = Evaluation(example_ids=("x",), scores={})
    with pytest.raises(UserError, match="other examples"):
        find(1, other, CONTROL, rewards=[], witnesses=[], config=MonitorConfig())


def test_the_control_of_the_same_or_latest_earlier_step_is_taken(tmp_path: Path) -> None:
    control = Monitor(MonitorConfig(), made(tmp_path / "control"), rewards=[], witnesses=[])
    control.begin(evaluation(statistic_sharpness=1.5))
    control.check(5, CONTROL, [])
    control.check(10, evaluation(statistic_sharpness=1.5), [])
    config = MonitorConfig(control=str(tmp_path / "control"))
    run = Monitor(config, made(tmp_path / "run"), rewards=["style"], witnesses=["layout"])
    run.begin(CONTROL)
    drifted = evaluation(statistic_sharpness=1.5)
    examples = [Example(id=name) for name in CONTROL.example_ids]
    (finding,) = run.check(9, drifted, examples)
    assert finding.against == "control"
    assert run.check(9, drifted, examples) == [], "it is said once"
    assert Monitor(config, tmp_path / "run", rewards=[], witnesses=[]).check(10, drifted, examples) == []
    assert json.loads((tmp_path / "run" / "monitor" / "step-000009-sharpness.json").read_text())["effect"] > 1.4
    assert run.remark(9) is None


def test_a_control_s_own_start_is_the_base_and_no_control(tmp_path: Path) -> None:
    control = Monitor(MonitorConfig(), made(tmp_path / "control"), rewards=[], witnesses=[])
    control.begin(CONTROL)
    control.check(10, CONTROL, [])
    config = MonitorConfig(control=str(tmp_path / "control"))
    run = Monitor(config, made(tmp_path / "run"), rewards=["style"], witnesses=["layout"])
    run.begin(CONTROL)
    drifted = evaluation(statistic_sharpness=1.5)
    (finding,) = run.check(9, drifted, [Example(id=name) for name in CONTROL.example_ids])
    assert finding.against == "start"
    assert "against the run's start (monitor.control has no evaluation between its start and step 9)" in str(finding)
    told = run.remark(9)
    assert told is not None
    assert "no evaluation between its start and step 9" in told
    assert run.remark(9) is None, "it is said once"
    alone = Monitor(MonitorConfig(), made(tmp_path / "alone"), rewards=[], witnesses=[])
    alone.begin(CONTROL)
    (finding,) = alone.check(9, drifted, [Example(id=name) for name in CONTROL.example_ids])
    assert "against the run's start (no monitor.control)" in str(finding)
    assert alone.remark(9) is None


def test_a_resumed_run_forgets_what_comes_again(tmp_path: Path) -> None:
    first = Monitor(MonitorConfig(), tmp_path, rewards=[], witnesses=[])
    first.begin(CONTROL)
    for step in (5, 10):
        first.check(step, CONTROL, [])
    second = Monitor(MonitorConfig(), tmp_path, rewards=[], witnesses=[])
    second.begin(CONTROL, 5)
    assert list(json.loads((tmp_path / FILE).read_text())["evaluations"]) == ["0", "5"]


def test_a_resumed_run_does_not_say_again_what_was_said(tmp_path: Path) -> None:
    """Or it would be stopped (`stop_on_drift`) at each evaluation, and never get further."""
    drifted, examples = evaluation(statistic_sharpness=1.5), [Example(id=name) for name in CONTROL.example_ids]
    first = Monitor(MonitorConfig(), tmp_path, rewards=[], witnesses=[])
    first.begin(CONTROL)
    assert first.check(5, drifted, examples)
    second = Monitor(MonitorConfig(), tmp_path, rewards=[], witnesses=[])
    second.begin(CONTROL, 5)
    assert second.check(10, drifted, examples) == []
    earlier = Monitor(MonitorConfig(), tmp_path, rewards=[], witnesses=[])
    earlier.begin(CONTROL, 4)
    assert earlier.check(5, drifted, examples), "the step that said it comes again"


def test_a_control_of_other_examples_is_refused_before_training(tmp_path: Path) -> None:
    control = Monitor(MonitorConfig(), made(tmp_path / "control"), rewards=[], witnesses=[])
    control.begin(Evaluation(example_ids=("x",), scores={}))
    config = MonitorConfig(control=str(tmp_path / "control"))
    run = Monitor(config, made(tmp_path / "run"), rewards=[], witnesses=[])
    with pytest.raises(UserError, match="other examples"):
        run.begin(CONTROL)


def test_an_infinite_effect_is_written_as_json_knows_numbers(tmp_path: Path) -> None:
    def flat(value: float) -> Evaluation:
        scores = {
            name: Score(value_B=torch.full((4,), v, dtype=torch.float64), valid_B=torch.ones(4, dtype=torch.bool))
            for name, v in (("style", -value), ("layout", value))
        }
        # Rises that are all alike are certain.
        return Evaluation(example_ids=("a", "b", "c", "d"), scores=scores)

    run = Monitor(MonitorConfig(), tmp_path, rewards=["style"], witnesses=["layout"])
    run.begin(flat(0.0))
    (finding,) = run.check(5, flat(-1.0), [])
    assert finding.effect == -math.inf
    (path,) = (tmp_path / "monitor").glob("*.json")
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["effect"] is None


def test_a_control_that_is_none_is_refused(tmp_path: Path) -> None:
    config = MonitorConfig(control=str(tmp_path))
    with pytest.raises(ConfigError, match=r"monitor\.control: .*all reward weights 0"):
        Monitor(config, tmp_path / "run", rewards=[], witnesses=[])
    (tmp_path / FILE).write_text('{"evaluations": {"0": {"example_ids": 3}}}')
    with pytest.raises(ConfigError, match="no record of a monitor"):
        Monitor(config, tmp_path / "run", rewards=[], witnesses=[])


def test_diversity_is_that_of_the_first_examples() -> None:
    draws = [Evaluation(example_ids=("e0", "e1"), scores={}, pixels_K3HW=torch.full((2, 3, 4, 4), v)) for v in (0, 0.5)]
    whole = with_diversity(CONTROL, draws)
    score = whole.scores["statistic/diversity"]
    assert score.value_B[:2].tolist() == pytest.approx([0.5, 0.5])
    assert int(score.valid_B.sum()) == 2
    assert set(without_statistics(whole).scores) == {"style", "layout"}


TOY = """\
name: small
policy: {use: "tests.toys:ToyPolicy", args: {hidden: 4}}
data:
  train: {use: "tests.toys:ToyDataset", args: {size: 4}}
  held_out: {use: "tests.toys:ToyDataset", args: {size: 8, seed: 1}}
rollout: {image_size: [8, 8], num_steps: 3, window: {kind: refl, entry_range: [1, 2]}}
objective:
  flow_matching: {weight: 0.1}
  rewards: {light: {use: brightness, weight: 5.0}}
optimizer: {lr: 5e-2}
train: {num_steps: 12, batch_size: 4, checkpoint_every: 0, device: cpu}
evaluation: {every: 4, num_examples: 8, grid_examples: 2}
report: {tensorboard: false, console: false}
"""


def test_a_planted_game_is_caught_against_the_supervised_control(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parent.parent)
    path = tmp_path / "toy.yaml"
    path.write_text(TOY)

    def train(folder: str, *overrides: str) -> str:
        assert build.train(load_experiment(path, overrides=overrides), folder=tmp_path / folder)
        return capsys.readouterr().out

    train("control", "objective.rewards.light.weight=0")
    control = f"monitor.control={tmp_path / 'control'}"
    again = train("again", "objective.rewards.light.weight=0", control)
    assert "warning" not in again, "supervised training is no drift"
    told = train("game", control)
    assert "brightness of the pictures has drifted" in told
    assert list((tmp_path / "game" / "monitor").glob("step-*-brightness.png"))
    record: dict[str, Any] = json.loads((tmp_path / "game" / FILE).read_text())
    assert list(record["evaluations"]) == ["0", "4", "8", "12"]
    assert "statistic" not in (tmp_path / "game" / "comparison.md").read_text()
    stopping = [control, "monitor.stop_on_drift=true", "train.keep_best=1", "train.keep_best_metric=light"]
    with pytest.raises(DriftError, match=r"stop_on_drift is set: step [48]: brightness.*go on from step [48] with"):
        train("stopped", *stopping)
    saved = latest_checkpoint(tmp_path / "stopped" / "checkpoints")
    assert saved is not None, "nothing is lost, though checkpoint_every is 0"
    state = load_checkpoint(saved)[1]
    assert state["completed_steps"] in (4, 8)
    assert list(state["best"]) == [str(state["completed_steps"])], "the evaluation that stopped it counts"
    train("off", "monitor.enabled=false", "train.num_steps=1")
    assert not (tmp_path / "off" / FILE).exists()


@pytest.mark.parametrize("every", [0, 12, 100])
def test_a_run_that_nothing_could_stop_is_refused(tmp_path: Path, every: int) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(TOY)
    asked = [f"evaluation.every={every}", "monitor.stop_on_drift=true"]
    with pytest.raises(
        ConfigError, match=rf"monitor\.stop_on_drift \(override\): .*12 steps.*evaluation\.every = {every}"
    ):
        load_experiment(path, overrides=asked)
    load_experiment(path, overrides=[*asked, "monitor.enabled=false"])
    load_experiment(path, overrides=[*asked, "train.num_steps=101", "evaluation.every=100"])


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder
