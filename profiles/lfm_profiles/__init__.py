"""What the device is: facts that choose how to run. Standard library and psutil only."""

from lfm_profiles.cores import default_threads
from lfm_profiles.cpu import cpu_features

__all__ = ["cpu_features", "default_threads"]
