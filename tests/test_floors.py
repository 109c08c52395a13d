"""Every file imports from lower floors alone, and the core from Keras alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import se_keras

# From the ground up. A module listed here may not exist yet; one that exists is listed.
FLOORS = (
    ("version", "layers", "graph", "storage", "naming", "figures", "errors", "training.recipe"),
    ("recalibration", "weights"),
    ("blocks", "pretrained"),
    ("architectures.*",),
    ("catalogue",),
    ("applications", "preprocessing", "complexity", "training.data", "training.images", "training.checkpoint"),
    ("pyramid", "training.shards", "training.pipeline", "training.distribution"),
    (
        "training.record",
        "training.sources",
        "export.lower",
        "export.agreement",
        "export.manifest",
        "export.images",
        "export.metadata",
        "export.signatures",
        "export.protos",
        "export.energy",
        "export.session",
        "export.events",
    ),
    ("training.fit", "export.golden", "export.warmup"),
    ("export.savedmodel", "export.quantize", "export.flatbuffer", "export.calibration"),
    ("export.litert", "export.twin", "export.serving"),
    (
        "export.verify",
        "export.channels",
        "export.inspection",
        "export.qat",
        "export.benchmark",
        "export.profiler",
    ),
    ("export.overhead", "training.evaluation"),
    ("export.report", "export.load", "export.android", "training.throughput", "quickstart", "cli.screen"),
    ("cli.networks", "cli.training", "cli.profiling", "cli.files", "cli.measuring", "cli.serving"),
    ("cli.evaluating",),
    ("cli",),
)
# The highest floor that a package's __init__.py reads, from its own children; "" is se_keras itself.
PACKAGES = {"": 6, "architectures": 5, "training": 8, "export": 11}
CORE = 4

SOURCE = Path(se_keras.__file__).parent
FOLDERS = {"": SOURCE, "export.": SOURCE.parent / "export"}


def files():
    """The path of each module by its name behind `se_keras.`; a package's is its own name."""
    found = {}
    for prefix, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[(prefix + ".".join(parts)).rstrip(".")] = path
    return found


FILES = files()
MODULES = [name for name in FILES if name not in PACKAGES]


def floor_of(module):
    """The floor of a module; None if it is not listed."""
    family = f"{module.rpartition('.')[0]}.*"
    return next((floor for floor, modules in enumerate(FLOORS) if module in modules or family in modules), None)


def imports(module):
    """What a file imports, inside functions too, as dotted names: `from a import b` is `a.b` where that is a file."""
    imported = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import in line {node.lineno}"
            for alias in node.names:
                within = f"{node.module}.{alias.name}".removeprefix("se_keras.")
                imported.add(f"se_keras.{within}" if within in FILES else node.module)
    return imported


def ours(module):
    """The modules of se_keras that a file imports, behind `se_keras.`; se_keras itself is the empty name."""
    names = (name for name in imports(module) if name.partition(".")[0] == "se_keras")
    return {name.removeprefix("se_keras").removeprefix(".") for name in names}


def others(module):
    """The packages that a file imports, without se_keras and the standard library."""
    roots = {name.partition(".")[0] for name in imports(module)}
    return roots - {"se_keras"} - set(sys.stdlib_module_names)


def height(module):
    """The floor that another module needs to be above of in order to import this one."""
    return PACKAGES[module] if module in PACKAGES else floor_of(module)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_is_on_a_floor(module):
    assert floor_of(module) is not None


@pytest.mark.parametrize("module", [module for module in MODULES if floor_of(module) is not None])
def test_module_imports_from_lower_floors_alone(module):
    too_high = {name for name in ours(module) if height(name) is None or height(name) >= floor_of(module)}
    assert too_high == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports_from_its_own_children_up_to_its_floor(package):
    def allowed(name):
        child = not package or name.startswith(f"{package}.")
        return child and floor_of(name) is not None and floor_of(name) <= PACKAGES[package]

    assert {name for name in ours(package) if not allowed(name)} == set()


def test_package_imports_keras_alone_and_no_export():
    assert others("") == set()
    assert {name for name in ours("") if name.partition(".")[0] == "export"} == set()


CORE_MODULES = [
    module for module in MODULES if module == "complexity" or floor_of(module) is not None and floor_of(module) <= CORE
]


@pytest.mark.parametrize("module", CORE_MODULES)
def test_core_imports_keras_and_the_standard_library_alone(module):
    # Where weights come from: Keras' files, state dicts, the hub.
    readers = {"weights": {"h5py", "numpy", "safetensors", "torch"}, "pretrained": {"huggingface_hub"}}
    assert others(module) <= {"keras"} | readers.get(module, set())


def test_import_se_keras_does_not_import_export():
    script = "import sys, se_keras; print([name for name in sys.modules if name.startswith('se_keras.export')])"
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"
