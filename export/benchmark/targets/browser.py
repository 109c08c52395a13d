"""Measures pairs of LiteRT files in a browser, on this computer or on a phone, with LiteRT.js."""

import sys
import time
import warnings
import webbrowser
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from io import StringIO
from itertools import count, tee
from math import ceil
from typing import Literal, get_args

from se_keras.environment import versions
from se_keras.errors import require_choice
from se_keras.timing import Blocks, check_plan
from se_keras.typing import FilePath, Json, OnMessage, Outputs
from se_keras.wording import counted

from ...outputs import noise
from ..browser import certificate, chromium
from ..browser.facts import environment
from ..browser.litertjs import VERSION, load
from ..browser.server import File, PageServer
from ..browser.session import LONGEST_SILENCE, Device, Session, Task
from ..measuring import Pair
from ..results import HERE, DeviceConditions, Footprint, Overhead
from ..sentences import headline

Accelerator = Literal["wasm", "webgpu"]
ACCELERATORS: tuple[Accelerator, ...] = get_args(Accelerator)
_LONGEST_WAIT = 1800.0  # seconds for somebody to open the page
_LONGEST_START = 120.0  # seconds for a headless browser to open it
_LONGEST_END = 5.0  # seconds for the pages to get the result
_MOST_VALUES = 4096  # of an output that are compared
_QUIET = 30.0  # seconds of silence after which the command says that it waits
_KINDS = {"js": "text/javascript", "wasm": "application/wasm", "html": "text/html; charset=utf-8"}
_BYTES = "application/octet-stream"


@dataclass
class _Open:
    """What `connect` opens and `measure` uses."""

    session: Session = field(default_factory=Session)
    files: dict[str, File] = field(default_factory=dict)
    server: PageServer | None = None


@dataclass(frozen=True, kw_only=True)
class Browser:
    """Browsers that open a page of this computer, with LiteRT.js: one device after the other.

    Args:
        accelerator: `"wasm"`, the processor with XNNPACK in WebAssembly, or `"webgpu"`.
        lan: Whether other devices in the network reach the page; otherwise this computer alone.
        port: Of the page; 0 for any that is free.
        https: Whether to serve with HTTPS, which threads, WebGPU and a fine clock need on other devices.
        open: Whether to open the page in this computer's browser.
        headless: Whether to measure in a Chromium without a window, found on the PATH.
        litertjs: Folder with LiteRT.js as two .tgz files. Default: fetched once with npm.
        devices: How many devices measure. Those that wait when the last one ends measure too.
        blocks, runs, within: As in `timing.compare`.
        seconds: For a pair on a device, after which no further block is measured.
        allow_undelegated: Whether to measure files with operators that are not delegated to the accelerator.

    Raises:
        ValueError: If a number is out of its range, or if options contradict each other.
    """

    accelerator: Accelerator = "wasm"
    lan: bool = False
    port: int = 0
    https: bool = False
    open: bool = False
    headless: bool = False
    litertjs: FilePath | None = None
    devices: int = 1
    blocks: int = 30
    runs: int = 3
    within: float | None = None
    seconds: float | None = 60.0
    allow_undelegated: bool = False
    _open: _Open = field(default_factory=_Open, init=False, repr=False, compare=False)

    def __post_init__(self):
        check_plan(self.blocks, self.runs)
        Blocks(within=self.within, seconds=self.seconds)  # checks both
        require_choice("accelerator", self.accelerator, ACCELERATORS)
        if self.open and self.headless:
            raise ValueError("A browser is opened with a window or without one. Received: --open and --headless")
        if self.accelerator == "webgpu":
            self._require_secure("accelerator='webgpu'")
        if self.devices < 1:
            raise ValueError(f"devices must be 1 or more. Received: devices={self.devices!r}")

    @property
    def address(self) -> str | None:
        """The address of the page; None before `connect`."""
        return self._open.server and self._open.server.address

    def _require_secure(self, what):
        """Raises ValueError unless all devices get the page in a secure context, which `what` needs."""
        if self.lan and not self.https:
            raise ValueError(f"On other devices, browsers have WebGPU and threads with --https alone. Received: {what}")

    def connect(self, progress: OnMessage) -> Json:
        """Serves the page and prints its address: see `Target`. Each record has the environment of its device.

        Raises:
            OSError: If LiteRT.js, Chromium, a network or a tool for certificates is missing, or the port is in use.
            ValueError: If LiteRT.js is not the one with the known checksum.
        """
        self._serve(progress)
        return {
            "target": "browser",
            "processor": "browsers",
            "matrix_units": [],
            "runtime": f"LiteRT.js {VERSION}",
            "versions": versions() | {"litertjs": VERSION},
        }

    def measure(self, pairs: Iterable[Pair], progress: OnMessage) -> Iterator[Overhead]:
        """Times pairs: see `Target`. A page that is closed after two blocks or more leaves those of them.

        Warns:
            UserWarning: If a file is not timed, because it does not compute the same in the browser, or fails there.

        Raises:
            OSError: If nobody opens the page within half an hour, or if the headless browser ends.
            ValueError: If a file has integer inputs or outputs, or if nothing could be timed.
        """
        server = self._open.server or self._serve(progress)
        browser = chromium.Chromium(server.address) if self.headless else None
        try:
            yield from _Measurement(self, self._open.session, self._open.files, browser, progress).of(pairs)
        finally:
            if browser:
                browser.close()
            server.close()
            self._open.server, self._open.session, self._open.files = None, Session(), {}

    def _serve(self, progress):
        """Starts the server of the page, and prints its address."""
        if self.headless:
            chromium.find()
        files, folder = self._open.files, resources.files("se_keras.export.benchmark.browser")
        for address, content in load(self.litertjs, progress=progress).items():
            files[address] = File(_KINDS[address.rpartition(".")[2]], content)
        for address, name in (("", "page.html"), ("page.js", "page.js")):
            files[address] = File(_KINDS[name.rpartition(".")[2]], folder.joinpath(name).read_bytes())
        make_context = certificate.context if self.https else None
        server = PageServer(files, self._open.session.answers, lan=self.lan, port=self.port, make_context=make_context)
        self._open.server = server
        _announce(server.address, self)
        if self.open and not webbrowser.open(server.address):
            _say("No browser could be started here: open the address yourself")
        return server


@dataclass(frozen=True)
class _Offer:
    """A pair with what a device needs to measure it."""

    pair: Pair
    plan: Json
    expected: dict[str, Outputs]


@dataclass(frozen=True)
class _Measurement:
    """The measurement of pairs on the devices of a session."""

    target: Browser
    session: Session
    files: dict[str, File]
    browser: chromium.Chromium | None
    progress: OnMessage

    def of(self, pairs: Iterable[Pair]) -> Iterator[Overhead]:
        """Measures on one device after the other. Pairs are exported for the first one, and kept for the others."""
        offers, refusals, is_empty = map(self._offer, self._exported(pairs), count(1)), [], True
        try:
            for number in count(1):
                if number > self.target.devices and not self.session.is_waited_for():
                    break
                offers, these = tee(offers)
                device, records = None, []
                for offer in these:
                    device, task = self._measured(offer, device)
                    if len(task.blocks) < 2:
                        refusals.append(f"{device.name}: {task.refused}")
                        self.progress(refusals[-1])
                        continue
                    found, is_empty = self._overhead(offer, device, task), False
                    records.append(found.to_json())
                    yield found
                    if found.device.missing:
                        return
                if device is None:  # there are no pairs
                    return
                self.session.end(device, _end_of(records))
        finally:
            self._end()
            for refusal in refusals * (not is_empty):
                warnings.warn(refusal, stacklevel=3)
        if is_empty:
            raise ValueError(f"Nothing could be timed. {refusals[0]}")

    def _exported(self, pairs):
        """The pairs; meanwhile, pages that are open say what is done."""
        pairs = iter(pairs)
        while True:
            self.session.exports_since = time.monotonic()
            pair = next(pairs, None)
            self.session.exports_since = None
            if pair is None:
                return
            yield pair

    def _offer(self, pair, number):
        """Puts the files of a pair on the server; refuses those that LiteRT.js cannot run."""
        if pair.cell.threads > 1:
            self.target._require_secure(f"threads={pair.cell.threads}")
        shape = pair.cell.input_shape
        images = noise(shape[1:], samples=shape[0])
        expected, files = {}, {}
        for side, name, model in (("a", pair.cell.baseline, pair.baseline), ("b", pair.cell.network, pair.network)):
            runner = model.runner(threads=pair.cell.threads)
            _check_types(name, runner)
            expected[side] = runner(images)
            largest = max(values.size for values in expected[side].values())
            address = f"files/{number}{side}.tflite"
            self.files[address] = File(_BYTES, model.content)
            files[side] = {
                "address": address,
                "name": name,
                "bytes": len(model.content),
                "every": ceil(largest / _MOST_VALUES),
            }
        self.files[f"files/{number}.input"] = File(_BYTES, images.tobytes())
        plan = {
            "number": number,
            "title": str(pair),
            "files": files,
            "input": {"address": f"files/{number}.input", "name": "the input", "bytes": images.nbytes},
            "shape": list(shape),
            "accelerator": self.target.accelerator,
            "threads": pair.cell.threads,
            "blocks": self.target.blocks,
            "runs": self.target.runs,
        }
        return _Offer(pair, plan, expected)

    def _measured(self, offer: _Offer, device: Device | None) -> tuple[Device, Task]:
        """Lets a device measure a pair. If it goes away before two blocks, the next device that comes does."""
        while True:
            device = device or self._next_device()
            task = Task(
                plan=offer.plan,
                expected=offer.expected,
                precision=offer.pair.cell.precision,
                limits={"within": self.target.within, "seconds": self.target.seconds},
                allow_undelegated=self.target.allow_undelegated,
            )
            self.session.give(device, task)
            self._follow(device, task)
            if task.refused is not None or len(task.blocks) > 1:
                return device, task
            self.progress(f"{device.name} closed the page before two blocks")
            self.session.end(device, "This page was away for too long: open its address again.")
            device = None

    def _follow(self, device, task):
        """Waits for the end of a pair; blocks are kept if the headless browser ends after two."""
        try:
            self._wait(lambda: task.is_over or self.session.is_gone(device), lambda: self._doing(device))
        except OSError as error:
            if len(task.blocks) < 2:
                raise
            task.refused = str(error)

    def _next_device(self):
        limit = _LONGEST_START if self.browser else _LONGEST_WAIT
        began = time.monotonic()

        def come():
            if time.monotonic() - began > limit:
                raise TimeoutError(f"No browser opened the page within {limit:.0f} seconds")
            return self.session.is_waited_for()

        self._wait(come, lambda: "waiting for a browser to open the page")
        return self.session.next_device()

    def _wait(self, is_over: Callable[[], bool], doing: Callable[[], str]) -> None:
        """Waits for pages, and shows each new text of `doing`."""
        last = ""
        while not is_over():
            if self.browser:
                self.browser.check()
            if (message := doing()) != last:
                self.progress(last := message)
            self.session.pause(0.5)

    def _doing(self, device):
        silent = time.monotonic() - device.seen
        if silent < _QUIET:
            return f"{device.name}: {device.state or 'loading'}"
        waited = _QUIET * (silent // _QUIET)
        rule = "light its screen and keep the page in front"
        return f"{device.name} is silent for {waited:.0f} of at most {LONGEST_SILENCE:.0f} seconds: {rule}"

    def _overhead(self, offer, device, task):
        setup, contents = task.setup or {}, (offer.pair.baseline.content, offer.pair.network.content)
        missing = None
        if not task.is_complete:
            blocks = counted(task.plan["blocks"], "block")
            reason = task.refused or ("closed the page" if device.left else "is silent")
            missing = f"{len(task.blocks)} of {blocks}: {device.name}: {reason}"
        return offer.pair.overhead(
            task.comparison(),
            undelegated=() if setup["is_delegated"] else ("a part",),
            footprints=tuple(
                Footprint(bytes=len(content), init_ms=init, first_ms=first, peak_mb=None)
                for content, init, first in zip(contents, setup["init_ms"], setup["first_ms"], strict=True)
            ),
            device=DeviceConditions(missing=missing) if missing else HERE,
            environment=environment(
                device.facts,
                number=device.number,
                accelerator=self.target.accelerator,
                threads=offer.pair.cell.threads,
                setup=setup | {"max_error": [task.errors["a"], task.errors["b"]]},
            ),
        )

    def _end(self):
        """Lets all pages know the end."""
        self.session.close("The measurement has ended. Nothing is left to do here.")
        until = time.monotonic() + _LONGEST_END
        while not self.session.have_ended() and time.monotonic() < until:
            self.session.pause(0.2)


def _check_types(name, runner):
    """Refuses what LiteRT.js cannot run."""
    types = {"input": runner.input_dtype, **{f"output {key}": kind for key, kind in runner.output_dtypes.items()}}
    for tensor, kind in types.items():
        if kind != "float32":
            raise ValueError(
                f"A browser measures files with float32 inputs and outputs, also of int8 networks: export {name} "
                f"without --input-type and --output-type. Received: {kind} {tensor}"
            )


def _end_of(records: list[Json]) -> str:
    """What a page shows when its device has measured."""
    results = {"environment": records[0]["environment"], "overhead": records} if records else None
    sentence = results and headline([results])
    return f"Done. {sentence}" if sentence else "Nothing could be timed on this device."


def _announce(address: str, target: Browser) -> None:
    """Prints the address of the page, on a terminal also as a QR code, where it stays while progress is shown."""
    _say(f"Open {address}" + (" on a device in the same network" if target.lan else " in a browser on this computer"))
    if target.lan and not target.https:
        _say("Over plain HTTP a browser gives one thread and a coarse clock: --https gives more, after a warning")
    if target.https:
        _say("The browser warns, because this computer signed the certificate itself: continue anyway")
    if target.lan and sys.stderr.isatty():
        _say(_qr_code(address))


def _qr_code(text: str) -> str:
    """A QR code as lines for a terminal: white on black, whatever colors the terminal has."""
    import segno

    lines = StringIO()
    segno.make(text, error="l").terminal(out=lines, border=2, compact=True)
    return "\n".join(f"\x1b[97;40m{line}\x1b[0m" for line in lines.getvalue().splitlines())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
