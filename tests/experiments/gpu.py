"""All that only a CUDA GPU can show, in one call: is it right, does it run, how much memory, how fast.

    ./run.sh gpu                                  all steps in 9 minutes: a table, and results/gpu.json
    ./run.sh gpu --only right speed               some steps, which share --seconds
    ./run.sh gpu --device cpu --tiny              every step's code on the smallest shapes, to find its faults

right: log-probs and gradients of three families against float64, in float32 and in bf16; log-ratios of update 1; a
resume after a kill; checkpointing. scripts: whole runs. memory: what memory.py predicts. speed: updates against TRL
1.16, a profile. variants: torch.compile, BLOCK_BYTES, MAX_PADDING. sampling: tokens/s, and waiting for the CPU. real:
the experiment with a real model, once there is one. Weights are random, in the shape of Qwen2.5-0.5B and 1.5B.

Each step is a process of its own with a time limit; what it leaves goes on to the later steps. A measurement is on
disk as soon as it is made, so that a step that fails or is stopped keeps what it has. The exit code is 1 if a check
failed or a step did not end. "idle" is the part of the time in which no kernel ran: the GPU waited for the CPU.

Where nothing can be fetched, take along what may be missing there. First here, once, into a folder that git ignores:

    .venv/bin/python tests/experiments/gpu.py --wheels .whl           (… --wheels .whl pyarrow: all but pyarrow)

and then there, with Python 3.12 on x86-64 Linux, torch 2.11 and transformers 5.17 or newer:

    python3 -m pip install -q --no-index --no-deps --upgrade --target /tmp/site .whl/*.whl && PYTHONPATH=/tmp/site \\
        python3 tests/experiments/gpu.py --out gpu.json

A model that is too large to travel in one piece: `split -b 50M model.gguf part.` here, and there
`python3 tests/experiments/gpu.py --model-parts part.aa part.ab model.gguf`.
"""

import argparse
import collections
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/experiments")]

import torch  # noqa: E402
import transformers  # noqa: E402

import gpu_checks  # noqa: E402
import gpu_measures  # noqa: E402

RESULT = ROOT / "tests/experiments/results/gpu.json"
LIMITS = {"right": 60, "scripts": 120, "memory": 60, "speed": 150, "variants": 60, "sampling": 60, "real": 30}  # s
STEPS = {"right": gpu_checks.right, "scripts": gpu_checks.scripts, "memory": gpu_measures.memory_step,
         "speed": gpu_measures.speed, "variants": gpu_measures.variants, "sampling": gpu_measures.sampling,
         "real": gpu_checks.real}
BYTES = 64 * 2**20  # of wheels
WHEELS = ["datasets==5.2.0", "dill<0.4.2", "multiprocess<0.70.20", "xxhash", "math-verify==0.9.0",  # most needed first
          "latex2sympy2_extended==1.11.0", "antlr4-python3-runtime==4.13.2", "trl==1.16.0", "peft==0.21.2",
          "vaderSentiment", "gguf", "pyarrow"]
PIP = ["download", "-q", "--no-deps", "--only-binary=:all:", "--implementation=cp", "--python-version=3.12", *(
    f"--platform=manylinux{tag}_x86_64" for tag in ("_2_28", "_2_27", "_2_17", "2014", "1"))]


def step_process(args, name: str) -> None:
    os.setsid()  # so that what it starts is stopped with it
    gpu_checks.log_to(args.folder / "log")
    os.environ["HF_DATASETS_CACHE"] = str(args.folder / "datasets")
    if args.device == "cuda":
        gpu_checks.record(args, "device", card=torch.cuda.get_device_name())
    STEPS[name](args)


def run_step(args, name: str, seconds: float) -> dict:
    """What a step found, what failed, and its warnings."""
    with tempfile.TemporaryDirectory() as folder:
        args.folder, started = Path(folder), time.perf_counter()
        process = gpu_checks.start(args, step_process, name)
        try:
            process.join(max(1.0, seconds))
        finally:
            ended = process.exitcode
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()  # if it is too young to lead a group
            process.join()
        records = args.folder / "records.jsonl"
        found = [json.loads(line) for line in open(records)] if records.exists() else []
        lines = [line.strip() for log in sorted(args.folder.glob("log*")) for line in open(log, errors="replace")]
    failed = [f"{row['name']}: a check failed" for row in found if row.get("ok") is False]
    if ended is None:
        failed.append(f"stopped at its limit of {seconds:.0f} s")
    elif ended:
        failed.append(f"ended with {ended}: " + " | ".join(lines[-3:]))
    warnings = collections.Counter(line[:300] for line in lines if re.search("[Ww]arn(ing)?:", line))
    taken = round(time.perf_counter() - started, 1)
    return {"seconds": taken, "found": found, "failed": failed, "warnings": warnings}


def show(name: str, step: dict) -> None:
    print(f"{name}: {step['seconds']} s, {len(step['failed'])} failed")
    for row in step["found"]:
        mark = "FAILED" if row.get("ok") is False else ""
        numbers = [f"{key} {x:.4g}" if isinstance(x, float) else f"{key} {x}" for key, x in row.items()
                   if key not in ("name", "ok", "kernels")]
        print(f"  {mark:7s}{row['name']:58s}{', '.join(numbers)}")
        for kernel, share in row.get("kernels", {}).items():
            print(f"  {'':7s}{share:8.1%}  {kernel[:90]}")
    for line in step["failed"]:
        print(f"  FAILED {line}")
    for line, count in step["warnings"].items():
        print(f"  {count} × {line}")
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=[*LIMITS], metavar="NAME", help=", ".join(LIMITS))
    parser.add_argument("--seconds", type=float, default=sum(LIMITS.values()), help="for all of it")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the smallest shapes")
    parser.add_argument("--out", type=Path, help="of the results; on a CPU nowhere else")
    parser.add_argument("--wheels", nargs="+", metavar=("FOLDER", "NAME"), help="download; but what is named")
    parser.add_argument("--model-parts", nargs="+", metavar="FILE", help="put parts together; the last is the whole")
    args = parser.parse_args(argv)
    if args.wheels:
        return wheels(Path(args.wheels[0]), args.wheels[1:])
    if args.model_parts:
        return join(args.model_parts)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: no CUDA GPU is here; --device cpu --tiny runs the same code without one")
    out = args.out or (RESULT if args.device == "cuda" else Path(tempfile.mkdtemp()) / "gpu.json")
    limits, started = {name: LIMITS[name] for name in LIMITS if name in args.only}, time.perf_counter()
    table = {"command": "./run.sh gpu", "torch": torch.__version__, "transformers": transformers.__version__,
             "device": f"{platform.machine()}, {os.cpu_count()} cores", "tiny": args.tiny, "steps": {}}
    end = 0.0
    for name in limits:
        end += limits[name] * args.seconds / sum(limits.values())
        step = run_step(args, name, end - (time.perf_counter() - started))
        for row in [row for row in step["found"] if row["name"] == "device"]:
            table["device"] = row["card"]
        table["steps"][name] = step
        out.write_text(json.dumps(table, indent=1) + "\n")
        show(name, step)
    failed = [name for name, step in table["steps"].items() if step["failed"]]
    print(f"{table['device']}, torch {torch.__version__}, transformers {transformers.__version__}: {out}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


# --- what travels to a machine where nothing can be fetched -----------------------------------------------------

def wheels(folder: Path, there: list[str]) -> None:
    """Download WHEELS, but for what is there, until the next would be too much."""
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in [x for x in WHEELS if re.split("[=<]", x)[0] not in there]:
        had = set(folder.iterdir())
        subprocess.run([sys.executable, "-m", "pip", *PIP, "--dest", str(folder), wheel], check=True)
        new, total = set(folder.iterdir()) - had, sum(file.stat().st_size for file in folder.iterdir())
        if total > BYTES:
            for file in new:
                file.unlink()
            print(f"left out, for more than {BYTES / 2**20:.0f} MiB: {wheel}")
        for file in new & set(folder.iterdir()):
            print(f"{file.stat().st_size / 2**20:8.2f} MiB  {file.name}")
    print(f"{sum(file.stat().st_size for file in folder.iterdir()) / 2**20:8.2f} MiB in all")


def join(names: list[str]) -> None:
    *parts, whole = names
    with open(whole, "wb") as file:
        for part in parts:
            shutil.copyfileobj(open(part, "rb"), file)


if __name__ == "__main__":
    main()
