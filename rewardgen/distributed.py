"""Several processes that train one policy: who they are, where they meet, and how they end together.

`torchrun` or `accelerate launch` starts them and says in the environment how many there are; accelerate's process
state makes the process group and gives each its device. Each has its own share of a step's examples, and what it
found is summed over all of them (see `Learner`): the step is the one that a single process makes with so many times
the accumulation.

Gradients are summed by an explicit reduction at the end of the step, not by the hooks of
`DistributedDataParallel`: those fire in `backward()` and average. The learner differentiates each term by itself, and
the number of valid examples that a term is divided by is known only when all processes have scored theirs.

Before anything collective all processes meet in a small exchange on the CPU. One that failed says so there, and all
stop, where otherwise the others would wait for it until a timeout.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from rewardgen.errors import ConfigError, UserError

Strategy: TypeAlias = Literal["ddp", "fsdp"]

PATIENCE = timedelta(hours=2)
"""How long a process waits at a meeting: the first one may be evaluating. One that died is noticed at once."""
_COLLECTIVE = timedelta(minutes=10)
"""How long a collective operation may take. It follows a meeting, so that all begin it together."""
_FAREWELL = timedelta(seconds=60)
"""How long a failed process waits to tell the others; where they do not come, they see its death."""
_BUCKET_BYTES = 32 * 2**20


class ProcessError(UserError):
    """Another process of the run failed or is gone, or the processes do different things.

    `lost`: the connection to it broke, and it could not say why.
    """

    lost = False


class Processes:
    """The processes of a run, seen from one of them. Without arguments: the only one.

    Args:
        rank: this process's number, from 0. The first alone writes files, prints, and evaluates where it can alone.
        size: number of processes.
        device: where this process computes; None leaves it to the run's configuration.
        control: process group on the CPU for meetings; needed for more than one.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        device: torch.device | None = None,
        control: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self.lost = False
        self._control = control

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def exchange(self, topic: str, value: Any = None) -> list[Any]:
        """Wait for all processes; returns what each one brought, by rank.

        Args:
            topic: what the meeting is for; all must name the same.
            value: anything that JSON can say; floats come through exactly.

        Raises:
            ProcessError: another process failed, is gone, or came for something else.
        """
        if self.size == 1:
            return [value]
        said = self._all_say({"topic": topic, "value": value}, PATIENCE)
        for rank, other in enumerate(said):
            if "error" in other:
                raise ProcessError(f"stopped, because process {rank} failed: {other['error']}")
        topics = [other["topic"] for other in said]
        if len(set(topics)) > 1:
            doing = ", ".join(f"process {rank} at '{found}'" for rank, found in enumerate(topics))
            raise ProcessError(
                f"the processes are out of step: {doing}. Under fsdp all must call the policy equally often; where"
                " examples differ in the number and size of their references, use train.batch_size 1"
            )
        return [other["value"] for other in said]

    def announce(self, error: Exception) -> None:
        """Tell the others, at their next meeting, that this process fails. Not for what they know already."""
        if self.size > 1 and not self.lost and not isinstance(error, ProcessError):
            with contextlib.suppress(ProcessError):
                self._all_say({"error": f"{type(error).__name__}: {error}"}, _FAREWELL)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, which have tensors of the same shapes and order."""
        if self.size == 1:
            return
        from accelerate.utils import reduce

        for bucket in _buckets(tensors):
            summed = reduce(torch.cat([tensor.flatten() for tensor in bucket]), reduction="sum")
            for tensor, part in zip(bucket, summed.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def copy_from_first_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by the first process's."""
        if self.size == 1:
            return
        from accelerate.utils import broadcast

        for tensor in tensors:
            sent = tensor.detach().to(self.device).clone(memory_format=torch.contiguous_format)
            with torch.no_grad():
                tensor.copy_(broadcast(sent, from_process=0))

    def _all_say(self, message: dict[str, Any], patience: timedelta) -> list[dict[str, Any]]:
        data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        lengths = [int(length) for length in self._all_gather(torch.tensor([len(data)]), patience)]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(data)] = data
        rows = self._all_gather(padded, patience)
        return [json.loads(bytes(row[:length].tolist())) for row, length in zip(rows, lengths, strict=True)]

    def _all_gather(self, tensor: Tensor, patience: timedelta) -> list[Tensor]:
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        try:
            work = dist.all_gather(gathered, tensor, group=self._control, async_op=True)
            work.wait(patience)
        except RuntimeError as error:
            self.lost = True
            reason = str(error).strip().splitlines()[0]
            fault = ProcessError(
                f"process {self.rank} lost the others: one ended, or did not come within {patience}; its own output"
                f" says why ({reason})"
            )
            fault.lost = True
            raise fault from error
        return gathered


@contextmanager
def launched(device: torch.device, strategy: Strategy = "ddp") -> Iterator[Processes]:
    """The processes that a launcher started, for the length of the block; without a launcher one, and nothing is done.

    Whatever ends the block in one process ends it in all. Not for use twice at a time.

    Args:
        device: the run's; several processes take the GPUs of their machine in order, or share its CPU.

    Raises:
        ConfigError: a device that several processes cannot have, or `fsdp` for a single one.
        ProcessError: another process failed or is gone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if strategy == "fsdp":
            raise ConfigError(
                "train.strategy: fsdp needs several processes: start with `torchrun --nproc-per-node N -m rewardgen"
                " train ...`, or set ddp, which one process may have too"
            )
        yield Processes()
        return
    _check_device(device)
    from accelerate import PartialState

    options = {"backend": "gloo"} if device.type == "cpu" else {}
    state = PartialState(cpu=device.type == "cpu", timeout=_COLLECTIVE, **options)
    control = dist.new_group(backend="gloo", timeout=PATIENCE)
    processes = Processes(state.process_index, state.num_processes, device=state.device, control=control)
    try:
        yield processes
        processes.exchange("the end")
    except Exception as error:
        processes.announce(error)
        raise
    else:
        # Only where all have come to the end: what is left of a broken group goes with its processes.
        state.destroy_process_group()
        PartialState._reset_state()


def _check_device(device: torch.device) -> None:
    if "RANK" not in os.environ:
        raise ConfigError("WORLD_SIZE asks for several processes, but RANK does not say which this is; use torchrun")
    if ":" in str(device):
        raise ConfigError(f"train.device: several processes cannot all have '{device}'; use auto, cuda or cpu")
    local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if device.type == "cuda" and local >= there:
        raise ConfigError(f"there are more processes on this machine than its {there} GPUs; start fewer")


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one dtype, each of some megabytes: many small reductions cost more than one."""
    bucket: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or filled + tensor.nbytes > _BUCKET_BYTES):
            yield bucket
            bucket, filled = [], 0
        bucket.append(tensor)
        filled += tensor.nbytes
    if bucket:
        yield bucket
