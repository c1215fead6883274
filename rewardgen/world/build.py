"""`rewardgen world build`: remakes the bundled world piece by piece and writes down what belongs to what.

`assets/world.json` holds for each piece its recipe, what it was made from, the hashes of its files and how well it
does on held-out pictures. A piece is made again only where one of these no longer fits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rewardgen.errors import ConfigError, nearest
from rewardgen.world import faces, people, scenes
from rewardgen.world.recipes.training import Recipe

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Piece:
    """A part of the world: its recipe, the pieces it is made from, its files, and the function that makes it.

    `make(folder, steps_factor)` writes `files` below `folder` and returns held-out figures. `generator` is the version
    of the pictures it learns from.
    """

    recipes: tuple[Recipe, ...]
    needs: tuple[str, ...]
    files: tuple[str, ...]
    make: Callable[[Path, float], dict[str, float]]
    generator: str = scenes.VERSION


def pieces() -> dict[str, Piece]:
    """All pieces in the order they are made. Imports torch and transformers, so it is a function."""
    from rewardgen.world.recipes import (
        base,
        csd,
        detector,
        embedder,
        encoders,
        judge,
        people_vae,
        reader,
        traits,
        uno_base,
        vae,
    )

    drawn = f"{people.VERSION}.{faces.VERSION}"
    return {
        "vae": Piece(vae.ROUNDS, (), ("base/vae",), vae.build),
        "encoders": Piece(
            (encoders.RECIPE,),
            (),
            ("siglip", "base/text_encoder", "base/text_encoder_2", "base/tokenizer", "base/tokenizer_2"),
            encoders.build,
        ),
        "reader": Piece((reader.RECIPE,), ("vae",), ("reader.safetensors",), reader.build),
        "base": Piece(base.STAGES, ("vae", "encoders"), ("base/transformer", "uso"), base.build),
        "csd": Piece(csd.ROUNDS, ("vae", "base"), ("csd.safetensors",), csd.build),
        "judge": Piece(judge.STAGES, ("vae",), ("judge",), judge.build),
        "people_vae": Piece((people_vae.RECIPE,), ("vae",), (people_vae.FOLDER,), people_vae.build, drawn),
        "detector": Piece((detector.RECIPE,), ("people_vae",), (detector.FILE,), detector.build, drawn),
        "embedder": Piece((embedder.RECIPE,), ("people_vae",), (embedder.FILE,), embedder.build, drawn),
        "traits": Piece((traits.RECIPE,), ("people_vae",), (traits.FILE,), traits.build, drawn),
        "uno": Piece(
            uno_base.STAGES,
            ("base", "encoders", "people_vae", "detector", "embedder"),
            tuple(f"{uno_base.FOLDER}/{name}" for name in ("transformer", *uno_base.COPIED)),
            uno_base.build,
            drawn,
        ),
    }


def build_world(names: Sequence[str] = (), *, folder: Path = ASSETS, steps_factor: float = 1.0) -> list[str]:
    """Make the named pieces again, or with no name all that are missing or outdated; returns what was made.

    Args:
        steps_factor: scales every recipe's steps; anything but 1 is for tests and is recorded as such.

    Raises:
        ConfigError: no piece of that name.
    """
    known = pieces()
    for name in names:
        if name not in known:
            raise ConfigError(f"world: there is no piece '{name}'.{nearest(name, known)} Pieces: {', '.join(known)}")
    made = []
    for name, piece in known.items():
        if name in names or (not names and stale(name, piece, folder)):
            print(f"world: making {name}", flush=True)
            figures = piece.make(folder, steps_factor)
            _record(folder, name, _entry(piece, folder, steps_factor) | {"figures": figures})
            made.append(name)
    return made


def stale(name: str, piece: Piece, folder: Path = ASSETS) -> str:
    """Why a piece has to be made (again), or an empty string."""
    entry = _manifest(folder).get(name)
    if entry is None:
        return "not built"
    current = _entry(piece, folder, entry.get("steps_factor", 1.0))
    for key in ("recipes", "generator", "needs", "files"):
        if entry.get(key) != current[key]:
            return f"{key} changed"
    return ""


def file_hashes(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """sha256 of every file below the named files and folders, by path relative to `folder`."""
    paths = [
        path
        for name in names
        for path in ([folder / name] if (folder / name).is_file() else (folder / name).rglob("*"))
    ]
    files = sorted(path for path in paths if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _entry(piece: Piece, folder: Path, steps_factor: float) -> dict[str, Any]:
    manifest = _manifest(folder)
    return {
        "recipes": [asdict(recipe) for recipe in piece.recipes],
        "generator": piece.generator,
        "needs": {need: manifest.get(need, {}).get("files") for need in piece.needs},
        "files": file_hashes(folder, piece.files),
        "steps_factor": steps_factor,
    }


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "world.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _record(folder: Path, name: str, entry: dict[str, Any]) -> None:
    text = json.dumps(_manifest(folder) | {name: entry}, indent=1, sort_keys=True)
    (folder / "world.json").write_text(text + "\n")
