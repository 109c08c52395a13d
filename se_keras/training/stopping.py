"""Signals that end a training: SIGINT and SIGTERM, after which everything is saved."""

import contextlib
import signal
import threading
from collections.abc import Iterator

EXIT_SAVED = 75  # EX_TEMPFAIL of sysexits.h: the same command resumes


class Preempted(SystemExit):
    """SIGTERM arrived, and the training was saved. The process exits with status 75."""

    def __init__(self, message: str):
        super().__init__(EXIT_SAVED)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Stop:
    """A request to stop: `signal` is the signal that arrived, if any."""

    def __init__(self):
        self.signal: int | None = None

    def exception(self, message: str) -> BaseException:
        """The exception to raise. A worker that stops because another worker did ends as after SIGTERM."""
        return KeyboardInterrupt(message) if self.signal == signal.SIGINT else Preempted(message)


@contextlib.contextmanager
def stop_requests() -> Iterator[Stop]:
    """Records the first SIGINT or SIGTERM in the `with` block; a second one has its usual effect."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # other threads cannot handle signals
        return

    def record(number, _):
        stop.signal = number
        restore()

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, record) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        restore()
