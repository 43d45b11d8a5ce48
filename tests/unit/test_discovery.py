import subprocess
import sys
from typing import Annotated, Literal

import pytest
from pydantic import Field

from kdcompress import discovery
from kdcompress.errors import InputError, RecipeError


class Example:
    def __init__(
        self,
        shapes: int,
        *,
        variant: Literal["a", "b"] = "a",
        temperature: Annotated[float, Field(gt=0)] = 4.0,
        steps: int | None = None,
        fade: bool = False,
    ) -> None:
        pass


def test_list_options() -> None:
    assert [(o.name, o.default) for o in discovery.list_options(Example)] == [
        ("variant", "a"),
        ("temperature", 4.0),
        ("steps", None),
        ("fade", False),
    ]


def test_check_options_gives_only_what_was_given_with_its_type() -> None:
    checked = discovery.check_options(Example, {"temperature": 2, "fade": "true"})
    assert checked == {"temperature": 2.0, "fade": True}
    assert isinstance(checked["temperature"], float)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 3}, "unknown key 'method.temprature'; did you mean 'method.temperature'?"),
        ({"temperature": 0}, "method.temperature: input should be greater than 0, not 0"),
        ({"temperature": float("nan")}, "method.temperature"),
        ({"temperature": "warm"}, "method.temperature"),
        ({"variant": "c"}, "'a' or 'b', not 'c'"),
        ({"steps": 1.5}, "method.steps"),
        ({"shapes": 1}, "unknown key 'method.shapes'"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        discovery.check_options(Example, options)
    assert message in str(caught.value)


def test_all_wrong_options_are_named_at_once() -> None:
    with pytest.raises(RecipeError, match=r"method\.tau.*method\.variant.*method\.temperature"):
        discovery.check_options(Example, {"tau": 1, "variant": "c", "temperature": -1})


def test_a_card_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="unknown method 'avg'"):
        discovery.read_card("kdcompress.methods", "avg")


def test_names_and_cards_need_no_torch() -> None:
    code = (
        "import sys; from kdcompress.discovery import list_names, read_card;"
        "names = list_names('kdcompress.methods');"
        "assert all(read_card('kdcompress.methods', name).title for name in names);"
        "assert 'torch' not in sys.modules and 'base' not in names"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
