import subprocess
import sys

import kdcompress


def test_public_names_are_sorted_and_exist() -> None:
    assert list(kdcompress.__all__) == sorted(set(kdcompress.__all__))
    for name in kdcompress.__all__:
        assert getattr(kdcompress, name) is not None


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, kdcompress, kdcompress.cli; print('torch' in sys.modules, 'pydantic' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["False", "False"]
