"""Turns Ctrl-C, SIGTERM and the end of a terminal into a request to stop at the next good moment."""

import signal
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
    """

    def __init__(self, wake: Callable[[], None]):
        self.received: signal.Signals | None = None
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
        self.received = signal.Signals(number)
        self.__exit__()
        self._wake()
