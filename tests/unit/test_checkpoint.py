"""last.pt: what goes in comes out, and what is no saved run is refused in one line."""

from pathlib import Path

import pytest
import torch

from kdcompress.checkpoint import environment, load_state, not_finite, require_same, save_state, seed_step
from kdcompress.errors import CheckpointError, KdcompressError

CPU = torch.device("cpu")


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {"run": {"weights": [torch.randn(3), torch.tensor(2)], "step": 7, "shape": (1, 0.5), "note": None}}
    save_state(tmp_path / "deep" / "last.pt", state)
    loaded = load_state(tmp_path / "deep" / "last.pt")
    assert torch.equal(loaded["run"]["weights"][0], state["run"]["weights"][0])
    assert {key: loaded["run"][key] for key in ("step", "shape", "note")} == {
        "step": 7,
        "shape": (1, 0.5),
        "note": None,
    }
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["last.pt"]


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("trap-was-sprung"),))


def damaged_files(folder: Path) -> dict[str, Path]:
    names = ["truncated", "text", "empty", "list", "foreign", "version", "trap", "folder", "missing"]
    files = {name: folder / f"{name}.pt" for name in names}
    save_state(files["truncated"], {"weights": torch.randn(1000)})
    files["truncated"].write_bytes(files["truncated"].read_bytes()[:2000])
    files["text"].write_text("<html>not found</html>")
    files["empty"].touch()
    torch.save([1, 2], files["list"])
    torch.save({"format": "other", "version": 1}, files["foreign"])
    torch.save({"format": "kdcompress/training-state", "version": 99}, files["version"])
    torch.save({"format": "kdcompress/training-state", "version": 1, "trap": Trap()}, files["trap"])
    files["folder"].mkdir()
    return files


def test_what_is_no_saved_run_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, file in damaged_files(tmp_path).items():
        with pytest.raises(CheckpointError) as caught:
            load_state(file)
        assert str(file) in caught.value.what, name
        assert "\n" not in caught.value.what
    assert not Path("trap-was-sprung").exists()


def test_a_state_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_state(path, {"step": 1})
    with pytest.raises(TypeError, match=r"TorchVersion cannot be saved in last.pt: run.1.torch"):
        save_state(path, {"step": 2, "run": [1, {"torch": torch.__version__}]})
    assert load_state(path)["step"] == 1
    with pytest.raises(KdcompressError):
        save_state(path / "below" / "last.pt", {"step": 2})


def test_settings_that_differ_are_named_with_both_values() -> None:
    saved = {"lr": 0.1, "students": "resnet20", "seed": 0, "milestones": (0.5, 0.75)}
    require_same(saved, dict(saved), Path("last.pt"))
    with pytest.raises(CheckpointError) as caught:
        require_same(saved, {**saved, "lr": 0.2, "students": "vgg8", "ema": 0.9}, Path("last.pt"))
    for part in ("lr was 0.1 and is now 0.2", "'resnet20' and is now 'vgg8'", "ema was None and is now 0.9"):
        assert part in caught.value.what
    assert "seed" not in caught.value.what


def test_what_is_drawn_is_a_function_of_seed_and_step() -> None:
    def draw(seed: int, step: int) -> float:
        seed_step(seed, step, CPU)
        return float(torch.rand(()))

    drawn = [draw(seed, step) for seed in range(5) for step in range(40)]
    assert len(set(drawn)) == 200
    assert [draw(seed, step) for seed in range(5) for step in range(40)] == drawn
    assert 0.4 < sum(drawn) / 200 < 0.6


def test_the_first_tensor_that_is_not_finite_is_named() -> None:
    good = {"a": [torch.ones(2), {"b": torch.tensor(3)}], "c": 1.0, "empty": torch.ones(0)}
    assert not_finite(good) is None
    assert not_finite({}) is None
    assert not_finite({**good, "d": [torch.ones(1), {"w": torch.tensor([0.0, float("inf")])}]}) == "d.1.w"
    assert not_finite({"d": torch.tensor(float("nan")), **good}) == "d"


def test_the_environment_names_what_last_bits_depend_on() -> None:
    here = environment(CPU)
    assert here["threads"] == torch.get_num_threads()
    assert here["torch"] == torch.__version__
    assert str(here["device"]).startswith("cpu")
