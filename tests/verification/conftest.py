"""A network trained for a moment, images to calibrate on and judge by, and its INT8 file; each is made once a run."""

from pathlib import Path

import pytest
import torch

import cnx_deploy as cnx
from cnx_deploy.core.files import temporary_folder
from tests.support.eight_bits import SIZE, train_on_colours
from tests.support.training_data import write_colours


@pytest.fixture(scope="session")
def colours_and_weights(made_once: Path) -> tuple[Path, Path]:
    """80 images of two classes, and weights that tell them apart. Shared: do not change them."""
    folder, weights = made_once / "colours", made_once / "colours.safetensors"
    made_once.mkdir(exist_ok=True)
    with temporary_folder(folder) as working:  # of several worker processes one makes them
        if not weights.exists():
            write_colours(folder, train=24, val=40)
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            train_on_colours(folder / "train", working / weights.name).replace(weights)
            torch.set_num_threads(threads)
    return folder / "val", weights


@pytest.fixture(scope="session")
def eight_bit_words(colours_and_weights: tuple[Path, Path]) -> dict:
    """What `export` takes for a file in eight bits: 20 images to calibrate on, 60 to judge by."""
    images, weights = colours_and_weights
    return {"checkpoint": weights, "calibration": images, "samples": 20, "image_size": SIZE, "batch": (1, 4, 8)}


@pytest.fixture(scope="session")
def int8_file(eight_bit_words: dict, made_once: Path) -> cnx.Artifact:
    """The INT8 file, judged by all three gates. Shared: do not change it."""
    return cnx.export("narrow-test", precision="int8", output_dir=made_once / "int8", **eight_bit_words)
