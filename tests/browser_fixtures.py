"""What the tests of browsers share: small pairs, a page that speaks to the command without a browser, and Chromium."""

import json
import ssl
import threading
import urllib.error
import urllib.request

import keras
import numpy as np
from keras import layers

from se_keras.export import to_litert
from se_keras.export.benchmark.measuring import pair_of_files
from se_keras.export.outputs import noise

FACTS = {
    "user_agent": "Mozilla/5.0 (iPhone; CPU iPhone OS 18_1 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) "
    "Version/18.1 Mobile/15E148 Safari/604.1",
    "touch_points": 5,
    "hardware_concurrency": 4,
    "device_memory": None,
    "secure_context": False,
    "cross_origin_isolated": False,
    "timer_step_ms": 1.0,
    "model": None,
    "platform": None,
    "gpu": "Apple GPU",
}
READY = {
    "init_ms": [5.0, 6.0],
    "first_ms": [2.0, 2.5],
    "is_delegated": True,
    "repeats": 1,
    "heap_bytes": 17_000_000,
    "adapter": None,
}


def small_file(width, precision="float32", seed=0):
    """A LiteRT file that takes `(8, 8, 3)` images."""
    keras.utils.set_random_seed(seed)
    images = keras.Input((8, 8, 3), name="images")
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(width, 3, activation="relu")(images))
    model = keras.Model(images, layers.Dense(4, name="scores")(x), name=f"net{width}")
    return to_litert(model, precision=precision, calibration=noise((8, 8, 3), samples=8))


def small_pair(precision="float32", **options):
    """A pair of two such files."""
    return pair_of_files(small_file(8, precision), small_file(16, precision), **options)


class Page:
    """Says to the command what a page in a browser says, through its server. Its outputs are those of this machine."""

    def __init__(self, address, pair, **facts):
        self.address, self.pair, self.number = address, pair, None
        self.number = self.post("hello", **FACTS | facts, device=None)["device"]

    def request(self, name, data=None, **headers):
        """Status, headers and content of the answer to a request."""
        request = urllib.request.Request(self.address + name, data=data, headers=headers)
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        try:
            with urllib.request.urlopen(request, context=context, timeout=20) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, error.read()

    def post(self, name, **value):
        """The answer to a value; ValueError with the reason if it is refused."""
        status, _, content = self.request(name, json.dumps({"device": self.number, **value}).encode())
        if status != 200:
            raise ValueError(f"{status}: {content.decode().strip()}")
        return json.loads(content)

    def next(self):
        """What the page should do."""
        return self.post("next")

    def check(self, side, task, off=0.0):
        """Sends the outputs of a file, `off` by a number."""
        model = self.pair.baseline if side == "a" else self.pair.network
        outputs = model.runner()(np.frombuffer(self.request(task["input"]["address"])[2], "f4").reshape(task["shape"]))
        return self.post(
            "check",
            task=task["number"],
            side=side,
            outputs={name: (values.ravel() + off).tolist() for name, values in outputs.items()},
        )

    def start(self):
        """Waits for its pair, and does what comes before the first block."""
        task = self.wait("measure")["task"]
        for side in ("a", "b"):
            assert self.check(side, task)["agrees"]
        self.post("ready", task=task["number"], **READY)
        return task

    def block(self, task, number, ratio=1.25):
        """Sends a block."""
        base = 10 + 0.01 * number
        sides = {"a": base, "b": ratio * base, "control": base}
        times = {side: [x] * task["runs"] for side, x in sides.items()}
        return self.post("block", task=task["number"], number=number, times=times)

    def measure(self, **options):
        """Measures its pair."""
        task, number, more = self.start(), 0, True
        while more:
            more = self.block(task, number, **options)["more"]
            number += 1

    def wait(self, what):
        """Asks until the answer is this one."""
        while (found := self.next())["what"] != what:
            threading.Event().wait(0.02)
        return found


class Command(threading.Thread):
    """The command, in a thread: `records` of the target, `messages`, and the error, if any."""

    def __init__(self, target, pairs):
        super().__init__(daemon=True)
        self.target, self.pairs = target, pairs
        self.records, self.messages, self.error = [], [], None
        self.environment = target.connect(self.messages.append)
        self.address, self.server = target.address, target._open.server
        self.start()

    def run(self):
        try:
            for record in self.target.measure(self.pairs, self.messages.append):
                self.records.append(record)
        except Exception as error:
            self.error = error

    def end(self):
        """Waits for the end, and returns the records."""
        self.join(60)
        assert not self.is_alive()
        if self.error:
            raise self.error
        return self.records
