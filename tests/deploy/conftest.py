from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from kdcompress.bundle import Bundle
from kdcompress.device_bundle import MANIFEST, Card, write_device_bundle
from kdcompress.files import file_digest
from kdcompress.profiles import get_profile
from kdcompress.quantize import find_quantizer
from tests.unit.deployed import digits, onnx_bundle

PROGRAM = """
import runpy, sys
for name in ("torch", "torchvision", "kdcompress", "onnx", "scipy", "pydantic", "tensorrt"):
    sys.modules[name] = None  # importing it fails
sys.path.insert(0, sys.argv[1])
sys.argv[0:2] = [sys.argv[1] + "/run.py"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Delivered:
    """A device bundle as it lies on a device."""

    path: Path

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        """`python3 run.py …`, where neither torch nor kdcompress can be imported; every warning an error."""
        line = [sys.executable, "-W", "error", "-c", PROGRAM, str(self.path), *map(str, words)]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        place = self.path.parent
        return subprocess.run(
            line, cwd=place, env=environment, capture_output=True, text=True, check=False, timeout=300
        )

    def sign(self) -> None:
        """Writes the manifest anew, as somebody would who changes a file and wants it believed."""
        names = [line.split("  ", 1)[1] for line in (self.path / MANIFEST).read_text().splitlines()]
        (self.path / MANIFEST).write_text("".join(f"{file_digest(self.path / name)}  {name}\n" for name in names))


@functools.cache
def int8_bundle() -> Bundle:
    source = onnx_bundle()
    folder = source.path.with_name("onnx-int8-ort-x86")
    return find_quantizer("int8").run(source, digits()[0][:200], folder, profile=get_profile("ort-x86"))


def deliver(folder: Path, profile: str = "ort-x86") -> Delivered:
    flavours = {"fp32": onnx_bundle(), "int8": int8_bundle()}
    return Delivered(write_device_bundle(folder, flavours, profile=get_profile(profile), card=Card()))


@pytest.fixture(scope="session")
def delivered(tmp_path_factory: pytest.TempPathFactory) -> Delivered:
    """Not to be changed."""
    return deliver(tmp_path_factory.mktemp("device") / "bundle [ü]")


@pytest.fixture
def copy(delivered: Delivered, tmp_path: Path) -> Delivered:
    """To be changed."""
    return Delivered(Path(shutil.copytree(delivered.path, tmp_path / "copy")))
