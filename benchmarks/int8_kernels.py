"""What one 8-bit convolution of ONNX Runtime takes, by its number of channels.

    python benchmarks/int8_kernels.py --kernel 3 --size 28 --depthwise --channels 58 64 72 80
    python benchmarks/int8_kernels.py --kernel 1 --size 28 --channels 22 24 58 60

Chains of 2 and of 12 such convolutions, channels last, are timed in turns in one thread; a tenth of the difference is
one convolution without the call and the way in and out. Medians of 60 pairs, random integers.
"""

import argparse
import time

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from kdcompress.latency import describe_machine

SHORT, LONG = 2, 12


def chain(length: int, channels: int, size: int, kernel: int, depthwise: bool) -> bytes:
    """A graph of QLinearConv nodes one behind the other."""
    random = np.random.default_rng(0)
    groups = channels if depthwise else 1
    constants = {
        "scale": np.float32(0.02),
        "zero": np.uint8(128),
        "weight": random.integers(-127, 128, (channels, channels // groups, kernel, kernel), np.int8),
        "weight_scale": np.full(channels, 0.002 * groups / channels, np.float32),
        "weight_zero": np.zeros(channels, np.int8),
        "bias": np.zeros(channels, np.int32),
    }
    ends = ("scale", "zero")
    nodes = [helper.make_node("QuantizeLinear", ["images", *ends], ["0"])]
    for number in range(length):
        inputs = [str(number), *ends, "weight", "weight_scale", "weight_zero", *ends, "bias"]
        nodes.append(helper.make_node("QLinearConv", inputs, [str(number + 1)], group=groups, pads=[kernel // 2] * 4))
    nodes.append(helper.make_node("DequantizeLinear", [str(length), *ends], ["out"]))
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, channels, size, size])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    content: bytes = model.SerializeToString()
    return content


def microseconds(channels: int, size: int, kernel: int, depthwise: bool, pairs: int = 60) -> float:
    """What one of the convolutions takes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = [
        onnxruntime.InferenceSession(
            chain(length, channels, size, kernel, depthwise), options, providers=["CPUExecutionProvider"]
        )
        for length in (SHORT, LONG)
    ]
    images = {"images": np.random.default_rng(0).random((1, channels, size, size), np.float32)}
    differences = []
    for turn in range(pairs + 10):
        times = []
        for session in sessions:
            start = time.perf_counter_ns()
            session.run(None, images)
            times.append(time.perf_counter_ns() - start)
        if turn >= 10:  # the first ones warm up
            differences.append((times[1] - times[0]) / 1000 / (LONG - SHORT))
    return float(np.median(differences))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, nargs="+", required=True)
    parser.add_argument("--kernel", type=int, default=3)
    parser.add_argument("--size", type=int, default=28, help="height and width")
    parser.add_argument("--depthwise", action="store_true")
    options = parser.parse_args()
    machine = describe_machine()
    print(f"{machine['cpu']} · {', '.join(machine['instruction_sets'])} · onnxruntime {onnxruntime.__version__}")
    print("| channels | µs |\n| ---: | ---: |")
    for channels in options.channels:
        print(
            f"| {channels} | {microseconds(channels, options.size, options.kernel, options.depthwise):.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
