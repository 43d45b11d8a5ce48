"""Which INT8 file: the ranges, the operators and the layers that stay in fp32, chosen by what was measured of each.

Nothing here looks at the images that the gate judges on. Divergences need no labels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor

from kdcompress.bundle import Bundle
from kdcompress.errors import VerificationError
from kdcompress.evaluate import agreement, divergence
from kdcompress.gate import Drop, accuracy_drop
from kdcompress.pipeline._gate import race
from kdcompress.pipeline.base import console
from kdcompress.quantize.base import PACKED, CalibrationMethod, Layout, Scheme
from kdcompress.quantize.int8 import FloatModel, Int8Source
from kdcompress.types import Images, Labels, Logits

CalibrationChoice: TypeAlias = Literal["minmax", "entropy", "percentile", "auto"]

_WORTH = 1.05
"""Quantizing less must be so much faster to be preferred."""
_WORTH_PACKING = 1.02
"""As for `_WORTH`, where the answers are the same."""
_MOST_KEPT = 0.5
"""At most this part of the layers is tried in fp32; with more there is little left to gain."""


@dataclass(frozen=True)
class Candidate:
    """One way to quantize, and what was found about it on the images for choosing.

    Args:
        scheme: the way.
        size_mb: of its file, in 10⁶ bytes.
        divergence: mean KL of its answers from those of fp32, in nats.
        agreement: share of images to which it gives the class of fp32.
        drop: of top-1 against fp32.
        speed_up: against fp32, from one process; None where it was not timed.
    """

    scheme: Scheme
    size_mb: float
    divergence: float
    agreement: float
    drop: Drop
    speed_up: float | None = None


@dataclass(frozen=True)
class LayerSensitivity:
    """What quantizing one layer alone does to the answers.

    Args:
        node: its name in the graph.
        layer: the name of its weight.
        divergence: how much further the answers are from the reference's with this layer alone in INT8: mean KL, in
            nats, above that of fp32 (which is 0 where the reference is fp32 itself).
    """

    node: str
    layer: str
    divergence: float


def find_sensitivity(
    source: Int8Source, scheme: Scheme, images: Images, reference: Logits | None = None
) -> tuple[LayerSensitivity, ...]:
    """Quantizes one layer at a time and compares the answers; the most sensitive layer first.

    It costs one graph, one session and a pass over `images` for each layer. One layer at a time tells what a layer does
    by itself; all but one would measure a small difference of large divergences.

    Args:
        source: the fp32 bundle with its ranges.
        scheme: how it is quantized.
        images: in [0, 1]; no labels are needed.
        reference: logits that the answers are compared with; by default those of fp32.
    """
    plain = source.answers(images)
    expected = plain if reference is None else reference
    before = divergence(expected, plain)
    found = [
        LayerSensitivity(
            node, layer, divergence(expected, source.answers(images, source.quantized(scheme, node))) - before
        )
        for node, layer in source.layers().items()
    ]
    return tuple(sorted(found, key=lambda entry: -entry.divergence))


def time_files(source: Bundle, contents: Sequence[bytes], scratch: Path, timing: Mapping[str, int]) -> list[float]:
    """How much faster than an fp32 bundle each INT8 file of it is, all timed in turns in one process.

    Args:
        source: the fp32 bundle.
        contents: the files.
        scratch: a folder for them.
        timing: batch size and threads to time with.
    """
    place = Path(tempfile.mkdtemp(dir=scratch))
    files = {"fp32": source}
    for number, content in enumerate(contents):
        file = files[str(number)] = replace(source, path=place / str(number))  # opened as the fp32 bundle is
        file.path.mkdir()
        file.model_path.write_bytes(content)
    latency = race(files, restarts=1, iterations=60, **timing)
    return [latency["fp32"].p50_ms / latency[str(number)].p50_ms for number in range(len(contents))]


def packed_where_faster(source: Int8Source, scheme: Scheme, scratch: Path, timing: Mapping[str, int] | None) -> Scheme:
    """The scheme, or the same packed, which answers alike.

    Args:
        source: the fp32 bundle with its ranges.
        scheme: quantizes everything.
        scratch: a folder for what is timed.
        timing: see `time_files`; None: this machine is not what the file is for.
    """
    if timing is None or not source.packs:
        return scheme
    packed = replace(scheme, layout=PACKED[scheme.layout])
    contents = [source.quantized(each) for each in (scheme, packed)]
    if not source.answer_alike(*contents):
        return scheme
    before, after = time_files(source.bundle, contents, scratch, timing)
    return packed if after > _WORTH_PACKING * before else scheme


def gated_where_faster(source: FloatModel, bundle: Bundle, scratch: Path, timing: Mapping[str, int] | None) -> Layout:
    """The layout "all", or "gated" where that is faster, both packed.

    Args:
        source: the graph of the bundle, with its ranges.
        bundle: in fp32.
        scratch: a folder for what is timed.
        timing: see `time_files`; None: this machine is not what the file is for.
    """
    if timing is None or not source.gates:
        return "all"
    layouts: tuple[Layout, ...] = ("all", "gated")
    schemes = [Scheme(layout=PACKED[layout] if source.packs else layout) for layout in layouts]
    contents = [source.quantize(scheme).SerializeToString(deterministic=True) for scheme in schemes]
    before, after = time_files(bundle, contents, scratch, timing)
    return "gated" if after > _WORTH * before else "all"


class Search:
    """Tries ways to quantize one bundle.

    Args:
        source: the fp32 bundle with its calibration images.
        images: to choose on, in [0, 1]; not those that the gate judges on.
        labels: of these images.
        scratch: a folder for files that are timed.
        timing: batch size and threads to time with; None: this machine is not what the file is for.
    """

    def __init__(
        self,
        source: Int8Source,
        images: Images,
        labels: Labels,
        scratch: Path,
        timing: Mapping[str, int] | None,
    ) -> None:
        self.source = source
        self.tried: list[Candidate] = []
        self._images = images
        self._labels = labels
        self._scratch = scratch
        self._timing = timing
        self._expected = source.answers(images)

    def attempt(self, scheme: Scheme) -> Candidate:
        """Quantizes and looks at the answers."""
        content = self.source.quantized(scheme)
        answers = self.source.answers(self._images, content)
        right = self._right(self._expected), self._right(answers)
        found = Candidate(
            scheme,
            len(content) / 1e6,
            divergence(self._expected, answers),
            agreement(self._expected, answers),
            accuracy_drop(*right, "for choosing"),
        )
        self.tried.append(found)
        return found

    def calibrated(self, choice: CalibrationChoice) -> Candidate:
        """The way of calibrating that was asked for; `auto`: the one whose answers diverge least."""
        methods = get_args(CalibrationMethod) if choice == "auto" else (choice,)
        found = [self.attempt(Scheme(calibration=method)) for method in methods]
        return min(found, key=lambda candidate: candidate.divergence)

    def laid_out(self, first: Candidate) -> Candidate:
        """The fastest of quantizing everything, packed or not, gates too, dense layers only, and late ones only."""
        if self._timing is None:
            return first
        others: list[Layout] = ["packed"] if self.source.packs else []
        if self.source.gates:
            others.append("packed-gated" if self.source.packs else "gated")
        others += ["dense", "late"]
        candidates = [first]
        for layout in others:
            try:
                candidates.append(self.attempt(replace(first.scheme, layout=layout)))
            except VerificationError as error:
                console().print(f"note: no layout {layout} of this graph: {error.what}")
        best, *rest = self.timed(candidates)
        for candidate in rest:
            worth = _WORTH_PACKING if candidate.scheme.layout == "packed" else _WORTH
            if (candidate.speed_up or 0.0) > worth * (best.speed_up or 0.0):
                best = candidate
        return best

    def mixed(self, first: Candidate, order: Sequence[LayerSensitivity], max_drop: float) -> Candidate:
        """Keeps the most sensitive layers in fp32, one, two, four … of them, until the drop is within the limit.

        Where no number of them brings the interval's upper end below the limit, the smallest drop among those that are
        still faster than fp32.
        """
        found, number = [first], 1
        while number <= max(1, round(_MOST_KEPT * len(order))):
            keep = tuple(entry.node for entry in order[:number])
            (candidate,) = self.timed([self.attempt(replace(first.scheme, keep=keep))])
            number *= 2
            if candidate.speed_up is not None and candidate.speed_up <= 1:
                continue  # more in fp32 may be faster: two layers in a row need nothing between them
            if candidate.drop.high <= max_drop:
                return candidate
            found.append(candidate)
        return min(found, key=lambda candidate: (candidate.drop.value, len(candidate.scheme.keep)))

    def within(self, max_drop: float) -> Candidate | None:
        """The fastest of all that were tried whose drop is within the limit for sure, if one is faster than fp32.

        A layout that quantizes less may lose less than the fastest one with some of its layers in fp32.
        """
        fitting = [(one.speed_up, one) for one in self.tried if one.speed_up is not None and one.drop.high <= max_drop]
        speed_up, found = max(fitting, key=lambda entry: entry[0], default=(0.0, None))
        return found if speed_up > 1 else None

    def timed(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates with their speed-up over fp32, all timed in turns in one process."""
        if self._timing is None:
            return list(candidates)
        contents = [self.source.quantized(candidate.scheme) for candidate in candidates]
        ratios = time_files(self.source.bundle, contents, self._scratch, self._timing)
        found = []
        for candidate, ratio in zip(candidates, ratios, strict=True):
            found.append(replace(candidate, speed_up=ratio))
            self.tried[self.tried.index(candidate)] = found[-1]
        return found

    def place(self, candidate: Candidate) -> int:
        """Which of those that were tried it is."""
        return self.tried.index(candidate)

    def document(self) -> list[dict[str, Any]]:
        """Everything that was tried, as JSON can hold it."""
        names = self.source.layers()
        return [
            asdict(one) | {"scheme": asdict(one.scheme) | {"keep": [names.get(node, node) for node in one.scheme.keep]}}
            for one in self.tried
        ]

    def _right(self, logits: Logits) -> Tensor:
        return logits.argmax(1) == self._labels
