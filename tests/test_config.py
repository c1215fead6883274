"""Experiments: what loads, what flavors and overrides do, and one clear error for everything that is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rewardgen import strict_yaml
from rewardgen.config import Experiment, flavors_of, load_experiment, overlay, plugins_in
from rewardgen.errors import ConfigError
from rewardgen.sources import find_sources

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.yaml"))
GOOD = """\
name: small
seed: 3
policy: {use: "tests.toys:ToyPolicy", args: {hidden: 4}}
data:
  train: {use: "tests.toys:ToyDataset", args: {size: 4}}
  held_out: {use: "tests.toys:ToyDataset", args: {size: 4, seed: 1}}
rollout:
  image_size: [8, 8]
  num_steps: 4
  window: {kind: refl, entry_range: [1, 3]}
objective:
  flow_matching: {weight: 1.0}
  rewards:
    style: {use: "tests.toys:ToyReward", weight: 0.5}
optimizer: {lr: 1e-3}
train: {num_steps: 3, batch_size: 2}
evaluation: {num_examples: 4, grid_examples: 2}
flavors:
  tiny: {}
  large: {train: {num_steps: 30}, optimizer: {lr: 1.0e-5}}
"""


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "experiment.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_full_scale_takes_nothing_from_the_tiny_world() -> None:
    for path in EXPERIMENTS:
        for flavor in set(flavors_of(path)) - {"tiny"}:
            for where, _, plugin in plugins_in(load_experiment(path, flavor)):
                assert not plugin.use.startswith("rewardgen.world"), (path, flavor, where)
                found = [source.text for source in find_sources(plugin.args, where) if source.kind == "world"]
                assert not found, (path, flavor, where)


def test_checking_an_experiment_imports_no_model_library() -> None:
    """They take several seconds, in which one would wait for a misspelt key."""
    program = (
        "import sys; from pathlib import Path; from rewardgen import build, config;"
        "config.load_experiment(Path('experiments/uso_srl.yaml'));"
        "print(sorted({'diffusers', 'peft', 'transformers', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_every_experiment_of_the_project_loads_in_every_flavor(path: Path) -> None:
    for flavor in [None, *flavors_of(path)]:
        experiment = load_experiment(path, flavor)
        assert experiment.name == path.stem
        assert next(iter(plugins_in(experiment)))[0] == "policy"


def test_a_good_experiment(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path, GOOD))
    assert experiment.optimizer.lr == 1e-3
    assert experiment.rollout.image_size == (8, 8)
    assert experiment.objective.rewards["style"].weight == 0.5
    kinds = [(path, kind) for path, kind, _ in plugins_in(experiment)]
    assert kinds == [
        ("policy", "policies"),
        ("data.train", "data"),
        ("data.held_out", "data"),
        ("objective.rewards.style", "rewards"),
    ]


def test_what_is_written_back_loads_to_the_same(tmp_path: Path) -> None:
    """The resolved experiment in a run's folder is an experiment itself."""
    experiment = load_experiment(write(tmp_path, GOOD), overrides=["seed=9"])
    again = write(tmp_path, yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False))
    assert load_experiment(again) == experiment


def test_flavors(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert flavors_of(path) == ["tiny", "large"]
    assert load_experiment(path).train.num_steps == 3
    large = load_experiment(path, "large")
    assert (large.train.num_steps, large.train.batch_size, large.optimizer.lr) == (30, 2, 1e-5)
    first = write(tmp_path, GOOD.replace("  tiny: {}\n", ""))
    assert load_experiment(first).train.num_steps == 30


def test_overrides_come_last(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    overrides = ["train.num_steps=7", "optimizer.lr=2e-4", "rollout.window={entry_range: [2, 2]}", "name=other"]
    experiment = load_experiment(path, "large", overrides)
    assert experiment.train.num_steps == 7
    assert experiment.optimizer.lr == 2e-4
    assert experiment.rollout.window.entry_range == (2, 2)
    assert experiment.name == "other"


def test_another_plugin_does_not_inherit_arguments() -> None:
    base = {"use": "a", "args": {"size": 3}, "weight": 2}
    assert overlay(base, {"args": {"seed": 1}})["args"] == {"size": 3, "seed": 1}
    assert overlay(base, {"use": "a", "args": {"seed": 1}})["args"] == {"size": 3, "seed": 1}
    assert overlay(base, {"use": "b"}) == {"use": "b", "weight": 2}
    assert overlay(base, {"use": "b", "args": {"seed": 1}}) == {"use": "b", "args": {"seed": 1}, "weight": 2}
    window = {"kind": "refl", "entry_range": [1, 2]}
    assert overlay(window, {"kind": "draft", "k": 1}) == {"kind": "draft", "k": 1}


trees: st.SearchStrategy[Any] = st.dictionaries(
    st.sampled_from("abc"),
    st.recursive(st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=6),
    max_size=3,
)


@given(base=trees, top=trees)
def test_overlay_properties(base: dict[str, Any], top: dict[str, Any]) -> None:
    merged = overlay(base, top)
    assert overlay(base, {}) == base
    assert overlay({}, top) == top
    assert overlay(merged, top) == merged
    assert set(merged) == set(base) | set(top)


letters = st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), min_size=1, max_size=5)
values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | letters


@given(st.recursive(values, lambda inner: st.lists(inner) | st.dictionaries(letters, inner), max_leaves=6))
def test_json_is_read_as_json(value: Any) -> None:
    """JSON is YAML with every word quoted; nothing of it may change its meaning."""
    found = strict_yaml.load(json.dumps(value), "test")[0]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("12", 12),
        ("-0", 0),
        ("1_000", 1000),
        ("010", "010"),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        ("true", True),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("True", "True"),
        ("null", None),
        ("~", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("world:csd", "world:csd"),
        ("'3'", "3"),
    ],
)
def test_words_and_numbers(written: str, value: Any) -> None:
    found = strict_yaml.load(f"key: {written}", "test")[0]["key"]
    assert found == value
    assert type(found) is type(value)


def change(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new, 1)


MALFORMED: list[tuple[str, str, str]] = [
    ("an empty file", "", "the file is empty"),
    ("a list", "- 1\n- 2\n", "the top level must be a mapping of keys, not a list"),
    ("a word", "hello", "the top level must be a mapping of keys, not a word"),
    ("bad YAML", "name: [1,\n", "line 2: "),
    ("a tab", "name: x\n\tseed: 1\n", "line 2: "),
    ("two documents", GOOD + "---\n" + GOOD, "line 21: but found another document"),
    ("a duplicate key", GOOD + "seed: 4\n", "line 21: the key 'seed' stands twice, first on line 2"),
    (
        "an inner duplicate key",
        change("num_steps: 4", "num_steps: 4\n  num_steps: 5"),
        "the key 'num_steps' stands twice",
    ),
    ("an anchor", change("seed: 3", "seed: &s 3"), "line 2: anchors and aliases are not allowed"),
    ("an alias", change("seed: 3", "seed: *s"), "line 2: anchors and aliases are not allowed"),
    ("a merge key", change("seed: 3", "<<: {seed: 3}"), "line 2: merge keys ('<<') are not allowed"),
    ("a tag", change("seed: 3", "seed: !!python/name:os.system"), "line 2: the tag"),
    ("a harmless tag", change("seed: 3", "seed: !!int '3'"), "line 2: the tag"),
    ("a number as key", change("seed: 3", "3: seed"), "line 2: keys must be words"),
    ("a control character", change("seed: 3", "seed: \x01"), "experiment.yaml: "),
    ("deep nesting", "name: " + "[" * 5000, "nested too deeply"),
    ("an unknown key", change("seed: 3", "sede: 3"), "sede (line 2): unknown key. Did you mean 'seed'?"),
    ("an unknown inner key", change("lr: 1e-3", "learning: 1"), "optimizer.learning (line 15): unknown key."),
    ("a key in the wrong place", GOOD + "lr: 1e-3\n", "lr (line 21): unknown key. Did you mean 'optimizer.lr'?"),
    (
        "an unknown key of a term",
        change("weight: 0.5", "wigths: 0.5"),
        "objective.rewards.style.wigths (line 14): unknown key. Did you mean 'weight'?",
    ),
    (
        "a missing section",
        change('policy: {use: "tests.toys:ToyPolicy", args: {hidden: 4}}\n', ""),
        "policy: required key is missing",
    ),
    (
        "a missing use",
        change('use: "tests.toys:ToyReward", ', ""),
        "objective.rewards.style.use (line 14): required key is missing",
    ),
    (
        "a word for a number",
        change("num_steps: 3", "num_steps: three"),
        "train.num_steps (line 16): should be a valid integer",
    ),
    ("a quoted number", change("seed: 3", "seed: '3'"), "seed (line 2): should be a valid integer, got '3'"),
    ("a truth value for a number", change("seed: 3", "seed: true"), "seed (line 2): should be a valid integer"),
    (
        "a fraction for a whole number",
        change("num_steps: 3", "num_steps: 2.5"),
        "train.num_steps (line 16): should be a valid integer",
    ),
    ("nan", change("lr: 1e-3", "lr: .nan"), "optimizer.lr (line 15): should be a finite number"),
    ("infinity", change("lr: 1e-3", "lr: .inf"), "optimizer.lr (line 15): should be a finite number"),
    ("a negative rate", change("lr: 1e-3", "lr: -1"), "optimizer.lr (line 15): should be greater than"),
    ("a negative seed", change("seed: 3", "seed: -3"), "seed (line 2): should be greater than or equal to 0, got -3"),
    ("no steps", change("num_steps: 3", "num_steps: 0"), "train.num_steps (line 16): should be greater than"),
    ("a name that is a path", change("name: small", "name: ../small"), "name (line 1): "),
    ("a scalar for a section", change("optimizer: {lr: 1e-3}", "optimizer: 3"), "optimizer (line 15): "),
    ("null for a section", change("optimizer: {lr: 1e-3}", "optimizer:"), "optimizer (line 15): "),
    ("one number for a size", change("[8, 8]", "8"), "rollout.image_size (line 8): "),
    ("three numbers for a size", change("[8, 8]", "[8, 8, 3]"), "rollout.image_size (line 8): "),
    ("an empty picture", change("[8, 8]", "[8, 0]"), "rollout (line 7): image_size must be positive, got [8, 0]"),
    ("a window of no kind", change("kind: refl", "kind: relf"), "rollout.window.kind (line 10): "),
    ("an entry after the end", change("[1, 3]", "[1, 4]"), "entry_range ends at step 4, but the last of 4 steps is 3"),
    ("an empty range", change("[1, 3]", "[3, 1]"), "rollout.window (line 10): entry_range must be [low, high]"),
    (
        "a field of another kind",
        change("entry_range: [1, 3]", "entry_range: [1, 3], k: 2"),
        "'k' does not belong to a window of kind 'refl'",
    ),
    (
        "a start that never comes",
        change("weight: 0.5", "weight: 0.5, start_step: 3"),
        "objective.rewards.style.start_step (line 14): step 3 is never reached",
    ),
    (
        "a flow matching that never comes",
        change("{weight: 1.0}", "{weight: 1.0, start_step: 9}"),
        "objective.flow_matching.start_step",
    ),
    ("all weights 0", change("{weight: 1.0}", "{weight: 0}").replace("weight: 0.5", "weight: 0"), "all weights are 0"),
    (
        "a reward without gradient",
        change("tests.toys:ToyReward", "rewardgen.world.witness:StyleWitness"),
        "objective.rewards.style: StyleWitness has no gradient",
    ),
    (
        "more pictures than examples",
        change("grid_examples: 2", "grid_examples: 5"),
        "evaluation.grid_examples (line 17): 5 ",
    ),
    (
        "a witness named as a reward",
        change("grid_examples: 2", "grid_examples: 2, witnesses: {style: {use: brightness}}"),
        "evaluation.witnesses (line 17): a witness needs a name that no reward has: style",
    ),
    (
        "an unknown reward",
        change("tests.toys:ToyReward", "brihgtness"),
        "objective.rewards.style.use (line 14): no file 'brihgtness.py' among the bundled rewards",
    ),
    (
        "a policy for a reward",
        change("tests.toys:ToyReward", "tests.toys:ToyPolicy"),
        "'tests.toys:ToyPolicy' is no subclass of rewardgen's Reward",
    ),
    (
        "an unknown module",
        change("tests.toys:ToyPolicy", "tests.tois:ToyPolicy"),
        "policy.use (line 3): 'tests.tois:ToyPolicy': there is no module 'tests.tois'",
    ),
    (
        "an unknown argument",
        change("hidden: 4", "hidn: 4"),
        "policy.args.hidn (line 3): unknown argument. Did you mean 'hidden'?",
    ),
    (
        "an argument of a wrong type",
        change("hidden: 4", "hidden: wide"),
        "policy.args.hidden (line 3): input should be a valid integer, got 'wide'",
    ),
    ("arguments that are a list", change("{hidden: 4}", "[4]"), "policy.args (line 3): "),
    ("flavors that are a list", GOOD.partition("flavors:")[0] + "flavors: [tiny]\n", "flavors: must be a mapping"),
    ("a flavor that is a number", change("tiny: {}", "tiny: 3"), "flavors.tiny: must be a mapping, not a number"),
    ("a flavor with flavors", change("tiny: {}", "tiny: {flavors: {}}"), "a flavor has no flavors"),
    ("a fault in the flavor", change("tiny: {}", "tiny: {train: {stesp: 3}}"), "train.stesp (line 19): unknown key."),
]


@pytest.mark.parametrize(("text", "message"), [row[1:] for row in MALFORMED], ids=[row[0] for row in MALFORMED])
def test_a_malformed_experiment_gives_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(write(tmp_path, text))
    told = str(caught.value)
    assert message in told
    assert told.startswith(str(tmp_path / "experiment.yaml"))
    assert "\n" not in told
    assert "pydantic" not in told


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    text = change("seed: 3", "sede: 3").replace("hidden: 4", "hidn: 4").replace("lr: 1e-3", "lr: fast")
    with pytest.raises(ConfigError) as caught:
        load_experiment(write(tmp_path, text), overrides=["train.bacth_size=3"])
    first, *rows = str(caught.value).splitlines()
    assert first.endswith("(flavor tiny): 4 faults")
    assert sorted(row.strip().partition(" (")[0] for row in rows) == [
        "optimizer.lr",
        "policy.args.hidn",
        "sede",
        "train.bacth_size",
    ]
    assert "train.bacth_size (override): unknown key. Did you mean 'batch_size'?" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train", "override 'train': expected 'dotted.key=value'"),
        ("=3", "expected 'dotted.key=value'"),
        ("train..num_steps=3", "expected 'dotted.key=value'"),
        ("flavors.tiny.seed=3", "choose a flavor with --flavor"),
        ("train.num_steps=[1", "override 'train.num_steps=[1', line 1: "),
        ("train.num_steps=&a 3", "anchors and aliases are not allowed"),
        ("train.num_stesp=3", "train.num_stesp (override): unknown key. Did you mean 'num_steps'?"),
        ("trin.num_steps=3", "trin (override): unknown key. Did you mean 'train'?"),
        ("name.first=x", "name (override): should be a valid string"),
        ("train.num_steps=", "train.num_steps"),
        ("train.num_steps=many", "train.num_steps (override): should be a valid integer"),
    ],
)
def test_a_bad_override(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(write(tmp_path, GOOD), overrides=[override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_that_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another override has given 'train' a value of its own"):
        load_experiment(write(tmp_path, GOOD), overrides=["train=3", "train.num_steps=3"])


def test_an_unknown_flavor_and_a_missing_file(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    with pytest.raises(ConfigError, match=r"no flavor 'larje'. Did you mean 'large'\?"):
        load_experiment(path, "larje")
    with pytest.raises(ConfigError, match="There are: none"):
        load_experiment(write(tmp_path, GOOD.partition("flavors:")[0]), "tiny")
    with pytest.raises(ConfigError, match=r"there is no experiment file .*nowhere\.yaml"):
        load_experiment(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="is a directory"):
        load_experiment(tmp_path)
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="not a text file"):
        load_experiment(path)


def test_configuration_is_frozen(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path, GOOD))
    with pytest.raises(ValueError, match="frozen"):
        experiment.seed = 1  # type: ignore[misc]


def test_every_field_is_documented() -> None:
    """Section classes live beside what they configure, with a docstring under each field."""

    def walk(model: Any, path: str) -> list[str]:
        missing = []
        for name, field in model.model_fields.items():
            inner = field.annotation
            section = isinstance(inner, type) and hasattr(inner, "model_fields")
            if section:
                missing += walk(inner, f"{path}{name}.")
            elif not field.description:
                missing.append(path + name)
        return missing

    assert walk(Experiment, "") == []
