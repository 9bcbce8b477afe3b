"""Kernels compiled without a GPU: what their code uses, what a launch takes, and the record of all variants."""

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from cnx_deploy.core.errors import InputError, MissingRequirementError
from cnx_deploy.kernels import compiling, launch
from cnx_deploy.kernels.compiling import KernelImage, compile_kernel
from cnx_deploy.kernels.loading import SOURCE
from cnx_deploy.kernels.settings import (
    KERNELS,
    SHARED_BYTES,
    KernelName,
    LaunchSettings,
    candidate_settings,
    default_settings,
)

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "docs" / "data" / "kernels.json"
SPILLING = LaunchSettings(64, 0, 32, 4, 2)
"""A tile of `gained_mlp_residual` that four warps cannot hold at 320 channels."""


def compiled(kernel: KernelName, channels: int = 40, target: str = "sm89", **options: Any) -> KernelImage:
    return compile_kernel(kernel, channels, default_settings(kernel, channels, target), target=target, **options)


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """scripts/compile_kernels.py as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield importlib.import_module("compile_kernels")


@pytest.mark.parametrize(
    ("kernel", "arguments"),
    [
        ("norm_linear_gelu", "tokens_ptr weight_ptr bias_ptr hidden_ptr sums_ptr positions"),
        ("response_gain", "sums_ptr gamma_ptr gain_ptr tiles"),
        ("gained_linear_residual", "hidden_ptr gain_ptr weight_ptr bias_ptr residual_ptr out_ptr positions"),
        (
            "gained_mlp_residual",
            "tokens_ptr weight1_ptr bias1_ptr gain_ptr weight2_ptr bias2_ptr residual_ptr out_ptr positions",
        ),
    ],
)
def test_an_image_spills_nothing_and_says_what_a_launch_takes(kernel: KernelName, arguments: str) -> None:
    image = compiled(kernel)
    assert image.cubin.startswith(b"\x7fELF")
    assert image.entry == kernel
    assert image.arguments == (*arguments.split(), "global_scratch_ptr", "profile_scratch_ptr")
    assert (image.spills, 16 < image.registers < 256) == (0, True)
    assert image.shared_bytes <= SHARED_BYTES["sm89"]
    assert image.tensor_core == ("" if kernel == "response_gain" else "mma.sync")
    assert (image.tensor_core_count > 0) == (kernel != "response_gain")


def test_what_a_block_does_not_need_is_no_argument() -> None:
    first, second = compiled("norm_linear_gelu", store_hidden=False), compiled("gained_linear_residual", with_grn=False)
    assert "hidden_ptr" not in first.arguments
    assert "sums_ptr" in first.arguments
    assert "gain_ptr" not in second.arguments


def test_a_triton_that_appends_other_parameters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "SCRATCH", ("global_scratch_ptr",))
    with pytest.raises(MissingRequirementError, match="6 parameters and 0 bytes of scratch memory; expected 5"):
        compiled("response_gain", channels=24)


def test_hopper_multiplies_with_wgmma() -> None:
    assert compiled("norm_linear_gelu", target="sm90").tensor_core == "wgmma.mma_async"


def test_a_tile_that_spills_is_seen_to_spill() -> None:
    assert compile_kernel("gained_mlp_residual", 320, SPILLING).spills > 100


def test_an_image_holds_no_path_of_this_machine() -> None:
    cubin = compiled("norm_linear_gelu").cubin
    assert SOURCE.name.encode() not in cubin
    assert str(Path.home()).encode() not in cubin


def test_kernels_are_compiled_and_interpreted_in_turn_in_one_process() -> None:
    sums, gamma = torch.rand(1, 2, 160), torch.rand(160)
    before = launch.response_gain(sums, gamma)
    compiling.compile_kernel.cache_clear()
    assert compiled("response_gain", target="sm86").registers > 16
    assert torch.equal(launch.response_gain(sums, gamma), before)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Any]]:
    """Have CPU tensors taken for CUDA ones and each launch compiled for a target, as on that GPU, and not run.

    A launch makes a constant of the integer 1, and tells multiples of 16 apart, which `compile_kernel` does not.
    """

    def pretend(target: str) -> list[Any]:
        capability = int(target.removeprefix("sm"))
        driver = SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_current_device=lambda: capability,  # a number of its own: what is compiled is kept by device
            get_current_stream=lambda device: 0,
        )
        kernels: list[Any] = []
        run = JITFunction.run

        def warm_up(self: Any, *words: Any, grid: Any, warmup: bool, **more: Any) -> None:
            kernels.append(run(self, *words, grid=grid, warmup=True, **more))

        monkeypatch.setattr(triton.runtime.driver, "_active", driver)
        monkeypatch.setattr(JITFunction, "run", warm_up)
        monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        return kernels

    return pretend


def launch_all(channels: int, positions: int, tiles: Sequence[LaunchSettings]) -> None:
    """Call every kernel as the operator does, with and without what a block may lack."""
    shapes = ((1, positions, channels), (channels, 4 * channels), (4 * channels,))
    first = [torch.zeros(shape).half() for shape in shapes]
    hidden, sums = launch.norm_linear_gelu(*first, settings=tiles[0])
    launch.norm_linear_gelu(*first, settings=tiles[0], store_hidden=False)
    assert hidden is not None
    assert sums is not None
    gain = launch.response_gain(sums, torch.zeros(4 * channels))
    last = (first[1].t().contiguous(), first[2][:channels].clone(), first[0])
    for given in (gain, None):
        launch.gained_linear_residual(hidden, given, *last, settings=tiles[1])
        launch.gained_mlp_residual(*first, given, *last, settings=tiles[2])


def test_a_launch_calls_its_kernel_and_no_wrapper(
    launches: Callable[[str], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    launches("sm90")
    monkeypatch.setattr(torch.library, "wrap_triton", None)  # it would make a new wrapper, and keep it, at every launch
    calls: list[tuple[str, Any]] = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *words, grid, **more: calls.append((self.__name__, grid)))
    launch_all(40, 49, [LaunchSettings(16, 32, 16, 4, 2)] * 3)
    assert [name for name, _ in calls] == [
        "norm_linear_gelu", "norm_linear_gelu", "response_gain", *["gained_linear_residual", "gained_mlp_residual"] * 2,
    ]  # fmt: skip
    assert calls[0][1] == (5, 4, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "positions"), [(40, 3136), (160, 196), (320, 1)])
@pytest.mark.parametrize("target", SHARED_BYTES)
def test_what_a_launch_compiles_has_room(
    launches: Callable[[str], list[Any]], target: str, channels: int, positions: int
) -> None:
    kernels = launches(target)
    tiles = [default_settings(name, channels, target) for name in KERNELS if name != "response_gain"]
    launch_all(channels, positions, tiles)
    assert max(kernel.metadata.shared for kernel in kernels) <= SHARED_BYTES[target]


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(InputError, match="sm75"):
        compile_kernel("response_gain", 40, default_settings("response_gain", 40), target="sm75")


def test_the_script_ends_with_3_where_a_kernel_spills(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def chosen(kernel: KernelName, channels: int, target: str) -> tuple[LaunchSettings, ...]:
        return (SPILLING,) if kernel == "gained_mlp_residual" else ()

    monkeypatch.setattr(script, "candidate_settings", chosen)
    file = tmp_path / "kernels.json"
    words = ["compile_kernels.py", "--targets", "sm89", "--channels", "320", "--record", str(file)]
    monkeypatch.setattr(sys, "argv", words)
    assert script.main() == 3
    assert "spills" in capsys.readouterr().out
    (row,) = json.loads(file.read_text())["kernels"]
    assert row["spills"] > 100


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"spills": 8}, "spills 8 bytes"),
        ({"shared_bytes": 102_400}, "sm89 has 101376"),
        ({"tensor_core": ""}, "no tensor core"),
    ],
)
def test_the_script_names_a_fault(script: ModuleType, change: dict[str, object], reason: str | None) -> None:
    row = {"kernel": "norm_linear_gelu", "target": "sm89", "spills": 0, "shared_bytes": 1024, "tensor_core": "mma.sync"}
    report = script.fault(row | change)
    assert report is None if reason is None else reason in report


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "num_warps", "target", "resident"),
    [
        (128, 0, 4, "sm89", 16),  # registers: 65536 / (128 · 32)
        (72, 0, 4, "sm89", 28),
        (40, 0, 4, "sm89", 48),  # the limit of warps
        (40, 0, 4, "sm90", 48),
        (32, 0, 4, "sm90", 64),
        (32, 50 << 10, 4, "sm89", 4),  # shared memory: one block and its kilobyte
        (255, 0, 8, "sm80", 8),
    ],
)
def test_resident_warps_follow_from_what_is_used(
    script: ModuleType, registers: int, shared_bytes: int, num_warps: int, target: str, resident: int
) -> None:
    image = KernelImage("response_gain", b"", "", (), registers, shared_bytes, 0, num_warps, "", 0)
    assert script.resident_warps(image, target) == resident


def test_the_record_has_every_chosen_tile_and_none_with_a_fault(script: ModuleType) -> None:
    rows = json.loads(RECORD.read_text())["kernels"]
    recorded = {(row["kernel"], row["channels"], row["target"], settings_of(row), row["stores_hidden"]) for row in rows}
    assert recorded == set(script.jobs(list(SHARED_BYTES), script.WIDTHS, candidates=False))
    assert [script.fault(row) for row in rows] == [None] * len(rows)


def test_the_record_is_what_is_compiled(script: ModuleType) -> None:
    record = json.loads(RECORD.read_text())
    if record["triton"] != version("triton"):
        pytest.skip(f"recorded with Triton {record['triton']}")
    rows = [row for row in record["kernels"] if (row["channels"], row["target"]) == (40, "sm89")]
    assert len(rows) == 5
    for row in rows:
        job = (row["kernel"], row["channels"], row["target"], settings_of(row), row["stores_hidden"])
        assert script.compiled(job) == row


@pytest.mark.usefixtures("script")
def test_the_page_says_what_the_records_say(tmp_path: Path) -> None:
    tables = importlib.import_module("kernel_tables")
    assert tables.main(["--check"]) == 0
    (tmp_path / "data").mkdir()
    for name in ("kernels.md", "data/kernels.json", "data/kernel-errors.json"):
        (tmp_path / name).write_bytes((ROOT / "docs" / name).read_bytes())
    page = tmp_path / "kernels.md"
    page.write_text(page.read_text().replace("64×64×16, 4;", "64×64×16, 8;"), encoding="utf-8")
    assert tables.main(["--check", "--docs-dir", str(tmp_path)]) == 3
    assert tables.main(["--docs-dir", str(tmp_path)]) == 0
    assert page.read_bytes() == (ROOT / "docs" / "kernels.md").read_bytes()


def settings_of(row: dict[str, Any]) -> LaunchSettings:
    return LaunchSettings(*(row[name] for name in LaunchSettings.__dataclass_fields__))


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED_BYTES)
def test_no_candidate_spills(script: ModuleType, target: str) -> None:
    """Every tile that is offered for measuring, at the widths of atto, tiny and base."""
    for job in script.jobs([target], [40, 80, 96, 128, 160, 192, 320, 512, 1024], candidates=True):
        assert script.fault(script.compiled(job)) is None, job


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"channels_last": False}, {"with_grn": False}], ids=str)
def test_no_other_form_spills(options: dict[str, Any]) -> None:
    for kernel in KERNELS:
        for channels in (40, 96, 160, 352):
            if kernel == "response_gain" or not candidate_settings(kernel, channels):
                continue
            settings = default_settings(kernel, channels)
            if kernel == "gained_linear_residual" and not options.get("channels_last", True):
                settings = replace(settings, block_n=min(settings.block_n, 128), num_warps=8)
            image = compile_kernel(kernel, channels, settings, **options)
            assert (image.spills, image.tensor_core) == (0, "mma.sync"), (kernel, channels)


@pytest.mark.slow
def test_another_process_with_an_empty_cache_makes_the_same_bytes(tmp_path: Path) -> None:
    code = (
        "import hashlib; from cnx_deploy.kernels.compiling import compile_kernel as make; "
        "from cnx_deploy.kernels.settings import default_settings as tile; "
        "names = ('norm_linear_gelu', 'gained_mlp_residual'); "
        "print(*(hashlib.sha256(make(name, 40, tile(name, 40)).cubin).hexdigest() for name in names))"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path / folder)},
        ).stdout
        for folder in ("one", "two")
    }  # fmt: skip
    assert len(digests) == 1
