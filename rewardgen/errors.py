"""Errors whose message is meant for the person at the keyboard: the thing, what is wrong, the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The command line prints the message alone, without a traceback, and exits with code 2."""


class ConfigError(UserError):
    """An experiment that cannot be run as written."""


class CheckpointError(UserError):
    """A weight or checkpoint file that is missing, damaged or of another layout."""


class NonFiniteError(UserError):
    """Losses or gradients stayed non-finite for too many steps in a row."""


class ClusterError(UserError):
    """A Ray cluster that cannot be reached, refuses, or cannot do what is asked of it."""


class ScoringError(UserError):
    """A reward failed more often than the experiment allows."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ' Did you mean X?' for the valid name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
