"""`sweep`: train a whole grid of heads in one pass over cached features, choose one, and train it again on all rows."""

from .result import SweepResult
from .ridge import solve_ridge
from .run import sweep
from .settings import GRIDS, Setting, expand_grid

__all__ = ["GRIDS", "Setting", "SweepResult", "expand_grid", "solve_ridge", "sweep"]
