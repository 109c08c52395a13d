"""Arguments that several commands share: help with examples, names to choose from, images and their sizes."""

import argparse
import inspect
import json
import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.console import Console

if TYPE_CHECKING:  # not imported for --help
    import numpy as np

    from se_keras.export.verification import Runnable

# The library's own tables, which take seconds to import; tests/test_cli.py holds that these are the same.
PRECISIONS = ("float32", "float16", "dynamic", "int8", "int16x8")
CALIBRATED = ("int8", "int16x8")
TYPES = ("float32", "int8", "uint8")
ACCELERATORS = ("cpu", "gpu")
VARIANTS = ("published", "lowered")
BROWSER_ACCELERATORS = ("wasm", "webgpu")
SITES = ("standard", "pre", "3x3", "post", "identity")
PROTOCOLS = ("plain", "224", "299", "320", "ten_crop", "multi_scale", "multi_crop")
FAMILIES = ("cifar", "inception", "mobilenet", "resnet", "shufflenet", "vgg")
SAMPLINGS = ("shuffled", "balanced")
STRATEGIES = ("none", "mirrored", "multi-worker", "tpu")
RECIPES = ("digits", "paper_imagenet", "paper_mobile", "paper_cifar", "paper_cifar_wide", "paper_cifar_shake")
RECIPES += ("senet154", "ablation", "places365", "modern")
LIMIT = 500  # images of a folder or of a data set
DATA_SETS = ("digits", "fashion_mnist", "cifar10", "cifar100")
_NAMED = ", ".join(DATA_SETS)
DATA = f"{_NAMED}, a folder with a folder for each class (in train/ and val/, or alone), packed TFRecords, or tfds:NAME"
IMAGES = f"{_NAMED}, a .npy file (N, height, width, channels), or a folder of image files"
LABELS = f"{_NAMED}, or a text file with the name of one class per line"
NORMALIZE = (
    "MEAN STD, each a number or one for each channel (123.7,116.3,103.5), or the NETWORK of the catalogue that has "
    "them: pixels in 0 to 255 become (pixel - MEAN) / STD; default: as the model was trained"
)

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Handler = Callable[[argparse.Namespace, Console], int | None]
AddArgument = Callable[..., argparse.Action]


def _number(parse: Callable[[str], Any], rule: str, is_valid: Callable[[Any], bool]) -> Callable[[str], Any]:
    """The type of an option: a function that argparse calls with the text, and whose error it shows."""

    def read(text: str) -> Any:
        try:
            if is_valid(value := parse(text)):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"must be {rule}. Received: {text[:40]!r}")

    return read


# TensorFlow counts in 64 bits, which a product of two of these fits.
POSITIVE = _number(int, "an int of 1 to 2147483647", lambda x: 0 < x < 2**31)
COUNT = _number(int, "an int of 0 to 2147483647", lambda x: 0 <= x < 2**31)
SEED = _number(int, "an int of 0 to 4294967295", lambda x: 0 <= x < 2**32)  # numpy's largest
THREADS = _number(int, "an int of 1 to 1024", lambda x: 1 <= x <= 1024)
BLOCKS = _number(int, "an int of 2 to 2147483647: at least 2 blocks make an interval", lambda x: 2 <= x < 2**31)
RATE = _number(float, "a finite number above 0", lambda x: 0 < x < math.inf)
SHARE = _number(float, "a finite number of at least 0", lambda x: 0 <= x < math.inf)
PORT = _number(int, "an int of 1 to 65535", lambda x: 1 <= x <= 65535)
BUDGET = _number(float, "above 0 and at most 1", lambda x: 0 < x <= 1)
SECONDS = _number(float, "0 to 1000000000 seconds", lambda x: 0 <= x <= 1e9)
TIMEOUT = _number(float, "above 0 and at most 1000000000 seconds", lambda x: 0 < x <= 1e9)


def only_for(options: argparse.Namespace, names: str, what: str, received: object, *, possible: object) -> None:
    """Refuses options that would have no effect.

    Raises:
        ValueError: If not `possible`, and one of the options, such as "--top --limit", was given: it is for `what`.
    """
    for name in () if possible else names.split():
        value = getattr(options, name.removeprefix("--").replace("-", "_"))
        if value is not None and value is not False:
            raise ValueError(f"{name} is for {what}. Received: {received}")


def add_command(commands: Commands, name: str, handler: Handler, *, json_output: bool = False) -> AddArgument:
    """Adds a command whose help is the docstring of its handler, and returns its parser's `add_argument`."""
    description, examples, usage = (inspect.getdoc(handler) or "").partition("Examples:")
    parser = commands.add_parser(
        name,
        help=description.strip(),
        description=description,
        epilog=examples + usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=handler)
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error came from")
    if json_output:
        parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser.add_argument


def add_folder_options(add: AddArgument) -> None:
    """Adds the options for a folder of images."""
    add("--normalize", nargs="+", metavar="VALUE", help=NORMALIZE)
    add_override(add)
    add("--limit", type=POSITIVE, metavar="N", help=f"use at most N images of a folder or data set (default: {LIMIT})")


def add_override(add: AddArgument) -> None:
    """Adds the option to contradict what the files of a model say."""
    add("--override", action="store_true", help="use given values even if they contradict the model's training")


def add_corrupt_budget(add: AddArgument) -> None:
    """Adds the option for files that cannot be decoded."""
    skipped = "files that may be skipped if they cannot be decoded"
    add("--corrupt-budget", type=COUNT, default=0, metavar="N", help=skipped)


def one_of(names: Sequence[str], default: str | None = None) -> str:
    """The names as a phrase for a help text: `float32 (default), int8, or uint8`."""
    *others, last = (f"{name} (default)" if name == default else name for name in names)
    return f"{', '.join(others)}, or {last}"


def input_shape(network: str, size: int | None) -> tuple[int, ...] | None:
    """The shape of images of --size; None stands for the network's own."""
    from se_keras.catalogue import spec_of

    return None if size is None else (size, size, spec_of(network).input_shape[-1])


def shipped_networks() -> list[dict[str, Any]]:
    """The rows of `se_keras.figures.listing`, read without an import of se_keras, which takes seconds."""
    package = find_spec("se_keras")
    if package is None or not package.submodule_search_locations:
        raise ImportError("se_keras is not installed, though its command is: pip install se-keras")
    (folder,) = package.submodule_search_locations
    return json.loads(Path(folder, "networks.json").read_text())


def complete_network(prefix: str, **_: object) -> list[str]:
    """The networks whose names begin with what was typed, for argcomplete."""
    return [row["name"] for row in shipped_networks() if row["name"].startswith(prefix)]


def read_normalization(values: Sequence[str] | None) -> tuple[Sequence[float], Sequence[float]] | None:
    """MEAN and STD of --normalize, which are numbers or those of a network; None without it."""
    if not values:
        return None
    if len(values) == 1:
        from se_keras.catalogue import spec_of

        spec = spec_of(values[0])
        return spec.mean, spec.std
    try:
        mean, std = ([float(number) for number in part.split(",")] for part in values)
    except ValueError:
        raise ValueError(f"--normalize takes MEAN STD, or a network. Received: {' '.join(values)}") from None
    return mean, std


def read_labels(source: str) -> Sequence[str]:
    """The names of --labels. Raises OSError or ValueError if there is no such text file."""
    from se_keras.training.sources import DATA

    if source in DATA:
        return DATA[source]().classes
    if not Path(source).is_file():
        raise FileNotFoundError(f"There is no file of labels {source!r}: give {LABELS}")
    try:
        return Path(source).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{source!r} is not a text file of labels: {error}") from None


def read_images(
    source: str,
    options: argparse.Namespace,
    shape: Sequence[Any],
    progress: Callable[[str], object],
    *models: "Runnable",
    split: str = "train",
) -> "np.ndarray":
    """Reads the images of a split of a data set, of a .npy file, or of a folder.

    The `limit` of `options`, `shape`, `(height, width, channels)`, and `models`, which know the normalization, are for
    data sets and folders. The digits are all read, and as they are.

    Raises:
        OSError, ValueError: If there are no such images, or if an option is not for this kind of source.
    """
    import numpy as np

    if Path(source).is_dir():
        from se_keras.export.verification import of_pixels
        from se_keras.images import load_images

        mean, std = of_pixels(*models)
        limit = LIMIT if options.limit is None else options.limit
        size, channels = tuple(shape[:2]), shape[2]
        return load_images(source, size=size, channels=channels, mean=mean, std=std, limit=limit, progress=progress)
    if source in DATA_SETS and source != "digits":
        from se_keras.export.verification import of_pixels
        from se_keras.training import sources

        limit = LIMIT if options.limit is None else options.limit
        return sources.images(source, split=split, shape=shape, normalization=of_pixels(*models), limit=limit)
    if options.limit is not None:
        raise ValueError(f"--limit is for a folder of images. Received: {source}")
    if source == "digits":
        from se_keras.training.data import digits

        return getattr(digits(), split).images
    if not Path(source).is_file():
        raise FileNotFoundError(f"There are no images {source!r}: give {IMAGES}")
    try:
        with open(source, "rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{source!r} is not a .npy file of images: {error}") from error
