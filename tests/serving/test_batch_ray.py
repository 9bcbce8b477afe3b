"""Batches on Ray Data: equal to those of one process row for row, whatever is killed; and what is refused."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

import cnx_deploy as cnx
from cnx_deploy.core.errors import InputError, MissingRequirementError
from tests.support.batches import rows_of, write_tar
from tests.support.ray_kills import BROKEN, IMAGES, PART_SIZE, PARTS, KillCluster, ten_of_each

pytest.importorskip("ray", reason="Ray is in an environment of its own")

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),
    # Of Ray's own code.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with KillCluster(tmp_path_factory.mktemp("ray")).running() as started:
        yield started


@pytest.mark.parametrize("kinds", [("worker", "before", "after"), ("node",), ("driver",)], ids="+".join)
def test_kills_lose_no_row_and_double_none(cluster, kinds):
    outcome = cluster.run(list(zip(kinds, range(5, PARTS, 10), strict=False)))
    assert outcome.killed == dict.fromkeys(kinds, 1)
    assert (outcome.lost, outcome.doubled, outcome.errors) == (0, 0, len(BROKEN))
    assert outcome.equals_undisturbed


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_kills_of_each_kind_lose_no_row_and_double_none(cluster):
    killed = Counter()
    for kills in ten_of_each():
        outcome = cluster.run(kills)
        killed += Counter(outcome.killed)
        assert (outcome.lost, outcome.doubled, outcome.equals_undisturbed) == (0, 0, True), kills
    assert killed == dict.fromkeys(("worker", "before", "after", "driver", "node"), 10)


def test_either_engine_goes_on_with_what_the_other_began(cluster, tmp_path):
    out, options = tmp_path / "out", {"part_size": PART_SIZE}
    for engine in ("local", "ray", "local"):
        result = cluster.batch(out, 2) if engine == "ray" else cnx.batch(cluster.model, cluster.images, out, **options)
        assert rows_of(out) == cluster.expected
        assert (result.rows, result.errors, result.engine) == (IMAGES, len(BROKEN), engine)
        for number in range(0, PARTS, 2):
            (out / f"rows/part-{number:06}.parquet").unlink()
    assert result.done == 63


def test_a_cluster_without_room_for_the_actors_and_two_more_is_refused(cluster, tmp_path):
    with pytest.raises(MissingRequirementError, match=r"5 actors .* are 7, and the cluster has 6.*--actors 4"):
        cluster.batch(tmp_path / "out", 5)
    options = {"engine": "ray", "address": cluster.cluster.address, "gpus_per_actor": 0.5}
    with pytest.raises(MissingRequirementError, match=r"GPUs each are 0.5, and the cluster has 0"):
        cnx.batch(cluster.model, cluster.images, tmp_path / "out", **options)
    assert not list((tmp_path / "out/rows").glob("*.parquet"))


def test_an_error_in_an_actor_is_told_as_it_would_be_here(cluster, tmp_path):
    options = {"engine": "ray", "actors": 1, "address": cluster.cluster.address}
    with pytest.raises(InputError, match="gives logits, and not embedding"):
        cnx.batch(cluster.model, cluster.images, tmp_path / "out", keep=("embedding",), **options)


def test_the_command_starts_ray_by_itself_and_stops_it(cluster, tmp_path):
    contents = [path.read_bytes() for path in sorted(cluster.images.iterdir())]
    tar = write_tar(tmp_path / "images.tar", contents[:20])
    words = ["batch", cluster.model, tar, "--to", tmp_path / "out", "--engine", "ray", "--actors", "1", "--json"]
    command = [sys.executable, "-m", "tests.support.batch_command", *map(str, words)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_TMPDIR"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, env=environment)
    assert done.returncode == 3, done.stderr
    document = json.loads(done.stdout)
    assert (document["rows"], document["errors"], document["engine"]) == (20, 1, "ray")
    answers = [(row["error"] is None, row["top_probabilities"]) for row in rows_of(tmp_path / "out")]
    assert answers == [(row["error"] is None, row["top_probabilities"]) for row in cluster.expected[:20]]
