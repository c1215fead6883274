"""ImageReward against a plain implementation of BLIP with the names of the released file."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from rewardgen.errors import CheckpointError
from rewardgen.reward import check_reward, score
from rewardgen.rewards.image_reward import MEAN, STD, ImageReward, load_image_reward
from rewardgen.types import Example
from tests.toy_reward_models import bert_tokenizer, photo, to_tensor

SIDE, PATCH, WIDTH, TEXT_WIDTH = 32, 8, 32, 24
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROMPTS = ("a red cat", "two dogs, on a mat.", "word " * 100)


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask_BT: Tensor | None = None) -> Tensor:
    """Softmax attention written out, [B, N, D]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    weights = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask_BT is not None:
        weights = weights.masked_fill(mask_BT[:, None, None] == 0, float("-inf"))
    return (weights.softmax(-1) @ v).transpose(1, 2).flatten(2)


def module(**parts: Any) -> Any:
    made = nn.Module()
    for name, part in parts.items():
        setattr(made, name, part)
    return made


class Blip(nn.Module):
    """Names and formulas of BLIP's picture tower (pre-norm, fused) and text tower (post-norm, two attentions)."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        linear, norm = nn.Linear, nn.LayerNorm
        blocks = [
            module(
                norm1=norm(WIDTH, eps=1e-6),
                attn=module(qkv=linear(WIDTH, 3 * WIDTH), proj=linear(WIDTH, WIDTH)),
                norm2=norm(WIDTH, eps=1e-6),
                mlp=module(fc1=linear(WIDTH, 48), fc2=linear(48, WIDTH)),
            )
            for _ in range(2)
        ]
        self.visual_encoder = module(
            cls_token=nn.Parameter(torch.randn(1, 1, WIDTH)),
            pos_embed=nn.Parameter(torch.randn(1, (SIDE // PATCH) ** 2 + 1, WIDTH)),
            patch_embed=module(proj=nn.Conv2d(3, WIDTH, PATCH, PATCH)),
            blocks=nn.ModuleList(blocks),
            norm=norm(WIDTH, eps=1e-6),
        )

        def attention(width: int) -> Any:
            parts = {"query": linear(TEXT_WIDTH, TEXT_WIDTH), "key": linear(width, TEXT_WIDTH)}
            inner = module(**parts, value=linear(width, TEXT_WIDTH))
            return module(self=inner, output=output(TEXT_WIDTH))

        def output(width: int) -> Any:
            return module(dense=linear(width, TEXT_WIDTH), LayerNorm=norm(TEXT_WIDTH, eps=1e-12))

        layers = [
            module(
                attention=attention(TEXT_WIDTH),
                crossattention=attention(WIDTH),
                intermediate=module(dense=linear(TEXT_WIDTH, 40)),
                output=output(40),
            )
            for _ in range(2)
        ]
        embeddings = module(
            word_embeddings=nn.Embedding(vocabulary, TEXT_WIDTH),
            position_embeddings=nn.Embedding(50, TEXT_WIDTH),
            LayerNorm=norm(TEXT_WIDTH, eps=1e-12),
        )
        embeddings.register_buffer("position_ids", torch.arange(50)[None])
        self.text_encoder = module(embeddings=embeddings, encoder=module(layer=nn.ModuleList(layers)))
        self.vision_proj, self.text_proj = linear(WIDTH, 4), linear(TEXT_WIDTH, 4)

    def see(self, images_B3SS: Tensor) -> Tensor:
        v: Any = self.visual_encoder
        x = v.patch_embed.proj(images_B3SS).flatten(2).transpose(1, 2)
        x = torch.cat([v.cls_token.expand(len(x), -1, -1), x], 1) + v.pos_embed
        for block in v.blocks:
            x = x + block.attn.proj(attend(*block.attn.qkv(block.norm1(x)).chunk(3, -1), heads=16))
            x = x + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(x))))
        found: Tensor = v.norm(x)
        return found

    def read(self, ids_BT: Tensor, mask_BT: Tensor, patches_BND: Tensor) -> Tensor:
        t: Any = self.text_encoder
        x: Tensor = t.embeddings.word_embeddings(ids_BT) + t.embeddings.position_embeddings.weight[: ids_BT.shape[1]]
        x = t.embeddings.LayerNorm(x)
        for layer in t.encoder.layer:
            for part, seen, mask in ((layer.attention, None, mask_BT), (layer.crossattention, patches_BND, None)):
                inner: Any = part.self
                seen = x if seen is None else seen
                mixed = attend(inner.query(x), inner.key(seen), inner.value(seen), 12, mask)
                x = part.output.LayerNorm(part.output.dense(mixed) + x)
            hidden = nn.functional.gelu(layer.intermediate.dense(x))
            x = layer.output.LayerNorm(layer.output.dense(hidden) + x)
        return x


class Released(nn.Module):
    """`ImageReward.pt`: BLIP, and five linear layers with dropout between the first four."""

    def __init__(self) -> None:
        super().__init__()
        self.blip = Blip(len(bert_tokenizer()))
        sizes = (TEXT_WIDTH, 20, 12, 8, 6, 1)
        linear = [nn.Linear(before, after) for before, after in itertools.pairwise(sizes)]
        layers = [linear[0], nn.Dropout(0.2), linear[1], nn.Dropout(0.2), linear[2], nn.Dropout(0.1), *linear[3:]]
        self.mlp = module(layers=nn.Sequential(*layers))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))

    def score(self, picture: Image.Image, prompt: str) -> float:
        tokens = bert_tokenizer()(prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        image = (to_tensor(cut(picture)) - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
        read = self.blip.read(tokens["input_ids"], tokens["attention_mask"], self.blip.see(image[None]))
        return (float(self.mlp.layers(read[:, 0])) - 0.16717362830052426) / 1.0333394966054072  # type: ignore[operator]


def cut(picture: Image.Image) -> Image.Image:
    """Short side to the square's, then its centre."""
    width, height = picture.size
    short = min(width, height)
    resized = picture.resize((int(SIDE * width / short), int(SIDE * height / short)), Image.Resampling.BICUBIC)
    left, top = (resized.width - SIDE) // 2, (resized.height - SIDE) // 2
    return resized.crop((left, top, left + SIDE, top + SIDE))


@pytest.fixture(scope="module")
def released() -> Released:
    torch.manual_seed(0)
    return Released().eval()


@pytest.fixture
def file(released: Released, tmp_path: Path) -> Path:
    path = tmp_path / "ImageReward.pt"
    torch.save(released.state_dict(), path)
    return path


@pytest.fixture
def reward(file: Path, tmp_path: Path) -> ImageReward:
    bert_tokenizer().save_pretrained(tmp_path / "bert")
    return ImageReward.from_pretrained(str(file), tokenizer=str(tmp_path / "bert"))


def test_equal_to_the_published_formula(reward: ImageReward, released: Released) -> None:
    assert (MEAN, STD) == (0.16717362830052426, 1.0333394966054072)
    for picture in (photo(1), photo(2, 36, 80)):
        drawn = to_tensor(picture)[None].repeat(3, 1, 1, 1)
        examples = [Example(id=prompt, prompt=prompt) for prompt in PROMPTS]
        found = score(reward, drawn, examples, enable_grad=False)
        with torch.no_grad():
            expected = [released.score(picture, prompt) for prompt in PROMPTS]
        assert found.value_B.tolist() == pytest.approx(expected, abs=1e-4)
        assert max(expected) - min(expected) > 0.1


def test_it_keeps_the_contract(reward: ImageReward) -> None:
    check_reward(reward, image_size=(40, 72))


def test_without_a_prompt_it_is_not_valid(reward: ImageReward) -> None:
    drawn = torch.stack([to_tensor(photo(1)), to_tensor(photo(2))])
    found = reward.score(drawn, [Example(id="a", prompt="a cat"), Example(id="b", prompt=" ")])
    assert found.valid_B.tolist() == [True, False]


def test_gradient_matches_finite_differences(reward: ImageReward) -> None:
    from dataclasses import replace

    reward = reward.double()
    reward.processor = replace(reward.processor, round_8bit=False)  # type: ignore[type-var]
    drawn = (0.2 + 0.6 * to_tensor(photo(1))[None]).double().requires_grad_()
    example = [Example(id="a", prompt="a cat")]
    (grad,) = torch.autograd.grad(reward.score(drawn, example).value_B.sum(), drawn)
    direction = grad / grad.norm()
    with torch.no_grad():
        ahead, behind = (reward.score(drawn + step * direction, example).value_B for step in (1e-4, -1e-4))
    assert float(ahead - behind) / 2e-4 == pytest.approx(float(grad.norm()), rel=1e-4)


def test_safetensors_hold_the_same(file: Path, released: Released, tmp_path: Path) -> None:
    save_file(released.state_dict(), tmp_path / "reward.safetensors")
    pairs = [load_image_reward(str(path)).state_dict() for path in (file, tmp_path / "reward.safetensors")]
    assert all(torch.equal(tensor, pairs[1][name]) for name, tensor in pairs[0].items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blip.visual_encoder.cls_token": None}, "class_embedding"),
        ({"blip.text_encoder.encoder.layer.1.crossattention.self.key.bias": None}, "crossattention"),
        ({"mlp.layers.4.bias": None}, r"mlp\.layers\.4\.bias"),
        ({"mlp.layers.7.weight": torch.zeros(2, 6)}, r"'mlp\.layers\.7\.weight' has shape \(2, 6\)"),
        ({"blip.visual_encoder.pos_embed": None}, r"lacks the tensor 'blip\.visual_encoder\.pos_embed'"),
        ({"blip.visual_encoder.extra": torch.zeros(1)}, "unknown tensor 'extra'"),
        ({"mlp.layers.0.bias": torch.full((20,), torch.inf)}, "not finite"),
        ({"blip.text_encoder.embeddings.word_embeddings.weight": torch.zeros(9, 25)}, "12 heads"),
    ],
)
def test_another_file_is_refused(released: Released, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    state = {name: tensor for name, tensor in (released.state_dict() | change).items() if tensor is not None}
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_image_reward(str(tmp_path / "other.pt"))
    assert "other.pt" in str(caught.value)
    assert "\n" not in str(caught.value)
