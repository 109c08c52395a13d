"""What a browser says of its device: checked, and in words."""

import math
import re
from typing import Any, TypedDict

from se_keras.environment import versions
from se_keras.typing import Json

from .litertjs import VERSION

_LONGEST = 300  # characters of a text of a browser
# The first that fits counts: most browsers also have the names of others.
_BROWSERS = (
    ("Edge", r"Edg(?:A|iOS)?/(\d+)"),
    ("Samsung Internet", r"SamsungBrowser/(\d+)"),
    ("Opera", r"OPR/(\d+)"),
    ("Firefox", r"(?:Firefox|FxiOS)/(\d+)"),
    ("headless Chrome", r"HeadlessChrome/(\d+)"),
    ("Chrome", r"(?:CriOS|Chrome)/(\d+)"),
    ("Safari", r"Version/(\d+(?:\.\d+)?)"),
)
_GPU = r"Adreno[^,;]*|Mali[^,;]*|Immortalis[^,;]*|PowerVR[^,;]*|Xclipse[^,;]*"  # of phones


class Facts(TypedDict):
    """What the page sends first."""

    user_agent: str
    touch_points: int
    hardware_concurrency: int | None
    device_memory: float | None
    secure_context: bool
    cross_origin_isolated: bool
    timer_step_ms: float
    model: str | None
    platform: str | None
    gpu: str | None


def readable(values: Json) -> Json:
    """The known entries of what a page sent, without control characters, and with texts of a bounded length.

    Raises:
        ValueError: If a number is not finite.
    """
    if not all(math.isfinite(x) for x in values.values() if isinstance(x, float)):
        raise ValueError("Numbers must be finite. Received: others")
    return {name: _clean(value) if isinstance(value, str) else value for name, value in values.items()}


def _clean(text):
    return "".join(letter if letter.isprintable() else " " for letter in text[:_LONGEST]).strip()


def name_of(facts: Json) -> str:
    """What the device is, as far as it says: "iPhone, Safari 18.1"."""
    agent = facts["user_agent"]
    found = ((name, re.search(pattern, agent)) for name, pattern in _BROWSERS)
    browser = next((f"{name} {match[1]}" for name, match in found if match), "a browser")
    return f"{_device(facts)}, {browser}"


def _device(facts):
    agent, model = facts["user_agent"], facts["model"]
    if "iPhone" in agent:
        return "iPhone"
    if "iPad" in agent or ("Macintosh" in agent and facts["touch_points"] > 1):  # an iPad says that it is a Mac
        return "iPad"
    if "Android" in agent:
        # Chrome says "Android 10; K" of all; what tells them apart is then the GPU.
        named = re.search(r"Android [\d.]+; (?!K\)|Mobile|Tablet)([^;)]+?)(?: Build/[^;)]+)?[;)]", agent)
        gpu = re.search(_GPU, facts["gpu"] or "")
        return model or (named and named[1]) or (f"Android device with {gpu[0].strip()}" if gpu else "Android device")
    systems = {"Windows": "Windows", "Macintosh": "Mac", "CrOS": "Chromebook", "Linux": "Linux"}
    return next((name for key, name in systems.items() if key in agent), "a device")


def system_of(facts: Json) -> str:
    """The system of the device, as far as it says."""
    if facts["platform"]:
        return facts["platform"]
    patterns = r"OS (\d+(?:_\d+)*) like Mac", r"(Android [\d.]+)", r"\(([^;)]+(?:; [^;)]+)?)"
    ios, *others = (match and match[1] for match in (re.search(x, facts["user_agent"]) for x in patterns))
    return f"iOS {ios.replace('_', '.')}" if ios else next(filter(None, others), "unknown")


def environment(facts: Json, *, number: int, accelerator: str, threads: int, setup: Json) -> Json:
    """The device of a record, with the fields of `environment.environment`.

    Args:
        facts: What the page sent first.
        number: 1, or more if devices of the same name measured before: tells them apart in results.json.
        threads: Of the measurement.
        setup: What the page sent before it timed anything: repeats, heap_bytes, adapter; and max_error.
    """
    runtime = "XNNPACK (WebAssembly)" if accelerator == "wasm" else f"WebGPU on {setup['adapter']}"
    known: dict[str, Any] = {name: facts[name] for name in Facts.__annotations__}
    return {
        "target": "browser",
        "id": number,
        "processor": name_of(facts),
        "matrix_units": [],
        "system": system_of(facts),
        "runtime": f"LiteRT.js {VERSION} with {runtime}",
        "accelerator": accelerator,
        "threads": threads,
        "repeats": setup["repeats"],
        "heap_mb": setup["heap_bytes"] / 1e6,
        "max_error": setup["max_error"],
        "adapter": setup["adapter"],
        **known,
        "versions": versions() | {"litertjs": VERSION},
    }
