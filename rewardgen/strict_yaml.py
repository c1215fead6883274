"""YAML without its surprises: JSON's values only, no duplicate keys, anchors, tags or second documents.

`yes` and `on` are words, `010` and `1:30` are words, dates are words, and `1e-3` is a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from rewardgen.errors import ConfigError

Lines = dict[tuple[str, ...], int]
"""Key path -> line number in the file, from 1."""

_PREFIX = "tag:yaml.org,2002:"
_SCALARS = {
    "bool": (re.compile(r"true|false"), "tf"),
    "null": (re.compile(r"~|null|"), ["~", "n", ""]),
    "int": (re.compile(r"[-+]?(0|[1-9][0-9_]*)"), "-+0123456789"),
    "float": (
        re.compile(
            r"[-+]?([0-9][0-9_]*\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan"
        ),
        "-+0123456789.",
    ),
}


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses what makes an experiment mean something other than it seems to."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not allowed", problem_mark=mark)
        if getattr(event, "tag", None):
            raise yaml.MarkedYAMLError(problem=f"the tag '{event.tag}' is not allowed", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            mark = key.start_mark
            if not isinstance(key, yaml.ScalarNode) or key.tag != f"{_PREFIX}str":
                raise yaml.MarkedYAMLError(problem="keys must be words", problem_mark=mark)
            if key.value == "<<":
                raise yaml.MarkedYAMLError(problem="merge keys ('<<') are not allowed", problem_mark=mark)
            if key.value in seen:
                problem = f"the key '{key.value}' stands twice, first on line {seen[key.value]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
            seen[key.value] = mark.line + 1
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {}
for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"{_PREFIX}{_name}", re.compile(rf"^(?:{_pattern.pattern})$"), list(_first))


def load(text: str, source: str) -> tuple[Any, Lines]:
    """Parse one document.

    Args:
        text: YAML.
        source: file name or override, for messages.

    Returns:
        The value (mappings, lists, strings, numbers, booleans, None), and the line of every key.

    Raises:
        ConfigError: what is wrong, with the line.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            value = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{line}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply") from None
    return value, {} if node is None else dict(_lines(node, ()))


def load_file(path: Path) -> tuple[dict[str, Any], Lines]:
    """Parse a file whose top level must be a mapping. Raises ConfigError as `load`, and for an unreadable file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"there is no experiment file {path}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file (UTF-8 is expected)") from None
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    value, lines = load(text, str(path))
    if value is None:
        raise ConfigError(f"{path}: the file is empty")
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: the top level must be a mapping of keys, not {describe(value)}")
    return value, lines


def describe(value: Any) -> str:
    """What a value is, in words."""
    names = {dict: "a mapping", list: "a list", str: "a word", bool: "a truth value", type(None): "nothing"}
    return names.get(type(value), "a number")


def _lines(node: yaml.Node, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*path, key.value), key.start_mark.line + 1
            yield from _lines(value, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*path, str(index)), item.start_mark.line + 1
            yield from _lines(item, (*path, str(index)))
