"""What gpu.py checks: log-probs and gradients, whole runs of the scripts; and what all its steps use."""

import contextlib
import copy
import gc
import importlib
import importlib.util
import json
import logging
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/experiments")]

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

import common  # noqa: E402
import memory  # noqa: E402
import toy_world  # noqa: E402

TINY = ("qwen2", 512, 64, 96, 3, 2, 1, True)  # as memory.SHAPES
# Gemma with a window that is full; its logits, tied to scaled embeddings, are large: smaller weights.
FAMILIES = {"llama": {}, "qwen2": {}, "gemma3_text": {
    "head_dim": 32, "sliding_window": 32, "query_pre_attn_scalar": 32, "initializer_range": 0.01}}


# --- what all steps use -------------------------------------------------------------------------------------

def record(args, name: str, **found) -> None:
    """A line of the table, on disk at once. ok=False is a failed check."""
    with open(args.folder / "records.jsonl", "a") as file:
        file.write(json.dumps({"name": name} | found) + "\n")


def attempt(args, name: str, work, *given) -> None:
    """Record what work(*given) returns, or its error, which does not end the step."""
    try:
        record(args, name, **work(*given))
    except torch.OutOfMemoryError:
        record(args, name, memory="not enough")
    except (Exception, SystemExit):
        record(args, name, ok=False, error=traceback.format_exc().splitlines()[-3:])
    gc.collect()  # trainers hold themselves in circles
    if args.device == "cuda":
        torch.cuda.empty_cache()


def within(found: float, limit: float) -> dict:
    return {"found": found, "limit": limit, "ok": found <= limit}  # a NaN is not


def now(args) -> float:
    """Seconds, when all that was started has ended."""
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def random_model(config, args):
    torch.manual_seed(0)
    with torch.device(args.device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()


def shape_of(size: str, args):
    with mock.patch.dict(memory.SHAPES, tiny=TINY):
        return memory.config_of("tiny" if args.tiny else f"Qwen2.5-{size}")


def save(args, config, weights=True) -> Path:
    """A folder with the config, the toy's tokenizer (a token a letter) and random weights."""
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    config.save_pretrained(folder)
    toy_world.make_tokenizer().save_pretrained(folder)
    if weights:
        random_model(config, args).save_pretrained(folder)
    return folder


def write_rows(args, kind: str, count: int, prompt: int, shortest: int, longest: int) -> Path:
    """Rows of random letters: responses of shortest to longest tokens; groups of 4."""
    rng = random.Random(0)

    def text(low, high):
        return "".join(rng.choices(toy_world.LETTERS, k=rng.randint(low, high)))

    rows = []
    for i in range(count):
        texts = [text(shortest, longest) for _ in range(4)]
        rows.append({"dpo": {"chosen": texts[0], "rejected": texts[1]},
                     "kto": {"completion": texts[0], "label": i % 2 == 0},
                     "grpo": {"completions": texts, "rewards": [rng.random() for _ in texts]}}[kind])
        rows[-1]["prompt"] = text(prompt, prompt)
    path = args.folder / f"{kind}-{count}-{shortest}-{longest}.jsonl"
    toy_world.write_jsonl(path, rows)
    return path


def flags_for(args, model: Path, data: Path, steps: int, **more) -> list[str]:
    flags = {"model": model, "data": data, "output_dir": tempfile.mkdtemp(dir=args.folder), "device": args.device,
             "steps": steps, "sync_every": 1, "eval_size": 0, "save_every": 0, "warmup": 1, "lr": 1e-5} | more
    return ["--overwrite", *(str(x) for name, value in flags.items() for x in (f"--{name}", value))]


def metrics_of(argv: list[str]) -> list[dict]:
    folder = Path(argv[argv.index("--output_dir") + 1])
    return [json.loads(line) for line in open(folder / "metrics.jsonl")][1:]


def train(kind: str, argv: list[str], model=None) -> list[dict]:
    """Metrics of the updates that main() makes; of a model that is given, without a file of its weights."""
    script, stack = importlib.import_module(f"humanline_{kind}"), contextlib.ExitStack()
    with stack:
        if model is not None:
            info = dict.fromkeys(("missing_keys", "unexpected_keys", "mismatched_keys"), [])

            def load(*_, output_loading_info=False, **__):
                return (model, info) if output_loading_info else model

            stack.enter_context(mock.patch.object(AutoModelForCausalLM, "from_pretrained", load))
            stack.enter_context(mock.patch.object(type(model), "save_pretrained", lambda *_, **__: None))
            stack.enter_context(mock.patch.object(torch, "save", lambda state, path: Path(path).touch()))
        script.main(script.parse_args(argv))
    return metrics_of(argv)


# --- processes ------------------------------------------------------------------------------------------------

def start(args, target, *given):
    """On CUDA a fresh process, for CUDA does not live through a fork; on a CPU a fork, which imports nothing again."""
    process = multiprocessing.get_context("spawn" if args.device == "cuda" else "fork").Process(
        target=target, args=(args, *given))
    process.start()
    return process


def log_to(path: Path) -> None:
    """All output of this process, and each warning as a line."""
    for number in (1, 2):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    transformers.logging.disable_default_handler()
    transformers.logging.enable_propagation()
    logging.basicConfig(level=logging.WARNING, format="Warning: %(name)s: %(message)s", force=True,
                        stream=open(os.dup(2), "w", buffering=1))
    sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)


def script_process(args, file: str, argv: list[str], log: Path) -> None:
    """python FILE.py …"""
    log_to(log)
    sys.argv = [file, *argv]
    runpy.run_path(file, run_name="__main__")


def killed_process(args, kind: str, argv: list[str], update: int) -> None:
    """A training run that is killed in mid-update."""
    script, calls = importlib.import_module(f"humanline_{kind}"), []
    accumulate_gradient = script.accumulate_gradient

    def accumulate_and_die(*given):
        calls.append(1)
        metrics = accumulate_gradient(*given)
        if len(calls) == update:
            os.kill(os.getpid(), signal.SIGKILL)
        return metrics

    script.accumulate_gradient = accumulate_and_die
    script.main(script.parse_args(argv))


# --- right ----------------------------------------------------------------------------------------------------

def family_of(name: str, args):
    hidden, inner, layers, vocabulary = (64, 96, 2, 331) if args.tiny else (256, 688, 2, 32_003)
    heads = hidden // 32
    config = AutoConfig.for_model(
        name, vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 2, max_position_embeddings=2048,
        tie_word_embeddings=name != "llama", pad_token_id=0, bos_token_id=None, eos_token_id=1, **FAMILIES[name])
    if name == "gemma3_text":
        config.layer_types = ["sliding_attention", "full_attention"] * (layers // 2)
    return config


def example_of(ids: list[int], prompt_len: int):
    return common.Example(torch.tensor(ids, dtype=torch.int32), prompt_len)


def logps_and_gradient(logps_of, model, examples: list) -> tuple:
    """Log-probs of all response tokens, and the gradient of a sum of them with random factors, both on the CPU."""
    model.zero_grad()
    logp = logps_of(model, examples)
    factors = torch.randn(len(logp), generator=torch.Generator().manual_seed(1)).to(logp)
    (logp * factors).sum().backward()
    gradient = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    return logp.detach().cpu().double(), gradient.cpu().double()


def from_logits(model, examples: list):
    """The definition: one sequence at a time, all logits."""
    found = []
    for example in examples:
        ids, cut = example.ids.long(), example.prompt_len
        logits = model(ids[None, :-1]).logits[0, cut - 1 :]  # (T, V)
        found.append(logits.log_softmax(-1).gather(1, ids[cut:, None])[:, 0])
    return torch.cat(found)


def float32(model, examples: list):
    logp, mask = common.response_logps(model, examples)
    return logp[mask]


def bf16(model, examples: list):
    with torch.autocast(model.device.type, torch.bfloat16):
        return float32(model, examples)


def right(args) -> None:
    longest, cuda = 48 if args.tiny else 384, args.device == "cuda"
    for name in FAMILIES:
        attempt(args, name, check_family, args, name, longest)
    weight, hidden = (torch.randn(n, 512, device=args.device).bfloat16() for n in (32_064, 256))
    product = weight.float() @ hidden.float().T
    error = (common.head_logits(weight, hidden) - product).abs().max() / product.abs().max()
    # Not rounded to bf16 on CUDA; on a CPU it is.
    record(args, "head: bf16 product with float32 out", **within(error.item(), 1e-4 if cuda else 2**-8))
    folder, more = save(args, family_of("qwen2", args)), {"batch_size": 8, "max_length": 2 * longest}
    for kind in ("dpo", "kto", "grpo"):
        data = write_rows(args, kind, 16, 5, longest // 4, longest)
        attempt(args, f"{kind}: update 1", first_update, kind, flags_for(args, folder, data, 1, **more))
    more |= {"save_every": 2, "sync_every": 2, "lr": 1e-3}
    data = write_rows(args, "dpo", 32, 5, longest // 4, longest)
    whole, other = (flags_for(args, folder, data, 4, **more) for _ in range(2))
    attempt(args, "a resumed run less a whole one", resumed, args, whole, other, 1e-2 if cuda else 0)


def check_family(args, name: str, longest: int) -> dict:
    """Largest and mean error of log-probs, nats, and of the gradient, relative."""
    model, rng = random_model(family_of(name, args), args), random.Random(0)
    examples = [example_of(rng.choices(range(331), k=rng.randint(longest // 2, longest)), 9) for _ in range(6)]
    exact = logps_and_gradient(from_logits, copy.deepcopy(model).cpu().double(), examples)
    single = logps_and_gradient(float32, model, examples)
    half = logps_and_gradient(bf16, model, examples)
    memory.checkpoint(model)
    again = logps_and_gradient(bf16, model, examples)
    # CUDA adds up attention's gradients in any order: checkpointed, they are the same but for that.
    pairs = {"float32 less float64": (single, exact, 1e-4, 1e-4), "bf16 less float32": (half, single, 2e-2, 2e-2),
             "checkpointed less plain": (again, half, *((1e-4, 1e-3) if args.device == "cuda" else (0, 0)))}
    for pair, ((logp, slope), (other, other_slope), nats, relative) in pairs.items():
        error = (logp - other).abs()
        record(args, f"{name}, {pair}: largest, nats", **within(error.max().item(), nats))
        record(args, f"{name}, {pair}: mean, nats", **within(error.mean().item(), nats / 10))
        difference = (slope - other_slope).norm() / other_slope.norm()
        record(args, f"{name}, {pair}: gradient, relative", **within(difference.item(), relative))
    return {"tokens": len(exact[0])}


def first_update(kind: str, argv: list[str]) -> dict:
    first = train(kind, argv)[0]
    found = {name: first[name] for name in ("abs_logratio", "unclipped")}
    return found | {"ok": found == {"abs_logratio": 0, "unclipped": 1}}


def resumed(args, whole: list[str], other: list[str], limit: float) -> dict:
    """The largest difference of a metric, relative; a run that is killed in update 4 goes on from update 2."""
    process = start(args, killed_process, "dpo", other, 4)
    process.join()
    other.remove("--overwrite")
    runs = zip(train("dpo", whole), train("dpo", ["--resume", *other]), strict=True)
    pairs = [(a[name], b[name]) for a, b in runs for name in ("loss", "grad_norm", "abs_logratio")]
    found = within(max(abs(a - b) / (abs(a) + 1e-6) for a, b in pairs), limit)
    return found | {"ok": found["ok"] and process.exitcode == -signal.SIGKILL}


# --- scripts, real --------------------------------------------------------------------------------------

def scripts(args) -> None:
    model = save(args, shape_of("0.5B", args))
    (args.folder / "chance.py").write_text(
        "import random\ndef chance(prompts, completions, **columns):\n    return [random.random() for _ in prompts]\n")
    sampled = {"sample_every": 2, "reward": f"{args.folder}/chance.py:chance", "group_size": 4,
               "max_new_tokens": 8 if args.tiny else 128}
    runs = [("dpo", {}), ("grpo", sampled), ("kto", {"humanline": "sample"}), ("dpo", {"lora_rank": 16}),
            ("dpo", {"micro_tokens": 10**7}), ("grpo", {}), ("dpo", sampled), ("kto", sampled)]
    for kind, more in runs[: 5 if args.tiny else None]:
        flag = next((f"--{name} {value}" for name, value in more.items()), "")
        attempt(args, f"{kind} {flag}", too_large if "micro_tokens" in more else whole_run, args, kind, model, more)


def run_script(args, kind: str, argv: list[str]) -> tuple[int, str]:
    """Exit code and last line of python humanline_{kind}.py …"""
    log = args.folder / f"log-{len(list(args.folder.glob('log-*')))}"
    process = start(args, script_process, str(ROOT / f"humanline_{kind}.py"), argv, log)
    process.join()
    return process.exitcode, log.read_text().splitlines()[-1][-300:]


def whole_run(args, kind: str, model: Path, more: dict) -> dict:
    script = importlib.import_module(f"humanline_{kind}")
    if "lora_rank" in more and "lora_rank" not in script.parse_args(["--model", "any"]):
        return {"not there yet": "--lora_rank"}
    if "lora_rank" in more and not importlib.util.find_spec("peft"):
        return {"not there": "peft"}
    data = write_rows(args, kind, 96, 9, 8 if args.tiny else 100, 32 if args.tiny else 400)
    argv = flags_for(args, model, data, 3, **{"batch_size": 8, "max_length": 2048} | more)
    code, last = run_script(args, kind, argv)
    if code:
        return {"ok": False, "last": last}
    updates, good = metrics_of(argv), "the trained policy is in" in last
    shutil.rmtree(argv[argv.index("--output_dir") + 1])  # gigabytes
    return {"ok": good and len(updates) == 3 and updates[0]["abs_logratio"] == 0,
            "tokens/s": updates[1]["tokens_per_second"], "GiB": updates[-1]["peak_memory_gib"]}


def too_large(args, kind: str, model: Path, more: dict) -> dict:
    """64 responses of 1,900 tokens in one micro-batch: the error names the flag."""
    if args.device == "cpu":
        return {"left out": "a CPU has no such error"}
    data = write_rows(args, kind, 32, 9, 1900, 1900)
    code, last = run_script(args, kind, flags_for(args, model, data, 1, **{"batch_size": 32} | more))
    return {"ok": code == 1 and last.startswith("error: ") and "--micro_tokens" in last, "last": last}


def real(args) -> None:
    """The main table of the experiment with a real model."""
    files = [ROOT / "tests/experiments" / name for name in ("real_model.py", "evidence.py")]
    for file in [file for file in files if file.exists()]:
        log = args.folder / f"log-{file.stem}"
        process = start(args, script_process, str(file), ["--device", args.device], log)
        process.join()
        record(args, file.name, ok=process.exitcode == 0, last=log.read_text().splitlines()[-20:])
    if not any(file.exists() for file in files):
        record(args, "real model", there="not yet")
