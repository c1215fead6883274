"""The UNO policy: USO without styles, several references at their own size, UNO's and UMO's LoRA files in and out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rewardgen.checkpoint import save_checkpoint
from rewardgen.cli import main
from rewardgen.errors import CheckpointError, ConfigError
from rewardgen.policies import official
from rewardgen.policies.encodings import EncodingStore
from rewardgen.policies.uno import DEFAULT_RANK, UnoPolicy
from rewardgen.policies.uso import UsoPolicy
from rewardgen.policy import noise_like_request
from rewardgen.types import Example
from tests.test_uso_policy import SIZE, make_parts, make_tokenizer, picture

OPTIONS = {"content_long_side": 16, "max_text_tokens": 5}
PERSON, OTHER, THING = picture(2), picture(5, 24, 12), picture(7)
EXAMPLES = [
    Example(id="nobody", prompt="a cat"),
    Example(id="person", prompt="a cat", identity_refs=(PERSON,)),
    Example(id="two", prompt="a dog", identity_refs=(PERSON, OTHER)),
    Example(id="person and thing", prompt="red", content_refs=(THING,), identity_refs=(PERSON,)),
]
TIMES = torch.linspace(1, 0.2, len(EXAMPLES))


def make_policy(**options: object) -> UnoPolicy:
    return UnoPolicy(make_parts(), **({"lora_rank": 2, "several_long_side": 12} | OPTIONS | options))


def velocities(policy: UnoPolicy | UsoPolicy, examples: list[Example]) -> Tensor:
    """Each example from noise of its own."""
    latents = noise_like_request(policy, [len(example.id) for example in examples], SIZE)
    with torch.no_grad():
        velocity = policy.velocity_fn(policy.encode(examples), mode="sample", image_size=SIZE)
        return velocity(latents, TIMES[: len(examples)])


def released_lora(
    rank: int, seed: int = 0, depth: int = 1, single_depth: int = 2, width: int = 24
) -> dict[str, Tensor]:
    """A file as UNO and UMO released theirs, written down from its description, at toy sizes."""
    shapes: dict[str, tuple[int, int]] = {}
    for i in range(depth):
        for stream in "12":
            shapes[f"double_blocks.{i}.processor.qkv_lora{stream}"] = (width, 3 * width)
            shapes[f"double_blocks.{i}.processor.proj_lora{stream}"] = (width, width)
    for i in range(single_depth):
        shapes[f"single_blocks.{i}.processor.qkv_lora"] = (width, 3 * width)
        shapes[f"single_blocks.{i}.processor.proj_lora"] = (5 * width, width)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (inputs, outputs) in shapes.items():
        tensors[f"{name}.down.weight"] = 0.2 * torch.randn(rank, inputs, generator=generator)
        tensors[f"{name}.up.weight"] = 0.2 * torch.randn(outputs, rank, generator=generator)
    return tensors


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in diffusers' layout."""
    folder, parts = tmp_path_factory.mktemp("base"), make_parts()
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        getattr(parts, name).save_pretrained(folder / name)
    for name in ("tokenizer", "tokenizer_2"):
        make_tokenizer().save_pretrained(folder / name)
    return folder


def test_it_is_uso_without_styles() -> None:
    """Object first, then people; at equal reference sizes and weights the same velocity to the last bit."""
    uno, uso = make_policy(several_long_side=16), UsoPolicy(make_parts(), None, lora_rank=2, **OPTIONS)
    for policy in (uno, uso):
        torch.manual_seed(3)
        for parameter in official.lora_parameters(policy.transformer).values():
            torch.nn.init.normal_(parameter, std=0.2)
    assert torch.equal(velocities(uno, EXAMPLES), velocities(uso, EXAMPLES))
    assert list(uno.trainable()) == list(uso.trainable())


def test_several_references_have_a_size_of_their_own() -> None:
    """A picture that was encoded alone is encoded anew beside another, and remembered both ways."""
    policy = make_policy()
    for _ in range(2):
        alone, both, mixed = (policy.encode([example]).references_B[0] for example in EXAMPLES[1:])
        assert [reference.grid for reference in alone] == [(3, 4)]  # 20 x 24 pixels at 16: 13 x 16, cut to 12 x 16
        assert [reference.grid for reference in both] == [(2, 3), (3, 1)]
        assert [reference.grid for reference in mixed] == [(2, 3), (2, 3)]


def test_people_keep_to_their_places() -> None:
    """The order of the references matters to the model, the company in the batch does not."""
    policy = make_policy()
    together = velocities(policy, EXAMPLES)
    alone = [
        policy.velocity_fn(policy.encode([example]), mode="sample", image_size=SIZE)(
            noise_like_request(policy, [len(example.id)], SIZE), TIMES[i : i + 1]
        ).detach()
        for i, example in enumerate(EXAMPLES)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=2e-6)
    pair = EXAMPLES[2]
    swapped = replace(pair, identity_refs=pair.identity_refs[::-1])
    assert float((velocities(policy, [pair]) - velocities(policy, [swapped])).abs().max()) > 1e-5
    as_content = replace(pair, identity_refs=(), content_refs=pair.identity_refs)
    assert torch.equal(velocities(policy, [pair]), velocities(policy, [as_content]))


def test_released_files_in_and_out(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "UMO_UNO.safetensors"
    save_file(released_lora(rank=3), file)
    policy = UnoPolicy.from_pretrained(str(base), lora=str(file), **OPTIONS)
    bare = UnoPolicy.from_pretrained(str(base), lora_rank=3, **OPTIONS)
    assert float((velocities(policy, EXAMPLES) - velocities(bare, EXAMPLES)).abs().max()) > 1e-3
    written = policy.save(tmp_path / "out")
    assert set(written) == {"lora"}
    given, found = load_file(file), load_file(written["lora"])
    assert given.keys() == found.keys()
    assert all(torch.equal(given[name], found[name]) for name in given)
    with pytest.raises(CheckpointError, match="rank 3, but rank 512"):
        UnoPolicy.from_pretrained(str(base), lora=str(file), lora_rank=512, **OPTIONS)
    short = released_lora(rank=3)
    del short["single_blocks.1.processor.proj_lora.up.weight"]
    save_file(short, file)
    with pytest.raises(CheckpointError, match=r"single_blocks\.1\.processor\.proj_lora\.up\.weight"):
        UnoPolicy.from_pretrained(str(base), lora=str(file), **OPTIONS)


@pytest.mark.parametrize("file_format", ["uno", "diffusers"])
def test_a_run_is_exported_without_a_word_about_styles(
    file_format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = make_policy()
    stored = {f"trainable/{name}": parameter.detach() for name, parameter in policy.trainable().items()}
    run = tmp_path / "run"
    save_checkpoint(run / "checkpoints", step=1, tensors=stored, state={"completed_steps": 1})
    (run / "config.yaml").write_text("name: faces\npolicy: {use: uno, args: {base: world:uno}}\n")
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(run), "--format", file_format, "-o", str(tmp_path / "out")])
    assert stopped.value.code in (0, None)
    assert "style" not in capsys.readouterr().out + (tmp_path / "out" / "README.md").read_text()
    if file_format == "uno":
        expected, found = official.export_lora(policy.transformer), load_file(tmp_path / "out/dit_lora.safetensors")
        assert expected.keys() == found.keys() == released_lora(2).keys()
        assert all(torch.equal(expected[name], found[name]) for name in found)


def test_what_it_cannot_do_is_refused() -> None:
    policy = make_policy()
    with pytest.raises(ConfigError, match=r"'styled' has style references, which UNO cannot take"):
        policy.encode([Example(id="styled", style_refs=(THING,))])
    with pytest.raises(ConfigError, match="'projector' is not one of lora, transformer"):
        make_policy(train=("projector",))


def test_released_rank_is_the_default() -> None:
    assert DEFAULT_RANK == 512
    down = official.export_lora(make_policy(lora_rank=None).transformer)
    assert down["double_blocks.0.processor.qkv_lora1.down.weight"].shape == (512, 24)


def test_stored_references_are_those_of_their_size(tmp_path: Path) -> None:
    """One portrait is kept twice: at the size it has alone, and at the one it has beside another."""
    store = EncodingStore(tmp_path, {kind: kind for kind in ("text", "content", "target")})
    first, second = make_policy(store=store), make_policy(store=store)
    made = first.encode(EXAMPLES)
    alone, beside = made.references_B[1][0], made.references_B[2][0]
    assert alone.grid != beside.grid
    target = picture(9, *SIZE)[None]
    clean = first.encode_pixels(target)
    second.vae.encode = second.text_encoder.forward = None  # whatever comes now comes from the folder
    again = second.encode(EXAMPLES)
    for before, after in zip(made.references_B, again.references_B, strict=True):
        assert [reference.grid for reference in before] == [reference.grid for reference in after]
        assert all(torch.equal(a.tokens_NP, b.tokens_NP) for a, b in zip(before, after, strict=True))
    assert torch.equal(second.encode_pixels(target), clean)
    plain = make_policy().encode(EXAMPLES)
    assert torch.equal(plain.references_B[2][0].tokens_NP, beside.tokens_NP)


def test_blueprint_has_the_released_sizes() -> None:
    with torch.device("meta"):
        policy = UnoPolicy.blueprint(
            "black-forest-labs/FLUX.1-dev",
            lora="owner/name:dit_lora.safetensors",
            base_dtype="bf16",
            encodings="nowhere",
            several_long_side=320,
        )
    assert sum(parameter.numel() for parameter in policy.trainable().values()) == 4 * 239_075_328  # 4 x rank 128
    assert policy.text_encoder is None
    assert policy.transformer.x_embedder.weight.dtype == torch.bfloat16
