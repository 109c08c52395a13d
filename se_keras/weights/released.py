"""Released weights: fetched from the Hugging Face hub, checked, ported, and kept as Keras weights in the Keras home."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import keras

from se_keras import storage
from se_keras.errors import first_line
from se_keras.weights.porting import load_weights


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Weights of a row of the catalogue, trained on ImageNet with 1000 classes.

    Args:
        repo: Of the hub, with a `model.safetensors` in timm's names.
        top1: Accuracy on ImageNet's validation images in %, as timm measured it; None where it is not in timm's table
            for 224x224.
        source: Who trained them.
    """

    repo: str
    top1: float | None = None
    source: str = "arXiv:1709.01507, the authors' Caffe release, converted by timm"


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


def imagenet(network, build):
    """The path of a Keras file with the released weights of `network`; fetched and ported the first time.

    Args:
        network: A name of the catalogue.
        build: Builds that network with its classifier; called where the weights are not there yet.

    Raises:
        ValueError: If none were released, or if what came is not what was released.
        OSError: If they cannot be fetched or kept.
    """
    if network not in IMAGENET:
        raise ValueError(f"No weights='imagenet' were released for {network}, but for {', '.join(IMAGENET)}")
    repo = IMAGENET[network].repo
    path = home() / f"{network}.imagenet.weights.h5"
    if _is_whole(path, repo):
        return path
    try:
        storage.check_writable(path)
    except OSError as error:
        raise _not_kept(network, path, error) from error
    downloaded = _download(network, repo)
    model = _in_float32(build)
    load_weights(model.layers, downloaded)
    try:
        with storage.staged(path) as written:
            _reserve(written, 4 * model.count_params())
            model.save_weights(written)
            checksum = storage.file_sha256(written)
        storage.write_json(_record(path), {"sha256": checksum, "repo": repo})
    except (OSError, RuntimeError) as error:  # HDF5 has both for a full disk
        raise _not_kept(network, path, error) from error
    return path


def home():
    """The folder of ported weights, in the Keras home: `$KERAS_HOME`, or `~/.keras`."""
    return Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser() / "models" / "se_keras"


def _is_whole(path, repo):
    try:
        record = json.loads(_record(path).read_text())
        return record["repo"] == repo and record["sha256"] == storage.file_sha256(path)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _record(path):
    return path.with_name(path.name + ".json")


def _in_float32(build):
    """What `build` builds, with variables of float32: the file is for every later policy, not for today's alone."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32")
    try:
        return build()
    finally:
        keras.config.set_dtype_policy(policy)


def _download(network, repo):
    """The path of the hub's file in the hub's own cache, with the SHA-256 that the hub gives for it."""
    path = _fetch(network, repo)
    if not _is_as_announced(path):
        path = _fetch(network, repo, force_download=True)
    if not _is_as_announced(path):
        path.unlink()
        raise ValueError(f"What {repo} sent for {network} has not the SHA-256 that it announced: try again")
    return path


def _fetch(network, repo, **options):
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(repo, FILE, **options))
    except Exception as error:  # the hub's library passes on the errors of the HTTP library of the day
        # Its own words, "check your connection", stand for each failure; the cause is the one that happened.
        reason = first_line(error.__cause__ or error).rstrip(".")
        raise ConnectionError(
            f"The weights of {network} could not be fetched from {repo}: {reason}. weights=PATH takes a file"
        ) from error


def _is_as_announced(path):
    """Whether a file of the hub's cache has the SHA-256 that its link there is named after.

    One link is followed, no more: the next one may lead to a file that several repositories share, which has the name
    of another hash. Where the cache has no links, the hub's own check of the length is the only one.
    """
    blob = path.readlink().name if path.is_symlink() else ""
    return not re.fullmatch("[0-9a-f]{64}", blob) or blob == storage.file_sha256(path)


def _reserve(path, size):
    """Fails at once where there is no room: on a full disk HDF5 prints pages, one for each of its objects."""
    block = bytes(2**20)
    with path.open("wb") as file:
        for _ in range(size // len(block) + 1):
            file.write(block)


def _not_kept(network, path, error):
    reason = first_line(getattr(error, "strerror", None) or error).rstrip(".")
    return OSError(
        f"The weights of {network} cannot be kept in {str(path.parent)!r}: {reason}. KERAS_HOME names another folder"
    )
