"""The decode loop: state carried from step to step, sampling, what contexts and caches keep."""
