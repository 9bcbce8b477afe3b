"""What a run is asked for: the request that training and pre-training share, and training's own. No Lightning here."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from cnx_deploy.core.class_names import ClassNames
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.image_size import ImageSize
from cnx_deploy.core.preprocessing import PerChannel, Preprocessing, given_per_channel
from cnx_deploy.core.variants import Variant, find_variant
from cnx_deploy.model.tasks.base import Task, find_task
from cnx_deploy.model.tasks.multi_label import GAMMA_NEG, GAMMA_POS, NEGATIVE_CLIP
from cnx_deploy.training.class_balance import ClassWeights, named_weights
from cnx_deploy.training.distributed import ONE_PROCESS, Launch

__all__ = ["LATER_FIELDS", "RunSpec", "TrainingPrecision", "TrainingSpec"]

Optimizer = Literal["adamw", "sgd"]
Schedule = Literal["cosine", "linear", "step", "constant"]
LayerDecayGroups = Literal["single", "group", "stage"]
Loss = Literal["cross-entropy", "focal", "bce", "asymmetric"]
Sampling = Literal["shuffle", "balanced"]
TrainingPrecision = Literal["fp32", "bf16", "fp16"]
CHOICES: dict[str, tuple[str, ...]] = {
    "optimizer": get_args(Optimizer),
    "schedule": get_args(Schedule),
    "layer_decay_groups": get_args(LayerDecayGroups),
    "precision": get_args(TrainingPrecision),
    "loss": get_args(Loss),
    "sampling": get_args(Sampling),
}
LEARNING_RATES = {"adamw": 1e-3, "sgd": 5e-3}
RATE_IS_PER = 256
"""Images of an optimiser step that `base_learning_rate` is for (Goyal et al., arXiv:1706.02677)."""
# Where a run is and how its work is done may differ on resume; what is learned may not.
FREE_FIELDS = frozenset(
    {"data", "image_folder", "output_dir", "run_dir", "workers", "resume", "compile", "tensorboard", "deterministic",
     "launch", "picture_every", "class_names"}
)  # fmt: skip
LATER_FIELDS: dict[str, Any] = {
    "class_weights": "none", "sampling": "shuffle", "loss": "cross-entropy", "focal_gamma": None,
    "mean": None, "std": None, "interpolation": None, "crop_mode": None, "pad_value": None, "in_chans": 3,
    "task": "classification", "task_options": {}, "gamma_neg": None, "gamma_pos": None, "negative_clip": None,
    "scale_jitter": None, "photometric": False, "reduce_zero_label": False,
}  # fmt: skip
"""Fields that earlier records do not have, and what they stand at there: written only where they differ."""
FOCAL_GAMMA = 2.0
"""Of Lin et al., arXiv:1708.02002, who found it best."""
OPTIONS_OF_LOSSES: dict[str, dict[str, float]] = {
    "focal": {"focal_gamma": FOCAL_GAMMA},
    "asymmetric": {"gamma_neg": GAMMA_NEG, "gamma_pos": GAMMA_POS, "negative_clip": NEGATIVE_CLIP},
}
"""What a loss takes beside the targets, and what None stands for."""


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What every run is asked for, whatever it learns.

    Attributes:
        data: Folder or file of images.
        variant: Network, by name or as a record.
        output_dir: Folder of runs, used where `run_dir` is None.
        epochs: Times that every image is seen.
        image_size: Side in pixels, or (height, width).
        batch_size: Images a process and batch.
        accumulate: Batches that make one step of the optimiser.
        learning_rate: Highest rate, absolute; None takes it from `base_learning_rate`.
        base_learning_rate: Highest rate for 256 images a step, scaled to what a step has.
        weight_decay: On matrices and kernels; norms, biases and GRN have none.
        warmup_epochs: Epochs of linear warm-up; None takes the task's default.
        min_crop_area: Least share of an image that a random crop keeps, in (0, 1].
        in_chans: Channels of an image, 1 to 16; 3 are RGB, see `data.bands`.
        white_level: Stored value that is white in images with more than 8 bits, see `core.preprocessing`.
        seed: Seed of everything drawn.
        workers: Loader processes; None see `images.make_loader`.
        precision: Of the computation; weights stay in FP32.
        deterministic: Only GPU kernels that give the same bits again.
        launch: This process among those that were started for the run, one a device (Lightning's DDP).
        run_dir: The run's folder; None takes a fresh `<output_dir>/<name>-NNN`, or with `resume` the newest there.
        resume: Go on with a run instead of starting one.
    """

    data: Path
    variant: Variant | str
    output_dir: Path = Path("runs")
    epochs: int = 30
    image_size: ImageSize = 224
    batch_size: int = 32
    accumulate: int = 1
    learning_rate: float | None = None
    base_learning_rate: float | None = None
    weight_decay: float = 0.05
    warmup_epochs: float | None = None
    min_crop_area: float = 0.5
    in_chans: int = 3
    white_level: float | None = None
    seed: int = 0
    workers: int | None = None
    precision: TrainingPrecision = "fp32"
    deterministic: bool = False
    launch: Launch = ONE_PROCESS
    run_dir: Path | None = None
    resume: bool = False

    @property
    def network(self) -> Variant:
        """The variant itself."""
        return find_variant(self.variant) if isinstance(self.variant, str) else self.variant

    @property
    def images_per_step(self) -> int:
        """Images of one step of the optimiser, all processes together."""
        return self.batch_size * self.accumulate * self.launch.processes

    @property
    def preprocessing(self) -> Preprocessing:
        """What validation images go through."""
        return Preprocessing(self.image_size, white_level=self.white_level).for_channels(self.in_chans)

    def to_dict(self) -> dict[str, Any]:
        """The fields that decide what is learned, as plain types."""
        learned = {
            name: value
            for name, value in asdict(self).items()
            if name not in FREE_FIELDS and (name not in LATER_FIELDS or value != LATER_FIELDS[name])
        }
        return {**learned, "variant": self.network.name, "processes": self.launch.processes}

    def resolved(self) -> dict[str, Any]:
        """Everything, with the values that None stands for, for people to read."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class TrainingSpec(RunSpec):
    """What to train; `RunSpec` has the rest.

    `data` is what `data.find_dataset` takes. Without either learning rate it is 1e-3 for AdamW, 5e-3 for SGD
    (momentum 0.9). `warmup_epochs` None: a tenth of the epochs, none for a constant rate.

    Attributes:
        image_folder: Where the paths of a CSV file begin; None: at the file's own folder.
        recipe: Name of the preset that the values come from.
        optimizer, beta2: AdamW with its second momentum, or SGD.
        schedule, final_learning_rate: Cosine or linear, and where it ends (None: a hundredth); a tenth after three
            quarters and again after 11 twelfths of the run (step); or a constant rate.
        layer_decay, layer_decay_groups: A layer's rate as a share of the next one's, 1: none; see
            `optimisation.layer_index`.
        clip_norm: Largest norm of all gradients; None: not clipped.
        drop_path_rate: Stochastic depth of the last block.
        head_init_scale: Factor on a new head's weights.
        ema_decay: Moving average of the weights; None: none.
        freeze_backbone: The head alone learns.
        label_smoothing: Share of the target given to all classes.
        task: "classification", "multi-label" for several labels an image, "segment" or "detect".
        task_options: Fields of the task's `config` that are not the usual ones.
        loss, focal_gamma: Cross-entropy, or focal loss with the exponent gamma (None: 2); of several labels "bce" or
            "asymmetric".
        gamma_neg, gamma_pos, negative_clip: Of the asymmetric loss (None: 4, 1 and 0.05).
        class_weights: Of the loss, of several labels on the positives of each: "none", "balanced", weights by class
            name or a file of them; see `class_balance`.
        sampling: Every image once an epoch in shuffled order, or "balanced": each class equally often.
        crop_ratio, crop_mode, pad_value, interpolation: Of validation images, see `core.preprocessing.Preprocessing`.
        mean, std: Of the pixels, one number or one a channel; None takes those of the weights started from, else
            ImageNet's.
        scale_jitter, photometric: Of dense tasks, see `dense_images.DenseAugmentation`.
        class_names: Of masks, the names of the classes in their order or a file of them; None: see
            `data.segmentation.MaskReading`.
        reduce_zero_label: Of masks, 0 is not counted and each value is one class lower, as in ADE20K.
        flip, randaugment_magnitude, erasing_probability: See `images.ImageAugmentation`; magnitude to 10, 0: none.
        mixup_alpha, cutmix_alpha: See `images.BatchMix`; 0: none.
        channels_last, compile: How the network computes; what it learns is the same.
        tensorboard: Write TensorBoard's events into the run's folder.
    """

    image_folder: Path | None = None
    task: str = "classification"
    task_options: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = "plain"
    optimizer: Optimizer = "adamw"
    beta2: float = 0.999
    final_learning_rate: float | None = None
    schedule: Schedule = "cosine"
    layer_decay: float = 1.0
    layer_decay_groups: LayerDecayGroups = "single"
    clip_norm: float | None = None
    drop_path_rate: float = 0.0
    head_init_scale: float = 1.0
    ema_decay: float | None = None
    freeze_backbone: bool = False
    label_smoothing: float = 0.1
    loss: Loss = "cross-entropy"
    focal_gamma: float | None = None
    gamma_neg: float | None = None
    gamma_pos: float | None = None
    negative_clip: float | None = None
    class_weights: ClassWeights = "none"
    sampling: Sampling = "shuffle"
    crop_ratio: float = 0.875
    crop_mode: str | None = None
    interpolation: str | None = None
    mean: PerChannel | float | None = None
    std: PerChannel | float | None = None
    pad_value: PerChannel | float | None = None
    scale_jitter: tuple[float, float] | None = None
    photometric: bool = False
    class_names: ClassNames | None = None
    reduce_zero_label: bool = False
    flip: bool = True
    randaugment_magnitude: float = 0.0
    erasing_probability: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    channels_last: bool = False
    compile: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_weights", named_weights(self.class_weights))
        for name in ("mean", "std", "pad_value", "scale_jitter"):
            if isinstance(value := getattr(self, name), list):  # is the same request, and a tuple can be hashed
                object.__setattr__(self, name, tuple(value))
        _ = self.preprocessing, self.network  # their own checks
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        for name, holds, expected in self._rules():
            if not holds:
                raise InputError(f"{name} must be {expected}, got {getattr(self, name)}.")
        if self.learning_rate is not None and self.base_learning_rate is not None:
            raise InputError(
                f"Both learning_rate {self.learning_rate} and base_learning_rate {self.base_learning_rate} were given; "
                f"one is absolute, the other for {RATE_IS_PER} images a step. Leave one out."
            )
        if self.class_weights == self.sampling == "balanced":
            raise InputError(
                "class_weights and sampling are both balanced: either alone gives each class the same share of the "
                "loss, and with both a small class would have more than a large one. Leave one out."
            )
        for loss, options in OPTIONS_OF_LOSSES.items():
            for name in options:
                if getattr(self, name) is not None and self.loss != loss:
                    raise InputError(
                        f"{name} is {getattr(self, name)} and the loss is {self.loss}, which has no such number. Add "
                        f"--loss {loss}, or leave it out."
                    )
        task = self.purpose
        task.check_image_size(self.image_size)
        if task.losses and self.loss not in task.losses:
            raise InputError(
                f"The task {self.task} is trained with the loss {' or '.join(task.losses)}, not with {self.loss}. "
                f"Take one of them (--loss, loss), or another task."
            )
        self._check_augmentation(task)
        if task.takes_label_sets and self.sampling != "shuffle":
            raise InputError(
                f"sampling is {self.sampling} and an image of the task {self.task} has several labels, so that images "
                "cannot be drawn by their class. Use --class-weights balanced, or leave --sampling out."
            )

    def _check_augmentation(self, task: Task) -> None:
        """Raise InputError for an augmentation of another kind of task."""
        dense = ("scale_jitter", "photometric")
        others: dict[str, Any] = {
            "min_crop_area": 1.0, "randaugment_magnitude": 0.0, "erasing_probability": 0.0, "mixup_alpha": 0.0,
            "cutmix_alpha": 0.0, "sampling": "shuffle", "class_weights": "none",
        }  # fmt: skip
        wrong = [name for name in dense if getattr(self, name) and not task.is_dense]
        if task.is_dense:
            wrong = [name for name, usual in others.items() if getattr(self, name) != usual]
        if wrong:
            said = ", ".join(f"{name} {getattr(self, name)}" for name in wrong)
            taken = f"by {', '.join(dense)} and flip alone" if task.is_dense else "without them"
            raise InputError(
                f"The task {task.name} does not take {said}: its images are varied {taken}. Leave it out, or start "
                "from spec_from_recipe (training.recipes), which gives the task's own values."
            )

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        """Field, whether its value holds, what it must be."""
        for name, value in self.to_dict().items():
            yield name, not isinstance(value, float) or math.isfinite(value), "finite"
        for name in ("epochs", "batch_size", "accumulate"):
            yield name, getattr(self, name) >= 1, "at least 1"
        for name in ("weight_decay", "seed", "mixup_alpha", "cutmix_alpha"):
            yield name, getattr(self, name) >= 0, "at least 0"
        for name, value in self.loss_options.items():
            below = 1.0 if name == "negative_clip" else math.inf
            yield name, 0 <= value < below, "at least 0" if below == math.inf else "in [0, 1)"
        for name in ("learning_rate", "base_learning_rate", "clip_norm"):
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
        highest = self.resolved_learning_rate
        yield "final_learning_rate", 0 <= self.resolved_final_rate <= highest, "from 0 to the learning rate"
        low, high = self.scale_jitter or (1.0, 1.0)
        yield "scale_jitter", 0 < low <= high <= 10, "two numbers above 0 that rise, to 10"
        yield "photometric", self.in_chans in (1, 3) or not self.photometric, "left out: it takes 1 or 3 channels"
        takes_colours = self.in_chans in (1, 3) or self.randaugment_magnitude == 0
        yield "randaugment_magnitude", takes_colours, f"0 for images of {self.in_chans} channels: it changes colours"
        yield "workers", self.workers is None or self.workers >= 0, "at least 0"

    @property
    def purpose(self) -> Task:
        """The task with its options."""
        return find_task(self.task).configured(self.task_options)

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
        return 0.0 if self.schedule == "constant" else self.epochs / 10

    @property
    def loss_options(self) -> dict[str, float]:
        """What the loss takes beside the targets, by name, with the values that None stands for."""
        own = OPTIONS_OF_LOSSES.get(self.loss, {})
        return {name: usual if getattr(self, name) is None else getattr(self, name) for name, usual in own.items()}

    @property
    def is_balanced(self) -> bool:
        """Whether classes of uneven size are made up for by weights or sampling, so that mean recall is what counts."""
        return self.class_weights != "none" or self.sampling == "balanced"

    @property
    def balancing(self) -> dict[str, Any]:
        """What of loss and sampling is off its default, as weights record it: their scores are of other priors."""
        names = ("class_weights", "sampling", "loss", *(name for own in OPTIONS_OF_LOSSES.values() for name in own))
        return {name: value for name, value in self.resolved().items() if name in names}

    @property
    def validation_batch_size(self) -> int:
        """Images of a validation step: no gradients are kept, so twice as many fit; of maps as many, for their size."""
        return self.batch_size if self.purpose.is_dense else 2 * self.batch_size

    @property
    def preprocessing(self) -> Preprocessing:
        """What validation images go through, and every image the trained model will see."""
        said = {"crop_mode": self.crop_mode, "interpolation": self.interpolation}
        given: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
        made = Preprocessing(self.image_size, self.crop_ratio, white_level=self.white_level, **given)
        made = made.for_channels(self.in_chans)
        mean, std = (
            own if said is None else given_per_channel(said, self.in_chans)
            for said, own in ((self.mean, made.mean), (self.std, made.std))
        )
        pad = None if self.pad_value is None else given_per_channel(self.pad_value, self.in_chans)
        return replace(made, mean=mean, std=std, pad_value=pad)

    def resolved(self) -> dict[str, Any]:
        """Everything, with the values that None stands for, for people to read."""
        return {
            **self.to_dict(),
            **self.loss_options,
            "learning_rate": self.resolved_learning_rate,
            "final_learning_rate": self.resolved_final_rate,
            "warmup_epochs": self.resolved_warmup_epochs,
            "images_per_step": self.images_per_step,
        }
