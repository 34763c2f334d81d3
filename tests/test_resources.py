from pathlib import Path

import pytest

from autocomp import resources
from autocomp.errors import ConfigError, RunError, SpaceError
from autocomp.resources import available, find, writable

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """An empty working directory and an empty user's data folder."""
    found = {"here": tmp_path / "here", "user": tmp_path / "user"}
    for path in found.values():
        path.mkdir()
    monkeypatch.chdir(found["here"])
    monkeypatch.setattr(resources, "user_data_path", lambda name: found["user"] / name)
    return found


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    return path


def test_the_packages_own_are_always_there(places: dict[str, Path]) -> None:
    assert {"bits", "default", "int8", "prune"} <= set(available("search_spaces"))
    assert find("search_spaces", "default").read_text() == (REPOSITORY / "search_spaces/default.toml").read_text()
    assert find("hardware_profiles", "simulated").is_dir()
    assert list(available("search_spaces")) == sorted(available("search_spaces"))


def test_nearer_places_win(places: dict[str, Path]) -> None:
    user = put(places["user"] / "autocomp/search_spaces/default.toml")
    assert find("search_spaces", "default") == user
    here = put(places["here"] / "search_spaces/default.toml")
    assert find("search_spaces", "default") == here
    assert available("search_spaces")["default"] == here
    profile = put(places["here"] / "hardware_profiles/box/profile.toml").parent
    assert find("hardware_profiles", "box") == profile


def test_a_path_is_taken_as_it_is(places: dict[str, Path]) -> None:
    put(places["here"] / "mine.toml")
    assert find("search_spaces", "mine.toml") == Path("mine.toml")
    path = put(places["here"] / "other/space.txt")
    assert find("search_spaces", str(path)) == path
    folder = put(places["here"] / "boxes/box/profile.toml").parent
    assert find("hardware_profiles", str(folder)) == folder


def test_a_plain_name_never_means_a_file_nearby(places: dict[str, Path]) -> None:
    put(places["here"] / "default")
    assert find("search_spaces", "default").suffix == ".toml"


@pytest.mark.parametrize("name", ["nowhere", "nowhere.toml", "../search_spaces", "", "."])
def test_unknown_names_list_the_known(places: dict[str, Path], name: str) -> None:
    with pytest.raises(SpaceError, match="default, gpu, int8, prune"):
        find("search_spaces", name)
    with pytest.raises(ConfigError, match="simulated"):
        find("hardware_profiles", name)


def test_writing_goes_to_the_first_place_that_can_be_written(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    user = places["user"] / "autocomp/search_spaces"
    assert writable("search_spaces") == user and user.is_dir()
    here = places["here"] / "search_spaces"
    here.mkdir()
    assert writable("search_spaces") == here
    monkeypatch.setattr(resources.os, "access", lambda path, mode: path == user)
    assert writable("search_spaces") == user
    monkeypatch.setattr(resources.os, "access", lambda path, mode: False)
    with pytest.raises(RunError, match="can be written"):
        writable("search_spaces")
