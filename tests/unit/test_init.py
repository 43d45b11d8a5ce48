from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from kdcompress.errors import CheckpointError, DownloadError, InputError, ShapeError
from kdcompress.init import (
    BLOCK_CHOICES,
    InitDecision,
    even_blocks,
    first_and_last_blocks,
    init_from_file,
    init_from_teacher,
    initialise,
    resolve_init,
)
from kdcompress.models import build_network, published_weights, weightless
from kdcompress.networks import Teacher

SIZES: dict[str, Any] = {"num_classes": 5, "in_channels": 3}


def network(name: str, num_classes: int = 5, **arguments: Any) -> nn.Module:
    """Random weights, batch norm's statistics included."""
    built = build_network(name, num_classes=num_classes, **arguments)
    for module in built.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return built


def test_measured_choices() -> None:
    assert first_and_last_blocks(3, 9) == (0, 1, 8)
    assert first_and_last_blocks(3, 5) == (0, 1, 4)
    assert even_blocks(3, 9) == (0, 4, 8)
    assert even_blocks(3, 5) == (0, 2, 4)
    assert even_blocks(4, 9) == (0, 3, 5, 8)
    assert first_and_last_blocks(4, 2) == (0, None, None, 1)
    assert even_blocks(5, 3) == (0, None, 1, None, 2)


@pytest.mark.parametrize("choose", BLOCK_CHOICES.values(), ids=BLOCK_CHOICES)
@given(num_student=st.integers(1, 40), num_teacher=st.integers(1, 40))
def test_choices_keep_order_and_ends(choose: Any, num_student: int, num_teacher: int) -> None:
    chosen = choose(num_student, num_teacher)
    assert len(chosen) == num_student
    taken = [index for index in chosen if index is not None]
    assert taken == sorted(set(taken))
    assert len(taken) == min(num_student, num_teacher)
    assert chosen[0] == 0
    if min(num_student, num_teacher) > 1:
        assert chosen[-1] == num_teacher - 1
    if num_student == num_teacher:
        assert chosen == tuple(range(num_teacher))


@pytest.mark.parametrize(("blocks", "places"), [("first-two-and-last", (0, 1, 8)), ("even", (0, 4, 8))])
def test_blocks_of_a_deeper_teacher(blocks: Any, places: tuple[int, ...]) -> None:
    student, teacher = network("resnet20"), network("resnet56")
    report = init_from_teacher(student, teacher, blocks)
    mine, theirs = student.state_dict(), teacher.state_dict()
    for name, tensor in mine.items():
        layer, _, rest = name.partition(".")
        source = f"{layer}.{places[int(rest[0])]}{rest[1:]}" if layer.startswith("layer") else name
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, theirs[source]), name
    assert (report.copied_tensors, report.copied_parameters, report.not_copied) == (1.0, 1.0, ())
    assert report.blocks == {"layer1": places, "layer2": places, "layer3": places}


def test_the_teacher_keeps_its_own() -> None:
    student, teacher = network("resnet8"), network("resnet14")
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    init_from_teacher(student, teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_head_only_where_class_counts_agree() -> None:
    student, teacher = network("resnet8"), network("resnet14", num_classes=7)
    report = init_from_teacher(student, teacher)
    assert report.not_copied == ("linear.weight", "linear.bias")
    assert 0.9 < report.copied_tensors < 1
    again = init_from_teacher(network("resnet8"), network("resnet14"), copy_head=False)
    assert again.not_copied == ("linear.weight", "linear.bias")


def test_a_norm_is_copied_only_behind_a_layer_that_was() -> None:
    student, teacher = network("resnet8", in_channels=1), network("resnet8", in_channels=3)
    before = student.get_buffer("bn1.running_mean").clone()
    report = init_from_teacher(student, teacher)
    assert {name.split(".")[0] for name in report.not_copied} == {"conv1", "bn1"}
    assert torch.equal(student.get_buffer("bn1.running_mean"), before)
    assert torch.equal(student.get_buffer("layer1.0.bn1.running_mean"), teacher.get_buffer("layer1.0.bn1.running_mean"))


def test_a_shallower_teacher_fills_some_blocks() -> None:
    student, teacher = network("resnet20"), network("resnet14")
    report = init_from_teacher(student, teacher)
    assert report.blocks["layer1"] == (0, None, 1)
    assert {name.partition(".")[2][0] for name in report.not_copied} == {"1"}
    same = teacher.get_buffer("layer2.1.bn2.running_var")
    assert torch.equal(student.get_buffer("layer2.2.bn2.running_var"), same)


def test_stacks_of_other_families() -> None:
    student, teacher = network("resnet18"), network("resnet34")
    report = init_from_teacher(student, teacher)
    assert report.copied_tensors == 1.0
    assert report.blocks == {"layer1": (0, 2), "layer2": (0, 3), "layer3": (0, 5), "layer4": (0, 2)}
    # a VGG's features are no stack of like blocks: nothing is moved to another place
    assert init_from_teacher(network("vgg8", width=8), network("vgg8", width=8)).blocks == {}


def test_nothing_fits() -> None:
    for student, teacher in (
        (network("vgg8", width=8), network("resnet8")),
        (network("resnet8", width=8), network("resnet8")),
    ):
        before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        with pytest.raises(ShapeError, match="no layer of the teacher fits") as caught:
            init_from_teacher(student, teacher)
        assert caught.value.where == "--init teacher"
        assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_file(tmp_path: Path) -> None:
    source, student = network("resnet8"), network("resnet8")
    torch.save({"net": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "a.pt")
    assert init_from_file(student, tmp_path / "a.pt").copied_tensors == 1.0
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(student.eval()(images), source.eval()(images))
    other_task = network("resnet8", num_classes=9)
    assert init_from_file(other_task, tmp_path / "a.pt").not_copied == ("linear.weight", "linear.bias")


def test_file_that_does_not_fit(tmp_path: Path) -> None:
    torch.save(network("resnet8", width=8).state_dict(), tmp_path / "narrow.pt")
    with pytest.raises(
        ShapeError, match=r"conv1\.weight is \(8, 3, 3, 3\) in the file, \(16, 3, 3, 3\) in the student"
    ):
        init_from_file(network("resnet8"), tmp_path / "narrow.pt")
    torch.save(network("resnet8").state_dict(), tmp_path / "shallow.pt")
    with pytest.raises(ShapeError, match=r"layer1\.1\.conv1\.weight is missing in the file") as caught:
        init_from_file(network("resnet14"), tmp_path / "shallow.pt")
    assert str(tmp_path / "shallow.pt") in caught.value.where
    with pytest.raises(CheckpointError, match="no such file"):
        init_from_file(network("resnet8"), tmp_path / "no.pt")


def test_auto_takes_what_there_is_in_this_order() -> None:
    with weightless():
        student, like, unlike = (build_network(name, **SIZES) for name in ("resnet20", "resnet56", "vgg8"))
        smaller = build_network("resnet32", **SIZES)
        published = build_network("resnet18", **SIZES)
    decision = resolve_init("auto", "resnet20", student, [unlike, like, smaller])
    assert (decision.kind, decision.teacher) == ("teacher", 2)  # both fit whole; of these, the smaller
    assert "nobody publishes weights for resnet20" in decision.why
    assert resolve_init("auto", "resnet20", student, [unlike]).kind == "random"
    assert resolve_init("auto", "resnet20", student, []).kind == "random"
    decision = resolve_init("auto", "resnet18", published, [like])
    assert decision.kind == "pretrained"
    assert decision.licence
    assert "BSD" in decision.licence


def test_offline_means_what_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    student = network("squeezenet1_1")
    decision = resolve_init("auto", "squeezenet1_1", student, [student], offline=True)
    assert (decision.kind, decision.teacher) == ("teacher", 0)
    assert "not on this machine" in decision.why
    with pytest.raises(InputError, match="not on this machine"):
        resolve_init("pretrained", "squeezenet1_1", student, [], offline=True)
    published = published_weights("squeezenet1_1")
    assert published is not None
    file = tmp_path / "hub" / "checkpoints" / published.url.rsplit("/", 1)[1]
    file.parent.mkdir(parents=True)
    torch.save(build_network("squeezenet1_1", num_classes=1000).state_dict(), file)
    decision = resolve_init("auto", "squeezenet1_1", student, [student], offline=True)
    assert decision.kind == "pretrained"
    report = initialise(student, decision, arch="squeezenet1_1", arch_args={}, **SIZES)
    assert report.not_copied == ("classifier.1.weight", "classifier.1.bias")
    saved = torch.load(file, weights_only=True)
    assert torch.equal(student.state_dict()["features.0.weight"], saved["features.0.weight"])


def test_failed_download_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for variable in ("http_proxy", "https_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    student = network("squeezenet1_1")
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    decision = resolve_init("pretrained", "squeezenet1_1", student, [])
    with pytest.raises(DownloadError, match="could not be fetched"):
        initialise(student, decision, arch="squeezenet1_1", arch_args={}, **SIZES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_what_is_asked_for(tmp_path: Path) -> None:
    student, small, large = network("resnet8"), network("resnet14"), network("resnet20")
    assert resolve_init("random", "resnet8", student, [large]).kind == "random"
    assert resolve_init("teacher", "resnet8", student, [large, small]).teacher == 1
    assert resolve_init("teacher:1", "resnet8", student, [large, small]).teacher == 0
    (tmp_path / "a.pt").touch()
    assert resolve_init(str(tmp_path / "a.pt"), "resnet8", student, []) == InitDecision(
        "file", "asked for", path=tmp_path / "a.pt"
    )


@pytest.mark.parametrize(
    ("choice", "kind", "message"),
    [
        ("pretrained", InputError, "nobody publishes weights for resnet8"),
        ("teacher:3", InputError, "there are 2 teachers, counted from 1"),
        ("teacher:0", InputError, "there are 2 teachers, counted from 1"),
        ("teacher:x", InputError, "there are 2 teachers"),
        ("teacher:2", ShapeError, "no layer of resnet8 fits teacher 2"),
        ("pretraind", InputError, "no such choice or file"),
    ],
)
def test_what_cannot_be(choice: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        resolve_init(choice, "resnet8", network("resnet8"), [network("resnet14"), network("vgg8", width=8)])


def test_teachers_that_are_not_there() -> None:
    with pytest.raises(InputError, match="no teachers"):
        resolve_init("teacher", "resnet8", network("resnet8"), [])


def test_decisions_are_carried_out(tmp_path: Path) -> None:
    teacher, student = network("resnet14"), network("resnet8")
    torch.save(student.state_dict(), tmp_path / "a.pt")
    more: dict[str, Any] = {"arch": "resnet8", "arch_args": {}, **SIZES}
    untouched = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    report = initialise(student, InitDecision("random", ""), **more)
    assert report.copied_tensors == 0.0
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in student.state_dict().items())
    assert initialise(student, InitDecision("teacher", "", teacher=0), teachers=[teacher], **more).copied_tensors == 1.0
    assert torch.equal(student.get_parameter("layer1.0.conv1.weight"), teacher.get_parameter("layer1.0.conv1.weight"))
    initialise(student, InitDecision("file", "", path=tmp_path / "a.pt"), **more)
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in student.state_dict().items())


@pytest.mark.shared
def test_blocks_of_a_real_teacher_know_something_already(shared_data: Path) -> None:
    """With batch norm's statistics measured again, copied blocks answer far above chance before any training."""
    with zipfile.ZipFile(shared_data / "cifar10.zip") as archive:
        names = sorted(name for name in archive.namelist() if "train/" in name and name.endswith(".webp"))[::100]
        images = np.stack([np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names])
    classes = sorted({name.split("/")[-2] for name in names})
    labels = torch.tensor([classes.index(name.split("/")[-2]) for name in names])
    (file,) = (shared_data / "cifar10_teachers").glob("resnet32-*.th")
    sample = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, labels)
    teacher = Teacher.load(file, measure_on=sample)
    student = build_network("resnet20", num_classes=10)
    assert init_from_teacher(student, teacher.network).copied_tensors == 1.0
    with torch.no_grad():
        logits = student.train()(teacher.normalise(sample[0]))
    assert (logits.argmax(1) == labels).double().mean().item() > 0.3
