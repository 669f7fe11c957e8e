"""What humanline does to a real language model, and to two toys that train in seconds.

    ./run.sh                                 the demo: DPO, plain and with humanline
    ./run.sh reproduce                       the runs that results/evidence.jsonl lacks, then tables and figures
    ./run.sh reproduce --only main toy       some parts, in this order
    ./run.sh reproduce --pages               tables and figures alone

A run is a script's own main, with flags only. Tasks:

    sentiment  real_model.py's: SmolLM2-135M-Instruct writes a sentence about a thing; reward: VADER's sentiment
    sums       the same model, "What is 27 + 82?", graded by math_reward: share of 100 held-out sums that are right
    letters    toy_world.py's, graded by the win rate against the initial policy (½ for a tie)
    addition   toy_world.py's: greedy accuracy, mean of the last four evaluations of six

On the real model a run trains LoRA adapters of rank 16 in UPDATES updates, and its learning rate falls to 0. A seed
draws 4 of the 8 responses to each prompt, the order and the samples of training; SEEDS are reported. The learning rate
is the best of LADDER on the seed CHOICE: each cell begins with START and goes on while its best rate lacks a neighbour.
A rate whose KL is above LIMIT is not chosen. At other β plain has a rate of its own; the variants of humanline, its
other β and other k have the rate of humanline at β = 1. The toys' flags (TOY) were found by climbing such ladders of
rate, k and gradient norm, on seeds 10, 11 and 12.

A finished run is a line of results/evidence.jsonl; tables and figures are made of that file alone. Intervals are 95 %
t-intervals over seeds, of paired differences where two cells are compared.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import platform
import random
import re
import shlex
import shutil
import statistics
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import real_model  # first: it sets the environment and the path
import matplotlib

matplotlib.use("Agg")
import common  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import memory  # noqa: E402
import numpy  # noqa: E402
import torch  # noqa: E402
import toy_world  # noqa: E402
from real_model import HERE, ROOT  # noqa: E402
from tqdm import tqdm  # noqa: E402

RESULTS, FIGURES = HERE / "results", HERE / "figures"
PAGES = ROOT / "README.md", RESULTS / "README.md"
STORE, WORK = RESULTS / "evidence.jsonl", ROOT / "runs/evidence"
SEEDS, CHOICE = (1, 2, 3), 0
LADDER, START = ("5e-5", "1e-4", "2e-4", "5e-4", "1e-3", "2e-3", "5e-3", "1e-2"), ("5e-4", "1e-3", "2e-3")
LIMIT = 30.0  # nats a response of at most 32 tokens: beyond it VADER still likes the words, but they are no sentences
UPDATES = {"sentiment": 24, "sums": 32, "letters": 120, "addition": 192}
REAL = f"--lora_rank 16 --max_length 128 --group_size 4 --warmup 2 --system_prompt {shlex.quote(real_model.SYSTEM)}"
FLAGS = {"sentiment": f"{REAL} --max_new_tokens {real_model.TOKENS}", "sums": f"{REAL} --max_new_tokens 24",
         "letters": "--max_length 48 --max_new_tokens 20", "addition": "--max_length 32 --max_new_tokens 6"}
REWARDS = {"sentiment": f"{HERE}/real_model.py:sentiment", "sums": f"{HERE}/rewards.py:math_reward",
           "letters": f"{HERE}/toy_world.py:letters_reward", "addition": f"{HERE}/toy_world.py:addition_reward"}
BATCH = {("sentiment", "dpo"): 8, ("sentiment", "kto"): 16, ("sentiment", "grpo"): 16, ("sums", "grpo"): 16,
         ("letters", "dpo"): 16, ("letters", "kto"): 32, ("letters", "grpo"): 64, ("addition", "grpo"): 128}
KINDS = {"dpo": "pairs", "kto": "labels", "grpo": "groups"}
NAMES = {method: method.upper() for method in KINDS}
VARIANTS = {"plain": "--plain", "humanline": "--humanline clip", "synced only": "--humanline off",
            "clipped only": "--humanline clip --sync_every 0", "humanline sampling": "--humanline sample"}
TOY_SIZES = {"letters": dict(train=3200, test=256), "addition": dict(train=4096, test=512)}
K = {"dpo": "1", "kto": "1", "grpo": "4"}  # of humanline on the real model

class Run(NamedTuple):
    """A cell of a table; with a rate and a seed a run."""

    task: str
    method: str
    source: str  # offline, online, every 16, every 64
    variant: str
    beta: str = "1"
    k: str = ""  # empty where nothing is synced
    lr: str = ""
    seed: int = -1

    def folder(self) -> Path:
        return WORK / f"{self.task}-{self.seed}"

    def argv(self, device: str, out: Path) -> list[str]:
        folder, toy = self.folder(), self.task in toy_world.WORLDS
        n = {"offline": 0, "online": 1, "every 16": 16, "every 64": 64}[self.source]
        data = folder / ("prompts_train.jsonl" if n else f"{KINDS[self.method]}_train.jsonl")
        flags = f"--steps {UPDATES[self.task]} --batch_size {BATCH[self.task, self.method]} --sample_every {n}"
        flags += f" {FLAGS[self.task]} {VARIANTS[self.variant]} --beta {self.beta} --lr {self.lr} --seed {self.seed}"
        flags += f" --temperature 1.0 --gen_batch 1024 --save_every {int(n == 1)} --lr_decay --overwrite"
        if self.k:
            flags += f" --sync_every {self.k}"
        if toy:
            flags += f" --max_grad_norm {TOY[self[:6]][1]}"
        if self.task == "addition":
            flags += f" --eval_data {folder}/prompts_test.jsonl --eval_size 512 --eval_every 32"
        else:
            flags += " --eval_size 0"
        argv = ["--model", folder / "policy" if toy else real_model.MODEL, "--data", data, "--device", device,
                "--reward", REWARDS[self.task], "--output_dir", out, *shlex.split(flags)]
        return list(map(str, argv))


# --- which runs there are -----------------------------------------------------------------------------

def real(method: str, source="offline", variant="plain", beta="1", k=None, task="sentiment") -> Run:
    synced = variant not in ("plain", "clipped only")
    return Run(task, method, source, variant, "0" if method == "grpo" else beta, (k or K[method]) if synced else "")


BETAS, KS, TOY_BETAS, TOY_KS = ("1", "0.1", "0.03"), ("1", "4", "16"), ("0.1", "0.3", "1", "3"), ("1", "4", "16", "64")
TOY = {}  # the rate and the bound of the gradient norm of a cell
for _cells in """letters dpo offline plain     0.1,,6e-4,0.01  0.3,,1e-3,0.01  1,,1e-3,0.01  3,,1e-3,0.01
letters dpo offline humanline 0.1,64,6e-4,1  0.3,32,1e-3,1  1,16,1e-3,1  3,2,1e-3,0.1
letters dpo online plain      3,,2e-3,0.1
letters kto offline plain     0.1,,1e-3,1  0.3,,6e-4,1  1,,2e-3,1  3,,6e-4,1
letters kto offline humanline 0.1,128,6e-4,1  0.3,32,6e-4,1  1,16,6e-4,1  3,16,6e-4,1
letters kto online plain      3,,4e-3,1
letters grpo offline plain     0,,6e-4,1
letters grpo offline humanline 0,8,1e-3,1
letters grpo online plain      0,,1e-3,10
addition grpo online plain       0,,1e-4,0.1
addition grpo every_64 plain     0,,3e-4,1
addition grpo every_64 humanline 0,1,1e-4,10  0,4,1e-4,10  0,16,1e-4,10  0,64,1e-4,10""".splitlines():
    _task, _method, _source, _variant, *_settings = _cells.split()
    for _beta, _k, *_flags in (setting.split(",") for setting in _settings):  # β, k, rate, norm
        TOY[_task, _method, _source.replace("_", " "), _variant, _beta, _k] = _flags
PARTS = {  # the cells of each table
    "main": [real(method, variant=variant) for method in KINDS for variant in ("plain", "humanline")],
    "beta": [real(method, variant=variant, beta=beta) for method in ("dpo", "kto") for beta in BETAS[1:]
             for variant in ("plain", "humanline")],
    "online": [real(method, "online") for method in KINDS],
    "ablation": [real("dpo", variant=variant) for variant in ("synced only", "clipped only", "humanline sampling")],
    "k": [real(method, variant="humanline", k=k) for method in ("dpo", "grpo") for k in KS if k != K[method]],
    "sums": [real("grpo", source, variant, task="sums")
             for source, variant in (("online", "plain"), ("every 16", "plain"), ("every 16", "humanline"))],
    "toy": [Run(*cell) for cell in TOY],
}
INITIAL = {task: Run(task, "initial", "", "") for task in ("sentiment", "sums")}

def tuned(cell: Run) -> Run:
    """The cell whose rate this one has."""
    if cell.variant == "plain":
        return cell
    return cell._replace(variant="humanline", k=K[cell.method], beta="0" if cell.method == "grpo" else "1")

def tried(cell: Run, results: dict) -> dict[str, dict]:
    """The run of each rate that was tried for a cell of the real model."""
    runs = [tuned(cell)._replace(lr=lr, seed=CHOICE) for lr in LADDER]
    return {run.lr: results[run] for run in runs if run in results}

def best_rate(runs: dict[str, dict]) -> str:
    """That of the largest score, among the runs whose KL is at most LIMIT while there are any."""
    return max(runs, key=lambda lr: (runs[lr]["kl"] <= LIMIT, runs[lr]["score"]))

def untried(runs: dict[str, dict]) -> list[str]:
    """The rates to try next: none where the best of three or more has both neighbours."""
    if len(runs) < len(START):
        return [lr for lr in START if lr not in runs]
    at = LADDER.index(best_rate(runs))
    return [lr for lr in LADDER[max(0, at - 1) : at + 2] if lr not in runs]

def runs_of(cell: Run, results: dict) -> list[Run]:
    """A cell's runs over SEEDS; none as long as its rate is not known."""
    if cell.method == "initial":
        return [cell]
    if cell[:6] in TOY:
        lr = TOY[cell[:6]][0]
    elif untried(runs := tried(cell, results)):
        return []
    else:
        lr = best_rate(runs)
    return [cell._replace(lr=lr, seed=seed) for seed in SEEDS]

def wanted(parts: list[str], results: dict) -> list[Run]:
    """What is to be run next for these parts, the choice of a rate first."""
    found = [INITIAL[task] for task in INITIAL if any(cell.task == task for part in parts for cell in PARTS[part])]
    for cell in (cell for part in parts for cell in PARTS[part]):
        rates = [] if cell[:6] in TOY else untried(tried(cell, results))
        found += [tuned(cell)._replace(lr=lr, seed=CHOICE) for lr in rates] or runs_of(cell, results)
    return [run for run in dict.fromkeys(found) if run not in results]


# --- the work of one process --------------------------------------------------------------------------

def work(run: Run, device: str, threads: int) -> dict:
    """Train and grade; what is printed goes to a file."""
    if threads:
        torch.set_num_threads(threads)
    out, started = WORK / f"now-{os.getpid()}", time.perf_counter()
    WORK.mkdir(parents=True, exist_ok=True)
    with open(f"{out}.log", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        found = {} if run.method == "initial" else train(run, device, out)
        policy = real_model.MODEL if run.method == "initial" else out / "final"
        found |= grade(run, policy, device, out)
    shutil.rmtree(out, ignore_errors=True)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    return {"run": run, **found, "wall": round(time.perf_counter() - started), "machine": where, "torch": torch.__version__}

def build(run: Run) -> None:
    """The data of a task and seed, in the folder that Run.argv names, unless they are there."""
    folder, rng = run.folder(), random.Random(run.seed)
    if run.task in toy_world.WORLDS:
        toy_world.build(folder, run.task, run.seed, **TOY_SIZES[run.task])
        if not (folder / "initial.json").exists():
            (folder / "initial.json").write_text(json.dumps(toy_world.grade(folder / "policy", folder, run.task)))
    if (folder / "prompts_train.jsonl").exists():
        return
    groups = []
    if run.task == "sentiment":
        for group in real_model.read(real_model.DATA / "groups.jsonl"):
            at = rng.sample(range(real_model.SAMPLES), 4)
            groups.append(group | {name: [group[name][i] for i in at] for name in ("completions", "rewards")})
    prompts = [{"prompt": group["prompt"]} for group in groups] or real_model.sums()[0]
    folder.mkdir(parents=True, exist_ok=True)
    toy_world.write_data(folder, prompts, groups)

def train(run: Run, device: str, out: Path) -> dict:
    script = importlib.import_module(f"humanline_{run.method}")
    args = script.parse_args(run.argv(device, out))
    try:
        script.main(args)
    except common.BadInput as error:  # online, a policy may end up with one answer to each prompt: nothing to learn
        if run.source != "online" or "equal within all groups" not in str(error):
            raise
        model, tokenizer, policy = script.load_policy(args)
        model.load_state_dict(torch.load(out / "checkpoint.pt", weights_only=False)["model"], strict=False)
        for part in (policy, tokenizer):
            part.save_pretrained(out / "final")
    metrics = real_model.read(out / "metrics.jsonl")
    updates = metrics[1:]
    return {"updates": updates[-1]["step"],
            "loss": round(statistics.fmean(m["loss"] for m in updates[-4:]), 5),
            "unclipped": round(statistics.fmean(m["unclipped"] for m in updates), 5),
            "seconds": round(sum(m["seconds"] for m in metrics), 1)}

def grade(run: Run, policy: Path, device: str, out: Path) -> dict:
    """{"score"} and, of the real model, {"kl"} in nats a response and {"greedy"}, five sentences."""
    if run.task == "addition":
        evaluations = [m for m in real_model.read(out / "metrics.jsonl") if "eval_reward_greedy" in m]
        return {"score": statistics.fmean(m["eval_reward_greedy"] for m in evaluations[-4:])}
    if run.task == "letters":
        rewards = toy_world.grade(policy, run.folder(), run.task)
        return {"score": win_rate(rewards, json.loads((run.folder() / "initial.json").read_text()))}
    found = real_model.grade(policy, run.task, device)
    return {"score": round(statistics.fmean(found["rewards"]), 4), "kl": round(found["kl"], 3), "greedy": found["greedy"]}

def win_rate(rewards: list[float], initial: list[float], samples: int = 4) -> float:
    """Chance that a sample of the one beats a sample of the other for the same prompt, ½ for a tie.
    Lists hold all prompts, `samples` times over."""
    prompts = len(rewards) // samples
    return statistics.fmean((a > b) + (a == b) / 2 for i in range(prompts)
                            for a in rewards[i::prompts] for b in initial[i::prompts])


# --- many runs ----------------------------------------------------------------------------------------

def finished() -> dict[Run, dict]:
    """Results by run; a last line that a kill cut short is dropped, and done again."""
    lines = STORE.read_text(encoding="utf-8").splitlines(True) if STORE.exists() else []
    return {Run(*result["run"]): result for result in map(json.loads, (x for x in lines if x.endswith("\n")))}

def do(parts: list[str], device: str, jobs: int) -> dict[Run, dict]:
    """Make the runs that are missing, `jobs` at a time, and append each to STORE as it ends."""
    results, running = finished(), {}
    STORE.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in results.values()), encoding="utf-8")
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool, tqdm(desc="runs") as bar:
        while True:
            for run in [run for run in wanted(parts, results) if run not in running.values()][: jobs - len(running)]:
                if run.method != "initial":
                    build(run)
                running[pool.submit(work, run, device, threads)] = run
            if not running:
                return results
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                results[running.pop(future)] = result = future.result()
                with open(STORE, "a", encoding="utf-8") as file:
                    file.write(json.dumps(result, ensure_ascii=False) + "\n")
                bar.update()
                tqdm.write(f"{' '.join(map(str, result['run']))}: {result['score']:.3f}, {result['wall']} s")


# --- numbers and tables -------------------------------------------------------------------------------

T_975 = {3: 4.303}  # Student's t for so many seeds
WORDS = {  # what an interval says of a claim that a difference is above 0, or that there is none
    ">": {"above 0": "holds", "includes 0": "not shown", "below 0": "**the reverse**"},
    "=": {"includes 0": "no difference shown", "above 0": "better", "below 0": "**worse**"}}

def interval(values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high): 95 % t-interval over seeds."""
    mean, half = statistics.fmean(values), T_975[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half

def verdict(numbers: tuple[float, float, float]) -> str:
    """The one rule for all tables: where the interval of a difference lies."""
    _, low, high = numbers
    return "above 0" if low > 0 else "below 0" if high < 0 else "includes 0"

def number(x: float, sign: bool = False) -> str:
    """Two decimals, or as many as show a sign and a digit: 0.0004 is not 0.00."""
    digits = next((n for n in (2, 3, 4) if round(x, n)), 2)
    return (f"{x:+.{digits}f}" if sign and round(x, digits) else f"{x:.{digits}f}").replace("-", "−")

def bounds(numbers: tuple, sign: bool = False) -> str:
    mean, low, high = (number(x, sign) for x in numbers)
    return f"{mean} [{low}, {high}]"

MISSING = "not run"

def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table, without the rows and the columns of which nothing has been run."""
    rows = [row for row in rows if set(row[1:]) - {"", MISSING}]
    columns = [i for i in range(len(head)) if i == 0 or {row[i] for row in rows} - {"", MISSING}]
    lines = [[line[i] for i in columns] for line in [head, ["---"] * len(head), *rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""

class Page:
    """Cells, differences and sentences, of the results that there are."""

    def __init__(self, results: dict[Run, dict]):
        self.results = results

    def all(self, cell: Run, key="score") -> list[float]:
        """A cell's values over the seeds; [] as long as one is missing."""
        found = [self.results[run][key] for run in runs_of(cell, self.results) if run in self.results]
        return found if len(found) == (1 if cell.method == "initial" else len(SEEDS)) else []

    def cell(self, cell: Run) -> str:
        """Mean [interval], and in parentheses the KL of the real model."""
        values, kl = self.all(cell), self.all(cell, "kl") if cell.task in INITIAL else []
        if not values:
            return MISSING
        text = bounds(interval(values)) if len(values) > 1 else number(values[0])
        return text + (f" ({statistics.fmean(kl):.1f})" if kl and cell.method != "initial" else "")

    def minus(self, a: Run, b: Run) -> tuple | None:
        x, y = self.all(a), self.all(b)
        return interval([p - q for p, q in zip(x, y)]) if x and y else None

    def difference(self, a: Run, b: Run) -> str:
        found = self.minus(a, b)
        return f"{bounds(found, True)}: {verdict(found)}" if found else MISSING

    def plain(self, method: str) -> list[Run]:
        """Offline plain at all BETAS, the best on the seed CHOICE first; [] as long as one is missing."""
        cells = [real(method, beta=beta) for beta in BETAS if method != "grpo"]
        if not all(map(self.all, cells)):
            return []
        chosen = [tried(cell, self.results) for cell in cells]
        return [cell for _, cell in sorted(zip(chosen, cells), key=lambda x: -x[0][best_rate(x[0])]["score"])]

    def first_table(self) -> str:
        best = {method: self.plain(method)[0] for method in KINDS if self.plain(method)}
        ours = {method: real(method, variant="humanline") for method in KINDS}
        rows = {"initial policy": lambda m: self.cell(INITIAL["sentiment"]),
                "offline (plain)": lambda m: self.cell(real(m)),
                "offline (plain), at its best β":
                    lambda m: f"{self.cell(best[m])}, β = {best[m].beta}" if m in best else "",
                "offline + humanline": lambda m: self.cell(ours[m]),
                "online": lambda m: self.cell(real(m, "online")),
                "humanline − plain": lambda m: self.difference(ours[m], real(m)),
                "humanline at β = 1 − plain at its best β": lambda m: self.difference(ours[m], best[m]) if m in best else "",
                "humanline − online": lambda m: self.difference(ours[m], real(m, "online"))}
        methods = [method for method in KINDS if self.all(ours[method])]
        return markdown(["sentiment (KL)", *map(NAMES.get, methods)],
                        [[name, *map(cell, methods)] for name, cell in rows.items()])

    def frontier(self, method: str) -> str:
        """Humanline's score minus plain's at the same KL, which lies on a line between plain's runs of that seed."""
        plain, ours = self.plain(method), real(method, variant="humanline")
        if not plain or not self.all(ours):
            return f"{NAMES[method]} {MISSING}"
        start = self.results[INITIAL["sentiment"]]["score"]
        gaps, beyond = [], 0
        for i, (kl, score) in enumerate(zip(self.all(ours, "kl"), self.all(ours))):
            points = sorted([(0.0, start)] + [(self.all(cell, "kl")[i], self.all(cell)[i]) for cell in plain])
            beyond += kl > points[-1][0]
            gaps.append(score - float(numpy.interp(kl, *zip(*points))))
        found = interval(gaps)
        more = f" (in {beyond} of {len(SEEDS)} seeds no plain run has so large a KL; these are compared with the largest)"
        return f"{NAMES[method]} {bounds(found, True)}: {verdict(found)}{more if beyond else ''}"


DPO = {variant: real("dpo", variant=variant) for variant in VARIANTS}
SUMS = dict(zip(("online", "plain", "humanline"), PARTS["sums"]))
CLAIMS = [  # the finding, the paper's figure, what is claimed of the difference, the cells that differ
    ("Online beats offline.", "1.3× to 1.6×", ">", [(NAMES[m], real(m, "online"), real(m)) for m in KINDS]),
    ("Offline + humanline beats offline.", "all three, p < 0.05", ">",
     [(NAMES[m], real(m, variant="humanline"), real(m)) for m in KINDS]),
    ("Offline + humanline is as good as online.", "the gap is closed", "=",
     [(NAMES[m], real(m, variant="humanline"), real(m, "online")) for m in KINDS]),
    ("Without syncing it is plain (clipped only − plain at its own rate).", "falls back to offline", "=",
     [("DPO", DPO["clipped only"], DPO["plain"])]),
    ("Syncing alone is not enough (both − synced only).", "not enough", ">",
     [("DPO", DPO["humanline"], DPO["synced only"])]),
    ("Humanline sampling is as good as clipping.", "as good", "=",
     [("DPO", DPO["humanline sampling"], DPO["humanline"])]),
    ("k = 4 loses nothing against k = 1.", "nothing", "=",
     [("DPO", real("dpo", variant="humanline", k="4"), DPO["humanline"])]),
    ("Sampled every 16 updates, humanline beats plain.", "significantly", ">",
     [("GRPO, sums", SUMS["humanline"], SUMS["plain"])]),
    ("Sampling 16 times less often costs humanline nothing.", "as good as online", "=",
     [("GRPO, sums", SUMS["humanline"], SUMS["online"])])]

def claims(page: Page) -> str:
    rows = []
    for finding, paper, direction, pairs in CLAIMS:
        for name, a, b in pairs:
            found = page.minus(a, b)
            if found:
                rows.append([finding, paper, name, bounds(found, True), WORDS[direction][verdict(found)]])
                finding = paper = ""
    return markdown(["finding", "the paper", "here", "difference [95 % interval]", "verdict"], rows)

def beta_table(page: Page, cell, betas) -> str:
    """Of cell(method, variant, β): plain, humanline and their difference, DPO's beside KTO's."""
    head, rows = ["β"], [[beta] for beta in betas]
    for method in ("dpo", "kto"):
        head += [f"{NAMES[method]}: plain", "humanline", "humanline − plain"]
        for row in rows:
            plain, ours = cell(method, "plain", row[0]), cell(method, "humanline", row[0])
            row += [page.cell(plain), page.cell(ours), page.difference(ours, plain)]
    return markdown(head, rows)

def parts_table(page: Page) -> str:
    rows = [[f"humanline, k = {k}", *(page.cell(real(m, variant="humanline", k=k)) for m in ("dpo", "grpo"))]
            for k in KS]
    rows += [[f"{name}, k = {cell.k}" if cell.k else name, page.cell(cell), ""] for name, cell in DPO.items()
             if name not in ("plain", "humanline")]
    return markdown(["", "DPO", "GRPO"], rows)

def letters(method: str, variant: str, beta: str, source="offline") -> Run:
    """The cell of a toy's table; there is one k for each."""
    return next(Run(*cell) for cell in TOY if cell[:5] == ("letters", method, source, variant, beta))

def letters_table(page: Page) -> str:
    rows = {"offline (plain)": ("offline", "plain"), "offline + humanline": ("offline", "humanline"),
            "online": ("online", "plain")}
    return markdown(["", *NAMES.values()],
                    [[name, *(page.cell(letters(m, variant, "0" if m == "grpo" else "3", source)) for m in KINDS)]
                     for name, (source, variant) in rows.items()])

def addition_table(page: Page) -> str:
    cells = {cell[2:6:3]: Run(*cell) for cell in TOY if cell[0] == "addition"}  # by source and k
    plain = cells["every 64", ""]
    rows = [["online", page.cell(cells["online", ""]), ""], ["every 64 updates, plain", page.cell(plain), ""]]
    for k in TOY_KS:
        ours = cells["every 64", k]
        rows.append([f"every 64 updates, k = {k}", page.cell(ours), page.difference(ours, plain)])
    return markdown(["", "accuracy", "− plain"], rows)

def rates_table(page: Page) -> str:
    cells = dict.fromkeys(tuned(cell) for part in PARTS if part != "toy" for cell in PARTS[part])
    rows = []
    for cell in cells:
        runs = tried(cell, page.results)
        name = " ".join([cell.task, cell.method, cell.source, cell.variant, f"β = {cell.beta}" if cell.beta != "0" else ""])
        rows.append([name, "" if untried(runs) else best_rate(runs),
                     ", ".join(f"{lr}: {number(x['score'])} ({x['kl']:.0f})" for lr, x in runs.items())])
    return markdown(["cell", "best rate", f"rates, their scores and KL on seed {CHOICE}"], rows)

def sentences(page: Page, count: int) -> str:
    """The greedy sentences of the first seed's DPO runs, for the first held-out prompts."""
    runs = {"initial": INITIAL["sentiment"], "plain": real("dpo"), "humanline": real("dpo", variant="humanline")}
    found = {name: page.all(cell, "greedy")[:1] for name, cell in runs.items()}
    if not all(found.values()):
        return MISSING
    prompts = [row["prompt"] for row in real_model.read(real_model.DATA / "held_out.jsonl")[:count]]
    return markdown(["prompt", *runs], [[prompt, *(" ".join(found[name][0][i].split()).replace("|", "\\|") for name in runs)]
                                        for i, prompt in enumerate(prompts)])

def theory() -> str:
    found = json.loads((RESULTS / "theory.json").read_text())
    betas, perceived = found["theorem_4_3"]["gamma_P, gamma_R, beta_P, beta_R = (0.5, 0.01, 1.0, 1.0)"], found["perceived"]
    away = {name: perceived[name]["mean_abs_difference"] for name in found["mean_utility"]}
    order = ", ".join(f"{name.replace('-', ' ')} {away[name]:.2f}" for name in sorted(away, key=away.get))
    return (f"The power is {number(betas['slope'])} at the paper's Betas; at c = 1 the share is {betas['share'][0]:.2f}. "
            f"The mean distances to the human curve, the nearest first: {order}.")

def summary(page: Page) -> str:
    found = [result for run, result in page.results.items() if run.method != "initial"]
    machines = ", ".join(sorted({f"{x['machine']}, torch {x['torch']}" for x in found}))
    missing = [part for part, cells in PARTS.items() if not all(map(page.all, cells))]
    return (f"There are {len(found)} runs, which took {sum(x['wall'] for x in found) / 3600:.1f} hours of processes on {machines}."
            + (f" Parts not run, or not in full: {', '.join(missing)}." if missing else ""))

def bench_table() -> str:
    table, rows = json.loads((RESULTS / "bench_cpu.json").read_text()), []
    for method in KINDS:
        found = table[method]
        ours, fastest, lightest = found["ours"], str(found["fastest"]), str(found["lightest"])
        rows.append([NAMES[method], f"{ours['tokens_per_second']:,.0f}", f"{ours['memory']:.2f} GiB",
                     f"({fastest}) {found['trl'][fastest]['tokens_per_second']:,.0f}", f"{found['speed over trl']:.1f}×",
                     f"({lightest}) {found['trl'][lightest]['memory']:.2f} GiB", f"{found['memory over trl']:.2f}×",
                     f"{ours['share']:.2f}", f"{ours['padded']:.1%}".replace("%", " %")])
    return markdown(["", "tokens/s", "peak memory", "TRL's fastest (per-device batch): tokens/s", "ours over it",
                     "TRL's lightest (batch)", "ours over it", "share of the floor", "padding"], rows)

def limits(page: Page) -> str:
    """What limits the claim of the first table."""
    same = [f"{page.difference(real('dpo', variant='humanline', beta=beta), real('dpo', beta=beta))} (β = {beta})"
            for beta in BETAS]
    beyond = f"{1 - statistics.fmean(page.all(DPO['humanline'], 'unclipped') or [1]):.2%}".replace("%", " %")
    return f"""* **Drift.** A policy may gain reward by moving far away. At equal KL, on a line between plain's runs over β, each at its best rate, the sentiment of humanline at β = 1 minus plain's is: {"; ".join(map(page.frontier, ("dpo", "kto")))}. No rate was chosen whose KL is above {LIMIT:.0f} on seed {CHOICE}; other seeds may lie above it.
* **β.** At the same β, DPO with humanline minus plain is: {"; ".join(same)}.
* **Clipping.** DPO that is synced and not clipped has {page.cell(DPO["synced only"])}, and clipping adds {page.difference(DPO["humanline"], DPO["synced only"])}. Only {beyond} of the tokens of the humanline runs lie beyond the bounds."""

def tables(page: Page) -> dict[str, str]:
    """What stands after each marker of README.md and results/README.md."""
    sums = {"initial policy": INITIAL["sums"], "sampled every update (online)": SUMS["online"],
            "every 16 updates, plain": SUMS["plain"], "every 16 updates, humanline": SUMS["humanline"]}
    return {"first": page.first_table(), "limits": limits(page), "sentences": sentences(page, 2), "claims": claims(page),
            "beta": beta_table(page, lambda method, variant, beta: real(method, variant=variant, beta=beta), BETAS),
            "parts": parts_table(page), "rates": rates_table(page), "runs": summary(page), "theory": theory(),
            "sums": markdown(["", "right (KL)"], [[name, page.cell(cell)] for name, cell in sums.items()]),
            "letters": letters_table(page), "letters_beta": beta_table(page, letters, TOY_BETAS),
            "addition": addition_table(page), "memory": memory.memory_table(), "bench": bench_table()}

def fill(text: str, found: dict[str, str]) -> str:
    """A page with the table of each marker after it, in place of the lines there."""
    return re.sub(r"(<!-- (\w+) -->\n+)(?:.+\n)*", lambda m: f"{m[1]}{found[m[2]] or MISSING}\n", text)


# --- figures, the demo --------------------------------------------------------------------------------

LOOKS = {"plain": ("#D55E00", "s"), "humanline": ("#0072B2", "o"), "online": ("#009E73", "^"),
         "synced only": ("#56B4E9", "D"), "clipped only": ("#E69F00", "v"), "humanline sampling": ("#CC79A7", "P")}

def draw_frontier(page: Page) -> None:
    """Sentiment over KL, a point for each reported run, as in the DPO paper's figure 2."""
    cells = [c for part in ("main", "beta", "online", "ablation", "k") for c in PARTS[part] if page.all(c)]
    methods = [method for method in KINDS if any(cell.method == method for cell in cells)] or ["dpo"]
    figure, panels = plt.subplots(1, len(methods), figsize=(8, 3.6), sharey=True, squeeze=False)
    for axes, method in zip(panels[0], methods):
        axes.plot(0, page.results[INITIAL["sentiment"]]["score"], "*", color="black", markersize=10, label="initial policy")
        for name, (color, marker) in LOOKS.items():
            some = [c for c in cells if c.method == method and name == ("online" if c.source == "online" else c.variant)]
            points = [point for c in some for point in zip(page.all(c, "kl"), page.all(c))]
            if points:
                axes.plot(*zip(*points), marker, color=color, markersize=5, alpha=0.8, label=name)
        axes.set_title(NAMES[method])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.supxlabel("KL to the initial policy, nats a response", fontsize=10)
    figure.supylabel("sentiment of held-out responses", fontsize=10)
    figure.tight_layout()
    figure.savefig(FIGURES / "frontier.png", dpi=150)


# --- main ---------------------------------------------------------------------------------------------

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", nargs="*", choices=PARTS, default=[*PARTS], help="some parts, in this order")
    parser.add_argument("--pages", action="store_true", help="no runs: tables and figures of those that there are")
    parser.add_argument("--again", action="store_true", help="forget all finished runs")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    if args.again:
        STORE.unlink(missing_ok=True)
        shutil.rmtree(WORK, ignore_errors=True)
    if not args.pages:
        real_model.make_model()
        do(args.only, args.device, args.jobs)
    page = Page(finished())
    for path in PAGES:
        path.write_text(fill(path.read_text(encoding="utf-8"), tables(page)), encoding="utf-8")
    if INITIAL["sentiment"] in page.results:
        draw_frontier(page)
    print(f"\nthe page is {PAGES[1]}, the figure {FIGURES / 'frontier.png'}")


if __name__ == "__main__":
    main()
