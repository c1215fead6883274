"""The USO policy: ragged batches, encodings, gradients, precision, files. Everything is random and tiny."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

from rewardgen.errors import CheckpointError, ConfigError
from rewardgen.flow.schedule import official_sigmas, token_count_sigmas
from rewardgen.policies import official
from rewardgen.policies.conditions import UsoCondition
from rewardgen.policies.encodings import EncodingCache, content_hash
from rewardgen.policies.packing import preprocess_reference, to_pil
from rewardgen.policies.parts import FluxParts, load_parts
from rewardgen.policies.projector import StyleProjector, select_levels
from rewardgen.policies.uso import UsoPolicy
from rewardgen.policy import noise_like_request
from rewardgen.types import Example

SIZE = (16, 24)


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "cat", "dog"])}
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=8
    )


def make_parts() -> FluxParts:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 4),
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    clip = CLIPTextConfig(
        vocab_size=7,
        hidden_size=10,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=0,
    )
    t5 = T5Config(vocab_size=7, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    siglip = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=20, num_attention_heads=2, image_size=8, patch_size=4
    )
    return FluxParts(
        transformer=transformer.eval(),
        vae=vae.eval(),
        text_encoder=CLIPTextModel(clip).eval(),
        tokenizer=make_tokenizer(),
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=make_tokenizer(),
        siglip=SiglipVisionModel(siglip).eval(),
    )


def make_projector() -> StyleProjector:
    torch.manual_seed(1)
    return StyleProjector(num_tokens=4, token_dim=8, tokens_per_level=2, hidden_size=24)


def make_policy(*train: str, **options: object) -> UsoPolicy:
    policy = UsoPolicy(
        make_parts(), make_projector(), train=train, lora_rank=2, content_long_side=16, max_text_tokens=5, **options
    )
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in official.lora_parameters(policy.transformer).values():
            parameter.normal_(std=0.2)
    return policy


def picture(seed: int, height: int = 20, width: int = 24) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


EXAMPLES = [
    Example(id="plain", prompt="a cat"),
    Example(id="styled", prompt="a dog", style_refs=(picture(1),)),
    Example(id="both", prompt="red", content_refs=(picture(2),), style_refs=(picture(1), picture(3))),
    Example(id="styled too", prompt="a red dog", style_refs=(picture(4),)),
    Example(id="tall", prompt="a cat", content_refs=(picture(2), picture(5, 24, 12)), style_refs=(picture(3),)),
    Example(id="person", prompt="a cat", identity_refs=(picture(2),), style_refs=(picture(1), picture(6))),
]
TIMES = torch.linspace(1, 0.2, len(EXAMPLES))


def velocities(policy: UsoPolicy, examples: list[Example], latents: Tensor, t_B: Tensor) -> Tensor:
    return policy.velocity_fn(policy.encode(examples), mode="sample", image_size=SIZE)(latents, t_B)


def test_ragged_batch_does_not_depend_on_order_or_company() -> None:
    policy = make_policy("lora")
    latents = noise_like_request(policy, range(len(EXAMPLES)), SIZE)
    with torch.no_grad():
        together = velocities(policy, EXAMPLES, latents, TIMES)
        alone = [velocities(policy, [e], latents[i : i + 1], TIMES[i : i + 1]) for i, e in enumerate(EXAMPLES)]
        order = random.Random(0).sample(range(len(EXAMPLES)), len(EXAMPLES))
        shuffled = velocities(policy, [EXAMPLES[i] for i in order], latents[order], TIMES[order])
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=2e-6)
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=2e-6)
    assert float((together[1] - together[3]).abs().max()) > 1e-3


def test_every_condition_matters() -> None:
    policy = make_policy("lora")
    latents = noise_like_request(policy, [0], SIZE)
    base = EXAMPLES[2]
    changed = [
        replace(base, prompt="a cat"),
        replace(base, content_refs=(picture(7),)),
        replace(base, style_refs=(picture(1), picture(7))),
        replace(base, content_refs=()),
        replace(base, style_refs=()),
    ]
    with torch.no_grad():
        before = velocities(policy, [base], latents, TIMES[1:2])
        for other in changed:
            assert float((velocities(policy, [other], latents, TIMES[1:2]) - before).abs().max()) > 1e-4
        train = policy.velocity_fn(policy.encode([base]), mode="train", image_size=SIZE)(latents, TIMES[1:2])
    assert float((train - before).abs().max()) > 1e-4  # another guidance


def test_style_tokens_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy("projector")
    calls: list[int] = []
    forward = policy.projector.forward

    def counted(levels: Tensor) -> Tensor:
        calls.append(len(levels))
        return forward(levels)

    monkeypatch.setattr(policy.projector, "forward", counted)
    velocity = policy.velocity_fn(policy.encode(EXAMPLES), mode="sample", image_size=SIZE)
    latents = noise_like_request(policy, range(len(EXAMPLES)), SIZE)
    for time in (1.0, 0.7, 0.4):
        latents = latents - 0.3 * velocity(latents, torch.full((len(EXAMPLES),), time))
    assert calls == [sum(len(example.style_refs) for example in EXAMPLES)]
    latents.sum().backward()  # one graph over all steps reaches the projector
    assert all(parameter.grad is not None for parameter in policy.trainable().values())


def test_encoders_run_once_per_content(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy("lora")
    calls = {"vae": 0, "siglip": 0, "text_encoder_2": 0}

    def count(name: str, method: str) -> None:
        module = getattr(policy, name)
        inner = getattr(module, method)

        def counted(*args: object, **options: object) -> object:
            calls[name] += 1
            return inner(*args, **options)

        monkeypatch.setattr(module, method, counted)

    count("vae", "encode")
    count("siglip", "forward")
    count("text_encoder_2", "forward")
    first = policy.encode(EXAMPLES)
    second = policy.encode([replace(example, id="again") for example in reversed(EXAMPLES)])
    assert calls == {"vae": 2, "siglip": 4, "text_encoder_2": 4}
    for index, text in enumerate(first.text_B):
        assert torch.equal(text, second.text_B[len(EXAMPLES) - 1 - index])
    tensors = [*first.text_B, *first.pooled_B, *(s for styles in first.styles_B for s in styles)]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_cache_is_bounded_and_forgets_the_oldest() -> None:
    cache, made = EncodingCache(max_bytes=3 * 40), []

    def ask(key: str) -> None:
        cache.get("kind", key, lambda: (made.append(key), torch.zeros(10))[1:])

    for key in "abcadabc":
        ask(key)
    assert "".join(made) == "abcdbc"
    assert len(cache) == 3
    assert content_hash(torch.zeros(3, 2, 4)) != content_hash(torch.zeros(3, 4, 2))


@pytest.mark.parametrize("train", [("lora",), ("projector",), ("transformer", "projector"), ("lora", "projector")])
def test_gradients_reach_what_is_trained_and_nothing_else(train: tuple[str, ...]) -> None:
    policy = make_policy(*train).train()
    latents = noise_like_request(policy, [3], SIZE)
    latents = latents - velocities(policy, [EXAMPLES[2]], latents, TIMES[:1])
    policy.decode(latents, SIZE).square().mean().backward()
    trained = policy.trainable()
    assert all(parameter.grad is not None for parameter in trained.values())
    assert {name for name, p in policy.named_parameters() if p.grad is not None} == set(trained)
    kinds = {"lora" if ".lora_" in name else name.split(".")[0] for name in trained}
    assert kinds == set(train)
    assert not policy.vae.training
    assert policy.training


def test_directional_derivative_through_decoder_and_dit() -> None:
    """Finite differences along a random direction of all LoRA weights.

    In float64 but for diffusers' rotary embedding, which rounds to float32: hence the wide step.
    """
    policy = make_policy("lora").double()
    condition = policy.encode([EXAMPLES[4]])
    latents = noise_like_request(policy, [3], SIZE).double()

    def loss() -> Tensor:
        velocity = policy.velocity_fn(condition, mode="sample", image_size=SIZE)
        clean = latents - 0.5 * velocity(latents, torch.tensor([0.5]))
        return policy.decode(clean, SIZE).square().sum()

    value = loss()
    value.backward()
    trained = list(policy.trainable().values())
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in trained]
    expected = sum(float((p.grad * d).sum()) for p, d in zip(trained, directions, strict=True))
    values = []
    with torch.no_grad():
        for step in (1e-3, -2e-3):
            for parameter, direction in zip(trained, directions, strict=True):
                parameter.add_(step * direction)
            values.append(float(loss()))
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(expected, rel=1e-4)


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for enabled in (False, True):
        policy = make_policy("lora", "projector").train()
        policy.enable_checkpointing(enabled)
        latents = noise_like_request(policy, [3, 4], SIZE)
        latents = latents - velocities(policy, EXAMPLES[1:3], latents, TIMES[:2])
        policy.decode(latents, SIZE).square().mean().backward()
        gradients.append([parameter.grad for parameter in policy.trainable().values()])
    for stored, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(stored, recomputed, rtol=1e-5, atol=1e-8)


def test_bf16_base_with_fp32_lora_under_autocast() -> None:
    exact, half = make_policy("lora"), make_policy("lora")
    half.cast_frozen(torch.bfloat16)
    assert half.transformer.x_embedder.weight.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in half.trainable().values())
    latents = noise_like_request(exact, range(len(EXAMPLES)), SIZE)
    expected = velocities(exact, EXAMPLES, latents, TIMES)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = velocities(half, EXAMPLES, latents, TIMES)
    assert velocity.dtype == torch.float32
    assert float((velocity - expected).detach().norm() / expected.detach().norm()) < 0.03
    with torch.autocast("cpu", torch.bfloat16):
        half.decode(latents - velocity, SIZE).square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in half.trainable().values())


def test_time_is_not_rounded_to_the_precision_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy("lora")
    policy.cast_frozen(torch.bfloat16)
    seen: list[Tensor] = []
    embed = policy.transformer.time_text_embed
    monkeypatch.setattr(embed, "forward", lambda *args, _inner=embed.forward: (seen.append(args[0]), _inner(*args))[1])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        velocities(policy, EXAMPLES[:1], noise_like_request(policy, [0], SIZE), torch.tensor([0.73151]))
    assert seen[0].item() == pytest.approx(731.51, abs=1e-3)


def test_save_and_load_again(tmp_path: Path) -> None:
    policy = make_policy("lora", "projector")
    for kind, folder in (("transformer", "transformer"), ("vae", "vae"), ("siglip", "../siglip")):
        if kind != "transformer":
            getattr(policy, kind).save_pretrained(tmp_path / "base" / folder)
    official.save_transformer(policy.transformer, tmp_path / "base" / "transformer")
    for name in ("text_encoder", "text_encoder_2"):
        getattr(policy, name).save_pretrained(tmp_path / "base" / name)
    for name in ("tokenizer", "tokenizer_2"):
        make_tokenizer().save_pretrained(tmp_path / "base" / name)
    written = policy.save(tmp_path / "out")
    assert set(written) == {"lora", "projector"}
    assert all(key.startswith("feature_embedder.") for key in load_file(written["projector"]))
    options = {"siglip": str(tmp_path / "siglip"), "content_long_side": 16, "max_text_tokens": 5}
    loaded = UsoPolicy.from_pretrained(
        str(tmp_path / "base"), lora=str(written["lora"]), projector=str(written["projector"]), **options
    )
    latents = noise_like_request(policy, range(len(EXAMPLES)), SIZE)
    with torch.no_grad():
        ours, theirs = (velocities(p, EXAMPLES, latents, TIMES) for p in (policy, loaded))
    again = dict(loaded.named_parameters())
    assert all(torch.equal(parameter, again[name]) for name, parameter in policy.named_parameters())
    # Not bit for bit: on some processors a product's last bits depend on where in memory its factors lie.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    assert list(loaded.trainable()) == [name for name in policy.trainable() if ".lora_" in name]
    fresh = UsoPolicy.from_pretrained(
        str(tmp_path / "base"), train=("transformer", "projector"), style_tokens_per_level=3, **options
    )
    assert fresh.projector is not None
    assert fresh.projector.tokens_per_level == 3
    assert set(fresh.save(tmp_path / "full")) == {"projector", "transformer"}
    (tmp_path / "base" / "vae" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"base/vae: cannot load a AutoencoderKL") as caught:
        load_parts(str(tmp_path / "base"), None)
    assert "\n" not in str(caught.value)


def test_sizes_schedules_and_pixels() -> None:
    policy = make_policy("lora")
    assert policy.latent_shape(SIZE) == (4 * 6, 16)
    with pytest.raises(ConfigError, match="multiples of 4"):
        policy.latent_shape((16, 26))
    assert torch.equal(policy.sigmas(5, (1024, 1024)), official_sigmas(5, (1024, 1024)))
    policy.schedule = "token_count"
    assert torch.equal(policy.sigmas(5, SIZE), token_count_sigmas(5, 24))
    assert policy.training_sigmas(SIZE).shape == (1000,)
    pixels = torch.stack([picture(1, *SIZE), picture(2, *SIZE)])
    latents = policy.encode_pixels(pixels)
    assert latents.shape == (2, 24, 16)
    assert not latents.requires_grad
    assert policy.decode(latents, SIZE).shape == pixels.shape


def test_sampled_encoding_belongs_to_the_picture() -> None:
    mean = make_policy("lora")
    first, second = (make_policy("lora", vae_encode="sample") for _ in range(2))
    examples = [EXAMPLES[4], EXAMPLES[2]]

    def tokens(policy: UsoPolicy, batch: list[Example]) -> list[Tensor]:
        condition: UsoCondition = policy.encode(batch)
        return [reference.tokens_NP for references in condition.references_B for reference in references]

    assert all(map(torch.equal, tokens(first, examples), tokens(second, examples)))
    assert torch.equal(tokens(second, examples)[0], tokens(second, examples[::-1])[0])
    assert not torch.equal(tokens(mean, examples)[0], tokens(first, examples)[0])
    pixels = picture(1, *SIZE)[None]
    assert not torch.equal(first.encode_pixels(pixels), first.encode_pixels(pixels))
    assert torch.equal(mean.encode_pixels(pixels), mean.encode_pixels(pixels))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": ("lorra",)}, "train: 'lorra' is not one of lora, projector, transformer. Did you mean 'lora'?"),
        ({"schedule": "officially"}, "Did you mean 'official'?"),
        ({"pe": "x"}, "pe: 'x' is not one of d, h, w, o."),
        ({"projector": None, "train": ("projector",)}, "train: it names 'projector', but the policy has none"),
        ({"projector": StyleProjector(num_tokens=4, token_dim=8, tokens_per_level=2, hidden_size=20)}, "24 wide"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], message: str) -> None:
    arguments = {"projector": make_projector(), **options}
    with pytest.raises(ConfigError) as caught:
        UsoPolicy(make_parts(), **arguments)
    assert message in str(caught.value)


def test_impossible_inputs_are_refused() -> None:
    bare = UsoPolicy(replace(make_parts(), siglip=None), None, train=(), content_long_side=16, max_text_tokens=5)
    assert bare.trainable() == {}
    with pytest.raises(ConfigError, match="no `siglip`"):
        bare.encode(EXAMPLES[1:2])
    with pytest.raises(ConfigError, match="too thin"):
        bare.encode([Example(id="thin", content_refs=(picture(0, 2, 90),))])
    unprojected = UsoPolicy(make_parts(), None, train=(), content_long_side=16, max_text_tokens=5)
    with pytest.raises(ConfigError, match="no `projector`"):
        unprojected.velocity_fn(unprojected.encode(EXAMPLES[1:2]), mode="sample", image_size=SIZE)
    with pytest.raises(CheckpointError, match="at least 20 layers"):
        select_levels([torch.zeros(1, 4, 8)] * 12)


def test_preprocessing_follows_the_models_multiple() -> None:
    wide = Image.new("RGB", (100, 64))
    assert preprocess_reference(wide, 64, 16).size == (64, 32)
    assert preprocess_reference(wide, 64, 8).size == (64, 40)
    assert preprocess_reference(Image.new("RGB", (8, 8)), 64, 8).size == (8, 8)
    image = picture(1)
    assert float((torch.tensor(to_pil(image).getpixel((3, 5))) / 255 - image[:, 5, 3]).abs().max()) <= 0.5 / 255 + 1e-6
