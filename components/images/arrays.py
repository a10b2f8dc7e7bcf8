"""What a decoded picture is in memory, said once for every room above."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

ImageArray = npt.NDArray[np.uint8]
"""8-bit pixels; a whole picture is (H, W, 3) RGB, a plane of it (H, W)."""
