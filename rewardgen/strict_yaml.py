"""YAML without its surprises: JSON's values only, no duplicate keys, anchors, tags or second documents.

`yes` and `on` are words, `010` and `1:30` are words, dates are words, and `1e-3` is a number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from rewardgen.errors import ConfigError

Lines = dict[tuple[str, ...], int]
"""Key path -> line number in the file, from 1."""
MAX_DEPTH = 64
"""Mappings and lists within each other; what reads them further on recurses."""

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

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not allowed", problem_mark=mark)
        if getattr(event, "tag", None):
            tag = show(event.tag.replace(_PREFIX, "!!"))
            raise yaml.MarkedYAMLError(problem=f"the tag '{tag}' is not allowed", problem_mark=mark)
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            mark = key.start_mark
            if not isinstance(key, yaml.ScalarNode) or key.tag != f"{_PREFIX}str":
                raise yaml.MarkedYAMLError(problem="keys must be words", problem_mark=mark)
            if key.value == "<<":
                raise yaml.MarkedYAMLError(problem="merge keys ('<<') are not allowed", problem_mark=mark)
            if key.value in seen:
                problem = f"the key '{show(key.value)}' stands twice, first on line {seen[key.value]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
            seen[key.value] = mark.line + 1
        return super().construct_mapping(node, deep=deep)

    def construct_number(self, node: yaml.ScalarNode) -> int:
        try:
            return int(node.value.replace("_", ""))
        except ValueError:
            # Python refuses to read thousands of digits.
            problem = f"a number of {len(node.value)} digits is too long"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None


_Loader.add_constructor(f"{_PREFIX}int", _Loader.construct_number)
_Loader.yaml_implicit_resolvers = {}
for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"{_PREFIX}{_name}", re.compile(rf"^(?:{_pattern.pattern})$"), list(_first))


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes every word which `load` would take for something else: `1e3` as well as PyYAML's own."""


for _name, (_pattern, _first) in _SCALARS.items():
    _Dumper.add_implicit_resolver(f"{_PREFIX}{_name}", re.compile(rf"^(?:{_pattern.pattern})$"), list(_first))


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # In single quotes PyYAML leaves line breaks such as U+0085 as they are, and reads them as spaces.
    return dumper.represent_scalar(f"{_PREFIX}str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _quoted)


def dump(value: Any) -> str:
    """YAML of a JSON value, keys in their order, from which `load` makes the same value."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


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
        except (ValueError, OverflowError):
            # PyYAML makes any eight digits after "\\U" a character.
            raise yaml.MarkedYAMLError(problem="there is no such character", problem_mark=loader.get_mark()) from None
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{line}: {_in_one_line(error.problem or error.context or 'not YAML')}") from None
    except yaml.reader.ReaderError as error:
        place = f"on line {text.count(chr(10), 0, error.position) + 1}"
        raise ConfigError(f"{source}: the character U+{error.character:04X} {place} is not allowed") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: {_in_one_line(str(error))}") from None
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


def show(text: str, length: int = 80) -> str:
    """Text for a message: cut to a length, control characters written out, so that it stays on its line."""
    cut = text if len(text) <= length else f"{text[:length]}…"
    return cut if cut.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)


def unusable(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, fault) of each value that YAML can write and no experiment can use."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from unusable(inner, f"{path}.{key}" if path else key)
            yield from ((path, f"{fault} within the key '{show(key)}'") for fault in _unusable_text(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from unusable(inner, f"{path}.{index}")
    elif isinstance(value, str):
        yield from ((path, fault) for fault in _unusable_text(value))
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, f"should be a finite number, got {value}"
    elif isinstance(value, int) and abs(value) >= 2**63:
        yield path, "should be a number of at most 63 bits"


def holds(value: Any, path: Sequence[str]) -> bool:
    """Whether nested mappings have a key at the path, whatever its value."""
    for part in path:
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True


def _unusable_text(text: str) -> Iterator[str]:
    if "\0" in text:
        yield "there is a null character"
    if any("\ud800" <= character <= "\udfff" for character in text):
        yield "there is half a surrogate pair, which is no character"


def _in_one_line(problem: str) -> str:
    return show(" ".join(problem.split()), 200)


def _lines(node: yaml.Node, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*path, key.value), key.start_mark.line + 1
            yield from _lines(value, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*path, str(index)), item.start_mark.line + 1
            yield from _lines(item, (*path, str(index)))
