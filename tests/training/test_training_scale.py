"""Several processes, uneven batches, killed runs and broken states."""

import csv
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cnx_deploy.core.errors import CorruptArtifactError, DiskFullError, InputError
from cnx_deploy.training import Launch, Silence, TrainingSpec, launch_from_environment, train
from cnx_deploy.training.records import CONDITIONS
from cnx_deploy.training.run_folder import keep_state, usable_state
from cnx_deploy.training.sampling import EpochBatches
from tests.support.training_data import write_colours


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    return write_colours(tmp_path_factory.mktemp("colours"), train=13, val=5)


@pytest.fixture
def spec(colours, tiny_variant, tmp_path):
    return TrainingSpec(colours, tiny_variant, run_dir=tmp_path / "run", epochs=3, image_size=32, batch_size=8)


def table(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open() as stream:
        return [{k: v for k, v in row.items() if k not in CONDITIONS} for row in csv.DictReader(stream)]


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [20, 21, 23])
def test_processes_share_every_image_once_in_as_many_batches(count, processes):
    shares = [EpochBatches(count, 4, seed=0, launch=Launch(rank, processes)) for rank in range(processes)]
    batches = [list(share) for share in shares]
    assert len({len(each) for each in batches}) == 1
    assert len(batches[0]) == len(shares[0])
    counted = [
        index
        for share, each in zip(shares, batches, strict=True)
        for number, batch in enumerate(each)
        for index, _ in batch[: share.own_count(number)]
    ]
    assert sorted(counted) == list(range(count))
    assert all(batch for each in batches for batch in each)


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
    first = [item for batch in sampler for item in batch]
    sampler.set_epoch(1)
    second = [item for batch in sampler for item in batch]
    assert sorted(index for index, _ in first) == sorted(index for index, _ in second) == list(range(20))
    assert [index for index, _ in first] != [index for index, _ in second]
    assert [index for index, _ in first] != list(range(20))
    sampler.set_epoch(0)
    assert [item for batch in sampler for item in batch] == first


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
    [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "x"}, {"WORLD_SIZE": "5", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}],
    ids=str,
)
def test_an_environment_that_does_not_add_up_is_refused(environment):
    with pytest.raises(InputError, match="expected"):
        launch_from_environment(environment)


TWO_PROCESSES = """
import dataclasses, os, sys
from pathlib import Path
from cnx_deploy.training import TrainingSpec, launch_from_environment, train
from cnx_deploy.core.variants import Variant
variant = Variant("tiny-test", (1, 1, 2, 1), (8, 16, 32, 64), 138_104, 0.0)
launch = launch_from_environment(os.environ)
spec = TrainingSpec(Path(sys.argv[1]), variant, run_dir=Path(sys.argv[2]), epochs=3, image_size=32, optimizer="sgd",
                    learning_rate=0.05, batch_size=8 // launch.processes, accumulate=2, ema_decay=0.9, launch=launch)
train(spec)
"""


@pytest.mark.slow
def test_train_ddp_equals_single(colours, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command, name in (([sys.executable], "one"), (torchrun, "two")):
        words = [*command, str(script), str(colours), str(tmp_path / name)]
        subprocess.run(words, check=True, capture_output=True, env=environment, timeout=240)
    one, two = ({name: load_file(tmp_path / run / f"{name}.safetensors") for name in ("last", "last-ema")}
                for run in ("one", "two"))  # fmt: skip
    for name in one:
        assert max(float((one[name][key] - two[name][key]).abs().max()) for key in one[name]) < 1e-5
    for first, second in zip(table(tmp_path / "one"), table(tmp_path / "two"), strict=True):
        assert {k: float(v) for k, v in first.items()} == pytest.approx(
            {k: float(v) for k, v in second.items()}, rel=1e-4
        )


KILLED = """
import sys
from pathlib import Path
from cnx_deploy.training import Silence, TrainingSpec, train
from cnx_deploy.core.variants import Variant
class Tell(Silence):
    def step(self, report): print(report.epoch, flush=True)
variant = Variant("tiny-test", (1, 1, 2, 1), (8, 16, 32, 64), 138_104, 0.0)
spec = TrainingSpec(Path(sys.argv[1]), variant, run_dir=Path(sys.argv[2]), epochs=3, image_size=32, batch_size=8)
train(spec, progress=Tell())
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.03, 0.0])
def test_train_resume_exact_after_a_kill(spec, colours, tmp_path, delay):
    script = tmp_path / "train.py"
    script.write_text(KILLED)
    process = subprocess.Popen([sys.executable, script, colours, spec.run_dir], stdout=subprocess.PIPE, text=True)
    while process.stdout.readline().strip() != "2":
        assert process.poll() is None
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    resumed = train(dataclasses.replace(spec, resume=True))
    whole = train(dataclasses.replace(spec, run_dir=tmp_path / "whole"))
    assert resumed.epochs_run == 3
    assert table(resumed.run_dir) == table(whole.run_dir)


class StopAfter(Silence):
    """Raises after an epoch is written."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def end_epoch(self, record, is_best):
        if record.epoch == self.epoch:
            raise InterruptedError


@pytest.mark.parametrize(
    "damage", ["cut", *(pytest.param(each, marks=pytest.mark.slow) for each in ("flipped", "missing"))]
)
def test_train_resume_exact_a_broken_newest_state_gives_way(spec, tmp_path, damage):
    with pytest.raises(InterruptedError):
        train(spec, progress=StopAfter(2))
    state = spec.run_dir / "last.ckpt"
    content = bytearray(state.read_bytes())
    if damage == "missing":
        state.unlink()
    else:
        content[len(content) // 2] ^= 1
        state.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    assert usable_state(spec.run_dir).name == "previous.ckpt"
    started = []

    class Note(Silence):
        def begin(self, epochs, steps_per_epoch, epochs_done):
            started.append(epochs_done)

    resumed = train(dataclasses.replace(spec, resume=True), progress=Note())
    assert started == [1]
    assert table(resumed.run_dir) == table(train(dataclasses.replace(spec, run_dir=tmp_path / "whole")).run_dir)


def test_train_resume_exact_two_broken_states_are_one_error(spec):
    with pytest.raises(InterruptedError):
        train(spec, progress=StopAfter(1))
    for name in ("last.ckpt", "previous.ckpt"):
        (spec.run_dir / name).write_bytes(b"not a state")
    with pytest.raises(CorruptArtifactError, match=r"last.ckpt and previous.ckpt cannot be read whole"):
        train(dataclasses.replace(spec, resume=True))


def test_train_resume_exact_a_state_that_cannot_be_written(tmp_path):
    keep_state(tmp_path, lambda path: torch.save({"epoch": 1}, path))

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskFullError, match=r"last\.ckpt \(No space left on device\)"):
        keep_state(tmp_path, fail)
    assert torch.load(usable_state(tmp_path), weights_only=True) == {"epoch": 1}
