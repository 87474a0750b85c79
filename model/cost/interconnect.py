"""Communication of tensor parallelism: bytes that each GPU sends per step, and seconds per link.

Pure arithmetic, like `model.cost.operations`. Each layer all-reduces two activations and the
embedding one; then the ranks exchange the most likely token of their part of the vocabulary. In a
ring all-reduce each GPU sends 2·(n - 1)/n of the data (Patarasuk & Yuan 2009). Communication is
assumed not to overlap with computation.
"""

from dataclasses import dataclass

from model.config import ModelConfig
from model.cost.workload import DTYPE_BYTES, Workload


@dataclass(frozen=True)
class Link:
    """An interconnect of GPUs. bandwidth: documented bytes per second that each GPU can send.

    latency_s: of one collective among a few GPUs; assumed, because no document states it.
    """

    name: str
    bandwidth: float
    latency_s: float
    source: str


LINKS = {
    link.name: link
    for link in (
        Link("NVLink 2", 150e9, 10e-6, "half of 300 GB/s, NVIDIA V100 datasheet (SXM2)"),
        Link("NVLink 3", 300e9, 10e-6, "half of 600 GB/s, NVIDIA A100 datasheet (SXM)"),
        Link("NVLink 4", 450e9, 10e-6, "half of 900 GB/s, NVIDIA H100 and H200 datasheets (SXM)"),
        Link("NVLink 5", 900e9, 10e-6, "half of 1.8 TB/s, NVIDIA HGX B200 table"),
        Link(
            "Infinity Fabric 3", 100e9, 15e-6,
            "MI250: two links of 50 GB/s to the next GPU in a ring (Pearson 2023)",
        ),
        Link("Infinity Fabric 4", 448e9, 15e-6, "7 links of 64 GB/s, AMD MI300X data sheet"),
        Link("Infinity Fabric 4+", 537.6e9, 15e-6, "7 links of 76.8 GB/s, AMD MI355X data sheet"),
        Link("PCIe 4", 32e9, 25e-6, "PCI Express 4.0, 16 lanes"),
        Link("PCIe 5", 64e9, 25e-6, "PCI Express 5.0, 16 lanes"),
        Link("Ethernet 100G", 12.5e9, 60e-6, "100 Gbit/s per GPU"),
        Link("Ethernet 400G", 50e9, 60e-6, "400 Gbit/s per GPU"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Exchange:
    """Communication of one GPU in one step."""

    collectives: int
    bytes: int

    def seconds(self, link: Link) -> float:
        """Return the seconds of the step's collectives, one after the other."""
        return self.collectives * link.latency_s + self.bytes / link.bandwidth


NO_EXCHANGE = Exchange(0, 0)


def exchange(config: ModelConfig, work: Workload, ranks: int | None = None) -> Exchange:
    """Return the communication of each GPU in a step; ranks: GPUs (None: the workload's)."""
    ranks = ranks or work.tensor_parallel
    if ranks == 1:
        return NO_EXCHANGE
    sums = 1 + 2 * len(config.layers)
    activation = work.tokens * config.hidden_size * DTYPE_BYTES[work.dtype]
    argmax = 16 * work.logits_rows  # a logit and a token, 8 bytes each, to every other rank
    sent = sums * -(-2 * (ranks - 1) * activation // ranks) + (ranks - 1) * argmax
    return Exchange(sums + 1, sent)
