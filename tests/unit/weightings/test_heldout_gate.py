from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcompress.errors import ShapeError
from kdcompress.types import UNLABELLED, EnsembleOutputs, NetworkShapes, Outputs, Step
from kdcompress.weightings.base import ANSWERS, BOTH, CANDIDATES, STATIC, STUDENT, UNFITTED, UNIFORM
from kdcompress.weightings.heldout_gate import HeldoutGate, fit_gate
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
    if kind == "specialists":
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
    assert {"coefficients", "centre", "scale", "choice", "gain", "gain_error"} == set(gate.state_dict())


@pytest.mark.parametrize(
    ("kind", "choices"),
    [("alike", [UNIFORM]), ("broken", [STATIC, ANSWERS, STUDENT, BOTH]), ("specialists", [ANSWERS, STUDENT, BOTH])],
)
def test_leaves_uniform_only_where_that_helps(kind: str, choices: list[int]) -> None:
    gate, exam = HeldoutGate(SHAPES), make_exam(kind)
    found = gate.refit(exam)
    weights = gate(exam)
    assert found["choice"] in choices
    assert float(gate.diagnostics(weights)["gate_choice"]) == found["choice"]
    if kind == "alike":
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / 3))
        assert found["shrinkage"] == 0
        return
    assert found["gain"] > found["gain_error"] > 0
    if kind == "broken":
        assert found["nll_static"] < found["nll_uniform"] - 0.1
        assert float(weights[:, 0].mean()) < 0.1
    else:
        assert max(found["nll_answers"], found["nll_student"]) < found["nll_static"] < found["nll_uniform"] + 0.02
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
    """Teachers that differ by noise alone, of which neither the answers nor the student tell anything."""
    for seed in range(5):
        rng = torch.Generator().manual_seed(seed)
        answers, features = (torch.randn(400, count, generator=rng, dtype=torch.float64) for count in (24, 8))
        log_right = -torch.rand(400, 3, generator=rng, dtype=torch.float64)
        fit = fit_gate(answers, features, log_right, torch.arange(400) % 4)
        scores = torch.cat([answers, features, torch.ones(400, 1).double()], 1) @ fit.coefficients.T
        assert float((scores.softmax(1) - 1 / 3).abs().mean()) < 0.03


@pytest.mark.parametrize(("told_by", "choice"), [("answers", ANSWERS), ("features", STUDENT), ("either", BOTH)])
def test_it_reads_what_tells_the_teachers_apart(told_by: str, choice: int) -> None:
    """Which of two teachers is right stands in one of the answers, in one of the features, or in their sum."""
    rng = torch.Generator().manual_seed(0)
    answers, features = (torch.randn(600, 4, generator=rng, dtype=torch.float64) for _ in range(2))
    told = {"answers": answers[:, 0], "features": features[:, 3], "either": answers[:, 0] + features[:, 3]}[told_by]
    log_right = torch.stack([told > 0, told <= 0], 1).double().clamp(0.01, 0.99).log()
    fit = fit_gate(answers, features, log_right, torch.arange(600) % 4)
    assert fit.choice == choice
    assert fit.nll[CANDIDATES[choice]] < min(fit.nll["uniform"], fit.nll["static"]) - 0.3
    read = fit.coefficients.abs().sum(0) > 0
    assert bool(read[:4].all()) == (told_by != "features")
    assert bool(read[4:8].all()) == (told_by != "answers")


def test_the_answers_are_read_as_they_were_when_it_was_fitted() -> None:
    """Their centre and scale are those of the held-out images, whatever batch is weighed."""
    exam = make_exam("specialists", images=600)
    gate = HeldoutGate(SHAPES)
    gate.refit(exam)
    assert gate.coefficients[:, : len(gate.centre)].any()
    alone = torch.cat([gate(subset(exam, slice(row, row + 1))) for row in range(20)])
    torch.testing.assert_close(alone, gate(exam)[:20])


def test_it_does_not_weigh_some_of_the_teachers() -> None:
    gate, exam = HeldoutGate(SHAPES), make_exam("alike")
    assert exam.teachers is not None
    two = EnsembleOutputs(exam.teachers.logits[:, :2], ({}, {}), (0, 1))
    with pytest.raises(ShapeError, match="all 3 teachers, and 2 answered"):
        gate(replace(exam, teachers=two))


def test_a_refit_on_like_teachers_goes_back_to_averaging() -> None:
    gate = HeldoutGate(SHAPES)
    gate.refit(make_exam("specialists"))
    assert bool(gate.coefficients.any())
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
    assert torch.equal(gate.coefficients, expected.coefficients)


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
    gate.choice.fill_(BOTH)
    torch.nn.init.normal_(gate.coefficients)
    assert not gate(exam).requires_grad


def test_weights_are_blind_to_the_size_of_the_features() -> None:
    """The input is layer-normed, so a student whose features grow does not sharpen the gate."""
    gate, exam = HeldoutGate(SHAPES), make_exam("specialists")
    gate.refit(exam)
    larger = replace(exam, student=Outputs(exam.student.logits, {"stage1": 10 * exam.student.features["stage1"]}))
    torch.testing.assert_close(gate(larger), gate(exam), atol=1e-3, rtol=0)


def test_memorised_images_are_not_what_it_is_for() -> None:
    """Equal teachers, one of them surer: one weight per teacher may win, an instance gate must not."""
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(400, 6, generator=rng, dtype=torch.float64)
    log_right = -torch.rand(400, 1, generator=rng, dtype=torch.float64) * torch.tensor([1.0, 1.0, 3.0])
    fit = fit_gate(features[:, :3], features[:, 3:], log_right, torch.arange(400) % 4)
    assert fit.choice == STATIC
    assert bool((fit.coefficients[:, :-1] == 0).all())
