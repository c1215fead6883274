"""The train step of Style Reward Learning as one would write it by hand, for `step_overhead.py` to compare with.

Plain torch around the modules of diffusers and CSD: no cache, no per-term gradients, no report, no checks. It takes
every shortcut that the bundled experiment allows and the engine, being general, does not: all examples have one
layout, everything frozen is computed once, pictures have CSD's own size, and noise comes ready made.

Shape suffixes: B batch, N examples, L target tokens, P packed channels, H and W pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewardgen.config import Experiment
from rewardgen.policies.packing import image_ids
from rewardgen.policies.uso import UsoPolicy
from rewardgen.rewards.csd import CsdReward
from rewardgen.rewards.preprocess import CLIP_MEAN, CLIP_STD
from rewardgen.types import Example


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What one step sees and draws.

    Args:
        index_B: places in the list of examples.
        no_prompt_B: which examples lose their prompt in the flow-matching term.
        t_B, fm_noise_BLP: time and noise of the flow-matching term.
        noise_BLP: where the rollout starts.
        entry_step: steps that it takes without gradient.
    """

    index_B: Tensor
    no_prompt_B: Tensor
    t_B: Tensor
    fm_noise_BLP: Tensor
    noise_BLP: Tensor
    entry_step: int


class BareStep:
    """Models, encoded examples and optimizer; `step` is the loop's body.

    Args:
        policy: its modules are used and its LoRA is trained; nothing else of it is called after this.
        reward: CSD, likewise.
        examples: each with one content reference, one style reference and a target of the rollout's size.
        experiment: sizes, weights and the optimizer's settings. Its window is `refl`.
    """

    def __init__(self, policy: UsoPolicy, reward: CsdReward, examples: Sequence[Example], experiment: Experiment):
        rollout, settings = experiment.rollout, experiment.optimizer
        assert rollout.window.kind == "refl"
        assert rollout.image_size == (reward.model.config.image_size,) * 2
        assert experiment.train.accumulation == 1
        assert policy.trained_parts == ("lora",)
        self.transformer, self.vae, self.csd = policy.transformer, policy.vae, reward.model
        self.fm_weight = experiment.objective.flow_matching.weight
        self.reward_weight = experiment.objective.rewards["style"].weight
        self.settings, self.ema_decay = settings, experiment.train.ema_decay
        self.sigmas = policy.sigmas(rollout.num_steps, rollout.image_size)
        self.guidance = {"train": policy.train_guidance, "sample": policy.sample_guidance}
        self.size = rollout.image_size
        with torch.no_grad():
            encoded = policy.encode(examples)
            self.text, self.pooled = torch.stack(encoded.text_B), torch.stack(encoded.pooled_B)
            nothing = policy.encode([dataclasses.replace(examples[0], prompt="")])
            self.no_text, self.no_pooled = nothing.text_B[0], nothing.pooled_B[0]
            self.references = torch.stack([references[0].tokens_NP for references in encoded.references_B])
            assert policy.projector is not None
            self.styles = policy.projector(torch.stack([styles[0] for styles in encoded.styles_B]))
            self.descriptors = torch.cat([reward.embed(example.style_refs[0][None]) for example in examples])
            self.targets = torch.stack([example.target for example in examples if example.target is not None])
            self.grid = (self.size[0] // policy.multiple, self.size[1] // policy.multiple)
            ids = image_ids(self.grid, [encoded.references_B[0][0].grid])
            length = self.styles.shape[1] + self.text.shape[1]
            self.rotary = self.transformer.pos_embed(torch.cat([torch.zeros(length, 3), *ids]))
        self.mean, self.std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
        self.parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.adamw = torch.optim.AdamW(
            self.parameters, settings.lr, settings.betas, settings.eps, settings.weight_decay
        )

    def step(self, inputs: Inputs, step: int) -> tuple[float, float]:
        """One optimizer step; returns the flow-matching loss and the mean reward."""
        index_B, weight = inputs.index_B, self.settings
        references, styles = self.references[index_B], self.styles[index_B]
        text, pooled = self.text[index_B], self.pooled[index_B]

        # Flow matching on the targets, some without their prompt.
        with torch.no_grad():
            clean = self.pack(
                (self.vae.encode(self.targets[index_B] * 2 - 1).latent_dist.mean - self.shift) * self.scale
            )
        t = inputs.t_B[:, None, None]
        fm_text = torch.where(inputs.no_prompt_B[:, None, None], self.no_text, text)
        fm_pooled = torch.where(inputs.no_prompt_B[:, None], self.no_pooled, pooled)
        noisy = (1 - t) * clean + t * inputs.fm_noise_BLP
        v = self.dit(noisy, inputs.t_B, "train", references, styles, fm_text, fm_pooled)
        fm_loss = (v - (inputs.fm_noise_BLP - clean)).square().mean()
        (self.fm_weight * fm_loss).backward()

        # From noise to the entry step without gradient, one step with it, decode, CSD.
        x = inputs.noise_BLP
        with torch.no_grad():
            for i in range(inputs.entry_step):
                sigma = self.sigmas[i].expand(len(x))
                x = x + (self.sigmas[i + 1] - self.sigmas[i]) * self.dit(
                    x, sigma, "sample", references, styles, text, pooled
                )
        sigma = self.sigmas[inputs.entry_step]
        clean_hat = x - sigma * self.dit(x, sigma.expand(len(x)), "sample", references, styles, text, pooled)
        pixels = (self.vae.decode(self.unpack(clean_hat) / self.scale + self.shift).sample + 1) / 2
        pixels = pixels + (pixels.clamp(0, 1) - pixels).detach()
        descriptors = self.csd((pixels - self.mean) / self.std)[2]
        reward = (descriptors * self.descriptors[index_B]).sum(-1).mean()
        (-self.reward_weight * reward).backward()

        torch.nn.utils.clip_grad_norm_(self.parameters, weight.max_grad_norm)
        # No decay: it would change no time.
        for group in self.adamw.param_groups:
            group["lr"] = weight.lr * min(1.0, (step + 1) / max(1, weight.warmup_steps))
        self.adamw.step()
        self.adamw.zero_grad()
        if self.ema_decay is not None:
            with torch.no_grad():
                for average, parameter in zip(self.average, self.parameters, strict=True):
                    average.lerp_(parameter, 1 - self.ema_decay)
        return fm_loss.item(), reward.item()

    def dit(
        self, x: Tensor, t: Tensor, mode: str, references: Tensor, styles: Tensor, text: Tensor, pooled: Tensor
    ) -> Tensor:
        """FLUX's velocity of the target tokens; style tokens stand before the text."""
        model = self.transformer
        image = model.x_embedder(torch.cat([x, references], dim=1))
        context = torch.cat([styles, model.context_embedder(text)], dim=1)
        guidance = torch.full((len(x),), self.guidance[mode])
        embedding = model.time_text_embed(1000 * t, 1000 * guidance, pooled)
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            context, image = block(image, context, embedding, self.rotary)
        velocity: Tensor = model.proj_out(model.norm_out(image[:, : x.shape[1]], embedding))
        return velocity

    @property
    def scale(self) -> float:
        return float(self.vae.config.scaling_factor)

    @property
    def shift(self) -> float:
        return float(self.vae.config.shift_factor)

    def pack(self, latents: Tensor) -> Tensor:
        return torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)

    def unpack(self, tokens: Tensor) -> Tensor:
        return torch.nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, self.grid), 2)
