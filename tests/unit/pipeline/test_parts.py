import pytest

from kdcompress.data import load_splits
from kdcompress.pipeline._parts import build_student
from kdcompress.recipe import build_recipe


@pytest.mark.parametrize(("size", "resize"), [(None, "none"), (8, "none"), (16, "bilinear-crop")])
def test_whoever_opens_the_student_is_told_how_its_images_were_resized(size: int | None, resize: str) -> None:
    recipe = build_recipe({"student": {"arch": "resnet8", "init": "random"}})
    student, _, _ = build_student(recipe, load_splits("digits", image_size=size), (), offline=True)
    assert student.preprocess.image_shape == (1, size or 8, size or 8)
    assert student.preprocess.resize == resize
