"""What the device is: facts that choose how to run. Standard library and psutil only."""

from lfm_profiles.cores import default_threads

__all__ = ["default_threads"]
