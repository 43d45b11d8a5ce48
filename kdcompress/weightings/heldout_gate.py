"""Held-out gate: weights learned only from images that the teachers have not seen.

Idea
    Teachers know their training images by heart: a gate that learns there learns who memorised best. So this one is
    fitted between epochs on held-out images and is fixed while the student trains. It begins uniform, is shrunk to
    uniform, and leaves it only where that has been shown to help. It may read what the teachers answer, what the
    student sees, or both.
Loss
    w(x) = softmax(A α + B β + b). α is made of the teachers' answers: each one's log-sum-exp of the logits, entropy and
    largest probability, and all logits where they are no more than 256, each brought to mean 0 and standard deviation 1
    over the held-out images. β is the layer-normed max-pooled last feature map of the student, detached. A, B and b
    minimise the mean of -log Σ_t w_t(x) p_t(y | x) at temperature 1 plus λ/2 (|A|² + |B|² + |b|²), by L-BFGS in
    float64. Candidates: uniform; static (A = B = 0); answers (B = 0); student (A = 0); both. λ is chosen by 5-fold
    cross-fitting, the strongest within one standard error of the best. So is the candidate: each in turn must improve
    the held-out NLL of the one taken so far by more than one standard error of the mean paired difference.
Paper
    None. It repairs the gate of AMTML-KD (`latent-factors`), of which B is the product W ∘ θ_t without a bias; that the
    teachers' answers are read as well is ours.
Use
    With `--holdout DIR`, for teachers that know different things: specialists, other domains, a broken one. Without
    held-out images it is plain averaging.
Cost
    One pass of the student and the teachers over the held-out images and a few seconds of fitting per epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from kdcompress.crossfit import (
    MIN_IMAGES,
    answer_inputs,
    centre_and_scale,
    cross_fit,
    fit_coefficients,
    fold_masks,
    improves,
    mixture_nll,
    num_answer_inputs,
    paired_gain,
)
from kdcompress.errors import ShapeError
from kdcompress.losses import full_precision, without_autocast
from kdcompress.types import UNLABELLED, NetworkShapes, Step, TeacherWeights, WeightSource
from kdcompress.weightings.base import (
    CANDIDATES,
    STATIC,
    UNFITTED,
    UNIFORM,
    Weighting,
    describe_weights,
    last_stage,
    teachers_of,
)


class HeldoutGate(Weighting):
    """A linear gate on the teachers' answers and the student's last feature map. It has buffers, no parameters.

    Args:
        shapes: of the student's and the teachers' feature maps.

    Raises:
        ShapeError: the student has no feature maps.
    """

    source: ClassVar[WeightSource] = "heldout"

    coefficients: Tensor
    centre: Tensor
    scale: Tensor
    choice: Tensor
    gain: Tensor
    gain_error: Tensor

    def __init__(self, shapes: NetworkShapes) -> None:
        super().__init__(shapes)
        self.stage, channels = last_stage(shapes)
        answers = num_answer_inputs(self.num_teachers, shapes.num_classes)
        self.register_buffer("coefficients", torch.zeros(self.num_teachers, answers + channels + 1))
        self.register_buffer("centre", torch.zeros(answers))
        self.register_buffer("scale", torch.ones(answers))
        self.register_buffer("choice", torch.tensor(float(UNFITTED)))
        self.register_buffer("gain", torch.tensor(0.0))
        self.register_buffer("gain_error", torch.tensor(0.0))

    def forward(self, step: Step) -> TeacherWeights:
        """The weights, without gradient. Uniform until the first `refit`.

        Raises:
            ShapeError: not all teachers have answered.
        """
        answers, features = self._answers(step), self._features(step)
        inputs = torch.cat([(answers - self.centre) / self.scale, features], 1)
        with without_autocast(inputs):
            scores = F.linear(inputs, self.coefficients[:, :-1], self.coefficients[:, -1])
        return scores.softmax(1)[:, list(teachers_of(step).teacher_ids)]

    def refit(self, heldout: Step) -> Mapping[str, float]:
        """Fits the gate to the labelled held-out images; deterministic, and independent of the fit before.

        Args:
            heldout: outputs in eval mode on images that the teachers have not seen; unlabelled ones are left out.

        Returns:
            `heldout_images`; `nll_uniform`, `nll_static`, `nll_answers`, `nll_student`, `nll_both`, cross-fitted;
            `gain` and `gain_error`, how much the best candidate improves on uniform, and its standard error; `choice`,
            0 uniform, 1 static, 2 answers, 3 student, 4 both; `shrinkage`.

        Raises:
            ShapeError: not all teachers have answered.
        """
        with torch.inference_mode(False), torch.no_grad():
            labelled = heldout.labels != UNLABELLED
            labels = heldout.labels[labelled].cpu()
            answers = self._answers(heldout)[labelled].double().cpu()
            if len(labels):
                centre, scale = centre_and_scale(answers)
                self.centre.copy_(centre)
                self.scale.copy_(scale)
                answers = (answers - centre) / scale
            log_p = F.log_softmax(self._logits(heldout)[labelled].double(), dim=2).cpu()
            log_right = log_p[torch.arange(len(labels)), :, labels]
            fit = fit_gate(answers, self._features(heldout)[labelled].double().cpu(), log_right, labels)
            self.coefficients.copy_(fit.coefficients)
            self.choice.fill_(fit.choice)
            self.gain.fill_(fit.gain)
            self.gain_error.fill_(fit.gain_error)
        return {
            "heldout_images": float(len(labels)),
            **{f"nll_{name}": nll for name, nll in fit.nll.items()},
            "gain": fit.gain,
            "gain_error": fit.gain_error,
            "choice": float(fit.choice),
            "shrinkage": fit.shrinkage,
        }

    def diagnostics(self, weights: TeacherWeights) -> Mapping[str, Tensor]:
        """As `describe_weights`, with what the last fit decided: `gate_choice`, `gate_gain`, `gate_gain_error`."""
        fitted = {"gate_choice": self.choice, "gate_gain": self.gain, "gate_gain_error": self.gain_error}
        return {**describe_weights(weights), **{name: value.clone() for name, value in fitted.items()}}

    def _logits(self, step: Step) -> Tensor:
        """The teachers' logits in the order of the teachers, whatever order they answered in."""
        teachers = teachers_of(step)
        if sorted(teachers.teacher_ids) != list(range(self.num_teachers)):
            raise ShapeError(
                f"this gate reads the answers of all {self.num_teachers} teachers, and {len(teachers.teacher_ids)} "
                "answered",
                fix="ensemble.teachers_per_step=all",
            )
        order = [teachers.teacher_ids.index(number) for number in range(self.num_teachers)]
        return full_precision(teachers.logits)[:, order]

    def _answers(self, step: Step) -> Tensor:
        return answer_inputs(self._logits(step))

    def _features(self, step: Step) -> Tensor:
        pooled = full_precision(step.student.features[self.stage].detach()).amax((2, 3))
        return F.layer_norm(pooled, pooled.shape[1:])


@dataclass(frozen=True)
class GateFit:
    """What `fit_gate` found.

    Args:
        coefficients: [teachers, answers + student's features + 1], the bias last; 0 for what the choice does not read.
        choice: index in `CANDIDATES` of what was chosen.
        nll: candidate -> its cross-fitted NLL; "uniform" is that of the averaged teachers.
        gain: improvement on uniform of what was chosen, of the best candidate where uniform was.
        gain_error: its standard error.
        shrinkage: λ of the fit; 0 where uniform was chosen.
    """

    coefficients: Float[Tensor, "teachers inputs"]
    choice: int
    nll: Mapping[str, float]
    gain: float
    gain_error: float
    shrinkage: float


def fit_gate(
    answers: Float[Tensor, "images answers"],
    features: Float[Tensor, "images features"],
    log_right: Float[Tensor, "images teachers"],
    labels: Int64[Tensor, "images"],
) -> GateFit:
    """Chooses one of `CANDIDATES`, and fits it to all images.

    Args:
        answers: what the gate reads of the teachers, float64.
        features: what it reads of the student, float64.
        log_right: log probability that each teacher gives to the right class, float64.
        labels: the right classes; they only spread each class over the folds.
    """
    num_images, num_teachers = log_right.shape
    inputs = torch.cat([answers, features, features.new_ones(num_images, 1)], 1)
    coefficients = inputs.new_zeros(num_teachers, inputs.shape[1])
    uniform = mixture_nll(torch.zeros_like(log_right), log_right)
    if num_images < MIN_IMAGES or num_teachers < 2:
        same = float(uniform.mean()) if num_images else 0.0
        return GateFit(coefficients, UNIFORM, dict.fromkeys(CANDIDATES, same), 0.0, 0.0, 0.0)
    of_answers = torch.arange(inputs.shape[1]) < answers.shape[1]
    of_student = ~of_answers
    of_student[-1] = False
    nothing = torch.zeros_like(of_answers)
    read = {"static": nothing, "answers": of_answers, "student": of_student, "both": of_answers | of_student}
    held = fold_masks(labels)
    nll, choice, shrinkage = {"uniform": uniform}, UNIFORM, 0.0
    for number, name in enumerate(CANDIDATES[STATIC:], start=STATIC):
        read[name][-1] = True
        fit = cross_fit(inputs[:, read[name]], log_right, held)
        nll[name] = mixture_nll(fit.scores, log_right)
        if improves(nll[CANDIDATES[choice]], nll[name]):
            choice, shrinkage = number, fit.shrinkage
    if choice != UNIFORM:
        columns = read[CANDIDATES[choice]]
        everything = torch.ones_like(held[:1])
        coefficients[:, columns] = fit_coefficients(inputs[:, columns], log_right, everything, shrinkage)[0]
    means = {name: float(value.mean()) for name, value in nll.items()}
    best = CANDIDATES[choice] if choice != UNIFORM else min(CANDIDATES[STATIC:], key=means.__getitem__)
    gain, gain_error = paired_gain(uniform, nll[best])
    return GateFit(coefficients, choice, means, gain, gain_error, shrinkage)
