"""Peak rates of known GPUs, for rooflines.

Peaks are dense (datasheets often print doubled ones, "with sparsity") and with float32
accumulation, from the vendor document named as the source of each device. On 2026-11-20 they were
compared with quotations of those documents, because the documents themselves were out of reach;
"not checked again" marks the sources for which no quotation was found. `model.cost.measure` makes
a Device of this machine.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from model.cost.interconnect import LINKS, Link
from model.cost.rates import Rates

LAUNCH_S = 7.5e-6
"""Seconds to launch a kernel (bottleneck-analysis). Datasheets do not state it, because most of it
is host time. A launch in a captured graph takes a fraction of it; that of `local` is measured."""

# The dtypes in which products of a dtype can be computed, best first. On a device without units for
# a dtype, weights and KV are stored in it and converted when they are loaded.
_COMPUTED_IN = {
    "float8": ("float8", "bfloat16", "float16", "float32"),
    "bfloat16": ("bfloat16", "float16", "float32"),
    "float16": ("float16", "float32"),
    "float32": ("float32",),
}


@dataclass(frozen=True)
class Device:
    """One GPU. Peaks in FLOP/s, bandwidth in bytes per second, memory in bytes."""

    name: str
    peaks: Mapping[str, float]  # of matrix products by dtype; float4 and tfloat32 if supported
    vector: float  # float32 outside matrix products
    special: float  # exponentials and other special functions per second
    bandwidth: float
    memory: int
    source: str
    launch_s: float = LAUNCH_S
    link: Link = LINKS["PCIe 4"]  # to GPUs of the same kind in one host
    rates: Rates | None = None  # of a measured CPU's kernels

    def computes_in(self, dtype: str) -> str:
        """Return the dtype in which this device computes matrix products of `dtype`."""
        return next(kind for kind in _COMPUTED_IN[dtype] if kind in self.peaks)

    def peak(self, dtype: str) -> float:
        """Return the peak FLOP/s of matrix products."""
        return self.peaks[self.computes_in(dtype)]

    def ridge(self, dtype: str) -> float:
        """Return the intensity (FLOPs per byte) above which compute is the limit, not memory."""
        return self.peak(dtype) / self.bandwidth


class UnknownDeviceError(ValueError):
    """Unknown device; the message lists the known ones."""


def _device(
    name: str,
    source: str,
    *,
    half: float,
    single: float,
    vector: float,
    gb_s: float,
    gb: int,
    special_share: int = 16,
    bfloat16: bool = True,
    link: str = "PCIe 4",
    **others: float,
) -> Device:
    """Make a device from TFLOP/s, GB/s and GB. `special_share`: vector FLOPs per exponential."""
    peaks = {"float32": single, "float16": half, **({"bfloat16": half} if bfloat16 else {})}
    return Device(
        name,
        {dtype: tflops * 1e12 for dtype, tflops in {**peaks, **others}.items()},
        vector * 1e12,
        vector * 1e12 / special_share,
        gb_s * 1e9,
        gb * 10**9,
        source,
        link=LINKS[link],
    )


def _a100(name: str, gb_s: float, gb: int, link: str) -> Device:
    # 64 float32 lanes and 16 special function units per multiprocessor; later GPUs have 128 lanes.
    return _device(
        name, "NVIDIA A100 datasheet", half=312, tfloat32=156, single=19.5, vector=19.5,
        gb_s=gb_s, gb=gb, special_share=8, link=link,
    )  # fmt: skip


def _hopper(name: str, source: str, gb_s: float, gb: int) -> Device:
    return _device(
        name, source, half=989.4, float8=1978.9, tfloat32=494.7, single=66.9, vector=66.9,
        gb_s=gb_s, gb=gb, link="NVLink 4",
    )  # fmt: skip


def _mi300(name: str, gb_s: float, gb: int) -> Device:
    return _device(
        name, f"AMD Instinct {name} data sheet", half=1307.4, float8=2614.9, tfloat32=653.7,
        single=163.4, vector=163.4, gb_s=gb_s, gb=gb, link="Infinity Fabric 4",
    )  # fmt: skip


DEVICES: tuple[Device, ...] = (
    _device(
        "V100", "NVIDIA V100 datasheet (SXM2), not checked again", half=125, single=15.7,
        vector=15.7, gb_s=900, gb=32, special_share=8, bfloat16=False, link="NVLink 2",
    ),
    _device(
        "V100 16GB", "NVIDIA V100 datasheet (SXM2), not checked again", half=125, single=15.7,
        vector=15.7, gb_s=900, gb=16, special_share=8, bfloat16=False, link="NVLink 2",
    ),
    _device(
        "A10", "NVIDIA A10 datasheet", half=125, tfloat32=62.5, single=31.2, vector=31.2,
        gb_s=600, gb=24,
    ),
    _a100("A100 SXM 40GB", 1555, 40, "NVLink 3"),
    _a100("A100 SXM 80GB", 2039, 80, "NVLink 3"),
    _a100("A100 PCIe 40GB", 1555, 40, "PCIe 4"),
    _a100("A100 PCIe 80GB", 1935, 80, "PCIe 4"),
    _device(
        "L40S", "NVIDIA L40S datasheet", half=362.05, float8=733, tfloat32=183, single=91.6,
        vector=91.6, gb_s=864, gb=48,
    ),
    _device(
        "RTX 3090", "NVIDIA Ampere GA102 whitepaper, tensor cores not checked again", half=71,
        tfloat32=35.6, single=35.6, vector=35.6, gb_s=936, gb=24,
    ),
    _device(
        "RTX 4090", "NVIDIA Ada architecture whitepaper", half=165.2, float8=330.3,
        tfloat32=82.6, single=82.6, vector=82.6, gb_s=1008, gb=24,
    ),
    _device(
        "H100 PCIe", "NVIDIA H100 datasheet, not checked again", half=756, float8=1513,
        tfloat32=378, single=51, vector=51, gb_s=2000, gb=80, link="PCIe 5",
    ),
    _hopper("H100 SXM", "NVIDIA H100 datasheet", 3350, 80),
    _hopper("H200", "NVIDIA H200 datasheet (SXM)", 4800, 141),
    _device(
        # Early documents say 192 GB and 8 TB/s; the driver reports 7,680 bits at 3,996 MHz.
        "B200", "an eighth of NVIDIA's HGX B200 table; bandwidth from its driver (pytorch/ao 4002)",
        half=2250, float8=4500, float4=9000, tfloat32=1125, single=75, vector=75, gb_s=7672,
        gb=180, link="NVLink 5",
    ),
    _device(
        "MI250", "AMD Instinct MI250 data sheet", half=362.1, single=90.5, vector=45.3,
        gb_s=3276.8, gb=128, link="Infinity Fabric 3",
    ),
    _device(  # a program sees each die as one GPU
        "MI250 die", "AMD Instinct MI250 data sheet, halved", half=181.05, single=45.25,
        vector=22.65, gb_s=1638.4, gb=64, link="Infinity Fabric 3",
    ),
    _mi300("MI300X", 5300, 192),
    _mi300("MI325X", 6000, 256),
    _device(
        # 256 compute units of 8,192 float8 FLOPs per clock (AMD at ISSCC 2026) at 2.4 GHz.
        "MI355X", "AMD Instinct MI355X announcements; the rest by ratio to float8",
        half=2516.6, float8=5033.2, float4=10_066.3,
        single=157.3, vector=157.3, gb_s=8000, gb=288, link="Infinity Fabric 4+",
    ),
)  # fmt: skip

_ALIASES = {
    "a100": "A100 SXM 80GB",
    "a100sxm": "A100 SXM 80GB",
    "a10080gb": "A100 SXM 80GB",
    "a10040gb": "A100 SXM 40GB",
    "a100pcie": "A100 PCIe 40GB",  # as in roofline-prefill-decode
    "h100": "H100 SXM",
    "h200sxm": "H200",
    "v100sxm2": "V100",
    "3090": "RTX 3090",
    "4090": "RTX 4090",
    "mi250gcd": "MI250 die",
}

# The names that drivers report.
_DRIVER_NAMES = {
    "Tesla V100-SXM2-16GB": "V100 16GB",
    "Tesla V100-SXM2-32GB": "V100",
    "NVIDIA A10": "A10",
    "NVIDIA A100-SXM4-40GB": "A100 SXM 40GB",
    "NVIDIA A100-SXM4-80GB": "A100 SXM 80GB",
    "NVIDIA A100-PCIE-40GB": "A100 PCIe 40GB",
    "NVIDIA A100 80GB PCIe": "A100 PCIe 80GB",
    "NVIDIA L40S": "L40S",
    "NVIDIA GeForce RTX 3090": "RTX 3090",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H100 80GB HBM3": "H100 SXM",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
    "AMD Instinct MI250": "MI250 die",
    "AMD Instinct MI300X": "MI300X",
    "AMD Instinct MI325X": "MI325X",
    "AMD Instinct MI355X": "MI355X",
}


def find_device(name: str) -> Device:
    """Return a known device by name, ignoring case, spaces, dashes and vendor.

    Raises UnknownDeviceError with the list of known devices.
    """
    known = {_key(device.name): device for device in DEVICES}
    key = _key(name)
    if key in _ALIASES:
        key = _key(_ALIASES[key])
    if key in known:
        return known[key]
    close = difflib.get_close_matches(key, [*known, *_ALIASES], n=1)
    found = known.get(close[0]) or known[_key(_ALIASES[close[0]])] if close else None
    hint = f"did you mean {found.name}? Known" if found else "known"
    names = ", ".join(device.name for device in DEVICES)
    raise UnknownDeviceError(f"unknown GPU {name!r}; {hint} GPUs: {names}, local")


def is_device(name: str) -> bool:
    """Return whether `name` is a known device, `local` or `all`."""
    return _key(name) in {"local", "all", *_ALIASES, *(_key(device.name) for device in DEVICES)}


def device_of_driver(driver_name: str) -> Device | None:
    """Return the known device with this driver name; None if it is unknown."""
    name = _DRIVER_NAMES.get(driver_name)
    return None if name is None else find_device(name)


def _key(name: str) -> str:
    return re.sub(r"[\s_-]|nvidia|amd|instinct|geforce", "", name.lower())
