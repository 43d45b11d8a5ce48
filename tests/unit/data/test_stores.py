import io
import stat
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kdcompress.data._stores import END_BYTES, open_store
from kdcompress.errors import DataError

from .pictures import write_folder, write_tar, write_zip

FILES = {
    "b/two.bin": bytes(range(256)) * 300,
    "a/one.bin": b"1" * 5000,
    "top.txt": b"",
    "a/.hidden/x": b"x",
    "a/.DS_Store": b"x",
    "a/Thumbs.db": b"x",
    "__MACOSX/a/one.bin": b"x",
}
SHOWN = ("a/one.bin", "b/two.bin", "top.txt")
WRITERS: dict[str, Callable[[Path], Path]] = {
    "folder": lambda path: write_folder(path / "data", FILES),
    "zip": lambda path: write_zip(path / "data.zip", FILES),
    "deflated": lambda path: write_zip(path / "data.zip", FILES, zipfile.ZIP_DEFLATED),
    "tar": lambda path: write_tar(path / "data.tar", FILES),
    "tgz": lambda path: write_tar(path / "data.tgz", FILES, "w:gz"),
    "tar.xz": lambda path: write_tar(path / "data.tar.xz", FILES, "w:xz"),
    "tar.bz2": lambda path: write_tar(path / "data.tar.bz2", FILES, "w:bz2"),
    "dotted tar": lambda path: write_tar(path / "data.tar", {f"./{name}": data for name, data in FILES.items()}),
    "backslashes": lambda path: write_zip(path / "d.zip", {name.replace("/", "\\"): FILES[name] for name in FILES}),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_store_holds_the_same_files(kind: str, tmp_path: Path) -> None:
    store = open_store(WRITERS[kind](tmp_path))
    before = sorted(tmp_path.rglob("*"))
    assert store.files == SHOWN
    for name in SHOWN:
        assert store.read(name) == FILES[name]
        ends = store.ends(name)
        assert (ends.size, ends.head, ends.tail) == (
            len(FILES[name]),
            FILES[name][:END_BYTES],
            FILES[name][-END_BYTES:],
        )
        assert store.where(name).endswith(name)
    assert sorted(tmp_path.rglob("*")) == before  # nothing was extracted


@pytest.mark.parametrize("kind", ["folder", "deflated", "tar", "tgz"])
def test_threads_do_not_disturb_each_other(kind: str, tmp_path: Path) -> None:
    store = open_store(WRITERS[kind](tmp_path))
    names = list(SHOWN) * 50
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(store.read, names)) == [FILES[name] for name in names]


def test_empty_folders_are_listed(tmp_path: Path) -> None:
    (tmp_path / "data/train/cat").mkdir(parents=True)
    (tmp_path / "data/.git").mkdir()
    assert open_store(tmp_path / "data").folders == {"train", "train/cat"}
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.mkdir("train/cat")
    assert "train/cat" in open_store(tmp_path / "z.zip").folders
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        archive.add(tmp_path / "data", "data")
    assert "data/train/cat" in open_store(tmp_path / "t.tar").folders


def test_links_in_archives_are_ignored(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "a.bin"), (tarfile.FIFOTYPE, "")):
            member = tarfile.TarInfo(f"link{kind!r}")
            member.type, member.linkname = kind, target
            archive.addfile(member)
        real = tarfile.TarInfo("a.bin")
        real.size = 1
        archive.addfile(real, io.BytesIO(b"a"))
    assert open_store(tmp_path / "t.tar").files == ("a.bin",)
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as zipped:
        link = zipfile.ZipInfo("link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        zipped.writestr(link, "/etc/passwd")
        zipped.writestr("a.bin", b"a")
    assert open_store(tmp_path / "z.zip").files == ("a.bin",)


def test_links_in_folders_are_followed_once(tmp_path: Path) -> None:
    write_folder(tmp_path / "elsewhere", {"x.bin": b"x"})
    write_folder(tmp_path / "data", {"a/one.bin": b"1"})
    (tmp_path / "data/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/a/two.bin").symlink_to(tmp_path / "data/a/one.bin")
    (tmp_path / "data/a/loop").symlink_to(tmp_path / "data")
    store = open_store(tmp_path / "data")
    assert store.files == ("a/one.bin", "a/two.bin", "b/x.bin")
    assert store.read("b/x.bin") == b"x"


@pytest.mark.parametrize("name", ["../e.png", "a/../../e.png", "/etc/e.png", "..\\e.png", "C:/e.png"])
def test_paths_that_lead_out_are_refused(name: str, tmp_path: Path) -> None:
    for path in (write_zip(tmp_path / "z.zip", {name: b"x"}), write_tar(tmp_path / "t.tar", {name: b"x"})):
        with pytest.raises(DataError, match=r"leads out of it.*e\.png"):
            open_store(path)


def test_a_cut_archive_is_refused(tmp_path: Path) -> None:
    for kind in ("zip", "deflated", "tar", "tgz", "tar.xz", "tar.bz2"):
        whole = WRITERS[kind](tmp_path)
        data = whole.read_bytes()
        for cut in (0, 10, len(data) // 2, len(data) * 9 // 10):
            broken = tmp_path / f"cut-{whole.name}"
            broken.write_bytes(data[:cut])
            with pytest.raises(DataError, match=str(broken)) as caught:  # noqa: PT012
                store = open_store(broken)
                for name in SHOWN:
                    store.read(name)
                assert store.files == SHOWN, "a part of it passed for the whole"
            assert caught.value.fix


def test_changed_bytes_in_a_zip_are_noticed(tmp_path: Path) -> None:
    for kind in ("zip", "deflated"):
        path = WRITERS[kind](tmp_path)
        with zipfile.ZipFile(path) as archive:
            offset = archive.getinfo("b/two.bin").header_offset
        data = bytearray(path.read_bytes())
        data[offset + 60] ^= 0xFF
        path.write_bytes(data)
        store = open_store(path)
        assert store.read("a/one.bin") == FILES["a/one.bin"]
        with pytest.raises(DataError, match=r"data\.zip:b/two\.bin is damaged"):
            store.read("b/two.bin")


def test_unusual_zips_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="method 14"):
        open_store(write_zip(tmp_path / "lzma.zip", {"a.png": b"x" * 99}, zipfile.ZIP_LZMA))
    path = write_zip(tmp_path / "secret.zip", {"a.png": b"x"})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="encrypted"):
        open_store(path)


def test_a_file_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path: Path) -> None:
    """268 MB of zeros in 260 kB; the time and the memory are spent only here, to write it."""
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a/x.png", "w") as member:
        for _ in range(257):
            member.write(bytes(2**20))
    store = open_store(path)
    with pytest.raises(DataError, match=r"unpacks from 26[0-9],[0-9]{3} bytes to 269,484,032") as caught:
        store.read("a/x.png")
    assert "a/x.png" in str(caught.value)


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        open_store(tmp_path / "nothing")
    (tmp_path / "page.zip").write_text("<html>404</html>")
    with pytest.raises(DataError, match="neither a folder nor an archive"):
        open_store(tmp_path / "page.zip")


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    store = open_store(write_folder(tmp_path / "data", {"a/x.bin": b"x"}))
    (tmp_path / "data/a/x.bin").unlink()
    for look in (store.read, store.ends):
        with pytest.raises(DataError, match=r"cannot read .*a/x\.bin: No such file"):
            look("a/x.bin")
