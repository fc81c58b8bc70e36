"""Turns Ctrl-C and SIGTERM into a request to stop at the next good moment."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any


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
    """In its `with` block SIGINT and SIGTERM set `received` and call `wake`; a second signal acts as it would outside.

    Parameters
    ----------
    wake : callable
        Called in the signal handler, to cut a wait short. It may raise.
    """

    def __init__(self, wake: Callable[[], None]):
        self.received: signal.Signals | None = None
        self._wake = wake
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "SignalGuard":
        """Take over the signals; only the main thread can, elsewhere they are left alone."""
        for number in (signal.SIGINT, signal.SIGTERM):
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
        self.received = signal.Signals(number)
        self.__exit__()
        self._wake()
