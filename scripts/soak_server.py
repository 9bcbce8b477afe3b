"""Does the endpoint grow? 10,000 requests by eight clients, good and bad: memory and open files of its replica.

Runs in .venv-ray. The slope is least squares over the second half, when caches are warm; exit code 3 where it is above
its limit, or where an answer is not the expected one.

    .venv-ray/bin/python scripts/soak_server.py --record docs/data/soak-server.json
"""

import argparse
import contextlib
import datetime
import http.client
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from compare_servers import children, ours, write_pictures

import cnx_deploy as cnx
from cnx_deploy.core.files import whole_file

MAX_KILOBYTES = 1.0
"""Growth of resident memory a request: 10 MB over 10,000."""
MAX_FILES = 0.001


def main() -> int:
    """Load it, print and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--record", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as held:
        folder = Path(name)
        made = cnx.export("atto", precision="fp32", input_kind="uint8", image_size=64, output_dir=folder / "export")
        pictures = write_pictures(folder / "pictures", 50)
        (port, _), pid = ours(held, made.path)
        replica = next(each for each in children(pid) if command_of(each).startswith("ray::ServeRepli"))
        found = soaked(port, replica, made.path.stem, pictures, asked.requests)
    document = {
        "date": datetime.date.today().isoformat(),
        "command": f"scripts/soak_server.py --requests {asked.requests}",
    }
    document |= found
    print(json.dumps(document, indent=2))
    if asked.record is not None:
        with whole_file(asked.record) as temporary:
            temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    grows = found["kilobytes_a_request"] > MAX_KILOBYTES or found["files_a_request"] > MAX_FILES
    return 3 if grows or found["unexpected"] else 0


def soaked(port: int, replica: int, model: str, pictures: list[bytes], count: int) -> dict[str, Any]:
    """How memory and open files of a process grow while it is asked so often."""
    requests: list[tuple[str, Any, dict[str, str], int]] = [
        ("/v1/classify", None, {}, 200),
        (f"/v2/models/{model}/infer", None, {"Inference-Header-Content-Length": "0"}, 200),
        ("/v1/classify", b"no picture", {}, 400),
        (f"/v2/models/{model}/infer", b'{"inputs": []}', {}, 400),
        ("/v2/models/other/infer", b"{}", {}, 404),
    ]
    numbers, lock = iter(range(count)), threading.Lock()
    seen, samples = Counter[str](), list[tuple[int, float, int]]()

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while True:
            with lock:
                number = next(numbers, None)
                if number is not None and number % 100 == 0:
                    samples.append((number, *resident_and_files(replica)))
            if number is None:
                connection.close()
                return
            # Three of four are pictures.
            path, body, headers, expected = requests[number % 2 if number % 4 else 2 + number // 4 % 3]
            connection.request("POST", path, body or pictures[number % len(pictures)], headers)
            answer = connection.getresponse()
            answer.read()
            seen[f"{answer.status}" if answer.status == expected else f"{answer.status} in place of {expected}"] += 1

    begun = time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    at, memory, files = (np.array(column, dtype=float) for column in zip(*samples, strict=True))
    half = len(at) // 2
    return {
        "requests": count,
        "seconds": round(time.perf_counter() - begun, 1),
        "statuses": dict(sorted(seen.items())),
        "unexpected": sum(number for status, number in seen.items() if "place" in status),
        "resident_mb": [round(float(memory[place]), 1) for place in (0, half, -1)],
        "files": [int(files[place]) for place in (0, half, -1)],
        "kilobytes_a_request": round(float(np.polyfit(at[half:], memory[half:] * 1e3, 1)[0]), 4),
        "files_a_request": round(float(np.polyfit(at[half:], files[half:], 1)[0]), 6),
    }


def resident_and_files(pid: int) -> tuple[float, int]:
    """Resident megabytes and open files of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - names alone


def command_of(pid: int) -> str:
    """What a process calls itself."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace")
    return ""


if __name__ == "__main__":
    sys.exit(main())
