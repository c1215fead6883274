"""Plug-ins by name: `csd` (a file of the matching folder), `package.module:Class`, `./file.py:Class`.

A reward may also be a plain function (`package.module:function`, `./file.py:function`), or the name of an entry point
that an installed distribution declares in the group `rewardgen.rewards`.

There is no registry: the file's name is the plug-in's name. Resolving imports the plug-in's module and nothing else.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import rewardgen
from rewardgen.arguments import check_args as check_args
from rewardgen.arguments import collect_args as collect_args
from rewardgen.errors import ConfigError, nearest

Kind = Literal["rewards", "policies", "data"]

ENTRY_POINT_GROUP = "rewardgen.rewards"
"""Entry points of this group are rewards: name -> class or function."""


def resolve(kind: Kind, use: str) -> type[Any]:
    """Return the class that `use` names, importing its module. A reward function becomes a class of its own name.

    Args:
        kind: the folder for bare names, and the contract the class must keep: `rewards` -> `Reward`,
            `policies` -> `Policy`, `data` -> `__len__` and `__getitem__`.
        use: `name`, `package.module:Class` or `path/to/file.py:Class` (relative to the working directory). A bare
            name is a bundled file, or else an entry point: what is installed beside rewardgen never changes what a
            bundled name means.

    Raises:
        ConfigError: the name, module, file or class does not exist, does not import, or breaks the contract.
    """
    place, _, name = use.rpartition(":")
    if not place:
        return _by_name(kind, use)
    if not name.isidentifier():
        raise ConfigError(f"'{use}' names no class; write it as '{place}:ClassName'")
    module = _import_file(place, use) if place.endswith(".py") else _import_dotted(place, use)
    found = getattr(module, name, None)
    if not _may_be(kind, found):
        wanted = "class or function" if kind == "rewards" else "class"
        there = [other for other, value in vars(module).items() if _may_be(kind, value)]
        raise ConfigError(f"'{place}' has no {wanted} '{name}'.{nearest(name, there)}")
    return _as_class(kind, found, use)


def bundled(kind: Kind) -> list[str]:
    """The names that can be used bare, sorted."""
    package = importlib.import_module(f"rewardgen.{kind}")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_"))


def factory(cls: type[Any]) -> Callable[..., Any]:
    """What experiments call: `from_pretrained` where the class defines one, else the constructor."""
    made: Callable[..., Any] = getattr(cls, "from_pretrained", cls)
    return made


def _may_be(kind: Kind, found: object) -> bool:
    return inspect.isclass(found) or (kind == "rewards" and inspect.isfunction(found))


def _as_class(kind: Kind, found: Any, use: str) -> type[Any]:
    if inspect.isfunction(found):
        from rewardgen.reward_function import function_reward

        return function_reward(found)
    _check_contract(kind, found, use)
    checked: type[Any] = found
    return checked


def _by_name(kind: Kind, use: str) -> type[Any]:
    # One distribution may be found twice on the path.
    declared = {point.value: point for point in _entry_points(kind) if point.name == use}
    if _is_bundled(kind, use):
        for point in declared.values():
            warnings.warn(f"'{use}' is the bundled one; write out {_origin(point)} to use that", stacklevel=3)
        return _the_class(kind, _import(f"rewardgen.{kind}.{use}", use))
    if not declared:
        return _no_such(kind, use)
    if len(declared) > 1:
        origins = " and ".join(sorted(map(_origin, declared.values())))
        raise ConfigError(f"'{use}' is declared by {origins}; write out the one you mean")
    (point,) = declared.values()
    try:
        if not point.attr:
            raise ConfigError("it names no class or function")
        return resolve(kind, f"{point.module}:{point.attr}")
    except ConfigError as error:
        raise ConfigError(f"'{use}' is {_origin(point)}: {error}") from error


def _entry_points(kind: Kind) -> Iterable[EntryPoint]:
    return entry_points(group=ENTRY_POINT_GROUP) if kind == "rewards" else ()


def _origin(point: EntryPoint) -> str:
    return f"'{point.value}'" + (f" of {point.dist.name} {point.dist.version}" if point.dist else "")


def _is_bundled(kind: Kind, use: str) -> bool:
    return use.isidentifier() and use in bundled(kind)


def _no_such(kind: Kind, use: str) -> type[Any]:
    names = bundled(kind)
    declared = sorted({point.name for point in _entry_points(kind)})
    for other in ("rewards", "policies", "data"):
        if other != kind and _is_bundled(other, use):
            raise ConfigError(f"'{use}' is found among {other}, but {kind} are wanted here: {', '.join(names)}")
    guess = nearest(use, names + declared) or f" There are: {', '.join(names + declared)}."
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
    here = Path.cwd()
    if str(here) in sys.path:
        return
    # At the end: a user's file must not take the place of a module of the standard library. Yet a user's own package
    # `rewards` or `policies` comes before the checkout of rewardgen, which has folders of these names at its top.
    place = len(sys.path)
    if (here / "rewards").is_dir() or (here / "policies").is_dir():
        checkout = Path(rewardgen.__file__).resolve().parent.parent
        entries = [Path(entry).resolve() for entry in sys.path]
        if checkout in entries and (checkout / "pyproject.toml").is_file():
            place = entries.index(checkout)
    sys.path.insert(place, str(here))


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
