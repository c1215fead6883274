"""The base of every configuration class: frozen, strict about keys, documented by docstrings under its fields."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer


class Settings(BaseModel):
    """A section of an experiment. It lives in the file of what it configures."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class SparseSettings(Settings):
    """Settings whose `sparse` fields are written out only where they differ from their default.

    Fields that came later thus leave the resolved configuration of older experiments, and its hash, as they were.
    """

    sparse: ClassVar[frozenset[str]] = frozenset()

    def _left_out(self) -> set[str]:
        fields = type(self).model_fields
        return {name for name in self.sparse if getattr(self, name) == fields[name].default}

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        left_out = self._left_out()
        return {name: value for name, value in write(self).items() if name not in left_out}


class Plugin(Settings):
    """A class or function named in an experiment, and its arguments."""

    use: str
    """`csd` (a file of the matching folder), `package.module:Class`, `./file.py:Class`, an entry point's name, or, for
    a reward, a function in place of the class."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the constructor or function, checked against its signature before anything is loaded."""
