"""The tiny encoders: SigLIP vision tower, CLIP and T5 text encoders with word tokenizers, trained together.

One sigmoid loss (SigLIP, arXiv 2303.15343) between pictures and captions that tell content and style; the CLIP
caption is its pooled state, the T5 caption the mean of its states.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

from rewardgen.world.recipes.training import Recipe, fit
from rewardgen.world.scenes import (
    COLUMNS,
    REGIONS,
    ROWS,
    SHAPES,
    TEXTURES,
    Content,
    Split,
    Style,
    describe,
    draw_contents,
    draw_photo_styles,
    draw_styles,
    oklab,
    render,
)

RECIPE = Recipe(name="encoders", version="1", steps=700, batch=48, lr=1e-3, seed=202)
MAX_WORDS = 40
COLOURS = {
    "white": (1.0, 1.0, 1.0), "grey": (0.5, 0.5, 0.5), "black": (0.05, 0.05, 0.05), "red": (0.85, 0.1, 0.1),
    "orange": (0.95, 0.55, 0.1), "yellow": (0.95, 0.9, 0.2), "green": (0.15, 0.7, 0.2), "teal": (0.1, 0.6, 0.6),
    "blue": (0.15, 0.25, 0.85), "purple": (0.5, 0.15, 0.7), "pink": (0.95, 0.6, 0.75), "brown": (0.45, 0.28, 0.12),
}  # fmt: skip
WORDS = (
    "a",
    "and",
    "on",
    "with",
    "outlines",
    "background",
    "shapes",
    "both",
    *SHAPES,
    *TEXTURES,
    *ROWS,
    *COLUMNS,
    *COLOURS,
)


class Encoders(nn.Module):
    """The three encoders and what only their training needs: one projection each, a temperature and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.siglip = SiglipVisionModel(
            SiglipVisionConfig(
                image_size=64,
                patch_size=8,
                hidden_size=48,
                intermediate_size=128,
                num_hidden_layers=20,
                num_attention_heads=3,
            )
        )
        special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
        self.clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=4 + len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=MAX_WORDS, **special,
            )
        )  # fmt: skip
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=4 + len(WORDS), d_model=48, d_kv=16, d_ff=96, num_layers=2, num_heads=3,
                feed_forward_proj="gated-gelu", dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
            )
        )  # fmt: skip
        self.of_clip, self.of_t5 = nn.Linear(32, 48), nn.Linear(48, 48)
        self.scale, self.bias = nn.Parameter(torch.tensor(2.3)), nn.Parameter(torch.tensor(-4.0))


def word_tokenizer(max_length: int = MAX_WORDS) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that ends with </s> and pads with <pad>."""
    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>",
        model_max_length=max_length,
    )  # fmt: skip


def captions(content: Content, style: Style) -> list[str]:
    """Content and style in words."""
    names = list(COLOURS)
    table = oklab(torch.tensor(list(COLOURS.values())))

    def name(rgb: Tensor) -> list[str]:
        return [names[i] for i in torch.cdist(oklab(rgb), table).argmin(1).tolist()]

    ground, fill, ink = name(style.background_N3), name(style.fill_NK3[:, 0]), name(style.ink_N3)
    rows = zip(describe(content), ground, fill, ink, style.texture_N, style.region_N, style.outline_N, strict=True)
    return [
        f"{what} on {g} background with {f} shapes {ink_name} {TEXTURES[t]} on {REGIONS[r]}"
        + (" with outlines" if o > 0 else "")
        for what, g, f, ink_name, t, r, o in rows
    ]


def make(steps: int = RECIPE.steps) -> Encoders:
    torch.manual_seed(RECIPE.seed)
    encoders, tokenizer = Encoders(), word_tokenizer()

    def loss(step: int) -> Tensor:
        image_N, clip_N, t5_N = embed(encoders, tokenizer, RECIPE.batch, RECIPE.seed * 1_000_003 + step)
        same = 2 * torch.eye(RECIPE.batch) - 1
        scale = encoders.scale.exp()
        from_clip, from_t5 = (
            (-F.logsigmoid(same * (scale * image_N @ text_N.T + encoders.bias))).sum(1).mean()
            for text_N in (clip_N, t5_N)
        )
        return from_clip + from_t5

    fit(encoders, loss, RECIPE, steps)
    return encoders.eval()


def embed(
    encoders: Encoders, tokenizer: PreTrainedTokenizerFast, n: int, seed: int, split: Split = "train"
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors [n, 48] of n pictures, and of their captions by CLIP and by T5."""
    content = draw_contents(n, seed, split)
    style = draw_photo_styles(n, seed + 1) if seed % 4 == 0 else draw_styles(n, seed + 2, split)
    tokens = tokenizer(captions(content, style), padding="max_length", truncation=True, return_tensors="pt")
    image = encoders.siglip(render(content, style) * 2 - 1).pooler_output
    clip = encoders.of_clip(encoders.clip(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output)
    mask = tokens.attention_mask.unsqueeze(-1)
    t5 = (encoders.t5(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state * mask).sum(
        1
    ) / mask.sum(1)
    return F.normalize(image, dim=-1), F.normalize(clip, dim=-1), F.normalize(encoders.of_t5(t5), dim=-1)


def retrieval_accuracy(encoders: Encoders, n: int = 64) -> float:
    """Share of held-out pictures whose own caption is the nearest of `n`, mean of both text encoders."""
    with torch.no_grad():
        image, clip, t5 = embed(encoders, word_tokenizer(), n, 31, "held_out")
    right = torch.arange(n)
    return (
        float(((image @ clip.T).argmax(1) == right).float().mean() + ((image @ t5.T).argmax(1) == right).float().mean())
        / 2
    )


def save(encoders: Encoders, folder: Path) -> None:
    encoders.half()
    encoders.siglip.save_pretrained(folder / "siglip")
    encoders.clip.save_pretrained(folder / "base" / "text_encoder")
    encoders.t5.save_pretrained(folder / "base" / "text_encoder_2")
    for name in ("tokenizer", "tokenizer_2"):
        word_tokenizer().save_pretrained(folder / "base" / name)


def build(folder: Path, steps_factor: float) -> dict[str, float]:
    """Train, save, and report how often a picture finds its caption among 64."""
    encoders = make(RECIPE.scaled(steps_factor))
    figures = {"retrieval_accuracy_of_64": retrieval_accuracy(encoders)}
    save(encoders, folder)
    return figures
