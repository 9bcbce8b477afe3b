"""Which images each process trains on, and how a launcher says which process this is; `test_runs` starts several."""

import pytest

from cnx_deploy.core.errors import InputError
from cnx_deploy.training import Launch, launch_from_environment
from cnx_deploy.training.distributed import EpochBatches


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [20, 21, 23])
def test_processes_share_every_image_once_in_as_many_batches(count, processes):
    shares = [EpochBatches(count, 4, seed=0, launch=Launch(rank, processes)) for rank in range(processes)]
    batches = [list(share) for share in shares]
    assert {len(dealt) for dealt in batches} == {len(shares[0])}
    counted = [
        index
        for share, dealt in zip(shares, batches, strict=True)
        for number, batch in enumerate(dealt)
        for index, _ in batch[: share.own_count(number)]
    ]
    assert sorted(counted) == list(range(count))
    assert all(batch for dealt in batches for batch in dealt)


def test_processes_see_in_a_step_what_one_would():
    alone = list(EpochBatches(20, 8, seed=0))
    together = [list(EpochBatches(20, 4, seed=0, launch=Launch(rank, 2))) for rank in range(2)]
    for number, batch in enumerate(alone):
        assert sorted(batch) == sorted(together[0][number] + together[1][number])


@pytest.mark.parametrize(("count", "expected"), [(20, [16, 16, 4]), (24, [16, 16, 8]), (17, [16, 16, 1])])
def test_a_steps_images_are_counted_over_its_batches_and_processes(count, expected):
    batches = EpochBatches(count, 4, seed=0, accumulate=2, launch=Launch(0, 2))
    assert [batches.step_count(number) for number in range(len(batches))] == expected


def test_the_sampler_draws_every_image_once_in_another_order_each_epoch():
    sampler = EpochBatches(20, 6, seed=0)

    def epoch(number: int) -> list[tuple[int, int]]:
        sampler.set_epoch(number)
        return [item for batch in sampler for item in batch]

    first, second = ([index for index, _ in epoch(number)] for number in (0, 1))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first not in (second, list(range(20)))
    assert epoch(0) == epoch(0)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch()),
        ({"WORLD_SIZE": "1", "RANK": "0"}, Launch()),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "5"}, Launch(5, 4, 2)),
        ({"SLURM_NTASKS": "6", "SLURM_NNODES": "3", "SLURM_PROCID": "4"}, Launch(4, 2, 3)),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, Launch()),
        ({"SLURM_NTASKS": "6", "SLURM_JOB_NAME": "bash"}, Launch()),
    ],
)
def test_the_launcher_is_read_from_the_environment(environment, expected):
    assert launch_from_environment(environment) == expected


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "x"},
        {"WORLD_SIZE": "5", "LOCAL_WORLD_SIZE": "2", "RANK": "0"},
        {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "2"},
    ],
    ids=str,
)
def test_an_environment_that_does_not_add_up_is_refused(environment):
    with pytest.raises(InputError, match=r"torchrun|as the others"):
        launch_from_environment(environment)
