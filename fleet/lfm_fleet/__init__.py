"""Many machines: the same question about more images than one machine can look at (Dask)."""
