"""The statistics of trainings logged one JSON line each, as in docs/results/*.jsonl and by cifar10_methods.py --out.

    python benchmarks/paired_table.py docs/results/ablation.jsonl
    python benchmarks/paired_table.py docs/results/one-broken.jsonl --reference amtml-kd

Top-1 in %, mean ± standard deviation over the seeds, and the mean of the differences to the reference at equal seed,
in points, with Student's 95 % interval. Nothing is adjusted for the number of rows.
"""

import argparse
import json
from pathlib import Path

from kdcompress.comparison import mean_and_sd, paired_seeds


def table(path: Path, reference: str | None = None) -> str:
    """The Markdown table of a file; the first method in it is the reference if none is named."""
    scores: dict[str, dict[int, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        scores.setdefault(row["method"], {})[row["seed"]] = 100 * row["top1"]
    base = reference or next(iter(scores))
    lines = [f"| | top-1 % | n | difference to {base}, paired, 95 % |", "| --- | --- | ---: | --- |"]
    for method, by_seed in scores.items():
        mean, sd = mean_and_sd(list(by_seed.values()))
        seeds = sorted(by_seed.keys() & scores[base].keys())
        told = ""
        if method != base and len(seeds) > 1:
            found = paired_seeds([by_seed[seed] for seed in seeds], [scores[base][seed] for seed in seeds])
            told = f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f})"
        lines.append(f"| {method} | {mean:.2f} ± {sd:.2f} | {len(by_seed)} | {told} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--reference", metavar="METHOD")
    asked = parser.parse_args()
    print(table(asked.file, asked.reference))
