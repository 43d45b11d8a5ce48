"""Teacher, TeacherEnsemble, Student: networks that take images in [0, 1] and normalise and resize for themselves."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor, nn

from kdcompress.bundle import Bundle, Preprocess, Resize, read_safetensors, write_bundle, write_safetensors
from kdcompress.errors import BundleError, CheckpointError, ShapeError, unknown_name
from kdcompress.models import build_network, load_weights
from kdcompress.resizing import cover_and_cut
from kdcompress.taps import Tapped, eval_mode, find_classifier, find_stages, split_head
from kdcompress.teachers import LoadedCheckpoint, build_from, load_checkpoint
from kdcompress.teachers.preprocessing import PreprocessingFit, measure_preprocessing
from kdcompress.types import (
    EnsembleOutputs,
    FeatureForm,
    FeatureShape,
    Head,
    Images,
    Labels,
    Logits,
    Outputs,
)


class Normalise(nn.Module):
    """Images in [0, 1] -> what a network was trained on: `(images - mean) / std` per channel. It has no weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        for name, values in (("mean", preprocess.mean), ("std", preprocess.std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: Images) -> Images:
        """Normalised images."""
        return (images - self.mean) / self.std


class Deployable(nn.Module):
    """What is shipped: images in [0, 1], of the size in `bundle.json`, -> logits. Normalises, does not resize."""

    def __init__(self, network: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        self.normalise = Normalise(preprocess)
        self.network = network

    def forward(self, images: Images) -> Logits:
        """Logits of images in [0, 1]."""
        logits: Tensor = self.network(self.normalise(images))
        return logits


class Teacher(nn.Module):
    """A trained network that does not change: no gradients for its weights, always in eval mode.

    Args:
        network: bare, on any device; frozen from here on.
        preprocess: its size and normalisation.
        name: what reports call it.
        classes: the class names in the order of the logits, where known.
        training_digests: sorted digests of the images it was trained on, where known.
        stages: module paths of its feature maps "stage1" …; None: found (`taps.find_stages`).
        path: the file it came from, for messages.

    Raises:
        ShapeError: the network does not take images of this size.
        InputError: a module path does not exist.
    """

    def __init__(
        self,
        network: nn.Module,
        preprocess: Preprocess,
        *,
        name: str,
        classes: tuple[str, ...] | None = None,
        training_digests: Int64[Tensor, " images"] | None = None,
        stages: tuple[str, ...] | None = None,
        path: Path | None = None,
    ) -> None:
        super().__init__()
        network.requires_grad_(False).eval()
        stages = find_stages(network, preprocess.image_shape) if stages is None else stages
        self.tapped = Tapped(network, stages)
        self.normalise = Normalise(preprocess)
        self.preprocess = preprocess
        self.name = name
        self.classes = classes
        self.training_digests = training_digests
        self.path = path
        self.checkpoint: LoadedCheckpoint | None = None
        self.preprocessing_fit: PreprocessingFit | None = None
        self.num_classes, self.feature_shapes = _shapes(self.tapped, preprocess)
        self.eval()

    @classmethod
    def load(
        cls,
        spec: str | Path,
        *,
        preprocess: Preprocess | None = None,
        measure_on: tuple[Images, Labels] | None = None,
        name: str | None = None,
        stages: tuple[str, ...] | None = None,
    ) -> Teacher:
        """Opens a checkpoint, `PATH` or `ARCH:PATH`.

        Args:
            spec: see `teachers.load_checkpoint`.
            preprocess: size and normalisation; None: what the file says, else measured.
            measure_on: some hundred labelled images in [0, 1] to measure the normalisation on, where the file does not
                state it. The outcome stays in `preprocessing_fit`.
            name: None: the architecture's name.
            stages: as for the class.

        Raises:
            CheckpointError: the file cannot be used, or does not state its normalisation and nothing is there to
                measure it on.
            InputError: no network has the name given.
            ShapeError: the network does not take such images.
        """
        checkpoint = load_checkpoint(spec)
        network = build_from(checkpoint)
        fit = None
        preprocess = preprocess or checkpoint.preprocess
        if preprocess is None:
            if measure_on is None:
                raise CheckpointError(
                    "the file does not state its normalisation",
                    where=str(checkpoint.path),
                    fix="state mean and std, or give labelled images to measure it on",
                )
            images, labels = measure_on
            size = checkpoint.arch_args.get("image_size")
            height, width = (size, size) if size is not None else images.shape[-2:]
            resize: Resize = "none" if (height, width) == images.shape[-2:] else "bilinear"
            fit = measure_preprocessing(network, _resized(images, height, width), labels)
            preprocess = Preprocess(checkpoint.in_channels, height, width, fit.mean, fit.std, resize)
        teacher = cls(
            network,
            preprocess,
            name=name or checkpoint.arch,
            classes=checkpoint.classes,
            training_digests=checkpoint.training_digests,
            stages=stages,
            path=checkpoint.path,
        )
        teacher.checkpoint = checkpoint
        teacher.preprocessing_fit = fit
        return teacher

    @property
    def network(self) -> nn.Module:
        """The bare network."""
        return self.tapped.network

    @cached_property
    def head(self) -> Head | None:
        """Its classifier alone: last feature map -> logits, with its frozen weights; None if it cannot be split off."""
        if not self.tapped.paths:
            return None
        return split_head(self.network, self.tapped.paths[-1], self.preprocess.image_shape)

    def train(self, mode: bool = True) -> Teacher:
        """Keeps eval mode, whatever is asked."""
        return super().train(False)

    def forward(self, images: Images) -> Outputs:
        """Logits and feature maps of images in [0, 1] of any size.

        Raises:
            ShapeError: the images have another number of channels.
        """
        logits, features = self.tapped(self._normalised(images))
        return Outputs(logits, features)

    def predict(self, images: Images) -> Logits:
        """Logits of images in [0, 1], without gradient: a `Predictor`."""
        with torch.no_grad():
            logits: Tensor = self.network(self._normalised(images))
        return logits

    def _normalised(self, images: Images) -> Tensor:
        """What the network takes, in the precision of its weights."""
        normalised: Tensor = self.normalise(_fitted(images, self.preprocess))
        weight = next(self.network.parameters(), normalised)
        return normalised.to(weight.dtype)


class TeacherEnsemble(nn.Module):
    """Several teachers that answer together.

    Args:
        teachers: one or more, of the same classes.

    Raises:
        ShapeError: two teachers have different class counts, or name their classes differently.
    """

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        super().__init__()
        if not teachers:
            raise ShapeError("an ensemble of no teachers", where="--teachers", fix="give at least one checkpoint")
        for other in teachers[1:]:
            _check_same_classes(teachers[0], other)
        self.members = nn.ModuleList(teachers)
        self.num_classes = teachers[0].num_classes
        self.eval()

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        """The teachers, in the order given."""
        return tuple(member for member in self.members if isinstance(member, Teacher))

    def train(self, mode: bool = True) -> TeacherEnsemble:
        """Keeps eval mode, whatever is asked."""
        return super().train(False)

    def forward(self, images: Images) -> EnsembleOutputs:
        """What each teacher says of images in [0, 1]: logits `batch teachers classes`, and feature maps."""
        outputs = [teacher(images) for teacher in self.teachers]
        return EnsembleOutputs(
            logits=torch.stack([output.logits for output in outputs], dim=1),
            features=tuple(output.features for output in outputs),
            teacher_ids=tuple(range(len(outputs))),
        )

    def predict(self, images: Images) -> Logits:
        """The log of the mean probability, without gradient: a `Predictor`."""
        return log_mean_probability(torch.stack([teacher.predict(images) for teacher in self.teachers], dim=1))


def log_mean_probability(logits: Tensor) -> Tensor:
    """`batch teachers classes` -> `batch classes`: the log of the probabilities' mean over the teachers, in fp32."""
    return logits.float().log_softmax(-1).logsumexp(1) - math.log(logits.shape[1])


def feature_forms(stages: Sequence[str], wanted: Mapping[str, FeatureForm]) -> dict[str, FeatureForm]:
    """The maps of one teacher that a method gets, and their form.

    Args:
        stages: the names of its feature maps, in order.
        wanted: `Needs.teacher_features`.

    Raises:
        ShapeError: a map is wanted that the teacher does not have.
    """
    found: dict[str, FeatureForm] = {}
    for name, form in wanted.items():
        names = tuple(stages) if name == "*" else tuple(stages[-1:]) if name == "last" else (name,)
        for stage in names:
            if stage not in stages:
                raise ShapeError(unknown_name("feature map of a teacher", stage, stages))
            found[stage] = form
    return found


class Student(nn.Module):
    """A network that is trained.

    Args:
        network: bare.
        preprocess: its size and normalisation.
        arch: name for `models.build_network`, by which it can be built again.
        arch_args: its further arguments.
        num_classes: size of its logits.
        in_channels: channels of its images.
        stages: module paths of its feature maps "stage1" …; None: found (`taps.find_stages`).

    Raises:
        ShapeError: the network does not take such images, or answers with another number of classes.
        InputError: a module path does not exist.
    """

    def __init__(
        self,
        network: nn.Module,
        preprocess: Preprocess,
        *,
        arch: str,
        arch_args: Mapping[str, Any],
        num_classes: int,
        in_channels: int,
        stages: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__()
        if in_channels != preprocess.channels:
            raise ShapeError(f"{arch} takes {in_channels} channels, its images have {preprocess.channels}")
        stages = find_stages(network, preprocess.image_shape) if stages is None else stages
        self.tapped = Tapped(network, stages)
        self.normalise = Normalise(preprocess)
        self.preprocess = preprocess
        self.arch = arch
        self.arch_args = dict(arch_args)
        self.in_channels = in_channels
        self.num_classes, self.feature_shapes = _shapes(self.tapped, preprocess)
        if self.num_classes != num_classes:
            raise ShapeError(f"{arch} answers with {self.num_classes} classes, {num_classes} are wanted")

    @property
    def network(self) -> nn.Module:
        """The bare network."""
        return self.tapped.network

    @property
    def num_params(self) -> int:
        """Parameters of the network, without batch norm's statistics."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    def forward(self, images: Images) -> Outputs:
        """Logits and feature maps of images in [0, 1] of any size.

        Raises:
            ShapeError: the images have another number of channels.
        """
        logits, features = self.tapped(self.normalise(_fitted(images, self.preprocess)))
        return Outputs(logits, features)

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """All parameters but those of the layer that makes the logits."""
        head = {id(parameter) for parameter in self._classifier_parameters}
        return (parameter for parameter in self.parameters() if id(parameter) not in head)

    @cached_property
    def _classifier_parameters(self) -> tuple[nn.Parameter, ...]:
        path = find_classifier(self.network, self.preprocess.image_shape)
        return () if path is None else tuple(self.network.get_submodule(path).parameters())

    def synchronised(self) -> Student:
        """A copy whose batch norms take their statistics over the images of all processes that train together."""
        network = copy.deepcopy(self.tapped).release()
        return Student(
            nn.SyncBatchNorm.convert_sync_batchnorm(network),  # type: ignore[no-untyped-call]
            self.preprocess,
            arch=self.arch,
            arch_args=self.arch_args,
            num_classes=self.num_classes,
            in_channels=self.in_channels,
            stages=self.tapped.paths,
        )

    def frozen_copy(self, name: str) -> Teacher:
        """Itself as it is now, as a teacher that does not change: its own pre-trained copy in self-distillation."""
        network = copy.deepcopy(self.tapped).release()
        for parameter in network.parameters():
            parameter.grad = None
        teacher = Teacher(network, self.preprocess, name=name, stages=self.tapped.paths)
        return teacher.to(next(self.normalise.buffers()).device)

    def deployable(self) -> Deployable:
        """A frozen fp32 copy in eval mode: images in [0, 1] of its own size -> logits, normalisation inside."""
        network = copy.deepcopy(self.tapped).release()
        for parameter in network.parameters():
            parameter.grad = None
        shipped = Deployable(network, self.preprocess).to(next(self.normalise.buffers()).device)
        return shipped.float().eval().requires_grad_(False)


def save_student(
    student: Student,
    path: Path,
    *,
    classes: Sequence[str],
    provenance: Sequence[Mapping[str, Any]] = (),
    training_digests: Int64[Tensor, " images"] | None = None,
    replace: bool = False,
) -> Bundle:
    """Writes a student as a torch bundle: safetensors, architecture, preprocessing. Atomic.

    Args:
        student: what to write; its bare network's weights are kept, in fp32.
        path: the folder to make.
        classes: the class names in the order of the logits.
        provenance: the steps that led here (`bundle.provenance_step`).
        training_digests: sorted digests of the images it was trained on, its start included.
        replace: take the place of an existing folder.

    Raises:
        ShapeError: the number of names is not the number of classes.
        OutputError: the place is taken or cannot be written to.
        RunError: the disk is full.
    """
    if len(classes) != student.num_classes:
        raise ShapeError(f"{len(classes)} class names for a student of {student.num_classes} classes")
    weights = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in student.network.state_dict().items()
    }
    return write_bundle(
        path,
        lambda file: write_safetensors(file, weights),
        kind="torch",
        precision="fp32",
        classes=tuple(classes),
        preprocess=student.preprocess,
        arch=student.arch,
        arch_args=student.arch_args,
        num_params=student.num_params,
        provenance=tuple(provenance),
        training_digests=training_digests,
        replace=replace,
    )


def load_student(bundle: Bundle) -> Student:
    """Builds the student of a torch bundle again, in eval mode.

    Raises:
        BundleError: it is no torch bundle, or its weights do not fit the architecture it names.
        InputError: this kdcompress has no such network.
    """
    if bundle.kind != "torch":
        fix = "give the torch bundle it was made from: student/ in the run"
        raise BundleError(f"a bundle of kind {bundle.kind}, a torch bundle is needed", where=str(bundle.path), fix=fix)
    channels = bundle.preprocess.channels
    arguments = {"image_size": bundle.preprocess.height, **bundle.arch_args}
    try:
        network = build_network(bundle.arch, num_classes=bundle.num_classes, in_channels=channels, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:  # of arguments that a network does not take, or cannot be of
        what = f"{bundle.arch} is not built with {dict(bundle.arch_args)}: {' '.join(str(error).split())[:200]}"
        raise BundleError(what, where=str(bundle.path)) from error
    try:
        load_weights(network, read_safetensors(bundle.model_path))
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise BundleError(f"its weights do not fit {bundle.arch}: {first}", where=str(bundle.path)) from error
    student = Student(
        network,
        bundle.preprocess,
        arch=bundle.arch,
        arch_args=bundle.arch_args,
        num_classes=bundle.num_classes,
        in_channels=channels,
    )
    return student.eval()


def _fitted(images: Tensor, preprocess: Preprocess) -> Tensor:
    """Images at the network's own size. Where `resize` says "none", another size is made to fit as by "bilinear"."""
    if images.shape[1] != preprocess.channels:
        raise ShapeError(f"images of {images.shape[1]} channels for a network that takes {preprocess.channels}")
    height, width = preprocess.height, preprocess.width
    if images.shape[-2:] == (height, width) or preprocess.resize != "bilinear-crop":
        return _resized(images, height, width)
    scaled, (top, left) = cover_and_cut(images.shape[-2], images.shape[-1], height, width)
    larger = _resized(images, *scaled)
    return larger[..., top : top + height, left : left + width]


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bilinear", antialias=True)


def _shapes(tapped: Tapped, preprocess: Preprocess) -> tuple[int, dict[str, FeatureShape]]:
    """Number of classes, and the feature maps' shapes, from one pass in eval mode."""
    first = next(tapped.parameters(), torch.zeros(()))
    images = torch.zeros(1, *preprocess.image_shape, device=first.device, dtype=first.dtype)
    with eval_mode(tapped), torch.no_grad():
        logits, features = tapped(images)
    shapes = {name: (value.shape[1], value.shape[2], value.shape[3]) for name, value in features.items()}
    return logits.shape[1], shapes


def _check_same_classes(one: Teacher, other: Teacher) -> None:
    where = f"{one.path or one.name} and {other.path or other.name}"
    fix = "give teachers of the same task"
    if one.num_classes != other.num_classes:
        what = f"teachers with {one.num_classes} and {other.num_classes} classes"
        raise ShapeError(what, where=where, fix=fix)
    if one.classes is not None and other.classes is not None and one.classes != other.classes:
        index = next(i for i, pair in enumerate(zip(one.classes, other.classes, strict=True)) if pair[0] != pair[1])
        what = f"teachers whose class {index} is {one.classes[index]!r} and {other.classes[index]!r}"
        raise ShapeError(what, where=where, fix=fix)
