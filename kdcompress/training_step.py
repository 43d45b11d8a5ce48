"""One training step, and everything that changes by it.

Nothing in a step waits for the device: what was measured is noted there and read at log points (`ledger.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from kdcompress import ranks
from kdcompress.balance import Balancer
from kdcompress.checkpoint import not_finite, seed_step
from kdcompress.errors import InputError, NonFiniteError
from kdcompress.execution import Execution, autocast, compiled
from kdcompress.global_batch import gather, gather_answers, gather_outputs
from kdcompress.ledger import Ledger
from kdcompress.methods.base import Method
from kdcompress.networks import Student
from kdcompress.optim import Optimisation, WeightAverage, build_optimizer, learning_rate, parameter_groups
from kdcompress.types import Batch, EnsembleOutputs, Images, LossTerms, Outputs, Share, Step, TeacherSource

SelfTeacher: TypeAlias = Callable[[Images], Outputs]
"""A student's own pre-trained copy, frozen."""


@dataclass(frozen=True)
class EpochResult:
    """What one epoch brought; tuples have one entry per student.

    Args:
        epoch: counted from 1.
        losses: mean of the weighted loss over the epoch's steps.
        val_top1: accuracy on val, a fraction of 1; empty without val.
        val_top1_ema: the same of the averaged weights; empty without val or average.
        seconds: of the training up to here, all sessions together.
    """

    epoch: int
    losses: tuple[float, ...]
    val_top1: tuple[float, ...]
    val_top1_ema: tuple[float, ...]
    seconds: float


class Run:
    """Everything that changes while training, all of it in `last.pt`."""

    def __init__(
        self,
        students: Sequence[Student],
        methods: Sequence[Method],
        optimisation: Optimisation,
        device: torch.device,
        execution: Execution,
        steps_per_epoch: int,
        num_steps: int,
        seed: int,
    ) -> None:
        self.execution = execution
        self.students = [student.to(device).to(memory_format=execution.memory_format) for student in students]
        self._forwards: list[Callable[[Images], Outputs]] = [
            compiled(student) if execution.compiled else student for student in self.students
        ]
        self.methods = [method.to(device) for method in methods]
        self.optimisation = optimisation
        self.device = device
        self.steps_per_epoch = steps_per_epoch
        self.num_steps = num_steps
        self.num_warmup_steps = min(round(optimisation.warmup_epochs * steps_per_epoch), num_steps // 2)
        self.seed = seed
        self.optimizers = [
            build_optimizer(parameter_groups(student, method, optimisation.weight_decay), optimisation, device)
            for student, method in zip(self.students, self.methods, strict=True)
        ]
        self.scaler = torch.amp.GradScaler(device.type, enabled=execution.precision == "fp16")
        self.balancers = [Balancer(student.backbone_parameters()) for student in self.students]
        decay = optimisation.ema
        self.averages = [WeightAverage(student, decay) for student in self.students] if decay else []
        self.ledger = Ledger()
        self.weights: list[dict[str, float | Share]] = [{} for _ in self.students]
        self.step = 0
        self.seconds = 0.0
        self.history: list[EpochResult] = []
        self.warned: list[str] = []
        self.claims: dict[str, str] = {}

    def rate(self, step: int) -> float:
        """The learning rate of one step."""
        settings = self.optimisation
        return learning_rate(
            step,
            self.num_steps,
            base=settings.lr,
            schedule=settings.schedule,
            num_warmup_steps=self.num_warmup_steps,
            milestones=settings.milestones,
            decay=settings.decay,
        )

    def train_mode(self) -> None:
        """Students and methods as they train."""
        for module in (*self.students, *self.methods):
            module.train()

    def eval_mode(self) -> None:
        """Students and methods as they are measured."""
        for module in (*self.students, *self.methods):
            module.eval()

    def autocast(self) -> torch.autocast:
        """Where the students run; the losses do not."""
        return autocast(self.device, self.execution.precision)

    def ask(self, images: Images) -> list[Outputs]:
        """What each student says. A compiled one answers in training only: other batches have other sizes."""
        with self.autocast():
            return [
                _full_precision(forward(images) if student.training else student(images))
                for student, forward in zip(self.students, self._forwards, strict=True)
            ]

    @torch.no_grad()
    def ask_teachers(self, batch: Batch, teachers: TeacherSource | None) -> EnsembleOutputs | None:
        """What the teachers say."""
        return None if teachers is None else teachers(batch)

    @torch.no_grad()
    def ask_self_teachers(
        self, images: Images, self_teachers: Sequence[SelfTeacher] | None
    ) -> Sequence[Outputs | None]:
        """What each student's own pre-trained copy says."""
        if self_teachers is None:
            return [None] * len(self.students)
        with self.autocast():
            return [_full_precision(self_teacher(images)) for self_teacher in self_teachers]

    def steps(
        self,
        batch: Batch,
        outputs: Sequence[Outputs],
        answers: EnsembleOutputs | None,
        own: Sequence[Outputs | None],
    ) -> Iterator[Step]:
        """What each method gets to see of the global batch: its student with gradient, the others without."""
        count = batch.global_size
        labels, label_targets = gather(batch.labels, count), gather(batch.label_targets, count)
        teachers = None if answers is None else gather_answers(answers, count)
        peers = [gather_outputs(output.detach(), count) for output in outputs] if len(outputs) > 1 else []
        for index, (output, copy) in enumerate(zip(outputs, own, strict=True)):
            yield Step(
                labels=labels,
                label_targets=label_targets,
                student=gather_outputs(output, count),
                teachers=teachers,
                peers=tuple(peer for other, peer in enumerate(peers) if other != index),
                self_teacher=None if copy is None else gather_outputs(copy, count),
                student_index=index,
                progress=self.step / self.num_steps,
            )

    def advance(
        self, batch: Batch, teachers: TeacherSource | None, self_teachers: Sequence[SelfTeacher] | None
    ) -> None:
        """One training step on a batch that is on the device."""
        seed_step(self.seed, self.step, self.device)
        answers = self.ask_teachers(batch, teachers)
        own = self.ask_self_teachers(batch.images, self_teachers)
        with self._own_draws():
            outputs = self.ask(batch.images)

        measured: dict[str, Tensor] = {}
        for index, step in enumerate(self.steps(batch, outputs, answers, own)):
            losses = self._terms(index, step)
            loss = self._weigh(index, losses)
            torch.autograd.backward(self.scaler.scale(loss))
            measured[f"{index}/loss"] = loss.detach()
            measured |= {f"{index}/terms/{name}": term.value.detach() for name, term in losses.terms.items()}
            measured |= {f"{index}/diagnostics/{name}": value for name, value in losses.diagnostics.items()}

        self._add_up_gradients()
        rate = self.rate(self.step)
        for index, optimizer in enumerate(self.optimizers):
            for group in optimizer.param_groups:
                group["lr"] = rate
            if self.optimisation.clip_norm is not None:
                self.scaler.unscale_(optimizer)
                for name, module in (("gradient_norm", self.students[index]), ("method_norm", self.methods[index])):
                    if trained := [parameter for parameter in module.parameters() if parameter.requires_grad]:
                        norm = nn.utils.clip_grad_norm_(trained, self.optimisation.clip_norm)
                        measured[f"{index}/{name}"] = norm
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        for average in self.averages:
            average.update(self.step)

        self.ledger.note(self.step, measured)
        self.step += 1

    @contextlib.contextmanager
    def _own_draws(self) -> Iterator[None]:
        """Inside the block each of several processes draws for itself; behind it all are where they were before."""
        if ranks.size() == 1:
            yield
            return
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            seed_step(self.seed, self.step, self.device, ranks.rank())
            yield

    def _add_up_gradients(self) -> None:
        """Makes of each process's gradients those of the global batch.

        A student's flow through the process's own images, so they add up; a method's flow through all images anywhere.
        """
        if ranks.size() == 1:
            return
        flowing, alike = (
            [parameter.grad for module in modules for parameter in module.parameters() if parameter.grad is not None]
            for modules in (self.students, self.methods)
        )
        for gradient in alike:
            gradient.div_(ranks.size())
        ranks.add_up([*flowing, *alike])

    @torch.no_grad()
    def start_alike(self) -> None:
        """Gives every process the weights of the leading one."""
        for module in (*self.students, *self.methods):
            ranks.take_over(list(module.state_dict().values()))

    def share_statistics(self) -> None:
        """Gives every process the mean of the statistics that each one's normalisation layers took of its own images.

        They are running means, so it makes no difference how often this is done.
        """
        found: list[Tensor] = []
        for index, student in enumerate(self.students):
            trained = {name for name, _ in student.named_parameters()}
            states = [student.state_dict(), *(average.state_dict() for average in self.averages[index : index + 1])]
            for state in states:
                found += [held for name, held in state.items() if name not in trained and held.is_floating_point()]
        ranks.average(found)

    def _terms(self, index: int, step: Step) -> LossTerms:
        """What a method answers.

        Raises:
            InputError: it answers something else, or what does not depend on the student.
        """
        method = self.methods[index]
        losses: Any = method(step)
        name = type(method).__name__
        if not isinstance(losses, LossTerms):
            raise InputError(f"{name} answers a {type(losses).__name__}, a method answers LossTerms", where=name)
        if not any(term.value.requires_grad for term in losses.terms.values()):
            raise InputError(f"no term of {name} depends on the student", where=", ".join(losses.terms))
        return losses

    def _weigh(self, index: int, losses: LossTerms) -> Tensor:
        """The sum of the terms under their factors; the terms are measured first if it is time."""
        balancer = self.balancers[index]
        weights = {name: term.weight for name, term in losses.terms.items()}
        self.weights[index] = weights
        if balancer.due(self.step, weights):
            balancer.measure(losses.terms, scale=self.scaler.scale(torch.ones((), device=self.device)))
        factors = balancer.factors(weights)
        acting = [
            losses.terms[name].value * factor
            for name, factor in factors.items()
            if isinstance(factor, Tensor) or factor != 0
        ]
        if not acting:
            raise InputError(f"every term of the loss has weight 0: {', '.join(weights)}", where="the method's weights")
        return torch.stack(acting).sum()

    def require_finite(self) -> None:
        """Waits for the device.

        Raises:
            NonFiniteError: a loss since the last time, or a weight, is not finite.
        """
        self.ledger.settle()
        weights = {
            "student": [student.state_dict() for student in self.students],
            "method": [dict(method.named_parameters()) for method in self.methods],
            "optimizer": [optimizer.state_dict()["state"] for optimizer in self.optimizers],
            "average": [average.state_dict() for average in self.averages],
        }
        name = not_finite(weights)
        if name is not None:
            raise NonFiniteError(
                f"after step {self.step} {name} is not finite, though every loss was",
                where=f"the last losses: {self.ledger.describe_last()}",
                fix="a lower train.lr, train.clip_norm=5, or train.precision=fp32",
            )

    def state_dict(self) -> dict[str, Any]:
        """All of it, as `last.pt` holds it."""
        return {
            "students": [student.state_dict() for student in self.students],
            "methods": [method.state_dict() for method in self.methods],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "balancers": [balancer.state_dict() for balancer in self.balancers],
            "averages": [average.state_dict() for average in self.averages],
            "ledger": self.ledger.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "history": [asdict(epoch) for epoch in self.history],
            "warned": self.warned,
            "claims": self.claims,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over all of it.

        Raises:
            KeyError, RuntimeError, ValueError: it does not fit.
        """
        for modules, states in ((self.students, state["students"]), (self.methods, state["methods"])):
            for module, saved in zip(modules, states, strict=True):
                module.load_state_dict(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.scaler.load_state_dict(state["scaler"])
        for balancer, saved in zip(self.balancers, state["balancers"], strict=True):
            balancer.load_state_dict(saved, self.device)
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.load_state_dict(saved)
        self.ledger.load_state_dict(state["ledger"])
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.history = [EpochResult(**epoch) for epoch in state["history"]]
        self.warned = list(state["warned"])
        self.claims = dict(state["claims"])

    def finish(self) -> None:
        """Gives the students the weights that are exported."""
        for average in self.averages:
            average.apply()
        self.eval_mode()


def _full_precision(outputs: Outputs) -> Outputs:
    return Outputs(outputs.logits.float(), {name: value.float() for name, value in outputs.features.items()})
