"""Released weights: downloaded from the Hugging Face hub, checked, ported, and stored as Keras files in KERAS_HOME."""

import contextlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import keras

from se_keras import storage
from se_keras.errors import first_line, needs_extra
from se_keras.records import read_json
from se_keras.weights.porting import load_weights


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Released weights of a network, trained on ImageNet with 1000 classes.

    Args:
        repo: Repository on the hub. It has a `model.safetensors` with the names of timm.
        top1: Accuracy on the validation images of ImageNet in %, from timm's table for 224x224. None if it has none.
        source: Who trained the weights.
        license: The license that timm's table states.
    """

    repo: str
    top1: float | None = None
    source: str = "arXiv:1709.01507, the authors' Caffe release, converted by timm"
    license: str = "Apache-2.0"


_timm = "timm (arXiv:2110.00476 and its training scripts)"
IMAGENET = {
    "se_resnet50": Pretrained(repo="timm/legacy_seresnet50.in1k", top1=77.650),
    "se_resnet101": Pretrained(repo="timm/legacy_seresnet101.in1k", top1=78.370),
    "se_resnet152": Pretrained(repo="timm/legacy_seresnet152.in1k", top1=78.662),
    "se_resnext50_32x4d": Pretrained(repo="timm/legacy_seresnext50_32x4d.in1k", top1=79.080),
    "se_resnext101_32x4d": Pretrained(repo="timm/legacy_seresnext101_32x4d.in1k", top1=80.274),
    "senet154": Pretrained(repo="timm/legacy_senet154.in1k", top1=81.320),
    "se_resnet50b": Pretrained(repo="timm/seresnet50.ra2_in1k", source=_timm),
    "se_resnext50b_32x4d": Pretrained(repo="timm/seresnext50_32x4d.racm_in1k", source=_timm),
    "resnet50b": Pretrained(repo="timm/resnet50.a1_in1k", source=_timm),
}
FILE = "model.safetensors"


class _Ported(TypedDict):
    """The record next to a file of ported weights."""

    sha256: str
    repo: str


def imagenet(network: str, build: Callable[[], keras.Model]) -> Path:
    """The path of a Keras file with the released weights of `network`. They are downloaded and ported the first time.

    `build`, which makes the network with its classifier, is called only then.

    Raises:
        ValueError: If there are no released weights, or if the download is not the released file.
        OSError: If they cannot be downloaded or stored.
    """
    if network not in IMAGENET:
        raise ValueError(f"There are no weights='imagenet' for {network}. There are for: {', '.join(IMAGENET)}")
    repo = IMAGENET[network].repo
    path = home() / f"{network}.imagenet.weights.h5"
    if _is_intact(path, repo):
        return path
    try:
        storage.check_writable(path)
    except OSError as error:
        raise _not_stored(network, path, error) from error
    downloaded = _download(network, repo)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32")  # the file is used under any policy later
    try:
        model = build()
    finally:
        keras.config.set_dtype_policy(policy)
    load_weights(model.layers, downloaded)
    try:
        with storage.staged(path) as written:
            _reserve_space(written, 4 * model.count_params())
            model.save_weights(written)
            checksum = storage.file_sha256(written)
        storage.write_json(_record_path(path), {"sha256": checksum, "repo": repo})
    except (OSError, RuntimeError) as error:  # HDF5 raises either on a full disk
        raise _not_stored(network, path, error) from error
    return path


def home() -> Path:
    """The folder of ported weights. It is in `$KERAS_HOME`, or in `~/.keras`."""
    return Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser() / "models" / "se_keras"


def _is_intact(path, repo):
    try:
        record = read_json(_record_path(path), _Ported, what="the record of ported weights")
        return record["repo"] == repo and record["sha256"] == storage.file_sha256(path)
    except (OSError, ValueError):
        return False


def _record_path(path):
    return path.with_name(path.name + ".json")


def _download(network, repo):
    """The path of the file in the cache of the hub's library. Its SHA-256 is the one that the hub announced."""
    for force in (False, True):  # the cached file first; if it was changed, a new one
        path = _fetch(network, repo, force=force)
        if _is_as_announced(path):
            return path
    path.unlink()
    raise ValueError(f"The file that {repo} sent for {network} does not have the announced SHA-256: try again")


def _fetch(network, repo, *, force):
    with needs_extra("pretrained", "weights='imagenet'"):
        import huggingface_hub
    try:
        failure = _error_of_hub(huggingface_hub.hf_hub_url(repo, FILE))
        if failure is None or force:
            return Path(huggingface_hub.hf_hub_download(repo, FILE, force_download=force))
        with contextlib.suppress(huggingface_hub.errors.LocalEntryNotFoundError):
            return Path(huggingface_hub.hf_hub_download(repo, FILE, local_files_only=True))
        raise failure
    except Exception as error:  # huggingface_hub also raises the errors of the HTTP library that it uses
        # Its own message is "check your connection" for every failure. The cause says what happened.
        reason = first_line(error.__cause__ or error).rstrip(".")
        raise ConnectionError(
            f"The weights of {network} could not be downloaded from {repo}: {reason}. "
            "weights=PATH (--weights) loads a file"
        ) from error


def _error_of_hub(url):
    """Why the hub does not send a file, after one retry; None if it does. A download would retry for half a minute."""
    import huggingface_hub

    for wait in (1, 0):
        try:
            huggingface_hub.get_hf_file_metadata(url)
            return None
        except huggingface_hub.errors.HfHubHTTPError as error:  # an answer
            return error
        except Exception as error:
            found = error
            time.sleep(wait)
    return found


def _is_as_announced(path):
    """Whether a file in the hub's cache has the SHA-256 that its link's target is named after.

    Only one link is followed: a second one may lead to a file that several repositories share, named by another hash.
    Without links, only the hub's library has checked the file, by its length.
    """
    blob = path.readlink().name if path.is_symlink() else ""
    return not re.fullmatch("[0-9a-f]{64}", blob) or blob == storage.file_sha256(path)


def _reserve_space(path, size):
    """Fails at once if there is no space: on a full disk HDF5 prints pages of errors, one for each of its objects."""
    block = bytes(2**20)
    with path.open("wb") as file:
        for _ in range(size // len(block) + 1):
            file.write(block)


def _not_stored(network, path, error):
    reason = first_line(getattr(error, "strerror", None) or error).rstrip(".")
    return OSError(
        f"The weights of {network} cannot be stored in {str(path.parent)!r}: {reason}. KERAS_HOME sets another folder"
    )
