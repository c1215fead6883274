"""How the recipes save a diffusers model: small, and without the folder that it was loaded from."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import ModelMixin


def save_model(model: ModelMixin, folder: Path) -> None:
    """Write the model in half precision; diffusers would name the folder of its first weights in `config.json`."""
    model.half().save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
