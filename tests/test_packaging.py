"""What the wheel holds, what an import costs, and what CI and make do."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

HEAVY = (
    "torch",
    "torchvision",
    "torch_pruning",
    "optuna",
    "onnxruntime",
    "openvino",
    "onnx",
    "ray",
    "sklearn",
    "pandas",
)


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built without network."""
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_all_that_travels(wheel: Path, root: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        weights = file.read("autocomp/assets/resnet20_digits.safetensors")
        metadata = file.read(next(name for name in names if name.endswith("METADATA"))).decode()
        entry_points = file.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert weights == (root / "autocomp" / "assets" / "resnet20_digits.safetensors").read_bytes()
    assert "autocomp/py.typed" in names
    for kind in ("search_spaces", "hardware_profiles"):
        here = {path.relative_to(root).as_posix() for path in (root / kind).rglob("*") if path.is_file()}
        assert here, f"{kind} is empty"
        assert {f"autocomp/_resources/{name}" for name in here} <= names
    modules = {path.relative_to(root).as_posix() for path in (root / "autocomp").rglob("*.py")}
    assert modules <= names
    assert not any(name.startswith(("tests", "runs", "benchmarks", "examples")) for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "autocomp = autocomp.cli:main" in entry_points
    assert "Requires-Python: <3.14,>=3.11" in metadata
    assert wheel.stat().st_size < 4e6


def test_wheel_works_without_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    code = (
        "import autocomp, autocomp.models as models\n"
        f"assert autocomp.__file__.startswith({str(tmp_path)!r}), autocomp.__file__\n"
        "print(models.load_model('zoo:resnet20', None, 10, embedded=True).weights)"
    )
    ran = _python(code, cwd=tmp_path, path=tmp_path / "site")
    assert ran.stdout.strip() == "embedded", ran.stderr


@pytest.mark.parametrize("module", ["policy", "budget", "graph", "results", "outcome", "protocols", "quantization"])
def test_plain_nouns_import_nothing_heavy(module: str, root: Path, tmp_path: Path) -> None:
    code = f"import sys, autocomp.{module}\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    ran = _python(code, cwd=tmp_path, path=root)
    assert (ran.returncode, ran.stdout.strip()) == (0, ""), ran.stderr


def test_every_library_the_package_imports_is_named(root: Path) -> None:
    import ast
    from importlib.metadata import packages_distributions

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = [
        *project["dependencies"],
        *(line for name in ("ray", "tensorrt", "tensorrt-rtx", "openvino") for line in extras[name]),
    ]
    known = {line.split(">")[0].split("[")[0].lower().replace("_", "-") for line in named}
    owners = packages_distributions()
    for path in (root / "autocomp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                modules = [node.module]
            else:
                continue
            for top in {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"autocomp"}:
                distributions = {name.lower().replace("_", "-") for name in owners.get(top, [top])}
                assert distributions & known, f"{path} imports {top}, which pyproject.toml does not name"


def test_every_folder_of_code_is_a_package(root: Path) -> None:
    """The import contracts overlook a folder without ``__init__.py``."""
    for path in (root / "autocomp").rglob("*.py"):
        assert (path.parent / "__init__.py").is_file(), f"{path.parent} has no __init__.py"


def test_make_refuses_other_pythons(root: Path, tmp_path: Path) -> None:
    """A stand-in for an interpreter that reports another version runs make's own check."""
    old = tmp_path / "python3.10"
    old.write_text(
        f'#!/bin/sh\nif [ "$1" = -c ]; then exec {sys.executable} -c '
        '"import sys; sys.version_info = (3, 10, 4); exec(sys.argv[1])" "$2"; fi\ntouch "$(dirname "$0")/went-on"\n'
    )
    old.chmod(0o755)
    (tmp_path / "Makefile").write_bytes((root / "Makefile").read_bytes())
    (tmp_path / "pyproject.toml").write_bytes((root / "pyproject.toml").read_bytes())
    ran = subprocess.run(["make", "venv", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert "needs Python 3.11, 3.12 or 3.13" in ran.stderr and "is 3.10" in ran.stderr
    assert not (tmp_path / "went-on").exists()
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("preset", [True, False])
def test_ci_runs_check_then_test_with_an_absolute_shared_folder(preset: bool, root: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / ".ci").mkdir(parents=True)
    (tree / ".ci" / "run").write_bytes((root / ".ci" / "run").read_bytes())
    (tmp_path / "shared").mkdir()
    (tree / "Makefile").write_text('%:\n\t@echo "$@ $(AUTOCOMP_SHARED)" >> log\n')
    environment = {name: value for name, value in os.environ.items() if name != "AUTOCOMP_SHARED"}
    if preset:
        environment["AUTOCOMP_SHARED"] = "/elsewhere"
    subprocess.run(["bash", str(tree / ".ci" / "run")], cwd=tmp_path, env=environment, check=True)
    expected = "/elsewhere" if preset else str((tmp_path / "shared").resolve())
    assert (tree / "log").read_text().splitlines() == [f"check {expected}", f"test {expected}"]


def _python(code: str, cwd: Path, path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
