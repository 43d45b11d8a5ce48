"""Where a student starts: published weights, a file, a teacher's blocks, or random.

A student that is a shallower network of a teacher's widths (resnet20 of resnet56) can take over blocks as they are,
batch-norm statistics included. What is copied is found by names and shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from kdcompress.errors import InputError, ShapeError
from kdcompress.models import build_network, published_weights
from kdcompress.teachers import read_weights

Blocks: TypeAlias = Literal["even", "first-two-and-last"]
Kind: TypeAlias = Literal["pretrained", "file", "teacher", "random"]
Indices: TypeAlias = tuple[int | None, ...]

_ENOUGH = 0.5
"""Share of the student's tensors that a teacher must fit before `auto` starts from it."""


def first_and_last_blocks(num_student: int, num_teacher: int) -> Indices:
    """For each of a stage's student blocks the teacher's block to copy: the first ones, and the last for the last.

    With three student blocks these are the teacher's first two and its last. Where the student has more blocks than
    the teacher, those before its last get none.
    """
    if num_student == 1 or num_teacher == 1:
        return (0, *(None for _ in range(num_student - 1)))
    first = tuple(index if index < num_teacher - 1 else None for index in range(num_student - 1))
    return (*first, num_teacher - 1)


def even_blocks(num_student: int, num_teacher: int) -> Indices:
    """For each of a stage's student blocks the teacher's block to copy: spread evenly from the first to the last.

    Where the student has more blocks than the teacher, the teacher's are spread over the student's and the rest get
    none.
    """
    if num_student == 1 or num_teacher == 1:
        return (0, *(None for _ in range(num_student - 1)))
    if num_student <= num_teacher:
        return tuple(_spaced(index, num_student, num_teacher) for index in range(num_student))
    places = {_spaced(index, num_teacher, num_student): index for index in range(num_teacher)}
    return tuple(places.get(index) for index in range(num_student))


def _spaced(index: int, count: int, total: int) -> int:
    """The position of number `index` of `count` spread over `total`, halves rounded up."""
    return (2 * index * (total - 1) + count - 1) // (2 * (count - 1))


BLOCK_CHOICES: Mapping[Blocks, Callable[[int, int], Indices]] = MappingProxyType(
    {"first-two-and-last": first_and_last_blocks, "even": even_blocks}
)


@dataclass(frozen=True)
class InitDecision:
    """What `--init` came to.

    Args:
        kind: where the weights come from.
        why: the reason, as a sentence for the user.
        teacher: index of the teacher whose blocks are taken, from 0; `why` and the user count from 1.
        path: the file the weights come from.
        licence: licence of published weights.
    """

    kind: Kind
    why: str
    teacher: int | None = None
    path: Path | None = None
    licence: str | None = None


@dataclass(frozen=True)
class InitReport:
    """What was copied into a student.

    Args:
        copied_tensors: share of its tensors, batch norm's statistics included (its step counters not).
        copied_parameters: share of its numbers.
        not_copied: names of the tensors that stayed random.
        blocks: stack of blocks -> the teacher's block in each place, where the two have different numbers of them.
    """

    copied_tensors: float
    copied_parameters: float
    not_copied: tuple[str, ...]
    blocks: Mapping[str, Indices]


def names_file(choice: str) -> bool:
    """Whether a value of `--init` means a file."""
    return choice.partition(":")[0] not in ("auto", "pretrained", "random", "teacher")


def resolve_init(
    choice: str, arch: str, student: nn.Module, teachers: Sequence[nn.Module], *, offline: bool = False
) -> InitDecision:
    """Says where a student starts, and why. Loads and fetches nothing.

    Args:
        choice: "auto", "pretrained", "random", "teacher", "teacher:N" (counted from 1) or a path.
        arch: the student's architecture.
        student: its bare network; only names and shapes matter (`models.weightless` will do).
        teachers: the teachers' bare networks.
        offline: nothing may be fetched: published weights count only when they are on this machine.

    Raises:
        InputError: there is no such choice, file or teacher, nothing is published, or it is not here while offline.
        ShapeError: no teacher's blocks fit the student.
    """
    published = published_weights(arch)
    if choice == "random":
        return InitDecision("random", "asked for")
    if choice == "pretrained":
        if published is None:
            fix = "use --init teacher, random or FILE"
            raise InputError(f"nobody publishes weights for {arch}", where="--init pretrained", fix=fix)
        if offline and not published.cached:
            fix = "drop --offline, or use --init teacher, random or FILE"
            raise InputError(f"the weights of {published.name} are not on this machine", where="--offline", fix=fix)
        return InitDecision("pretrained", f"asked for ({published.name})", licence=published.licence)
    fits = [_plan(student, teacher, "even").share for teacher in teachers]
    # Of teachers that fit alike the smallest, from which the fewest blocks are dropped.
    order = sorted(range(len(teachers)), key=lambda index: (-fits[index], _size(teachers[index]), index))
    if choice == "teacher" or choice.startswith("teacher:"):
        return _resolve_teacher(choice, arch, fits, order)
    if choice != "auto":
        if not Path(choice).exists():
            fix = "use auto, pretrained, teacher, teacher:N, random, or a file that exists"
            raise InputError(f"--init {choice}: no such choice or file", where="--init", fix=fix)
        return InitDecision("file", "asked for", path=Path(choice))
    if published is not None and (published.cached or not offline):
        return InitDecision("pretrained", f"{published.name} are published", licence=published.licence)
    missing = "its published weights are not on this machine" if published else f"nobody publishes weights for {arch}"
    if order and fits[order[0]] >= _ENOUGH:
        why = f"{missing}, and {fits[order[0]]:.0%} of its tensors fit teacher {order[0] + 1}"
        return InitDecision("teacher", why, teacher=order[0])
    return InitDecision("random", missing + (", and no teacher has its widths" if teachers else ""))


def initialise(
    student: nn.Module,
    decision: InitDecision,
    *,
    arch: str,
    arch_args: Mapping[str, Any],
    num_classes: int,
    in_channels: int,
    image_size: int | None = None,
    teachers: Sequence[nn.Module] = (),
    blocks: Blocks = "even",
) -> InitReport:
    """Puts the weights decided upon into a student's bare network, in place.

    Args:
        student: as built by `build_network` with the arguments that follow.
        decision: from `resolve_init`.
        arch: the student's architecture.
        arch_args: its further arguments.
        num_classes: size of its logits.
        in_channels: channels of its images.
        image_size: height and width of its images.
        teachers: the teachers' bare networks, as given to `resolve_init`.
        blocks: which of a teacher's blocks to take.

    Raises:
        ShapeError: the weights do not fit.
        CheckpointError: the file cannot be read.
        DownloadError: the published weights could not be fetched.
    """
    if decision.kind == "pretrained":
        published = published_weights(arch)
        arguments = {"image_size": image_size, **arch_args}
        sizes: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels}
        source = build_network(arch, pretrained=True, **sizes, **arguments).state_dict()
        keeps_head = published is not None and published.num_classes == num_classes
        pairs = {name: name for name in source if keeps_head or _module(name) != _head(source)}
        return _copy(student, source, _Plan(pairs, {}, 1.0))
    if decision.kind == "file" and decision.path is not None:
        return init_from_file(student, decision.path)
    if decision.kind == "teacher" and decision.teacher is not None:
        return init_from_teacher(student, teachers[decision.teacher], blocks)
    return _copy(student, {}, _Plan({}, {}, 0.0))


def init_from_teacher(
    student: nn.Module, teacher: nn.Module, blocks: Blocks = "even", *, copy_head: bool = True
) -> InitReport:
    """Copies a teacher's weights where names and shapes agree, blocks of a deeper teacher as `blocks` chooses.

    A layer is copied with all its tensors or not at all; a norm, and the layer that makes the logits, only behind a
    layer that was copied.

    Args:
        student: bare network, changed in place.
        teacher: bare network.
        blocks: which of a teacher's blocks to take where it has another number of them.
        copy_head: also the layer that makes the logits, where the class counts agree.

    Raises:
        ShapeError: nothing fits.
    """
    plan = _plan(student, teacher, blocks, copy_head=copy_head)
    if not plan.pairs:
        raise ShapeError(
            f"no layer of the teacher fits the student: {_first_layer(student)} against {_first_layer(teacher)}",
            where="--init teacher",
            fix="use a student of the teacher's family and widths, or --init random",
        )
    return _copy(student, teacher.state_dict(), plan)


def init_from_file(student: nn.Module, path: Path) -> InitReport:
    """Copies a checkpoint's weights; the layer that makes the logits only where the class counts agree.

    Args:
        student: bare network, changed in place.
        path: a checkpoint of any format that a teacher may have.

    Raises:
        CheckpointError: the file cannot be read.
        ShapeError: a weight other than the head's is missing or has another shape.
    """
    source = read_weights(path).state_dict
    own = _tensors(student)
    pairs: dict[str, str] = {}
    for name, tensor in own.items():
        found = source.get(name)
        if found is not None and found.shape == tensor.shape:
            pairs[name] = name
        elif _module(name) != _head(own):
            there = "missing" if found is None else str(tuple(found.shape))
            what = f"{name} is {there} in the file, {tuple(tensor.shape)} in the student"
            raise ShapeError(what, where=f"--init {path}", fix="give weights of the student's architecture")
    return _copy(student, source, _Plan(pairs, {}, 1.0))


@dataclass(frozen=True)
class _Plan:
    """Which tensor goes where: the student's name -> the source's name."""

    pairs: Mapping[str, str]
    blocks: Mapping[str, Indices]
    share: float


def _plan(student: nn.Module, teacher: nn.Module, blocks: Blocks, *, copy_head: bool = True) -> _Plan:
    own, theirs = _tensors(student), _tensors(teacher)
    stacks: dict[str, Indices] = {}
    partners = dict(_partners(_tree(own), _tree(theirs), "", "", BLOCK_CHOICES[blocks], stacks))
    layers: dict[str, list[str]] = {}
    for name in own:
        layers.setdefault(_module(name), []).append(name)
    pairs: dict[str, str] = {}
    previous = False
    for layer, names in layers.items():
        fits = all(name in partners and theirs[partners[name]].shape == own[name].shape for name in names)
        is_head = layer == _head(own)
        if max(own[name].ndim for name in names) > 1 and not is_head:
            previous = fits
        if fits and previous and (copy_head or not is_head):
            pairs |= {name: partners[name] for name in names}
    return _Plan(pairs, stacks, len(pairs) / max(1, len(own)))


def _copy(student: nn.Module, source: Mapping[str, Tensor], plan: _Plan) -> InitReport:
    own = _tensors(student)
    with torch.no_grad():
        for name, partner in plan.pairs.items():
            if name in own:
                own[name].copy_(source[partner])
    copied = [tensor for name, tensor in own.items() if name in plan.pairs]
    return InitReport(
        copied_tensors=len(copied) / max(1, len(own)),
        copied_parameters=sum(tensor.numel() for tensor in copied) / max(1, sum(t.numel() for t in own.values())),
        not_copied=tuple(name for name in own if name not in plan.pairs),
        blocks=plan.blocks,
    )


def _resolve_teacher(choice: str, arch: str, fits: Sequence[float], order: Sequence[int]) -> InitDecision:
    number = choice.partition(":")[2]
    if ":" in choice:
        if not number.isdecimal() or not 1 <= int(number) <= len(fits):
            what = f"--init {choice}: there are {len(fits)} teachers, counted from 1"
            raise InputError(what, where="--init", fix=f"use teacher:1 to teacher:{len(fits)}" if fits else "")
        order = [int(number) - 1]
    if not order:
        raise InputError("--init teacher, but there are no teachers", where="--init", fix="give --teachers")
    if not fits[order[0]]:
        fix = "use a student of the teachers' family and widths, or --init random"
        raise ShapeError(f"no layer of {arch} fits {_which(order, fits)}", where=f"--init {choice}", fix=fix)
    why = "asked for" if number else f"asked for; of the teachers, number {order[0] + 1} fits best"
    return InitDecision("teacher", f"{why} ({fits[order[0]]:.0%} of the tensors)", teacher=order[0])


def _which(order: Sequence[int], fits: Sequence[float]) -> str:
    return f"teacher {order[0] + 1}" if len(order) < len(fits) or len(fits) == 1 else f"any of the {len(fits)} teachers"


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """All weights and statistics, without batch norm's step counters."""
    return {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _head(tensors: Iterable[str]) -> str:
    """The layer that makes the logits: the last one."""
    return _module(list(tensors)[-1])


def _size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _first_layer(network: nn.Module) -> str:
    name, tensor = next(iter(network.state_dict().items()))
    return f"{name} {tuple(tensor.shape)}"


_Tree: TypeAlias = dict[str, Any]
"""Names split at their dots: a module -> its children, a tensor -> its shape."""


def _tree(tensors: Mapping[str, Tensor]) -> _Tree:
    root: _Tree = {}
    for name, tensor in tensors.items():
        *modules, last = name.split(".")
        node = root
        for module in modules:
            node = node.setdefault(module, {})
        node[last] = tuple(tensor.shape)
    return root


def _partners(
    own: _Tree,
    theirs: _Tree,
    path: str,
    their_path: str,
    choose: Callable[[int, int], Indices],
    stacks: dict[str, Indices],
) -> Iterable[tuple[str, str]]:
    """Pairs of names that stand in the same place, blocks of stacks as chosen. Fills `stacks` on the way."""
    children = {name: name for name in own if name in theirs}
    if len(own) != len(theirs) and _is_stack(own) and _is_stack(theirs):
        mine, others = sorted(own, key=int), sorted(theirs, key=int)
        stacks[path.removesuffix(".")] = choose(len(mine), len(others))
        chosen = zip(mine, stacks[path.removesuffix(".")], strict=True)
        children = {name: others[index] for name, index in chosen if index is not None}
    for name, other in children.items():
        if isinstance(own[name], dict) and isinstance(theirs[other], dict):
            yield from _partners(own[name], theirs[other], f"{path}{name}.", f"{their_path}{other}.", choose, stacks)
        elif not isinstance(own[name], dict) and not isinstance(theirs[other], dict):
            yield path + name, their_path + other


def _is_stack(node: _Tree) -> bool:
    """Whether these are numbered blocks that are all alike from the second on."""
    if not node or not all(name.isdecimal() and isinstance(child, dict) for name, child in node.items()):
        return False
    later = [node[name] for name in sorted(node, key=int)[1:]]
    return all(child == later[0] for child in later)
