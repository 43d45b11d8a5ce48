"""The loop: what it computes, what it leaves behind, and that it goes on exactly."""

import json
import math
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcompress.checkpoint import load_state, save_state
from kdcompress.data import eval_batches
from kdcompress.errors import (
    CheckpointError,
    InputError,
    InterruptedRunError,
    NonFiniteError,
    OutputError,
    RunError,
)
from kdcompress.evaluate import evaluate
from kdcompress.execution import Execution, Precision
from kdcompress.networks import Student
from kdcompress.optim import Optimisation, learning_rate
from kdcompress.train import TrainResult, train
from kdcompress.types import Images, LossTerms, Outputs, Share, Step, Term
from tests.unit.tiny import (
    NUM_CLASSES,
    Everything,
    Labels,
    TinyTeachers,
    quiet,
    run_in_process,
    tiny_images,
    tiny_loader,
    tiny_student,
    train_everything,
)

NUM_STEPS = 7
"""Of one epoch of `tiny_loader()`."""


def train_labels(out: Path, method: Any = None, student: Student | None = None, **changes: Any) -> TrainResult:
    """One student, one simple method, no teachers."""
    arguments: dict[str, Any] = {
        "epochs": 2,
        "optimisation": Optimisation(lr=0.1, warmup_epochs=0.0),
        "display": quiet(),
        **changes,
    }
    chosen = method if method is not None else Labels()
    return train([student or tiny_student()], [chosen], None, tiny_loader(), out=out, **arguments)


def weights(result: TrainResult) -> dict[str, Tensor]:
    return {
        f"{index}.{name}": tensor
        for index, student in enumerate(result.students)
        for name, tensor in student.state_dict().items()
    }


def assert_same(one: Any, other: Any, name: str = "") -> None:
    """Bit for bit, all the way down."""
    if isinstance(one, Tensor):
        assert torch.equal(one, other), name
    elif isinstance(one, Mapping):
        assert list(one) == list(other), name
        for key in one:
            assert_same(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), name
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{name}.{index}")
    else:
        assert one == other, name


def state_of(out: Path) -> dict[str, Any]:
    """The run's state, less what the clock says."""
    run = load_state(out / "last.pt")["run"]
    for epoch in run["history"]:
        del epoch["seconds"]
    del run["seconds"]
    return run


def lines_of(out: Path, *events: str) -> list[dict[str, Any]]:
    """The log's lines of these kinds, less what the clock and the machine say."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    measured = {"seconds", "images_per_s", "data_wait", "peak_memory_mb"}
    return [{key: line[key] for key in line if key not in measured} for line in lines if line["event"] in events]


class Failing(Labels):
    """Does something to the run at one step."""

    def __init__(self, at: int, act: Any) -> None:
        super().__init__()
        self.at = at
        self.act = act
        self.count = 0

    def forward(self, step: Step) -> LossTerms:
        losses = super().forward(step)
        self.count += 1
        return self.act(losses) if self.count == self.at else losses


def test_one_step_is_the_step_of_its_formula(tmp_path: Path) -> None:
    loader = tiny_loader(num_images=30)
    student, method = tiny_student(dropout=0.0), Everything()
    reference, regressor = tiny_student(dropout=0.0), Everything().regressor
    batch = next(iter(loader.epoch(0)))
    answers = torch.no_grad()(TinyTeachers())(batch)

    settings = Optimisation(lr=0.1, momentum=0.0, weight_decay=0.01, schedule="constant", warmup_epochs=0.0)
    train([student], [method], TinyTeachers(), loader, epochs=1, optimisation=settings, out=tmp_path, display=quiet())

    reference.train()
    said = reference(batch.images)
    torch.default_generator.set_state(_generator_of_step_0())
    noisy = answers.logits.mean(1) + 0.1 * torch.rand_like(said.logits)
    labels = -(batch.label_targets * said.logits.log_softmax(1)).sum(1).mean()
    soft = noisy.softmax(1)
    kl = (soft * (soft.log() - said.logits.log_softmax(1))).sum(1).mean()
    pooled = F.adaptive_avg_pool2d(answers.features[0]["stage1"], 4)
    hint = (regressor(said.features["stage2"]) - pooled).square().mean()
    backbone = list(reference.backbone_parameters())
    norms = [_norm(torch.autograd.grad(term, backbone, retain_graph=True)) for term in (labels, kl, hint)]
    factor = 0.2 * (norms[0] + 0.5 * norms[1]) / (0.8 * norms[2])
    (labels + 0.5 * kl + factor * hint).backward()
    with torch.no_grad():
        for parameter in (*reference.parameters(), *regressor.parameters()):
            decay = 0.01 if parameter.ndim > 1 else 0.0
            parameter -= 0.1 * (parameter.grad + decay * parameter)

    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(tensor, reference.state_dict()[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(method.regressor.weight, regressor.weight, rtol=1e-4, atol=1e-6)


def _generator_of_step_0() -> Tensor:
    from kdcompress.checkpoint import seed_step

    seed_step(0, 0, torch.device("cpu"))
    return torch.default_generator.get_state()


def _norm(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients]).norm()


def test_it_learns_and_reports(tmp_path: Path) -> None:
    val = tiny_images(200, seed=3)
    result = train_labels(tmp_path, epochs=8, val=val)
    student = result.students[0]
    assert not student.training
    accuracy = evaluate(lambda images: student(images).logits, eval_batches(val, NUM_CLASSES), NUM_CLASSES)
    assert result.history[-1].val_top1 == (accuracy.top1,)
    assert accuracy.top1 > 0.9
    assert [epoch.epoch for epoch in result.history] == list(range(1, 9))
    assert result.history[-1].losses[0] < 0.5 * result.history[0].losses[0]
    assert result.history[-1].val_top1_ema == ()
    assert 0 < result.history[0].seconds < result.history[-1].seconds <= result.seconds


def test_the_log_holds_every_log_point_and_every_epoch(tmp_path: Path) -> None:
    train_everything(tmp_path, epochs=10)
    steps, epochs = lines_of(tmp_path, "step"), lines_of(tmp_path, "epoch")
    ends = [NUM_STEPS * epoch for epoch in range(1, 11)]
    assert [line["step"] for line in steps] == sorted({*ends, 50})
    assert [line["step"] for line in epochs] == ends
    assert [line["epoch"] for line in lines_of(tmp_path, "refit")] == [e for e in range(1, 11) for _ in range(2)]
    for line in steps:
        assert line["lr"] == pytest.approx(
            learning_rate(line["step"] - 1, 70, base=0.05, schedule="cosine", num_warmup_steps=4)
        )
        for student in line["students"]:
            assert set(student["terms"]) == {"labels", "kl", "hint", "peer0"}
            assert sum(student["shares"].values()) == pytest.approx(1)
            asked = 0.2 * (1 - (line["step"] - 1) / 70)
            assert student["shares"]["hint"] == pytest.approx(asked, rel=1e-4)
            assert len(student["diagnostics"]["largest"]) == NUM_CLASSES
            assert student["gradient_norm"] > 0
    first, epoch = steps[0]["students"][0], epochs[0]["students"][0]
    assert first["loss"] == pytest.approx(epoch["loss"])


def test_students_see_their_peers_before_any_of_them_moves(tmp_path: Path) -> None:
    seen: list[tuple[int, Tensor, Tensor, bool]] = []

    class Watching(Labels):
        def forward(self, step: Step) -> LossTerms:
            (peer,) = step.peers
            seen.append((step.student_index, step.student.logits.detach(), peer.logits, peer.logits.requires_grad))
            return super().forward(step)

    students = [tiny_student(0), tiny_student(1)]
    train(
        students,
        [Watching(), Watching()],
        None,
        tiny_loader(),
        epochs=1,
        optimisation=Optimisation(),
        out=tmp_path,
        display=quiet(),
    )
    assert [index for index, *_ in seen] == [0, 1] * NUM_STEPS
    for (_, own, other, graph), (_, own_b, other_b, graph_b) in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(own, other_b)
        assert torch.equal(own_b, other)
        assert not graph
        assert not graph_b


def test_self_teachers_answer_without_gradient_and_progress_runs(tmp_path: Path) -> None:
    copy = tiny_student(5).eval()
    seen: list[Step] = []

    class Watching(Labels):
        def forward(self, step: Step) -> LossTerms:
            seen.append(step)
            return super().forward(step)

    train_labels(tmp_path, Watching(), epochs=1, self_teachers=[copy])
    assert [step.progress for step in seen] == pytest.approx([k / NUM_STEPS for k in range(NUM_STEPS)])
    assert all(step.self_teacher is not None and not step.self_teacher.logits.requires_grad for step in seen)
    assert all(step.teachers is None and step.peers == () for step in seen)
    batches = list(tiny_loader().epoch(0))
    assert torch.equal(seen[2].self_teacher.logits, copy(batches[2].images).logits)


def test_refit_sees_all_held_out_images_in_eval_mode_once_per_epoch(tmp_path: Path) -> None:
    class Keeping(Everything):
        def reduce_heldout(self, step: Step) -> Step:
            assert not torch.is_grad_enabled()
            return step

    heldout = tiny_images(300, seed=1)
    student, method, teachers = tiny_student(), Keeping(), TinyTeachers()
    train(
        [student],
        [method],
        teachers,
        tiny_loader(),
        epochs=2,
        optimisation=Optimisation(lr=1e-12, weight_decay=0.0),
        out=tmp_path,
        display=quiet(),
        heldout=heldout,
    )
    assert teachers.calls == 2 * NUM_STEPS + 2
    assert len(method.refitted) == 2
    fresh = tiny_student().eval()
    images = torch.cat([batch.images for batch in eval_batches(heldout, NUM_CLASSES)])
    first, second = method.refitted
    torch.testing.assert_close(first.student.logits, fresh(images).logits.detach(), rtol=1e-4, atol=1e-5)
    assert first.student.features["stage2"].shape == (300, 6, 4, 4)
    assert torch.equal(first.labels, heldout.labels)
    assert first.teachers is not None
    assert second.teachers is not None
    assert first.teachers.logits.shape == (300, 2, NUM_CLASSES)
    assert_same(first.teachers.features, second.teachers.features)
    assert second.progress == 0.5


def test_the_average_is_what_is_returned_and_what_val_measures(tmp_path: Path) -> None:
    val = tiny_images(90, seed=2)
    settings = Optimisation(lr=0.1, ema=0.95, warmup_epochs=0.0)
    result = train_labels(tmp_path, optimisation=settings, val=val)
    state = state_of(tmp_path)
    assert_same(dict(result.students[0].state_dict()), dict(state["averages"][0]))
    raw = tiny_student()
    raw.load_state_dict(state["students"][0])
    raw.eval()
    for student, top1 in ((raw, result.history[-1].val_top1), (result.students[0], result.history[-1].val_top1_ema)):
        accuracy = evaluate(lambda images: student(images).logits, eval_batches(val, NUM_CLASSES), NUM_CLASSES)  # noqa: B023
        assert top1 == (accuracy.top1,)


def test_clipping_bounds_the_first_update(tmp_path: Path) -> None:
    settings = Optimisation(
        lr=1.0, momentum=0.0, weight_decay=0.0, schedule="constant", clip_norm=1e-3, warmup_epochs=0.0
    )
    before = [parameter.detach().clone() for parameter in tiny_student().parameters()]
    student = tiny_student()
    loader = tiny_loader(num_images=30)
    train([student], [Labels()], None, loader, epochs=1, optimisation=settings, out=tmp_path, display=quiet())
    moved = [new - old for new, old in zip(student.parameters(), before, strict=True)]
    assert float(_norm(tuple(moved)).detach()) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_losses_are_full_precision_under_autocast(tmp_path: Path, precision: Precision) -> None:
    seen: list[Step] = []

    class Watching(Everything):
        def forward(self, step: Step) -> LossTerms:
            assert not torch.is_autocast_enabled("cpu")
            seen.append(step)
            return super().forward(step)

    result = train(
        [tiny_student()],
        [Watching()],
        TinyTeachers(),
        tiny_loader(),
        epochs=4,
        optimisation=Optimisation(lr=0.1, clip_norm=1.0),
        out=tmp_path,
        display=quiet(),
        execution=Execution(precision),
        val=tiny_images(50, seed=2),
    )
    step = seen[0]
    assert step.teachers is not None
    tensors = [step.student.logits, *step.student.features.values(), step.teachers.logits]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert torch.equal(step.student.logits, step.student.logits.to(low).float())
    assert result.history[-1].losses[0] < result.history[0].losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in result.students[0].parameters())


# Bad losses


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_last_terms(tmp_path: Path) -> None:
    method = Failing(10, lambda losses: LossTerms({"labels": Term(losses.terms["labels"].value * float("nan"))}))
    with pytest.raises(NonFiniteError) as caught:
        train_labels(tmp_path, method)
    assert "at step 9" in caught.value.what
    assert caught.value.where.startswith("one step earlier: loss ")
    assert " labels " in caught.value.where
    saved = load_state(tmp_path / "last.pt")["run"]
    assert saved["step"] == NUM_STEPS
    assert all(bool(tensor.isfinite().all()) for tensor in saved["students"][0].values())


def test_held_out_images_are_not_asked_about_where_no_method_refits(tmp_path: Path) -> None:
    teachers = TinyTeachers()
    train(
        [tiny_student()],
        [Labels()],
        teachers,
        tiny_loader(),
        epochs=1,
        optimisation=Optimisation(),
        out=tmp_path,
        display=quiet(),
        heldout=tiny_images(30, seed=1),
    )
    assert teachers.calls == NUM_STEPS


def test_a_state_that_is_not_finite_never_replaces_a_good_one(tmp_path: Path) -> None:
    student = tiny_student()

    def spoil(losses: LossTerms) -> LossTerms:
        value = losses.terms["labels"].value
        return LossTerms({"labels": Term(value + 0 * (value - value.detach()).sqrt())})  # finite, its gradient is not

    with pytest.raises(NonFiniteError) as caught:
        train_labels(tmp_path, Failing(2 * NUM_STEPS, spoil), student)
    assert f"after step {2 * NUM_STEPS} student.0." in caught.value.what
    assert load_state(tmp_path / "last.pt")["run"]["step"] == NUM_STEPS


def test_a_term_of_weight_zero_may_be_anything(tmp_path: Path) -> None:
    class Spoilt(Labels):
        def forward(self, step: Step) -> LossTerms:
            bad = step.student.logits.sum() * float("nan")
            return LossTerms({**super().forward(step).terms, "off": Term(bad, 0.0), "faded": Term(bad, Share(0.0))})

    assert math.isfinite(train_labels(tmp_path, Spoilt()).history[-1].losses[0])


def test_a_loss_without_any_weight_is_refused(tmp_path: Path) -> None:
    method = Failing(1, lambda losses: LossTerms({"labels": Term(losses.terms["labels"].value, 0.0)}))
    with pytest.raises(InputError, match="every term of the loss has weight 0: labels"):
        train_labels(tmp_path, method)


def test_a_term_that_is_hardly_felt_is_warned_about_once(tmp_path: Path) -> None:
    class Inert(Labels):
        def forward(self, step: Step) -> LossTerms:
            hint = 1e-6 * step.student.features["stage2"].square().mean()
            faded = Term(hint, Share(0.0))
            return LossTerms({**super().forward(step).terms, "hint": Term(hint), "faded": faded})

    train_labels(tmp_path, Inert())
    (warning,) = lines_of(tmp_path, "warning")
    assert "hint" in warning["text"]


# Going on


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_interrupted_again_and_again_it_ends_in_the_same_bits(tmp_path: Path, optimizer: str) -> None:
    whole = train_everything(tmp_path / "whole", optimizer=optimizer)

    for done in (0, 3, 6, 7, 16, 20):
        with pytest.raises(InterruptedRunError) as caught:
            train_everything(tmp_path / "parts", optimizer=optimizer, resume=True, interrupt_at=done / 21)
        assert f"stopped by SIGTERM after step {done + 1} of 21" in caught.value.what
        assert "--resume" in caught.value.fix
    parts = train_everything(tmp_path / "parts", optimizer=optimizer, resume=True)

    assert_same(weights(whole), weights(parts))
    assert_same(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))
    events = ("step", "epoch", "refit")
    assert lines_of(tmp_path / "whole", *events) == lines_of(tmp_path / "parts", *events)


def _time_of(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.mark.parametrize(
    ("optimizer", "kills", "epochs"),
    [("sgd", 3, 6), ("adamw", 3, 6), pytest.param("sgd", 40, 60, marks=pytest.mark.slow)],
)
def test_killed_at_random_instants_it_ends_in_the_same_bits(
    tmp_path: Path, optimizer: str, kills: int, epochs: int
) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.unit.tiny"])
    rng = random.Random(f"{optimizer} {kills}")
    out = tmp_path / "killed"
    found: list[int] = []
    for attempt in range(5 * kills):
        before = _time_of(out / "last.pt")
        process = context.Process(target=run_in_process, args=(out, optimizer, epochs))
        process.start()
        while attempt and process.is_alive() and _time_of(out / "last.pt") == before:
            time.sleep(0.001)  # so that every attempt but the first gets on by at least one saved state
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        if (out / "last.pt").exists():
            found.append(load_state(out / "last.pt")["run"]["step"])
        # On a busy machine a kill may come before the next state: then some more are needed.
        if attempt + 1 >= kills and len(set(found)) > 1 and any(step % NUM_STEPS for step in found):
            break
    assert found
    process = context.Process(target=run_in_process, args=(out, optimizer, epochs))
    process.start()
    process.join()
    assert process.exitcode == 0

    train_everything(tmp_path / "whole", epochs=epochs, optimizer=optimizer)
    assert_same(state_of(tmp_path / "whole"), state_of(out))
    events = ("step", "epoch", "refit")
    assert lines_of(tmp_path / "whole", *events) == lines_of(out, *events)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = train_everything(tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    again = train_everything(tmp_path, resume=True)
    assert_same(weights(first), weights(again))
    assert [epoch.losses for epoch in first.history] == [epoch.losses for epoch in again.history]
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    train_labels(tmp_path)
    with pytest.raises(OutputError, match="already holds a run"):
        train_labels(tmp_path)


def test_another_run_is_refused_with_both_values(tmp_path: Path) -> None:
    train_labels(tmp_path, identity={"data": "aaa"})
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"epochs": 5}, ["2 epochs, not 5"]),
        ({"seed": 3}, ["seed was 0 and is now 3"]),
        ({"optimisation": Optimisation(lr=0.2, warmup_epochs=0.0)}, ["lr was 0.1 and is now 0.2"]),
        ({"identity": {"data": "bbb"}}, ["data was 'aaa' and is now 'bbb'"]),
        ({"method": Everything()}, ["'Labels'", "'Everything'"]),
    ]
    for changes, texts in cases:
        with pytest.raises(CheckpointError) as caught:
            train_labels(tmp_path, resume=True, **{"identity": {"data": "aaa"}, **changes})
        assert all(text in caught.value.what for text in texts), caught.value.what


def test_another_student_of_the_same_name_is_refused(tmp_path: Path) -> None:
    train_labels(tmp_path)
    state = load_state(tmp_path / "last.pt")
    state["run"]["students"][0].popitem()
    save_state(tmp_path / "last.pt", state)
    with pytest.raises(CheckpointError, match="does not fit this run"):
        train_labels(tmp_path, resume=True)


def test_another_machine_is_warned_about(tmp_path: Path) -> None:
    train_labels(tmp_path)
    state = load_state(tmp_path / "last.pt")
    state["environment"]["threads"] = 64
    save_state(tmp_path / "last.pt", state)
    train_labels(tmp_path, resume=True)
    (warning,) = lines_of(tmp_path, "warning")
    assert "threads was 64 and is now 1" in warning["text"]


def test_states_are_saved_by_the_clock(tmp_path: Path) -> None:
    saved: list[int] = []

    def look(losses: LossTerms) -> LossTerms:
        saved.append(load_state(tmp_path / "last.pt")["run"]["step"])
        return losses

    class Looking(Labels):
        def forward(self, step: Step) -> LossTerms:
            return look(super().forward(step))

    train_labels(tmp_path, Looking(), epochs=1, checkpoint_every_seconds=0.0)
    assert saved == list(range(NUM_STEPS))


def test_signals_act_as_before_afterwards_and_in_threads(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    train_labels(tmp_path / "main", epochs=1)
    assert signal.getsignal(signal.SIGINT) is before
    errors: list[BaseException] = []

    def run() -> None:
        try:
            train_labels(tmp_path / "thread", epochs=1)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not errors


def test_a_second_signal_acts_at_once(tmp_path: Path) -> None:
    def twice(losses: LossTerms) -> LossTerms:
        taking_down = signal.getsignal(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        until = time.monotonic() + 30
        while signal.getsignal(signal.SIGINT) == taking_down:  # another thread may take the signal first
            assert time.monotonic() < until, "the first signal was not taken down"
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        return losses

    outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            train_labels(tmp_path, Failing(3, twice))
    finally:
        signal.signal(signal.SIGINT, outside)
    assert load_state(tmp_path / "last.pt")["run"]["step"] == 0


def test_both_signals_at_once_are_one_request_to_stop(tmp_path: Path) -> None:
    """Python looks at all signals that have come together; a trace of a lost one would be a warning, thus an error."""
    both = (signal.SIGINT, signal.SIGTERM)

    def stop(losses: LossTerms) -> LossTerms:
        signal.pthread_sigmask(signal.SIG_BLOCK, both)
        for number in both:
            signal.pthread_kill(threading.get_ident(), number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
        return losses

    whole = train_labels(tmp_path / "whole")
    before = [signal.getsignal(number) for number in both]
    with pytest.raises(InterruptedRunError, match="stopped by SIGINT after step 3 of"):
        train_labels(tmp_path / "parts", Failing(3, stop))
    assert [signal.getsignal(number) for number in both] == before
    assert load_state(tmp_path / "parts" / "last.pt")["run"]["step"] == 3
    parts = train_labels(tmp_path / "parts", Failing(100, stop), resume=True)
    assert_same(weights(whole), weights(parts))


def test_an_interrupt_while_val_is_measured_is_obeyed_and_resumed(tmp_path: Path) -> None:
    whole = train_labels(tmp_path / "whole", val=tiny_images(50, seed=2))
    stopping = {"left": 1}

    class Student(type(tiny_student())):  # type: ignore[misc]
        def forward(self, images: Images) -> Outputs:
            if not self.training and stopping["left"]:
                stopping["left"] = 0
                os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(images)

    student = tiny_student()
    student.__class__ = Student
    with pytest.raises(InterruptedRunError):
        train_labels(tmp_path / "parts", student=student, val=tiny_images(600, seed=2))
    parts = train_labels(tmp_path / "parts", val=tiny_images(50, seed=2), resume=True)
    assert_same(weights(whole), weights(parts))
    assert [epoch.val_top1 for epoch in parts.history] == [epoch.val_top1 for epoch in whole.history]


def test_an_output_that_cannot_be_written_fails_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    method = Failing(1, lambda losses: pytest.fail("trained"))
    with pytest.raises((OutputError, RunError)):
        train_labels(tmp_path / "file" / "run", method)
