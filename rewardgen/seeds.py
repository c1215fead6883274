"""All randomness is derived, none is kept: a seed is a function of what it is for."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """Return a seed in [0, 2**63) that depends on every part and its order.

    The engine calls it as `derive_seed(run_seed, purpose, step, example_id, sample)`. With no generator that lives
    longer than one use there is no state to save, and a resumed run equals the uninterrupted one.

    Raises:
        TypeError: a part that is neither int nor str, whose `repr` could differ between processes.
    """
    for part in parts:
        if type(part) not in (int, str):
            raise TypeError(f"seeds derive from int and str, not from {type(part).__name__}")
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_globals(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch.

    The engine draws from none of them. The trainer calls this at each step for plug-ins that do, so that they too
    draw the same after a resume.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
