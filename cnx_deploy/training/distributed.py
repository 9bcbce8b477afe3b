"""The processes that train together: which one this is, and which images it takes in each step.

A step's images are dealt to the processes by turns, so that several processes see in a step what one would. The last
step of an epoch takes what is left, and each image counts once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Sampler

from cnx_deploy.core.errors import InputError

__all__ = ["ONE_PROCESS", "EpochBatches", "Launch", "launch_from_environment", "mixed_seed"]

INTERACTIVE_JOBS = ("bash", "interactive")
"""Names of SLURM jobs in which a person types: their tasks are not processes of one run. Lightning has the same."""


@dataclass(frozen=True, slots=True)
class Launch:
    """This process is number `rank`, from 0, of `devices` a node on `nodes` nodes; one process has one device."""

    rank: int = 0
    devices: int = 1
    nodes: int = 1

    def __post_init__(self) -> None:
        if self.devices < 1 or self.nodes < 1 or not 0 <= self.rank < self.processes:
            raise InputError(
                f"Process {self.rank} of {self.devices} a node on {self.nodes} nodes cannot be: the rank must be below "
                "the number of processes. Start the run with torchrun or srun."
            )

    @property
    def processes(self) -> int:
        """Processes that train together."""
        return self.devices * self.nodes


ONE_PROCESS = Launch()


def launch_from_environment(environment: Mapping[str, str]) -> Launch:
    """Read what torchrun (RANK, WORLD_SIZE, LOCAL_WORLD_SIZE) or srun (SLURM_PROCID, …) set; else one process.

    Raises:
        InputError: The values do not add up, or nodes have different numbers of processes.
    """
    try:
        if int(environment.get("WORLD_SIZE", "1")) > 1:
            world, local = int(environment["WORLD_SIZE"]), int(environment["LOCAL_WORLD_SIZE"])
            rank = int(environment["RANK"])
        elif (
            int(environment.get("SLURM_NTASKS", "1")) > 1 and environment.get("SLURM_JOB_NAME") not in INTERACTIVE_JOBS
        ):
            world, nodes = int(environment["SLURM_NTASKS"]), int(environment.get("SLURM_NNODES", "1"))
            local, rank = world // nodes, int(environment["SLURM_PROCID"])
        else:
            return ONE_PROCESS
    except (KeyError, ValueError) as error:
        raise InputError(
            f"The environment says that several processes train, but {error} is missing or no number: expected those "
            "that torchrun or srun sets. Start the run with one of them."
        ) from error
    if local < 1 or world % local:
        raise InputError(
            f"{world} processes of {local} a node were started; every node must have as many as the others."
        )
    return Launch(rank, local, world // local)


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Yield this process's batches of an epoch as lists of (image index, augmentation seed).

    Every process yields the same number of batches, none of them empty. A process that is left without an image in
    the last batch gets one that counts nothing, see `own_count`.

    Args:
        count: Images of an epoch.
        batch_size: Images a process and batch.
        seed: Seed of the order and of the augmentation seeds.
        accumulate: Batches that make one step of the optimiser.
        launch: This process among those of the run.
        labels: The class of each image, where each class is to be drawn equally often; else each image once.
    """

    def __init__(
        self, count: int, batch_size: int, *, seed: int, accumulate: int = 1, launch: Launch = ONE_PROCESS,
        labels: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.count, self.seed, self.accumulate, self.launch = count, seed, accumulate, launch
        self.members: dict[int, list[int]] = {}
        for index, label in enumerate(labels or ()):
            self.members.setdefault(label, []).append(index)
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
        if self.members:
            drawn = self._balanced(generator)
            order = [drawn[at] for at in order]
        seeds = torch.randint(2**62, (self.count,), generator=generator).tolist()
        items = list(zip(order, seeds, strict=True))
        for start in range(0, self.count, self.joint_size):
            joint = items[start : start + self.joint_size]
            yield joint[self.launch.rank :: self.launch.processes] or joint[:1]

    def _balanced(self, generator: torch.Generator) -> list[int]:
        """Image indices, as many as the epoch has.

        Draws of two classes, and of two images of a class, differ by one at most.
        """
        often, more = divmod(self.count, len(self.members))
        lucky = set(torch.randperm(len(self.members), generator=generator)[:more].tolist())
        drawn = []
        for place, label in enumerate(sorted(self.members)):
            own, wanted = self.members[label], often + (place in lucky)
            for start in range(0, wanted, len(own)):
                some = torch.randperm(len(own), generator=generator)[: wanted - start].tolist()
                drawn += [own[at] for at in some]
        return drawn

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
    """One 63-bit seed from several numbers; (0, 1) and (1, 0) give different ones."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
