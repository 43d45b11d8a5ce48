from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from kdcompress import probe
from kdcompress.errors import InputError
from kdcompress.execution import Execution
from kdcompress.networks import TeacherEnsemble
from kdcompress.probe import Wanted, choose, student_step, teachers_answer
from tests.unit.test_live_teachers import batch, teacher
from tests.unit.tiny import tiny_student

CPU = torch.device("cpu")
LONG = 10**9


def taking(
    seconds: dict[Execution, float], built: list[Execution] | None = None
) -> Callable[[Execution], Callable[[], None]]:
    """Calls that sleep as long as is said."""

    def build(execution: Execution) -> Callable[[], None]:
        if built is not None:
            built.append(execution)
        return lambda: time.sleep(seconds[execution])

    return build


PLAIN, INNERMOST, HALF, BOTH = (
    Execution("fp32", False),
    Execution("fp32", True),
    Execution("bf16", False),
    Execution("bf16", True),
)


def test_the_fastest_is_taken() -> None:
    choice = choose(Wanted(compiled=False), taking({PLAIN: 0.04, INNERMOST: 0.03, HALF: 0.02, BOTH: 0.005}), LONG, CPU)
    assert choice.execution == BOTH
    assert "8" in choice.describe() or "7" in choice.describe()
    assert choice.describe().startswith("bf16, channels-last")


def test_a_plainer_way_that_is_nearly_as_fast_is_taken() -> None:
    choice = choose(Wanted(compiled=False), taking({PLAIN: 0.02, INNERMOST: 0.0195, HALF: 0.05, BOTH: 0.05}), LONG, CPU)
    assert choice.execution == PLAIN


def test_short_work_is_not_probed() -> None:
    built: list[Execution] = []
    choice = choose(Wanted(), taking(dict.fromkeys([PLAIN, INNERMOST, HALF, BOTH], 0.001), built), 10, CPU)
    assert choice.execution == PLAIN
    assert built == [PLAIN]
    assert choice.describe() == "fp32"


def test_what_is_asked_for_is_not_probed() -> None:
    choice = choose(Wanted(("bf16",), True, False), taking({}, built := []), LONG, CPU)
    assert choice.execution == BOTH
    assert built == []


def test_compiling_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="no C\\+\\+ compiler"):
        choose(Wanted(compiled=True), taking({}), LONG, CPU)
    choice = choose(Wanted(("fp32",), False), taking({PLAIN: 0.001}), LONG, CPU)
    assert choice.execution == PLAIN
    assert choice.note == "not compiled: there is no C++ compiler"


def test_compiling_is_tried_where_much_is_left_and_taken_where_it_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "why_not_compiled", lambda device: None)
    fast = Execution("fp32", False, True)
    build = taking({PLAIN: 0.01, fast: 0.002})
    assert choose(Wanted(("fp32",), False), build, LONG, CPU).execution == fast
    assert choose(Wanted(("fp32",), False), build, 20_000, CPU).execution == PLAIN
    slow = taking({PLAIN: 0.01, fast: 0.0095})
    assert choose(Wanted(("fp32",), False), slow, LONG, CPU).execution == PLAIN


def test_a_probed_student_is_not_changed() -> None:
    student = tiny_student()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    images = torch.rand(4, student.preprocess.channels, student.preprocess.height, student.preprocess.width)
    for execution in (PLAIN, BOTH):
        student_step(student, images, CPU)(execution)()
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())


def test_probed_teachers_answer() -> None:
    asked = batch(torch.rand(4, 3, 8, 8))
    for execution in (PLAIN, BOTH):
        teachers_answer(TeacherEnsemble([teacher()]), {"last": "map"}, asked)(execution)()
