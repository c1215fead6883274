"""Plug-ins by name: `csd` (a file of the matching folder), `package.module:Class`, `./file.py:Class`.

There is no registry: the file's name is the plug-in's name. Resolving imports the plug-in's module and nothing else;
`check_args` compares arguments with a signature and calls nothing.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import pkgutil
import sys
import traceback
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from rewardgen.errors import ConfigError, nearest

Kind = Literal["rewards", "policies", "data"]


def resolve(kind: Kind, use: str) -> type[Any]:
    """Return the class that `use` names, importing its module.

    Args:
        kind: the folder for bare names, and the contract the class must keep: `rewards` -> `Reward`,
            `policies` -> `Policy`, `data` -> `__len__` and `__getitem__`.
        use: `name`, `package.module:Class` or `path/to/file.py:Class` (relative to the working directory).

    Raises:
        ConfigError: the name, module, file or class does not exist, does not import, or breaks the contract.
    """
    place, _, class_name = use.rpartition(":")
    if not place:
        return (
            _the_class(kind, _import(f"rewardgen.{kind}.{use}", use)) if _is_bundled(kind, use) else _no_such(kind, use)
        )
    if not class_name.isidentifier():
        raise ConfigError(f"'{use}' names no class; write it as '{place}:ClassName'")
    module = _import_file(place, use) if place.endswith(".py") else _import_dotted(place, use)
    found = getattr(module, class_name, None)
    if not inspect.isclass(found):
        classes = [name for name, value in vars(module).items() if inspect.isclass(value)]
        raise ConfigError(f"'{place}' has no class '{class_name}'.{nearest(class_name, classes)}")
    _check_contract(kind, found, use)
    return found


def bundled(kind: Kind) -> list[str]:
    """The names that can be used bare, sorted."""
    package = importlib.import_module(f"rewardgen.{kind}")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_"))


def factory(cls: type[Any]) -> Callable[..., Any]:
    """What experiments call: `from_pretrained` where the class defines one, else the constructor."""
    made: Callable[..., Any] = getattr(cls, "from_pretrained", cls)
    return made


def check_args(target: Callable[..., Any], args: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Check keyword arguments against a typed signature, without calling it.

    Args:
        target: class, classmethod or function. A parameter without annotation accepts anything.
        args: values as YAML gives them (mappings, lists, strings, numbers, booleans, null).
        path: dotted path of the arguments in the experiment, for messages.

    Returns:
        The arguments with values converted to the annotated types (a list to a tuple, a string to a `Path`).

    Raises:
        ConfigError: one line for each unknown, missing or ill-typed argument.
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
        if name in parameters:
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
    return checked, faults


def _is_bundled(kind: Kind, use: str) -> bool:
    return use.isidentifier() and use in bundled(kind)


def _no_such(kind: Kind, use: str) -> type[Any]:
    names = bundled(kind)
    for other in ("rewards", "policies", "data"):
        if other != kind and _is_bundled(other, use):
            raise ConfigError(f"'{use}' is found among {other}, but {kind} are wanted here: {', '.join(names)}")
    guess = nearest(use, names) or f" There are: {', '.join(names)}."
    raise ConfigError(
        f"no file '{use}.py' among the bundled {kind}.{guess}"
        " One's own class is written 'package.module:Class' or './file.py:Class'."
    )


def _import_dotted(name: str, use: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"'{use}': '{name}' is no module name; a file is written './file.py:Class'")
    _see_working_directory()
    return _import(name, use)


def _import_file(place: str, use: str) -> ModuleType:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        near = nearest(path.name, [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else [])
        raise ConfigError(f"'{use}': there is no file {path}.{near}")
    _see_working_directory()
    # A stable name, so that the same file is the same class wherever it is named, and in every process.
    name = f"rewardgen_plugin_{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"'{use}': {path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _import_failed(use, error) from error
    return module


def _import(name: str, use: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise ConfigError(
                f"'{use}': there is no module '{error.name}' (looked in the working directory too)"
            ) from error
        raise _import_failed(use, error) from error
    except Exception as error:
        raise _import_failed(use, error) from error


def _import_failed(use: str, error: Exception) -> ConfigError:
    """The plug-in's own error, and where it arose: it is the author of the plug-in who reads this."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return ConfigError(f"'{use}' could not be imported: {type(error).__name__}: {error}{where}")


def _see_working_directory() -> None:
    # At the end: a user's file must not take the place of a module of the standard library.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def _the_class(kind: Kind, module: ModuleType) -> type[Any]:
    found = [
        value
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and not name.startswith("_")
        if not inspect.isabstract(value) and not _contract_fault(kind, value)
    ]
    if len(found) == 1:
        return found[0]
    stem = module.__name__.rpartition(".")[2]
    if not found:
        raise ConfigError(f"'{stem}' is a helper among the {kind}: it defines no class that can be used here")
    names = ", ".join(f"'{module.__name__}:{cls.__name__}'" for cls in found)
    raise ConfigError(f"'{stem}' defines several classes; name one of {names}")


def _check_contract(kind: Kind, cls: type[Any], use: str) -> None:
    fault = _contract_fault(kind, cls)
    if fault:
        raise ConfigError(f"'{use}' {fault}")
    if inspect.isabstract(cls):
        raise ConfigError(f"'{use}' is abstract: it does not define {', '.join(sorted(cls.__abstractmethods__))}")


def _contract_fault(kind: Kind, cls: type[Any]) -> str:
    if kind == "data":
        lacks = [name for name in ("__len__", "__getitem__") if not callable(getattr(cls, name, None))]
        return f"is no dataset: it does not define {' and '.join(lacks)}" if lacks else ""
    if kind == "rewards":
        from rewardgen.reward import Reward as Contract
    else:
        from rewardgen.policy import Policy as Contract  # type: ignore[assignment]
    return "" if issubclass(cls, Contract) else f"is no subclass of rewardgen's {Contract.__name__}"


def _takes_nothing(target: Callable[..., Any]) -> bool:
    # A torch module without an __init__ of its own has torch's, which says **kwargs and accepts none.
    return inspect.isclass(target) and getattr(target.__init__, "__module__", "").startswith("torch.nn")


def _type_hints(target: Callable[..., Any]) -> dict[str, Any]:
    function = target.__init__ if inspect.isclass(target) else target
    hints: dict[str, Any] = {}
    for name, annotation in inspect.get_annotations(inspect.unwrap(getattr(function, "__func__", function))).items():
        # One by one: a name imported only for the type checker leaves its own argument unchecked, not all of them.
        try:
            hints[name] = typing.get_type_hints(SimpleNamespace(__annotations__={name: annotation}), _names(function))[
                name
            ]
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
