"""A plug-in that an experiment names becomes an object."""

from __future__ import annotations

from typing import Any

from rewardgen import plugins, sources
from rewardgen.settings import Plugin


def make(path: str, kind: plugins.Kind, plugin: Plugin) -> Any:
    """Construct a plug-in: fetch what its arguments name, check them against its signature, call it.

    Args:
        path: key path in the experiment, for messages.

    Raises:
        UserError: a source is missing, an argument does not fit, or the plug-in refuses it.
    """
    target = plugins.factory(plugins.resolve(kind, plugin.use))
    args = sources.materialise(plugin.args, f"{path}.args")
    return target(**plugins.check_args(target, args, f"{path}.args"))
