"""What a training with roundings began from is what it is resumed with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from kdcompress.equalization import Equalization
from kdcompress.pipeline._rounded import Plan, keep_plan, kept_plan
from kdcompress.profiles import PROFILES, instruction_sets
from kdcompress.quantize.int8 import equalize_model, quantize_model
from tests.unit.deployed import digits, onnx_bundle


def test_a_plan_that_was_kept_is_the_same(tmp_path: Path) -> None:
    profile, images, bundle = PROFILES["ort-x86"], digits()[0][:64], onnx_bundle()
    reduce_range = profile.reduces_range(instruction_sets())
    equalized, _ = equalize_model(bundle.model_path, images, profile, reduce_range=reduce_range)
    quantized = quantize_model(bundle.model_path, images, profile, reduce_range=reduce_range)
    factors = Equalization({"a/b": np.array([0.5, 2.0])}, {"w": np.array([2.0**-20])}, {"v": np.array([1.0, 4.0])})
    plan = Plan(bundle, equalized, factors, quantized, images, profile, reduce_range, "gated")
    keep_plan(plan, tmp_path)

    again = kept_plan(tmp_path, bundle, images, profile)
    assert replace(again, equalization=factors) == plan
    for before, after in zip(factors, again.equalization, strict=True):
        assert before.keys() == after.keys()
        for name, value in before.items():
            np.testing.assert_array_equal(after[name], value)
