"""Names of the arrays that scenes are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]  # [H, W, 3], RGB
Field = NDArray[np.float32]  # [H, W], in [0, 1]
Matrix = NDArray[np.floating[Any]]  # [3, 3], maps (x, y, 1) in pixels
Polygon = NDArray[np.float64]  # [N, 2], (x, y) in units of the radius
Rng = np.random.Generator
