"""Questions to a judge: templates as files, and what a reply to one is worth.

A template is a text file. It begins with settings in YAML between two lines `---` (see `TemplateSettings`), then comes
the question. In it stand, each any number of times: `{picture}`, the picture to be judged; `{content_refs}`,
`{style_refs}` and `{identity_refs}`, all of the example's references of that kind; `{target}` and `{prompt}`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, TypeAlias

import yaml
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from rewardgen.errors import ConfigError, nearest
from rewardgen.settings import Settings
from rewardgen.types import Example

TEMPLATES = Path(__file__).resolve().parent / "templates"
"""The bundled templates; a file's name without its ending is the question's name."""
PICTURES = ("picture", "content_refs", "style_refs", "identity_refs", "target")
PLACEHOLDERS = (*PICTURES, "prompt")
MIN_MASS = 0.5
"""Share of the first token's probability that the answers must have together. With less, a service's reply is read as
text instead, and a local model has given no answer."""

Part: TypeAlias = str | Tensor
"""A piece of a question as it is put: text, or a picture [3, H, W] in [0, 1]."""


class Rubric(Settings):
    """Answers are whole numbers, worth 0 at `lowest` to 1 at `highest`."""

    lowest: int = Field(ge=0)
    """The worst."""
    highest: int = Field(le=9)
    """The best; one digit, so that it is one token."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.lowest >= self.highest:
            raise ValueError("lowest must be below highest")
        return self


class TemplateSettings(Settings):
    """The settings at the head of a template."""

    answer: Literal["yes_no"] | Rubric
    """`yes_no`, worth 1 and 0, or a rubric such as `{lowest: 0, highest: 4}`."""
    reasons: bool = False
    """The reply gives reasons first and ends with a line such as `Score: 3`. Log-probabilities are not asked for."""
    max_tokens: int = Field(default=8, ge=1)
    """Longest reply."""
    system: str = ""
    """System message; none where empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A template, read.

    Args:
        name: for messages.
        parts: text and names of placeholders in turn, text first: the even ones are text.
        values: what each answer is worth in [0, 1], by its word in lower case.
        settings: the head of the template.
    """

    name: str
    parts: tuple[str, ...]
    values: Mapping[str, float]
    settings: TemplateSettings

    @property
    def by_logprob(self) -> bool:
        """Whether the first token of a reply is the answer, so that its probabilities can be read."""
        return not self.settings.reasons

    def put(self, picture_3HW: Tensor, example: Example) -> tuple[Part, ...] | None:
        """The question about a picture, or None where the example lacks what the question speaks of."""
        found: list[Part] = []
        for index, part in enumerate(self.parts):
            if index % 2 == 0:
                found += [part] if part else []
            elif part == "prompt":
                if not example.prompt.strip():
                    return None
                found.append(example.prompt)
            else:
                pictures = _pictures(part, picture_3HW, example)
                if not pictures:
                    return None
                found += pictures
        return tuple(_joined(found))


def load_question(name: str) -> Question:
    """Read a bundled template by its name (`style`), or one's own by its path (`./mine.txt`).

    Raises:
        ConfigError: there is none, or it is not well formed; names the file and the fix.
    """
    bundled = {path.stem: path for path in sorted(TEMPLATES.glob("*.txt"))}
    path = bundled.get(name) or Path(name).expanduser()
    if name not in bundled and not path.suffix:
        raise ConfigError(
            f"question: there is no bundled template '{name}'.{nearest(name, bundled)} There are: {', '.join(bundled)}."
            " One's own is written as a path, such as ./mine.txt"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"question: the template {path} cannot be read: {(reason or str(error)).lower()}") from None
    return parse_template(text, name=name)


def check_question(name: str) -> Question | None:
    """As `load_question`, but None where it is a file that is not here (yet)."""
    if Path(name).suffix:
        try:
            if not Path(name).expanduser().is_file():
                return None
        except (OSError, RuntimeError):  # no path that can be, or nobody of that name has a home here
            return None
    return load_question(name)


def parse_template(text: str, *, name: str) -> Question:
    """Parse the text of a template. Raises ConfigError as `load_question`."""
    where = f"question: the template '{name}'"
    head = re.match(r"---[ \t]*\n(.*?)\n---[ \t]*\n", text.replace("\r\n", "\n"), re.DOTALL)
    if head is None:
        raise ConfigError(f"{where} must begin with its settings between two lines '---', such as 'answer: yes_no'")
    try:
        found = yaml.safe_load(head[1])
        settings = TemplateSettings.model_validate(found)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: its settings are no YAML: {str(error).splitlines()[0]}") from None
    except ValidationError as error:
        told = []
        for fault in error.errors(include_url=False):
            key = ".".join(str(part) for part in fault["loc"] if part != "Rubric") or "settings"
            unknown = fault["type"] == "extra_forbidden"
            told.append(f"{key}: {fault['msg']}{nearest(key, TemplateSettings.model_fields) if unknown else ''}")
        raise ConfigError(f"{where}: {'; '.join(told)}") from None
    body = text.replace("\r\n", "\n")[head.end() :].strip()
    for wrong in re.findall(r"\{(\w*)\}", body):
        if wrong not in PLACEHOLDERS:
            hint = nearest(wrong, PLACEHOLDERS) or f" There are: {', '.join(PLACEHOLDERS)}."
            raise ConfigError(f"{where}: unknown placeholder '{{{wrong}}}'.{hint}")
    parts = tuple(re.split(r"\{(\w+)\}", body))
    if "picture" not in parts[1::2]:
        raise ConfigError(f"{where} does not show the picture to be judged; put {{picture}} where it belongs")
    return Question(name=name, parts=parts, values=_values(settings.answer), settings=settings)


def read_text(question: Question, reply: str) -> float | None:
    """What a reply is worth, in [0, 1]; None if it is not an answer, beyond doubt and nothing else.

    Accepted is the bare answer (`yes`, `**No.**`, `3`), or one line `Answer: yes`, `Score: 3` or `Rating: 3`, which
    must come last where the template asks for reasons. Case and quotation marks do not matter. "Yes, but ..." and
    two different answer lines are none.
    """
    word = re.compile(r"[\s*_`\"'(]*([A-Za-z]+|[0-9]+)[\s*_`\"').!]*")
    whole = word.fullmatch(reply)
    if whole is not None:
        return question.values.get(whole[1].casefold())
    lines = [line for line in reply.splitlines() if line.strip()]
    labelled = re.compile(r"[\s*_`#>-]*(?:answer|score|rating)[\s*_`]*:(.*)", re.IGNORECASE)
    found = [(index, match[1]) for index, line in enumerate(lines) if (match := labelled.fullmatch(line))]
    if len(found) != 1 or (question.settings.reasons and found[0][0] != len(lines) - 1):
        return None
    answer = word.fullmatch(found[0][1])
    return None if answer is None else question.values.get(answer[1].casefold())


def read_logprobs(question: Question, candidates: Sequence[tuple[str, float]]) -> float | None:
    """Expected worth of the first token, over the answers alone: P(yes) / (P(yes) + P(no)) for a yes/no question.

    Spellings of one answer (`Yes`, ` yes`) are added up. None where the answers have less than `MIN_MASS` of the
    probability: then the model was about to say something else.

    Args:
        candidates: (token, natural logarithm of its probability), each token once.
    """
    mass = dict.fromkeys(question.values, 0.0)
    for token, logprob in candidates:
        answer = token.strip().casefold()
        if answer in mass and not math.isnan(logprob) and logprob <= 1e-3:
            mass[answer] += math.exp(logprob)
    total = sum(mass.values())
    if not MIN_MASS <= total <= 1.01:
        return None
    return sum(mass[answer] * value for answer, value in question.values.items()) / total


def _values(answer: Literal["yes_no"] | Rubric) -> dict[str, float]:
    if isinstance(answer, Rubric):
        span = answer.highest - answer.lowest
        return {str(k): (k - answer.lowest) / span for k in range(answer.lowest, answer.highest + 1)}
    return {"yes": 1.0, "no": 0.0}


def _pictures(part: str, picture_3HW: Tensor, example: Example) -> list[Tensor]:
    if part == "picture":
        return [picture_3HW]
    if part == "target":
        return [] if example.target is None else [example.target]
    found: tuple[Tensor, ...] = getattr(example, part)
    return list(found)


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Neighbouring texts as one."""
    found: list[Part] = []
    for part in parts:
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    return found
