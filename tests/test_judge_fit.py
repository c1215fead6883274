"""`rewardgen judge fit`: agreement by its definition, labels, and a small judge that learns from labelled files."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from rewardgen.cli import main
from rewardgen.errors import ConfigError
from rewardgen.rewards.judging.fit import FitConfig, agreement, fit, label_of
from rewardgen.rewards.judging.local import LocalModel, load_model, save_model
from rewardgen.rewards.judging.questions import load_question, parse_template
from rewardgen.rewards.vlm_judge_local import LocalVlmJudge
from rewardgen.types import Example
from rewardgen.world.pairs import UNLIKE, StylePairs
from rewardgen.world.tiny_vlm import tiny_llava

SIZES: dict[str, int] = {"image_size": 16, "patch_size": 16, "vision_width": 16, "vision_layers": 1}
SIZES |= {"text_width": 16, "text_layers": 1, "heads": 2}
TEMPLATE = "---\nanswer: yes_no\n---\n{picture} light ?"


def example(name: str, level: float, label: Any) -> Example:
    return Example(id=name, target=torch.full((3, 16, 16), level), extras={"label": label})


class ByBrightness:
    """A judge whose score is the mean of the picture."""

    def __init__(self, template: str = TEMPLATE) -> None:
        self.question = parse_template(template, name="light")

    def __call__(self, parts: Any) -> tuple[Tensor, Tensor]:
        (picture,) = [part for part in parts if isinstance(part, Tensor)]
        return picture.mean(), torch.ones(())


def saved_llava(folder: Path) -> Path:
    save_model(*tiny_llava(**SIZES), folder)
    return folder


def write_pairs(folder: Path, name: str, n: int, seed: int) -> Path:
    """Light and dark pictures with their labels, as a user would write them."""
    rng = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(n):
        light = index % 2 == 0
        pixels = torch.rand(16, 16, 3, generator=rng) * 0.3 + (0.65 if light else 0.05)
        picture = f"{name}-{index}.png"
        Image.fromarray((pixels * 255).byte().numpy()).save(folder / picture)
        rows.append({"id": f"{name}-{index}", "target": picture, "extras": {"label": "yes" if light else "no"}})
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


class TestAgreement:
    def test_balanced_accuracy_is_the_mean_of_the_recalls(self):
        given = [example("a", 0.9, "yes"), example("b", 0.4, True)]
        given += [example(f"n{i}", level, "No") for i, level in enumerate((0.1, 0.2, 0.6, 0.1, 0.3, 0.2))]
        found = agreement(ByBrightness(), given)
        assert found.recalls == {"no": pytest.approx(5 / 6), "yes": 0.5}
        assert found.balanced_accuracy == pytest.approx((5 / 6 + 1 / 2) / 2)
        assert found.accuracy == pytest.approx(6 / 8)
        assert found.counts == {"no": 6, "yes": 2}

    def test_of_a_rubric_the_nearest_mark_counts(self):
        judge = ByBrightness("---\nanswer: {lowest: 0, highest: 4}\n---\n{picture}")
        given = [example("a", 0.7, 3), example("b", 0.55, 2), example("c", 0.9, "3"), example("d", 0.1, 0)]
        assert agreement(judge, given).recalls == {"0": 1.0, "2": 1.0, "3": 0.5}

    def test_what_the_question_cannot_be_put_about_is_left_out_and_counted(self):
        judge = ByBrightness("---\nanswer: yes_no\n---\n{picture} {prompt}")
        asked = [Example(id=e.id, prompt="x", target=e.target, extras=e.extras) for e in (example("a", 0.9, "yes"), example("b", 0.1, "no"))]  # fmt: skip  # noqa: E501
        found = agreement(judge, [*asked, example("c", 0.9, "no")])
        assert (found.accuracy, found.not_applicable) == (1.0, 1)

    @pytest.mark.parametrize("label", ["maybe", None, 1, 0.5, ["yes"]])
    def test_labels_that_are_no_answers(self, label):
        with pytest.raises(ConfigError, match="example 'a': extras"):
            label_of(load_question("style"), example("a", 0.5, label))

    def test_one_kind_of_label_tells_nothing(self):
        with pytest.raises(ConfigError, match="needs two kinds"):
            agreement(ByBrightness(), [example("a", 0.5, "yes")])
        with pytest.raises(ConfigError, match="has no target"):
            label_of(load_question("style"), Example(id="a", extras={"label": "yes"}))


class TestFit:
    def test_a_small_judge_learns_all_its_parameters(self, tmp_path, capsys):
        model = saved_llava(tmp_path / "model")
        train, held_out = write_pairs(tmp_path, "train", 64, 0), write_pairs(tmp_path, "held", 40, 1)
        (tmp_path / "light.txt").write_text(TEMPLATE)
        main_arguments = ["judge", "fit", str(model), "--data", str(train), "--held-out", str(held_out), "--json"]
        main_arguments += ["-o", str(tmp_path / "judge"), "-q", str(tmp_path / "light.txt")]
        with pytest.raises(SystemExit) as done:
            main([*main_arguments, "--steps", "40", "--batch-size", "16", "--lr", "5e-3"])
        assert done.value.code == 0
        report = json.loads(capsys.readouterr().out)
        assert report == json.loads((tmp_path / "judge" / "fit.json").read_text())
        assert report["before"]["balanced_accuracy"] < 0.8
        assert report["after"]["balanced_accuracy"] >= 0.95
        assert report["after"]["counts"] == {"no": 20, "yes": 20}
        taught = LocalVlmJudge.from_pretrained(str(tmp_path / "judge"), str(tmp_path / "light.txt"), min_mass=0.0)
        pixels = torch.stack([torch.full((3, 16, 16), level) for level in (0.8, 0.2)])
        value_B = taught.score(pixels, [Example(id="a"), Example(id="b")]).value_B
        assert value_B[0] > 0.6 > 0.4 > value_B[1]
        assert not list((tmp_path / "judge").glob("*.bin"))

    def test_lora_leaves_the_model_alone_and_is_read_with_it(self, tmp_path):
        base = saved_llava(tmp_path / "model")
        before = load_file(base / "model.safetensors")
        model, processor = load_model(str(base), torch.float32)
        judge = LocalModel(model, processor, parse_template(TEMPLATE, name="light"), checkpointing=False)
        given = [example(f"{i}", 0.8 if i % 2 else 0.2, bool(i % 2)) for i in range(8)]
        parts = judge.question.put(given[1].target, given[1])
        with torch.no_grad():
            untaught = judge(parts)[0]
        fit(judge, given, tmp_path / "lora", FitConfig(num_steps=3, batch_size=4, lr=0.05, lora_rank=2))
        assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
        assert not (tmp_path / "lora" / "model.safetensors").exists()
        after = load_file(base / "model.safetensors")
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        read = LocalModel(*load_model(str(tmp_path / "lora"), torch.float32), judge.question, checkpointing=False)
        with torch.no_grad():
            assert not torch.allclose(read(parts)[0], untaught, atol=1e-4)

    def test_a_wrong_label_is_named_before_anything_is_trained(self, tmp_path):
        judge: Any = SimpleNamespace(question=load_question("style"))
        with pytest.raises(ConfigError, match="example 'b'"):
            fit(judge, [example("b", 0.1, "perhaps")], tmp_path / "judge", FitConfig())
        assert not (tmp_path / "judge").exists()

    def test_without_trl_the_extra_is_named(self, tmp_path, monkeypatch):
        def missing(name: str) -> Any:
            raise ModuleNotFoundError(f"No module named '{name}'")

        monkeypatch.setattr(importlib, "import_module", missing)
        judge: Any = SimpleNamespace(question=load_question("style"))
        with pytest.raises(ConfigError, match=r"pip install -e '\.\[judge\]'"):
            fit(judge, [example("b", 0.1, "no")], tmp_path, FitConfig())


class TestCommand:
    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"--output": "."}, "not an empty folder"),
            ({"--held-out": "train.jsonl"}, "are among those to learn from"),
            ({"extra": "datta.size=3"}, "Did you mean 'data'"),
            ({"extra": "size=3"}, r"expected 'data.KEY=VALUE'"),
            ({"--data": "nowhere.jsonl"}, "there is no such dataset file"),
            ({"model": "empty"}, "no image-text model"),
        ],
    )
    def test_bad_input_is_one_message(self, tmp_path, monkeypatch, capsys, changes, said):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty").mkdir()
        for name, seed in (("train", 0), ("held", 1)):
            write_pairs(tmp_path, name, 2, seed)
        options = {"--data": "train.jsonl", "--held-out": "held.jsonl", "--output": "out"}
        options |= {key: value for key, value in changes.items() if key.startswith("--")}
        words = ["judge", "fit", changes.get("model", "empty"), *([changes["extra"]] if "extra" in changes else [])]
        with pytest.raises(SystemExit) as done:
            main([*words, *[word for pair in options.items() for word in pair]])
        assert done.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert re.search(said, error)
        assert not (tmp_path / "out").exists()


class TestPairs:
    def test_labels_are_true_and_balanced(self):
        pairs = StylePairs("train", size=60)
        found = [pairs[index] for index in range(len(pairs))]
        by_label = {
            label: [e.extras["similarity"] for e in found if e.extras["label"] == label] for label in ("yes", "no")
        }
        assert len(by_label["yes"]) == len(by_label["no"]) == 30
        assert min(by_label["yes"]) > 0.99
        assert max(by_label["no"]) < 0.85
        assert sum(0.3 < s < UNLIKE for s in by_label["no"]) >= 3
        assert all(load_question("style").put(e.target, e) is not None for e in found)

    def test_splits_and_seeds_are_apart_and_repeat(self):
        a, again, b = StylePairs("train", 6), StylePairs("train", 6), StylePairs("held_out", 6)
        assert torch.equal(a[3].target, again[3].target)
        assert not torch.equal(a[3].target, StylePairs("train", 6, seed=1)[3].target)
        assert not {a[i].id for i in range(6)} & {b[i].id for i in range(6)}
        with pytest.raises(ConfigError, match="split"):
            StylePairs("test")
