"""Several students in one run, from the command to the bundles."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from kdcompress.bundle import read_bundle, read_safetensors
from kdcompress.checkpoint import load_state
from kdcompress.cli.distill import command
from kdcompress.data import load_splits
from kdcompress.errors import InputError
from kdcompress.networks import load_student
from kdcompress.pipeline._runs import judge
from kdcompress.pipeline.base import RunFolder
from kdcompress.pipeline.distill import distill

SHORT = ("train.epochs=2", "train.batch_size=64", "data.limit=150", "data.test_limit=50", "train.device=cpu")


def run(
    out: Path, method: str, *overrides: str, students: tuple[str, ...] = ("resnet8", "resnet8"), **changes: Any
) -> Any:
    sections = {
        "students": [{"arch": arch} for arch in students],
        "method": {"name": method},
        "data": {"source": "digits"},
    }
    return distill({**sections, **changes.pop("sections", {})}, (*SHORT, *overrides), out=out, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run(
        tmp_path_factory.mktemp("runs") / "ctsl", "ctsl-mkt", "train.pretrain_epochs=1", students=("resnet8", "dscnn")
    )


def weights(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {name: read_safetensors(bundle.model_path) for name, bundle in RunFolder(run).bundles().items()}


def test_all_are_kept_and_the_best_on_val_is_the_student(finished: RunFolder) -> None:
    lines = [json.loads(line) for line in (finished.path / "log.jsonl").read_text().splitlines()]
    top1 = [line for line in lines if line["event"] == "epoch"][-1]["val_top1"]
    best = max(range(2), key=lambda index: top1[index])
    other = f"peer-{2 - best}"
    assert list(finished.bundles()) == ["student", other]
    archs = ["resnet8", "dscnn"]
    assert read_bundle(finished.path / "student").arch == archs[best]
    assert read_bundle(finished.path / other).arch == archs[1 - best]
    assert load_student(read_bundle(finished.path / other)).num_classes == 10


def test_a_comparison_judges_the_first_student_and_not_the_best(finished: RunFolder, tmp_path: Path) -> None:
    """Whoever is chosen on val of several would be held against methods that have no choice."""
    (other,) = (name for name in finished.bundles() if name != "student")
    splits = load_splits("digits", limit=150, test_limit=50)

    def judged(best: str, first: str | None) -> float:
        folder = tmp_path / f"{best}, {first}"
        shutil.copytree(finished.path / best, folder / "student")
        if first is not None:
            shutil.copytree(finished.path / first, folder / "peer-1")
        return judge(folder, "test", splits)["nll"]

    chosen_alone, other_alone = judged("student", None), judged(other, None)
    assert chosen_alone != other_alone
    assert judged("student", other) == other_alone
    assert judged(other, "student") == chosen_alone


def test_each_was_first_trained_alone_and_went_on_from_there(finished: RunFolder) -> None:
    """The rate at which it went on is the one for trained weights, a tenth."""
    recipe = finished.recipe
    assert (recipe.train.pretrain_epochs, recipe.train.pretrain_lr, recipe.train.lr) == (1, 0.1, 0.01)
    alone = [load_state(finished.path / f"alone-{number}" / "last.pt")["run"] for number in (1, 2)]
    assert all(len(state["history"]) == 1 for state in alone)
    lines = [json.loads(line) for line in (finished.path / "log.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["event"] == "step")
    assert first["students"][0]["terms"].keys() == {"labels", "peers", "distances", "angles", "self"}


@pytest.mark.parametrize("lost", [("last.pt", "log.jsonl", "alone-2"), ("last.pt", "log.jsonl"), ()])
def test_a_run_stopped_at_any_stage_ends_in_the_same_weights(
    finished: RunFolder, tmp_path: Path, lost: tuple[str, ...]
) -> None:
    """As it looks after a stop while the second student is trained alone, between the two stages, before the export."""
    stopped = tmp_path / "run"
    shutil.copytree(finished.path, stopped)
    for name in (*lost, "student"):
        target = stopped / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    distill({}, out=stopped, resume=True)
    again, before = weights(stopped), weights(finished.path)
    assert again.keys() == before.keys()
    assert all(torch.equal(again[n][key], value) for n, tensors in before.items() for key, value in tensors.items())


def test_like_students_start_from_different_weights(tmp_path: Path) -> None:
    bundles = run(tmp_path / "a", "dml", "train.epochs=1").bundles()
    one, other = (read_safetensors(bundle.model_path) for bundle in bundles.values())
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])


def test_the_same_network_with_the_same_weights_twice_is_refused(finished: RunFolder, tmp_path: Path) -> None:
    arch = read_bundle(finished.path / "student").arch
    students = [{"arch": arch, "init": str(finished.path / "student")}] * 2
    with pytest.raises(InputError, match="students 1 and 2 are the same"):
        run(tmp_path / "a", "dml", sections={"students": students})
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("method", "students", "message"),
    [
        ("dml", ("resnet8",), "1 student, dml trains 2 to 16"),
        ("supervised", ("resnet8", "dscnn"), "2 students, supervised trains 1"),
    ],
)
def test_a_method_says_how_many_students_it_trains(
    tmp_path: Path, method: str, students: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(tmp_path / "a", method, students=students)


def test_the_command_takes_several_students_with_one_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("kdcompress.pipeline.distill.distill", lambda changes, *_, **__: asked.append(changes))
    words = ["--students", "resnet8", "dscnn", "--init", "random", "--method", "dml", "seed=3"]
    assert CliRunner().invoke(command, words).exit_code == 0
    assert asked[0]["students"] == [{"arch": "resnet8", "init": "random"}, {"arch": "dscnn", "init": "random"}]
    assert "student" not in asked[0]
    both = CliRunner().invoke(command, ["--student", "resnet8", "--students", "resnet8", "dscnn"])
    assert both.exit_code == 2
    assert "give one of the two" in both.output
