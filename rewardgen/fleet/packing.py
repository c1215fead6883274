"""What travels with a submitted job, and what stays at home. Knows files, not Ray.

Two things travel: the working folder, without what its ignore files name and with everything that the experiment
names; and rewardgen itself, laid out as in a wheel. Both are decided, and refused, before anything is uploaded.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rewardgen import sources
from rewardgen.errors import ConfigError, UserError
from rewardgen.fleet import ignores, job
from rewardgen.settings import Plugin

MAX_BYTES = 100 * 1024**2 - 1024**2
"""Ray's job server takes 100 MiB in one upload (`DASHBOARD_CLIENT_MAX_SIZE`); 1 MiB is kept for names and headers."""
MAX_FILES = 20_000
"""More than this is no project's folder; the walk through it ends there."""
NEVER = (".git", ".hg", ".svn")
"""Histories; a line such as `!*/`, which takes back every folder, does not mean them."""
_CACHES = (".mypy_cache/", ".ruff_cache/", ".pytest_cache/", ".hypothesis/", ".ipynb_checkpoints/", "__pycache__/")
ALWAYS_OUT = (*_CACHES, ".venv/", "node_modules/", "*.pyc", "*.egg-info/", ".DS_Store", ".env", ".netrc")
"""Left out unless an ignore file takes it back with `!name`. Virtual environments of any name and the folders of runs
are left out too."""

_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """Files by the name they have on the other side, and what was left out (the topmost folder or file)."""

    files: Mapping[str, Path]
    left_out: Sequence[str] = ()

    def num_bytes(self) -> int:
        """Sum of the files' sizes. Ray packs folders without compressing them."""
        return sum(path.stat().st_size for path in self.files.values())


@dataclass(kw_only=True, slots=True)
class Needs:
    """What the plug-ins and arguments of an experiment ask for.

    Args:
        files: files and folders within the working folder, which travel even where an ignore file names them.
        elsewhere: what the cluster must have itself, one line each for the user.
        faults: what can be neither, one line each.
    """

    files: list[Path] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def needs(plugins: Iterable[tuple[str, str, Plugin]], root: Path) -> Needs:
    """Sort what an experiment names into what travels, what the cluster must have, and what cannot be.

    Args:
        plugins: (key path, kind, plug-in) of each; their modules have been imported, as loading an experiment does.
        root: the working folder.
    """
    found = Needs()
    for path, _, plugin in plugins:
        _need_code(plugin.use, f"{path}.use", root, found)
        for source in sources.find_sources(plugin.args, f"{path}.args"):
            if source.kind == "local":
                _need_local(source, root, found)
            elif source.kind != "world":
                found.elsewhere.append(f"{source.path}: {source.text} ({source.kind})")
    return found


def working_files(root: Path, needed: Sequence[Path] = ()) -> Package:
    """The files of the working folder that travel.

    `.gitignore` and `.rayignore` count, also those of folders around `root` within one git repository; `needed` files
    and folders come whatever they say. rewardgen's own folders do not: the package travels by itself, and twice it
    would be two packages.

    Raises:
        UserError: the folder is the home folder or the root, holds too many files, or cannot be read.
    """
    root = root.resolve()
    if root in (Path.home().resolve(), Path(root.anchor)):
        raise UserError(f"the working folder travels along, and {root} is no project's folder; go to one and try again")
    own = set(job.package_folders().values())
    files: dict[str, Path] = {}
    left_out: list[str] = []

    def add(path: Path) -> None:
        files.setdefault(path.relative_to(root).as_posix(), path)
        if len(files) > MAX_FILES:
            raise UserError(f"{root} holds more than {MAX_FILES} files that would travel; is it the project's folder?")

    def walk(folder: Path, patterns: list[ignores.Pattern], around: frozenset[Path]) -> None:
        patterns = patterns + ignores.read(folder)
        for path in sorted(folder.iterdir()):
            is_folder = path.is_dir()
            if is_folder and (path.name in NEVER or path.resolve() in own or path == root / "rewardgen"):
                continue
            if ignores.decides(patterns, path, is_folder) or (is_folder and _is_bulky(path)):
                left_out.append(path.relative_to(root).as_posix() + "/" * is_folder)
            elif is_folder:
                if path.resolve() not in around:  # a link back up would never end
                    walk(path, patterns, around | {path.resolve()})
            elif path.is_file():
                add(path)

    try:
        walk(root, ignores.always(ALWAYS_OUT, root) + ignores.above(root), frozenset({root}))
        for place in needed:
            for path in [place] if place.is_file() else sorted(place.rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    add(path)
    except OSError as error:
        raise UserError(f"{error.filename or root}: it would travel, and cannot be read: {error.strerror}") from error
    return Package(files=dict(sorted(files.items())), left_out=left_out)


def own_package() -> Package:
    """rewardgen as it runs here, named as in a wheel: `rewardgen/...`, with rewards and policies inside."""
    return Package(files=job.package_files())


def check_size(package: Package, what: str, limit: int = MAX_BYTES) -> None:
    """Refuse what the job server would not take. Raises UserError with the largest, and how to leave them out."""
    total = package.num_bytes()
    if total <= limit:
        return
    sizes = {name: path.stat().st_size for name, path in package.files.items()}
    folders: dict[str, int] = {}
    for name, size in sizes.items():
        top, slash, _ = name.partition("/")
        if slash:
            folders[f"{top}/"] = folders.get(f"{top}/", 0) + size
    largest = sorted((sizes | folders).items(), key=lambda item: (-item[1], item[0]))[:_SHOWN]
    rows = "".join(f"\n  {show_size(size):>10}  {name}" for name, size in largest)
    raise UserError(
        f"{what}: {show_size(total)} would travel, and Ray's job server takes {show_size(limit)}. The largest:{rows}\n"
        f"Leave them out with lines in a file .rayignore, written as in a .gitignore: {largest[0][0]}\n"
        "Data and weights that the run needs belong where the cluster sees them; name them by absolute paths."
    )


def write_zip(files: Mapping[str, Path | bytes], path: Path) -> None:
    """Write an archive that depends on names and contents alone: Ray uploads an equal one only once."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(files.items()):
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content if isinstance(content, bytes) else content.read_bytes())


def write_tree(files: Mapping[str, Path], folder: Path) -> None:
    """Copy files to their names below `folder`."""
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)


def show_size(num_bytes: int) -> str:
    """A size for people: `0.4 KiB`, `312.4 MiB`."""
    return f"{num_bytes / 1024:.1f} KiB" if num_bytes < 1024**2 else f"{num_bytes / 1024**2:.1f} MiB"


def _is_bulky(folder: Path) -> bool:
    """A virtual environment of any name, or a run's folder."""
    return (folder / "pyvenv.cfg").is_file() or (
        (folder / "manifest.json").is_file() and (folder / "checkpoints").is_dir()
    )


def _need_code(use: str, where: str, root: Path, found: Needs) -> None:
    place, _, _ = use.rpartition(":")
    if not place:
        if not _is_bundled(use):
            found.elsewhere.append(f"{where}: '{use}', which an installed package declares")
        return
    path = Path(place).expanduser() if place.endswith(".py") else _file_of(place)
    if path is None or _is_bundled(place):
        return
    inside = within(root, path)
    if inside is not None:
        found.files += _with_package(inside, root.resolve(), place)
    elif place.endswith(".py"):
        found.faults.append(f"{where}: {place} lies outside of the working folder {root}, which is what travels")
    else:
        found.elsewhere.append(f"{where}: the package '{place.partition('.')[0]}'")


def _is_bundled(use: str) -> bool:
    if "." in use:
        return use.split(".")[0] == "rewardgen"
    return any((folder / f"{use}.py").is_file() for folder in _plugin_folders())


def _plugin_folders() -> Iterator[Path]:
    for kind in ("rewards", "policies", "data"):
        yield from map(Path, importlib.import_module(f"rewardgen.{kind}").__path__)


def _file_of(module: str) -> Path | None:
    loaded = sys.modules.get(module) or importlib.import_module(module)
    return Path(loaded.__file__) if loaded.__file__ else None


def _with_package(path: Path, root: Path, place: str) -> list[Path]:
    """The file, or for a module of a package the Python files of the whole package: what it imports comes with it."""
    top = path.relative_to(root).parts[0]
    if place.endswith(".py") or "." not in place or not (root / top).is_dir():
        return [path]
    return sorted((root / top).rglob("*.py"))


def _need_local(source: sources.Source, root: Path, found: Needs) -> None:
    inside = within(root, Path(source.text))
    if Path(source.text).is_absolute() or source.text.startswith("~"):
        found.elsewhere.append(f"{source.path}: {source.text} (looked up on the cluster)")
    elif source.location is None:
        found.faults.append(
            f"{source.path}: there is no {source.text} in {root}; a path of the cluster is written absolutely"
        )
    elif inside is None:
        found.faults.append(f"{source.path}: {source.text} lies outside of the working folder {root}, which travels")
    else:
        found.files.append(inside)


def within(root: Path, place: Path) -> Path | None:
    """`place`, seen from `root`, where it lies within it by its name: a link within counts as what it points to."""
    path = Path(os.path.normpath(root.resolve() / place))
    return path if path.is_relative_to(root.resolve()) else None


def refuse(found: Needs, where: str) -> None:
    """Raise ConfigError where something can neither travel nor be on the cluster."""
    if found.faults:
        raise ConfigError("\n  ".join([f"{where} cannot run as a job:", *found.faults]))
