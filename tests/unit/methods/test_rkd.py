import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kdcompress.errors import ShapeError
from kdcompress.methods.avg_kd import AverageKD
from kdcompress.methods.rkd import RKD
from kdcompress.types import NetworkShapes, Share
from tests.made_steps import STAGES, make_shapes, make_step

Array = NDArray[np.float64]


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


@pytest.mark.parametrize("relations", ["features", "logits"])
def test_against_the_equations(relations: Any) -> None:
    shapes = make_shapes(2)
    step = make_step(shapes)
    assert step.teachers is not None
    if relations == "features":
        mine = step.student.features["stage3"].detach().double().numpy().mean((2, 3))
        theirs = [features["stage3"].double().numpy().mean((2, 3)) for features in step.teachers.features]
    else:
        mine = step.student.logits.detach().double().numpy()
        theirs = [step.teachers.logits[:, t].double().numpy() for t in range(2)]
    terms = RKD(shapes, relations=relations)(step).terms
    average = AverageKD(shapes)(step).terms
    found = {name: float(term.value.detach()) for name, term in terms.items()}
    assert found == pytest.approx(
        {
            "soft_targets": float(average["soft_targets"].value.detach()),
            "labels": float(average["labels"].value.detach()),
            "distances": np.mean([huber(distances(mine) - distances(other)) for other in theirs]),
            "angles": np.mean([huber(cosines(mine) - cosines(other)) for other in theirs]),
        },
        rel=1e-4,
    )
    assert (terms["distances"].weight, terms["angles"].weight) == (Share(0.1), Share(0.2))


def test_needs_and_networks_without_maps() -> None:
    assert RKD.needs(relations="logits").teacher_features == {}
    shapes = NetworkShapes(5, STAGES, (STAGES, {}))
    with pytest.raises(ShapeError, match="relations=logits"):
        RKD(shapes)
    assert RKD(shapes, relations="logits").paper
