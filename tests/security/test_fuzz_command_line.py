"""Random words after every command: an exit code of the table and a message, never a traceback."""

import contextlib
import string
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnx_deploy.cli import COMMANDS, cli
from cnx_deploy.cli.options import DefaultGroup
from tests.support.lies import FEW, QUICK, run

CODES = {0, 1, 2, 3, 4, 5, 130}
GARBAGE = st.text(string.printable, max_size=12)
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
    st.sampled_from(["0", "-0", "1e309", "nan", "inf", "0x10", "1_0", "½", "1:8:64", "64:8:1", "::", ""]),
)
PATHS = st.sampled_from(
    ["corrupt.safetensors", "corrupt.onnx", "corrupt.json", "broken.png", "missing", "folder", ".", ""]
)
HEAVY = {"doctor", "variants"}
"""Without arguments they have nothing to refuse."""


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command and sub-command by the words it is called with."""
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        if isinstance(command, click.Group):
            if isinstance(command, DefaultGroup):
                yield name, command.default
            yield from ((f"{name} {part}", own) for part, own in command.commands.items())
        elif command is not None and name not in HEAVY:
            yield name, command


FUZZED = dict(commands())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """A folder with nothing in it that any command could work on for long."""
    made = tmp_path_factory.mktemp("fuzz")
    (made / "folder").mkdir()
    for name in ("corrupt.safetensors", "corrupt.onnx", "broken.png"):
        (made / name).write_bytes(b"\x08\x03 no such file")
    (made / "corrupt.json").write_text('{"schema_version": 1}')
    with contextlib.chdir(made):
        yield made


def values_of(parameter: click.Parameter) -> st.SearchStrategy[str]:
    kind = parameter.type
    if isinstance(kind, click.Choice):
        return st.one_of(st.sampled_from([str(choice) for choice in kind.choices]), GARBAGE)
    if isinstance(kind, click.Path):
        return PATHS
    return st.one_of(NUMBERS, GARBAGE) if kind.name != "text" else st.one_of(GARBAGE, NUMBERS)


@st.composite
def command_lines(draw: st.DrawFn, name: str) -> list[str]:
    """Words for one command. Its sources are always files that cannot be read, so no work begins."""
    words = name.split()
    for parameter in FUZZED[name].params:
        if isinstance(parameter, click.Argument):
            count = draw(st.integers(0, 2)) if parameter.nargs == -1 else 1
            words += [draw(PATHS) or "missing" for _ in range(count)]
        elif parameter.name in ("checkpoint", "init") and name in ("export", "train", "pretrain"):
            words += [parameter.opts[0], "corrupt.safetensors"]
        elif draw(st.booleans()):
            words.append(draw(st.sampled_from([*parameter.opts, *parameter.secondary_opts])))
            if not getattr(parameter, "is_flag", False):
                words.append(draw(values_of(parameter)))
    return [*words, *draw(st.lists(GARBAGE, max_size=1))]


def check(words: list[str]) -> None:
    before = {path.name for path in Path().iterdir()}
    code, said = run(*words)
    assert code in CODES
    assert "Traceback" not in said
    assert code == 0 or said.strip()
    made = {path.name for path in Path().iterdir()} - before - {"export", "engines", "runs"}
    assert made <= (set(words) if code == 0 else set()), made  # a page that was asked for under that name
    for name in made:
        Path(name).unlink()


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", FUZZED)
@FEW
@given(data=st.data())
def test_cli_fuzz(folder, name, data):
    check(data.draw(command_lines(name)))


@QUICK
@given(words=st.lists(st.one_of(GARBAGE, st.sampled_from(["-h", "--version", "--json", *COMMANDS])), max_size=3))
def test_cli_fuzz_without_a_command(folder, words):
    if not set(words) & {*HEAVY, "verify", "bench", "build-trt", "report"}:
        check(words)
