from pathlib import Path
from typing import Any

import pytest
import torch

from kdcompress.data import MemorySet, Split, Splits, training_digests
from kdcompress.errors import BundleError, InputError
from kdcompress.gate import Drop, judge, read_verdict, write_verdict
from kdcompress.measurement import Measurement
from kdcompress.pipeline._gate import (
    believe,
    find_drop,
    halves,
    judged_images,
    load_labelled,
    race,
    renew_verdicts,
    runs_here,
    speed_ups,
)
from kdcompress.pipeline._source import Source
from kdcompress.profiles import PROFILES, default_profile
from kdcompress.quantize.fp16 import QUANTIZER as HALF
from kdcompress.quantize.int8 import QUANTIZER
from kdcompress.runtimes import open_bundle
from tests.unit.deployed import digits, onnx_bundle, student_bundle
from tests.unit.tiny import tiny_images

CLASSES = ("a", "b", "c")


def labelled(num_images: int, seed: int) -> Split:
    split = tiny_images(num_images, seed)
    return Split(split.images, split.ids[split.labels >= 0])


def splits(holdout: Split | None = None) -> Splits:
    train, val = labelled(200, 0), labelled(90, 1)
    return Splits(train, val, labelled(50, 2), train, holdout, None, CLASSES, "noise")


def test_halves_share_no_image_and_keep_the_classes_shares() -> None:
    split = labelled(200, 0)
    first, second = halves(split)
    assert sorted([*first.ids.tolist(), *second.ids.tolist()]) == sorted(split.ids.tolist())
    assert not set(first.ids.tolist()) & set(second.ids.tolist())
    shares = [torch.bincount(half.labels, minlength=3).double() / len(half) for half in (first, second)]
    assert (shares[0] - shares[1]).abs().max() < 0.03


def test_what_is_chosen_on_is_not_judged_on() -> None:
    judged = judged_images(splits(), False, picks=True)
    assert judged.confirm is not None
    assert not set(judged.choose.ids.tolist()) & set(judged.confirm.ids.tolist())
    assert (judged.name, judged.unjudged, judged.note) == ("second half of val", "", "")
    whole = judged_images(splits(), False, picks=False)
    assert whole.confirm is not None
    assert (len(whole.confirm), whole.name) == (len(splits().val), "val")


def test_val_does_not_judge_a_student_that_saw_it() -> None:
    judged = judged_images(splits(), True, picks=True)
    assert judged.confirm is None
    assert "--holdout" in judged.unjudged
    fresh = judged_images(splits(labelled(60, 3)), True, picks=True)
    assert fresh.confirm is not None
    assert (fresh.name, fresh.unjudged) == ("second half of holdout", "")
    unknown = judged_images(splits(), None, picks=True)
    assert unknown.confirm is not None
    assert "not known" in unknown.note


def test_the_digests_of_a_bundle_tell_what_it_saw(tmp_path: Path) -> None:
    val = labelled(200, 1)  # 180 of them
    data = Splits(val, val, val, val, None, None, CLASSES, "noise")
    assert Source(student_bundle(tmp_path / "plain"), tmp_path, None).saw_val(data, None) is None
    from kdcompress.networks import save_student
    from tests.unit.deployed import CLASSES as DIGITS
    from tests.unit.deployed import trained_student

    copy, two = Split(val.images, val.ids[:1]), Split(val.images, val.ids[:2])
    for name, seen, expected in (
        ("val", val, True),
        ("other", labelled(60, 9), False),
        ("copy", copy, False),
        ("two", two, True),
    ):
        made = save_student(trained_student(), tmp_path / name, classes=DIGITS, training_digests=training_digests(seen))
        assert Source(made, tmp_path, None).saw_val(data, None) is expected


def test_held_out_images_that_the_student_was_trained_on_do_not_judge_it() -> None:
    holdout = labelled(200, 3)  # 180 of them
    two = Split(holdout.images, holdout.ids[:2])
    with pytest.raises(InputError, match="2 of 180 held-out images are among those that the student was trained on"):
        judged_images(splits(holdout), False, picks=False, digests=training_digests(two))
    one = Split(holdout.images, holdout.ids[5:6])
    judged = judged_images(splits(holdout), False, picks=False, digests=training_digests(one))
    assert judged.confirm is not None
    assert sorted({*holdout.ids.tolist()} - {*judged.confirm.ids.tolist()}) == one.ids.tolist(), "a stray is left out"


def test_images_without_a_label_decide_nothing() -> None:
    images, labels = load_labelled(tiny_images(50), 1000)
    assert len(images) == len(labels) == 45
    assert int(labels.min()) >= 0


def digit_split(start: int, end: int) -> Split:
    images, labels = digits()
    stored = (images * 255).round().to(torch.uint8)
    return Split(MemorySet(stored, labels, tuple(map(str, range(10)))), torch.arange(start, end))


def test_a_real_gate_on_a_tiny_network(tmp_path: Path) -> None:
    """INT8 in ONNX Runtime against fp32: the drop is that of the answers, the interval holds the ratio."""
    source = onnx_bundle()
    made = QUANTIZER.run(source, digits()[0][:200], tmp_path / "int8", profile=PROFILES["ort-x86"])
    judged = judged_images(
        Splits(*[digit_split(1200, 1797)] * 4, None, None, tuple(map(str, range(10))), "digits"), False, picks=True
    )
    drop = find_drop(open_bundle(source), open_bundle(made), judged, 10)
    assert drop is not None
    assert judged.confirm is not None
    images, labels = load_labelled(judged.confirm, 1000)
    right = [(open_bundle(bundle)(images).argmax(1) == labels).double().mean() for bundle in (source, made)]
    assert drop.value == pytest.approx(float(right[0] - right[1]))
    assert drop.low <= drop.value <= drop.high
    latency = race({"fp32": source, "int8": made}, batch_size=2, threads=1, restarts=2, iterations=10)
    (found,) = speed_ups(latency, "int8")
    assert (found.rival, found.restarts, found.batch_size) == ("fp32", 2, 2)
    ratios = [a / b for a, b in zip(latency["fp32"].restart_p50_ms, latency["int8"].restart_p50_ms, strict=True)]
    assert min(ratios) <= found.ratio <= max(ratios)
    assert judge(drop, [found], max_drop=1.0).answer == "unmeasured on target", "two processes say nothing"


def test_this_machine_tells_of_its_own_profile_only() -> None:
    assert [name for name, profile in PROFILES.items() if runs_here(profile)] == [default_profile().name]


def measured(int8: str, fp32: str, times: tuple[float, float], fp16: str = "") -> Measurement:
    """With fp16, that takes as long as fp32."""

    def model(bundle: str, precision: str, base: float) -> dict[str, Any]:
        samples = [[base * (1 + 0.01 * number), base * (1 + 0.01 * number)] for number in range(5)]
        return {"bundle": bundle, "precision": precision, "batch_size": 1, "latency_ms": samples}

    document: dict[str, Any] = {
        "profile": "jetson-orin",
        "runtime": "tensorrt 10.3.0",
        "machine": {"board": "Orin Nano"},
        "versions": {},
        "protocol": {"interleaved": True},
        "models": [model(int8, "int8", times[0]), model(fp32, "fp32", times[1])],
    }
    if fp16:
        document["models"].append(model(fp16, "fp16", times[1]))
    return Measurement.model_validate(document)


def test_the_verdict_beside_a_bundle_is_renewed_and_belongs_to_it_alone(tmp_path: Path) -> None:
    source = onnx_bundle()
    made = QUANTIZER.run(source, digits()[0][:64], tmp_path / "int8", profile=PROFILES["jetson-orin"])
    half = HALF.run(source, digits()[0][:64], tmp_path / "fp16", profile=PROFILES["jetson-orin"])
    bundles = {"onnx-fp32": source, "int8": made, "onnx-fp16": half}
    found = measured(made.digest, source.digest, (1.0, 2.0), half.digest)
    assert renew_verdicts(bundles, [found]) == {}, "the gate was not asked about any of them"
    before = judge(Drop(0.0, -0.001, 0.004, 3000, 9, "val"), (), max_drop=0.01)
    write_verdict(made.path, before, made.digest, {})
    assert read_verdict(made.path, made.digest) == before
    assert read_verdict(made.path, source.digest) is None
    renewed = renew_verdicts(bundles, [found])
    assert renewed["int8"].answer == "pass"
    assert read_verdict(made.path, made.digest) == renewed["int8"]
    older = measured(made.digest, source.digest, (1.0, 3.0))
    assert renew_verdicts(bundles, [older]) == {}, "a file that knows fewer rivals"
    assert read_verdict(made.path, made.digest) == renewed["int8"]
    (made.path / "gate.json").write_text("{", encoding="utf-8")
    with pytest.raises(BundleError, match=r"gate\.json is damaged"):
        read_verdict(made.path, made.digest)


def test_a_measurement_from_the_target_is_believed(tmp_path: Path) -> None:
    source = onnx_bundle()
    made = QUANTIZER.run(source, digits()[0][:64], tmp_path / "int8", profile=PROFILES["jetson-orin"])
    before = judge(Drop(0.0, -0.001, 0.004, 3000, 9, "val"), (), max_drop=0.01)
    assert before.answer == "unmeasured on target"
    half = HALF.run(source, digits()[0][:64], tmp_path / "fp16", profile=PROFILES["jetson-orin"])
    after = believe(before, made, [source, half], measured(made.digest, source.digest, (1.0, 2.0), half.digest))
    assert (after.answer, after.measured_on) == ("pass", "tensorrt 10.3.0 · Orin Nano")
    assert after.drop == before.drop
    assert after.speed_ups[0].ratio == pytest.approx(2)
    elsewhere = believe(before, made, [source], measured(made.digest, source.digest, (1.0, 2.0), half.digest))
    assert elsewhere == after, "fp16 that lies in the device bundle alone"
    alone = believe(before, made, [source, half], measured(made.digest, source.digest, (1.0, 2.0)))
    assert (alone.answer, len(alone.speed_ups)) == ("unmeasured on target", 1)
    assert "Speed: fp16 was not timed, which the target computes as well: nothing is recommended yet." in alone.reasons
    slower = believe(before, made, [source], measured(made.digest, source.digest, (2.0, 1.9)))
    assert slower.answer == "fail"
    unjudged = believe(judge(None, (), max_drop=0.01, unjudged="Accuracy: it saw val."), made, [source, half],
                       measured(made.digest, source.digest, (1.0, 2.0), half.digest))  # fmt: skip
    assert unjudged.answer == "cannot decide"
    assert "Accuracy: it saw val." in unjudged.reasons
    with pytest.raises(InputError, match="not measured: int8"):
        believe(before, made, [source], measured("a" * 64, source.digest, (1.0, 2.0)))
    apart = measured(made.digest, source.digest, (1.0, 2.0)).model_copy(update={"protocol": {}})
    with pytest.raises(InputError, match="not timed in turns"):
        believe(before, made, [source], apart)
    with pytest.raises(InputError, match="is not in this run: it was written anew since"):
        believe(before, made, [source], measured(made.digest, "b" * 64, (1.0, 2.0)))
    other = measured(made.digest, source.digest, (1.0, 2.0))
    only = other.model_copy(update={"models": other.models[:1]})
    with pytest.raises(InputError, match="without the fp32 bundle"):
        believe(before, made, [source], only)
