"""Frozen layers in 8 bits and in CPU memory: the format's error, gradients, bytes, files, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rewardgen.errors import ConfigError
from rewardgen.fleet.inline import InlinePool
from rewardgen.learner import Learner, OptimizerConfig
from rewardgen.objective import Objective, ObjectiveConfig
from rewardgen.policies.frozen import FrozenLinear, hold_blocks, quantise
from rewardgen.policies.uno import UnoPolicy
from rewardgen.policies.uso import UsoPolicy
from rewardgen.policy import noise_like_request
from rewardgen.rollout import RolloutConfig, RolloutWorker
from rewardgen.trainer import TrainConfig, Trainer
from rewardgen.types import StepReport
from tests.test_uso_policy import EXAMPLES, SIZE, TIMES, make_policy, velocities
from tests.toys import ToyDataset, ToyReward

FORMS = pytest.mark.parametrize(
    ("eight_bit", "offload"), [(True, False), (False, True), (True, True)], ids=["int8", "offload", "both"]
)


def layer(*, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(24, 40, bias=bias).to(dtype).requires_grad_(False)


def made(held: FrozenLinear, dtype: torch.dtype) -> Tensor:
    """The weight that a layer stands for, by arithmetic of the test's own."""
    scale = 1.0 if held.scale is None else held.scale.double()
    return (held.weight.double() * scale).to(dtype)


@contextmanager
def copies(tensors: list[Tensor]) -> Iterator[list[int]]:
    """Counts how often each of these tensors is copied to a device while the block lasts."""
    counts = [0] * len(tensors)
    places = {tensor.data_ptr(): index for index, tensor in enumerate(tensors)}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._to_copy.default and (index := places.get(args[0].data_ptr())) is not None:
                counts[index] += 1
            return func(*args, **(kwargs or {}))

    with Watch():
        yield counts


# -- the format --


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-30, 30), outlier=st.floats(1, 1e4))
def test_no_weight_is_off_by_more_than_half_a_step(seed: int, exponent: int, outlier: float) -> None:
    weight_OI = torch.randn(5, 33, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    weight_OI[1, 7] *= outlier  # costs its own channel alone
    weight_OI[2] = 0
    levels_OI, scale_O1 = quantise(weight_OI)
    assert levels_OI.dtype == torch.int8
    assert levels_OI.abs().max() <= 127
    error_OI = (levels_OI.double() * scale_O1.double() - weight_OI.double()).abs()
    assert (error_OI <= scale_O1.double() * (0.5 + 1e-6)).all()
    largest_O1 = weight_OI.abs().amax(1, keepdim=True).double()
    assert ((scale_O1 / largest_O1)[[0, 1, 3, 4]] * 127 - 1).abs().max() <= 2**-8
    assert torch.equal(scale_O1, scale_O1.bfloat16().float())
    assert (levels_OI[2] == 0).all()
    assert torch.isfinite(scale_O1).all()


def test_what_was_quantised_before_comes_back_unchanged() -> None:
    levels_OI, scale_O1 = quantise(torch.randn(6, 50))
    again_OI, _ = quantise(levels_OI * scale_O1)
    assert torch.equal(again_OI, levels_OI)


# -- the layer --


@FORMS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 24), (2, 5, 24), (24,)])
def test_a_layer_is_that_of_the_weight_it_stands_for(
    shape: tuple[int, ...], bias: bool, eight_bit: bool, offload: bool
) -> None:
    plain = layer(bias=bias)
    held = FrozenLinear(plain, eight_bit=eight_bit, offload=offload)
    found = []
    for function in (held, lambda x: F.linear(x, made(held, torch.float32), plain.bias)):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = function(x)
        found.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    if not eight_bit:
        torch.testing.assert_close(found[0][0], plain(x), rtol=0, atol=0)


@FORMS
def test_its_gradient_is_that_of_finite_differences(eight_bit: bool, offload: bool) -> None:
    held = FrozenLinear(layer(dtype=torch.float64), eight_bit=eight_bit, offload=offload)
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(held, (x,))


@FORMS
def test_it_computes_in_the_precision_of_autocast(eight_bit: bool, offload: bool) -> None:
    held = FrozenLinear(layer(), eight_bit=eight_bit, offload=offload)
    x = torch.randn(7, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = held(x.requires_grad_())
    assert y.dtype == torch.bfloat16
    expected = F.linear(x.bfloat16(), made(held, torch.bfloat16), held.bias.bfloat16())
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    (grad,) = torch.autograd.grad(y.float().sum(), x)
    assert grad.dtype == torch.float32


@FORMS
def test_autograd_keeps_the_bytes_that_are_held_and_no_others(eight_bit: bool, offload: bool) -> None:
    held = FrozenLinear(layer(), eight_bit=eight_bit, offload=offload)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        held(torch.randn(3, 24, requires_grad=True))
    own = {held.weight.data_ptr()} | ({held.scale.data_ptr()} if eight_bit else set())
    assert {tensor.data_ptr() for tensor in kept} == own


def test_offloaded_weights_stay_when_the_module_moves_and_are_copied_at_each_use() -> None:
    held = FrozenLinear(layer(), eight_bit=True, offload=True)
    x = torch.randn(3, 24, requires_grad=True)
    with copies([held.weight]) as counts:
        y = held(x)
        assert counts == [1]
        torch.autograd.grad(y.sum(), x)
    assert counts == [2]
    held.to(torch.device("meta"))
    assert held.weight.device.type == "cpu"
    assert held.bias.device.type == held.scale.device.type == "meta"
    assert "weight" not in held.state_dict()
    there = FrozenLinear(layer(), eight_bit=True, offload=False).to(torch.device("meta"))
    assert there.weight.device.type == "meta"


def test_compiled_it_computes_the_same() -> None:
    held = nn.Sequential(FrozenLinear(layer(), eight_bit=True, offload=True), nn.GELU())
    compiled = torch.compile(held, backend="aot_eager", fullgraph=True)
    found = []
    for module in (held, compiled):
        x = torch.randn(3, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = module(x)
        found.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


# -- the policy --


def held_policy(base_dtype: Any, offload: bool, *train: str) -> UsoPolicy:
    policy = make_policy(*(train or ("lora", "projector")))
    policy.hold_base(base_dtype, offload=offload)
    return policy


def frozen_layers(policy: UsoPolicy) -> list[FrozenLinear]:
    return [module for module in policy.modules() if isinstance(module, FrozenLinear)]


def with_made_weights(policy: UsoPolicy, dtype: torch.dtype) -> UsoPolicy:
    """The same policy with plain layers, whose weights are those that the frozen ones stand for."""
    plain = make_policy(*policy.trained_parts)
    plain.cast_frozen(dtype)
    own = dict(plain.named_modules())
    for name, module in policy.named_modules():
        if isinstance(module, FrozenLinear):
            own[name].weight.data = made(module, dtype)
    return plain


def velocity_and_gradients(policy: UsoPolicy, checkpointing: bool = False) -> list[Tensor]:
    policy.enable_checkpointing(checkpointing)
    latents = noise_like_request(policy, range(len(EXAMPLES)), SIZE)
    velocity = velocities(policy.train(), EXAMPLES, latents.requires_grad_(), TIMES)
    wanted = [latents, *policy.trainable().values()]
    return [velocity, *torch.autograd.grad(velocity.square().sum(), wanted)]


@pytest.mark.parametrize(
    ("base_dtype", "offload", "checkpointing"),
    [("int8", False, False), ("bf16", True, False), ("fp32", True, True), ("int8", True, True)],
)
def test_velocity_and_gradients_are_those_of_the_weights_it_stands_for(
    base_dtype: str, offload: bool, checkpointing: bool
) -> None:
    policy = held_policy(base_dtype, offload)
    plain = with_made_weights(policy, torch.float32 if base_dtype == "fp32" else torch.bfloat16)
    assert list(policy.trainable()) == list(plain.trainable())
    for one, other in zip(*(velocity_and_gradients(p, checkpointing) for p in (policy, plain)), strict=True):
        assert other.abs().max() > 0
        assert torch.equal(one, other)


def test_all_of_the_blocks_is_one_byte_a_weight() -> None:
    policy, plain = held_policy("int8", False), make_policy("lora")
    own = dict(plain.named_modules())
    layers = {name: m for name, m in policy.named_modules() if isinstance(m, FrozenLinear)}
    assert layers
    for name, held in layers.items():
        assert held.weight.untyped_storage().nbytes() == own[name].weight.numel()
        assert held.scale.nbytes == 4 * len(own[name].weight)
    for block in (*policy.transformer.transformer_blocks, *policy.transformer.single_transformer_blocks):
        matrices = [name for name, p in block.named_parameters() if p.dim() > 1 and not p.requires_grad]
        assert not matrices
    assert policy.offloaded_bytes == 0
    assert not any(isinstance(module, FrozenLinear) for module in policy.vae.modules())


def test_what_is_offloaded_is_counted_and_copied_once_in_each_pass() -> None:
    policy = held_policy("bf16", True)
    held = frozen_layers(policy)
    assert policy.offloaded_bytes == sum(2 * m.in_features * m.out_features for m in held)
    assert not {m.weight.data_ptr() for m in held} & {t.data_ptr() for t in (*policy.parameters(), *policy.buffers())}
    latents = noise_like_request(policy, [0], SIZE)
    condition = policy.encode(EXAMPLES[:1])
    with copies([m.weight for m in held]) as counts, torch.no_grad():
        policy.velocity_fn(condition, mode="sample", image_size=SIZE)(latents, TIMES[:1])
    assert set(counts) == {1}


@FORMS
def test_a_lora_is_saved_as_from_any_base(eight_bit: bool, offload: bool, tmp_path: Path) -> None:
    make_policy("lora", "projector").save(tmp_path / "plain")
    held_policy("int8" if eight_bit else "bf16", offload).save(tmp_path / "held")
    for name in ("dit_lora.safetensors", "projector.safetensors"):
        expected, found = load_file(tmp_path / "plain" / name), load_file(tmp_path / "held" / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)


# -- training --


class Reports(list[StepReport]):
    def step(self, report: StepReport) -> None:
        self.append(report)


def trainer(folder: Path, num_steps: int, base_dtype: str, offload: bool) -> Trainer:
    policy = held_policy(base_dtype, offload, "lora")
    rollout = RolloutConfig.model_validate(
        {"image_size": [8, 8], "num_steps": 3, "window": {"kind": "refl", "entry_range": [1, 2]}}
    )
    objective = ObjectiveConfig.model_validate({"rewards": {"style": {"use": "toy", "weight": 0.5}}})
    learner = Learner(
        policy, Objective(objective, {"style": ToyReward()}), optimizer=OptimizerConfig(lr=1e-2), window=rollout.window
    )
    config = {"num_steps": num_steps, "batch_size": 2, "checkpoint_every": 0, "gradient_checkpointing": True}
    return Trainer(
        learner,
        InlinePool(RolloutWorker(policy)),
        PlainDataset(4),
        rollout=rollout,
        config=TrainConfig.model_validate(config),
        seed=0,
        folder=folder,
        reporter=Reports(),
    )


class PlainDataset(ToyDataset):
    """Prompts that the tests' tokenizer has, and no style."""

    def __getitem__(self, index: int) -> Any:
        return dataclasses.replace(super().__getitem__(index), prompt="a cat", style_refs=(), content_refs=())


@pytest.mark.parametrize("offload", [False, True])
def test_a_resumed_run_equals_the_uninterrupted_one(offload: bool, tmp_path: Path) -> None:
    form = ("int8", offload)
    whole = trainer(tmp_path / "whole", 3, *form)
    before = {name: parameter.clone() for name, parameter in whole.learner.policy.trainable().items()}
    whole.run()
    trainer(tmp_path / "part", 2, *form).run()
    resumed = trainer(tmp_path / "part", 3, *form)
    assert resumed.resume() == 2
    resumed.run()
    tensors, again = whole.learner.state()[0], resumed.learner.state()[0]
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    after = whole.learner.policy.trainable()
    assert any(not torch.equal(after[name], old) for name, old in before.items())
    (file,) = (path for path in (tmp_path / "whole").rglob("*.safetensors") if "step" in str(path.parent))
    saved = load_file(file)
    assert saved
    assert all(".lora_" in name and "base_layer" not in name for name in saved)


# -- what is refused --


@pytest.mark.parametrize("policy", [UsoPolicy, UnoPolicy])
@pytest.mark.parametrize(
    ("options", "named"), [({"base_dtype": "int8"}, "base_dtype: int8"), ({"offload": True}, "offload: true")]
)
def test_training_the_base_itself_is_refused_before_it_is_read(
    policy: Any, options: dict[str, Any], named: str
) -> None:
    for make in (policy.from_pretrained, policy.blueprint):
        with pytest.raises(ConfigError, match=rf"^{named} is for base weights that stay as they are, .*'transformer'"):
            make("/nowhere", train=("transformer",), **options)


def test_lora_layers_are_left_alone() -> None:
    policy = make_policy("lora")
    names = set(policy.trainable())
    hold_blocks(policy.transformer.transformer_blocks, eight_bit=True, offload=False)
    assert set(policy.trainable()) == names
    assert not any("lora_" in name for name, m in policy.named_modules() if isinstance(m, FrozenLinear))
