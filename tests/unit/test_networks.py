from __future__ import annotations

import copy
import io
import math
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kdcompress.bundle import Preprocess, read_bundle
from kdcompress.errors import BundleError, CheckpointError, InputError, OutputError, ShapeError
from kdcompress.models import build_network
from kdcompress.networks import (
    Student,
    Teacher,
    TeacherEnsemble,
    feature_forms,
    load_student,
    log_mean_probability,
    save_student,
)
from kdcompress.teachers import save_checkpoint
from kdcompress.types import Batch, Predictor

PREPROCESS = Preprocess(3, 8, 8, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
MEAN, STD = (torch.tensor(part)[:, None, None] for part in (PREPROCESS.mean, PREPROCESS.std))


def teacher(name: str = "resnet8", num_classes: int = 4, preprocess: Preprocess = PREPROCESS, **more: Any) -> Teacher:
    network = build_network(name, num_classes=num_classes, in_channels=preprocess.channels, image_size=32)
    return Teacher(network, preprocess, name=more.pop("called", name), **more)


def student(name: str = "resnet8", preprocess: Preprocess = PREPROCESS, **more: Any) -> Student:
    sizes: dict[str, Any] = {"num_classes": 4, "in_channels": preprocess.channels}
    network = build_network(name, image_size=preprocess.height, **sizes)
    return Student(network, preprocess, arch=name, arch_args={}, **sizes, **more)


def batch(images: torch.Tensor) -> Batch:
    count = len(images)
    ids = torch.arange(count)
    return Batch(images, ids, ids, torch.zeros(count, dtype=torch.int64), torch.zeros(count, 4))


def test_teacher_normalises_for_itself() -> None:
    one = teacher()
    images = torch.rand(5, 3, 8, 8)
    outputs = one(images)
    torch.testing.assert_close(outputs.logits, one.network((images - MEAN) / STD))
    assert torch.equal(one.predict(images), outputs.logits)
    assert one.num_classes == 4
    assert one.feature_shapes == {"stage1": (16, 8, 8), "stage2": (32, 4, 4), "stage3": (64, 2, 2)}
    assert {name: value.shape[1:] for name, value in outputs.features.items()} == one.feature_shapes
    assert one.head is not None
    torch.testing.assert_close(one.head(outputs.features["stage3"]), outputs.logits)
    assert isinstance(one.predict, Predictor)


def test_teacher_is_frozen_whatever_is_done_to_it() -> None:
    one = teacher().train()
    ensemble = TeacherEnsemble([one]).train(True)
    before = copy.deepcopy(one.state_dict())
    images = torch.rand(5, 3, 8, 8, requires_grad=True)
    ensemble(images).logits.sum().backward()
    assert not any(module.training for module in ensemble.modules() if module is not ensemble)
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in ensemble.parameters())
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())
    assert images.grad is not None  # what is learned from it may still reach what came before


@pytest.mark.parametrize("resize", ["none", "bilinear"])
def test_other_sizes_are_resized(resize: Any) -> None:
    one = teacher(preprocess=Preprocess(3, 8, 8, PREPROCESS.mean, PREPROCESS.std, resize))
    images = torch.rand(2, 3, 24, 16)
    small = F.interpolate(images, (8, 8), mode="bilinear", antialias=True)
    torch.testing.assert_close(one.predict(images), one.predict(small))


def test_crop_keeps_the_aspect_ratio() -> None:
    one = teacher(preprocess=Preprocess(3, 8, 8, PREPROCESS.mean, PREPROCESS.std, "bilinear-crop"))
    images = torch.rand(2, 3, 16, 32)
    small = F.interpolate(images, (8, 16), mode="bilinear", antialias=True)[..., 4:12]
    torch.testing.assert_close(one.predict(images), one.predict(small))


def test_other_channels_are_refused() -> None:
    for network in (teacher(), student()):
        with pytest.raises(ShapeError, match="images of 1 channels for a network that takes 3"):
            network(torch.rand(2, 1, 8, 8))


def test_ensemble_is_the_log_of_the_mean_probability() -> None:
    members = [teacher("resnet8"), teacher("vgg8"), teacher("dscnn")]
    ensemble = TeacherEnsemble(members)
    images = torch.rand(6, 3, 8, 8)
    outputs = ensemble(images)
    assert outputs.logits.shape == (6, 3, 4)
    assert outputs.teacher_ids == (0, 1, 2)
    for index, member in enumerate(members):
        assert torch.equal(outputs.logits[:, index], member.predict(images))
        assert {k: v.shape[1:] for k, v in outputs.features[index].items()} == member.feature_shapes
    logits = np.stack([member.predict(images).numpy().astype(np.float64) for member in members])
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    mean = (exponentials / exponentials.sum(-1, keepdims=True)).mean(0)
    np.testing.assert_allclose(ensemble.predict(images).numpy(), np.log(mean), rtol=1e-5, atol=1e-6)


@given(scale=st.floats(0.1, 1e4), teachers=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_mean_probabilities_are_a_distribution_at_any_scale(scale: float, teachers: int) -> None:
    logits = scale * torch.randn(3, teachers, 5)
    mean = log_mean_probability(logits)
    torch.testing.assert_close(mean.exp().sum(-1), torch.ones(3))
    torch.testing.assert_close(log_mean_probability(logits.flip(1)), mean)


def test_teachers_of_different_tasks_are_refused() -> None:
    one = teacher(path=Path("a.pt"))
    with pytest.raises(ShapeError, match="teachers with 4 and 7 classes") as caught:
        TeacherEnsemble([one, teacher(num_classes=7, path=Path("b.pt"))])
    assert "a.pt and b.pt" in caught.value.where
    cats = teacher(classes=("ant", "bee", "cat", "dog"))
    TeacherEnsemble([one, cats])
    with pytest.raises(ShapeError, match="class 1 is 'bee' and 'cat'"):
        TeacherEnsemble([cats, one, teacher(classes=("ant", "cat", "bee", "dog"))])
    with pytest.raises(ShapeError, match="no teachers"):
        TeacherEnsemble([])


def test_the_names_of_wanted_maps() -> None:
    stages = ("stage1", "stage2", "stage3")
    assert feature_forms(stages, {"*": "pooled"}) == dict.fromkeys(stages, "pooled")
    assert feature_forms(stages, {"last": "map"}) == {"stage3": "map"}
    assert feature_forms((), {"*": "map", "last": "map"}) == {}
    with pytest.raises(ShapeError, match="did you mean 'stage3'"):
        feature_forms(stages, {"stage4": "map"})


@pytest.mark.parametrize("arch", ["resnet8", "mnasnet0_5"])
def test_teacher_from_a_checkpoint(arch: str, tmp_path: Path) -> None:
    network = build_network(arch, num_classes=4).eval()
    save_checkpoint(
        tmp_path / "a.pt",
        network,
        arch=arch,
        arch_args={},
        num_classes=4,
        in_channels=3,
        classes=tuple("abcd"),
        preprocess=PREPROCESS,
        training_digests=torch.tensor([3, 1]),
    )
    one = Teacher.load(tmp_path / "a.pt")
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(one.predict(images), network((images - MEAN) / STD))
    assert (one.name, one.classes, one.path) == (arch, tuple("abcd"), tmp_path / "a.pt")
    assert one.training_digests is not None
    assert one.training_digests.tolist() == [1, 3]


def test_a_teacher_has_the_name_and_the_stages_it_is_given(tmp_path: Path) -> None:
    torch.save(build_network("resnet8", num_classes=4).state_dict(), tmp_path / "a.pt")
    one = Teacher.load(tmp_path / "a.pt", preprocess=PREPROCESS, name="first", stages=("layer2",))
    assert (one.name, one.feature_shapes) == ("first", {"stage1": (32, 4, 4)})


def test_file_that_does_not_state_its_normalisation(tmp_path: Path) -> None:
    torch.save(build_network("resnet8", num_classes=4).state_dict(), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="does not state its normalisation"):
        Teacher.load(tmp_path / "a.pt")
    assert Teacher.load(tmp_path / "a.pt", preprocess=PREPROCESS).preprocess == PREPROCESS
    sample = (torch.rand(20, 3, 8, 8), torch.arange(20) % 4)
    measured = Teacher.load(tmp_path / "a.pt", measure_on=sample)
    assert measured.preprocessing_fit is not None
    assert measured.preprocess.mean == measured.preprocessing_fit.mean


def test_networks_without_maps_have_none() -> None:
    shape = Preprocess(3, 32, 32, (0.5,) * 3, (0.5,) * 3)
    one = teacher("vit_b_32", preprocess=shape)
    assert one(torch.rand(1, 3, 32, 32)).features == {}
    assert one.head is None
    assert one.feature_shapes == {}


def test_student_trains_and_its_head_is_no_backbone() -> None:
    one = student().train()
    one(torch.rand(4, 3, 8, 8)).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in one.parameters())
    linear = one.network.get_submodule("linear")
    backbone = list(one.backbone_parameters())
    assert len(backbone) == len(list(one.parameters())) - 2
    assert not {id(p) for p in backbone} & {id(p) for p in linear.parameters()}
    assert one.num_params == sum(parameter.numel() for parameter in one.network.parameters())
    twin = copy.deepcopy(one)
    assert {id(p) for p in twin.backbone_parameters()} <= {id(p) for p in twin.parameters()}


def test_student_keeps_the_stages_it_is_given() -> None:
    assert student(stages=("layer1.0", "pool")).feature_shapes == {"stage1": (16, 8, 8), "stage2": (64, 1, 1)}
    with pytest.raises(InputError, match="unknown module path 'layer9'"):
        student(stages=("layer9",))


def test_student_that_is_not_what_it_says() -> None:
    network = build_network("resnet8", num_classes=4)
    with pytest.raises(ShapeError, match="answers with 4 classes, 5 are wanted"):
        Student(network, PREPROCESS, arch="resnet8", arch_args={}, num_classes=5, in_channels=3)
    with pytest.raises(ShapeError, match="takes 1 channels, its images have 3"):
        Student(network, PREPROCESS, arch="resnet8", arch_args={}, num_classes=4, in_channels=1)


def test_building_a_student_changes_nothing_in_it() -> None:
    network = build_network("resnet8", num_classes=4).train()
    before = copy.deepcopy(network.state_dict())
    Student(network, PREPROCESS, arch="resnet8", arch_args={}, num_classes=4, in_channels=3)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_deployable_is_a_plain_frozen_copy() -> None:
    one = student().train()
    for _ in range(2):
        one(torch.rand(8, 3, 8, 8))
    shipped = one.deployable()
    images = torch.rand(3, 3, 8, 8)
    torch.testing.assert_close(shipped(images), one.eval()(images).logits)
    assert not any(module.training or module._forward_hooks for module in shipped.modules())
    assert not any(parameter.requires_grad for parameter in shipped.parameters())
    with torch.no_grad():
        next(one.parameters()).add_(1)
    assert not torch.allclose(shipped(images), one(images).logits)
    half = student().half().deployable()
    assert all(parameter.dtype == torch.float32 for parameter in half.parameters())


@pytest.mark.parametrize("name", ["resnet8", "vgg8", "dscnn"])
def test_deployable_exports_to_onnx(name: str, tmp_path: Path) -> None:
    import onnxruntime

    shipped = student(name).eval().deployable()
    images = torch.rand(3, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"images": {0: torch.export.Dim("batch")}}
        torch.onnx.export(
            shipped,
            (images[:2],),
            tmp_path / "a.onnx",
            input_names=["images"],
            dynamo=True,
            dynamic_shapes=axes,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    (logits,) = session.run(None, {"images": images.numpy()})
    np.testing.assert_allclose(logits, shipped(images).numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet8", "mobilenet_v3_small", "mnasnet0_5"])
def test_saved_student_answers_bit_for_bit(name: str, tmp_path: Path) -> None:
    preprocess = Preprocess(3, 32, 32, (0.5,) * 3, (0.5,) * 3)
    one = student(name, preprocess)
    one.train()(torch.rand(4, 3, 32, 32))
    bundle = save_student(
        one.eval(),
        tmp_path / "student",
        classes=tuple("abcd"),
        provenance=({"step": "distill"},),
        training_digests=torch.tensor([1, 2]),
    )
    again = load_student(read_bundle(tmp_path / "student"))
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(again(images).logits, one(images).logits)
    assert (bundle.kind, bundle.arch, bundle.num_params) == ("torch", name, one.num_params)
    assert again.feature_shapes == one.feature_shapes
    assert not again.training
    with pytest.raises(OutputError, match="not empty"):
        save_student(one, tmp_path / "student", classes=tuple("abcd"))
    with pytest.raises(ShapeError, match="2 class names"):
        save_student(one, tmp_path / "other", classes=("a", "b"))


def test_bundle_whose_weights_do_not_fit(tmp_path: Path) -> None:
    save_student(student(), tmp_path / "student", classes=tuple("abcd"))
    file = tmp_path / "student" / "bundle.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"resnet8"', '"resnet14"'), encoding="utf-8")
    with pytest.raises(BundleError, match="do not fit resnet14"):
        load_student(read_bundle(tmp_path / "student"))


def read_part(archive: zipfile.ZipFile, part: str, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    names = sorted(name for name in archive.namelist() if f"{part}/" in name and name.endswith(".webp"))
    classes = sorted({name.split("/")[-2] for name in names})
    names = names[::step]
    images = np.stack([np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names])
    labels = torch.tensor([classes.index(name.split("/")[-2]) for name in names])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, labels


@pytest.mark.shared
@pytest.mark.slow
def test_published_teachers_are_as_accurate_as_measured_by_others(shared_data: Path) -> None:
    with zipfile.ZipFile(shared_data / "cifar10.zip") as archive:
        sample, (images, labels) = read_part(archive, "train", 97), read_part(archive, "test", 1)
    files = sorted((shared_data / "cifar10_teachers").glob("*.th"))
    teachers = [Teacher.load(file, measure_on=sample) for file in files]
    parts = images.split(500)
    right = {one.name: torch.cat([one.predict(part) for part in parts]) for one in teachers}
    accuracy = {name: 100 * (logits.argmax(1) == labels).double().mean().item() for name, logits in right.items()}
    wanted = {"resnet20": 91.73, "resnet32": 92.63, "resnet44": 93.10, "resnet56": 93.39}
    assert accuracy == pytest.approx(wanted, abs=0.005)
    together = log_mean_probability(torch.stack([right[name] for name in ("resnet32", "resnet44", "resnet56")], 1))
    assert math.isclose(100 * (together.argmax(1) == labels).double().mean().item(), 94.39, abs_tol=0.005)
