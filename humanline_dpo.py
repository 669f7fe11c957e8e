r"""Humanline DPO: direct preference optimization on fixed pairs that learns as if they were fresh.

Paper: "Humanline: Online Alignment as Perceptual Loss" (arXiv 2509.24207), on top of DPO (Rafailov
et al. 2023, arXiv 2305.18290). People misjudge how likely outcomes are, and fresh samples of the
policy happen to carry that bias: put it into the loss, and fixed data will do. A clamp is such a
perception at its simplest: what lies beyond the bounds is seen as on them, and moves nothing.

  clipping  every token's log-ratio is clamped to [log ε_P, log ε_R] before anything is summed;
  syncing   every k updates the reference becomes the policy as it was just before the update.

    z_t = clamp( log π_θ(y_t | x, y_<t) − log π_ref(y_t | x, y_<t), log ε_P, log ε_R )
    L   = −log σ( β [ Σ_t z_t(chosen) − Σ_t z_t(rejected) ] ),  mean over the pairs of an update

    update            1  2  3  4  5      (policy that trains; reference that it meets, as numbers
    policy            0  1  2  3  4       of updates made)
    reference, k = 1  0  0  1  2  3
    reference, k = 2  0  0  1  1  3
    reference, k = 0  0  0  0  0  0      with --sample_every: the policy that wrote the samples

  log π_θ, π_ref  logp, ref_logp        (B, T)  of B sequences' T response tokens, nats
                  mask                  (B, T)  true on response tokens, their end included
  log r_θ         logratio              (B, T)  log π_θ − log π_ref, the token's surprisal
  z               perceived             (B, T)  the log-ratio as a human would see it
  log ε_P, ε_R    log_eps_P, log_eps_R  bounds. P: the Policy finds it too unlikely; R: Reverse
  k, β            sync_every, beta      updates between syncs; inverse temperature

Departures from the authors' code: means are over the whole update, however it is cut; M_P and M_R
are per response; the reference lags one update on one GPU too (theirs aliases the live weights: the
method is off); k is counted anew when new samples are written.
    python humanline_dpo.py --model Qwen/Qwen2.5-1.5B-Instruct
    (update 1 has loss 0.6931 and unclipped 1: its own reference. --plain is the baseline.)
"""

import argparse
import functools
import json
import math
import random
import resource
import runpy
import sys
import time
from collections import Counter, deque
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from datasets import load_dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common import BadInput, Example, check_model, encode, encode_prompt, errors_in
from common import micro_batches, prompt_in, response_logps, sample_responses

# === 1. Perception: how a human would see each token's log-ratio ===
def perceive(logratio: Tensor, mask: Tensor, mode: str, log_eps_P: float, log_eps_R: float,
             gamma_P: float, gamma_R: float, beta_P=1.0, beta_R=1.0) -> tuple:
    """Humanline clipping or sampling (paper, section 4), upstream of any loss.

    logratio, mask: (B, T), nats. Returns the perceived log-ratio (B, T), 0 on padding, and which
    tokens lost their gradient on the low (P) and the high (R) side, (B, T) bool. "clip": clamped,
    the gradient is 0 outside the bounds, 1 inside. "sample", of which that is the limit (theorem
    4.3): a token keeps its value but no gradient if π_θ/π_ref < M_P B_P or π_ref/π_θ < M_R B_R,
    with draws B ~ Beta(γ, β) per token, M the response's largest such ratio.
    """
    z = torch.where(mask, logratio, 0.0)  # masked first: padding meets no clamp, no exp
    if mode == "off":
        return z, torch.zeros_like(mask), torch.zeros_like(mask)
    if mode == "clip":
        return z.clamp(log_eps_P, log_eps_R), mask & (z < log_eps_P), mask & (z > log_eps_R)
    def too_low(value, gamma, beta):  # a draw that underflows is below all
        draws = torch.distributions.Beta(*value.new_tensor([gamma, beta])).sample(value.shape)
        log_M = value.masked_fill(~mask, -math.inf).amax(-1, keepdim=True)  # (B, 1)
        return mask & (value < log_M + draws.log())

    low, high = too_low(z.detach(), gamma_P, beta_P), too_low(-z.detach(), gamma_R, beta_R)
    return torch.where(low | high, z.detach(), z), low, high


# === 2. Loss ===
def dpo_loss(logratio: Tensor, mask: Tensor, beta: float) -> Tensor:
    """DPO (Rafailov et al. 2023, equation 7) of perceived log-ratios.

    logratio, mask: (B, T), nats; rows are chosen, rejected, chosen, rejected, … Returns the loss of
    each pair, (B/2,).
    """
    reward = beta * torch.where(mask, logratio, 0.0).sum(-1)  # (B,)
    return -F.logsigmoid(reward[0::2] - reward[1::2])


# === 3. The reference: no second model, but the policy's log-probs, frozen at a sync ===
class Row(NamedTuple):
    examples: list[Example]  # [chosen, rejected]; of a prompt for rollouts one, without response
    source: dict | None = None  # the row of the data, for the reward
    ref_logp: list[Tensor] | None = None  # for each example (T,) on the CPU, nats

    @property
    def prompt(self) -> tuple[int, ...]:
        return tuple(self.examples[0].ids[: self.examples[0].prompt_len])


def policy_logps(model, batch: list[Row], args):
    """By micro-batch: its rows (indices), logp and mask (B, T). Scoring and training both cut here:
    where the policy has not moved, log-ratios are exactly 0. Precision: matrix products are bf16 on
    CUDA; weights, gradients, AdamW and log-softmax float32."""
    temperature = args.temperature if args.sample_every else 1.0  # as the samples were drawn
    units = [row.examples for row in batch]
    for micro in micro_batches(units, args.micro_tokens, args.device):
        examples = [example for i in micro for example in batch[i].examples]
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            logp, mask = response_logps(model, examples, temperature)  # (B, T)
        yield micro, logp, mask


@torch.no_grad()
def score(model, batch: list[Row], args) -> list[Row]:
    """The batch with ref_logp: what the policy as it is now thinks of its responses."""
    scored = list(batch)
    for micro, logp, mask in policy_logps(model, batch, args):
        lines = iter([row[real] for row, real in zip(logp.cpu(), mask.cpu())])
        for i in micro:
            ref_logp = [next(lines) for _ in batch[i].examples]
            scored[i] = batch[i]._replace(source=None, ref_logp=ref_logp)
    return scored


def next_window(model, queue: deque, rollouts, more: int, args) -> deque:
    """The next k batches (k = 0: all), scored by the policy; if none is left, it samples more."""
    if not queue and more:
        queue.extend(sample_batches(model, rollouts, more, args))
    taken = [queue.popleft() for _ in range(min(args.sync_every or len(queue), len(queue)))]
    return deque(score(model, x, args) for x in tqdm(taken, "scoring", leave=False, delay=2))


# === 4. One update ===
def accumulate_gradient(model, batch: list[Row], mode: str, args) -> dict[str, float]:
    """Forward and backward of one update; returns its metrics."""
    pairs = len(batch)  # means are over the whole update, however it is cut
    tokens = sum(len(e.ids) - e.prompt_len for row in batch for e in row.examples)
    sums = Counter(tokens=sum(len(e.ids) for row in batch for e in row.examples))
    for micro, logp, mask in policy_logps(model, batch, args):
        ref_logp = pad_sequence([x for i in micro for x in batch[i].ref_logp], batch_first=True)
        logratio = logp - ref_logp.to(args.device, non_blocking=True)  # (B, T)
        # Humanline clipping: one clamp of each token's log-ratio, before the loss sees it.
        perceived, low, high = perceive(
            logratio, mask, mode, args.log_eps_P, args.log_eps_R, args.gamma_P, args.gamma_R)
        losses = dpo_loss(perceived, mask, args.beta)  # (B/2,)
        if torch.is_grad_enabled():  # not in an evaluation
            (losses.sum() / pairs).backward()
        reward = args.beta * perceived.detach().sum(-1)  # (B,)
        margin = reward[0::2] - reward[1::2]
        sums.update({
            "loss": losses.detach().sum() / pairs,
            "reward_chosen": reward[0::2].sum() / pairs,
            "reward_rejected": reward[1::2].sum() / pairs,
            "margin": margin.sum() / pairs,
            "accuracy": margin.heaviside(margin.new_tensor(0.5)).sum() / pairs,  # a tie counts ½
            "unclipped": (mask & ~low & ~high).sum() / tokens,
            "clipped_low": low.sum() / tokens,
            "clipped_high": high.sum() / tokens,
            "abs_logratio": torch.where(mask, logratio.detach(), 0.0).abs().sum() / tokens,
        })
    return {name: float(value) for name, value in sums.items()}


# === 5. Data ===
def load_rows(source: str, limit: int | None, read: Callable) -> list[Row]:
    """The first rows of a file or of a Hub data set id[:config[:split]], as tokens."""
    name, config, split = (source.split(":") + ["", ""])[:3]
    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(Path(source).suffix)
    options = {"data_files": source} if kind else {"name": config or None}
    with errors_in(f"{source}: missing, empty or broken"):
        data = [*load_dataset(kind or name, split=split or "train", **options)][:limit]
    rows, dropped = [], 0
    for number, row in enumerate(tqdm(data, "reading", leave=False, delay=2), 1):
        with errors_in(f"{source}: row {number} (columns {', '.join(row)})"):
            found = read(row)
        rows += found
        dropped += not found
    print(f"{source}: {len(rows)} rows; {dropped} dropped: too long or nothing to learn")
    return rows


def encode_row(tokenizer, reward, args, row: dict) -> list[Row]:
    """{prompt, chosen, rejected}, or two whole dialogues, as tokens; [] is a row to drop."""
    pair = [encode(tokenizer, prompt_in(row), row.get(name), args.max_length, args.raw,
                   args.system_prompt, name) for name in ("chosen", "rejected")]
    if None in pair or pair[0] == pair[1]:
        return []
    if Row(pair).prompt != Row(pair[::-1]).prompt:
        raise BadInput("chosen and rejected have different prompts")
    return [Row(pair, source=row)]


def hold_out(rows: list[Row], others: list[Row], args) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and those held out, of others if any; no prompt is in both."""
    prompts = list(dict.fromkeys(row.prompt for row in others or rows))
    size = len(prompts) if others else min(128, len(prompts) // 20)
    size = size if args.eval_size is None else min(args.eval_size, len(prompts))
    held_out = set(random.Random(args.seed).sample(prompts, size))
    kept = [row for row in rows if row.prompt not in held_out]
    print(f"{len(kept)} rows to train on, {size} prompts held out")
    return kept, [row for row in others or rows if row.prompt in held_out]


def make_batches(rows: list[Row], args) -> list[list[Row]]:
    """All batches of the run; each epoch has its order and drops a ragged last batch."""
    loader = DataLoader(rows, args.batch_size, shuffle=True, drop_last=True, collate_fn=list,
                        generator=torch.Generator().manual_seed(args.seed))
    epochs = math.ceil(args.steps / len(loader)) if args.steps else args.epochs
    return [batch for _ in range(epochs) for batch in loader][: args.steps]


# === 6. Rollouts: the policy writes responses, a reward scores them ===
def encode_prompt_row(tokenizer, reward, args, row: dict) -> list[Row]:
    """The prompt of a row as tokens; [] is a row to drop."""
    ids, *_ = encode_prompt(tokenizer, prompt_in(row), args.raw, args.system_prompt)
    usable = getattr(reward, "usable", bool)(row)  # can it read the row's answer
    fits = len(ids) + args.max_new_tokens <= args.max_length
    return [Row([Example(ids, len(ids))], source=row)] if usable and fits else []


def roll_out(model, rollouts, rows: list[Row], temperature: float, args) -> tuple:
    """Examples, texts, rewards: one for each prompt. The reward is called as TRL calls it."""
    ids, prompts = [list(row.prompt) for row in rows], [prompt_in(row.source) for row in rows]
    examples, texts = sample_responses(model, rollouts.tokenizer, ids, args.max_new_tokens,
                                       temperature, args.gen_batch, args.raw)
    answers = [text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
               for prompt, text in zip(prompts, texts)]
    columns = {name: [row.source[name] for row in rows] for name in rows[0].source
               if name not in ("prompt", "prompts", "completion", "completions")}
    with errors_in(f"--reward {args.reward}"):
        rewards = rollouts.reward(prompts=prompts, completions=answers, **columns)
        bad = [i for i, x in enumerate(rewards) if x is None or not math.isfinite(x)]
        if bad or len(rewards) != len(texts):
            raise BadInput(f"{len(rewards)} for {len(texts)} responses, not finite: {bad[:9]}")
    return examples, texts, [float(x) for x in rewards]


def sample_batches(model, rollouts, count: int, args) -> list[list[Row]]:
    """Batches that the policy writes now; prompts are drawn in turn, round and round."""
    rows, start, wanted, size = [], rollouts.cursor, count * args.batch_size, args.group_size
    while len(rows) < wanted:
        if rollouts.cursor - start > 20 * wanted:
            raise BadInput(f"--reward {args.reward}: rewards are equal within groups")
        groups = wanted - len(rows)  # some give no pair
        prompts = [rollouts.prompts[(rollouts.cursor + i) % len(rollouts.prompts)]
                   for i in range(groups) for _ in range(size)]
        rollouts.cursor += groups
        examples, _, rewards = roll_out(model, rollouts, prompts, args.temperature, args)
        for i in range(0, len(prompts), size):
            rows += rows_of_group(examples[i : i + size], rewards[i : i + size])
    return [rows[i : i + args.batch_size] for i in range(0, wanted, args.batch_size)]


def rows_of_group(examples: list[Example], rewards: list[float]) -> list[Row]:
    best, worst = rewards.index(max(rewards)), rewards.index(min(rewards))
    return [Row([examples[best], examples[worst]])] if rewards[best] > rewards[worst] else []


# === 7. Evaluation ===
EVALUATED = ("loss", "accuracy", "margin")
SHOWN = ("step", *EVALUATED, "unclipped", "abs_logratio", "grad_norm", "tokens_per_second")


def evaluate(model, rows: list[Row], rollouts, step: int, args) -> dict[str, float]:
    """Held-out rows, unclipped, against the *initial* policy (so all k compare); rewards."""
    with torch.no_grad():
        metrics = accumulate_gradient(model, rows, "off", args) if rows else {}
    metrics = {f"eval_{name}": metrics[name] for name in EVALUATED if rows}
    modes = {"greedy": 0.0, "sampled": args.temperature} if rollouts.held_out else {}
    for mode, temperature in modes.items():
        _, texts, rewards = roll_out(model, rollouts, rollouts.held_out, temperature, args)
        metrics[f"eval_reward_{mode}"] = sum(rewards) / len(rewards)
        with open(Path(args.output_dir) / "samples.jsonl", "a") as file:
            for row, text, x in zip(rollouts.held_out, texts, rewards):
                line = {"step": step, "mode": mode, "prompt": prompt_in(row.source)}
                file.write(json.dumps(line | {"response": text, "reward": x}) + "\n")
    return metrics


def log(metrics: dict, args) -> None:
    """To the screen and metrics.jsonl."""
    shown = [name for name in metrics if name in SHOWN or name.startswith("eval")]
    tqdm.write(" | ".join(f"{name} {metrics[name]:.4g}" for name in shown))
    with open(Path(args.output_dir) / "metrics.jsonl", "a") as file:
        file.write(json.dumps(metrics) + "\n")


# === 8. Arguments, checkpoints, main ===
def number(above: float, below: float = math.inf, kind: type = float) -> Callable:
    """An argparse type: a finite number strictly between two bounds."""
    def number(text):
        if not above < kind(text) < below:
            raise argparse.ArgumentTypeError(f"{text} is not between {above} and {below}")
        return kind(text)
    return number


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; (*) marks a default that the paper does not give."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     usage="%(prog)s --model NAME [flags]")
    positive, size, count = number(0), number(0, kind=int), number(-1, kind=int)
    add = parser.add_argument_group("model and data").add_argument
    add("--model", required=True, help="folder or Hub id")
    add("--data", default="princeton-nlp/llama3-ultrafeedback-armorm", help="file or Hub id")
    add("--eval_data", help="held-out rows; None: of --data")
    add("--eval_size", type=count, help="prompts; None: min(128, 5%%) (*)")
    add("--max_rows", type=size, help="first rows of --data")
    add("--raw", action="store_true", help="no chat template")
    add("--system_prompt", help="before every prompt")
    add("--max_length", type=number(1, kind=int), default=2048, help="of an example (*)")
    add("--output_dir", default="runs/dpo", help="for all output")
    add("--resume", action="store_true", help="go on from the checkpoint")
    add("--overwrite", action="store_true", help="replace a run")
    add = parser.add_argument_group("method").add_argument
    add("--humanline", choices=["clip", "sample", "off"], default="clip", help="perception")
    add("--log_eps_P", type=number(-math.inf, 0), default=-1.5, help="lower bound, nats")
    add("--log_eps_R", type=positive, default=1.5, help="upper bound, nats")
    add("--gamma_P", type=positive, default=0.5, help="B_P ~ Beta(gamma_P, 1)")
    add("--gamma_R", type=positive, default=0.01, help="B_R ~ Beta(gamma_R, 1)")
    add("--sync_every", type=count, default=1, help="k: updates between syncs; 0: never")
    add("--plain", action="store_true", help="no clipping, no syncing")
    add("--beta", type=positive, default=0.1, help="inverse temperature")
    add = parser.add_argument_group("rollouts; --data then holds prompts").add_argument
    add("--sample_every", type=count, default=0, help="n: updates between them; 0: never")
    add("--reward", help="FILE.py:FUNCTION; see README.md")
    add("--group_size", type=number(1, kind=int), default=8, help="responses to a prompt")
    add("--temperature", type=positive, default=0.7, help="of samples, log-probs")
    add("--max_new_tokens", type=size, default=512, help="of a response (*)")
    add("--gen_batch", type=size, default=128, help="responses at once (*)")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=size, help="updates; None: by --epochs")
    add("--epochs", type=size, default=1, help="passes over the data (*)")
    add("--batch_size", type=size, default=32, help="pairs of an update")
    add("--micro_tokens", type=size, default=4096, help="of a forward (*)")
    add("--lr", type=number(0, 1), default=1e-6, help="of AdamW, after the warm-up (*)")
    add("--lr_decay", action="store_true", help="linear, 0 at the last update")
    add("--warmup", type=count, default=10, help="updates (*)")
    add("--max_grad_norm", type=positive, default=1.0, help="bound of the gradient (*)")
    add("--activation_checkpointing", action="store_true", help="slower, less memory")
    add("--eval_every", type=count, default=100, help="updates; 0: at the end (*)")
    add("--save_every", type=count, default=100, help="updates; 0: at the end (*)")
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=number(-1, 2**32, int), default=0, help="of data order and draws")
    args = parser.parse_args(argv)
    args.prompts_a_batch = args.batch_size  # at least: a group gives one pair or none
    if args.plain:
        args.humanline, args.sync_every = "off", 0
    return args


def load_policy(args) -> tuple:
    """The policy, float32, without dropout, and its tokenizer."""
    with errors_in(f"--model {args.model}"):
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        config = AutoConfig.from_pretrained(args.model)
        for name in [name for name in vars(config.get_text_config()) if "drop" in name]:
            setattr(config.get_text_config(), name, 0.0)
        model, info = AutoModelForCausalLM.from_pretrained(  # bf16 would miss small updates
            args.model, config=config, dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"]:
            raise BadInput(f"weights are missing: {', '.join(sorted(info['missing_keys'])[:3])}")
        check_model(model.to(args.device).eval(), tokenizer, args.max_length)
    if args.activation_checkpointing:  # it works in training mode only
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.train()
    return model, tokenizer


def main(args: argparse.Namespace) -> None:
    """Train. Raises BadInput where it cannot."""
    folder, k, n = Path(args.output_dir), args.sync_every, args.sample_every
    if folder.exists() and not (args.resume or args.overwrite):
        raise BadInput(f"--output_dir {folder} exists; add --resume or --overwrite")
    with errors_in(f"--reward takes FILE.py:FUNCTION, not {args.reward}"):
        path, _, function = (args.reward or "").rpartition(":")
        reward = runpy.run_path(path)[function] if n or args.reward else None
    torch.manual_seed(args.seed)
    model, tokenizer = load_policy(args)
    read = functools.partial(encode_prompt_row if n else encode_row, tokenizer, reward, args)
    others = load_rows(args.eval_data, None, read) if args.eval_data else []
    rows, eval_rows = hold_out(load_rows(args.data, args.max_rows, read), others, args)
    if len(rows) < (1 if n else args.batch_size):
        raise BadInput(f"{len(rows)} rows fill no batch; lower --batch_size or --eval_size")
    held_out = list({row.prompt: row for row in eval_rows}.values()) if reward else []
    rollouts = SimpleNamespace(tokenizer=tokenizer, reward=reward, held_out=held_out,
                               prompts=random.Random(args.seed).sample(rows, len(rows)), cursor=0)
    queue = deque([] if n else make_batches(rows, args))  # has no reference yet
    steps = len(queue) or args.steps or math.ceil(args.epochs * len(rows) / args.prompts_a_batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)

    run = vars(args) | {"script": Path(__file__).name, "rows": len(rows), "updates": steps}
    run |= dict.fromkeys(("resume", "overwrite", "output_dir"))  # may differ
    state, checkpoint = {"run": run, "step": -1}, folder / "checkpoint.pt"
    if args.resume:
        with errors_in(f"--resume: {checkpoint}"):
            torch.serialization.add_safe_globals([Row, Example])
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if state["run"] != run:
        raise BadInput(f"--resume: it ran with {dict(state['run'].items() - run.items())}")
    with errors_in(f"--output_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    for file in [*folder.glob("metrics.jsonl"), *folder.glob("samples.jsonl")]:
        lines = [x for x in file.open() if x[-1] == "\n" and json.loads(x)["step"] <= state["step"]]
        file.write_text("".join(lines))
    if args.resume:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        window, eval_rows, rollouts.cursor = deque(state["window"]), state["eval"], state["cursor"]
        queue = deque(state["queue"] if n else [*queue][state["step"] + len(window) :])
    else:
        eval_rows = [] if n else score(model, eval_rows, args)
        checkpoint.unlink(missing_ok=True)
        means = [x.mean() for row in eval_rows for x in row.ref_logp] or [torch.tensor(math.nan)]
        quartiles = torch.stack(means).quantile(torch.tensor([0.25, 0.5, 0.75])).numpy().round(2)
        ids, cut = rows[0].examples[0]
        print(f"{tokenizer.decode(ids[:cut])}⟦{tokenizer.decode(ids[cut:])}⟧ (⟦⟧: trained)\n"
              f"quartiles of held-out mean token log-probs, better near 0: {quartiles}")
        log({"step": 0} | evaluate(model, eval_rows, rollouts, 0, args), args)
        window = next_window(model, queue, rollouts, min(n, steps), args)

    for step in tqdm(range(max(0, state["step"]) + 1, steps + 1), "training", leave=False):
        started, batch = time.perf_counter(), window.popleft()
        torch.manual_seed(args.seed * 10**6 + step)  # no generator in a checkpoint
        metrics = {"step": step} | accumulate_gradient(model, batch, args.humanline, args)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()
        if not math.isfinite(norm + metrics["loss"]):
            raise BadInput(f"update {step}: loss {metrics['loss']}, gradient norm {norm}; "
                           "it is not applied; try a lower --lr")
        decay = (steps - step) / max(1, steps - args.warmup) if args.lr_decay else 1
        optimizer.param_groups[0]["lr"] = lr = args.lr * min(1, step / max(1, args.warmup), decay)

        # Humanline syncing. When its k batches are used up, the window is filled anew: the policy
        # as it still is, before this update, scores the next k batches and so is their reference,
        # which lags one update. Scored after it they would meet that same policy: with k = 1 all
        # log-ratios would be 0 and nothing ever clipped.
        if k > 0 and not window:
            window = next_window(model, queue, rollouts, min(n, steps - step), args)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if k == 0 and not window:  # the online baseline: n = 1 is exactly on-policy
            window = next_window(model, queue, rollouts, min(n, steps - step), args)

        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
        peak = torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else peak
        metrics |= {"grad_norm": norm, "lr": lr, "seconds": seconds, "peak_memory_gib": peak,
                    "tokens_per_second": metrics["tokens"] / seconds}
        if step == steps or args.eval_every and step % args.eval_every == 0:
            metrics |= evaluate(model, eval_rows, rollouts, step, args)
        log(metrics, args)
        if step == steps or args.save_every and step % args.save_every == 0:
            state = {"run": run, "step": step, "eval": eval_rows, "window": [*window],
                     "queue": [*queue] if n else [], "cursor": rollouts.cursor,
                     "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, folder / "checkpoint.tmp")
            (folder / "checkpoint.tmp").replace(checkpoint)  # whole, or the one before it
    model.save_pretrained(folder / "final")
    tokenizer.save_pretrained(folder / "final")
    print(f"the trained policy is in {folder / 'final'}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except BadInput as error:
        sys.exit(f"error: {error}")
    except torch.cuda.OutOfMemoryError:
        sys.exit("error: out of memory; lower --micro_tokens or add --activation_checkpointing")
    except KeyboardInterrupt:
        sys.exit(f"stopped; go on from any checkpoint: python {' '.join(sys.argv)} --resume")
