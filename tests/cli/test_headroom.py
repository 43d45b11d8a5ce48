"""What weights are worth, and what they may be learned from: `compare --headroom`, `distill --holdout`, `--force`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from kdcompress.data import Split, load_splits
from tests.cli.conftest import SHORT, Shop

TEACHERS = ("--teachers", "a/model.pt", "b/model.pt")
DISTILL = ("distill", *TEACHERS, "--student", "resnet8", "--init", "random", "train.epochs=1", *SHORT)
WEIGHTED = ("--method", "weighted-kd")


def write_split(split: Split, classes: tuple[str, ...], folder: Path) -> None:
    pixels = split.images.load(split.ids)
    for index, (image, label) in enumerate(zip(pixels, split.labels.tolist(), strict=True)):
        place = folder / classes[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(place / f"{index}.png")


@pytest.fixture(scope="module")
def exams(shop: Shop) -> Shop:
    """The shop with three holdouts: unseen, seen, and unseen with one image that was seen."""
    splits = load_splits("digits", limit=200)
    unseen, seen = splits.test.take(150), splits.train.take(100)
    write_split(unseen, splits.classes, shop.folder / "unseen")
    write_split(seen, splits.classes, shop.folder / "seen")
    write_split(unseen, splits.classes, shop.folder / "stray")
    write_split(Split(seen.images, seen.ids[:1]), splits.classes, shop.folder / "stray2")
    copied = next((shop.folder / "stray2").rglob("*.png"))
    copied.rename(shop.folder / "stray" / copied.parent.name / "copy.png")
    return shop


def facts(run: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return content


def test_headroom_prints_a_table_and_writes_it(exams: Shop) -> None:
    words = ("compare", "--headroom", *TEACHERS, "--holdout", "unseen", *SHORT)
    said = exams.must(*words, "--out", "headroom")
    document = json.loads((exams.folder / "headroom" / "headroom.json").read_text(encoding="utf-8"))
    assert (document["kind"], document["schema_version"]) == ("headroom", 1)
    assert {"machine", "versions", "teachers", "notes"} <= set(document)
    assert document["data"]["heldout"] == "holdout"
    found = document["headroom"]
    assert (found["n"], found["folds"]) == (150, 5)
    kinds = [row["kind"] for row in found["rows"]]
    assert kinds == ["teacher", "teacher", "best", "average", "drop", "static", "class-wise", "gate", "oracle"]
    for row in found["rows"]:
        assert f"{row['top1']:.2%} ± {row['top1_error']:.2%}" in said
    for number in (0, 1):
        assert found["rows"][number]["top1"] == pytest.approx(document["teachers"][number]["holdout"]["top1"])
    assert found["recommendation"]["text"] in said
    apart = document["disagreement"]
    assert apart["training views"]["n"] == 200
    assert apart["held-out"]["n"] == 150
    assert 0 < apart["training views"]["differ"] < 1
    error = exams.run(*words, "--out", "headroom")
    assert error.code == 2
    assert "not empty" in error.err


def test_without_a_holdout_val_serves_where_no_teacher_saw_it(exams: Shop) -> None:
    words = ("compare", "--headroom", "--teachers", "c/model.pt", "c/model.pt", "--data", "colours")
    exams.must(*words, "--out", "from val")
    document = json.loads((exams.folder / "from val" / "headroom.json").read_text(encoding="utf-8"))
    assert document["teachers_saw_val"] is False
    assert document["data"]["heldout"] == "val"
    said = exams.must(*words, "--out", "from nothing", "data.split_seed=5")
    assert "cannot be known" in said
    document = json.loads((exams.folder / "from nothing" / "headroom.json").read_text(encoding="utf-8"))
    assert document["teachers_saw_val"] is True
    assert document["headroom"] is None


@pytest.mark.parametrize("command", [("compare", "--headroom", *TEACHERS), (*DISTILL, *WEIGHTED), DISTILL])
def test_images_that_the_teachers_were_trained_on_teach_no_weights(exams: Shop, command: tuple[str, ...]) -> None:
    done = exams.run(*command, "--holdout", "seen", "--out", "refused")
    assert done.code == 2
    assert "100 of 100 held-out images" in done.error
    assert "--holdout" in done.error
    assert len(done.error.splitlines()) == 2
    assert not (exams.folder / "refused").exists()


def test_force_learns_from_them_all_the_same_says_so_and_is_resumed(exams: Shop) -> None:
    said = exams.must(*DISTILL, *WEIGHTED, "--holdout", "seen", "--force", "--out", "forced")
    assert "forced: 100 of 100 held-out images" in said
    assert any("forced" in str(note) for note in facts(exams.folder / "forced")["notes"])  # type: ignore[attr-defined]
    (exams.folder / "forced" / "student" / "bundle.json").parent.rename(exams.folder / "elsewhere")
    exams.must("distill", "--resume", "--out", "forced")
    assert (exams.folder / "forced" / "student" / "bundle.json").is_file()


def test_compare_may_be_forced_too(exams: Shop) -> None:
    """The fix that the refusal names is an option of this command as well."""
    words = ("compare", "--headroom", *TEACHERS, "--holdout", "seen", "--out")
    assert "or --force" in exams.run(*words, "refused").error
    assert "forced: 100 of 100 held-out images" in exams.must(*words, "forced measure", "--force")


def test_a_method_that_learns_no_weights_may_have_any_holdout(exams: Shop) -> None:
    said = exams.must(*DISTILL, "--method", "avg-kd", "--holdout", "seen", "--out", "averaged")
    assert "100 of 100 held-out images" in said
    assert facts(exams.folder / "averaged")["headroom"] == {}


def test_a_run_says_what_weights_are_worth_and_its_report_repeats_it(exams: Shop) -> None:
    said = exams.must(*DISTILL, "--holdout", "stray", "--out", "told")
    assert "1 of 151 held-out images are among those" in said
    assert "they are left out" in said
    known = facts(exams.folder / "told")
    headroom = known["headroom"]
    assert isinstance(headroom, dict)
    assert headroom["n"] == 150
    sentence = headroom["recommendation"]["text"]
    assert f"recommended: {sentence}" in said
    exams.must("report", "told", "--restarts", "1", "--batch-sizes", "1")
    report = json.loads((exams.folder / "told" / "report.json").read_text(encoding="utf-8"))
    assert any(sentence in note for note in report["notes"])
    refits = [json.loads(line) for line in (exams.folder / "told" / "log.jsonl").read_text("utf-8").splitlines()]
    assert [line["heldout_images"] for line in refits if line["event"] == "refit"] == [150]


def test_weights_learned_from_training_labels_need_force_and_the_papers_gate_does_not(exams: Shop) -> None:
    paper = (*DISTILL, "method.variant=paper")
    done = exams.run(*paper, "method.loss=dkd", "--out", "refused")
    assert done.code == 2
    assert "labels of images that the teachers were trained on" in done.error
    assert "nothing in them knows which teacher is right" in exams.must(*paper, "--out", "paper")
    colours = ("--teachers", "c/model.pt", "c/model.pt", "--data", "colours", "--student", "resnet8")
    assert "cannot be known" in exams.must("distill", *colours, "train.epochs=1", "--out", "unknown")
