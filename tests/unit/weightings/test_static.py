from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from kdcompress.weightings.static import PRIOR_IMAGES, Static, fit_mixture
from tests.made_steps import make_shapes, make_step


def test_the_weights_maximise_the_likelihood_with_the_imagined_images() -> None:
    rng = np.random.default_rng(0)
    log_right = np.log(rng.uniform(0.05, 1, size=(400, 3)) * [0.4, 1.0, 0.7])

    def objective(scores: np.ndarray) -> float:
        w = np.exp(scores) / np.exp(scores).sum()
        return float(-np.log(np.exp(log_right) @ w).sum() - PRIOR_IMAGES / 3 * np.log(w).sum())

    best = minimize(objective, np.zeros(3), tol=1e-10).x
    expected = np.exp(best) / np.exp(best).sum()
    np.testing.assert_allclose(fit_mixture(torch.from_numpy(log_right)), expected, atol=1e-4)


def test_a_broken_teacher_loses_its_weight_and_without_labels_nothing_is_learned() -> None:
    shapes = make_shapes(3)
    weighting, step = Static(shapes), make_step(shapes, batch=300)
    assert step.teachers is not None
    step.teachers.logits[:, 1:] += 6 * step.label_targets[:, None]
    found = weighting.refit(step)
    weights = weighting(make_step(shapes))
    assert found["heldout_images"] == 300
    assert found["nll_static"] < found["nll_uniform"]
    assert float(weights[0, 0]) < 0.05
    assert weights.shape == (6, 3)
    weighting.refit(replace(step, labels=torch.full_like(step.labels, -1)))
    np.testing.assert_allclose(weighting.weights, [1 / 3] * 3, rtol=1e-6)
    assert weighting.refit(step)["nll_static"] == pytest.approx(found["nll_static"])
