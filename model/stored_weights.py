"""The tensors of a checkpoint that hold each of its weights, by the format of the weight."""

from dataclasses import dataclass

from model.formats import DENSE, FormatRules, StoredTensor, WeightFormat
from model.formats.dense import Dequantized
from model.formats.format import Find
from model.formats.mxfp4 import PackedMxfp4
from model.tensors.pieces import NamedWeight, Piece, TensorMap

# Calibrated scales of activations, and of keys and values: they are computed in a higher precision.
_UNUSED = (
    *("input_scale", "input_zero_point", "input_global_scale", "activation_scale"),
    *("output_scale", "output_zero_point", "k_scale", "v_scale", "q_scale", "kv_scale"),
)


@dataclass(frozen=True)
class StoredPiece:
    """A piece, the format of its weight in the files, and the tensors that hold it."""

    piece: Piece
    format: WeightFormat
    tensors: list[StoredTensor]


@dataclass(frozen=True)
class StoredMap:
    """The tensors of all pieces."""

    pieces: list[StoredPiece]
    expected: dict[str, StoredTensor]  # also those that only other ranks read
    is_quantized: bool

    @classmethod
    def of(cls, found: TensorMap, rules: FormatRules, find: Find) -> "StoredMap":
        """Find the tensors of a map in a checkpoint with these rules.

        Raises ValueError for a weight whose format does not have its shape, or that is divided by
        this rank's part.
        """
        pieces = [
            StoredPiece(piece, *_tensors(piece.weight, rules, find)) for piece in found.pieces
        ]
        every = [stored.tensors for stored in pieces]
        every += [_tensors(weight, rules, find)[1] for weight in found.elsewhere]
        expected = {tensor.name: tensor for tensors in every for tensor in tensors}
        return cls(pieces, expected, bool(rules.formats))

    def is_unused(self, name: str) -> bool:
        """Whether a stored tensor belongs to a quantization that is not applied."""
        return self.is_quantized and name.rpartition(".")[2] in _UNUSED


def _tensors(
    weight: NamedWeight, rules: FormatRules, find: Find
) -> tuple[WeightFormat, list[StoredTensor]]:
    name, shape, part = weight.name, weight.shape, weight.part
    form: WeightFormat = DENSE
    if weight.module is not None:
        form = rules.of(weight.module, embedding=weight.is_embedding)
    try:
        if len(shape) > 2 and isinstance(form, Dequantized | PackedMxfp4) and find(name) is None:
            raise ValueError(f"a stack of experts is not supported in the format {form.name}")
        form = form.as_stored(name, shape, part, find)
        return form, form.stored(name, shape, part, transposed=weight.transposed)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
