from pathlib import Path

import pytest

from kdcompress.pipeline.base import RunFolder


def test_a_new_runs_folder_has_a_plain_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder inside another, and nothing that `ARCH:PATH` or a volume of Docker would read as two words."""
    monkeypatch.chdir(tmp_path)
    first, second = (RunFolder.create(None, "my_pkg.my_kd:MyKD-torchvision/resnet18+vgg8").path for _ in range(2))
    assert first.parent.name == "runs"
    assert first.name.endswith("-my_pkg.my_kd-MyKD-torchvision-resnet18+vgg8")
    assert first != second
