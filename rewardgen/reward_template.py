"""What `rewardgen reward new NAME` writes: a file with a whole reward that passes `check_reward` as it stands."""

from __future__ import annotations

import builtins
import importlib.util
import keyword
import os
import re
from pathlib import Path

from rewardgen.errors import ConfigError

CLASS = '''\
"""NAME: a reward with a gradient, for rewardgen. Change `score` to what you want to see more of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewardgen.errors import ConfigError
from rewardgen.reward import Reward, check_reward
from rewardgen.types import Example, Score


class CLASS_NAME(Reward):
    """Minus the mean squared distance of a picture's brightness from a level: 0 at best, -1 at worst.

    Args:
        level: the wanted brightness in [0, 1].
        needs_style: apply only to examples with a style reference.
    """

    differentiable = True

    def __init__(self, level: float = 0.5, needs_style: bool = False) -> None:
        super().__init__()
        self.check_arguments(level=level)
        self.level = level
        self.needs_style = needs_style

    @classmethod
    def check_arguments(cls, *, level: float, **_: object) -> None:
        # Called with an experiment's arguments before anything is loaded; the message begins with the one at fault.
        if not 0 <= level <= 1:
            raise ConfigError(f"level: {level:g} is not in [0, 1]")

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        # Pictures are RGB in [0, 1] and may stray slightly outside. Higher values are better.
        brightness_BHW = pixels_B3HW.float().mean(1)
        value_B = -(brightness_BHW - self.level).square().mean((1, 2))
        # False where there is nothing to judge: such a score is masked and counted, never taken for 0.
        applies = [bool(example.style_refs) or not self.needs_style for example in examples]
        return Score(value_B=value_B, valid_B=torch.tensor(applies, device=pixels_B3HW.device))


if __name__ == "__main__":
    for line in check_reward(CLASS_NAME()):
        print("ok:", line)
'''

FUNCTION = '''\
"""NAME: a reward function for rewardgen. It has no gradient: use it under `evaluation.witnesses`."""

from __future__ import annotations

from PIL import Image, ImageStat

from rewardgen.reward import check_reward
from rewardgen.reward_function import function_reward


def NAME(
    completions: list[Image.Image], prompts: list[str], level: float = 0.5, **columns: object
) -> list[float | None]:
    """Minus the distance of a picture's brightness from `level`, both in [0, 1]; pictures without a prompt get None.

    `completions` are the pictures to score, RGB; `columns` holds the references and the dataset's other columns, each
    a list with one entry for each picture. Return a number for each picture, or None where there is nothing to judge.
    """
    scores: list[float | None] = []
    for picture, prompt in zip(completions, prompts, strict=True):
        brightness = ImageStat.Stat(picture.convert("L")).mean[0] / 255
        scores.append(-abs(brightness - level) if prompt else None)
    return scores


if __name__ == "__main__":
    for line in check_reward(function_reward(NAME)()):
        print("ok:", line)
'''


def write_reward(name: str, folder: Path, *, function: bool = False) -> tuple[Path, str]:
    """Write `folder/name.py` with a reward to start from.

    Args:
        name: in lower case, as `edge_sharpness`; the file's and the function's name. The class is `EdgeSharpness`.
        folder: made if missing.
        function: a plain function instead of a class.

    Returns:
        The file, and the name of the class or function in it.

    Raises:
        ConfigError: a name that will not do, a file that is there already, or a folder that cannot be written.
    """
    path = folder / f"{name}.py"
    if os.path.lexists(path):  # asked first: such a file may also be a module that Python finds
        raise ConfigError(f"{path} is there already; choose another name or --output")
    _check_name(name)
    symbol = name if function else _class_name(name)
    text = (FUNCTION if function else CLASS).replace("CLASS_NAME", symbol).replace("NAME", name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {(error.strerror or str(error)).lower()}") from None
    return path, symbol


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
        proposed = re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_0123456789")
        guess = f" Did you mean '{proposed}'?" if proposed else ""
        raise ConfigError(f"'{name}' will not do as a name: use lower-case words such as 'edge_sharpness'.{guess}")
    if keyword.iskeyword(name) or name in dir(builtins):
        raise ConfigError(f"'{name}' is a word of Python itself; choose another name")
    if importlib.util.find_spec(name) is not None:
        raise ConfigError(f"'{name}' is the name of a module already, which the file would hide; choose another")


def _class_name(name: str) -> str:
    camel = "".join(word.capitalize() for word in name.split("_"))
    taken = {"Reward", "Score", "Example", "Sequence", "Tensor"} | set(dir(builtins)) | set(keyword.kwlist)
    return f"{camel}Reward" if camel in taken or camel == "ConfigError" else camel
