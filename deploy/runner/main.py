"""The command line of the device bundle. Exit codes: 0 done; 1 a check said no; 2 the command or a file is wrong."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_MOST = 10**6
"""Of anything that is counted on the command line."""
_NEEDED = {"numpy": "numpy", "PIL": "Pillow"}


def main(words: Sequence[str]) -> int:
    """Does what the words say; the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without · or … shows ?
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
        parser = _child_parser() if words[:1] == ["_child"] else _parser()
        if "" in words:
            return _fail("an empty word on the command line\nis a variable of the shell not set?", 2)
        arguments = parser.parse_args(words)
        missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
        if missing:
            return _fail(f"{' and '.join(missing)} not installed\npip install {' '.join(missing)}", 2)
        return _obey(arguments)
    except ImportError as error:
        said = " ".join(str(error).split())[:300]
        return _fail(f"a package does not load: {said}\ninstall it again for this Python", 2)
    except MemoryError:
        return _fail("out of memory\ntake a smaller batch size, or fewer --precisions", 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 1)
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except OSError as error:
        return _fail(f"{error.strerror or error}\nis there space where the output goes?", 1)
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        return _fail(f"unexpected {type(error).__name__}: {said}\nis the command line as --help says?", 1)


def _obey(arguments: argparse.Namespace) -> int:
    from . import commands
    from .cuda_driver import CudaError
    from .errors import DeviceError
    from .tensorrt_module import EngineError

    try:
        return int(getattr(commands, arguments.command.strip("_"))(ROOT, arguments))
    except DeviceError as error:
        return _fail(str(error), error.code)
    except EngineError as error:
        return _fail(error.what + (f"\n{error.fix}" if error.fix else ""), 1)
    except CudaError as error:
        return _fail(f"the GPU failed: {error}", 1)


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """One that says what is wrong, and not how everything is used."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message}\n{self.prog} --help says more\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="run.py", description="Check, measure and run the student in this folder.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    check = commands.add_parser("check", help="does this device answer as it should, from the JPEG to the logits")
    build = commands.add_parser("build", help="build the TensorRT engines; every other command does it when needed")
    measure = commands.add_parser(
        "measure", help="latency, memory, energy; writes a file for kdcompress report --merge"
    )
    classify = commands.add_parser("classify", help="name what is in pictures")
    for command in (check, build, measure, classify):
        _add_common(command)
    measure.add_argument("--out", type=Path, default=Path("measurement.json"), metavar="FILE", help="[%(default)s]")
    measure.add_argument("--batch-sizes", type=_sizes, metavar="N,N", help="images in a call [1]")
    measure.add_argument("--restarts", type=_positive, default=5, metavar="N", help="processes [%(default)s]")
    measure.add_argument(
        "--iterations", type=_positive, default=200, metavar="N", help="timed calls each [%(default)s]"
    )
    measure.add_argument("--warmup", type=_positive, default=50, metavar="N", help="untimed calls first [%(default)s]")
    measure.add_argument("--sustained", type=_seconds, default=0.0, metavar="TIME", help="run each so long: 10m, 90s")
    classify.add_argument("paths", nargs="+", type=_path, metavar="PICTURE|FOLDER")
    classify.add_argument(
        "--top", type=_positive, default=1, metavar="N", help="how many classes to name [%(default)s]"
    )
    classify.add_argument("--json", action="store_true", help="one JSON object for each picture")
    classify.add_argument("--resize", choices=("bilinear", "bilinear-crop"), help="where the student names no method")
    return parser


def _child_parser() -> argparse.ArgumentParser:
    """How `measure` speaks to its processes; nobody else does, so no usage names it."""
    parser = argparse.ArgumentParser(prog="run.py")
    parser.add_argument("command")
    parser.add_argument("order", type=json.loads)
    parser.add_argument("answer", type=Path)
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--precisions", type=_names, default=[], metavar="P,P", help="fp32, fp16, int8 [all there are]"
    )
    command.add_argument("--runtime", choices=("auto", "tensorrt", "onnxruntime"), default="auto", help="[%(default)s]")
    command.add_argument("--threads", type=_positive, default=1, metavar="N", help="of ONNX Runtime [%(default)s]")
    engines = command.add_argument_group("TensorRT engines")
    engines.add_argument("--engines", type=Path, default=ROOT / "engines", metavar="DIR", help="[engines/ here]")
    engines.add_argument("--batch", type=_sizes, default=None, metavar="MIN,OPT,MAX", help="batch sizes [1,1,32]")
    engines.add_argument(
        "--workspace-mb", type=_positive, metavar="N", help="memory a layer may use beside its tensors"
    )
    engines.add_argument("--builder-level", type=int, choices=range(6), metavar="0-5", help="effort of the builder")
    engines.add_argument("--version-compatible", action="store_true", help="also for later TensorRT of this major")
    engines.add_argument("--hardware-compatible", action="store_true", help="for every GPU from Ampere on")


def _path(text: str) -> Path:
    try:
        Path(text).exists()
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text[:40]}… is no name of a file: {error}"[:200]) from error
    return Path(text)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(_positive(word) for word in text.split(","))


def _positive(text: str) -> int:
    if not (text.isdigit() and len(text) < 20 and 1 <= int(text) <= _MOST):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number from 1 to {_MOST}")
    return int(text)


def _seconds(text: str) -> float:
    factor = {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    try:
        seconds = float(text if factor is None else text[:-1]) * (factor or 1)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 10m or 90s")
    return seconds
