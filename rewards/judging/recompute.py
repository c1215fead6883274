"""Activation checkpointing of a transformers model in evaluation mode; the library recomputes only in training."""

from __future__ import annotations

from typing import Any


def recompute_layers(model: Any) -> None:
    """From now on the layers are recomputed in the backward pass instead of keeping their activations."""
    # Its name changed within transformers 5.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def go_on_recomputing(model: Any) -> None:
    """After `eval()`: layers that recompute take themselves to be in training; the modules inside them do not."""
    for module in model.modules():
        # The flag of the layer alone, which says whether it recomputes. Dropout sits in modules inside it.
        if hasattr(type(module), "gradient_checkpointing") and module.gradient_checkpointing:
            module.training = True
