"""The memory plan: its counter against arithmetic, and predicted bytes against counted ones at toy size."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import memory_plan as benchmark

from rewardgen import strict_yaml
from rewardgen.config import Experiment, load_experiment
from rewardgen.dry_run import dry
from rewardgen.errors import UserError
from rewardgen.measure import LiveBytes, OperationCounter
from rewardgen.memory_plan import Plan, plan, render
from rewardgen.policies import shapes
from rewardgen.policies.packing import to_pil
from rewardgen.rewards import sizes
from rewardgen.rewards.cache import digest
from rewardgen.types import Example, Score
from rewardgen.world.witness import ContentWitness
from tests.test_cli import TOY
from tests.test_uso_policy import make_parts, make_tokenizer
from tests.toys import ToyDataset, ToyPolicy, ToyReward

EXPERIMENT = Path(__file__).resolve().parent.parent / "experiments" / "uso_srl.yaml"
KB = 4 * 256


def test_live_bytes_come_and_go() -> None:
    kept = torch.zeros(256)
    with LiveBytes([kept]) as live:
        assert live.live == KB
        a = torch.zeros(4, 256)
        view = a[1:]
        b = a + 1
        assert live.live == 9 * KB
        del b
        assert live.live == 5 * KB
        del a  # its view still holds the storage
        assert live.live == 5 * KB
        del view
        assert live.live == KB
        assert live.peak == 9 * KB
        live.reset_peak()
        assert live.peak == KB
        kept.add_(1)
        assert live.peak == KB


def test_live_bytes_leave_out_what_lies_elsewhere() -> None:
    picture = torch.zeros(3, 256)
    with LiveBytes([picture], elsewhere=[picture[0]]) as live:
        view = picture[1:].detach()
        assert live.live == live.peak == 0
        made = view + 1
        assert live.live == 2 * KB
        del picture, view, made
        assert live.live == 0
        assert not live._elsewhere  # a new storage may come to lie where the old one was


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_live_bytes_see_backward_passes_and_recomputation(fake: bool, again: bool) -> None:
    """A chain of products and sigmoids: what each segment keeps is its sigmoid's result, and recomputed, nothing."""
    size, number = 64 * 64 * 4, 6

    def segment(x: Tensor, weight: Tensor) -> Tensor:
        return ((x @ weight).sigmoid() @ weight).sigmoid()

    with FakeTensorMode() if fake else nullcontext():
        weights = [torch.zeros(64, 64, requires_grad=True) for _ in range(number)]
        x = torch.zeros(64, 64)
        with LiveBytes([x, *weights]) as live:
            y = x
            for weight in weights:
                y = checkpoint(segment, y, weight, use_reentrant=False) if again else segment(y, weight)
            loss = y.sum()
            kept = number if again else 2 * number
            assert live.live == pytest.approx((1 + number + kept) * size, abs=64)
            gradients = torch.autograd.grad(loss, weights)
            assert live.peak >= (1 + number + kept + 2) * size
            del loss, y
            assert live.live == pytest.approx((1 + 2 * number) * size, abs=64)
    assert len(gradients) == number


def test_operations_of_products() -> None:
    with OperationCounter() as counter:
        torch.zeros(3, 5) @ torch.zeros(5, 7)
        nn.functional.conv2d(torch.zeros(2, 3, 8, 8), torch.zeros(4, 3, 3, 3), padding=1)
    assert counter.total == 2 * 3 * 5 * 7 + 2 * 2 * 3 * 4 * 9 * 64


@lru_cache(maxsize=1)
def _remembered() -> Tensor:
    return torch.zeros(3)


def test_nothing_of_a_dry_run_stays() -> None:
    with dry():
        assert isinstance(_remembered(), FakeTensor)
        assert torch.zeros(2).tolist() == [1.0, 1.0]
        assert bool(torch.zeros(2, dtype=torch.bool).all())
        assert not bool(torch.ones(2).isnan().any())
        assert torch.rand(5)[torch.zeros(5, dtype=torch.bool)].shape == (5,)
        assert torch.zeros(4, dtype=torch.bool).nonzero()[:, 0].shape == (4,)
    assert not isinstance(_remembered(), FakeTensor)
    assert nn.Linear(2, 2).to(torch.float64).weight.dtype == torch.float64
    assert torch.ones(2).numpy().sum() == 2


def test_pictures_of_a_dry_run_are_told_apart_by_their_values() -> None:
    with dry():
        first, second = torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)
        batch = torch.stack([first, second])
        assert float(first.numpy().max()) == 0
        assert 0 < float(second.numpy().max()) < 1
        codes = {digest(picture) for picture in (first, second, *batch)}
        assert len(codes) == 4
        # A picture is found again, also by another view of it.
        assert {digest(picture) for picture in (first.detach(), second.view(3, 4, 4), batch[0], batch[1])} == codes
        assert to_pil(second).size == (4, 4)
        assert torch.zeros(0, 3).numpy().size == 0
        assert not torch.zeros(5, dtype=torch.int64).numpy().any()
        assert not torch.zeros(5, dtype=torch.bool).numpy().any()


@pytest.mark.parametrize("case", ["SRL", "offloaded 8-bit base, checkpointed blocks"])
def test_prediction_agrees_with_measurement(case: str) -> None:
    """Far closer than the aim: no part is missing, however small beside the activations."""
    row = benchmark.compare(benchmark.CASES[case])
    assert row["ratio"] == pytest.approx(1, abs=1e-4)
    assert row["operations"] == pytest.approx(1, abs=1e-3)
    assert case in benchmark.render({case: row})


def test_every_example_of_a_batch_is_encoded() -> None:
    one, three = (plan(benchmark.experiment_of([f"train.batch_size={size}"])) for size in (1, 3))
    part = "encodings of the batch"
    assert three.resident[part] == 3 * one.resident[part] > 0
    # The flow-matching term's targets are encoded in the step, so that this is of prompts and references alone.
    assert three.encoding_operations == 3 * one.encoding_operations > 0


def test_the_bundled_witnesses_are_counted() -> None:
    found = plan(benchmark.experiment_of([]))
    assert not any("witness" in what for what in found.uncounted)
    assert found.resident["witness layout"] == sum(4 * p.numel() for p in ContentWitness().parameters())


class Hoard(ToyDataset):
    """Pictures that are views of one memory, a thousand times as large as the model."""

    def __init__(self, size: int, hoarded: int = 0) -> None:
        super().__init__(size)
        self._all = torch.zeros(hoarded, 3, 8, 8)

    def __getitem__(self, index: int) -> Example:
        return dataclasses.replace(super().__getitem__(index), extras={"more": self._all[index:]})


def test_what_a_dataset_holds_is_not_measured() -> None:
    use = "tests.test_memory_plan:Hoard"
    plain, hoarding = (toy(data={"train": {"use": use, "args": {"size": 4, "hoarded": n}}}) for n in (0, 10_000))
    assert benchmark.measured(plain) == benchmark.measured(hoarding)


class Unstyled(ToyDataset):
    """For UNO, which takes no styles."""

    def __getitem__(self, index: int) -> Example:
        return dataclasses.replace(super().__getitem__(index), style_refs=())


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of three blocks, in which the blocks' weights are most of what a step needs."""
    torch.manual_seed(0)
    folder, parts = tmp_path_factory.mktemp("wide"), make_parts()
    sizes = {"attention_head_dim": 32, "num_attention_heads": 4, "axes_dims_rope": (8, 12, 12)}
    FluxTransformer2DModel.from_config({**parts.transformer.config, **sizes}).save_pretrained(folder / "transformer")
    for name in ("vae", "text_encoder", "text_encoder_2"):
        getattr(parts, name).save_pretrained(folder / name)
    for name in ("tokenizer", "tokenizer_2"):
        make_tokenizer().save_pretrained(folder / name)
    return folder


def experiment_on(base: Path, **args: object) -> Experiment:
    document = strict_yaml.load(TOY, "toy.yaml")[0] | {"evaluation": {"num_examples": 1, "grid_examples": 0}}
    sizes = {"base": str(base), "lora_rank": 2, "content_long_side": 16, "max_text_tokens": 5}
    document["policy"] = {"use": "uno", "args": {**sizes, **args}}
    document["data"] = {part: {"use": "tests.test_memory_plan:Unstyled"} for part in ("train", "held_out")}
    document["rollout"]["window"]["entry_range"] = [2, 2]
    document["objective"]["rewards"] = {"light": {"use": "brightness", "weight": 1.0}}
    document["train"] |= {"gradient_checkpointing": bool(args.get("offload"))}
    return Experiment.model_validate(document)


def test_prediction_agrees_with_measurement_for_every_form_of_the_base(wide: Path) -> None:
    forms: dict[str, dict[str, object]] = {
        "bf16": {"base_dtype": "bf16"},
        "int8": {"base_dtype": "int8"},
        "offload": {"base_dtype": "bf16", "offload": True},
        "both": {"base_dtype": "int8", "offload": True},
    }
    experiments = {name: experiment_on(wide, **args) for name, args in forms.items()}
    found = {name: plan(experiment) for name, experiment in experiments.items()}
    measured = {name: benchmark.measured(experiment)[0] for name, experiment in experiments.items()}
    for name, one in found.items():
        assert one.peak / measured[name] == pytest.approx(1, abs=benchmark.TOLERANCE), name
    frozen = {name: one.resident["transformer, frozen"] for name, one in found.items()}
    weights = found["both"].offloaded
    assert [found[name].offloaded for name in forms] == [0, 0, 2 * weights, weights]
    assert weights > frozen["int8"] / 2
    # The weights themselves are the whole difference, but for the scales: 4 bytes for each output channel.
    assert frozen["bf16"] - frozen["offload"] == 2 * weights
    assert frozen["int8"] - frozen["both"] == weights
    assert 0 < frozen["int8"] - (frozen["bf16"] - weights) < weights / 16
    assert measured["int8"] < measured["bf16"] - 0.5 * weights
    assert measured["both"] < measured["int8"] - 0.5 * weights


def test_plan_of_parts_that_are_not_here() -> None:
    """Full width, few blocks: what is told stands on shapes alone, and no file is read."""
    overrides = [
        *("policy.args.base=black-forest-labs/FLUX.1-dev", "policy.args.base_dtype=bf16"),
        *("policy.args.encodings=nowhere", "policy.args.lora_rank=16"),
        *(f"policy.args.{name}=null" for name in ("siglip", "projector", "lora")),
        "rollout.image_size=[64, 64]",
        "train.batch_size=1",
        "objective.rewards.style.args.checkpoint=nowhere.pth",
    ]
    experiment = load_experiment(EXPERIMENT, "tiny", overrides)
    with pytest.MonkeyPatch.context() as patch:
        few = {**shapes._DEV, "transformer": {**shapes.FLUX, "num_layers": 1, "num_single_layers": 1}}
        few["text_encoder_2"] = {**shapes.T5_XXL, "num_layers": 1}
        patch.setattr(shapes, "RELEASED", {"black-forest-labs/FLUX.1-dev": few})
        with pytest.raises(UserError, match="no `siglip`"):
            plan(experiment)
        patch.setattr("rewardgen.planned.takes_styles", lambda _: False)
        found = plan(experiment)
    assert not any("text_encoder" in part or "siglip" in part for part in found.resident)
    assert found.resident["transformer, frozen"] == pytest.approx(2 * 588e6, rel=0.2)
    assert found.encoding_peak > found.resident["transformer, frozen"] + 2 * 300e6  # a block and embeddings of T5
    assert found.peak > sum(found.resident.values()) + found.gradients


def test_plan_of_a_policy_that_takes_no_styles() -> None:
    overrides = [
        *("policy.args.lora_rank=16", "policy.args.content_long_side=64", "policy.args.encodings=nowhere"),
        *("rollout.image_size=[64, 64]", "train.accumulation=1"),
        "objective.rewards.people={use: brightness, weight: 1.0}",
    ]
    experiment = load_experiment(EXPERIMENT.with_name("umo_matching.yaml"), "flux-dev", overrides)
    with pytest.MonkeyPatch.context() as patch:
        few = {**shapes._DEV, "transformer": {**shapes.FLUX, "num_layers": 1, "num_single_layers": 1}}
        few["text_encoder_2"] = {**shapes.T5_XXL, "num_layers": 1}
        patch.setattr(shapes, "RELEASED", {"black-forest-labs/FLUX.1-dev": few})
        found = plan(experiment)
    assert "one content reference for each example" in found.assumed
    assert found.resident["transformer, frozen"] == pytest.approx(2 * 588e6, rel=0.2)
    assert found.gradients == 2 * found.resident["trained parameters"]


def test_plan_of_rewards_that_are_not_here() -> None:
    """A judge of 3 billion weights, DINO and a bound relative to the base: both train in the step that is planned."""
    overrides = [
        *("policy.args.lora_rank=16", "policy.args.content_long_side=64", "policy.args.encodings=nowhere"),
        "rollout.image_size=[64, 64]",
    ]
    experiment = load_experiment(EXPERIMENT.with_name("uso_vlm_judge.yaml"), "flux-dev", overrides)
    qwen = sizes.RELEASED["Qwen/Qwen2.5-VL-3B-Instruct"]
    short = {**qwen, "text_config": {**qwen["text_config"], "num_hidden_layers": 2}}
    short["vision_config"] = {**qwen["vision_config"], "depth": 2}
    with pytest.MonkeyPatch.context() as patch:
        few = {**shapes._DEV, "transformer": {**shapes.FLUX, "num_layers": 1, "num_single_layers": 1}}
        few["text_encoder_2"] = {**shapes.T5_XXL, "num_layers": 1}
        patch.setattr(shapes, "RELEASED", {**shapes.RELEASED, "black-forest-labs/FLUX.1-dev": few})
        patch.setattr(sizes, "RELEASED", {**sizes.RELEASED, "Qwen/Qwen2.5-VL-3B-Instruct": short})
        found = plan(experiment)
    assert found.uncounted == ()
    assert found.resident["reward judge"] > 2 * 151936 * 2048
    assert found.resident["reward content"] == pytest.approx(4 * 86.58e6, rel=0.01)
    # Of 64 micro-batches each makes a gradient for each of the four terms, beside the sums so far.
    assert found.gradients == 8 * found.resident["trained parameters"]


def toy(**sections: dict[str, Any]) -> Experiment:
    """The toy experiment with a wider policy, no witness and the same entry step in every step."""
    document = strict_yaml.load(TOY, "toy.yaml")[0] | {"evaluation": {"num_examples": 1, "grid_examples": 0}}
    document["policy"]["args"]["hidden"] = 64
    document["rollout"]["window"]["entry_range"] = [1, 1]
    document["train"]["prompt_dropout"] = 0.0
    for name, section in sections.items():
        document[name] = document[name] | section
    return Experiment.model_validate(document)


STYLE = {"use": "tests.toys:ToyReward", "weight": 0.5}
LIGHT = {"use": "brightness", "weight": 1.0}
JUDGE = {"use": "tests.toys:ToyJudge"}
GRPO = {"kind": "grpo", "num_generations": 3, "beta": 0.1}
NFT = {"kind": "nft", "num_generations": 3, "times_per_sample": 3, "num_iterations": 2}
FLOOR = {"use": "brightness", "floor": {"base": 0.5, "steps": 1}, "multiplier": {"initial": 1.0}}
WORK: dict[str, dict[str, dict[str, Any]]] = {
    "one reward": {},
    "samples alone": {
        "objective": {"flow_matching": {"weight": 0}, "rewards": {"judge": JUDGE}, "policy_gradient": GRPO}
    },
    "samples, a gradient and two micro-batches": {
        "objective": {"rewards": {"judge": JUDGE, "style": STYLE}, "policy_gradient": GRPO | {"window": {"size": 1}}},
        "train": {"accumulation": 2},
    },
    "two updates on the same samples": {
        "objective": {"rewards": {"judge": JUDGE, "style": STYLE}, "policy_gradient": NFT}
    },
    "a floor at the base's value": {"objective": {"rewards": {"style": STYLE, "light": FLOOR}}},
    "normalised": {"objective": {"rewards": {"style": STYLE | {"normalize": "standard"}}}},
    "two entries": {
        "rollout": {"window": {"kind": "refl", "entry_range": [1, 2]}, "entries_per_rollout": 2},
        "objective": {"rewards": {"style": STYLE, "light": LIGHT}},
        "train": {"term_grad_norms": False},
    },
    "one backward pass for two rewards": {
        "objective": {"rewards": {"style": STYLE, "light": LIGHT}},
        "train": {"term_grad_norms": False},
    },
    "no such pass with two micro-batches": {
        "objective": {"rewards": {"style": STYLE, "light": LIGHT}},
        "train": {"term_grad_norms": False, "accumulation": 2},
    },
}


@pytest.mark.parametrize("case", WORK)
def test_all_that_a_step_does_is_counted(case: str) -> None:
    """Operations exactly, bytes never fewer than a real step's; a little more where the worst case is told."""
    experiment = toy(**WORK[case])
    found, (peak, operations) = plan(experiment), benchmark.measured(experiment)
    encoding = experiment.train.accumulation * found.encoding_operations
    assert found.operations + encoding == pytest.approx(operations, rel=1e-9)
    assert 0.995 <= found.peak / peak <= 1 + 2 * benchmark.TOLERANCE
    assert sum(found.resident.values()) + found.drawn < found.peak


def test_what_is_not_counted_is_told() -> None:
    objective = {"rewards": {"judge": JUDGE, "style": STYLE}, "policy_gradient": GRPO}
    witnesses = {"light": {"use": "brightness"}, "people": {"use": "dino", "args": {"model": "./nowhere"}}}
    evaluation = {"batch_size": 16, "num_examples": 1, "grid_examples": 0, "witnesses": witnesses}
    found = plan(toy(objective=objective, evaluation=evaluation))
    judge, people, at_a_time = found.uncounted
    assert "reward 'judge' takes to score" in judge
    assert "witness 'people'" in people
    assert "16 pictures at a time" in at_a_time
    assert "every term of the objective at once" in found.assumed
    told = render(found, device_bytes=80e9)
    assert [line for line in told if "NOT COUNTED" in line] == [f"  NOT COUNTED: {what}" for what in found.uncounted]


def test_the_largest_bucket_is_planned() -> None:
    small, large = plan(toy()), plan(toy(rollout={"buckets": [[8, 4], [16, 16]]}))
    assert large.operations > 3 * small.operations
    assert "every picture of 16 x 16 pixels" in large.assumed


def test_it_says_whether_it_fits() -> None:
    found = Plan(
        resident={"transformer, frozen": int(24e9)},
        gradients=int(2e9),
        peak=int(60e9),
        encoding_peak=int(70e9),
        operations=4e15,
        encoding_operations=1e12,
        assumed=("one reference",),
    )
    text = "\n".join(render(found, device_bytes=80e9, rate=4e14))
    assert "24.000 GB" in text
    assert "34.000 GB" in text  # activations: what is left of the peak
    assert "it fits into 80 GB" in text
    assert "10 s at an assumed 400 TFLOP/s" in text
    assert "not measured" in text
    assert "WILL NOT FIT into 70 GB" in "\n".join(render(found, device_bytes=70e9))


def test_a_step_that_needs_its_numbers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def stubborn(self: ToyReward, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        raise KeyError("no face in a black picture")

    experiment = Experiment.model_validate(strict_yaml.load(TOY, "toy.yaml")[0])
    monkeypatch.setattr(ToyReward, "score", stubborn)
    with pytest.raises(UserError, match="cannot be planned from shapes alone: 'no face"):
        plan(experiment)
    monkeypatch.undo()
    found = plan(experiment)
    assert found.resident["trained parameters"] == sum(4 * p.numel() for p in ToyPolicy(4).trainable().values())
    assert found.gradients == 2 * found.resident["trained parameters"]
    assert "reward style" in found.resident
