"""Which of a run's processes this one is, as torchrun or SLURM started it."""

from collections.abc import Mapping
from dataclasses import dataclass

from cnx_deploy.core.errors import InputError

__all__ = ["Launch", "launch_from_environment"]


@dataclass(frozen=True, slots=True)
class Launch:
    """This process is number `rank`, from 0, of `devices` a node on `nodes` nodes; one process has one device."""

    rank: int = 0
    devices: int = 1
    nodes: int = 1

    def __post_init__(self) -> None:
        if self.devices < 1 or self.nodes < 1 or not 0 <= self.rank < self.processes:
            raise InputError(
                f"Process {self.rank} of {self.devices} a node on {self.nodes} nodes cannot be: expected a rank below "
                "the number of processes. Start the run with torchrun or srun."
            )

    @property
    def processes(self) -> int:
        """Processes that train together."""
        return self.devices * self.nodes


def launch_from_environment(environment: Mapping[str, str]) -> Launch:
    """Read what torchrun (RANK, WORLD_SIZE, LOCAL_WORLD_SIZE) or srun (SLURM_PROCID, …) set; else one process.

    Raises InputError when they do not add up, or nodes have different numbers of processes.
    """
    try:
        if int(environment.get("WORLD_SIZE", "1")) > 1:
            world, local = int(environment["WORLD_SIZE"]), int(environment["LOCAL_WORLD_SIZE"])
            rank = int(environment["RANK"])
        elif int(environment.get("SLURM_NTASKS", "1")) > 1 and environment.get("SLURM_JOB_NAME") not in (
            "bash",
            "interactive",
        ):
            world, nodes = int(environment["SLURM_NTASKS"]), int(environment.get("SLURM_NNODES", "1"))
            local, rank = world // nodes, int(environment["SLURM_PROCID"])
        else:
            return Launch()
    except (KeyError, ValueError) as error:
        raise InputError(
            f"The environment says that several processes train, but {error} is missing or no number: expected those "
            "that torchrun or srun sets. Start the run with one of them."
        ) from error
    if local < 1 or world % local:
        raise InputError(
            f"{world} processes of {local} a node were started: expected as many on every node. Start so many."
        )
    return Launch(rank, local, world // local)
