"""Linear gates over the teachers, fitted to held-out images and judged on images that they were not fitted on.

A gate's scores for an image are linear in its inputs, its weights their softmax, its NLL that of the weighted mixture
of the teachers' answers at temperature 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

NUM_FOLDS = 5
MIN_IMAGES = 50
"""With fewer labelled held-out images nothing is fitted."""
SHRINKAGES = (1.0, 0.1, 0.01, 1e-3, 1e-4)
"""Values of λ tried, strongest first: each fit starts from the one before."""
MAX_LOGITS = 256
"""With more logits for an image, all teachers together, a gate reads only summaries of them."""


def answer_inputs(logits: Float[Tensor, "images teachers classes"]) -> Float[Tensor, "images inputs"]:
    """What a gate reads of the teachers' own answers.

    Of each teacher the log-sum-exp of its logits (the free energy of Liu et al. 2020, arXiv 2010.03759), the entropy of
    its answer and its largest probability; after these, where there are no more than `MAX_LOGITS`, all logits.
    """
    p = logits.softmax(2)
    columns = [logits.logsumexp(2), torch.special.entr(p).sum(2), p.amax(2)]
    if logits.shape[1] * logits.shape[2] <= MAX_LOGITS:
        columns.append(logits.flatten(1))
    return torch.cat(columns, 1)


def centre_and_scale(
    inputs: Float[Tensor, "images inputs"],
) -> tuple[Float[Tensor, " inputs"], Float[Tensor, " inputs"]]:
    """Mean and standard deviation of each input over the images; what never varies is not scaled up."""
    deviation = inputs.std(0, correction=0)
    return inputs.mean(0), torch.where(deviation > 1e-6, deviation, 1.0)


def num_answer_inputs(num_teachers: int, num_classes: int) -> int:
    """How many numbers `answer_inputs` gives for an image."""
    logits = num_teachers * num_classes
    return 3 * num_teachers + (logits if logits <= MAX_LOGITS else 0)


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
