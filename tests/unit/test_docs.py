"""What the documentation says is so."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from kdcompress.cli.show import command as show
from kdcompress.errors import RecipeError
from kdcompress.methods.base import check_options, find_method
from kdcompress.pipeline.distill import distill, train_network
from tests.made_steps import make_shapes, make_step

DOCS = Path(__file__).parent.parent.parent / "docs"
SHORT = ("train.epochs=1", "train.batch_size=64", "data.limit=100", "data.test_limit=20", "train.device=cpu")


def test_the_page_of_the_methods_is_up_to_date() -> None:
    written = runpy.run_path(str(DOCS / "write_methods.py"))["page"]()
    assert (DOCS / "methods.md").read_text(encoding="utf-8") == written, "python docs/write_methods.py"


def test_the_page_of_the_linter_is_up_to_date() -> None:
    written = runpy.run_path(str(DOCS / "write_lint.py"))["page"]()
    assert (DOCS / "lint.md").read_text(encoding="utf-8") == written, "python docs/write_lint.py"


@pytest.mark.parametrize("raw", sorted((DOCS / "results").glob("*.jsonl")), ids=lambda path: path.stem)
def test_the_tables_of_the_results_are_those_of_the_raw_figures(raw: Path) -> None:
    told = (DOCS / "results.md").read_text(encoding="utf-8") + (DOCS / "performance.md").read_text(encoding="utf-8")
    table = runpy.run_path(str(DOCS.parent / "benchmarks" / "paired_table.py"))["table"](raw)
    figures = re.findall(r"\d+\.\d\d ± \d+\.\d\d", table)
    assert len(figures) >= 3
    assert [one for one in figures if one not in told] == []


def test_the_example_of_a_method_of_ones_own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (DOCS / "adding-a-method.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_kd.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    shown = CliRunner().invoke(show, ["my_kd:BoldestKD"])
    assert shown.exit_code == 0
    assert "Whoever knows best is sure." in shown.output
    assert "method.temperature = 4.0" in shown.output
    cls = find_method("my_kd:BoldestKD")
    with pytest.raises(RecipeError, match="temperature"):
        check_options(cls, {"temperature": -1})

    shapes, T = make_shapes(2), 2.0
    step = make_step(shapes)
    assert step.teachers is not None
    p = (step.student.logits / T).softmax(1)
    expected = torch.zeros(())
    for i, answers in enumerate(step.teachers.logits):
        q = (max(answers, key=lambda one: float(one.softmax(0).max())) / T).softmax(0)
        expected = expected + T**2 * (q * (q / p[i]).log()).sum() / len(step.labels)
    torch.testing.assert_close(cls(shapes, temperature=T)(step).terms["soft_targets"].value, expected)

    student = {"student": {"arch": "resnet8"}, "data": {"source": "digits"}}
    train_network(student, SHORT, out=tmp_path / "teacher")
    teachers = [{"path": str(tmp_path / "teacher" / "model.pt")}] * 2
    asked = {**student, "teachers": teachers, "method": {"name": "my_kd:BoldestKD"}}
    run = distill(asked, (*SHORT, "method.temperature=2"), out=tmp_path / "run")
    assert run.recipe.method.options == {"temperature": 2}
