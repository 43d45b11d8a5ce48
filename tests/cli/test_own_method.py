"""A method of the user's own that fails: what the command says of it."""

from pathlib import Path

import pytest

from tests.cli.conftest import SHORT, Shop

OWN = '''"""Mine: a method of one's own."""
from kdcompress.methods.base import Method
from kdcompress.types import LossTerms, Needs, Term


class Mine(Method):
    """Labels' logits, larger.

    Args:
        factor: how much
            larger.
    """

    def __init__(self, shapes, heads=(), *, factor: float = 1.0):
        super().__init__(shapes, heads)

    @classmethod
    def needs(cls, **options):
        return Needs()

    def forward(self, step):
        logits = step.student.logits
        ANSWER
'''


@pytest.mark.parametrize(
    ("answer", "code", "named"),
    [
        ("return {'mine': Term(logits.mean())}", 2, "Mine answers a dict, a method answers LossTerms"),
        ("return LossTerms({'mine': logits.mean()})", 2, "mine must be of type Term"),
        ("return LossTerms({'mine': Term(logits)})", 2, "one number, not a tensor of shape (50, 10)"),
        ("return LossTerms({'mine': Term(logits.detach().mean())})", 2, "no term of Mine depends on the student"),
        ("return LossTerms({})", 2, "a loss of no terms"),
        ("return logits.nothing", 1, "unexpected AttributeError in mine.py, line 23: 'Tensor' object"),
    ],
)
def test_what_is_wrong_with_its_answer_is_one_line(
    shop: Shop, tmp_path: Path, answer: str, code: int, named: str
) -> None:
    (tmp_path / "mine.py").write_text(OWN.replace("ANSWER", answer))
    words = ("--teachers", shop.folder / "a" / "model.pt", "--student", "resnet8", "--data", "digits")
    done = shop.warm.run("distill", *words, "--method", "mine:Mine", "train.epochs=1", *SHORT, folder=tmp_path)
    assert done.code == code
    assert named in done.error
    assert len(done.error.splitlines()) <= 2


def test_show_tells_what_its_options_mean_and_what_its_card_lacks(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN.replace("ANSWER", "raise RuntimeError"))
    done = shop.warm.run("show", "mine:Mine", folder=tmp_path)
    assert done.code == 0
    assert "method.factor = 1.0\n        how much larger." in done.out
    assert "does not say: Idea, Loss, Paper, Use, Cost." in done.out
