"""GPUs and networks, with the figures of their makers' data sheets.

All are peaks that no program reaches: `Machine` carries the shares of them that are reckoned with.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_salt.config.values import nearest


@dataclass(frozen=True)
class Gpu:
    """One GPU. Tera and giga are powers of ten."""

    name: str
    tflops_16_bit: float
    """Dense bf16 or fp16 products on tensor cores."""
    tflops_fp32: float
    """fp32 outside the tensor cores: PyTorch uses TF32 for products only when it is told to."""
    memory_gb: float
    memory_gb_s: float
    nvlink_gb_s: float
    """In one direction: half of what data sheets give for both together."""
    network: str
    """What the maker's own 8-GPU machine has for each GPU."""
    source: str


GPUS = {
    gpu.name: gpu
    for gpu in (  # the numbers in the order of the fields
        Gpu("a100-40gb", 312, 19.5, 40, 1555, 300, network="hdr",
            source="NVIDIA A100 data sheet (SXM4 40 GB); DGX A100 data sheet"),
        Gpu("a100", 312, 19.5, 80, 2039, 300, network="hdr",
            source="NVIDIA A100 data sheet (SXM4 80 GB); DGX A100 data sheet"),
        Gpu("h100", 989, 67, 80, 3350, 450, network="ndr",
            source="NVIDIA H100 data sheet (SXM5), 1979 with sparsity; DGX H100 data sheet"),
        Gpu("h200", 989, 67, 141, 4800, 450, network="ndr",
            source="NVIDIA H200 data sheet (SXM), 1979 with sparsity; DGX H200 data sheet"),
        Gpu("b200", 2250, 75, 180, 8000, 900, network="ndr",
            source="NVIDIA HGX B200 (eight GPUs), 4500 with sparsity; DGX B200 data sheet"),
    )
}  # fmt: skip

# GB/s in one direction for each GPU; source: the InfiniBand Trade Association's roadmap, 4 lanes.
NETWORKS = {"edr": 12.5, "hdr": 25.0, "ndr": 50.0, "xdr": 100.0}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Nodes of equal GPUs, and which share of the peaks to reckon with."""

    gpu: Gpu
    network_gb_s: float
    """In one direction, for each GPU."""
    gpus_per_node: int = 8
    efficiency: float = 0.5
    """Of the peak of products. An assumption: measure it (see docs/planner.md)."""
    link_efficiency: float = 0.8
    """Of the bandwidth of links and of the GPU's memory. An assumption, too."""
    usable: float = 0.95
    """Share of the GPU's memory for tensors; the rest is CUDA's, NCCL's and the allocator's."""

    @property
    def usable_bytes(self) -> float:
        return self.usable * self.gpu.memory_gb * 1e9

    def flops_s(self, precision: str) -> float:
        peak = self.gpu.tflops_fp32 if precision == "fp32" else self.gpu.tflops_16_bit
        return peak * 1e12 * self.efficiency

    @property
    def memory_bytes_s(self) -> float:
        return self.gpu.memory_gb_s * 1e9 * self.link_efficiency

    def link_bytes_s(self, span: int, in_node: int = 1) -> float:
        """What a rank can send in a ring of a group.

        Args:
            span: neighbouring ranks among which the group's lie; NVLink if they fit into a node.
            in_node: ranks of the group in one node. Rings through several nodes enter and leave
                each by all of the group's network cards there, as NCCL's do.
        """
        nvlink, network = self.gpu.nvlink_gb_s, self.network_gb_s
        rate = nvlink if span <= self.gpus_per_node else min(nvlink, network * max(1, in_node))
        return rate * 1e9 * self.link_efficiency


def find_gpu(name: str) -> Gpu:
    """Raises: ValueError naming the known ones."""
    if name.lower() not in GPUS:
        raise ValueError(
            f"--gpu {name}: not in the table; known are {', '.join(GPUS)}."
            f"{nearest(name.lower(), list(GPUS))}"
        )
    return GPUS[name.lower()]


def find_network(name: str) -> float:
    """GB/s for each GPU, from a name of `NETWORKS` or a number.

    Raises: ValueError naming the known ones.
    """
    if name.lower() in NETWORKS:
        return NETWORKS[name.lower()]
    try:
        rate = float(name)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise ValueError(
            f"--interconnect {name}: give GB/s for each GPU in one direction, above 0, or one of "
            f"{', '.join(NETWORKS)}.{nearest(name.lower(), list(NETWORKS))}"
        )
    return rate
