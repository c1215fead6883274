"""Alignment, crops, the matching reward, the face network and ID-Conf against UMO's code: values and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rewardgen.rewards.faces.align import similarity_transform, template, warp
from rewardgen.rewards.faces.detector import FACE_LANDMARKS, IDENTITY_LANDMARKS, GivenDetector
from rewardgen.rewards.faces.encoder import FaceEncoder
from rewardgen.rewards.faces.iresnet import IResNet, iresnet_from
from rewardgen.rewards.faces.metrics import id_conf, identity_report
from rewardgen.rewards.faces.onnx_detectors import retinaface_input
from rewardgen.rewards.matching import MatchingReward, assign, assign_batch, matching_value
from rewardgen.types import Example
from tests.toy_faces import CROP, tiny_iresnet

from .conftest import FixtureSet, set_of
from .kinks import gradient_up_to_kinks

Record = Callable[[str, float], None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    fixtures = set_of(metafunc.config)
    if "reward_case" in metafunc.fixturenames:
        metafunc.parametrize("reward_case", list(fixtures.json("umo_mimr")["reward_cases"]))
    if "e2e_case" in metafunc.fixturenames:
        names = [name for name in fixtures.tensors("umo_mimr") if name.startswith("e2e.")]
        metafunc.parametrize("e2e_case", sorted({name.split(".")[1] for name in names if name.count(".") == 2}))


@pytest.fixture(scope="module")
def io(fixture_set: FixtureSet) -> dict[str, Tensor]:
    return fixture_set.tensors("umo_mimr")


def check(
    record_error: Record, group: str, ours: Tensor, reference: Tensor, tolerance: float, *, relative: bool = False
) -> None:
    assert ours.shape == reference.shape
    error = float((ours.double() - reference.double()).abs().max())
    if relative:
        error /= max(float(reference.abs().max()), 1e-12)
    record_error(group, error)
    assert error <= tolerance, group


# ---------------------------------------------------------------------------------------------- the matching reward


def detected(io: dict[str, Tensor], counts: dict[str, int], case: str) -> tuple[Tensor, Tensor]:
    """Embeddings of the faces that were found; the reference code stands one pseudo-face in where there was none."""
    ref_MD = nn.functional.normalize(io[f"reward.{case}.ref_emb"], dim=-1)[: counts["n_ref_detected"]]
    gen_ND = io[f"reward.{case}.gen_emb"].clone().requires_grad_()
    return ref_MD, gen_ND


def padded(refs: list[Tensor], gens: list[Tensor]) -> tuple[Tensor, Tensor]:
    similarity_BMN = pad_sequence(refs, batch_first=True) @ pad_sequence(gens, batch_first=True).mT
    present_BMN = torch.zeros(similarity_BMN.shape, dtype=torch.bool)
    for present_MN, ref_MD, gen_ND in zip(present_BMN, refs, gens, strict=True):
        present_MN[: len(ref_MD), : len(gen_ND)] = True
    return similarity_BMN, present_BMN


def test_reward_and_gradient(fixture_set, io, record_error, reward_case):
    counts = fixture_set.json("umo_mimr")["reward_cases"][reward_case]
    ref_MD, gen_ND = detected(io, counts, reward_case)
    unit_ND = nn.functional.normalize(gen_ND, dim=-1)[: counts["n_gen_detected"]]
    similarity_BMN, present_BMN = padded([ref_MD], [unit_ND])
    value = matching_value(similarity_BMN, assign_batch(similarity_BMN, present_BMN), present_BMN)[0]
    check(record_error, "MIMR value", value.detach(), io[f"reward.{reward_case}.reward"], 1e-6)
    check(record_error, "MIMR value", value.detach(), torch.tensor(counts["reward"]), 1e-6)
    (grad,) = torch.autograd.grad(value, gen_ND)
    check(record_error, "MIMR gradient", grad, io[f"reward.{reward_case}.grad_gen_emb"], 1e-6)


def test_the_assignment_has_the_total_of_the_reference(fixture_set, io, reward_case):
    """The assignment itself is not in the set; it is the only one that makes this total of the cosines."""
    counts = fixture_set.json("umo_mimr")["reward_cases"][reward_case]
    ref_MD, gen_ND = detected(io, counts, reward_case)
    similarity_MN = ref_MD @ nn.functional.normalize(gen_ND.detach(), dim=-1)[: counts["n_gen_detected"]].T
    if similarity_MN.numel():
        matched_cosines = (counts["reward"] * similarity_MN.numel() + float(similarity_MN.sum())) / 2
        assert float(similarity_MN[assign(similarity_MN)].sum()) == pytest.approx(matched_cosines, abs=1e-5)
        assert int(assign(similarity_MN).sum()) == min(similarity_MN.shape)
    else:
        assert counts["reward"] == 0


def test_all_cases_as_one_batch(fixture_set, io, record_error):
    cases = fixture_set.json("umo_mimr")["reward_cases"]
    sides = [detected(io, counts, case) for case, counts in cases.items()]
    units = [
        nn.functional.normalize(gen_ND, dim=-1)[: counts["n_gen_detected"]]
        for (_, gen_ND), counts in zip(sides, cases.values(), strict=True)
    ]
    similarity_BMN, present_BMN = padded([ref_MD for ref_MD, _ in sides], units)
    value_B = matching_value(similarity_BMN, assign_batch(similarity_BMN, present_BMN), present_BMN)
    expected_B = torch.stack([io[f"reward.{case}.reward"] for case in cases])
    check(record_error, "MIMR value, batched", value_B.detach(), expected_B, 1e-6)
    gradients = torch.autograd.grad(value_B.sum(), [gen_ND for _, gen_ND in sides])
    for case, grad in zip(cases, gradients, strict=True):
        check(record_error, "MIMR gradient, batched", grad, io[f"reward.{case}.grad_gen_emb"], 1e-6)


# ------------------------------------------------------------------------------------------------- alignment, crops


def test_template(io, record_error):
    check(record_error, "ArcFace template", template(), io["align.template_5pt"], 1e-4)


def test_similarity_transform(io, record_error):
    ours_N23 = similarity_transform(io["align.landmarks"], io["align.template_5pt"])
    check(record_error, "similarity transform", ours_N23, io["align.M"], 1e-3)
    assert bool((io["align.id_weight"] == 1).all())


def test_crops(io, record_error):
    size = io["align.crops"].shape[-1]
    for group, transform_N23 in (
        ("crops, reference transforms", io["align.M"]),
        ("crops, own transforms", similarity_transform(io["align.landmarks"], io["align.template_5pt"])),
    ):
        ours = warp(io["align.image"][None], [transform_N23[io["align.crop_of"]]], size)
        check(record_error, group, ours, io["align.crops"], 2e-3)


def test_crops_of_several_pictures_at_once(io, record_error):
    """The same crops when they are cut from a batch in which pictures have different numbers of faces."""
    transform_N23 = io["align.M"][io["align.crop_of"]]
    images_B3HW = torch.stack([io["align.image"].flip(0), io["align.image"], io["align.image"]])
    ours = warp(images_B3HW, [transform_N23[:0], transform_N23[:1], transform_N23[1:]], io["align.crops"].shape[-1])
    check(record_error, "crops, batched", ours, io["align.crops"], 2e-3)


def test_without_a_face(io, record_error):
    """The reference code cuts with the identity and weighs the result with 0; we cut nothing and mask."""
    assert float(io["align.no_face.id_weight"].sum()) == 0
    ours = warp(io["align.image"][None], [io["align.no_face.M"]], io["align.no_face.crop"].shape[-1])
    check(record_error, "crop without a face", ours, io["align.no_face.crop"], 2e-3)


def test_detector_input(io, record_error):
    ours = retinaface_input(io["align.image"][None] / 2 + 0.5)
    check(record_error, "RetinaFace input", ours, io["align.detector_input_nhwc_bgr"], 1e-3)


# ------------------------------------------------------------------------------------------------ from pixels to reward


class ToyEmbedder(nn.Module):
    """The set's stand-in for a face network: a linear map of the average-pooled crop."""

    def __init__(self, weight_DP: Tensor, bias_D: Tensor, crop_size: int) -> None:
        super().__init__()
        self.weight_DP, self.bias_D = nn.Parameter(weight_DP), nn.Parameter(bias_D)
        self.kernel = crop_size // round((weight_DP.shape[1] / 3) ** 0.5)

    def forward(self, crops_F3SS: Tensor) -> Tensor:
        pooled_FP = nn.functional.avg_pool2d(crops_F3SS, self.kernel).flatten(1)
        return nn.functional.linear(pooled_FP, self.weight_DP, self.bias_D)


def test_whole_chain(io, record_error, e2e_case):
    case = {name.rpartition(".")[2]: tensor for name, tensor in io.items() if name.startswith(f"e2e.{e2e_case}.")}
    size = io["align.crops"].shape[-1]
    network = ToyEmbedder(io["e2e.embed_weight"].clone(), io["e2e.embed_bias"].clone(), size)
    reward = MatchingReward(FaceEncoder(GivenDetector(), network, crop_size=size))
    example = Example(
        id="group",
        identity_refs=(case["ref_image"] / 2 + 0.5,),
        extras={FACE_LANDMARKS: case["gen_landmarks"], IDENTITY_LANDMARKS: [case["ref_landmarks"]]},
    )
    image = case["gen_image"].clone().requires_grad_()
    score = reward.score((image / 2 + 0.5)[None], [example])
    assert score.valid_B.tolist() == [bool(len(case["gen_landmarks"])) and bool(len(case["ref_landmarks"]))]
    check(record_error, "chain value", score.value_B[0].detach(), case["reward"], 1e-4)
    (grad,) = torch.autograd.grad(score.value_B[0], image)
    check(record_error, "chain gradient (relative)", grad, case["grad_gen_image"], 1e-4, relative=True)


# ----------------------------------------------------------------------------------------------------- face network

DRAW: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "matrix": lambda x: x / np.sqrt(np.prod(x.shape[1:])),
    "scale": lambda x: 1 + 0.1 * x,
    "bias": lambda x: 0.1 * x,
    "mean": lambda x: 0.1 * x,
    "var": lambda x: 1 + 0.2 * np.tanh(x),
    "prelu": lambda x: 0.25 + 0.05 * x,
}


@pytest.fixture(scope="module")
def iresnet(fixture_set: FixtureSet) -> IResNet:
    recipe = fixture_set.json("arcface_r50_keys")
    tensors = {}
    for tensor in recipe["tensors"]:
        x = np.random.RandomState(recipe["base_seed"] + tensor["index"]).standard_normal(tensor["shape"])
        tensors[tensor["name"]] = torch.from_numpy(DRAW[tensor["kind"]](x).astype(np.float32))
    return iresnet_from(tensors, "the fixture set").requires_grad_(False)


def test_names_and_shapes_of_the_release(fixture_set, iresnet):
    theirs = {tensor["name"]: tuple(tensor["shape"]) for tensor in fixture_set.json("arcface_r50_keys")["tensors"]}
    ours = {name: tuple(tensor.shape) for name, tensor in iresnet.state_dict().items()}
    assert {name: shape for name, shape in ours.items() if not name.endswith("num_batches_tracked")} == theirs


def test_embedding(fixture_set, iresnet, record_error):
    io = fixture_set.tensors("arcface_r50_io")
    check(record_error, "IResNet (relative)", iresnet(io["input"]), io["embedding"], 1e-4, relative=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_gradient_of_the_embedding(fixture_set, iresnet, record_error):
    io = {name: tensor.double() for name, tensor in fixture_set.tensors("arcface_r50_io").items()}
    network = copy.deepcopy(iresnet).double()
    for row in range(len(io["input"])):
        image, probe, reference = (io[name][row : row + 1] for name in ("input", "grad_probe", "grad_input"))
        before, after, turned = gradient_up_to_kinks(network, image, probe, reference, 1e-4)
        record_error("IResNet gradient (relative)", after)
        record_error("IResNet gradient, kinks as they fall", before)
        record_error("IResNet gradient, units on a kink", turned)
        assert after <= 1e-4


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_kinks_excuse_rounding_and_nothing_else():
    network = tiny_iresnet().double()
    image = torch.rand(1, 3, CROP, CROP, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    probe = torch.ones(1, 6, dtype=torch.float64)

    def gradient(of: nn.Module) -> Tensor:
        pixels = image.clone().requires_grad_()
        return torch.autograd.grad((of(pixels) * probe).sum(), pixels)[0]

    # Move one unit of the first PReLU next to 0, then look from either side.
    unit = network.bn1(network.conv1(image))[0, 2, 5, 7]
    below, above = copy.deepcopy(network), copy.deepcopy(network)
    with torch.no_grad():
        below.bn1.bias[2] -= unit + 1e-9
        above.bn1.bias[2] -= unit - 1e-9
    before, after, turned = gradient_up_to_kinks(below, image, probe, gradient(above), 1e-6)
    assert before > 1e-4
    assert after < 1e-6
    assert turned == 1

    with torch.no_grad():
        above.layer3[0].bn2.weight[1] *= 1.1
    assert gradient_up_to_kinks(below, image, probe, gradient(above), 1e-6)[1] > 1e-4


# ------------------------------------------------------------------------------------------------------------ ID-Conf


def test_id_conf(fixture_set, record_error):
    golden = fixture_set.json("umo_idconf")
    by_name: dict[str, list[float]] = {}
    similarities = []
    for image in golden["images"]:
        similarity_MN = torch.tensor(image["similarities"], dtype=torch.float64)
        similarities.append(similarity_MN)
        ours = {f"id{row}": value for row, value in enumerate(id_conf(similarity_MN)) if value is not None}
        assert ours.keys() == image["scores"].keys()
        for name, value in ours.items():
            by_name.setdefault(name, []).append(value)
            record_error("ID-Conf of a reference", abs(value - image["scores"][name]))
            assert value == pytest.approx(image["scores"][name], abs=1e-6)
    report = identity_report(similarities)
    assert report.id_conf is not None
    record_error("ID-Conf of the set (0 to 100)", abs(report.id_conf - golden["final_id_conf"]))
    assert report.id_conf == pytest.approx(golden["final_id_conf"], abs=1e-4)
    for name, expected in golden["per_identity_name"].items():
        assert 100 * sum(by_name[name]) / len(by_name[name]) == pytest.approx(expected, abs=1e-4)
    assert report.coverage == pytest.approx(
        sum(len(image["scores"]) for image in golden["images"])
        / sum(len(image["similarities"]) for image in golden["images"])
    )
