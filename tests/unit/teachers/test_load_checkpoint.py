"""Files as other people write them, good and bad."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kdcompress.bundle import Preprocess, write_bundle, write_safetensors
from kdcompress.errors import CheckpointError, InputError
from kdcompress.models import build_network
from kdcompress.teachers import build_from, load_checkpoint, save_checkpoint

PREPROCESS = Preprocess(3, 8, 8, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
CLASSES = ("ant", "bee", "cat", "dog")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return build_network("resnet8", num_classes=4).eval()


def assert_same(path: str | Path, network: nn.Module) -> None:
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(build_from(load_checkpoint(path))(images), network(images), rtol=1e-3, atol=1e-3)


Wrap = Callable[[dict[str, Tensor]], Any]
WRAPPED: dict[str, Wrap] = {
    "bare": lambda weights: weights,
    "state_dict": lambda weights: {"epoch": 3, "state_dict": weights, "optimizer": {"state": {}, "param_groups": []}},
    "net, as data parallel saves it": lambda weights: {"net": {f"module.{k}": v for k, v in weights.items()}},
    "model, compiled in data parallel": lambda w: {
        "model": OrderedDict((f"module._orig_mod.{k}", v) for k, v in w.items())
    },
    "averaged": lambda w: {"n_averaged": torch.tensor(3)} | {f"module.{k}": v for k, v in w.items()},
    "inside an unknown key": lambda weights: {"best": {"weights": weights}},
    "half precision": lambda w: {k: v.half() if v.is_floating_point() else v for k, v in w.items()},
    "without counters": lambda w: {k: v for k, v in w.items() if not k.endswith("num_batches_tracked")},
    "with the script's options": lambda w: {
        "state_dict": w,
        "args": argparse.Namespace(lr=0.1, out=Path("runs")),
        "best": np.float64(0.5),
        "step": np.int64(7),
    },
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_state_dicts_by_other_hands_are_recognised(
    tmp_path: Path, network: nn.Module, wrap: Wrap, zipped: bool
) -> None:
    torch.save(wrap(network.state_dict()), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    checkpoint = load_checkpoint(tmp_path / "a.pth")
    assert (checkpoint.arch, checkpoint.num_classes, checkpoint.in_channels) == ("resnet8", 4, 3)
    assert checkpoint.preprocess is None
    assert all(
        not value.is_floating_point() or value.dtype == torch.float32 for value in checkpoint.state_dict.values()
    )
    assert_same(tmp_path / "a.pth", network)


def test_remarks_and_class_names_are_kept(tmp_path: Path, network: nn.Module) -> None:
    weights = network.state_dict()
    indices = {name: index for index, name in enumerate(CLASSES)}
    torch.save({"state_dict": weights, "class_to_idx": indices, "best_prec1": np.float64(93.5)}, tmp_path / "a.pt")
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    assert checkpoint.classes == CLASSES
    assert checkpoint.metadata == {"best_prec1": 93.5}


def test_wrong_number_of_class_names(tmp_path: Path, network: nn.Module) -> None:
    torch.save({"state_dict": network.state_dict(), "classes": ["a", "b"]}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="names 2 classes, its head has 4"):
        load_checkpoint(tmp_path / "a.pt")


def test_safetensors(tmp_path: Path, network: nn.Module) -> None:
    save_file(dict(network.state_dict()), tmp_path / "a.safetensors", {"author": "me"})
    assert_same(tmp_path / "a.safetensors", network)
    assert load_checkpoint(tmp_path / "a.safetensors").metadata == {"author": "me"}


@pytest.mark.parametrize(
    ("arch", "arguments"),
    [("vit_b_32", {}), ("timm/vit_tiny_patch16_224", {"patch_size": 8, "depth": 1, "embed_dim": 12, "num_heads": 3})],
)
def test_vision_transformers_of_another_size_than_published(
    tmp_path: Path, arch: str, arguments: dict[str, int]
) -> None:
    """Their weights fit one image size alone, which is what the file says of its images."""
    pytest.importorskip("timm")
    network = build_network(arch, num_classes=4, image_size=64, **arguments).eval()
    content = {"arch": arch, "arch_args": arguments, "num_classes": 4, "in_channels": 3, "classes": CLASSES}
    preprocess = Preprocess(3, 64, 64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    save_checkpoint(tmp_path / "a.pt", network, preprocess=preprocess, **content)
    found = load_checkpoint(tmp_path / "a.pt")
    assert found.arch_args == arguments
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(build_from(found)(images), network(images))


def test_the_size_of_a_bare_vision_transformer_of_timm(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    network = build_network("timm/vit_tiny_patch16_224", num_classes=4, image_size=48).eval()
    torch.save(network.state_dict(), tmp_path / "a.pt")
    found = load_checkpoint(f"timm/vit_tiny_patch16_224:{tmp_path}/a.pt")
    assert found.arch_args == {"image_size": 48}
    images = torch.rand(2, 3, 48, 48)
    assert torch.equal(build_from(found)(images), network(images))


def test_own_checkpoint_says_everything(tmp_path: Path) -> None:
    network = build_network("dscnn", num_classes=4, width=8).eval()
    digests = torch.tensor([5, -3, 9, 5])
    save_checkpoint(
        tmp_path / "deep" / "a.pt",
        network,
        arch="dscnn",
        arch_args={"width": 8},
        num_classes=4,
        in_channels=3,
        classes=CLASSES,
        preprocess=PREPROCESS,
        training_digests=digests,
        licence="CC0",
        metadata={"epochs": 3, "sizes": (1, 2)},
    )
    found = load_checkpoint(tmp_path / "deep" / "a.pt")
    assert (found.arch, found.arch_args, found.num_classes, found.in_channels) == ("dscnn", {"width": 8}, 4, 3)
    assert (found.classes, found.preprocess, found.licence) == (CLASSES, PREPROCESS, "CC0")
    assert found.training_digests is not None
    assert found.training_digests.tolist() == [-3, 5, 9]
    assert found.metadata == {"epochs": 3, "sizes": [1, 2]}
    assert_same(tmp_path / "deep" / "a.pt", network)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["a.pt"]


def test_own_checkpoint_that_is_damaged_or_of_tomorrow(tmp_path: Path, network: nn.Module) -> None:
    path = tmp_path / "a.pt"
    sizes: dict[str, Any] = {"num_classes": 4, "in_channels": 3, "classes": None, "preprocess": PREPROCESS}
    save_checkpoint(path, network, arch="resnet8", arch_args={}, **sizes)
    content = torch.load(path, weights_only=True)
    torch.save(content | {"version": 2}, path)
    with pytest.raises(CheckpointError, match="version 2, this kdcompress reads 1"):
        load_checkpoint(path)
    torch.save({key: value for key, value in content.items() if key != "arch"}, path)
    with pytest.raises(CheckpointError, match="damaged kdcompress checkpoint: arch"):
        load_checkpoint(path)
    torch.save(content | {"preprocess": content["preprocess"] | {"std": [1.0]}}, path)
    with pytest.raises(CheckpointError, match="1 stds"):
        load_checkpoint(path)
    torch.save(content | {"arch": "resnet14"}, path)
    with pytest.raises(CheckpointError, match=r"do not fit resnet14: layer1\.1\.conv1\.weight is missing"):
        load_checkpoint(path)


def test_bundles_and_runs_are_teachers_too(tmp_path: Path, network: nn.Module) -> None:
    write_bundle(
        tmp_path / "run" / "student",
        lambda file: write_safetensors(file, network.state_dict()),
        kind="torch",
        precision="fp32",
        classes=CLASSES,
        preprocess=PREPROCESS,
        arch="resnet8",
        num_params=1,
        training_digests=torch.tensor([1, 2]),
    )
    for path in (tmp_path / "run", tmp_path / "run" / "student"):
        checkpoint = load_checkpoint(path)
        assert (checkpoint.classes, checkpoint.preprocess) == (CLASSES, PREPROCESS)
        assert checkpoint.training_digests is not None
        assert_same(path, network)
    with pytest.raises(CheckpointError, match="without a bundle"):
        load_checkpoint(tmp_path)


def test_named_architecture_and_whole_names(tmp_path: Path, network: nn.Module) -> None:
    torch.save(network.state_dict(), tmp_path / "a.pt")
    assert load_checkpoint(f"resnet8:{tmp_path}/a.pt").arch == "resnet8"
    with pytest.raises(CheckpointError, match="do not fit resnet14"):
        load_checkpoint(f"resnet14:{tmp_path}/a.pt")
    with pytest.raises(CheckpointError, match="do not fit vgg11"):
        load_checkpoint(f"vgg11:{tmp_path}/a.pt")
    with pytest.raises(InputError, match="unknown network 'resnet9'"):
        load_checkpoint(f"resnet9:{tmp_path}/a.pt")
    whole = tmp_path / "resnet14:a.pt"
    torch.save(network.state_dict(), whole)
    assert load_checkpoint(str(whole)).arch == "resnet8"  # the file of that whole name wins


def test_weights_of_timm_by_name(tmp_path: Path) -> None:
    network = build_network("timm/test_byobnet", num_classes=4).eval()
    torch.save({"arch": "test_byobnet", "state_dict": network.state_dict()}, tmp_path / "a.pt")
    assert load_checkpoint(tmp_path / "a.pt").arch == "timm/test_byobnet"
    torch.save(network.state_dict(), tmp_path / "b.pt")
    checkpoint = load_checkpoint(f"timm/test_byobnet:{tmp_path}/b.pt")
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(build_from(checkpoint)(images), network(images))


def test_torchvision_file_with_auxiliary_heads_and_old_names(tmp_path: Path) -> None:
    densenet = build_network("densenet121", num_classes=4).eval()
    old = {key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): v for key, v in densenet.state_dict().items()}
    torch.save(old, tmp_path / "densenet.pth")
    checkpoint = load_checkpoint(tmp_path / "densenet.pth")
    assert checkpoint.arch == "densenet121"
    images = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(build_from(checkpoint)(images), densenet(images))


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle protocol 2", "pickle protocol 5"])
def test_code_in_a_file_is_refused_by_name_and_never_run(tmp_path: Path, network: nn.Module, kind: str) -> None:
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    content = {"x": Malicious(trace), "state_dict": network.state_dict()}
    if kind.startswith("pickle"):
        path.write_bytes(pickle.dumps(Malicious(trace), protocol=int(kind[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match=r"refused: .*posix\.system.*nothing was run") as caught:
        load_checkpoint(path)
    assert not trace.exists()
    assert caught.value.where == str(path)
    pickle.loads(pickle.dumps(Malicious(trace)))
    assert trace.exists()  # it would have worked


def test_whole_networks_are_refused_by_name(tmp_path: Path, network: nn.Module) -> None:
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"refused: .*torch\.nn\.modules\.container\.Sequential") as caught:
        load_checkpoint(tmp_path / "a.pt")
    assert "state_dict()" in caught.value.fix


def _truncated(network: nn.Module, keep: float, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()[: int(keep * buffer.tell())]


def _archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("picture.txt", "no weights")
    return buffer.getvalue()


def _saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


BAD: dict[str, tuple[Callable[[nn.Module], bytes], str]] = {
    "empty": (lambda _: b"", "empty"),
    "web page": (lambda _: b"\n<!DOCTYPE html><html>Sign in</html>", "web page"),
    "lfs pointer": (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
    "text": (lambda _: b"hello", "starts with b'hello'"),
    "half a zip": (lambda network: _truncated(network, 0.5, True), "truncated"),
    "start of a zip": (lambda network: _truncated(network, 0.001, True), "truncated"),
    "half a legacy file": (lambda network: _truncated(network, 0.5, False), "truncated"),
    "start of a legacy file": (lambda network: _truncated(network, 0.001, False), "truncated"),
    "another archive": (lambda _: _archive(), "not a torch checkpoint"),
    "half safetensors": (lambda _: (1000).to_bytes(8, "little") + b'{"a": {', "safetensors file is truncated"),
    "a list": (lambda _: _saved([1, 2]), "no state dict in it"),
    "no weights": (lambda _: _saved({"epoch": 3}), "no state dict in it .*epoch"),
    "unknown weights": (lambda _: _saved({"a.w": torch.zeros(2, 2), "b.w": torch.zeros(2)}), "fit none of the"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_bad_files(tmp_path: Path, network: nn.Module, make: Callable[[nn.Module], bytes], message: str) -> None:
    path = tmp_path / "bad.pt"
    path.write_bytes(make(network))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert str(path) in caught.value.where
    assert "\n" not in caught.value.what


def test_missing_file(tmp_path: Path) -> None:
    for spec in (tmp_path / "no.pt", f"resnet20:{tmp_path}/no.pt"):
        with pytest.raises(CheckpointError, match="no such file"):
            load_checkpoint(spec)
