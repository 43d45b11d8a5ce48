"""Every shipped recipe: everything that it names can be built, and what is not shared by them all trains."""

from pathlib import Path

import pytest
from rich.console import Console

from kdcompress.pipeline._parts import Materials, open_materials, prepare
from kdcompress.pipeline.distill import distill, train_network
from kdcompress.recipe import Recipe, build_recipe, list_recipes, merge, read_recipe

SHORT = ("train.epochs=1", "train.batch_size=32", "train.precision=fp32", "data.limit=64", "data.test_limit=20")
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What the command line adds to a recipe: one teacher, and its data."""
    folder = tmp_path_factory.mktemp("teacher")
    changes = {"student": {"arch": "resnet8", "init": "random"}, "data": {"source": "digits"}}
    train_network(changes, SHORT, out=folder / "run")
    return {"teachers": [{"path": str(folder / "run" / "model.pt")}], "data": {"source": "digits"}}


def asked(name: str, teacher: dict[str, object]) -> Recipe:
    return build_recipe(merge(read_recipe(name), teacher), SHORT, where=name)


@pytest.fixture(scope="module")
def materials(teacher: dict[str, object]) -> Materials:
    return open_materials(asked("cifar10/avg-kd_resnet20", teacher), QUIET)


@pytest.mark.parametrize("name", list_recipes())
def test_all_that_a_recipe_names_can_be_built(name: str, teacher: dict[str, object], materials: Materials) -> None:
    recipe = asked(name, teacher)
    parts = prepare(recipe, QUIET, offline=True, materials=materials)
    assert parts.recipe.method == recipe.method
    assert parts.students[0].student.arch == recipe.trained[0].arch
    batch = next(parts.loader.epoch(0))
    one_hot = bool(((batch.label_targets == 0) | (batch.label_targets == 1)).all())
    assert one_hot == (recipe.data.mixup_alpha == 0)


def test_mixed_images_without_labels_train(teacher: dict[str, object], tmp_path: Path) -> None:
    run = distill(teacher, (*SHORT, "student.arch=resnet8"), recipe="cifar10/patient_resnet20", out=tmp_path / "run")
    assert run.student().arch == "resnet8"


def test_what_the_papers_ask_for() -> None:
    """MEAL V2 and the patient teacher learn nothing from labels, at temperature 1; only one of them mixes images."""
    for name, mixup in (("meal-v2", 0.0), ("patient", 1.0)):
        recipe = build_recipe(read_recipe(f"cifar10/{name}_resnet20"))
        assert recipe.method.options == {"temperature": 1.0, "label_weight": 0.0}
        assert recipe.data.mixup_alpha == mixup
