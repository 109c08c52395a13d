"""How a pair of LiteRT files is measured: what is measured, and what each target does."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from se_keras.storage import sha256
from se_keras.timing import Comparison
from se_keras.typing import Json, OnMessage

from ..litert.file import LiteRTModel, check_threads
from .results import AS_GIVEN, HERE, Cell, Counts, DeviceConditions, Footprint, Overhead, Profile, require_pair


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two LiteRT files to measure, and what the record says about them."""

    cell: Cell
    baseline: LiteRTModel
    network: LiteRTModel

    def __str__(self):
        cell = self.cell
        what = f", {cell.precision} {cell.variant}" * (cell.variant != AS_GIVEN)
        threads = f", {cell.threads} threads" * (cell.threads > 1)
        return f"{cell.network} compared with {cell.baseline}{what}{threads}"

    def overhead(
        self,
        comparison: Comparison | Counts,
        *,
        undelegated: tuple[str, ...] = (),
        footprints: tuple[Footprint, ...] = (),
        profiles: tuple[Profile, ...] = (),
        device: DeviceConditions = HERE,
        environment: Json | None = None,
    ) -> Overhead:
        """The `Overhead` of this pair."""
        cell = self.cell
        return Overhead(
            baseline=cell.baseline,
            network=cell.network,
            precision=cell.precision,
            variant=cell.variant,
            threads=cell.threads,
            input_shape=cell.input_shape,
            comparison=comparison,
            undelegated=undelegated,
            sha256=(sha256(self.baseline.content), sha256(self.network.content)),
            se=cell.se and asdict(cell.se),
            footprints=footprints,
            profiles=profiles,
            device=device,
            environment=environment,
        )


def pair_of_files(
    baseline: LiteRTModel,
    network: LiteRTModel,
    *,
    names: Sequence[str] | None = None,
    variant: str = AS_GIVEN,
    threads: int = 1,
) -> Pair:
    """The pair of two files with the same input.

    Args:
        names: Of the baseline and the network; default: what their manifests say.

    Raises:
        ValueError: If the inputs differ or leave the size free, or if the number of threads is out of range.
    """
    check_threads(threads)
    manifests = baseline.manifest, network.manifest
    a, b = names or [manifest["network"] for manifest in manifests]
    cell = Cell(
        baseline=a,
        network=b,
        precision="/".join(dict.fromkeys(manifest["precision"] for manifest in manifests)),
        variant=variant,
        threads=threads,
        input_shape=require_pair(baseline.runner(), network.runner()),
        se=None,
    )
    return Pair(cell=cell, baseline=baseline, network=network)


def largest_difference(precision: str) -> float:
    """How far the outputs of a file on a device may be from those here, as a share of their range.

    In float only the order of sums differs: 1e-6 was seen. In int8, XNNPACK rounds the products of two tensors in
    another way on Arm than on x86, which grows to 3e-2 in an untrained network with fifty layers. Wrong kernels gave
    0.14 and more.

    Args:
        precision: That of the files, such as `"int8"`; `"float32/int8"` if they differ.
    """
    return max({"float32": 1e-4, "float16": 1e-3}.get(one, 0.1) for one in precision.split("/"))


def require_delegated(undelegated: Collection[str], *, allow_undelegated: bool) -> None:
    """Raises ValueError if there are operators that are not delegated to XNNPACK, unless they are allowed."""
    if undelegated and not allow_undelegated:
        raise ValueError(
            f"Not delegated to XNNPACK: {', '.join(undelegated)}. These operators run on slow kernels, which would "
            "distort the ratio; allow_undelegated=True (--allow-undelegated) measures the files anyway"
        )


class Target(Protocol):
    """Something to measure on. Each file of `targets/` has one: a frozen dataclass, whose fields are its options."""

    def connect(self, progress: OnMessage) -> Json:
        """Checks, and gets, what the measurement needs, before a minute of exporting. Returns the environment.

        The environment has the fields of `se_keras.environment.environment`, as far as the target knows them, and
        `target`, the name of the target.

        Raises:
            OSError, ValueError: If something is missing.
        """
        ...

    def measure(self, pairs: Iterable[Pair], progress: OnMessage) -> Iterator[Overhead]:
        """Yields each `Overhead` as soon as it is measured. The iterable exports each pair when it is asked for it.

        If the device is lost, the last `Overhead` is that of the blocks so far, and its `device.missing` says so.

        Raises:
            OSError, ValueError: If the target cannot measure a pair.
        """
        ...
