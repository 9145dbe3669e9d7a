"""What holds for the repository as a whole."""

import ast
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import allo_fast
import allo_kernels

ROOT = Path(__file__).parents[1]
FLOORS = "errors section device config_train config_sections config signals durable journal config_file".split()
FLOORS += "config_keys ranks data model method training locating plan runs stages report compare".split()
FLOORS += "starting overview publishing converting arguments console commands".split()
SOURCES = ("allo_fast", "benchmarks", "examples", "kernels", "tests")
PYTHON = sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py"))


def layer(module: str) -> int:
    return FLOORS.index(module.split(".")[1])


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("kernels.").removesuffix(".__init__")


MODULES = {
    name_of(path): path for root in ("allo_fast", "kernels/allo_kernels") for path in (ROOT / root).rglob("*.py")
}


def imports(path: Path) -> set[str]:
    """Our modules that a file imports, wherever the import stands, for types only too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= names or {node.module} & MODULES.keys()
    return found


def test_no_two_modules_import_each_other_by_any_way_round():
    left = {name: imports(path) - {name} for name, path in MODULES.items() if name not in ("allo_fast", "allo_kernels")}
    while leaves := {name for name, imported in left.items() if not imported & left.keys()}:
        left = {name: imported for name, imported in left.items() if name not in leaves}
    assert not left


@pytest.mark.parametrize("path", sorted((ROOT / "allo_fast").rglob("*.py")), ids=lambda p: p.stem)
def test_imports_go_one_way(path):
    module = name_of(path)
    if module in ("allo_fast", "allo_fast.__main__"):
        return
    for imported in imports(path):
        if imported.startswith("allo_fast."):
            same = module.split(".")[1] == imported.split(".")[1]
            assert same or layer(imported) < layer(module), f"{module} imports {imported}"


def test_the_floors_name_every_folder():
    found = {module.name for module in pkgutil.iter_modules(allo_fast.__path__)} - {"__main__"}
    assert found == set(FLOORS)


@pytest.mark.parametrize("package", [allo_fast, allo_kernels], ids=lambda p: p.__name__)
def test_every_module_imports(package):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)


def test_the_kernels_do_not_import_the_engine():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert "allo_fast" not in path.read_text()


def run_python(code: str, **environment) -> str:
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, env={**environment, "PATH": ""}
    )
    return done.stdout + done.stderr


def test_import_kernels_is_never_ours():
    # -S leaves out site-packages: only the repository root could answer.
    said = run_python("import sys; sys.path.insert(0, '.'); import kernels; print(getattr(kernels, '__file__', None))")
    assert "None" in said or "ModuleNotFoundError" in said
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_it_runs_uninstalled():
    installed = [path for path in sys.path if "site-packages" in path]
    code = f"import sys; sys.path += {installed!r}; import allo_kernels, allo_fast; print('ran')"
    assert "ran" in run_python(code, PYTHONPATH=".:kernels")


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: p.stem)
def test_ascii(path):
    assert path.read_text().isascii()


def test_no_module_is_longer_than_a_reader_can_hold():
    lengths = {path.name: len(path.read_text().splitlines()) for path in PYTHON if "tests" not in path.parts}
    assert not {name: length for name, length in lengths.items() if length > 300}


def test_the_map_names_every_file():
    tree = (ROOT / "CONTRIBUTING.md").read_text()
    named = [path.name for path in PYTHON if "tests" not in path.parts and path.name != "__init__.py"]
    missing = [name for name in [*named, *(page.name for page in ROOT.glob("docs/*"))] if name not in tree]
    assert not missing


def test_pages_lead_to_what_is_there():
    """And the README is one that is read to its end."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"
    assert len(pages[0].read_text().splitlines()) <= 150


def test_the_packages_are_all_installed_ones():
    setup = (ROOT / "setup.py").read_text()
    for path in (ROOT / "allo_fast").rglob("__init__.py"):
        assert f'"{".".join(path.relative_to(ROOT).parts[:-1])}"' in setup


@pytest.mark.xdist_group("grouped")
def test_groups_of_tests_share_what_is_made_once(request):
    """pytest 9.2 takes a node's name in a way that pytest-xdist 3.8 cannot add a group to."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert request.node.nodeid.endswith("@grouped")
