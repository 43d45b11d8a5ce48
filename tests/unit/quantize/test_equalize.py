"""Equalized channels in the files: nothing changes in fp32, and INT8 keeps what it would lose."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from kdcompress.bundle import Bundle, Interface, provenance_step
from kdcompress.equalization import Equalization, Rounding, Spread, equalize, read_tensors
from kdcompress.errors import ShapeError
from kdcompress.export import change_interface, find_target
from kdcompress.fake_quant import learned_model, learned_ranges, prepare_student
from kdcompress.networks import save_student
from kdcompress.profiles import get_profile
from kdcompress.quantize._spread import measure_spreads
from kdcompress.quantize.base import Scheme
from kdcompress.quantize.int8 import Int8Source, equalize_model, quantize_model
from kdcompress.runtimes.onnxruntime_runtime import open_session
from tests.unit.deployed import CLASSES, badly_scaled, digits, onnx_bundle

TESTED = slice(1200, None)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The badly scaled student as ONNX."""
    folder = tmp_path_factory.mktemp("uneven")
    steps = (provenance_step("train", seed=0),)
    source = save_student(badly_scaled(), folder / "student", classes=CLASSES, provenance=steps)
    images = digits()[0][:40]
    return find_target("onnx").run(source, folder / "onnx-fp32", profile=get_profile("ort-x86"), images=images)


def right(logits: Tensor) -> float:
    """Percent."""
    return 100 * float((logits.argmax(1) == digits()[1][TESTED]).double().mean())


def test_spreads_are_those_of_the_values() -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(onnx_bundle().model_path))
    names = read_tensors(model)
    feeds = [part.numpy().copy() for part in digits()[0][:80].split(32)]
    found = measure_spreads(model, names, feeds)
    assert set(found) == set(names)
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    opened.graph.output.extend([onnx.helper.make_empty_tensor_value_info(name) for name in names])
    session = onnx.reference.ReferenceEvaluator(opened)
    values = session.run(list(names), {"images": np.concatenate(feeds)})
    for name, value in zip(names, values, strict=True):
        others = tuple(axis for axis in range(value.ndim) if axis != 1)
        np.testing.assert_allclose(found[name].lowest, value.min(others), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[name].highest, value.max(others), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[name].largest, np.abs(value).max(others), rtol=1e-4)
        some = found[name].some
        assert 1000 < len(some) <= 4096 or len(some) == value.size // value.shape[1]
        mean_square = (value.astype(np.float64) ** 2).mean(others)
        np.testing.assert_allclose((some.astype(np.float64) ** 2).mean(0), mean_square, rtol=0.4)


@pytest.mark.parametrize("name", ["ort-x86", "ort-arm", "trt10.3", "openvino"])
def test_a_student_of_uneven_channels_loses_nothing(name: str, uneven: Bundle) -> None:
    images, profile = digits()[0], get_profile(name)
    source = Int8Source(uneven, images[:300], profile=profile)
    fp32, int8 = source.answers(images[TESTED]), source.answers(images[TESTED], source.quantized(Scheme()))
    unchanged = quantize_model(uneven.model_path, images[:300], profile, reduce_range=False)
    without = source.answers(images[TESTED], unchanged.SerializeToString())
    assert right(fp32) - right(without) > 2, "there is something to lose"
    assert right(fp32) - right(int8) < 0.7
    assert float((fp32 - int8).norm() / (fp32 - without).norm()) < 0.25


def test_an_even_student_stays_as_it_is() -> None:
    images = digits()[0][:300]
    _, equalization = equalize_model(onnx_bundle().model_path, images, get_profile("ort-x86"), reduce_range=False)
    assert not equalization.columns


def test_factors_that_make_the_answers_worse_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise of single layers is not all that decides; the answers on the calibration images do."""
    images, profile = digits()[0], get_profile("ort-x86")

    def unlucky(model: onnx.ModelProto, spreads: Mapping[str, Spread], rounding: Rounding) -> Equalization:
        pulled = {
            name: Spread(each.lowest, each.highest, each.some * np.float32(2.0) ** (np.arange(len(each.lowest)) % 12))
            for name, each in spreads.items()
        }
        return equalize(model, pulled, rounding)

    before = Int8Source(onnx_bundle(), images[:300], profile=profile).quantized(Scheme())
    monkeypatch.setattr("kdcompress.equalization._WORTH", 1e9)
    monkeypatch.setattr("kdcompress.equalization._EXPONENTS", (-2.0,))
    monkeypatch.setattr("kdcompress.quantize._ptq.equalize", unlucky)
    source = Int8Source(onnx_bundle(), images[:300], profile=profile)
    assert source.quantized(Scheme()) == before


def test_a_file_of_large_batches_names_both_numbers(tmp_path: Path) -> None:
    bundle = change_interface(onnx_bundle(), tmp_path / "onnx", Interface(batch=16), images=digits()[0][:40])
    with pytest.raises(ShapeError, match="9 images to calibrate on, the file takes 16 at once"):
        Int8Source(bundle, digits()[0][:9], profile=get_profile("ort-x86"))


def test_fp32_answers_the_same_to_the_bit(uneven: Bundle, tmp_path: Path) -> None:
    images = digits()[0]
    model, equalization = equalize_model(uneven.model_path, images[:300], get_profile("trt10.3"), reduce_range=False)
    assert equalization.columns
    (tmp_path / "equalized.onnx").write_bytes(model.SerializeToString())
    before, after = (
        open_session(path).run(None, {"images": images.numpy()})[0]
        for path in (uneven.model_path, tmp_path / "equalized.onnx")
    )
    np.testing.assert_array_equal(before, after)


def test_the_provenance_says_how_many_layers_were_rewritten(uneven: Bundle, tmp_path: Path) -> None:
    source = Int8Source(uneven, digits()[0][:300], profile=get_profile("ort-x86"))
    assert source.write(Scheme(), tmp_path / "int8").provenance[-1]["equalized_layers"] >= 2


@pytest.mark.parametrize("name", ["ort-x86", "trt10.3"])
def test_training_goes_on_from_the_equalized_student(name: str, uneven: Bundle, tmp_path: Path) -> None:
    """It computes what its file computes, with live batch norms and the feature maps of the student it was."""
    images, profile, student = digits()[0], get_profile(name), badly_scaled()
    model, equalization = equalize_model(uneven.model_path, images[:300], profile, reduce_range=False)
    file = tmp_path / "equalized.onnx"
    file.write_bytes(model.SerializeToString())
    quantized = quantize_model(file, images[:300], profile, reduce_range=False)
    exported = onnx.load(uneven.model_path)
    prepared = prepare_student(student, exported, quantized, equalization=equalization).eval()
    with torch.no_grad():
        mine, before = prepared(images[TESTED]), student(images[TESTED])
    assert right(before.logits) - right(mine.logits) < 0.7
    for stage, expected in before.features.items():
        error = float((mine.features[stage] - expected).norm() / expected.norm())
        assert error < 0.1, stage
    norms = [sum(isinstance(m, torch.nn.BatchNorm2d) for m in each.modules()) for each in (prepared, student)]
    assert norms[0] == norms[1]

    file.write_bytes(learned_model(prepared, model).SerializeToString())
    ranges = learned_ranges(prepared)
    made = quantize_model(file, images[:300], profile, reduce_range=False, ranges=ranges)
    file.write_bytes(made.SerializeToString())
    theirs = torch.from_numpy(open_session(file, as_written=True).run(None, {"images": images[TESTED].numpy()})[0])
    assert float((mine.logits.argmax(1) == theirs.argmax(1)).double().mean()) >= 0.995
