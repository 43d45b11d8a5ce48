import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdcompress.data.base import MemorySet, Split
from kdcompress.data.loader import TrainLoader, eval_batches
from kdcompress.data.splits import Splits, load_splits
from kdcompress.data.views import build_views
from kdcompress.errors import DataError, InputError, RecipeError
from kdcompress.types import UNLABELLED

from .pictures import encoded, noise, tree, write_folder, write_tar, write_zip

COUNTS = {"bird": 20, "cat": 10, "dog": 30}
FILES = tree(COUNTS, test={"bird": 4, "cat": 4, "dog": 4})


def pixels_of(split: Split) -> list[bytes]:
    return [image.numpy().tobytes() for image in split.images.load(split.ids)]


def counts_of(split: Split) -> list[int]:
    return torch.bincount(split.labels, minlength=3).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pets") / "pets", FILES)


def same_splits(one: Splits, other: Splits) -> bool:
    parts = [(getattr(one, name), getattr(other, name)) for name in ("train", "val", "test", "calibration")]
    return one.digest == other.digest and all(torch.equal(a.ids, b.ids) for a, b in parts)


def test_a_folder_with_one_held_out_part(folder: Path) -> None:
    splits = load_splits(str(folder))
    assert (splits.name, splits.classes, splits.image_shape) == ("pets", ("bird", "cat", "dog"), (3, 8, 8))
    assert counts_of(splits.val) == [2, 1, 3]
    assert counts_of(splits.train) == [18, 9, 27]
    assert counts_of(splits.test) == [4, 4, 4]
    assert splits.holdout is splits.unlabeled is None
    assert splits.notes == ()
    together = sorted(splits.train.ids.tolist() + splits.val.ids.tolist())
    assert together == list(range(60))
    assert splits.train.images is splits.val.images
    assert set(splits.calibration.ids.tolist()) <= set(splits.train.ids.tolist())


def test_every_image_has_the_label_of_its_folder(folder: Path) -> None:
    splits = load_splits(str(folder))
    label_of = {}
    for name, data in FILES.items():
        pixels = np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1).tobytes()
        label_of[pixels] = (name.split("/")[0], ["bird", "cat", "dog"].index(name.split("/")[1]))
    for split, part in ((splits.train, "train"), (splits.val, "train"), (splits.test, "test")):
        for pixels, label in zip(pixels_of(split), split.labels.tolist(), strict=True):
            assert label_of[pixels] == (part, label)


ARCHIVES: dict[str, Callable[[Path], Path]] = {
    "zip": lambda path: write_zip(path / "pets.zip", FILES, zipfile.ZIP_DEFLATED),
    "tar": lambda path: write_tar(path / "pets.tar", FILES),
    "tgz": lambda path: write_tar(path / "pets.tgz", FILES, "w:gz"),
    "nested": lambda path: write_zip(path / "pets.v1.zip", {f"Pets-main/{name}": FILES[name] for name in FILES}),
    "nested folder": lambda path: write_folder(path / "pets", {f"inner/{name}": FILES[name] for name in FILES}),
    "with junk": lambda path: write_zip(
        path / "pets.zip",
        FILES
        | {"__MACOSX/train/cat/._0000.png": b"x", "train/.DS_Store": b"x", "train/cat/Thumbs.db": b"x", "README": b"x"},
    ),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_archives_are_the_same_data_as_the_folder(kind: str, folder: Path, tmp_path: Path) -> None:
    found = load_splits(str(ARCHIVES[kind](tmp_path)))
    assert same_splits(found, load_splits(str(folder)))
    assert found.notes == ()


@pytest.mark.parametrize("alias", ["val", "valid", "Validation"])
def test_val_and_test_are_used_as_they_are(alias: str, tmp_path: Path) -> None:
    files = tree(COUNTS, test={"bird": 2, "cat": 2, "dog": 2}, val={"bird": 1, "cat": 2, "dog": 3})
    splits = load_splits(str(write_folder(tmp_path, {n.replace("val/", f"{alias}/"): d for n, d in files.items()})))
    assert len(splits.train) == 60
    assert counts_of(splits.val) == [1, 2, 3]
    assert counts_of(splits.test) == [2, 2, 2]


def test_a_lone_val_folder_is_the_test_set(tmp_path: Path) -> None:
    splits = load_splits(str(write_folder(tmp_path, tree(COUNTS, val={"bird": 2, "cat": 2, "dog": 2}))))
    assert counts_of(splits.test) == [2, 2, 2]
    assert len(splits.val) == 6


def test_seeds_choose_val_and_nothing_else_changes(folder: Path) -> None:
    vals = {tuple(load_splits(str(folder), split_seed=seed).val.ids.tolist()) for seed in range(6)}
    assert len(vals) == 6
    one, other = load_splits(str(folder), split_seed=1), load_splits(str(folder), split_seed=2)
    assert one.digest == other.digest
    assert torch.equal(one.test.ids, other.test.ids)
    assert same_splits(one, load_splits(str(folder), split_seed=1, workers=3))


def test_limits_come_after_val_and_keep_shares(folder: Path) -> None:
    full, some = load_splits(str(folder)), load_splits(str(folder), limit=18, test_limit=6)
    assert torch.equal(full.val.ids, some.val.ids)
    assert counts_of(some.train) == [6, 3, 9]
    assert counts_of(some.test) == [2, 2, 2]
    assert set(some.train.ids.tolist()) < set(full.train.ids.tolist())
    assert full.digest == some.digest
    assert "2 of 3 classes have no training image" in load_splits(str(folder), limit=1).notes[0]


def test_calibration_is_balanced_and_from_train(folder: Path) -> None:
    splits = load_splits(str(folder), calibration_images=15)
    assert counts_of(splits.calibration) == [5, 5, 5]
    birds, cats, dogs = counts_of(load_splits(str(folder), calibration_images=40).calibration)
    assert cats == 9  # all there are
    assert {birds, dogs} == {15, 16}
    everything = load_splits(str(folder), calibration_images=9999).calibration
    assert torch.equal(everything.ids, splits.train.ids)


def test_a_class_with_one_image_keeps_it_in_train(tmp_path: Path) -> None:
    path = write_folder(tmp_path, tree({"a": 1, "b": 2, "c": 40}, test={"a": 1, "b": 1, "c": 1}))
    for seed in range(5):
        splits = load_splits(str(path), split_seed=seed, val_fraction=0.5)
        assert counts_of(splits.train)[0] == 1
        assert min(counts_of(splits.train)) >= 1


def test_a_tiny_set_trains(tmp_path: Path) -> None:
    splits = load_splits(str(write_folder(tmp_path, tree({"a": 2, "b": 1}, test={"a": 1}))))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (2, 1, 1)
    assert "test has no images of 1 of 2 classes (b)" in splits.notes
    views = build_views("auto", image_shape=splits.image_shape, num_images=2)
    (batch,) = TrainLoader(splits.train, views, num_classes=2, batch_size=128, seed=0).epoch(0)
    assert batch.images.shape == (2, 3, 8, 8)
    with pytest.raises(DataError, match="no class has two images"):
        load_splits(str(write_folder(tmp_path / "one", tree({"a": 1, "b": 1}, test={"a": 1}))))


def photo(seed: int, height: int, width: int, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth = Image.fromarray(noise(seed, (6, 8, 3))).resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    smooth.save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def test_photos_of_many_sizes_and_kinds(tmp_path: Path) -> None:
    files = {
        "train/oak/1.jpg": photo(1, 600, 800),
        "train/oak/2.JPEG": photo(2, 800, 600, orientation=6),
        "train/oak/deeper/3.webp": encoded(noise(3, (300, 320, 3)), "WEBP"),
        "train/oak/notes.txt": b"mine",
        "train/elm/1.bmp": encoded(noise(4, (240, 250, 3)), "BMP"),
        "train/elm/2.png": encoded(noise(5, (400, 300))),
        "train/elm/.hidden.jpg": b"",
        "train/elm/Thumbs.db": b"",
        "train/.DS_Store": b"",
        "valid/oak/1.jpg": photo(6, 500, 400),
        "valid/elm/1.jpg": photo(7, 500, 400),
    }
    splits = load_splits(str(write_folder(tmp_path, files)))
    assert splits.classes == ("elm", "oak")
    assert splits.image_shape == (3, 224, 224)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (4, 1, 2)
    notes = " | ".join(splits.notes)
    assert "1 files that are no images are ignored" in notes
    assert "1 grey, 4 RGB" in notes
    assert "224 × 224" in notes
    assert load_splits(str(tmp_path), image_size=64).image_shape == (3, 64, 64)
    assert splits.resized
    batch = next(eval_batches(splits.test, 2))
    assert batch.images.shape == (2, 3, 224, 224)


def test_a_test_set_of_another_size_is_brought_to_that_of_train(tmp_path: Path) -> None:
    files = tree({"a": 3, "b": 3}) | {"test/a/x.png": encoded(noise(1, (16, 20))), "test/b/y.png": encoded(noise(2))}
    splits = load_splits(str(write_folder(tmp_path, files)))
    assert splits.test.images.load(torch.arange(2)).shape == (2, 3, 8, 8)
    assert splits.notes == (
        "some test images differ in size or channels from those of train and are brought to theirs",
    )


def test_copies_across_splits_are_told(tmp_path: Path) -> None:
    files = tree({"a": 10, "b": 10}, test={"a": 3, "b": 3})
    files["test/a/copy.bmp"] = encoded(noise(0), "BMP")  # the first training image in another format
    holdout = write_folder(tmp_path / "holdout", {"a/x.png": files["train/a/0000.png"], "b/x.png": encoded(noise(99))})
    splits = load_splits(str(write_folder(tmp_path / "data", files)), val_fraction=0.05, split_seed=1, holdout=holdout)
    assert 0 in splits.train.ids.tolist()
    assert splits.notes == (
        "1 of 7 test images have the same content as one in train",
        "1 of 2 holdout images have the same content as one in train",
    )


@pytest.mark.parametrize("inner", ["", "test/", "top/", "top/test/"])
def test_holdouts(inner: str, folder: Path, tmp_path: Path) -> None:
    files = {f"{inner}{name}/{k}.png": encoded(noise(500 + k)) for name in COUNTS for k in range(2)}
    for path in (write_folder(tmp_path / "fresh", files), write_zip(tmp_path / "fresh.zip", files)):
        splits = load_splits(str(folder), holdout=path)
        assert splits.holdout is not None
        assert counts_of(splits.holdout) == [2, 2, 2]
        assert splits.digest != load_splits(str(folder)).digest


def test_unlabelled_images_come_behind_the_labelled_ones(folder: Path, tmp_path: Path) -> None:
    extra = write_folder(tmp_path, {f"any/where/{k}.png": encoded(noise(700 + k, (12, 9))) for k in range(5)})
    plain, splits = load_splits(str(folder)), load_splits(str(folder), unlabeled=extra, limit=30)
    assert splits.unlabeled is not None
    assert splits.unlabeled.ids.tolist() == [60, 61, 62, 63, 64]
    assert splits.unlabeled.labels.tolist() == [UNLABELLED] * 5
    assert len(splits.train) == 35
    assert splits.train.ids[-5:].tolist() == [60, 61, 62, 63, 64]
    assert torch.equal(splits.val.ids, plain.val.ids)
    assert pixels_of(splits.val) == pixels_of(plain.val)
    assert splits.train.images.load(torch.tensor([61])).shape == (1, 3, 8, 8)
    views = build_views("auto", image_shape=splits.image_shape, num_images=35, mixup_alpha=0.2)
    batches = list(TrainLoader(splits.train, views, num_classes=3, batch_size=10, seed=0).epoch(0))
    assert sorted(torch.cat([b.ids for b in batches]).tolist()) == sorted(splits.train.ids.tolist())


def test_the_digest_depends_on_pixels_labels_and_names(tmp_path: Path) -> None:
    base = tree({"a": 3, "b": 3}, test={"a": 1, "b": 1})
    changed = [
        base,
        base | {"test/b/0000.png": encoded(noise(77))},
        {name.replace("/b/", "/c/"): data for name, data in base.items()},
        base | {"train/a/0001.png": base["train/b/0001.png"], "train/b/0001.png": base["train/a/0001.png"]},
    ]
    digests = {load_splits(str(write_folder(tmp_path / str(k), files))).digest for k, files in enumerate(changed)}
    assert len(digests) == len(changed)


def test_digits() -> None:
    splits = load_splits("digits", calibration_images=100)
    assert splits.holdout is not None
    assert len(splits.train) + len(splits.val) == 1080
    assert (len(splits.holdout), len(splits.test)) == (357, 360)
    assert splits.image_shape == (1, 8, 8)
    assert splits.classes == tuple("0123456789")
    assert torch.bincount(splits.calibration.labels).tolist() == [10] * 10
    for split in (splits.train, splits.val, splits.test, splits.holdout):
        shares = torch.bincount(split.labels, minlength=10).double() / len(split)
        assert float((shares - 0.1).abs().max()) < 0.015
    from sklearn.datasets import load_digits

    real = sorted(np.round(image * (255 / 16)).astype(np.uint8).tobytes() for image in load_digits().images)
    found = [one for split in (splits.train, splits.val, splits.test, splits.holdout) for one in pixels_of(split)]
    assert sorted(found) == real
    assert torch.equal(load_splits("digits", split_seed=5).test.images.labels, splits.test.images.labels)
    assert load_splits("digits", image_size=16).image_shape == (1, 16, 16)
    assert [load_splits("digits", image_size=size).resized for size in (None, 8, 16)] == [False, False, True]


def broken(files: dict[str, bytes], **options: object) -> Callable[[Path], tuple[str, dict[str, object]]]:
    return lambda path: (str(write_folder(path / "pets", files)), options)


SMALL = tree({"cat": 2, "dog": 2}, test={"cat": 1, "dog": 1})
BAD: dict[str, tuple[Callable[[Path], tuple[str, dict[str, object]]], str]] = {
    "nothing there": (lambda path: (str(path / "nowhere"), {}), "unknown file, folder or data set"),
    "empty folder": (broken({}), "no train/ folder"),
    "classes at the top": (
        broken({name.removeprefix("train/"): data for name, data in SMALL.items() if "train" in name}),
        r"no train/ folder \(it holds cat/, dog/\)",
    ),
    "no held-out part": (broken(tree({"cat": 2, "dog": 2})), "neither val/ nor test/"),
    "val twice": (broken(SMALL | {"val/cat/x.png": b"", "valid/cat/x.png": b""}), "both val/ and valid/"),
    "one class": (broken(tree({"cat": 4}, test={"cat": 1})), r"one class \(cat\)"),
    "no class folders": (broken({"train/1.png": b"", "test/1.png": b""}), "no class folders"),
    "only other files": (broken(SMALL | {"train/emu/1.heic": b"", "train/emu/2.txt": b""}), "train/emu is empty.*2"),
    "unreadable": (broken(SMALL | {"train/dog/bad.jpg": b"no"}), r"cannot read the image .*train/dog/bad\.jpg"),
    "unreadable in test": (broken(SMALL | {"test/dog/bad.jpg": b"no"}), r"cannot read the image .*test/dog/bad\.jpg"),
    "test class unknown": (broken(SMALL | {"test/emu/1.png": encoded(noise(1))}), "emu, which train has not"),
    "data set misspelt": (lambda path: (f"cifr10:{path}", {}), "did you mean 'cifar10'"),
    "data set misspelt, alone": (lambda path: ("cifar1o", {}), "did you mean 'cifar10'"),
    "not a data set": (lambda path: (f"resnet50:{path}", {}), "unknown data set 'resnet50'"),
    "no root": (lambda path: ("cifar10", {}), "cifar10 needs the folder"),
    "empty root": (lambda path: (f"cifar10:{path}", {}), r"does not hold the files of CIFAR10(.|\n)*download=True"),
    "root missing": (
        lambda path: (f"cifar100:{path}/x", {}),
        r"not hold the files of CIFAR100(.|\n)*download=True",
    ),
    "imagenet without files": (lambda path: (f"imagenet:{path}", {}), r"train/ and val/(.|\n)*image-net\.org"),
    "needs more than a name": (lambda path: (f"phototour:{path}", {}), "cannot be opened by its name alone"),
    "an html page": (
        lambda path: (str(write_folder(path, {"d.zip": b"<html>"}) / "d.zip"), {}),
        "neither a folder nor",
    ),
    "holdout missing": (broken(SMALL, holdout=Path("nowhere/at/all")), "no such file or folder: nowhere/at/all"),
    "unlabeled missing": (broken(SMALL, unlabeled=Path("nowhere")), "no such file or folder: nowhere"),
    "val fraction": (broken(SMALL, val_fraction=1.0), r"not 1\.0"),
    "limit": (broken(SMALL, limit=0), "at least 1, not 0"),
    "image size": (broken(SMALL, image_size=-3), "at least 1, not -3"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_clear_error(kind: str, tmp_path: Path) -> None:
    make, words = BAD[kind]
    source, options = make(tmp_path)
    (tmp_path / "pets").mkdir(exist_ok=True)
    with pytest.raises(InputError, match=words) as caught:
        load_splits(source, **options)  # type: ignore[arg-type]
    assert isinstance(caught.value, DataError | RecipeError)
    assert str(caught.value).count("\n") <= 1


def test_empty_class_folders_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path, SMALL)
    (tmp_path / "train/emu").mkdir()
    (tmp_path / "train/yak").mkdir()
    with pytest.raises(DataError, match=r"class folder train/emu is empty.*and 1 more"):
        load_splits(str(tmp_path))


def test_a_holdout_of_other_classes_names_both_differences(folder: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "h", {f"{name}/1.png": encoded(noise(1)) for name in ("bird", "dogs", "emu")})
    with pytest.raises(DataError, match=r"has dogs, emu, which train has not; it lacks cat, dog") as caught:
        load_splits(str(folder), holdout=other)
    assert caught.value.where == "--holdout"
    empty = write_folder(tmp_path / "u", {"readme.txt": b"x"})
    with pytest.raises(DataError, match="holds no image"):
        load_splits(str(folder), unlabeled=empty)


def sample_of(archive: Path, out: Path, step: int) -> Path:
    """Every step-th member of a zip, as a zip."""
    with zipfile.ZipFile(archive) as whole:
        return write_zip(out, {name: whole.read(name) for name in sorted(whole.namelist())[::step]})


@pytest.mark.shared
def test_some_of_cifar10(shared_data: Path, tmp_path: Path) -> None:
    splits = load_splits(str(sample_of(shared_data / "cifar10.zip", tmp_path / "some.zip", step=50)))
    assert splits.image_shape == (3, 32, 32)
    assert len(splits.train) + len(splits.val) == 1000
    assert torch.bincount(splits.test.labels).tolist() == [20] * 10
    images = splits.train.images.load(torch.arange(1000)).double() / 255
    assert torch.allclose(images.mean((0, 2, 3)), torch.tensor([0.491, 0.482, 0.447]).double(), atol=0.02)
    assert splits.notes == ()


@pytest.mark.slow
@pytest.mark.shared
def test_all_of_cifar10(shared_data: Path) -> None:
    splits = load_splits(str(shared_data / "cifar10.zip"))
    assert isinstance(splits.train.images, MemorySet)
    assert torch.bincount(splits.train.labels).tolist() == [4500] * 10
    assert torch.bincount(splits.val.labels).tolist() == [500] * 10
    assert torch.bincount(splits.test.labels).tolist() == [1000] * 10
    assert splits.notes == ()


@pytest.mark.slow
@pytest.mark.shared
def test_cifar100_has_ten_copies_across_train_and_test(shared_data: Path) -> None:
    splits = load_splits(str(shared_data / "cifar100.zip"))
    trained, tested = (set(split.images.image_digests().tolist()) for split in (splits.train, splits.test))
    assert len(trained & tested) == 10
