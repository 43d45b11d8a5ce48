"""The held-out images, as `Method.refit` wants them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kdcompress.data import Split, eval_batches
from kdcompress.training_step import Run, SelfTeacher
from kdcompress.types import Batch, EnsembleOutputs, Outputs, Step, TeacherSource


class HeldOut:
    """The held-out images as the methods want them; what the teachers say of them is asked for once.

    Of several processes each asks about its part, and each refits on all.
    """

    def __init__(
        self,
        split: Split,
        run: Run,
        teachers: TeacherSource | None,
        self_teachers: Sequence[SelfTeacher] | None,
    ) -> None:
        self._split = split
        self._run = run
        self._teachers = teachers
        self._self_teachers = self_teachers
        self._kept: list[list[Step]] = []

    def refit(self, stop_if_asked: Callable[[], None]) -> list[Mapping[str, float]]:
        """Refits every method on all held-out images in eval mode; what each found."""
        run = self._run
        run.eval_mode()
        steps: list[list[Step]] = [[] for _ in run.students]
        for number, batch in enumerate(eval_batches(self._split, run.students[0].num_classes, divided=True)):
            stop_if_asked()
            for index, step in enumerate(self._steps(number, batch.to(run.device))):
                steps[index].append(step)
        return [method.refit(_join(parts)) for method, parts in zip(run.methods, steps, strict=True)]

    @torch.no_grad()
    def _steps(self, number: int, batch: Batch) -> list[Step]:
        """One batch for each method, reduced; the teachers' part comes from the first time."""
        run = self._run
        outputs = run.ask(batch.images)
        if number < len(self._kept):
            fresh = run.steps(batch, outputs, None, [None] * len(outputs))
            steps = [
                replace(step, teachers=kept.teachers, self_teacher=kept.self_teacher)
                for step, kept in zip(fresh, self._kept[number], strict=True)
            ]
        else:
            answers = run.ask_teachers(batch, self._teachers)
            own = run.ask_self_teachers(batch.images, self._self_teachers)
            steps = list(run.steps(batch, outputs, answers, own))
        reduced = [method.reduce_heldout(step) for method, step in zip(run.methods, steps, strict=True)]
        if number == len(self._kept):
            self._kept.append([replace(step, student=Outputs(step.student.logits), peers=()) for step in reduced])
        return reduced


def _join(steps: Sequence[Step]) -> Step:
    """Several batches as one."""
    first = steps[0]
    return replace(
        first,
        labels=torch.cat([step.labels for step in steps]),
        label_targets=torch.cat([step.label_targets for step in steps]),
        student=_join_outputs([step.student for step in steps]),
        teachers=_join_answers([step.teachers for step in steps if step.teachers is not None]),
        peers=tuple(_join_outputs(peer) for peer in zip(*(step.peers for step in steps), strict=True)),
        self_teacher=_join_outputs([step.self_teacher for step in steps if step.self_teacher is not None])
        if first.self_teacher is not None
        else None,
    )


def _join_outputs(parts: Sequence[Outputs]) -> Outputs:
    return Outputs(torch.cat([part.logits for part in parts]), _join_features([part.features for part in parts]))


def _join_answers(parts: Sequence[EnsembleOutputs]) -> EnsembleOutputs | None:
    if not parts:
        return None
    features = tuple(_join_features(maps) for maps in zip(*(part.features for part in parts), strict=True))
    return EnsembleOutputs(torch.cat([part.logits for part in parts]), features, parts[0].teacher_ids)


def _join_features(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
