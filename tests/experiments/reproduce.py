"""Which of the paper's findings hold on a laptop: ./run.sh reproduce [--grid | --quick]

Runs the three scripts' own main, with flags only, on the toy worlds of toy_world.py:

    letters    unverifiable: a hidden utility; scored as AlpacaEval scores, by the win rate of held-out
               responses against those of the initial policy (½ for a tie; 4 × 4 samples of 256 prompts)
    addition   verifiable: share of 512 held-out sums that are right, greedy, mean of the last four
               evaluations of six (accuracy swings with the rollouts)

β. What saturates the loss of DPO and KTO is β · Σ log-ratio. The paper has β = 0.1 and responses of
hundreds of tokens, which we take as 300: β·T = 30. Here a response has about 13 tokens, so the main table
takes β = 3, about β·T = 40. The β sweep shows the others.

A seed changes everything: initial policy, data, order, sampling. Every cell has its own learning rate,
gradient-norm bound and, for humanline, k (1 where sampling is online), found by --grid on seeds that are
not reported: it climbs from neighbour to neighbour on LADDERS, in one flag after the other (STAGES), by the
mean gain over the initial policy less its standard deviation over those seeds. On letters the next smaller
learning rate is then taken if a seed is lost at this rate or at the next larger one, and none at the smaller.
The β sweep's cells climb in learning rate and k. The rate falls linearly to 0 in all runs. Seeds 0 to 4
shaped these rules, so others are reported.

Runs share their data, so a process tokenizes each text once (encode_once).
Finished runs are lines of runs/reproduce/runs.jsonl: a broken reproduction goes on where it stopped. Tables
go to results/*.json and figures to figures/ (--quick: to runs/quick, with one seed). An online run of DPO or
KTO stops when 20 prompts for each pair or label of an update have not given enough of them, since rewards are
equal within groups; the policy after its last whole update is graded.
Intervals are 95% t-intervals over seeds, of paired differences where two cells are compared. No offline run
makes more than one pass over its data, but for those called "4 epochs"; online runs draw prompts in turn, and
DPO and KTO draw more where rewards are equal, so that they may come round.
"""

import argparse
import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS, FIGURES = HERE / "results", HERE / "figures"
sys.path[:0] = [str(ROOT), str(HERE)]

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import common  # noqa: E402
import toy_world  # noqa: E402

SEEDS, GRID_SEEDS = (5, 6, 7, 8, 9), (10, 11, 12)
BETA, BETAS = "3", ("0.1", "0.3", "1", "3")
PAPER = {"beta": 0.1, "tokens": 300}  # UltraFeedback: responses of hundreds of tokens
PROMPTS = {"letters": dict(train=3200, test=256), "addition": dict(train=4096, test=512)}
WORLDS = {
    "letters": "--max_length 48 --max_new_tokens 20 --steps 120 --eval_size 0",
    "addition": "--max_length 32 --max_new_tokens 6 --steps 192 --eval_every 32 --eval_size 512",
}
METHODS = {  # kind of offline data; batch: pairs, responses, responses in groups of 8
    "dpo": ("pairs", {"letters": "--batch_size 16"}),
    "kto": ("labels", {"letters": "--batch_size 32"}),
    "grpo": ("groups", {"letters": "--batch_size 64", "addition": "--batch_size 128"}),
}
ROWS = {"dpo": "2000", "kto": "4000", "grpo": "1000"}  # letters, offline: a little more than one pass
EVERY = "--temperature 1.0 --gen_batch 1024 --device cpu --overwrite --lr_decay"
SOURCES = {"offline": 0, "online": 1, "every 64": 64}  # n: updates between two rollouts
VARIANTS = {  # what is added to the baseline
    "plain": "--plain",
    "humanline": "--humanline clip",
    "synced only": "--humanline off",
    "clipped only": "--humanline clip --sync_every 0",
    "humanline sampling": "--humanline sample",
}


def folder_of(world: str, seed: int) -> Path:
    return ROOT / "runs/reproduce/worlds" / f"{world}-{seed}"


class Run(NamedTuple):
    world: str
    method: str
    source: str
    variant: str
    seed: int
    flags: tuple  # of (name, value)
    data: str | None = None  # another offline file of the world than the method's own

    @property
    def key(self) -> str:
        return json.dumps(self)

    def folder(self) -> Path:
        return folder_of(self.world, self.seed)

    def argv(self, output_dir: Path) -> list[str]:
        kind, flags = METHODS[self.method]
        folder, n = self.folder(), SOURCES[self.source]
        data = self.data or ("prompts_train.jsonl" if n else f"{kind}_train.jsonl")
        argv = ["--model", folder / "policy", "--data", folder / data, "--output_dir", output_dir]
        argv += ["--reward", f"{HERE}/toy_world.py:{self.world}_reward", "--sample_every", n]
        argv += ["--save_every", 1 if n and self.method != "grpo" else 0]  # only these may stop
        argv += f"{EVERY} {WORLDS[self.world]} {flags[self.world]} {VARIANTS[self.variant]}".split()
        if self.world == "addition":
            argv += ["--eval_data", folder / f"{'prompts' if n else kind}_test.jsonl"]
        elif not n:
            argv += ["--max_rows", ROWS[self.method]]
        argv += ["--seed", self.seed] + [x for name, value in self.flags for x in (f"--{name}", value)]
        return [str(x) for x in argv]


# --- the work of one process ------------------------------------------------------------------------


def work(task) -> dict | None:
    """Build a world (world, seed) or do a Run; what they print goes to a file."""
    torch.set_num_threads(1)
    log = ROOT / "runs/reproduce/now" / f"{os.getpid()}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    try:
        with open(log, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            if not isinstance(task, Run):
                return build_world(*task)
            return train(task, log.with_suffix("")) | {"wall": round(time.perf_counter() - started, 1)}
    except BaseException as error:
        raise RuntimeError(f"{task}: {error!r}\n{traceback.format_exc()[-1500:]}") from None


def build_world(world: str, seed: int) -> None:
    folder = folder_of(world, seed)
    toy_world.build(folder, world, seed, **PROMPTS[world])
    if not (folder / "initial.json").exists():
        if world == "letters" and seed in SEEDS:  # the grid needs neither
            write_random(folder, seed)
            split_in_quartiles(folder)
        graded = toy_world.grade(folder / "policy", folder, world)
        (folder / "initial.json").write_text(json.dumps(graded))


def train(run: Run, out: Path) -> dict:
    script = importlib.import_module(f"humanline_{run.method}")
    shutil.rmtree(out, ignore_errors=True)
    stopped = None
    try:
        with mock.patch.object(script, "encode", encode_once):
            script.main(script.parse_args(run.argv(out)))
    except common.BadInput as error:
        if "rewards are equal within groups" not in str(error):
            raise
        # responses all alike, at the best or the worst: nothing to learn
        last_checkpoint(run, out).save_pretrained(out / "final")
        shutil.copytree(run.folder() / "policy", out / "final", dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("*.safetensors"))
        stopped = True
    metrics = [json.loads(line) for line in open(out / "metrics.jsonl")]
    curve = [[m["step"], m["eval_reward_greedy"]] for m in metrics if "eval_reward_greedy" in m]
    result = {"run": run, "curve": curve, "stopped": metrics[-1]["step"] if stopped else None,
              "seconds": round(sum(m.get("seconds", 0) for m in metrics), 2),
              "unclipped": statistics.fmean(m["unclipped"] for m in metrics[1:]) if metrics[1:] else 1.0}
    if run.world == "addition":
        return result | {"score": statistics.fmean(at[1] for at in curve[-4:])}
    rewards = toy_world.grade(out / "final", run.folder(), run.world)
    initial = json.loads((run.folder() / "initial.json").read_text())
    return result | {"score": win_rate(rewards, initial), "utility": statistics.fmean(rewards)}


EXAMPLES = {}  # by the tokenizer's folder and the other arguments of encode


def encode_once(tokenizer, *arguments) -> common.Example | None:
    """common.encode, but each text is tokenized once in a process: runs share their data."""
    key = tokenizer.name_or_path, *arguments
    if key not in EXAMPLES:
        EXAMPLES[key] = common.encode(tokenizer, *arguments)
    return EXAMPLES[key]


def last_checkpoint(run: Run, out: Path):
    """The policy of the checkpoint, else the initial one."""
    model = toy_world.AutoModelForCausalLM.from_pretrained(run.folder() / "policy")
    if (out / "checkpoint.pt").exists():
        script = importlib.import_module(f"humanline_{run.method}")
        torch.serialization.add_safe_globals([script.Row, common.Example])
        model.load_state_dict(torch.load(out / "checkpoint.pt", weights_only=True)["model"])
    return model


def win_rate(rewards: list[float], initial: list[float], samples: int = 4) -> float:
    """Chance that a sample of the one beats a sample of the other for the same prompt, ½ for a tie.
    Lists hold all prompts, `samples` times over."""
    prompts = len(rewards) // samples
    wins = [(a > b) + (a == b) / 2 for i in range(prompts)
            for a in rewards[i::prompts] for b in initial[i::prompts]]
    return statistics.fmean(wins)


def write_random(folder: Path, seed: int) -> None:
    """*_random.jsonl: the data of another policy, which writes 8 to 16 letters at random."""
    rng, groups = random.Random(seed), []
    for line in open(folder / "prompts_train.jsonl"):
        row = json.loads(line)
        texts = ["".join(rng.choices(toy_world.LETTERS, k=rng.randint(toy_world.SHORTEST, toy_world.LONGEST)))
                 for _ in range(8)]
        rewards = toy_world.letters_reward([row["prompt"]] * 8, texts)
        groups.append(row | {"completions": texts, "rewards": rewards})
    toy_world.write_data(folder, "random", [], groups)


@torch.no_grad()
def split_in_quartiles(folder: Path) -> None:
    """groups_quartile_1.jsonl (worst) … 4: groups by their responses' mean token log-prob under the
    initial policy; quartiles.json: that of each quartile and of the random data, [lowest, highest], nats."""
    tokenizer = toy_world.AutoTokenizer.from_pretrained(folder / "policy")
    model = toy_world.AutoModelForCausalLM.from_pretrained(folder / "policy").eval()
    model.row_tokens = 0  # no row is shared

    def mean_logp(group: dict) -> float:
        examples = [common.encode(tokenizer, group["prompt"], text, 48) for text in group["completions"]]
        logp, mask = common.response_logps(model, examples)  # (B, T)
        return ((logp * mask).sum(-1) / mask.sum(-1)).mean().item()

    groups = [json.loads(line) for line in open(folder / "groups_train.jsonl")]
    means = list(map(mean_logp, groups))
    order = sorted(range(len(groups)), key=means.__getitem__)
    quarter, bounds = len(groups) // 4, {}
    for i in range(4):
        part = order[i * quarter : (i + 1) * quarter]
        toy_world.write_jsonl(folder / f"groups_quartile_{i + 1}.jsonl", [groups[j] for j in part])
        bounds[f"quartile {i + 1}"] = [means[part[0]], means[part[-1]]]
    some = [json.loads(line) for line in open(folder / "groups_random.jsonl")][:200]
    found = sorted(map(mean_logp, some))
    (folder / "quartiles.json").write_text(json.dumps(bounds | {"random": [found[0], found[-1]]}))


# --- many runs --------------------------------------------------------------------------------------


def finished(store: Path) -> dict[str, dict]:
    """Results by key; a last line that a kill cut short is dropped, and done again."""
    if not store.exists():
        return {}
    whole = [line for line in store.read_text().splitlines(True) if line.endswith("\n")]
    store.write_text("".join(whole))
    results = map(json.loads, whole)
    return {json.dumps(result["run"]): result for result in results}


@functools.cache
def workers(jobs: int) -> ProcessPoolExecutor:
    """Processes that last as long as this one: they have imported torch and encoded data."""
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))


def do(runs: list[Run], jobs: int) -> dict[str, dict]:
    """The results of all runs by key, those that are missing made, `jobs` at a time."""
    store = ROOT / "runs/reproduce/runs.jsonl"
    store.parent.mkdir(parents=True, exist_ok=True)
    results = finished(store)
    todo = [run for run in dict.fromkeys(runs) if run.key not in results]
    worlds = sorted({(run.world, run.seed) for run in todo})
    worlds = [task for task in worlds if not (folder_of(*task) / "initial.json").exists()]
    try:
        for tasks, title in ((worlds, "toy worlds"), (todo, "training")):
            futures = [workers(jobs).submit(work, task) for task in tasks]
            for future in tqdm(as_completed(futures), title, len(tasks), smoothing=0, leave=False, disable=not tasks):
                result = future.result()
                if result:
                    with open(store, "a") as file:
                        file.write(json.dumps(result) + "\n")
                    results[json.dumps(result["run"])] = result
    except BaseException:  # nothing more is begun
        workers(jobs).shutdown(cancel_futures=True)
        raise
    return results


# --- the grid ---------------------------------------------------------------------------------------

LADDERS = {
    "lr": ("3e-5", "1e-4", "3e-4", "6e-4", "1e-3", "2e-3", "4e-3", "8e-3", "1.6e-2"),
    "sync_every": ("1", "2", "4", "8", "16", "32", "64", "128"),  # letters has 120 updates: 128 never syncs
    "max_grad_norm": ("0.0001", "0.001", "0.01", "0.1", "1", "10", "100", "1000"),
}
STAGES = ("lr", "sync_every", "lr", "max_grad_norm", "lr")  # each from the best of those before
CELLS = [("letters", method, source, variant, "0" if method == "grpo" else BETA)
         for method in METHODS for source in ("offline", "online") for variant in ("plain", "humanline")]
CELLS += [("addition", "grpo", source, variant, "0") for source in SOURCES for variant in ("plain", "humanline")]
SWEPT = [("letters", method, source, variant, beta) for method in ("dpo", "kto") for beta in BETAS if beta != BETA
         for source, variant in (("offline", "plain"), ("offline", "humanline"), ("online", "plain"))]


def start_of(cell: tuple) -> dict:
    """The flags that a cell begins with. Plain has no k; with n = 1 a window is one update."""
    world, method, source, variant, beta = cell
    flags = {"lr": "3e-4" if world == "addition" else "1e-3", "max_grad_norm": "1", "beta": beta}
    if variant != "plain":
        flags["sync_every"] = "1" if source == "online" else "16"
    return flags


def neighbours(cell: tuple, flags: dict, name: str) -> list[dict]:
    """The flags and those one step down and up the ladder of `name`."""
    if name not in flags or name == "sync_every" and cell[2] == "online":
        return [flags]
    ladder = LADDERS[name]
    at = ladder.index(flags[name])
    return [flags | {name: value} for value in ladder[max(0, at - 1) : at + 2]]


def steady(results: list[dict]) -> float:
    """What the grid chooses by: the mean less the standard deviation over seeds of what training gained.
    A win rate is against the initial policy already; an accuracy is less that policy's."""
    gains = [x["score"] - (x["curve"][0][1] if x["run"][0] == "addition" else 0) for x in results]
    return statistics.fmean(gains) - statistics.stdev(gains)


def lost(score: float) -> bool:
    """A win rate that is no better than the initial policy's."""
    return score <= 0.5


def climb(starts: dict[tuple, dict], stages: tuple, jobs: int) -> list[dict]:
    """For each cell what was tried on GRID_SEEDS and what was chosen."""
    chosen, stage, tried = dict(starts), dict.fromkeys(starts, 0), {cell: {} for cell in starts}
    while min(stage.values()) < len(stages):
        runs = {cell: [[Run(*cell[:4], seed, tuple(flags.items())) for seed in GRID_SEEDS]
                       for flags in neighbours(cell, chosen[cell], stages[stage[cell]])]
                for cell in starts if stage[cell] < len(stages)}
        results = do([run for sets in runs.values() for many in sets for run in many], jobs)
        for cell, sets in runs.items():
            found = {many[0].flags: [results[run.key] for run in many] for many in sets}
            tried[cell] |= found
            best = dict(max(found, key=lambda flags: (steady(found[flags]), dict(flags) == chosen[cell])))  # a tie: stay
            stage[cell] += best == chosen[cell]
            chosen[cell] = best
    return [{"cell": cell, "chosen": chosen[cell], "at the ladder's end": ends(chosen[cell]),
             "tried": [dict(flags) | {"scores": scores_of(some)} for flags, some in tried[cell].items()]}
            for cell in starts]


def scores_of(results: list[dict]) -> list[float]:
    return [round(x["score"], 4) for x in results]


def step_back(entries: list[dict], jobs: int) -> None:
    """Where a seed is lost at the chosen learning rate or the next larger one, take the next smaller one, if
    that loses none: where the edge lies differs from seed to seed."""
    def moved(entry: dict, by: int) -> dict:
        ladder = LADDERS["lr"]
        at = ladder.index(entry["chosen"]["lr"]) + by
        return entry["chosen"] | {"lr": ladder[min(max(at, 0), len(ladder) - 1)]}

    def runs_of(entry: dict, by: int) -> list[Run]:
        return [Run(*entry["cell"][:4], seed, tuple(moved(entry, by).items())) for seed in GRID_SEEDS]

    results = do([run for entry in entries for by in (-1, 0, 1) for run in runs_of(entry, by)], jobs)
    for entry in entries:
        scores = {by: scores_of([results[run.key] for run in runs_of(entry, by)]) for by in (-1, 0, 1)}
        tried = [moved(entry, by) | {"scores": scores[by]} for by in scores]
        entry["tried"] += [setting for setting in tried if setting not in entry["tried"]]
        entry["lr of the best"] = entry["chosen"]["lr"]
        if any(map(lost, scores[0] + scores[1])) and not any(map(lost, scores[-1])):
            entry["chosen"] = moved(entry, -1)
        entry["at the ladder's end"] = ends(entry["chosen"])


def ends(flags: dict) -> list[str]:
    """The flags that stand at an end of their ladder; k = 1 is the least that there is."""
    return [name for name, ladder in LADDERS.items()
            if flags.get(name) in (ladder[0], ladder[-1]) and (name, flags[name]) != ("sync_every", "1")]


def grid(jobs: int) -> None:
    cells = climb({cell: start_of(cell) for cell in CELLS}, STAGES, jobs)
    chosen = {entry["cell"]: entry["chosen"] for entry in cells}
    starts = {cell: chosen[(*cell[:4], BETA)] | {"beta": cell[4]} for cell in SWEPT}
    starts |= {cell: start_of(cell) for cell in SWEPT if cell[3] == "humanline"}  # another β, another k
    swept = climb(starts, STAGES[:3], jobs)
    step_back([entry for entry in cells + swept if entry["cell"][0] == "letters"], jobs)
    for entry in cells + swept:
        print(*entry["cell"], entry["chosen"], *(f"({name} at its end)" for name in entry["at the ladder's end"]))
    runs = [Run(*entry["cell"][:4], seed, tuple((name, x) for name, x in setting.items() if name != "scores"))
            for entry in cells + swept for setting in entry["tried"] for seed in GRID_SEEDS]
    save(RESULTS, "grid", {"command": "./run.sh reproduce --grid", "seeds": GRID_SEEDS, "cells": cells + swept,
                           "core-minutes of training": core_minutes(runs, do([], jobs))})


def core_minutes(runs, results: dict[str, dict]) -> float:
    return round(sum(results[key]["wall"] for key in {run.key for run in runs}) / 60)


def choice(*cell) -> dict:
    path = RESULTS / "grid.json"
    if not path.exists():
        sys.exit("error: no results/grid.json; make it with ./run.sh reproduce --grid")
    cells = json.loads(path.read_text())["cells"]
    return next(dict(entry["chosen"]) for entry in cells if entry["cell"] == list(cell))


# --- the experiments: rows of (label, runs over the seeds) --------------------------------------------


def over_seeds(seeds, world, method, source, variant, beta=None, flags=None, like=None, data=None) -> list[Run]:
    """A cell's runs with its chosen flags, or those of the variant that it is `like`, and others."""
    beta = "0" if method == "grpo" else beta or BETA
    chosen = choice(world, method, source, like or variant, beta) | (flags or {})
    if variant in ("plain", "clipped only"):
        chosen.pop("sync_every", None)
    return [Run(world, method, source, variant, seed, tuple(chosen.items()), data) for seed in seeds]


def main_table(seeds, world="letters", methods=tuple(METHODS), both=("offline", "online")) -> dict[str, list[Run]]:
    return {f"{method} {source} {variant}": over_seeds(seeds, world, method, source, variant)
            for method in methods for source in both for variant in ("plain", "humanline")}


def verifiable(seeds) -> dict[str, list[Run]]:
    return main_table(seeds, "addition", ("grpo",))


def every_64(seeds) -> dict[str, list[Run]]:
    return {"online plain": over_seeds(seeds, "addition", "grpo", "online", "plain"),
            "every 64 plain": over_seeds(seeds, "addition", "grpo", "every 64", "plain"),
            "every 64 humanline": over_seeds(seeds, "addition", "grpo", "every 64", "humanline")}


KS = (1, 2, 4, 8, 12, 16, 24, 32, 64)


def k_sweep(seeds, ks=KS) -> dict[str, list[Run]]:
    return {f"k = {k}": over_seeds(seeds, "addition", "grpo", "every 64", "humanline",
                                   flags={"sync_every": str(k)}) for k in ks}


def beta_sweep(seeds) -> dict[str, list[Run]]:
    return {f"{method} β = {beta} {name}": over_seeds(seeds, "letters", method, source, variant, beta)
            for method in ("dpo", "kto") for beta in BETAS
            for name, source, variant in (("plain", "offline", "plain"), ("humanline", "offline", "humanline"),
                                          ("online", "online", "plain"))}


ABLATED = {"letters dpo": ("letters", "dpo", "offline"), "letters kto": ("letters", "kto", "offline"),
           "letters grpo": ("letters", "grpo", "offline"), "addition grpo": ("addition", "grpo", "every 64")}
LARGER = ("letters dpo, larger rate", "letters kto, larger rate")
BLOCKS = (*ABLATED, *LARGER)


def ablation(seeds) -> dict[str, list[Run]]:
    """All variants at the flags of humanline, and at the next learning rate of the ladder."""
    rows = {}
    for name in BLOCKS:
        cell, flags = ABLATED[name.partition(",")[0]], {}
        if name in LARGER:
            ladder = LADDERS["lr"]
            flags = {"lr": ladder[ladder.index(choice(*cell, "humanline", BETA)["lr"]) + 1]}
        for variant in VARIANTS:
            rows[f"{name}: {variant}"] = over_seeds(seeds, *cell, variant, flags=flags, like="humanline")
    return rows


SETTINGS = ("k = 64", "4 epochs", "data of another policy")


def clipping(seeds) -> dict[str, list[Run]]:
    """Where clipping might add to syncing: longer windows, several epochs, data of another policy."""
    rows = {}
    for method in ("dpo", "kto"):
        kind = METHODS[method][0]
        quarter = {"max_rows": str(int(ROWS[method]) // 4)}
        for name, flags, data in (("k = 64", {"sync_every": "64"}, None), ("4 epochs", quarter, None),
                                  ("data of another policy", {}, f"{kind}_random.jsonl")):
            for variant in ("synced only", "humanline"):
                rows[f"{method}, {name}: {variant}"] = over_seeds(
                    seeds, "letters", method, "offline", variant, flags=flags, like="humanline", data=data)
    return rows


def windows(seeds) -> dict[str, list[Run]]:
    """The paper's k for DPO and KTO, 1, and 4, which by the paper loses nothing."""
    return {f"{method} k = {k}": over_seeds(seeds, "letters", method, "offline", "humanline", flags={"sync_every": k})
            for method in ("dpo", "kto") for k in ("1", "4")}


def data_quality(seeds) -> dict[str, list[Run]]:
    """96 updates: a quartile has 800 groups, 8 for an update."""
    files = {f"quartile {i}": f"groups_quartile_{i}.jsonl" for i in (1, 2, 3, 4)}
    files |= {"random": "groups_random.jsonl", "all": None}
    return {name: over_seeds(seeds, "letters", "grpo", "offline", "humanline", flags={"steps": "96"}, data=data)
            for name, data in files.items()}


CELL_PAIRS = [("online plain", "offline plain"), ("offline humanline", "offline plain"),
              ("offline humanline", "online plain"), ("online humanline", "online plain")]
PARTS = [("synced only", "plain"), ("clipped only", "plain"), ("humanline", "synced only"),
         ("humanline", "clipped only"), ("humanline sampling", "humanline")]
EXPERIMENTS = {  # name: (rows, pairs whose difference is of interest, what is measured)
    "main": (main_table, [(f"{m} {a}", f"{m} {b}") for m in METHODS for a, b in CELL_PAIRS], "win rate"),
    "verifiable": (verifiable, [(f"grpo {a}", f"grpo {b}") for a, b in CELL_PAIRS], "greedy accuracy"),
    "beta_sweep": (beta_sweep, [(f"{m} β = {beta} {a}", f"{m} β = {beta} {b}") for m in ("dpo", "kto") for beta in BETAS
                                for a, b in (("humanline", "plain"), ("online", "humanline"))]
                   + [(f"{m} β = 3 {name}", f"{m} β = 0.1 plain") for m in ("dpo", "kto")
                      for name in ("plain", "humanline")], "win rate"),
    "every_64": (every_64, [("every 64 plain", "online plain"), ("every 64 humanline", "every 64 plain"),
                            ("every 64 humanline", "online plain")], "greedy accuracy"),
    "k_sweep": (k_sweep, [(f"k = {b}", f"k = {a}") for a, b in zip(KS, KS[1:])]
                + [("k = 16", k) for k in ("k = 1", "k = 8", "k = 64")] + [("k = 32", "k = 16")], "greedy accuracy"),
    "ablation": (ablation, [(f"{name}: {a}", f"{name}: {b}") for name in BLOCKS for a, b in PARTS],
                 "win rate or accuracy"),
    "clipping": (clipping, [(f"{m}, {name}: humanline", f"{m}, {name}: synced only") for m in ("dpo", "kto")
                            for name in SETTINGS], "win rate"),
    "windows": (windows, [(f"{m} k = 4", f"{m} k = 1") for m in ("dpo", "kto")], "win rate"),
    "data_quality": (data_quality, [("quartile 1", "quartile 4"), ("quartile 1", "all"), ("random", "all")], "win rate"),
}
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t for so many seeds


def interval(values: list[float]) -> list[float]:
    """[mean, low, high]: 95% t-interval over seeds; one seed has no interval."""
    mean, half = statistics.fmean(values), 0.0
    if len(values) > 1:
        half = T_975[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return [round(x, 4) for x in (mean, mean - half, mean + half)]


def verdict(numbers: list[float]) -> str:
    """The one rule for all tables: where the interval of a difference lies."""
    _, low, high = numbers
    return "above 0" if low > 0 else "below 0" if high < 0 else "holds 0"


def machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


def save(folder: Path, name: str, table: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table |= {"machine": machine()}
    text = json.dumps(table, indent=1, ensure_ascii=False)
    (folder / f"{name}.json").write_text(text + "\n")


def summarize(name: str, rows: dict[str, list[Run]], results: dict, command: str) -> dict:
    """The table of an experiment: of each row mean and interval over seeds, the values, the curve."""
    _, pairs, measured = EXPERIMENTS[name]
    table, values = {"command": command, "measured": measured, "rows": {}, "differences": {}}, {}
    for label, runs in rows.items():
        done = [results[run.key] for run in runs]
        values[label] = [x["score"] for x in done]
        curves = list(zip(*(x["curve"] for x in done)))
        table["seeds"] = [run.seed for run in runs]
        table["rows"][label] = {
            "score": interval(values[label]),
            "values": [round(x, 4) for x in values[label]],
            "flags": dict(runs[0].flags),
            "seconds": [x["seconds"] for x in done],
            "unclipped": round(statistics.fmean(x["unclipped"] for x in done), 4),
            "stopped": {run.seed: x["stopped"] for run, x in zip(runs, done) if x["stopped"] is not None},
            "curve": {"updates": [at[0][0] for at in curves],
                      "greedy": [[round(x[1], 4) for x in at] for at in curves]},  # of each seed
        }
        if "utility" in done[0]:
            table["rows"][label]["utility"] = interval([x["utility"] for x in done])
    for a, b in pairs:
        if a in values and b in values:
            numbers = interval([x - y for x, y in zip(values[a], values[b])])
            table["differences"][f"{a} − {b}"] = {"difference": numbers, "verdict": verdict(numbers)}
    if name == "data_quality":
        bounds = [json.loads((run.folder() / "quartiles.json").read_text()) for run in rows["all"]]
        for part in bounds[0]:
            low, high = zip(*(b[part] for b in bounds))
            table["rows"][part]["nats"] = [round(min(low), 2), round(max(high), 2)]
    return table


def show(name: str, table: dict) -> None:
    print(f"\n{name}: {table['measured']}, seeds {table['seeds']}, mean [95% interval]")
    for label, row in table["rows"].items():
        mean, low, high = row["score"]
        flags = " ".join(f"{key} {value}" for key, value in row["flags"].items())
        print(f"  {label:48s}{mean:.3f} [{low:.3f}, {high:.3f}]  {statistics.median(row['seconds']):5.1f} s  {flags}")
    for label, found in table["differences"].items():
        mean, low, high = found["difference"]
        print(f"  {label:78s}{mean:+.3f} [{low:+.3f}, {high:+.3f}]  {found['verdict']}")


# --- the demo ---------------------------------------------------------------------------------------


def demo_rows(seeds) -> dict[str, dict[str, list[Run]]]:
    main = {label: runs for label, runs in main_table(seeds).items() if "online humanline" not in label}
    return {"main": main, "every_64": every_64(seeds), "k_sweep": k_sweep(seeds, (1, 4, 16, 64))}


def typical_seed() -> int:
    """Of the reported seeds the one whose scores lie nearest to the means of the demo's rows: no lucky pick."""
    tables = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in ("main", "every_64", "k_sweep")}
    rows = [tables[name]["rows"][label] for name, some in demo_rows(SEEDS).items() for label in some]
    return min(SEEDS, key=lambda seed: sum(abs(row["values"][SEEDS.index(seed)] - row["score"][0]) for row in rows))


def demo(jobs: int) -> None:
    """Three short tables of one seed; a minute or two after the toy worlds are made."""
    seed, folder = typical_seed(), ROOT / "runs/quick"
    rows = demo_rows([seed])
    results = do([run for many in rows.values() for runs in many.values() for run in runs], jobs)
    tables = {name: summarize(name, some, results, "./run.sh") for name, some in rows.items()}
    for name, table in tables.items():
        save(folder, name, table)
    score = {name: {label: row["score"][0] for label, row in table["rows"].items()} for name, table in tables.items()}

    main = score["main"]
    print("\n1. Fixed data, fixed data with humanline, fresh samples: win rate against the initial policy\n\n"
          f"{'':8s}{'offline':>10s}{'+ humanline':>14s}{'online':>10s}")
    for method in METHODS:
        three = [main[f"{method} {cell}"] for cell in ("offline plain", "offline humanline", "online plain")]
        print(f"{method.upper():8s}{three[0]:10.2f}{three[1]:14.2f}{three[2]:10.2f}")
    print("\n2. GRPO on sums that are sampled every 64 updates: greedy accuracy\n")
    for label, x in score["every_64"].items():
        print(f"{label.replace('online', 'every update,').replace('64 ', '64 updates, '):32s}{x:8.2f}")
    print("\n3. The same with humanline, synced every k updates\n")
    print("".join(f"{label:>10s}" for label in score["k_sweep"]))
    print("".join(f"{x:10.2f}" for x in score["k_sweep"].values()))
    draw_main(tables["main"], folder)
    draw_every_64(tables["every_64"], folder)
    draw_k_sweep(tables["k_sweep"], tables["every_64"], folder)
    added = [f"{m.upper()} by {main[f'{m} offline humanline'] - main[f'{m} offline plain']:+.2f}" for m in METHODS]
    found = json.loads((RESULTS / "main.json").read_text())
    shown = [f"{m.upper()} {found['differences'][f'{m} offline humanline − {m} offline plain']['verdict']}" for m in METHODS]
    gone = [f"{m.upper()} {sum(map(lost, found['rows'][f'{m} online plain']['values']))}" for m in METHODS]
    swept = json.loads((RESULTS / "k_sweep.json").read_text())["differences"]["k = 16 − k = 1"]["verdict"]
    print(f"\nThis is seed {seed}, which of the five in README.md lies nearest to their means.\n"
          f"Humanline changes the win rate: {', '.join(added)}.\n"
          f"Over the five seeds the interval of this change is: {', '.join(shown)}; of k = 16 less k = 1: {swept}.\n"
          f"Seeds of the five that online training loses: {', '.join(gone)}.\n"
          f"Open {(folder / 'main.png').relative_to(ROOT)} first.")


# --- figures ----------------------------------------------------------------------------------------

COLORS = {"plain": "#D55E00", "humanline": "#0072B2", "online": "#000000"}  # Okabe and Ito: for the colour-blind


def point(axes, x, numbers: list, values: list, color: str, marker: str, label=None, filled=True) -> None:
    """A mean with its interval, and beside it the seeds."""
    mean, low, high = numbers
    axes.errorbar(x, mean, [[max(0, mean - low)], [max(0, high - mean)]], color=color, marker=marker, capsize=3,
                  markersize=7, label=label, linestyle="", markerfacecolor=color if filled else "white")
    axes.plot([x + 0.06] * len(values), values, ".", color=color, alpha=0.4, markersize=4)


def within(numbers: list) -> list:
    """A win rate's interval as far as there are win rates."""
    return [min(1.0, max(0.0, x)) for x in numbers]


def finish(figure, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(folder / f"{name}.png", dpi=150)
    plt.close(figure)


def draw_main(table: dict, folder: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 3.6))
    cells = [("offline", "plain"), ("offline", "humanline"), ("online", "plain"), ("online", "humanline")]
    for i, method in enumerate(METHODS):
        for j, (source, variant) in enumerate(cells):
            row = table["rows"].get(f"{method} {source} {variant}")
            if row:
                label = None if i else f"{source}{' + humanline' if variant == 'humanline' else ''}"
                point(axes, i + (j - 1.5) / 5, within(row["score"]), row["values"], COLORS[variant],
                      "so"[source == "online"], label, filled=source == "offline")
    axes.axhline(0.5, color="gray", linewidth=0.8, linestyle=":")
    axes.text(0.01, 0.5, "initial policy", transform=axes.get_yaxis_transform(), va="bottom", color="gray", fontsize=8)
    axes.set_xticks(range(len(METHODS)), [m.upper() for m in METHODS])
    axes.set_ylabel("win rate against the initial policy")
    axes.set_ylim(0, 1.03)
    axes.legend(fontsize=8, loc="lower right")
    finish(figure, folder, "main")


def draw_beta(table: dict, folder: Path) -> None:
    figure, both = plt.subplots(1, 2, figsize=(7, 3.2), sharey=True)
    for axes, method in zip(both, ("dpo", "kto")):
        for j, (name, marker) in enumerate((("plain", "s"), ("humanline", "o"), ("online", "^"))):
            for i, beta in enumerate(BETAS):
                row = table["rows"][f"{method} β = {beta} {name}"]
                label = None if i else {"plain": "offline", "humanline": "offline + humanline"}.get(name, name)
                point(axes, i + (j - 1) / 6, within(row["score"]), row["values"], COLORS[name], marker, label)
            means = [table["rows"][f"{method} β = {beta} {name}"]["score"][0] for beta in BETAS]
            axes.plot([i + (j - 1) / 6 for i in range(len(BETAS))], means, color=COLORS[name], linewidth=0.8)
        axes.set_xticks(range(len(BETAS)), BETAS)
        axes.set_xlabel("β")
        axes.set_title(method.upper(), fontsize=10)
    both[0].set_ylabel("win rate")
    both[1].legend(fontsize=8)
    finish(figure, folder, "beta_sweep")


def draw_every_64(table: dict, folder: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 3.6))
    looks = {"online plain": (COLORS["online"], "-", "sampled every update (online)"),
             "every 64 plain": (COLORS["plain"], "--", "every 64 updates, plain"),
             "every 64 humanline": (COLORS["humanline"], "-.", "every 64 updates, humanline")}
    for (label, (color, line, name)), marker in zip(looks.items(), "os^"):
        curve = table["rows"][label]["curve"]
        means = [statistics.fmean(at) for at in curve["greedy"]]
        axes.plot(curve["updates"], means, line, color=color, marker=marker, markersize=4, label=name)
        axes.plot(curve["updates"], curve["greedy"], line, color=color, linewidth=0.7, alpha=0.4)
    axes.set_xlabel("updates")
    axes.set_ylabel("greedy accuracy on held-out sums\n(thin: each seed)")
    axes.legend(fontsize=8)
    finish(figure, folder, "every_64")


def draw_k_sweep(table: dict, others: dict, folder: Path) -> None:
    """Differences to plain with the same seed: accuracies differ more from seed to seed than from k to k."""
    figure, axes = plt.subplots(figsize=(7, 3.6))
    plain = others["rows"]["every 64 plain"]["values"]

    def differences(row: dict) -> list[float]:
        return [x - y for x, y in zip(row["values"], plain)]

    for i, row in enumerate(table["rows"].values()):
        values = differences(row)
        point(axes, i, interval(values), values, COLORS["humanline"], "o", None if i else "humanline, every 64 updates")
    mean, low, high = interval(differences(others["rows"]["online plain"]))
    axes.axhline(mean, color=COLORS["online"], label="sampled every update (online)")
    axes.axhspan(low, high, color=COLORS["online"], alpha=0.1, linewidth=0)
    axes.axhline(0, color=COLORS["plain"], linestyle="--", label="every 64 updates, plain")
    axes.set_xticks(range(len(table["rows"])), [label.removeprefix("k = ") for label in table["rows"]])
    axes.set_xlabel("k: updates between two syncs")
    axes.set_ylabel("greedy accuracy less plain's")
    axes.legend(fontsize=8, loc="lower right")
    finish(figure, folder, "k_sweep")


# --- main -------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--grid", action="store_true", help="choose each cell's flags, on other seeds")
    parser.add_argument("--quick", action="store_true", help="the demo: one seed, a slice, minutes")
    parser.add_argument("--only", nargs="*", choices=[*EXPERIMENTS, "theory"], help="some experiments")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    if args.grid:
        return grid(args.jobs)
    if args.quick:
        return demo(args.jobs)
    names = args.only if args.only is not None else [*EXPERIMENTS, "theory"]
    rows = {name: EXPERIMENTS[name][0](SEEDS) for name in names if name in EXPERIMENTS}
    results = do([run for many in rows.values() for some in many.values() for run in some], args.jobs)
    tables = {name: summarize(name, some, results, "./run.sh reproduce") for name, some in rows.items()}
    if "main" in tables:
        lengths = [tokens_of(folder_of("letters", seed)) for seed in SEEDS]
        tables["main"] |= {"beta times tokens": {"paper": PAPER["beta"] * PAPER["tokens"], "tokens": interval(lengths),
                                                 "here": float(BETA) * statistics.fmean(lengths)},
                           "core-minutes of training": core_minutes(
                               [run for many in rows.values() for some in many.values() for run in some], results)}
    for name, table in tables.items():
        show(name, table)
        save(RESULTS, name, table)
    if "theory" in names:
        subprocess.run([sys.executable, HERE / "theory.py"], check=True, stdout=subprocess.DEVNULL)
    for name, draw in (("main", draw_main), ("beta_sweep", draw_beta), ("every_64", draw_every_64)):
        if name in tables:
            draw(tables[name], FIGURES)
    if "k_sweep" in tables and "every_64" in tables:
        draw_k_sweep(tables["k_sweep"], tables["every_64"], FIGURES)
    print(f"\ntables and figures are in {RESULTS} and {FIGURES}")


def tokens_of(folder: Path) -> float:
    """Mean tokens of the offline responses, their end included: one a letter."""
    groups = [json.loads(line) for line in open(folder / "groups_train.jsonl")]
    return statistics.fmean(len(text) + 1 for group in groups for text in group["completions"])


if __name__ == "__main__":
    main()
    workers.cache_clear()  # they end now, not while Python takes itself apart
