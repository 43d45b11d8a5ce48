from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcompress.bundle import Preprocess
from kdcompress.execution import Execution
from kdcompress.live_teachers import LiveTeachers, agreement, prepare_teacher
from kdcompress.models import build_network
from kdcompress.networks import Teacher, TeacherEnsemble
from kdcompress.types import Batch

PREPROCESS = Preprocess(3, 8, 8, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def teacher(name: str = "resnet8") -> Teacher:
    network = build_network(name, num_classes=4, image_size=32)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 2.0)
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    return Teacher(network, PREPROCESS, name=name)


def batch(images: Tensor, start: int = 0) -> Batch:
    count = len(images)
    ids = torch.arange(start, start + count)
    return Batch(images, ids, ids, torch.zeros(count, dtype=torch.int64), torch.zeros(count, 4))


def test_they_answer_without_gradient() -> None:
    ensemble = TeacherEnsemble([teacher(), teacher()])
    images = torch.rand(3, 3, 8, 8, requires_grad=True)
    outputs = LiveTeachers(ensemble)(batch(images))
    assert not outputs.logits.requires_grad
    assert not outputs.logits.is_inference()
    torch.testing.assert_close(outputs.logits, ensemble(images).logits, atol=1e-4, rtol=1e-4)
    assert outputs.teacher_ids == (0, 1)


def test_they_send_the_maps_that_are_wanted_in_the_form_wanted() -> None:
    ensemble = TeacherEnsemble([teacher(), teacher("vgg8")])
    images = torch.rand(3, 3, 8, 8)
    whole = ensemble(images).features
    assert [dict(maps) for maps in LiveTeachers(ensemble, {})(batch(images)).features] == [{}, {}]
    everything = LiveTeachers(ensemble)(batch(images)).features
    assert [list(maps) for maps in everything] == [list(maps) for maps in whole]
    pooled = LiveTeachers(ensemble, {"last": "pooled", "stage1": "map"})(batch(images)).features
    for maps, expected in zip(pooled, whole, strict=True):
        last = list(expected)[-1]
        assert set(maps) == {"stage1", last}
        torch.testing.assert_close(maps["stage1"], expected["stage1"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(maps[last], F.adaptive_avg_pool2d(expected[last], 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["resnet20", "vgg8", "dscnn", "mobilenet_v2", "mobilenet_v3_small"])
def test_a_prepared_teacher_has_no_batch_norm_left_and_answers_the_same(name: str) -> None:
    one = teacher(name)
    before = {key: value.clone() for key, value in one.state_dict().items()}
    prepared = prepare_teacher(one, Execution(channels_last=True))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in prepared.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in one.modules())
    images = torch.rand(4, 3, 8, 8)
    expected, found = one(images), prepared(images)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-3)
    for stage, value in expected.features.items():
        torch.testing.assert_close(found.features[stage], value, atol=1e-4, rtol=1e-3)
    assert all(torch.equal(value, before[key]) for key, value in one.state_dict().items())
    assert not any(parameter.requires_grad for parameter in prepared.parameters())


class Shared(nn.Module):
    """A convolution that is read behind its batch norm and also before it: folding would change the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.norm.running_mean.fill_(3.0)  # type: ignore[union-attr]

    def forward(self, images: Tensor) -> Tensor:
        first = self.conv(images)
        return (first + self.norm(first)).mean((2, 3))


def test_what_folding_would_change_is_left_as_it_is() -> None:
    one = Teacher(Shared(), PREPROCESS, name="shared", stages=("norm",))
    prepared = prepare_teacher(one, Execution())
    images = torch.rand(2, 3, 8, 8)
    assert any(isinstance(module, nn.BatchNorm2d) for module in prepared.modules())
    assert torch.equal(prepared(images).logits, one(images).logits)


def test_low_precision_is_the_networks_own_and_its_answers_are_fp32() -> None:
    one = teacher("resnet20")
    live = LiveTeachers(TeacherEnsemble([one]), {"last": "map"}, Execution("bf16", channels_last=True))
    images = torch.rand(16, 3, 8, 8)
    outputs = live(batch(images))
    assert outputs.logits.dtype == outputs.features[0]["stage3"].dtype == torch.float32
    assert not torch.equal(outputs.logits[:, 0], one(images).logits)
    found = agreement(one(images).logits[:, None], outputs.logits)
    assert found.probability < 0.05
    assert found.num_images == 16


def test_agreement_is_that_of_the_teacher_that_differs_most() -> None:
    plain = torch.tensor([[[2.0, 0.0], [2.0, 0.0]], [[0.0, 2.0], [0.0, 2.0]]])
    other = plain.clone()
    other[1, 1] = torch.tensor([2.0, 0.0])
    found = agreement(plain, other)
    assert found.same_class == 0.5
    p = float(torch.tensor(2.0).sigmoid())
    assert found.probability == pytest.approx((p - (1 - p)) / 2)


def test_one_teacher_per_step_is_drawn_by_the_batch_and_evenly() -> None:
    ensemble = TeacherEnsemble([teacher(), teacher("vgg8"), teacher()])
    images = torch.rand(2, 3, 8, 8)
    live = LiveTeachers(ensemble, {}, per_step=1)
    all_of_them = LiveTeachers(ensemble, {})(batch(images)).logits
    drawn = []
    for start in range(60):
        outputs = live(batch(images, start))
        (number,) = outputs.teacher_ids
        drawn.append(number)
        assert outputs.logits.shape == (2, 1, 4)
        torch.testing.assert_close(outputs.logits[:, 0], all_of_them[:, number])
    assert drawn == [live(batch(images, start)).teacher_ids[0] for start in range(60)]
    assert min(drawn.count(number) for number in range(3)) >= 8
