"""Is the identity world fit to train against? The gate before any policy: `python benchmarks/faces_gate.py [--write]`.

True group pictures of six held-out people go through the autoencoder, which a policy's pictures never get past. In
them the detector must find the faces (recall), and the face network must tell them apart: the mean cosine of a
person's portrait with their own face, less that with the faces of the others.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rewardgen.rewards.faces.encoder import FaceEncoder
from rewardgen.sources import ASSETS
from rewardgen.world.faces import MAX_PEOPLE, draw_groups, portraits
from rewardgen.world.people import draw_people
from rewardgen.world.recipes import detector, embedder, people_vae

LEAST_RECALL, LEAST_GAP = 0.95, 0.4
RESULT = Path(__file__).resolve().parent / "results" / "faces_gate.json"
PIECES = ("people_vae", "detector", "embedder")


def gate(folder: Path, pictures: int, seed: int = 51) -> dict[str, float]:
    """Recall and precision of the detector, and cosines with the portraits, over `pictures` rebuilt groups."""
    people = draw_people(MAX_PEOPLE * pictures, seed, "held_out")
    who_NK = torch.arange(MAX_PEOPLE * pictures).reshape(pictures, MAX_PEOPLE)
    truth, known, _ = draw_groups(people, who_NK, seed + 1)
    alone = portraits(people, seed + 2)[0]
    encoder = FaceEncoder(detector.load(folder), embedder.load(folder), crop_size=embedder.CONFIG.image_size)
    drawn = people_vae.rebuild(people_vae.load(folder), truth)
    lesson = detector.Lesson(drawn, known.boxes_NK4, known.landmarks_NK52)
    with torch.no_grad():
        found = encoder.find(drawn, [None] * pictures)
        faces = encoder.embed(drawn, [encoder.align(some) for some in found])
        singles = encoder.find(alone, [None] * len(alone))
        references = encoder.embed(alone, [encoder.align(some.by_size()[:1]) for some in singles])
    same, different = [], []
    for n in range(pictures):
        overlap_KF = detector.overlaps(known.boxes_NK4[n], found[n].boxes_N4)
        owner_F = overlap_KF.argmax(0)
        for k in range(MAX_PEOPLE):
            reference = references[n * MAX_PEOPLE + k]
            if len(reference):
                cosine_F = faces[n] @ reference[0]
                same += cosine_F[owner_F == k].tolist()
                different += cosine_F[owner_F != k].tolist()
    same_mean, different_mean = (sum(values) / max(len(values), 1) for values in (same, different))
    measured = detector.recall(encoder.detector, lesson)
    return measured | {
        "unreadable_portraits": sum(not len(reference) for reference in references) / len(references),
        "same": same_mean,
        "different": different_mean,
        "gap": same_mean - different_mean,
    }


def record(folder: Path, pictures: int, found: Mapping[str, float]) -> dict[str, Any]:
    """What was found, and by which files of the world."""
    world = json.loads((folder / "world.json").read_text())
    return {"pictures": pictures, "figures": dict(found), "files": {name: world[name]["files"] for name in PIECES}}


def passed(found: Mapping[str, float]) -> bool:
    """Whether the world may be trained against."""
    return found["recall"] >= LEAST_RECALL and found["gap"] >= LEAST_GAP


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100, help="group pictures of six people")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder of the bundled world")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/faces_gate.json")
    options = parser.parse_args()
    found = gate(options.assets, options.pictures)
    for name, value in found.items():
        print(f"{name:<22} {value:.3f}")
    if options.write:
        RESULT.write_text(json.dumps(record(options.assets, options.pictures, found), indent=1) + "\n")
    print(f"gate {'passed' if passed(found) else 'FAILED'}: recall at least {LEAST_RECALL}, gap at least {LEAST_GAP}")
    return 0 if passed(found) else 1


if __name__ == "__main__":
    sys.exit(main())
