"""Compile our FP16 graph and the peers' with the same TensorRT-RTX and print kernels and MB an image of each.

usage: compare_traffic.py [VARIANT ...] [--batch 64] [--target sm89]      (default: atto)

The peers are timm's and transformers' models, `.half()`, exported by torch.onnx.export as they are.
"""

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from cnx_deploy.artifacts import ModelRecord, WeightsRecord
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.model.deploy import DeploySpec
from cnx_deploy.onnx_export import ExportSpec, export_onnx
from cnx_deploy.trt.backend import load_backend
from cnx_deploy.trt.compiled import measure_compiled
from cnx_deploy.variants import VARIANTS, find_variant


def main() -> int:
    """Print one line a variant and graph."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("variants", nargs="*", default=["atto"], metavar="VARIANT", help=", ".join(VARIANTS))
    arguments.add_argument("--batch", type=int, default=64)
    arguments.add_argument("--target", default="sm89")
    options = arguments.parse_args()
    backend = load_backend("tensorrt-rtx")
    print(f"{backend.name} {backend.version}, {options.target}, batch {options.batch}, FP16, 224 px")
    print(f"{'variant':8} {'graph':14} {'kernels':>8} {'MB an image':>12} {'of best peer':>13}")
    for name in options.variants:
        with tempfile.TemporaryDirectory() as folder:
            paths = {"timm": timm_file, "transformers": transformers_file, "cnx-deploy": own_file}
            found = {}
            for graph, export in paths.items():
                path = export(name, Path(folder))
                found[graph] = measure_compiled(path, batch=options.batch, target=options.target, backend=backend)
            best = min(found[graph].megabytes_per_image for graph in ("timm", "transformers"))
            for graph, compiled in found.items():
                megabytes = compiled.megabytes_per_image
                row = f"{len(compiled.kernels):>8} {megabytes:>12.1f} {megabytes / best:>13.3f}"
                print(f"{name:8} {graph:14} {row}", flush=True)
    return 0


def own_file(name: str, folder: Path) -> Path:
    """Our deploy form."""
    record = ModelRecord(name, 1000, 224, WeightsRecord("random", "0", "0" * 64, "none"), {})
    spec = ExportSpec(deploy=DeploySpec(precision="fp16"))
    return export_onnx(random_model(name), record, spec, folder)[0].path


def timm_file(name: str, folder: Path) -> Path:
    """The model of timm."""
    import timm

    return exported(timm.create_model(f"convnextv2_{name}"), folder / "timm.onnx")


def transformers_file(name: str, folder: Path) -> Path:
    """The model of transformers, its logits alone."""
    from transformers import ConvNextV2Config, ConvNextV2ForImageClassification

    variant = find_variant(name)
    config = ConvNextV2Config(depths=list(variant.depths), hidden_sizes=list(variant.dims), num_labels=1000)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = ConvNextV2ForImageClassification(config)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.model(images).logits

    return exported(Logits(), folder / "transformers.onnx")


def exported(model: torch.nn.Module, path: Path) -> Path:
    """Half precision, dynamic batch, the exporter's own defaults otherwise."""
    images = torch.zeros(2, 3, 224, 224, dtype=torch.float16)
    batch = torch.export.Dim("batch", min=1, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval().half(), (images,), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False
        )
    return path


if __name__ == "__main__":
    sys.exit(main())
