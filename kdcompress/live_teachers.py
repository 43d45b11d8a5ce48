"""Teachers that answer while the student trains: frozen for real, and as cheap as this hardware lets them be."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcompress.data import keyed_hash
from kdcompress.execution import DTYPES, PLAIN, Execution, compiled
from kdcompress.folding import fold_batch_norm
from kdcompress.losses import global_average
from kdcompress.networks import Teacher, TeacherEnsemble, feature_forms
from kdcompress.types import Batch, EnsembleOutputs, FeatureForm, FeatureMap, Images, Outputs

ALL_MAPS: Mapping[str, FeatureForm] = {"*": "map"}
"""Every feature map of every teacher, whole."""
FOLDED_TOLERANCE = 1e-3
"""Largest difference by which folding may change an answer, relative to the largest value of that answer."""


def prepare_teacher(teacher: Teacher, execution: Execution) -> Teacher:
    """A copy of a teacher that answers as it does at less cost.

    Batch norm is folded into the convolutions where the answers stay the same, the weights are in the precision and
    layout of `execution`. It is not compiled here.

    Args:
        teacher: on its device; not changed.
        execution: how the copy is run.
    """
    device = next(teacher.normalise.buffers()).device
    own = copy.deepcopy(teacher.tapped).release()
    prepared = _teacher(fold_batch_norm(own, teacher.preprocess.image_shape), teacher)
    if not _same(prepared, teacher):
        prepared = _teacher(own, teacher)
    prepared.to(device)
    prepared.network.to(DTYPES[execution.precision]).to(memory_format=execution.memory_format)
    return prepared


class LiveTeachers:
    """A `TeacherSource` that asks the networks themselves, without gradient.

    Args:
        ensemble: the teachers; copies of them answer (`prepare_teacher`).
        features: the feature maps that are wanted, and their form: `Needs.teacher_features`.
        execution: how the copies are run.
        per_step: None asks every teacher about every batch; 1 asks one, drawn by the (global) batch's first image and
            view, so that it is the same one in a resumed run and in all processes.
        block: compiled networks are asked about so many images at once, whatever the batch; larger ones are cut, the
            last piece filled up, for every new size is compiled anew.
    """

    def __init__(
        self,
        ensemble: TeacherEnsemble,
        features: Mapping[str, FeatureForm] = ALL_MAPS,
        execution: Execution = PLAIN,
        *,
        per_step: int | None = None,
        block: int = 64,
    ) -> None:
        self.execution = execution
        self.per_step = per_step
        self.block = block
        self.num_teachers = len(ensemble.teachers)
        self._forms = tuple(feature_forms(tuple(one.feature_shapes), features) for one in ensemble.teachers)
        prepared = [prepare_teacher(one, execution) for one in ensemble.teachers]
        wanted = [_Wanted(one, forms) for one, forms in zip(prepared, self._forms, strict=True)]
        self._asked: list[Callable[[Images], Outputs]] = [
            self._in_blocks(compiled(one, frozen=True)) if execution.compiled else one for one in wanted
        ]

    def __call__(self, batch: Batch) -> EnsembleOutputs:
        """What each teacher, or the one drawn, says of a batch, in fp32."""
        chosen = tuple(range(self.num_teachers)) if self.per_step is None else (self._drawn(batch),)
        with torch.no_grad(), torch.autocast(batch.images.device.type, enabled=False):
            outputs = [self._asked[number](batch.images) for number in chosen]
        logits = torch.stack([output.logits for output in outputs], dim=1)
        return EnsembleOutputs(logits, tuple(output.features for output in outputs), chosen)

    def _drawn(self, batch: Batch) -> int:
        ids, views = batch.global_first
        return int(keyed_hash(0, ids, views).remainder(self.num_teachers))

    def _in_blocks(self, compiled: Callable[[Images], Outputs]) -> Callable[[Images], Outputs]:
        def ask(images: Images) -> Outputs:
            count = len(images)
            missing = -count % self.block
            filled = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)]) if missing else images
            answers = [compiled(piece) for piece in torch.split(filled, self.block)]
            features = {
                name: torch.cat([answer.features[name] for answer in answers])[:count] for name in answers[0].features
            }
            return Outputs(torch.cat([answer.logits for answer in answers])[:count], features)

        return ask


class _Wanted(nn.Module):
    """One teacher's logits and the maps that are wanted of it, in fp32."""

    def __init__(self, teacher: Teacher, forms: Mapping[str, FeatureForm]) -> None:
        super().__init__()
        self.teacher = teacher
        self.forms = dict(forms)

    def forward(self, images: Images) -> Outputs:
        answer = self.teacher(images)
        return Outputs(
            answer.logits.float(), {name: _in_form(answer.features[name], form) for name, form in self.forms.items()}
        )


def _in_form(feature_map: FeatureMap, form: FeatureForm) -> Tensor:
    return global_average(feature_map) if form == "pooled" else feature_map.float()


@dataclass(frozen=True)
class Agreement:
    """How far prepared teachers answer as the plain fp32 ones do; of the teacher that differs most.

    Args:
        same_class: the fraction of images that both put into the same class.
        probability: the mean over images of the largest difference of a probability.
        num_images: compared.
    """

    same_class: float
    probability: float
    num_images: int


def agreement(
    plain: Float[Tensor, "images teachers classes"], prepared: Float[Tensor, "images teachers classes"]
) -> Agreement:
    """Compares logits.

    Args:
        plain: of the teachers as they were loaded.
        prepared: what a `LiveTeachers` said of the same images.
    """
    same = (plain.argmax(2) == prepared.argmax(2)).float().mean(0).min()
    difference = (plain.softmax(2) - prepared.softmax(2)).abs().amax(2).mean(0).max()
    return Agreement(float(same), float(difference), len(plain))


def _teacher(network: nn.Module, like: Teacher) -> Teacher:
    return Teacher(network, like.preprocess, name=like.name, classes=like.classes, stages=like.tapped.paths)


def _same(one: Teacher, other: Teacher) -> bool:
    """Whether two teachers answer alike, feature maps and all."""
    device = next(other.normalise.buffers()).device
    images = torch.rand(2, *other.preprocess.image_shape, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        mine, theirs = one.to(device)(images), other(images)
    pairs = [(mine.logits, theirs.logits), *((mine.features[n], theirs.features[n]) for n in theirs.features)]
    return all(a.shape == b.shape and bool((a - b).abs().max() <= FOLDED_TOLERANCE * b.abs().max()) for a, b in pairs)
