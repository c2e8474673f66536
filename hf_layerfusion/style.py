"""How all figures look. They need the extra `hf-layerfusion[plots]`.

Colours are those of Okabe and Ito (*Color Universal Design*, 2008), which everyone tells apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import LayerFusionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY_BLUE, VERMILION, BLACK = "#56B4E9", "#D55E00", "#000000"
# Of what is not data, and of data that stays in the background.
GREY, LIGHT_GREY = "#555555", "#888888"
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches, drawn without a display and without the state of `pyplot`.

    Raises:
        LayerFusionError: if matplotlib is not installed.
    """
    if not can_draw():
        raise LayerFusionError("figures need matplotlib: pip install 'hf-layerfusion[plots]'")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06)
    FigureCanvasAgg(figure)
    return figure
