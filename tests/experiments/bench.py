"""Tokens per second, memory and share of the hardware's floor, against TRL and the usual way.

    ./run.sh bench                       all of it, on 2 CPU cores about 15 minutes; on CUDA with --device cuda
    .venv/bin/python tests/experiments/bench.py --only dpo

Each measurement is a process of its own and the sides take turns; medians are printed. On a CPU: a Llama
with hidden 256, 6 layers and a vocabulary of 32,000, batches of 32 sequences of GSM8K (../shared/data, or
another folder with --data_dir; else the toy world's letters); on CUDA: random weights in the shape of
Qwen2.5-0.5B and 1.5B, sequences of 512 and 2,048 tokens. k = 1 on all sides that sync. Tokens are those of
prompts and responses, without padding, each trained response counted once with its prompt. The first
update is a warm-up. Memory: the process's peak RSS on a CPU, max_memory_allocated on CUDA.

Peers: TRL's DPOTrainer, with and without sync_ref_model; KTOTrainer; GRPOTrainer, whose rollout_func
returns the fixed completions, so that nothing is generated; and for DPO the usual way, below: a second
model, one forward of the whole batch padded to its longest row, float32 logits of all positions.
The branch for CUDA has never been run.
"""

import argparse
import contextlib
import copy
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
WORK, RESULTS, FIGURES = ROOT / "runs/bench", ROOT / "tests/experiments/results", ROOT / "tests/experiments/figures"
sys.path[:0] = [str(ROOT), str(ROOT / "tests/experiments")]

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import common  # noqa: E402

KINDS = {"dpo": "pairs", "kto": "labels", "grpo": "groups"}
BATCH = {"dpo": 16, "kto": 16, "grpo": 32}  # 32 sequences each, with KTO's mismatched pairs
OURS = {"cpu": {"micro_tokens": 2048, "max_length": 2048}}  # flags for memory, as a CPU's user would set them
UPDATES = 4  # the first warms up, the last scores nothing for a next: two are timed
SIZES = {  # of Qwen2.5: hidden, intermediate, layers, heads, key-value heads, tied
    "0.5B": (896, 4864, 24, 14, 2, True),
    "1.5B": (1536, 8960, 28, 12, 2, True),
}
SHAPES = {"cpu": (256, 688, 6, 4, 4, False), "small": (128, 344, 2, 4, 4, False), **SIZES}


# --- models and data ----------------------------------------------------------------------------------


def make_model(shape: str, vocabulary: int) -> Path:
    """A folder with random weights and a BPE tokenizer of at most 4,000 tokens."""
    folder = WORK / f"model-{shape}-{vocabulary}"
    if (folder / "config.json").exists():
        return folder
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    texts = [row["prompt"] + row["chosen"] for row in read(data_of("dpo"))]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=4000, special_tokens=["<pad>", "<end>", "<user>", "<assistant>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{m['role']}}>{{m['content']}}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")
    torch.manual_seed(0)
    hidden, inner, layers, heads, kv, tied = SHAPES[shape]
    make = dict(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=tied,
                max_position_embeddings=4096, eos_token_id=1, pad_token_id=0, bos_token_id=None)
    if shape in SIZES:
        model = Qwen2ForCausalLM(Qwen2Config(**make))
    else:
        from transformers import LlamaConfig, LlamaForCausalLM
        model = LlamaForCausalLM(LlamaConfig(**make))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


DATA_DIR = ROOT.parent / "shared/data"


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


def groups_in(method: str) -> int:
    """Rows of the data file that fill a batch."""
    return BATCH[method] // (8 if method == "grpo" else 1)


def rows_for(method: str, repeat: int) -> list[dict]:
    """As many rows as UPDATES need, others for each repetition; the same for both sides."""
    rows = read(data_of(method))
    if method == "grpo" and len(rows[0]["completions"]) == 4:  # groups of 8: four answers to another question
        rows = [dict(row, completions=row["completions"] + other["completions"],
                     rewards=[*row["rewards"], 0.0, 0.0, 0.0, 0.0])
                for row, other in zip(rows, rows[1:] + rows[:1])]
    return random.Random(repeat).sample(rows, UPDATES * groups_in(method))


def synthetic(method: str, count: int, tokens: int, seed: int = 0) -> list[dict]:
    """Rows with prompts and responses of about `tokens` tokens each."""
    rng = random.Random(seed)

    def text():
        return "".join(rng.choice(" 0123456789") for _ in range(tokens))  # a token each, nearly

    rows = [{"prompt": text(), "chosen": text(), "rejected": text()} for _ in range(count)]
    if method == "kto":
        return [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0}
                for i, row in enumerate(rows)]
    if method == "grpo":
        return [{"prompt": row["prompt"], "completions": [text() for _ in range(8)],
                 "rewards": [rng.random() for _ in range(8)]} for row in rows]
    return rows


# --- one measurement, in a process of its own -----------------------------------------------------------


def peak_memory(device: str) -> float:
    """GiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def matrix_rate(device: str) -> float:
    """FLOP/s of a square product, float32 on a CPU and bf16 on CUDA: the median of 15."""
    size, dtype, found = (8192, torch.bfloat16, []) if device == "cuda" else (1024, torch.float32, [])
    a = torch.randn(size, size, device=device, dtype=dtype)
    for _ in range(15):
        started = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(2 * size**3 / (time.perf_counter() - started))
    return statistics.median(found)


def memory_rate(device: str) -> float:
    """Bytes/s, read and written, of an addition in place: the best of five."""
    x, y, best = torch.ones(2**24, device=device), torch.ones(2**24, device=device), 0.0
    for _ in range(5):
        started = time.perf_counter()
        x += y
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 12 * 2**24 / (time.perf_counter() - started))
    return best


def measure_ours(spec: dict) -> dict:
    script = importlib.import_module(f"humanline_{spec['method']}")
    flags = {"model": spec["model"], "data": spec["data"], "steps": spec.get("updates", UPDATES),
             "batch_size": spec["batch"], "eval_size": 0, "save_every": 0, "max_length": 4096,
             "sync_every": 1, "output_dir": WORK / "ours", "device": spec["device"], "warmup": 1}
    flags |= spec.get("flags", {})
    argv = [str(x) for name, value in flags.items() for x in (f"--{name}", value)] + ["--overwrite"]
    rates, seen, scoring = [matrix_rate(spec["device"])], [], []
    accumulate_gradient, next_window = script.accumulate_gradient, script.next_window
    start = peak_memory(spec["device"])

    def remember(model, batch, mode, args):  # what the floor is of
        if torch.is_grad_enabled():  # no evaluation
            seen.append((model, batch))
        return accumulate_gradient(model, batch, mode, args)

    def timed_window(*given):
        started = time.perf_counter()
        window = next_window(*given)
        scoring.append(time.perf_counter() - started)
        return window

    script.accumulate_gradient, script.next_window = remember, timed_window
    args = script.parse_args(argv)
    with contextlib.redirect_stdout(sys.stderr):
        script.main(args)
    memory = peak_memory(spec["device"])
    updates = [json.loads(line) for line in open(Path(args.output_dir) / "metrics.jsonl")][1:]
    first, timed = 0.0, slice(1, -1)  # the very last scores no next window
    if spec.get("whole"):  # from the first scoring on: each batch is trained and scored once, whatever k is
        first, timed = scoring[0], slice(None)
    tokens, seconds = (sum(u[name] for u in updates[timed]) for name in ("tokens", "seconds"))
    seconds, count = first + seconds, len(updates[timed])
    rates.append(matrix_rate(spec["device"]))
    config = script.AutoConfig.from_pretrained(spec["model"])
    bandwidth = memory_rate(spec["device"])
    floors = [floor(batch, config, statistics.fmean(rates), bandwidth) for _, batch in seen[timed]]
    return {"tokens_per_second": tokens / seconds, "seconds": seconds / count, "memory": memory,
            "before": start, "tokens": tokens / count, "share": sum(floors) / seconds,
            "matrix_rate": statistics.fmean(rates),
            "padded": statistics.fmean(padded_share(model, batch, args.micro_tokens) for model, batch in seen)}


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
    each weight and token, the head on response tokens only, and causal attention 2 T² H a layer. AdamW
    reads weight, gradient and two moments and writes three: 28 bytes a weight. No prompt is shared."""
    hidden, layers, inner = config.hidden_size, config.num_hidden_layers, config.intermediate_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    body = layers * (2 * hidden * (hidden + kv) + 3 * hidden * inner)
    weights = body + hidden * config.vocab_size * (1 if config.tie_word_embeddings else 2)
    flops = 0.0
    for row in batch:
        forwards = 2 if getattr(row, "desirable", True) is None else 4
        for example in row.examples:
            total, response = len(example.ids), len(example.ids) - example.prompt_len
            flops += forwards * (2 * body * total + 2 * hidden * config.vocab_size * response
                                 + 2 * layers * total**2 * hidden)
    return flops / rate + 28 * weights / bandwidth


def profile_ours(spec: dict) -> dict:
    """Share of each operator's own time in one update after a warm-up."""
    script = importlib.import_module(f"humanline_{spec['method']}")
    inner, updates = script.accumulate_gradient, []
    activities = [torch.profiler.ProfilerActivity.CPU]
    if spec["device"] == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)

    def watch(model, batch, mode, args):
        updates.append(1)
        if len(updates) == 2:
            profiler.start()
        if len(updates) == 3:
            profiler.stop()
        return inner(model, batch, mode, args)

    script.accumulate_gradient = watch
    argv = ["--model", spec["model"], "--data", spec["data"], "--steps", 4, "--batch_size", spec["batch"],
            "--eval_size", 0, "--save_every", 0, "--sync_every", 1, "--overwrite",
            "--output_dir", WORK / "profile", "--device", spec["device"]]
    with contextlib.redirect_stdout(sys.stderr):
        script.main(script.parse_args([str(x) for x in argv]))
    attribute = "self_device_time_total" if spec["device"] == "cuda" else "self_cpu_time_total"
    times = {event.key: getattr(event, attribute) for event in profiler.key_averages()}
    total = sum(times.values())
    top = sorted(times, key=times.get, reverse=True)[:12]
    return {"shares": {name: round(times[name] / total, 3) for name in top}}


def measure_trl(spec: dict) -> dict:
    """Seconds of the last optimizer step of TRL's trainer, on the same rows."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    method, rows = spec["method"], read(spec["data"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])

    def load():
        return AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)

    def message(role, text):
        return [{"role": role, "content": text}]

    groups = groups_in(method)
    steps = 3 if method == "dpo" else 2  # the first warms up; DPO: the second without a sync, the third with one
    rows = rows[: groups * steps]
    every = dict(output_dir=str(WORK / "trl"), max_steps=steps, report_to=[], save_strategy="no",
                 use_cpu=spec["device"] == "cpu", bf16=spec["device"] == "cuda", gradient_checkpointing=False,
                 per_device_train_batch_size=BATCH[method], train_sampling_strategy="sequential",
                 logging_strategy="no", disable_tqdm=True)
    if method == "grpo":
        from trl import GRPOConfig, GRPOTrainer

        texts = {row["prompt"]: row for row in rows}

        def rollout(prompts, trainer):
            seen, ids, completions = {}, [], []
            for prompt in prompts:
                text = prompt[0]["content"]
                at = seen[text] = seen.get(text, -1) + 1
                example = common.encode(tokenizer, text, texts[text]["completions"][at % 8], 4096)
                ids.append(example.ids[: example.prompt_len])
                completions.append(example.ids[example.prompt_len :])
            return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}

        def reward(prompts, completions, **columns):
            return [(i % 8) / 8 for i in range(len(prompts))]

        data = Dataset.from_list([{"prompt": message("user", row["prompt"])} for row in rows])
        every |= dict(num_generations=8, max_completion_length=2048, beta=1e-4, shuffle_dataset=False)
        trainer = GRPOTrainer(model=load(), args=GRPOConfig(**every), train_dataset=data, reward_funcs=reward,
                              processing_class=tokenizer, rollout_func=rollout)
        examples = [common.encode(tokenizer, row["prompt"], text, 4096) for row in rows for text in row["completions"]]
    elif method == "kto":
        from trl import KTOConfig, KTOTrainer

        data = Dataset.from_list([{"prompt": message("user", row["prompt"]), "label": row["label"],
                                   "completion": message("assistant", row["completion"])} for row in rows])
        trainer = KTOTrainer(model=load(), ref_model=load(), args=KTOConfig(max_length=4096, **every),
                             train_dataset=data, processing_class=tokenizer)
        examples = [common.encode(tokenizer, row["prompt"], row["completion"], 4096) for row in rows]
    else:
        from trl import DPOConfig, DPOTrainer

        data = Dataset.from_list([{"prompt": message("user", row["prompt"]),
                                   "chosen": message("assistant", row["chosen"]),
                                   "rejected": message("assistant", row["rejected"])} for row in rows])
        every |= dict(sync_ref_model=True, ref_model_sync_steps=3, ref_model_mixup_alpha=1.0)
        trainer = DPOTrainer(model=load(), ref_model=load(), args=DPOConfig(max_length=4096, **every),
                             train_dataset=data, processing_class=tokenizer)
        examples = [common.encode(tokenizer, row["prompt"], row[side], 4096)
                    for row in rows for side in ("chosen", "rejected")]
    ends = []

    class Clock(TrainerCallback):  # the last callback: the sync is over
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    size = 2 * groups if method == "dpo" else 8 * groups if method == "grpo" else groups
    tokens = [sum(len(e.ids) for e in examples[i * size : (i + 1) * size]) for i in range(steps)]
    seconds = [b - a for a, b in zip(ends, ends[1:])]
    result = {"tokens_per_second": tokens[-1] / seconds[-1], "seconds": seconds[-1],
              "memory": peak_memory(spec["device"])}
    if method == "dpo":
        result["tokens_per_second_without_sync"] = tokens[1] / seconds[0]
    return result


def measure_usual(spec: dict) -> dict:
    """DPO as most codebases do it, with the script's own loss."""
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import humanline_dpo as script

    device = spec["device"]
    argv = ["--model", spec["model"], "--data", spec["data"], "--batch_size", BATCH["dpo"], "--eval_size", 0]
    args = script.parse_args([str(x) for x in argv])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    with contextlib.redirect_stdout(sys.stderr):
        rows = script.load_rows(args.data, None, functools.partial(script.encode_row, tokenizer, None, args))
    batches = script.make_batches(rows, args)[:2]
    policy = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32).to(device).eval()
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)

    def logps(model, examples):
        ids = pad_sequence([torch.tensor(e.ids) for e in examples], batch_first=True).to(device)  # (B, L)
        mask = pad_sequence([torch.arange(len(e.ids)) >= e.prompt_len for e in examples], batch_first=True)
        attention = pad_sequence([torch.ones(len(e.ids)) for e in examples], batch_first=True).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(ids, attention_mask=attention, use_cache=False).logits.float()  # (B, L, V)
        logp = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        return logp, mask[:, 1:].to(device)

    took = []
    for batch in batches:  # the first warms up
        started = time.perf_counter()
        examples = [example for row in batch for example in row.examples]  # chosen, rejected, …
        logp, mask = logps(policy, examples)
        with torch.no_grad():
            ref_logp, _ = logps(reference, examples)
        z = torch.where(mask, logp - ref_logp, 0.0).clamp(-1.5, 1.5)
        loss = script.dpo_loss(z, mask, args.beta).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        reference.load_state_dict(policy.state_dict())  # before the step
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - started)
    tokens = sum(len(e.ids) for row in batch for e in row.examples)
    return {"tokens_per_second": tokens / took[-1], "seconds": took[-1], "memory": peak_memory(device)}


MEASURES = {"ours": measure_ours, "trl": measure_trl, "usual": measure_usual, "profile": profile_ours}


def measure(side: str, **spec) -> dict:
    """Run one measurement in a new process."""
    argv = [sys.executable, __file__, "--one", side, json.dumps(spec, default=str)]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {side} {spec}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# --- the tables -----------------------------------------------------------------------------------------


def compare(method: str, shape: str, vocabulary: int, device: str, repeats: int, tokens: int | None = None) -> dict:
    """Ours, TRL and the usual way in turn."""
    sides = ("ours", "trl", "usual") if method == "dpo" else ("ours", "trl")  # the usual way is the same for all
    model, found = make_model(shape, vocabulary), {side: [] for side in sides}
    for repeat in tqdm(range(repeats), f"{method} {shape} {tokens or ''}", leave=False):
        rows = rows_for(method, repeat)
        if tokens:
            rows = synthetic(method, UPDATES * groups_in(method), tokens // 2)
        data = write(f"{method}.jsonl", rows)
        for side in found:
            found[side].append(measure(side, method=method, model=model, data=data, device=device,
                                       batch=BATCH[method], flags=OURS.get(device, {})))
    table = {side: {key: statistics.median(x[key] for x in many) for key in many[0]}
             for side, many in found.items()}
    for side in sides[1:]:
        table[f"speed over {side}"] = table["ours"]["tokens_per_second"] / table[side]["tokens_per_second"]
        table[f"memory over {side}"] = table["ours"]["memory"] / table[side]["memory"]
    if method == "dpo":
        without = table["trl"]["tokens_per_second_without_sync"]
        table["speed over trl without sync"] = table["ours"]["tokens_per_second"] / without
    return table


def show(name: str, table: dict) -> None:
    for side in [side for side in ("ours", "trl", "usual") if side in table]:
        row = table[side]
        more = f"  share of the floor {row['share']:.2f}  padded {row['padded']:.3f}" if side == "ours" else ""
        print(f"{name:14s}{side:8s}{row['tokens_per_second']:10,.0f} tokens/s{row['memory']:8.2f} GiB{more}")
    print("".join(f"  {key} {value:.2f}" for key, value in table.items() if " " in key), flush=True)


def growth(device: str) -> dict:
    """Seconds an update and memory, one thing varied at a time: DPO, hidden 128, 2 layers, prompts and
    responses of 128 tokens, 8 pairs, vocabulary 32,000, k = 1."""
    base = {"batch": 8, "vocabulary": 32_000, "sync_every": 1, "response": 128}
    varied = {"batch": (4, 8, 16, 32), "vocabulary": (8_000, 32_000, 128_000),
              "sync_every": (1, 8, 64), "response": (64, 256, 512)}
    table = {}
    for name, values in varied.items():
        table[name] = []
        for value in tqdm(values, f"growth: {name}", leave=False):
            now = base | {name: value}
            updates = 64 if name == "sync_every" else UPDATES
            rows = synthetic("dpo", updates * now["batch"], now["response"])
            found = measure("ours", method="dpo", model=make_model("small", now["vocabulary"]), device=device,
                            data=write("growth.jsonl", rows), batch=now["batch"], updates=updates,
                            whole=name == "sync_every",
                            flags=OURS["cpu"] | {"sync_every": now["sync_every"]})
            hidden, inner, layers, *_ = SHAPES["small"]
            weights = layers * (4 * hidden**2 + 3 * hidden * inner) + 2 * hidden * now["vocabulary"]
            beyond = found["memory"] - found["before"] - 16 * weights / 2**30
            table[name].append({"value": value, "seconds": found["seconds"], "tokens": found["tokens"],
                                "memory": found["memory"], "beyond": beyond})
    return table


def draw_growth(table: dict, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(10, 4.4), sharey="row")
    names = {"batch": "pairs in a batch", "vocabulary": "vocabulary", "sync_every": "k",
             "response": "tokens of a response"}
    for column, (name, rows) in enumerate(table.items()):
        x = [row["value"] for row in rows]
        top, bottom = axes[:, column]
        top.plot(x, [row["seconds"] for row in rows], "o-", color="#0072B2")
        bottom.plot(x, [row["memory"] for row in rows], "s--", color="#D55E00", label="whole process")
        bottom.plot(x, [row["beyond"] for row in rows], "^-", color="#009E73", label="beyond weights,\ngradients, AdamW")
        for axis in (top, bottom):
            axis.set_xscale("log", base=2)
            axis.set_xticks(x, [f"{v // 1000}k" if v >= 1000 else v for v in x])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        bottom.set_xlabel(names[name])
    for row, key in zip(axes, ("seconds", "memory")):  # all panels of a row have its scale
        row[0].set_ylim(0, 1.08 * max(x[key] for rows in table.values() for x in rows))
    axes[0, 0].set_ylabel("seconds an update")
    axes[1, 0].set_ylabel("peak memory, GiB")
    axes[1, 0].legend(fontsize=7)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "bench_growth.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", choices=[*KINDS, "profile", "growth"], help="some parts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data_dir", type=Path, help="folder of gsm8k_pairs.jsonl, _labels and _groups")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        torch.manual_seed(0)
        result = MEASURES[args.one[0]](json.loads(args.one[1]))
        return print(json.dumps(result))
    if args.data_dir:
        global DATA_DIR
        DATA_DIR = args.data_dir
    parts, path = args.only or [*KINDS, "profile", "growth"], RESULTS / f"bench_{args.device}.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    table |= {"command": "./run.sh bench", "repeats": args.repeats,
              "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"}
    if args.device == "cuda":
        table["machine"] += f", {torch.cuda.get_device_name()}"
    cases = [("cpu", 32_000, None)]
    if args.device == "cuda":
        cases = [(size, 151_936, tokens) for size in SIZES for tokens in (512, 2048)]
    for method in [name for name in KINDS if name in parts]:
        for shape, vocabulary, tokens in cases:
            name = method if args.device == "cpu" else f"{method} {shape} {tokens}"
            table[name] = compare(method, shape, vocabulary, args.device, args.repeats, tokens)
            show(name, table[name])
    if "profile" in parts:
        shape, vocabulary, tokens = cases[0]
        rows = synthetic("dpo", 64, tokens // 2) if tokens else rows_for("dpo", 0)
        table["profile"] = measure("profile", method="dpo", model=make_model(shape, vocabulary),
                                   data=write("dpo.jsonl", rows), device=args.device, batch=BATCH["dpo"])
        print("own time of operators in an update of DPO:", table["profile"]["shares"])
    if "growth" in parts:
        table["growth"] = growth(args.device)
        for name, rows in table["growth"].items():
            for row in rows:
                print(f"{name:12s}{row['value']:8d}{row['seconds']:8.2f} s{row['memory']:8.2f} GiB, "
                      f"{row['beyond']:.2f} beyond weights, gradients and AdamW")
        draw_growth(table["growth"], FIGURES)
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
