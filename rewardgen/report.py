"""What a run says while it runs: `metrics.jsonl`, TensorBoard, wandb and the console."""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Literal, Self

from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from rewardgen.errors import UserError
from rewardgen.manifest import redact
from rewardgen.settings import Settings
from rewardgen.types import StepReport

METRICS = "metrics.jsonl"


class WandbConfig(Settings):
    """Where the run is shown on Weights & Biases; needs the extra `wandb`."""

    project: str
    """Name of the project there."""
    entity: str | None = None
    """User or team; by default the account's own."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes into the run's folder, for `wandb sync` later."""
    tags: tuple[str, ...] = ()
    """Labels of the run."""


class ReportConfig(Settings):
    """Where a run's numbers go. `metrics.jsonl` is always written."""

    tensorboard: bool = True
    """Write TensorBoard events into `tensorboard/` of the run's folder."""
    wandb: WandbConfig | None = None
    """Log to Weights & Biases."""
    console: bool = True
    """Show a progress bar, or lines where the output is no terminal."""
    log_every: int = Field(default=10, ge=1)
    """Steps between two lines on the console where it is no terminal."""


class Reporter:
    """Writes each step's report to every place that was asked for. A context manager; `close` does the same.

    Args:
        folder: the run's folder, made if missing.
        config: where to write.
        num_steps: length of the whole run.
        experiment: shown by wandb as the run's configuration.
        console: of the progress bar; by default standard output.

    Raises:
        UserError: wandb or TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        folder: Path,
        config: ReportConfig,
        *,
        num_steps: int,
        experiment: Mapping[str, Any] | None = None,
        console: Console | None = None,
    ) -> None:
        self.folder = folder
        self.config = config
        self.num_steps = num_steps
        self._experiment = dict(experiment or {})
        self._make_wandb = _door("wandb") if config.wandb else None
        self._make_writer = _door("tensorboard") if config.tensorboard else None
        self._screen = _Screen(num_steps, config.log_every, console or Console()) if config.console else None
        self._file: IO[str] | None = None
        self._writer: Any = None
        self._wandb: Any = None

    def start(self, first_step: int = 0) -> None:
        """Open everything, before the step of index `first_step`; more than 0 resumes a run.

        Lines of a former run that ran further are cut from `metrics.jsonl`: those of the steps that come again, and
        those of evaluations after more than `first_step` completed steps. No step stands twice.

        Raises:
            UserError: the folder cannot be written.
        """
        self.close()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._open(lambda line: line["step"] < first_step + (line["kind"] == "evaluation"))
        except OSError as error:
            raise UserError(f"{self.folder / METRICS}: cannot be written: {error.strerror}") from error
        if self._make_writer:
            # Events of the steps that come again are hidden.
            self._writer = self._make_writer(log_dir=str(self.folder / "tensorboard"), purge_step=first_step)
        if self._make_wandb and self.config.wandb:
            self._wandb = self._make_wandb(
                project=self.config.wandb.project,
                entity=self.config.wandb.entity,
                mode=self.config.wandb.mode,
                tags=list(self.config.wandb.tags),
                name=self.folder.name,
                dir=str(self.folder),
                id=_run_id(self.folder),
                resume="allow",
                config=redact(self._experiment),
            )
            # A resumed run may be behind what it logged before; wandb's own counter only grows.
            self._wandb.define_metric("*", step_metric="step")
        if self._screen:
            self._screen.start(first_step)

    def step(self, report: StepReport) -> None:
        """Record a finished step; `report.step` counts from 0. Numbers that are not finite become null."""
        if self._file is None:
            self.start(report.step)
        self._write({"kind": "step"} | _plain(report))
        self._scalars(report.step, _flat(report))
        if self._screen:
            self._screen.step(report)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Record an evaluation after `step` completed steps; one of the same step is replaced."""
        if self._file is None:
            self.start(step)
        self._open(lambda line: (line["kind"], line["step"]) != ("evaluation", step))
        self._write({"kind": "evaluation", "step": step, "values": dict(values)})
        self._scalars(step, {f"evaluation/{name}": value for name, value in values.items()})
        if self._screen:
            self._screen.evaluation(step, values)

    def close(self) -> None:
        """Close everything that is open; may be called twice."""
        if self._screen:
            self._screen.stop()
        if self._file:
            self._file.close()
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._file = self._writer = self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Open `metrics.jsonl` for appending, with only the wanted lines of what it holds."""
        if self._file:
            self._file.close()
        path = self.folder / METRICS
        if path.exists():
            text = path.read_text(encoding="utf-8", errors="replace")
            kept = [line for line in text.splitlines() if (found := _line(line)) is not None and wanted(found)]
            cut = "".join(f"{line}\n" for line in kept)
            if cut != text:
                temporary = path.with_name(f".{METRICS}")
                temporary.write_text(cut, encoding="utf-8")
                temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None
        try:
            self._file.write(json.dumps(_finite(line), allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.folder / METRICS}: cannot be written: {error.strerror}") from error

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if self._writer is not None:
            for name, value in finite.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
        if self._wandb is not None:
            self._wandb.log({"step": step, **finite})


class _Screen:
    """The console: a progress bar on a terminal, else a line every few steps."""

    def __init__(self, num_steps: int, log_every: int, console: Console) -> None:
        self.num_steps = num_steps
        self.log_every = log_every
        self.console = console
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._since, self._steps = 0.0, 0

    def start(self, first_step: int) -> None:
        self._since, self._steps = time.monotonic(), 0
        if self.console.is_terminal:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}", markup=False),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("", total=self.num_steps, completed=first_step)
            self._bar.start()

    def step(self, report: StepReport) -> None:
        self._steps += 1
        done = report.step + 1
        if self._bar:
            self._bar.update(self._task, completed=done, description=self._summary(report))
        elif done % self.log_every == 0 or done == self.num_steps or report.skipped:
            self._print(f"step {done}/{self.num_steps}  {self._summary(report)}")
        else:
            return
        self._since, self._steps = time.monotonic(), 0

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        self._print(f"evaluation after {step} steps  {shown}")
        self._since, self._steps = time.monotonic(), 0

    def stop(self) -> None:
        if self._bar:
            self._bar.stop()
        self._bar = None

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _summary(self, report: StepReport) -> str:
        seconds = (time.monotonic() - self._since) / self._steps
        rewards = [f"{name} {value:.4f}" for name, value in report.reward_means.items()]
        reason = "nothing to learn from" if math.isfinite(report.grad_norm) else "gradient not finite"
        skipped = [f"skipped: {reason}"] if report.skipped else []
        fleet = [*_fleet(report.metrics, "fleet", "workers"), *_fleet(report.metrics, "judges", "judges")]
        return "  ".join([f"loss {report.loss:.4f}", *rewards, f"{seconds:.2f} s/step", *fleet, *skipped])


def _door(name: Literal["wandb", "tensorboard"]) -> Callable[..., Any]:
    """The one place that imports what is heavy or optional: wandb's `init` or TensorBoard's writer."""
    try:
        if name == "wandb":
            import wandb

            init: Callable[..., Any] = wandb.init
            return init
        from torch.utils.tensorboard import SummaryWriter

        writer: Callable[..., Any] = SummaryWriter
        return writer
    except ImportError as error:
        fix = "pip install -e '.[wandb]' in the checkout" if name == "wandb" else "pip install tensorboard"
        raise UserError(f"report.{name} is asked for, but {name} cannot be imported ({error}): {fix}") from None


def _fleet(metrics: Mapping[str, float], pool: str, who: str) -> list[str]:
    """A pool in a few words, where there is one; what went wrong only where something did."""
    if f"{pool}/workers" not in metrics:
        return []
    number, busy = metrics[f"{pool}/workers"], metrics[f"{pool}/busy_share"]
    lost, retries = metrics[f"{pool}/lost_workers"], metrics[f"{pool}/retries"]
    trouble = f", {lost:.0f} lost, {retries:.0f} retries" if lost or retries else ""
    return [f"{number:.0f} {who} {100 * busy:.0f} % busy, {metrics[f'{pool}/queue_depth']:.0f} queued{trouble}"]


def _run_id(folder: Path) -> str:
    """The run's name at wandb, kept in its folder so that a resumed run goes on there."""
    path = folder / "wandb_run_id"
    if not path.exists():
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _plain(report: StepReport) -> dict[str, Any]:
    values = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}


def _flat(report: StepReport) -> dict[str, float]:
    """The report's numbers by names such as `reward_means/style`; the places that draw curves group by the slash."""
    flat: dict[str, float] = {}
    for name, value in _plain(report).items():
        if isinstance(value, dict):
            flat |= {f"{name}/{key}": float(inner) for key, inner in value.items()}
        elif name != "step" and value is not None:
            flat[name] = float(value)
    return flat


def _finite(value: Any) -> Any:
    """JSON has no NaN: null says that there is no number."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(text: str) -> dict[str, Any] | None:
    """A line of `metrics.jsonl`, or None for what a dying writer left half written."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and {"kind", "step"} <= line.keys() else None
