import numpy as np
import pytest
import torch

from kdcompress.weightings.latent_factors import LatentFactors
from tests.made_steps import make_shapes, make_step, permute_teachers


def trained(seed: int = 0, *, average_pooled: bool = False) -> LatentFactors:
    torch.manual_seed(seed)
    gate = LatentFactors(make_shapes(), average_pooled=average_pooled)
    torch.nn.init.normal_(gate.projection)
    return gate


def test_starts_uniform_and_can_leave() -> None:
    """W = 0 gives uniform weights; θ ≠ 0 gives W a gradient there, so this is no stationary point."""
    gate = LatentFactors(make_shapes())
    weights = gate(make_step(make_shapes()))
    torch.testing.assert_close(weights, torch.full((6, 3), 1 / 3))
    weights[:, 0].sum().backward()
    assert gate.projection.grad is not None
    assert float(gate.projection.grad.abs().max()) > 0


@pytest.mark.parametrize("average_pooled", [False, True])
def test_weights_follow_the_paper(average_pooled: bool) -> None:
    gate, step = trained(average_pooled=average_pooled), make_step(make_shapes(), batch=4)
    maps = step.student.features["stage3"].detach().double().numpy()
    theta, W = gate.factors.detach().double().numpy(), gate.projection.detach().double().numpy()
    for i in range(4):
        beta = np.array([channel.mean() if average_pooled else channel.max() for channel in maps[i]])
        scores = np.array([sum(W[d] * beta[d] * theta[t, d] for d in range(len(W))) for t in range(3)])
        expected = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(gate(step)[i].detach(), expected, rtol=1e-5)


def test_permuting_the_teachers_permutes_the_weights() -> None:
    gate, step, order = trained(), make_step(make_shapes()), [2, 0, 1]
    expected = gate(step)[:, order]
    torch.testing.assert_close(gate(permute_teachers(step, order, keep_ids=True)), expected)
    with torch.no_grad():
        gate.factors.copy_(gate.factors[order])
    torch.testing.assert_close(gate(permute_teachers(step, order)), expected)


def test_only_some_teachers_answer() -> None:
    gate, step = trained(), make_step(make_shapes())
    two = gate(permute_teachers(step, [2, 1], keep_ids=True))
    all_three = gate(step)
    torch.testing.assert_close(two, all_three[:, [2, 1]] / all_three[:, [2, 1]].sum(1, keepdim=True))


def test_squared_norm() -> None:
    gate = trained()
    expected = (gate.projection.detach().numpy() ** 2).sum() + (gate.factors.detach().numpy() ** 2).sum()
    assert float(gate.squared_norm().detach()) == pytest.approx(expected, rel=1e-5)
