"""The peak is of the stretch that is looked at, and no other."""

import sys

import pytest
import torch

from kdcompress.memory import PeakMemory


@pytest.mark.skipif(sys.platform != "linux", reason="known on Linux only")
def test_the_peak_begins_anew() -> None:
    first = PeakMemory(torch.device("cpu"))
    before = first.read_mb()
    assert before is not None
    large = torch.ones(50_000_000)  # 200 MB
    with_it = first.read_mb()
    assert with_it is not None
    assert with_it - before == pytest.approx(200, abs=40)
    del large
    again = PeakMemory(torch.device("cpu")).read_mb()
    assert again is not None
    assert again < with_it - 150
