"""The base of every configuration class: frozen, strict about keys, documented by docstrings under its fields."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """A section of an experiment. It lives in the file of what it configures."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Plugin(Settings):
    """A class or function named in an experiment, and its arguments."""

    use: str
    """`csd` (a file of the matching folder), `package.module:Class`, `./file.py:Class`, an entry point's name, or, for
    a reward, a function in place of the class."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the constructor or function, checked against its signature before anything is loaded."""
