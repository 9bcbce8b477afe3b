"""ConvNeXt V2 from PyTorch to verified ONNX files and FP16 TensorRT engines.

    import cnx_deploy as cnx

    onnx = cnx.export("atto", precision="fp16")
    report = cnx.verify(onnx)

The names below are handed on from `cnx_deploy.api` when they are asked for; importing the package loads nothing else.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cnx_deploy.api import (
        Model,
        VerifyReport,
        batch,
        benchmark,
        build_engine,
        check_package,
        evaluate,
        export,
        fit_temperature,
        fit_thresholds,
        headroom,
        inspect,
        load,
        package,
        predict,
        push,
        rescue,
        serve,
        train,
        verify,
    )
    from cnx_deploy.core.manifest import Artifact

__version__ = "0.1.0"

__all__ = [
    "Artifact",
    "Model",
    "VerifyReport",
    "batch",
    "benchmark",
    "build_engine",
    "check_package",
    "evaluate",
    "export",
    "fit_temperature",
    "fit_thresholds",
    "headroom",
    "inspect",
    "load",
    "package",
    "predict",
    "push",
    "rescue",
    "serve",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    if name == "Artifact":
        from cnx_deploy.core.manifest import Artifact

        return Artifact
    from cnx_deploy import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
