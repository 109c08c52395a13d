"""Released weights: fetched from the Hugging Face hub, checked, ported, and kept as Keras weights in the Keras home."""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from se_keras import storage, weights


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
    downloaded = _download(network, repo)
    model = build()
    weights.load(model.layers, downloaded)
    with storage.staged(path) as written:
        model.save_weights(written)
        checksum = _sha256(written)
        path.unlink(missing_ok=True)
    storage.write_json(_record(path), {"sha256": checksum, "repo": repo})
    return path


def home():
    """The folder of ported weights, in the Keras home: `$KERAS_HOME`, or `~/.keras`."""
    return Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "models" / "se_keras"


def _is_whole(path, repo):
    try:
        record = json.loads(_record(path).read_text())
        return record["repo"] == repo and record["sha256"] == _sha256(path)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _record(path):
    return path.with_name(path.name + ".json")


def _download(network, repo):
    """The path of the hub's file in the hub's own cache, with the SHA-256 that the hub gives for it."""
    import huggingface_hub

    try:
        path = Path(huggingface_hub.hf_hub_download(repo, FILE))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConnectionError(
            f"The weights of {network} could not be fetched from {repo}: {reason}. weights=PATH takes a file"
        ) from error
    # The cache names a large file after its SHA-256.
    blob = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", blob.name) and blob.name != _sha256(blob):
        blob.unlink()
        path.unlink(missing_ok=True)
        raise ValueError(f"What {repo} sent for {network} has not the SHA-256 that it announced: try again")
    return path


def _sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
