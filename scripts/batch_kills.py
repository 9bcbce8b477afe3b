"""Kill workers, the driver, a node and actors at the rename under `cnx-deploy batch --engine ray`, ten times each.

    .venv-ray/bin/python scripts/batch_kills.py docs/data/batch-kills.json

Each run answers for 123 images, three of them broken, on a cluster of two nodes on this machine; its rows are compared
with those of one process without a kill. Exit code 3 where a row is lost, doubled or another, or a kill met nothing.
It takes about half an hour on two processors that others use too.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.conftest import TINY_TEST  # noqa: E402 - registered with it
from tests.support.ray_kills import IMAGES, PARTS, KillCluster, ten_of_each  # noqa: E402

KINDS = ("worker", "before", "after", "driver", "node")


def main() -> int:
    """Run the sweep and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("record", type=Path)
    asked = parser.parse_args()
    outcomes = []
    with tempfile.TemporaryDirectory() as folder, KillCluster(Path(folder)).running() as cluster:
        for kills in ten_of_each():
            outcomes.append(cluster.run(kills))
            print(outcomes[-1], flush=True)
    killed = sum((Counter(outcome.killed) for outcome in outcomes), Counter[str]())
    import ray

    record = {
        "what": "Kills under cnx-deploy batch --engine ray, each in the middle of the work; rows compared with those "
        "of one process without a kill. before and after: the rename of a file of rows.",
        "conditions": {
            "ray": ray.__version__, "processors": os.cpu_count(), "nodes": 2, "images": IMAGES, "parts": PARTS,
            "network": f"{TINY_TEST.name}, 32 px",
        },
        "killed": {kind: killed[kind] for kind in KINDS},
        "lost": sum(outcome.lost for outcome in outcomes),
        "doubled": sum(outcome.doubled for outcome in outcomes),
        "runs": [dataclasses.asdict(outcome) for outcome in outcomes],
    }  # fmt: skip
    asked.record.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    is_whole = all(outcome.equals_undisturbed for outcome in outcomes) and all(killed[kind] >= 10 for kind in KINDS)
    return 0 if is_whole else 3


if __name__ == "__main__":
    sys.exit(main())
