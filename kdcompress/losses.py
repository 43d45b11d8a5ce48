"""The losses, as pure functions of tensors. Every one is computed in fp32 (or fp64) also under autocast.

Teachers' sides carry no gradient of their own: the caller decides what to detach.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kdcompress.types import (
    UNLABELLED,
    FeatureMap,
    Labels,
    LabelTargets,
    Logits,
    Scalar,
    TeacherLogits,
    TeacherWeights,
)

MAX_TRIPLES_BATCH = 128
"""The largest batch whose triples are all related to each other; a larger one is cut into seeded groups."""
APART = 8.0
"""Two points nearer than this times the precision of their numbers have no direction between them: an angle there is 0,
and so is its gradient."""


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor in fp32, fp64 where it was fp64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def without_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which matrix products on this tensor's device keep the precision of their inputs."""
    return torch.autocast(tensor.device.type, enabled=False)


def soft_targets(teacher_logits: TeacherLogits, weights: TeacherWeights, temperature: float) -> LabelTargets:
    """The integrated target: the weighted mean of the teachers' probabilities, Σ_t w_t softmax(z_t / T).

    Args:
        teacher_logits: the teachers' logits.
        weights: how much each teacher counts for each image; rows sum to 1.
        temperature: T.
    """
    probabilities = F.softmax(full_precision(teacher_logits) / temperature, dim=2)
    return (full_precision(weights)[:, :, None] * probabilities).sum(1)


def kl_divergence(targets: LabelTargets, logits: Logits, temperature: float) -> Scalar:
    """T² · KL(targets ‖ softmax(z / T)): summed over classes, mean over the batch (Hinton et al., 2015).

    T² keeps the gradient's size when T changes; the sum over classes keeps it when their number does.

    Args:
        targets: probabilities, already at temperature T. A class of probability 0 contributes 0.
        logits: the student's.
        temperature: T.
    """
    targets = full_precision(targets)
    log_targets = targets.clamp_min(torch.finfo(targets.dtype).tiny).log()
    log_student = F.log_softmax(full_precision(logits) / temperature, dim=1)
    return temperature**2 * (targets * (log_targets - log_student)).sum(1).mean()


def kl_by_image(log_targets: Logits, logits: Logits, temperature: float) -> Float[Tensor, "batch"]:
    """T² · KL(exp(log_targets) ‖ softmax(z / T)) of each image.

    Args:
        log_targets: log probabilities, already at temperature T.
        logits: the student's.
        temperature: T.
    """
    log_targets = full_precision(log_targets)
    log_student = F.log_softmax(full_precision(logits) / temperature, dim=1)
    return temperature**2 * (log_targets.exp() * (log_targets - log_student)).sum(1)


def dkd_by_image(
    log_targets: Logits,
    logits: Logits,
    labels: Labels,
    temperature: float,
    *,
    label_class_weight: float = 1.0,
    other_classes_weight: float = 8.0,
) -> Float[Tensor, "batch"]:
    """Decoupled KD of each image: T² · (weight · KL of label class against the rest + weight · KL among the rest).

    The plain KL weighs the second part with what the teacher leaves to the other classes, so a sure teacher mutes it
    (Zhao et al., CVPR 2022, arXiv 2203.08679, whose defaults the weights are). An image without a label has no class
    to set apart: it has its plain KL.

    Args:
        log_targets: log probabilities, already at temperature T.
        logits: the student's.
        labels: hard labels.
        temperature: T.
        label_class_weight: of the first part, called α there.
        other_classes_weight: of the second part, called β there.
    """
    log_targets = full_precision(log_targets)
    log_student = F.log_softmax(full_precision(logits) / temperature, dim=1)
    labelled = labels != UNLABELLED
    chosen = F.one_hot(labels.clamp_min(0), logits.shape[1]).bool()
    pairs = [_label_class_and_others(side, chosen) for side in (log_targets, log_student)]
    (target_split, target_others), (student_split, student_others) = pairs
    first = (target_split.exp() * (target_split - student_split)).sum(1)
    second = torch.where(chosen, 0.0, target_others.exp() * (target_others - student_others)).sum(1)
    decoupled = label_class_weight * first + other_classes_weight * second
    return torch.where(labelled, temperature**2 * decoupled, kl_by_image(log_targets, logits, temperature))


def dist(targets: TeacherLogits, logits: Logits, weights: TeacherWeights, temperature: float) -> Scalar:
    """DIST: T² · (1 - correlation over the classes of an image + 1 - correlation over the images of a class).

    Both are Pearson's, of probabilities; the first is averaged over images, the second over classes (Huang et al.,
    NeurIPS 2022, arXiv 2205.10536). Of several teachers the first part is weighted image by image; in the second a
    teacher's correlation counts each image by its weight, and the teacher counts by its mean weight. Where one side
    does not vary the correlation is 0.

    Args:
        targets: probabilities of each teacher, already at temperature T.
        logits: the student's.
        weights: of the teachers, for each image.
        temperature: T.
    """
    targets, weights = full_precision(targets), full_precision(weights)
    answers = F.softmax(full_precision(logits) / temperature, dim=1)[:, None]
    over_classes = 1.0 - _correlation(targets, answers, torch.ones_like(targets), dim=2)
    image_weights = weights.detach()[:, :, None].expand_as(targets)
    over_images = 1.0 - _correlation(targets, answers, image_weights, dim=0).mean(1)
    return temperature**2 * ((weights * over_classes).sum(1).mean() + (weights.mean(0) * over_images).sum())


def standardise(logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch classes"]:
    """Each row of logits with mean 0 and standard deviation 1 over the classes (Sun et al., CVPR 2024, 2403.01427).

    Two logits are alike after it whatever they were, so it wants three classes or more.
    """
    logits = full_precision(logits)
    centred = logits - logits.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / (logits.shape[-1] - 1)
    return centred / (variance.clamp_min(torch.finfo(logits.dtype).tiny).sqrt() + 1e-7)


def cross_entropy(logits: Logits, label_targets: LabelTargets, temperature: float = 1.0) -> Scalar:
    """-Σ_c y_c log softmax(z / T)_c, mean over the labelled images; 0 where none is.

    Args:
        logits: the student's.
        label_targets: one-hot, smoothed or mixed; a zero row where there is no label. An image mixed of one with and
            one without a label counts for the part that has one.
        temperature: T.
    """
    label_targets = full_precision(label_targets)
    log_student = F.log_softmax(full_precision(logits) / temperature, dim=1)
    return -(label_targets * log_student).sum() / label_targets.sum().clamp_min(1.0)


def relation_angles(
    student: Float[Tensor, "batch student_dim"], teacher: Float[Tensor, "batch teacher_dim"], *, seed: int = 0
) -> Scalar:
    """RKD-A: Huber error of the cosine of the angle at j between images i and k, mean over the triples (i, j, k).

    Both sides should be like quantities (Park et al., CVPR 2019). Up to a batch of `MAX_TRIPLES_BATCH` all ordered
    triples count, those with a point twice too. A larger batch is cut, by a permutation that depends only on `seed` and
    the batch size, into near-equal groups of at most that many images, and all triples within a group count: every
    image takes part, and the cost grows with the batch instead of its cube.

    Args:
        student: one row per image.
        teacher: one row per image; the width may differ.
        seed: of the permutation.
    """
    student, teacher = full_precision(student), full_precision(teacher)
    batch = len(student)
    num_groups = -(-batch // MAX_TRIPLES_BATCH)
    if num_groups <= 1:
        return _angle_error(student, teacher)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed)).to(student.device)
    groups = order.tensor_split(num_groups)
    errors = [_angle_error(student[group], teacher[group]) * len(group) for group in groups]
    return torch.stack(errors).sum() / batch


def relation_distances(
    student: Float[Tensor, "batch student_dim"], teacher: Float[Tensor, "batch teacher_dim"]
) -> Scalar:
    """RKD-D: Huber error of the distance of images i and j in units of the mean distance, mean over all pairs (i, j).

    The mean distance is that of the pairs that are apart at all (Park et al., CVPR 2019).

    Args:
        student: one row per image.
        teacher: one row per image; the width may differ.
    """
    return F.smooth_l1_loss(_relative_distances(full_precision(student)), _relative_distances(full_precision(teacher)))


def hint_error(
    student: FeatureMap,
    hint: Float[Tensor, "batch channels hint_height hint_width"],
    form: Literal["cosine", "mse"] = "cosine",
) -> Scalar:
    """How far a regressed student map is from a teacher's, position by position.

    Args:
        student: the student's map after its regressor, with as many channels as the hint.
        hint: the teacher's map.
        form: "cosine" is 1 - cos over channels, blind to scale. "mse" is the mean of (s - h / |h|)², the published
            form: the hint has unit length at each position, and the regressor's output is taken as it is.

    The larger of two maps is average-pooled to the size of the smaller.
    """
    student, hint = align(full_precision(student), full_precision(hint))
    if form == "cosine":
        return 1.0 - F.cosine_similarity(student, hint, dim=1).mean()
    return F.mse_loss(student, F.normalize(hint, dim=1))


def align(
    one: FeatureMap, other: Float[Tensor, "batch other_channels other_height other_width"]
) -> tuple[Tensor, Tensor]:
    """Both maps at the smaller height and width of the two, by average pooling."""
    size = (min(one.shape[2], other.shape[2]), min(one.shape[3], other.shape[3]))
    return _pool(one, size), _pool(other, size)


def _label_class_and_others(log_p: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Log probabilities of (label class, all others), and of the others among themselves."""
    others = log_p.masked_fill(chosen, -torch.inf)
    log_rest = others.logsumexp(1, keepdim=True)
    among = torch.where(chosen, log_rest, log_p) - log_rest
    return torch.cat([log_p.masked_fill(~chosen, 0.0).sum(1, keepdim=True), log_rest], 1), among


def _correlation(one: Tensor, other: Tensor, weights: Tensor, dim: int) -> Tensor:
    """Pearson's correlation along `dim`, each element counted by its weight; 0 where nothing varies."""
    share = weights / weights.sum(dim, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    other = other.expand_as(one)
    roots = share.sqrt()
    one = roots * (one - (share * one).sum(dim, keepdim=True))
    other = roots * (other - (share * other).sum(dim, keepdim=True))
    return F.cosine_similarity(one, other, dim=dim, eps=1e-8)


def global_average(features: FeatureMap) -> Float[Tensor, "batch channels 1 1"]:
    """The mean over all positions, handed on in fp32. A map that is pooled already stays as it is."""
    return full_precision(_pool(features, (1, 1)))


def _pool(features: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(features.shape[2:]) == size:
        return features
    return _mean_over_positions(features) if size == (1, 1) else F.adaptive_avg_pool2d(features, size)


def _mean_over_positions(features: Tensor) -> Tensor:
    """As `features.mean((2, 3), keepdim=True)`, whose gradient is slow to add to a channels-last map on a CPU."""
    if not features.is_contiguous(memory_format=torch.channels_last):
        return features.mean((2, 3), keepdim=True)
    rows = features.permute(0, 2, 3, 1).flatten(1, 2)
    with without_autocast(features):
        total = torch.bmm(features.new_ones(1, 1, 1).expand(len(rows), 1, rows.shape[1]), rows)
    return total.transpose(1, 2)[:, :, :, None] / rows.shape[1]


def _angle_error(student: Tensor, teacher: Tensor) -> Tensor:
    with without_autocast(student):
        return F.smooth_l1_loss(_angles(student), _angles(teacher))


def _angles(points: Tensor) -> Tensor:
    """[j, i, k]: the cosine of the angle at j between i and k."""
    difference = points[None, :, :] - points[:, None, :]
    squared = difference.square().sum(2, keepdim=True)
    apart = _apart(squared)
    # where() before rsqrt(): a zero distance must not put an infinite gradient into the other branch.
    directions = torch.where(apart, difference * torch.where(apart, squared, 1.0).rsqrt(), 0.0)
    return directions @ directions.transpose(1, 2)


def _relative_distances(points: Tensor) -> Tensor:
    squared = (points[None, :, :] - points[:, None, :]).square().sum(2)
    apart = _apart(squared)
    distances = torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0)
    mean = distances.sum() / apart.sum().clamp_min(1)
    return distances / torch.where(mean > 0, mean, 1.0)


def _apart(squared: Tensor) -> Tensor:
    return squared > (APART * torch.finfo(squared.dtype).eps) ** 2
