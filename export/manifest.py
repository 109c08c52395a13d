"""What is written beside an export: what it is, what made it, and how well it agrees with the model it came from."""

import hashlib
from dataclasses import asdict
from importlib.metadata import version

PACKAGES = (
    "se-keras",
    "keras",
    "tensorflow",
    "numpy",
    "ai-edge-litert",
    "ai-edge-quantizer",
    "tensorflow-model-optimization",
    "tf-keras",
)


def manifest(*, network, precision, signature, lowering, agreement, held_out, **more):
    """The manifest as a dict for JSON.

    Args:
        network: Name of the model.
        precision: Name of the precision.
        signature: `{"inputs": {name: {"shape", "dtype"}}, "outputs": ...}`.
        lowering: A `Lowering`, or None for a model exported as published.
        agreement: An `Agreement` with the Keras model.
        held_out: Whether it was measured on inputs that calibration did not see.
        **more: Further entries.
    """
    return {
        "schema": 1,
        "network": network,
        "precision": precision,
        "signature": signature,
        "lowering": lowering and {kind: len(found) for kind, found in asdict(lowering).items()},
        "agreement": asdict(agreement) | {"held_out": held_out},
        **more,
        "versions": versions(),
    }


def versions():
    """Versions of the packages that make an export what it is."""
    return {package: version(package) for package in PACKAGES}


def sha256(content):
    """Hexadecimal SHA-256 of bytes."""
    return hashlib.sha256(content).hexdigest()
