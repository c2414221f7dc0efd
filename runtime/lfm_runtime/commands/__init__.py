"""The `lfm-edge` command and those of its subcommands that run a model."""


def start() -> int:
    """Run this process's command line; as `cli.main`, and quiet too when Ctrl-C comes while modules load."""
    try:
        from lfm_runtime.commands.cli import main

        return main()
    except KeyboardInterrupt:
        return 130
