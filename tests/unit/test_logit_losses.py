"""The logit loss of several weighted teachers against loops over images and teachers in float64."""

from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kdcompress import losses
from kdcompress.errors import RecipeError
from kdcompress.logit_losses import LogitLoss, LossName, Mix

Array = NDArray[np.float64]
T = 3.0
LABELS = [0, 3, -1, 2, 1]


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def standardised(z: Array) -> Array:
    return np.asarray((z - z.mean(-1, keepdims=True)) / (1e-7 + z.std(-1, ddof=1, keepdims=True)))


def one_image(loss: str, q: Array, p: Array, label: int) -> float:
    if loss == "kl" or label < 0:
        return float(T**2 * (q * np.log(q / p)).sum())
    others = np.arange(len(q)) != label
    parts = [(np.array([q[label], 1 - q[label]]), np.array([p[label], 1 - p[label]]), 1.0)]
    parts += [(q[others] / q[others].sum(), p[others] / p[others].sum(), 8.0)]
    return float(T**2 * sum(weight * (a * np.log(a / b)).sum() for a, b, weight in parts))


def make() -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(5, 3, 4)) * 3, rng.dirichlet(np.ones(3), size=5), rng.normal(size=(5, 4))


def ask(loss: LogitLoss, teachers: Array, weights: Array, student: Array) -> torch.Tensor:
    tensors = [torch.from_numpy(a) for a in (teachers, weights, student)]
    return loss(tensors[0], tensors[1], tensors[2], torch.tensor(LABELS))


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("mix", get_args(Mix))
@pytest.mark.parametrize("loss", ["kl", "dkd"])
def test_against_loops(loss: LossName, mix: Mix, standardise: bool) -> None:
    teachers, weights, student = make()
    found = ask(LogitLoss(loss, T, standardise, mix, 4), teachers, weights, student)
    if standardise:
        teachers, student = standardised(teachers), standardised(student)
    total = 0.0
    for i, label in enumerate(LABELS):
        p = softmax(student[i] / T)
        if mix == "losses":
            total += sum(weights[i, t] * one_image(loss, softmax(teachers[i, t] / T), p, label) for t in range(3))
        elif mix == "logits":
            total += one_image(loss, softmax(weights[i] @ teachers[i] / T), p, label)
        else:
            total += one_image(loss, weights[i] @ softmax(teachers[i] / T), p, label)
    assert float(found) == pytest.approx(total / 5)


@pytest.mark.parametrize("mix", get_args(Mix))
def test_dist_mixes_as_the_others_do(mix: Mix) -> None:
    teachers, weights, student = make()
    found = ask(LogitLoss("dist", T, False, mix, 4), teachers, weights, student)
    q = softmax(teachers / T)
    if mix == "targets":
        q, weights = np.einsum("bt,btc->bc", weights, q)[:, None], np.ones((5, 1))
    elif mix == "logits":
        q, weights = softmax(np.einsum("bt,btc->bc", weights, teachers) / T)[:, None], np.ones((5, 1))
    expected = losses.dist(torch.from_numpy(q), torch.from_numpy(student), torch.from_numpy(weights), T)
    assert float(found) == pytest.approx(float(expected))


def test_mixing_targets_and_mixing_kls_have_the_same_gradient() -> None:
    teachers, weights, student = (torch.from_numpy(a) for a in make())
    gradients = []
    for mix in ("targets", "losses"):
        logits = student.clone().requires_grad_()
        LogitLoss("kl", T, False, mix, 4)(teachers, weights, logits, torch.tensor(LABELS)).backward()  # type: ignore[arg-type,no-untyped-call]
        gradients.append(logits.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("loss", get_args(LossName))
def test_one_teacher_is_the_same_however_it_is_mixed(loss: LossName) -> None:
    teachers, _, student = make()
    values = [
        float(ask(LogitLoss(loss, T, False, mix, 4), teachers[:, :1], np.ones((5, 1)), student))
        for mix in get_args(Mix)
    ]
    assert values == pytest.approx([values[0]] * 3)


@pytest.mark.parametrize("loss", get_args(LossName))
@pytest.mark.parametrize("mix", get_args(Mix))
def test_weights_may_be_zero_and_learn(loss: LossName, mix: Mix) -> None:
    teachers, weights, student = (torch.from_numpy(a) for a in make())
    weights[:, 0] = 0.0
    weights.requires_grad_()
    LogitLoss(loss, T, False, mix, 4)(teachers, weights, student, torch.tensor(LABELS)).backward()  # type: ignore[no-untyped-call]
    assert weights.grad is not None
    assert bool(weights.grad.isfinite().all())
    assert float(weights.grad[:, 1:].abs().max()) > 0


def test_two_classes_cannot_be_standardised() -> None:
    with pytest.raises(RecipeError, match="2 standardised logits"):
        LogitLoss("kl", T, True, "targets", 2)
