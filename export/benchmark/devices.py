"""What measurements on other devices share: a device that is lost, its temperature, and pauses until it is cool."""

import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from se_keras.timing import Blocks
from se_keras.typing import OnMessage
from se_keras.wording import counted

from .results import DeviceConditions

_MAX_WARMING = 3.0  # degrees Celsius by which a device may be warmer before a block than before the first one
_LONGEST_REST = 300  # seconds to wait for it to cool down


class DeviceLost(ConnectionError):
    """The device no longer answers."""


class Plan(Protocol):
    """The options of a target that say how many blocks there are, and how far apart."""

    @property
    def blocks(self) -> int:
        """Most blocks."""
        ...

    @property
    def rest(self) -> float:
        """Seconds between blocks."""
        ...

    @property
    def within(self) -> float | None:
        """Width of the interval that is enough, as in `timing.compare`."""
        ...

    @property
    def seconds(self) -> float | None:
        """Time that is enough, as in `timing.compare`."""
        ...


def warmest(readings: str) -> float | None:
    """Temperature of the warmest sensor, from those of /sys/class/thermal; None where none can be read."""
    degrees = [int(x) / 1000 for x in readings.split() if re.fullmatch(r"\d{4,6}", x)]
    return max((x for x in degrees if 10 < x < 120), default=None)


def check_rest(rest: float) -> None:
    """Raises ValueError unless `rest` is a number of seconds that can be waited."""
    if not 0 <= rest <= threading.TIMEOUT_MAX:
        raise ValueError(f"rest must be 0 seconds or more, and finite. Received: rest={rest!r}")


def measured_blocks(
    run_block: Callable[[], Mapping[str, float]],
    celsius: Callable[[], float | None],
    plan: Plan,
    device: str,
    progress: OnMessage,
) -> tuple[Blocks, DeviceConditions]:
    """Runs blocks on a device until they are enough, or until it is lost after two blocks or more.

    Args:
        run_block: Runs a block: the nanoseconds of each side.
        celsius: The temperature of the device.
        device: Its name, for `progress`.

    Returns:
        The blocks, and the conditions: the temperature before each block, and what is missing.

    Raises:
        DeviceLost: If the device is lost before two blocks.
    """
    found, degrees, missing = Blocks(within=plan.within, seconds=plan.seconds), [], None
    try:
        while len(found) < plan.blocks and not found.are_enough():
            progress(f"timing on {device}: block {len(found) + 1} of {plan.blocks}")
            _rest(celsius, degrees, plan.rest if len(found) else 0, device, progress)
            found.add(run_block())
    except DeviceLost as lost:
        if len(found) < 2:
            raise
        missing = f"{len(found)} of {counted(plan.blocks, 'block')}: {lost}"
    return found, DeviceConditions(celsius=tuple(degrees), missing=missing)


def _rest(celsius, degrees, seconds, device, progress):
    """Waits, longer while the device is warmer than before the first block."""
    time.sleep(seconds)
    now, until = celsius(), time.monotonic() + _LONGEST_REST
    while seconds and degrees and now is not None and now > degrees[0] + _MAX_WARMING and time.monotonic() < until:
        progress(f"waiting for {device} to cool down: {now:.1f} degrees Celsius, {degrees[0]:.1f} at first")
        time.sleep(seconds)
        now = celsius()
    if now is not None:
        degrees.append(now)
