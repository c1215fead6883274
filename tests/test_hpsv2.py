"""HPSv2 against a plain implementation of open_clip's two towers with the names of the released file."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rewardgen.errors import CheckpointError
from rewardgen.reward import check_reward, score
from rewardgen.rewards.hpsv2 import Hpsv2Reward, load_hpsv2
from rewardgen.types import Example
from tests.toy_reward_models import clip_tokenizer, photo, to_tensor

SIDE, PATCH, WIDTH, TEXT_WIDTH, SHARED = 32, 8, 64, 32, 24
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROMPTS = ("a red cat", "two dogs, on a mat", "word " * 100)
PHOTOS = (photo(1, 40, 56), photo(2, 31, 80), photo(3, 50, 50))


class Tower(nn.Module):
    """open_clip's transformer: torch's own attention, exact GELU."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList()
        for _ in range(layers):
            block = nn.Module()
            block.ln_1 = nn.LayerNorm(width)
            block.attn = nn.MultiheadAttention(width, 16)
            block.ln_2 = nn.LayerNorm(width)
            block.mlp = nn.Sequential(
                OrderedDict(c_fc=nn.Linear(width, 3 * width), gelu=nn.GELU(), c_proj=nn.Linear(3 * width, width))
            )
            self.resblocks.append(block)

    def forward(self, x_NBD: Tensor, mask_NN: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            normed: Tensor = block.ln_1(x_NBD)  # type: ignore[operator,assignment]
            x_NBD = x_NBD + block.attn(normed, normed, normed, need_weights=False, attn_mask=mask_NN)[0]  # type: ignore[operator]
            x_NBD = x_NBD + block.mlp(block.ln_2(x_NBD))  # type: ignore[operator]
        return x_NBD


class OpenClip(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        visual = nn.Module()
        visual.class_embedding = nn.Parameter(torch.randn(WIDTH))
        visual.positional_embedding = nn.Parameter(torch.randn((SIDE // PATCH) ** 2 + 1, WIDTH))
        visual.proj = nn.Parameter(torch.randn(WIDTH, SHARED))
        visual.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        visual.ln_pre, visual.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        visual.transformer = Tower(WIDTH, 3)
        self.visual = visual
        self.positional_embedding = nn.Parameter(torch.randn(77, TEXT_WIDTH))
        self.text_projection = nn.Parameter(torch.randn(TEXT_WIDTH, SHARED))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        self.transformer = Tower(TEXT_WIDTH, 2)
        self.token_embedding = nn.Embedding(vocabulary, TEXT_WIDTH)
        self.ln_final = nn.LayerNorm(TEXT_WIDTH)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name != "logit_scale":
                    parameter.add_(0.2 * torch.randn_like(parameter))

    def encode_image(self, images_B3SS: Tensor) -> Tensor:
        v: Any = self.visual
        x_BND = v.conv1(images_B3SS).flatten(2).transpose(1, 2)
        x_BND = torch.cat([v.class_embedding.expand(len(x_BND), 1, -1), x_BND], 1) + v.positional_embedding
        x_BND = v.transformer(v.ln_pre(x_BND).transpose(0, 1)).transpose(0, 1)
        return F.normalize(v.ln_post(x_BND[:, 0]) @ v.proj, dim=-1)

    def encode_text(self, ids_BT: Tensor) -> Tensor:
        x_BTD = self.token_embedding(ids_BT) + self.positional_embedding[: ids_BT.shape[1]]
        causal = torch.full((ids_BT.shape[1],) * 2, float("-inf")).triu(1)
        x_BTD = self.ln_final(self.transformer(x_BTD.transpose(0, 1), causal).transpose(0, 1))
        # The end of the text has the highest number.
        return F.normalize(x_BTD[torch.arange(len(x_BTD)), ids_BT.argmax(-1)] @ self.text_projection, dim=-1)


@pytest.fixture(scope="module")
def model() -> OpenClip:
    torch.manual_seed(0)
    return OpenClip(len(clip_tokenizer())).eval()


@pytest.fixture
def file(model: OpenClip, tmp_path: Path) -> Path:
    """As `HPS_v2.1_compressed.pt`."""
    path = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 1, "name": "x", "state_dict": model.state_dict()}, path)
    return path


@pytest.fixture
def reward(file: Path, tmp_path: Path) -> Hpsv2Reward:
    clip_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return Hpsv2Reward.from_pretrained(str(file), tokenizer=str(tmp_path / "tokenizer"))


def released_score(model: OpenClip, picture: Image.Image, prompt: str) -> float:
    """Long side to the square's, on black; texts of 77 places filled up with zeros; the cosine."""
    scale = SIDE / max(picture.size)
    inner = tuple(round(side * scale) for side in picture.size)
    square = Image.new("RGB", (SIDE, SIDE))
    square.paste(picture.resize(inner, Image.Resampling.BICUBIC), tuple((SIDE - side) // 2 for side in inner))
    image = (to_tensor(square) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    ids = clip_tokenizer()(prompt)["input_ids"]
    ids = ids if len(ids) <= 77 else [*ids[:76], ids[-1]]
    padded = torch.tensor([ids + [0] * (77 - len(ids))])
    with torch.no_grad():
        return float((model.encode_image(image[None]) * model.encode_text(padded)).sum())


def test_equal_to_the_published_formula(reward: Hpsv2Reward, model: OpenClip) -> None:
    for picture in PHOTOS:
        drawn = to_tensor(picture)[None].repeat(3, 1, 1, 1)
        examples = [Example(id=prompt, prompt=prompt) for prompt in PROMPTS]
        found = score(reward, drawn, examples, enable_grad=False)
        expected = [released_score(model, picture, prompt) for prompt in PROMPTS]
        assert found.value_B.tolist() == pytest.approx(expected, abs=1e-5)
        assert max(expected) - min(expected) > 0.02
    assert not reward.score(to_tensor(PHOTOS[0])[None], [Example(id="a")]).valid_B.any()


def test_it_keeps_the_contract(reward: Hpsv2Reward) -> None:
    check_reward(reward, image_size=(40, 72))


def test_the_full_size_is_vit_h_14(monkeypatch: pytest.MonkeyPatch) -> None:
    """The released tensors' shapes, without their memory; 986 million parameters, as open_clip's ViT-H-14 has."""
    from rewardgen.rewards import hpsv2

    block = {"ln_1.weight": (1,), "mlp.c_fc.weight": (4, 1)}
    shapes = {"visual.conv1.weight": (1280, 3, 14, 14), "visual.positional_embedding": (257, 1280)}
    shapes |= {"positional_embedding": (77, 1024), "token_embedding.weight": (49408, 1024)}
    shapes |= {"text_projection": (1024, 1024)}
    for tower, layers, width in (("visual.transformer", 32, 1280), ("transformer", 24, 1024)):
        for layer in range(layers):
            sizes = {"ln_1.weight": (width,), "mlp.c_fc.weight": (4 * width, width)}
            shapes |= {f"{tower}.resblocks.{layer}.{name}": sizes[name] for name in block}
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = hpsv2._infer_config("file", tensors)
    with torch.device("meta"):
        from transformers import CLIPModel

        model = CLIPModel(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 986_109_441
    assert config.vision_config.hidden_size // config.vision_config.num_attention_heads == 80


def test_safetensors_hold_the_same(file: Path, model: OpenClip, tmp_path: Path) -> None:
    save_file(model.state_dict(), tmp_path / "hps.safetensors")
    pairs = [load_hpsv2(str(path)).state_dict() for path in (file, tmp_path / "hps.safetensors")]
    assert all(torch.equal(tensor, pairs[1][name]) for name, tensor in pairs[0].items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual.proj": None}, r"visual_projection\.weight"),
        ({"visual.transformer.resblocks.1.attn.in_proj_bias": None}, "self_attn"),
        ({"visual.conv1.weight": None}, r"lacks the tensor 'visual\.conv1\.weight'"),
        ({"extra": torch.zeros(1)}, "unknown tensor 'extra'"),
        ({"ln_final.bias": torch.full((TEXT_WIDTH,), torch.nan)}, "not finite"),
        ({"ln_final.bias": torch.zeros(5)}, "size|shape|fit"),
        ({"visual.conv1.weight": torch.zeros(30, 3, 8, 8)}, "16 heads"),
    ],
)
def test_another_file_is_refused(model: OpenClip, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    state = {name: tensor for name, tensor in (model.state_dict() | change).items() if tensor is not None}
    torch.save({"state_dict": state}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_hpsv2(str(tmp_path / "other.pt"))
    assert "other.pt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer(file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        Hpsv2Reward.from_pretrained(str(file), tokenizer=str(tmp_path / "nowhere"))
