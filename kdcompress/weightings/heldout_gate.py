"""Held-out gate: weights learned only from images that the teachers have not seen.

Idea
    Teachers know their training images by heart: a gate that learns there learns who memorised best. So this one is
    fitted between epochs on held-out images and is fixed while the student trains. It begins uniform, is shrunk to
    uniform, and leaves it only where that has been shown to help.
Loss
    w(x) = softmax(A β + b), β the layer-normed max-pooled last feature map of the student, detached. A and b minimise
    the mean of -log Σ_t w_t(x) p_t(y | x) at temperature 1 plus λ/2 (|A|² + |b|²), by L-BFGS in float64. Candidates:
    uniform, static (A = 0), per image. λ is chosen by 5-fold cross-fitting, the strongest within one standard error of
    the best. So is the candidate: a richer one must improve the held-out NLL of a simpler one by more than one standard
    error of the mean paired difference.
Paper
    None. It repairs the gate of AMTML-KD (`latent-factors`), of which A is the product W ∘ θ_t without a bias.
Use
    With `--holdout DIR`, for teachers that know different things: specialists, other domains, a broken one. Without
    held-out images it is plain averaging.
Cost
    One pass of the student and the teachers over the held-out images and about a second of fitting per epoch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from kdcompress.losses import full_precision, without_autocast
from kdcompress.types import UNLABELLED, NetworkShapes, Step, TeacherWeights, WeightSource
from kdcompress.weightings.base import (
    INSTANCE,
    STATIC,
    UNFITTED,
    UNIFORM,
    Weighting,
    by_teacher,
    describe_weights,
    last_stage,
    teachers_of,
)

NUM_FOLDS = 5
MIN_IMAGES = 50
"""With fewer labelled held-out images the gate stays uniform."""
SHRINKAGES = (1.0, 0.1, 0.01, 1e-3, 1e-4)
"""Values of λ tried, strongest first: each fit starts from the one before."""


class HeldoutGate(Weighting):
    """A linear gate on the student's last feature map, refitted on held-out images. It has buffers, no parameters.

    Args:
        shapes: of the student's and the teachers' feature maps.

    Raises:
        ShapeError: the student has no feature maps.
    """

    source: ClassVar[WeightSource] = "heldout"

    factors: Tensor
    bias: Tensor
    choice: Tensor
    gain: Tensor
    gain_error: Tensor

    def __init__(self, shapes: NetworkShapes) -> None:
        super().__init__(shapes)
        self.stage, channels = last_stage(shapes)
        self.register_buffer("factors", torch.zeros(self.num_teachers, channels))
        self.register_buffer("bias", torch.zeros(self.num_teachers))
        self.register_buffer("choice", torch.tensor(float(UNFITTED)))
        self.register_buffer("gain", torch.tensor(0.0))
        self.register_buffer("gain_error", torch.tensor(0.0))

    def forward(self, step: Step) -> TeacherWeights:
        """The weights, without gradient. Uniform until the first `refit`."""
        features = self._features(step)
        with without_autocast(features):
            return F.linear(features, by_teacher(self.factors, step), by_teacher(self.bias, step)).softmax(1)

    def refit(self, heldout: Step) -> Mapping[str, float]:
        """Fits the gate to the labelled held-out images; deterministic, and independent of the fit before.

        Args:
            heldout: outputs in eval mode on images that the teachers have not seen; unlabelled ones are left out.

        Returns:
            `heldout_images`; `nll_uniform`, `nll_static`, `nll_instance`, cross-fitted; `gain` and `gain_error`, how
            much the best candidate improves on uniform, and its standard error; `choice`, 0 uniform, 1 static,
            2 per image; `shrinkage`.
        """
        with torch.inference_mode(False), torch.no_grad():
            labelled = heldout.labels != UNLABELLED
            labels = heldout.labels[labelled].cpu()
            teachers = teachers_of(heldout)
            log_probabilities = F.log_softmax(teachers.logits[labelled].double(), dim=2).cpu()
            log_right = log_probabilities[torch.arange(len(labels)), :, labels]
            fit = fit_gate(self._features(heldout)[labelled].double().cpu(), log_right, labels)
            for teacher, coefficients in zip(teachers.teacher_ids, fit.coefficients, strict=True):
                self.factors[teacher] = coefficients[:-1]
                self.bias[teacher] = coefficients[-1]
            self.choice.fill_(fit.choice)
            self.gain.fill_(fit.gain)
            self.gain_error.fill_(fit.gain_error)
        return {
            "heldout_images": float(len(labels)),
            "nll_uniform": fit.nll_uniform,
            "nll_static": fit.nll_static,
            "nll_instance": fit.nll_instance,
            "gain": fit.gain,
            "gain_error": fit.gain_error,
            "choice": float(fit.choice),
            "shrinkage": fit.shrinkage,
        }

    def diagnostics(self, weights: TeacherWeights) -> Mapping[str, Tensor]:
        """As `describe_weights`, with what the last fit decided: `gate_choice`, `gate_gain`, `gate_gain_error`."""
        fitted = {"gate_choice": self.choice, "gate_gain": self.gain, "gate_gain_error": self.gain_error}
        return {**describe_weights(weights), **{name: value.clone() for name, value in fitted.items()}}

    def _features(self, step: Step) -> Tensor:
        pooled = full_precision(step.student.features[self.stage].detach()).amax((2, 3))
        return F.layer_norm(pooled, pooled.shape[1:])


@dataclass(frozen=True)
class GateFit:
    """What `fit_gate` found.

    Args:
        coefficients: [teachers, features + 1], the bias last; zeros where uniform was chosen.
        choice: `UNIFORM`, `STATIC` or `INSTANCE`.
        nll_uniform: held-out NLL of the averaged teachers.
        nll_static: cross-fitted, with one weight per teacher.
        nll_instance: cross-fitted, with weights per image.
        gain: improvement on uniform of what was chosen, of the better candidate where uniform was.
        gain_error: its standard error.
        shrinkage: λ of the fit; 0 where uniform was chosen.
    """

    coefficients: Float[Tensor, "teachers inputs"]
    choice: int
    nll_uniform: float
    nll_static: float
    nll_instance: float
    gain: float
    gain_error: float
    shrinkage: float


def fit_gate(
    features: Float[Tensor, "images features"],
    log_right: Float[Tensor, "images teachers"],
    labels: Int64[Tensor, "images"],
) -> GateFit:
    """Chooses between uniform, static and per-image weights, and fits the chosen ones to all images.

    Args:
        features: the gate's input, float64.
        log_right: log probability that each teacher gives to the right class, float64.
        labels: the right classes; they only spread each class over the folds.
    """
    num_images, num_teachers = log_right.shape
    ones = features.new_ones(num_images, 1)
    inputs = torch.cat([features, ones], 1)
    coefficients = features.new_zeros(num_teachers, inputs.shape[1])
    uniform = mixture_nll(torch.zeros_like(log_right), log_right)
    if num_images < MIN_IMAGES or num_teachers < 2:
        nll = float(uniform.mean()) if num_images else 0.0
        return GateFit(coefficients, UNIFORM, nll, nll, nll, 0.0, 0.0, 0.0)
    held = fold_masks(labels)
    static_fit, instance_fit = cross_fit(ones, log_right, held), cross_fit(inputs, log_right, held)
    static, instance = (mixture_nll(fit.scores, log_right) for fit in (static_fit, instance_fit))
    choice, best, shrinkage = UNIFORM, uniform, 0.0
    if improves(best, static):
        choice, best, shrinkage = STATIC, static, static_fit.shrinkage
    if improves(best, instance):
        choice, best, shrinkage = INSTANCE, instance, instance_fit.shrinkage
    everything = torch.ones_like(held[:1])
    if choice == STATIC:
        coefficients[:, -1:] = fit_coefficients(ones, log_right, everything, shrinkage)[0]
    elif choice == INSTANCE:
        coefficients = fit_coefficients(inputs, log_right, everything, shrinkage)[0]
    candidate = best if choice != UNIFORM else min(static, instance, key=lambda nll: float(nll.mean()))
    gain, gain_error = paired_gain(uniform, candidate)
    return GateFit(
        coefficients,
        choice,
        nll_uniform=float(uniform.mean()),
        nll_static=float(static.mean()),
        nll_instance=float(instance.mean()),
        gain=gain,
        gain_error=gain_error,
        shrinkage=shrinkage,
    )


def mixture_nll(
    scores: Float[Tensor, "*folds images teachers"], log_right: Float[Tensor, "images teachers"]
) -> Float[Tensor, "*folds images"]:
    """-log Σ_t softmax(scores)_t p_t(y) for each image."""
    return torch.logsumexp(scores, -1) - torch.logsumexp(scores + log_right, -1)


def fold_masks(
    labels: Int64[Tensor, "images"], num_folds: int = NUM_FOLDS, seed: int = 0
) -> Float[Tensor, "folds images"]:
    """1 where an image belongs to a fold. Each class is dealt out over the folds in an order that `seed` shuffles."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = shuffled[torch.argsort(labels[shuffled], stable=True)]
    folds = torch.empty_like(labels)
    folds[order] = torch.arange(len(labels)) % num_folds
    return F.one_hot(folds, num_folds).T.double()


def fit_coefficients(
    inputs: Float[Tensor, "images inputs"],
    log_right: Float[Tensor, "images teachers"],
    members: Float[Tensor, "folds images"],
    shrinkage: float,
    start: Float[Tensor, "folds teachers inputs"] | None = None,
) -> Float[Tensor, "folds teachers inputs"]:
    """The minimum of mean NLL + λ/2 |coefficients|² over the members of each fold, all folds in one L-BFGS.

    Args:
        inputs: of the linear gate.
        log_right: log probability that each teacher gives to the right class.
        members: 1 for the images that count in a fold.
        shrinkage: λ.
        start: where to begin; zeros (uniform weights) without.
    """
    shape = (len(members), log_right.shape[1], inputs.shape[1])
    coefficients = (inputs.new_zeros(shape) if start is None else start.clone()).requires_grad_()
    share = members / members.sum(1, keepdim=True)
    optimizer = torch.optim.LBFGS(
        [coefficients], max_iter=50, tolerance_grad=1e-4, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        nll = mixture_nll(torch.einsum("nd,ftd->fnt", inputs, coefficients), log_right)
        total = (nll * share).sum() + 0.5 * shrinkage * coefficients.square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    with torch.enable_grad(), one_thread():
        optimizer.step(objective)  # type: ignore[no-untyped-call]
    return coefficients.detach()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Many tiny operations: handing them out to threads costs more than it saves, on a busy machine a hundred times."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class CrossFit(NamedTuple):
    """A gate's scores for images that it was not fitted on.

    Args:
        scores: each image's, of the gate fitted, and its λ chosen, without the image's fold; softmax gives the weights.
        shrinkage: the λ for a fit to all images.
    """

    scores: Float[Tensor, "images teachers"]
    shrinkage: float


def cross_fit(
    inputs: Float[Tensor, "images inputs"],
    log_right: Float[Tensor, "images teachers"],
    held: Float[Tensor, "folds images"],
) -> CrossFit:
    """Fits a gate without each fold in turn, and lets it weigh the teachers for that fold.

    Args:
        inputs: of the linear gate, float64; a column of ones is its bias.
        log_right: log probability that each teacher gives to the right class, float64.
        held: from `fold_masks`.
    """
    start, rows = None, []
    for shrinkage in SHRINKAGES:
        start = fit_coefficients(inputs, log_right, 1.0 - held, shrinkage, start)
        rows.append((torch.einsum("nd,ftd->fnt", inputs, start) * held[:, :, None]).sum(0))
    scores = torch.stack(rows)
    nll = mixture_nll(scores, log_right)
    chosen = torch.stack([strongest_shrinkage(nll[:, fold == 0]) for fold in held])[held.argmax(0)]
    return CrossFit(scores[chosen, torch.arange(len(inputs))], SHRINKAGES[int(strongest_shrinkage(nll))])


def strongest_shrinkage(nll: Float[Tensor, "shrinkages images"]) -> Int64[Tensor, ""]:
    """The first of `SHRINKAGES` that is not worse than the best by more than one standard error.

    Breiman et al. 1984, "Classification and Regression Trees", call it the one-standard-error rule.
    """
    worse = nll - nll[nll.mean(1).argmin()]
    error = worse.std(1) / worse.shape[1] ** 0.5
    first: Tensor = (worse.mean(1) <= error).long().argmax()
    return first


def paired_gain(simple: Float[Tensor, "images"], rich: Float[Tensor, "images"]) -> tuple[float, float]:
    """By how much the mean of `rich` is below that of `simple`, and the standard error of the mean difference."""
    difference = simple - rich
    return float(difference.mean()), float(difference.std() / len(difference) ** 0.5)


def improves(simple: Float[Tensor, "images"], rich: Float[Tensor, "images"]) -> bool:
    """Whether the gain is more than one standard error."""
    gain, error = paired_gain(simple, rich)
    return gain > error
