"""How to run on which device: profiles as data, what the device is, which profile fits. Standard library and psutil
only.
"""

from lfm_profiles.choice import Choice, choose
from lfm_profiles.cores import default_threads, physical_cores
from lfm_profiles.cpu import adds_int8_in_16_bits, cpu_features
from lfm_profiles.device import Device, detect, now, this_device
from lfm_profiles.files import read, to_toml
from lfm_profiles.schema import Profile, ProfileError, changed, stepped_down, with_flags
from lfm_profiles.variants import FINEST, SMALLER, VARIANTS, Variant

__all__ = [
    "FINEST",
    "SMALLER",
    "VARIANTS",
    "Choice",
    "Device",
    "Profile",
    "ProfileError",
    "Variant",
    "adds_int8_in_16_bits",
    "changed",
    "choose",
    "cpu_features",
    "default_threads",
    "detect",
    "now",
    "physical_cores",
    "read",
    "stepped_down",
    "this_device",
    "to_toml",
    "with_flags",
]
