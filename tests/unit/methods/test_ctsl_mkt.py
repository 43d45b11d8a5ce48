"""CTSL-MKT against an independent float64 computation of each equation."""

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from kdcompress.errors import ShapeError
from kdcompress.methods.ctsl_mkt import CTSLMKT
from kdcompress.types import NetworkShapes, Outputs, Share
from tests.made_steps import make_shapes, make_step

Array = NDArray[np.float64]


def array(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def kl(q: Array, p: Array) -> float:
    return float((q * np.log(q / p)).sum(1).mean())


def huber(x: Array) -> float:
    return float(np.where(np.abs(x) < 1, 0.5 * x * x, np.abs(x) - 0.5).mean())


def distances(points: Array) -> Array:
    d = np.array([[np.linalg.norm(a - b) for b in points] for a in points])
    return np.asarray(d / d[d > 0].mean())


def cosines(points: Array) -> Array:
    def cosine(i: int, j: int, k: int) -> float:
        a, b = points[i] - points[j], points[k] - points[j]
        lengths = np.linalg.norm(a) * np.linalg.norm(b)
        return float(a @ b / lengths) if lengths > 0 else 0.0

    return np.array([cosine(*triple) for triple in itertools.product(range(len(points)), repeat=3)])


@pytest.mark.parametrize("num_teachers", [0, 3])
@pytest.mark.parametrize("relations", ["logits", "features"])
def test_every_term_against_the_equations(relations: Any, num_teachers: int) -> None:
    shapes = make_shapes(num_teachers)
    step = make_step(shapes, num_peers=2, self_teacher=True, num_unlabelled=1)
    assert step.self_teacher is not None
    T, z, y = 3.0, array(step.student.logits), array(step.label_targets)

    def points(outputs: Outputs) -> Array:
        return array(outputs.logits) if relations == "logits" else array(outputs.features["stage3"]).mean((2, 3))

    mine, theirs = points(step.student), [points(peer) for peer in step.peers]
    expected = {
        "labels": -(y * np.log(softmax(z))).sum() / 5,
        "peers": np.mean([kl(softmax(array(peer.logits)), softmax(z)) for peer in step.peers]),
        "distances": np.mean([huber(distances(mine) - distances(other)) for other in theirs]),
        "angles": np.mean([huber(cosines(mine) - cosines(other)) for other in theirs]),
        "self": T**2 * kl(softmax(array(step.self_teacher.logits) / T), softmax(z / T)),
    }
    if step.teachers is not None:
        expected["soft_targets"] = T**2 * kl(softmax(array(step.teachers.logits) / T).mean(1), softmax(z / T))
    answer = CTSLMKT(shapes, temperature=T, relations=relations)(step)
    assert {name: float(term.value.detach()) for name, term in answer.terms.items()} == pytest.approx(
        expected, rel=1e-4
    )


def test_the_weights_of_the_terms_and_terms_of_weight_zero() -> None:
    shapes = make_shapes()
    step = make_step(shapes, num_peers=1, self_teacher=True)
    weights = {name: term.weight for name, term in CTSLMKT(shapes)(step).terms.items()}
    assert weights == {
        "labels": 1.0,
        "peers": 1.0,
        "distances": Share(0.05),
        "angles": Share(0.1),
        "self": 1.0,
        "soft_targets": 1.0,
    }
    plain = CTSLMKT(shapes, distance_weight=0.3, angle_weight=0.0)
    weights = {name: term.weight for name, term in plain(step).terms.items()}
    assert (weights["distances"], "angles" in weights) == (0.3, False)
    only_self = CTSLMKT(
        shapes, label_weight=0.0, peer_weight=0.0, distance_share=0.0, angle_share=0.0, soft_target_weight=0.0
    )
    assert list(only_self(step).terms) == ["self"]


def test_needs() -> None:
    assert CTSLMKT.needs().self_teacher
    assert not CTSLMKT.needs(self_weight=0.0).self_teacher
    assert CTSLMKT.needs().teachers[0] == 0
    with pytest.raises(ShapeError, match="relations=logits"):
        CTSLMKT(NetworkShapes(5, {}), relations="features")
    with pytest.raises(ShapeError, match="own copy"):
        CTSLMKT(make_shapes())(make_step(make_shapes(), num_peers=1))
