"""The GPU that an engine is built for: its compute capability, or its name, which stands for one.

Source: NVIDIA's list "CUDA GPU Compute Capability", https://developer.nvidia.com/cuda-gpus.
"""

import re

from cnx_deploy.core.errors import InputError

__all__ = ["GPUS", "find_target"]

GPUS: dict[str, tuple[str, ...]] = {
    "sm70": ("V100",),
    "sm75": (
        "T4", "Titan RTX", "Quadro RTX 4000", "Quadro RTX 5000", "Quadro RTX 6000", "Quadro RTX 8000", "RTX 2060",
        "RTX 2070", "RTX 2080", "GTX 1650", "GTX 1660",
    ),
    "sm80": ("A100", "A30"),
    "sm86": (
        "A10", "A2", "A16", "A40", "RTX 3050", "RTX 3060", "RTX 3070", "RTX 3080", "RTX 3090", "RTX A2000",
        "RTX A4000", "RTX A5000", "RTX A6000",
    ),
    "sm87": ("Jetson Orin", "Jetson AGX Orin", "Jetson Orin NX", "Jetson Orin Nano"),
    "sm89": (
        "L4", "L40", "L40S", "RTX 4050", "RTX 4060", "RTX 4070", "RTX 4080", "RTX 4090", "RTX 2000 Ada",
        "RTX 4000 Ada", "RTX 4500 Ada", "RTX 5000 Ada", "RTX 6000 Ada",
    ),
    "sm90": ("H100", "H200", "GH200"),
    "sm100": ("B200", "GB200"),
    "sm103": ("B300", "GB300"),
    "sm110": ("Jetson T5000", "Jetson T4000"),
    "sm120": (
        "RTX 5050", "RTX 5060", "RTX 5070", "RTX 5080", "RTX 5090", "RTX PRO 4000 Blackwell", "RTX PRO 4500 Blackwell",
        "RTX PRO 5000 Blackwell", "RTX PRO 6000 Blackwell",
    ),
    "sm121": ("GB10", "DGX Spark"),
}  # fmt: skip
"""Common GPUs by their compute capability, without what does not change it: NVIDIA, GeForce, Ti, Super, Laptop."""
_EXAMPLES = ("RTX 4090", "RTX 3090", "RTX 5090", "L4", "T4", "A100", "H100", "Jetson Orin")
_NOT_DISTINCTIVE = re.compile(
    r"\b(nvidia|geforce|tesla|gpu|laptop|mobile|max-q|generation|(server|workstation) edition|ti|super|sxm\d?|pcie|nvl"
    r"|hbm\d\w?|\d+ ?gb)\b|(?<=\d)(ti|super)+\b"
)


def find_target(text: str) -> str:
    """The compute capability that a user names: "sm89", "sm_89", "8.9", "RTX 4090", "rtx4090"; "current" stays.

    Raises InputError, with common GPUs and theirs, for a name that is not in the table.
    """
    if not isinstance(text, str):
        raise InputError(f"A target is one name, such as 'sm89', not {text!r:.80}. Build for each by itself.")
    words = text.strip().lower()
    if words == "current":
        return words
    if match := re.fullmatch(r"sm_?(\d{2,3})|(\d{1,2}\.\d)", words):
        return f"sm{match[1] or match[2].replace('.', '')}"
    if found := _BY_NAME.get(_distinctive(words)):
        return found
    named = ", ".join(f"{name} is {_BY_NAME[_distinctive(name)]}" for name in _EXAMPLES)
    raise InputError(
        f"{text!r:.80} is no known target: expected current, a compute capability such as sm89, or a common GPU's name "
        f"({named}). `nvidia-smi --query-gpu=name,compute_cap --format=csv` prints that of a GPU, and 8.9 is sm89."
    )


def _distinctive(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", _NOT_DISTINCTIVE.sub("", name.lower().replace("_", " ")))


_BY_NAME = {_distinctive(name): target for target, names in GPUS.items() for name in names}
