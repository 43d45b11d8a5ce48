"""The peak is of the stretch that is looked at, and no other."""

import subprocess
import sys

import pytest

STRETCHES = """
import torch
from kdcompress.memory import PeakMemory

first = PeakMemory(torch.device("cpu"))
before = first.read_mb()
large = torch.ones(50_000_000)  # 200 MB
with_it = first.read_mb()
del large
again = PeakMemory(torch.device("cpu")).read_mb()
print(before, with_it, again)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="known on Linux only")
def test_the_peak_begins_anew() -> None:
    """In a process of its own: in one that has run other tests, memory that they leave may be freed meanwhile."""
    done = subprocess.run([sys.executable, "-c", STRETCHES], capture_output=True, text=True, check=True, timeout=300)
    before, with_it, again = (float(figure) for figure in done.stdout.split())
    assert with_it - before == pytest.approx(200, abs=40)
    assert again < with_it - 150
