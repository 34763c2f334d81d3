"""What several tests share."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports torch: several workers share the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent


# Whole searches take most of the time: begun first, so that the workers end together.
LONGEST = ("test_end_to_end.py", "test_readme.py", "test_bad_input.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the source tree."""
    return ROOT


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from, or left in, the cache and the profiles of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Pretrained CIFAR-10 weights and images, which are not part of the repository."""
    where = os.environ.get("AUTOCOMP_SHARED")
    if not where:
        pytest.skip("AUTOCOMP_SHARED is not set: no pretrained CIFAR-10 weights and images")
    folder = Path(where)
    if not folder.is_dir():
        pytest.fail(f"AUTOCOMP_SHARED names {where}, which is no folder")
    return folder


@pytest.fixture(scope="session")
def cifar10_npz(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of CIFAR-10 as ``x_train y_train x_test y_test``; made once for all workers."""
    from filelock import FileLock

    base = tmp_path_factory.getbasetemp()
    folder = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    path = folder / "cifar10.npz"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            unfinished = folder / "unfinished.npz"
            subprocess.run([sys.executable, str(shared / "data" / "unpack.py"), str(unfinished)], check=True)
            unfinished.rename(path)
    return path
