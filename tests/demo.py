"""The demo of ./run.sh: plain against humanline, from the same policy and data, on the letters world.

Prints a table of the held-out utility (tests/toy_world.py: one sampled response for each of 256 prompts,
four times) and of the win rate against the initial policy, before and after training.
"""

import importlib
import os
import statistics
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import toy_world  # noqa: E402

SEED = 0
COMMON = ["--max_length", "64", "--steps", "200", "--eval_every", "0", "--save_every", "0"]
RUNS = [  # (script, data, flags of plain, flags of humanline): each side at the best of a few settings tried
    ("humanline_dpo", "pairs", "--plain --beta 0.1 --lr 3e-4", "--sync_every 1 --beta 1.0 --lr 3e-4"),
    ("humanline_kto", "labels", "--plain --beta 0.1 --lr 3e-4", "--sync_every 8 --beta 0.1 --lr 1e-4"),
    ("humanline_grpo", "groups", "--plain --lr 3e-4", "--sync_every 16 --lr 3e-4"),
]


def main() -> None:
    folder = ROOT / "runs" / "demo"
    started = time.time()
    world = toy_world.build(folder / "letters", "letters", seed=SEED)
    print(f"toy world in {world} ({time.time() - started:.0f} s)", flush=True)
    before = toy_world.grade(world / "policy", world, "letters")
    table = [("initial policy", before, 0.0)]
    for name, kind, plain, humanline in RUNS:
        script = importlib.import_module(name)
        for variant, flags in (("plain", plain), ("humanline", humanline)):
            out = folder / f"{name}-{variant}"
            argv = ["--model", world / "policy", "--data", world / f"{kind}_train.jsonl"]
            argv += ["--eval_data", world / f"{kind}_test.jsonl", "--output_dir", out, "--overwrite"]
            argv = [str(x) for x in [*argv, *COMMON, "--seed", SEED, *flags.split()]]
            print("+ python", f"{name}.py", *argv, flush=True)
            started = time.time()
            script.main(script.parse_args(argv))
            seconds = time.time() - started
            table.append((f"{name.removeprefix('humanline_').upper()} {variant}",
                          toy_world.grade(out / "final", world, "letters"), seconds))
    print(f"\nheld-out utility on the letters world, seed {SEED}")
    print(f"{'':16s}{'utility':>10s}{'win rate':>10s}{'seconds':>10s}")
    for name, rewards, seconds in table:
        wins = statistics.mean((a > b) + (a == b) / 2 for a, b in zip(rewards, before))
        print(f"{name:16s}{statistics.mean(rewards):+10.3f}{wins:10.3f}{seconds:10.0f}")


if __name__ == "__main__":
    main()
