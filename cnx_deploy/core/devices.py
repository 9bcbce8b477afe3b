"""GPUs and the peaks of their data sheets, by the driver's name; which card stands for a compute capability.

The peaks come from NVIDIA's documents, which print tensor-core rates with sparsity first or only; the rates here are
without it. The documents also differ in the accumulator. GeForce cards run FP16 with FP32 accumulation at half the
rate of FP16 accumulation (RTX 4090: 165 and 330 TFLOPS), and the slower rate stands here. Peaks hold at the document's
boost clock: a card that boosts higher passes them, a card at its power limit stays below.

The values were read in public quotations of the document that `source` names, not in the document itself. `source`
says what came from elsewhere, and marks what was found nowhere "from memory, not rechecked". A GPU without a full set
is left out (no dense FP16 rate was found for the RTX PRO 6000 Blackwell Server Edition).
"""

from dataclasses import dataclass

from cnx_deploy.core.precision import find_precision

__all__ = ["DEVICES", "TYPICAL", "Device", "find_device", "typical_device"]

NOT_PART_OF_THE_NAME = frozenset({"nvidia", "geforce", "tesla"})


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU. `name` is the driver's; rates are dense (no sparsity) and count a multiply-add as two operations.

    `fp16_tflops`: tensor cores, FP16 in, FP32 accumulated (the same with BF16 where there is BF16).
    `fp32_tflops`: CUDA cores, since TensorFloat-32 is off in this package. `bandwidth_gb_s`: 1e9 bytes a second.
    `l2_mb`: 2**20 bytes. `source`: the documents, and which values were not rechecked.
    """

    name: str
    compute_capability: str
    fp16_tflops: float
    fp32_tflops: float
    bandwidth_gb_s: float
    l2_mb: float
    source: str

    def peak_tflops(self, precision: str) -> float | None:
        """The rate of matrix products in this precision; None where it does not compute it or no rate is known."""
        row = find_precision(precision)
        peaks = {"float32": self.fp32_tflops, "float16": self.fp16_tflops, "bfloat16": self.fp16_tflops}
        return peaks.get(row.dtype) if row.runs_on(self.compute_capability) else None


T4 = "NVIDIA T4 data sheet; L2 from third-party tables"
A100 = "NVIDIA A100 data sheet; L2 from third-party tables"
A10 = "NVIDIA A10 data sheet (125 TFLOPS dense, 250 with sparsity); L2 from third-party tables"
GA102 = "NVIDIA Ampere GA102 whitepaper, appendix A, table 9"
L4 = "NVIDIA L4 data sheet (242 TFLOPS with sparsity, halved); FP32 and L2 from third-party tables"
L40S = "NVIDIA L40S data sheet; L2 from memory, not rechecked (a third-party table has 48 MB)"
ADA = "NVIDIA Ada GPU architecture whitepaper v2.02, appendix A, table 2"
H100 = "NVIDIA H100 data sheet (1979 TFLOPS SXM, 1513 PCIe, with sparsity, halved); L2 from third-party tables"
H200 = "NVIDIA H200 data sheet (1979 TFLOPS with sparsity, halved); L2 from memory, not rechecked (the H100's)"
BLACKWELL = "NVIDIA RTX Blackwell GPU architecture whitepaper, table 3; FP32 and L2 from third-party tables"
BLACKWELL_PRO = (
    "NVIDIA RTX PRO Blackwell GPU architecture whitepaper v1.0, table 4; FP32 and L2 from third-party tables"
)

DEVICES: tuple[Device, ...] = (
    Device("Tesla T4", "sm75", 65.0, 8.1, 320, 4, T4),
    Device("NVIDIA A100-PCIE-40GB", "sm80", 312.0, 19.5, 1555, 40, A100),
    Device("NVIDIA A100-SXM4-40GB", "sm80", 312.0, 19.5, 1555, 40, A100),
    Device("NVIDIA A100 80GB PCIe", "sm80", 312.0, 19.5, 1935, 40, A100),
    Device("NVIDIA A100-SXM4-80GB", "sm80", 312.0, 19.5, 2039, 40, A100),
    Device("NVIDIA A10", "sm86", 125.0, 31.2, 600, 6, A10),
    Device("NVIDIA GeForce RTX 3090", "sm86", 71.0, 35.6, 936, 6, GA102),
    Device("NVIDIA L4", "sm89", 121.0, 30.3, 300, 48, L4),
    Device("NVIDIA L40S", "sm89", 362.05, 91.6, 864, 96, L40S),
    Device("NVIDIA GeForce RTX 4090", "sm89", 165.2, 82.6, 1008, 72, ADA),
    Device("NVIDIA H100 PCIe", "sm90", 756.5, 51.0, 2000, 50, H100),
    Device("NVIDIA H100 80GB HBM3", "sm90", 989.5, 67.0, 3350, 50, H100),
    Device("NVIDIA H200", "sm90", 989.5, 67.0, 4800, 50, H200),
    Device("NVIDIA GeForce RTX 5090", "sm120", 209.5, 104.8, 1792, 96, BLACKWELL),
    Device("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "sm120", 503.8, 125.0, 1792, 128, BLACKWELL_PRO),
)

TYPICAL = {
    "sm75": "Tesla T4",
    "sm80": "NVIDIA A100-SXM4-80GB",
    "sm86": "NVIDIA GeForce RTX 3090",
    "sm89": "NVIDIA GeForce RTX 4090",
    "sm90": "NVIDIA H100 80GB HBM3",
    "sm120": "NVIDIA GeForce RTX 5090",
}
"""The card of the table that stands for a compute capability where only that is known."""


def find_device(name: str) -> Device | None:
    """Return the device that the driver or torch calls `name`, None where it is not in the table.

    The whole name must match, apart from case and the words NVIDIA, GeForce and Tesla. "RTX 4090" is found; a
    "GeForce RTX 4090 Laptop GPU", an "RTX 3090 Ti" and a slice of a divided GPU ("… MIG 1g.5gb") are other devices.
    Ask with torch's name: nvidia-smi gives a divided GPU the name of the whole one.
    """
    wanted = _significant_words(name)
    return next((device for device in DEVICES if _significant_words(device.name) == wanted), None)


def typical_device(target: str) -> Device | None:
    """Return the card that stands for a compute capability such as "sm89"; None where the table has none."""
    return find_device(TYPICAL[target]) if target in TYPICAL else None


def _significant_words(name: str) -> list[str]:
    return [word for word in name.lower().split() if word not in NOT_PART_OF_THE_NAME]
