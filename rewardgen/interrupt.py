"""A request to stop, by signal, honoured between steps."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; after it the signals act as before."""
    stopped = threading.Event()
    # Only the main thread may handle signals; elsewhere whoever owns it decides.
    if threading.current_thread() is not threading.main_thread():
        yield stopped
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
