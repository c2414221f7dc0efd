"""The `lfm-edge` command and those of its subcommands that run a model."""

from __future__ import annotations

import _thread
import signal
import time
from types import FrameType

_LATER_S = 0.02


def start() -> int:
    """Run this process's command line; as `cli.main`, and quiet too when Ctrl-C comes while modules load."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else a shell's `&` or nohup ignores it
        signal.signal(signal.SIGINT, _interrupt)
    try:
        from lfm_runtime.commands.cli import main

        return main()
    except KeyboardInterrupt:
        return 130


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C raises KeyboardInterrupt, but while a module loads a little later: libraries' own code would take it for
    an error of theirs ("initialization failed", "import numpy failed").
    """
    inner = frame
    while inner:
        if inner.f_code.co_filename.startswith("<frozen importlib."):
            _thread.start_new_thread(_again, (_thread.get_ident(),))
            return
        inner = inner.f_back
    signal.default_int_handler(number, frame)


def _again(main: int) -> None:
    time.sleep(_LATER_S)
    signal.pthread_kill(main, signal.SIGINT)  # unlike _thread.interrupt_main, it ends a wait
