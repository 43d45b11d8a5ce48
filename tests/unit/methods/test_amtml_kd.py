"""AMTML-KD against an independent float64 computation of each equation, and the acceptance test of its gate."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.nn import functional as F

from kdcompress.errors import RecipeError, ShapeError
from kdcompress.methods.amtml_kd import AMTMLKD, pair_hints
from kdcompress.methods.avg_kd import AverageKD
from kdcompress.regressors import Regressor
from kdcompress.types import UNLABELLED, EnsembleOutputs, NetworkShapes, Share, Step
from kdcompress.weightings.base import ANSWERS, diagnose
from kdcompress.weightings.latent_factors import LatentFactors
from tests.made_steps import STAGES, TinyStudent, make_shapes, make_step

Array = NDArray[np.float64]


def array(tensor: torch.Tensor) -> Array:
    return tensor.detach().double().numpy()


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def unit(x: Array, axis: int) -> Array:
    return np.asarray(x / np.linalg.norm(x, axis=axis, keepdims=True))


def pooled(x: Array, size: int) -> Array:
    b, c, h, w = x.shape
    return x.reshape(b, c, size, h // size, size, w // size).mean((3, 5))


def angle_oracle(s: Array, q: Array) -> float:
    def cosine(p: Array, i: int, j: int, k: int) -> float:
        a, b = p[i] - p[j], p[k] - p[j]
        lengths = np.linalg.norm(a) * np.linalg.norm(b)
        return float(a @ b / lengths) if lengths > 0 else 0.0

    errors = [cosine(s, *t) - cosine(q, *t) for t in itertools.product(range(len(s)), repeat=3)]
    return float(np.mean([0.5 * e * e if abs(e) < 1 else abs(e) - 0.5 for e in errors]))


def gate_scores(method: AMTMLKD, step: Step) -> Array:
    """The teachers' scores for each image, from the paper's equation or from the linear gate's."""
    maps = array(step.student.features["stage3"])
    beta = maps.mean((2, 3)) if method.settings.get("official_compat") else maps.max((2, 3))
    gate = method.weighting
    if isinstance(gate, LatentFactors):
        theta, W = array(gate.factors), array(gate.projection)
        return np.array([[W @ (b * theta[t]) for t in range(len(theta))] for b in beta])
    assert step.teachers is not None
    z = array(step.teachers.logits)
    p = softmax(z)
    summaries = [np.log(np.exp(z).sum(2)), -(p * np.log(p)).sum(2), p.max(2), z.reshape(len(z), -1)]
    alpha = (np.concatenate(summaries, 1) - array(gate.centre)) / array(gate.scale)
    normed = (beta - beta.mean(1, keepdims=True)) / np.sqrt(beta.var(1, keepdims=True) + 1e-5)
    inputs = np.concatenate([alpha, normed, np.ones((len(z), 1))], 1)
    return np.asarray(inputs @ array(gate.coefficients).T)


def hint_oracle(method: AMTMLKD, step: Step) -> float:
    """Σ over teachers; with 3 teachers and 3 stages teacher t teaches stage t. Both maps are first pooled to one size.
    Batch norm uses the batch's statistics."""
    assert step.teachers is not None
    total = 0.0
    for t, stage in enumerate(("stage1", "stage2", "stage3")):
        s, h = array(step.student.features[stage]), array(step.teachers.features[t]["stage3"])
        size = 1 if method.hint_pool == "pooled" else min(s.shape[2], h.shape[2])
        h = pooled(h, size)
        regressor = method.regressors[t]
        if method.variant == "paper":
            kernel = array(regressor.weight)[:, :, 0, 0]
            r = np.einsum("oc,bchw->bohw", kernel, unit(pooled(s, size), 1))
            total += float(np.mean((r - unit(h, 1)) ** 2))
        else:
            assert isinstance(regressor, Regressor)
            kernel = array(regressor.convolution.weight)[:, :, 0, 0]
            r = np.einsum("oc,bchw->bohw", kernel, pooled(s, size))
            r = (r - r.mean((0, 2, 3), keepdims=True)) / np.sqrt(r.var((0, 2, 3), keepdims=True) + 1e-5)
            total += float(np.mean(1 - (unit(r, 1) * unit(h, 1)).sum(1)))
    return total


def build(variant: str, **options: object) -> tuple[AMTMLKD, Step]:
    """A method whose gate has learned something, and a step with an unlabelled image."""
    torch.manual_seed(0)
    shapes = make_shapes()
    terms = {"angle_share": 0.1, "hint_share": 0.1} if variant == "repaired" else {}
    method = AMTMLKD(shapes, variant=variant, **{**terms, **options})  # type: ignore[arg-type]
    with torch.no_grad():
        if isinstance(method.weighting, LatentFactors):
            method.weighting.factors.normal_()
            method.weighting.projection.normal_()
        else:
            method.weighting.coefficients.normal_().mul_(0.2)
            method.weighting.centre.normal_()
            method.weighting.scale.uniform_(1, 3)
    return method, make_step(shapes, num_unlabelled=1)


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("repaired", {}),
        ("repaired", {"hint_pool": "pooled"}),
        ("paper", {}),
        ("paper", {"hint_pool": "pooled"}),
        ("paper", {"official_compat": True}),
    ],
)
def test_every_term_against_the_equations(variant: str, options: dict[str, object]) -> None:
    method, step = build(variant, **options)
    assert step.teachers is not None
    T, compat = (4.0 if variant == "repaired" else 5.0), "official_compat" in options
    w = softmax(gate_scores(method, step))
    z, y = array(step.student.logits), array(step.label_targets)
    q = np.einsum("bt,btc->bc", w, softmax(array(step.teachers.logits) / T))
    s = softmax(z / T)
    expected = {
        "soft_targets": T**2 * np.mean((q * np.log(q / s)).sum(1)) / (5 if compat else 1),
        "labels": -(y * np.log(softmax(z / T) if compat else softmax(z))).sum() / 5,
        "angles": angle_oracle(s, q),
        "hints": hint_oracle(method, step),
    }
    if isinstance(method.weighting, LatentFactors):
        gate = method.weighting
        expected["regulariser"] = (array(gate.projection) ** 2).sum() + (array(gate.factors) ** 2).sum()
    answer = method(step)
    assert {name: float(term.value.detach()) for name, term in answer.terms.items()} == pytest.approx(
        expected, rel=1e-4
    )
    np.testing.assert_allclose(answer.diagnostics["teacher_weight_mean"], w.mean(0), rtol=1e-5)


@pytest.mark.parametrize(
    ("variant", "options", "weights"),
    [
        ("repaired", {"angle_share": 0.0, "hint_share": 0.0}, {"soft_targets": 1.0, "labels": 1.0}),
        (
            "repaired",
            {"angle_share": 0.1, "hint_share": 0.2},
            {"soft_targets": 1.0, "labels": 1.0, "angles": Share(0.1), "hints": Share(0.2)},
        ),
        (
            "paper",
            {},
            {"soft_targets": 1.4, "labels": 0.3, "angles": 1.0, "hints": 1.0, "regulariser": 1e-4},
        ),
    ],
)
def test_the_weights_of_the_terms(variant: str, options: dict[str, object], weights: dict[str, float | Share]) -> None:
    method, step = build(variant, **options)
    found = {name: term.weight for name, term in method(step).terms.items()}
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert found[name] == (weight if isinstance(weight, Share) else pytest.approx(weight)), name


@pytest.mark.parametrize("variant", ["repaired", "paper"])
def test_pooled_hints_are_the_same_loss_whether_a_source_sends_the_maps_or_their_means(variant: str) -> None:
    method, step = build(variant, hint_pool="pooled")
    shares = {"hint_share": 0.1} if variant == "repaired" else {}
    needs = AMTMLKD.needs(variant=variant, hint_pool="pooled", **shares)  # type: ignore[arg-type]
    assert needs.teacher_features == {"last": "pooled"}
    assert step.teachers is not None
    means = tuple({"stage3": maps["stage3"].mean((2, 3), keepdim=True)} for maps in step.teachers.features)
    reduced = replace(step, teachers=replace(step.teachers, features=means))
    assert torch.equal(method(reduced).terms["hints"].value, method(step).terms["hints"].value)


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.1), (0.125, 0.075), (0.25, 0.05), (0.5, None), (1.0, None)])
def test_repaired_hints_fade_out_by_half_time(progress: float, share: float | None) -> None:
    method, step = build("repaired")
    terms = method(replace(step, progress=progress)).terms
    if share is None:
        assert "hints" not in terms
    else:
        weight = terms["hints"].weight
        assert isinstance(weight, Share)
        assert weight.value == pytest.approx(share)


def test_the_papers_hints_do_not_fade() -> None:
    method, step = build("paper")
    assert method(replace(step, progress=1.0)).terms["hints"].weight == 1.0


@given(seed=st.integers(0, 1000), batch=st.integers(1, 6), num_teachers=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_an_unfitted_gate_is_averaged_kd(seed: int, batch: int, num_teachers: int) -> None:
    shapes = make_shapes(num_teachers)
    step = make_step(shapes, batch, seed=seed)
    for variant in ("repaired", "paper"):
        terms = AMTMLKD(shapes, variant=variant, temperature=4.0)(step).terms
        expected = AverageKD(shapes, temperature=4.0)(step).terms
        torch.testing.assert_close(terms["soft_targets"].value, expected["soft_targets"].value)
        torch.testing.assert_close(terms["labels"].value, expected["labels"].value)


def test_the_papers_gate_learns_from_the_kl_and_the_repaired_one_does_not() -> None:
    method, step = build("paper")
    assert isinstance(method.weighting, LatentFactors)
    method(step).terms["soft_targets"].value.backward()
    assert float(method.weighting.factors.grad.abs().max()) > 0  # type: ignore[union-attr]
    assert float(step.student.features["stage3"].grad.abs().max()) > 0  # type: ignore[union-attr]
    method, step = build("repaired")
    method(step).terms["soft_targets"].value.backward()
    assert step.student.features["stage3"].grad is None


def test_the_angles_teach_the_student_and_not_the_gate() -> None:
    method, step = build("paper")
    method(step).terms["angles"].value.backward()
    assert method.weighting.factors.grad is None
    assert step.student.logits.grad is not None


@pytest.mark.parametrize(
    ("num_teachers", "stages"),
    [
        (1, ["stage3"]),
        (2, ["stage2", "stage3"]),
        (3, ["stage1", "stage2", "stage3"]),
        (4, ["stage1", "stage2", "stage3", "stage3"]),
        (5, ["stage1", "stage2", "stage2", "stage3", "stage3"]),
    ],
)
def test_hints_are_paired_shallow_to_deep(num_teachers: int, stages: list[str]) -> None:
    pairs = pair_hints(make_shapes(num_teachers))
    assert [group for group, _ in pairs] == stages
    assert {stage for _, stage in pairs} == {"stage3"}


@given(num_teachers=st.integers(1, 12), num_stages=st.integers(1, 8))
def test_no_teacher_is_dropped_and_stages_are_shared_evenly(num_teachers: int, num_stages: int) -> None:
    student = {f"stage{n}": (4, 2, 2) for n in range(num_stages)}
    pairs = pair_hints(NetworkShapes(2, student, ({"stage1": (3, 2, 2)},) * num_teachers))
    taught = [list(student).index(group) for group, _ in pairs]
    assert len(taught) == num_teachers
    assert taught == sorted(taught)
    assert taught[-1] == num_stages - 1
    counts = [taught.count(stage) for stage in range(num_stages)]
    assert max(counts) - min(counts) <= 1


def test_networks_without_feature_maps_are_refused_unless_there_are_no_hints() -> None:
    shapes = NetworkShapes(5, STAGES, ({"stage1": (3, 2, 2)}, {}))
    with pytest.raises(ShapeError, match="teacher 2 has no feature maps"):
        AMTMLKD(shapes, hint_share=0.1)
    assert len(AMTMLKD(shapes).regressors) == 0
    with pytest.raises(ShapeError, match="student"):
        AMTMLKD(NetworkShapes(5, {}, ({"stage1": (3, 2, 2)},)))


@pytest.mark.parametrize(
    ("variant", "options"),
    [("repaired", {"hint_weight": 1.0}), ("repaired", {"official_compat": True}), ("paper", {"hint_share": 0.1})],
)
def test_an_option_of_the_other_variant_is_refused(variant: str, options: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="belongs to variant"):
        AMTMLKD(make_shapes(), variant=variant, **options)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="belongs to variant"):
        AMTMLKD.needs(variant=variant, **options)  # type: ignore[arg-type]


def test_needs() -> None:
    assert AMTMLKD.needs().heldout
    assert AMTMLKD.needs().teacher_features == {}, "the default works with any teacher, and a cache of logits is enough"
    assert AMTMLKD.needs(hint_share=0.1).teacher_features == {"last": "map"}
    assert not AMTMLKD.needs(variant="paper").heldout


def test_a_reduced_heldout_step_fits_the_same_gate() -> None:
    torch.manual_seed(0)
    shapes = make_shapes()
    whole, parts = AMTMLKD(shapes), AMTMLKD(shapes)
    step = make_step(shapes, batch=100)
    reduced = parts.reduce_heldout(step)
    assert {name: value.shape for name, value in reduced.student.features.items()} == {"stage3": (100, 8, 1, 1)}
    assert whole.refit(step) == parts.refit(reduced)
    assert torch.equal(whole.weighting.coefficients, parts.weighting.coefficients)


def test_the_gates_fit_is_kept_in_the_state() -> None:
    shapes = make_shapes()
    method, other = AMTMLKD(shapes), AMTMLKD(shapes)
    method.refit(make_step(shapes, batch=100))
    other.load_state_dict(method.state_dict())
    step = make_step(shapes, seed=1)
    assert torch.equal(method.weighting(step), other.weighting(step))


@pytest.mark.parametrize(("batch", "size"), [(1, 1), (1, 2), (2, 1)])
def test_a_regressor_takes_a_single_value_per_channel(batch: int, size: int) -> None:
    features = torch.randn(batch, 3, size, size, requires_grad=True)
    Regressor(3, 5)(features).square().sum().backward()
    assert features.grad is not None
    assert bool(features.grad.isfinite().all())


def make_specialists(images: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Nine classes of 8 × 8 images, and three teachers: teacher k is right on classes 3k to 3k + 2, and sure and wrong
    on all others."""
    prototypes = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    labels = torch.randint(0, 9, (images,), generator=generator)
    pictures = prototypes[labels] + 0.7 * torch.randn(images, 3, 8, 8, generator=generator)
    wrong = (labels[:, None] + torch.randint(1, 9, (images, 3), generator=generator)) % 9
    answers = torch.where(labels[:, None] // 3 == torch.arange(3), labels[:, None], wrong)
    logits = 6 * F.one_hot(answers, 9).float() + torch.randn(images, 3, 9, generator=generator)
    return pictures, labels, logits


def test_three_specialists_each_get_their_own_images() -> None:
    """The acceptance test of the gate: over .6 of the weight goes to the teacher that is right (by chance .333)."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    pictures, labels, logits = make_specialists(512, generator)
    exam_pictures, exam_labels, exam_logits = make_specialists(256, generator)
    student = TinyStudent(3, 9)
    stages = {"stage1": (4, 4, 4), "stage2": (6, 2, 2), "stage3": (8, 1, 1)}
    method = AMTMLKD(NetworkShapes(9, stages, ({}, {}, {})), hint_share=0.0, angle_share=0.0)
    optimizer = torch.optim.SGD([*student.parameters(), *method.parameters()], lr=0.1, momentum=0.9)

    def make(pictures: torch.Tensor, labels: torch.Tensor, logits: torch.Tensor) -> Step:
        teachers = EnsembleOutputs(logits, ({}, {}, {}), (0, 1, 2))
        return Step(labels, F.one_hot(labels, 9).float(), student(pictures), teachers)

    def exam() -> Step:
        student.eval()
        with torch.no_grad():
            step = make(exam_pictures, exam_labels, exam_logits)
        student.train()
        return step

    unseen = torch.full_like(labels, UNLABELLED)  # the gate must not learn from the labels of training images
    for _ in range(10):
        found = method.refit(exam())
        for rows in torch.randperm(512, generator=generator).split(64):
            step = replace(make(pictures[rows], labels[rows], logits[rows]), labels=unseen[rows])
            terms = method(step).terms
            optimizer.zero_grad()
            torch.stack([term.value * term.weight for term in terms.values()]).sum().backward()
            optimizer.step()
    found = method.refit(exam())
    test_pictures, test_labels, test_logits = make_specialists(300, torch.Generator().manual_seed(1))
    student.eval()
    weights = method.weighting(make(test_pictures, test_labels, test_logits))
    right = weights.gather(1, (test_labels // 3)[:, None])
    assert found["choice"] >= ANSWERS
    assert float(right.mean()) > 0.6
    assert float((weights.argmax(1) == test_labels // 3).float().mean()) > 0.8
    (told,) = diagnose(method.weighting.diagnostics(weights))
    assert told.startswith("The teachers are weighed image by image")
