"""What gpu.py measures: memory against memory.py, updates against TRL and the peak, variants, sampling."""

import collections
import copy
import importlib
import importlib.util
import json
import statistics
import tempfile
from pathlib import Path
from unittest import mock

import torch
import transformers

import common
import memory
import toy_world
from gpu_checks import attempt, bf16, flags_for, now, random_model, record, save, shape_of, train, write_rows


# --- memory ----------------------------------------------------------------------------------------------------

def peak_of(work, *given) -> int:
    """Bytes that are allocated at most while work(…) runs."""
    torch.cuda.reset_peak_memory_stats()
    work(*given)
    return torch.cuda.max_memory_allocated()


def memory_step(args) -> None:
    """Peaks of each part, measured and as memory.py predicts. On a CPU, memory.py's Live measures in place of CUDA."""
    for size in ["0.5B", "1.5B"][: 1 if args.tiny else None]:
        attempt(args, size, memory_of, args, size)


def memory_of(args, size: str) -> dict:
    length, batch, prompt, response = (64, 4, 8, 8) if args.tiny else (2048, 64, 512, 64)
    config, model, cuda = shape_of(size, args), random_model(shape_of(size, args), args), args.device == "cuda"
    states = 16 * model.num_parameters()

    def compare(part, predicted, measured):
        ratio = measured / predicted
        record(args, f"{size}: {part}", ratio=ratio, GiB=measured / 2**30, predicted=predicted / 2**30,
               ok=abs(ratio - 1) <= 0.1)

    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer.step()
    if cuda:
        compare("weights, gradients, AdamW", states, torch.cuda.memory_allocated())
    for mode, checkpointed in memory.MODES.items():
        rows = 16 if checkpointed else 4 if size == "0.5B" else 2
        forward, *backward = memory.all_layers(config, memory.trace_update, checkpointed, rows, length)
        if checkpointed:
            memory.checkpoint(model)
        if cuda:
            examples, logps = [common.Example([1] * (8 + length), 8)] * rows, []
            found = [peak_of(lambda: logps.append(bf16(model, examples)))]
            found.append(peak_of(lambda: logps.pop().sum().backward()))
        else:
            live = memory.update_bytes(model, rows, length)
            found = [states + live[0], states + max(live[1:])]
        compare(f"{mode}, {rows * length} tokens, forward", states + forward, found[0])
        compare(f"{mode}, {rows * length} tokens, backward", states + max(backward), found[1])
    model.eval()
    peaks = memory.all_layers(config, memory.trace_sampling, batch, prompt, response)
    if cuda:
        prompts, tokenizer = [[5] * prompt] * batch, toy_world.make_tokenizer()
        found = peak_of(common.sample_responses, model, tokenizer, prompts, response, 0.7, batch)
    else:
        found = states + max(memory.sampling_bytes(model, batch, prompt, response))
    compare(f"sampling {batch}, {prompt} and {response} tokens", states + max(peaks), found)
    return {"parameters": model.num_parameters()}


# --- updates, sampling ------------------------------------------------------------------------------------------

def flops(config, tokens: float, sequences: int, response: int) -> float:
    """Of an update with k = 1: a response is trained (3 forwards) and scored (1). A forward takes 2 for each weight and
    token, the head on response tokens only, and causal attention 2 H a layer for each square of a length."""
    hidden, layers, inner = config.hidden_size, config.num_hidden_layers, config.intermediate_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    body = layers * (2 * hidden * (hidden + kv) + 3 * hidden * inner)
    head, attention = hidden * config.vocab_size * sequences * response, layers * hidden * tokens**2 / sequences
    return 4 * 2 * (body * tokens + head + attention)


def matrix_rate(args) -> float:
    """FLOP/s of a square bf16 product: the median of 15."""
    size, found = 256 if args.tiny else 8192, []
    a = torch.randn(size, size, device=args.device, dtype=torch.bfloat16)
    for _ in range(15):
        started = now(args)
        a @ a
        found.append(2 * size**3 / (now(args) - started))
    return statistics.median(found)


def peak_gib(args) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else 0.0


def measured(args, kind: str, argv: list[str], model) -> dict:
    """Medians of updates 2 to 4 of five: the first warms up, the last scores nothing for a next one."""
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    updates = train(kind, argv, model)
    tokens, seconds = (statistics.median(u[name] for u in updates[1:4]) for name in ("tokens", "seconds"))
    return {"tokens/s": tokens / seconds, "GiB": peak_gib(args), "seconds": seconds, "tokens": tokens,
            "log-ratio of update 1": updates[0]["abs_logratio"]}


def ours(args, kind: str, argv: list[str], model, response: int) -> dict:
    rate, found = matrix_rate(args), measured(args, kind, argv, model)
    work = flops(model.config, found["tokens"], 16, response)
    return found | {"share of the peak": work / found["seconds"] / rate, "peak TFLOP/s": rate / 1e12}


def kernels(args, profiler, seconds: float) -> dict:
    """Of a profile: the share of the time in which no kernel ran, and where the rest went. On a CPU, operators."""
    totals, busy, last = collections.Counter(), 0.0, 0.0
    on_cuda = torch.autograd.DeviceType.CUDA
    events = [e for e in profiler.events() if e.device_type == on_cuda and not e.is_user_annotation]
    for event in sorted(events, key=lambda e: e.time_range.start):
        totals[event.name[:100]] += event.time_range.elapsed_us()
        busy += max(0.0, event.time_range.end - max(last, event.time_range.start))
        last = max(last, event.time_range.end)
    if args.device == "cpu":
        totals.update({e.key: e.self_cpu_time_total for e in profiler.key_averages() if not e.is_user_annotation})
    every = sum(totals.values()) or 1
    top = {name: round(time / every, 3) for name, time in totals.most_common(10)}
    return {"idle": 1 - busy / 1e6 / seconds if args.device == "cuda" else None, "kernels": top}


def profiled(args, kind: str, argv: list[str], model) -> dict:
    """The second update: seconds in which a kernel runs, and in which none does; the ten largest kernels."""
    script, kinds, times = importlib.import_module(f"humanline_{kind}"), torch.profiler.ProfilerActivity, []
    inner = script.accumulate_gradient
    profiler = torch.profiler.profile(
        activities=[kinds.CPU] + [kinds.CUDA] * (args.device == "cuda"),
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=1, repeat=1))

    def accumulate_gradient(*given):
        times.append(now(args))
        profiler.step()
        return inner(*given)

    with mock.patch.object(script, "accumulate_gradient", accumulate_gradient), profiler:
        train(kind, argv, model)
    return {"seconds": times[2] - times[1]} | kernels(args, profiler, times[2] - times[1])


def train_trl(args, kind: str, path: Path, batch: int, per_device: int, model) -> dict:
    """TRL's trainer on the same rows in the same order, syncing at every step; the first of four updates warms up."""
    import trl
    from datasets import Dataset

    tokenizer, rows = toy_world.make_tokenizer(), [json.loads(line) for line in open(path)]
    model, ended = copy.deepcopy(model).train(), []
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rows = rows[: 4 * batch // (1 if kind == "dpo" else 4)]
    as_messages, own, more = common.as_messages, {"max_length": 4096}, {}
    columns = ("prompt", "chosen", "rejected") if kind == "dpo" else ("prompt",)
    data = [{name: as_messages(row[name], "user" if name == "prompt" else "assistant", name) for name in columns}
            for row in rows]
    examples = [common.encode(tokenizer, row["prompt"], text, 4096)
                for row in rows for text in row.get("completions", [row.get("chosen"), row.get("rejected")])]
    given = iter(examples)

    def rollout(prompts, trainer):
        some = [next(given) for _ in prompts]  # they are asked for in order
        return {"prompt_ids": [ids[:cut] for ids, cut in some], "completion_ids": [ids[cut:] for ids, cut in some],
                "logprobs": None}

    if kind == "grpo":
        own = {"num_generations": 4, "max_completion_length": 4096, "beta": 1e-4, "shuffle_dataset": False}
        more = {"rollout_func": rollout, "reward_funcs": lambda prompts, **_: [i % 4 for i in range(len(prompts))]}
    config = getattr(trl, f"{kind.upper()}Config")(
        output_dir=tempfile.mkdtemp(dir=args.folder), max_steps=4, per_device_train_batch_size=per_device,
        gradient_accumulation_steps=batch // per_device, sync_ref_model=True, ref_model_sync_steps=1,
        ref_model_mixup_alpha=1.0, use_cpu=args.device == "cpu", bf16=args.device == "cuda",
        gradient_checkpointing=False, train_sampling_strategy="sequential", logging_strategy="no", disable_tqdm=True,
        report_to=[], save_strategy="no", **own)

    class Clock(transformers.TrainerCallback):  # the last callback: the sync is over
        def on_step_end(self, *_, **__):
            ended.append(now(args))

    module = importlib.import_module(f"trl.trainer.{kind}_trainer")
    with mock.patch.object(module, "create_model_from_path", lambda *_, **__: copy.deepcopy(model)):
        trainer = getattr(trl, f"{kind.upper()}Trainer")(
            model=model, args=config, train_dataset=Dataset.from_list(data), processing_class=tokenizer, **more)
    trainer.add_callback(Clock())
    trainer.train()
    seconds = statistics.median(end - begin for begin, end in zip(ended, ended[1:]))
    tokens = sum(len(ids) for ids, _ in examples) / 4
    return {"tokens/s": tokens / seconds, "GiB": peak_gib(args), "seconds": seconds}


def speed(args) -> None:
    has_trl, config = importlib.util.find_spec("trl") is not None, None
    record(args, "TRL", version=importlib.import_module("trl").__version__ if has_trl else "not there")
    cases = [(size, response) for size in ("1.5B", "0.5B") for response in (512, 2048)]
    for size, response in [("tiny", 16)] if args.tiny else cases:
        if config is None or response == 512:  # the next size: the other one goes
            config, model = shape_of(size, args), None
            model = random_model(config, args)
        for kind, batch in {"dpo": 8, "grpo": 16}.items():  # 16 responses
            rows = write_rows(args, kind, 5 * 8, 8 if args.tiny else 128, response, response)
            argv = flags_for(args, save(args, config, weights=False), rows, 5, batch_size=batch, max_length=4096,
                             micro_tokens=8192)
            name = f"{size} {response} {kind}"
            attempt(args, f"{name}, ours", ours, args, kind, argv, model, response)
            if kind == "dpo" and response < 2048:
                attempt(args, f"{name}, profile", profiled, args, kind, argv, model)
            for each in (2,) if args.tiny else (1, 2, 4):
                if has_trl:
                    attempt(args, f"{name}, TRL, {each} a device", train_trl, args, kind, rows, batch, each, model)


def variants(args) -> None:
    config = shape_of("1.5B", args)
    model, folder = random_model(config, args), save(args, config, weights=False)
    rows = write_rows(args, "dpo", 40, 8, 16, 32) if args.tiny else write_rows(args, "dpo", 40, 128, 128, 1024)
    options = {"backend": "eager"} if args.device == "cpu" else {}

    def run():
        argv = flags_for(args, folder, rows, 5, batch_size=8, max_length=2048, micro_tokens=8192)
        return measured(args, "dpo", argv, model)

    attempt(args, "as it is", run)
    settings = {"BLOCK_BYTES": (2**26, 2**28, 2**30), "MAX_PADDING": (0, 512, 4096)}
    # transformers gives a compiled model a mask, which turns flash attention off; not so compiled layers.
    compiled = {"layers": list(model.base_model.layers), "model": [model.base_model]}
    if args.tiny:  # to compile takes seconds
        settings, compiled = {"BLOCK_BYTES": (2**12,), "MAX_PADDING": (0,)}, {"layer": [model.base_model.layers[0]]}
    for name, values in settings.items():
        for value in values:
            with mock.patch.dict(getattr(common, name), {args.device: value}):
                attempt(args, f"{name} {value}", run)
    for name, parts in compiled.items():
        for part in parts:
            part.compile(dynamic=True, **options)
        attempt(args, f"compiled {name}", run)
        for part in parts:
            part._compiled_call_impl = None


def sampling(args) -> None:
    model, tokenizer = random_model(shape_of("0.5B", args), args), toy_world.make_tokenizer()
    prompt, new, few = (4, 8, 4) if args.tiny else (128, 512, 64)

    def sample(batch, tokens):
        started = now(args)
        examples, _ = common.sample_responses(model, tokenizer, [[5] * prompt] * batch, tokens, 1.0, batch)
        return sum(len(ids) - cut for ids, cut in examples) / (now(args) - started)

    def run(batch):
        sample(batch, 2)
        found = {"tokens/s": sample(batch, new)}
        kinds = torch.profiler.ProfilerActivity  # kernels alone: to watch the CPU would slow it down
        with torch.profiler.profile(activities=[kinds.CUDA if args.device == "cuda" else kinds.CPU]) as profiler:
            started = now(args)
            sample(batch, few)
            seconds = now(args) - started
        return found | kernels(args, profiler, seconds)

    for batch in (2, 4) if args.tiny else (64, 128, 256):
        attempt(args, f"--gen_batch {batch}", run, batch)
