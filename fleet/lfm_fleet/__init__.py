"""Many machines: the same question about more images than one machine can look at (Dask)."""

from lfm_fleet.program import Captioner, caption, captioner

__all__ = ["Captioner", "caption", "captioner"]
