"""Quantizing after training: an fp32 ONNX model and real images, then as many INT8 graphs as one wants to try.

ONNX Runtime's own quantizer places the Q/DQ pairs and rounds the weights; here is what it is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcompress import onnx_graph
from kdcompress.equalization import Equalization, Rounding, equalize, read_tensors
from kdcompress.errors import VerificationError
from kdcompress.evaluate import divergence
from kdcompress.onnx_graph import ModelProto
from kdcompress.onnx_normalisation import FOLDED, fold_normalisation
from kdcompress.profiles import Profile
from kdcompress.quantize._answers import answer_feeds, quiet
from kdcompress.quantize._bias import correct_biases, correctable
from kdcompress.quantize._calibrate import Extremes, find_extremes, refused
from kdcompress.quantize._fill import fill_channels, find_fillings
from kdcompress.quantize._float_layers import guard_float_layers
from kdcompress.quantize._gates import has_gates, read_scaled, spell_gates
from kdcompress.quantize._layouts import kept_float, lay_out, quantized_layers
from kdcompress.quantize._pack import activation_of, find_rows, pack_rows
from kdcompress.quantize._prepare import hold_constants, name_nodes, part_constants, spread_biases
from kdcompress.quantize._spread import measure_means, measure_spreads
from kdcompress.quantize.base import GATED, PACKED, CalibrationMethod, Ranges, Scheme

_IN_FP32 = ("Gemm", "MatMul")
"""Outputs that stay fp32: logits of 8 bits would tie where fp32 decides, and a matrix product sums in fp32 anyway."""


class _Written(NamedTuple):
    """What is told of a graph as its layout wants it.

    Args:
        operators: those that are quantized.
        spared: names of nodes of these that are not.
        extremes: of its tensors.
        learned: ranges of its tensors.
        factors: see `spell_gates`.
    """

    operators: Sequence[str]
    spared: Sequence[str]
    extremes: Extremes
    learned: Ranges
    factors: tuple[str, ...]


class FloatModel:
    """An fp32 ONNX file, ready to be quantized.

    Args:
        path: the file.
        feeds: batches of calibration images as the file takes them; read once for each way of calibrating.
        profile: the runtime that the INT8 graphs are for.
        reduce_range: whether weights get 7 bits.
        ranges: scales and zero points that a training has learned.
        fold: the normalisation moves into the first convolution where it can (`onnx_normalisation`).
        equalize: channels are equalized (`equalization`), which does not change what fp32 answers.
        correct: biases take back what rounded weights shift (`_bias`). Each of these two only where INT8 then answers
            more like fp32 on the calibration images.

    Raises:
        VerificationError: this is not a graph that can be quantized.
    """

    @quiet()
    def __init__(
        self,
        path: Path,
        feeds: Sequence[NDArray[Any]],
        profile: Profile,
        *,
        reduce_range: bool,
        ranges: Ranges | None = None,
        fold: bool = False,
        equalize: bool = False,
        correct: bool = False,
    ) -> None:
        import onnx

        self.path = path
        self.profile = profile
        self._feeds = feeds
        self._reduce_range = reduce_range
        self._learned = dict(ranges or {})
        self._extremes: dict[CalibrationMethod, Extremes] = {}
        self._means: Mapping[str, NDArray[np.float64]] | None = None
        self._corrects = False
        self.equalization = Equalization()
        try:
            model = onnx.load(path)
            onnx_graph.require_flat(model)
            onnx_graph.constants_alone(model)
            name_nodes(model)
            hold_constants(model)
            part_constants(model)
            spread_biases(model)
            self.folded = fold and not profile.skip_only and fold_normalisation(model)
            self._model = onnx.shape_inference.infer_shapes(model)
            opset = onnx_graph.opset_of(model)
            self._fillings = () if profile.skip_only else find_fillings(self._model)
            self._rows = () if profile.skip_only else find_rows(self._filled())
        except Exception as error:  # onnx raises what any part of it raises
            raise refused(path, error) from error
        if profile.per_channel and opset < onnx_graph.CHANNEL_SCALES_OPSET:
            what = f"this graph cannot be quantized: opset {opset} has no scale for each channel"
            fix = f"export it again with opset {onnx_graph.CHANNEL_SCALES_OPSET} or later"
            raise VerificationError(what, where=str(path), fix=fix)
        if profile.per_channel and (equalize or correct):
            try:
                self._improve(equalize=equalize, correct=correct)
            except VerificationError:
                raise
            except Exception as error:  # the runtime raises what any part of it raises
                raise refused(path, error) from error

    @property
    def model(self) -> ModelProto:
        """The graph in fp32, as it is quantized."""
        return self._model

    @property
    def packs(self) -> bool:
        """Whether the layout "packed" differs from "all"."""
        return bool(self._rows or self._fillings)

    @property
    def gates(self) -> bool:
        """Whether the layout "gated" differs from "all"."""
        return has_gates(self._model) and not self.profile.skip_only

    def layers(self) -> dict[str, str]:
        """Node -> name of its weight, for each layer that the profile quantizes, in the order of the graph."""
        return quantized_layers(self._model, self.profile)

    def extremes(self, method: CalibrationMethod) -> Extremes:
        """The ranges of all activations on the calibration images.

        Raises:
            VerificationError: the graph cannot be run, or has a value that is not finite.
        """
        if method not in self._extremes:
            self._extremes[method] = find_extremes(self._model, self._feeds, self.profile, method, where=self.path)
        return self._extremes[method]

    @quiet()
    def quantize(self, scheme: Scheme, only: str | None = None) -> ModelProto:
        """The graph in INT8; the same bytes whenever it is made from the same.

        Args:
            scheme: how.
            only: quantize nothing but the layer of this name, with the activation whose range it gets in the whole.

        Raises:
            VerificationError: the quantizer could not be run on this graph, or made one that is not valid.
        """
        import onnx
        from onnxruntime.quantization import CalibrationMethod as Method
        from onnxruntime.quantization import QDQQuantizer, QuantType, TensorsData

        profile = self.profile
        types = {"int8": QuantType.QInt8, "uint8": QuantType.QUInt8}
        extremes = self.extremes(scheme.calibration)
        corrected = self.corrected(scheme, only)
        in_fp32 = profile.operators if profile.skip_only else _IN_FP32
        try:
            model = onnx.ModelProto()
            model.CopyFrom(self._model)
            if corrected:
                correct_biases(model, corrected, self._find_means(), reduce_range=self._reduce_range)
            written = self._write(model, scheme, extremes, packs=only is None)
            pairs = {name: tuple(np.array(end, np.float32) for end in ends) for name, ends in written.extremes.items()}
            quantizer = QDQQuantizer(
                model,
                profile.per_channel,
                self._reduce_range,
                types[profile.weight_type],
                types[profile.activation_type],
                TensorsData(Method.MinMax, pairs),
                [] if only is None else self._alone(only),
                [*kept_float(model, profile), *written.spared, *scheme.keep, *([FOLDED] if self.folded else [])],
                list(written.operators),
                {
                    "ActivationSymmetric": profile.symmetric,
                    "QuantizeBias": not profile.float_bias,
                    "AddQDQPairToWeight": profile.float_weights,
                    "TensorQuantOverrides": self._overrides(written.learned),
                    "OpTypesToExcludeOutputQuantization": list(in_fp32),
                },
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
            model = quantizer.model.model
            read_scaled(model, written.factors)
            if profile.skip_only:
                onnx_graph.free_residual_branches(model)
            else:
                guard_float_layers(model)
            onnx_graph.drop_unused_initializers(model)
            onnx_graph.strip_traces(model)
            onnx.checker.check_model(model, full_check=True)
        except Exception as error:  # the quantizer raises what any part of it raises
            raise refused(self.path, error) from error
        return model

    def corrected(self, scheme: Scheme, only: str | None = None) -> tuple[str, ...]:
        """The layers whose biases are changed; as for `quantize`."""
        if not self._corrects:
            return ()
        left = {*lay_out(self._model, self.profile, scheme.layout)[1], *scheme.keep}
        rounded = [name for name in self.layers() if name not in left] if only is None else [only]
        return tuple(node.name for node in correctable(self._model, rounded))

    def _write(self, model: ModelProto, scheme: Scheme, found: Extremes, *, packs: bool) -> _Written:
        """Writes a graph as its layout wants it; what it is called there, and what of it is quantized."""
        operators, spared = lay_out(self._model, self.profile, scheme.layout)
        extremes, learned = dict(found), dict(self._learned)
        factors: tuple[str, ...] = ()
        if packs and scheme.layout in PACKED.values():
            kept = set(scheme.keep)
            fill_channels(model, [filling for filling in self._fillings if not kept & filling.layers])
            same = pack_rows(model, [row for row in self._rows if row.node not in kept])
            extremes |= {new: extremes[old] for new, old in same.items() if old in extremes}
            learned |= {new: learned[old] for new, old in same.items() if old in learned}
            made = {name for node in model.graph.node for name in node.output}
            learned = {name: value for name, value in learned.items() if name in made or name not in same.values()}
        if scheme.layout in GATED:
            ranges, products, factors = spell_gates(model, extremes, scheme.keep)
            extremes |= ranges
            operators = [*operators, "Mul"]
            spared += [node.name for node in model.graph.node if node.op_type == "Mul" and node.name not in products]
        return _Written(operators, spared, extremes, learned, factors)

    def _find_means(self) -> Mapping[str, NDArray[np.float64]]:
        """Of what all layers read."""
        if self._means is None:
            names = [node.input[0] for node in correctable(self._model, self.layers())]
            self._means = measure_means(self._model, tuple(dict.fromkeys(names)), self._feeds)
        return self._means

    def _improve(self, *, equalize: bool, correct: bool) -> None:
        """Corrects biases and equalizes channels, each if INT8 then answers more like fp32 on the calibration images.

        What is rounded by how much is luck, so that what helps on average may harm one network. The same roundings are
        made for other images: a few hundred tell.
        """
        fp32 = answer_feeds(self._model, self._feeds)

        def distance() -> float:
            return divergence(fp32, answer_feeds(self.quantize(Scheme()), self._feeds))

        nearest = distance()
        if correct:
            self._corrects = True
            found = distance()
            self._corrects, nearest = found < nearest, min(nearest, found)
        model, factors = self._equalized() if equalize else (self._model, Equalization())
        if factors.columns:
            before = self._model, self._extremes, self._means
            self._model, self._extremes, self._means = model, {}, None
            if distance() < nearest:
                self.equalization = factors
            else:
                self._model, self._extremes, self._means = before

    def _equalized(self) -> tuple[ModelProto, Equalization]:
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        spreads = measure_spreads(model, read_tensors(model), self._feeds)
        kept = frozenset(kept_float(model, self.profile))
        return model, equalize(model, spreads, Rounding(self.profile.symmetric, self._reduce_range, kept))

    def _filled(self) -> ModelProto:
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        fill_channels(model, self._fillings)
        return onnx.shape_inference.infer_shapes(model)

    def _alone(self, name: str) -> list[str]:
        """A layer and the activation behind it: rounded before that, it would have to span what that cuts off."""
        layer = next(node for node in self._model.graph.node if node.name == name)
        activation = activation_of(self._model, layer)
        return [name] if activation is None else [name, activation.name]

    def _overrides(self, learned: Ranges) -> dict[str, Any]:
        if self.folded:  # a pixel k / 255 becomes the integer k
            learned = {**learned, FOLDED: (1 / 255, -128 if self.profile.activation_type == "int8" else 0)}
        return {
            name: [
                {"scale": np.array(scale, np.float32), "zero_point": np.array(zero_point, self.profile.activation_type)}
            ]
            for name, (scale, zero_point) in learned.items()
        }
