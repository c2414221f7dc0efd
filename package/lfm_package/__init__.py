"""From a bundle to what is carried to a device. Standard library and the runtime only."""
