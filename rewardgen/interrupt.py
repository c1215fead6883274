"""Ends before the end: a request to stop, by signal, honoured between steps; and what is said of how to go on."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rewardgen.checkpoint import checkpoint_step, latest_checkpoint
from rewardgen.errors import ConfigError, NonFiniteError, UserError

_DISK = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.ENOSPC,
    errno.EPERM,
    errno.EROFS,
}
"""Faults of the place that a run is written to; what else may raise an OSError (a network, say) stays as it is."""


ASKED = threading.Event()
"""Set by whoever owns the main thread: a run in another thread, where no signal arrives, is to end as if by one."""


@contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; after it the signals act as before."""
    stopped = threading.Event()
    # Only the main thread may handle signals; elsewhere whoever owns it decides.
    if threading.current_thread() is not threading.main_thread():
        yield ASKED
        return
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in former.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        stopped.set()
        restore()
        # Not print: its buffer may be in use at the moment of the signal.
        os.write(2, b"\nfinishing the step, then saving a checkpoint; once more stops at once\n")

    for number in former:
        signal.signal(number, handle)
    try:
        yield stopped
    finally:
        restore()


@contextmanager
def resumable(checkpoints: Path, command: str) -> Iterator[None]:
    """Whatever ends the block early says also how to go on from the last whole checkpoint, if there is one.

    Args:
        checkpoints: the run's folder of checkpoints.
        command: what resumes the run.

    Raises:
        UserError: as it came, with that said. A full disk or a folder that may not be written becomes one. A
            ConfigError and a NonFiniteError pass as they are: the same command would meet them again.
    """
    try:
        yield
    except (ConfigError, NonFiniteError):
        raise
    except UserError as error:
        error.args = (f"{error}{_how_to_go_on(checkpoints, command)}",)
        raise
    except OSError as error:
        # Closing a file that could not be written fails once more; the first fault is the one to tell.
        told: BaseException | None = error
        while told is not None and not isinstance(told, UserError):
            told = told.__context__
        if told is None and error.errno not in _DISK:
            raise
        fault = told or f"{error.filename or checkpoints.parent}: {error.strerror}"
        raise UserError(f"{fault}{_how_to_go_on(checkpoints, command)}") from error
    except KeyboardInterrupt:
        sys.stderr.write(_how_to_go_on(checkpoints, command).removeprefix("; ") + "\n")
        raise


def _how_to_go_on(checkpoints: Path, command: str) -> str:
    path = latest_checkpoint(checkpoints)
    return "" if path is None else f"; go on from step {checkpoint_step(path)} with: {command}"
