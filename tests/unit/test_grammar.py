import click
import pytest

from kdcompress.cli._grammar import repeat_flags


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--teachers a b c", "--teachers a --teachers b --teachers c"),
        ("--teachers a b --data d x", "--teachers a --teachers b --data d x"),
        ("--teachers a b seed=3 train.lr=1", "--teachers a --teachers b seed=3 train.lr=1"),
        ("--teachers a -- b", "--teachers a -- b"),
        ("--teachers a --teachers b c", "--teachers a --teachers b --teachers c"),
        ("--teachers=a b", "--teachers=a --teachers b"),
        ("--data d seed=1", "--data d seed=1"),
        ("--teachers resnet32:a=b.pt c", "--teachers resnet32:a=b.pt --teachers c"),
        ("--teachers", "--teachers"),
    ],
)
def test_a_flag_takes_all_words_up_to_the_next_option(line: str, expected: str) -> None:
    assert repeat_flags(line.split(), {"--teachers"}) == expected.split()


def test_a_setting_is_no_value() -> None:
    with pytest.raises(click.UsageError, match="--teachers needs a value, seed=1 is a setting"):
        repeat_flags(["--teachers", "seed=1"], {"--teachers"})
