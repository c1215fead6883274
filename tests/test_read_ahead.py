"""Reading ahead: nothing changes but when, and by whom, an example is read."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from rewardgen import batches
from rewardgen.data.buckets import BucketedDataset
from rewardgen.data.huggingface import HuggingFaceDataset
from rewardgen.data.images import ImageError
from rewardgen.data.jsonl import JsonlDataset
from rewardgen.data.read_ahead import Reading
from rewardgen.data.shards import ShardDataset
from rewardgen.learner import MicroBatch
from rewardgen.policies.conditions import UsoCondition
from rewardgen.policies.encodings import EncodingCache, EncodingStore
from rewardgen.trainer import Trainer
from rewardgen.types import Example, StepReport
from tests.test_shards import write
from tests.test_trainer import make, said, same_state
from tests.test_uso_policy import EXAMPLES, make_policy, picture
from tests.toys import ToyDataset

MAIN = threading.main_thread().name
WAIT = 60.0
"""Seconds after which something that should have happened did not."""


class Watched(ToyDataset):
    """Tells who read which example, in order."""

    def __init__(self, size: int = 7, *, read_ahead: bool = True) -> None:
        super().__init__(size)
        self.read_ahead = read_ahead
        self.reads: list[tuple[str, int]] = []
        self.before: Callable[[int], object] = lambda _: None

    def __getitem__(self, index: int) -> Example:
        self.reads.append((threading.current_thread().name, index))
        self.before(len(self.reads))
        return super().__getitem__(index)


def watch(trainer: Trainer, **options: Any) -> Watched:
    dataset = trainer.batches.dataset = Watched(len(trainer.batches.dataset), **options)
    return dataset


def reader_is_gone() -> bool:
    readers = [thread for thread in threading.enumerate() if thread.name.startswith("rewardgen-read-ahead")]
    for thread in readers:
        thread.join(WAIT)  # it may be on its last line
    return not any(thread.is_alive() for thread in readers)


def test_a_run_is_the_same_bit_for_bit_with_and_without(tmp_path: Path) -> None:
    (ahead, one), (plain, two) = (make(tmp_path / name) for name in ("ahead", "plain"))
    watched, usual = watch(ahead), watch(plain, read_ahead=False)
    for trainer in (ahead, plain):
        trainer.run()
    assert said(one) == said(two)
    assert same_state(ahead, plain)
    assert [index for _, index in watched.reads] == [index for _, index in usual.reads]
    # Four examples a step: the first step's are read by the step itself, and nothing past the last step is read.
    assert [name == MAIN for name, _ in watched.reads] == [True] * 4 + [False] * 20
    assert {name for name, _ in usual.reads} == {MAIN}
    assert reader_is_gone()


@pytest.mark.parametrize("cut", [1, 4])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, cut: int) -> None:
    whole, all_reports = make(tmp_path / "whole")
    watch(whole, read_ahead=False)
    whole.run()
    part, first = make(tmp_path / "part")
    watched, step = watch(part), part.learner.step

    def stopping(micro_batches: list[MicroBatch], **at: Any) -> StepReport:
        if at["step"] == cut - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(micro_batches, **at)

    part.learner.step = stopping  # type: ignore[assignment,method-assign]
    assert part.run().completed_steps == cut
    assert reader_is_gone()
    assert len(watched.reads) > 4 * cut - 1  # more than was consumed may have been read
    resumed, last = make(tmp_path / "part")
    watch(resumed)
    assert resumed.resume() == cut
    resumed.run()
    assert said(all_reports) == said(first) + said(last)
    assert same_state(whole, resumed)


def test_the_next_step_is_read_while_this_one_runs(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path, train={"num_steps": 2})
    watched, learn, all_read = watch(trainer), trainer.learner.step, threading.Event()
    watched.before = lambda count: all_read.set() if count == 8 else None

    def waiting(micro_batches: list[MicroBatch], **at: Any) -> StepReport:
        assert all_read.wait(WAIT), "the next step's examples were not read during this one"
        return learn(micro_batches, **at)

    trainer.learner.step = waiting  # type: ignore[assignment,method-assign]
    assert trainer.run().completed_steps == 2


def test_an_error_comes_up_at_the_step_that_needs_the_example(tmp_path: Path) -> None:
    trainer, reports = make(tmp_path)
    watched = watch(trainer)

    def fail(count: int) -> None:
        if count == 4 * 2 + 3:  # in the third step
            raise ImageError("the picture is cut off")

    watched.before = fail
    with pytest.raises(ImageError, match="the picture is cut off"):
        trainer.run()
    assert len(reports) == 2
    assert watched.reads[-1][0] != MAIN
    assert reader_is_gone()


def test_a_second_ctrl_c_ends_the_wait_for_a_picture_that_never_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "PATIENCE", 0.05)
    monkeypatch.setattr(batches.Batches.close, "__defaults__", (0.05,))
    trainer, reports = make(tmp_path)
    watched, never, killed = watch(trainer), threading.Event(), threading.Event()
    watched.before = lambda count: never.wait(WAIT) if count == 5 else None
    take = Reading.take

    def interrupt() -> None:
        for _ in range(2):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            threading.Event().wait(0.2)
        killed.set()

    def taking(self: Reading) -> list[Example]:
        threading.Timer(0.3, interrupt).start()
        return take(self)

    monkeypatch.setattr(Reading, "take", taking)
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
    finally:
        never.set()
    assert killed.wait(WAIT)
    assert len(reports) == 1


def test_a_jump_gives_up_what_was_read_for_another_step(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path)
    watched = watch(trainer)
    made = trainer.batches
    made.read_ahead(3)
    jumped = made.plan(1)
    assert reader_is_gone()
    plain = make(tmp_path)[0].batches.plan(1)
    ids = [[example.id for _, example in batch] for batch in jumped.micro_batches]
    assert ids == [[example.id for _, example in batch] for batch in plain.micro_batches]
    assert [name for name, _ in watched.reads][-4:] == [MAIN] * 4


def test_what_is_held_is_bounded_and_the_rest_is_read_by_who_takes_it() -> None:
    readers: list[str] = []
    data = ToyDataset(5)
    size = sum(tensor.nbytes for tensor in (*data[0].content_refs, *data[0].style_refs, data[0].target))  # type: ignore[union-attr,misc]

    def read(index: int) -> Example:
        readers.append(threading.current_thread().name)
        return data[index]

    reading = Reading(read, [4, 0, 0, 2, 1], prepare=lambda _: None, max_bytes=int(1.5 * size))
    assert [example.id[-1] for example in reading.take()] == ["4", "0", "0", "2", "1"]
    assert [name == MAIN for name in readers] == [False, False, True, True, True]


def test_what_only_warms_up_may_fail() -> None:
    def prepare(example: Example) -> None:
        raise ValueError(example.id)

    data = ToyDataset(2)
    assert [example.id for example in Reading(data.__getitem__, [0, 1], prepare=prepare).take()] == [
        "toy-000",
        "toy-001",
    ]


def on_disk(folder: Path) -> list[Any]:
    """Each dataset that is read ahead, over files."""
    path = folder / "a.png"
    Image.new("RGB", (24, 16), (200, 10, 10)).save(path)
    rows = [{"id": str(number), "prompt": "x", "content": "a.png", "target": "a.png"} for number in range(3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write(folder / "0.tar", {f"{number}.target.png": path.read_bytes() for number in range(3)})
    hub = HuggingFaceDataset.from_dataset(datasets.Dataset.from_list([{"target": str(path)}] * 3))
    jsonl = JsonlDataset(str(folder / "rows.jsonl"))
    return [jsonl, ShardDataset(str(folder / "*.tar")), hub, BucketedDataset(jsonl, [(16, 16), (16, 24)])]


def test_datasets_on_disk_are_read_ahead_and_draw_from_no_global_generator(tmp_path: Path) -> None:
    for dataset in on_disk(tmp_path):
        before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()  # type: ignore[union-attr,index]
        assert dataset.read_ahead
        assert dataset[1].target is not None
        assert random.getstate() == before[0]
        assert np.random.get_state()[1].tobytes() == before[1]  # type: ignore[union-attr,index]
        assert torch.equal(torch.get_rng_state(), before[2])
    assert not BucketedDataset(ToyDataset(2), [(8, 8)]).read_ahead


PRINTS = {"text": "t", "content": "c", "style": "s", "target": "g"}


def test_stored_encodings_are_brought_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [*EXAMPLES, Example(id="last", prompt="a cat", target=picture(9, 16, 24))]
    store = EncodingStore(tmp_path, PRINTS)
    first = make_policy("lora", store=store)
    expected, clean = first.encode(examples), first.encode_pixels(picture(9, 16, 24)[None])
    second = make_policy("lora", store=store)
    draws = torch.get_rng_state()
    second.read_encodings(examples)
    assert torch.equal(torch.get_rng_state(), draws)
    monkeypatch.setattr(EncodingStore, "read", lambda *_: pytest.fail("it was to be in memory"))
    found = second.encode(examples)
    assert isinstance(found, UsoCondition)
    for one, other in zip(found.text_B, expected.text_B, strict=True):
        assert torch.equal(one, other)
    for mine, theirs in zip(found.references_B, expected.references_B, strict=True):
        assert all(torch.equal(a.tokens_NP, b.tokens_NP) for a, b in zip(mine, theirs, strict=True))
    for of, wanted in zip(found.styles_B, expected.styles_B, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(of, wanted, strict=True))
    assert torch.equal(second.encode_pixels(picture(9, 16, 24)[None]), clean)


def test_without_a_store_there_is_nothing_to_read() -> None:
    policy = make_policy("lora")
    policy.read_encodings(EXAMPLES)
    assert len(policy.encoder.cache) == 0


def test_what_waits_takes_a_quarter_of_the_memory_at_most(tmp_path: Path) -> None:
    store = EncodingStore(tmp_path, PRINTS)
    for number in range(8):
        store.write("text", str(number), (torch.full((25,), float(number)),))  # 100 bytes
    cache = EncodingCache(800, store)
    for number in range(8):
        cache.read_ahead("text", str(number))
    assert len(cache) == 3  # a fourth is not begun once more than 200 bytes wait
    cache.get("text", "0", lambda: pytest.fail("it is there"))
    cache.read_ahead("text", "7")
    assert len(cache) == 4
    cache.read_ahead("text", "no such text")
    assert len(cache) == 4


def test_one_thread_reads_ahead_while_another_asks(tmp_path: Path) -> None:
    store = EncodingStore(tmp_path, PRINTS)
    for number in range(12):
        store.write("text", str(number), (torch.full((25,), float(number)),))
    cache = EncodingCache(600, store)  # half of them: entries come and go all the time

    def ahead() -> None:
        for turn in range(300):
            cache.read_ahead("text", str((turn * 7) % 12))

    thread = threading.Thread(target=ahead)
    thread.start()
    for turn in range(300):
        number = (turn * 5) % 12
        (entry,) = cache.get("text", str(number), lambda: pytest.fail("it is stored"))
        assert float(entry[0]) == number
    thread.join(WAIT)
    assert len(cache) == 6
    assert cache._bytes == 600 == sum(entry.nbytes for (entry,) in cache._entries.values())
