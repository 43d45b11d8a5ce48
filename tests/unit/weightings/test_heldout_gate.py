from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from kdcompress.types import UNLABELLED, EnsembleOutputs, NetworkShapes, Outputs, Step
from kdcompress.weightings.base import INSTANCE, STATIC, UNFITTED, UNIFORM
from kdcompress.weightings.heldout_gate import HeldoutGate, fit_coefficients, fit_gate, fold_masks, mixture_nll
from tests.made_steps import make_shapes, make_step, permute_teachers

NUM_CLASSES = 6
SHAPES = NetworkShapes(NUM_CLASSES, {"stage1": (8, 2, 2)}, ({}, {}, {}))


def make_exam(kind: str, images: int = 300, seed: int = 0) -> Step:
    """Held-out outputs of three teachers whose student feature shows the class.

    "alike": all know the same. "broken": the first knows nothing. "specialists": teacher k knows classes 2k and 2k + 1.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % NUM_CLASSES
    right = torch.nn.functional.one_hot(labels, NUM_CLASSES).float()
    knows = torch.ones(images, 3)
    if kind == "broken":
        knows[:, 0] = 0
    elif kind == "specialists":
        knows = torch.nn.functional.one_hot(labels // 2, 3).float()
    wrong = torch.nn.functional.one_hot(torch.randint(0, NUM_CLASSES, (images, 3), generator=generator), NUM_CLASSES)
    noise = torch.randn(images, 1, NUM_CLASSES, generator=generator)
    if kind != "alike":
        noise = torch.randn(images, 3, NUM_CLASSES, generator=generator)
    logits = 4 * torch.where(knows[:, :, None] > 0, right[:, None], wrong.float()) + noise
    centres = torch.randn(NUM_CLASSES, 8, generator=generator)
    maps = centres[labels][:, :, None, None] + 0.5 * torch.randn(images, 8, 2, 2, generator=generator)
    return Step(labels, right, Outputs(right, {"stage1": maps}), EnsembleOutputs(logits, ({}, {}, {}), (0, 1, 2)))


def subset(step: Step, rows: Tensor | slice) -> Step:
    assert step.teachers is not None
    features = {name: value[rows] for name, value in step.student.features.items()}
    return Step(
        step.labels[rows],
        step.label_targets[rows],
        Outputs(step.student.logits[rows], features),
        EnsembleOutputs(step.teachers.logits[rows], step.teachers.features, step.teachers.teacher_ids),
    )


def test_uniform_until_fitted_and_without_parameters() -> None:
    gate = HeldoutGate(SHAPES)
    weights = gate(make_exam("specialists"))
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 3))
    assert float(gate.diagnostics(weights)["gate_choice"]) == UNFITTED
    assert list(gate.parameters()) == []
    assert {"factors", "bias", "choice", "gain", "gain_error"} == set(gate.state_dict())


@pytest.mark.parametrize(("kind", "choice"), [("alike", UNIFORM), ("broken", STATIC), ("specialists", INSTANCE)])
def test_leaves_uniform_only_where_that_helps(kind: str, choice: int) -> None:
    gate, exam = HeldoutGate(SHAPES), make_exam(kind)
    found = gate.refit(exam)
    weights = gate(make_exam(kind, seed=0))
    assert found["choice"] == choice
    assert float(gate.diagnostics(weights)["gate_choice"]) == choice
    if choice == UNIFORM:
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / 3))
        assert found["shrinkage"] == 0
    elif choice == STATIC:
        assert found["gain"] > found["gain_error"] > 0
        assert float(weights[:, 0].max()) < 0.1
        assert float(weights.std(0).max()) < 1e-6
    else:
        assert found["nll_instance"] < found["nll_static"] < found["nll_uniform"] + 0.02
        right = weights.gather(1, (exam.labels // 2)[:, None])
        assert float(right.mean()) > 0.8


def test_the_weights_hold_on_images_that_the_gate_was_not_fitted_on() -> None:
    exam = make_exam("specialists", images=600)
    gate = HeldoutGate(SHAPES)
    gate.refit(subset(exam, slice(0, 300)))
    other = subset(exam, slice(300, 600))
    right = gate(other).gather(1, (other.labels // 2)[:, None])
    assert float(right.mean()) > 0.8


def test_noise_moves_the_weights_little() -> None:
    """Teachers that differ by noise alone: whatever the gate decides, it stays near uniform."""
    for seed in range(5):
        shapes = make_shapes()
        gate, exam = HeldoutGate(shapes), make_step(shapes, batch=400, seed=seed)
        gate.refit(exam)
        assert float((gate(exam) - 1 / 3).abs().mean()) < 0.08


def test_a_refit_on_like_teachers_goes_back_to_averaging() -> None:
    gate = HeldoutGate(SHAPES)
    gate.refit(make_exam("specialists"))
    assert bool(gate.factors.any())
    exam = make_exam("alike")
    assert gate.refit(exam)["choice"] == UNIFORM
    assert torch.equal(gate(exam), torch.full((300, 3), 1 / 3))


def test_refit_is_deterministic_and_forgets_the_fit_before() -> None:
    first, second = HeldoutGate(SHAPES), HeldoutGate(SHAPES)
    exam = make_exam("specialists")
    second.refit(make_exam("broken", seed=3))
    state = torch.get_rng_state()
    assert first.refit(exam) == second.refit(exam)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_refit_works_where_gradients_are_off(context: type[torch.no_grad]) -> None:
    gate, expected, exam = HeldoutGate(SHAPES), HeldoutGate(SHAPES), make_exam("specialists")
    expected.refit(exam)
    with context():
        gate.refit(subset(exam, slice(None)))
    assert torch.equal(gate.factors, expected.factors)


@pytest.mark.parametrize("kind", ["broken", "specialists"])
@pytest.mark.parametrize("keep_ids", [False, True])
def test_permuting_the_teachers_permutes_the_weights(kind: str, keep_ids: bool) -> None:
    order, exam = [2, 0, 1], make_exam(kind)
    gate, permuted = HeldoutGate(SHAPES), HeldoutGate(SHAPES)
    gate.refit(exam)
    permuted.refit(permute_teachers(exam, order, keep_ids=keep_ids))
    weights = permuted(permute_teachers(exam, order, keep_ids=keep_ids))
    torch.testing.assert_close(weights, gate(exam)[:, order], atol=2e-3, rtol=0)


def test_unlabelled_images_are_left_out() -> None:
    exam = make_exam("specialists", images=400)
    labels = exam.labels.clone()
    labels[::4] = UNLABELLED
    gate, expected = HeldoutGate(SHAPES), HeldoutGate(SHAPES)
    found = gate.refit(replace(exam, labels=labels))
    assert found == expected.refit(subset(exam, labels != UNLABELLED))
    assert found["heldout_images"] == 300


@pytest.mark.parametrize("images", [0, 1, 49])
def test_too_few_images_leave_it_uniform(images: int) -> None:
    gate = HeldoutGate(SHAPES)
    found = gate.refit(subset(make_exam("specialists"), slice(0, images)))
    assert found["choice"] == UNIFORM
    assert all(np.isfinite(value) for value in found.values())


def test_one_teacher() -> None:
    shapes = make_shapes(num_teachers=1)
    gate, step = HeldoutGate(shapes), make_step(shapes, batch=80)
    gate.refit(step)
    assert torch.equal(gate(step), torch.ones(80, 1))


def test_no_gradient_reaches_the_student_through_the_weights() -> None:
    gate, exam = HeldoutGate(make_shapes()), make_step(make_shapes())
    gate.choice.fill_(INSTANCE)
    torch.nn.init.normal_(gate.factors)
    assert not gate(exam).requires_grad


def test_weights_are_blind_to_the_size_of_the_features() -> None:
    """The input is layer-normed, so a student whose features grow does not sharpen the gate."""
    gate, exam = HeldoutGate(SHAPES), make_exam("specialists")
    gate.refit(exam)
    larger = replace(exam, student=Outputs(exam.student.logits, {"stage1": 10 * exam.student.features["stage1"]}))
    torch.testing.assert_close(gate(larger), gate(exam), atol=1e-3, rtol=0)


def test_mixture_nll() -> None:
    rng = np.random.default_rng(0)
    scores, p = rng.normal(size=(4, 3)), rng.uniform(size=(4, 3))
    w = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    expected = -np.log((w * p).sum(1))
    np.testing.assert_allclose(mixture_nll(torch.tensor(scores), torch.tensor(p).log()), expected, rtol=1e-12)


def test_the_fit_is_the_minimum_that_scipy_finds() -> None:
    rng = np.random.default_rng(1)
    X, log_p = rng.normal(size=(60, 4)), np.log(rng.uniform(size=(60, 3)))

    def objective(flat: np.ndarray) -> float:
        scores = X @ flat.reshape(3, 4).T
        w = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        return float(-np.log((w * np.exp(log_p)).sum(1)).mean() + 0.05 * (flat**2).sum())

    expected = minimize(objective, np.zeros(12), tol=1e-12)
    found = fit_coefficients(torch.tensor(X), torch.tensor(log_p), torch.ones(1, 60).double(), 0.1)[0]
    # A gradient of at most 1e-4 and a curvature of at least λ = 0.1 leave 1e-3 in each coefficient, 1e-7 in the value.
    assert objective(found.numpy().ravel()) == pytest.approx(expected.fun, abs=1e-7)
    np.testing.assert_allclose(found.numpy().ravel(), expected.x, atol=1e-3)


def test_folds_do_not_see_their_own_images() -> None:
    """What a fold is fitted on is everything else, whatever happens to the other folds in the same run."""
    rng = np.random.default_rng(2)
    X, log_p = torch.tensor(rng.normal(size=(50, 3))), torch.tensor(np.log(rng.uniform(size=(50, 2))))
    held = fold_masks(torch.arange(50) % 4)
    together = fit_coefficients(X, log_p, 1 - held, 0.1)
    for fold, mask in enumerate(held):
        rows = mask == 0
        alone = fit_coefficients(X[rows], log_p[rows], torch.ones(1, int(rows.sum())).double(), 0.1)[0]
        torch.testing.assert_close(together[fold], alone, atol=2e-3, rtol=0)


@pytest.mark.parametrize("labels", [torch.arange(100) % 10, torch.arange(100) // 10])
def test_every_fold_has_its_part_of_every_class(labels: Tensor) -> None:
    held = fold_masks(labels)
    assert torch.equal(held.sum(0), torch.ones(100).double())
    for number in range(10):
        assert torch.equal(held[:, labels == number].sum(1), torch.full((5,), 2.0).double())


def test_memorised_images_are_not_what_it_is_for() -> None:
    """Equal teachers, one of them surer: one weight per teacher may win, an instance gate must not."""
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(400, 6, generator=rng, dtype=torch.float64)
    log_right = -torch.rand(400, 1, generator=rng, dtype=torch.float64) * torch.tensor([1.0, 1.0, 3.0])
    fit = fit_gate(features, log_right, torch.arange(400) % 4)
    assert fit.choice == STATIC
    assert bool((fit.coefficients[:, :-1] == 0).all())
