"""Curves of any runs: one panel for each metric, one line for each run.

    .venv/bin/python tests/experiments/plot.py runs/dpo runs/plain [--keys loss unclipped eval_accuracy] [--out runs/plot.png]

A run is an --output_dir of a script. Without --keys: those of KEYS that the runs have.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

KEYS = ["loss", "reward", "margin", "accuracy", "kl", "unclipped", "abs_logratio", "grad_norm", "eval_loss",
        "eval_accuracy", "eval_margin", "eval_agreement", "eval_reward_greedy", "eval_reward_sampled"]
# Okabe and Ito's colours, with other dashes and markers, too: for the colour-blind and for paper
LOOKS = list(zip(["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9"],
                 ["-", "--", "-.", ":", "-", "--", "-."], "os^vDPX"))


def read_run(folder: str) -> list[dict]:
    """The lines of a run's metrics.jsonl; exits with one line where there is none."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        sys.exit(f"error: {path}: no such file; name the --output_dir of a run")
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    if not lines:
        sys.exit(f"error: {path}: empty; the run has made no update yet")
    return lines


def plot(runs: dict[str, list[dict]], keys: list[str], out: Path) -> None:
    """One panel a key; points where a metric is logged now and then (evaluations)."""
    columns = min(3, len(keys))
    rows = -(-len(keys) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 2.6 * rows), squeeze=False)
    for axis in axes.flat[len(keys) :]:
        axis.axis("off")
    for key, axis in zip(keys, axes.flat):
        for i, (name, lines) in enumerate(runs.items()):
            color, dashes, marker = LOOKS[i % len(LOOKS)]
            points = [(line["step"], line[key]) for line in lines if key in line]
            sparse = marker if len(points) <= 30 else ""
            axis.plot(*zip(*points) if points else ([], []), dashes, color=color, marker=sparse, markersize=4,
                      linewidth=1.2, label=name)
        axis.set_title(key, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("update")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=min(4, len(runs)), fontsize=9)
    figure.tight_layout(rect=(0, 0.06 if rows > 1 else 0.1, 1, 1))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="an --output_dir")
    parser.add_argument("--keys", nargs="+", help="metrics to draw")
    parser.add_argument("--out", type=Path, default=Path("runs/plot.png"))
    args = parser.parse_args(argv)
    runs = {folder: read_run(folder) for folder in args.runs}
    found = {key for lines in runs.values() for line in lines for key in line}
    missing = [key for key in args.keys or () if key not in found]
    if missing:
        sys.exit(f"error: --keys {' '.join(missing)}: in none of the runs; they have {', '.join(sorted(found))}")
    plot(runs, args.keys or [key for key in KEYS if key in found], args.out)
    print(f"the curves are in {args.out}")


if __name__ == "__main__":
    main()
