"""Accelerators and clusters as a plan sees them. Figures are the makers' data sheets', dense (without sparsity)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rmoe.validation import require


@dataclass(frozen=True)
class Accelerator:
    """One device.

    Attributes:
        memory_gib: what the driver reports, about 1 to 2 GiB under the nominal size.
        bf16_tflops: dense matrix products in bfloat16, the peak.
        fp32_tflops: in float32, the peak. Not TF32's: rmoe leaves torch's default, which does not round to it.
        memory_gb_per_s: bandwidth of its memory.
        link_gb_per_s: to the other devices of a node, one direction.
        network_gb_per_s: to other nodes, one direction, the usual network adapter per device.
    """

    memory_gib: float
    bf16_tflops: float
    fp32_tflops: float
    memory_gb_per_s: float
    link_gb_per_s: float
    network_gb_per_s: float


AcceleratorName = Literal["a100-40", "a100-80", "h100", "h200", "b200"]

# NVIDIA's data sheets "A100 Tensor Core GPU" (SXM), "H100 Tensor Core GPU" (SXM), "H200 Tensor Core GPU" (SXM) and
# "Blackwell" (HGX B200); float32 is their row "FP32".
ACCELERATORS: dict[AcceleratorName, Accelerator] = {
    "a100-40": Accelerator(39.4, 312, 19.5, 1555, 300, 25),
    "a100-80": Accelerator(79.1, 312, 19.5, 2039, 300, 25),
    "h100": Accelerator(79.1, 989, 67, 3350, 450, 50),
    "h200": Accelerator(139.8, 989, 67, 4800, 450, 50),
    "b200": Accelerator(178.4, 2250, 75, 8000, 900, 50),
}


@dataclass(frozen=True)
class Cluster:
    """Equal devices in equal nodes.

    Attributes:
        devices: in all.
        devices_per_node: joined by the fast link.
        accelerator: of each.
        compute_efficiency: share of the peak that matrix products reach; an assumption, see `docs/scale.md`.
        network_efficiency: share of a link's bandwidth that collectives reach; an assumption.
        usable_memory: share of the memory that tensors may fill; the rest is context, fragments, buffers.
    """

    devices: int
    devices_per_node: int
    accelerator: Accelerator
    compute_efficiency: float = 0.4
    network_efficiency: float = 0.8
    usable_memory: float = 0.92

    def __post_init__(self) -> None:
        for name, value in (("--devices", self.devices), ("--devices-per-node", self.devices_per_node)):
            require(value >= 1, name, value, "1 or more")
        full = self.devices <= self.devices_per_node or self.devices % self.devices_per_node == 0
        require(full, "--devices", self.devices, f"a multiple of {self.devices_per_node}, full nodes")
        share = self.compute_efficiency
        require(0 < share <= 1, "--efficiency", share, "above 0, at most 1")

    @property
    def node(self) -> int:
        """Devices within reach of the fast link."""
        return min(self.devices, self.devices_per_node)

    @property
    def memory_bytes(self) -> float:
        """What tensors may fill on one device."""
        return self.accelerator.memory_gib * 2**30 * self.usable_memory

    def flops_per_second(self, bf16: bool) -> float:
        """What matrix products reach on one device, in bfloat16 or in float32."""
        peak = self.accelerator.bf16_tflops if bf16 else self.accelerator.fp32_tflops
        return peak * 1e12 * self.compute_efficiency

    def bandwidth(self, group: int) -> float:
        """Bytes per second of one device's collectives over `group` neighbours: the slowest link decides."""
        across = group > self.node
        link = self.accelerator.network_gb_per_s if across else self.accelerator.link_gb_per_s
        return link * 1e9 * self.network_efficiency
