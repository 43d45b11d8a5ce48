"""Which names of TensorRT the files that touch it use, read from their source."""

from __future__ import annotations

import ast
from pathlib import Path

import kdcompress

FILES = [Path(kdcompress.__file__).parent / f"tensorrt_{part}.py" for part in ("module", "builder", "engine")]
TABLE = Path(__file__).with_name("tensorrt_names.txt")

CLASSES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "cache": "ITimingCache",
    "kept": "ITimingCache",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
    "kinds": "NetworkDefinitionCreationFlag",
}
"""What the variables of those files hold."""
RETURNED = {
    "get_input": "ITensor",
    "get_timing_cache": "ITimingCache",
    "get_tensor_dtype": "DataType",
}


def names_used() -> set[str]:
    """Every name below `trt`, and every member of an object of TensorRT."""
    found = set()
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in FILES]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute):
            words = _chain(node)
            if words and words[0] in ("trt", "self._trt"):
                found.add(".".join(words[1:]))
            elif len(words) == 2 and words[0].replace("self._", "") in CLASSES:
                found.add(f"{CLASSES[words[0].replace('self._', '')]}.{words[1]}")
            elif isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute):
                holder = RETURNED.get(node.value.func.attr)
                found |= {f"{holder}.{node.attr}"} if holder else set()
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr":
            words, name = _chain(node.args[0]), node.args[1]
            assert isinstance(name, ast.Constant)
            holder = CLASSES.get(words[0], ".".join(words[1:]))
            found.add(f"{holder}.{name.value}".lstrip("."))
        elif isinstance(node, ast.ClassDef):
            bases = [_chain(base) for base in node.bases]
            found |= {f"{words[1]}.{f.name}" for words in bases if words[:1] == ["trt"] for f in _methods(node)}
    return {name for name in found if name and "__" not in name}


def _methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    return [inner for inner in node.body if isinstance(inner, ast.FunctionDef)]


def _chain(node: ast.expr) -> list[str]:
    """`trt.BuilderFlag.TF32` → ["trt", "BuilderFlag", "TF32"]; `self._trt.X` → ["self._trt", "X"]."""
    words: list[str] = []
    while isinstance(node, ast.Attribute):
        words.insert(0, node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return []
    return [f"self.{words[0]}", *words[1:]] if node.id == "self" and words else [node.id, *words]


def read_table() -> dict[str, set[str]]:
    """Version -> the names that were found in the real module of that version."""
    head, *lines = (line for line in TABLE.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    versions = head.split()[1:]
    table: dict[str, set[str]] = {version: set() for version in versions}
    for line in lines:
        name, *marks = line.split()
        for version, mark in zip(versions, marks, strict=True):
            if mark == "yes":
                table[version].add(name)
    return table
