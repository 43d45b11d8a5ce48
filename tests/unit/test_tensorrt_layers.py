import json

import pytest

from kdcompress.tensorrt_layers import missing_precision, parse_layers, precision_shares


def told(*layers: object) -> str:
    return json.dumps({"Layers": list(layers), "Bindings": ["images", "logits"]})


def tensor(text: str) -> list[dict[str, str]]:
    return [{"Name": "x", "Format/Datatype": text}]


INT8 = {
    "Name": "c1",
    "LayerType": "CaskConvolution",
    "Weights": {"Type": "Int8", "Count": 432},
    "Inputs": tensor("FP32"),
}
HALF = {"Name": "c2", "LayerType": "CaskConvolution", "Weights": {"Type": "Half", "Count": 432}}
FLOAT = {"Name": "c3", "LayerType": "gemm", "Weights": {"Type": "Float", "Count": 640}}
MYELIN = {"Name": "k1", "LayerType": "kgen", "Inputs": tensor("Channel major FP16 format where channel % 8 == 0")}
NOTHING = {"Name": "s", "LayerType": "Signal", "Inputs": [], "Outputs": []}


@pytest.mark.parametrize(
    ("entry", "precision", "weighted"),
    [
        (INT8, "INT8", True),
        (HALF, "FP16", True),
        (FLOAT, "FP32", True),
        (MYELIN, "FP16", False),
        (NOTHING, "other", False),
        ({"Name": "p", "Inputs": tensor("Thirty-two wide channel vectorized row major Int8 format")}, "INT8", False),
        ({"Name": "p", "Inputs": tensor("BFloat16")}, "BF16", False),
        ({"Name": "p", "Inputs": tensor("Int64"), "Outputs": tensor("Float")}, "FP32", False),
        ({"Name": "p", "Inputs": tensor("N/A due to dynamic shapes")}, "other", False),
    ],
)
def test_a_layer_computes_in_what_its_weights_or_its_input_say(entry: object, precision: str, weighted: bool) -> None:
    (layer,) = parse_layers(told(entry))
    assert (layer.precision, layer.weighted) == (precision, weighted)


def test_shares_of_layers_and_time() -> None:
    layers = parse_layers(told(INT8, HALF, FLOAT, MYELIN))
    shares = precision_shares(layers, {"c1": 3.0, "c2": 1.0, "c3": 4.0, "k1": 0.0, "unknown": 2.0})
    assert shares["INT8"] == {"layers": 1, "weighted_layers": 1, "share": 0.25, "time_share": 0.3}
    assert shares["FP16"] == {"layers": 2, "weighted_layers": 1, "share": 0.5, "time_share": 0.1}
    assert "time_share" not in precision_shares(layers, {})["FP32"]
    assert sum(share["share"] for share in shares.values()) == 1


def test_a_precision_that_is_not_there_is_told() -> None:
    shares = precision_shares(parse_layers(told(FLOAT, FLOAT, MYELIN)), {})
    assert missing_precision("fp32", shares) is None
    assert "67% FP32" in (missing_precision("int8", shares) or "")
    assert missing_precision("fp16", shares) is not None, "a layer without weights is not enough where others have them"
    assert missing_precision("fp16", precision_shares(parse_layers(told(MYELIN)), {})) is None
    assert missing_precision("fp16", precision_shares(parse_layers(told(HALF, FLOAT)), {})) is None
    assert missing_precision("int8", precision_shares(parse_layers(told("conv1", "conv2")), {})) is None, "not told"
