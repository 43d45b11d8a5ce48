"""What was measured at each step: noted on the device, read from it only when somebody asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kdcompress.errors import NonFiniteError

LOSS = "loss"
"""`student/loss` names a value that has to be finite."""
TERMS = "terms"
"""`student/terms/name` names a part of it."""


class Means:
    """Running means of named values, in double precision on the CPU."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Takes in one value of each name."""
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value.double() if name in self._sums else value.double()
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, Any]:
        """The means, as a number or as nested lists, in the order in which the names came; starts anew."""
        means = {name: (total / self._counts[name]).tolist() for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """Sums and counts."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over sums and counts."""
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])


class Ledger:
    """The values of each step, named `student/terms/kl` and the like.

    `note` does not wait for the device; `settle` does. What is settled counts towards `window`, the means since the
    last log line, and `epoch`, the means of this epoch.
    """

    def __init__(self) -> None:
        self.window = Means()
        self.epoch = Means()
        self._pending: list[tuple[int, dict[str, torch.Size], Tensor]] = []
        self._last: dict[str, Tensor] = {}

    @torch.no_grad()
    def note(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Takes down one step's values, of any shape, all on one device."""
        flat = torch.cat([value.reshape(-1).float() for value in values.values()])
        self._pending.append((step, {name: value.shape for name, value in values.items()}, flat))

    def settle(self) -> None:
        """Reads everything that is pending.

        Raises:
            NonFiniteError: a loss is not finite; names the first such step and the last finite terms.
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        everything = torch.cat([flat for _, _, flat in pending]).cpu()
        rows = torch.split(everything, [flat.numel() for _, _, flat in pending])
        for (step, shapes, _), row in zip(pending, rows, strict=True):
            pieces = torch.split(row, [shape.numel() for shape in shapes.values()])
            values = {name: piece.view(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
            if not all(bool(value.isfinite().all()) for name, value in values.items() if _is_loss(name)):
                raise _not_finite(step, values, self._last)
            self._last = values
            self.window.add(values)
            self.epoch.add(values)

    def describe_last(self) -> str:
        """Losses and terms of the last settled step, as `name value, name value`."""
        return _listing(self._last)

    def state_dict(self) -> dict[str, Any]:
        """Everything settled."""
        return {"window": self.window.state_dict(), "epoch": self.epoch.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what was settled."""
        self.window.load_state_dict(state["window"])
        self.epoch.load_state_dict(state["epoch"])


def _is_loss(name: str) -> bool:
    return name.rsplit("/", 1)[-1] == LOSS


def _listing(values: Mapping[str, Tensor]) -> str:
    """`loss 1.2, kl 1.1`: losses and terms only, with the student's number where there are several."""
    names = [name.split("/") for name in values]
    several = len({name[0] for name in names}) > 1
    return ", ".join(
        f"{f'student {student} ' if several else ''}{rest[-1]} {float(values['/'.join([student, *rest])]):.4g}"
        for student, *rest in names
        if rest[0] in (LOSS, TERMS)
    )


def _not_finite(step: int, values: Mapping[str, Tensor], last: Mapping[str, Tensor]) -> NonFiniteError:
    before = f"one step earlier: {_listing(last)}" if last else "no step before it was finite"
    return NonFiniteError(
        f"the loss is not finite at step {step}: {_listing(values)}",
        where=before,
        fix="a lower train.lr, train.clip_norm=5, or train.precision=fp32",
    )
