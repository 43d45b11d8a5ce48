"""How much each term of a loss is felt: its gradient on the student's backbone, measured now and then.

A coefficient says little: with the published ones, AMTML-KD's hints make 0.07 % of the gradient. So a method may ask
for a `Share` of the whole instead, and the factor is found here. All of it stays on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from kdcompress import ranks
from kdcompress.errors import InputError
from kdcompress.types import Share, Term

EVERY = 100
"""Steps between two measurements."""
EARLY = (0, 10, 30)
"""Also measured at these steps, where the gradients change fastest."""
SMOOTHING = 0.5
"""How much of the old norm stays at a measurement."""
SMALLEST = 1e-8
"""A gradient below this part of the fixed terms' counts as this part, so that noise is never blown up without bound."""
FELT = 0.01
"""A term with a smaller share than this is hardly felt."""


def find_factors(norms: Mapping[str, Tensor], weights: Mapping[str, float | Share]) -> dict[str, float | Tensor]:
    """What each term is multiplied by: a fixed weight as it is; for shares s_k, with Σ over the terms of fixed weight,

        w_k = s_k · Σ |w_f| ‖g_f‖ / ((1 - Σ s) · ‖g_k‖),

    so that w_k ‖g_k‖ is the part s_k of the sum of all weighted norms.

    Args:
        norms: ‖g‖, the norm of each unweighted term's gradient; terms of weight 0 may be left out.
        weights: by term.

    Raises:
        InputError: the shares leave nothing for the rest, or there is no rest to measure them by.
    """
    shares = {name: weight.value for name, weight in weights.items() if isinstance(weight, Share)}
    fixed: dict[str, float] = {name: weight for name, weight in weights.items() if not isinstance(weight, Share)}
    asked = sum(shares.values())
    if asked >= 1:
        raise InputError(f"the shares of {', '.join(shares)} add up to {asked:g}", fix="less than 1 together")
    if asked > 0 and not any(fixed.values()):
        raise InputError(
            f"{', '.join(shares)} are shares of a whole that has no other term", fix="give one term a fixed weight"
        )
    result: dict[str, float | Tensor] = {**dict.fromkeys(shares, 0.0), **fixed}
    if asked > 0:
        whole = torch.stack([norms[name] * abs(weight) for name, weight in fixed.items() if weight]).sum()
        for name, share in shares.items():
            if share:
                norm = norms[name]
                felt = share / (1 - asked) * whole / norm.clamp_min(SMALLEST * whole)
                result[name] = torch.where((norm > 0) & (whole > 0), felt, torch.zeros_like(felt))
    return {name: result[name] for name in weights}


def felt_shares(norms: Mapping[str, Tensor], applied: Mapping[str, float | Tensor]) -> dict[str, Tensor]:
    """The part that each measured term has in the sum of all weighted norms; all zero if nothing is felt."""
    if not norms:
        return {}
    weighted = {name: (norm * applied[name]).abs() for name, norm in norms.items()}
    whole = torch.stack(list(weighted.values())).sum()
    return {name: torch.where(whole > 0, value / whole, torch.zeros_like(value)) for name, value in weighted.items()}


def hardly_felt(share: float, weight: float | Share) -> bool:
    """Whether a share below 1 % was not meant: neither a weight of 0 nor a share that was asked to be that small.

    Exactly 0 under a fixed weight is a term that does not reach the backbone at all, as a gate's regulariser.
    """
    if isinstance(weight, Share):
        return weight.value > 0 and share < min(FELT, weight.value / 2)
    return weight != 0 and 0 < share < FELT


def gradient_norm(value: Tensor, parameters: Iterable[nn.Parameter], scale: Tensor) -> Tensor:
    """The norm of a term's gradient on `parameters`, taken at `scale` times the term and divided by it again.

    Of several processes each gives the gradient that flows through its own images; the norm is that of their sum.
    Under fp16 `scale` keeps small gradients from vanishing. The graph is kept. Not finite where the gradient is not.
    """
    if not value.requires_grad:
        return torch.zeros_like(scale)
    gradients = torch.autograd.grad(value * scale, list(parameters), retain_graph=True, allow_unused=True)
    used = [gradient for gradient in gradients if gradient is not None]
    ranks.add_up(used)
    return torch.nn.utils.get_total_norm(used) / scale if used else torch.zeros_like(scale)


class Balancer:
    """Measures the terms of one student and turns their weights into factors.

    Args:
        parameters: the parameters of the student's backbone.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._norms: dict[str, Tensor] = {}

    def due(self, step: int, weights: Mapping[str, float | Share]) -> bool:
        """Whether to measure at this step: by the calendar, or because a term acts that was never measured.

        A term that acts alone has nothing to be compared with.
        """
        acting = _acting(weights)
        if len(acting) < 2:
            return False
        return step % EVERY == 0 or step in EARLY or any(name not in self._norms for name in acting)

    def measure(self, terms: Mapping[str, Term], scale: Tensor) -> None:
        """Measures every term whose weight is not 0 and takes it into the smoothed norm.

        Args:
            terms: of this step, their graphs still there.
            scale: see `gradient_norm`.
        """
        for name in _acting({name: term.weight for name, term in terms.items()}):
            new = gradient_norm(terms[name].value, self._parameters, scale)
            old = self._norms.get(name, torch.zeros_like(new))
            smoothed = torch.where(old > 0, SMOOTHING * old + (1 - SMOOTHING) * new, new)
            self._norms[name] = torch.where(new.isfinite(), smoothed, old)

    def factors(self, weights: Mapping[str, float | Share]) -> dict[str, float | Tensor]:
        """What each term is multiplied by, see `find_factors`.

        Raises:
            InputError: the shares leave nothing for the rest, or there is no rest.
        """
        return find_factors(self._norms, weights)

    def shares(self, weights: Mapping[str, float | Share]) -> dict[str, Tensor]:
        """The part of the whole that each term has under these weights, see `felt_shares`; none if one acts alone."""
        acting = _acting(weights)
        if len(acting) < 2:
            return {}
        return felt_shares({name: self._norms[name] for name in acting}, self.factors(weights))

    def state_dict(self) -> dict[str, Tensor]:
        """The smoothed norms by term."""
        return dict(self._norms)

    def load_state_dict(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Takes over smoothed norms."""
        self._norms = {name: norm.to(device) for name, norm in state.items()}


def _acting(weights: Mapping[str, float | Share]) -> list[str]:
    return [name for name, weight in weights.items() if (weight.value if isinstance(weight, Share) else weight) != 0]
