"""The last layers of reward models: linear maps, one after another, to a single number."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn

from rewardgen.errors import CheckpointError
from rewardgen.rewards.loading import check_tensors, size_of


def linear_head(what: str, tensors: Mapping[str, Tensor], prefix: str, inputs: int) -> nn.Sequential:
    """Linear layers with the places in a sequence that their names say, from features [..., inputs] to [..., 1].

    Both released heads have nothing but dropout between their layers, which plays no part when scoring.

    Args:
        what: the file, for messages.
        tensors: `{prefix}{place}.weight` and `.bias`, and nothing else that begins with the prefix.
        prefix: of the names, with its dot.
        inputs: length of a feature.

    Raises:
        CheckpointError: a tensor is missing, unknown, not finite, or does not fit its neighbours.
    """
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    places = sorted({int(name.split(".")[0]) for name in found if name.split(".")[0].isdigit()})
    if not places:
        raise CheckpointError(f"{what} lacks the tensor '{prefix}0.weight'")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    expected: dict[str, tuple[int, ...]] = {}
    before = inputs
    for place in places:
        outputs, _ = size_of(what, tensors, f"{prefix}{place}.weight", 2)
        outputs = 1 if place == places[-1] else outputs
        layers[str(place)] = nn.Linear(before, outputs)
        expected |= {f"{place}.weight": (outputs, before), f"{place}.bias": (outputs,)}
        before = outputs
    check_tensors(
        what,
        {prefix + name: tensor for name, tensor in found.items()},
        {prefix + name: shape for name, shape in expected.items()},
    )
    head = nn.Sequential(layers)
    head.load_state_dict({name: tensor.float() for name, tensor in found.items()})
    return head.eval()
