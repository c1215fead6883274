"""The rewards' leg of backpropagation: from the terms of the objective to the pixels.

    d/dx sum_B t(r_1 .. r_k) = sum_k dt/dr_k dr_k/dx

Shape suffixes: B batch, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewardgen.composition import pixel_gradient
from rewardgen.gradients import TermSums
from rewardgen.objective import Objective, masked_sum
from rewardgen.reward import score
from rewardgen.transfer import score_on_host
from rewardgen.types import Example, Score


def reward_leg(
    objective: Objective, pixels_B3HW: Tensor, examples: Sequence[Example], sums: TermSums, *, step: int
) -> dict[str, Tensor]:
    """Score pictures with every active reward, and differentiate each term's sum with respect to the pixels.

    Each reward's graph is freed before the next one is asked; afterwards a term's partial derivatives scale the rows
    of their gradients. Rows of invalid examples are cleared, so that a NaN made by a failed score ends here.

    Args:
        objective: the loss.
        pixels_B3HW: pictures; their own graph is left alone.
        examples: what they show.
        sums: gets the scores, and each term's sum and count.
        step: of training.

    Returns:
        Gradients [B, 3, H, W] in the pictures' dtype, of the terms with a weight and a counted example.
    """
    scores: dict[str, Score] = {}
    score_grads: dict[str, Tensor] = {}
    for name in objective.active_rewards(step):
        seen_B3HW = pixels_B3HW.detach().to(torch.promote_types(pixels_B3HW.dtype, torch.float32))
        seen_B3HW.requires_grad_()
        result = score(objective.rewards[name], seen_B3HW, examples, enable_grad=True)
        # The only answer that a reward's leg waits for: without a valid score there is no backward pass at all.
        scores[name] = seen = score_on_host(result)
        sums.add_score(name, seen)
        if int(seen.valid_B.sum()):  # a number, which a plan without values can make up
            # Of the sum over the valid ones, whose number the device need not know.
            valid_B = result.valid_B
            (grad_B3HW,) = torch.autograd.grad(result.value_B, seen_B3HW, grad_outputs=valid_B.to(result.value_B))
            valid_B = valid_B.to(grad_B3HW.device)
            score_grads[name] = grad_B3HW.where(valid_B[:, None, None, None], 0.0)
    pixel_grads: dict[str, Tensor] = {}
    for name, term in objective.terms(scores, step).items():
        total, count = masked_sum(Score(value_B=term.value_B, valid_B=term.counted_B))
        sums.add(name, total, count)
        grad = pixel_gradient(term, score_grads) if count and objective.weight(name, step) else None
        if grad is not None:
            pixel_grads[name] = grad.to(pixels_B3HW.dtype)
    return pixel_grads
