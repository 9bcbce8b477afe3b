"""What masked pre-training is asked for. Imports no Lightning.

Defaults are those of Woo et al., arXiv:2301.00808, appendix A.1, and of the reference code
(facebookresearch/ConvNeXt-V2, main_pretrain.py), except for the horizontal flip that the code has and the paper not.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.variants import STRIDE, Variant
from cnx_deploy.training.fcmae.masking import masked_count
from cnx_deploy.training.launch import Launch
from cnx_deploy.training.spec import ONE_PROCESS, TrainingPrecision, TrainingSpec

__all__ = ["PretrainingSpec"]

BETA2 = 0.95
WARMUP_EPOCHS = 40.0
WARMUP_SHARE = 0.05
"""40 of the reference's 800 epochs; shorter runs warm up for the same share."""
# Where a run is and how its work is done may differ on resume; what is learned may not.
FREE_FIELDS = frozenset(
    {"data", "output_dir", "run_dir", "workers", "resume", "deterministic", "launch", "picture_every"}
)


@dataclass(frozen=True, slots=True)
class PretrainingSpec:
    """What to pre-train.

    `data`: see `images.find_images_below`. `mask_ratio`: share of hidden patches. `min_crop_area`: least share of an
    image that a random crop keeps; there is no other augmentation. `held_images`: kept out of training, at most a
    tenth of all; their loss under fixed masks says which weights are best.

    `batch_size` images a process and step, of which `accumulate` make one step of the optimiser. `learning_rate` is
    absolute; None takes `base_learning_rate` times the images of a step of the optimiser / 256. `warmup_epochs` None:
    40, or a twentieth of the epochs where those are fewer.

    `picture_every`: epochs between pictures of reconstructions; None makes about ten in a run. `workers`, `launch`,
    `run_dir` and `resume` are as in `TrainingSpec`; a run is called `<variant>-fcmae-NNN`.
    """

    data: Path
    variant: Variant | str
    output_dir: Path = Path("runs")
    mask_ratio: float = 0.6
    epochs: int = 800
    image_size: int = 224
    batch_size: int = 64
    accumulate: int = 1
    learning_rate: float | None = None
    base_learning_rate: float = 1.5e-4
    weight_decay: float = 0.05
    warmup_epochs: float | None = None
    min_crop_area: float = 0.2
    held_images: int = 64
    picture_every: int | None = None
    seed: int = 0
    workers: int | None = None
    precision: TrainingPrecision = "fp32"
    deterministic: bool = False
    launch: Launch = ONE_PROCESS
    run_dir: Path | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        _ = self.training  # its own checks
        height, width = self.grid
        masked_count(height * width, self.mask_ratio)
        if self.held_images < 1:
            raise InputError(f"held_images is {self.held_images}; it must be at least 1. Give more.")
        if self.picture_every is not None and self.picture_every < 1:
            raise InputError(f"picture_every is {self.picture_every}; it must be at least 1. Give more.")

    @property
    def training(self) -> TrainingSpec:
        """The same as far as training has it: optimiser, augmentation, precision, processes. Its head is unused."""
        return TrainingSpec(
            self.data,
            self.variant,
            epochs=self.epochs,
            image_size=self.image_size,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            beta2=BETA2,
            learning_rate=self.learning_rate,
            base_learning_rate=self.base_learning_rate if self.learning_rate is None else None,
            weight_decay=self.weight_decay,
            warmup_epochs=self.resolved_warmup_epochs,
            min_crop_area=self.min_crop_area,
            flip=False,
            seed=self.seed,
            workers=self.workers,
            precision=self.precision,
            deterministic=self.deterministic,
            launch=self.launch,
        )

    @property
    def network(self) -> Variant:
        """The variant itself."""
        return self.training.network

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of an image, height and width."""
        return self.image_size // STRIDE, self.image_size // STRIDE

    @property
    def preprocessing(self) -> Preprocessing:
        """What held images go through."""
        return Preprocessing(self.image_size)

    @property
    def resolved_warmup_epochs(self) -> float:
        """The warm-up, or the default for so many epochs."""
        return min(WARMUP_EPOCHS, WARMUP_SHARE * self.epochs) if self.warmup_epochs is None else self.warmup_epochs

    @property
    def resolved_picture_every(self) -> int:
        """Epochs between pictures."""
        return max(1, self.epochs // 10) if self.picture_every is None else self.picture_every

    def to_dict(self) -> dict[str, Any]:
        """The fields that decide what is learned, as plain types."""
        learned = {name: value for name, value in asdict(self).items() if name not in FREE_FIELDS}
        return {**learned, "variant": self.network.name, "processes": self.launch.processes}

    def resolved(self) -> dict[str, Any]:
        """Everything, with what None stands for filled in, for people to read."""
        return {
            **self.to_dict(),
            "optimizer": "adamw",
            "beta2": BETA2,
            "learning_rate": self.training.resolved_learning_rate,
            "warmup_epochs": self.resolved_warmup_epochs,
            "images_per_step": self.training.images_per_step,
            "patches": self.grid[0] * self.grid[1],
            "hidden_patches": masked_count(self.grid[0] * self.grid[1], self.mask_ratio),
        }
