"""The two back ends on the same weights: `transformers serve` in a thread, and the model in this process."""

from __future__ import annotations

import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rewardgen.reward import score
from rewardgen.rewards.judging.local import LocalModel, save_model
from rewardgen.rewards.judging.questions import load_question
from rewardgen.rewards.vlm_judge import VlmJudge
from rewardgen.rewards.vlm_judge_local import LocalVlmJudge
from rewardgen.types import Example
from rewardgen.world.tiny_vlm import tiny_llava

N = 8


def asked() -> tuple[Tensor, list[Example]]:
    rng = torch.Generator().manual_seed(0)
    pixels = torch.rand(N, 3, 20, 26, generator=rng)
    return pixels, [Example(id=str(i), style_refs=(torch.rand(3, 16, 16, generator=rng),)) for i in range(N)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA that says yes or no and nothing else, each to some of the pictures that are asked about."""
    model, processor = tiny_llava(
        image_size=16, patch_size=8, vision_width=24, vision_layers=1, text_width=24, text_layers=1
    )
    states: list[Tensor] = []
    hook = model.lm_head.register_forward_pre_hook(lambda _module, inputs: states.append(inputs[0][0, -1]))
    judge = LocalVlmJudge(LocalModel(model, processor, load_question("style"), checkpointing=False), min_mass=0.0)
    with torch.no_grad():
        judge.score(*asked())
        hook.remove()
        mean_D = torch.stack(states).mean(0)
        direction_D = states[0] - mean_D
        direction_D -= (direction_D @ mean_D) / (mean_D @ mean_D) * mean_D
        words = processor.tokenizer.get_vocab()
        model.lm_head.weight.zero_()
        model.lm_head.weight[words["yes"]], model.lm_head.weight[words["no"]] = direction_D, -direction_D
    place = tmp_path_factory.mktemp("served")
    save_model(model, processor, place)
    return place


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[str]:
    from transformers.cli.serve import Serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server: Any = Serve(force_model=str(folder), host="127.0.0.1", port=port, device="cpu", non_blocking=True)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill_server()


def test_the_service_says_what_the_model_thinks(folder: Path, served: str) -> None:
    pixels, examples = asked()
    local = LocalVlmJudge.from_pretrained(str(folder), "style", min_mass=0.0)
    p_B = score(local, pixels, examples, enable_grad=False).value_B
    assert 0 < (p_B > 0.5).sum() < N
    # One token: this model would go on saying it.
    judge = VlmJudge("style", (served,), str(folder), request={"max_tokens": 1}, concurrency=2, timeout_s=300.0)
    found = score(judge, pixels, examples, enable_grad=False)
    assert torch.equal(found.value_B, (p_B > 0.5).float())
    # It takes the request for log-probabilities and ignores it.
    assert (found.counts["by_logprob"], found.counts["by_text"], found.counts["failed"]) == (0, N, 0)


def test_what_it_babbles_is_no_answer(folder: Path, served: str) -> None:
    pixels, examples = asked()
    judge = VlmJudge("style", (served,), str(folder), max_attempts=1, concurrency=2, timeout_s=300.0)
    with pytest.warns(UserWarning, match="no answer to the question: '(yes|no)( yes| no)+"):
        found = score(judge, pixels, examples, enable_grad=False)
    assert not found.valid_B.any()
    assert found.counts["nonsense"] == found.counts["failed"] == N
