"""Waiting for programs that may never answer."""

import threading
from collections.abc import Callable
from typing import Any


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """What `call` returns or raises. For calls that no signal interrupts, or that have no limit for the whole.

    It runs in a thread, which continues after the time and ends with the process.

    Raises:
        TimeoutError: If it has not ended after `seconds`.
    """
    returned, raised = [], []

    def run():
        try:
            returned.append(call())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not returned:
        raise TimeoutError(f"There was no end within {seconds:g} seconds")
    return returned[0]
