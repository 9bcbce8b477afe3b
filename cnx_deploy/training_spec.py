"""What training is asked for, what it says of each epoch, and what it returns. Imports no Lightning."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from cnx_deploy.data import Preprocessing
from cnx_deploy.errors import InputError
from cnx_deploy.variants import Variant, find_variant

__all__ = ["EpochRecord", "Progress", "Silence", "TrainingResult", "TrainingSpec"]

Optimizer = Literal["adamw", "sgd"]
TrainingPrecision = Literal["fp32", "bf16", "fp16"]
LEARNING_RATES = {"adamw": 1e-3, "sgd": 5e-3}
# Where a run is and how its work is done may differ on resume; what is learned may not.
FREE_FIELDS = frozenset({"data", "output_dir", "run_dir", "workers", "resume"})


@dataclass(frozen=True, slots=True)
class TrainingSpec:
    """What to train.

    `data`: see `data.find_dataset`. `run_dir` None takes a fresh `<output_dir>/<variant>-NNN`, or with `resume` the
    newest there. `learning_rate` None: 1e-3 for AdamW, 5e-3 for SGD (momentum 0.9). `warmup_epochs` None: a tenth of
    the epochs. `drop_path_rate`: stochastic depth of the last block. `min_crop_area`, `flip`: see
    `training_data.TrainingImages`. `workers` None: see `training_data.make_loader`.
    """

    data: Path
    variant: Variant | str
    output_dir: Path = Path("runs")
    epochs: int = 30
    image_size: int = 224
    batch_size: int = 32
    optimizer: Optimizer = "adamw"
    learning_rate: float | None = None
    weight_decay: float = 0.05
    warmup_epochs: float | None = None
    drop_path_rate: float = 0.0
    label_smoothing: float = 0.1
    crop_ratio: float = 0.875
    min_crop_area: float = 0.5
    flip: bool = True
    seed: int = 0
    workers: int | None = None
    precision: TrainingPrecision = "fp32"
    run_dir: Path | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        _ = self.network
        Preprocessing(self.image_size, self.crop_ratio)
        for name, allowed in (("optimizer", get_args(Optimizer)), ("precision", get_args(TrainingPrecision))):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is {getattr(self, name)!r}. Choose one of: {', '.join(allowed)}.")
        rules = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "learning_rate": (self.resolved_learning_rate > 0, "above 0"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "warmup_epochs": (0 <= self.resolved_warmup_epochs <= self.epochs, "from 0 to the epochs"),
            "drop_path_rate": (0 <= self.drop_path_rate < 1, "in [0, 1)"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "in [0, 1)"),
            "min_crop_area": (0 < self.min_crop_area <= 1, "in (0, 1]"),
            "seed": (self.seed >= 0, "at least 0"),
            "workers": (self.workers is None or self.workers >= 0, "at least 0"),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                raise InputError(f"{name} is {getattr(self, name)}; it must be {expected}.")

    @property
    def network(self) -> Variant:
        """The variant itself."""
        return find_variant(self.variant) if isinstance(self.variant, str) else self.variant

    @property
    def resolved_learning_rate(self) -> float:
        """The learning rate, or the optimiser's default."""
        return LEARNING_RATES[self.optimizer] if self.learning_rate is None else self.learning_rate

    @property
    def resolved_warmup_epochs(self) -> float:
        """The warm-up, or a tenth of the epochs."""
        return self.epochs / 10 if self.warmup_epochs is None else self.warmup_epochs

    @property
    def preprocessing(self) -> Preprocessing:
        """What validation images go through, and every image the trained model will see."""
        return Preprocessing(self.image_size, self.crop_ratio)

    def to_dict(self) -> dict[str, Any]:
        """The fields that decide what is learned, as plain types."""
        learned = {name: value for name, value in asdict(self).items() if name not in FREE_FIELDS}
        return {**learned, "variant": self.network.name}


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One epoch, from 1. Losses are means over images: `train_loss` smoothed and augmented, `val_loss` neither."""

    epoch: int
    train_loss: float
    val_loss: float
    val_top1_percent: float
    learning_rate: float
    seconds: float

    @property
    def rank(self) -> tuple[float, float]:
        """Greater is better: top-1, then validation loss."""
        return self.val_top1_percent, -self.val_loss

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """A run and how far it came. `best` and `last` are None when it was interrupted in its first epoch."""

    run_dir: Path
    best: Path | None
    last: Path | None
    metrics: Path
    best_top1_percent: float | None
    epochs_run: int
    interrupted: bool


class Progress(Protocol):
    """Who is told how training goes. Epochs and steps count from 1."""

    def begin(self, epochs: int, steps_per_epoch: int, epochs_done: int) -> None:
        """Training starts or goes on."""

    def step(self, epoch: int, step: int, mean_loss: float) -> None:
        """A step is done; not every step is reported."""

    def end_epoch(self, record: EpochRecord, is_best: bool) -> None:
        """An epoch is done and written."""


class Silence:
    """A Progress that says nothing."""

    def begin(self, epochs: int, steps_per_epoch: int, epochs_done: int) -> None:
        """Say nothing."""

    def step(self, epoch: int, step: int, mean_loss: float) -> None:
        """Say nothing."""

    def end_epoch(self, record: EpochRecord, is_best: bool) -> None:
        """Say nothing."""
