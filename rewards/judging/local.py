"""A vision-language model on this machine that answers questions, with a gradient to the pictures."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewardgen import hub
from rewardgen.errors import CheckpointError, ConfigError
from rewardgen.rewards.cache import TensorCache
from rewardgen.rewards.judging.pictures import to_pil
from rewardgen.rewards.judging.preprocess import Preprocess, one_tile
from rewardgen.rewards.judging.questions import Part, Question
from rewardgen.rewards.judging.recompute import go_on_recomputing, recompute_layers
from rewardgen.transfer import to_device

_KEPT_TEXTS = 1024


def load_model(model: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Read an image-text model and its processor: a folder, an adapter's folder, or a repository of the hub.

    Weights are read from safetensors only, and no code of the repository is run.

    Raises:
        ConfigError: something that its processor needs is not installed.
        CheckpointError: there is no such model, or it is damaged or of another kind.
    """
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
        if getattr(processor.image_processor, "backend", "pil") != "pil":
            # torchvision, where it is installed, resizes by other arithmetic than models were trained with.
            processor.image_processor = AutoImageProcessor.from_pretrained(model, backend="pil")
        weights = AutoModelForImageTextToText.from_pretrained(
            model, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except ImportError as error:
        needs = "torchvision" if "torchvision" in str(error).lower() else str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model: the processor of '{model}' needs {needs}, which is not installed (pip install {needs});"
            " LLaVA's works without"
            if needs == "torchvision"
            else f"model: '{model}' cannot be read: {needs}"
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        advice = "" if Path(model).exists() else hub.remedy(model, error)
        raise CheckpointError(
            f"model: '{model}' is no image-text model that can be read: {said}{advice and '; ' + advice}"
        ) from error
    return weights, processor


def save_model(model: Any, processor: Any, folder: Path) -> None:
    """Write what `load_model` reads."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def render(processor: Any, question: Question, parts: Sequence[Part]) -> str:
    """The question as the model's chat template has it, up to where the answer begins."""
    content: list[dict[str, str]] = []
    for part in parts:
        if not isinstance(part, str):
            content.append({"type": "image"})
            continue
        # What a prompt says must not be taken for a picture, or for a video.
        for token in (processor.image_token, getattr(processor, "video_token", None)):
            part = part.replace(token, " ") if token else part
        content.append({"type": "text", "text": part})
    messages = [{"role": "user", "content": content}]
    if question.settings.system:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": question.settings.system}]})
    rendered: str = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return rendered


def answer_tokens(tokenizer: Any, values: Mapping[str, float]) -> dict[str, list[int]]:
    """Tokens that each answer may begin with, whatever its case and whether a space stands before it.

    Raises:
        ConfigError: the tokenizer has no token of its own for an answer.
    """
    found: dict[str, set[int]] = {}
    for answer in values:
        spellings = {form for word in (answer, answer.capitalize(), answer.upper()) for form in (word, f" {word}")}
        encoded = [tokenizer.encode(spelling, add_special_tokens=False) for spelling in spellings]
        found[answer] = {tokens[0] for tokens in encoded if len(tokens) == 1} - {tokenizer.unk_token_id}
    every = [token for tokens in found.values() for token in tokens]
    for answer, tokens in found.items():
        tokens -= {token for token in tokens if every.count(token) > 1}
        if not tokens:
            raise ConfigError(f"model: its tokenizer has no single token for the answer '{answer}'")
    return {answer: sorted(tokens) for answer, tokens in found.items()}


def check_plain(question: Question) -> None:
    """Raise ConfigError for a question whose reply does not begin with the answer."""
    if question.settings.reasons:
        raise ConfigError(f"question: '{question.name}' asks for reasons first, which only vlm_judge can read")


class LocalModel(nn.Module):
    """Answers a question about pictures by the probabilities of the reply's first token.

    Args:
        model: a transformers image-text model.
        processor: its processor, with an image processor on PIL and a chat template. One that cuts pictures into tiles
            is told to make one of each (`preprocess.one_tile`).
        question: what is asked; its reply must begin with the answer.
        checkpointing: recompute the layers in the backward pass instead of keeping their activations.
        round_8bit: see pictures as 8-bit files, which the model was trained on.
        preprocess: what the processor does to pictures; None finds out, by comparing with it.

    Raises:
        ConfigError: the processor or the question cannot be used with a gradient.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        question: Question,
        *,
        checkpointing: bool = True,
        round_8bit: bool = True,
        preprocess: Preprocess | None = None,
    ) -> None:
        super().__init__()
        name = str(getattr(model, "name_or_path", "")) or type(model).__name__
        check_plain(question)
        if not getattr(processor, "chat_template", None):
            raise ConfigError(f"model: the processor of '{name}' has no chat template")
        if not isinstance(getattr(processor, "image_token", None), str):
            raise ConfigError(f"model: the processor of '{name}' has no token for a picture")
        if preprocess is None:
            one_tile(processor, name=f"model: '{name}'")
            preprocess = Preprocess.of(processor.image_processor, name=f"model: '{name}'")
        self.preprocess = preprocess
        self.model, self.processor, self.question = model, processor, question
        self.round_8bit = round_8bit
        self.tokens = answer_tokens(processor.tokenizer, question.values)
        self._checkpointing = checkpointing
        if checkpointing:
            recompute_layers(model)
        self._kept = TensorCache()
        self._texts: OrderedDict[tuple[str, tuple[tuple[int, int], ...]], dict[str, Tensor]] = OrderedDict()
        self.eval()

    def train(self, mode: bool = True) -> LocalModel:
        """As of any module; but layers go on recomputing in evaluation, where transformers would not."""
        super().train(mode)
        if self._checkpointing and not mode:
            go_on_recomputing(self.model)
        return self

    def forward(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
        """Expected worth of the answer in [0, 1], and the probability that the reply is an answer at all.

        Both are scalars. The first is P(yes) / (P(yes) + P(no)) for a yes/no question.
        """
        pictures = [part for part in parts if isinstance(part, Tensor)]
        weight = self.model.get_input_embeddings().weight
        seen = [self.preprocess(to_device(picture, weight.device), round_8bit=self.round_8bit) for picture in pictures]
        inputs = {name: to_device(tensor, weight.device) for name, tensor in self.text_inputs(parts).items()}
        # A reward differs between pictures in its third digit; autocast's bfloat16 would drown that.
        with torch.autocast(weight.device.type, enabled=False):
            pixels = self.preprocess.batch(seen).to(weight.dtype)
            logits = self.model(**inputs, pixel_values=pixels, use_cache=False, logits_to_keep=1).logits[0, -1]
        logits_V = logits if logits.dtype == torch.float64 else logits.float()
        log_p_V = logits_V.log_softmax(-1)
        log_mass_A = torch.stack([log_p_V[tokens].logsumexp(0) for tokens in self._tokens_on(weight.device)])
        worth_A = self._kept.get(
            (log_mass_A.dtype, weight.device),
            lambda: to_device(torch.tensor(list(self.question.values.values()), dtype=log_mass_A.dtype), weight.device),
        )
        return (log_mass_A.softmax(0) * worth_A).sum(), log_mass_A.logsumexp(0).exp()

    def _tokens_on(self, device: torch.device) -> list[Tensor]:
        """The numbers of each answer's tokens there. Kept: a list as an index is a copy that the host waits for."""
        return [
            self._kept.get((answer, device), partial(to_device, torch.tensor(tokens), device))
            for answer, tokens in self.tokens.items()
        ]

    def text_inputs(self, parts: Sequence[Part]) -> dict[str, Tensor]:
        """All but the pixels, [1, tokens], as the processor makes them; they depend on the pictures' sizes alone."""
        pictures = [part for part in parts if isinstance(part, Tensor)]
        text = render(self.processor, self.question, parts)
        key = (text, tuple((int(p.shape[-2]), int(p.shape[-1])) for p in pictures))
        if key not in self._texts:
            made = self.processor(
                images=[to_pil(torch.zeros_like(picture, device="cpu")) for picture in pictures],
                text=[text],
                return_tensors="pt",
                add_special_tokens=False,  # the chat template has them
            )
            self._texts[key] = {name: tensor for name, tensor in made.items() if name != "pixel_values"}
        self._texts.move_to_end(key)
        if len(self._texts) > _KEPT_TEXTS:
            self._texts.popitem(last=False)
        return self._texts[key]
