"""The `lfm-edge serve` command."""
