"""Humanline DPO: direct preference optimization on fixed pairs that learns as if they were fresh.

Paper: "Humanline: Online Alignment as Perceptual Loss" (arXiv 2509.24207), on top of DPO (Rafailov
et al. 2023, arXiv 2305.18290). People misjudge how likely outcomes are, and fresh samples of the
policy happen to carry that bias: put it into the loss, and fixed data will do. Two additions do it:
  clipping  every token's log-ratio is clamped to [log ε_P, log ε_R] before it is summed;
  syncing   at every k-th update the reference becomes the policy as it was just before it.

    z_t = clamp( log π_θ(y_t | x, y_<t) − log π_ref(y_t | x, y_<t),  log ε_P, log ε_R )
    L   = −log σ( β [ Σ_t z_t(chosen) − Σ_t z_t(rejected) ] ),  mean over the pairs of an update

    update            1  2  3  4  5      (weights are named by the number of updates made)
    policy            0  1  2  3  4
    reference, k = 1  0  0  1  2  3
    reference, k = 2  0  0  1  1  3
    reference, k = 0  0  0  0  0  0      (with --sample_every: the policy that wrote the samples)

  logp, ref_logp, mask  (B, T)  log π_θ, log π_ref (nats) of B responses' T tokens; which are real
  logratio, perceived   (B, T)  log π_θ − log π_ref, and z: as a human would see it
  log_eps_P, log_eps_R          the Policy (below), the Reference (above) finds it much less likely
Sections 1 to 4 are the method; 5 to 8 read data, sample, evaluate and run. --plain, the baseline,
neither clips nor syncs.

    python humanline_dpo.py --model Qwen/Qwen2.5-1.5B-Instruct
"""

import argparse
import importlib.util
import itertools
import json
import math
import random
import shlex
import shutil
import sys
import time
import zlib
from collections import Counter, deque
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import torch
import torch.nn.functional as F
from datasets import load_dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from common import TOO_LARGE, BadInput, Example, check_model, encode, errors_in, micro_batches
from common import prompt_in, response_logps, sample_responses

# === 1. Perception: how a human would see each token's log-ratio ===
def perceive(logratio: Tensor, mask: Tensor, mode: str, log_eps_P: float, log_eps_R: float,
             gamma_P=0.5, gamma_R=0.01, beta_P=1.0, beta_R=1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Humanline clipping or sampling (paper, section 4). logratio, mask: (B, T), nats. Returns the
    perceived log-ratio (B, T), 0 on padding, and the tokens without gradient on the low (P) and the
    high (R) side, (B, T) bool. "clip": clamped, gradient 1 inside the bounds, 0 outside. "sample"
    (clipping is its limit, theorem 4.3): rejected tokens keep their value without gradient."""
    perceived = torch.where(mask, logratio, 0.0)  # first: 0 lies within any bounds
    low = high = torch.zeros_like(mask)
    if mode == "clip":
        low, high = perceived < log_eps_P, perceived > log_eps_R
        perceived = perceived.clamp(log_eps_P, log_eps_R)
    elif mode == "sample":
        low = rejected(perceived.detach(), mask, gamma_P, beta_P)
        high = rejected(-perceived.detach(), mask, gamma_R, beta_R)
        perceived = torch.where(low | high, perceived.detach(), perceived)
    return perceived, low, high

def rejected(log_ratio: Tensor, mask: Tensor, gamma: float, beta: float) -> Tensor:
    """Tokens that one side of humanline sampling rejects, (B, T) bool: their ratio is below M times
    a draw from Beta(gamma, beta), M being the largest ratio of the response. log_ratio: (B, T),
    nats, of π_θ to π_ref (P) or the reverse (R)."""
    draws = torch.distributions.Beta(*log_ratio.new_tensor([gamma, beta])).sample(log_ratio.shape)
    log_M = log_ratio.masked_fill(~mask, -math.inf).amax(-1, keepdim=True)  # (B, 1)
    return mask & (log_ratio < log_M + draws.log())


# === 2. Loss ===
def dpo_loss(logratio: Tensor, mask: Tensor, beta: float) -> Tensor:
    """DPO (Rafailov et al. 2023, equation 7) of perceived log-ratios. logratio, mask: (B, T), nats,
    of chosen, rejected, chosen, rejected, … Returns the loss of each pair, (B/2,)."""
    reward = beta * torch.where(mask, logratio, 0.0).sum(-1)  # (B,)
    return -F.logsigmoid(reward[0::2] - reward[1::2])


# === 3. The reference: no second model, but the policy's log-probs, frozen at a sync ===
class Row(NamedTuple):
    examples: list[Example]  # [chosen, rejected]; of a prompt for rollouts one, without response
    source: dict | None = None  # the row of the data, for the reward
    ref_logp: list[Tensor] | None = None  # for each example (T,) on the CPU, nats

def policy_logps(model, batch: list[Row], args) -> Iterator[tuple]:
    """By micro-batch: its rows, and their examples' logp and mask (B, T). Scoring and training both
    cut here: where the policy has not moved, log-ratios are exactly 0. Precision: matrix products
    are bf16 on CUDA; weights, gradients, AdamW and log-softmax float32."""
    temperature = args.temperature if args.sample_every else 1.0  # as the samples were drawn
    for micro in micro_batches([row.examples for row in batch], args.micro_tokens, args.device):
        rows = [batch[i] for i in micro]
        examples = [example for row in rows for example in row.examples]
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            logp, mask = response_logps(model, examples, temperature)  # (B, T)
        yield rows, logp, mask

@torch.no_grad()
@errors_in(TOO_LARGE, torch.OutOfMemoryError)
def score(model, batch: list[Row], args) -> list[Row]:
    """The batch with ref_logp: what the policy as it is now thinks of its responses."""
    scored = []
    for rows, logp, mask in policy_logps(model, batch, args):
        by_example = iter([line[real] for line, real in zip(logp.cpu(), mask.cpu())])
        for row in rows:
            ref_logp = [next(by_example) for _ in row.examples]
            scored.append(row._replace(source=None, ref_logp=ref_logp))
    return scored

def next_window(model, queue: deque, rollouts, updates: range, args) -> deque:
    """The next k batches (k = 0: all), scored by the policy as it is now. Online, if none is left,
    it first writes those of the next n updates (numbered from 0; offline there are none)."""
    if not queue and updates:
        queue.extend(sample_batches(model, rollouts, updates, args))
    k = args.sync_every if args.sync_every else len(queue)
    batches = [queue.popleft() for _ in range(min(k, len(queue)))]
    return deque(score(model, x, args) for x in tqdm(batches, "scoring", leave=False, delay=2))


# === 4. One update ===
@errors_in(TOO_LARGE, torch.OutOfMemoryError)
def accumulate_gradient(model, batch: list[Row], mode: str, args) -> dict[str, float]:
    """Forward and backward of one update; returns its metrics."""
    examples = [example for row in batch for example in row.examples]
    pairs = len(batch)  # means are over the whole update, however it is cut
    tokens = sum(len(example.response) for example in examples)
    sums = Counter(tokens=sum(len(example.ids) for example in examples))
    for rows, logp, mask in policy_logps(model, batch, args):
        ref_logp = pad_sequence([x for row in rows for x in row.ref_logp], batch_first=True)
        logratio = logp - ref_logp.to(args.device, non_blocking=True)  # (B, T)
        # Humanline clipping: one clamp of each token's log-ratio, before the loss sees it.
        perceived, low, high = perceive(logratio, mask, mode, args.log_eps_P, args.log_eps_R)
        losses = dpo_loss(perceived, mask, args.beta)  # (B/2,)
        if torch.is_grad_enabled():  # not in an evaluation
            (losses.sum() / pairs).backward()
        reward = args.beta * perceived.detach().sum(-1)  # (B,)
        margin = reward[0::2] - reward[1::2]  # (B/2,)
        right = (margin > 0).float() + (margin == 0).float() / 2  # a tie counts ½
        sums.update({
            "loss": losses.detach().sum() / pairs,
            "reward_chosen": reward[0::2].sum() / pairs,
            "reward_rejected": reward[1::2].sum() / pairs,
            "margin": margin.sum() / pairs,
            "accuracy": right.sum() / pairs,
            "unclipped": (mask & ~low & ~high).sum() / tokens,
            "clipped_low": low.sum() / tokens,
            "clipped_high": high.sum() / tokens,
            "abs_logratio": torch.where(mask, logratio.detach(), 0.0).abs().sum() / tokens,
        })
    return {name: float(value) for name, value in sums.items()}


# === 5. Data ===
def read_file(source: str) -> Iterator[tuple[int, dict]]:
    """Numbered rows of a .jsonl or .json (a row a line) or .parquet file, or of a Hub data set
    id[:config[:split]]. JSON stays as it is: datasets would make a date of "2024-05-01"."""
    if source.endswith((".jsonl", ".json")):
        for number, line in enumerate(open(source, "rb"), 1):
            with errors_in(f"line {number} is no JSON object"):
                yield number, {**json.loads(line)}
    elif source.endswith(".parquet"):
        yield from enumerate(load_dataset("parquet", data_files=source, split="train"), 1)
    elif Path(source).is_file():
        raise BadInput("it ends with none of .jsonl, .json (a row a line) and .parquet")
    else:
        name, _, rest = source.partition(":")
        config, _, split = rest.partition(":")
        yield from enumerate(load_dataset(name, config or None, split=split or "train"), 1)

def load_rows(source: str, limit: int | None, tokenizer, reward, args) -> tuple:
    """The first rows of the data as tokens (for rollouts prompts), how many were too long, and a
    checksum of all as they were read, since templates may write the date into the tokens."""
    read = encode_prompt_row if args.sample_every else encode_row
    rows, too_long, no_use, checksum = [], 0, 0, 0
    with errors_in(source):
        data = itertools.islice(read_file(source), limit)
        for number, row in tqdm(data, "reading", leave=False, delay=2):
            with errors_in(f"row {number} (columns {', '.join(row)})"):
                found = read(tokenizer, reward, args, row)
            rows += found or []
            too_long += found is None
            no_use += found == []
            checksum = zlib.crc32(repr(row).encode(), checksum)
    if args.sample_every and hasattr(reward, "usable"):  # can it read a row's answer
        count, rows = len(rows), [row for row in rows if reward.usable(row.source)]
        no_use += count - len(rows)
    cut = sum(example.cut for row in rows for example in row.examples)
    print(f"{source}: {len(rows)} rows, {cut} responses cut; dropped: {too_long} too long, "
          f"{no_use} of no use")
    return rows, too_long, checksum

def encode_row(tokenizer, reward, args, row: dict) -> list[Row] | None:
    """{prompt, chosen, rejected}, or two whole dialogues, as tokens. None: too long, []: no use."""
    chosen, rejected = (encode(tokenizer, row, name, args) for name in ("chosen", "rejected"))
    if not chosen or not rejected:
        return None
    if chosen.response == rejected.response:
        return []
    if chosen.prompt != rejected.prompt:
        raise BadInput("chosen and rejected have different prompts")
    return [Row([chosen, rejected], source=row if reward else None)]

def hold_out(rows: list[Row], others: list[Row], args) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and those held out, of others if any; no prompt is in both."""
    pool = others if args.eval_data else rows
    prompts = list(dict.fromkeys(row.examples[0].prompt for row in pool))
    default = len(prompts) if args.eval_data else min(128, len(prompts) // 20)
    size = default if args.eval_size is None else min(args.eval_size, len(prompts))
    held_out = set(random.Random(args.seed).sample(prompts, size))
    kept = [row for row in rows if row.examples[0].prompt not in held_out]
    print(f"{len(kept)} rows to train on, {size} prompts held out")
    return kept, [row for row in pool if row.examples[0].prompt in held_out]

def make_batches(rows: list[Row], tokenizer, args) -> list[list[Row]]:
    """All batches of the run; each epoch has its order and drops a ragged last batch."""
    loader = DataLoader(rows, args.batch_size, shuffle=True, drop_last=True, collate_fn=list,
                        generator=torch.Generator().manual_seed(args.seed))
    epochs = math.ceil(args.steps / len(loader)) if args.steps else args.epochs
    return [batch for _ in range(epochs) for batch in loader][: args.steps]


# === 6. Rollouts: the policy writes responses, a reward scores them ===
class Rollouts(NamedTuple):
    tokenizer: object
    reward: Callable | None
    prompts: list[Row]  # to train on, in the order of drawing, round and round
    held_out: list[Row]  # prompts to evaluate on

def encode_prompt_row(tokenizer, reward, args, row: dict) -> list[Row] | None:
    """The prompt of a row as tokens; None is a row that is too long."""
    example = encode(tokenizer, row, None, args)
    fits = example and len(example.ids) + args.max_new_tokens <= args.max_length
    return [Row([example], source=row)] if fits else None

def roll_out(model, rollouts: Rollouts, rows: list[Row], temperature: float, args) -> tuple:
    """A response (Example), its text and its reward for each prompt in rows. The reward is called
    as TRL calls it: a completion is a list of messages where the prompt is one."""
    ids = [list(row.examples[0].prompt) for row in rows]
    examples, texts = sample_responses(model, rollouts.tokenizer, ids, args.max_new_tokens,
                                       temperature, args.gen_batch)
    prompts = [prompt_in(row.source) for row in rows]
    answers = [text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
               for prompt, text in zip(prompts, texts)]
    names = {name for row in rows for name in row.source}
    columns = {name: [row.source.get(name) for row in rows] for name in names}
    columns |= {"prompts": prompts, "completions": answers,
                "completion_ids": [example.response for example in examples]}
    rewards = rollouts.reward(**columns)  # its errors show their own traceback
    with errors_in(f"--reward {args.reward}"):
        rewards = [float(x) for x in rewards]
        if len(rewards) != len(rows) or not all(map(math.isfinite, rewards)):
            raise BadInput(f"{len(rewards)} rewards for {len(rows)} responses, or not all finite")
    return examples, texts, rewards

def sample_batches(model, rollouts: Rollouts, updates: range, args) -> list[list[Row]]:
    """The batches of these updates, which the policy writes now. A group may give no row; where no
    group does, the next prompts are drawn, until all have been."""
    size, count = args.group_size, len(updates) * args.prompts_a_batch
    first, everything = updates.start * args.prompts_a_batch, len(rollouts.prompts)
    for start in range(first, first + everything, count):
        drawn = [rollouts.prompts[i % everything] for i in range(start, start + count)]
        prompts = [prompt for prompt in drawn for _ in range(size)]
        examples, _, rewards = roll_out(model, rollouts, prompts, args.temperature, args)
        groups = [rows_of_group(examples[i : i + size], rewards[i : i + size])
                  for i in range(0, len(prompts), size)]
        groups = [rows for rows in groups if rows]
        if groups:
            return [sum(groups[i :: len(updates)] or groups[:1], []) for i in range(len(updates))]
        tqdm.write(f"rewards are equal within all {count} groups; the next prompts are drawn")
    raise BadInput(f"--reward {args.reward}: equal within all groups; take other prompts")

def rows_of_group(examples: list[Example], rewards: list[float]) -> list[Row]:
    """The best response against the worst; nothing where all are equal."""
    best, worst = rewards.index(max(rewards)), rewards.index(min(rewards))
    return [Row([examples[best], examples[worst]])] if rewards[best] > rewards[worst] else []


# === 7. Evaluation ===
EVALUATED = ("loss", "accuracy", "margin")
SHOWN = ("step", *EVALUATED, "unclipped", "abs_logratio", "grad_norm", "tokens_per_second")

@torch.no_grad()
def evaluate(model, rows: list[Row], rollouts: Rollouts, args) -> dict:
    """Held-out rows, unclipped, against the *initial* policy (so all k compare); and samples."""
    found = accumulate_gradient(model, rows, "off", args) if rows else {}
    metrics = {f"eval_{name}": found[name] for name in EVALUATED if name in found}
    for mode, temperature in {"greedy": 0.0, "sampled": args.temperature}.items():
        if rollouts.held_out:
            _, texts, rewards = roll_out(model, rollouts, rollouts.held_out, temperature, args)
            metrics[f"eval_reward_{mode}"] = sum(rewards) / len(rewards)
            prompts = [prompt_in(row.source) for row in rollouts.held_out]
            metrics[f"samples_{mode}"] = [*zip(prompts, texts, rewards)]
    return metrics

def log(metrics: dict, args) -> None:
    """To the screen and to metrics.jsonl, whose first line makes the folder."""
    shown = [name for name in metrics if name in SHOWN or name.startswith("eval")]
    tqdm.write(" | ".join(f"{name} {metrics[name]:.4g}" for name in shown))
    with errors_in(f"--output_dir {args.output_dir}"):
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        mode = "a" if metrics["step"] else "x"  # another run may have begun here meanwhile
        with open(Path(args.output_dir) / "metrics.jsonl", mode) as file:
            file.write(json.dumps(metrics) + "\n")


# === 8. Arguments, checkpoints, main ===
def number(above: float, below: float = math.inf, kind: type = float, equal=False) -> Callable:
    """An argparse type: a finite number between two bounds, or equal to the lower one."""
    def number(text):
        if not (above < kind(text) < below or equal and kind(text) == above):
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
    add("--raw", action="store_true", help="prompts and responses are texts, no chat template")
    add("--system_prompt", help="of rows that have no system message")
    add("--chat_template_kwargs", type=json.loads, default={}, help="JSON, for the chat template")
    add("--lora_rank", type=count, default=0, help="train adapters of this rank; 0: all weights")
    add("--max_length", type=number(1, kind=int), default=2048, help="of an example (*)")
    add("--output_dir", default="runs/dpo", help="for all output")
    add("--resume", action="store_true", help="go on from the checkpoint, with the same flags")
    add("--overwrite", action="store_true", help="replace a run")
    add = parser.add_argument_group("method").add_argument
    add("--humanline", choices=["clip", "sample", "off"], default="clip", help="perception")
    add("--log_eps_P", type=number(-math.inf, 0), default=-1.5, help="lower bound, nats")
    add("--log_eps_R", type=positive, default=1.5, help="upper bound, nats")
    add("--sync_every", type=count, default=1, help="k: updates between syncs, up to n; 0: never")
    add("--plain", action="store_true", help="the baseline: no clipping, no syncing")
    add("--beta", type=positive, default=0.1, help="inverse temperature")
    add = parser.add_argument_group("rollouts: none without --sample_every").add_argument
    add("--sample_every", type=count, default=0, help="every n updates; --data: prompts. 0: never")
    add("--reward", help="FILE.py:FUNCTION; without --sample_every it scores the evaluation only")
    add("--group_size", type=number(1, kind=int), default=8, help="samples of a prompt, if online")
    add("--temperature", type=positive, default=0.7, help="of samples and their log-probs")
    add("--max_new_tokens", type=size, default=512, help="of a response (*)")
    add("--gen_batch", type=size, default=128, help="responses at once, in bf16 on CUDA (*)")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=size, help="updates; None: by --epochs")
    add("--epochs", type=size, default=1, help="passes over the data (*)")
    add("--batch_size", type=size, default=32, help="pairs of an update")
    add("--micro_tokens", type=size, default=4096, help="of a forward (*)")
    add("--lr", type=number(0, 1), default=1e-6, help="after warm-up; LoRA wants 10 times more (*)")
    add("--lr_decay", action="store_true", help="linear, to 0 after the last update")
    add("--warmup", type=count, default=10, help="updates (*)")
    add("--max_grad_norm", type=positive, default=1.0, help="bound of the gradient (*)")
    add("--activation_checkpointing", action="store_true", help="slower, less memory")
    add("--eval_every", type=count, default=100, help="updates; 0: at the end (*)")
    add("--save_every", type=count, default=100, help="updates; 0: at the end (*)")
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=number(-1, 2**32, int), default=0, help="of order and draws")
    args = parser.parse_args(argv)
    args.prompts_a_batch = args.batch_size  # at most as many pairs: a group gives one or none
    if args.plain:
        args.humanline, args.sync_every = "off", 0
    return args

def load_policy(args) -> tuple:
    """The policy without dropout, its tokenizer, and what is saved: it, or its adapters."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew, up to seconds, for every new shape
    with errors_in(f"--model {args.model}"), errors_in("it is too large", torch.OutOfMemoryError):
        missing = "/" in args.model and not Path(args.model).exists()
        if missing and (Path(args.model).parent.is_dir() or args.model.count("/") > 1):
            raise BadInput("there is no such folder")
        if Path(args.model, "adapter_config.json").exists():
            raise BadInput("these are LoRA adapters; merge them into their base with peft: "
                           "PeftModel.from_pretrained(base, folder).merge_and_unload()")
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        if args.raw:
            tokenizer.chat_template = None
        config = AutoConfig.from_pretrained(args.model)
        text = config.get_text_config()
        text.update({name: 0.0 for name in vars(text) if "drop" in name})
        # What is trained is float32, bf16 would miss small updates; what LoRA freezes need not be.
        dtype = torch.bfloat16 if args.lora_rank and args.device == "cuda" else torch.float32
        model, info = AutoModelForCausalLM.from_pretrained(
            args.model, config=config, dtype=dtype, output_loading_info=True)
        if info["missing_keys"]:
            raise BadInput(f"weights are missing: {', '.join(sorted(info['missing_keys'])[:3])}")
        if info["unexpected_keys"]:
            print(f"weights left out: {', '.join(sorted(info['unexpected_keys'])[:3])}, …")
        check_model(model.to(args.device).eval(), tokenizer, args.max_length)
    saved = model
    if args.lora_rank:
        with errors_in("--lora_rank needs `pip install peft`"):
            from peft import LoraConfig, get_peft_model
        saved = get_peft_model(model, LoraConfig(  # puts float32 adapters into the model itself
            r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear"))
        for module in model.modules():  # no float32 copies of its inputs: autocast casts
            module.cast_input_dtype_enabled = False
    if args.activation_checkpointing:
        model.gradient_checkpointing_enable()
        for module in model.modules():  # works in training mode, where others add noise
            module.training = isinstance(module, GradientCheckpointingLayer)
    return model, tokenizer, saved

def load_reward(name: str | None) -> Callable:
    path, _, function = (name or "").rpartition(":")
    file = Path(path).resolve()
    if file.suffix != ".py" or not file.is_file():
        raise BadInput(f"--reward takes FILE.py:FUNCTION of a file that is there, not {name}")
    sys.path.insert(0, str(file.parent))  # it may import its neighbours
    if "." in file.stem or importlib.util.find_spec(file.stem).origin != str(file):
        raise BadInput(f"--reward {name}: another module has that name; rename {file.name}")
    module = importlib.import_module(file.stem)  # its errors show their own traceback
    with errors_in(f"--reward {name}"):
        return getattr(module, function)

def identity(args, **more) -> dict:
    """What a resumed run has in common with the one before: its data and all flags but those that
    only cut, save or show. --steps and --epochs are not among these: --lr_decay depends on them."""
    free = {"resume", "overwrite", "output_dir", "micro_tokens", "gen_batch", "save_every",
            "eval_every", "activation_checkpointing", "device"}
    run = {name: value for name, value in vars(args).items() if name not in free}
    return run | more | {"script": Path(__file__).name}

def main(args: argparse.Namespace) -> None:
    """Train. Raises BadInput where it cannot."""
    folder, k, n = Path(args.output_dir), args.sync_every, args.sample_every
    checkpoint, log_file = folder / "checkpoint.pt", folder / "metrics.jsonl"
    saving = f"cannot save in --output_dir {folder} (is the disk full?)"
    if folder.is_file() or any(folder.glob("*")) and not (args.resume or args.overwrite):
        raise BadInput(f"--output_dir {folder} is no empty folder; add --resume or --overwrite")
    reward = load_reward(args.reward) if args.reward or n else None
    torch.manual_seed(args.seed)
    model, tokenizer, saved = load_policy(args)
    trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=args.lr, weight_decay=0.0, fused=True)
    rows, too_long, checksum = load_rows(args.data, args.max_rows, tokenizer, reward, args)
    others = load_rows(args.eval_data, None, tokenizer, reward, args)[0] if args.eval_data else []
    rows, eval_rows = hold_out(rows, others, args)
    if len(rows) < (1 if n else args.batch_size):
        raise BadInput(f"{len(rows)} rows fill no batch; lower --batch_size or --eval_size; "
                       f"{too_long} were too long: raise --max_length or lower --max_new_tokens")
    prompts = random.Random(args.seed).sample(rows, len(rows))
    held_out = {row.examples[0].prompt: row for row in eval_rows
                if reward and row.examples[0].prompt_len + args.max_new_tokens <= args.max_length}
    rollouts = Rollouts(tokenizer, reward, prompts, [*held_out.values()])
    batches = [] if n else make_batches(rows, tokenizer, args)  # they have no reference yet
    steps = len(batches)
    if n:
        steps = args.steps or math.ceil(args.epochs * len(rows) / args.prompts_a_batch)
    run = identity(args, updates=steps, rows=len(rows), data_crc32=checksum)
    if args.resume:  # nothing is scored again: the window is in the checkpoint
        with errors_in(f"--resume: {checkpoint}"):
            torch.serialization.add_safe_globals([Row, Example])
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            then = state["run"]
            other = {name: then.get(name) for name in run if run[name] != then.get(name)}
            if other:
                raise BadInput(f"it ran with {other}; take the same, or begin with --overwrite")
            log_file.open("r+").truncate(state["log_bytes"])  # forget what came after it
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        done, window, eval_rows = state["step"], deque(state["window"]), state["eval"]
        queue = deque(state["queue"] if n else batches[done + len(window) :])
    else:
        for old in filter(Path.exists, (checkpoint, log_file)):
            old.unlink()
        shutil.rmtree(folder / "final", ignore_errors=True)
        done, queue = 0, deque(batches)
        eval_rows = [] if n else score(model, eval_rows, args)
        print(f"the first example:\n{tokenizer.decode(rows[0].examples[0].ids)}")
        metrics = {"step": 0} | evaluate(model, eval_rows, rollouts, args)
        started = time.perf_counter()
        window = next_window(model, queue, rollouts, range(min(n, steps)), args)
        log(metrics | {"seconds": time.perf_counter() - started}, args)

    for step in tqdm(range(done + 1, steps + 1), "training", leave=False):
        started, batch = time.perf_counter(), window.popleft()
        upcoming = range(step, min(step + n, steps))
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(args.seed * 10**6 + step)  # so no generator is in a checkpoint
        metrics = {"step": step} | accumulate_gradient(model, batch, args.humanline, args)
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), args.max_grad_norm).item()
        if not math.isfinite(norm + metrics["loss"]):
            raise BadInput(f"update {step}: loss {metrics['loss']}, gradient norm {norm}. It is "
                           "not applied; begin anew with a lower --lr, --resume would repeat it")
        decay = (steps + 1 - step) / max(1, steps + 1 - args.warmup) if args.lr_decay else 1
        lr = optimizer.param_groups[0]["lr"] = args.lr * min(1, step / max(1, args.warmup), decay)
        # Humanline syncing. When its k batches are used up, the window is filled anew: the policy
        # as it still is, before this update, (online: writes and) scores the next k batches and so
        # is their reference, which lags one update. Scored after it they would meet that same
        # policy: with k = 1 all log-ratios would be 0 and nothing ever clipped.
        if k > 0 and not window:
            window = next_window(model, queue, rollouts, upcoming, args)
        with errors_in(TOO_LARGE, torch.OutOfMemoryError):  # the first step makes AdamW's averages
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if k == 0 and not window:  # the online baseline; n = 1: log-ratios are 0, gradients are not
            window = next_window(model, queue, rollouts, upcoming, args)
        seconds = time.perf_counter() - started
        metrics |= {"grad_norm": norm, "lr": lr, "seconds": seconds,
                    "tokens_per_second": metrics["tokens"] / seconds,
                    "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30}  # CPU: 0
        if step == steps or args.eval_every and step % args.eval_every == 0:
            metrics |= evaluate(model, eval_rows, rollouts, args)
        log(metrics, args)
        if step == steps or args.save_every and step % args.save_every == 0:
            state = {"run": run, "step": step, "eval": eval_rows, "window": [*window],
                     "queue": [*queue] if n else [], "log_bytes": log_file.stat().st_size,
                     "model": trained, "optimizer": optimizer.state_dict()}
            with errors_in(saving):
                torch.save(state, folder / "checkpoint.tmp")
                (folder / "checkpoint.tmp").replace(checkpoint)  # whole, or the one before it
    with errors_in(saving):
        saved.save_pretrained(folder / "final")
        AutoTokenizer.from_pretrained(args.model).save_pretrained(folder / "final")  # as it came
    print(f"the trained policy is in {folder / 'final'}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except BadInput as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"stopped; go on from any checkpoint: python {shlex.join(sys.argv)} --resume")
