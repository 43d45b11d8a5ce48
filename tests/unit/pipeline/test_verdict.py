import errno
import os
from pathlib import Path

import pytest

from kdcompress.errors import GateError, InputError, RunError
from kdcompress.gate import Drop, SpeedUp, Verdict, judge, read_verdict
from kdcompress.pipeline._gate import JudgedImages
from kdcompress.pipeline._verdict import Limits, advice, hold_to, keep
from kdcompress.profiles import get_profile
from tests.unit.deployed import digits, onnx_bundle
from tests.unit.tiny import tiny_images

DROP = Drop(0.001, -0.002, 0.004, 4000, 20, "holdout")
JUDGED = JudgedImages(tiny_images(8, 0), None, "val", note="Only a part was looked at.")


def verdict(ratio: float) -> Verdict:
    return judge(DROP, [SpeedUp("fp32", ratio, ratio - 0.01, ratio + 0.01, 5, 1)], max_drop=0.01)


def test_what_fails_is_not_written_and_the_way_to_keep_it_is_named(tmp_path: Path) -> None:
    said = verdict(0.9)
    assert advice(said) == "not recommended"
    with pytest.raises(GateError, match=r"INT8 fails the gate\. Speed: 0\.90 × as fast as fp32") as caught:
        keep(
            onnx_bundle(),
            said,
            {},
            tmp_path / "out",
            judged=JUDGED,
            force=False,
            replace=False,
            again="--resume --force keeps it all the same",
        )
    assert caught.value.fix == "the new file was not kept; --resume --force keeps it all the same"
    assert not (tmp_path / "out").exists()
    older = keep(onnx_bundle(), verdict(1.5), {}, tmp_path / "out", judged=JUDGED, force=False, replace=False)
    with pytest.raises(GateError) as caught:
        keep(onnx_bundle(), said, {}, tmp_path / "out", judged=JUDGED, force=False, replace=True)
    assert caught.value.fix.endswith("; what stands there is from before")
    assert read_verdict(older.path, older.digest) == verdict(1.5)


@pytest.mark.parametrize(("ratio", "force"), [(1.5, False), (0.9, True)])
def test_what_is_kept_has_its_verdict_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ratio: float, force: bool
) -> None:
    said = verdict(ratio)
    files = {"drawing.svg": "<svg/>"}
    kept = keep(onnx_bundle(), said, {"a": 1}, tmp_path / "out", judged=JUDGED, force=force, replace=False, files=files)
    assert kept.digest == onnx_bundle().digest
    assert read_verdict(kept.path, kept.digest) == said
    assert (kept.path / "drawing.svg").read_text(encoding="utf-8") == "<svg/>"
    told = capsys.readouterr().out
    assert told.startswith(f"gate · {said.answer}\n")
    assert all(reason in told for reason in (*said.reasons, JUDGED.note))


def test_a_full_disk_is_called_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path, **_options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source), None, str(target))

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(RunError, match="no space left while writing"):
        keep(onnx_bundle(), verdict(1.5), {}, tmp_path / "out", judged=JUDGED, force=False, replace=False)
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_is_not_this_machine_is_not_timed(tmp_path: Path) -> None:
    profile, images = get_profile("jetson-orin"), digits()[0][:20]
    found, evidence = hold_to(
        onnx_bundle(), onnx_bundle(), JUDGED, Limits(), profile=profile, calibration=images, scratch=tmp_path
    )
    assert found.answer == "unmeasured on target"
    assert found.drop is None
    assert evidence["latency"] == {}


def test_too_few_processes_are_refused() -> None:
    with pytest.raises(InputError, match="4 process"):
        Limits(restarts=4)
