import pytest

from kdcompress.errors import InputError
from kdcompress.quantize import find_quantizer, list_quantizers


def test_quantizers_are_found_by_file_name() -> None:
    assert "int8" in list_quantizers()
    assert "base" not in list_quantizers()
    assert (find_quantizer("int8").takes, find_quantizer("int8").makes) == ("onnx", "int8")


def test_an_unknown_quantizer_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'int8'"):
        find_quantizer("int88")
