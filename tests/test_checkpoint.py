"""Checkpoints: what goes in comes out, damage is named, and no death of a writer costs the last good one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from rewardgen import checkpoint
from rewardgen.checkpoint import checkpoint_step, latest_checkpoint, load_checkpoint, prune_checkpoints, save_checkpoint
from rewardgen.errors import CheckpointError

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def tensors_of(step: int) -> dict[str, Tensor]:
    return {"weight": torch.full((3, 5), float(step)), "moment": torch.arange(7, dtype=torch.bfloat16) + step}


def save(folder: Path, step: int, mark: str = "") -> Path:
    return save_checkpoint(folder, step=step, tensors=tensors_of(step), state={"step": step, "mark": mark})


def assert_whole(path: Path | None, step: int, mark: str = "") -> None:
    assert path is not None
    tensors, state = load_checkpoint(path)
    assert state == {"step": step, "mark": mark}
    expected = tensors_of(step)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_keep_their_bits_and_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype)
    given_tensors = {"matrix": values, "scalar": values[0, 0], "empty": values[:0]}
    path = save_checkpoint(tmp_path, step=0, tensors=given_tensors, state={})
    tensors, _ = load_checkpoint(path)
    for name, tensor in given_tensors.items():
        assert tensors[name].dtype == dtype
        assert torch.equal(tensors[name], tensor)


def test_shared_strided_and_trained_tensors_are_stored_alone(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tied = torch.nn.Parameter(torch.ones(2))
    given_tensors = {"a": base, "same": base, "row": base[1], "turned": base.T, "tied_1": tied, "tied_2": tied}
    path = save_checkpoint(tmp_path, step=1, tensors=given_tensors, state={})
    tensors, _ = load_checkpoint(path)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in given_tensors.items())
    size = sum(tensor.nbytes for tensor in given_tensors.values())
    assert size <= (path / "tensors.safetensors").stat().st_size < size + 1024, "a view takes its own bytes only"


@settings(max_examples=25, deadline=None)
@given(
    state=st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=8,
        ),
        max_size=4,
    )
)
def test_any_json_comes_back(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]) -> None:
    path = save_checkpoint(tmp_path_factory.mktemp("any"), step=3, tensors={}, state=state)
    assert load_checkpoint(path) == ({}, state)


def test_keys_become_strings_and_tuples_lists(tmp_path: Path) -> None:
    state: Any = {"by_step": {10: (1, 2), 9: ()}}
    assert load_checkpoint(save_checkpoint(tmp_path, step=3, tensors={}, state=state))[1] == {
        "by_step": {"10": [1, 2], "9": []}
    }


def test_the_format_is_open(tmp_path: Path) -> None:
    path = save(tmp_path, 123)
    assert path == tmp_path / "step-000123"
    assert sorted(file.name for file in path.iterdir()) == ["state.json", "tensors.safetensors"]
    assert load_file(path / "tensors.safetensors").keys() == {"weight", "moment"}
    with safe_open(path / "tensors.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    document = json.loads((path / "state.json").read_text())
    assert document["state"]["step"] == document["step"] == checkpoint_step(path) == 123
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000123"], "nothing else is left"


def test_what_is_no_json_is_refused_before_anything_is_in_place(tmp_path: Path) -> None:
    for bad in (torch.ones(1), float("nan"), {1, 2}, b"bytes"):
        with pytest.raises(CheckpointError, match=r"state of step 4 cannot be saved as JSON"):
            save_checkpoint(tmp_path, step=4, tensors={}, state={"bad": bad})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="negative"):
        save(tmp_path, -1)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


@settings(max_examples=20, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True))
def test_every_flipped_bit_of_the_tensors_is_found(tmp_path_factory: pytest.TempPathFactory, where: float) -> None:
    path = save(tmp_path_factory.mktemp("flip"), 5)
    flip(path / "tensors.safetensors", int(where * (path / "tensors.safetensors").stat().st_size))
    with pytest.raises(CheckpointError, match=r"tensors\.safetensors: damaged"):
        load_checkpoint(path)


@settings(max_examples=20, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True))
def test_no_flipped_bit_of_the_state_goes_unnoticed(tmp_path_factory: pytest.TempPathFactory, where: float) -> None:
    path = save(tmp_path_factory.mktemp("flip"), 5)
    flip(path / "state.json", int(where * (path / "state.json").stat().st_size))
    with pytest.raises(CheckpointError, match=r"state\.json: (damaged|not)|state\.json: format version"):
        load_checkpoint(path)


def damage(path: Path, fault: str) -> str:
    """Damage a checkpoint; returns what the message must say."""
    tensors, state = path / "tensors.safetensors", path / "state.json"
    if fault == "truncated tensors":
        tensors.write_bytes(tensors.read_bytes()[:-1])
        return r"tensors\.safetensors: damaged: \d+ bytes instead of \d+"
    if fault == "no tensors":
        tensors.unlink()
        return r"tensors\.safetensors: there is no such file"
    if fault == "no state":
        state.unlink()
        return r"state\.json: there is no such file"
    if fault == "truncated state":
        state.write_bytes(state.read_bytes()[:-20])
        return r"state\.json: not JSON"
    if fault == "binary state":
        state.write_bytes(b"\xff\xfe\x00")
        return r"state\.json: not JSON"
    if fault == "another's file":
        state.write_text("[]")
        return r"state\.json: not a state of 'rewardgen-checkpoint'"
    if fault == "newer":
        state.write_text(state.read_text().replace('"version": 1', '"version": 2'))
        return r"state\.json: format version 2, this rewardgen reads 1"
    assert fault == "edited"
    state.write_text(state.read_text().replace('"mark": ""', '"mark": "x"'))
    return r"state\.json: damaged"


FAULTS = ["truncated tensors", "no tensors", "no state", "truncated state", "binary state"]
FAULTS += ["another's file", "newer", "edited"]


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_named_and_skipped(tmp_path: Path, fault: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    message = damage(path, fault)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match=message):
        assert_whole(latest_checkpoint(tmp_path), 1)


def test_latest_goes_by_the_number(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    for step in (999_999, 1_000_000, 3):
        save(tmp_path, step)
    for name in ("step-final", "step-12", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-2000000").write_text("a file")
    assert_whole(latest_checkpoint(tmp_path), 1_000_000)
    with pytest.raises(CheckpointError, match="not a checkpoint's name"):
        checkpoint_step(tmp_path / "step-final")


def steps_in(folder: Path) -> list[int]:
    return sorted(checkpoint_step(path) for path in folder.iterdir())


def test_prune_keeps_the_newest_whole_and_the_chosen(tmp_path: Path) -> None:
    paths = {step: save(tmp_path, step) for step in range(6)}
    damage(paths[5], "truncated tensors")
    removed = prune_checkpoints(tmp_path, 2, keep={tmp_path / "." / "step-000001"})
    assert sorted(checkpoint_step(path) for path in removed) == [0, 2]
    assert steps_in(tmp_path) == [1, 3, 4, 5], "the damaged one counts for nothing"
    with pytest.raises(ValueError, match="keep_last is 0"):
        prune_checkpoints(tmp_path, 0)
    assert prune_checkpoints(tmp_path / "none", 1) == []


STAGES = ["mkdir", "save_file", "file_sha256", "dump", "fsync 1", "fsync 2", "fsync 3", "rename 1", "rename 2"]
STAGES += ["fsync 4"]


def break_at(patch: pytest.MonkeyPatch, stage: str, error: BaseException) -> None:
    """Let the writer fail at one of its calls."""
    name, _, number = stage.partition(" ")
    places: dict[str, tuple[Any, str]] = {
        "mkdir": (Path, "mkdir"),
        "save_file": (checkpoint, "save_file"),
        "file_sha256": (checkpoint, "file_sha256"),
        "dump": (json, "dump"),
        "fsync": (os, "fsync"),
        "rename": (Path, "rename"),
    }
    owner, attribute = places[name]
    real, calls = getattr(owner, attribute), []

    def broken(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == int(number or 1):
            raise error
        return real(*args, **options)

    patch.setattr(owner, attribute, broken)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("same_step", [False, True])
def test_a_failed_write_leaves_the_last_good_one(tmp_path: Path, stage: str, same_step: bool) -> None:
    """Disk full, at every call that can meet it; also while a checkpoint of the same step is replaced."""
    if stage == "rename 2" and not same_step:
        stage = "rename 1"
    save(tmp_path, 1, "old")
    step = 1 if same_step else 2
    with pytest.MonkeyPatch.context() as patch:
        break_at(patch, stage, OSError(28, "No space left on device"))
        with pytest.raises(CheckpointError, match=r"step-00000[12]: .* No space left on device"):
            save(tmp_path, step, "new")
    found = latest_checkpoint(tmp_path)
    assert found is not None
    in_place = stage == "fsync 4"  # renamed, but nobody can say whether the rename is on the disk
    assert_whole(found, step if in_place else 1, "new" if in_place else "old")
    assert_whole(save(tmp_path, step, "again"), step, "again")
    assert {path.name for path in tmp_path.iterdir()} == {"step-000001", f"step-{step:06d}"}


def test_an_interrupted_write_leaves_the_last_good_one(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.MonkeyPatch.context() as patch:
        break_at(patch, "save_file", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert_whole(latest_checkpoint(tmp_path), 1)


def test_where_nothing_can_be_written_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/step-000001: the checkpoint could not be written: File exists"):
        save(tmp_path / "file", 1)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with checkpoint._only_writer(tmp_path), pytest.raises(CheckpointError, match="another process writes"):
        save(tmp_path, 2)
    assert_whole(save(tmp_path, 2), 2)


def run_python(code: str, folder: Path) -> subprocess.Popen[bytes]:
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1")
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], env=environment, stdout=subprocess.PIPE)


DIES_AT_EVERY_CALL = """
import os, sys, builtins
from pathlib import Path
from rewardgen import checkpoint
from tests.test_checkpoint import save

# A child per system call that the writer makes, killed without any clean-up just before that call.
def count(event, args):
    global calls
    if event in ("os.mkdir", "os.rename", "open", "os.rmdir", "os.remove", "os.listdir", "os.scandir"):
        calls += 1
        if calls == fatal:
            os._exit(9)

sys.addaudithook(count)
fatal, finished = 0, False
while not finished:
    fatal += 1
    folder = Path(sys.argv[1]) / str(fatal)
    calls = -10**9
    save(folder, 1, "old"), save(folder, 2, "old")
    child = os.fork()
    if child == 0:
        calls = 0
        save(folder, 2, "new")
        os._exit(0)
    finished = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_death_at_any_call_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    writer = run_python(DIES_AT_EVERY_CALL, tmp_path)
    assert writer.wait(timeout=120) == 0
    folders = sorted(tmp_path.iterdir(), key=lambda path: int(path.name))
    assert len(folders) > 8, "the writer died at many places"
    marks = []
    for folder in folders:
        found = latest_checkpoint(folder)
        assert found is not None
        marks.append(load_checkpoint(found)[1]["mark"])
        assert_whole(found, 2, marks[-1])
        assert_whole(save(folder, 3), 3)
        assert {path.name for path in folder.iterdir()} == {"step-000001", "step-000002", "step-000003"}
        assert_whole(folder / "step-000002", 2, marks[-1])
    assert marks == sorted(marks, key=["old", "new"].index), "first the old one, from some call on the new one"
    assert {"old", "new"} == set(marks)


KILLED_WHILE_WRITING = """
import os, random, signal, sys, time, torch
from itertools import count
from pathlib import Path
from rewardgen.checkpoint import save_checkpoint, prune_checkpoints

def write_for_ever(folder, done):
    for step in count():
        tensors = {"large": torch.full((400_000,), float(step)), "small": torch.tensor(step)}
        save_checkpoint(folder, step=step, tensors=tensors, state={"step": step})
        prune_checkpoints(folder, 2)
        os.write(done, b"%d\\n" % step)

random.seed(0)
for number in range(5):
    folder = Path(sys.argv[1]) / str(number)
    done = os.open(f"{folder}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    child = os.fork()
    if child == 0:
        write_for_ever(folder, done)
    while os.fstat(done).st_size < 6:
        time.sleep(0.001)
    time.sleep(0.05 * random.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_killed_writer_costs_at_most_the_step_it_wrote(tmp_path: Path) -> None:
    assert run_python(KILLED_WHILE_WRITING, tmp_path).wait(timeout=120) == 0
    for number in range(5):
        folder = tmp_path / str(number)
        last = int((tmp_path / f"{number}.txt").read_text().split()[-1])
        latest = latest_checkpoint(folder)
        assert latest is not None
        tensors, state = load_checkpoint(latest)
        assert state["step"] - last in (0, 1)
        assert torch.equal(tensors["large"], torch.full((400_000,), float(state["step"])))
        assert_whole(save(folder, 10_000), 10_000)
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]


DISK_FULL = """
import resource, sys
from pathlib import Path
from rewardgen.errors import CheckpointError
from tests.test_checkpoint import save, assert_whole, latest_checkpoint
folder = Path(sys.argv[1])
save(folder, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    save(folder, 2)
except CheckpointError as error:
    print(error)
assert_whole(latest_checkpoint(folder), 1)
assert len(list(folder.iterdir())) == 1
"""


def test_a_file_system_that_takes_no_more(tmp_path: Path) -> None:
    writer = run_python(DISK_FULL, tmp_path)
    said = writer.communicate(timeout=60)[0].decode()
    assert writer.returncode == 0
    assert "step-000002: the checkpoint could not be written" in said
