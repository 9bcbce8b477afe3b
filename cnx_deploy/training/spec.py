"""What training is asked for. Imports no Lightning."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.variants import Variant, find_variant
from cnx_deploy.training.launch import Launch

__all__ = ["CHOICES", "TrainingSpec"]

Optimizer = Literal["adamw", "sgd"]
Schedule = Literal["cosine", "constant"]
LayerDecayGroups = Literal["single", "group"]
TrainingPrecision = Literal["fp32", "bf16", "fp16"]
CHOICES: dict[str, tuple[str, ...]] = {
    "optimizer": get_args(Optimizer),
    "schedule": get_args(Schedule),
    "layer_decay_groups": get_args(LayerDecayGroups),
    "precision": get_args(TrainingPrecision),
}
LEARNING_RATES = {"adamw": 1e-3, "sgd": 5e-3}
ONE_PROCESS = Launch()
RATE_IS_PER = 256
"""Images of an optimiser step that `base_learning_rate` is for (Goyal et al., arXiv:1706.02677)."""
# Where a run is and how its work is done may differ on resume; what is learned may not.
FREE_FIELDS = frozenset(
    {"data", "output_dir", "run_dir", "workers", "resume", "compile", "tensorboard", "deterministic", "launch"}
)


@dataclass(frozen=True, slots=True)
class TrainingSpec:
    """What to train.

    Data: `data`: see `data.find_dataset`. `crop_ratio`: of validation images. `min_crop_area`, `flip`,
    `randaugment_magnitude` (0: none; to 10), `erasing_probability`: see `augmentation.ImageAugmentation`.
    `mixup_alpha`, `cutmix_alpha` (0: none): see `augmentation.BatchMix`. `workers` None: see `images.make_loader`.

    Optimisation: `batch_size` images a process and step, of which `accumulate` make one step of the optimiser.
    `learning_rate` is absolute; None takes `base_learning_rate` times the images of a step of the optimiser / 256, and
    without that 1e-3 for AdamW, 5e-3 for SGD (momentum 0.9). `final_learning_rate`: where the cosine ends, None a
    hundredth. `warmup_epochs` None: a tenth of the epochs, none for a constant rate. `layer_decay` 1: none; see
    `optimisation.layer_index`. `clip_norm` None: gradients are not clipped.

    Network: `drop_path_rate`: stochastic depth of the last block. `head_init_scale`: on a new head's weights.
    `ema_decay` None: no moving average. `freeze_backbone`: the head alone learns.

    Machine: `launch`: the processes that were started for this run, one a device (Lightning's DDP).
    `run_dir` None takes a fresh `<output_dir>/<variant>-NNN`, or with `resume` the newest there. `recipe` is the name
    of the preset that the values come from.
    """

    data: Path
    variant: Variant | str
    output_dir: Path = Path("runs")
    recipe: str = "plain"
    epochs: int = 30
    image_size: int = 224
    batch_size: int = 32
    accumulate: int = 1
    optimizer: Optimizer = "adamw"
    beta2: float = 0.999
    learning_rate: float | None = None
    base_learning_rate: float | None = None
    final_learning_rate: float | None = None
    schedule: Schedule = "cosine"
    weight_decay: float = 0.05
    warmup_epochs: float | None = None
    layer_decay: float = 1.0
    layer_decay_groups: LayerDecayGroups = "single"
    clip_norm: float | None = None
    drop_path_rate: float = 0.0
    head_init_scale: float = 1.0
    ema_decay: float | None = None
    freeze_backbone: bool = False
    label_smoothing: float = 0.1
    crop_ratio: float = 0.875
    min_crop_area: float = 0.5
    flip: bool = True
    randaugment_magnitude: float = 0.0
    erasing_probability: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    seed: int = 0
    workers: int | None = None
    precision: TrainingPrecision = "fp32"
    channels_last: bool = False
    compile: bool = False
    deterministic: bool = False
    launch: Launch = ONE_PROCESS
    tensorboard: bool = False
    run_dir: Path | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        _ = self.network
        Preprocessing(self.image_size, self.crop_ratio)
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is {getattr(self, name)!r}. Choose one of: {', '.join(allowed)}.")
        for name, holds, expected in self._rules():
            if not holds:
                raise InputError(f"{name} is {getattr(self, name)}; it must be {expected}. Give such a one.")
        if self.learning_rate is not None and self.base_learning_rate is not None:
            raise InputError(
                f"Both learning_rate {self.learning_rate} and base_learning_rate {self.base_learning_rate} were given: "
                f"expected one, absolute or for {RATE_IS_PER} images a step. Leave one out."
            )

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        for name, value in self.to_dict().items():
            yield name, not isinstance(value, float) or math.isfinite(value), "finite"
        for name in ("epochs", "batch_size", "accumulate"):
            yield name, getattr(self, name) >= 1, "at least 1"
        for name in ("weight_decay", "seed", "mixup_alpha", "cutmix_alpha"):
            yield name, getattr(self, name) >= 0, "at least 0"
        for name in ("learning_rate", "base_learning_rate", "final_learning_rate", "clip_norm"):
            yield name, getattr(self, name) is None or getattr(self, name) > 0, "above 0"
        for name in ("drop_path_rate", "label_smoothing", "beta2"):
            yield name, 0 <= getattr(self, name) < 1, "in [0, 1)"
        for name in ("min_crop_area", "layer_decay"):
            yield name, 0 < getattr(self, name) <= 1, "in (0, 1]"
        yield "head_init_scale", self.head_init_scale > 0, "above 0"
        yield "erasing_probability", 0 <= self.erasing_probability <= 1, "from 0 to 1"
        yield "randaugment_magnitude", 0 <= self.randaugment_magnitude <= 10, "from 0 to 10"
        yield "ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "in (0, 1)"
        yield "warmup_epochs", 0 <= self.resolved_warmup_epochs <= self.epochs, f"from 0 to the {self.epochs} epochs"
        yield (
            "final_learning_rate",
            self.resolved_final_rate <= self.resolved_learning_rate,
            "at most the learning rate",
        )
        yield "workers", self.workers is None or self.workers >= 0, "at least 0"

    @property
    def network(self) -> Variant:
        """The variant itself."""
        return find_variant(self.variant) if isinstance(self.variant, str) else self.variant

    @property
    def images_per_step(self) -> int:
        """Images of one step of the optimiser, all processes together."""
        return self.batch_size * self.accumulate * self.launch.processes

    @property
    def resolved_learning_rate(self) -> float:
        """The highest learning rate, scaled to the images of a step, or the optimiser's default."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.base_learning_rate is not None:
            return self.base_learning_rate * self.images_per_step / RATE_IS_PER
        return LEARNING_RATES[self.optimizer]

    @property
    def resolved_final_rate(self) -> float:
        """Where the cosine ends."""
        return self.resolved_learning_rate / 100 if self.final_learning_rate is None else self.final_learning_rate

    @property
    def resolved_warmup_epochs(self) -> float:
        """The warm-up, or a tenth of the epochs; a constant rate has none."""
        if self.warmup_epochs is not None:
            return self.warmup_epochs
        return self.epochs / 10 if self.schedule == "cosine" else 0.0

    @property
    def preprocessing(self) -> Preprocessing:
        """What validation images go through, and every image the trained model will see."""
        return Preprocessing(self.image_size, self.crop_ratio)

    def to_dict(self) -> dict[str, Any]:
        """The fields that decide what is learned, as plain types."""
        learned = {name: value for name, value in asdict(self).items() if name not in FREE_FIELDS}
        return {**learned, "variant": self.network.name, "processes": self.launch.processes}

    def resolved(self) -> dict[str, Any]:
        """Everything, with what None stands for filled in, for people to read."""
        return {
            **self.to_dict(),
            "learning_rate": self.resolved_learning_rate,
            "final_learning_rate": self.resolved_final_rate,
            "warmup_epochs": self.resolved_warmup_epochs,
            "images_per_step": self.images_per_step,
        }
