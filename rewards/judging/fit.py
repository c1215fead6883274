"""Teaching a local judge from labelled pictures with TRL, and how far it agrees with held-out labels.

A labelled picture is an `Example` whose `target` is the picture to judge and whose `extras["label"]` is the answer:
`yes` or `no` (or true or false), or a number of the question's rubric.
"""

from __future__ import annotations

import importlib
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewardgen.errors import ConfigError
from rewardgen.rewards.judging.local import LocalModel, render
from rewardgen.rewards.judging.pictures import to_pil
from rewardgen.rewards.judging.questions import Question
from rewardgen.types import Example

SMALL = 100_000_000
"""Models of fewer parameters are trained whole, others by LoRA, if nothing is said."""
LORA_RANK = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class FitConfig:
    """How a judge is taught.

    Args:
        num_steps: optimizer steps.
        batch_size: labelled pictures in a step.
        lr: highest learning rate; linear warm-up over a tenth of the steps, then a cosine to zero.
        lora_rank: rank of LoRA on all linear layers; 0 trains all parameters; None decides by the model's size.
        seed: of the order and of LoRA's first weights.
    """

    num_steps: int = 500
    batch_size: int = 8
    lr: float = 1e-4
    lora_rank: int | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How far a judge agrees with labels.

    Args:
        balanced_accuracy: mean over the labels of the share of their pictures that were judged so; chance is
            1 / number of labels, whatever their frequencies.
        accuracy: share of all pictures.
        recalls: the shares that the first is the mean of, by label.
        counts: labelled pictures by label.
        not_applicable: pictures that the question could not be put about; they are left out.
    """

    balanced_accuracy: float
    accuracy: float
    recalls: dict[str, float]
    counts: dict[str, int]
    not_applicable: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def label_of(question: Question, example: Example) -> str:
    """The labelled answer. Raises ConfigError for a label that is no answer to the question, or a missing picture."""
    label = example.extras.get("label")
    word = {True: "yes", False: "no"}[label] if isinstance(label, bool) else str(label).strip().casefold()
    if label is None or word not in question.values:
        raise ConfigError(
            f"example '{example.id}': extras.label is {label!r}; '{question.name}' is answered by"
            f" {', '.join(question.values)}"
        )
    if example.target is None:
        raise ConfigError(f"example '{example.id}' has no target, which is the picture to be judged")
    return word


def agreement(judge: LocalModel, examples: Iterable[Example]) -> Agreement:
    """Judge labelled pictures and compare: the judge's answer is the one whose worth is nearest to its score.

    Raises:
        ConfigError: a label is missing or unknown, or there are not two different ones.
    """
    right: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    without = 0
    values = judge.question.values
    for example in examples:
        label = label_of(judge.question, example)
        parts = judge.question.put(_target(example), example)
        if parts is None:
            without += 1
            continue
        with torch.no_grad():
            value = float(judge(parts)[0])
        counts[label] += 1
        right[label] += min(values, key=lambda answer: abs(values[answer] - value)) == label
    if len(counts) < 2:
        raise ConfigError(f"the held-out labels are all {' '.join(counts) or 'missing'}: agreement needs two kinds")
    recalls = {label: right[label] / counts[label] for label in sorted(counts)}
    return Agreement(
        balanced_accuracy=sum(recalls.values()) / len(recalls),
        accuracy=right.total() / counts.total(),
        recalls=recalls,
        counts={label: counts[label] for label in sorted(counts)},
        not_applicable=without,
    )


def fit(judge: LocalModel, examples: Iterable[Example], folder: Path, config: FitConfig) -> None:
    """Teach a judge its answers by TRL's `SFTTrainer` (loss on the answer alone), and save it to a folder.

    The model in memory is used up: read the folder again with `load_model`. With LoRA the folder holds an adapter.

    Raises:
        ConfigError: TRL is not installed, a label is missing or unknown, or nothing can be asked.
    """
    trl, datasets = _extra("trl"), _extra("datasets")
    rows = [row for example in examples if (row := _row(judge, example)) is not None]
    if not rows:
        raise ConfigError("the question can be put about none of the labelled pictures: do they have the references?")
    features = datasets.Features(
        prompt=datasets.Value("string"), completion=datasets.Value("string"), images=[datasets.Image()]
    )
    columns = {name: [row[name] for row in rows] for name in features}
    parameters = sum(parameter.numel() for parameter in judge.model.parameters())
    rank = config.lora_rank if config.lora_rank is not None else (0 if parameters < SMALL else LORA_RANK)
    model = judge.model.requires_grad_(True).train()
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        settings = trl.SFTConfig(
            output_dir=scratch,
            max_steps=config.num_steps,
            per_device_train_batch_size=config.batch_size,
            learning_rate=config.lr,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, config.num_steps // 10),
            completion_only_loss=True,
            max_length=None,  # cutting would cut pictures
            gradient_checkpointing=parameters >= SMALL,
            bf16=model.dtype == torch.bfloat16,
            use_cpu=model.device.type == "cpu",
            seed=config.seed,
            save_strategy="no",
            logging_steps=max(1, config.num_steps // 20),
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=model.device.type != "cpu",
        )
        trainer = trl.SFTTrainer(
            model=model,
            args=settings,
            train_dataset=datasets.Dataset.from_dict(columns, features=features),
            processing_class=judge.processor,
            peft_config=_lora(rank) if rank else None,
        )
        trainer.train()
        trainer.model.save_pretrained(folder)
        judge.processor.save_pretrained(folder)


def _row(judge: LocalModel, example: Example) -> dict[str, Any] | None:
    label = label_of(judge.question, example)
    parts = judge.question.put(_target(example), example)
    if parts is None:
        return None
    images = [to_pil(part) for part in parts if isinstance(part, Tensor)]
    eos = judge.processor.tokenizer.eos_token or ""
    return {
        "prompt": render(judge.processor, judge.question, parts),
        "completion": _spelling(judge, label) + eos,
        "images": images,
    }


def _spelling(judge: LocalModel, answer: str) -> str:
    """The first common spelling of an answer that is a single token, one of those that the judge is read by."""
    encode = judge.processor.tokenizer.encode
    for spelling in (answer.capitalize(), answer, f" {answer.capitalize()}", f" {answer}"):
        tokens = encode(spelling, add_special_tokens=False)
        if len(tokens) == 1 and tokens[0] in judge.tokens[answer]:
            return spelling
    raise ConfigError(f"model: its tokenizer has no single token for the answer '{answer}'")


def _target(example: Example) -> Tensor:
    if example.target is None:
        raise ConfigError(f"example '{example.id}' has no target, which is the picture to be judged")
    return example.target


def _lora(rank: int) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def _extra(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        fix = "pip install -e '.[judge]' in the checkout"
        raise ConfigError(f"fitting a judge needs {name} ({error}): {fix}") from error
