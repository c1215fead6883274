"""What runs inside each process of a group (`group.py`): an actor with threads, and what it prints."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from rewardgen import interrupt
from rewardgen.fleet import cluster
from rewardgen.fleet.replica import Place, Surroundings, versions

_WORDS_SECONDS = 5.0
"""How long something to be printed is waited for."""


class Member:
    """A Ray actor with threads: one runs the program, others answer meanwhile."""

    def __init__(self, surroundings: Surroundings) -> None:
        surroundings.enter()  # before anything of the user's is imported
        self._surroundings = surroundings
        self._said = Relay(sys.stdout)

    def meet(self) -> tuple[Place, str, int]:
        """Where this process is, its machine's address, and a port that is free there."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            port = int(listener.getsockname()[1])
        place = Place(host=platform.node(), pid=os.getpid(), versions=versions())
        return place, str(cluster.load_ray().util.get_node_ip_address()), port

    def run(self, program: Callable[[], Any], environment: Mapping[str, str]) -> Any:
        """Run the program; what the first process prints can be read by `said` meanwhile."""
        os.environ.update(environment)
        self._surroundings.enter()  # torch has some of it for each thread
        with contextlib.ExitStack() as stack:
            stack.callback(self._said.finish)
            if environment["RANK"] == "0":
                stack.enter_context(contextlib.redirect_stdout(self._said))
                stack.enter_context(contextlib.redirect_stderr(self._said))
            return program()

    def said(self) -> str:
        """What was printed since the last call; waits a while for something."""
        return self._said.take(_WORDS_SECONDS)

    def stop(self) -> None:
        """Let the run finish its step, save and end, as a signal would."""
        interrupt.ASKED.set()


class Relay(io.TextIOBase):
    """A stream that keeps what is written until it is taken, and also passes it on."""

    def __init__(self, inner: TextIO) -> None:
        self._inner = inner
        self._parts: list[str] = []
        self._finished = False
        self._changed = threading.Condition()

    def write(self, text: str) -> int:
        """See `TextIOBase.write`."""
        with self._changed:
            self._parts.append(text)
            self._changed.notify_all()
        return self._inner.write(text)

    def flush(self) -> None:
        """See `IOBase.flush`."""
        self._inner.flush()

    def finish(self) -> None:
        """No more is to be waited for."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def take(self, seconds: float) -> str:
        """What was written since the last time; waits up to `seconds` for something."""
        with self._changed:
            self._changed.wait_for(lambda: self._parts or self._finished, seconds)
            text = "".join(self._parts)
            self._parts.clear()
        return text
