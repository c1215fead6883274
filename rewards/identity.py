"""SIR, the single identity reward of UMO (arXiv 2509.06818): does the person of the reference appear?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewardgen.rewards.faces.explain import face_matches
from rewardgen.rewards.faces.reward import FaceReward
from rewardgen.types import Example, FaceMatches, Score


class IdentityReward(FaceReward):
    """Cosine of the face embeddings of the picture and of the identity reference, in [-1, 1].

    `SIR = cos(psi(picture), psi(reference))`. The paper says it for one face and one reference. With more, a reference
    is compared with the face most like it and the value is the mean over references (ID-Sim / 100), and of a
    reference picture the largest face counts; nothing then keeps one face from serving two references, which is what
    `matching` is for. Where the faces are carries no gradient, nor do the references; each is embedded once.

    An example is valid if it has an identity reference, each of them shows a face, and the picture shows one.
    `counts` are over the batch: `faces`, pictures with `no_face`, examples with an `unreadable_reference`.

    Args:
        faces: detector and face network.
    """

    differentiable = True

    def explain(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> list[FaceMatches]:
        """Who was found in each picture, one face to a reference (the value allows one face for several)."""
        return face_matches(self.faces, pixels_B3HW, examples, one_each=True)

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        seen = self.faces.compare(pixels_B3HW, examples, one_each=True)
        applies = [bool(len(refs_MD)) and bool(len(drawn_ND)) for refs_MD, drawn_ND in seen.pairs()]
        value_B = torch.stack(
            [
                # The sum of nothing, or times 0: no value, but still a function of the pixels.
                (refs_MD @ drawn_ND.T).max(1).values.mean() if applied else 0 * drawn_ND.sum()
                for applied, (refs_MD, drawn_ND) in zip(applies, seen.pairs(), strict=True)
            ]
        )
        valid_B = torch.tensor(applies, device=value_B.device) & value_B.detach().isfinite()
        return Score(value_B=value_B, valid_B=valid_B, counts=seen.counts())
