"""Malformed experiments: one clear error each, exit code 2, and no weight file opened before it.

They go through the command line. The good experiment names real weights (the bundled CSD and FLUX parts), so that an
experiment that were not refused would open them; opening any weight file fails the test.
"""

# ruff: noqa: E501 - one case a line

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from rewardgen.cli import main
from rewardgen.policies import reading
from rewardgen.rewards import loading

ROOT = Path(__file__).resolve().parent.parent.parent
GOOD = """\
name: small
seed: 3
policy:
  use: uso
  args: {base: world:base, siglip: world:siglip, projector: world:uso/projector.safetensors, train: [lora]}
data:
  train: {use: rewardgen.world.dataset:TinyWorld, args: {split: train, size: 4}}
  held_out: {use: rewardgen.world.dataset:TinyWorld, args: {split: held_out, size: 4}}
rollout:
  image_size: [64, 64]
  num_steps: 8
  window: {kind: refl, entry_range: [4, 7]}
objective:
  flow_matching: {weight: 1.0}
  rewards:
    style: {use: csd, args: {checkpoint: world:csd.safetensors}, weight: 4.0}
optimizer: {lr: 3.0e-3, warmup_steps: 2}
train: {num_steps: 5, batch_size: 2, device: cpu}
evaluation:
  num_examples: 4
  grid_examples: 2
  witnesses:
    layout: {use: rewardgen.world.witness:ContentWitness}
report: {tensorboard: false}
flavors:
  tiny: {}
  large: {train: {num_steps: 30}, policy: {args: {lora_rank: 8}}}
"""


class WeightsWereRead(BaseException):
    """A weight file was opened. Not an Exception, so that no clause of the product can take it for a fault."""


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every way to open weights raises, in its library and wherever a module of the project has bound it."""
    monkeypatch.chdir(ROOT)

    def refuse(*args: object, **_: object) -> None:
        raise WeightsWereRead(str(args[:1]))

    places = [(safetensors, "safe_open"), (safetensors.torch, "load_file"), (safetensors.torch, "load")]
    places += [(torch, "load"), (torch.jit, "load")]
    readers = [(module, name, getattr(module, name), partial(refuse)) for module, name in places]
    for library, attribute, original, refusal in readers:
        ours = [(module, name) for module in list(sys.modules.values()) for name in _bound(module, original)]
        for module, name in ((library, attribute), *ours):
            monkeypatch.setattr(module, name, refusal)
    # diffusers and transformers open files by their own means.
    monkeypatch.setattr("rewardgen.policies.parts._read", refuse)
    # These two read the weights of the good experiment.
    assert any(_bound(reading, refusal) for *_, refusal in readers)
    assert any(_bound(loading, refusal) for *_, refusal in readers)
    yield
    # A module that was first imported meanwhile has bound a replacement, and would keep it.
    monkeypatch.undo()
    for module in list(sys.modules.values()):
        for _, _, original, refusal in readers:
            for name in _bound(module, refusal):
                setattr(module, name, original)


def _bound(module: object, reader: object) -> list[str]:
    """The names by which a module of the project holds a reader."""
    if not getattr(module, "__name__", "").startswith("rewardgen"):
        return []
    return [name for name, value in vars(module).items() if value is reader]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and stderr of a command that has nothing to say on stdout."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    told = capsys.readouterr()
    assert told.out == ""
    return int(stopped.value.code or 0), told.err


@dataclass(frozen=True)
class Case:
    """A change to the good experiment, by text (`old` -> `new`) or overrides, or another `text`; and what is told."""

    id: str
    told: tuple[str, ...]
    old: str = ""
    new: str = ""
    text: str | bytes = GOOD
    overrides: tuple[str, ...] = ()

    def content(self) -> bytes:
        text = self.text
        if isinstance(text, bytes):
            return text
        assert self.old in text
        return text.replace(self.old, self.new, 1).encode()


def edit(id: str, old: str, new: str, *told: str) -> Case:
    return Case(id, told, old=old, new=new)


def override(id: str, *rest: str) -> Case:
    *overrides, told = rest
    return Case(id, (told,), overrides=tuple(overrides))


def whole(id: str, text: str | bytes, *told: str) -> Case:
    return Case(id, told, text=text)


CASES = [
    # -- no mapping in YAML --
    whole("empty file", "", ": the file is empty"),
    whole("only a comment", "# to be written\n", ": the file is empty"),
    whole("a list at the top", "- name: x\n", "the top level must be a mapping of keys, not a list"),
    whole("a number at the top", "3\n", "the top level must be a mapping of keys, not a number"),
    whole("two documents", GOOD + "---\nname: x\n", "line 28: but found another document"),
    whole("zero bytes within", b"name: x\nseed: \x00\n", "the character U+0000 on line 2 is not allowed"),
    whole("UTF-16", GOOD.encode("utf-16"), "not a text file (UTF-8 is expected)"),
    whole("Latin-1", "name: Bär\n".encode("latin-1"), "not a text file (UTF-8 is expected)"),
    whole("weights for a file", bytes(range(256)), "not a text file (UTF-8 is expected)"),
    whole("deep nesting", "name: " + "[" * 9000, ", line 1: nested too deeply"),
    whole("deep mappings", "\n".join(" " * n + "a:" for n in range(500)), "nested too deeply"),
    edit("tab for indent", "  num_steps: 8", "\tnum_steps: 8", ", line 11: ", r"'\t'"),
    edit("unclosed quote", "name: small", "name: 'small", "unexpected end of stream"),
    edit("unclosed list", "[64, 64]", "[64, 64", ", line 11: "),
    edit("missing colon", "seed: 3", "seed 3", ", line 3: could not find expected ':'"),
    edit("wrong indent", "  num_steps: 8", "   num_steps: 8", ", line 11: "),
    edit("reserved character", "seed: 3", "seed: @3", ", line 2: found character '@'"),
    edit("anchor", "seed: 3", "seed: &s 3", ", line 2: anchors and aliases are not allowed"),
    edit("alias", "seed: 3", "seed: *s", ", line 2: anchors and aliases are not allowed"),
    edit("merge key", "seed: 3", "<<: {seed: 3}", ", line 2: merge keys ('<<') are not allowed"),
    edit("Python tag", "seed: 3", "seed: !!python/object/apply:os.system ['true']", ", line 2: the tag '!!python/object/apply:os.system'"),
    edit("own tag", "seed: 3", "seed: !secret 3", ", line 2: the tag '!secret' is not allowed"),
    edit("duplicate key", "seed: 3", "seed: 3\nname: x", "line 3: the key 'name' stands twice, first on line 1"),
    edit("duplicate inner key", "num_steps: 5", "num_steps: 5, num_steps: 6", "the key 'num_steps' stands twice"),
    edit("number as key", "seed: 3", "3: seed", ", line 2: keys must be words"),
    edit("list as key", "seed: 3", "[a, b]: 3", ", line 2: keys must be words"),
    edit("truth value as key", "seed: 3", "true: 3", ", line 2: keys must be words"),
    edit("no such escape", "name: small", r'name: "\q"', ", line 1: "),
    edit("no such character", "name: small", r'name: "\UFFFFFFFF"', ", line 1: there is no such character"),
    edit("half a character", "name: small", r'name: "\ud800"', "name (line 1): there is half a surrogate pair"),
    edit("null character", "use: csd", r'use: "csd\0"', "objective.rewards.style.use (line 16): there is a null"),
    edit("thousands of digits", "seed: 3", f"seed: {'9' * 5000}", ", line 2: a number of 5000 digits is too long"),
    edit("tens of digits", "seed: 3", f"seed: {'9' * 25}", "seed (line 2): should be a number of at most 63 bits"),
    # -- keys --
    edit("unknown key", "seed: 3", "sede: 3", "sede (line 2): unknown key. Did you mean 'seed'?"),
    edit("flavours", "flavors:", "flavours:", "flavours (line 25): unknown key. Did you mean 'flavors'?"),
    edit("key of a section at the top", "seed: 3", "lr: 3", "lr (line 2): unknown key. Did you mean 'optimizer.lr'?"),
    edit("empty key", "seed: 3", '"": 3', "unknown key"),
    edit("key with a line break", "seed: 3", r'"a\nb": 3', r"a\nb (line 2): unknown key"),
    edit("key with odd signs", "lr:", '"lr %":', "optimizer.lr % (line 17): unknown key. Did you mean 'lr'?"),
    edit("key of policy", "  use: uso", "  use: uso\n  arg: {}", "policy.arg (line 5): unknown key. Did you mean 'args'?"),
    edit("key of data", "  held_out:", "  heldout:", "data.heldout (line 8): unknown key", "data.held_out"),
    edit("key of rollout", "image_size:", "imagesize:", "rollout.imagesize (line 10)", "rollout.image_size"),
    edit("key of the window", "entry_range:", "entry_rang:", "rollout.window.entry_rang (line 12): unknown key."),
    edit("key of objective", "  rewards:", "  reward:", "objective.reward (line 15): unknown key. Did you mean 'rewards'"),
    edit("key of flow matching", "{weight: 1.0}", "{wieght: 1.0}", "objective.flow_matching.wieght (line 14)"),
    edit("key of a term", "weight: 4.0", "wight: 4", "objective.rewards.style.wight (line 16): unknown key. Did you"),
    edit("key of optimizer", "warmup_steps", "warm_up", "optimizer.warm_up (line 17): unknown key."),
    edit("key of train", "batch_size", "batchsize", "train.batchsize (line 18): unknown key. Did you mean 'batch_size'"),
    edit("key of evaluation", "num_examples", "examples", "evaluation.examples (line 20): unknown key."),
    edit("key of a witness", "witness:ContentWitness", "witness:ContentWitness, weight: 1", "layout.weight (line 23)"),
    edit("key of report", "tensorboard:", "tensorbord:", "report.tensorbord (line 24): unknown key. Did you mean"),
    edit("key of wandb", "{tensorboard: false}", "{wandb: {project: x, entty: y}}", "report.wandb.entty (line 24)"),
    edit("key within a flavor", "tiny: {}", "tiny: {train: {stesp: 3}}", "train.stesp (line 26): unknown key."),
    edit("missing section", "rollout:", "fleet: {}\nrolout:", "rollout: required key is missing", "rolout (line 10)"),
    edit("missing use", "  use: uso\n", "", "policy.use (line 3): required key is missing"),
    edit("missing image size", "  image_size: [64, 64]\n", "", "rollout.image_size (line 9): required key is missing"),
    # -- types and ranges --
    edit("word for a number", "num_steps: 5", "num_steps: five", "train.num_steps (line 18): should be a valid integer"),
    edit("quoted number", "seed: 3", "seed: '3'", "seed (line 2): should be a valid integer, got '3'"),
    edit("fraction", "batch_size: 2", "batch_size: 2.5", "train.batch_size (line 18): should be a valid integer"),
    edit("truth value for a number", "seed: 3", "seed: true", "seed (line 2): should be a valid integer"),
    edit("yes for true", "tensorboard: false", "tensorboard: no", "report.tensorboard (line 24): should be a valid bool"),
    edit("list for a number", "lr: 3.0e-3", "lr: [1]", "optimizer.lr (line 17): should be a valid number"),
    edit("mapping for a name", "name: small", "name: {a: b}", "name (line 1): should be a valid string"),
    edit("scalar for a section", "optimizer: {lr: 3.0e-3, warmup_steps: 2}", "optimizer: 3", "optimizer (line 17): "),
    edit("nothing for a section", "report: {tensorboard: false}", "report:", "report (line 24): ", "got nothing"),
    edit("list for rewards", "{use: csd, args: {checkpoint: world:csd.safetensors}, weight: 4.0}", "[csd]", "style (li"),
    edit("name for a plug-in", "{use: csd, args: {checkpoint: world:csd.safetensors}, weight: 4.0}", "csd", "got 'csd'"),
    edit("infinite rate", "lr: 3.0e-3", "lr: 1e999", "optimizer.lr (line 17): should be a finite number, got inf"),
    edit("nan in arguments", "train: [lora]", "x: .nan", "policy.args.x (line 5): should be a finite number, got nan"),
    edit("rate of 0", "lr: 3.0e-3", "lr: 0", "optimizer.lr (line 17): should be greater than 0, got 0"),
    edit("negative weight", "weight: 4.0", "weight: -4.0", "objective.rewards.style.weight (line 16): should be greater"),
    edit("no batch", "batch_size: 2", "batch_size: 0", "train.batch_size (line 18): should be greater than or equal to 1"),
    edit("betas", "lr: 3.0e-3", "betas: [0.9, 1.0]", "optimizer.betas (line 17): each must be at least 0 and below 1"),
    edit("precision", "batch_size: 2", "precision: fp16", "train.precision (line 18): should be 'fp32' or 'bf16'"),
    edit("device", "device: cpu", "device: gpu", "train.device (line 18): 'gpu' is no device; use auto, cpu, cuda"),
    edit("pool", "report:", "fleet: {pool: cluster}\nreport:", "fleet.pool (line 24): should be ", "got 'cluster'"),
    edit("a path for a name", "name: small", "name: ../../small", "name (line 1): string should match pattern"),
    edit("name of a reward", "    style:", '    "my style":', "objective.rewards (line 15): names are letters, digits"),
    edit("one number for a size", "[64, 64]", "64", "rollout.image_size (line 10): should be a list"),
    edit("three numbers for a size", "[64, 64]", "[64, 64, 3]", "rollout.image_size (line 10): "),
    edit("an empty picture", "[64, 64]", "[0, 64]", "rollout (line 9): image_size must be positive, got [0, 64]"),
    # -- combinations --
    edit("window after the end", "[4, 7]", "[4, 8]", "entry_range ends at step 8, but the last of 8 steps is 7"),
    edit("window backwards", "[4, 7]", "[7, 4]", "rollout.window (line 12): entry_range must be [low, high]"),
    edit("window before the start", "[4, 7]", "[-1, 7]", "rollout.window (line 12): entry_range must be [low, high]"),
    edit("window of another kind", "entry_range: [4, 7]", "k: 2", "a window of kind 'refl' needs 'entry_range'"),
    edit("window with two kinds", "kind: refl", "kind: full", "'entry_range' does not belong to a window of kind 'full'"),
    edit("window too long", "kind: refl, entry_range: [4, 7]", "kind: draft, k: 9", "9 steps long, but there are only 8"),
    override("all weights 0", "objective={flow_matching: {weight: 0}, rewards: {style: {weight: 0}}}", "all weights are 0"),
    edit(
        "reward without gradient",
        "use: csd, args: {checkpoint: world:csd.safetensors}",
        "use: rewardgen.world.witness:StyleWitness",
        "objective.rewards.style: StyleWitness has no gradient, but the gradient window needs one",
    ),
    edit("start never reached", "weight: 4.0", "weight: 4.0, start_step: 5", "style.start_step (line 16): step 5 is never"),
    edit("flow matching never reached", "{weight: 1.0}", "{weight: 1.0, start_step: 9}", "flow_matching.start_step (line"),
    edit("decayed to nothing", "warmup_steps: 2", "decay_steps: 3", "optimizer.decay_steps (line 17): the learning rate"),
    edit("reward named as the other term", "    style:", "    flow_matching:", "a reward cannot be called 'flow_matching'"),
    edit("witness named as a reward", "    layout:", "    style:", "a witness needs a name that no reward has: style"),
    edit("more pictures than examples", "grid_examples: 2", "grid_examples: 9", "evaluation.grid_examples (line 21): 9"),
    # -- plug-ins and their arguments --
    edit("misspelt reward", "use: csd", "use: cds", "style.use (line 16): no file 'cds.py'", "Did you mean 'csd'?"),
    edit("a policy for a reward", "use: csd, args: {checkpoint: world:csd.safetensors}", "use: uso", "found among polic"),
    edit("a reward for a policy", "use: uso", "use: csd", "policy.use (line 4): 'csd' is found among rewards"),
    edit("a helper for a reward", "use: csd", "use: preprocess", "style.use (line 16): 'preprocess' is a helper"),
    edit("no such module", "witness:Content", "wittness:Content", "layout.use (line 23): ", "there is no module 'reward"),
    edit("no such class", "ContentWitness", "ContnetWitness", "has no class", "Did you mean 'ContentWitness'?"),
    edit("no such file", "use: uso", "use: ./mine.py:Mine", "policy.use (line 4): './mine.py:Mine': there is no file "),
    edit("file without class", "use: uso", "use: ./setup.py", "policy.use (line 4): "),
    edit("name too long for a file", "use: uso", f"use: ./{'x' * 999}.py:A", "cannot be looked up: file name too long"),
    edit("no dataset", "dataset:TinyWorld, args: {split: train, size: 4}", "witness:ContentWitness", "is no dataset"),
    edit("unknown argument", "siglip:", "siglipp:", "policy.args.siglipp (line 5): unknown argument. Did you mean 'siglip'"),
    edit("missing argument", "base: world:base, ", "", "policy.args.base (line 5): required argument is missing"),
    edit("type of an argument", "train: [lora]", "lora_rank: many", "policy.args.lora_rank (line 5): input should be a"),
    edit("choice of an argument", "train: [lora]", "train: [vae]", "policy.args.train.0", "'lora', 'projector'"),
    edit("arguments that are a list", "args: {split: train, size: 4}", "args: [4]", "data.train.args (line 7): "),
    edit("dataset without a path", "rewardgen.world.dataset:TinyWorld, args: {split: train, size: 4}", "jsonl",
         "data.train.args.path (line 7): required argument is missing"),
    # -- flavors --
    edit("flavors that are a list", "  tiny: {}\n  large:", "  - tiny\n  - large:", "flavors: must be a mapping"),
    edit("a flavor that is a word", "tiny: {}", "tiny: small", "flavors.tiny: must be a mapping, not a word"),
    edit("a flavor with a line break", "tiny: {}", r'"a\nb": 3', r"flavors.a\nb: must be a mapping, not a number"),
    edit("a flavor of a flavor", "tiny: {}", "tiny: {flavors: {}}", "flavors.tiny.flavors: a flavor has no flavors"),
    edit("a flavor that breaks it", "tiny: {}", "tiny: {rollout: {num_steps: 4}}", "entry_range ends at step 7"),
    # -- overrides --
    override("override without a value", "train.num_steps", "override 'train.num_steps': expected 'dotted.key=value'"),
    override("override without a key", "=3", "override '=3': expected 'dotted.key=value'"),
    override("override with an empty part", "train..num_steps=3", "expected 'dotted.key=value'"),
    override("override of a thousand parts", f"{'a.' * 1000}a=3", "expected 'dotted.key=value'"),
    override("override of nothing there", "train.num_stesp=3", "train.num_stesp (override): unknown key. Did you mean"),
    override("override of a section by a word", "train=3", "train (override): should be a mapping, got 3"),
    override("override with a bad type", "train.num_steps=many", "train.num_steps (override): should be a valid integer"),
    override("override with nothing", "train.num_steps=", "train.num_steps (override): should be a valid integer, got no"),
    override("override that is no YAML", "rollout.image_size=[64", "override 'rollout.image_size=[64', line 1: "),
    override("override with an anchor", "seed=&a 3", "anchors and aliases are not allowed"),
    override("override below a number", "seed.x=3", "seed (override): should be a valid integer"),
    override("override of an element", "rollout.image_size.0=32", "rollout.image_size (override): should be a list"),
    override("overrides at odds", "train=3", "train.num_steps=4", "another override has given 'train' a value of its own"),
    override("override of a flavor", "flavors.tiny.seed=3", "choose a flavor with --flavor"),
    # -- files that are not there --
    override("missing bundled weights", "policy.args.lora=world:uso/lora.safetensors", "is not among the bundled assets"),
    override("outside of the bundle", "policy.args.lora=world:../../cli.py", "is not among the bundled assets"),
    override("missing data", "data.train={use: jsonl, args: {path: nowhere.jsonl}}", "there is no such dataset file"),
    override("a folder of data", "data.train={use: jsonl, args: {path: experiments}}", "the dataset cannot be read: is a"),
    override("too few examples", "evaluation.num_examples=5", "evaluation.num_examples is 5, but data.held_out has only 4"),
]  # fmt: skip


def test_there_are_enough() -> None:
    assert len(CASES) >= 60
    assert len({case.id for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_one_clear_error_before_any_weight_is_read(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_bytes(case.content())
    code, told = run(capsys, "train", str(path), *case.overrides, "--output", str(tmp_path / "run"))
    assert code == 2
    for part in case.told:
        assert part in told
    one_clear_error(told)


def one_clear_error(told: str) -> None:
    first, *rest = told.removesuffix("\n").split("\n")
    assert first.startswith("error: ")
    # A list only where there are several faults, and then it says how many.
    assert not rest or (first.endswith(f": {len(rest)} faults") and all(line.startswith("  ") for line in rest)), told
    assert told.replace("\n", "").isprintable()
    assert len(told) < 1500
    for word in ("Traceback", "pydantic", "validation error", "yaml.org", "<unicode string>"):
        assert word not in told


def test_the_good_experiment_reaches_the_weights(tmp_path: Path) -> None:
    """Without this the test above would show nothing."""
    (tmp_path / "good.yaml").write_text(GOOD)
    with pytest.raises(WeightsWereRead, match=r"csd\.safetensors"):
        main(["train", str(tmp_path / "good.yaml"), "--output", str(tmp_path / "run")])


def test_what_is_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place, message in ((tmp_path, "is a directory"), (tmp_path / "none.yaml", "there is no experiment file")):
        code, told = run(capsys, "train", str(place))
        assert code == 2
        assert message in told
        one_clear_error(told)


def test_several_faults_are_told_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text(GOOD.replace("seed: 3", "sede: 3").replace("lr: 3.0e-3", "lr: fast"))
    code, told = run(capsys, "train", str(path), "objective.rewards.style.use=cds", "train.batch_size=0")
    one_clear_error(told)
    assert code == 2
    assert "4 faults" in told
    for key in (
        "sede (line 2)",
        "optimizer.lr (line 17)",
        "objective.rewards.style.use (override)",
        "train.batch_size",
    ):
        assert f"\n  {key}" in told


def test_a_plugin_that_ends_the_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A script without a guard, named by mistake, must not pass for a run that went well."""
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "experiment.yaml").write_text(GOOD.replace("use: uso", f"use: {tmp_path}/script.py:Mine"))
    code, told = run(capsys, "train", str(tmp_path / "experiment.yaml"))
    assert code == 2
    assert "policy.use (line 4): " in told
    one_clear_error(told)


FOR_REAL = {
    "misspelt key": (["train", "FILE", "train.num_stesp=3"], "train.num_stesp (override): unknown key."),
    "an argument that is no text": (["check", "FILE", b"name=\xff\xfe"], "is not allowed"),
}


@pytest.mark.parametrize("name", FOR_REAL)
def test_in_a_process_of_its_own(name: str, tmp_path: Path) -> None:
    arguments, message = FOR_REAL[name]
    (tmp_path / "good.yaml").write_text(GOOD)
    given = [str(tmp_path / "good.yaml") if argument == "FILE" else argument for argument in arguments]
    done = subprocess.run([sys.executable, "-m", "rewardgen", *given], capture_output=True, check=False, cwd=ROOT)
    told = done.stderr.decode()
    assert done.returncode == 2
    assert done.stdout == b""
    assert message in told
    one_clear_error(told)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a", "prompt": "b"}', "line 2: the key 'prompt' stands twice"),
        ('{"extras": {"x": NaN}}', "line 2: not JSON: NaN is no number of it"),
        ('{"prompt": "\\ud800"}', "line 2: text with half a surrogate pair"),
        ('{"extras": {"x": ["\\udfff"]}}', "line 2: text with half a surrogate pair"),
        ('{"extras": {"x": ' + "9" * 5000 + "}}", "line 2: "),
        (json.dumps({"content": "x" * 5000}), "line 2: 'content': no path that can be: file name too long"),
        (json.dumps({"content": "~nobody-of-that-name/x.png"}), "line 2: 'content': there is no picture"),
        (json.dumps({"content": "a\0b.png"}), "line 2: 'content': there is no picture"),
    ],
)
def test_a_faulty_row_of_data(row: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "experiment.yaml").write_text(GOOD)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n' + row + "\n")
    data = f"data.train={{use: jsonl, args: {{path: {tmp_path}/rows.jsonl}}}}"
    code, told = run(capsys, "train", str(tmp_path / "experiment.yaml"), data, "--output", str(tmp_path / "run"))
    assert code == 2
    first, *rest = told.splitlines()
    assert first == f"error: {tmp_path}/rows.jsonl: faulty rows"
    assert len(rest) == 1
    assert message in rest[0]
