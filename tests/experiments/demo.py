"""The demo, ./run.sh: what humanline changes on a language model, in minutes of a CPU.

DPO trains SmolLM2-135M-Instruct twice on the same pairs, plain and with humanline, to write cheerful sentences
(real_model.py says what the task is). One seed; the findings are evidence.py's.
"""

import contextlib
import os
import statistics
import time
from unittest import mock

# Threads that wait for each other sleep: beside other busy processes, spinning takes the time of those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import evidence  # noqa: E402
import pages  # noqa: E402
import real_model  # noqa: E402
from real_model import DATA, MODEL, ROOT  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers.utils import logging  # noqa: E402

import common  # noqa: E402
import humanline_dpo  # noqa: E402

STARTED = time.perf_counter()
OUT, UPDATES, PROMPTS, SHOWN = ROOT / "runs/demo", 12, 64, 5
EXAMPLE = "What do you think of a history lesson? Answer in one sentence."
LINES = {"initial": "before training", "plain": "plain DPO", "humanline": "with humanline"}

class OneBar(tqdm):
    """The bar of training, without those of what is done between two updates."""

    def __init__(self, items=None, desc=None, **flags):
        super().__init__(items, desc, disable=desc != "training", **flags)

def say(text: str) -> None:
    print(f"\n[{(time.perf_counter() - STARTED) / 60:.1f} min] {text}", flush=True)

def train(run: evidence.Run) -> None:
    """What it prints goes to a file."""
    argv = evidence.argv(run, OUT / run.way, "cpu") + ["--steps", str(UPDATES)]
    bars = [mock.patch.object(module, "tqdm", OneBar) for module in (common, humanline_dpo)]
    with open(OUT / f"{run.way}.log", "w") as log, contextlib.redirect_stdout(log), bars[0], bars[1]:
        humanline_dpo.main(humanline_dpo.parse_args(argv))

def mean_of(rewards: list[float]) -> tuple[float, float]:  # and half of its 95 % interval
    return statistics.fmean(rewards), 1.96 * statistics.stdev(rewards) / len(rewards) ** 0.5

def main() -> None:
    logging.disable_progress_bar()  # of loading
    real_model.make_model()
    results = evidence.finished()
    runs = [evidence.runs_of(evidence.cell_of("dpo", "main", way), results)[0] for way in ("plain", "humanline")]
    for run in runs:
        real_model.write_data(OUT / run.way, run.seed)
    pairs = real_model.read(OUT / "plain/pairs.jsonl")
    example = next(row for row in pairs if row["prompt"] == EXAMPLE)
    print(f"""SmolLM2-135M-Instruct, a small language model, is to learn to write cheerful sentences. For
{len(pairs)} prompts we have four of its sentences each. VADER, a list of words that people have rated, scores how
cheerful they are, from −1 to 1. Of each four the best is "chosen" and the worst "rejected":

  prompt    {EXAMPLE}
  chosen    {example["chosen"].strip()}
  rejected  {example["rejected"].strip()}

On these pairs DPO trains LoRA adapters, for {UPDATES} updates of 8 pairs at β = 1: first plain, then with humanline,
which clips the log-ratio of each token to ±1.5 and makes the policy its own reference at each update.""")
    for run in runs:
        say(f"training, {LINES[run.way]}, at the rate that was best for it in longer runs, {run.lr}")
        train(run)
    found = {}
    for way, name in LINES.items():
        say(f"{name}: sentences for {PROMPTS} prompts that none was trained on")
        found[way] = real_model.grade(MODEL if way == "initial" else OUT / way / "run/final", times=1, count=PROMPTS)
    scores = {name: mean_of(found[way]["rewards"]) for way, name in LINES.items()}
    say("done. Sentiment (± the 95 % interval over prompts), and how far the policy has gone (KL, nats a sentence):\n")
    print(f"  {'':16s}sentiment         KL")
    for way, name in LINES.items():
        mean, half = scores[name]
        print(f"  {name:16s}{pages.text_of(mean)} ± {half:.2f}{found[way]['kl']:9.1f}")
    print("\nTheir likeliest sentences:")
    for i, row in enumerate(real_model.read(DATA / "held_out.jsonl")[:SHOWN]):
        print(f"\n  {row['prompt']}")
        for way, name in LINES.items():
            print(f"    {name:16s}{' '.join(found[way]['greedy'][i].split())}")
    mean, half = mean_of([a - b for a, b in zip(found["humanline"]["rewards"], found["plain"]["rewards"])])
    seeds = evidence.differences(evidence.ABOVE_PLAIN, "dpo", results)
    over_seeds = f"{pages.number(seeds, sign=True)} ({pages.span(seeds, sign=True)}): {pages.verdict(seeds)}"
    pages.draw_demo(scores, OUT / "reward.png")
    print(f"""
Humanline minus plain: {pages.text_of(mean, sign=True)} ± {half:.2f}. This is one seed after {UPDATES} updates.
After {evidence.UPDATES}, over {len(seeds)} seeds, it is {over_seeds}. README.md says what a smaller β does.
{(OUT / "reward.png").relative_to(ROOT)} shows the sentiments. Train on your own pairs:

  .venv/bin/python humanline_dpo.py --model Qwen/Qwen2.5-1.5B-Instruct --data pairs.jsonl""")


if __name__ == "__main__":
    main()
