"""The recipe: everything that decides a run, as typed data. Read by name or path, overridden, written back resolved.

A recipe file is YAML with the sections of `Recipe`. What a file leaves out has the defaults below. Options of the
method are checked later against the method itself, so this file knows none of them and needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdcompress.errors import RecipeError, unknown_name
from kdcompress.files import atomic_write

Fraction = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
OVERRIDE = re.compile(r"^(seed|[a-z]+(?:\.[a-z_][a-z_0-9]*)+)=(.*)$", re.DOTALL)
"""`seed=3` or `section.key=value`."""


class Section(BaseModel):
    """One section: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataSection(Section):
    """Where the images come from, how they are split and what views are made of them.

    `limit` and `test_limit` use so many training and test images. `views` is how training images are augmented;
    `padding` belongs to the crops, `mixup_alpha` 0 mixes nothing. `image_size` is the side of the square in pixels.
    `force` learns weights of the teachers also from labels of images that they were trained on.
    """

    source: str | None = None
    holdout: str | None = None
    force: bool = False
    unlabeled: str | None = None
    split_seed: Seed = 0
    view_seed: Seed = 0
    limit: Annotated[int, Field(ge=1)] | None = None
    test_limit: Annotated[int, Field(ge=1)] | None = None
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    calibration_images: Annotated[int, Field(ge=1)] = 512
    image_size: Annotated[int, Field(ge=4, le=4096)] | None = None
    views: Literal["auto", "none", "crop", "crop-flip", "random-resized-crop"] = "auto"
    padding: Annotated[int, Field(ge=0, le=64)] | None = None
    mixup_alpha: Annotated[float, Field(ge=0)] = 0.0
    workers: Annotated[int, Field(ge=0)] = 0


class TeacherSection(Section):
    """One teacher. `mean` and `std` (of images in [0, 1]) are measured where neither the file nor the recipe says."""

    path: str
    arch: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    image_size: Annotated[int, Field(ge=4, le=4096)] | None = None
    stages: tuple[str, ...] | None = None


class StudentSection(Section):
    """The student's architecture, the arguments of its constructor, and where it starts (`--init`)."""

    arch: str | None = None
    args: dict[str, Any] = Field(default_factory=dict)
    init: str = "auto"
    init_blocks: Literal["even", "first-two-and-last"] = "even"
    stages: tuple[str, ...] | None = None


class MethodSection(BaseModel):
    """The method's name and its options; which options exist is the method's to say (`kdcompress show METHOD`)."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = "amtml-kd"

    @property
    def options(self) -> dict[str, Any]:
        """Everything but the name."""
        return dict(self.__pydantic_extra__ or {})


class TrainSection(Section):
    """The optimisation. `lr` is the peak rate, chosen by the optimizer and the student's start where it is not given.

    `batch_size` is that of all processes together, where several train (`torchrun`), and `sync_batchnorm` lets batch
    norms take their statistics over all of it (CUDA).
    `milestones` are fractions of the training at which the schedule `step` cuts the rate to `decay` of itself.
    `ema` is the decay of the exponential moving average of the weights, 0 for none; `clip_norm` bounds the
    gradient's norm; `checkpoint_minutes` is the longest time between two saved states. Where a method asks for each
    student's own trained copy, it is trained on labels for `pretrain_epochs` (not given: as many as `epochs`) at
    `pretrain_lr` first. What `precision`, `channels_last` and `compile` leave to "auto" is measured on this machine
    before a training that takes more than a minute; the run's recipe has what was found.
    """

    epochs: Annotated[int, Field(ge=1)] = 60
    batch_size: Annotated[int, Field(ge=1)] = 128
    lr: Annotated[float, Field(gt=0)] | None = None
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: Fraction = 0.9
    nesterov: bool = True
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    milestones: tuple[Fraction, ...] = (0.5, 0.75)
    decay: Annotated[float, Field(gt=0, le=1)] = 0.1
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0
    label_smoothing: Fraction = 0.0
    ema: Fraction = 0.0
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    channels_last: Literal["auto"] | bool = "auto"
    compile: Literal["auto"] | bool = "auto"
    sync_batchnorm: bool = False
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 2.0
    pretrain_epochs: Annotated[int, Field(ge=1)] | None = None
    pretrain_lr: Annotated[float, Field(gt=0)] | None = None


class EnsembleSection(Section):
    """How the teachers are asked. `precision`, `channels_last` and `compile` are found as those of the student are.

    `teachers_per_step` 1 asks one teacher about each batch, drawn at random, for methods whose gradient is the same on
    average.
    """

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    channels_last: Literal["auto"] | bool = "auto"
    compile: Literal["auto"] | bool = "auto"
    teachers_per_step: Literal["all", 1] = "all"


class CacheSection(Section):
    """Whether what the teachers say is stored, and replayed by every later run (`kdcompress cache`).

    `views` fixed views of each image, no more than there are epochs, are shown in turn, and the teachers are asked for
    them before the training; a number no smaller than the space of views keeps all of it, and the training is what it
    is without a cache. `max_gb` bounds all caches in `dir` together. `top_k` logits of each teacher are kept, by
    default all of up to 256 classes.
    """

    enabled: bool = False
    dir: str | None = None
    views: Annotated[int, Field(ge=1)] = 8
    max_gb: Annotated[float, Field(gt=0)] = 10.0
    top_k: Annotated[int, Field(ge=1)] | None = None


class Recipe(Section):
    """Everything that decides a run. `seed` moves order and initial weights, not the data's seeds.

    `students` are several that are trained together, by a method that does so; `student` says nothing then.
    """

    seed: Seed = 0
    data: DataSection = DataSection()
    teachers: tuple[TeacherSection, ...] = ()
    student: StudentSection = StudentSection()
    students: tuple[StudentSection, ...] = ()
    method: MethodSection = MethodSection()
    train: TrainSection = TrainSection()
    ensemble: EnsembleSection = EnsembleSection()
    cache: CacheSection = CacheSection()

    @property
    def trained(self) -> tuple[StudentSection, ...]:
        """The sections of all students of the run, one or more."""
        return self.students or (self.student,)


def recipe_folder() -> Path:
    """The folder of the recipes that come with kdcompress."""
    shipped = Path(__file__).parent / "_recipes"
    return shipped if shipped.is_dir() else Path(__file__).parent.parent / "recipes"


def list_recipes() -> tuple[str, ...]:
    """Names of the shipped recipes, `<dataset>/<method>_<student>`."""
    folder = recipe_folder()
    return tuple(sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml")))


def read_recipe(name_or_path: str) -> dict[str, Any]:
    """The mapping in a recipe file, unchecked.

    Args:
        name_or_path: a file, or the name of a shipped recipe.

    Raises:
        RecipeError: no such recipe, or not a YAML mapping.
    """
    path = Path(name_or_path)
    if not path.is_file():
        shipped = recipe_folder() / f"{name_or_path}.yaml"
        if path.suffix in (".yaml", ".yml"):
            what = "is no file" if path.exists() else "does not exist"
            raise RecipeError(f"{path} {what}", where="--recipe", fix="a recipe file, or see kdcompress ls recipes")
        if name_or_path not in list_recipes():
            raise RecipeError(
                unknown_name("recipe", name_or_path, list_recipes()), where="--recipe", fix="or the path of a file"
            )
        path = shipped
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    except _NOT_YAML as error:
        raise RecipeError(f"not a YAML recipe: {_reason(error)}", where=str(path)) from error
    if not isinstance(content, dict):
        found = "empty" if content is None else f"a {type(content).__name__}"
        raise RecipeError(
            f"a recipe is a mapping, this is {found}", where=str(path), fix="sections such as `train:`, with keys below"
        )
    return content


_NOT_YAML = (ValueError, RecursionError, yaml.YAMLError)


def _reason(error: Exception) -> str:
    """What is wrong with a text that is no YAML, and where, on one line."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not text in UTF-8"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem} (line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1})"
    return " ".join(str(error).split())


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """`train.lr=0.05` → (("train", "lr"), 0.05).

    Raises:
        RecipeError: not of the form `seed=…` or `section.key=…`.
    """
    match = OVERRIDE.match(text)
    if not match:
        raise RecipeError(f"{text!r} is not KEY=VALUE", fix="seed=3, or section.key=value such as train.epochs=30")
    try:
        value = yaml.safe_load(match[2])
    except _NOT_YAML as error:
        raise RecipeError(f"cannot read the value {match[2]!r}", where=match[1]) from error
    return tuple(match[1].split(".")), value


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `changes`; mappings are merged, everything else is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def nested(path: Iterable[str], value: Any) -> dict[str, Any]:
    """(("train", "lr"), 0.05) → {"train": {"lr": 0.05}}."""
    first, *rest = path
    return {first: nested(rest, value) if rest else value}


def build_recipe(content: Mapping[str, Any], overrides: Iterable[str] = (), *, where: str = "the command") -> Recipe:
    """The checked recipe.

    Args:
        content: what `read_recipe` or the command line gave.
        overrides: texts `KEY=VALUE`, applied last and in order.
        where: named in the error.

    Raises:
        RecipeError: every unknown key and every wrong value, all at once.
    """
    for override in overrides:
        path, value = parse_override(override)
        content = merge(content, nested(path, value))
    method = content.get("method")
    if isinstance(method, Mapping):
        content = {**content, "method": {key: _as_number(value) for key, value in method.items()}}
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError("; ".join(_problem(item) for item in error.errors()), where=where) from error


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out; `build_recipe` of it gives the same recipe."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return str(text)


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Writes `dump_recipe` atomically."""
    with atomic_write(path, "w") as handle:
        handle.write(dump_recipe(recipe))


def differences(one: Recipe, other: Recipe) -> tuple[str, ...]:
    """The keys in which two recipes differ, as `key: value → value`."""
    return tuple(_differences(one.model_dump(mode="json"), other.model_dump(mode="json"), ""))


def _differences(one: Any, other: Any, key: str) -> Iterable[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for name in [*one, *(name for name in other if name not in one)]:
            yield from _differences(one.get(name), other.get(name), f"{key}.{name}" if key else name)
    elif one != other:
        yield f"{key}: {one} → {other}"


def _as_number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as a text; as a number it is what was meant."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value):
        return float(value)
    return value


def _problem(error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        return unknown_name("key", key, [".".join([*location[:-1], name]) for name in known])
    value = error.get("input")
    if error["type"] == "model_type":
        return f"{key}: a section with keys below it is needed, not {'nothing' if value is None else repr(value)}"
    shown = f", not {value!r}" if isinstance(value, str | int | float | bool) else ""
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{key}: {message}{shown}"


def _known_keys(path: list[str]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in path:
        if part.isdigit():
            continue
        if part in ("teachers", "students"):
            model = TeacherSection if part == "teachers" else StudentSection
            continue
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
