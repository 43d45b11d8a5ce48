"""Carves a holdout that no teacher has seen out of the test images of a zipped folder data set.

    python benchmarks/carve_holdout.py cifar10.zip --every 5 --out data/

writes `data/cifar10.zip`, without every fifth test image of each class (in the order of their names), and those images
as `data/holdout/<class>/…`. What is trained on stays as it is.
"""

import argparse
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath


def carve(source: Path, out: Path, every: int) -> tuple[int, int]:
    """Writes both parts; returns how many test images each has (kept, held out)."""
    out.mkdir(parents=True, exist_ok=True)
    seen: Counter[str] = Counter()
    kept = held = 0
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(out / source.name, "w", zipfile.ZIP_STORED) as new:
        for name in sorted(old.namelist()):
            parts = PurePosixPath(name).parts
            if name.endswith("/"):
                continue
            if "test" in parts[:-2]:
                label, file = parts[-2:]
                seen[label] += 1
                if seen[label] % every == 0:
                    target = out / "holdout" / label / file
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(old.read(name))
                    held += 1
                    continue
                kept += 1
            new.writestr(zipfile.ZipInfo(name), old.read(name))
    return kept, held


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    print("test images kept and held out:", *carve(arguments.source, arguments.out, arguments.every))
