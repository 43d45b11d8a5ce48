"""Every loss against an independent float64 computation, written from the equations with loops over images."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kdcompress import losses

Array = NDArray[np.float64]


def softmax(z: Array, temperature: float = 1.0) -> Array:
    e = np.exp(z / temperature - np.max(z / temperature, axis=-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def huber(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def cosine_at(points: Array, i: int, j: int, k: int) -> float:
    a, b = points[i] - points[j], points[k] - points[j]
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / lengths) if lengths > 0 else 0.0


def angle_oracle(student: Array, teacher: Array) -> float:
    triples = itertools.product(range(len(student)), repeat=3)
    return float(np.mean([huber(cosine_at(student, *t) - cosine_at(teacher, *t)) for t in triples]))


def distance_oracle(student: Array, teacher: Array) -> float:
    def relative(points: Array) -> Array:
        d = np.array([[np.linalg.norm(a - b) for b in points] for a in points])
        return np.asarray(d / d[d > 0].mean())

    s, t = relative(student), relative(teacher)
    return float(np.mean([huber(x) for x in (s - t).ravel()]))


def tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


FIGURE_4 = [
    pytest.param((0.57, 0.31, 0.12), (0.70, 0.25, 0.05), 0.4825, 0.48, id="CIFAR-10 plane"),
    pytest.param((0.48, 0.14, 0.26), (0.73, 0.02, 0.25), 0.4182, 0.42, id="CIFAR-10 dog"),
    pytest.param((0.28, 0.36, 0.41), (0.10, 0.38, 0.52), 0.378, 0.38, id="MNIST 2"),
]


@pytest.mark.parametrize(("right", "weights", "exact", "printed"), FIGURE_4)
def test_soft_targets_reproduce_the_papers_figure_4(
    right: tuple[float, ...], weights: tuple[float, ...], exact: float, printed: float
) -> None:
    temperature = 5.0
    probabilities = torch.tensor([[p, 1 - p] for p in right], dtype=torch.float64)
    target = losses.soft_targets(
        (temperature * probabilities.log())[None], torch.tensor([weights], dtype=torch.float64), temperature
    )
    assert float(target[0, 0]) == pytest.approx(exact, abs=1e-12)
    assert round(float(target[0, 0]), 2) == printed
    assert float(target.sum()) == pytest.approx(1.0)


def test_soft_targets(rng: np.random.Generator) -> None:
    logits, weights = rng.normal(size=(4, 3, 7)) * 3, rng.dirichlet(np.ones(3), size=4)
    expected = np.einsum("bt,btc->bc", weights, softmax(logits, 2.5))
    np.testing.assert_allclose(losses.soft_targets(tensor(logits), tensor(weights), 2.5), expected, rtol=1e-12)


def test_kl_divergence(rng: np.random.Generator) -> None:
    logits, q = rng.normal(size=(5, 9)), softmax(rng.normal(size=(5, 9)) * 2)
    q[0] = np.eye(9)[3]  # classes of probability zero
    p = softmax(logits, 4.0)
    per_image = [sum(q[i, c] * np.log(q[i, c] / p[i, c]) for c in range(9) if q[i, c] > 0) for i in range(5)]
    assert float(losses.kl_divergence(tensor(q), tensor(logits), 4.0)) == pytest.approx(16 * np.mean(per_image))


def test_kl_divergence_is_zero_and_flat_where_both_agree(rng: np.random.Generator) -> None:
    logits = tensor(rng.normal(size=(3, 6))).requires_grad_()
    value = losses.kl_divergence((logits.detach() / 3).softmax(1), logits, 3.0)
    value.backward()  # type: ignore[no-untyped-call]
    assert abs(float(value.detach())) < 1e-12
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-12


@given(num_classes=st.sampled_from([2, 10, 100, 1000]), gap=st.floats(0.5, 3.0))
@settings(max_examples=20, deadline=None)
def test_the_scale_of_the_kl_does_not_depend_on_the_number_of_classes(num_classes: int, gap: float) -> None:
    """Classes of no probability on either side add nothing, so two that matter give the same value among 1000."""
    logits = torch.full((4, num_classes), -1e4, dtype=torch.float64)
    logits[:, :2] = torch.tensor([gap, 0.0], dtype=torch.float64)
    targets = torch.zeros(4, num_classes, dtype=torch.float64)
    targets[:, :2] = torch.tensor([0.3, 0.7], dtype=torch.float64)
    p = 1 / (1 + np.exp(-gap))
    expected = 0.3 * np.log(0.3 / p) + 0.7 * np.log(0.7 / (1 - p))
    assert float(losses.kl_divergence(targets, logits, 1.0)) == pytest.approx(expected, rel=1e-9)


def test_cross_entropy(rng: np.random.Generator) -> None:
    logits, targets = rng.normal(size=(5, 4)), rng.dirichlet(np.ones(4), size=5)
    log_p = np.log(softmax(logits))
    assert float(losses.cross_entropy(tensor(logits), tensor(targets))) == pytest.approx(-(targets * log_p).sum() / 5)
    softened = -(targets * np.log(softmax(logits, 5.0))).sum() / 5
    assert float(losses.cross_entropy(tensor(logits), tensor(targets), 5.0)) == pytest.approx(softened)


def test_cross_entropy_is_the_mean_over_labelled_images(rng: np.random.Generator) -> None:
    logits, targets = tensor(rng.normal(size=(6, 4))), torch.eye(4, dtype=torch.float64)[[0, 1, 2, 3, 0, 1]]
    some = targets.clone()
    some[[1, 4]] = 0
    labelled = [0, 2, 3, 5]
    expected = losses.cross_entropy(logits[labelled], targets[labelled])
    assert float(losses.cross_entropy(logits, some)) == pytest.approx(float(expected))
    assert float(losses.cross_entropy(logits, torch.zeros_like(targets))) == 0.0


@pytest.mark.parametrize("batch", [2, 3, 9])
def test_relation_angles(rng: np.random.Generator, batch: int) -> None:
    student, teacher = rng.normal(size=(batch, 4)), rng.normal(size=(batch, 6))
    value = float(losses.relation_angles(tensor(student), tensor(teacher)))
    assert value == pytest.approx(angle_oracle(student, teacher), abs=1e-12)


@given(st.lists(st.tuples(*[st.integers(-9, 9)] * 2), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_angles_are_blind_to_place_and_size_and_have_finite_gradients(points: list[tuple[int, int]]) -> None:
    """Also where points coincide, which they do when a confident student answers two images alike."""
    teacher = torch.tensor(points, dtype=torch.float64)
    assert float(losses.relation_angles(3 * teacher + 1, teacher)) == pytest.approx(0.0, abs=1e-6)
    student = torch.zeros_like(teacher).requires_grad_()
    value = losses.relation_angles(student, teacher)
    value.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


def test_points_apart_by_less_than_the_precision_of_their_numbers_have_no_direction() -> None:
    """Two answers that are the same but for rounding: their direction would be noise, with a gradient of 10⁶."""
    teacher = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.4, 0.2, 0.4]])
    same = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    student = (same + torch.tensor([[0.0, 0.0, 0.0], [1.2e-7, -1.2e-7, 0.0], [0.0, 0.0, 0.0]])).requires_grad_()
    value = losses.relation_angles(student, teacher)
    torch.testing.assert_close(value, losses.relation_angles(same, teacher))
    value.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 10


def test_angles_of_large_batches_are_near_those_of_all_triples(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = rng.normal(size=(300, 5))
    student = teacher + rng.normal(size=(300, 5))
    groups = losses.relation_angles(tensor(student), tensor(teacher))
    assert torch.equal(groups, losses.relation_angles(tensor(student), tensor(teacher)))
    assert not torch.equal(groups, losses.relation_angles(tensor(student), tensor(teacher), seed=1))
    monkeypatch.setattr(losses, "MAX_TRIPLES_BATCH", 300)
    assert float(groups) == pytest.approx(float(losses.relation_angles(tensor(student), tensor(teacher))), rel=0.05)


def test_every_image_of_a_large_batch_takes_part_in_the_angles(rng: np.random.Generator) -> None:
    student = tensor(rng.normal(size=(257, 3))).requires_grad_()
    state = torch.get_rng_state()
    losses.relation_angles(student, tensor(rng.normal(size=(257, 3)))).backward()  # type: ignore[no-untyped-call]
    assert torch.equal(torch.get_rng_state(), state)
    assert student.grad is not None
    assert bool((student.grad.abs().sum(1) > 0).all())


def test_relation_distances(rng: np.random.Generator) -> None:
    student, teacher = rng.normal(size=(7, 4)), 5 * rng.normal(size=(7, 3))
    student[2] = student[5]
    value = float(losses.relation_distances(tensor(student), tensor(teacher)))
    assert value == pytest.approx(distance_oracle(student, teacher), abs=1e-12)
    assert float(losses.relation_distances(tensor(4 * teacher), tensor(teacher))) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("batch", [1, 2])
def test_relation_distances_of_points_that_coincide(batch: int) -> None:
    student = torch.ones(batch, 3, requires_grad=True)
    value = losses.relation_distances(student, torch.ones(batch, 3))
    value.backward()  # type: ignore[no-untyped-call]
    assert float(value.detach()) == 0.0
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


def test_hint_error(rng: np.random.Generator) -> None:
    student, hint = rng.normal(size=(3, 4, 2, 2)), rng.normal(size=(3, 4, 2, 2))
    positions = list(itertools.product(range(3), range(2), range(2)))
    pairs = [(student[b, :, h, w], hint[b, :, h, w]) for b, h, w in positions]
    cosine = np.mean([1 - s @ t / np.linalg.norm(s) / np.linalg.norm(t) for s, t in pairs])
    squared = np.mean([(s - t / np.linalg.norm(t)) ** 2 for s, t in pairs])
    assert float(losses.hint_error(tensor(student), tensor(hint))) == pytest.approx(cosine)
    assert float(losses.hint_error(tensor(student), tensor(hint), "mse")) == pytest.approx(squared)
    assert float(losses.hint_error(tensor(3 * hint), tensor(hint))) == pytest.approx(0.0, abs=1e-12)


def test_hints_of_different_size_are_pooled_to_the_smaller(rng: np.random.Generator) -> None:
    student, hint = rng.normal(size=(2, 3, 4, 4)), rng.normal(size=(2, 3, 2, 2))
    pooled = student.reshape(2, 3, 2, 2, 2, 2).mean((3, 5))
    expected = losses.hint_error(tensor(pooled), tensor(hint))
    assert float(losses.hint_error(tensor(student), tensor(hint))) == pytest.approx(float(expected))
    assert float(losses.hint_error(tensor(hint), tensor(student))) == pytest.approx(float(expected))


def test_kl_by_image(rng: np.random.Generator) -> None:
    q, logits = softmax(rng.normal(size=(4, 6))), rng.normal(size=(4, 6))
    p = softmax(logits, 2.0)
    expected = [4 * sum(q[i, c] * np.log(q[i, c] / p[i, c]) for c in range(6)) for i in range(4)]
    np.testing.assert_allclose(losses.kl_by_image(tensor(np.log(q)), tensor(logits), 2.0), expected)


def dkd_oracle(q: Array, p: Array, label: int, first: float, second: float) -> float:
    """One image; q and p are probabilities at temperature T."""
    others = [c for c in range(len(q)) if c != label]
    binary = [(q[label], p[label]), (q[others].sum(), p[others].sum())]
    among = zip(q[others] / q[others].sum(), p[others] / p[others].sum(), strict=True)
    return first * sum(a * np.log(a / b) for a, b in binary) + second * sum(a * np.log(a / b) for a, b in among)


def test_dkd(rng: np.random.Generator) -> None:
    T, labels = 3.0, [2, 0, -1, 4]
    q, logits = softmax(rng.normal(size=(4, 5)) * 2), rng.normal(size=(4, 5))
    p = softmax(logits, T)
    expected = [
        T**2 * (dkd_oracle(q[i], p[i], y, 1.0, 8.0) if y >= 0 else float((q[i] * np.log(q[i] / p[i])).sum()))
        for i, y in enumerate(labels)
    ]
    found = losses.dkd_by_image(tensor(np.log(q)), tensor(logits), torch.tensor(labels), T)
    np.testing.assert_allclose(found, expected)


def test_dkd_contains_the_kl(rng: np.random.Generator) -> None:
    """KL = first part + what the teacher leaves to the other classes × second part (Zhao et al., equation 7)."""
    q, logits, labels = softmax(rng.normal(size=(1, 5))), rng.normal(size=(1, 5)), torch.tensor([3])
    weighted = losses.dkd_by_image(
        tensor(np.log(q)), tensor(logits), labels, 1.0, other_classes_weight=float(1 - q[0, 3])
    )
    torch.testing.assert_close(weighted, losses.kl_by_image(tensor(np.log(q)), tensor(logits), 1.0))


def test_dkd_hears_a_teacher_that_is_sure_beyond_the_precision_of_its_probabilities() -> None:
    """The label's class leaves 1e-200 to the others, who still are 3 : 1 among themselves."""
    teacher = torch.tensor([[500.0, 1.0986, 0.0]]).log_softmax(1)
    student = torch.tensor([[5.0, 0.0, 0.0]], requires_grad=True)
    losses.dkd_by_image(teacher, student, torch.tensor([0]), 1.0).sum().backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    np.testing.assert_allclose(student.grad[0, 1:], [8 * (0.5 - 0.75), 8 * (0.5 - 0.25)], atol=0.01)


def weighted_pearson(a: Array, b: Array, w: Array) -> float:
    w = w / w.sum()
    a, b = a - (w * a).sum(), b - (w * b).sum()
    return float((w * a * b).sum() / np.sqrt((w * a * a).sum() * (w * b * b).sum()))


def test_dist_of_one_teacher_is_that_of_its_paper(rng: np.random.Generator) -> None:
    q, logits, T = softmax(rng.normal(size=(6, 4))), rng.normal(size=(6, 4)), 4.0
    p = softmax(logits, T)
    intra = np.mean([1 - np.corrcoef(q[i], p[i])[0, 1] for i in range(6)])
    inter = np.mean([1 - np.corrcoef(q[:, c], p[:, c])[0, 1] for c in range(4)])
    found = losses.dist(tensor(q[:, None]), tensor(logits), torch.ones(6, 1, dtype=torch.float64), T)
    assert float(found) == pytest.approx(T**2 * (inter + intra))


def test_dist_of_weighted_teachers(rng: np.random.Generator) -> None:
    q, logits, w = softmax(rng.normal(size=(6, 3, 4))), rng.normal(size=(6, 4)), rng.dirichlet(np.ones(3), size=6)
    p = softmax(logits, 2.0)
    intra = np.mean([sum(w[i, t] * (1 - np.corrcoef(q[i, t], p[i])[0, 1]) for t in range(3)) for i in range(6)])
    inter = sum(
        w[:, t].mean() * np.mean([1 - weighted_pearson(q[:, t, c], p[:, c], w[:, t]) for c in range(4)])
        for t in range(3)
    )
    assert float(losses.dist(tensor(q), tensor(logits), tensor(w), 2.0)) == pytest.approx(4 * (inter + intra))


def test_dist_of_a_batch_of_one_and_of_teachers_without_an_opinion() -> None:
    for targets in (torch.tensor([[[0.7, 0.2, 0.1]]]), torch.full((1, 1, 3), 1 / 3)):
        logits = torch.randn(1, 3, requires_grad=True)
        losses.dist(targets, logits, torch.ones(1, 1), 1.0).backward()  # type: ignore[no-untyped-call]
        assert logits.grad is not None
        assert bool(logits.grad.isfinite().all())


def test_standardise(rng: np.random.Generator) -> None:
    z = 7 + 3 * rng.normal(size=(2, 3, 5))
    expected = (z - z.mean(2, keepdims=True)) / (1e-7 + z.std(2, ddof=1, keepdims=True))
    np.testing.assert_allclose(losses.standardise(tensor(z)), expected)
    flat = torch.ones(1, 4, requires_grad=True)
    losses.standardise(flat).sum().backward()  # type: ignore[no-untyped-call]
    assert flat.grad is not None
    assert bool(flat.grad.isfinite().all())


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("num_classes", [2, 1000])
@pytest.mark.parametrize("batch", [1, 5])
def test_finite_under_autocast_with_bf16_inputs(batch: int, num_classes: int, scale: float) -> None:
    """Nothing is infinite or not a number, in value or gradient, and all is fp32, however confident the networks."""
    torch.manual_seed(0)
    student = (scale * torch.randn(batch, num_classes)).bfloat16().requires_grad_()
    teachers = (scale * torch.randn(batch, 3, num_classes)).bfloat16()
    maps = torch.randn(batch, 3, 2, 2).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        targets = losses.soft_targets(teachers, torch.full((batch, 3), 1 / 3), 4.0)
        answers = losses.full_precision(student).softmax(1)
        values = [
            losses.kl_divergence(targets, student, 4.0),
            losses.cross_entropy(student, targets.round()),
            losses.relation_angles(answers, targets),
            losses.relation_distances(answers, targets),
            losses.hint_error(student[:, :2, None, None], maps[:, :2]),
            losses.hint_error(student[:, :2, None, None], maps[:, :2], "mse"),
        ]
    assert all(value.dtype == torch.float32 and bool(value.isfinite()) for value in values)
    torch.stack(values).sum().backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


def test_autocast_does_not_change_the_angles() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(8, 5), torch.randn(8, 5)
    plain = losses.relation_angles(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(losses.relation_angles(student, teacher), plain)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12), (torch.bfloat16, 4e-3)]
)
@pytest.mark.parametrize("shape", [(3, 5, 4, 7), (2, 1, 3, 3), (1, 4, 1, 5), (2, 6, 1, 1)])
def test_the_average_of_a_map_and_its_gradient_in_every_layout(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, memory_format: torch.memory_format
) -> None:
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    features = features.to(memory_format=memory_format).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        average = losses.global_average(features)
    expected = features.detach().double().numpy().mean((2, 3), keepdims=True)
    assert average.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(average.detach().double().numpy(), expected, atol=tolerance, rtol=tolerance)
    average.sum().backward()
    assert features.grad is not None
    share = torch.full(shape, 1 / (shape[2] * shape[3]), dtype=dtype)
    torch.testing.assert_close(features.grad, share, atol=tolerance, rtol=tolerance)
