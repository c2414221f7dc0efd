"""Processes that are measured, and the machine while they run."""
