"""Help, versions and lists: at once, and without importing what is heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

import kdcompress
from kdcompress.cli import group
from kdcompress.cli.show import describe_own
from kdcompress.errors import InputError
from tests.cli.command import ENVIRONMENT, ROOT, run_cold
from tests.cli.conftest import Shop

HEAVY = {"torch", "torchvision", "numpy", "onnx", "onnxruntime", "onnxscript", "sklearn", "scipy", "timm", "pydantic"}
COMMANDS = group.list_commands(click.Context(group))


@pytest.mark.parametrize("words", [["--help"], *([command, "--help"] for command in COMMANDS)], ids=" ".join)
def test_help_imports_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    done = run_cold(*words, folder=tmp_path, flags=("-W", "error", "-X", "importtime"))
    assert done.code == 0
    assert done.out.startswith(f"Usage: kdcompress {'' if words[0] == '--help' else words[0] + ' '}[OPTIONS]")
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.err.splitlines()}
    assert "click" in imported
    assert not imported & HEAVY


def test_every_command_is_in_the_help_and_says_what_it_does(tmp_path: Path) -> None:
    lines = run_cold("--help", folder=tmp_path).out.partition("Commands:")[2].strip().splitlines()
    assert [line.split()[0] for line in lines] == COMMANDS
    assert all(len(line.split()) > 2 for line in lines)


def test_the_console_script_is_the_module(tmp_path: Path) -> None:
    script = Path(sys.executable).parent / "kdcompress"
    if not script.exists():
        pytest.skip("kdcompress is not installed beside this Python")
    line = [str(script), "--version"]
    done = subprocess.run(line, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout == run_cold("--version", folder=tmp_path).out
    assert kdcompress.__version__ in done.stdout


def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "kdcompress", "--help"]
    with subprocess.Popen(
        line, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode in (0, 1)


def test_a_terminal_without_the_characters_shows_question_marks(tmp_path: Path) -> None:
    program = "from kdcompress.cli import main\ntry: main(['--version'])\nexcept SystemExit: print('3 → 4 ×')"
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
    line = [sys.executable, "-c", program]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, encoding="ascii", check=True)
    assert done.stdout.splitlines()[1] == "3 ? 4 ?"


@pytest.mark.parametrize("what", ["methods", "weightings", "models", "recipes", "targets", "profiles"])
def test_ls_lists_what_show_and_the_flags_take(what: str, shop: Shop) -> None:
    names = [line.split()[0] for line in shop.must("ls", what).splitlines()]
    expected = {
        "methods": {"amtml-kd", "avg-kd", "supervised"},
        "weightings": {"uniform"},
        "models": {"resnet20", "resnet110", "mobilenet_v2"},
        "recipes": {
            path.relative_to(ROOT / "recipes").with_suffix("").as_posix() for path in (ROOT / "recipes").rglob("*.yaml")
        },
        "targets": {"onnx"},
        "profiles": {"ort-x86", "ort-arm", "trt8.5", "trt8.6", "trt10.3", "trt10.13", "trt11", "trt", "jetson-orin"},
    }
    assert expected[what] <= set(names)
    if what in ("methods", "weightings", "recipes", "profiles"):
        for name in names:
            assert len(shop.must("show", name).splitlines()) > 5


OWN_WEIGHTING = '''
"""Mine: everybody counts the same.

Idea
    Nobody knows better.
"""
from kdcompress.weightings.uniform import Uniform

class Mine(Uniform):
    pass
'''


def test_show_tells_of_a_weighting_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_shown_weighting.py").write_text(OWN_WEIGHTING)
    monkeypatch.chdir(tmp_path)
    assert describe_own("my_shown_weighting:Mine").splitlines()[0] == "Mine: everybody counts the same."
    for name in ("my_shown_weighting:Yours", "my_absent_module:Mine"):
        with pytest.raises(InputError, match=r"Method|cannot be imported"):
            describe_own(name)


def test_doctor_tells_versions_and_machine(shop: Shop) -> None:
    facts = dict(line.split(maxsplit=1) for line in shop.must("doctor").splitlines() if " " in line.strip())
    assert facts["kdcompress"] == kdcompress.__version__
    assert {"torch", "onnxruntime", "cpu", "profile"} <= set(facts)
