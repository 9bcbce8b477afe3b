"""What every test of training shares: images that are learnt within a few steps, and one thread."""

import pytest
import torch

from tests.support.training_data import write_colours


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small only wait for a second thread, for seconds when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    """24 reddish and bluish images to train on and 8 for validation, 48 px. Shared: do not change it."""
    return write_colours(tmp_path_factory.mktemp("colours"), side=48)
