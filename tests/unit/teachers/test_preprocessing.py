from __future__ import annotations

import functools
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from kdcompress.errors import ShapeError
from kdcompress.models import build_network
from kdcompress.networks import Teacher
from kdcompress.teachers.preprocessing import CANDIDATES, Normalisation, measure_preprocessing, measure_size

COLOUR = {name: value for name, value in CANDIDATES.items() if len(value.mean) == 3}


def pictures(count: int, channels: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Smooth noisy images of four kinds whose brightness and contrast differ, as photographs' do; and their kinds."""
    kinds = torch.rand(4, channels, 4, 4, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    noise = torch.rand(count, channels, 4, 4, generator=generator)
    contrast = 0.3 + 0.7 * torch.rand(count, 1, 1, 1, generator=generator)
    coarse = 0.45 + contrast * (0.5 * kinds[labels] + 0.5 * noise - 0.5)
    return F.interpolate(coarse, (16, 16), mode="bilinear"), labels


@functools.cache
def trained_under(value: Normalisation) -> nn.Module:
    """A small network trained on such images, so normalised, as far as to know them all."""
    torch.manual_seed(1)
    channels = len(value.mean)
    network = build_network("resnet8", num_classes=4, in_channels=channels)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    images, labels = pictures(800, channels, seed=1)
    normalised = _normalised(images, value)
    for epoch in range(4):
        for ids in torch.randperm(800, generator=torch.Generator().manual_seed(epoch)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(network(normalised[ids]), labels[ids]).backward()
            optimizer.step()
    return network


def _normalised(images: Tensor, value: Normalisation) -> Tensor:
    mean, std = (torch.tensor(part)[:, None, None] for part in value)
    return (images - mean) / std


@pytest.mark.parametrize("name", ["none", "half", "imagenet", "cifar10", "cifar100, std of image means"])
def test_the_normalisation_of_training_is_found(name: str) -> None:
    network = trained_under(CANDIDATES[name]).train()
    images, labels = pictures(200, seed=2)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    fit = measure_preprocessing(network, images, labels)
    assert (fit.name, fit.mean, fit.std) == (name, *CANDIDATES[name])
    assert fit.accuracy > 0.7
    assert {row.name for row in fit.rows} == set(COLOUR)
    assert not fit.at_chance
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_rows_hold_what_was_measured() -> None:
    network = trained_under(CANDIDATES["imagenet"])
    images, labels = pictures(200, seed=2)
    rows = {row.name: row for row in measure_preprocessing(network, images, labels).rows}
    assert min(rows.values(), key=lambda row: row.mismatch or 9).name == "imagenet"
    wanted = F.cross_entropy(network.eval()(_normalised(images, CANDIDATES["half"])).double(), labels).item()
    assert rows["half"].nll == pytest.approx(wanted, rel=1e-6)


def test_mismatch_is_the_divergence_of_normal_distributions() -> None:
    network = nn.Sequential(nn.BatchNorm2d(1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2))
    network[0].running_mean, network[0].running_var = torch.tensor([0.2]), torch.tensor([0.5])
    images = torch.rand(40, 1, 4, 4)
    images[:, :, 0] = 0.0  # so that black borders change little
    fit = measure_preprocessing(network, images, torch.arange(40) % 2, {"mine": Normalisation((0.1,), (0.7,))})
    border = 1
    padded = np.pad(images.numpy().astype(np.float64), ((0, 0), (0, 0), (border, border), (border, border)))
    views = [images.numpy().astype(np.float64)]
    views.append(np.stack([padded[n, :, n // 3 % 3 : n // 3 % 3 + 4, n % 3 : n % 3 + 4] for n in range(40)]))
    inputs = [(view - 0.1) / 0.7 for view in views]
    wanted = [
        0.5 * (x.var(ddof=1) / 0.5 + (x.mean() - 0.2) ** 2 / 0.5 - 1 - np.log(x.var(ddof=1) / 0.5)) for x in inputs
    ]
    assert fit.rows[0].mismatch == pytest.approx(min(wanted), rel=1e-5)


class Table(nn.Module):
    """Answers by the mean brightness it sees, without batch norm: rows of (upper bound, logits)."""

    def __init__(self, rows: list[tuple[float, list[float]]]) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, images: Tensor) -> Tensor:
        found = [next(logits for bound, logits in self.rows if image.mean() < bound) for image in images]
        return torch.tensor(found)


def test_accuracy_rejects_and_nll_decides_without_batch_norm() -> None:
    images, labels = torch.full((50, 3, 4, 4), 0.6), torch.zeros(50, dtype=torch.int64)
    labels[0] = 1  # one image that nobody gets right
    candidates = {
        "right": Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # sees 0.6
        "sure": Normalisation((0.4, 0.4, 0.4), (1.0, 1.0, 1.0)),  # sees 0.2
        "wrong": Normalisation((0.6, 0.6, 0.6), (1.0, 1.0, 1.0)),  # sees 0
    }
    network = Table([(0.1, [0.0, 0.1]), (0.3, [30.0, 0.0]), (1.0, [4.0, 0.0])])
    fit = measure_preprocessing(network, images, labels, candidates)
    assert [row.name for row in fit.rows] == ["right", "sure", "wrong"]
    sure = np.log1p(np.exp(-30.0)) + 30 / 50
    right = np.log1p(np.exp(-4.0)) + 4 / 50
    assert fit.rows[0].nll == pytest.approx(right, rel=1e-6)
    assert fit.rows[1].nll == pytest.approx(sure, rel=1e-6)
    assert fit.rows[2].nll > fit.rows[1].nll  # and it is last for its accuracy
    assert fit.rows[0].mismatch is None


def test_a_rejected_candidate_stays_last_whatever_its_nll() -> None:
    images, labels = torch.full((10, 3, 4, 4), 0.6), torch.zeros(10, dtype=torch.int64)
    labels[:2] = 1
    candidates = {
        "sure": Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        "unsure": Normalisation((0.5, 0.5, 0.5), (1.0, 1.0, 1.0)),
    }
    network = Table([(0.3, [0.0, 0.1]), (1.0, [60.0, 0.0])])
    fit = measure_preprocessing(network, images, labels, candidates)
    assert [row.name for row in fit.rows] == ["sure", "unsure"]
    assert fit.rows[0].nll > fit.rows[1].nll


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 0, 2, 3), (2, 0, 1, 3), (3, 2, 1, 0)])
def test_another_order_of_classes_is_noticed(order: tuple[int, ...]) -> None:
    network = trained_under(CANDIDATES["half"])
    images, labels = pictures(200, seed=2)
    renamed = torch.tensor(order)[labels]
    fit = measure_preprocessing(network, images, renamed, {"half": CANDIDATES["half"]})
    with torch.no_grad():
        answers = network.eval()(_normalised(images, CANDIDATES["half"])).argmax(1)
    assert fit.accuracy == (answers == renamed).double().mean().item()
    assert fit.accuracy_if_reordered == (answers == labels).double().mean().item() > 0.95
    assert fit.other_order == (sum(place == number for place, number in enumerate(order)) < 2)


def test_answers_at_chance_are_noticed() -> None:
    images, labels = pictures(200)
    shuffled = labels[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    fit = measure_preprocessing(trained_under(CANDIDATES["half"]), images, shuffled)
    assert fit.at_chance
    assert not fit.other_order


@pytest.mark.parametrize("channels", [1, 4])
def test_other_numbers_of_channels(channels: int) -> None:
    network = trained_under(Normalisation((0.5,) * channels, (0.5,) * channels))
    fit = measure_preprocessing(network, *pictures(200, channels, seed=2))
    assert fit.name == "half"
    assert fit.mean == (0.5,) * channels


def test_labels_that_the_network_does_not_have() -> None:
    network = build_network("resnet8", num_classes=4)
    with pytest.raises(ShapeError, match="label 9, the network 4 classes"):
        measure_preprocessing(network, torch.rand(10, 3, 8, 8), torch.full((10,), 9))


@pytest.mark.shared
@pytest.mark.parametrize("first", [3, 50])
def test_published_teachers_were_trained_with_imagenets(shared_data: Path, first: int) -> None:
    with zipfile.ZipFile(shared_data / "cifar10.zip") as archive:
        names = sorted(name for name in archive.namelist() if "train/" in name and name.endswith(".webp"))[first::200]
        images = np.stack([np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names])
    classes = sorted({name.split("/")[-2] for name in names})
    labels = torch.tensor([classes.index(name.split("/")[-2]) for name in names])
    sample = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, labels)
    for file in sorted((shared_data / "cifar10_teachers").glob("*.th")):
        teacher = Teacher.load(file, measure_on=sample)
        fit = teacher.preprocessing_fit
        assert fit is not None
        assert (fit.name, fit.accuracy > 0.97) == ("imagenet", True)
        assert teacher.preprocess.mean == (0.485, 0.456, 0.406)


class Blob(nn.Module):
    """Tells bright images from dark ones near one size, guesses at others, and refuses tiny ones."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, images: Tensor) -> Tensor:
        height = images.shape[-1]
        if height < 12:
            raise RuntimeError("kernel size can't be greater than actual input size")
        sharpness = 8.0 * max(0.0, 1 - abs(height - self.side) / 24)
        bright = images.mean((1, 2, 3)) - 0.5
        return sharpness * torch.stack([-bright, bright], 1).sign() + torch.tensor([0.1, 0.0])


@pytest.mark.parametrize(("trained", "found"), [(32, 32), (64, None), (96, 96), (8, None)])
def test_the_size_of_training_is_found_where_it_is_another(trained: int, found: int | None) -> None:
    labels = torch.arange(300) % 2
    images = (0.3 + 0.4 * labels[:, None, None, None].float()).expand(300, 3, 64, 64).contiguous()
    network = Blob(trained).train()
    assert (
        measure_size(network, images, labels, Normalisation((0.0,) * 3, (1.0,) * 3), (8, 16, 32, 48, 96, 128)) == found
    )
    assert network.training


def test_a_size_that_is_a_little_better_changes_nothing() -> None:
    network, (images, labels) = trained_under(CANDIDATES["half"]), pictures(120, seed=3)
    assert measure_size(network, images, labels, CANDIDATES["half"]) is None
