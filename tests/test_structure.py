"""Files import from lower layers alone, by the map in CONTRIBUTING.md; no cycles; the core needs Keras alone."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import se_keras

ROOT = Path(__file__).parents[1]
SOURCE = Path(se_keras.__file__).parent
NOT_CORE = {"decoding", "environment", "formats", "images", "protos", "timing"}
# What files of the core import in addition to Keras: arrays, and readers of files that are not Keras' own.
ALLOWED = {
    "drawing": {"matplotlib"},
    "normalization": {"numpy"},
    "preprocessing": {"numpy"},
    "typing": {"numpy"},
    "weights.files": {"h5py", "numpy", "safetensors", "torch"},
    "weights.porting": {"numpy"},
    "weights.released": {"huggingface_hub"},
    "export.lowering": {"numpy"},
    "export.lowering.algebra": {"numpy"},
}


def modules():
    """The path of each module by its name after `se_keras.`; a package has its own name, se_keras the empty one."""
    found = {}
    for folder in (SOURCE, SOURCE / "export"):  # a link in a checkout, which rglob does not follow
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(SOURCE).with_suffix("").parts
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


def imported(module):
    """What a file imports, inside functions too: modules of se_keras without their prefix, and names of others."""
    ours, others = set(), set()
    package = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            others |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = [part for part in package[: len(package) - node.level + 1] if part] if node.level else ["se_keras"]
            name = ".".join([*parts, *filter(None, [node.module])]) if node.level else node.module
            if not node.level and name.partition(".")[0] != "se_keras":
                others.add(name.partition(".")[0])
                continue
            name = name.removeprefix("se_keras").removeprefix(".")
            children = {f"{name}.{alias.name}".removeprefix(".") for alias in node.names}
            ours |= {child if child in MODULES else name for child in children}
    return ours - {module}, others - set(sys.stdlib_module_names)


IMPORTS = {module: imported(module)[0] for module in MODULES}


def layers():
    """`{module or package: its layer}` of the map in CONTRIBUTING.md."""
    (drawn,) = re.findall(r"```text\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    rows = [re.split(r"\s{2,}", line.strip()) for line in drawn.strip().splitlines()]
    return {name: number for number, (_, names) in enumerate(rows) for name in names.split()}


LAYERS = layers()


def layer_of(module):
    """The layer of the longest part of a module's name that the map has; None if it has none."""
    parts = module.split(".")
    found = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((LAYERS[name] for name in found if name in LAYERS), None)


def test_map_has_every_module_and_no_other():
    packages = {"", "export"}  # both gather names from below
    assert {module for module in MODULES if layer_of(module) is None} <= packages
    assert {name for name in LAYERS if name not in MODULES} == set()


def test_files_import_from_their_own_layer_and_those_below():
    upward = {
        (module, name)
        for module in MODULES
        for name in IMPORTS[module]
        if layer_of(module) is not None and name != "" and layer_of(name) is not None
        if layer_of(name) > layer_of(module)
    }
    assert upward == set()


def test_training_and_export_do_not_import_each_other():
    def crossing(here, there):
        return {(m, name) for m in MODULES if m.startswith(here) for name in IMPORTS[m] if name.startswith(there)}

    assert crossing("training", "export") | crossing("export", "training") == set()


def test_no_cycles_between_files():
    list(TopologicalSorter(IMPORTS).static_order())  # raises CycleError, which names the cycle


def test_core_and_lowering_import_keras_alone():
    core = [m for m in MODULES if layer_of(m) is not None and layer_of(m) <= LAYERS["catalogue"] and m not in NOT_CORE]
    core += ["export.lowering", "export.lowering.algebra", "export.lowering.copies"]
    foreign = {m: imported(m)[1] - {"keras"} - ALLOWED.get(m, set()) for m in core}
    assert {m: names for m, names in foreign.items() if names} == {}


def test_no_name_of_a_package_hides_its_module():
    # `import se_keras.export.lower` would give a function.
    hidden = {
        f"{package}.{alias.asname or alias.name}".removeprefix(".")
        for package, path in MODULES.items()
        if path.name == "__init__.py"
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ImportFrom) and node.module  # `from . import name` gives the module itself
        for alias in node.names
    }
    assert hidden & MODULES.keys() == set()


def test_import_se_keras_does_not_import_export_or_training():
    script = "import sys, se_keras; print(*{'se_keras.export', 'se_keras.training'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == ""
