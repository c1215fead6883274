"""Values that a plug-in's own class refuses: named by their key's path, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rewardgen import build, construct, plugins
from rewardgen.arguments import check_args, collect_args
from rewardgen.cli import main
from rewardgen.config import load_experiment
from rewardgen.errors import ConfigError
from rewardgen.settings import Plugin

ROOT = Path(__file__).resolve().parent.parent
UMO = str(ROOT / "experiments" / "umo_matching.yaml")
PEOPLE = "objective.rewards.people.args"
WORLD = "rewardgen.world"
FACES = {"checkpoint": "nowhere.safetensors"}
JUDGE = {"question": "style", "urls": ["http://localhost:8000/v1"], "served_model": "any"}

REFUSED: list[tuple[plugins.Kind, str, dict[str, Any], str, str]] = [
    ("rewards", "matching", {**FACES, "floor": 2.0}, "floor", "2 is no cosine; it lies in [-1, 1]"),
    ("rewards", "matching", {**FACES, "miss": -1.0}, "miss", "-1 is a cost"),
    ("rewards", "matching", {**FACES, "extra": -0.5}, "extra", "-0.5 is a cost"),
    ("rewards", "matching", {**FACES, "confidence": 0.5}, "confidence", "the detector 'given' has none"),
    ("rewards", "identity", {**FACES, "confidence": 0.5}, "confidence", "the detector 'given' has none"),
    ("rewards", "id_sim", {**FACES, "confidence": 0.5}, "confidence", "the detector 'given' has none"),
    ("rewards", "id_conf", {**FACES, "confidence": 0.5}, "confidence", "the detector 'given' has none"),
    ("rewards", "face_count", {**FACES, "confidence": 0.5}, "confidence", "the detector 'given' has none"),
    ("rewards", "hpsv3", {"checkpoint": "a", "instruction": __file__}, "instruction", "it is not the authors' file"),
    ("rewards", "structure", {"size": 20}, "size", "20 is not a multiple of 8"),
    ("rewards", "structure", {"noise": 0.0}, "noise", "0 must be above 0"),
    ("rewards", "vlm_judge", {**JUDGE, "question": "stile"}, "question", "Did you mean 'style'?"),
    ("rewards", "vlm_judge", {**JUDGE, "urls": ["localhost"]}, "urls", "'localhost' is no base URL"),
    ("rewards", "vlm_judge", {**JUDGE, "urls": ["http://me:pw@host/v1"]}, "urls", "write the base URL alone"),
    ("rewards", "vlm_judge", {**JUDGE, "key_env": "sk-1234"}, "key_env", "the name of an environment variable"),
    ("rewards", "vlm_judge_local", {"model": "a/b", "question": "stile"}, "question", "Did you mean 'style'?"),
    ("rewards", "vlm_judge_local", {"model": "a/b", "question": "subject_rubric"}, "question", "asks for reasons"),
    ("policies", "uso", {"base": None, "vae": "a/b"}, "base", "or else `transformer`"),
    ("policies", "uso", {"base": "a/b", "train": ["projector"]}, "train", "the policy has none"),
    ("policies", "uso", {"base": "a/b", "train": ["transformer"], "offload": True}, "offload", "stay as they are"),
    ("policies", "uso", {"base": "a/b", "attention": "flush"}, "attention", "Did you mean 'flash'?"),
    ("policies", "uno", {"base": None}, "base", "or else `transformer`"),
    ("policies", "uno", {"base": "a/b", "train": ["transformer"], "base_dtype": "int8"}, "base_dtype", "stay as they"),
    ("policies", "uno", {"base": "a/b", "attention": "sage"}, "attention", "has no backward pass"),
    ("data", "jsonl", {"path": "nowhere.jsonl", "limit": 0}, "limit", "at least 1 is needed"),
    ("data", "shards", {"path": "nowhere.tar", "limit": 0}, "limit", "at least 1 is needed"),
    ("data", "huggingface", {"path": "no/where", "limit": 0}, "limit", "at least 1 is needed"),
    ("data", f"{WORLD}.dataset:TinyWorld", {"split": "trian"}, "split", "Did you mean 'train'?"),
    ("data", f"{WORLD}.dataset:TinyWorld", {"size": 0}, "size", "at least 1 is needed"),
    ("data", f"{WORLD}.people_dataset:TinyPeople", {"split": "held-out"}, "split", "Did you mean 'held_out'?"),
    ("data", f"{WORLD}.people_dataset:TinyPeople", {"size": 0}, "size", "at least 1 is needed"),
    ("data", f"{WORLD}.people_dataset:TinyPeople", {"people": 7}, "people", "a picture has 1 to 6"),
    ("data", f"{WORLD}.pairs:StylePairs", {"split": "test"}, "split", "neither 'train' nor 'held_out'"),
    ("data", f"{WORLD}.pairs:StylePairs", {"size": 1}, "size", "at least 2 are needed"),
]


@pytest.mark.parametrize(
    ("kind", "use", "args", "key", "message"), REFUSED, ids=[f"{use}-{key}" for _, use, _, key, _ in REFUSED]
)
def test_a_bundled_class_refuses_the_value_by_its_key(
    kind: plugins.Kind, use: str, args: dict[str, Any], key: str, message: str
) -> None:
    found = collect_args(plugins.factory(plugins.resolve(kind, use)), args, "place.args")[1]
    assert [where for where, _ in found] == [f"place.args.{key}"]
    assert message in found[0][1]
    with pytest.raises(ConfigError, match=rf"^place\.args\.{key}: "):
        construct.make("place", kind, Plugin(use=use, args=args))


def test_every_bundled_class_that_checks_values_is_among_them() -> None:
    tried = {plugins.resolve(kind, use) for kind, use, *_ in REFUSED}
    for kind in ("rewards", "policies", "data"):
        for name in plugins.bundled(kind):
            try:
                cls = plugins.resolve(kind, name)
            except ConfigError:  # a helper
                continue
            assert not hasattr(cls, "check_arguments") or cls in tried


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Key paths of what is made, and with it read; here nothing is."""
    paths: list[str] = []

    def make(path: str, *_: object) -> None:
        paths.append(path)
        raise ConfigError("nothing is made here")

    monkeypatch.setattr(build, "make", make)
    return paths


@pytest.mark.parametrize("command", ["check", "train"])
def test_no_weight_is_read_and_nothing_written_before_a_value_is_refused(
    command: str, made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([command, UMO, f"{PEOPLE}.floor=2", f"{PEOPLE}.checkpoint=./nowhere.safetensors"])
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert err.count("\n") == 1
    assert f"{PEOPLE}.floor (override): 2 is no cosine; it lies in [-1, 1]" in err
    assert (out, made, list(tmp_path.iterdir())) == ("", [], [])
    # Without the fault it goes on to make things.
    with pytest.raises(SystemExit):
        main([command, UMO, "report.tensorboard=false"])
    assert made


def test_several_faults_are_told_together() -> None:
    with pytest.raises(ConfigError, match="2 faults") as caught:
        load_experiment(Path(UMO), overrides=[f"{PEOPLE}.floor=2", "data.train.args.people=9"])
    assert f"{PEOPLE}.floor (override): 2 is no cosine" in str(caught.value)
    assert "data.train.args.people (override): 9; a picture has 1 to 6" in str(caught.value)


def test_a_judge_on_another_machine_needs_neither_key_nor_template_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ELSEWHERE", raising=False)
    args = {**JUDGE, "key_env": "ELSEWHERE", "question": "./not/here/yet.txt"}
    target = plugins.factory(plugins.resolve("rewards", "vlm_judge"))
    assert check_args(target, args, "args") == {**args, "urls": ("http://localhost:8000/v1",)}


@pytest.mark.parametrize("question", ["~nobody-of-this-name/a.txt", "a" * 300 + ".txt", "owner/name:a.txt"])
def test_a_template_that_cannot_be_looked_at_is_left_to_whoever_reads_it(question: str) -> None:
    target = plugins.factory(plugins.resolve("rewards", "vlm_judge_local"))
    assert not collect_args(target, {"model": "a/b", "question": question}, "args")[1]


def test_a_malformed_template_is_refused(tmp_path: Path) -> None:
    template = tmp_path / "mine.txt"
    template.write_text("Is it nice?", encoding="utf-8")
    target = plugins.factory(plugins.resolve("rewards", "vlm_judge"))
    ((where, message),) = collect_args(target, {**JUDGE, "question": str(template)}, "args")[1]
    assert where == "args.question"
    assert "must begin with its settings" in message


class Mine:
    """A class of one's own; its constructor must not be called by a check."""

    def __init__(self, low: int, high: int = 3, **others: int) -> None:
        raise AssertionError("made")

    @classmethod
    def check_arguments(cls, *, low: int, high: int, **others: int) -> None:
        if low > high:
            raise ConfigError(f"low and high are in the wrong order: {low} > {high}")
        if min(others.values(), default=0) < 0:
            raise ConfigError("spare: below 0")


def test_the_class_sees_defaults_and_what_has_no_name_of_its_own() -> None:
    assert collect_args(Mine, {"low": 1}, "args")[1] == []
    # What names no single argument is said of them all.
    assert collect_args(Mine, {"low": 4}, "args")[1] == [("args", "low and high are in the wrong order: 4 > 3")]
    assert collect_args(Mine, {"low": 1, "spare": -1}, "args")[1] == [("args.spare", "below 0")]


def test_values_are_looked_at_only_where_names_and_types_are_right() -> None:
    found = collect_args(Mine, {"low": "much", "spare": -1}, "args")[1]
    assert [where for where, _ in found] == ["args.low"]


def test_a_child_with_another_constructor_is_not_held_to_its_parents_check() -> None:
    class Child(Mine):
        def __init__(self, width: int = 0) -> None:
            raise AssertionError("made")

    assert collect_args(Child, {"width": -1}, "args")[1] == []
