"""kdcompress distills several trained image classifiers into one small student and ships it to the edge.

The names below are the public interface; each is imported when it is first used, so `import kdcompress` costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Accuracy": "evaluate",
    "Batch": "types",
    "Bundle": "bundle",
    "EnsembleOutputs": "types",
    "KdcompressError": "errors",
    "LossTerms": "types",
    "Method": "methods.base",
    "Needs": "types",
    "NetworkShapes": "types",
    "Outputs": "types",
    "Predictor": "types",
    "Preprocess": "bundle",
    "Recipe": "recipe",
    "Share": "types",
    "Step": "types",
    "Student": "networks",
    "Teacher": "networks",
    "TeacherEnsemble": "networks",
    "Term": "types",
    "Weighting": "weightings.base",
    "build_network": "models",
    "find_method": "methods.base",
    "load_splits": "data",
    "load_student": "networks",
    "measure_latency": "latency",
    "open_bundle": "runtimes",
    "read_bundle": "bundle",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kdcompress' has no attribute {name!r}")
    return getattr(import_module(f"kdcompress.{_HOMES[name]}"), name)
