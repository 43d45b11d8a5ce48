import zlib
from pathlib import Path

import pytest

from kdcompress.discovery import list_options
from kdcompress.errors import InputError, RecipeError
from kdcompress.methods import base
from kdcompress.types import Share
from tests.made_steps import make_shapes, make_step

OWN = '''
"""Mine: a method of one's own.

Idea
    None.
"""
from kdcompress.methods.base import Method
from kdcompress.types import LossTerms, Needs, Term

class Mine(Method):
    paper = ""
    def __init__(self, shapes, heads=(), *, factor: float = 2.0):
        super().__init__(shapes, heads)
        self.factor = factor
    @classmethod
    def needs(cls, **options):
        return Needs()
    def forward(self, step):
        return LossTerms({"mine": Term(self.factor * step.student.logits.sum())})

class Unfinished(Method):
    pass
'''


def test_methods_are_found_by_their_file() -> None:
    assert {"amtml-kd", "avg-kd", "supervised"} <= set(base.list_methods())
    assert base.find_method("avg_kd") is base.find_method("avg-kd")


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown method 'amtlm-kd'; did you mean 'amtml-kd'\?"):
        base.find_method("amtlm-kd")


def test_a_method_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_kd.py").write_text(OWN)
    (tmp_path / "my_broken_kd.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    cls = base.find_method("my_own_kd:Mine")
    shapes = make_shapes()
    step = make_step(shapes)
    options = base.check_options(cls, {"factor": 3})
    assert float(cls(shapes, **options)(step).terms["mine"].value.detach()) == float(
        3 * step.student.logits.detach().sum()
    )
    assert base.card("my_own_kd:Mine").sections == {"Idea": "None."}
    with pytest.raises(InputError, match="my_broken_kd cannot be imported: ZeroDivisionError"):
        base.find_method("my_broken_kd:Mine")
    with pytest.raises(InputError, match="cannot be imported: ModuleNotFoundError"):
        base.find_method("my_absent_kd:Mine")


@pytest.mark.parametrize(
    ("before", "after", "cls", "message"),
    [
        ("", "", "Min", r"unknown class of my_\d+; did you mean 'Mine'\?|unknown class of my_\d+ 'Min'"),
        ("", "", "Unfinished", r"Unfinished does not define forward, needs, which every Method must"),
        ("", "", "Needs", r"Needs does not derive from kdcompress\.methods\.base\.Method"),
        ("(Method)", "", "Mine", r"Mine does not derive from kdcompress\.methods\.base\.Method"),
        ("heads=(), *, ", "heads=(), ", "Mine", r"factor of \S+ must be keyword-only, as options are"),
        ("shapes, heads=(), *", "shapes, *", "Mine", r"the constructor of \S+ does not take shapes, heads"),
        ("float = 2.0", "float", "Mine", r"factor of \S+ must have a default"),
        ("factor: float", "factor: 'Flaot'", "Mine", r"annotation of an option cannot be read: name 'Flaot'"),
        ("@classmethod", "", "Mine", r"needs of \S+ is no classmethod"),
        ("needs(cls, **options)", "needs(cls)", "Mine", r"needs of \S+ does not take its options: .*'factor'"),
    ],
)
def test_what_a_newcomer_gets_wrong_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str, cls: str, message: str
) -> None:
    module = f"my_{zlib.crc32((before + after + cls).encode())}"
    (tmp_path / f"{module}.py").write_text(OWN.replace(before, after) if before else OWN)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        base.find_method(f"{module}:{cls}")


def test_imports_for_type_checkers_alone_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = OWN.replace("(self, shapes, heads", "(self, shapes: 'NetworkShapes', heads")
    (tmp_path / "my_typed_kd.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert [option.annotation for option in list_options(base.find_method("my_typed_kd:Mine"))] == [float]


def test_heldout_steps_lose_their_feature_maps() -> None:
    step = make_step(make_shapes())
    bare = base.without_features(step)
    assert bare.student.features == {}
    assert bare.teachers is not None
    assert bare.teachers.features == ({}, {}, {})
    assert bare.student.logits is step.student.logits


def test_nothing_to_learn_is_refused_before_anything_runs() -> None:
    base.require_terms({"labels": 0.0, "peers": 0.5, "angles": Share(0.1)})
    with pytest.raises(RecipeError, match=r"the weights of labels, peers are all 0, and there is no other term"):
        base.require_terms({"labels": 0.0, "peers": 0.0, "angles": Share(0.0)})
    with pytest.raises(RecipeError, match=r"labels are all 0, and angles are shares of what they make"):
        base.require_terms({"labels": 0.0, "angles": Share(0.1)})


@pytest.mark.parametrize("name", ["dml", "rkd", "ctsl-mkt"])
def test_methods_whose_fixed_weights_are_all_zero_are_refused(name: str) -> None:
    weights = ("label_weight", "soft_target_weight", "peer_weight", "self_weight")
    cls = base.find_method(name)
    options = {option.name: 0.0 for option in list_options(cls) if option.name in weights}
    with pytest.raises(RecipeError, match="are all 0"):
        cls(make_shapes(), **options)
