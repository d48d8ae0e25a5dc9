"""Imports point down the layers, make no cycle and need neither Torch nor TensorFlow."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "latent_diffusion_jax"

# Folders and files of the package, lowest first. Those of one layer do not import each other.
LAYERS = (
    ("runtime",),
    ("diffusion", "models"),
    ("conditioning", "data", "weights"),
    ("ldm", "evaluation"),
    ("sampling",),
    ("training",),
    ("build", "older_configs"),
    ("first_stages", "conditions", "config_checks", "planning", "workdirs"),
    ("loaded_model",),
    ("published",),
    ("loading",),
    ("draw_requests",),
    ("pipelines", "saving", "autoencoding", "starting_points"),
    (
        "train",
        "plan",
        "sample",
        "evaluate",
        "convert",
        "encode",
        "reconstruct",
        "export",
        "exported_draw",
    ),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def sources(root: pathlib.Path) -> dict[str, str]:
    """Contents of a package's files by module: {"latent_diffusion_jax.data.sources": ...}."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text("utf-8")
    return found


def imported_names(module: str, is_package: bool, source: str) -> set[str]:
    """Everything that a module imports, at any depth, as absolute dotted names."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                kept = len(parts) - node.level + is_package
                base = ".".join([*parts[:kept], *([base] if base else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def import_graph(files: dict[str, str]) -> dict[str, set[str]]:
    """For each module of the package those of the package that it imports."""
    packages = {module.rpartition(".")[0] for module in files}
    graph: dict[str, set[str]] = {}
    for module, source in files.items():
        graph[module] = set()
        for name in imported_names(module, module in packages, source):
            while name and name not in files:  # a function's name leads to its module
                name = name.rpartition(".")[0]
            if name and name != module:
                graph[module].add(name)
    return graph


def part_of(module: str) -> str:
    """The folder or file of the package's top level that a module is or lies in."""
    return module.split(".")[1]


def imports_up(graph: dict[str, set[str]]) -> list[str]:
    return [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if PACKAGE not in (module, other)
        and part_of(module) != part_of(other)
        and LEVEL[part_of(other)] >= LEVEL[part_of(module)]
    ]


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Some modules that import each other in a ring, or []."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph[module]):
            if cycle := visit(other, [*path, module]):
                return cycle
        done.add(module)
        return []

    for module in graph:
        if cycle := visit(module, []):
            return cycle
    return []


@pytest.fixture(scope="module")
def files():
    return sources(ROOT)


@pytest.fixture(scope="module")
def graph(files):
    return import_graph(files)


def test_every_part_has_a_layer(files):
    assert {part_of(module) for module in files if module != PACKAGE} == LEVEL.keys()


def test_the_graph_is_read(graph):
    assert f"{PACKAGE}.build" in graph[f"{PACKAGE}.train"]
    assert f"{PACKAGE}.data.digits" in graph[f"{PACKAGE}.data.sources"]
    assert sum(len(others) for others in graph.values()) > 50


def test_imports_point_down(graph):
    assert imports_up(graph) == []


def test_no_cycle(graph):
    assert find_cycle(graph) == []


def test_packages_are_empty(files):
    # A package that imports its children is how cycles begin; the root has the version.
    packages = {module.rpartition(".")[0] for module in files} - {"", PACKAGE}
    assert packages
    assert [package for package in packages if files[package].strip()] == []


def test_no_module_names_torch_or_tensorflow(files):
    packages = {module.rpartition(".")[0] for module in files}
    for module, source in files.items():
        roots = {name.split(".")[0] for name in imported_names(module, module in packages, source)}
        assert not roots & {"torch", "tensorflow"}, module


# The checks above, on a package made up to break the rules.


def made_up(**changes: str) -> dict[str, str]:
    names = ("", ".runtime", ".runtime.a", ".runtime.b", ".models", ".models.unet", ".train")
    files = {PACKAGE + name: "" for name in names}
    return files | {f"{PACKAGE}.{name.replace('__', '.')}": source
                    for name, source in changes.items()}  # fmt: skip


@pytest.mark.parametrize(
    "source",
    [
        "import latent_diffusion_jax.train",
        "from latent_diffusion_jax import train",
        "from latent_diffusion_jax.train import main",
        "from .. import train",
        "from ..train import main as x",
        "def f():\n    from latent_diffusion_jax.train import main",
        "if TYPE_CHECKING:\n    import latent_diffusion_jax.train as t",
        "from latent_diffusion_jax.models.unet import UNet",  # sideways
        "from latent_diffusion_jax import models",
    ],
)
def test_imports_up_are_found(source):
    assert len(imports_up(import_graph(made_up(runtime__a=source)))) == 1


@pytest.mark.parametrize(
    "source", ["from latent_diffusion_jax.runtime import a", "from . import a", "import jax.numpy"]
)
def test_imports_within_a_folder_are_fine(source):
    assert imports_up(import_graph(made_up(runtime__b=source))) == []


def test_cycles_are_found():
    ring = made_up(
        runtime__a="from latent_diffusion_jax.runtime.b import f",
        runtime__b="def f():\n    from . import a",
    )
    assert len(find_cycle(import_graph(ring))) == 3
    assert find_cycle(import_graph(ring | {f"{PACKAGE}.runtime.b": ""})) == []


# What is imported in the end.


def run_python(code: str) -> str:
    """Output of some lines of Python in a new process."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Refuses both libraries, and says which module asked for them.
REFUSE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "tensorflow"):
            frame = sys._getframe(1)
            while "importlib" in frame.f_globals.get("__name__", ""):
                frame = frame.f_back
            print(name, "for", frame.f_globals["__name__"])
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
"""


def test_all_modules_import_together_without_torch_and_tensorflow(files):
    assert run_python(f"{REFUSE}\nimport {', '.join(sorted(files))}") == ""
