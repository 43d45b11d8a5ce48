import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from kdcompress.bundle import (
    Bundle,
    Preprocess,
    fit_images,
    model_metadata,
    provenance_step,
    read_bundle,
    read_safetensors,
    write_bundle,
    write_safetensors,
)
from kdcompress.errors import BundleError, OutputError, ShapeError, VerificationError

PREPROCESS = Preprocess(3, 8, 8, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), "bilinear")


def write(path: Path, content: bytes = b"weights", digests: torch.Tensor | None = None) -> Bundle:
    def write_model(file: Path) -> None:
        file.write_bytes(content)

    return write_bundle(
        path,
        write_model,
        kind="torch",
        precision="fp32",
        classes=("cat", "dög"),
        preprocess=PREPROCESS,
        arch="resnet8",
        arch_args={"width": 4},
        num_params=7,
        provenance=(provenance_step("distill", seed=3),),
        training_digests=digests,
    )


def test_a_bundle_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = write(tmp_path / "student", digests=torch.tensor([-5, 3, 9]))
    opened = read_bundle(tmp_path / "student")
    assert opened == written
    assert opened.digest == written.digest
    assert opened.num_classes == 2
    assert opened.size_mb == 7e-6
    assert opened.preprocess.image_shape == (3, 8, 8)
    digests = opened.training_digests()
    assert digests is not None
    assert digests.tolist() == [-5, 3, 9]


def test_the_same_content_gives_the_same_bytes_anywhere(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b" / "c")
    assert first.digest == second.digest
    assert (first.path / "bundle.json").read_bytes() == (second.path / "bundle.json").read_bytes()
    assert str(tmp_path) not in (first.path / "bundle.json").read_text()
    assert first.training_digests() is None


def test_other_weights_give_another_digest(tmp_path: Path) -> None:
    assert write(tmp_path / "a").digest != write(tmp_path / "b", b"other weights").digest


def test_a_step_names_its_source_by_digest(tmp_path: Path) -> None:
    source = write(tmp_path / "a")
    step = provenance_step("export-onnx", source, opset=17)
    assert step["source"] == source.digest
    assert step["opset"] == 17
    metadata = model_metadata(source, (*source.provenance, step))
    assert json.loads(metadata["classes"]) == ["cat", "dög"]
    assert json.loads(metadata["provenance"])[1] == step


def test_a_model_that_fails_its_check_leaves_nothing(tmp_path: Path) -> None:
    def refuse(file: Path) -> None:
        file.write_bytes(b"half")
        raise VerificationError("does not answer")

    with pytest.raises(VerificationError):
        write_bundle(
            tmp_path / "onnx-fp32",
            refuse,
            kind="onnx",
            precision="fp32",
            classes=("a",),
            preprocess=PREPROCESS,
            arch="x",
            num_params=0,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "a")
    with pytest.raises(OutputError, match="not empty"):
        write(tmp_path / "a")


def test_a_missing_folder_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"it has no bundle\.json"):
        read_bundle(tmp_path / "nothing")


def test_a_changed_model_file_is_refused(tmp_path: Path) -> None:
    bundle = write(tmp_path / "a")
    bundle.model_path.write_bytes(b"weightz")
    with pytest.raises(BundleError, match="was changed"):
        read_bundle(bundle.path)


def test_a_missing_model_file_is_refused(tmp_path: Path) -> None:
    bundle = write(tmp_path / "a")
    bundle.model_path.unlink()
    with pytest.raises(BundleError, match=r"model\.safetensors is missing"):
        read_bundle(bundle.path)


def sized(height: int, std: float) -> dict[str, object]:
    return {"channels": 1, "height": height, "width": 8, "mean": [0], "std": [std], "resize": "bilinear"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema version 99"),
        ({"kind": "tflite"}, "kind"),
        ({"file": "../secret"}, "file"),
        ({"classes": []}, "classes"),
        ({"model_digest": "abc"}, "model_digest"),
        ({"format": "else"}, "format"),
        ({"surprise": 1}, "surprise"),
        ({"schema_version": -1}, "schema_version"),
        ({"arch": "net\x1b[2J"}, "arch"),
        ({"interface": {"batch": 10**9}}, r"interface\.batch"),
        ({"preprocess": sized(10**6, 1)}, r"preprocess\.height"),
        ({"preprocess": sized(-5, 1)}, r"preprocess\.height"),
        ({"preprocess": sized(8, float("inf"))}, r"preprocess\.std"),
        ({"preprocess": sized(8, 0)}, "a std must be positive"),
        ({"preprocess": {"channels": 3}}, r"preprocess\.height"),
        (
            {"preprocess": {"channels": 3, "height": 8, "width": 8, "mean": [0], "std": [1], "resize": "none"}},
            "1 means",
        ),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    file = write(tmp_path / "a").path / "bundle.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(BundleError, match=message) as caught:
        read_bundle(tmp_path / "a")
    assert caught.value.where == str(file)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b'"text"', b"[" * 100_000])
def test_what_is_not_a_document_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bundle.json").write_bytes(content)
    with pytest.raises(BundleError) as caught:
        read_bundle(tmp_path)
    assert "\n" not in caught.value.what


@pytest.mark.parametrize(
    "fields",
    [
        (0, 8, 8, (), ()),
        (1, 8, 0, (0.0,), (1.0,)),
        (3, 8, 8, (0.0,), (1.0, 1.0, 1.0)),
        (1, 8, 8, (0.0,), (0.0,)),
        (1, 8, 8, (0.0,), (float("nan"),)),
    ],
)
def test_impossible_preprocessing_is_refused(
    fields: tuple[int, int, int, tuple[float, ...], tuple[float, ...]],
) -> None:
    with pytest.raises(BundleError):
        Preprocess(*fields)


def test_images_of_the_right_size_are_not_touched() -> None:
    images = torch.rand(2, 3, 8, 8)
    assert fit_images(images, PREPROCESS) is images


@given(st.integers(4, 40), st.integers(4, 40), st.sampled_from(["bilinear", "bilinear-crop"]))
def test_images_of_any_size_come_out_at_the_networks(height: int, width: int, resize: str) -> None:
    preprocess = Preprocess(1, 9, 6, (0.0,), (1.0,), resize)  # type: ignore[arg-type]
    images = torch.rand(2, 1, height, width)
    fitted = fit_images(images, preprocess)
    assert fitted.shape == (2, 1, 9, 6)
    assert fitted.min() >= -1e-6
    assert fitted.max() <= 1 + 1e-6


def test_a_crop_keeps_the_centre_undistorted() -> None:
    images = torch.zeros(1, 1, 16, 32)
    images[..., 8:24] = 1.0  # the middle half: exactly what a square crop keeps
    preprocess = Preprocess(1, 16, 16, (0.0,), (1.0,), "bilinear-crop")
    assert fit_images(images, preprocess).min() == 1.0
    stretched = fit_images(images, Preprocess(1, 16, 16, (0.0,), (1.0,), "bilinear"))
    assert torch.equal(stretched, F.interpolate(images, [16, 16], mode="bilinear", antialias=True))
    assert stretched.min() == 0.0


def test_images_that_do_not_fit_are_refused_with_both_shapes() -> None:
    with pytest.raises(ShapeError, match="1 × 8 × 8, the network takes 3 × 8 × 8"):
        fit_images(torch.rand(1, 1, 8, 8), PREPROCESS)
    with pytest.raises(ShapeError):
        fit_images(torch.rand(1, 1, 9, 9), Preprocess(1, 8, 8, (0.0,), (1.0,)))


def test_tensors_that_share_memory_are_written_whole(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    write_safetensors(tmp_path / "t", {"b": weight.T, "a": weight, "c": weight[0]})
    found = read_safetensors(tmp_path / "t")
    assert torch.equal(found["a"], weight)
    assert torch.equal(found["b"], weight.T)
    assert torch.equal(found["c"], weight[0])


@pytest.mark.parametrize("content", [b"", b"<html>", bytes(100)])
def test_what_is_not_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(BundleError, match="not a safetensors file"):
        read_safetensors(tmp_path / "t")
