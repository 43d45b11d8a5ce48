"""A file imports only from lower floors, and a folder's files only from that folder's `base`."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import kdcompress

FLOORS = (
    {"errors"},
    {"files", "types", "resizing", "cuda_driver", "tensorrt_layers", "ranks", "onnx_graph"},
    {"recipe", "pictures", "global_batch", "tensorrt_module", "channel_groups", "onnx_normalisation", "onnx_opset"},
    {
        "tensorrt_builder",
        "tensorrt_engine",
        "losses",
        "taps",
        "execution",
        "bundle",
        "data",
        "models",
        "profiles",
        "discovery",
        "onnx_file",
        "onnx_operators",
        "equalization",
        "comparison",
        "crossfit",
        "memory",
    },
    {
        "teachers",
        "weightings",
        "evaluate",
        "latency",
        "checkpoint",
        "optim",
        "balance",
        "display",
        "ledger",
        "logit_losses",
        "regressors",
        "measurement",
        "folding",
        "onnx_interface",
    },
    {"networks", "methods", "gate", "headroom"},
    {"init", "runtimes", "training_step", "live_teachers", "fake_quant"},
    {"training_session", "heldout", "probe", "onnx_ends"},
    {"train", "teacher_cache", "quantize", "export", "lint", "report", "adoption"},
    {"device_bundle"},
    {"pipeline"},
    {"cli"},
    {"__main__"},
)
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
ROOT = Path(kdcompress.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def imports(file: Path) -> Iterator[tuple[str, ...]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kdcompress"):
            assert node.level == 0
            yield from ((*node.module.split("."), alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level and file.parent == ROOT:  # files that a device gets too
            yield from (("kdcompress", node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (tuple(a.name.split(".")) for a in node.names if a.name.startswith("kdcompress"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_floors_hold(file: Path) -> None:
    parts = file.relative_to(ROOT).with_suffix("").parts
    if parts == ("__init__",):
        return
    package = parts[0]
    assert package in LEVEL, f"{package} has no floor"
    for imported in imports(file):
        target, inner = (*imported, "__init__", "__init__")[1:3]
        if target.startswith("__"):
            continue
        if target == package:
            neighbour = parts[-1] != "__init__" and inner != "base" and not inner.startswith("_")
            assert not neighbour, f"{'.'.join(parts)} imports its neighbour {inner}"
        else:
            assert LEVEL[target] < LEVEL[package], f"{'.'.join(parts)} imports {target} from the same or a higher floor"


@pytest.mark.parametrize("heavy", ["onnx", "onnxruntime", "tensorrt", "timm", "onnxscript", "matplotlib"])
def test_heavy_packages_are_imported_inside_functions(heavy: str) -> None:
    for file in FILES:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert all(name.split(".")[0] != heavy for name in names), f"{file.name} imports {heavy} at its top"
