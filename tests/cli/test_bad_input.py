"""Every kind of bad input: exit code 2, one or two lines that say what is wrong, and nothing written."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from tests.cli.command import Finished
from tests.cli.conftest import Shop, write_images


class Bomb:
    """A pickle that makes a file when it is opened carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch '{self.path}'",)


@pytest.fixture(scope="module")
def bad(shop: Shop) -> Shop:
    """The shop with one of everything that is wrong."""
    folder = shop.folder
    whole = (folder / "a" / "model.pt").read_bytes()
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "page.pt").write_bytes(b"<!DOCTYPE html><html><body>404</body></html>")
    (folder / "image.pt").write_bytes((folder / "colours" / "train" / "a" / "0.png").read_bytes())
    torch.save({"optimizer": {"lr": 0.1}, "step": 3}, folder / "foreign.pt")
    weights = {"stem.weight": torch.zeros(4, 3, 3, 3), "head.weight": torch.zeros(9, 4)}
    torch.save({"state_dict": weights}, folder / "other.pt")
    torch.save({"state_dict": Bomb(folder / "executed")}, folder / "bomb.pt")
    (folder / "bare_bomb.pt").write_bytes(pickle.dumps(Bomb(folder / "executed")))
    with zipfile.ZipFile(folder / "notes.zip", "w") as archive:
        archive.writestr("notes.txt", "nothing")

    (folder / "file").write_text("not a folder", encoding="utf-8")
    (folder / "nothing").mkdir()
    write_images(folder / "empty class")
    for image in (folder / "empty class" / "train" / "b").iterdir():
        image.unlink()
    write_images(folder / "unreadable")
    (folder / "unreadable" / "train" / "b" / "3.png").write_bytes(b"not an image")
    write_images(folder / "cut short")
    cut = folder / "cut short" / "train" / "c" / "2.png"
    cut.write_bytes(cut.read_bytes()[:90])
    write_images(folder / "no test", parts=("train",))
    write_images(folder / "no train", parts=("test",))
    write_images(folder / "one class", classes="a")
    write_images(folder / "four", classes="abcd")
    write_images(folder / "other names", classes="acd")
    write_images(folder / "other holdout", classes="abd", parts=("test",))

    (folder / "noise.yaml").write_bytes(bytes(range(128, 256)))
    (folder / "broken.yaml").write_text("train: [1, 2\nseed: }{", encoding="utf-8")
    (folder / "list.yaml").write_text("- train\n- data\n", encoding="utf-8")
    (folder / "empty.yaml").write_text("", encoding="utf-8")
    (folder / "typo.yaml").write_text("train: {epoch: 3, bach_size: 2}\n", encoding="utf-8")
    (folder / "section.yaml").write_text("train: fast\n", encoding="utf-8")
    code = f"seed: !!python/object/apply:os.system ['touch {folder / 'executed'}']\n"
    (folder / "code.yaml").write_text(code, encoding="utf-8")

    shutil.copytree(folder / "run", folder / "unfinished", ignore=shutil.ignore_patterns("student"))
    for name, damaged in (("changed model", "student/model.safetensors"), ("changed bundle", "student/bundle.json")):
        shutil.copytree(folder / "run", folder / name)
        file = folder / name / damaged
        content = bytearray(file.read_bytes())
        content[-40:] = b"x" * 40
        file.write_bytes(content)
    shutil.copytree(folder / "run", folder / "no model")
    (folder / "no model" / "student" / "model.safetensors").unlink()
    shutil.copytree(folder / "run", folder / "changed facts")
    (folder / "changed facts" / "run.json").write_text("{}", encoding="utf-8")
    shutil.copytree(folder / "run", folder / "moved teacher")
    recipe = yaml.safe_load((folder / "moved teacher" / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["teachers"][1]["path"] = str(folder / "gone.pt")
    (folder / "moved teacher" / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return shop


@dataclass(frozen=True)
class Case:
    """A command line (words apart by `|`) and what its error has to name."""

    line: str
    named: tuple[str, ...]


def case(name: str, line: str, *named: str) -> object:
    return pytest.param(Case(line, named), id=name)


TRAIN = "train|--arch|resnet8|--data|digits|--out|new"
DISTILL = "distill|--teachers|a/model.pt|b/model.pt|--student|resnet8|--out|new"
ON = "train|--arch|resnet8|--out|new|--data|"

CHECKPOINTS = (
    case("missing", "inspect|nosuch.pt", "there is no such file", "nosuch.pt"),
    case("missing teacher", "distill|--teachers|a/model.pt|nosuch.pt|--student|resnet8", "no such file", "nosuch.pt"),
    case("missing, architecture named", "inspect|resnet8:nosuch.pt", "no such file", "nosuch.pt"),
    case("truncated", "inspect|truncated.pt", "truncated, damaged", "truncated.pt"),
    case("truncated teacher", "distill|--teachers|a/model.pt|truncated.pt|--student|resnet8", "truncated.pt"),
    case("empty", "inspect|empty.pt", "the file is empty"),
    case("web page", "inspect|page.pt", "a web page", "page.pt"),
    case("an image", "inspect|image.pt", "not a checkpoint", "image.pt"),
    case("no checkpoint but a zip", "inspect|notes.zip", "not a torch checkpoint", "notes.zip"),
    case("foreign", "distill|--teachers|foreign.pt|--student|resnet8|--data|digits", "foreign.pt", "state dict"),
    case("of no known network", "distill|--teachers|other.pt|--student|resnet8|--data|digits", "other.pt", "ARCH:PATH"),
    case("code", "distill|--teachers|a/model.pt|bomb.pt|--student|resnet8", "system", "nothing was run", "bomb.pt"),
    case("code in a bare pickle", "inspect|bare_bomb.pt", "system", "nothing was run", "bare_bomb.pt"),
    case("code to evaluate", "evaluate|bomb.pt|--data|digits", "system", "nothing was run"),
    case("code to start from", f"{TRAIN}|--init|bomb.pt", "system", "nothing was run"),
    case("saved state", "inspect|run/last.pt", "the state of a training", "student/"),
    case("a folder", "inspect|colours", "a folder without a bundle", "colours"),
    case("another architecture", "inspect|resnet20:a/model.pt", "do not fit resnet20", "a/model.pt"),
    case("unknown architecture of a teacher", "inspect|resnet9:a/model.pt", "'resnet9'", "did you mean 'resnet8'"),
)
A_C = "distill|--teachers|a/model.pt|c/model.pt|--student|resnet8"
C = "distill|--teachers|c/model.pt|--student|resnet8|--out|new"
CLASSES = (
    case("teachers differ", A_C, "a/model.pt has 10", "c/model.pt has 3"),
    case("teachers and data differ", f"{C}|--data|four", "3 classes", "four has 4"),
    case("bundle and data differ", "evaluate|c/student|--data|four", "4 classes in the data four, 3 in the model"),
    case("checkpoint and data differ", "evaluate|c/model.pt|--data|four", "3 classes", "four has 4"),
    case("run and data differ", "report|c|--data|four", "4 classes", "3 in the model"),
    case("run and data of other names", "report|c|--data|other names", "'b' is not in it"),
    case("calibration data differ", "quantize|c|--data|four|--out|new", "4 classes", "3 in the model"),
    case("names differ", "evaluate|c/student|--data|other names", "'b' is not in it"),
    case("channels differ", f"{DISTILL}|--data|colours", "1 channel", "3", "a/model.pt"),
    case("digits for a bundle of colours", "evaluate|c/student|--data|digits", "10 classes in the data digits, 3 in"),
)
DATA = (
    case("missing", f"{ON}nosuch", "'nosuch'", "--data"),
    case("unknown set", f"{ON}nosuch:ROOT", "unknown data set 'nosuch'", "--data"),
    case("nearest set", f"{ON}cifar11:ROOT", "did you mean 'cifar1"),
    case("set without folder", f"{ON}cifar10", "--data cifar10:ROOT"),
    case("set that is not there", f"{ON}cifar10:nothing", "nothing does not hold the files of CIFAR10"),
    case("imagenet that is not there", f"{ON}imagenet:nothing", "train/ and val/"),
    case("digits with a folder", f"{ON}digits:nothing", "--data digits"),
    case("a file", f"{ON}file", "neither a folder nor an archive"),
    case("an archive of something else", f"{ON}notes.zip", "notes.zip has no train/"),
    case("an empty folder", f"{ON}nothing", "nothing has no train/"),
    case("empty class folder", f"{ON}empty class", "train/b", "empty"),
    case("unreadable image", f"{ON}unreadable", "unreadable/train/b/3.png"),
    case("truncated image", f"{ON}cut short", "cut short/train/c/2.png", "truncated"),
    case("no test", f"{ON}no test", "neither val/ nor test/"),
    case("no train", f"{ON}no train", "no train/"),
    case("one class", f"{ON}one class", "one class", "at least two"),
    case("missing holdout", f"{DISTILL}|--holdout|nosuch", "nosuch", "--holdout"),
    case("holdout of other classes", f"{DISTILL}|--holdout|other holdout", "--holdout", "classes"),
    case("missing unlabelled", f"{DISTILL}|--unlabeled|nosuch", "nosuch", "--unlabeled"),
    case("empty unlabelled", f"{DISTILL}|--unlabeled|nothing", "no image", "--unlabeled"),
    case("none given", "train|--arch|resnet8|--out|new", "no data", "--data"),
)
RECIPES = (
    case("unknown", f"{TRAIN}|--recipe|cifar10/avg-kd_resnet2", "did you mean 'cifar10/avg-kd_resnet20'"),
    case("missing file", f"{TRAIN}|--recipe|nosuch.yaml", "nosuch.yaml does not exist", "--recipe"),
    case("binary", f"{TRAIN}|--recipe|noise.yaml", "not text in UTF-8", "noise.yaml"),
    case("not YAML", f"{TRAIN}|--recipe|broken.yaml", "not a YAML recipe", "line 2", "broken.yaml"),
    case("a list", f"{TRAIN}|--recipe|list.yaml", "a recipe is a mapping, this is a list"),
    case("empty", f"{TRAIN}|--recipe|empty.yaml", "a recipe is a mapping, this is empty"),
    case("code", f"{TRAIN}|--recipe|code.yaml", "not a YAML recipe", "code.yaml"),
    case(
        "unknown keys, all at once", f"{TRAIN}|--recipe|typo.yaml", "'train.epochs'", "'train.batch_size'", "typo.yaml"
    ),
    case("no section", f"{TRAIN}|--recipe|section.yaml", "train: a section", "'fast'"),
    case("unknown key", f"{TRAIN}|train.epoch=3", "'train.epoch'", "did you mean 'train.epochs'"),
    case("unknown section", f"{TRAIN}|trian.epochs=3", "'trian'", "'train'"),
    case("no section named", f"{TRAIN}|epochs=3", "'epochs=3' is not KEY=VALUE"),
    case("not a number", f"{TRAIN}|train.epochs=many", "train.epochs", "'many'"),
    case("out of range", f"{TRAIN}|train.epochs=0", "train.epochs", "greater than or equal to 1, not 0"),
    case("negative rate", f"{TRAIN}|train.lr=-1", "train.lr", "not -1"),
    case("rate that is no number", f"{TRAIN}|train.lr=.nan", "train.lr", "finite"),
    case("seed too large", f"{TRAIN}|seed=99999999999999999999", "seed", "99999999999999999999"),
    case("impossible date", f"{TRAIN}|seed=2020-99-99", "2020-99-99"),
    case("unknown choice", f"{TRAIN}|train.precision=fp8", "train.precision", "'fp32', 'bf16' or 'fp16', not 'fp8'"),
    case("unknown device", f"{TRAIN}|train.device=gpu", "'gpu'", "train.device", "cuda"),
    case("device that holds nothing", f"{TRAIN}|train.device=meta", "'meta'", "train.device"),
    case("unknown method", f"{DISTILL}|--method|amtml", "unknown method 'amtml'", "did you mean 'amtml-kd'"),
    case("unknown option", f"{DISTILL}|method.temprature=3", "did you mean 'method.temperature'"),
    case("option out of range", f"{DISTILL}|method.temperature=-3", "method.temperature", "not -3"),
    case("own method that is not there", f"{DISTILL}|--method|nosuch:Method", "nosuch cannot be imported"),
    case("own method that is none", f"{DISTILL}|--method|json:JSONDecoder", "JSONDecoder does not derive", "json"),
)
MODELS = (
    case("none given", "distill|--teachers|a/model.pt", "--student"),
    case("no teachers", "distill|--student|resnet8|--data|digits", "0 teachers", "--teachers"),
    case("unknown", "train|--data|digits|--out|new|--arch|mobilenet", "'mobilenet'", "did you mean 'mobilenet_v2'"),
    case("unknown of timm", "train|--data|digits|--out|new|--arch|timm/nosuch", "'nosuch'"),
    case("unknown argument", f"{TRAIN}|student.args.wdth=2", "'wdth'", "width"),
    case("argument out of range", f"{TRAIN}|student.args.width=-2", "width", "-2"),
    case("unknown stage", f"{TRAIN}|student.stages=[nosuch]", "'nosuch'", "layer1"),
    case("start: missing file", f"{TRAIN}|--init|nosuch.pt", "nosuch.pt", "--init"),
    case("start: other shapes", f"{TRAIN}|--init|b/model.pt", "conv1.weight", "--init b/model.pt"),
    case(
        "start: teacher that does not fit",
        "distill|--teachers|b/model.pt|--student|resnet8|--out|new|--init|teacher",
        "--init teacher",
    ),
    case("start: no such teacher", f"{DISTILL}|--init|teacher:3", "teacher:3", "2 teachers"),
    case("start: nobody to start from", f"{TRAIN}|--init|teacher", "no teachers", "--init"),
    case("start: nothing published", f"{TRAIN}|--init|pretrained", "nobody publishes weights for resnet8"),
)
OUTPUTS = (
    case("train: not empty", "train|--arch|resnet8|--data|digits|--out|run", "run is not empty", "--out"),
    case("train: a file", "train|--arch|resnet8|--data|digits|--out|file", "file is a file", "--out"),
    case(
        "distill: below a file",
        "distill|--teachers|a/model.pt|--student|resnet8|--out|file/x",
        "file is a file",
        "--out",
    ),
    case("export: not empty", "export|run|--out|colours", "colours is not empty", "--out"),
    case("export: below a file", "export|run|--out|file/x", "file is a file", "--out"),
    case("quantize: a file", "quantize|run|--out|file", "file is a file", "--out"),
    case("quantize: not empty", "quantize|run|--out|run", "run is not empty", "--out"),
    case("report: a file", "report|run|--out|file", "file is a file", "--out"),
    case("demo: not empty", "demo|--out|run", "run is not empty", "--out"),
)
RUNS = (
    case("none yet", "export", "there is no run under runs/"),
    case("none to resume", "distill|--resume", "there is no run under runs/"),
    case("missing", "report|nosuch", "nosuch does not exist"),
    case("no run", "report|colours", "colours is not a run"),
    case("a file", "export|a/model.pt", "a/model.pt is not a run"),
    case("no run to resume", "train|--resume|--out|colours", "colours is not a run"),
    case("another kind to resume", "train|--resume|--out|run", "amtml-kd → supervised", "--resume"),
    case("other teachers to resume", "distill|--resume|--out|unfinished|--teachers|truncated.pt", "truncated.pt"),
    case("unfinished: export", "export|unfinished", "did not finish", "kdcompress distill --resume --out unfinished"),
    case("unfinished: report", "report|unfinished", "did not finish", "--resume"),
    case("changed model: export", "export|changed model", "model.safetensors was changed", "changed model/student"),
    case("changed model: report", "report|changed model", "model.safetensors was changed"),
    case("changed model: evaluate", "evaluate|changed model/student|--data|digits", "model.safetensors was changed"),
    case(
        "changed model: teacher", "distill|--teachers|changed model|--student|resnet8", "model.safetensors was changed"
    ),
    case("changed bundle", "inspect|changed bundle/student", "bundle.json", "cannot be read"),
    case("no model", "quantize|no model", "model.safetensors is missing"),
    case("changed facts", "report|changed facts", "run.json is missing or damaged"),
    case("teacher that is gone", "report|moved teacher", "no such file", "gone.pt"),
    case("ONNX from ONNX", "inspect|run/student/model.onnx", "no such file"),
)
LINES = (
    case("unknown command", "exprot", "'exprot'", "did you mean 'export'"),
    case("unknown option", "train|--arhc|resnet8", "--arhc", "--arch"),
    case("unknown profile", "quantize|run|--for|ort-x87", "'ort-x87'", "did you mean 'ort-x86'", "--for"),
    case("unknown profile for export", "export|run|--for|nosuch|--out|new", "'nosuch'", "ort-arm", "--for"),
    case("two exports", "export|run|--onnx|--trt|--out|new", "--onnx and --trt", "one command for each"),
    case("another target's", "export|run|--require-engine|--out|new", "--require-engine is of --trt, not of --onnx"),
    case("ONNX's", "export|run|--device|--batch|2|--out|new", "--batch is of --onnx", "then --device of that bundle"),
    case("batch sizes", "report|run|--batch-sizes|nonsense", "'nonsense'", "--batch-sizes", "1,32"),
    case("batch size 0", "report|run|--batch-sizes|1,0", "'1,0'", "--batch-sizes"),
    case("threads 0", "report|run|--threads|0", "--threads", "0 is not in the range"),
    case("a limit that is no number", "quantize|run|--max-drop|nan", "nan is no limit", "--max-drop"),
    case("a speed-up that is no number", "quantize|run|--min-speed-up|nan", "nan is no limit", "--min-speed-up"),
    case("restarts 0", "report|run|--restarts|0", "--restarts"),
    case("--teachers without any", "distill|--teachers|--student|resnet8", "--teachers needs a value"),
    case("--teachers at the end", "distill|--student|resnet8|--teachers", "--teachers"),
    case("--teachers and a setting", "distill|--teachers|seed=1", "--teachers needs a value"),
    case("--out without a value", "train|--out|--resume", "--out needs a value"),
    case("an empty word", "train|--arch|resnet8|--data||--out|new", "an empty word"),
    case("a stray word", f"{DISTILL}|--|c.pt", "'c.pt' is not KEY=VALUE"),
    case("nothing to evaluate on", "evaluate|run", "--data"),
    case("nothing to list", "ls", "methods", "profiles"),
    case("unknown list", "ls|modles", "'modles'", "models"),
    case("unknown card", "show|amtml", "'amtml'", "did you mean 'amtml-kd'"),
)
SECTIONS = {
    "checkpoint": CHECKPOINTS,
    "classes": CLASSES,
    "data": DATA,
    "recipe": RECIPES,
    "model": MODELS,
    "output": OUTPUTS,
    "run": RUNS,
    "line": LINES,
}


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder, with its size and time of change."""
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def require_plain_error(done: Finished, code: int = 2) -> None:
    assert done.code == code, done.err or done.out
    lines = done.error.splitlines()
    assert 1 <= len(lines) <= 2, done.err
    assert done.err.startswith("error: "), "nothing else is said"
    assert "Traceback" not in done.err
    assert "unexpected" not in done.err
    assert all(line.strip() for line in lines)


@pytest.mark.parametrize("case", [one for cases in SECTIONS.values() for one in cases])
def test_bad_input_is_one_clear_error_and_nothing_written(case: Case, bad: Shop) -> None:
    before = contents(bad.folder)
    done = bad.run(*case.line.split("|"))
    require_plain_error(done)
    for text in case.named:
        assert text in done.error
    assert contents(bad.folder) == before
    assert not (bad.folder / "executed").exists()
