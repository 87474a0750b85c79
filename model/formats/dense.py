"""Weights stored as plain numbers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from model.ops.backend import Backend


class DenseFormat:
    """One number of the compute dtype for each value."""

    def dense(self, weight: Any, dtype: "torch.dtype") -> "torch.Tensor":
        """Return the weight as it is."""
        tensor: torch.Tensor = weight
        return tensor

    def allocate(self, backend: "Backend", shape: tuple[int, ...], parts: int) -> Any:
        """Return storage to be filled by rows."""
        return backend.empty_weight(shape, parts)

    def finish(self, backend: "Backend", storage: Any) -> Any:
        """Return filled storage in the form that the backend multiplies with."""
        return backend.pack_experts(storage) if len(storage.shape) == 3 else backend.pack(storage)


DENSE = DenseFormat()
