"""Words of `--methods` become recipes that are equal where they must be."""

from pathlib import Path
from typing import Any

import pytest

from kdcompress.errors import InputError, RecipeError
from kdcompress.pipeline._contenders import EQUAL_COMPUTE, Contender, parse_method, read_contenders, with_epochs

CHANGES: dict[str, Any] = {"teachers": [{"path": "a.pt"}], "student": {"arch": "resnet8"}, "data": {"source": "digits"}}
OVERRIDES = ("train.epochs=7", "train.device=cpu", "seed=5")


def read(*words: str, overrides: tuple[str, ...] = OVERRIDES, recipe: str | None = None) -> dict[str, Contender]:
    return {one.name: one for one in read_contenders(words, CHANGES, overrides, recipe)}


@pytest.mark.parametrize(
    ("word", "name", "options"),
    [
        ("avg-kd", "avg-kd", {}),
        ("amtml-kd:variant=paper", "amtml-kd", {"variant": "paper"}),
        ("avg-kd:temperature=2,standardise=true", "avg-kd", {"temperature": 2, "standardise": True}),
        ("my_pkg.my_kd:MyKD", "my_pkg.my_kd:MyKD", {}),
        ("my_pkg.my_kd:MyKD:alpha=1e-3", "my_pkg.my_kd:MyKD", {"alpha": "1e-3"}),
        ("x:weights=[0.5,0.5],power=2", "x", {"weights": [0.5, 0.5], "power": 2}),
    ],
)
def test_a_word_is_a_name_and_options(word: str, name: str, options: dict[str, Any]) -> None:
    assert parse_method(word) == (name, options)


def test_a_recipes_own_teachers_are_not_asked(tmp_path: Path) -> None:
    """All learn from the same ones, wherever they are named."""
    shared, own = tmp_path / "shared.yaml", tmp_path / "own.yaml"
    shared.write_text("teachers: [{path: a.pt}, {path: b.pt}]\nstudent: {arch: resnet8}\ndata: {source: digits}\n")
    own.write_text("method: {name: ca-mkd}\nteachers: [{path: best.pt}]\n")
    found = read_contenders((str(own),), {}, (), str(shared))
    assert [[one.path for one in contender.recipe.teachers] for contender in found] == [["a.pt", "b.pt"]] * 3


def test_an_option_without_a_value_is_named() -> None:
    with pytest.raises(RecipeError, match="'temperature' is no option"):
        parse_method("avg-kd:temperature")


def test_the_reference_and_the_baseline_are_always_there_once() -> None:
    assert list(read()) == ["avg-kd", "supervised"]
    assert list(read("ca-mkd", "avg-kd", "ca-mkd")) == ["avg-kd", "supervised", "ca-mkd"]


def test_what_must_be_equal_is_equal_and_the_rest_is_a_recipes_own(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(
        "method: {name: avg-kd, label_weight: 0}\n"
        "data: {mixup_alpha: 0.5, source: elsewhere, limit: 3}\n"
        "student: {arch: resnet110, init: random}\n"
        "train: {epochs: 300, weight_decay: 0.002, precision: bf16}\n"
        "seed: 9\n"
    )
    shared = tmp_path / "shared.yaml"
    shared.write_text("method: {name: ca-mkd, hint_weight: 3}\ndata: {limit: 100}\ntrain: {precision: fp32}\n")
    found = read("amtml-kd:variant=paper", str(own), recipe=str(shared))
    assert [one.recipe.train.epochs for one in found.values()] == [7] * 4
    assert {(one.recipe.data.source, one.recipe.data.limit) for one in found.values()} == {("digits", 100)}
    assert {(one.recipe.seed, one.recipe.train.precision, one.recipe.student.arch) for one in found.values()} == {
        (5, "fp32", "resnet8")
    }
    assert all(one.recipe.cache.enabled and one.recipe.cache.views == 7 for one in found.values())
    theirs = found[str(own)].recipe
    assert (theirs.data.mixup_alpha, theirs.train.weight_decay, theirs.student.init) == (0.5, 0.002, "random")
    assert theirs.method.options == {"label_weight": 0}
    assert found["avg-kd"].recipe.method.options == {}, "a shared recipe's method is no one's"
    assert found["amtml-kd:variant=paper"].recipe.method.options == {"variant": "paper"}


def test_a_cache_that_is_asked_for_otherwise_stays_so() -> None:
    for override, expected in (("cache.views=3", (True, 3)), ("cache.enabled=false", (False, 7))):
        cache = read(overrides=(*OVERRIDES, override))["avg-kd"].recipe.cache
        assert (cache.enabled, cache.views) == expected


def test_methods_that_train_several_students_get_several_of_the_same() -> None:
    found = read("dml")
    assert [student.arch for student in found["dml"].recipe.students] == ["resnet8", "resnet8"]
    assert found["avg-kd"].recipe.students == ()
    several = {**CHANGES, "student": {}, "students": [{"arch": "resnet8"}, {"arch": "dscnn"}]}
    by_name = {one.name: one for one in read_contenders(["dml"], several, OVERRIDES, None)}
    assert [student.arch for student in by_name["dml"].recipe.students] == ["resnet8", "dscnn"]
    assert by_name["supervised"].recipe.student.arch == "resnet8"


def test_folders_are_names_of_files() -> None:
    found = read("amtml-kd:variant=paper", "cifar10/patient_resnet20")
    folders = [one.folder for one in found.values()]
    assert folders == ["avg-kd", "supervised", "amtml-kd-variant-paper", "cifar10-patient_resnet20"]


@pytest.mark.parametrize(
    ("words", "overrides", "said"),
    [
        (("no-such-method",), (), "no-such-method"),
        (("avg-kd:temprature=2",), (), "temprature"),
        (("avg-kd:temperature=2", "avg-kd: temperature=2"), (), "alike"),
        ((EQUAL_COMPUTE,), (), EQUAL_COMPUTE),
        (("ca-mkd",), ("method.temperature=2",), "every method"),
        (("no/such.yaml",), (), "does not exist"),
    ],
)
def test_words_that_mean_nothing_are_refused(words: tuple[str, ...], overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read(*words, overrides=(*OVERRIDES, *overrides))


def test_other_epochs_under_another_name() -> None:
    one = with_epochs(read()["supervised"], EQUAL_COMPUTE, 20)
    assert (one.name, one.folder, one.recipe.train.epochs) == (EQUAL_COMPUTE, EQUAL_COMPUTE, 20)
    with pytest.raises(RecipeError):
        read_contenders(["avg-kd:"], CHANGES, ("nonsense",), None)
