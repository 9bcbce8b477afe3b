"""What every stage asks of a task, and the table of tasks.

A task is one subclass of `Task` and one call of `register_task`. Export, engines, comparison, benchmark and prediction
read the table and know no task by name: a manifest and a checkpoint's header name theirs.
"""

import copy
import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.gates import Gate, OutputSpec
from cnx_deploy.core.image_size import STRIDE, ImageSize, canonical_size, sides, size_text, stage_sides
from cnx_deploy.core.strict_json import typed
from cnx_deploy.core.variants import Variant

if TYPE_CHECKING:
    from cnx_deploy.core.deploy_spec import DeploySpec
    from cnx_deploy.core.preprocessing import BrokenImage
    from cnx_deploy.model.convnextv2 import ConvNeXtV2

__all__ = [
    "Metrics", "Outputs", "Place", "Prediction", "Task", "all_finite", "find_task", "joined", "named_outputs",
    "network_outputs", "register_task", "sole_or_named", "task_names",
]  # fmt: skip

Outputs = dict[str, Tensor]
"""What a network gives: tensors (N, ...) by name, in the order of the task's `outputs`."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer to one image under the image's name; or, in `error`, why it could not be read."""

    path: str
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)

    def __str__(self) -> str:
        """The answer on one line, without the path."""
        return f"error: {self.error}" if self.error is not None else "no answer"


class Metrics(Protocol):
    """Sums over batches of labelled images."""

    count: int

    def add(self, outputs: Mapping[str, Tensor], targets: Any, paths: Sequence[str]) -> None:
        """Count finite outputs (N, ...) against their targets: (N, ...), or one for each image."""
        ...

    def result(self, classes: Sequence[str], broken: Sequence["BrokenImage"], notes: Sequence[str]) -> Any:
        """Give the metrics over the data's classes, with the images that could not be read and what was noted."""
        ...


class Place(Protocol):
    """Where a picture lies on its canvas: `data.preprocessing.Placement`."""

    @property
    def picture(self) -> tuple[int, int]:
        """Width and height of the picture."""
        ...

    @property
    def canvas(self) -> tuple[int, int]:
        """Width and height of the canvas."""
        ...

    def on_picture(self, maps: Tensor, mode: str = "bilinear") -> Tensor:
        """Maps (N, K, rows, columns) of the canvas -> (N, K, H, W) of the picture."""
        ...

    def boxes_of_picture(self, boxes: Tensor) -> Tensor:
        """Boxes (M, 4) xyxy of the canvas -> of the picture."""
        ...


class Task(ABC):
    """One task. A subclass sets the attributes and defines the abstract methods.

    `words` of a method are those of `DeploySpec.outputs`, some of `answers`; none means what the task gives by itself.
    The head is made of modules under names of its own in the network, both in the training form and in the deploy form.
    `keep_fp32` names them all together `head`.

    Attributes:
        name: the word in manifests and headers.
        answers: the words of `--output`, of which a deployment chooses; none where there is nothing to choose.
        levels: stages whose outputs the head reads, 0 to 3.
        operators: how many operators of the counted kinds (Gelu, LayerNormalization, ReduceSum, AveragePool) the head
            adds to the exported graph; "epsilon" counts those that are added outside of a LayerNormalization, and
            "ChannelsFirstNorm" the norms over channels, which the "gpu" layout spells out.
        config: sizes and constants of the task's own, a frozen dataclass whose defaults are the usual values; None
            where there are none.
        conventions: values of `config` that a toolbox's weights are made for, by its name in `model.layouts.HEADS`.
        class_layers: paths of the modules that depend on the classes: `--reset-head` draws them anew.
        draws_own_weights: its modules are made with initial weights of their own, other than the backbone's kind.
        behind_a_choice: modules of the deploy form that run on what was chosen among candidates. The order of that is
            no place, so that their outputs are not compared value by value.
        is_dense: the answer is for places of an image. Images have one size, the canvas, because GRN sums over padding.
        has_classes: there is a number of classes; without, it is 0.
        class_output: the output of class scores (N, num_classes), which labels are compared with; None without any.
        allows_flip: an image and its left-right mirror have the same answer, so that their outputs can be averaged.
        allows_temperature: the class scores are logits, and `deployed_modules` folds a temperature into them.
        prediction: the type of an answer, made with `path` and `error` for an image that cannot be read.
        targets: what an image is compared with: "class", "label-sets" (any number of labels, (N, num_classes) of 0 and
            1), "masks" (a class for each pixel, (N, H, W)) or "instances" (objects, a list of dictionaries).
        losses: words of `--loss` that the task is trained with; none where there is nothing to choose.
        training_defaults: fields of a training request that stand otherwise than for a classifier.
        thresholds: the probability from which each class is given, of a task that decides each by itself; None unset.
        usual_batch: the batches of a file where nobody says: smallest, typical, largest.
        usual_top: how many classes `predict` tells of an image where nobody says.
    """

    name: str
    answers: tuple[str, ...] = ()
    levels: tuple[int, ...] = (3,)
    operators: Mapping[str, int] = MappingProxyType({})
    config: Any = None
    conventions: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    class_layers: tuple[str, ...] = ("head",)
    draws_own_weights: bool = False
    behind_a_choice: tuple[str, ...] = ()
    is_dense: bool = False
    has_classes: bool = True
    class_output: str | None = None
    allows_flip: bool = False
    allows_temperature: bool = False
    prediction: type[Prediction] = Prediction
    targets: str = "class"
    losses: tuple[str, ...] = ()
    training_defaults: Mapping[str, Any] = MappingProxyType({})
    thresholds: tuple[float, ...] | None = None
    usual_batch: tuple[int, int, int] = (1, 8, 64)
    usual_top: int = 5

    @abstractmethod
    def outputs(
        self, num_classes: int, words: Sequence[str] = (), maps: Sequence[tuple[int, int, int]] = ()
    ) -> tuple[OutputSpec, ...]:
        """Declare the outputs, in their order in the graph; `maps` are the shapes (C, H, W) of the stages' outputs."""

    @abstractmethod
    def modules(self, variant: Variant, num_classes: int) -> dict[str, nn.Module]:
        """Make the head of the training form: modules by the names that they have in a state dict."""

    def temper(self, network: Any) -> None:
        """Change weights that were all drawn at random where the answer would be chaos: by default nothing."""
        return

    @abstractmethod
    def forward(
        self, network: Any, maps: Mapping[int, Tensor], words: Sequence[str] = (), *, temperature: float = 1.0
    ) -> Outputs:
        """Run the modules of the training form, which `network` holds, on outputs of stages (N, C, H, W) by level.

        `temperature` is 1 unless the task `allows_temperature`.
        """

    def training_outputs(self, network: Any, maps: Mapping[int, Tensor]) -> Outputs:
        """What the loss reads, in training: the outputs, unless a head learns along that is not deployed."""
        return self.forward(network, maps)

    @abstractmethod
    def deployed_modules(self, model: "ConvNeXtV2", spec: "DeploySpec") -> dict[str, nn.Module]:
        """Make the head of the deploy form in float64, with the folds that `spec` asks for; it is rounded later."""

    @abstractmethod
    def deployed_forward(self, network: Any, maps: Mapping[int, Tensor], words: Sequence[str] = ()) -> Outputs:
        """Run the modules of the deploy form. Reductions are done in FP32, and outputs leave in FP32."""

    @abstractmethod
    def predictions(
        self, outputs: Mapping[str, Tensor], paths: Sequence[str], class_names: Sequence[str] | None, *, top: int
    ) -> list[Prediction]:
        """Turn finite outputs (N, ...) into an answer for each image; `top` limits how much of it is told."""

    def predictions_on_pictures(
        self, outputs: Mapping[str, Tensor], paths: Sequence[str], class_names: Sequence[str] | None,
        places: Sequence[Place], *, top: int,
    ) -> list[Prediction]:  # fmt: skip
        """The same of a dense task, in the pixels of each picture; `places` say where it lies on its canvas."""
        return self.predictions(outputs, paths, class_names, top=top)

    def check_image_size(self, size: ImageSize) -> None:
        """Raise InputError for a size of images that the task does not take: of a canvas sides that 32 divides."""
        if self.is_dense and any(side % STRIDE for side in sides(size)):
            height, width = (-(-side // STRIDE) * STRIDE for side in sides(size))
            raise InputError(
                f"The canvas {size_text(size)} of the task {self.name} has a side that {STRIDE} does not divide, so "
                "that maps of the stages would not lie on each other. Take multiples, such as "
                f"{size_text(canonical_size((height, width)))}."
            )

    def check_allowed(self, spec: "DeploySpec") -> None:
        """Raise InputError where a deployment asks for an answer that the task does not give."""
        self.check_image_size(spec.image_size)
        if self.is_dense and spec.size_range is not None:
            raise InputError(
                f"A network of the task {self.name} has one canvas: GRN sums over all of it, padding included, so that "
                "another size gives other features. Export for one image size."
            )
        if unknown := [word for word in spec.outputs if word not in self.answers]:
            known = f"expected {', '.join(self.answers)}" if self.answers else "there is nothing to choose"
            raise InputError(f"The task {self.name} has no output {', '.join(map(repr, unknown))}: {known}.")
        allowed = {"tta": self.allows_flip, "temperature": self.allows_temperature}
        if refused := [f"{name} {value}" for name, value in spec.answer.items() if not allowed[name]]:
            raise InputError(
                f"The task {self.name} does not allow {' and '.join(refused)}: its outputs would mean something else. "
                "Leave the option out."
            )

    def levels_of(self, words: Sequence[str]) -> tuple[int, ...]:
        """Stages whose outputs are read for these words."""
        return self.levels

    def operators_of(self, spec: "DeploySpec") -> Mapping[str, int]:
        """What the head adds to the graph of a deployment, as `operators` has it."""
        return self.operators

    def class_output_of(self, names: Collection[str]) -> str | None:
        """Which of these outputs has class scores that labels are compared with; None without any."""
        return self.class_output if self.class_output in names else None

    def gate(self, gate: Gate) -> Gate:
        """Return what the outputs are judged by, from the gate of their precision: by default that one."""
        return gate

    def loss(self, outputs: Mapping[str, Tensor], targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Return the loss of each image (N,). Raises InputError for a task that is not trained here.

        A subclass takes what its loss can do as further keywords: `class_weights` and `focal_gamma` of a classifier.
        """
        raise InputError(f"The task {self.name} has no loss, so that it cannot be trained.")

    def check_loss_takes(self, options: Iterable[str]) -> None:
        """Raise InputError for an option that the task's loss does not name among its keywords."""
        taken = inspect.signature(self.loss).parameters
        if unknown := [name for name in options if name not in taken]:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in unknown)
            raise InputError(
                f"The loss of the task {self.name} does not take {', '.join(unknown)}. Leave {flags} out, or add "
                "the keyword to its method loss."
            )

    def metrics(self, class_names: Sequence[str], each: Callable[[Any], None] | None = None) -> Metrics:
        """Begin to count labelled images; `each` is told every image's outcome. Raises InputError without metrics."""
        raise InputError(f"The task {self.name} has no metrics on images with class labels.")

    def with_thresholds(self, thresholds: Sequence[float] | None) -> "Task":
        """Return the task with a threshold for each class; itself for None. InputError where it has none."""
        if thresholds is None:
            return self
        raise InputError(f"The task {self.name} has no thresholds. Leave --thresholds (thresholds) out.")

    @property
    def takes_label_sets(self) -> bool:
        """An image has any number of labels."""
        return self.targets == "label-sets"

    @property
    def options(self) -> dict[str, Any]:
        """The fields of `config` that are not the usual ones, as plain types; `configured` takes them back."""
        if self.config is None:
            return {}
        usual, own = asdict(type(self.config)()), asdict(self.config)
        return {name: _plain(value) for name, value in own.items() if value != usual[name]}

    def configured(self, values: Mapping[str, Any]) -> Self:
        """Return the task with these fields of its `config`; itself without any. InputError for what it has not."""
        if not values:
            return self
        known = [] if self.config is None else [field.name for field in fields(self.config)]
        if unknown := [name for name in values if name not in known]:
            expected = f"expected {', '.join(known)}" if known else "there are none"
            raise InputError(f"The task {self.name} has no option {', '.join(map(repr, unknown))}: {expected}.")
        changed = copy.copy(self)
        try:
            changed.config = typed({**_plain(asdict(self.config)), **_plain(dict(values))}, type(self.config))
        except ValueError as error:
            given = ", ".join(f"{name}={value}" for name, value in values.items())
            raise InputError(f"The task {self.name} cannot take {given}: {error}.") from error
        return changed

    def fitted(self, state: Mapping[str, Tensor]) -> Self:
        """Return the task with what the shapes of a state dict tell of its `config`."""
        return self

    def trained_alone(self, network: Any) -> list[nn.Module]:
        """The modules that learn where the backbone is frozen."""
        return [network.get_submodule(name) for name in self.class_layers]

    def num_classes_in(self, state: Mapping[str, Tensor]) -> int | None:
        """Return the classes of the head in a state dict under the reference code's names; None without a head."""
        weight = state.get("head.weight")
        return weight.shape[0] if weight is not None and weight.ndim else None

    def own_state(self, state: dict[str, Tensor], variant: Variant) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """What the task takes of a checkpoint under the reference code's names, and what is to be said of the rest.

        A dense task takes the backbone of a classifier without its norm and head.
        """
        others = [name for name in state if name.startswith(("norm.", "head."))] if self.is_dense else []
        if not others:
            return state, ()
        kept = {name: tensor for name, tensor in state.items() if name not in others}
        return kept, (f"{len(others)} tensors of a classifier's norm and head are left out",)


BUILT_IN = {
    "classification": "cnx_deploy.model.tasks.classification",
    "detect": "cnx_deploy.model.tasks.detection",
    "features": "cnx_deploy.model.tasks.features",
    "foreign": "cnx_deploy.model.tasks.foreign",
    "multi-label": "cnx_deploy.model.tasks.multi_label",
    "segment": "cnx_deploy.model.tasks.segmentation",
}
"""Task -> the module that registers it."""

_TASKS: dict[str, Task] = {}


def register_task(task: Task) -> None:
    """Add a task, or replace the one of its name: from then on every stage takes it."""
    _TASKS[task.name] = task


def find_task(name: str) -> Task:
    """Return the task called `name`; InputError lists the names otherwise."""
    if name not in _TASKS and name in BUILT_IN:
        importlib.import_module(BUILT_IN[name])
    if name not in _TASKS:
        offered = ", ".join(task for task in task_names() if task != "foreign")  # that one is of rescued files alone
        raise InputError(f"No task is called {name!r}. Choose one of: {offered}.")
    return _TASKS[name]


def task_names() -> tuple[str, ...]:
    """Every task, built-in ones first."""
    return tuple(dict.fromkeys((*BUILT_IN, *_TASKS)))


def network_outputs(task: Task, variant: Variant, num_classes: int, spec: "DeploySpec") -> tuple[OutputSpec, ...]:
    """What a network gives in a deployment, as its task declares it; InputError for words that it has not."""
    task.check_allowed(spec)
    maps = [(width, *stage_sides(spec.image_size, level)) for level, width in enumerate(variant.dims)]
    return task.outputs(num_classes, spec.outputs, maps)


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON has them."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value


def sole_or_named(outputs: Outputs) -> Tensor | Outputs:
    """What a module's `forward` returns: the tensor of a network with one output, else all by name."""
    return next(iter(outputs.values())) if len(outputs) == 1 else outputs


def named_outputs(value: Tensor | Outputs, specs: Sequence[OutputSpec]) -> Outputs:
    """What `sole_or_named` took apart, by name again."""
    return {specs[0].name: value} if isinstance(value, Tensor) else value


def joined(batches: Sequence[Outputs]) -> Outputs:
    """The outputs of several batches as those of one."""
    return {name: torch.cat([outputs[name] for outputs in batches]) for name in batches[0]}


def all_finite(outputs: Mapping[str, Tensor]) -> Tensor:
    """(N,) bool: the images whose outputs hold numbers only."""
    finite = [torch.isfinite(tensor).flatten(1).all(dim=1) for tensor in outputs.values()]
    return torch.stack(finite).all(dim=0)
