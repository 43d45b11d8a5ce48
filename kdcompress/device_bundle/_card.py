"""The model card: what the student is, what it was trained with, what is known of it and what is not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import kdcompress
from kdcompress.bundle import Bundle, Precision
from kdcompress.gate import Verdict
from kdcompress.profiles import Profile
from kdcompress.report.base import AccuracyPart

_UNKNOWN = "not stated"


@dataclass(frozen=True)
class Card:
    """What is known of a student beyond its bundles.

    Args:
        teachers: for each its name, arch, digest and licence, as the run says.
        accuracy: of each precision on the test images, where the run has a report.
        data: what those test images are: name, part, number, digest.
        verdict: of the gate on its INT8, where it was asked.
    """

    teachers: tuple[Mapping[str, Any], ...] = ()
    accuracy: Mapping[Precision, AccuracyPart] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    verdict: Verdict | None = None


def weights_of(bundle: Bundle, card: Card) -> list[dict[str, Any]]:
    """Where every weight comes from: role, name, digest, licence; None where nobody said."""
    start = next((step["init"] for step in bundle.provenance if isinstance(step.get("init"), dict)), None)
    found: list[dict[str, Any]] = []
    if start is not None:
        found.append({"role": "start of the student", **{key: value for key, value in start.items() if value}})
    keys = ("name", "arch", "digest", "licence")
    found += [{"role": "teacher", **{key: teacher.get(key) for key in keys}} for teacher in card.teachers]
    return found


def render_card(flavours: Mapping[Precision, Bundle], profile: Profile, card: Card, real: int) -> str:
    """MODEL_CARD.md; `real` of the golden pictures are images of the user's."""
    first = next(iter(flavours.values()))
    step: Mapping[str, Any] = first.provenance[0] if first.provenance else {}
    p = first.preprocess
    lines = [
        f"# {first.arch}: {first.num_classes} classes",
        "",
        "## What it is",
        f"- An image classifier, {first.num_params:,} parameters, made with kdcompress {kdcompress.__version__} for "
        f"`{profile.name}` ({profile.device}).",
        f"- {_spoken_to(first)}",
        f"- Images of another size: {_RESIZING[p.resize]}.",
        f"- Classes, in the order of the logits: {', '.join(first.classes[:20])}"
        + (f" … ({first.num_classes}, see labels.txt)." if first.num_classes > 20 else "."),
        *([f"- {real} of its calibration images are in `golden/` (`image-N.png`)."] if real else []),
        "",
        "## Accuracy",
        *_accuracy(flavours, card),
        *([f"- INT8 before the gate: {card.verdict}"] if card.verdict is not None else []),
        "",
        "## Where its weights come from",
        *_weights(first, card),
        "",
        "## Training",
        *(f"- {key}: {_shown(step[key])}" for key in ("step", "method", "seed", "data", "train") if key in step),
        "",
        "## What is not known",
        "- Speed on a device: `python3 run.py measure` finds it out; nothing here was measured on one.",
        "- How it does on images unlike those it was trained and tested on, and on classes it has not seen: it always "
        "names one of its own.",
        "- Whether its errors fall on some people or things more than on others, beyond the figures above.",
    ]
    return "\n".join(lines) + "\n"


def _spoken_to(bundle: Bundle) -> str:
    p, spoken = bundle.preprocess, bundle.interface
    if spoken.input == "uint8-nhwc":
        taken = f"{p.height} × {p.width} × {p.channels} images of 8 bits, channels last"
    else:
        taken = f"{p.channels} × {p.height} × {p.width} images in [0, 1]"
    number = f", {spoken.batch} at once" if spoken.batch else ""
    softmax = " Probabilities are their softmax." if spoken.output == "logits" else ""
    return f"Takes {taken}{number}, named `images`; normalises inside; gives `{spoken.output}`.{softmax}"


_RESIZING = {
    "none": "refused, the network takes this size only",
    "bilinear": "resized as a whole, bilinear with antialiasing",
    "bilinear-crop": "resized to cover it, bilinear with antialiasing, and cut at the centre",
}


def _accuracy(flavours: Mapping[Precision, Bundle], card: Card) -> list[str]:
    if not card.accuracy:
        return ["- Not measured: the run has no report (`kdcompress report`)."]
    name, part = card.data.get("name", "the data"), card.data.get("part", "test")
    lines = [f"On {name} ({part}); intervals are 95 %, of that data and no other."]
    for precision in flavours:
        if precision in card.accuracy:
            found = card.accuracy[precision]
            low, high = found.interval
            lines.append(
                f"- {precision}: top-1 {found.top1:.2%} ({low:.2%} to {high:.2%}, n = {found.n:,}); mean recall "
                f"{found.macro_recall:.2%}; worst class {flavours[precision].classes[found.worst_class_index]} "
                f"{found.worst_class:.2%}"
            )
        else:
            lines.append(f"- {precision}: not measured")
    return lines


def _weights(bundle: Bundle, card: Card) -> list[str]:
    found = weights_of(bundle, card)
    if not found:
        return ["- Nothing was said about them."]
    lines = []
    for weight in found:
        facts = [
            f"{key.replace('_', ' ')}: {_shown(value)}"
            for key, value in weight.items()
            if key not in ("role", "licence") and value
        ]
        licence = weight.get("licence") or _UNKNOWN
        lines.append(f"- {weight['role']}: {', '.join(facts)}; licence: {licence}")
    if any(not weight.get("licence") for weight in found):
        lines.append(f"- Where the licence is {_UNKNOWN}, find it out before you pass this folder on.")
    return lines


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
