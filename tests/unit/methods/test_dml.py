import numpy as np
import pytest
import torch

from kdcompress.methods.dml import DML
from tests.made_steps import make_shapes, make_step


@pytest.mark.parametrize(("num_peers", "temperature"), [(1, 1.0), (3, 1.0), (2, 2.5)])
def test_against_the_equations(num_peers: int, temperature: float) -> None:
    shapes = make_shapes(0)
    step = make_step(shapes, num_peers=num_peers, num_unlabelled=2)
    terms = DML(shapes, peer_weight=0.5, temperature=temperature)(step).terms

    def softmax(logits: torch.Tensor, temperature: float = 1.0) -> np.ndarray:
        e = np.exp(logits.detach().double().numpy() / temperature)
        return np.asarray(e / e.sum(1, keepdims=True))

    p, soft = softmax(step.student.logits), softmax(step.student.logits, temperature)
    said = [softmax(peer.logits, temperature) for peer in step.peers]
    kls = [temperature**2 * (q * np.log(q / soft)).sum(1).mean() for q in said]
    labels = -np.mean([np.log(p[i, int(step.labels[i])]) for i in range(2, 6)])
    assert float(terms["peers"].value.detach()) == pytest.approx(np.mean(kls), rel=1e-5)
    assert float(terms["labels"].value.detach()) == pytest.approx(labels, rel=1e-5)
    assert (terms["peers"].weight, terms["labels"].weight) == (0.5, 1.0)


def test_it_is_never_negative_and_zero_where_all_agree() -> None:
    """The released baseline took probabilities for log probabilities, and its term came out below zero."""
    shapes = make_shapes(0)
    step = make_step(shapes, num_peers=1)
    assert float(DML(shapes)(step).terms["peers"].value.detach()) > 0
    step.peers[0].logits.copy_(step.student.logits.detach())
    assert float(DML(shapes)(step).terms["peers"].value.detach()) == pytest.approx(0, abs=1e-6)


def test_needs() -> None:
    assert DML.needs().students[0] == 2
    assert DML.needs().teachers == (0, 0)
