"""`rewardgen export`: from a run's folder to files, the model card, and every way in which it refuses."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rewardgen.checkpoint import TENSORS, save_checkpoint
from rewardgen.cli import main

ROOT = Path(__file__).resolve().parent.parent
PROJECTOR = {"projector.high_projection.weight": torch.ones(2, 2)}
CONFIG = """\
name: small
policy: {use: uso, args: {base: BASE, train: [lora]}}
"""


def tiny_lora(rank: int = 2, width: int = 3) -> dict[str, Tensor]:
    """The parameters of one double and one single block, as a checkpoint holds them: shared `down`s once."""
    generator = torch.Generator().manual_seed(0)
    double, single = "transformer.transformer_blocks.0.attn", "transformer.single_transformer_blocks.0"
    image, text = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
    downs = [f"{double}.{name}" for name in ("to_q", "to_out.0", "add_q_proj", "to_add_out")]
    downs += [f"{single}.attn.to_q", f"{single}.proj_out"]
    ups = [f"{double}.{name}" for name in (*image, "to_out.0", *text, "to_add_out")]
    ups += [*(f"{single}.attn.{name}" for name in image), f"{single}.proj_out"]
    tensors = {f"{name}.lora_A.default.weight": torch.randn(rank, width, generator=generator) for name in downs}
    return tensors | {f"{name}.lora_B.default.weight": torch.randn(width, rank, generator=generator) for name in ups}


def make_run(
    folder: Path, tensors: dict[str, Tensor], *, average: bool = True, step: int = 3, base: str = "world:base"
) -> Path:
    """A run's folder with one checkpoint, whose average is the trained weights plus one."""
    stored = {f"trainable/{name}": tensor for name, tensor in tensors.items()}
    if average:
        stored |= {f"average/{name}": tensor + 1 for name, tensor in tensors.items()}
    stored["adamw/step/x"] = torch.tensor(float(step))
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG.replace("BASE", base))
    save_checkpoint(folder / "checkpoints", step=step, tensors=stored, state={"completed_steps": step})
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `rewardgen export`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["export", *map(str, arguments)])
    told = capsys.readouterr()
    return int(stopped.value.code or 0), told.out, told.err


def down(folder: Path) -> Tensor:
    return load_file(folder / "dit_lora.safetensors")["double_blocks.0.processor.proj_lora1.down.weight"]


def test_a_runs_folder_gives_its_latest_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older, newer = tiny_lora(), {name: 2 * tensor for name, tensor in tiny_lora().items()}
    folder = make_run(tmp_path / "run", older, step=3)
    make_run(folder, newer, step=12)
    key = "transformer.transformer_blocks.0.attn.to_out.0.lora_A.default.weight"
    checkpoints = folder / "checkpoints"
    for index, (source, weights, expected) in enumerate(
        [
            (folder, [], newer[key] + 1),
            (folder, ["--weights", "ema"], newer[key] + 1),
            (folder, ["--weights", "trained"], newer[key]),
            (checkpoints, ["--weights", "trained"], newer[key]),
            (checkpoints / "step-000003", ["--weights", "trained"], older[key]),
        ]
    ):
        out = tmp_path / f"out-{index}"
        code, said, err = run(capsys, source, "--format", "uso", "--output", out, *weights)
        assert code == 0, err
        assert torch.equal(down(out), expected)
        assert sorted(path.name for path in out.iterdir()) == ["README.md", "dit_lora.safetensors"]
        assert str(out / "dit_lora.safetensors") in said
    assert "trained weights after step 3" in said
    # Where no average was kept, the trained weights are the only ones.
    bare = make_run(tmp_path / "bare", tiny_lora(), average=False)
    assert run(capsys, bare, "--format", "uso", "-o", tmp_path / "bare-out")[0] == 0
    assert torch.equal(down(tmp_path / "bare-out"), older[key])


def test_the_card_says_where_the_weights_come_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flux = make_run(tmp_path / "flux", tiny_lora(rank=5), base="black-forest-labs/FLUX.1-dev")
    assert run(capsys, flux, "--format", "peft", "-o", tmp_path / "peft")[0] == 0
    card = (tmp_path / "peft" / "README.md").read_text()
    digest = hashlib.sha256((flux / "config.yaml").read_bytes()).hexdigest()
    for fact in (
        "base_model: black-forest-labs/FLUX.1-dev",
        "rank 5",
        "after step 3",
        digest,
        "Non-Commercial License",
    ):
        assert fact in card
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (5, 5)
    assert config["base_model_name_or_path"] == "black-forest-labs/FLUX.1-dev"
    # A path of this machine is nobody else's business, and the licence of FLUX.1-dev is that of FLUX.1-dev.
    local = make_run(tmp_path / "local", tiny_lora(), base="/home/someone/base")
    assert run(capsys, local, "--format", "peft", "-o", tmp_path / "shared")[0] == 0
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "someone" not in card
    assert "Non-Commercial" not in card
    assert json.loads((tmp_path / "shared" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    # A checkpoint that was taken out of its run has no experiment.
    (flux / "checkpoints" / "step-000003").rename(tmp_path / "alone")
    assert run(capsys, tmp_path / "alone", "--format", "uso", "-o", tmp_path / "lone")[0] == 0
    assert "resolved config.yaml: unknown" in (tmp_path / "lone" / "README.md").read_text()


def test_an_empty_folder_and_a_dead_exports_leftovers_are_no_obstacle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = make_run(tmp_path / "run", tiny_lora()), tmp_path / "out"
    (out / ".writing").mkdir(parents=True)
    (out / ".writing" / "dit_lora.safetensors").write_bytes(b"half")
    assert run(capsys, folder, "--format", "uso", "-o", out)[0] == 0
    assert down(out).shape == (2, 3)
    assert not (out / ".writing").exists()
    before = sorted(out.iterdir())
    code, _, err = run(capsys, folder, "--format", "peft", "-o", out)
    assert code == 2
    assert f"--output {out}: the folder is not empty" in err
    assert sorted(out.iterdir()) == before


def test_a_projector_alone_is_exported_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = make_run(tmp_path / "run", PROJECTOR), tmp_path / "out"
    code, said, _ = run(capsys, folder, "--format", "uso", "-o", out)
    assert code == 0
    assert list(load_file(out / "projector.safetensors")) == ["feature_embedder.high_projection.weight"]
    assert "note: no LoRA was trained" in said
    code, _, err = run(capsys, folder, "--format", "diffusers", "-o", tmp_path / "other")
    assert code == 2
    assert "no LoRA was trained there, only a style projector, which diffusers cannot hold; use --format uso" in err
    assert not (tmp_path / "other").exists()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ("--format", "uso", "-o", out)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    assert "nowhere: there is no such folder" in refused(capsys, tmp_path / "nowhere", *options)
    assert "file: is a file; name a run's folder" in refused(capsys, tmp_path / "file", *options)
    assert "neither a run's folder nor a checkpoint" in refused(capsys, tmp_path / "empty", *options)
    toy = make_run(tmp_path / "toy", {"inner": torch.ones(2), "outer": torch.ones(2)})
    message = refused(capsys, toy, *options)
    assert "step-000003: neither a LoRA nor a style projector was trained there, only 'inner' and 1 more" in message
    foreign = tmp_path / "foreign"
    save_checkpoint(foreign / "checkpoints", step=1, tensors={"weight": torch.ones(1)}, state={})
    assert "not a checkpoint of a training run" in refused(capsys, foreign, *options)
    bare = make_run(tmp_path / "bare", tiny_lora(), average=False)
    assert "the run kept no average" in refused(capsys, bare, *options, "--weights", "ema")
    assert not out.exists()


def test_a_damaged_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = make_run(tmp_path / "run", tiny_lora()), tmp_path / "out"
    checkpoint = folder / "checkpoints" / "step-000003"
    data = bytearray((checkpoint / TENSORS).read_bytes())
    data[-1] ^= 1
    (checkpoint / TENSORS).write_bytes(data)
    message = refused(capsys, checkpoint, "--format", "uso", "-o", out)
    assert f"{checkpoint / TENSORS}: damaged" in message
    with pytest.warns(UserWarning, match="skipped a damaged checkpoint"):
        message = refused(capsys, folder, "--format", "uso", "-o", out)
    assert "none of the checkpoints is whole" in message
    assert not out.exists()


def test_where_nothing_can_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run", tiny_lora())
    (tmp_path / "file").write_text("")
    assert "that is a file" in refused(capsys, folder, "--format", "uso", "-o", tmp_path / "file")
    message = refused(capsys, folder, "--format", "uso", "-o", tmp_path / "file" / "inside")
    assert "inside: a part of that path is a file" in message


DISK_FULL = """
import resource, sys
from rewardgen.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
for output in sys.argv[2:]:
    try:
        main(["export", sys.argv[1], "--format", "peft", "--output", output])
    except SystemExit as stopped:
        print(stopped.code)
"""


def test_a_file_system_that_takes_no_more(tmp_path: Path) -> None:
    folder, new, empty = make_run(tmp_path / "run", tiny_lora()), tmp_path / "new", tmp_path / "empty"
    empty.mkdir()
    command = [sys.executable, "-c", DISK_FULL, str(folder), str(new), str(empty)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.split() == ["2", "2"]
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert all("adapter_model.safetensors: cannot be written: " in line for line in lines)
    assert not new.exists()
    assert not list(empty.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "kohya", "-o", "out"], "kohya"),
        (["--format", "uso", "-o", "out", "--weights", "best"], "best"),
        (["-o", "out"], "--format"),
        (["--format", "uso"], "--output"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, tmp_path, *arguments)
    assert code == 2
    assert message in err
