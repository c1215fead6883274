"""Reward-feedback training for image-customisation diffusion transformers."""

from pathlib import Path as _Path

__version__ = "0.1.0.dev0"

# In a checkout `rewards/` and `policies/` stand at its top and are imported as `rewardgen.rewards` and
# `rewardgen.policies`. In a wheel setuptools has already put them inside the package.
_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "rewards" / "__init__.py").is_file():
    __path__.append(str(_checkout))
