"""Random inputs and weights of cases."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from model.formats import DENSE, full_interface
from model.ops.backend import Backend
from model.ops.mxfp4 import Mxfp4
from model.ops.specs import Norm, Parameter


@dataclass(frozen=True)
class Size:
    """How large the inputs of cases are; widths are always the model's."""

    rows: int  # sequences of a large decode step
    tokens: int  # of a large chunk
    context: int  # of a long sequence
    weight_bytes: int  # of one weight: the head has fewer tokens, a layer fewer experts if larger


FULL = Size(rows=64, tokens=1024, context=1000, weight_bytes=2 << 30)
"""For a GPU: seconds in all. Weights are whole, so that kernels are the ones that a job uses."""
SMALL = Size(rows=6, tokens=72, context=150, weight_bytes=1 << 20)
"""For a CPU, on which Triton's interpreter runs a program of a kernel in milliseconds."""


class Inputs:
    """Reproducible random tensors on one device, rounded to one dtype."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        size: Size,
        kv_dtype: torch.dtype | None = None,  # of the KV cache; None: dtype
    ):
        self.device, self.dtype, self.size = device, dtype, size
        self.kv_dtype = kv_dtype or dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(
        self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Return normally distributed values, by default in the compute dtype."""
        values = torch.randn(shape, generator=self.generator, device=self.device) * scale
        return values.to(dtype or self.dtype)

    def order(self, count: int) -> torch.Tensor:
        """Return the numbers below `count` in random order, int64."""
        return torch.randperm(count, generator=self.generator, device=self.device)

    def integers(self, below: int, *shape: int) -> torch.Tensor:
        """Return random numbers from 0 to below - 1, int64."""
        return torch.randint(below, shape, generator=self.generator, device=self.device)

    def angles(self, tokens: int, rotary_dim: int) -> torch.Tensor:
        """Return cos and sin of random angles, float32 [tokens, rotary_dim]."""
        angles = torch.rand(
            tokens, rotary_dim // 2, generator=self.generator, device=self.device
        ).mul(6.28)
        return torch.cat((angles.cos(), angles.sin()), dim=1)

    def factors(self, count: int) -> torch.Tensor:
        """Return factors around 1.5, float32 [count, 1]."""
        return 1.5 + 0.1 * self.normal(count, 1, dtype=torch.float32)

    def norm(self, norm: Norm) -> Norm:
        """Return a declared norm with weights around 1."""
        if norm.is_identity:
            return norm
        weight = self.normal(norm.size, scale=0.2, dtype=torch.float32) + 1
        return replace(norm, weight=weight)


class Weights:
    """The random parameters of a declared layer such as `Linear` or `Experts`.

    `on` returns the layer with its weights in a backend's form. They are converted once for a
    series of calls with the same backend.
    """

    def __init__(self, holder: Any, inputs: Inputs):
        self.holder = holder
        self._sources = {p.attribute: _source(p, inputs) for p in holder.parameters()}
        self._loaded: tuple[Backend, Any] | None = None

    def bytes(self, item: int) -> int:
        """Return the bytes of all parameters; item: bytes of one value in the compute dtype."""
        return parameter_bytes(self.holder, item)

    @property
    def tolerance(self) -> float:
        """The error, by the largest result, of kernels that round the inputs of these layers."""
        return rounding_error(self.holder)

    def on(self, backend: Backend) -> Any:
        """Return the layer with its parameters in a backend's form."""
        if self._loaded is None or self._loaded[0] is not backend:
            self._loaded = None  # frees the memory of the other form first
            values = {p.attribute: self._load(p, backend) for p in self.holder.parameters()}
            self._loaded = backend, replace(self.holder, **values)
        return self._loaded[1]

    def _load(self, parameter: Parameter, backend: Backend) -> Any:
        source, shape = self._sources[parameter.attribute], parameter.shape
        if parameter.format is None:
            return source.to(torch.float32 if parameter.is_float32 else backend.dtype)
        form = full_interface(parameter.format)
        storage = form.allocate(backend, shape, parameter.parts)
        rows = shape[-2]
        if len(shape) == 2:
            storage[0:rows].copy_(source[0:rows])
        else:
            for expert in range(shape[0]):
                storage[expert][0:rows].copy_(source[expert][0:rows])
        return form.finish(backend, storage)


def rounding_error(holder: Any) -> float:
    """Return the largest error of a layer that comes from rounding its inputs to e4m3.

    A value is off by up to 1/16, a sum of many by a third of that; two layers follow each other.
    """
    forms = (p.format for p in holder.parameters())
    return 0.08 if any(getattr(form, "inputs", "") for form in forms) else 0.0


def parameter_bytes(holder: Any, item: int) -> int:
    """Return the bytes of a layer's parameters; item: bytes of one value in the compute dtype."""
    return sum(full_interface(p.format or DENSE).bytes(p.shape, item) for p in holder.parameters())


def _source(parameter: Parameter, inputs: Inputs) -> Any:
    """Return random values in the form in which the plain-torch backend stores them."""
    if parameter.format is None:
        return inputs.normal(*parameter.shape)
    form = full_interface(parameter.format)
    storage = form.allocate(Backend(inputs.device, inputs.dtype), parameter.shape, parameter.parts)
    form.fill_random(storage, inputs.generator)
    if isinstance(storage, Mxfp4):  # with equal scales, a kernel could read any of them
        storage.scales.copy_(117 + inputs.integers(5, *storage.scales.shape))
    return storage
