from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kdcompress.errors import RecipeError
from kdcompress.recipe import (
    build_recipe,
    differences,
    dump_recipe,
    list_recipes,
    merge,
    parse_override,
    read_recipe,
    write_recipe,
)


def test_a_dumped_recipe_reads_back_as_the_same_recipe(tmp_path: Path) -> None:
    recipe = build_recipe(
        {"teachers": [{"path": "a.pt", "mean": [0.5], "std": [0.25]}], "method": {"name": "avg-kd", "temperature": 3}},
        ["train.lr=1e-3", "data.limit=100", "seed=7"],
    )
    write_recipe(recipe, tmp_path / "recipe.yaml")
    again = build_recipe(read_recipe(str(tmp_path / "recipe.yaml")))
    assert again == recipe
    assert again.train.lr == 0.001
    assert again.method.options == {"temperature": 3}
    assert build_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


def test_overrides_apply_in_order_and_do_not_touch_their_neighbours() -> None:
    recipe = build_recipe({"train": {"epochs": 3, "lr": 0.2}}, ["train.epochs=4", "train.epochs=5"])
    assert (recipe.train.epochs, recipe.train.lr, recipe.train.batch_size) == (5, 0.2, 128)


def test_numbers_that_yaml_reads_as_text_are_numbers() -> None:
    assert build_recipe({}, ["method.weight=1e-4"]).method.options == {"weight": 1e-4}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.epoch=3"], ["unknown key 'train.epoch'", "did you mean 'train.epochs'"]),
        (["trian.epochs=3"], ["unknown key 'trian'", "'train'"]),
        (["train.epochs=0"], ["train.epochs", "greater than or equal to 1", "not 0"]),
        (["train.momentum=1.0"], ["train.momentum", "less than 1"]),
        (["train.lr=.nan"], ["train.lr", "finite"]),
        (["seed=three"], ["seed", "integer", "'three'"]),
        (["data.views=flip"], ["data.views", "'crop-flip'"]),
        (["train.epochs=0", "data.vews=none"], ["train.epochs", "data.vews"]),
    ],
)
def test_every_problem_is_named_at_once(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        build_recipe({}, overrides)
    assert caught.value.exit_code == 2
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("text", ["epochs=3", "train.epochs", "=3", "Train.lr=3", "train.lr=[1"])
def test_words_that_are_not_key_value_are_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_override(text)


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "just words", "\x00"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    with pytest.raises(RecipeError, match=r"recipe|YAML"):
        read_recipe(str(file))


def test_a_recipe_that_does_not_exist_names_what_does() -> None:
    with pytest.raises(RecipeError, match="unknown recipe"):
        read_recipe("no/such_recipe")


def test_every_shipped_recipe_is_valid() -> None:
    assert list_recipes()
    for name in list_recipes():
        build_recipe(read_recipe(name), where=name)


def test_differences_name_the_keys() -> None:
    one, other = build_recipe({}), build_recipe({}, ["train.lr=0.3", "method.name=avg-kd"])
    assert differences(one, other) == ("method.name: amtml-kd → avg-kd", "train.lr: None → 0.3")
    assert differences(one, one) == ()


leaves = st.integers() | st.text(max_size=3)
mappings = st.recursive(leaves, lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=8)


@given(st.dictionaries(st.sampled_from("abc"), mappings), st.dictionaries(st.sampled_from("abc"), mappings))
def test_merge_keeps_what_is_not_changed(base: dict[str, object], changes: dict[str, object]) -> None:
    merged = merge(base, changes)
    assert merge(base, {}) == base
    assert merge(merged, changes) == merged
    assert set(merged) == set(base) | set(changes)
    assert all(merged[key] == base[key] for key in base if key not in changes)
