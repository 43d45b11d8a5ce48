from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcompress.errors import VerificationError
from kdcompress.gate import accuracy_drop
from kdcompress.pipeline import _int8_search
from kdcompress.pipeline._int8_search import (
    Candidate,
    LayerSensitivity,
    Search,
    divergence,
    find_sensitivity,
    packed_where_faster,
)
from kdcompress.profiles import PROFILES
from kdcompress.quantize.base import Layout, Scheme
from kdcompress.quantize.int8 import Int8Source
from tests.unit.deployed import digits, onnx_bundle


@pytest.fixture(scope="module")
def source() -> Int8Source:
    return Int8Source(onnx_bundle(), digits()[0][:100], profile=PROFILES["ort-x86"])


def chosen_images() -> tuple[Tensor, Tensor]:
    images, labels = digits()
    return images[1200:1500], labels[1200:1500]


def search(source: Int8Source, folder: Path, timing: dict[str, int] | None = None) -> Search:
    return Search(source, *chosen_images(), folder, timing)


def test_a_divergence_by_hand() -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(5, 4)), random.normal(size=(5, 4))
    p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (a, b))
    expected = (p * np.log(p / q)).sum(1).mean()
    assert divergence(torch.from_numpy(a).float(), torch.from_numpy(b).float()) == pytest.approx(expected, rel=1e-5)
    assert divergence(torch.from_numpy(a).float(), torch.from_numpy(a).float()) == pytest.approx(0, abs=1e-7)


def test_a_layers_sensitivity_is_that_of_the_layer_alone(source: Int8Source) -> None:
    images = digits()[0][1500:1540]
    found = find_sensitivity(source, Scheme(), images)
    assert [entry.divergence for entry in found] == sorted((entry.divergence for entry in found), reverse=True)
    assert {entry.node: entry.layer for entry in found} == source.layers()
    alone = source.answers(images, source.quantized(Scheme(), found[0].node))
    assert found[0].divergence == pytest.approx(divergence(source.answers(images), alone))
    whole = divergence(source.answers(images), source.answers(images, source.quantized(Scheme())))
    assert 0 < found[0].divergence < 3 * whole
    reference = torch.linspace(0, 3, 400).reshape(40, 10).roll(3, 0)
    other = {entry.node: entry.divergence for entry in find_sensitivity(source, Scheme(), images, reference)}
    change = divergence(reference, alone) - divergence(reference, source.answers(images))
    assert other[found[0].node] == pytest.approx(change), "beyond what fp32 differs from an ensemble"


def test_the_calibration_that_diverges_least_is_taken(source: Int8Source, tmp_path: Path) -> None:
    tried = search(source, tmp_path)
    best = tried.calibrated("auto")
    assert {candidate.scheme.calibration for candidate in tried.tried} == {"minmax", "entropy", "percentile"}
    assert best.divergence == min(candidate.divergence for candidate in tried.tried)
    assert tried.calibrated("percentile").scheme == Scheme(calibration="percentile")


def test_what_is_said_of_a_candidate_is_so(source: Int8Source, tmp_path: Path) -> None:
    found = search(source, tmp_path).attempt(Scheme())
    images, labels = chosen_images()
    fp32, int8 = source.answers(images).argmax(1), source.answers(images, source.quantized(Scheme())).argmax(1)
    assert found.agreement == pytest.approx(float((fp32 == int8).double().mean()))
    assert found.drop == accuracy_drop(fp32 == labels, int8 == labels, "for choosing")
    assert found.size_mb == len(source.quantized(Scheme())) / 1e6
    assert found.speed_up is None


def test_layers_are_kept_until_the_drop_is_within_the_limit(source: Int8Source, tmp_path: Path) -> None:
    tried = search(source, tmp_path)
    order = tuple(LayerSensitivity(node, layer, 1.0) for node, layer in source.layers().items())
    first = tried.attempt(Scheme())
    easy = tried.mixed(first, order, max_drop=1.0)
    assert easy.scheme.keep == (order[0].node,)
    tried.tried.clear()
    hard = tried.mixed(first, order, max_drop=-1.0)
    assert [len(candidate.scheme.keep) for candidate in tried.tried] == [1, 2, 4]
    assert hard.drop.value == min(candidate.drop.value for candidate in (first, *tried.tried))
    document = tried.document()
    assert document[1]["scheme"]["keep"] == [order[0].layer, order[1].layer]


def test_one_that_is_not_faster_does_not_end_the_search(
    source: Int8Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = search(source, tmp_path)
    order = tuple(LayerSensitivity(node, layer, 1.0) for node, layer in source.layers().items())
    first, speeds = tried.attempt(Scheme()), iter([0.9, 1.5])
    monkeypatch.setattr(tried, "timed", lambda found: [replace(one, speed_up=next(speeds)) for one in found])
    assert tried.mixed(first, order, max_drop=1.0).scheme.keep == (order[0].node, order[1].node)


def test_layouts_are_timed_where_the_target_is_here(source: Int8Source, tmp_path: Path) -> None:
    untimed = search(source, tmp_path)
    first = untimed.attempt(Scheme())
    assert untimed.laid_out(first) is first
    timed = search(source, tmp_path, {"batch_size": 1, "threads": 1})
    taken = timed.laid_out(timed.attempt(Scheme()))
    ratios = {candidate.scheme.layout: candidate.speed_up for candidate in timed.tried}
    assert set(ratios) == {"all", "packed", "dense", "late"}
    assert taken.speed_up is not None
    assert all(taken.speed_up * 1.05 >= ratio for ratio in ratios.values() if ratio is not None)


def test_the_fastest_of_all_that_lose_little_is_taken(source: Int8Source, tmp_path: Path) -> None:
    tried = search(source, tmp_path)
    one = tried.attempt(Scheme())

    def candidate(layout: Layout, high: float, speed_up: float | None) -> Candidate:
        return replace(one, scheme=Scheme(layout=layout), drop=replace(one.drop, high=high), speed_up=speed_up)

    tried.tried = [candidate("packed", 0.03, 2.0), candidate("late", 0.005, 1.2), candidate("dense", 0.002, 1.1)]
    assert tried.within(0.01) == tried.tried[1]
    assert tried.within(0.003) == tried.tried[2]
    assert tried.within(0.05) == tried.tried[0]
    assert tried.within(0.001) is None
    tried.tried = [candidate("late", 0.0, 0.9), candidate("dense", 0.0, None)]
    assert tried.within(0.01) is None


def test_a_layout_that_cannot_be_made_is_left_out_and_told(
    source: Int8Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = search(source, tmp_path, {"batch_size": 1, "threads": 1})
    first, attempt = tried.attempt(Scheme()), tried.attempt

    def fails(scheme: Scheme) -> Candidate:
        if scheme.layout == "packed":
            raise VerificationError("this graph cannot be quantized: some reason")
        return attempt(scheme)

    monkeypatch.setattr(tried, "attempt", fails)
    assert tried.laid_out(first).speed_up is not None
    assert {candidate.scheme.layout for candidate in tried.tried} == {"all", "dense", "late"}
    assert (
        "note: no layout packed of this graph: this graph cannot be quantized: some reason" in capsys.readouterr().out
    )


def test_packing_is_for_files_that_answer_alike(
    source: Int8Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timing = {"batch_size": 1, "threads": 1}
    packed, plain = Scheme(layout="packed"), Scheme()
    assert source.answer_alike(source.quantized(plain), source.quantized(packed))
    assert not source.answer_alike(source.quantized(plain), source.quantized(Scheme(layout="dense")))
    monkeypatch.setattr(_int8_search, "time_files", lambda *_: [1.0, 1.5])
    assert packed_where_faster(source, plain, tmp_path, timing) == packed
    assert packed_where_faster(source, plain, tmp_path, None) == plain
    monkeypatch.setattr(source, "answer_alike", lambda *_: False)
    assert packed_where_faster(source, plain, tmp_path, timing) == plain
    monkeypatch.undo()
    monkeypatch.setattr(_int8_search, "time_files", lambda *_: [1.0, 1.01])
    assert packed_where_faster(source, plain, tmp_path, timing) == plain
