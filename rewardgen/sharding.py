"""FSDP2: each process holds a part of every block of a policy, and of what the optimizer keeps for it.

`torch.distributed.fsdp.fully_shard` is called here and not by accelerate, which on a CPU falls back to whole copies
without a word. A sharded parameter is a DTensor; its *part* is the plain tensor that this process holds, and the
optimizer works on parts alone. A block is gathered when it runs and freed after; the gradient of its parameters is
summed over the processes and scattered to their parts in the backward pass.

That pass must be `backward()`. `torch.autograd.grad` knows nothing of the shards: what a block computes with is the
gathered parameter, and the gradient reaches the shard only through FSDP's hooks, as `.grad`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rewardgen.distributed import Processes, Strategy
from rewardgen.errors import ConfigError
from rewardgen.policy import Mode, Policy
from rewardgen.types import Condition, Example, VelocityFn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def spread(policy: Policy, processes: Processes, strategy: Strategy) -> Policy:
    """Make a policy one of several processes: all get the first's trained weights, and under `fsdp` shards of blocks.

    Args:
        policy: as loaded, alike in all processes but for what a fresh initialisation drew.
        processes: all of them; for the only one nothing changes.

    Raises:
        ConfigError: a policy that cannot be sharded.
    """
    if processes.size == 1:
        return policy
    processes.exchange("the first weights")
    processes.copy_from_first_(list(policy.trainable().values()))
    return ShardedPolicy(policy, processes) if strategy == "fsdp" else policy


class ShardedPolicy(Policy):
    """A policy whose blocks are sharded over the processes; all else of it is whole in each.

    The blocks are the modules of the classes that a model with trained parameters names in `_no_split_modules`, as
    those of diffusers and transformers do; in FLUX.1 they hold more than 99 % of the transformer. They must be run
    through their `forward`, equally often in each process and only within a velocity. The same pictures drawn by all
    processes, as in an evaluation, are such a use; a picture drawn by one process is not.

    Args:
        policy: on the CPU or on the device; its trained parameters must be equal in all processes.
        processes: all of them; more than one.

    Raises:
        ConfigError: the policy has no such blocks.
    """

    def __init__(self, policy: Policy, processes: Processes) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        super().__init__()
        blocks = _blocks(policy)
        if not blocks:
            raise ConfigError(
                "train.strategy: fsdp shards the blocks that a model names in `_no_split_modules`;"
                f" {type(policy).__name__} has none with trained parameters: use ddp"
            )
        device = processes.device or torch.device("cpu")
        mesh = init_device_mesh(device.type, (processes.size,))
        for block in blocks:
            _shard(block, mesh)
        whole = [name for block in blocks for name, p in block.named_parameters() if not is_shard(p)]
        if whole:
            raise RuntimeError(f"fully_shard left {len(whole)} parameters whole, such as '{whole[0]}': no FSDP")
        self.inner = policy.to(device)
        self._root = _Root(blocks)
        fully_shard(self._root, mesh=mesh)
        # Parameters get their final memory when they are first gathered; parts taken before would be stale copies.
        for block in (self._root, *blocks):
            assert isinstance(block, FSDPModule)
            block.unshard()
            block.reshard()
        self._is_first = processes.is_first
        # Before FSDP's own hook, which gathers: who comes for something else, or failed, is noticed and not waited for.
        blocks[0].register_forward_pre_hook(lambda *_: _meet(processes), prepend=True)

    def encode(self, examples: Sequence[Example]) -> Condition:
        """See `Policy.encode`."""
        return self.inner.encode(examples)

    def read_encodings(self, examples: Sequence[Example]) -> None:
        """See `Policy.read_encodings`."""
        self.inner.read_encodings(examples)

    def velocity_fn(self, condition: Condition, *, mode: Mode, image_size: tuple[int, int]) -> VelocityFn:
        """See `Policy.velocity_fn`."""
        inner = self.inner.velocity_fn(condition, mode=mode, image_size=image_size)

        def velocity(latents_BLC: Tensor, t_B: Tensor) -> Tensor:
            velocity_BLC: Tensor = self._root(inner, latents_BLC, t_B)
            return velocity_BLC

        return velocity

    def sigmas(self, num_steps: int, image_size: tuple[int, int]) -> Tensor:
        """See `Policy.sigmas`."""
        return self.inner.sigmas(num_steps, image_size)

    def training_sigmas(self, image_size: tuple[int, int]) -> Tensor:
        """See `Policy.training_sigmas`."""
        return self.inner.training_sigmas(image_size)

    def latent_shape(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """See `Policy.latent_shape`."""
        return self.inner.latent_shape(image_size)

    def encode_pixels(self, pixels_B3HW: Tensor) -> Tensor:
        """See `Policy.encode_pixels`."""
        return self.inner.encode_pixels(pixels_B3HW)

    def decode(self, latents_BLC: Tensor, image_size: tuple[int, int]) -> Tensor:
        """See `Policy.decode`."""
        return self.inner.decode(latents_BLC, image_size)

    def compile_blocks(self, **options: Any) -> None:
        """See `Policy.compile_blocks`."""
        self.inner.compile_blocks(**options)

    def enable_checkpointing(self, enabled: bool = True) -> None:
        """See `Policy.enable_checkpointing`."""
        self.inner.enable_checkpointing(enabled)

    def trainable(self) -> dict[str, nn.Parameter]:
        """See `Policy.trainable`; those of blocks are DTensors."""
        return self.inner.trainable()

    def save(self, folder: Path) -> Mapping[str, Path]:
        """See `Policy.save`. All processes must call it; the first writes."""
        with self._gathered():
            return self.inner.save(folder) if self._is_first else {}

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """While the block lasts the first process has whole trained parameters on the CPU in the shards' places."""
        owners = {id(p): (module, key) for module in self.inner.modules() for key, p in module._parameters.items()}
        swapped: list[tuple[nn.Module, str, Any]] = []
        try:
            for parameter in self.trainable().values():
                if is_shard(parameter):
                    whole = gathered(parameter, part(parameter))
                    if self._is_first:
                        module, key = owners[id(parameter)]
                        swapped.append((module, key, parameter))
                        module._parameters[key] = nn.Parameter(whole)
            yield
        finally:
            for module, key, parameter in swapped:
                module._parameters[key] = parameter


class _Root(nn.Module):
    """What FSDP takes for the model: it has no parameters but the blocks', and runs whatever velocity it is given.

    It lets the blocks' communication overlap, and ends each backward pass.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, velocity: VelocityFn, latents_BLC: Tensor, t_B: Tensor) -> Tensor:
        return velocity(latents_BLC, t_B)


def is_shard(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor. Their module takes seconds to import; without it there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def part(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter, sharing its memory; all of one that is not sharded."""
    if is_shard(parameter):
        held: Tensor = parameter.to_local().detach()
        return held
    return parameter


def gathered(parameter: Tensor, held: Tensor) -> Tensor:
    """The whole of which the processes hold parts, as `parameter` is parted.

    All processes must call it. The first gets the whole on the CPU, the others nothing (a tensor of size 0): together
    the parts may not fit into one device. What is not sharded comes back as it is.
    """
    if not is_shard(parameter):
        return held
    mesh, placements = parameter.device_mesh, parameter.placements
    from torch.distributed.tensor import DTensor

    parts = DTensor.from_local(
        held, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    whole: Tensor = parts.full_tensor()
    return whole.cpu() if mesh.get_rank() == 0 else torch.empty(0)


def part_of(parameter: Tensor, whole: Tensor) -> Tensor:
    """This process's part of a whole that all have, as `parameter` is parted. Nothing is sent."""
    if not is_shard(parameter):
        return whole
    from torch.distributed.tensor import distribute_tensor

    parts = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    held: Tensor = parts.to_local()
    return held


def differentiate(
    output: Tensor, parameters: Sequence[nn.Parameter], grad_output: Tensor | None = None, *, keep_graph: bool = False
) -> list[Tensor]:
    """As `rewardgen.gradients.differentiate`, for sharded parameters: one part of the gradient for each parameter.

    Shards' parts are summed over the processes, which must all call it; what is not sharded is this process's own.
    """
    for parameter in parameters:
        parameter.grad = None
    torch.autograd.backward(output, grad_output, retain_graph=keep_graph)
    gradient = []
    for parameter in parameters:
        grad, parameter.grad = parameter.grad, None
        gradient.append(torch.zeros_like(part(parameter)) if grad is None else part(grad))
    return gradient


def summing(parameters: Sequence[Tensor]) -> Callable[[Tensor], Tensor] | None:
    """What completes numbers found on parts, a vector of one for each parameter: sums those of shards over processes.

    None where nothing is sharded and the numbers are complete.
    """
    shards = [parameter for parameter in parameters if is_shard(parameter)]
    if not shards:
        return None
    group = shards[0].device_mesh.get_group()
    in_shards = torch.tensor([is_shard(parameter) for parameter in parameters])

    def complete(numbers: Tensor) -> Tensor:
        chosen = in_shards.to(numbers.device)
        summed = numbers.where(chosen, 0.0)
        dist.all_reduce(summed, group=group)
        return summed.where(chosen, numbers)

    return complete


def _blocks(policy: Policy) -> list[nn.Module]:
    trained = {id(parameter) for parameter in policy.trainable().values()}
    blocks: list[nn.Module] = []
    for model in policy.children():
        if any(id(parameter) in trained for parameter in model.parameters()):
            names = getattr(model, "_no_split_modules", None) or ()
            blocks += [module for module in model.modules() if type(module).__name__ in names]
    return blocks


def _shard(block: nn.Module, mesh: DeviceMesh) -> None:
    from torch.distributed.fsdp import fully_shard

    sharded: Any = fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # Gradients of sums are summed: the division by the number of valid examples comes later. Gloo can only sum.
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)


def _meet(processes: Processes) -> None:
    processes.exchange("a pass through the policy")
