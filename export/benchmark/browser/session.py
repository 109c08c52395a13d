"""What the page in each browser and the command say to each other.

The threads of the server call the answers, the command calls the rest. One device measures at a time; others wait.
"""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypedDict

import numpy as np

from se_keras.timing import Blocks, Comparison, percentiles
from se_keras.typing import Array, Json, Outputs
from se_keras.wording import counted

from ..measuring import largest_difference
from ..sentences import interval, percent
from .facts import Facts, name_of, readable
from .server import Answer

REJOINING = 10.0  # seconds that a page has to come back after it was left, as by a reload
LONGEST_SILENCE = 300.0  # seconds: a phone that sleeps continues when it wakes up
_LONGEST_PAUSE = 90.0  # seconds without a word of a page that waits; in the background they speak once a minute
_MOST_DEVICES = 50
_MOST_STARTS = 3  # of a pair without a block between them


class _Numbered(TypedDict):
    device: int


class _Status(_Numbered):
    text: str


class _OfTask(_Numbered):
    task: int


class _Check(_OfTask):
    side: str
    outputs: dict[str, list[float | None]]


class _Ready(_OfTask):
    init_ms: list[float]
    first_ms: list[float]
    is_delegated: bool
    repeats: int
    heap_bytes: int
    adapter: str | None


class _Block(_OfTask):
    number: int
    times: dict[str, list[float]]


class _Failed(_OfTask):
    text: str


@dataclass(kw_only=True)
class Task:
    """A pair that a device measures.

    Args:
        plan: What the page gets: title, files, input, shape, accelerator, threads, blocks, runs.
        expected: Outputs of both files on this computer, `{"a": {name: array}, "b": ...}`.
        precision: Of the files; says how close outputs must be.
        limits: `within` and `seconds` of the blocks.
        allow_undelegated: Whether to time files with operators that are not delegated.
        blocks: Those measured so far.
        every: Nanoseconds of all runs of A and B.
        errors: How far the outputs of both files are from the expected ones, as a share of their range.
        setup: What the page said before it timed anything.
        refused: Why nothing was timed, or why no more blocks came; None if all is well.
    """

    plan: Json
    expected: dict[str, Outputs]
    precision: str
    limits: Json
    allow_undelegated: bool
    blocks: Blocks = field(default_factory=Blocks)
    every: dict[str, list[float]] = field(default_factory=lambda: {"a": [], "b": []})
    errors: dict[str, float] = field(default_factory=dict)
    setup: Json | None = None
    refused: str | None = None
    is_complete: bool = False
    starts: int = 0

    @property
    def is_over(self) -> bool:
        """Whether the device has nothing more to do."""
        return self.is_complete or self.refused is not None

    def comparison(self) -> Comparison:
        """The result of the blocks so far."""
        more = {side: percentiles(times) for side, times in self.every.items()}
        return self.blocks.comparison(runs=self.plan["runs"], **more)


@dataclass(kw_only=True)
class Device:
    """A page that is open in a browser.

    Args:
        facts: What the browser says of the device.
        number: 1, or more if devices of the same name came before.
        seen: When it last said something.
        left: Whether its page was closed.
        state: What it says that it does.
    """

    facts: Json
    number: int
    seen: float
    left: bool = False
    state: str = ""
    task: Task | None = None
    ending: str | None = None  # what its page shows at the end

    @property
    def name(self) -> str:
        """What it is."""
        return name_of(self.facts)


class Session:
    """The devices of one measurement. `answers` is the table for the server."""

    def __init__(self):
        self._changed = threading.Condition()
        self._devices: dict[int, Device] = {}
        self._turn: Device | None = None
        self.exports_since: float | None = None  # when the command began to export the next pair
        table: dict[str, tuple[Any, Callable[[Any], Json]]] = {
            "hello": (Facts, self._hello),
            "next": (_Numbered, self._next),
            "status": (_Status, self._status),
            "check": (_Check, self._check),
            "ready": (_Ready, self._ready),
            "block": (_Block, self._block),
            "failed": (_Failed, self._failed),
            "leave": (_Numbered, self._leave),
        }
        self.answers = {name: Answer(shape, self._locked(answer)) for name, (shape, answer) in table.items()}

    def is_waited_for(self) -> bool:
        """Whether a device waits for its turn."""
        return bool(self._waiting())

    def next_device(self) -> Device:
        """The device whose turn it is now: the one that came first of those that wait."""
        with self._changed:
            self._turn = self._waiting()[0]
            return self._turn

    def give(self, device: Device, task: Task) -> None:
        """Lets a device measure a pair."""
        with self._changed:
            device.task = task

    def is_gone(self, device: Device) -> bool:
        """Whether the page of a device was closed, or has not answered for long."""
        return time.monotonic() - device.seen > (REJOINING if device.left else LONGEST_SILENCE)

    def end(self, device: Device, text: str) -> None:
        """Ends the turn of a device; its page shows the text."""
        with self._changed:
            device.ending, device.task, self._turn = text, None, None

    def close(self, text: str) -> None:
        """Ends the turns of all devices that have none yet."""
        with self._changed:
            for device in self._devices.values():
                device.ending = device.ending or text

    def pause(self, seconds: float) -> None:
        """Waits until a page says something, at most some seconds."""
        with self._changed:
            self._changed.wait(seconds)

    def have_ended(self) -> bool:
        """Whether all pages that are open know the end."""
        return all(device.state == "ended" or device.left for device in self._devices.values())

    def _waiting(self):
        here = (x for x in list(self._devices.values()) if time.monotonic() - x.seen < _LONGEST_PAUSE)
        return [x for x in here if not (x.ending or x.left or x is self._turn)]

    def _locked(self, answer):
        def locked(value):
            with self._changed:
                if answer != self._hello:
                    device = self._devices.get(value["device"])
                    if device is None:
                        raise ValueError("This page is of an earlier measurement: open the new address")
                    device.seen = time.monotonic()
                    found = answer(device, value)
                else:
                    found = answer(value)
                self._changed.notify_all()
                return found

        return locked

    def _hello(self, facts):
        number, facts = facts.get("device"), readable(facts)
        known = self._devices.get(number)
        if known is None or known.facts["user_agent"] != facts["user_agent"]:
            if len(self._devices) >= _MOST_DEVICES:
                raise ValueError(f"At most {_MOST_DEVICES} devices measure in turn")
            number = len(self._devices) + 1
            same = sum(device.name == name_of(facts) for device in self._devices.values())
            self._devices[number] = known = Device(facts=facts, number=same + 1, seen=0.0)
        known.seen, known.left = time.monotonic(), False
        return {"device": number}

    def _next(self, device, value):
        if device.ending is not None:
            device.state = "ended"
            return {"what": "end", "text": device.ending}
        task = device.task
        if task is None or task.is_over:
            return {"what": "wait", "text": self._why(device)}
        task.starts += 1
        if task.starts > _MOST_STARTS:
            task.refused = f"the page began {_MOST_STARTS} times and was lost each time: is there too little memory?"
            return {"what": "wait", "text": self._why(device)}
        return {"what": "measure", "task": task.plan}

    def _why(self, device):
        """Why a device waits."""
        if self._turn is not None and device is not self._turn:
            return "Another device is measuring. This one comes after it: keep this page open."
        if self.exports_since is None:
            return "Your computer gets the files of the pair ready."
        seconds = time.monotonic() - self.exports_since
        return f"Your computer exports the next pair of networks, for {seconds:.0f} s now. It takes a minute or two."

    def _status(self, device, value):
        device.state = readable(value)["text"]
        return {}

    def _check(self, device, value):
        task, side = self._task(device, value), value["side"]
        if side not in task.expected:
            raise ValueError(f"side must be one of {tuple(task.expected)}. Received: {side[:20]!r}")
        fault, error = difference(task.expected[side], value["outputs"], task.plan["files"][side]["every"])
        name, limit = task.plan["files"][side]["name"], largest_difference(task.precision)
        if fault is None and error <= limit:
            task.errors[side] = error
            how = "exactly" if error == 0 else f"to {error:.1e} of the range"
            return {"agrees": True, "text": f"{name} computes the same as on your computer, {how}."}
        reason = fault or f"its outputs are {error:.1e} of the range away from those here, more than {limit:g}"
        task.refused = f"{name} does not compute the same in this browser and is not timed: {reason}"
        return {"agrees": False, "text": task.refused}

    def _ready(self, device, value):
        task = self._task(device, value)
        numbers = [*value["init_ms"], *value["first_ms"], value["repeats"], value["heap_bytes"]]
        if [len(value[name]) for name in ("init_ms", "first_ms")] != [2, 2] or not all(map(_is_plausible, numbers)):
            raise ValueError("init_ms and first_ms must be two times each. Received: others")
        task.setup = readable({name: value[name] for name in _Ready.__annotations__ if name not in ("device", "task")})
        device.state = "timing"
        if not value["is_delegated"] and not task.allow_undelegated:
            task.refused = (
                "operators are not delegated to the accelerator and run on slow kernels: --allow-undelegated measures "
                "the files anyway"
            )
        if not len(task.blocks):  # the time counts from here; after a reload, blocks are there already
            task.blocks = Blocks(**task.limits)
        return {"done": len(task.blocks), "refused": task.refused}

    def _block(self, device, value):
        task, runs = self._task(device, value), value["times"]
        if sorted(runs) != ["a", "b", "control"] or {len(x) for x in runs.values()} != {task.plan["runs"]}:
            raise ValueError(f"A block must be {task.plan['runs']} times of a, b and control. Received: others")
        if not all(0 < x and _is_plausible(x) for times in runs.values() for x in times):
            raise ValueError("Times must be above 0 and below a day. Received: others")
        if task.setup is None or task.errors.keys() != task.expected.keys():
            raise ValueError("A block must come after the check of the outputs. Received: one before")
        if value["number"] == len(task.blocks):  # otherwise it is one that was sent again
            nanoseconds = {side: [1e6 * x for x in times] for side, times in runs.items()}
            task.blocks.add({side: min(times) for side, times in nanoseconds.items()})
            for side, times in task.every.items():
                times += nanoseconds[side]
        task.starts = 0
        done = len(task.blocks)
        task.is_complete = done >= task.plan["blocks"] or task.blocks.are_enough()
        device.state = f"block {done} of {task.plan['blocks']}"
        return {"more": not task.is_complete, "done": done, "text": so_far(task)}

    def _failed(self, device, value):
        self._task(device, value).refused = readable(value)["text"]
        return {}

    def _leave(self, device, value):
        device.left = True
        return {}

    def _task(self, device, value):
        if device.task is None or device.task.is_over or device.task.plan["number"] != value["task"]:
            raise ValueError("This pair is not measured now")
        return device.task


def so_far(task: Task) -> str:
    """The result of the blocks so far, in a sentence."""
    done = counted(len(task.blocks), "block")
    if len(task.blocks) < 2:
        return f"{done} of {task.plan['blocks']} measured."
    found = task.comparison()
    cost = f"{percent(found.ratio.median)} time [{interval(asdict(found.ratio))}]"
    if not task.is_complete:
        return f"So far, after {done}: {cost}."
    return f"Result of {done}: {cost}{'' if found.is_significant else ', not larger than the noise of this device'}."


def strided(values: Array, every: int) -> Array:
    """Every so many-th value of an output."""
    return values.reshape(-1)[::every]


def difference(expected: Outputs, actual: dict[str, list[float | None]], every: int) -> tuple[str | None, float]:
    """What is wrong with outputs of a browser, and how far they are from the expected ones, as a share of the range."""
    # The page has the names of tensors; those of a signature may be others.
    if len(expected) == 1 and len(actual) == 1:
        actual = dict(zip(expected, actual.values(), strict=True))
    if expected.keys() != actual.keys():
        return f"its outputs are {', '.join(actual)} and not {', '.join(expected)}", math.inf
    largest = 0.0
    for name, values in expected.items():
        wanted, found = strided(values, every).astype("float64"), np.array(actual[name], dtype="float64")
        if wanted.shape != found.shape:
            return f"it has {found.size} outputs and not {wanted.size}", math.inf
        if not np.isfinite(found).all():
            return "its outputs are not finite", math.inf
        largest = max(largest, float(np.abs(wanted - found).max() / (np.ptp(values) or 1)))
    return None, largest


def _is_plausible(number: float) -> bool:
    return math.isfinite(number) and 0 <= number < 1e12
