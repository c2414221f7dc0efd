"""The `lfm-edge` command and those of its subcommands that run a model."""
