"""Attention back ends: the named one runs, computes what the others do, and is refused where it cannot train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rewardgen.errors import ConfigError
from rewardgen.policies.attention import check_backend
from rewardgen.policies.uno import UnoPolicy
from rewardgen.policies.uso import UsoPolicy
from rewardgen.policy import noise_like_request
from tests.test_uso_policy import EXAMPLES, SIZE, TIMES, make_policy

REGISTRY = attention_dispatch._AttentionBackendRegistry


class Kernels(TorchDispatchMode):
    """Counts calls of torch's fused attention on the CPU."""

    fused = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.fused += func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


def velocity_and_gradients(policy: UsoPolicy) -> tuple[list[Tensor], int]:
    latents = noise_like_request(policy, range(len(EXAMPLES)), SIZE)
    velocity_fn = policy.velocity_fn(policy.encode(EXAMPLES), mode="sample", image_size=SIZE)  # encoders attend too
    with Kernels() as kernels:
        velocity = velocity_fn(latents, TIMES)
    return [velocity.detach(), *torch.autograd.grad(velocity.square().sum(), [*policy.trainable().values()])], (
        kernels.fused
    )


def test_every_back_end_of_the_cpu_gives_the_same_velocity_and_gradients() -> None:
    expected, fused = velocity_and_gradients(make_policy("lora"))
    assert fused > 0
    for name, is_fused in (("native", True), ("_native_math", False), ("_native_flash", True)):
        found, calls = velocity_and_gradients(make_policy("lora", attention=name))
        assert (calls > 0) == is_fused, name
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        # It is one policy's choice: the next one without has diffusers' own again.
        assert velocity_and_gradients(make_policy("lora"))[1] > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flashh", r"attention: 'flashh' is no back end of diffusers\. Did you mean 'flash'\?"),
        ("quick", r"'quick' is no back end of diffusers\. It knows: flash, .*native"),
        ("sage", r"'sage' has no backward pass, so nothing would be trained; use flash or native"),
        ("flash", r"'flash' cannot be used here: .*install `flash-attn"),
        ("xformers", r"'xformers' cannot be used here: .*install `xformers"),
        ("_native_cudnn", r"'_native_cudnn' on cpu in float32 does not run: .*; leave `attention` out"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_read(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", False)
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_XFORMERS_ATTN", False)
    for policy in (UsoPolicy, UnoPolicy):
        with pytest.raises(ConfigError, match=message) as refused:
            policy.from_pretrained("/nothing/is/here", attention=name)
        assert "\n" not in str(refused.value)


def test_a_plan_knows_the_names_and_needs_no_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", False)
    check_backend("flash", here=False)
    for policy in (UsoPolicy, UnoPolicy):
        with pytest.raises(ConfigError, match="Did you mean 'flash'"):
            policy.blueprint("/nothing/is/here", attention="flashh")


def stand_in(monkeypatch: pytest.MonkeyPatch, compute: Any) -> None:
    """Put another function in the place of diffusers' `flex`."""
    flex = AttentionBackendName.FLEX
    monkeypatch.setitem(REGISTRY._backends, flex, compute)
    monkeypatch.setitem(REGISTRY._supported_arg_names, flex, {"query", "key", "value"})


def torchs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out: Tensor = dispatch_attention_fn(query, key, value, backend=AttentionBackendName.NATIVE)
    return out


def test_a_back_end_without_gradient_or_with_another_result_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, lambda query, key, value: torchs(query, key, value).detach())
    with pytest.raises(ConfigError, match=r"'flex' on cpu in float32 does not run: .*does not require grad"):
        check_backend("flex")
    stand_in(monkeypatch, lambda query, key, value: torchs(query.detach() + 0 * query, key, value))
    with pytest.raises(ConfigError, match="its gradient of the queries is 100 % away from torch's"):
        check_backend("flex")
    stand_in(monkeypatch, lambda query, key, value: torchs(2 * query, key, value))
    with pytest.raises(ConfigError, match=r"its output is \d+ % away"):
        check_backend("flex")


def test_it_is_tried_again_in_the_precision_it_is_used_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_float32_alone(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.dtype != torch.float32:
            raise RuntimeError("no kernel for this dtype\nand much more")
        return torchs(query, key, value)

    stand_in(monkeypatch, in_float32_alone)
    policy = make_policy("lora", attention="flex")
    velocity_and_gradients(policy)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ConfigError, match="'flex' on cpu in bfloat16 does not run: no kernel for this dtype; leave"),
    ):
        velocity_and_gradients(policy)


def test_queries_and_keys_come_in_the_precision_of_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast on CUDA makes float32 of normalised queries and keys; here the norms do so themselves."""
    seen: set[tuple[torch.dtype, ...]] = set()

    def noting(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen.add((query.dtype, key.dtype, value.dtype))
        return torchs(query, key, value)

    stand_in(monkeypatch, noting)
    policy = make_policy("lora", attention="flex")
    policy.cast_frozen(torch.bfloat16)
    forward = torch.nn.RMSNorm.forward
    monkeypatch.setattr(torch.nn.RMSNorm, "forward", lambda self, x: forward(self, x).float())
    seen.clear()
    velocity_and_gradients(policy)
    assert seen == {(torch.bfloat16,) * 3}
