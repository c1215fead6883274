"""Trained files go out in three formats and come in again elsewhere: the same tensors, velocities and pictures.

Everything runs on the bundled tiny world, with the loaders of PEFT and diffusers themselves.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from rewardgen.checkpoint import save_checkpoint
from rewardgen.commands.export import export
from rewardgen.errors import CheckpointError, ConfigError
from rewardgen.flow.sampling import sample
from rewardgen.flow.window import WindowConfig
from rewardgen.learner import Learner, MicroBatch, OptimizerConfig
from rewardgen.objective import Objective, ObjectiveConfig
from rewardgen.policies.exports import LORA_FILES, write_export
from rewardgen.policies.parts import FluxParts, load_parts
from rewardgen.policies.uso import UsoPolicy
from rewardgen.policy import noise_like_request
from rewardgen.sources import ASSETS
from rewardgen.types import Example
from rewardgen.world.dataset import TinyWorld
from tests.test_export_command import tiny_lora

BASE, SIGLIP, USO = ASSETS / "base", ASSETS / "siglip", ASSETS / "uso"
SIZE, STEPS, WORDS = (64, 64), 4, 16
OPTIONS = {"siglip": str(SIGLIP), "content_long_side": 64, "max_text_tokens": WORDS}


def load(lora: Path, projector: Path, **options: object) -> UsoPolicy:
    return UsoPolicy.from_pretrained(
        str(BASE), lora=str(lora), projector=str(projector), train=("lora", "projector"), **OPTIONS, **options
    )


@dataclasses.dataclass
class Run:
    """A policy that came from the official files and was trained for two steps, and its checkpoint."""

    learner: Learner
    policy: UsoPolicy
    checkpoint: Path
    examples: list[Example]

    def export(self, file_format: str, folder: Path, weights: str = "trained") -> Path:
        export(self.checkpoint, file_format=file_format, output=folder, weights=weights)
        return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    policy = load(USO / "dit_lora.safetensors", USO / "projector.safetensors")
    learner = Learner(
        policy,
        Objective(ObjectiveConfig(), {}),
        optimizer=OptimizerConfig(lr=1e-2),
        window=WindowConfig(kind="refl", entry_range=(1, 1)),
        ema_decay=0.5,
    )
    world = TinyWorld("train", 4)
    examples = [world[index] for index in range(4)]
    for step in range(2):
        report = learner.step([MicroBatch(examples=examples, seed_B=range(4), image_size=SIZE)], step=step)
        assert not report.skipped
    tensors, state = learner.state()
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoint = save_checkpoint(folder, step=2, tensors=tensors, state={"completed_steps": 2, "learner": state})
    return Run(learner=learner, policy=policy, checkpoint=checkpoint, examples=examples[:2])


def picture(policy: UsoPolicy, examples: list[Example]) -> Tensor:
    """Pictures [B, 3, H, W] from noise, with the policy's own sampler."""
    with torch.no_grad():
        velocity = policy.velocity_fn(policy.encode(examples), mode="sample", image_size=SIZE)
        noise = noise_like_request(policy, range(len(examples)), SIZE)
        clean = sample(velocity, noise, policy.sigmas(STEPS, SIZE), start=0, stop=STEPS, enable_grad=False)
        return policy.decode(clean, SIZE)


def velocity(policy: UsoPolicy, examples: list[Example]) -> Tensor:
    with torch.no_grad():
        noise = noise_like_request(policy, range(len(examples)), SIZE)
        times = torch.linspace(1, 0.3, len(examples))
        return policy.velocity_fn(policy.encode(examples), mode="sample", image_size=SIZE)(noise, times)


def plain_parts() -> FluxParts:
    return load_parts(str(BASE), str(SIGLIP))


def around(transformer: FluxTransformer2DModel, parts: FluxParts, run: Run) -> UsoPolicy:
    """A policy around a transformer whose LoRA others have loaded, with a projector of the run's weights.

    Its projector stays trainable like the run's: torch folds a matrix product in another way, and so rounds in another
    way, for weights that require no gradient.
    """
    parts, projector = dataclasses.replace(parts, transformer=transformer), copy.deepcopy(run.policy.projector)
    return UsoPolicy(parts, projector, train=("projector",), content_long_side=64, max_text_tokens=WORDS)


@pytest.mark.parametrize("weights", ["trained", "ema"])
def test_official_files_in_training_out_and_in_again(run: Run, weights: str, tmp_path: Path) -> None:
    folder = run.export("uso", tmp_path / "first", weights)
    again = load(folder / "dit_lora.safetensors", folder / "projector.safetensors")
    with run.learner.averaged() if weights == "ema" else torch.no_grad():
        expected = picture(run.policy, run.examples)
        run.policy.save(tmp_path / "weights")
        wanted = {name: parameter.detach().clone() for name, parameter in run.policy.trainable().items()}
    assert torch.equal(picture(again, run.examples), expected)
    found = again.trainable()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    again.save(tmp_path / "second")
    for name in ("dit_lora.safetensors", "projector.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "weights" / name).read_bytes()
        assert (folder / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
        first, exported = load_file(USO / name), load_file(folder / name)
        assert {key: tensor.shape for key, tensor in first.items()} == {k: t.shape for k, t in exported.items()}
        assert any(not torch.equal(first[key].float(), exported[key]) for key in first)  # the steps moved something


def test_peft_loads_the_folder_onto_a_plain_transformer(run: Run, tmp_path: Path) -> None:
    folder, expected = run.export("peft", tmp_path / "adapter"), velocity(run.policy, run.examples)
    parts = plain_parts()
    before = velocity(around(parts.transformer, parts, run), run.examples)
    model = PeftModel.from_pretrained(parts.transformer, str(folder))
    assert torch.equal(velocity(around(model.get_base_model(), parts, run), run.examples), expected)
    assert float((expected - before).abs().max()) > 1e-2
    config = model.peft_config["default"]
    rank = load_file(USO / "dit_lora.safetensors")["double_blocks.0.processor.qkv_lora1.down.weight"].shape[0]
    assert config.r == config.lora_alpha == rank
    # A second time beside it, under another name; then alone.
    missing = model.load_adapter(str(folder), adapter_name="second")
    assert not [key for key in (*missing.missing_keys, *missing.unexpected_keys) if "lora" in key]
    model.set_adapter("second")
    assert torch.equal(velocity(around(model.get_base_model(), parts, run), run.examples), expected)
    with model.disable_adapter():
        assert torch.equal(velocity(around(model.get_base_model(), parts, run), run.examples), before)


def test_diffusers_loads_the_folder_onto_a_plain_transformer(run: Run, tmp_path: Path) -> None:
    folder, expected = run.export("diffusers", tmp_path / "adapter"), velocity(run.policy, run.examples)
    parts = plain_parts()
    parts.transformer.load_lora_adapter(str(folder), weight_name=LORA_FILES["diffusers"])
    assert torch.equal(velocity(around(parts.transformer, parts, run), run.examples), expected)


def test_diffusers_itself_splits_the_official_file_in_the_same_way(run: Run, tmp_path: Path) -> None:
    """An independent reading of the fused layout: diffusers' own conversion of XLabs' format."""
    official, ours = run.export("uso", tmp_path / "uso"), run.export("diffusers", tmp_path / "diffusers")
    converted = FluxPipeline.lora_state_dict(str(official), weight_name=LORA_FILES["uso"])
    exported = load_file(ours / LORA_FILES["diffusers"])
    assert converted.keys() == exported.keys()
    assert all(torch.equal(converted[key], exported[key]) for key in exported)


@pytest.mark.parametrize("file_format", ["peft", "diffusers"])
def test_the_projector_lies_beside_the_lora_and_is_spoken_of(
    run: Run, file_format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run.export(file_format, tmp_path / "out")
    official = run.export("uso", tmp_path / "uso")
    name = "projector.safetensors"
    assert (folder / name).read_bytes() == (official / name).read_bytes()
    said = capsys.readouterr().out
    for text in (said, (folder / "README.md").read_text()):
        assert f"style projector lies in {name} under USO's keys: {file_format} has no place for it" in text


def pipeline(parts: FluxParts, **schedule: object) -> FluxPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(str(BASE), subfolder="scheduler")
    made = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, **schedule),
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        text_encoder_2=parts.text_encoder_2,
        tokenizer_2=parts.tokenizer_2,
        transformer=parts.transformer,
    )
    made.set_progress_bar_config(disable=True)
    return made


def drawn_by(flux: FluxPipeline, policy: UsoPolicy, prompts: list[str], **options: object) -> Tensor:
    result: Tensor = flux(
        prompt=prompts,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=STEPS,
        latents=noise_like_request(policy, range(len(prompts)), SIZE),
        guidance_scale=policy.sample_guidance,
        max_sequence_length=WORDS,
        output_type="pt",
        **options,
    ).images
    return result


@pytest.mark.parametrize("schedule", ["official", "token_count"])
def test_flux_pipeline_draws_the_same_picture(run: Run, schedule: str, tmp_path: Path) -> None:
    """Text only, the same latents and times. "official" times are given to a scheduler that shifts nothing;
    "token_count" is what the pipeline does by itself."""
    folder = run.export("diffusers", tmp_path / "adapter")
    examples = [dataclasses.replace(example, content_refs=(), style_refs=()) for example in run.examples]
    prompts = [example.prompt for example in examples]
    policy = UsoPolicy.from_pretrained(
        str(BASE), lora=str(run.export("uso", tmp_path / "uso") / LORA_FILES["uso"]), schedule=schedule, **OPTIONS
    )
    expected = picture(policy, examples).clamp(0, 1)

    if schedule == "official":
        flux = pipeline(plain_parts(), use_dynamic_shifting=False, shift=1.0)
        options = {"sigmas": policy.sigmas(STEPS, SIZE)[:-1].tolist()}
    else:
        flux, options = pipeline(plain_parts()), {}
    without = drawn_by(flux, policy, prompts, **options)
    flux.load_lora_weights(str(folder), weight_name=LORA_FILES["diffusers"])
    drawn = drawn_by(flux, policy, prompts, **options)
    error = float((drawn - expected).abs().max())
    print(
        f"{schedule}: largest pixel difference {error:.1e}, the LoRA's own {float((drawn - without).abs().max()):.1e}"
    )
    assert error < 1e-5
    assert float((drawn - without).abs().max()) > 1e-2


# -- what cannot be exported -----------------------------------------------------------------------------------------


def test_a_lora_that_is_not_whole_is_refused_by_name(tmp_path: Path) -> None:
    made = write_export(tiny_lora(), "uso", tmp_path / "whole", source="run")
    assert made.rank == 2
    assert load_file(made.files["lora"])["double_blocks.0.processor.qkv_lora2.up.weight"].shape == (9, 2)
    for name in tiny_lora():
        tensors = tiny_lora()
        del tensors[name]
        with pytest.raises(CheckpointError, match=r"^run: the LoRA cannot be exported: its tensor '.*' is missing$"):
            write_export(tensors, "peft", tmp_path / "lacking", source="run")
    surplus = tiny_lora() | {"transformer.transformer_blocks.0.ff.net.2.lora_A.default.weight": torch.zeros(2, 3)}
    with pytest.raises(CheckpointError, match=r"ff\.net\.2.*no place in USO's layout"):
        write_export(surplus, "uso", tmp_path / "surplus", source="run")


def test_untied_downs_have_no_place_in_the_fused_layout_but_in_the_others(tmp_path: Path) -> None:
    key = "transformer.transformer_blocks.0.attn.to_k.lora_A.default.weight"
    tensors = tiny_lora() | {key: torch.full((2, 3), 7.0)}
    with pytest.raises(CheckpointError, match="stored once, but its parameters here are not shared"):
        write_export(tensors, "uso", tmp_path / "uso", source="run")
    made = load_file(write_export(tensors, "diffusers", tmp_path / "split", source="run").files["lora"])
    assert float(made["transformer.transformer_blocks.0.attn.to_k.lora_A.weight"].min()) == 7


def test_what_else_was_trained_is_spoken_of(tmp_path: Path) -> None:
    tensors = tiny_lora() | {"transformer.x_embedder.weight": torch.zeros(1), "other": torch.zeros(1)}
    made = write_export(tensors, "uso", tmp_path, source="run")
    assert any("'transformer.x_embedder.weight' and 1 more" in note for note in made.notes)
    assert any("projector was not trained" in note for note in made.notes)
    assert set(made.files) == {"lora"}
    with pytest.raises(ConfigError, match="Did you mean 'peft'"):
        write_export(tensors, "pef", tmp_path, source="run")
