"""What humanline does to a real language model: SmolLM2-135M-Instruct learns to write cheerful sentences.

    ./run.sh reproduce                       the runs that results/evidence.jsonl lacks, then tables and figures
    ./run.sh reproduce --only main beta      some parts, in this order
    ./run.sh reproduce --pages               tables and figures alone

The task is real_model.py's. A run is a script's own main, with flags only, and a line of results/evidence.jsonl; tables
and figures are made of that file alone. A cell of CELLS is run with each of its seeds, which draw 4 of the 8 responses
to each prompt, the order and the samples of training. Its rate, and of several β or k the one, are the best on another
seed: a ladder of rates begins around FIRST and goes on while its best rate lacks a neighbour. Last, one run of each
main cell is made alone, to see how long it takes.
"""

import argparse
import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import real_model  # first: it sets the environment and the path
import common
import memory
import numpy
import pages
import torch
from pages import markdown, number, span, verdict
from real_model import HERE, ROOT
from tqdm import tqdm

RESULTS, FIGURES, WORK = HERE / "results", HERE / "figures", ROOT / "runs/evidence"
STORE, PAGES = RESULTS / "evidence.jsonl", (ROOT / "README.md", RESULTS / "README.md")
SEEDS, CHOICE = (1, 2, 3, 4, 5), 0  # reported; that on which rates are chosen
LADDER, FIRST = ("5e-5", "1e-4", "2e-4", "5e-4", "1e-3", "2e-3", "5e-3", "1e-2"), "1e-3"
LIMIT = 30.0  # nats a response of at most 32 tokens: beyond it VADER still likes the words, but they are no sentences
UPDATES = 24
FLAGS = f"""--steps {UPDATES} --warmup 2 --lr_decay --lora_rank 16 --max_length 128 --max_new_tokens {real_model.TOKENS}
    --group_size 4 --temperature 1.0 --gen_batch 1024 --eval_size 0 --overwrite"""
METHODS = {"dpo": ("pairs", 8), "kto": ("labels", 16), "grpo": ("groups", 16)}  # data, --batch_size
WAYS = {  # to train
    "plain": "--plain", "humanline": "--humanline clip", "online": "--plain --sample_every 1",
    "plain, every 8": "--plain --sample_every 8", "humanline, every 8": "--humanline clip --sample_every 8",
    "synced only": "--humanline off", "clipped only": "--humanline clip", "humanline sampling": "--humanline sample"}
MAIN_WAYS = ("plain", "humanline", "online")


# --- which runs there are ----------------------------------------------------------------------------
class Cell(NamedTuple):
    """What a line of a table is about."""

    part: str
    method: str
    way: str
    beta: str  # several: the best on seed CHOICE; GRPO's is the weight of the KL
    k: str
    lr: str = ""  # empty: the best on seed CHOICE
    seeds: tuple = SEEDS

CELLS = [
    Cell("initial", "initial", "–", "–", "–", "–", (-1,)),  # the policy before training
    Cell("main", "dpo", "plain", "1", "0"),
    Cell("main", "dpo", "humanline", "1", "1"),
    Cell("main", "dpo", "online", "1", "0"),
    Cell("main", "kto", "plain", "1", "0"),
    Cell("main", "kto", "humanline", "1", "1"),
    Cell("main", "kto", "online", "1", "0"),
    Cell("main", "grpo", "plain", "0", "0"),
    Cell("main", "grpo", "humanline", "0", "1 4 16"),
    Cell("main", "grpo", "online", "0", "0"),
    Cell("beta", "dpo", "plain", "0.1", "0"),
    Cell("beta", "dpo", "plain", "0.03", "0"),
    Cell("beta", "dpo", "humanline", "0.1", "1", "1e-3"),  # here and below: the rate of humanline at β = 1
    Cell("beta", "dpo", "humanline", "0.03", "1", "1e-3"),
    Cell("beta", "kto", "plain", "0.1 0.03", "0"),
    Cell("clip", "dpo", "humanline", "1", "16", "1e-3", (1, 2, 3)),
    Cell("clip", "dpo", "synced only", "1", "16", "1e-3", (1, 2, 3)),
    Cell("clip", "dpo", "humanline", "1", "16", "2e-3", (1, 2, 3)),
    Cell("clip", "dpo", "synced only", "1", "16", "2e-3", (1, 2, 3)),
    Cell("stale", "grpo", "plain, every 8", "0", "0"),
    Cell("stale", "grpo", "humanline, every 8", "0", "1 4"),
    Cell("parts", "dpo", "synced only", "1", "1", "1e-3"),
    Cell("parts", "dpo", "clipped only", "1", "0", "1e-3"),
    Cell("parts", "dpo", "humanline sampling", "1", "1", "1e-3"),
    Cell("parts", "dpo", "humanline", "1", "4", "1e-3"),
    Cell("parts", "dpo", "humanline", "1", "16", "1e-3"),
]
PARTS = [*dict.fromkeys(cell.part for cell in CELLS), "cost"]
MAIN = [cell for cell in CELLS if cell.part == "main"]
BEST = [Cell("best", method, "plain", "1 0.1 0.03", "0") for method in ("dpo", "kto")]  # of the runs of the others

class Run(NamedTuple):
    method: str
    way: str
    beta: str
    k: str
    lr: str
    seed: int
    alone: bool = False  # no other run beside it: its time counts

INITIAL = Run("initial", "–", "–", "–", "–", -1)

def cell_of(method: str, part: str, way: str, k: str = "") -> Cell:
    return next(x for x in CELLS + BEST if (x.part, x.method, x.way) == (part, method, way) and k in ("", x.k))

def ladders(cell: Cell) -> list[list[Run]]:
    """For each β and k of a cell its runs on seed CHOICE, by rate."""
    return [[Run(cell.method, cell.way, beta, k, lr, CHOICE) for lr in LADDER]
            for beta in cell.beta.split() for k in cell.k.split()]

def best(runs: list[Run], results: dict) -> Run:
    """That of the largest score, among the runs whose KL is at most LIMIT while there are any."""
    return max(runs, key=lambda run: (results[run]["kl"] <= LIMIT, results[run]["score"]))

def choice(cell: Cell, results: dict) -> tuple[Run | None, list[Run]]:
    """A cell's β, k and rate, as a run on seed CHOICE, and the runs there that must be made before they are known."""
    if cell.lr:
        return Run(cell.method, cell.way, cell.beta, cell.k, cell.lr, CHOICE), []
    tried, missing = [], []
    for ladder in ladders(cell):
        made = [run for run in ladder if run in results]
        at = LADDER.index(best(made, results).lr if len(made) >= 3 else FIRST)
        missing += [run for run in ladder[max(0, at - 1) : at + 2] if run not in results]
        tried += made
    return None if missing else best(tried, results), missing

def runs_of(cell: Cell, results: dict) -> list[Run]:
    """A cell's runs over its seeds, made or not; none while its rate is not chosen."""
    setting, _ = choice(cell, results)
    return [setting._replace(seed=seed) for seed in cell.seeds] if setting else []

def alone(cell: Cell, results: dict) -> list[Run]:
    """The first of them, with no other beside it."""
    return [run._replace(alone=True) for run in runs_of(cell, results)[:1]]

def wanted(parts: list[str], results: dict) -> list[Run]:
    """What is to be run next for these parts: for each cell the choice, then its seeds."""
    found = [INITIAL]
    for part in parts:
        for cell in [cell for cell in CELLS if cell.part == part]:
            _, missing = choice(cell, results)
            found += missing or runs_of(cell, results)
        if part == "cost":
            found += [run for cell in MAIN for run in alone(cell, results)]
    return [run for run in dict.fromkeys(found) if run not in results]


# --- one run -----------------------------------------------------------------------------------------
def argv(run: Run, folder: Path, device: str) -> list[str]:
    """Its script's flags; its data and its output are in `folder`."""
    data, batch = METHODS[run.method]
    samples = "--sample_every" in WAYS[run.way]
    file = "prompts.jsonl" if samples else f"{data}.jsonl"
    flags = f"{FLAGS} {WAYS[run.way]} --sync_every {run.k} --beta {run.beta} --lr {run.lr} --seed {run.seed}"
    flags += f" --batch_size {batch} --save_every {int(samples)} --device {device}"
    return [*flags.split(), "--model", str(real_model.MODEL), "--data", f"{folder}/{file}",
            "--output_dir", f"{folder}/run", "--reward", f"{HERE}/real_model.py:sentiment",
            "--system_prompt", real_model.SYSTEM]

def count_only(perceive, logratio, mask, mode, *bounds):
    """Without clipping a script counts no token as clipped; here it counts those that clipping would have clipped."""
    _, low, high = perceive(logratio.detach(), mask, "clip", *bounds)
    return perceive(logratio, mask, mode, *bounds)[0], low, high

def train(run: Run, folder: Path, device: str) -> dict:
    """The script's main. "beyond": the share of tokens beyond the bounds, a mean over updates."""
    script = importlib.import_module(f"humanline_{run.method}")
    real_model.write_data(folder, run.seed)
    args = script.parse_args(argv(run, folder, device))
    perceive = functools.partial(count_only, script.perceive) if run.way == "synced only" else script.perceive
    try:
        with mock.patch.object(script, "perceive", perceive):
            script.main(args)
    except common.BadInput as error:  # a policy that samples may end up with one answer to each prompt
        if "equal within all groups" not in str(error):
            raise
        model, tokenizer, policy = script.load_policy(args)
        model.load_state_dict(torch.load(folder / "run/checkpoint.pt", weights_only=False)["model"], strict=False)
        policy.save_pretrained(folder / "run/final")
        tokenizer.save_pretrained(folder / "run/final")
    metrics = real_model.read(folder / "run/metrics.jsonl")
    found = {"updates": metrics[-1]["step"], "seconds": round(sum(line["seconds"] for line in metrics), 1)}
    if "--humanline clip" in WAYS[run.way] or run.way == "synced only":
        found["beyond"] = round(1 - statistics.fmean(line["unclipped"] for line in metrics[1:]), 5)
    return found

def work(run: Run, device: str, threads: int) -> dict:
    """Train and grade, in a process of its own; what is printed goes to a file."""
    torch.set_num_threads(threads)
    folder, started = WORK / str(os.getpid()), time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        found = {} if run == INITIAL else train(run, folder, device)
        graded = real_model.grade(real_model.MODEL if run == INITIAL else folder / "run/final", device)
    shutil.rmtree(folder)
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    return {"run": run, **found, "score": round(statistics.fmean(graded["rewards"]), 4), "kl": round(graded["kl"], 3),
            "greedy": graded["greedy"], "wall": round(time.perf_counter() - started), "machine": machine,
            "torch": torch.__version__}


# --- many runs ---------------------------------------------------------------------------------------
def finished() -> dict[Run, dict]:
    """Results by run; a last line that a kill cut short is dropped, and done again."""
    lines = STORE.read_text(encoding="utf-8").splitlines(True) if STORE.exists() else []
    results = [json.loads(line) for line in lines if line.endswith("\n")]
    return {Run(*result["run"]): result for result in results}

def run_all(parts: list[str], device: str, jobs: int) -> None:
    """Make the runs that are missing, `jobs` at a time, and append each to STORE as it ends."""
    results, running = finished(), {}
    threads = max(1, (os.cpu_count() or 1) // jobs)
    real_model.write(STORE, list(results.values()))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool, tqdm(desc="runs") as bar:
        while True:
            waiting = [run for run in wanted(parts, results) if run not in running.values()]
            for run in waiting[: jobs - len(running)]:
                running[pool.submit(work, run, device, threads)] = run
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                results[running.pop(future)] = result = future.result()
                with open(STORE, "a", encoding="utf-8") as file:
                    file.write(json.dumps(result, ensure_ascii=False) + "\n")
                bar.update()
                tqdm.write(f"{' '.join(map(str, result['run']))}: {result['score']:.3f}, {result['wall']} s")


# --- what they say -----------------------------------------------------------------------------------
def values(cell: Cell, results: dict, key: str = "score") -> dict[int, float]:
    """By seed, of the runs that have been made."""
    return {run.seed: results[run][key] for run in runs_of(cell, results) if key in results.get(run, {})}

def plains_line(method: str, results: dict) -> dict[int, float]:
    """By seed, the sentiment that plain has at the KL of humanline at β = 1: on a line from the initial policy through
    plain's runs over β, and beyond the last of them that run's."""
    cells = [cell for cell in CELLS if (cell.method, cell.way) == (method, "plain")]
    kls, scores = ([values(cell, results, key) for cell in cells] for key in ("kl", "score"))
    found = {}
    for seed, kl in values(cell_of(method, "main", "humanline"), results, "kl").items():
        if all(seed in by_seed for by_seed in scores):
            runs = sorted((kls[i][seed], scores[i][seed]) for i in range(len(cells)))
            found[seed] = float(numpy.interp(kl, *zip((0.0, results[INITIAL]["score"]), *runs)))
    return found

class Claim(NamedTuple):
    finding: str
    paper: dict[str, str]  # what it says of each method that is asked here
    one: tuple[str, ...]  # part, way, and k where there are several; minus
    other: tuple[str, ...]
    as_good: bool = False  # is what is claimed

OURS, PLAIN, ONLINE = ("main", "humanline"), ("main", "plain"), ("main", "online")
STALE, LINE = ("stale", "humanline, every 8"), ("plain's line",)
ABOVE_PLAIN = Claim("Humanline is above plain at the same β", dict.fromkeys(METHODS, "above, p < 0.05"), OURS, PLAIN)
BEST_BETA = Claim("Humanline at β = 1 is above plain at its best β", {"dpo": "–", "kto": "–"}, OURS, ("best", "plain"))
EQUAL_KL = Claim("Humanline is above plain at the same KL", {"dpo": "–", "kto": "–"}, OURS, LINE)
CLAIMS = [
    Claim("Online is above plain", {"dpo": "1.4 times", "kto": "1.3 times", "grpo": "1.6 times"}, ONLINE, PLAIN),
    ABOVE_PLAIN,
    Claim("Humanline is as good as online", dict.fromkeys(METHODS, "closes the gap"), OURS, ONLINE, True),
    BEST_BETA,
    EQUAL_KL,
    Claim("Both parts are above clipping alone", {"dpo": "above"}, OURS, ("parts", "clipped only")),
    Claim("Both parts are above syncing alone", {"dpo": "above"}, OURS, ("parts", "synced only")),
    Claim("Humanline sampling is as good as clipping", {"dpo": "as good"}, ("parts", "humanline sampling"), OURS, True),
    Claim("Plain is as good sampled every 8 updates", {"grpo": "below"}, ("stale", "plain, every 8"), ONLINE, True),
    Claim("Humanline sampled every 8 is as good as online", {"grpo": "as good"}, STALE, ONLINE, True),
    Claim("k = 4 is as good as k = 1", {"dpo": "as good"}, ("parts", "humanline", "4"), OURS, True),
]

def differences(claim: Claim, method: str, results: dict) -> list[float]:
    """Of the sentiments, in each seed that both sides have."""
    one = values(cell_of(method, *claim.one), results)
    other = plains_line(method, results) if claim.other == LINE else values(cell_of(method, *claim.other), results)
    return [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]

def verdict_of(claim: Claim, method: str, results: dict) -> str:
    return verdict(differences(claim, method, results), claim.as_good)


# --- tables and figures ------------------------------------------------------------------------------
def claims_table(results: dict) -> str:
    rows = []
    for claim in CLAIMS:
        for method, paper in claim.paper.items():
            found = differences(claim, method, results)
            rows.append([claim.finding, paper, method.upper(), number(found, sign=True), span(found, sign=True),
                         str(len(found)), verdict(found, claim.as_good)])
    return markdown(["finding", "the paper", "here", "difference", "95 % interval", "seeds", "verdict"], rows)

def cells_table(parts: list[str], results: dict) -> str:
    rows = []
    for cell in [cell for cell in CELLS if cell.part in parts]:
        setting = choice(cell, results)[0] or cell
        scores, kls, beyond = (values(cell, results, key).values() for key in ("score", "kl", "beyond"))
        percent = number([100 * share for share in beyond]) if beyond else "–"
        seconds = [results[run]["seconds"] for run in alone(cell, results) if run in results]
        rows.append([cell.method.upper(), cell.way, setting.beta, setting.k, setting.lr or "–", number(scores),
                     span(scores), number(kls, digits=1), percent, str(len(scores)),
                     number(seconds, digits=0) if cell in MAIN else "–"])
    return markdown(["method", "training", "β", "k", "rate", "sentiment", "95 % interval", "KL", "beyond, %", "seeds",
                     "seconds"], rows)

def first_table(results: dict) -> str:
    rows = []
    for method in METHODS:
        cells = [cell for cell in MAIN if cell.method == method]
        rows.append([method.upper(), *(number(values(cell, results).values()) for cell in cells)])
    return markdown(["sentiment", *MAIN_WAYS], rows)

def rates_table(results: dict) -> str:
    rows = []
    for cell in [cell for cell in CELLS if not cell.lr]:
        for ladder in ladders(cell):
            row = [cell.method.upper(), cell.way, ladder[0].beta, ladder[0].k]
            for run in ladder:
                text = f"{results[run]['score']:.2f} ({results[run]['kl']:.0f})" if run in results else ""
                row.append(f"**{text}**" if run == choice(cell, results)[0] else text)
            rows.append(row)
    return markdown(["method", "training", "β", "k", *LADDER], rows)

def tables(results: dict) -> dict[str, str]:
    """What stands after each marker of README.md and results/README.md."""
    return {"first": first_table(results), "claims": claims_table(results), "rates": rates_table(results),
            "main": cells_table(["initial", "main", "beta", "stale"], results),
            "parts": cells_table(["parts"], results), "clip": cells_table(["clip"], results),
            "memory": memory.memory_table(), "bench": pages.bench_table(RESULTS / "bench_cpu.json")}

def draw(results: dict) -> None:
    initial, scores, verdicts = results[INITIAL]["score"], {}, {}
    for method in METHODS:
        scores[method] = {cell.way: values(cell, results).values() for cell in MAIN if cell.method == method}
        verdicts[method] = verdict_of(ABOVE_PLAIN, method, results)
    pages.draw_method(scores, verdicts, initial, FIGURES / "method.png")
    runs = {way: {} for way in MAIN_WAYS}  # by β: the (KL, sentiment) of each seed
    for cell in [cell for cell in CELLS if cell.method == "dpo" and cell.part in ("main", "beta")]:
        kls, sentiments = (values(cell, results, key).values() for key in ("kl", "score"))
        runs[cell.way][cell.beta] = list(zip(kls, sentiments))
    verdicts = [verdict_of(claim, "dpo", results) for claim in (BEST_BETA, EQUAL_KL)]
    pages.draw_beta(runs, *verdicts, initial, FIGURES / "beta.png")


# --- main --------------------------------------------------------------------------------------------
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help="some parts, in this order")
    parser.add_argument("--pages", action="store_true", help="no runs: tables and figures of those that there are")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    if not args.pages:
        real_model.make_model()
        run_all([part for part in args.only if part != "cost"], args.device, args.jobs)
    if "cost" in args.only and not args.pages:
        run_all(["cost"], args.device, jobs=1)
    results = finished()
    for path in PAGES:
        path.write_text(pages.fill(path.read_text(encoding="utf-8"), tables(results)), encoding="utf-8")
    draw(results)
    print(f"\nthe page is {PAGES[1]}, the figures are in {FIGURES}")


if __name__ == "__main__":
    main()
