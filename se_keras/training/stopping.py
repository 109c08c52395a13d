"""Signals that end a training: SIGINT and SIGTERM, after which everything is saved."""

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator

EXIT_SAVED = 75  # EX_TEMPFAIL of sysexits.h: the same command resumes
_PATIENCE = 10  # seconds for Python to handle a second signal


class Preempted(SystemExit):
    """SIGTERM arrived, and the training was saved. The process exits with status 75."""

    def __init__(self, message: str):
        super().__init__(EXIT_SAVED)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Stop:
    """A request to stop: `signal` is the first signal that Python handled, if any, and `handled` how many it did."""

    def __init__(self):
        self.signal: int | None = None
        self.handled = 0

    def exception(self, message: str) -> BaseException:
        """The exception to raise. A worker that stops because another worker did ends as after SIGTERM."""
        return KeyboardInterrupt(message) if self.signal == signal.SIGINT else Preempted(message)


@contextlib.contextmanager
def stop_requests() -> Iterator[Stop]:
    """Records the first SIGINT or SIGTERM in the `with` block; a second one has its usual effect.

    Python handles no signal while TensorFlow waits, for example for a machine that is gone. The process ends then, some
    seconds after the second one.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # other threads cannot handle signals
        return

    def record(number, _):
        stop.handled += 1
        if stop.signal is None:
            stop.signal = number
        else:
            restore()
            signal.raise_signal(number)

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, record) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with _ended_where_python_waits(stop):
            yield stop
    finally:
        restore()


@contextlib.contextmanager
def _ended_where_python_waits(stop: Stop) -> Iterator[None]:
    """Ends the process if Python does not handle a second signal: its C code writes each one to a pipe."""
    arrived, descriptor = os.pipe()
    os.set_blocking(descriptor, False)
    before = signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)

    def watch():
        signals = b""
        while more := os.read(arrived, 100):
            signals += bytes(number for number in more if number in (signal.SIGINT, signal.SIGTERM))
            # Whatever comes next, the end of the block or a signal, is a sign of life if Python has handled them.
            if len(signals) > 1 and not select.select([arrived], [], [], _PATIENCE)[0] and stop.handled < len(signals):
                print("The training waits for another program: ended by two signals", file=sys.stderr, flush=True)
                os._exit(128 + signals[-1])
        os.close(arrived)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(descriptor)
