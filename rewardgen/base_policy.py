"""The policy that a run began with: the same network with the trained parameters as they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rewardgen.errors import CheckpointError
from rewardgen.sharding import gathered, part, part_of

_PREFIX = "base/"


class BasePolicy:
    """Keeps a copy of the trained parameters and lends it to the policy.

    What is frozen is the same before and after training, so that this is all that the policy was, whether its
    trained parameters are a LoRA or all of it. The copy travels in checkpoints: a fresh LoRA was drawn at random, and
    a resumed run could not draw it again.

    Args:
        parameters: trained parameters by name, as they are at the start. Of sharded ones each process keeps its part.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        self._kept = {name: part(parameter).detach().clone() for name, parameter in parameters.items()}

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """While the block lasts the policy is what it was at the start. Not for use between forward and backward."""
        own = {name: part(parameter).detach().clone() for name, parameter in self._parameters.items()}
        self._copy(self._kept)
        try:
            yield
        finally:
            self._copy(own)

    def state(self) -> dict[str, Tensor]:
        """The kept parameters by name, for a checkpoint; where they are sharded all processes must call it."""
        return {f"{_PREFIX}{name}": gathered(self._parameters[name], kept) for name, kept in self._kept.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore `state()`.

        Raises:
            CheckpointError: a tensor is missing or of another shape.
        """
        for name, parameter in self._parameters.items():
            found = tensors.get(f"{_PREFIX}{name}")
            if found is None or found.shape != parameter.shape:
                shape = "is missing" if found is None else f"has shape {list(found.shape)}"
                raise CheckpointError(
                    f"the checkpoint's tensor '{_PREFIX}{name}' {shape}; objective.policy_gradient.beta must stay"
                    " above 0, or 0, as it was"
                )
            self._kept[name].copy_(part_of(parameter, found))

    def _copy(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                part(self._parameters[name]).copy_(value)


def split_state(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a checkpoint without those of a `BasePolicy`, and these."""
    ours = {name: tensor for name, tensor in tensors.items() if name.startswith(_PREFIX)}
    return {name: tensor for name, tensor in tensors.items() if name not in ours}, ours
