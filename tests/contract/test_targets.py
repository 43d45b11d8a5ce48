"""What every export target and every quantizer must do, checked for each that there is."""

import dataclasses
from pathlib import Path

import pytest
import torch

from kdcompress.bundle import MODEL_FILES, Bundle, read_bundle
from kdcompress.errors import KdcompressError, OutputError
from kdcompress.evaluate import agreement
from kdcompress.export import Target, find_target, list_targets, walk
from kdcompress.profiles import PROFILES
from kdcompress.quantize import Quantizer, find_quantizer, list_quantizers
from kdcompress.runtimes import open_bundle
from kdcompress.tensorrt_module import why_not_here
from tests.unit.deployed import digits, onnx_bundle, student_bundle

PROFILE = PROFILES["ort-x86"]


def check_successor(made: Bundle, source: Bundle) -> None:
    """A bundle keeps what its source knows, adds one step that names it, and answers as it does."""
    assert read_bundle(made.path) == made
    for name in ("classes", "preprocess", "arch", "arch_args", "num_params"):
        assert getattr(made, name) == getattr(source, name), name
    assert made.provenance[:-1] == source.provenance
    assert made.provenance[-1]["source"] == source.digest
    assert str(made.path.parent) not in (made.path / "bundle.json").read_text(encoding="utf-8")
    images = digits()[0][1200:]
    assert agreement(open_bundle(made)(images), open_bundle(source)(images)) > 0.95
    assert open_bundle(made)(images[:1]).shape == (1, source.num_classes)


@pytest.mark.parametrize("name", list_targets())
def test_a_target_writes_what_it_says(name: str, tmp_path: Path) -> None:
    if name == "trt" and why_not_here() is not None:
        pytest.skip("no TensorRT or no GPU here")
    target = find_target(name)
    assert isinstance(target, Target)
    assert {target.takes, target.makes} <= set(MODEL_FILES)
    source = student_bundle(tmp_path / "student")
    made = walk(source, name, tmp_path / "made", profile=PROFILE, images=digits()[0][:16])
    assert made.kind == target.makes
    check_successor(made, source)
    with pytest.raises(OutputError):
        walk(source, name, tmp_path / "made", profile=PROFILE, images=digits()[0][:16])


@pytest.mark.parametrize("name", list_targets())
def test_a_target_refuses_what_it_does_not_take(name: str, tmp_path: Path) -> None:
    other = next(kind for kind in MODEL_FILES if kind != find_target(name).takes)
    wrong = dataclasses.replace(student_bundle(tmp_path / "student"), kind=other)  # type: ignore[arg-type]
    with pytest.raises(KdcompressError):
        find_target(name).run(wrong, tmp_path / "made", profile=PROFILE, images=digits()[0][:4])
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("profile", sorted(PROFILES))
@pytest.mark.parametrize("name", list_quantizers())
def test_a_quantizer_writes_what_it_says_for_every_profile(name: str, profile: str, tmp_path: Path) -> None:
    quantizer = find_quantizer(name)
    assert isinstance(quantizer, Quantizer)
    source, images = onnx_bundle(), digits()[0]
    assert quantizer.takes == source.kind
    made = quantizer.run(source, images[:200], tmp_path / "made", profile=PROFILES[profile], images=images[1200:])
    assert made.precision == quantizer.makes
    assert made.size_mb < source.size_mb or PROFILES[profile].float_weights
    check_successor(made, source)
    step = made.provenance[-1]
    assert 0.95 < step["agreement"]["value"] <= 1
    # What does not depend on the profile does not name it, or the file's digest would.
    assert step.get("profile") == (None if quantizer.makes == "fp16" else profile)
    again = quantizer.run(source, images[:200], tmp_path / "again", profile=PROFILES[profile], images=images[1200:])
    assert again.digest == made.digest
    with pytest.raises(OutputError):
        quantizer.run(source, images[:200], tmp_path / "made", profile=PROFILES[profile])


@pytest.mark.parametrize("name", list_quantizers())
def test_a_quantizer_refuses_to_calibrate_on_nothing(name: str, tmp_path: Path) -> None:
    with pytest.raises(KdcompressError):
        find_quantizer(name).run(onnx_bundle(), torch.empty(0, 1, 8, 8), tmp_path / "made", profile=PROFILE)
    assert not (tmp_path / "made").exists()
