"""The document of a comparison and what is shown of it, with numbers made up."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from kdcompress.errors import InputError
from kdcompress.report import (
    COMPARISON_FILE,
    ComparedRun,
    ComparedTrial,
    Comparison,
    MethodRuns,
    compare_runs,
    comparison_lines,
    read_comparison,
    render_comparison,
    write_comparison,
)

TOP1 = {
    "avg-kd": [0.880, 0.882, 0.878, 0.881],
    "good|kd [x]": [0.890, 0.893, 0.887, 0.892],
    "same-kd": [0.881, 0.880, 0.879, 0.881],
    "bad-kd": [0.850, 0.853, 0.846, 0.850],
}
SPEEDS = {"avg-kd": [100.0, 50.0, 100.0, 200.0], "bad-kd": [25.0, 25.0, 25.0, 25.0]}


def runs(name: str) -> MethodRuns:
    speeds = SPEEDS.get(name, [None] * 4)
    found = [
        ComparedRun(
            seed=seed,
            folder=f"{name}/seed-{seed}",
            top1=top1,
            nll=0.3,
            val_top1=0.9,
            images_per_s=speed,
            peak_memory_mb=None if name == "same-kd" else 1000.0 + seed,
            seconds=60.0,
        )
        for seed, (top1, speed) in enumerate(zip(TOP1[name], speeds, strict=True))
    ]
    trials = [ComparedTrial(setting={"train.lr": 0.03}, seeds=(1000, 1001), scores=(0.9, None))] * 2
    return MethodRuns(name, {"train": {"epochs": 10}}, trials, {"train.lr": 0.03, "method.temperature": 2.0}, found)


def example(names: Sequence[str] = tuple(TOP1)) -> Comparison:
    return compare_runs(
        [runs(name) for name in names],
        reference="avg-kd",
        data={"name": "some", "part": "test", "images": 2000, "digest": "abc"},
        judged_on="val",
        teachers=[{"name": "teacher 1"}],
        teachers_saw_val=True,
        student_saw_val=None,
        notes=["What must be known."],
        machine={"cpu": "Some CPU", "cores": 2, "instruction_sets": ["avx2"], "gpus": []},
        versions={"torch": "9.0"},
    )


def test_every_number_follows_from_the_runs() -> None:
    found = {method.name: method for method in example().methods}
    for name, method in found.items():
        assert (method.mean, method.sd) == pytest.approx((np.mean(TOP1[name]), np.std(TOP1[name], ddof=1)))
        assert (method.n, method.setting) == (4, {"train.lr": 0.03, "method.temperature": 2.0})
    tests = {name: stats.ttest_rel(TOP1[name], TOP1["avg-kd"]) for name in TOP1 if name != "avg-kd"}
    for name, test in tests.items():
        difference = found[name].difference
        assert difference is not None
        assert difference.p == pytest.approx(test.pvalue)
        assert (difference.low, difference.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    ordered = sorted(tests, key=lambda name: tests[name].pvalue)
    smallest = found[ordered[0]].difference
    assert smallest is not None
    assert smallest.adjusted_p == pytest.approx(3 * tests[ordered[0]].pvalue)
    verdicts = {name: one.difference.verdict for name, one in found.items() if one.difference is not None}
    assert verdicts == {"good|kd [x]": "better", "same-kd": "not decided", "bad-kd": "worse"}
    assert found["avg-kd"].difference is None


def test_seeds_are_asked_for_only_where_nothing_is_decided() -> None:
    found = {method.name: method.difference for method in example().methods}
    good, same = found["good|kd [x]"], found["same-kd"]
    assert good is not None
    assert same is not None
    assert good.more_seeds is None
    assert same.mean == pytest.approx(0.0)
    assert same.more_seeds is None, "no number of seeds shows a difference of nothing"


def test_the_number_of_seeds_is_that_of_a_test_at_the_level_of_all_comparisons(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the noncentral t distribution, less the seeds that are there."""
    monkeypatch.setitem(TOP1, "near-kd", [0.884, 0.880, 0.881, 0.882])
    methods = {method.name: method for method in example((*TOP1,)).methods}
    found = methods["near-kd"].difference
    assert found is not None
    assert found.verdict == "not decided"
    effect, comparisons = found.mean / found.sd, 4

    def power(n: int) -> float:
        quantile = stats.t.ppf(1 - 0.05 / comparisons / 2, n - 1)
        shift = effect * np.sqrt(n)
        with np.errstate(divide="ignore"):  # scipy 1.11
            return float(stats.nct.sf(quantile, n - 1, shift) + stats.nct.cdf(-quantile, n - 1, shift))

    needed = next(n for n in range(2, 1000) if power(n) >= 0.8)
    assert found.more_seeds == needed - 4


def test_costs_are_medians_of_the_ratios_seed_by_seed() -> None:
    found = {method.name: method for method in example().methods}
    assert found["bad-kd"].speed == pytest.approx(np.median([0.25, 0.5, 0.25, 0.125]))
    assert found["avg-kd"].speed == 1.0
    assert (found["same-kd"].images_per_s, found["same-kd"].speed) == (None, None)
    assert (found["same-kd"].peak_memory_mb, found["same-kd"].memory) == (None, None)
    assert found["bad-kd"].memory == 1.0


def test_the_table_says_what_the_document_says() -> None:
    lines = comparison_lines(example())
    assert lines[0].startswith("| method | top-1 % | vs avg-kd, points | verdict |")
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert len(rows) == 4 + 1  # the rule below the heading begins alike
    assert "| 88.02 ± 0.17 (4) |  | the reference | 100 (1.00 ×) |" in rows[1]
    assert rows[2].startswith("| good\\|kd [x] | 89.05 ± 0.26 (4) | +1.03 [")
    assert "| better |" in rows[2]
    assert "not decided (more than 1,000 more seeds needed)" in rows[3]
    assert "| lr 0.03, temperature 2 |" in rows[4]
    text = "\n".join(lines)
    for part in ("2,000 test images", "Holm", "0.05/3", "2 settings were tried", "What must be known.", "avx2"):
        assert part in text
    assert "abc" not in text


def test_the_terminal_shows_names_in_brackets() -> None:
    out = io.StringIO()
    Console(file=out, width=200).print(render_comparison(example()))
    assert "good|kd [x]" in out.getvalue()
    assert "worse" in out.getvalue()


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    write_comparison(example(), tmp_path)
    assert read_comparison(tmp_path / COMPARISON_FILE) == example()
    assert (tmp_path / "compare.md").read_text(encoding="utf-8").startswith("# Comparison\n\n| method |")


@pytest.mark.parametrize("content", [None, "", "{}", '{"schema_version": 2}'])
def test_what_is_no_comparison_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / COMPARISON_FILE).write_text(content)
    with pytest.raises(InputError, match="comparison"):
        read_comparison(tmp_path / COMPARISON_FILE)
