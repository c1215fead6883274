"""Plain functions as rewards, called the way TRL calls a reward function: keyword arguments in, a list of scores out.

    def sharpness(completions, prompts, threshold=0.1, **columns) -> list[float | None]: ...

Each call hands over one batch; every argument is a list with one entry for each picture:

- `prompts`: the texts, `ids`: the examples' ids;
- `completions`: the pictures to score, RGB `PIL.Image`s (values rounded to 8 bits, as a saved picture's are);
- `content_refs`, `style_refs`, `identity_refs`: a list of pictures for each example; `target`: a picture or None;
- every column of the dataset (`Example.extras`) under its own name, None for examples that lack it; one that has a
  name of the above is an error.

A function that names `pixels_B3HW` works on tensors: that argument is [B, 3, H, W] in [0, 1], and the references and
the target are tensors [3, H, W] in [0, 1] too. It costs no conversion to PIL unless `completions` is named as well.

Where samples are learned from, an `async` function is called for all of a step's batches before the first answer is
waited for, and runs in a thread beside the drawing: it may wait, but must not draw from the global generators.

Differences from TRL (1.x, `GRPOTrainer`): completions are pictures; a function without `**kwargs` gets only what it
names (TRL passes everything and such a function fails); there are no `completion_ids`, `trainer_state`, `log_extra` or
`log_metric`; NaN is an error, only None means "not applicable"; an exception masks the batch instead of ending the run
at once; evaluations ask several `async` functions one after the other.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, ClassVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewardgen import event_loop
from rewardgen.errors import ConfigError, ScoringError, nearest
from rewardgen.reward import Reward, RewardWarning
from rewardgen.types import Begun, Example, Score

MAX_FAILED_IN_A_ROW = 64
"""The run stops when a function has raised for this many pictures without scoring a single one in between."""

_REFERENCES = ("content_refs", "style_refs", "identity_refs")


class FunctionReward(Reward):
    """A reward that asks a function; `function_reward` makes one subclass for each function. It has no gradient.

    None masks a picture. An exception masks the whole batch, with one warning for each type of exception; after
    `MAX_FAILED_IN_A_ROW` pictures the run stops. An example that lacks a column which the function requires (a
    parameter without a default) is masked and not shown to it.

    Args:
        args: values of the function's own parameters; they win over columns of the same name.

    Raises:
        TypeError: an argument that the function does not take.
    """

    differentiable = False
    function: ClassVar[Callable[..., Any]]
    FILLED: ClassVar[tuple[str, ...]] = ("prompts", "completions", "pixels_B3HW", "ids", *_REFERENCES, "target")
    """Parameters that each call fills in; they cannot be given as arguments."""

    def __init__(self, **args: Any) -> None:
        super().__init__()
        inspect.signature(type(self)).bind(**args)
        self.args = args
        self._named, self._takes_any = _parameters(self.function)
        self._required = [
            name
            for name, parameter in self._named.items()
            if parameter.default is parameter.empty and name not in self.FILLED and name not in args
        ]
        self._seen_columns: set[str] = set()
        self._warned: set[str] = set()
        self._failed_in_a_row = 0
        self._running: set[Future[Any]] = set()

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        """Score pictures in [0, 1].

        Raises:
            ScoringError: the function returned something else than one finite number or None for each picture, a
                column has the name of a parameter that is filled in, or the function failed too often.
        """
        return self.begin(pixels_B3HW, examples).finish()

    def begin(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Begun[Score]:
        """As `score`, but what an `async` function waits for is waited for by `finish`.

        There failures are counted too, so that their order is that of the batches, whichever answer came first.
        """
        rows = [row for row, example in enumerate(examples) if self._has_columns(example)]
        count, device = len(examples), pixels_B3HW.device
        if not rows:
            if examples:
                self._warn_of_columns(examples)
            return Begun(lambda: _score([None] * count, device))
        with torch.no_grad():
            asked = self._call(self._arguments(pixels_B3HW.detach()[rows], [examples[row] for row in rows]), len(rows))

        def finish() -> Score:
            found = dict(zip(rows, asked.finish(), strict=True))
            return _score([found.get(row) for row in range(count)], device)

        return Begun(finish)

    def give_up(self) -> None:
        """Calls of an `async` function that still run are cancelled."""
        for future in tuple(self._running):
            future.cancel()
        self._running.clear()

    def _call(self, arguments: Mapping[str, Any], count: int) -> Begun[Sequence[float | None]]:
        """Ask the function about `count` pictures."""
        nothing: list[float | None] = [None] * count
        try:
            returned = self.function(**arguments)
        except Exception as error:
            self._failed(error, count)
            return Begun(lambda: nothing)
        if not inspect.isawaitable(returned):
            checked = self._answered(returned, count)
            return Begun(lambda: checked)
        future = event_loop.start(returned)
        self._running.add(future)

        def finish() -> Sequence[float | None]:
            try:
                answer = future.result()
            except Exception as error:
                self._failed(error, count)
                return nothing
            except BaseException:  # nobody waits any more
                self.give_up()
                raise
            finally:
                self._running.discard(future)
            return self._answered(answer, count)

        return Begun(finish)

    def _answered(self, returned: Any, count: int) -> Sequence[float | None]:
        self._failed_in_a_row = 0
        return self._checked(returned, count)

    def _arguments(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> dict[str, Any]:
        """What the function is called with: only what it names, or everything where it takes `**kwargs`."""
        columns = dict.fromkeys(name for example in examples for name in example.extras)
        wanted = [name for name in columns if self._takes_any or name in self._named]
        if taken := [name for name in wanted if name in self.FILLED]:
            raise ScoringError(f"{self._name()} is given '{taken[0]}' by the engine; rename that column of the dataset")
        return {
            **{name: [example.extras.get(name) for example in examples] for name in wanted},
            **self._filled(pixels_B3HW, examples),
            **self.args,
        }

    def _filled(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> dict[str, Any]:
        def picture(pixels_3HW: Tensor) -> Tensor | Image.Image:
            return pixels_3HW if "pixels_B3HW" in self._named else to_pil(pixels_3HW)

        def references(name: str) -> list[list[Tensor | Image.Image]]:
            return [[picture(ref_3HW) for ref_3HW in getattr(example, name)] for example in examples]

        offered: dict[str, Callable[[], Any]] = {
            "prompts": lambda: [example.prompt for example in examples],
            "completions": lambda: [to_pil(pixels_3HW) for pixels_3HW in pixels_B3HW],
            "pixels_B3HW": lambda: pixels_B3HW.clamp(0, 1),
            "ids": lambda: [example.id for example in examples],
            "target": lambda: [None if example.target is None else picture(example.target) for example in examples],
            **{name: functools.partial(references, name) for name in _REFERENCES},
        }
        # Who collects the rest in **kwargs is not given the pictures a second time.
        unnamed = set(offered) - {"pixels_B3HW"} if self._takes_any else set()
        return {name: make() for name, make in offered.items() if name in self._named or name in unnamed}

    def _checked(self, returned: Any, count: int) -> list[float | None]:
        what = f"{self._name()} returned"
        if isinstance(returned, Tensor | np.ndarray):
            returned = returned.tolist()
        if not isinstance(returned, list | tuple):
            raise ScoringError(f"{what} {type(returned).__name__}; expected a list of numbers or None, one per picture")
        if len(returned) != count:
            raise ScoringError(f"{what} {len(returned)} scores for {count} pictures")
        return [self._number(value, f"{what} {value!r} for picture {place}") for place, value in enumerate(returned)]

    @staticmethod
    def _number(value: Any, what: str) -> float | None:
        if value is None:
            return None
        if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1):
            value = value.item()
        if not isinstance(value, numbers.Real):
            raise ScoringError(f"{what}; expected a number or None")
        # Scores are kept in float32: what does not fit there is not finite either.
        if not math.isfinite(torch.tensor(float(value), dtype=torch.float32).item()):
            raise ScoringError(f"{what}; return None where there is no score")
        return float(value)

    def _failed(self, error: Exception, count: int) -> None:
        self._failed_in_a_row += count
        # The line in the function's own file; the exception may come from deep inside a library.
        file = getattr(getattr(inspect.unwrap(self.function), "__code__", None), "co_filename", None)
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
        told = f"{self._name()} raised {type(error).__name__}: {error}{where}"
        if self._failed_in_a_row >= MAX_FAILED_IN_A_ROW:
            raise ScoringError(f"{told}; it has scored none of the last {self._failed_in_a_row} pictures") from error
        self._warn(type(error).__qualname__, f"{told}; scores of such batches are masked and counted")

    def _has_columns(self, example: Example) -> bool:
        self._seen_columns.update(example.extras)
        return all(name in example.extras for name in self._required)

    def _warn_of_columns(self, examples: Sequence[Example]) -> None:
        for name in self._required:
            if name not in self._seen_columns:
                known = nearest(name, (column for example in examples for column in example.extras))
                self._warn(name, f"{self._name()} needs the column '{name}', which no example has.{known}")

    def _warn(self, reason: str, message: str) -> None:
        if reason not in self._warned:
            warnings.warn(message, RewardWarning, stacklevel=2)
            self._warned.add(reason)

    def _name(self) -> str:
        return f"reward function '{type(self).__name__}'"


@functools.cache
def function_reward(function: Callable[..., Any]) -> type[FunctionReward]:
    """The reward class of a function: named as it, with its parameters as constructor arguments.

    `check_reward(function_reward(sharpness)(radius=2))` checks the function `sharpness` with `radius=2` bound.

    Args:
        function: `def` or `async def`; see the module for what it is called with and what it returns.

    Raises:
        ConfigError: it could not be called that way.
    """
    name = function.__name__
    parameters, takes_any = _parameters(function)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ConfigError(f"'{name}' takes '{parameter.name}' by position; rewards are called by keywords only")
    if not takes_any and not {"completions", "pixels_B3HW"} & set(parameters):
        raise ConfigError(
            f"'{name}' is no reward function: it takes neither 'completions' (PIL images) nor 'pixels_B3HW' (a tensor)"
        )

    def init(self: FunctionReward, **args: Any) -> None:
        FunctionReward.__init__(self, **args)

    # Arguments are checked by the annotations of `__init__`, which are the function's.
    functools.update_wrapper(init, function, assigned=("__module__",), updated=())
    # A parameter without default may still be a column of the dataset, so none is required.
    own = [
        parameter.replace(kind=parameter.KEYWORD_ONLY, default=None)
        for name, parameter in parameters.items()
        if name not in FunctionReward.FILLED
    ]
    content = {
        "function": staticmethod(function),
        "__init__": init,
        "__signature__": inspect.Signature(own),
        "__doc__": function.__doc__,
    }
    return cast(type[FunctionReward], type(name, (FunctionReward,), content))


def to_pil(pixels_3HW: Tensor) -> Image.Image:
    """A picture [3, H, W] in [0, 1] as an 8-bit RGB image of W x H."""
    values_HW3 = (pixels_3HW.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(values_HW3.cpu().numpy())


def _score(scores: Sequence[float | None], device: torch.device) -> Score:
    # NaN where there is no score: no mean can take it for one.
    values = [math.nan if value is None else value for value in scores]
    valid = [value is not None for value in scores]
    return Score(
        value_B=torch.tensor(values, dtype=torch.float32, device=device),
        valid_B=torch.tensor(valid, dtype=torch.bool, device=device),
    )


def _parameters(function: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """Parameters that can be given by keyword, and whether there is a `**kwargs`."""
    signature = inspect.signature(function).parameters.values()
    named = {p.name: p for p in signature if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named, any(p.kind is p.VAR_KEYWORD for p in signature)
