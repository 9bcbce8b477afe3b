"""How different the channels of each block are: where the features of a network have collapsed.

`diversity.py CHECKPOINT ... --data digits --plot diversity.svg` prints a table with the checkpoints side by side, V1
and V2. Without --data the images are seeded and image-like, which tells networks apart but is no photograph.

The measure is the mean pair-wise cosine distance of Woo et al., "ConvNeXt V2", arXiv:2301.00808, section 4, figure 4:
for an activation of C channels, each flattened over space, 1/C² · Σᵢ Σⱼ (1 - cos(Xᵢ, Xⱼ)) / 2 over all pairs, i = j
included; an image at a time, averaged over images. The paper's figure is of "the high-dimensional features from each
layer", which are the 4C channels between a block's two linear layers; it does not say on which side of GRN. Both sides
are measured: `act` is what GELU gives, which V1 has as well, so the two are compared by it; `grn` is what GRN makes of
it; `output` is the block's own, of C channels. A cosine does not see a positive scale, so `act` and `grn` of a block
differ by GRN's beta and by channels that change their sign alone.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cnx_deploy.core.errors import CheckFailedError, CnxDeployError, InputError
from cnx_deploy.core.plotting import check_plot, save_svg
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data import ImageLike, evenly, find_images
from cnx_deploy.data.input_spec import InputSpec
from cnx_deploy.data.preprocessing import normalise
from cnx_deploy.model.checkpoint import load_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2

HEADS = {"act": "GELU", "grn": "GRN", "output": "output"}
"""The tensors of a block that are measured, in the order of the data; ConvNeXt V1 has no `grn`."""
BATCH = 4
"""Images run at once. The distance is an image's own, so this decides speed and memory alone."""


@dataclass(frozen=True, slots=True)
class TensorDiversity:
    """One tensor: `part` of HEADS of the block `block` (a torch module's name), means over images.

    `distance` in [0, 1] is 0 where all channels are alike up to a positive factor, and NaN where every image had zeros
    alone. `dead_share` in [0, 1] counts channels that are zero everywhere, which have no cosine and are left out.
    """

    block: str
    part: str
    channels: int
    images: int
    distance: float
    dead_share: float


def channel_distance(maps: Tensor) -> tuple[Tensor, Tensor]:
    """(N, positions, channels) -> (N,) mean pair-wise distance in float64, (N,) count of channels that are zero.

    All C² pairs count, those of a channel with itself included, as in the paper: C orthogonal channels have
    (1 - 1/C) / 2. The sum of all cosines is |Σᵢ Xᵢ/|Xᵢ||², so that no table of pairs is made. Zero channels are left
    out. The distance is NaN where there is no other, and where a value is NaN or infinite.
    """
    norms = torch.linalg.vector_norm(maps, dim=1, keepdim=True, dtype=torch.float64)  # (N, 1, C)
    alive = norms != 0  # NaN stays alive, and shows
    # In float64 the sum of C unit vectors loses nothing that float32 maps have.
    units = torch.where(alive, maps / norms.where(alive, 1.0), 0.0)  # (N, P, C)
    count = alive.sum(dim=(1, 2))  # (N,)
    cosines = units.sum(dim=2).square().sum(dim=1) / count.double().square()
    return (1.0 - cosines) / 2.0, maps.shape[2] - count


def measure_diversity(
    model: ConvNeXtV2, preprocessing: Preprocessing, batches: Iterable[Tensor]
) -> tuple[TensorDiversity, ...]:
    """Run the model in float32 over (N, S, S, 3) uint8 batches; every block's tensors in the order of the data.

    Raises InputError when there is no image, CheckFailedError for activations that are NaN or infinite.
    """
    kept: dict[tuple[str, str], list[Tensor]] = {}  # (block, part) -> batches of (distance, dead, channels), (N, 3)
    with ExitStack() as hooks, torch.inference_mode():
        for stage, blocks in enumerate(model.stage_blocks()):
            for index, block in enumerate(blocks):
                for part, module in (("act", block.act), ("grn", block.grn), ("output", block)):
                    if not isinstance(module, nn.Identity):  # in V1 nothing takes the place of GRN
                        key = (f"stages.{stage}.{index}", part)
                        kept[key] = []
                        hooks.callback(module.register_forward_hook(partial(_keep, key, kept[key])).remove)
        for pixels in batches:
            model.eval()(normalise(pixels, preprocessing))
    found = []
    for (name, part), rows in kept.items():
        if not rows:
            raise InputError("There is no image to measure on: --data has to name a folder that holds some.")
        distance, dead, channels = torch.cat(rows).unbind(dim=1)
        share = float((dead / channels).mean())
        found.append(TensorDiversity(name, part, int(channels[0]), len(distance), float(distance.nanmean()), share))
    return tuple(found)


def _keep(key: tuple[str, str], rows: list[Tensor], module: nn.Module, inputs: Any, output: Tensor) -> None:
    """Hidden tensors are (N, H, W, C), a block's output is (N, C, H, W)."""
    maps = output.flatten(2).mT if key[1] == "output" else output.flatten(1, 2)
    distance, dead = channel_distance(maps)
    if bool((~distance.isfinite() & (dead < maps.shape[2])).any()):
        raise CheckFailedError(
            f"{key[0]} ({key[1]}) gave values that are NaN or infinite: expected finite ones. cnx-deploy inspect "
            "shows whether the weights are."
        )
    rows.append(torch.stack([distance, dead, torch.full_like(distance, maps.shape[2])], dim=1))


Networks = Sequence[tuple[str, tuple[TensorDiversity, ...]]]
"""Checkpoints by name, in the order of the command line."""


def measured(path: Path, asked: argparse.Namespace) -> tuple[str, tuple[TensorDiversity, ...]]:
    """One checkpoint's name and tensors, on images that are prepared as that checkpoint has it."""
    name = "/".join(path.with_suffix("").parts[-2:])
    # No feature reads the head, so that any head will do, and files without one (pre-trained) are taken too.
    loaded = load_checkpoint(path, num_classes=1, reset_head=True)
    if not loaded.preprocessing:
        print(f"{name} says nothing of its images: ImageNet's mean and std are taken.", file=sys.stderr)
    preprocessing = loaded.preprocessing or Preprocessing()
    if asked.image_size is not None:
        preprocessing = replace(preprocessing, image_size=asked.image_size)
    images = ImageLike(asked.samples) if asked.data is None else find_images(asked.data)
    spec, chosen = (
        InputSpec("uint8", preprocessing.image_size, in_chans=preprocessing.in_chans),
        evenly(len(images), asked.samples),
    )
    batches = images.batches(preprocessing, spec, BATCH, chosen, leave_out_broken=True)
    found = measure_diversity(loaded.model, preprocessing, (batch.images for batch in batches))
    if batches.broken:
        reason = next(iter(batches.broken.values())).reason
        print(f"{len(batches.broken)} images cannot be read and are left out: {reason}", file=sys.stderr)
    print(f"{name} ({loaded.model.variant.name}), {found[0].images} images of {preprocessing.image_size} px")
    return name, found


def table(networks: Networks) -> Iterator[str]:
    """A row a block, the checkpoints side by side by their numbers; "nan" where every channel is zero."""
    columns = {
        f"{number} {head}": {each.block: each.distance for each in tensors if each.part == part}
        for number, (_, tensors) in enumerate(networks, start=1)
        for part, head in HEADS.items()
        if any(each.part == part for each in tensors)
    }
    yield f"{'block':12}" + "".join(f"{head:>10}" for head in columns)
    for block in dict.fromkeys(each.block for _, tensors in networks for each in tensors):
        cells = (column.get(block) for column in columns.values())
        yield f"{block:12}" + "".join(f"{'' if cell is None else f'{cell:.4f}':>10}" for cell in cells)
    means = (np.nanmean(list(column.values())) for column in columns.values())
    yield f"{'mean':12}" + "".join(f"{mean:>10.4f}" for mean in means)
    for name, tensors in networks:
        dead = [each for each in tensors if each.dead_share > 0]
        if dead:
            worst = max(dead, key=lambda each: each.dead_share)
            most = f"most in {worst.block} behind {HEADS[worst.part]} ({100 * worst.dead_share:.2f} %)"
            yield f"{name}: channels that are zero everywhere in {len(dead)} tensors, {most}"


def figure_of(networks: Networks) -> Any:
    """Diversity over depth from 0 (first block) to 1 (last), a line a checkpoint, after the paper's figure 4."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    figure.suptitle(f"Cosine distance of channels, {networks[0][1][0].images} images", x=0.01, ha="left", size=11)
    hidden, output = figure.subplots(1, 2, sharey=True)
    for number, (name, tensors) in enumerate(networks):
        for part, axes, line in (("act", hidden, "-o"), ("grn", hidden, ":"), ("output", output, "-o")):
            values = [each.distance for each in tensors if each.part == part]
            depth = [index / max(1, len(values) - 1) for index in range(len(values))]
            label = name if part == "act" else None
            axes.plot(depth, values, line, color=f"C{number}", label=label, linewidth=1.2, markersize=2.5)
    depth_label = "depth: first block 0, last block 1"
    hidden.set(title="hidden channels, after GELU (dotted: after GRN)", xlabel=depth_label)
    hidden.set(ylabel="mean pair-wise distance", ylim=(0.0, 1.08 * hidden.get_ylim()[1]))
    output.set(title="the block's output", xlabel=depth_label)
    hidden.legend(fontsize=7.5)
    return figure


def main() -> int:
    """Print the table; with --plot, draw it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--data", type=Path, help="folder or CSV file of images to measure on")
    parser.add_argument("--samples", type=int, default=64, help="images, at most [default: 64]")
    parser.add_argument("--image-size", type=int, help="side of the square image in pixels, a multiple of 32")
    parser.add_argument("--plot", type=Path, help="draw the distances into an SVG file")
    asked = parser.parse_args()
    if asked.samples < 1:
        parser.error(f"--samples is {asked.samples}: diversity is measured on at least one image")
    try:
        if asked.plot is not None:
            check_plot(asked.plot)
        networks = [measured(path, asked) for path in asked.checkpoints]
        for line in table(networks):
            print(line)
        if asked.plot is not None:
            save_svg(asked.plot, lambda: figure_of(networks))
    except CnxDeployError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
