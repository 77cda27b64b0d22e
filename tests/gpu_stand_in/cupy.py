"""What programs import as CuPy where PYTHONPATH names this folder: the stand-in for it."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from stand_in_cupy import StandIn

module = StandIn()
module.__spec__ = __spec__
# Peers and twins would look for a real GPU.
sys.modules |= {__name__: module} | dict.fromkeys(("torch", "diffusers", "numba_cuda", "cudnn"))
