"""`rewardgen sample`: what it writes and says, on the toy policy; once on the bundled tiny world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from rewardgen.cli import main
from rewardgen.commands.sample import draw, parse_seeds, parse_size
from rewardgen.errors import ConfigError, NonFiniteError
from rewardgen.evaluation.grid import GAP, HEADER
from rewardgen.flow.sampling import sample
from rewardgen.types import Example
from tests.toys import ToyPolicy

ROOT = Path(__file__).resolve().parent.parent
TOY = """\
name: small
policy: {use: "tests.toys:ToyPolicy", args: {hidden: 4}}
data:
  train: {use: "tests.toys:ToyDataset", args: {size: 4}}
  held_out: {use: "tests.toys:ToyDataset", args: {size: 4, seed: 1}}
rollout: {image_size: [8, 8], num_steps: 3, window: {kind: refl, entry_range: [1, 2]}}
objective:
  rewards:
    style: {use: "tests.toys:ToyReward", weight: 0.5}
optimizer: {lr: 0.1}
train: {num_steps: 4, batch_size: 2, checkpoint_every: 2, device: cpu, ema_decay: 0.8}
evaluation: {num_examples: 4, grid_examples: 0}
report: {tensorboard: false}
"""


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def toy(tmp_path: Path) -> str:
    path = tmp_path / "toy.yaml"
    path.write_text(TOY)
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished toy run, with an average of its weights."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "toy.yaml").write_text(TOY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        with pytest.raises(SystemExit) as stopped:
            main(["train", str(folder / "toy.yaml"), "-o", str(folder / "run")])
    assert not stopped.value.code
    return folder / "run"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    told = capsys.readouterr()
    return int(stopped.value.code or 0), told.out, told.err


def drawn(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> dict[int, Any]:
    """The pictures of a successful `sample --json` by seed, as arrays [H, W, 3]."""
    code, out, err = run(capsys, "sample", *arguments, "--output", str(folder), "--json")
    assert code == 0, err
    return {entry["seed"]: np.asarray(Image.open(entry["path"])) for entry in json.loads(out)["pictures"]}


def picture(path: Path, colour: tuple[int, int, int]) -> str:
    Image.new("RGB", (8, 8), colour).save(path)
    return str(path)


def eight_bit(pixels_3HW: Tensor) -> Any:
    return np.rint(pixels_3HW.permute(1, 2, 0).numpy() * 255).astype(np.uint8)


def test_a_seed_draws_one_picture_whatever_is_asked_for_with_it(
    toy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = drawn(capsys, tmp_path / "many", toy, "-p", "a", "--seeds", "0-3")
    few = drawn(capsys, tmp_path / "few", toy, "-p", "a", "--seeds", "3,1")
    assert list(many) == [0, 1, 2, 3]
    assert list(few) == [3, 1]
    for seed, pixels in few.items():
        assert (pixels == many[seed]).all()
    assert len({pixels.tobytes() for pixels in many.values()}) == 4


def test_a_picture_is_the_euler_integral_of_the_policy_from_the_seeds_noise() -> None:
    policy, size = ToyPolicy(hidden=4), (8, 12)
    style = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(9))
    example = Example(id="x", prompt="a", style_refs=(style,))
    noise = torch.randn(6, 6, generator=torch.Generator().manual_seed(5))[None]
    velocity = policy.velocity_fn(policy.encode([example]), mode="sample", image_size=size)
    clean = sample(velocity, noise, policy.sigmas(4, size), start=0, stop=4, enable_grad=False)
    expected = policy.decode(clean, size)[0].detach().clamp(0, 1)
    ((seed, pixels),) = draw(policy, example, [5], size, 4)
    assert seed == 5
    assert pixels.shape == (3, 8, 12)
    assert torch.equal(pixels, expected)


def test_prompt_references_size_and_steps_reach_the_policy(
    toy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    red, blue = picture(tmp_path / "red.png", (250, 0, 0)), picture(tmp_path / "blue.png", (0, 0, 250))
    asked = {
        "plain": ["-p", "a"],
        "prompt": ["-p", "b"],
        "style": ["-p", "a", "--style", red],
        "two styles": ["-p", "a", "--style", red, "--style", blue],
        "content": ["-p", "a", "--content", red],
        "steps": ["-p", "a", "--num-steps", "1"],
        "override": ["-p", "a", "rollout.num_steps=2", "rollout.window.entry_range=[0, 1]"],
        "size": ["-p", "a", "--size", "8x16"],
    }
    shown = {name: drawn(capsys, tmp_path / name, toy, *words)[0] for name, words in asked.items()}
    assert len({pixels.tobytes() for pixels in shown.values()}) == len(asked)
    assert {name: pixels.shape[:2] for name, pixels in shown.items() if pixels.shape[:2] != (8, 8)} == {"size": (8, 16)}
    again = drawn(capsys, tmp_path / "again", toy, "-p", "a", "evaluation.num_steps=1")[0]
    assert (again == shown["steps"]).all()


def test_the_weights_are_the_averaged_ones_of_the_run(
    trained: Path, toy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def by_hand(tensors: dict[str, Tensor]) -> Any:
        policy = ToyPolicy(hidden=4)
        with torch.no_grad():
            for name, parameter in policy.trainable().items():
                parameter.copy_(tensors[name])
        ((_, pixels),) = draw(policy, Example(id="x", prompt="a"), [0], (8, 8), 3)
        return eight_bit(pixels)

    newest = trained / "checkpoints" / "step-000004"
    tensors = load_file(newest / "tensors.safetensors")
    averaged = by_hand({key.removeprefix("average/"): t for key, t in tensors.items() if key.startswith("average/")})
    last = by_hand({key.removeprefix("trainable/"): t for key, t in tensors.items() if key.startswith("trainable/")})
    assert (by_hand(load_file(trained / "weights" / "toy.safetensors")) == averaged).all()
    assert (last != averaged).any()

    assert (drawn(capsys, tmp_path / "a", toy, "-p", "a", "--run", str(trained))[0] == averaged).all()
    assert (drawn(capsys, tmp_path / "b", toy, "-p", "a", "--checkpoint", str(newest))[0] == averaged).all()
    assert (drawn(capsys, tmp_path / "c", str(trained), "-p", "a")[0] == averaged).all()
    base = drawn(capsys, tmp_path / "d", str(trained / "config.yaml"), "-p", "a")[0]
    assert (base == drawn(capsys, tmp_path / "e", toy, "-p", "a")[0]).all()
    assert (base != averaged).any()
    earlier = drawn(capsys, tmp_path / "f", str(trained), "-p", "a", "--checkpoint", str(newest.parent / "step-000002"))
    assert (earlier[0] != averaged).any()


def test_paths_are_printed_and_json_says_what_was_drawn(
    toy: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    code, out, err = run(capsys, "sample", toy, "-p", "a", "--seeds", "7,0", "--grid")
    assert (code, err) == (0, "")
    assert out.splitlines() == [f"samples/small/{name}" for name in ("seed-0007.png", "seed-0000.png", "grid.png")]
    code, out, _ = run(capsys, "sample", str(trained), "-p", "a", "--size", "4x8", "--json", "-o", "out")
    assert code == 0
    assert json.loads(out) == {
        "experiment": "small",
        "weights": str(trained / "checkpoints" / "step-000004"),
        "prompt": "a",
        "image_size": [4, 8],
        "num_steps": 3,
        "pictures": [{"seed": 0, "path": "out/seed-0000.png"}],
        "grid": None,
    }


def test_the_grid_shows_references_and_every_seed(toy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    red, blue = picture(tmp_path / "red.png", (250, 0, 0)), picture(tmp_path / "blue.png", (0, 0, 250))
    pictures = drawn(capsys, tmp_path, toy, "--content", red, "--style", blue, "--seeds", "0-2", "--grid")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    side = 128  # of a cell: 8 pixels, each 16 wide
    assert grid.shape == (HEADER + side + GAP, GAP + 5 * (side + GAP), 3)

    def cell(column: int) -> Any:
        left = GAP + column * (side + GAP)
        return grid[HEADER : HEADER + side, left : left + side]

    assert (cell(0) == (250, 0, 0)).all()
    assert (cell(1) == (0, 0, 250)).all()
    for column, pixels in enumerate(pictures.values(), start=2):
        assert (cell(column) == pixels.repeat(16, 0).repeat(16, 1)).all()
    labels = [grid[:HEADER, GAP + column * (side + GAP) :][:, :side] for column in range(5)]
    assert len({label.tobytes() for label in labels}) == 5


TALKATIVE = """
from tests.toys import ToyPolicy

print("imported")

class Talkative(ToyPolicy):
    def __init__(self) -> None:
        super().__init__()
        print("loading")
"""


def test_what_a_plug_in_prints_does_not_disturb_stdout(
    toy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "talkative.py").write_text(TALKATIVE)
    override = f"policy={{use: '{tmp_path}/talkative.py:Talkative'}}"
    code, out, err = run(capsys, "sample", toy, override, "-p", "a", "-o", str(tmp_path), "--json")
    assert code == 0
    assert json.loads(out)["pictures"]
    assert err == "imported\nloading\n"


def test_a_picture_that_is_not_finite_is_refused() -> None:
    policy = ToyPolicy(hidden=4)
    with torch.no_grad():
        policy.outer.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=r"seed 3: .* not finite"):
        list(draw(policy, Example(id="x"), [3], (8, 8), 2))


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("7", [7]), ("0,1,2", [0, 1, 2]), ("0-3", [0, 1, 2, 3]), ("5, 2-3,2", [5, 2, 3]), ("4-4", [4]), ("0-9999", None)],
)
def test_seeds(text: str, seeds: list[int] | None) -> None:
    assert parse_seeds(text) == (list(range(10_000)) if seeds is None else seeds)


@pytest.mark.parametrize("text", ["", "a", "-1", "3-1", "1,,2", "0-", "1.5", "0-10000", "0-999999999999", "9" * 30])
def test_seeds_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--seeds"):
        parse_seeds(text)


def test_size() -> None:
    assert parse_size("512x768") == (512, 768)
    assert parse_size("64 X 32") == (64, 32)
    for text in ("64", "64x", "0x64", "x", "-4x8", "64x64x3", "9999999x1"):
        with pytest.raises(ConfigError, match="--size"):
            parse_size(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["TOY"], "nothing to draw: give --prompt"),
        (["nowhere.yaml", "-p", "a"], "there is no experiment file nowhere.yaml"),
        (["TMP", "-p", "a"], "is a folder without config.yaml: it is no run's folder"),
        (["TOY", "-p", "a", "--seeds", "three"], "--seeds 'three': expected whole numbers"),
        (["TOY", "-p", "a", "--size", "big"], "--size 'big': expected HEIGHTxWIDTH"),
        (["TOY", "-p", "a", "--size", "9x9"], "image size 9x9 is not a multiple of 4"),
        (["TOY", "-p", "a", "--flavor", "huge"], "has no flavor 'huge'"),
        (["TOY", "-p", "a", "trin.x=1"], "unknown key. Did you mean 'train'?"),
        (["TOY", "-p", "a", "--style", "none.png"], "none.png: there is no such picture"),
        (["TOY", "--style", "TOY", "-p", "a"], "not a picture"),
        (
            ["TOY", "--style", "a.png", "b.png"],
            "each picture needs an option of its own, as in --style a.png --style b",
        ),
        (["TOY", "-p", "a", "--run", "TMP"], "holds no whole checkpoint"),
        (["TOY", "-p", "a", "--checkpoint", "nowhere"], "there is no such file"),
        (["TOY", "-p", "a", "--run", "TMP", "--checkpoint", "TMP"], "either --run DIR or --checkpoint DIR"),
        (["TOY", "-p", "a", "-o", "TOY/inside"], "the folder cannot be made: not a directory"),
        (["TOY", "-p", "a", "train.device=abacus"], "'abacus' is no device"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    arguments: list[str], message: str, toy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.replace("TOY", toy).replace("TMP", str(tmp_path)) for argument in arguments]
    if "-o" not in given:
        given += ["-o", str(tmp_path / "out")]
    code, out, err = run(capsys, "sample", *given)
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert not list(tmp_path.rglob("*.png"))


def test_a_run_of_another_experiment_is_refused(
    trained: Path, toy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", toy, "-p", "a", "--run", str(trained), "-o", str(tmp_path)]
    code, _, err = run(capsys, *command, "policy.args.hidden=5")
    assert code == 2
    assert "has shape" in err
    code, _, err = run(capsys, *command, "train.ema_decay=null")
    assert code == 2
    assert "train.ema_decay must stay as it was" in err


def test_the_bundled_tiny_world_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Text alone, and with a style: pictures of the world's size which differ, and are no noise."""
    style = picture(tmp_path / "style.png", (200, 80, 20))
    command = ["experiments/uso_srl.yaml", "-p", "a circle top left", "--num-steps", "4", "--seeds", "1"]
    plain = drawn(capsys, tmp_path / "plain", *command)[1]
    styled = drawn(capsys, tmp_path / "styled", *command, "--style", style)[1]
    assert plain.shape == styled.shape == (64, 64, 3)
    # White noise has neighbours that differ by 85 of 255 levels on average.
    assert np.abs(np.diff(plain.astype(int), axis=0)).mean() < 30
    assert np.abs(plain.astype(int) - styled).mean() > 5
