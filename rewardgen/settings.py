"""The base of every configuration class: frozen, strict about keys, documented by docstrings under its fields."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """A section of an experiment. It lives in the file of what it configures."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Plugin(Settings):
    """A class named in an experiment, and the arguments of its constructor."""

    use: str
    """`csd` (a file of the matching folder), `package.module:Class`, or `./file.py:Class`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the constructor, checked against its signature before anything is loaded."""
