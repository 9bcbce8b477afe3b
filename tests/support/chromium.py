"""A headless Chromium for tests: how it lays out a page, what it writes to its console, what it asks the network for.

No driver and no protocol. The page stands in a frame of the wanted width, for a window is never narrower than 500 px;
a script around it measures, and what it found is read from `--dump-dom`. The page itself is as it was written.
"""

import base64
import contextlib
import html
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["BROWSER", "DARK", "Visit", "measured", "visit"]

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--enable-logging=stderr",
)  # fmt: skip
NO_NAMES = "--host-resolver-rules=MAP * ~NOTFOUND"
"""The browser's own services find no host either; what has a number for an address is still asked for, and seen."""
DARK = "--blink-settings=preferredColorScheme=0"
"""What `prefers-color-scheme` reads; 0 is dark."""
AROUND = """<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<iframe srcdoc="{page}" style="width: {width}px; height: 800px; border: 0"></iframe>
<script>
addEventListener("load", () => {{
  const window = document.querySelector("iframe").contentWindow;
  const found = ((window, document) => {{ {script} }})(window, window.document);
  const bytes = Array.from(new TextEncoder().encode(JSON.stringify(found)), byte => String.fromCharCode(byte));
  document.documentElement.textContent = "FOUND" + btoa(bytes.join("")) + "END";
}});
</script>"""


@dataclass(frozen=True, slots=True)
class Visit:
    """What became of one visit: standard output, lines of the page's console, addresses that a page asked for."""

    output: str
    console: tuple[str, ...]
    addresses: tuple[str, ...]


def visit(page: Path | str, *flags: str) -> Visit:
    """Open a file, or an address, with a profile of its own, which is thrown away."""
    with _folder() as folder:
        log = folder / "net.json"
        hosts = NO_NAMES if isinstance(page, Path) else f"{NO_NAMES}, EXCLUDE 127.0.0.1"
        own = (f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", hosts)
        command = [str(BROWSER), *FLAGS, *own, *flags, page.as_uri() if isinstance(page, Path) else page]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        console = tuple(line for line in done.stderr.splitlines() if ":CONSOLE" in line)
        return Visit(done.stdout, console, tuple(_addresses(json.loads(log.read_text(encoding="utf-8")))))


def measured(page: Path, script: str, width: int, *flags: str) -> Any:
    """What `script` returns, a function's body over the `window` and `document` of the page at a width in pixels."""
    with _folder() as folder:
        around = folder / "around.html"
        text = html.escape(page.read_text(encoding="utf-8"))
        around.write_text(AROUND.format(page=text, width=width, script=script), encoding="utf-8")
        seen = visit(around, "--dump-dom", f"--window-size={max(width + 40, 600)},900", *flags)
    assert seen.console == ()
    (encoded,) = re.findall(r"FOUND([A-Za-z0-9+/=]+)END", seen.output)
    return json.loads(base64.b64decode(encoded))


def _addresses(log: dict[str, Any]) -> Iterator[str]:
    """What was to be fetched for a document: the browser's own services are no origin. A local file is no request."""
    for event in log["events"]:
        parameters = event.get("params", {})
        if "url" in parameters and parameters.get("initiator", "not an origin") != "not an origin":
            yield str(parameters["url"])


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A temporary folder; what the browser's last processes still write there does not matter."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        yield Path(name)
