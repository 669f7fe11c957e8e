"""Which of the paper's findings hold on a laptop: ./run.sh reproduce [--grid | --quick]

Runs the three scripts' own main, with flags only, on the toy worlds of tests/experiments/toy_world.py:

    letters    unverifiable: a hidden utility; scored as AlpacaEval scores, by the win rate of held-out
               responses against those of the initial policy (½ for a tie; 4 × 4 samples of 256 prompts)
    addition   verifiable: share of 512 held-out sums that are right, greedy

A seed changes everything: initial policy, data, order, sampling. Every cell has its own learning rate,
β (DPO, KTO), k and gradient-norm bound, chosen by --grid on seeds that are not reported; the choice is
in tests/experiments/results/grid.json. Finished runs are lines of runs/reproduce/runs.jsonl: a broken reproduction
goes on where it stopped. Tables go to tests/experiments/results/*.json and figures to tests/experiments/figures (--quick: to
runs/quick, with one seed). A run that stops since all samples of a prompt are alike (it has converged, to
the best or the worst) is graded at its last checkpoint, of every 30 updates. Intervals are 95% percentile
bootstraps over seeds, differences are paired.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).resolve().parents[2]
RESULTS, FIGURES = ROOT / "tests/experiments/results", ROOT / "tests/experiments/figures"
sys.path[:0] = [str(ROOT), str(ROOT / "tests/experiments")]

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import common  # noqa: E402
import toy_world  # noqa: E402

SEEDS = (0, 1, 2, 3, 4)
GRID_SEEDS = {"letters": (10, 11, 12), "addition": (10,)}  # a cell that collapses now and then is not chosen
# At most one pass over the offline data in every run.
PROMPTS = {"letters": dict(train=3200, test=256), "addition": dict(train=4096, test=512)}
WORLDS = {
    "letters": "--max_length 48 --max_new_tokens 20 --steps 120 --eval_every 30 --eval_size 256",
    "addition": "--max_length 32 --max_new_tokens 6 --steps 256 --eval_every 32 --eval_size 512",
}
METHODS = {  # (kind of offline data, flags)
    "dpo": ("pairs", "--batch_size 16"),
    "kto": ("labels", "--batch_size 32"),
    "grpo": ("groups", "--batch_size {size} --beta 0"),
}
GRPO_BATCH = {"letters": 64, "addition": 128}  # responses, in groups of 8
EVERY = "--temperature 1.0 --gen_batch 1024 --save_every 30 --device cpu --overwrite"
SOURCES = {"offline": 0, "online": 1, "every 64": 64}  # n: updates between two samplings
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
        argv += ["--eval_data", folder / (f"{'prompts' if n else kind}_test.jsonl")]
        argv += ["--reward", f"{ROOT}/tests/experiments/toy_world.py:{self.world}_reward", "--sample_every", n]
        argv += f"{EVERY} {WORLDS[self.world]} {flags} {VARIANTS[self.variant]}".split()
        argv += ["--seed", self.seed] + [x for name, value in self.flags for x in (f"--{name}", value)]
        return [str(x).format(size=GRPO_BATCH[self.world]) for x in argv]


# --- the work of one process ------------------------------------------------------------------------


def work(task) -> dict | None:
    """Build a world (world, seed) or do a Run; what it prints goes to a file of the run."""
    torch.set_num_threads(1)
    if not isinstance(task, Run):
        return build_world(*task)
    try:
        return train(task)
    except BaseException as error:
        raise RuntimeError(f"{task}: {error!r}\n{traceback.format_exc()[-1500:]}") from None


def build_world(world: str, seed: int) -> None:
    folder = folder_of(world, seed)
    toy_world.build(folder, world, seed, **PROMPTS[world])
    if not (folder / "initial.json").exists():
        if world == "letters":
            split_in_quartiles(folder)
        graded = toy_world.grade(folder / "policy", folder, world)
        (folder / "initial.json").write_text(json.dumps(graded))


def train(run: Run) -> dict:
    script = importlib.import_module(f"humanline_{run.method}")
    out = ROOT / "runs/reproduce/now" / str(os.getpid())
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    stopped = None
    with open(out.with_suffix(".log"), "w") as file:
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            try:
                script.main(script.parse_args(run.argv(out)))
            except common.BadInput as error:
                stopped = str(error)
                if "rewards are equal within groups" not in stopped:
                    raise
                # responses all alike, at the best or the worst: nothing to learn
                last_checkpoint(run, out).save_pretrained(out / "final")
                shutil.copytree(run.folder() / "policy", out / "final", dirs_exist_ok=True,
                                ignore=shutil.ignore_patterns("*.safetensors"))
    metrics = [json.loads(line) for line in open(out / "metrics.jsonl")]
    curve = [[m["step"], m["eval_reward_greedy"], m["eval_reward_sampled"]]
             for m in metrics if "eval_reward_greedy" in m]
    result = {"run": run, "curve": curve, "stopped": stopped,
              "seconds": sum(m.get("seconds", 0) for m in metrics)}
    if run.world == "addition":
        return result | {"score": curve[-1][1]}
    rewards = toy_world.grade(out / "final", run.folder(), run.world)
    initial = json.loads((run.folder() / "initial.json").read_text())
    return result | {"score": win_rate(rewards, initial), "utility": statistics.fmean(rewards)}


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


@torch.no_grad()
def split_in_quartiles(folder: Path) -> None:
    """groups_quartile_1.jsonl (worst) … 4: groups by their responses' mean token log-prob under the
    initial policy, and the bounds of each in nats."""
    tokenizer = toy_world.AutoTokenizer.from_pretrained(folder / "policy")
    model = toy_world.AutoModelForCausalLM.from_pretrained(folder / "policy").eval()
    model.row_tokens = 0  # no row is shared
    groups = [json.loads(line) for line in open(folder / "groups_train.jsonl")]
    means = []
    for group in groups:
        examples = [common.encode(tokenizer, group["prompt"], text, 48) for text in group["completions"]]
        logp, mask = common.response_logps(model, examples)  # (B, T)
        means.append(((logp * mask).sum(-1) / mask.sum(-1)).mean().item())
    order = sorted(range(len(groups)), key=means.__getitem__)
    quarter, bounds = len(groups) // 4, []
    for i in range(4):
        part = order[i * quarter : (i + 1) * quarter]
        toy_world.write_jsonl(folder / f"groups_quartile_{i + 1}.jsonl", [groups[j] for j in part])
        bounds.append([means[part[0]], means[part[-1]]])
    (folder / "quartiles.json").write_text(json.dumps(bounds))


# --- many runs --------------------------------------------------------------------------------------


def finished(store: Path) -> dict[str, dict]:
    """Results by key; a last line that a kill cut short is dropped, and done again."""
    if not store.exists():
        return {}
    whole = [line for line in store.read_text().splitlines(True) if line.endswith("\n")]
    store.write_text("".join(whole))
    results = map(json.loads, whole)
    return {json.dumps(result["run"]): result for result in results}


def do(runs: list[Run], jobs: int) -> dict[str, dict]:
    """The results of all runs by key, those that are missing made, `jobs` at a time."""
    store = ROOT / "runs/reproduce/runs.jsonl"
    store.parent.mkdir(parents=True, exist_ok=True)
    results = finished(store)
    todo = [run for run in dict.fromkeys(runs) if run.key not in results]
    worlds = sorted({(run.world, run.seed) for run in todo})
    worlds = [task for task in worlds if not (folder_of(*task) / "initial.json").exists()]
    if todo:
        pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
        try:
            for tasks, title in ((worlds, "toy worlds"), (todo, "runs")):
                futures = [pool.submit(work, task) for task in tasks]
                for future in tqdm(as_completed(futures), title, len(tasks), smoothing=0):
                    result = future.result()
                    if result:
                        with open(store, "a") as file:
                            file.write(json.dumps(result) + "\n")
                        results[json.dumps(result["run"])] = result
        finally:  # after an error nothing more is begun
            pool.shutdown(cancel_futures=True)
    return results


# --- the grid ---------------------------------------------------------------------------------------

START = {"dpo": {"lr": "1e-4", "beta": "0.1", "sync_every": "4", "max_grad_norm": "1.0"},
         "grpo": {"lr": "1e-4", "sync_every": "16", "max_grad_norm": "1.0"}}
START["kto"] = START["dpo"]
STAGES = [  # one after the other, each from the best of those before; a name has its values in GRID
    ("lr", "beta"),
    ("sync_every",),
    ("max_grad_norm",),
]
GRID = {"lr": ("1e-4", "3e-4", "1e-3"), "beta": ("0.1", "1.0"),
        "sync_every": {"dpo": ("1", "4", "16"), "kto": ("1", "4", "16"), "grpo": ("4", "16", "32")},
        "max_grad_norm": ("0.1", "1.0")}
CELLS = [("letters", method, source, variant)
         for method in METHODS for source in ("offline", "online") for variant in ("plain", "humanline")]
CELLS += [("addition", "grpo", source, variant)
          for source in SOURCES for variant in ("plain", "humanline")]


def start_of(cell: tuple) -> dict:
    """The flags that a cell has, before any choice. Plain has no k; with n = 1 a window is one update."""
    flags = dict(START[cell[1]])
    if cell[3] == "plain":
        del flags["sync_every"]
    elif cell[2] == "online":
        flags["sync_every"] = "1"
    return flags


def candidates(cell: tuple, flags: dict, stage: tuple) -> list[dict]:
    names = [name for name in stage if name in flags and not (name == "sync_every" and cell[2] == "online")]
    values = [GRID[name][cell[1]] if name == "sync_every" else GRID[name] for name in names]
    return [flags | dict(zip(names, some)) for some in itertools.product(*values)]


def grid(jobs: int) -> None:
    chosen, tried = {cell: start_of(cell) for cell in CELLS}, {cell: {} for cell in CELLS}
    for stage in STAGES:
        runs = {cell: [[Run(*cell, seed, tuple(flags.items())) for seed in GRID_SEEDS[cell[0]]]
                       for flags in candidates(cell, chosen[cell], stage)] for cell in CELLS}
        results = do([run for sets in runs.values() for many in sets for run in many], jobs)
        for cell, sets in runs.items():
            for many in sets:
                tried[cell][many[0].flags] = statistics.fmean(results[r.key]["score"] for r in many)
            chosen[cell] = dict(max(tried[cell], key=tried[cell].get))
    cells = [{"cell": cell, "chosen": chosen[cell],
              "tried": [dict(flags) | {"score": round(x, 4)} for flags, x in tried[cell].items()]}
             for cell in CELLS]
    for entry in cells:
        print(*entry["cell"], entry["chosen"], f"{max(x['score'] for x in entry['tried']):.3f}")
    save(RESULTS, "grid", {"command": "./run.sh reproduce --grid", "seeds": GRID_SEEDS, "cells": cells})


def choice(*cell) -> dict:
    path = RESULTS / "grid.json"
    if not path.exists():
        sys.exit("error: no tests/experiments/results/grid.json; make it with ./run.sh reproduce --grid")
    cells = json.loads(path.read_text())["cells"]
    return next(dict(entry["chosen"]) for entry in cells if entry["cell"] == list(cell))


# --- the experiments: rows of (label, runs over the seeds) --------------------------------------------


def over_seeds(seeds, *cell, flags: dict | None = None, like: str | None = None, data=None) -> list[Run]:
    """A cell's runs with its chosen flags, or those of the variant that it is `like`."""
    chosen = choice(*cell[:3], like or cell[3]) | (flags or {})
    if cell[3] in ("plain", "clipped only"):
        chosen.pop("sync_every", None)
    return [Run(*cell, seed, tuple(chosen.items()), data) for seed in seeds]


def main_table(seeds, world="letters", methods=tuple(METHODS)) -> dict[str, list[Run]]:
    return {f"{method} {source} {variant}": over_seeds(seeds, world, method, source, variant)
            for method in methods for source in ("offline", "online") for variant in ("plain", "humanline")}


def verifiable(seeds) -> dict[str, list[Run]]:
    return main_table(seeds, "addition", ("grpo",))


def every_64(seeds) -> dict[str, list[Run]]:
    return {"online plain": over_seeds(seeds, "addition", "grpo", "online", "plain"),
            "every 64 plain": over_seeds(seeds, "addition", "grpo", "every 64", "plain"),
            "every 64 humanline": over_seeds(seeds, "addition", "grpo", "every 64", "humanline")}


def k_sweep(seeds, ks=(1, 2, 4, 8, 16, 32, 64)) -> dict[str, list[Run]]:
    return {f"k = {k}": over_seeds(seeds, "addition", "grpo", "every 64", "humanline",
                                   flags={"sync_every": str(k)}) for k in ks}


def ablation(seeds) -> dict[str, list[Run]]:
    rows = {}
    for world, source in (("letters", "offline"), ("addition", "every 64")):
        for variant in VARIANTS:
            like = "plain" if variant == "plain" else "humanline"
            rows[f"{world} {variant}"] = over_seeds(seeds, world, "grpo", source, variant, like=like)
    return rows


def data_quality(seeds) -> dict[str, list[Run]]:
    cell = "letters", "grpo", "offline", "humanline"
    rows = {f"quartile {i}": over_seeds(seeds, *cell, data=f"groups_quartile_{i}.jsonl")
            for i in (1, 2, 3, 4)}
    return rows | {"all": over_seeds(seeds, *cell)}


CLAIMS = [("online plain", "offline plain"), ("offline humanline", "offline plain"),
          ("offline humanline", "online plain"), ("online humanline", "online plain")]
EXPERIMENTS = {  # name: (rows, pairs whose difference is of interest, what is measured)
    "main": (main_table, [(f"{m} {a}", f"{m} {b}") for m in METHODS for a, b in CLAIMS], "win rate"),
    "verifiable": (verifiable, [(f"grpo {a}", f"grpo {b}") for a, b in CLAIMS], "greedy accuracy"),
    "every_64": (every_64, [("every 64 plain", "online plain"), ("every 64 humanline", "every 64 plain"),
                            ("every 64 humanline", "online plain")], "greedy accuracy"),
    "k_sweep": (k_sweep, [("k = 16", "k = 1"), ("k = 16", "k = 64")], "greedy accuracy"),
    "ablation": (ablation, [(f"{w} {a}", f"{w} {b}") for w in WORLDS for a, b in (
        ("synced only", "plain"), ("clipped only", "plain"), ("humanline", "synced only"),
        ("humanline", "clipped only"), ("humanline sampling", "humanline"))], "win rate or accuracy"),
    "data_quality": (data_quality, [("quartile 1", "quartile 4"), ("quartile 1", "all")], "win rate"),
}


def interval(values: list[float], draws: int = 10_000) -> list[float]:
    """[mean, low, high]: 95% percentile bootstrap over seeds; one seed has no interval."""
    rng, mean = random.Random(0), statistics.fmean(values)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(draws))
    return [round(x, 4) for x in (mean, means[int(0.025 * draws)], means[int(0.975 * draws) - 1])]


def machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


def save(folder: Path, name: str, table: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table |= {"machine": machine()}
    text = json.dumps(table, indent=1)
    (folder / f"{name}.json").write_text(text + "\n")


def summarize(name: str, rows: dict[str, list[Run]], results: dict, command: str) -> dict:
    """The table of an experiment: of each row mean and interval over seeds, the values, the curve."""
    _, pairs, measured = EXPERIMENTS[name]
    table = {"command": command, "measured": measured, "rows": {}, "differences": {}}
    values = {}
    for label, runs in rows.items():
        done = [results[run.key] for run in runs]
        values[label] = [x["score"] for x in done]
        curves = list(zip(*(x["curve"] for x in done)))
        table["seeds"] = [run.seed for run in runs]
        table["rows"][label] = {
            "score": interval(values[label]),
            "values": [round(x, 4) for x in values[label]],
            "flags": dict(runs[0].flags),
            "seconds": round(statistics.median(x["seconds"] for x in done), 1),
            "curve": {"updates": [at[0][0] for at in curves],
                      "greedy": [interval([x[1] for x in at], 1000) for at in curves],
                      "sampled": [interval([x[2] for x in at], 1000) for at in curves]},
        }
        if "utility" in done[0]:
            table["rows"][label]["utility"] = interval([x["utility"] for x in done])
        table["rows"][label]["stopped early"] = sum(bool(x.get("stopped")) for x in done)
    for a, b in pairs:
        if a in values and b in values:
            table["differences"][f"{a} − {b}"] = interval([x - y for x, y in zip(values[a], values[b])])
    if name == "data_quality":
        bounds = [json.loads((run.folder() / "quartiles.json").read_text()) for run in rows["all"]]
        for i in range(4):
            low, high = ([b[i][side] for b in bounds] for side in (0, 1))
            table["rows"][f"quartile {i + 1}"]["nats"] = [round(min(low), 2), round(max(high), 2)]
    return table


def show(name: str, table: dict) -> None:
    single = len(table["seeds"]) == 1
    print(f"\n{name}: {table['measured']}, " + ("one seed" if single else f"seeds {table['seeds']}, mean [95% interval]"))

    def text(numbers, form):
        mean, *bounds = (f"{x:{form}}" for x in numbers)
        return mean if single else f"{mean} [{', '.join(bounds)}]"

    for label, row in table["rows"].items():
        utility = f"  utility {row['utility'][0]:+.3f}" if "utility" in row else ""
        flags = " ".join(f"{key} {value}" for key, value in row["flags"].items())
        print(f"  {label:28s}{text(row['score'], '.3f')}{utility}  {row['seconds']:5.1f} s  {flags}")
    for label, numbers in table["differences"].items():
        print(f"  {label:58s}{text(numbers, '+.3f')}")


def measure_time(seeds) -> dict:
    """Seconds of training and sampling of the same number of updates, one run at a time."""
    rows = {}
    for world in WORLDS:
        for source, variant in (("online", "plain"), ("offline", "humanline")):
            runs = over_seeds(seeds, world, "grpo", source, variant)
            for task in {(run.world, run.seed) for run in runs}:
                build_world(*task)
            seconds = [train(run)["seconds"] for run in tqdm(runs, f"time: {world} {source}")]
            rows[f"{world} {source} {variant}"] = [round(x, 2) for x in seconds]
    ratios = {world: interval([a / b for a, b in zip(rows[f"{world} online plain"],
                                                     rows[f"{world} offline humanline"])])
              for world in WORLDS}
    return {"command": "./run.sh reproduce", "seeds": seeds, "measured": "seconds of training and sampling, "
            "one run at a time, one thread", "rows": rows, "online / offline + humanline": ratios}


# --- figures ----------------------------------------------------------------------------------------

COLORS = {"plain": "#D55E00", "humanline": "#0072B2"}  # Okabe and Ito: for the colour-blind, too


def point(axes, x, row: dict, color: str, marker: str, label=None, filled=True) -> None:
    mean, low, high = row["score"]
    axes.errorbar(x, mean, [[max(0, mean - low)], [max(0, high - mean)]], color=color, marker=marker, capsize=3,
                  markersize=7, label=label, linestyle="", markerfacecolor=color if filled else "white")
    values = row["values"]
    axes.plot([x + 0.06] * len(values), values, ".", color=color, alpha=0.4, markersize=4)


def finish(figure, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(folder / f"{name}.png", dpi=150)
    plt.close(figure)


def draw_main(table: dict, folder: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 3.6))
    methods = [m for m in METHODS if any(label.startswith(m) for label in table["rows"])]
    for i, method in enumerate(methods):
        for j, (source, variant) in enumerate(itertools.product(("offline", "online"), COLORS)):
            row = table["rows"].get(f"{method} {source} {variant}")
            if row:
                label = f"{source}{' + humanline' if variant == 'humanline' else ''}" if not i else None
                point(axes, i + (j - 1.5) / 5, row, COLORS[variant], "so"[source == "online"], label,
                      filled=source == "offline")
    axes.axhline(0.5, color="gray", linewidth=0.8, linestyle=":")
    axes.text(0.01, 0.5, "initial policy", transform=axes.get_yaxis_transform(), va="bottom", color="gray", fontsize=8)
    axes.set_xticks(range(len(methods)), [m.upper() for m in methods])
    axes.set_ylabel("win rate against the initial policy")
    axes.set_ylim(0, 1.05)
    axes.legend(fontsize=8, ncols=2)
    finish(figure, folder, "main")


def draw_every_64(table: dict, folder: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 3.6))
    looks = {"online plain": ("#000000", "-", "sampled every update (online)"),
             "every 64 plain": (COLORS["plain"], "--", "every 64 updates, plain"),
             "every 64 humanline": (COLORS["humanline"], "-.", "every 64 updates, humanline")}
    for label, (color, line, name) in looks.items():
        curve = table["rows"][label]["curve"]
        mean, low, high = zip(*curve["greedy"])
        axes.plot(curve["updates"], mean, line, color=color, marker="os^"[list(looks).index(label)],
                  markersize=4, label=name)
        axes.fill_between(curve["updates"], low, high, color=color, alpha=0.15, linewidth=0)
    axes.set_xlabel("updates")
    axes.set_ylabel("greedy accuracy on held-out sums")
    axes.legend(fontsize=8)
    finish(figure, folder, "every_64")


def draw_k_sweep(table: dict, others: dict, folder: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 3.6))
    for i, (label, row) in enumerate(table["rows"].items()):
        point(axes, i, row, COLORS["humanline"], "o", None if i else "humanline, sampled every 64 updates")
    for label, color, line, name in (("online plain", "#000000", "-", "sampled every update (online)"),
                                     ("every 64 plain", COLORS["plain"], "--", "every 64 updates, plain")):
        mean, low, high = others["rows"][label]["score"]
        axes.axhline(mean, color=color, linestyle=line, label=name)
        axes.axhspan(low, high, color=color, alpha=0.1, linewidth=0)
    axes.set_xticks(range(len(table["rows"])), [label.removeprefix("k = ") for label in table["rows"]])
    axes.set_xlabel("k: updates between two syncs")
    axes.set_ylabel("greedy accuracy on held-out sums")
    axes.legend(fontsize=8)
    finish(figure, folder, "k_sweep")


# --- main -------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--grid", action="store_true", help="choose each cell's flags, on other seeds")
    parser.add_argument("--quick", action="store_true", help="one seed, a slice, minutes")
    parser.add_argument("--only", nargs="*", choices=[*EXPERIMENTS, "time", "theory"], help="some experiments")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    if args.grid:
        return grid(args.jobs)
    seeds, command = SEEDS, "./run.sh reproduce"
    names = args.only if args.only is not None else [*EXPERIMENTS, "time", "theory"]
    if args.quick:
        seeds, command, names = SEEDS[:1], "./run.sh reproduce --quick", ["main", "every_64", "k_sweep"]
    results_to, figures_to = (ROOT / "runs/quick",) * 2 if args.quick else (RESULTS, FIGURES)
    rows = {name: EXPERIMENTS[name][0](seeds) for name in names if name in EXPERIMENTS}
    if args.quick:
        rows["k_sweep"] = k_sweep(seeds, (1, 4, 16, 64))
    runs = [run for many in rows.values() for some in many.values() for run in some]
    results, tables = do(runs, args.jobs), {}
    for name, some in rows.items():
        tables[name] = summarize(name, some, results, command)
        show(name, tables[name])
        save(results_to, name, tables[name])
    if "theory" in names:
        subprocess.run([sys.executable, ROOT / "tests/experiments/theory.py"], check=True, stdout=subprocess.DEVNULL)
    if "time" in names:
        torch.set_num_threads(1)
        table = measure_time(seeds)
        save(results_to, "time", table)
        print("\ntime:", *table["rows"].items(), table["online / offline + humanline"], sep="\n  ")
    if "main" in tables:
        draw_main(tables["main"], figures_to)
    if "every_64" in tables:
        draw_every_64(tables["every_64"], figures_to)
    if "k_sweep" in tables and "every_64" in tables:
        draw_k_sweep(tables["k_sweep"], tables["every_64"], figures_to)
    if tables:
        print(f"\ntables and figures are in {results_to} and {figures_to}")


if __name__ == "__main__":
    main()
