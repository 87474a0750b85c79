"""What ranks of tensor parallelism send each other in a step, and how long links take for it.

Pure arithmetic, as `model.cost.operations`. Each layer sums two activations over the ranks and the
embedding one; then every rank says which token of its vocabulary is likeliest. A ring sends
2·(n - 1)/n of what is summed (Patarasuk & Yuan 2009) from each GPU; nothing is taken to overlap
with computing.
"""

from dataclasses import dataclass

from model.config import ModelConfig
from model.cost.workload import DTYPE_BYTES, Workload


@dataclass(frozen=True)
class Link:
    """How GPUs are connected. Bytes a second that each one can send, as documents have it.

    latency_s: of one collective, which no document has: an assumption for a few GPUs.
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
            "MI250: two links of 50 GB/s to the next GPU of a ring (Pearson 2023)",
        ),
        Link("Infinity Fabric 4", 448e9, 15e-6, "7 links of 64 GB/s, AMD MI300X data sheet"),
        Link("Infinity Fabric 4+", 537.6e9, 15e-6, "7 links of 76.8 GB/s, AMD MI355X data sheet"),
        Link("PCIe 4", 32e9, 25e-6, "PCI Express 4.0, 16 lanes"),
        Link("PCIe 5", 64e9, 25e-6, "PCI Express 5.0, 16 lanes"),
        Link("Ethernet 100G", 12.5e9, 60e-6, "100 Gbit/s a GPU"),
        Link("Ethernet 400G", 50e9, 60e-6, "400 Gbit/s a GPU"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Exchange:
    """What one GPU sends in a step."""

    collectives: int
    bytes: int

    def seconds(self, link: Link) -> float:
        """How long the step's collectives take, one after the other."""
        return self.collectives * link.latency_s + self.bytes / link.bandwidth


NOTHING = Exchange(0, 0)


def exchange(config: ModelConfig, work: Workload, ranks: int | None = None) -> Exchange:
    """What each of the workload's GPUs, or of `ranks`, sends in a step."""
    ranks = ranks or work.tensor_parallel
    if ranks == 1:
        return NOTHING
    sums = 1 + 2 * len(config.layers)
    activation = work.tokens * config.hidden_size * DTYPE_BYTES[work.dtype]
    likeliest = 16 * work.logits_rows  # a logit and a token, 8 bytes each, to every other rank
    sent = sums * -(-2 * (ranks - 1) * activation // ranks) + (ranks - 1) * likeliest
    return Exchange(sums + 1, sent)
