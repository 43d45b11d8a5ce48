import torch

from kdcompress.methods.supervised import Supervised
from tests.made_steps import make_shapes, make_step


def test_cross_entropy_of_the_labelled_images() -> None:
    shapes = make_shapes(num_teachers=0)
    step = make_step(shapes, num_unlabelled=2)
    terms = Supervised(shapes)(step).terms
    expected = torch.nn.functional.cross_entropy(step.student.logits[2:], step.labels[2:])
    assert list(terms) == ["labels"]
    assert terms["labels"].weight == 1.0
    torch.testing.assert_close(terms["labels"].value, expected)


def test_it_asks_no_teacher() -> None:
    assert Supervised.needs().teachers == (0, 0)
