"""Arguments of plug-ins: values from YAML against a typed signature, and what the plug-in's class says of them.

What is to be made is not called. A class may have a class method `check_arguments(**arguments)` for what types cannot
say: ranges, and arguments that do not go together. It is called once names and types are right, with all arguments,
those left out at their defaults, and sources as the experiment writes them (`world:NAME`, `owner/name:file`): they may
not be here yet. It raises a `UserError`; where that begins with an argument's name and a colon, the fault is that
argument's.
"""

from __future__ import annotations

import inspect
import json
import sys
import typing
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from rewardgen.errors import ConfigError, UserError, nearest


def check_args(target: Callable[..., Any], args: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Check keyword arguments against a typed signature, and their values by `check_arguments`, without calling it.

    Args:
        target: class, classmethod or function. A parameter without annotation accepts anything.
        args: values as YAML gives them (mappings, lists, strings, numbers, booleans, null).
        path: dotted path of the arguments in the experiment, for messages.

    Returns:
        The arguments with values converted to the annotated types (a list to a tuple, a string to a `Path`).

    Raises:
        ConfigError: one line for each unknown, missing or ill-typed argument, or what `check_arguments` refuses.
    """
    checked, faults = collect_args(target, args, path)
    if faults:
        raise ConfigError("\n".join(f"{where}: {message}" for where, message in faults))
    return checked


def collect_args(
    target: Callable[..., Any], args: Mapping[str, Any], path: str
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """As `check_args`, but returns the faults as (dotted path, message) instead of raising."""
    signature = inspect.Signature() if _takes_nothing(target) else inspect.signature(target)
    parameters = {
        name: parameter
        for name, parameter in signature.parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    hints = _type_hints(target)
    checked: dict[str, Any] = {}
    faults: list[tuple[str, str]] = []
    for name, value in args.items():
        if name in getattr(target, "FILLED", ()):
            faults.append((f"{path}.{name}", "is filled in at every call and cannot be given here"))
        elif name in parameters:
            try:
                checked[name] = _convert(value, hints.get(name, Any))
            except ValidationError as error:
                for fault in error.errors(include_url=False):
                    where = ".".join([path, name, *(str(part) for part in fault["loc"])])
                    faults.append((where, f"{_lower_first(fault['msg'])}, got {value!r}"))
        elif takes_any:
            checked[name] = value
        else:
            known = nearest(name, parameters) or f" It takes: {', '.join(parameters) or 'no arguments'}."
            faults.append((f"{path}.{name}", f"unknown argument.{known}"))
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in args:
            faults.append((f"{path}.{name}", "required argument is missing"))
    if not faults:
        defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
        faults += _value_faults(target, defaults | checked, path)
    return checked, faults


def _value_faults(target: Callable[..., Any], arguments: Mapping[str, Any], path: str) -> list[tuple[str, str]]:
    """What the class says of the values, whether it is itself called or one of its class methods."""
    check = getattr(getattr(target, "__self__", target), "check_arguments", None)
    if check is None or not _required(check) <= arguments.keys():
        # None, or that of a parent whose constructor takes what this one does not.
        return []
    try:
        check(**arguments)
    except UserError as error:
        name, colon, message = str(error).partition(": ")
        return [(f"{path}.{name}", message) if colon and name in arguments else (path, str(error))]
    return []


def _required(function: Callable[..., Any]) -> set[str]:
    return {
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
    }


def _takes_nothing(target: Callable[..., Any]) -> bool:
    # A torch module without an __init__ of its own has torch's, which says **kwargs and accepts none. It is one of
    # torch._dynamo's once something was compiled.
    return inspect.isclass(target) and getattr(target.__init__, "__module__", "").startswith("torch.")


def _type_hints(target: Callable[..., Any]) -> dict[str, Any]:
    function = target.__init__ if inspect.isclass(target) else target
    hints: dict[str, Any] = {}
    for name, annotation in inspect.get_annotations(inspect.unwrap(getattr(function, "__func__", function))).items():
        # One by one: a name imported only for the type checker leaves its own argument unchecked, not all of them.
        try:
            found = typing.get_type_hints(
                SimpleNamespace(__annotations__={name: annotation}), _names(function), include_extras=True
            )
            hints[name] = found[name]
        except (NameError, TypeError, AttributeError):
            hints[name] = Any
    return hints


def _names(function: Any) -> dict[str, Any]:
    return dict(vars(sys.modules[function.__module__])) if function.__module__ in sys.modules else {}


def _convert(value: Any, annotation: Any) -> Any:
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))
    except PydanticSchemaGenerationError:
        adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
        return adapter.validate_python(value)
    except TypeError:
        # The annotation is a class with a pydantic configuration of its own.
        adapter = TypeAdapter(annotation)
    # JSON's strict mode is what YAML needs: no "3" for 3 and no true for 1, yet lists make tuples and strings paths.
    return adapter.validate_json(json.dumps(value), strict=True)


def _lower_first(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]
