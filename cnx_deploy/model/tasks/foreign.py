"""A network that came as an ONNX file: it gives what its outputs are called, and nobody says what they mean."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.gates import OutputSpec
from cnx_deploy.core.variants import Variant
from cnx_deploy.model.tasks.base import Outputs, Prediction, Task, register_task

__all__ = ["Foreign", "ForeignPrediction"]


@dataclass(frozen=True, slots=True)
class ForeignPrediction(Prediction):
    """The outputs for one image: for each its shape, and the least, mean and largest of its values."""

    outputs: Mapping[str, tuple[tuple[int, ...], float, float, float]] | None = None

    def __str__(self) -> str:
        if self.outputs is None:
            return Prediction.__str__(self)
        told = (
            f"{name} {'x'.join(map(str, shape)) or 1}: {low:.4g} to {high:.4g}, mean {mean:.4g}"
            for name, (shape, low, mean, high) in self.outputs.items()
        )
        return ", ".join(told)


class Foreign(Task):
    """The task of a rescued file whose user named none; `model.recorded` has its outputs from the manifest."""

    name = "foreign"
    has_classes = False
    prediction = ForeignPrediction

    def outputs(
        self, num_classes: int, words: Sequence[str] = (), maps: Sequence[tuple[int, int, int]] = ()
    ) -> tuple[OutputSpec, ...]:
        """None are known without the file."""
        return ()

    def modules(self, variant: Variant, num_classes: int) -> dict[str, nn.Module]:
        """Refuse: there is no network in PyTorch."""
        raise InputError("The task foreign is of ONNX files that cnx-deploy rescue made. Choose classification.")

    def forward(
        self, network: Any, maps: Mapping[int, Tensor], words: Sequence[str] = (), *, temperature: float = 1.0
    ) -> Outputs:
        """Refuse, as `modules` does before."""
        raise NotImplementedError

    def deployed_modules(self, model: Any, spec: Any) -> dict[str, nn.Module]:
        """Refuse, as `modules` does before."""
        raise NotImplementedError

    def deployed_forward(self, network: Any, maps: Mapping[int, Tensor], words: Sequence[str] = ()) -> Outputs:
        """Refuse, as `modules` does before."""
        raise NotImplementedError

    def predictions(
        self, outputs: Mapping[str, Tensor], paths: Sequence[str], class_names: Sequence[str] | None, *, top: int
    ) -> list[Prediction]:
        """Shape and range of each output; `predict --save` keeps the values."""

        def summary(values: Tensor) -> tuple[tuple[int, ...], float, float, float]:
            wide = values.double()
            return tuple(values.shape), float(wide.min()), float(wide.mean()), float(wide.max())

        return [
            ForeignPrediction(path, outputs={name: summary(values[at]) for name, values in outputs.items()})
            for at, path in enumerate(paths)
        ]


register_task(Foreign())
