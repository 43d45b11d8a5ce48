"""Shapes and types of every annotated call in the package are checked while the tests run."""

import os
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "1")

install_import_hook("kdcompress", "beartype.beartype")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the libraries warn about while they are imported is not ours
    import torch
    import torchvision  # noqa: F401

torch.set_num_threads(1)
# A busy machine must not fail a test: how long an example takes is not what is tested.
settings.register_profile("kdcompress", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kdcompress")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data and real teachers that KDCOMPRESS_TEST_DATA names; the test is skipped without it."""
    folder = os.environ.get("KDCOMPRESS_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("KDCOMPRESS_TEST_DATA names no folder of real data")
    return Path(folder)


@pytest.fixture(scope="session")
def stand_in_driver(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CUDA driver with one GPU, over ordinary memory (tests/unit/stand_in_cuda.c)."""
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("cuda") / "libcuda.so.1"
    source = Path(__file__).parent / "unit" / "stand_in_cuda.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return str(library)
