"""A decoder with its channels last: the same pictures and gradients, and really that layout inside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewardgen.policies.uso import UsoPolicy
from rewardgen.policy import noise_like_request
from tests.test_uso_policy import EXAMPLES, SIZE, make_policy, picture

TOLERANCE = 1e-5
"""Sums of a convolution in another order, in float32."""


def decoded(policy: UsoPolicy) -> tuple[Tensor, Tensor, list[bool]]:
    """Pictures, the gradient of a function of them, and for each convolution whether its input had channels last."""
    layouts: list[bool] = []

    def note(_conv: nn.Module, args: tuple[Tensor, ...]) -> None:
        layouts.append(args[0].is_contiguous(memory_format=torch.channels_last) and not args[0].is_contiguous())

    convs = [module for module in policy.vae.decoder.modules() if isinstance(module, nn.Conv2d)]
    hooks = [conv.register_forward_pre_hook(note) for conv in convs]
    latents = noise_like_request(policy, [3, 4], SIZE).requires_grad_()
    pixels = policy.decode(latents, SIZE)
    (gradient,) = torch.autograd.grad(pixels.square().sum(), latents)
    for hook in hooks:
        hook.remove()
    assert len(layouts) >= len(convs) > 5
    assert pixels.is_contiguous() or not policy.decoder_channels_last  # the layout that rewards know
    return pixels.detach(), gradient, layouts


@pytest.mark.parametrize("checkpointing", [False, True])
def test_pictures_and_gradients_agree_and_every_convolution_sees_channels_last(checkpointing: bool) -> None:
    usual, last = make_policy("lora"), make_policy("lora", decoder_channels_last=True)
    for policy in (usual, last):
        policy.cast_frozen(torch.float32)  # as `from_pretrained` does at the end
        policy.enable_checkpointing(checkpointing)
        policy.train()
    expected, expected_gradient, layouts = decoded(usual)
    assert not layouts[0]
    assert not all(layouts)  # some are by chance, behind the decoder's attention
    found, gradient, layouts = decoded(last)
    assert all(layouts)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(
        gradient, expected_gradient, rtol=TOLERANCE, atol=TOLERANCE * float(gradient.abs().max())
    )


def test_encodings_are_the_same_bit_for_bit() -> None:
    usual, last = make_policy("lora"), make_policy("lora", decoder_channels_last=True)
    pixels = picture(7, *SIZE)[None]
    assert torch.equal(usual.encode_pixels(pixels), last.encode_pixels(pixels))
    for one, other in zip(usual.encode(EXAMPLES).references_B, last.encode(EXAMPLES).references_B, strict=True):
        assert all(torch.equal(a.tokens_NP, b.tokens_NP) for a, b in zip(one, other, strict=True))
