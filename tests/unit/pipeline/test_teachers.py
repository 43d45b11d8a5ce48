from pathlib import Path

import pytest
import torch

from kdcompress.data import load_splits
from kdcompress.errors import ShapeError
from kdcompress.models import build_network
from kdcompress.pipeline._teachers import read_checkpoints, require_fitting
from kdcompress.recipe import TeacherSection


def checkpoint_of(path: Path, arch: str, **arguments: int) -> TeacherSection:
    torch.save(build_network(arch, **arguments).state_dict(), path)
    return TeacherSection(path=str(path))


def test_a_teacher_of_colour_images_is_refused_for_grey_ones(tmp_path: Path) -> None:
    sections = [checkpoint_of(tmp_path / f"{n}.pt", "resnet8", num_classes=10, in_channels=n) for n in (1, 3)]
    splits = load_splits("digits")
    require_fitting(read_checkpoints(sections[:1]), splits)
    with pytest.raises(ShapeError, match=r"images of 3 channel\(s\), those of digits have 1") as caught:
        require_fitting(read_checkpoints(sections), splits)
    assert caught.value.where == str(tmp_path / "3.pt")
