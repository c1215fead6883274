"""What the policies on FLUX.1 refuse among the arguments of `from_pretrained` before anything is read."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from rewardgen.errors import ConfigError
from rewardgen.policies.attention import check_backend
from rewardgen.policies.frozen import check_frozen
from rewardgen.policies.parts import Sources


def check_values(
    *,
    base: str | None,
    transformer: str | None,
    vae: str | None,
    text_encoder: str | None,
    text_encoder_2: str | None,
    train: Collection[str],
    base_dtype: str,
    offload: bool,
    attention: str | None,
    **_: Any,
) -> None:
    """Check what can be said on any machine: whether an attention back end is installed is left to the one that trains.

    Raises:
        ConfigError: a part is named nowhere, base weights are to be trained that cannot be, or diffusers knows no such
            attention back end.
    """
    named = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    sources = Sources(base=base, **named)
    for part in named:
        sources.place(part)
    check_frozen(train, eight_bit=base_dtype == "int8", offload=offload)
    check_backend(attention, here=False)


def check_projector(train: Collection[str], *, there: bool) -> None:
    """Raise ConfigError where a style projector is to be trained that is not `there`."""
    if "projector" in train and not there:
        raise ConfigError(
            "train: it names 'projector', but the policy has none: name its file in `projector`, or a `siglip` for a"
            " fresh one"
        )
