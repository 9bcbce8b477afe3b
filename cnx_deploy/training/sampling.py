"""Which images each process trains on in each step, in an order made from a seed.

A step's images are dealt to the processes by turns, so that several processes see in a step what one would; the last
step of an epoch takes what is left, and each image counts once.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from cnx_deploy.training.launch import Launch

__all__ = ["EpochBatches", "mixed_seed"]

ONE_PROCESS = Launch()


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Yields this process's batches of an epoch: lists of (index, augmentation seed).

    `batch_size` images a process; `accumulate` batches make a step of the optimiser. Every process yields the same
    number of batches, none empty: one that is left without an image in the last gets one that counts nothing, see
    `own_count`.
    """

    def __init__(
        self, count: int, batch_size: int, *, seed: int, accumulate: int = 1, launch: Launch = ONE_PROCESS
    ) -> None:
        self.count, self.seed, self.accumulate, self.launch = count, seed, accumulate, launch
        self.joint_size = batch_size * launch.processes
        self.epoch = 0

    @property
    def sampler(self) -> "EpochBatches":
        """Itself: where Lightning looks for a `set_epoch` to call."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0; Lightning calls this at the start of each."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.count // self.joint_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        order = torch.randperm(self.count, generator=generator).tolist()
        seeds = torch.randint(2**62, (self.count,), generator=generator).tolist()
        items = list(zip(order, seeds, strict=True))
        for start in range(0, self.count, self.joint_size):
            joint = items[start : start + self.joint_size]
            yield joint[self.launch.rank :: self.launch.processes] or joint[:1]

    def own_count(self, batch: int) -> int:
        """Images of this process's batch number `batch` that count: all, or none in place of an empty batch."""
        return len(range(self.launch.rank, self.joint_count(batch), self.launch.processes))

    def step_count(self, batch: int) -> int:
        """Images of all processes in the step of the optimiser that batch number `batch` belongs to."""
        first = batch - batch % self.accumulate
        return sum(self.joint_count(at) for at in range(first, min(first + self.accumulate, len(self))))

    def joint_count(self, batch: int) -> int:
        """Images of all processes in batch number `batch`."""
        return min(self.joint_size, self.count - batch * self.joint_size)


def mixed_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers, unlike for (0, 1) and (1, 0)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
