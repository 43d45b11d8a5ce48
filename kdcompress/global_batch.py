"""The global batch of several processes: each asks its networks about a part, each method sees the whole.

All ranks compute the same loss of the global batch. Of its gradient each takes the part that flows into its own
images; the sum of these over the ranks is the gradient that one process would have. So a method needs not know how
many processes there are, whatever it relates: images, classes, labelled ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from kdcompress import ranks
from kdcompress.types import EnsembleOutputs, Outputs


def gather(rows: Tensor, count: int) -> Tensor:
    """The rows of all ranks, `count` together; this rank's own keep their gradient."""
    if ranks.size() == 1:
        return rows
    whole = ranks.join_rows(rows.detach(), count)
    if not rows.requires_grad:
        return whole
    mine = ranks.part(count)
    return torch.cat([whole[: mine.start], rows, whole[mine.stop :]])


class GatheredMaps(Mapping[str, Tensor]):
    """Feature maps of the global batch; one travels when it is first looked at, and not before.

    Args:
        maps: of this rank's images.
        count: images of the global batch.
    """

    def __init__(self, maps: Mapping[str, Tensor], count: int) -> None:
        self._maps = maps
        self._count = count
        self._gathered: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._gathered:
            self._gathered[name] = gather(self._maps[name], self._count)
        return self._gathered[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._maps)

    def __len__(self) -> int:
        return len(self._maps)


def gather_outputs(outputs: Outputs, count: int) -> Outputs:
    """What a network said of the global batch; with gradient where this rank's part has one."""
    if ranks.size() == 1:
        return outputs
    return Outputs(gather(outputs.logits, count), GatheredMaps(outputs.features, count))


def gather_answers(answers: EnsembleOutputs, count: int) -> EnsembleOutputs:
    """What the teachers said of the global batch."""
    if ranks.size() == 1:
        return answers
    maps = tuple(GatheredMaps(one, count) for one in answers.features)
    return EnsembleOutputs(gather(answers.logits, count), maps, answers.teacher_ids)
