"""Tokens per second, memory and share of the hardware's floor on a CPU, against TRL at its best.

    ./run.sh bench                                              all of it, at most an hour on 2 cores
    .venv/bin/python tests/experiments/bench.py --only dpo      a part: dpo, kto, grpo

The model has SmolLM2-135M's shape (30 layers, hidden size 576, 9 heads and 3 of keys and values, inner size 1,536, a
tied vocabulary of 49,152), random weights, float32. The data are GSM8K's (../shared/data or --data_dir; else random
characters of about its lengths), tokenized by a BPE of 4,000 that takes digits one by one: some 190 tokens for a
prompt and a response. k = 1 on both sides: the reference is synced at every update.

Each measurement is a process of its own: one update of BATCH rows warms up, the next is timed. Both sides train on
the same batches in the same order. Tokens are those of prompts and responses, without padding, each trained
response counted once with its prompt. Memory is the process's peak RSS. Ours has --micro_tokens 640.

TRL's DPOTrainer, KTOTrainer and GRPOTrainer (whose rollout_func returns the fixed completions: nothing is generated)
run with the per-device batches of PER_DEVICE, accumulated to the same update: one update each finds the fastest and
the lightest, which take turns with ours, and medians count. Each trainer syncs its reference model (sync_ref_model)
and logs nothing; gradient checkpointing is off on both sides. Padding-free batches want flash attention, which no
CPU has.
"""

import argparse
import contextlib
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
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import common  # noqa: E402

KINDS = {"dpo": "pairs", "kto": "labels", "grpo": "groups"}
BATCH = {"dpo": 6, "kto": 12, "grpo": 12}  # of an update, as --batch_size counts: pairs, labels, responses
GROUP = 4  # GRPO's responses to a prompt
# TRL's per-device batches. KTO's are twice as large: TRL pairs a prompt with another's response of its per-device
# batch, for the KL estimate, and refuses a batch of 1.
PER_DEVICE = {"dpo": (1, 2), "kto": (2, 4), "grpo": (1, 2, 4)}
MICRO_TOKENS, MAX_LENGTH = 640, 1024
MODEL = WORK / "smollm2-shape"
SMOLLM2 = dict(vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
               num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=8192, rope_theta=100_000.0)


# --- the model and the data ---------------------------------------------------------------------------

def make_model(shape: dict, folder: Path) -> None:
    """A folder with a Llama of random weights and a BPE tokenizer of at most 4,000 tokens."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    path = DATA_DIR / "gsm8k_pairs.jsonl"
    rows = read(path) if path.exists() else []
    texts = [row[name] for row in rows for name in ("prompt", "chosen", "rejected")]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=4000, special_tokens=["<pad>", "<end>", "<user>", "<assistant>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = ("{% for m in messages %}<{{m['role']}}>{{m['content']}}<end>{% endfor %}"
                               "{% if add_generation_prompt %}<assistant>{% endif %}")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**shape, eos_token_id=1, pad_token_id=0, bos_token_id=None)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in open(path, encoding="utf-8")]

def data_for(method: str, seed: int) -> Path:
    """A file with the rows of three updates: of GSM8K, other ones for each seed, the same for both sides."""
    path, rng = DATA_DIR / f"gsm8k_{KINDS[method]}.jsonl", random.Random(seed)
    count = 3 * BATCH[method] // (GROUP if method == "grpo" else 1)
    rows = rng.sample(read(path), count) if path.exists() else made_up(method, count, rng)
    if method == "grpo":
        rows = [row | {name: row[name][:GROUP] for name in ("completions", "rewards")} for row in rows]
    file = WORK / f"{method}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file

def made_up(method: str, count: int, rng: random.Random, prompt=63, response=125, spread=0.5) -> list[dict]:
    """Rows with random characters, each a token: of about GSM8K's lengths, each up to `spread` of them off."""
    rows = []
    for i in range(count):
        sizes = [int(mean * rng.uniform(1 - spread, 1 + spread)) for mean in (prompt, *[response] * GROUP)]
        question, *texts = ["".join(rng.choices("abcdefgh", k=size)) for size in sizes]
        more = {"dpo": {"chosen": texts[0], "rejected": texts[1]}, "kto": {"completion": texts[0], "label": i % 2 == 0},
                "grpo": {"completions": texts, "rewards": [*range(GROUP)]}}[method]
        rows.append({"prompt": question} | more)
    return rows


# --- one measurement, in a process of its own -----------------------------------------------------------

class Enough(Exception):
    """All is measured: no last scoring, no checkpoint."""

def peak_memory() -> float:  # GiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30

def matrix_rate(size=1024, **how) -> float:
    """FLOP/s of a square product, of float32 on the CPU if `how` does not say otherwise: the median of 15."""
    a, seconds = torch.randn(size, size, **how), []
    for _ in range(15):
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds)

def script_for(spec: dict) -> tuple:
    """The method's script and its arguments: updates to warm up and to time, and one more that is not finished."""
    script = importlib.import_module(f"humanline_{spec['method']}")
    flags = {"model": spec["model"], "data": spec["data"], "output_dir": WORK / "ours", "batch_size": spec["batch"],
             "steps": max(3, spec.get("updates", 3)), "micro_tokens": MICRO_TOKENS, "max_length": MAX_LENGTH,
             "sync_every": 1, "eval_size": 0, "save_every": 0, "device": spec.get("device", "cpu")}
    argv = [str(x) for name, value in flags.items() for x in (f"--{name}", value)]
    return script, script.parse_args([*argv, "--overwrite"])

def run_script(script, args, before_update, end=3) -> None:
    """The script's main, with before_update(number, batch) before each update; that with number `end` is not made."""
    accumulate_gradient, begun = script.accumulate_gradient, []

    def update(model, batch, *given):
        begun.append(batch)
        before_update(len(begun), batch)
        if len(begun) == end:
            raise Enough
        return accumulate_gradient(model, batch, *given)

    script.accumulate_gradient = update
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(Enough):
        script.main(args)
    script.accumulate_gradient = accumulate_gradient

def measure_ours(spec: dict) -> dict:
    """Of the second update, from its beginning to the next's: training, scoring of the next batch, the step."""
    script, args = script_for(spec)
    rate, began, batches = matrix_rate(), [], []

    def before_update(number, batch):
        began.append(time.perf_counter())
        batches.append([row._replace(ref_logp=None) for row in batch])

    run_script(script, args, before_update)
    memory, seconds, batch = peak_memory(), began[2] - began[1], batches[1]
    rate, config = (rate + matrix_rate()) / 2, script.AutoConfig.from_pretrained(spec["model"])
    lengths = [len(example.ids) for row in batch if not is_mismatched(row) for example in row.examples]
    return {"tokens_per_second": sum(lengths) / seconds, "seconds": seconds, "memory": memory, "tokens": sum(lengths),
            "length": statistics.fmean(lengths), "share": floor(batch, config, rate) / seconds,
            "matrix_rate": rate, "padded": padded_share(batch, args.micro_tokens)}

def is_mismatched(row) -> bool:
    """KTO's pairs of a prompt and another's response, for the KL estimate."""
    return getattr(row, "desirable", True) is None

def padded_share(batch: list, micro_tokens: int) -> float:
    """Share of padding in an update's forwards, which are cut as the scripts' policy_logps cuts them."""
    tokens = padded = 0
    for mismatched in (True, False):
        units = [row.examples for row in batch if is_mismatched(row) == mismatched]
        for micro in common.micro_batches(units, micro_tokens, "cpu"):
            lengths = [len(example.ids) for i in micro for example in units[i]]
            tokens, padded = tokens + sum(lengths), padded + len(lengths) * max(lengths)
    return 1 - tokens / padded

def floor(batch: list, config, rate: float) -> float:
    """Seconds that an update cannot go below at k = 1, from its matrix products: each response is trained
    (3 × a forward) and scored once (1 ×), KTO's mismatched pairs are scored by policy and reference (2 ×). A
    forward takes 2 FLOPs for each weight and token, the head on response tokens only, and causal attention 2 H a
    layer for each square of the length."""
    hidden, layers, inner = config.hidden_size, config.num_hidden_layers, config.intermediate_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    body = layers * (2 * hidden * (hidden + kv) + 3 * hidden * inner)
    flops = 0
    for row in batch:
        for example in row.examples:
            length, trained = len(example.ids), len(example.ids) - example.prompt_len
            forward = 2 * body * length + 2 * layers * hidden * length**2 + 2 * hidden * config.vocab_size * trained
            flops += forward * (2 if is_mismatched(row) else 4)
    return flops / rate

def measure_trl(spec: dict) -> dict:
    """Of spec["updates"] updates, without the first if there are more, on the batches that ours trains on."""
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    method, (script, args) = spec["method"], script_for(spec)
    tokenizer = script.AutoTokenizer.from_pretrained(spec["model"])
    with contextlib.redirect_stdout(sys.stderr):
        rows, _, _ = script.load_rows(args.data, None, tokenizer, True, args)  # True: it keeps their texts
    batches = script.make_batches(rows, tokenizer, args)[: spec["updates"]]
    rows = [row for batch in batches for row in batch]
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant", "completion": "assistant"}

    def columns(row: dict) -> dict:
        texts = {name: [{"role": role, "content": row[name]}] for name, role in roles.items() if name in row}
        return texts | ({"label": row["label"]} if "label" in row else {})

    given = iter(rows)

    def rollout(prompts, trainer):
        examples = [next(given).examples[0] for _ in prompts]  # they are asked for in order
        return {"prompt_ids": [[*example.prompt] for example in examples], "logprobs": None,
                "completion_ids": [example.response for example in examples]}

    own, more = dict(max_length=MAX_LENGTH), {}
    if method == "grpo":
        own = dict(num_generations=GROUP, max_completion_length=MAX_LENGTH, beta=1e-4, shuffle_dataset=False)
        more = dict(rollout_func=rollout, reward_funcs=lambda prompts, **_: [i % GROUP for i in range(len(prompts))])
    config = getattr(trl, f"{method.upper()}Config")(
        output_dir=str(WORK / "trl"), max_steps=spec["updates"], per_device_train_batch_size=spec["per_device"],
        gradient_accumulation_steps=spec["batch"] // spec["per_device"], sync_ref_model=True, ref_model_sync_steps=1,
        ref_model_mixup_alpha=1.0, use_cpu=args.device == "cpu", bf16=args.device == "cuda",
        gradient_checkpointing=False, train_sampling_strategy="sequential", logging_strategy="no", disable_tqdm=True,
        report_to=[], save_strategy="no", **own)
    trainer = getattr(trl, f"{method.upper()}Trainer")(
        model=script.AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32), args=config,
        train_dataset=Dataset.from_list([columns(row.source) for row in rows[:: GROUP if method == "grpo" else 1]]),
        processing_class=tokenizer, **more)
    ended = []

    class Clock(TrainerCallback):  # the last callback: the sync is over
        def on_step_end(self, *_, **__):
            if args.device == "cuda":
                torch.cuda.synchronize()
            ended.append(time.perf_counter())

        on_train_begin = on_step_end

    trainer.add_callback(Clock())
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    warm_up = 1 if len(batches) > 1 else 0
    tokens = sum(len(e.ids) for batch in batches[warm_up:] for row in batch for e in row.examples)
    seconds = ended[-1] - ended[warm_up]
    return {"tokens_per_second": tokens / seconds, "seconds": seconds, "memory": peak_memory(), "tokens": tokens}


MEASURES = {"ours": measure_ours, "trl": measure_trl}

def measure(side: str, method: str, data: Path, **more) -> dict:
    """Run one measurement in a new process."""
    spec = {"method": method, "model": str(MODEL), "data": str(data), "batch": BATCH[method]} | more
    started = time.perf_counter()
    print(f"  {method} {side} {more or ''} …", end="", flush=True)
    done = subprocess.run([sys.executable, __file__, "--one", side, json.dumps(spec)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"\nerror: {side} {spec}\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    shown = {name: float(f"{x:.4g}") if type(x) is float else x for name, x in found.items()}
    print(f" {time.perf_counter() - started:.0f} s: {shown}", flush=True)
    return found

def fastest_and_lightest(trl: dict[int, dict]) -> tuple[int, int]:  # per-device batches
    return max(trl, key=lambda size: trl[size]["tokens_per_second"]), min(trl, key=lambda size: trl[size]["memory"])

def medians(many: list[dict]) -> dict:
    return {key: statistics.median(x[key] for x in many) for key in many[0]} | {"processes": len(many)}

def table_of(ours: list[dict], screened: dict[int, dict], finals: dict[int, list[dict]]) -> dict:
    """Medians; ours over TRL's fastest and lightest of those that took turns with it."""
    mine, final = medians(ours), {size: medians(many) for size, many in finals.items()}
    fastest, lightest = fastest_and_lightest(final)
    return {"ours": mine, "trl": {size: medians([found]) for size, found in screened.items()} | final,
            "fastest": fastest, "lightest": lightest,
            "speed over trl": mine["tokens_per_second"] / final[fastest]["tokens_per_second"],
            "memory over trl": mine["memory"] / final[lightest]["memory"]}

def compare(method: str, repeats: int) -> dict:
    """TRL's per-device batches once each, then ours and TRL's fastest and lightest in turn."""
    screened = {size: measure("trl", method, data_for(method, 0), per_device=size, updates=1)
                for size in PER_DEVICE[method]}
    ours, finals = [], {size: [] for size in fastest_and_lightest(screened)}
    for seed in range(repeats):
        ours.append(measure("ours", method, data_for(method, seed)))
        for size, found in finals.items():
            found.append(measure("trl", method, data_for(method, seed), per_device=size, updates=2))
    table = table_of(ours, screened, finals)
    print({name: table[name] for name in table if name not in ("ours", "trl")}, flush=True)
    return table

def main() -> None:
    global DATA_DIR
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", nargs="*", choices=KINDS, default=[*KINDS], help="some parts")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each that take turns")
    parser.add_argument("--data_dir", type=Path, default=DATA_DIR, help="of gsm8k_pairs.jsonl, _labels and _groups")
    parser.add_argument("--out", type=Path, default=RESULTS, help="an existing folder for bench_cpu.json")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        torch.manual_seed(0)
        return print(json.dumps(MEASURES[args.one[0]](json.loads(args.one[1]))))
    DATA_DIR, path, started = args.data_dir, args.out / "bench_cpu.json", time.perf_counter()
    WORK.mkdir(parents=True, exist_ok=True)
    make_model(SMOLLM2, MODEL)
    table = json.loads(path.read_text()) if path.exists() else {}
    table |= {"command": "./run.sh bench", "repeats": args.repeats, "GSM8K": DATA_DIR.exists(),
              "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"}
    for part in args.only:
        print(f"{part}, after {(time.perf_counter() - started) / 60:.0f} minutes", flush=True)
        table[part] = compare(part, args.repeats)
        path.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
