"""The one event loop of a process in which `async` reward functions run, beside whatever the process does meanwhile."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections.abc import Awaitable
from concurrent.futures import Future
from typing import Any

import torch


def start(answer: Awaitable[Any]) -> Future[Any]:
    """Begin to run a coroutine, whether or not the caller is itself inside an event loop. Its end is in the future."""

    async def run() -> Any:
        return await answer

    return asyncio.run_coroutine_threadsafe(run(), _event_loop(os.getpid()))


@functools.cache
def _event_loop(_process: int) -> asyncio.AbstractEventLoop:
    """One event loop for each process, in a thread of its own.

    It is kept: a function that keeps an HTTP client between calls needs the loop in which it made the client.
    """
    loop = asyncio.new_event_loop()

    def serve() -> None:
        torch.set_grad_enabled(False)  # the mode belongs to the thread
        asyncio.set_event_loop(loop)
        loop.run_forever()

    threading.Thread(target=serve, name="rewardgen-async-rewards", daemon=True).start()
    return loop
