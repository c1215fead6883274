"""The law of imports: arrows run one way. Every import counts, also those inside functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"rewardgen": "rewardgen", "rewards": "rewardgen.rewards", "policies": "rewardgen.policies"}

# A module may import those of lower ranks and its own; the longest prefix decides.
RANKS = {
    "rewardgen": 0,
    "rewardgen.errors": 0,
    "rewardgen.settings": 0,
    "rewardgen.types": 0,
    "rewardgen.seeds": 0,
    "rewardgen.transfer": 0,
    "rewardgen.adaptive": 1,
    "rewardgen.arguments": 1,
    "rewardgen.checkpoint": 1,
    "rewardgen.composition": 1,
    "rewardgen.data": 1,
    "rewardgen.distributed": 1,
    "rewardgen.dry_run": 2,
    "rewardgen.flow": 1,
    "rewardgen.event_loop": 1,
    "rewardgen.hub": 1,
    "rewardgen.interrupt": 1,
    "rewardgen.known_integers": 1,
    "rewardgen.manifest": 1,
    "rewardgen.measure": 1,
    "rewardgen.policy": 1,
    "rewardgen.report": 1,
    "rewardgen.reward": 1,
    "rewardgen.reward_template": 1,
    "rewardgen.strict_yaml": 1,
    "rewardgen.base_policy": 2,
    "rewardgen.gradients": 2,
    "rewardgen.objective": 2,
    "rewardgen.objective_config": 2,
    "rewardgen.optimizer": 2,
    "rewardgen.policy_gradient": 2,
    "rewardgen.replay": 2,
    "rewardgen.reward_leg": 2,
    "rewardgen.rollout": 2,
    "rewardgen.scoring": 2,
    "rewardgen.sharding": 2,
    "rewardgen.plugins": 2,
    "rewardgen.reward_function": 2,
    "rewardgen.sources": 2,
    "rewardgen.terms": 2,
    "rewardgen.rewards": 2,
    "rewardgen.policies": 2,
    "rewardgen.construct": 3,
    "rewardgen.curation": 3,
    "rewardgen.evaluation": 3,
    "rewardgen.fleet": 3,
    "rewardgen.learner": 3,
    "rewardgen.samples": 3,
    "rewardgen.world": 3,
    "rewardgen.batches": 4,
    "rewardgen.trainer": 4,
    "rewardgen.config": 5,
    "rewardgen.memory_plan": 5,
    "rewardgen.fitting": 5,
    "rewardgen.planned": 5,
    "rewardgen.planned_draws": 5,
    "rewardgen.run_folder": 6,
    "rewardgen.workers": 6,
    "rewardgen.learners": 6,
    "rewardgen.build": 6,
    "rewardgen.held_out": 6,
    "rewardgen.reward_check": 6,
    "rewardgen.commands": 6,
    "rewardgen.cli": 7,
    "rewardgen.__main__": 8,
}
FOUNDATION = {"rewardgen"} | {f"rewardgen.{name}" for name in ("errors", "hub", "settings", "transfer", "types")}
CONTRACT = {"rewardgen.rewards": "rewardgen.reward", "rewardgen.policies": "rewardgen.policy"}


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = modules()


def imports_of(name: str, path: Path) -> Iterator[str]:
    """The project's own modules that a file imports, as exactly as the file says."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the whole name"
            base = node.module or ""
            targets = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names]
        else:
            continue
        yield from (target for target in targets if target.split(".")[0] == "rewardgen" and target != name)


def prefix(name: str, among: object) -> str | None:
    parts = name.split(".")
    candidates = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((candidate for candidate in candidates if candidate in among), None)  # type: ignore[operator]


def fault(name: str, target: str) -> str | None:
    """Why a module may not import another, or None."""
    room, other = prefix(name, RANKS), prefix(target, RANKS)
    assert room is not None
    assert other is not None
    if room != "rewardgen" and (room == "rewardgen" or other == "rewardgen") and target not in FOUNDATION:
        return f"{target} has no rank"
    if room in CONTRACT:
        if other == room or target in FOUNDATION or target == CONTRACT[room] or other == "rewardgen.flow":
            return None
        return f"a file of {room} may import the types, its contract, the mathematics and siblings, not {target}"
    if other in CONTRACT and room != "rewardgen.world":
        return f"the engine reaches {target} by name, through plugins.py"
    if RANKS[room] < RANKS[other]:
        return f"the arrow to {target} runs back"
    return None


def test_every_module_has_a_place() -> None:
    assert len(MODULES) > 20
    lost = [name for name in MODULES if name != "rewardgen" and prefix(name, RANKS) == "rewardgen"]
    assert not lost, f"say in RANKS (and in docs/design.md) where these belong: {lost}"


@pytest.mark.parametrize("name", MODULES)
def test_no_arrow_runs_back(name: str) -> None:
    faults = [found for target in imports_of(name, MODULES[name]) if (found := fault(name, target))]
    assert not faults, f"{name}: {'; '.join(faults)}"


def test_there_are_no_circles() -> None:
    """Between modules of one rank the ranks do not help."""
    graph = {name: set(imports_of(name, path)) & set(MODULES) for name, path in MODULES.items()}
    while leaves := {name for name, targets in graph.items() if not targets & set(graph)}:
        graph = {name: targets for name, targets in graph.items() if name not in leaves}
    assert not graph, f"imports in a circle among {sorted(graph)}"


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("rewardgen.types", "rewardgen.reward"),
        ("rewardgen.flow.loss", "rewardgen.objective"),
        ("rewardgen.learner", "rewardgen.trainer"),
        ("rewardgen.trainer", "rewardgen.build"),
        ("rewardgen.objective", "rewardgen.rewards.csd"),
        ("rewardgen.build", "rewardgen.policies.uso"),
        ("rewardgen.rewards.csd", "rewardgen.policies.uso"),
        ("rewardgen.rewards.csd", "rewardgen.policy"),
        ("rewardgen.rewards.csd", "rewardgen.objective"),
        ("rewardgen.policies.uso", "rewardgen.reward"),
    ],
)
def test_the_law_catches(name: str, target: str) -> None:
    assert fault(name, target)
