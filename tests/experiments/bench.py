"""Tokens per second, memory and share of the hardware's floor, against TRL at its best.

    ./run.sh bench                       all of it, on 2 CPU cores 45 minutes; on CUDA with --device cuda
    .venv/bin/python tests/experiments/bench.py --only dpo

Each measurement is a process of its own. On a CPU: a Llama with hidden 256, 6 layers and a vocabulary of
32,000, float32, and 16 pairs, 32 labels or 8 groups of 4 of GSM8K in an update (../shared/data, or another
folder with --data_dir; else the toy world's letters); on CUDA: random weights in the shape of Qwen2.5-0.5B
and 1.5B, sequences of 512 and 2,048 tokens. k = 1 on both sides: the reference is synced at every update.
Both train on the same batches in the same order; the first update is a warm-up, the next two are timed (one where
TRL's batches are only compared with one another).
Tokens are those of prompts and responses, without padding, each trained response counted once with its
prompt. Memory: the process's peak RSS on a CPU, max_memory_allocated on CUDA.

Ours runs with --micro_tokens 640 on a CPU. TRL's DPOTrainer, KTOTrainer and GRPOTrainer (whose rollout_func
returns the fixed completions: nothing is generated) run with the per-device batches of PER_DEVICE, gradient
accumulation making up the batch: once each to find the two fastest and the lightest, and these then take turns
with ours, of which medians are printed. Each trainer syncs its reference model (sync_ref_model) and logs nothing;
gradient checkpointing is off on both sides. Padding-free batches want flash attention, which no CPU has.
The branch for CUDA has never been run.
"""

import argparse
import contextlib
import functools
import importlib
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[2]
WORK, RESULTS = ROOT / "runs/bench", ROOT / "tests/experiments/results"
DATA_DIR = ROOT.parent / "shared/data"
sys.path[:0] = [str(ROOT), str(ROOT / "tests/experiments")]

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import common  # noqa: E402

KINDS = {"dpo": "pairs", "kto": "labels", "grpo": "groups"}
BATCH = {"dpo": 16, "kto": 32, "grpo": 32}  # as --batch_size counts: pairs, labels, responses
GROUP = 4  # GRPO's responses to a prompt
# TRL's per-device batches, the last one all. KTO's are twice as large: it pairs a prompt with another's response
# of its per-device batch, for the KL estimate, and refuses a batch of 1.
PER_DEVICE = {"dpo": (1, 2, 4, 16), "kto": (2, 4, 8, 32), "grpo": (1, 2, 4, 32)}
OURS = {"cpu": {"micro_tokens": 640, "max_length": 2048}}  # flags for memory, as a CPU's user would set them
UPDATES = 4  # the first warms up, the last scores nothing for a next: two are timed
# Hidden, intermediate, layers, heads, key-value heads, tied: of Llamas, and of Qwen2.5's sizes.
SHAPES = {"cpu": (256, 688, 6, 4, 4, False), "small": (128, 344, 2, 4, 4, False)}
SIZES = {"0.5B": (896, 4864, 24, 14, 2, True), "1.5B": (1536, 8960, 28, 12, 2, True)}


# --- models and data ----------------------------------------------------------------------------------

def make_model(shape: str, vocabulary: int) -> Path:
    """A folder with random weights and a BPE tokenizer of at most 4,000 tokens."""
    folder = WORK / f"model-{shape}-{vocabulary}-{data_of('dpo').parent.name}"
    if (folder / "config.json").exists():
        return folder
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = [row["prompt"] + row["chosen"] for row in read(data_of("dpo"))]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=4000, special_tokens=["<pad>", "<end>", "<user>", "<assistant>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{m['role']}}>{{m['content']}}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")
    torch.manual_seed(0)
    hidden, inner, layers, heads, kv, tied = (SHAPES | SIZES)[shape]
    kind = transformers.Qwen2Config if shape in SIZES else transformers.LlamaConfig
    config = kind(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
                  num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=tied,
                  max_position_embeddings=4096, eos_token_id=1, pad_token_id=0, bos_token_id=None)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def data_of(method: str) -> Path:
    path = DATA_DIR / f"gsm8k_{KINDS[method]}.jsonl"
    if path.exists():
        return path
    import toy_world
    return toy_world.build(WORK / "letters", "letters") / f"{KINDS[method]}_train.jsonl"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def write(name: str, rows: list[dict]) -> Path:
    WORK.mkdir(parents=True, exist_ok=True)
    (WORK / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return WORK / name


def rows_for(method: str, repeat: int, tokens: int | None = None) -> list[dict]:
    """As many rows as UPDATES need, others for each repetition; the same for both sides."""
    count = UPDATES * BATCH[method] // (GROUP if method == "grpo" else 1)
    if tokens:
        return synthetic(method, count, tokens // 2, repeat)
    rows = read(data_of(method))
    if method == "grpo":  # the letters have groups of 8
        rows = [row | {name: row[name][:GROUP] for name in ("completions", "rewards")} for row in rows]
    return random.Random(repeat).sample(rows, count)


def synthetic(method: str, count: int, tokens: int, seed: int = 0) -> list[dict]:
    """Rows with prompts and responses of `tokens` tokens each: no tokenizer here merges these characters."""
    rng = random.Random(seed)

    def text():
        return "".join(rng.choices("^`{|}~", k=tokens))

    if method == "kto":
        return [{"prompt": text(), "completion": text(), "label": i % 2 == 0} for i in range(count)]
    if method == "grpo":
        return [{"prompt": text(), "completions": [text() for _ in range(GROUP)],
                 "rewards": [rng.random() for _ in range(GROUP)]} for _ in range(count)]
    return [{"prompt": text(), "chosen": text(), "rejected": text()} for _ in range(count)]


# --- one measurement, in a process of its own -----------------------------------------------------------

def peak_memory(device: str) -> float:
    """GiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def now(device: str) -> float:
    """Seconds, when all that was started has ended."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matrix_rate(device: str) -> float:
    """FLOP/s of a square product, float32 on a CPU and bf16 on CUDA: the median of 15."""
    size, dtype, found = (8192, torch.bfloat16, []) if device == "cuda" else (1024, torch.float32, [])
    a = torch.randn(size, size, device=device, dtype=dtype)
    for _ in range(15):
        started = now(device)
        a @ a
        found.append(2 * size**3 / (now(device) - started))
    return statistics.median(found)


def memory_rate(device: str) -> float:
    """Bytes/s, read and written, of an addition in place: the best of five."""
    x, y, best = torch.ones(2**24, device=device), torch.ones(2**24, device=device), 0.0
    for _ in range(5):
        started = now(device)
        x += y
        best = max(best, 12 * 2**24 / (now(device) - started))
    return best


def script_for(spec: dict) -> tuple:
    """The method's script and its arguments."""
    script = importlib.import_module(f"humanline_{spec['method']}")
    flags = {"model": spec["model"], "data": spec["data"], "steps": spec.get("updates", UPDATES),
             "batch_size": spec["batch"], "eval_size": 0, "save_every": 0, "max_length": 4096,
             "sync_every": 1, "output_dir": WORK / "ours", "device": spec["device"], "warmup": 1}
    flags |= OURS.get(spec["device"], {}) | spec.get("flags", {})
    argv = [str(x) for name, value in flags.items() for x in (f"--{name}", value)]
    return script, script.parse_args([*argv, "--overwrite"])


def measure_ours(spec: dict) -> dict:
    """Of the updates between the first, which warms up, and the last, which scores nothing for a next."""
    (script, args), device = script_for(spec), spec["device"]
    rate, batches, scoring = matrix_rate(device), [], []
    accumulate_gradient, next_window = script.accumulate_gradient, script.next_window
    before = peak_memory(device) if device == "cpu" else 0.0  # of Python and its libraries

    def remember(model, batch, mode, args):  # what the floor is of; log-probs, if kept, would pin the heap
        batches.append((model, [row._replace(ref_logp=None) for row in batch]))
        return accumulate_gradient(model, batch, mode, args)

    def timed_window(*given):
        started = now(device)
        window = next_window(*given)
        scoring.append(now(device) - started)
        return window

    script.accumulate_gradient, script.next_window = remember, timed_window
    with contextlib.redirect_stdout(sys.stderr):
        script.main(args)
    memory = peak_memory(device)
    updates = [json.loads(line) for line in open(Path(args.output_dir) / "metrics.jsonl")][1:]
    # Whole: from the first scoring on. Each batch is trained and scored once, whatever k is.
    first, timed = (scoring[0], slice(None)) if spec.get("whole") else (0.0, slice(1, -1))
    tokens, seconds = (sum(u[name] for u in updates[timed]) for name in ("tokens", "seconds"))
    seconds, count = first + seconds, len(updates[timed])
    rate, bandwidth = (rate + matrix_rate(device)) / 2, memory_rate(device)
    config = script.AutoConfig.from_pretrained(spec["model"])
    floors = [floor(batch, config, rate, bandwidth) for _, batch in batches[timed]]
    return {"tokens_per_second": tokens / seconds, "seconds": seconds / count, "memory": memory,
            "before": before, "tokens": tokens / count, "share": sum(floors) / seconds, "matrix_rate": rate,
            "padded": statistics.fmean(padded_share(*both, args.micro_tokens) for both in batches)}


def padded_share(model, batch: list, micro_tokens: int) -> float:
    """Share of padding in an update's forwards, which are cut as the scripts' policy_logps cuts them."""
    tokens = padded = 0
    mismatched = [getattr(row, "desirable", True) is None for row in batch]
    for apart in (True, False):  # KTO's mismatched pairs come first
        units = [row.examples for row, is_one in zip(batch, mismatched) if is_one == apart]
        for micro in common.micro_batches(model, units, micro_tokens):
            lengths = common.layout(model, [example for i in micro for example in units[i]])[1]
            tokens, padded = tokens + sum(lengths), padded + len(lengths) * max(lengths)
    return 1 - tokens / padded


def floor(batch: list, config, rate: float, bandwidth: float) -> float:
    """Seconds that an update cannot go below at k = 1: each response is trained (3 × a forward) and scored
    once (1 ×), KTO's mismatched pairs are scored by policy and reference (2 ×). A forward takes 2 FLOPs for
    each weight and token, the head on response tokens only, and causal attention 2 H a layer for each square
    of the length; responses to one prompt share it. AdamW reads weight, gradient and two moments and writes
    three: 28 bytes a weight."""
    hidden, layers, inner = config.hidden_size, config.num_hidden_layers, config.intermediate_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    body = layers * (2 * hidden * (hidden + kv) + 3 * hidden * inner)
    weights = body + hidden * config.vocab_size * (1 if config.tie_word_embeddings else 2)
    flops, prompts = 0.0, set()
    for row in batch:
        forwards = 2 if getattr(row, "desirable", True) is None else 4
        for example in row.examples:
            total, prompt = len(example.ids), example.prompt_len
            shared = prompt if (forwards, row.prompt) in prompts else 0
            prompts.add((forwards, row.prompt))
            flops += forwards * (2 * body * (total - shared) + 2 * hidden * config.vocab_size * (total - prompt)
                                 + 2 * layers * hidden * (total**2 - shared**2))
    return flops / rate + 28 * weights / bandwidth


def profile_ours(spec: dict) -> dict:
    """Share of each operator's own time in the second update: the first warms up."""
    (script, args), cuda = script_for(spec), spec["device"] == "cuda"
    inner, kinds = script.accumulate_gradient, torch.profiler.ProfilerActivity
    profiler = torch.profiler.profile(activities=[kinds.CPU] + [kinds.CUDA] * cuda,
                                      schedule=torch.profiler.schedule(wait=1, warmup=1, active=1, repeat=1))

    def step(*given):
        profiler.step()
        return inner(*given)

    script.accumulate_gradient = step
    with contextlib.redirect_stdout(sys.stderr), profiler:
        script.main(args)
    name = "self_device_time_total" if cuda else "self_cpu_time_total"
    times = {event.key: getattr(event, name) for event in profiler.key_averages()}
    top = sorted(times, key=times.get, reverse=True)[:12]
    return {"shares": {name: round(times[name] / sum(times.values()), 3) for name in top}}


def measure_trl(spec: dict) -> dict:
    """Of the updates after the first, on the batches that ours trains on."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    method, device, updates = spec["method"], spec["device"], spec["updates"]
    script, args = script_for(spec)
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    with contextlib.redirect_stdout(sys.stderr):
        rows = script.load_rows(args.data, None, functools.partial(script.encode_row, tokenizer, None, args))
    # Without KTO's mismatched pairs, of which TRL makes its own.
    batches = [[row for row in batch if row.source] for batch in script.make_batches(rows, args)]
    rows = [row for batch in batches for row in batch]
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant", "completion": "assistant"}

    def columns(row: dict) -> dict:
        return {name: common.as_messages(row[name], roles[name], name) if name in roles else row[name]
                for name in (*roles, "label") if name in row}

    given = iter(rows)

    def rollout(prompts, trainer):
        examples = [next(given).examples[0] for _ in prompts]  # they are asked for in order
        return {"prompt_ids": [e.ids[: e.prompt_len] for e in examples], "logprobs": None,
                "completion_ids": [e.ids[e.prompt_len :] for e in examples]}

    own, more = {"max_length": 4096}, {}
    if method == "grpo":
        own = dict(num_generations=GROUP, max_completion_length=2048, beta=1e-4, shuffle_dataset=False)
        more = dict(rollout_func=rollout, reward_funcs=lambda prompts, **_: [i % GROUP for i in range(len(prompts))])
    config = getattr(trl, f"{method.upper()}Config")(
        output_dir=str(WORK / "trl"), max_steps=updates, per_device_train_batch_size=spec["per_device"],
        gradient_accumulation_steps=spec["batch"] // spec["per_device"], sync_ref_model=True, ref_model_sync_steps=1,
        ref_model_mixup_alpha=1.0, use_cpu=device == "cpu", bf16=device == "cuda", gradient_checkpointing=False,
        train_sampling_strategy="sequential", logging_strategy="no", disable_tqdm=True, report_to=[],
        save_strategy="no", **own)
    trainer = getattr(trl, f"{method.upper()}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32), args=config,
        train_dataset=Dataset.from_list([columns(row.source) for row in rows[:: GROUP if method == "grpo" else 1]]),
        processing_class=tokenizer, **more)
    stepped, ended = [], []

    class Clock(TrainerCallback):  # the last callback: the sync is over
        def on_optimizer_step(self, *_, **__):
            stepped.append(now(device))

        def on_step_end(self, *_, **__):
            ended.append(now(device))

    trainer.add_callback(Clock())
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    tokens = sum(len(e.ids) for batch in batches[1:] for row in batch for e in row.examples)
    seconds, syncs = ended[-1] - ended[0], sum(end - start for start, end in zip(stepped[1:], ended[1:]))
    return {"tokens_per_second": tokens / seconds, "seconds": seconds / (updates - 1),
            "tokens_per_second_without_sync": tokens / (seconds - syncs), "memory": peak_memory(device)}


MEASURES = {"ours": measure_ours, "trl": measure_trl, "profile": profile_ours}


def measure(side: str, **spec) -> dict | None:
    """Run one measurement in a new process. None: TRL's batch does not fit the GPU."""
    argv = [sys.executable, __file__, "--one", side, json.dumps(spec, default=str)]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode and not (side == "trl" and "OutOfMemoryError" in done.stderr):
        sys.exit(f"error: {side} {spec}\n{done.stderr[-3000:]}")
    return None if done.returncode else json.loads(done.stdout.splitlines()[-1])


# --- the tables -----------------------------------------------------------------------------------------

def fastest_first(trl: dict) -> list[int]:
    return sorted(trl, key=lambda size: -trl[size]["tokens_per_second"])


def lightest_of(trl: dict) -> int:
    return min(trl, key=lambda size: trl[size]["memory"])


def finalists(screened: dict) -> list[int]:
    """The per-device batches that take turns with ours: the two fastest and the lightest."""
    return list(dict.fromkeys([*fastest_first(screened)[:2], lightest_of(screened)]))


def medians(many: list[dict]) -> dict:
    return {key: statistics.median(x[key] for x in many) for key in many[0]} | {"processes": len(many)}


def table_of(ours: list[dict], screened: dict[int, dict], finals: dict[int, list[dict]]) -> dict:
    """Medians; ours over TRL's fastest and lightest of those that took turns with it."""
    mine, final = medians(ours), {size: medians(many) for size, many in finals.items()}
    fastest, lightest = fastest_first(final)[0], lightest_of(final)
    table = {"ours": mine, "trl": screened | final, "fastest": fastest, "lightest": lightest,
             "memory over trl": mine["memory"] / final[lightest]["memory"]}
    peer, speed = final[fastest], mine["tokens_per_second"]
    table["speed over trl"] = speed / peer["tokens_per_second"]
    table["speed over trl without sync"] = speed / peer["tokens_per_second_without_sync"]
    return table


def take(side: str, method: str, case: tuple, device: str, repeat: int, **more) -> dict | None:
    """One measurement. case: shape of the model, vocabulary, tokens of a sequence (None: as the data have)."""
    shape, vocabulary, tokens = case
    data = write(f"{method}.jsonl", rows_for(method, repeat, tokens))
    return measure(side, method=method, model=make_model(shape, vocabulary), data=data, device=device,
                   batch=BATCH[method], **more)


def compare(method: str, case: tuple, device: str, repeats: int) -> dict:
    """TRL's per-device batches once each, then ours and TRL's two fastest and lightest in turn."""
    screened, ours = {}, []
    for size in tqdm(PER_DEVICE[method], f"{method}: TRL's batches", leave=False):
        found = take("trl", method, case, device, 0, per_device=size, updates=2)
        screened |= {size: medians([found])} if found else {}
    finals = {size: [] for size in finalists(screened)}
    for repeat in tqdm(range(repeats), f"{method}: in turn", leave=False):
        ours.append(take("ours", method, case, device, repeat))
        for size, found in finals.items():
            found.append(take("trl", method, case, device, repeat, per_device=size, updates=UPDATES - 1))
    return table_of(ours, screened, finals)


def show(name: str, table: dict) -> None:
    for side, row in {"ours": table["ours"], **table["trl"]}.items():
        side = side if side == "ours" else f"trl, {side} a device"
        print(f"{name:14s}{side:20s}{row['tokens_per_second']:10,.0f} tokens/s{row['memory']:8.2f} GiB")
    shown = {"share of the floor": table["ours"]["share"], "padded": table["ours"]["padded"]} | table
    print("".join(f"  {key} {x:.2f}" for key, x in shown.items() if type(x) is float), flush=True)


def growth(device: str) -> dict:
    """Seconds an update and memory, one thing varied at a time: DPO, hidden 128, 2 layers, prompts and
    responses of 128 tokens, 8 pairs, vocabulary 32,000, k = 1."""
    base = {"batch": 8, "vocabulary": 32_000, "sync_every": 1, "response": 128}
    varied = {"batch": (4, 8, 16, 32), "vocabulary": (8_000, 32_000, 128_000),
              "sync_every": (1, 8, 64), "response": (64, 256, 512)}
    table, (hidden, inner, layers, *_) = {name: [] for name in varied}, SHAPES["small"]
    for name, value in tqdm([(name, value) for name in varied for value in varied[name]], "growth", leave=False):
        this, updates = base | {name: value}, 64 if name == "sync_every" else UPDATES
        data = write("growth.jsonl", synthetic("dpo", updates * this["batch"], this["response"]))
        found = measure("ours", method="dpo", model=make_model("small", this["vocabulary"]), device=device,
                        data=data, batch=this["batch"], updates=updates, whole=name == "sync_every",
                        flags=OURS["cpu"] | {"sync_every": this["sync_every"]})
        weights = layers * (4 * hidden**2 + 3 * hidden * inner) + 2 * hidden * this["vocabulary"]
        beyond = found["memory"] - found["before"] - 16 * weights / 2**30
        table[name].append({"value": value, "beyond": beyond} | {x: found[x] for x in ("seconds", "tokens", "memory")})
    return table


def draw_growth(table: dict, folder: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 4, figsize=(10, 4.4), sharey="row")
    names = {"batch": "pairs in a batch", "vocabulary": "vocabulary", "sync_every": "k",
             "response": "tokens of a response"}
    curves = [("seconds", 0, "o-", "#0072B2", ""), ("memory", 1, "s--", "#D55E00", "whole process"),
              ("beyond", 1, "^-", "#009E73", "beyond weights,\ngradients, AdamW")]
    for column, (name, rows) in enumerate(table.items()):
        x = [row["value"] for row in rows]
        for key, which, style, color, label in curves:
            axes[which, column].plot(x, [row[key] for row in rows], style, color=color, label=label)
        for axis in axes[:, column]:
            axis.set_xscale("log", base=2)
            axis.set_xticks(x, [f"{v // 1000}k" if v >= 1000 else v for v in x])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[1, column].set_xlabel(names[name])
    for row, key, label in zip(axes, ("seconds", "memory"), ("seconds an update", "peak memory, GiB")):
        row[0].set_ylim(0, 1.08 * max(x[key] for rows in table.values() for x in rows))  # the row's scale
        row[0].set_ylabel(label)
    axes[1, 0].legend(fontsize=7)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "bench_growth.png", dpi=150)


def main() -> None:
    global DATA_DIR
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", choices=[*KINDS, "profile", "growth"], help="some parts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data_dir", type=Path, default=DATA_DIR, help="of gsm8k_pairs.jsonl, _labels and _groups")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the table; the figure goes to ../figures")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        torch.manual_seed(0)
        return print(json.dumps(MEASURES[args.one[0]](json.loads(args.one[1]))))
    DATA_DIR = args.data_dir
    parts, path = args.only or [*KINDS, "profile", "growth"], args.out / f"bench_{args.device}.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    data = "GSM8K" if (DATA_DIR / "gsm8k_pairs.jsonl").exists() else "the toy's letters"
    table |= {"command": "./run.sh bench", "repeats": args.repeats, "data": data,
              "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"}
    cases = [("cpu", 32_000, None)]
    if args.device == "cuda":
        table["machine"] += f", {torch.cuda.get_device_name()}"
        cases = [(size, 151_936, tokens) for size in SIZES for tokens in (512, 2048)]
    for method in [name for name in KINDS if name in parts]:
        for case in cases:
            name = method if args.device == "cpu" else f"{method} {case[0]} {case[2]}"
            table[name] = compare(method, case, args.device, args.repeats)
            show(name, table[name])
    if "profile" in parts:
        table["profile"] = take("profile", "dpo", cases[0], args.device, 0)
        print("own time of operators in an update of DPO:", table["profile"]["shares"])
    if "growth" in parts:
        table["growth"] = growth(args.device)
        for name, row in [(name, row) for name, rows in table["growth"].items() for row in rows]:
            print(f"{name:12s}{row['value']:8d}{row['seconds']:8.2f} s{row['memory']:8.2f} GiB, "
                  f"{row['beyond']:.2f} beyond weights, gradients and AdamW")
        draw_growth(table["growth"], args.out.parent / "figures")
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
