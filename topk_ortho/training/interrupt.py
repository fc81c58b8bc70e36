"""Turns Ctrl-C, SIGTERM and the end of a terminal into a request to stop at the next good moment."""

import math
import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupted(Exception):
    """The run was asked to stop, and saved itself first.

    Parameters
    ----------
    number : signal.Signals
        The signal.
    step : int
        Steps done.
    """

    def __init__(self, number: signal.Signals, step: int):
        super().__init__(f"stopped by {number.name} at step {step}")
        self.exit_code = 128 + number


class SignalGuard:
    """In its `with` block SIGINT, SIGTERM and SIGHUP set `received` and call `wake`.

    A second signal acts as it would outside. A signal that the process was told to ignore, as by nohup, stays ignored.

    Parameters
    ----------
    wake : callable
        Called in the signal handler, to cut a wait short. It may raise.
    echo : float, default 0.0
        Seconds after the first signal in which others are taken for the same one: what a terminal has sent to all
        processes, torchrun passes on to them again.
    """

    def __init__(self, wake: Callable[[], None], echo: float = 0.0):
        self.received: signal.Signals | None = None
        self._echo = echo
        self._first = -math.inf
        self._wake = wake
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "SignalGuard":
        """Take over the signals; only the main thread can, elsewhere they are left alone."""
        for number in _SIGNALS:
            if signal.getsignal(number) is signal.SIG_IGN:
                continue
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:
                break
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._first = signal.Signals(number), time.monotonic()
            if self._echo == 0:
                self.__exit__()
            self._wake()
        elif time.monotonic() > self._first + self._echo:
            self.__exit__()
            os.kill(os.getpid(), number)
