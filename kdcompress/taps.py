"""Where a network's stages end, found by watching one image pass; their feature maps as outputs, no network edited.

One forward pass is recorded as a tree of module calls. Its *trunk* is the row of calls that hand an image-shaped map
on to the next: containers that shrink the map more than once are opened, blocks are not. A *stage* is a stretch of
the trunk at one resolution; it ends at its last call.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdcompress.errors import InputError, ShapeError, unknown_name
from kdcompress.types import FeatureShape, Head

_EVEN_STAGES = 4
_NOT_AN_END = ("Pool", "Dropout", "DropPath", "Identity", "Flatten", "Permute")


@dataclass
class _Call:
    """One call of a module: the shapes that went in and came out, and the calls made inside, in order."""

    path: str
    module: nn.Module
    shape_in: tuple[int, ...] = ()
    shape_out: tuple[int, ...] = ()
    children: list[_Call] = field(default_factory=list)
    num_layers: int = 0
    """Calls of layers with a weight matrix or filters, inside or itself."""


def find_stages(network: nn.Module, image_shape: FeatureShape) -> tuple[str, ...]:
    """The module paths at which the stages of a convolutional network end, in order.

    A stage ends where the resolution is about to drop, or at the classifier. Where the network is mostly built of
    blocks, what comes before the first one (the stem) is no stage. Where the resolution never drops, four even depths
    are taken. A network whose layers mostly do not work on maps (a vision transformer) has none.

    Args:
        network: bare; it is run once in eval mode, and left in the mode it was in.
        image_shape: channels, height, width of its images.

    Raises:
        ShapeError: the network does not take such images.
    """
    root = _record(network, image_shape)
    classifier = _find_classifier(root)
    trunk = [call for call in _find_trunk(root, classifier) if _is_map(call.shape_out, image_shape)]
    if 2 * sum(call.num_layers for call in trunk) < root.num_layers:
        return ()
    groups = [group for group in _by_resolution(trunk) if any(call.num_layers for call in group)]
    first_block = next((n for n, group in enumerate(groups) if any(map(_holds_block, group))), 0)
    if 2 * _num_layers(groups[:first_block]) < _num_layers(groups):
        groups = groups[first_block:]
    times = Counter(call.path for call in _walk(root))
    if len(groups) == 1:
        ends = _even_depths(groups[0], times)
    else:
        ends = [able[-1] for group in groups if (able := [call for call in group if _can_end(call, times)])]
    return tuple(call.path for call in ends)


def find_classifier(network: nn.Module, image_shape: FeatureShape) -> str | None:
    """The path of the layer that makes the logits: the last one with weights; None if it is no linear layer.

    Raises:
        ShapeError: the network does not take such images.
    """
    call = _find_classifier(_record(network, image_shape))
    return None if call is None else call.path


class _Tap:
    """A forward hook that keeps what a module gives, while it is open. A class, so that copies keep for themselves."""

    def __init__(self) -> None:
        self.is_open = False
        self.output: Any = None

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if self.is_open:
            self.output = output


class Tapped(nn.Module):
    """A network that also returns the feature maps of the modules at `paths`.

    The taps stay on the network until `release()`, but keep something only during a call of this wrapper.

    Args:
        network: bare.
        paths: module paths, in order; their maps are called "stage1", "stage2" ….

    Raises:
        InputError: the network has no module of that name.
    """

    def __init__(self, network: nn.Module, paths: Sequence[str]) -> None:
        super().__init__()
        known = dict(network.named_modules())
        for path in paths:
            if path not in known or not path:
                raise InputError(unknown_name("module path", path, filter(None, known)), where="stages")
        self.network = network
        self.paths = tuple(paths)
        self._taps = [_Tap() for _ in paths]
        self._handles = [known[path].register_forward_hook(tap) for path, tap in zip(paths, self._taps, strict=True)]

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits `batch classes`, and maps `batch channels height width`; what is pooled already is 1 × 1.

        Raises:
            ShapeError: a module at a tapped path gives no map.
        """
        for tap in self._taps:
            tap.is_open = True
        try:
            logits: Tensor = self.network(images)
            outputs = [tap.output for tap in self._taps]
        finally:
            for tap in self._taps:
                tap.is_open, tap.output = False, None
        pairs = zip(outputs, self.paths, strict=True)
        return logits, {f"stage{index}": _as_map(output, path) for index, (output, path) in enumerate(pairs, 1)}

    def release(self) -> nn.Module:
        """Takes the taps off and gives the bare network back."""
        for handle in self._handles:
            handle.remove()
        return self.network


def split_head(network: nn.Module, last_stage_path: str, image_shape: FeatureShape) -> Head | None:
    """What follows the last stage, as a function of its feature map; it shares the network's modules.

    The modules called behind the stage are called again in the same order. Between two of them the map is averaged or
    flattened where the next one's input asks for it, as networks do outside their modules; a ReLU behind the stage is
    tried as well. The outcome is compared with the whole network on random images. It is no `nn.Module`, so that
    whatever keeps it does not take the weights for its own.

    Args:
        network: bare; it is run in eval mode, and left in the mode it was in.
        last_stage_path: the module that gives the map.
        image_shape: channels, height, width of its images.

    Returns:
        The head: `batch channels height width` -> logits `batch classes`; None where the logits depend on more than
        this map, or on it in another way.

    Raises:
        ShapeError: the network does not take such images.
    """
    root = _record(network, image_shape)
    later = _calls_behind(root, last_stage_path)
    first = next(network.parameters(), torch.zeros(()))
    images = torch.rand(2, *image_shape, generator=torch.Generator().manual_seed(0)).to(first)
    tapped = Tapped(network, [last_stage_path])
    with eval_mode(network), torch.no_grad():
        logits, features = _run(tapped, images, image_shape)
        tapped.release()
        for starts_with_relu in (False, True):
            head = _replay(features["stage1"].shape, later, root.shape_out, starts_with_relu)
            if head is not None and _agree(head(features["stage1"]), logits):
                return head
    return None


@dataclass(frozen=True, eq=False)
class _Replay:
    """Modules one after another, each with what is done to its input before."""

    steps: tuple[tuple[Callable[[Tensor], Tensor], ...], ...]

    def __call__(self, feature_map: Tensor) -> Tensor:
        value = feature_map
        for step in self.steps:
            for function in step:
                value = function(value)
        return value


def _calls_behind(root: _Call, path: str) -> list[_Call]:
    """The outermost calls made after the module at `path` was done, in order."""
    line = [root]
    while line[-1].path != path:
        inner = next((child for child in line[-1].children if any(call.path == path for call in _walk(child))), None)
        if inner is None:
            raise InputError(f"the network never calls {path}", where="stages")
        line.append(inner)
    later: list[_Call] = []
    for parent, child in zip(line[-2::-1], line[:0:-1], strict=True):
        later += parent.children[[call is child for call in parent.children].index(True) + 1 :]
    return later


def _replay(
    shape: Sequence[int], later: Sequence[_Call], logits: Sequence[int], starts_with_relu: bool
) -> _Replay | None:
    steps: list[tuple[Callable[[Tensor], Tensor], ...]] = [(torch.relu,)] if starts_with_relu else []
    for call in later:
        fit = _fit_between(shape, call.shape_in)
        if fit is None:
            return None
        steps.append((fit, call.module))
        shape = call.shape_out
    fit = _fit_between(shape, logits)
    return None if fit is None else _Replay((*steps, (fit,)))


def _fit_between(found: Sequence[int], wanted: Sequence[int]) -> Callable[[Tensor], Tensor] | None:
    """What a network does between two modules whose shapes differ (batch aside): nothing, flatten or average."""
    found, wanted = tuple(found[1:]), tuple(wanted[1:])
    if found == wanted:
        return _same
    if wanted == (math.prod(found),):
        return _flat
    if len(found) == 3 and wanted in ((found[0],), (found[0], 1, 1)):
        return _averaged if len(wanted) == 1 else _averaged_map
    return None


def _same(value: Tensor) -> Tensor:
    return value


def _flat(value: Tensor) -> Tensor:
    return value.flatten(1)


def _averaged(value: Tensor) -> Tensor:
    return value.mean((2, 3))


def _averaged_map(value: Tensor) -> Tensor:
    return value.mean((2, 3), keepdim=True)


def _agree(answer: Tensor, logits: Tensor) -> bool:
    return answer.shape == logits.shape and torch.allclose(answer, logits, rtol=1e-4, atol=1e-5)


def _as_map(output: Any, path: str) -> Tensor:
    if isinstance(output, Tensor) and output.ndim == 2:
        return output[:, :, None, None]
    if isinstance(output, Tensor) and output.ndim == 4:
        return output
    found = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"{type(output).__name__}"
    raise ShapeError(
        f"{path} gives {found}, not a feature map of batch × channels × height × width",
        where="stages",
        fix="name other modules, or choose a method that needs no feature maps",
    )


@contextlib.contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside; afterwards each in the mode it was in."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _run(network: Callable[[Tensor], Any], images: Tensor, image_shape: FeatureShape) -> Any:
    try:
        return network(images)
    except (RuntimeError, ValueError, AssertionError) as error:
        channels, height, width = image_shape
        reason = str(error).strip().splitlines()
        raise ShapeError(
            f"the network does not take images of {channels} × {height} × {width}: {reason[0] if reason else error!r}",
            fix="choose another network or another image size",
        ) from error


def _record(network: nn.Module, image_shape: FeatureShape) -> _Call:
    """One pass in eval mode as a tree of calls."""
    paths = {module: path for path, module in network.named_modules()}
    stack = [_Call("<input>", network)]
    handles = []

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        shape = _shape(inputs[0]) if inputs else ()
        call = _Call(paths[module], module, shape_in=shape)
        stack[-1].children.append(call)
        stack.append(call)

    def leave(module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        call = stack.pop()
        call.shape_out = _shape(output)
        own_weights = any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
        call.num_layers = own_weights + sum(child.num_layers for child in call.children)

    first = next(network.parameters(), torch.zeros(()))
    images = torch.zeros(1, *image_shape, device=first.device, dtype=first.dtype)
    try:
        for module in paths:
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        with eval_mode(network), torch.no_grad():
            _run(network, images, image_shape)
    finally:
        for handle in handles:
            handle.remove()
    return stack[0].children[0]


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _walk(call: _Call) -> Iterator[_Call]:
    """A call after all that it called."""
    for child in call.children:
        yield from _walk(child)
    yield call


def _find_classifier(root: _Call) -> _Call | None:
    layers = [call for call in _walk(root) if not call.children and call.num_layers]
    if not layers or len(root.shape_out) != 2:
        return None
    last = layers[-1]
    width = last.shape_out[1] if len(last.shape_out) == 4 else last.shape_out[-1]
    return last if width == root.shape_out[1] else None


def _is_map(shape: tuple[int, ...], image_shape: FeatureShape) -> bool:
    """Whether a shape is one image's map with the image's aspect ratio: channels-last ones are not."""
    if len(shape) != 4 or shape[0] != 1:
        return False
    (_, height, width), (_, _, map_height, map_width) = image_shape, shape
    if map_height > height or map_width > width:
        return False
    return abs(map_height * width - map_width * height) <= 2 * max(height, width)


def _is_global_pool(call: _Call) -> bool:
    name = type(call.module).__name__
    flattens = len(call.shape_out) != 4
    return "Pool" in name and call.num_layers == 0 and ("Adaptive" in name or "Global" in name or flattens)


def _find_trunk(root: _Call, classifier: _Call | None) -> list[_Call]:
    """The row of calls from the image to the global pool or the classifier, whichever comes first."""
    trunk: list[_Call] = []

    def follow(call: _Call) -> bool:
        """Whether the trunk goes on behind this call."""
        for child in call.children:
            if child is classifier or _is_global_pool(child):
                return False
            holds_classifier = any(inner is classifier for inner in _walk(child))
            is_chain = holds_classifier or len(child.shape_out) != 4 or _shrinks_often(child)
            if not child.children or not is_chain:
                trunk.append(child)
            elif not follow(child):
                return False
        return True

    follow(root)
    return trunk


def _shrinks_often(call: _Call) -> bool:
    """Whether a container's children one after another shrink the map more than once (parallel branches do not)."""
    is_row = bool(call.children) and call.children[-1].shape_out == call.shape_out
    return is_row and len(call.shape_in) == 4 and call.shape_in[2] > 3 * call.shape_out[2]


def _holds_block(call: _Call) -> bool:
    """Whether this is, or is a sequence with, a module of several layers that are not simply one after another."""
    if isinstance(call.module, nn.Sequential):
        return any(_holds_block(child) for child in call.children)
    return call.num_layers > 1


def _num_layers(groups: Sequence[Sequence[_Call]]) -> int:
    return sum(call.num_layers for group in groups for call in group)


def _by_resolution(trunk: Sequence[_Call]) -> list[list[_Call]]:
    """Stretches of one resolution. A border of some pixels less is the same one; a larger map is a side branch."""
    groups: list[list[_Call]] = []
    for call in trunk:
        here = call.shape_out[2] * call.shape_out[3]
        before = groups[-1][0].shape_out[2] * groups[-1][0].shape_out[3] if groups else 0
        if not groups or before >= 2 * here:
            groups.append([call])
        elif here <= before:
            groups[-1].append(call)
    return groups


def _can_end(call: _Call, times: Counter[str]) -> bool:
    return times[call.path] == 1 and not any(word in type(call.module).__name__ for word in _NOT_AN_END)


def _parts(call: _Call) -> list[_Call]:
    """What a sequence calls one after another; nothing for any other module."""
    return call.children if isinstance(call.module, nn.Sequential) else []


def _even_depths(group: list[_Call], times: Counter[str]) -> list[_Call]:
    """Four even depths of a network of one resolution, its longest sequences opened until there are four."""
    calls = [call for call in group if call.num_layers and _can_end(call, times)]
    while len(calls) < _EVEN_STAGES:
        sequences = [call for call in calls if sum(child.num_layers > 0 for child in _parts(call)) > 1]
        if not sequences:
            break
        longest = max(sequences, key=lambda call: call.num_layers)
        inside = [call for call in _parts(longest) if call.num_layers and _can_end(call, times)]
        position = calls.index(longest)
        calls[position : position + 1] = inside
    blocks = [call for call in calls if _holds_block(call)] or calls
    if len(blocks) <= _EVEN_STAGES:
        return blocks
    return [blocks[round((index + 1) * len(blocks) / _EVEN_STAGES) - 1] for index in range(_EVEN_STAGES)]
