"""The demo, ./run.sh: what humanline changes on a language model, in minutes of a CPU.

DPO trains SmolLM2-135M-Instruct twice on the same pairs, plain and with humanline, to write cheerful sentences
(real_model.py says what the task is). One seed; the findings are evidence.py's, of three.
"""

import contextlib
import json
import statistics
import time
from unittest import mock

import evidence
import real_model
from evidence import number
from plot import plot
from real_model import DATA, MODEL, ROOT
from tqdm import tqdm
from transformers.utils import logging

import common
import humanline_dpo

STARTED = time.perf_counter()
OUT, UPDATES, PROMPTS, SHOWN = ROOT / "runs/demo", 12, 64, 5
RATES = {"plain": "2e-3", "humanline": "1e-3"}  # of each the best in evidence.py, in 24 updates
LINES = {"initial": "initial policy", "plain": "plain", "humanline": "humanline"}

class OneBar(tqdm):
    """The bar of training, without those of what is done between two updates."""

    def __init__(self, items=None, desc=None, **flags):
        super().__init__(items, desc, disable=desc != "training", **flags)

def say(text: str) -> None:
    print(f"\n[{(time.perf_counter() - STARTED) / 60:.1f} min] {text}", flush=True)

def train(variant: str, seed: int) -> list[dict]:
    """The metrics of a run; what it prints goes to a file."""
    run = evidence.real("dpo", variant=variant)._replace(lr=RATES[variant], seed=seed)
    argv = run.argv("cpu", OUT / variant) + ["--steps", str(UPDATES), "--eval_size", "16", "--eval_every", str(UPDATES // 2)]
    bars = [mock.patch.object(module, "tqdm", OneBar) for module in (common, humanline_dpo)]
    with open(OUT / f"{variant}.log", "w") as log, contextlib.redirect_stdout(log), bars[0], bars[1]:
        humanline_dpo.main(humanline_dpo.parse_args(argv))
    return [json.loads(line) for line in open(OUT / variant / "metrics.jsonl")]

def mean_of(rewards: list[float]) -> str:
    """Mean and 95 % interval over the prompts."""
    half = 1.96 * statistics.stdev(rewards) / len(rewards) ** 0.5
    mean = statistics.fmean(rewards)
    return evidence.bounds((mean, mean - half, mean + half))

def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()  # of loading
    real_model.make_model()
    run = evidence.real("dpo")._replace(seed=1)
    evidence.build(run)
    pairs = real_model.read(run.folder() / "pairs_train.jsonl")
    print(f"""The model is SmolLM2-135M-Instruct. For {len(pairs)} prompts we have four of its sentences; VADER, a lexicon of words that
people have rated, scores how positive each is, from −1 to 1. Of each four the best is "chosen" and the worst
"rejected". On these pairs DPO now trains LoRA adapters, for {UPDATES} updates of 8 pairs, with β = 1: first plain, then with
humanline (the log-ratio of each token clipped to ±1.5, the reference synced at each update), each at the learning rate
that was best in longer runs. For example:

  prompt    {pairs[0]["prompt"]}
  chosen    {" ".join(pairs[0]["chosen"].split())}
  rejected  {" ".join(pairs[0]["rejected"].split())}""")
    metrics, found = {}, {}
    for variant in ("plain", "humanline"):
        say(f"training, {variant}")
        metrics[variant] = train(variant, 1)
    for variant in LINES:
        say(f"grading, {LINES[variant]}: answers to {PROMPTS} other prompts")
        found[variant] = real_model.grade(MODEL if variant == "initial" else OUT / variant / "final", times=1, count=PROMPTS)
    say("done. The interval is of 95 %, over the prompts; KL is to the initial policy, in nats a response:\n")
    print(f"  {'':16s}{'sentiment':22s}{'KL':>6s}{'last training loss':>22s}")
    for variant, name in LINES.items():
        loss = statistics.fmean(m["loss"] for m in metrics[variant][1:][-4:]) if variant in metrics else None
        more = "" if loss is None else f"{found[variant]['kl']:6.1f}{loss:22.3f}"
        print(f"  {name:16s}{mean_of(found[variant]['rewards']):22s}{more}")
    print("\nThe likeliest sentence of each policy, word by word, for prompts that none was trained on:")
    for i, row in enumerate(real_model.read(DATA / "held_out.jsonl")[:SHOWN]):
        print(f"\n  {row['prompt']}")
        for variant, name in LINES.items():
            print(f"    {name:16s}{' '.join(found[variant]['greedy'][i].split())}")
    gaps = [a - b for a, b in zip(found["humanline"]["rewards"], found["plain"]["rewards"])]
    moved = {v: statistics.fmean(found[v]["rewards"]) - statistics.fmean(found["initial"]["rewards"]) for v in metrics}
    three = evidence.Page(evidence.finished()).difference(*(evidence.real("dpo", variant=v) for v in ("humanline", "plain")))
    plot(metrics, ["eval_reward_greedy", "eval_reward_sampled", "loss"], OUT / "reward.png")
    print(f"""
Plain training moved the sentiment by {number(moved["plain"], True)}, humanline by {number(moved["humanline"], True)}; the second minus the first: {mean_of(gaps)}.
This is one seed at one β. Over three seeds, in {evidence.UPDATES["sentiment"]} updates, the difference is {three}.
README.md has plain at its best β too. A loss near 0.69 is no failure of humanline: its reference follows it.
Open {(OUT / "reward.png").relative_to(ROOT)} for the reward (the sentiment of 16 held-out prompts) and the loss over updates. Train on your own pairs:

  .venv/bin/python humanline_dpo.py --model Qwen/Qwen2.5-1.5B-Instruct --data pairs.jsonl""")


if __name__ == "__main__":
    main()
