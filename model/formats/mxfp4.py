"""MXFP4 (OCP Microscaling Formats 1.0): 32 values of 4 bits share a power-of-two scale."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from model.ops.backend import Backend


class Mxfp4Format:
    """4-bit values with a scale for each 32 along the inputs."""

    def dense(self, weight: Any, dtype: "torch.dtype") -> "torch.Tensor":
        """Return the values of one weight."""
        tensor: torch.Tensor = weight.dense(dtype)
        return tensor

    def allocate(self, backend: "Backend", shape: tuple[int, ...], parts: int) -> Any:
        """Return storage to be filled by rows."""
        return backend.empty_mxfp4(shape, parts)

    def finish(self, backend: "Backend", storage: Any) -> Any:
        """Return filled storage in the form that the backend multiplies with."""
        return backend.pack_mxfp4(storage)


MXFP4 = Mxfp4Format()
