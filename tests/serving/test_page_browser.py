"""The endpoint's page in a headless Chromium: a picture's classes, a text file's error, phones, dark mode.

A page around it, of the same origin, holds it in a frame of the wanted width and gives files to its input as a person
does. An image that the server holds back until the results are there keeps the browser waiting.
"""

import asyncio
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cnx_deploy as cnx
from tests.support.chromium import BROWSER, DARK, visit
from tests.support.http_server import Server, running

pytest.importorskip("starlette")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed: scripts/browser installs Debian's"),
]

CHECKS = (Path(__file__).parents[1] / "support" / "html_layout.js").read_text(encoding="utf-8")
NAMES = (
    "red fox",
    "a-name-without-end-" * 6,
    "<b>bold</b>",
    "tabby cat",
    "pelican",
    "canoe",
    "kelpie",
    "lemon",
    "ox",
    "pie",
)
AROUND = """<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<style>body {{ margin: 0; }}</style>
<iframe src="/framed" style="width: {width}px; height: 1000px; border: 0"></iframe><img src="/wait" alt="">
<script>
const sleep = milliseconds => new Promise(done => setTimeout(done, milliseconds));
async function until(what) {{ for (let turn = 0; turn < 600 && !what(); turn++) await sleep(50); }}
document.querySelector("iframe").onload = async () => {{
  const window = document.querySelector("iframe").contentWindow;
  let found;
  try {{ found = await (async (window, document) => {{ {script} }})(window, window.document); }}
  catch (problem) {{ found = String(problem); }}
  await fetch("/found", {{method: "POST", body: JSON.stringify(found === undefined ? null : found)}});
}};
async function choose(document, name) {{
  const files = new DataTransfer();
  files.items.add(new File([await (await fetch("/file/" + name)).blob()], name));
  const input = document.getElementById("file");
  input.files = files.files;
  input.dispatchEvent(new Event("change"));
  await until(() => document.getElementById("status").textContent.includes(name)
    || !document.getElementById("wrong").hidden);
}}
function seen(document) {{
  const text = id => document.getElementById(id).hidden ? null : document.getElementById(id).textContent;
  return {{
    classes: [...document.querySelectorAll("#classes .row")].map(row => [...row.children].map(one => one.textContent)),
    bars: [...document.querySelectorAll(".track div")].map(bar => bar.style.width),
    wrong: text("wrong"), status: text("status"), hint: text("hint"), name: text("name"),
    isDrawn: !document.getElementById("picture").hidden,
  }};
}}
</script>"""


@dataclass
class Stage:
    """The endpoint, and beside it what the page around it needs."""

    endpoint: Any
    files: dict[str, bytes]
    around: str = ""
    found: Any = None
    done: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from importlib import resources

        path, headers, body = scope["path"], [(b"content-type", b"text/html; charset=utf-8")], b""
        if path == "/around":
            self.done.clear()
            body = self.around.encode()
        elif path == "/framed":  # the page refuses to be framed; here it does not say so
            body = (resources.files("cnx_deploy.serving") / "page.html").read_bytes()
        elif path == "/wait":
            await asyncio.wait_for(self.done.wait(), 60)
            headers, body = [(b"content-type", b"image/svg+xml")], b'<svg xmlns="http://www.w3.org/2000/svg"/>'
        elif path == "/found":
            message = await receive()
            self.found = json.loads(message["body"])
            self.done.set()
        elif path.startswith("/file/"):
            headers, body = [(b"content-type", b"application/octet-stream")], self.files[path.removeprefix("/file/")]
        else:
            await self.endpoint(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def picture() -> bytes:
    rows, columns = np.mgrid[0:300, 0:400]
    pixels = np.stack([columns * 0.6, rows * 0.8, 255 - columns * 0.5], axis=-1).clip(0, 255).astype(np.uint8)
    pixels[80:200, 240:340] = (250, 200, 40)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words: dict[str, Any] = {"image_size": 128, "num_classes": 10, "batch": (1, 4, 8)}
    folder = tmp_path_factory.mktemp("page")
    return cnx.export("tiny-test", precision="fp32", outputs=("logits", "class-maps"), output_dir=folder, **words).path


@pytest.fixture(scope="module")
def stage(artifact: Path) -> Stage:
    from cnx_deploy.serving.endpoint import Endpoint, EndpointSpec

    files = {"photo.jpg": picture(), "notes.txt": b"no picture"}
    return Stage(Endpoint(EndpointSpec(artifact=artifact, model_options={"class_names": NAMES})), files)


@pytest.fixture(scope="module")
def server(stage: Stage) -> Iterator[Server]:
    with running(stage) as found:
        yield found
    stage.endpoint.close()


def run(stage: Stage, server: Server, script: str, width: int = 390, *flags: str, refused: int | None = None) -> Any:
    """What `script` returns in the frame. The console has to stay empty, but of the status of a refused request."""
    stage.around, stage.found = AROUND.format(width=width, script=script), "nothing came"
    visited = visit(f"http://127.0.0.1:{server.port}/around", "--dump-dom", "--window-size=1400,1000", *flags)
    assert [line for line in visited.console if f"responded with a status of {refused}" not in line] == []
    own = f"http://127.0.0.1:{server.port}/"
    assert [address for address in visited.addresses if not address.startswith((own, "blob:", "data:"))] == []
    return stage.found


def test_a_picture_gives_the_five_classes_that_predict_gives(stage: Stage, server: Server, artifact: Path) -> None:
    found = run(stage, server, 'await choose(document, "photo.jpg"); return seen(document);')
    with cnx.load(artifact, class_names=NAMES) as model:
        expected = model.predict(picture()).to_dict()["scores"]
    assert found["classes"] == [[score["name"], f"{100 * score['probability']:.1f} %"] for score in expected]
    assert len(found["bars"]) == 5
    assert (found["wrong"], found["isDrawn"], found["name"]) == (None, True, artifact.stem)
    assert found["status"].startswith("photo.jpg: ")


def test_a_text_file_gives_its_error_and_takes_the_earlier_answer_away(stage: Stage, server: Server) -> None:
    script = 'await choose(document, "photo.jpg"); await choose(document, "notes.txt"); return seen(document);'
    found = run(stage, server, script, refused=400)
    assert "cannot be read as an image" in found["wrong"]
    assert (found["classes"], found["isDrawn"]) == ([], False)


def test_a_class_that_is_chosen_shows_its_map(stage: Stage, server: Server) -> None:
    script = """
      const pixels = () => document.getElementById("picture").toDataURL();
      await choose(document, "photo.jpg");
      const plain = pixels();
      const buttons = () => document.querySelectorAll("#classes button");
      buttons()[1].click();
      const second = pixels();
      const pressed = [...buttons()].map(each => each.getAttribute("aria-pressed"));
      buttons()[1].click();
      return [plain === second, plain === pixels(), pressed, seen(document).hint !== null];
    """
    assert run(stage, server, script) == [False, True, ["false", "true", "false", "false", "false"], True]


@pytest.mark.parametrize("width", [320, 1280])
def test_nothing_is_wider_than_the_screen(stage: Stage, server: Server, width: int) -> None:
    script = f"{CHECKS} await choose(document, 'photo.jpg'); return widths();"
    assert run(stage, server, script, width) == {"inner": width, "scroll": width, "wide": [], "tall": []}


@pytest.mark.parametrize("flags", [(), (DARK,)], ids=["light", "dark"])
def test_text_is_legible_in_both_colour_schemes(stage: Stage, server: Server, flags: tuple[str, ...]) -> None:
    script = f"""{CHECKS} await choose(document, "photo.jpg");
      return [window.matchMedia("(prefers-color-scheme: dark)").matches, contrasts()];"""
    is_dark, found = run(stage, server, script, 390, *flags)
    assert is_dark == bool(flags)
    assert len(found) > 8
    assert [words for kind, ratio, words in found if kind == "text" and not ratio >= 4.5] == []


def test_the_page_itself_asks_for_nothing_and_lets_nothing_in(server: Server) -> None:
    visited = visit(f"http://127.0.0.1:{server.port}/", "--dump-dom")
    assert "Drop a picture here" in visited.output
    assert visited.console == ()
    assert visited.addresses == ()
    policy = server.get("/").headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")


def test_with_a_token_the_page_asks_for_it_and_takes_it(stage: Stage, server: Server) -> None:
    from dataclasses import replace

    from cnx_deploy.serving.endpoint import hashed_token

    script = """
      await choose(document, "photo.jpg");
      const before = seen(document), isAsked = !document.getElementById("asked").hidden;
      const token = document.getElementById("token");
      token.value = "correct-horse";
      token.form.requestSubmit();
      await until(() => document.querySelectorAll("#classes .row").length);
      return [before.wrong, isAsked, seen(document).classes.length];
    """
    open_spec = stage.endpoint.spec
    stage.endpoint.spec = replace(open_spec, token_sha256=hashed_token("correct-horse"))
    try:
        wrong, is_asked, classes = run(stage, server, script, refused=401)
    finally:
        stage.endpoint.spec = open_spec
    assert "asks for a token" in wrong
    assert (is_asked, classes) == (True, 5)
