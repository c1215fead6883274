"""Examples read by a thread of their own while the step before them runs.

What is read is a function of the step, so that nothing has to be remembered of how far the thread is: a resumed run
asks for the step that it is at, and what was read ahead of a run that ended is lost.

Only datasets that say `read_ahead = True` are read this way. They promise to draw nothing from the global generators
of Python, NumPy and torch, which belong to the step that is running. Two threads never read at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from threading import Event, Thread

from torch import Tensor

from rewardgen.types import Example

MAX_BYTES = 2 << 30
"""Of pictures read ahead; what is beyond is read by whoever takes the examples."""
PATIENCE = 5.0
"""Seconds that an end waits for the picture that is just being read."""


class Reading:
    """Examples being read in order.

    An exception is kept, and raised for whoever takes the examples: at the step that needs them, as it was.

    Args:
        read: the example at an index.
        indices: which, in order.
        prepare: called in the thread with each example that was read. What it raises is passed over: it only warms
            what the step does again, and there an error comes up.
        max_bytes: see `MAX_BYTES`.
    """

    def __init__(
        self,
        read: Callable[[int], Example],
        indices: Sequence[int],
        *,
        prepare: Callable[[Example], None],
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.indices = tuple(indices)
        self._read, self._prepare, self._max_bytes = read, prepare, max_bytes
        self._found: list[Example] = []
        self._error: BaseException | None = None
        self._stopped, self._done = Event(), Event()
        # A daemon, for no thread of ours may hold up the end of the process.
        Thread(target=self._run, name="rewardgen-read-ahead", daemon=True).start()

    def _run(self) -> None:
        held = 0
        try:
            for index in self.indices:
                if self._stopped.is_set() or held > self._max_bytes:
                    break
                example = self._read(index)
                self._found.append(example)
                held += _size(example)
                with contextlib.suppress(Exception):
                    self._prepare(example)
        except BaseException as error:  # whatever it is, it belongs to another thread
            self._error = error
        finally:
            self._done.set()

    def take(self) -> list[Example]:
        """All examples, in order; reads here what the thread left. Raises what the dataset raised."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._found + [self._read(index) for index in self.indices[len(self._found) :]]

    def stop(self, patience: float | None = None) -> None:
        """Read no further; wait for what is just being read, at most so many seconds."""
        self._stopped.set()
        self._done.wait(patience)


def _size(example: Example) -> int:
    pictures: list[Tensor | None] = [*example.content_refs, *example.style_refs, *example.identity_refs, example.target]
    return sum(picture.nbytes for picture in pictures if picture is not None)
