"""SVG files of plots: checked before the work, written whole or not at all, the same bytes for the same data.

matplotlib is the extra `report`; it is imported when something is drawn.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnx_deploy.core.errors import InputError, MissingRequirementError
from cnx_deploy.core.files import check_file, whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["check_plot", "save_svg"]


def check_plot(path: Path) -> None:
    """Raise, before anything is measured, InputError for another suffix, MissingRequirementError without matplotlib."""
    if path.suffix.lower() != ".svg":
        raise InputError(f"{path} is no name for a plot: expected the suffix .svg. Give another.")
    try:
        missing = importlib.util.find_spec("matplotlib") is None
    except ValueError:  # a module that was taken out of sys.modules by hand
        missing = True
    if missing:
        raise MissingRequirementError(
            "matplotlib is not installed, which draws the plot. Install it with pip install 'cnx-deploy[report]', or "
            "leave --plot out."
        )
    check_file(path)


def save_svg(path: Path, draw: "Callable[[], Figure]", style: dict[str, Any]) -> Path:
    """Write what `draw` makes under matplotlib's default style with `style` on top; see `check_plot` for errors."""
    check_plot(path)
    from matplotlib import style as styles

    with whole_file(path) as temporary, styles.context(["default", style]):
        draw().savefig(temporary, format="svg", metadata={"Date": None})
    return path
