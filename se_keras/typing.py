"""Types that many files share."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

FilePath = str | os.PathLike[str]
Array = npt.NDArray[Any]
Images = npt.NDArray[np.float32]  # (samples, height, width, channels)
Outputs = dict[str, Array]  # of a model by name, each (samples, ...)
ImageShape = tuple[int | None, ...]  # (height, width, channels); None where a size is free
OnMessage = Callable[[str], object]  # called with one line that says what comes next
Json = dict[str, Any]  # for json.dumps
