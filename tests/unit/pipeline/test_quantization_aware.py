from pathlib import Path

import pytest

from kdcompress.errors import RecipeError
from kdcompress.pipeline.base import RECIPE_FILE, RunFolder
from kdcompress.pipeline.quantization_aware import note_of_norms, shorter_recipe
from kdcompress.recipe import build_recipe, write_recipe


def run(folder: Path, epochs: int) -> RunFolder:
    train = {"epochs": epochs, "lr": 0.1, "warmup_epochs": 5}
    write_recipe(build_recipe({"train": train, "student": {"arch": "resnet8"}}), folder / RECIPE_FILE)
    return RunFolder(folder)


@pytest.mark.parametrize(("epochs", "expected"), [(40, 8), (13, 3), (3, 2)])
def test_a_fifth_of_the_epochs_at_a_tenth_of_the_rate(epochs: int, expected: int, tmp_path: Path) -> None:
    shorter = shorter_recipe(run(tmp_path, epochs), ())
    assert (shorter.train.epochs, shorter.train.lr, shorter.train.warmup_epochs) == (expected, pytest.approx(0.01), 0)
    assert shorter.student.init == str(tmp_path / "student")


def test_what_is_asked_for_counts_and_the_rest_of_the_run_stays(tmp_path: Path) -> None:
    assert shorter_recipe(run(tmp_path, 40), ["train.epochs=1"]).train.epochs == 1
    with pytest.raises(RecipeError, match=r"method\.name is the run's and stays as it is with --qat"):
        shorter_recipe(run(tmp_path, 40), ["method.name=avg-kd"])


def test_batch_norms_that_keep_their_statistics_are_told_of_in_one_line() -> None:
    assert note_of_norms(0, 5) == ""
    note = note_of_norms(2, 3)
    assert note.startswith("2 of 3 batch norms stay as they are in the file")
    assert "\n" not in note
