"""One look for every plot of the project, and SVG files of them: the same bytes for the same data.

matplotlib is the extra `report`; it is imported when something is drawn.
"""

import importlib.util
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnx_deploy.core.errors import InputError, MissingRequirementError
from cnx_deploy.core.files import check_file, whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "GRID",
    "ORANGE",
    "PURPLE",
    "RED",
    "SKY",
    "STYLE",
    "check_plot",
    "require_packages",
    "save_svg",
    "svg_bytes",
]  # fmt: skip

BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
"""The colours of Okabe and Ito, which colour-blind readers tell apart. Each series has a marker of its own as well."""
GREY, GRID = "#555555", "#dddddd"
STYLE: dict[str, Any] = {
    # Ids from a fixed salt: the same data give the same bytes.
    "svg.hashsalt": "cnx-deploy",
    # Text stays text. Phones lack the first font; the second has its widths.
    "svg.fonttype": "none", "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Verdana"],
    "font.size": 9, "axes.titlesize": 9.5, "axes.titlelocation": "left", "legend.fontsize": 8.5,
    "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": GRID, "axes.axisbelow": True, "figure.facecolor": "white",
    "axes.prop_cycle": f"cycler('color', {[BLUE, ORANGE, GREEN, RED, PURPLE, SKY]})",
}  # fmt: skip
"""matplotlib's settings for every plot, on top of its default style."""


def require_packages(*names: str) -> None:
    """Raise MissingRequirementError where a package of the extra `report` is not installed."""
    for name in names:
        try:
            missing = importlib.util.find_spec(name) is None
        except ValueError:  # a module that was taken out of sys.modules by hand
            missing = True
        if missing:
            raise MissingRequirementError(
                f"{name} is not installed. Plots and pages need it: pip install 'cnx-deploy[report]'."
            )


def check_plot(path: Path) -> None:
    """Raise, before anything is measured, InputError for another suffix, MissingRequirementError without matplotlib."""
    if path.suffix.lower() != ".svg":
        raise InputError(f"{path} is no name for a plot: expected the suffix .svg.")
    require_packages("matplotlib")
    check_file(path)


def svg_bytes(draw: "Callable[[], Figure]", **settings: Any) -> bytes:
    """Return what `draw` makes under `STYLE` as an SVG document without a date; `settings` go on top of the style."""
    from matplotlib import style

    written = io.BytesIO()
    with style.context(["default", {**STYLE, **settings}]), warnings.catch_warnings():
        # The text is written as text: whether this machine's font has the letter does not matter.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        draw().savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()


def save_svg(path: Path, draw: "Callable[[], Figure]") -> Path:
    """Write what `draw` makes, whole or not at all; see `check_plot` for errors."""
    check_plot(path)
    with whole_file(path) as temporary:
        temporary.write_bytes(svg_bytes(draw))
    return path
