import os
import time
from pathlib import Path

import pytest

from kdcompress import files
from kdcompress.errors import BundleError, OutputError
from kdcompress.files import atomic_folder, atomic_write, file_digest, scratch_folder


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def fail() -> None:
        with atomic_write(target) as handle:
            handle.write(b"half")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_written_file_is_whole_and_its_digest_is_sha256(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "deep" / "file", "w") as handle:
        handle.write("abc")
    # FIPS 180-4, appendix B.1: the digest of "abc".
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_digest(tmp_path / "deep" / "file") == expected


def test_a_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "one").write_text("1")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_no_error_speaks_of_a_folder_that_is_gone(tmp_path: Path) -> None:
    def fail() -> None:
        with scratch_folder() as folder:
            made.append(folder)
            what = f"not taken: [1] : FAIL : Load model from {folder}/deep/a.onnx failed:No Op Foo (see '{folder}/b')"
            raise BundleError(what, where=str(folder / "a.onnx"), fix="another")

    made: list[Path] = []
    with pytest.raises(BundleError) as caught:
        fail()
    assert not made[0].exists()
    assert str(caught.value) == "not taken: [1] : FAIL : No Op Foo (see '')\nanother"

    def fail_beside() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            raise BundleError(f"{folder} is damaged", where=str(folder / "a.onnx"))

    with pytest.raises(BundleError) as caught:
        fail_beside()
    assert str(caught.value) == f"{tmp_path}/out is damaged\n{tmp_path}/out/a.onnx"


def test_a_folder_that_is_not_empty_is_refused_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(OutputError, match="not empty"), atomic_folder(tmp_path / "out"):
        pass
    with pytest.raises(OutputError, match="not empty"), atomic_folder(tmp_path / "out", replace="bundle.json"):
        pytest.fail("a folder of somebody else's is not replaced")
    (tmp_path / "out" / "bundle.json").touch()
    with atomic_folder(tmp_path / "out", replace="bundle.json") as folder:
        (folder / "new").write_text("1")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["new"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_is_replaced_with_and_without_the_systems_exchange(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    for content in ("first", "second"):
        with atomic_folder(tmp_path / "out", replace="bundle.json") as folder:
            (folder / "bundle.json").write_text(content)
    assert (tmp_path / "out" / "bundle.json").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("marker", [None, "bundle.json"])
def test_of_two_that_make_one_folder_nobody_speaks_of_permissions(marker: str | None, tmp_path: Path) -> None:
    def make() -> None:
        with atomic_folder(tmp_path / "out", replace=marker) as folder:
            (folder / "bundle.json").write_text("mine")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "bundle.json").write_text("theirs")

    if marker is None:
        with pytest.raises(OutputError, match=r"another command wrote .* meanwhile"):
            make()
    else:
        make()
    content = (tmp_path / "out" / "bundle.json").read_text()
    assert content == ("theirs" if marker is None else "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_moved_aside_comes_back(tmp_path: Path) -> None:
    aside, half = tmp_path / ".out.0123abcd.old", tmp_path / ".out.89abcdef.tmp"
    for folder, content in ((aside, "good"), (half, "half")):
        folder.mkdir()
        (folder / "bundle.json").write_text(content)

    def fail() -> None:
        with atomic_folder(tmp_path / "out", replace="bundle.json"):
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert (tmp_path / "out" / "bundle.json").read_text() == "good"
    assert half.exists(), "another process may be writing it"
    yesterday = time.time() - 2 * 24 * 3600
    os.utime(half, (yesterday, yesterday))
    with pytest.raises(ValueError, match="stop"):
        fail()
    assert not half.exists()


@pytest.mark.parametrize("there", [True, False])
def test_through_a_link_what_it_points_to_is_written(there: bool, tmp_path: Path) -> None:
    if there:
        (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "new").write_text("1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target" / "new").read_text() == "1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"), atomic_write(tmp_path / "file" / "inside"):
        pass
