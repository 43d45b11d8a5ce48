import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from kdcompress.resizing import cover_and_cut

SIDES = st.integers(4, 300)


@given(SIDES, SIDES, st.integers(4, 64))
def test_a_square_is_cut_as_torchvision_cuts_it(height: int, width: int, side: int) -> None:
    numbered = np.arange(height * width, dtype=np.int32).reshape(height, width)
    resized = transforms.Resize(side, interpolation=transforms.InterpolationMode.NEAREST)(Image.fromarray(numbered))
    scaled, (top, left) = cover_and_cut(height, width, side, side)
    assert (resized.height, resized.width) == scaled
    expected = np.asarray(transforms.CenterCrop(side)(resized))
    assert np.array_equal(np.asarray(resized)[top : top + side, left : left + side], expected)


@given(SIDES, SIDES, SIDES, SIDES)
def test_any_shape_is_covered_without_waste(height: int, width: int, wanted_height: int, wanted_width: int) -> None:
    scaled, (top, left) = cover_and_cut(height, width, wanted_height, wanted_width)
    assert wanted_height in scaled or wanted_width in scaled
    cut = torch.zeros(scaled)[top : top + wanted_height, left : left + wanted_width]
    assert cut.shape == (wanted_height, wanted_width)
    assert scaled[0] == wanted_height or scaled[1] == wanted_width
    assert abs(scaled[0] / scaled[1] - height / width) <= (height / width + 1) / min(scaled) + 1e-9
