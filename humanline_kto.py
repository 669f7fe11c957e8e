r"""Humanline KTO: Kahneman-Tversky optimization on fixed labels that learns as if they were fresh.

Paper: "Humanline: Online Alignment as Perceptual Loss" (arXiv 2509.24207), on top of KTO
(Ethayarajh et al. 2024, arXiv 2402.01306). People perceive rare and common outcomes with a bias;
with that bias built into the loss, offline training comes out as strong as on freshly sampled data.
It adds two things to KTO:

  syncing   every k updates the reference becomes the policy as it was just before the update;
  clipping  every token's log-ratio is clipped to [log ε_P, log ε_R] before anything is summed.

    z_t = clamp( log π_θ(y_t | x, y_<t) − log π_ref(y_t | x, y_<t), log ε_P, log ε_R )
    L   = λ_D (1 − σ(β (Σ_t z_t − ẑ0)))  desirable,   λ_U (1 − σ(β (ẑ0 − Σ_t z_t)))  undesirable
    ẑ0  = max(0, mean of Σ_t z_t over mismatched pairs (x_i, y_j)),  L: mean over an update

  symbol         variable                shape    meaning
  B, T                                            sequences of a micro-batch; longest response
  log π_θ        logp                    (B, T)   policy log-prob of each response token, nats
  log π_ref      ref_logp                (B, T)   the same under the reference, a constant
                 mask                    (B, T)   true on response tokens, end of turn included
  log r_θ        logratio                (B, T)   log π_θ − log π_ref
  z              perceived               (B, T)   the log-ratio after clipping (or sampling)
  log ε_P, ε_R   log_eps_P, log_eps_R    floats   clip bounds, log ε_P < 0 < log ε_R
  k              sync_every              int      updates between two syncs; 0 = never
  ẑ0             kl                      scalar   the reference point, no gradient
  λ_D, λ_U       desirable_weight, ...   floats   weights of the two classes

The reference is no second model. All it is ever asked for are the log-probs of the next k batches,
so at a sync the policy itself scores these and the numbers are kept: the same as copying weights.

Departures from the authors' code: M_P and M_R of humanline sampling are per response (there per
micro-batch); ẑ0 and every mean are over the whole update, however it is cut into micro-batches; the
reference lags one update on one GPU too (there it aliases the live weights: the method is off);
k is counted anew in each sampled stretch.

    python humanline_kto.py --model Qwen/Qwen2.5-1.5B-Instruct --data trl-lib/kto-mix-14k

You should see loss 0.5000 and unclipped 1.000 at the first update, where the policy still is its
own reference, and little movement of both with k = 1 and a small lr. `--plain` is the baseline.
"""

import argparse
import collections
import difflib
import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import statistics
import sys
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from common import BadInput, Example, check_model, check_sharing, encode, encode_prompt
from common import end_of_turn, micro_batches, padded_share, response_logps

# ==================================================================================================
# 1. Arguments
# ==================================================================================================


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; (*) marks a default that the paper does not give."""
    parser = argparse.ArgumentParser(
        description="Humanline KTO (arXiv 2509.24207). (*): the paper gives no such default.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("model and data").add_argument
    add("--model", required=True, help="Hugging Face folder or Hub id of the policy")
    add("--data", required=True, help=".jsonl, .json, .parquet or Hub id[:config[:split]]")
    add("--eval_data", help="the same for held-out rows; without it prompts of --data are held out")
    add("--eval_size", type=int, help="held-out prompts; 0 = none; None = min(128, 5%%) (*)")
    add("--max_rows", type=int, help="use only the first rows of --data")
    add("--raw", action="store_true", help="leave string prompts as they are: no chat template")
    add("--max_length", type=int, default=2048, help="tokens of prompt and response together (*)")
    add("--output_dir", default="runs/kto", help="checkpoints, metrics.jsonl and final/ go here")
    add("--resume", action="store_true", help="go on from the newest whole checkpoint")
    add("--overwrite", action="store_true", help="replace the run in --output_dir")
    add = parser.add_argument_group("method").add_argument
    add("--humanline", choices=["clip", "sample", "off"], default="clip", help="perception")
    add("--log_eps_P", type=float, default=-1.5, help="lower clip bound, nats")
    add("--log_eps_R", type=float, default=1.5, help="upper clip bound, nats")
    add("--gamma_P", type=float, default=0.5, help="with --humanline sample: Beta(gamma_P, 1)")
    add("--gamma_R", type=float, default=0.01, help="with --humanline sample: Beta(gamma_R, 1)")
    add("--sync_every", type=int, default=1, help="k: updates between two syncs; 0 = never")
    add("--plain", action="store_true", help="the baseline: --humanline off --sync_every 0")
    add("--beta", type=float, default=0.1, help="how fast the value of a reward saturates (*)")
    # 1 leaves the classes as they are in the data; the paper has 1.1 on UltraFeedback
    add("--desirable_weight", type=float, default=1.0, help="λ_D (*)")
    add("--undesirable_weight", type=float, default=1.0, help="λ_U")
    add("--allow_one_class", action="store_true", help="train on one class alone")
    add = parser.add_argument_group("sampling; --data then holds prompts").add_argument
    add("--sample_every", type=int, default=0, help="n: updates between two samplings; 0 = never")
    add("--reward", help="FILE.py:FUNCTION(prompts, completions, **columns) -> list of numbers")
    add("--group_size", type=int, default=8, help="responses to a prompt")
    add("--temperature", type=float, default=0.7, help="of sampling, and of log-probs of samples")
    add("--max_new_tokens", type=int, default=512, help="tokens of a sampled response (*)")
    add("--gen_batch", type=int, default=128, help="responses written at once (*)")
    add("--system_prompt", help="a system message before every prompt")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=int, help="updates; not given: as many as --epochs makes")
    add("--epochs", type=int, default=1, help="passes over the data (*)")
    add("--batch_size", type=int, default=64, help="responses of an update")
    add("--micro_tokens", type=int, default=16384, help="padded tokens of a forward/backward (*)")
    add("--lr", type=float, default=1e-6, help="of AdamW, constant after the warm-up (*)")
    add("--warmup", type=int, default=10, help="updates of linear warm-up; the first is not 0 (*)")
    add("--max_grad_norm", type=float, default=1.0, help="bound of the gradient's norm (*)")
    add("--activation_checkpointing", action="store_true", help="slower, less memory")
    add("--eval_every", type=int, default=100, help="updates between evaluations, 0 = none (*)")
    add("--save_every", type=int, default=100, help="updates between checkpoints, 0 = none (*)")
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0, help="of the data's order, samples and humanline sampling")
    args = parser.parse_args(argv)
    if args.plain:
        args.humanline, args.sync_every = "off", 0
    return args


FLAG_CHECKS = [  # (flags, what must hold, in words)
    ("lr beta max_grad_norm gamma_P gamma_R temperature desirable_weight undesirable_weight",
     lambda v: 0 < v < math.inf, "positive and finite"),
    ("micro_tokens max_rows steps epochs", lambda v: v > 0, "at least 1"),
    ("batch_size", lambda v: v > 1, "at least 2: ẑ0 needs a response to another prompt"),
    ("max_new_tokens gen_batch", lambda v: v > 0, "at least 1"),
    ("max_length group_size", lambda v: v > 1, "at least 2"),
    ("sample_every sync_every warmup eval_every save_every eval_size",
     lambda v: v >= 0, "0 or more"),
    ("log_eps_P", lambda v: v < 0, "below 0, where a ratio of 1 lies"),
    ("log_eps_R", lambda v: v > 0, "above 0, where a ratio of 1 lies"),
    ("seed", lambda v: 0 <= v < 2**63, "0 or more, in 63 bits"),
    ("device", lambda v: v == "cpu" or torch.cuda.is_available(), "cpu: there is no CUDA GPU"),
    ("model", lambda v: not is_path(v) or os.path.isdir(v), "an existing folder or a Hub id"),
]


def is_path(name: str) -> bool:
    """Whether a name is a file or folder here, not a Hub id (org/name), which would be fetched."""
    return name.count("/") > 1 or name[:1] in "./~" or os.path.exists(name.partition("/")[0])


def check_args(args: argparse.Namespace) -> None:
    """Raise BadInput for the first flag out of range, or an output folder that cannot be used."""
    for flags, holds, words in FLAG_CHECKS:
        for flag in flags.split():
            value = getattr(args, flag)
            if value is not None and not holds(value):
                raise BadInput(f"--{flag} {value}: must be {words}")
    if args.sample_every and not args.reward:
        raise BadInput("--sample_every: needs --reward FILE.py:FUNCTION to score the samples")
    if args.reward and args.max_new_tokens >= args.max_length:
        raise BadInput(f"--max_new_tokens {args.max_new_tokens}: must be below --max_length "
                       f"{args.max_length}, which the prompt is part of")
    folder = Path(args.output_dir)
    parent = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise BadInput(f"--output_dir {folder}: {parent} is no folder to write in; name another")
    if folder.is_dir() and any(folder.iterdir()) and not (args.resume or args.overwrite):
        raise BadInput(f"--output_dir {folder}: not empty; add --resume or --overwrite, or rename")


# ==================================================================================================
# 2. Data
# ==================================================================================================


class Row(NamedTuple):
    """One response, with the reference's frozen scores once it is in a window."""

    examples: list[Example]  # [response]
    desirable: bool | None  # None: a mismatched pair, for ẑ0 alone
    ref_logp: list[Tensor] | None = None  # for each example (T,) float32 on the CPU, nats


def read_rows(source: str, limit: int | None = None) -> list[tuple[str, dict]]:
    """The first rows of a file or Hub data set, each with its place, as in "pairs.jsonl:17"."""
    path = Path(source)
    if path.suffix == ".jsonl" and path.is_file():
        with open(path, "rb") as file:
            lines = ((i, line) for i, line in enumerate(file, 1) if line.strip())
            lines = itertools.islice(lines, limit)
            return [read_line(line, f"{path.name}:{i}") for i, line in lines]
    name, config, split = (source.split(":") + ["", ""])[:3]
    options = {"path": name, "name": config or None, "split": split or "train"}
    if path.suffix in (".json", ".parquet") and path.is_file():
        if not path.stat().st_size:
            raise BadInput(f"{source}: empty; it needs a row")
        options = {"path": path.suffix[1:], "data_files": source, "split": "train"}
    elif path.suffix in (".jsonl", ".json", ".parquet") or is_path(name):
        raise BadInput(f"{source}: no such .jsonl, .json or .parquet file; check the path")
    try:
        rows = itertools.islice(datasets.load_dataset(**options), limit)
        return [(f"{source}[{i}]", row) for i, row in enumerate(rows)]
    except Exception as error:  # whatever a broken file or the Hub raises, its message says it
        mend = "mend the file" if path.is_file() else "name Hub data as id[:config[:split]]"
        raise BadInput(f"{source}: {' '.join(str(error).split())}; {mend}") from error


def read_line(line: bytes, where: str) -> tuple[str, dict]:
    """One line of a .jsonl file. `datasets` would not say which line is wrong."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise BadInput(f"{where}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not JSON ({error}); mend or drop the line") from error
    if not isinstance(row, dict):
        raise BadInput(f"{where}: no object but {line[:20].strip()!r}; write one {{...}} a line")
    return where, row


ROLES = ("system", "developer", "user", "assistant", "tool")
FIELD_CHECKS = [  # (what is wrong with a text or a list of messages, in words, how to mend it)
    (lambda v: v is None, "null", "give it a text or drop the row"),
    (lambda v: not isinstance(v, (str, list)), "neither text nor messages", "write one of them"),
    (lambda v: isinstance(v, str) and not v.strip(), "empty", "give it a text or drop the row"),
    (lambda v: v == [], "no message", "give it one or drop the row"),
    (lambda v: isinstance(v, list) and not all(isinstance(m, dict) for m in v),
     "a message that is no object", 'write {"role": ..., "content": ...}'),
    (lambda v: isinstance(v, list) and any(m.get("role") not in ROLES for m in v),
     "a message with a bad role", "use one of " + ", ".join(ROLES)),
    (lambda v: isinstance(v, list) and not all(isinstance(m.get("content"), str) for m in v),
     "a message whose content is no text", "give it a text"),
    (lambda v: isinstance(v, list) and not v[-1]["content"].strip(),
     "its last message is empty", "give it a text or drop the row"),
    (lambda v: any("\ud800" <= c <= "\udfff" for text in ([v] if isinstance(v, str) else
                   [m["content"] for m in v]) for c in text),
     "a lone surrogate, which is no character", "write the file as UTF-8"),
]


def field(row: dict, name: str, where: str) -> str | list[dict]:
    """A row's text or messages, checked; of messages only role and content are kept."""
    if name not in row:
        near = difflib.get_close_matches(name, row, 1)
        mend = f"did you mean '{near[0]}'?" if near else "rename the column"
        raise BadInput(f"{where}: no field '{name}' among {', '.join(row) or 'none'}; {mend}")
    value = row[name]
    for wrong, words, mend in FIELD_CHECKS:
        if wrong(value):
            raise BadInput(f"{where}: field '{name}': {words}; {mend}")
    if isinstance(value, str):
        return value
    return [{"role": m["role"], "content": m["content"]} for m in value]


def prompt_and_response(row: dict, name: str, where: str, args: argparse.Namespace) -> tuple:
    """Both as text or messages; a whole dialogue in the response's column wins over a prompt."""
    response = field(row, name, where)
    if isinstance(response, str) and "prompt" not in row:
        raise BadInput(f"{where}: field '{name}': text without a field 'prompt' (among "
                       f"{', '.join(row)}); add it, or write the dialogue as messages")
    if isinstance(response, list) and response[-1]["role"] != "assistant":
        raise BadInput(f"{where}: field '{name}': ends with no assistant message; drop the rest")
    whole = isinstance(response, list) and len(response) > 1
    prompt = response[:-1] if whole else field(row, "prompt", where)
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        name = name if whole else "prompt"
        raise BadInput(f"{where}: field '{name}': it ends with an assistant message; drop that")
    return with_system(prompt, args), response[-1:] if whole else response


def with_system(prompt: str | list[dict], args: argparse.Namespace) -> str | list[dict]:
    if not args.system_prompt:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": "system", "content": args.system_prompt}, *messages]


def encode_row(tokenizer, row: dict, where: str, args: argparse.Namespace) -> list[Row] | str:
    """{prompt, completion, label} as tokens, a pair as two such, or in words why it is dropped."""
    label = row.get("label")
    if "chosen" in row and "label" not in row:
        texts = [(*prompt_and_response(row, name, where, args), name == "chosen")
                 for name in ("chosen", "rejected")]
        if texts[0][0] != texts[1][0]:
            raise BadInput(f"{where}: fields 'chosen' and 'rejected' differ before their last "
                           "message; give them the same prompt")
    elif "label" in row and not (isinstance(label, (bool, int)) and label in (0, 1)):
        raise BadInput(f"{where}: field 'label': {label!r}; it must be true, false, 1 or 0")
    else:
        texts = [(*prompt_and_response(row, "completion", where, args), bool(label))]
        if "label" not in row:
            near = difflib.get_close_matches("label", row, 1)
            mend = f"did you mean '{near[0]}'?" if near else "add it"
            raise BadInput(f"{where}: no field 'label' among {', '.join(row)}; {mend}")
    found = [(encode(tokenizer, prompt, text, args.max_length, args.raw), desirable)
             for prompt, text, desirable in texts]
    if any(example is None for example, _ in found):
        return "the prompt leaves no room for a response"
    if len(found) == 2 and found[0][0] == found[1][0]:
        return "chosen and rejected are the same, cut at --max_length"
    return [Row([example], desirable) for example, desirable in found]


def load_rows(source: str, limit: int | None, tokenizer, args: argparse.Namespace) -> list[Row]:
    """Read, check and tokenize a data set; print what was kept and dropped."""
    raw = read_rows(source, limit)
    if not raw:
        raise BadInput(f"{source}: empty; it needs a row")
    rows, dropped = [], collections.Counter()
    for where, columns in tqdm(raw, "tokenizing", unit=" rows", leave=False):
        try:
            found = encode_row(tokenizer, columns, where, args)
        except BadInput as error:
            at = "" if str(error).startswith(where) else f"{where}: "
            raise BadInput(f"{at}{error}") from error
        if isinstance(found, str):
            dropped[found] += 1
        else:
            rows += found
    print(f"{source}: {len(raw) - dropped.total()} rows kept, {dropped.total()} dropped",
          *(f"({count}: {reason})" for reason, count in dropped.items()))
    if not rows:
        raise BadInput(f"{source}: no row is left: {'; '.join(dropped)}; raise --max_length")
    return rows


def prompt_of(row: Row) -> tuple[int, ...]:
    return tuple(row.examples[0].ids[: row.examples[0].prompt_len])


def load_data(tokenizer, args: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows; no prompt is in both."""
    rows = load_rows(args.data, args.max_rows, tokenizer, args)
    eval_rows = load_rows(args.eval_data, None, tokenizer, args) if args.eval_data else rows
    rows, eval_rows = hold_out(rows, eval_rows, args)
    desirable = sum(row.desirable for row in rows)
    print(f"{desirable} desirable and {len(rows) - desirable} undesirable rows to train on")
    if desirable in (0, len(rows)) and rows and not args.allow_one_class:
        raise BadInput(f"{args.data}: rows of one class only; add the other, or --allow_one_class")
    if not epoch_batches(rows, 0, args):
        raise BadInput(f"{args.data}: {len(rows)} rows to train on fill no batch of "
                       f"{args.batch_size}; lower --batch_size or hold out fewer prompts")
    return rows, eval_rows


def held_out_of(prompts: list[tuple], args: argparse.Namespace) -> set[tuple]:
    """The prompts (token ids) that are held out: as many as --eval_size says."""
    prompts = list(dict.fromkeys(prompts))
    size = len(prompts) if args.eval_data else min(128, len(prompts) // 20)
    size = size if args.eval_size is None else min(args.eval_size, len(prompts))
    return set(random.Random(args.seed).sample(prompts, size))


def hold_out(rows: list[Row], eval_rows: list[Row], args) -> tuple[list[Row], list[Row]]:
    """The rows whose prompts are not held out, and the held-out rows."""
    held_out = held_out_of([prompt_of(row) for row in eval_rows], args)
    kept = [row for row in rows if prompt_of(row) not in held_out]
    print(f"{len(held_out)} prompts are held out, with them {len(rows) - len(kept)} rows of --data")
    return kept, [row for row in eval_rows if prompt_of(row) in held_out]


def epoch_batches(rows: list[Row], epoch: int, args: argparse.Namespace) -> list[list[Row]]:
    """The batches of one epoch, in an order of its own; a ragged last one is dropped."""
    return cut_batches(random.Random(f"{args.seed} {epoch}").sample(rows, len(rows)), args)


def cut_batches(rows: list[Row], args: argparse.Namespace) -> list[list[Row]]:
    starts = range(0, len(rows) - args.batch_size + 1, args.batch_size)
    batches = [rows[start : start + args.batch_size] for start in starts]
    return [batch + mismatched(batch, args.max_length) for batch in batches]


def mismatched(batch: list[Row], max_length: int) -> list[Row]:
    """Each prompt with the next response, in batch order and around its end, to another prompt."""
    prompts, pairs = [prompt_of(row) for row in batch], []
    for i, prompt in enumerate(prompts):
        others = (j % len(batch) for j in range(i + 1, i + len(batch)))
        j = next((j for j in others if prompts[j] != prompt), None)
        if j is None:
            raise BadInput("a batch holds responses to one prompt only, ẑ0 needs another's; "
                           "raise --batch_size or add prompts")
        ids, start = batch[j].examples[0]
        pairs.append(Row([Example((list(prompt) + ids[start:])[:max_length], len(prompt))], None))
    return pairs


# ==================================================================================================
# 3. Rollouts: the policy writes responses, a reward scores them
# ==================================================================================================


class Prompt(NamedTuple):
    ids: list[int]
    text: str | list[dict]  # as the reward function gets it
    columns: dict  # what else the row holds, such as the answer


def load_prompts(source: str, limit: int | None, tokenizer, reward, args) -> list[Prompt]:
    """Prompts with the columns that the reward needs: {prompt}, {question}, {problem}, or what
    stands before the last message of a dialogue in `chosen`."""
    prompts, dropped = [], collections.Counter()
    usable = getattr(reward, "usable", lambda columns: True)  # has the row an answer to compare
    for where, row in tqdm(read_rows(source, limit), "tokenizing", leave=False):
        name = next((name for name in ("prompt", "question", "problem") if name in row), "prompt")
        if isinstance(row.get("chosen"), list):
            prompt = field(row, "chosen", where)[:-1]
        else:
            prompt = field(row, name, where)
        try:
            ids = encode_prompt(tokenizer, with_system(prompt, args), args.raw)
        except BadInput as error:
            raise BadInput(f"{where}: {error}") from error
        columns = {key: value for key, value in row.items()
                   if key not in ("prompt", "prompts", "completion", "completions")}
        if len(ids) + args.max_new_tokens > args.max_length:
            dropped["the prompt leaves no room for --max_new_tokens"] += 1
        elif not usable(columns):
            dropped["the reward can read no answer in the row"] += 1
        else:
            prompts.append(Prompt(ids, prompt, columns))
    print(f"{source}: {len(prompts)} prompts kept, {dropped.total()} dropped",
          *(f"({count}: {reason})" for reason, count in dropped.items()))
    if not prompts:
        raise BadInput(f"{source}: no prompt is left: {'; '.join(dropped) or 'empty'}")
    return prompts


def prompt_sets(tokenizer, reward, eval_rows: list[Row], args) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to sample from, and those to evaluate the reward on; no prompt is in both."""
    prompts = load_prompts(args.data, args.max_rows, tokenizer, reward, args)
    eval_prompts = prompts
    if args.eval_data:
        eval_prompts = load_prompts(args.eval_data, None, tokenizer, reward, args)
    if args.sample_every:
        held_out = held_out_of([tuple(p.ids) for p in eval_prompts], args)
    else:
        held_out = set(map(prompt_of, eval_rows))
    once = {tuple(p.ids): p for p in eval_prompts if tuple(p.ids) in held_out}
    prompts = [p for p in prompts if tuple(p.ids) not in held_out]
    if not prompts:
        raise BadInput(f"{args.data}: all prompts are held out; lower --eval_size")
    return prompts, list(once.values())


def load_reward(name: str):
    """The function named FILE.py:FUNCTION."""
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise BadInput(f"--reward {name}: no file {path!r}; write FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the file is the user's program
        raise BadInput(f"--reward {name}: {path} fails with {error!r}; mend it") from error
    if not callable(getattr(module, function, None)):
        raise BadInput(f"--reward {name}: no function {function!r} in {path}; define it there")
    return getattr(module, function)


def rewards_of(reward, prompts: list[Prompt], texts: list[str], args) -> list[float]:
    """One finite number a response, or BadInput that names the function and the response.

    The function is called as TRL calls it: with lists, conversations for conversations.
    """
    conversations = [not isinstance(p.text, str) for p in prompts]
    completions = [[{"role": "assistant", "content": text}] if conversation else text
                   for text, conversation in zip(texts, conversations)]
    names = dict.fromkeys(key for p in prompts for key in p.columns)
    columns = {key: [p.columns.get(key) for p in prompts] for key in names}
    try:
        values = reward(prompts=[p.text for p in prompts], completions=completions, **columns)
        values = list(values)
    except Exception as error:  # the function is the user's program
        raise BadInput(f"--reward {args.reward}: raised {error!r}; mend it") from error
    if len(values) != len(prompts):
        raise BadInput(f"--reward {args.reward}: {len(values)} values, {len(prompts)} responses; "
                       "return one for each")
    for i, (value, text) in enumerate(zip(values, texts)):
        if value is None or not math.isfinite(value):
            raise BadInput(f"--reward {args.reward}: {value} for response {i}, {text[:40]!r}; "
                           "return a finite number")
    return [float(value) for value in values]


@torch.no_grad()
def generate(model, tokenizer, prompts: list[Prompt], args, greedy: bool = False) -> list[Example]:
    """One response a prompt, with its end of turn unless cut off; torch's generator seeds it.

    Every knob that a checkpoint's generation_config may set is set here: else the samples would not
    be drawn from π_θ.
    """
    eos = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, end_of_turn(tokenizer, args.raw)[1][-1]}
    stops |= set(eos if isinstance(eos, list) else [eos]) - {None}
    options = dict(do_sample=not greedy, num_beams=1, max_new_tokens=args.max_new_tokens,
                   min_new_tokens=0, repetition_penalty=1.0, no_repeat_ngram_size=0, use_cache=True,
                   eos_token_id=sorted(stops), pad_token_id=tokenizer.pad_token_id)
    if not greedy:
        options |= dict(temperature=args.temperature, top_p=1.0, top_k=0, min_p=0.0, typical_p=1.0)
    in_training = [module for module in model.modules() if module.training]
    model.eval()  # checkpointed layers would turn the KV cache off
    found, order = {}, sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    for start in tqdm(range(0, len(order), args.gen_batch), "sampling", leave=False):
        part = [prompts[i] for i in order[start : start + args.gen_batch]]
        width = max(len(p.ids) for p in part)  # padded on the left: all end where they go on
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p.ids)) + p.ids for p in part])
        mask = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in part])
        with autocast(args):
            out = model.generate(input_ids=ids.to(args.device),
                                 attention_mask=mask.to(args.device), **options)
        for i, p, tokens in zip(order[start:], part, out[:, width:].tolist()):
            end = next((t + 1 for t, token in enumerate(tokens) if token in stops), len(tokens))
            found[i] = Example(p.ids + tokens[:end], len(p.ids))
    for module in in_training:
        module.training = True
    return [found[i] for i in range(len(prompts))]


def write_and_score(model, tokenizer, reward, prompts: list[Prompt], args, greedy=False) -> tuple:
    """(examples, texts, rewards), one of each a prompt."""
    examples = generate(model, tokenizer, prompts, args, greedy)
    texts = [tokenizer.decode(e.ids[e.prompt_len :], skip_special_tokens=True) for e in examples]
    return examples, texts, rewards_of(reward, prompts, texts, args)


def sample_batches(
    model, tokenizer, reward, prompts: list[Prompt], step: int, count: int, args: argparse.Namespace
) -> list[list[Row]]:
    """The batches of the `count` updates after `step`, written by the policy as it is now.

    The prompts follow a shuffled, endless order from a place that the step gives, so that a
    checkpoint need not hold it. Groups without a difference may give no row: more are drawn.
    """
    orders = (random.Random(f"{args.seed} {epoch}") for epoch in itertools.count())
    endless = (prompt for order in orders for prompt in order.sample(prompts, len(prompts)))
    endless = itertools.islice(endless, step * groups_needed(1, args), None)
    rows, batches, groups = [], [], 0
    while len(batches) < count:
        if groups >= 20 * groups_needed(count, args):
            raise Stopped(f"--reward {args.reward}: {groups} groups fill {len(batches)} of {count} "
                          "batches: rewards within groups are equal; look for other prompts")
        drawn = list(itertools.islice(endless, groups_needed(count - len(batches), args)))
        repeated = [p for p in drawn for _ in range(args.group_size)]
        examples, _, rewards = write_and_score(model, tokenizer, reward, repeated, args)
        for i in range(0, len(repeated), args.group_size):
            group = slice(i, i + args.group_size)
            rows += rows_of_group(examples[group], rewards[group], groups)
            groups += 1
        batches = cut_batches(rows, args)
    return batches[:count]


def groups_needed(batches: int, args: argparse.Namespace) -> int:
    """Prompts to draw for so many batches: a group gives --group_size rows at most."""
    return math.ceil(batches * args.batch_size / args.group_size)


def rows_of_group(examples: list[Example], rewards: list[float], number: int) -> list[Row]:
    """Desirable above the group's mean, undesirable below, none exactly at it."""
    mean = statistics.fmean(rewards) if min(rewards) < max(rewards) else rewards[0]
    return [Row([e], reward > mean) for e, reward in zip(examples, rewards) if reward != mean]


def pack(batch: list[Row]) -> list:
    """Sampled rows as lists, which torch.load(weights_only=True) takes."""
    return [([tuple(e) for e in row.examples], *row._replace(ref_logp=None)[1:]) for row in batch]


def unpack(batch: list) -> list[Row]:
    return [Row([Example(*e) for e in examples], *rest) for examples, *rest in batch]


# ==================================================================================================
# 4. Perception: how a human would see each token's log-ratio
# ==================================================================================================


def perceive(
    logratio: Tensor, mask: Tensor, mode: str, log_eps_P: float, log_eps_R: float,
    gamma_P: float, gamma_R: float, beta_P: float = 1.0, beta_R: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Humanline clipping or sampling (paper, section 4), upstream of any loss.

    logratio, mask: (B, T), nats. Returns the perceived log-ratio (B, T), 0 on padding, and which
    tokens lost their gradient on the low (P) and on the high (R) side, (B, T) bool.

    "clip"    z clamped to [log_eps_P, log_eps_R]: the gradient is exactly 0 outside, 1 inside.
    "sample"  a token is rejected, that is keeps its value but no gradient, when
              π_θ/π_ref < M_P · B_P  or  π_ref/π_θ < M_R · B_R,  with draws B ~ Beta(γ, β) per token
              and M the response's largest such ratio. Clipping is its limit (theorem 4.3).
    "off"     z as it is.
    """
    z = torch.where(mask, logratio, 0.0)  # masked first: padding never meets a clamp or an exp
    if mode == "off":
        return z, torch.zeros_like(mask), torch.zeros_like(mask)
    if mode == "clip":
        return z.clamp(log_eps_P, log_eps_R), mask & (z < log_eps_P), mask & (z > log_eps_R)
    value = z.detach()
    log_M_P = value.masked_fill(~mask, -math.inf).amax(-1, keepdim=True)  # (B, 1)
    log_M_R = (-value).masked_fill(~mask, -math.inf).amax(-1, keepdim=True)  # (B, 1)
    low = mask & (value < log_M_P + sample_log_beta(gamma_P, beta_P, value))
    high = mask & (-value < log_M_R + sample_log_beta(gamma_R, beta_R, value))
    return torch.where(low | high, value, z), low, high


def sample_log_beta(a: float, b: float, like: Tensor) -> Tensor:
    """Logs of Beta(a, b) draws, one for each element of `like`.

    Beta = G_a / (G_a + G_b) of Gamma draws, and log G_a = log G_{a+1} + log(U) / a: a draw with
    a = 0.01 would underflow, its logarithm does not.
    """
    log_a, log_b = (
        torch._standard_gamma(torch.full_like(like, shape + 1)).log()
        + torch.rand_like(like).clamp_min(torch.finfo(like.dtype).tiny).log() / shape
        for shape in (a, b)
    )
    return log_a - torch.logaddexp(log_a, log_b)


# ==================================================================================================
# 5. Loss
# ==================================================================================================


def kto_loss(
    logratio: Tensor, mask: Tensor, desirable: Tensor, kl: Tensor, beta: float,
    desirable_weight: float, undesirable_weight: float,
) -> Tensor:
    """KTO (Ethayarajh et al. 2024, equation 8) of perceived log-ratios.

    logratio, mask: (B, T), nats; desirable: (B,) bool; kl: scalar ẑ0, nats. Returns losses (B,).
    """
    reward = torch.where(mask, logratio, 0.0).sum(-1)  # (B,)
    gain = desirable_weight * (1 - torch.sigmoid(beta * (reward - kl)))
    loss = undesirable_weight * (1 - torch.sigmoid(beta * (kl - reward)))
    return torch.where(desirable, gain, loss)


# ==================================================================================================
# 6. Training
# ==================================================================================================


class Stopped(RuntimeError):
    """The run cannot go on; what is on disk is whole."""


def autocast(args: argparse.Namespace):
    """Precision: weights, gradients and AdamW float32; matrix products bf16 on CUDA, float32 on a
    CPU; the log-softmax and all that follows float32."""
    return torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")


def temperature_of(args: argparse.Namespace) -> float:
    """Of policy and reference alike: what was sampled at a temperature has its log-probs there."""
    return args.temperature if args.sample_every else 1.0


def plan(model, rows: list[Row], micro_tokens: int) -> list[list[int]]:
    """The micro-batches of an update, as indices; mismatched pairs apart from what is trained.
    Scoring and training use the same cut: where the policy has not moved since it scored them, the
    log-ratios are exactly 0."""
    labelled, mismatched = [], []
    for i, row in enumerate(rows):
        (mismatched if row.desirable is None else labelled).append(i)
    return [[part[j] for j in micro] for part in (labelled, mismatched)
            for micro in micro_batches(model, [rows[i].examples for i in part], micro_tokens)]


@torch.no_grad()
def score(model, rows: list[Row], args: argparse.Namespace, title: str = "") -> list[list[Tensor]]:
    """Log-probs of all responses under the policy as it is now, each (T,) float32 on the CPU."""
    scored = {}
    hide = not (title and rows)
    for micro in tqdm(plan(model, rows, args.micro_tokens), title, leave=False, disable=hide):
        examples = [e for i in micro for e in rows[i].examples]
        with autocast(args):
            logp, _ = response_logps(model, examples, temperature_of(args))  # (B, T)
        lines = iter([line[: len(e.ids) - e.prompt_len] for line, e in zip(logp.cpu(), examples)])
        scored |= {i: [next(lines) for _ in rows[i].examples] for i in micro}
    return [scored[i] for i in range(len(rows))]


def with_reference(rows: list[Row], scores: list[list[Tensor]]) -> list[Row]:
    return [row._replace(ref_logp=logp) for row, logp in zip(rows, scores)]


def next_window(model, stream, size: int, args: argparse.Namespace, title: str = ""):
    """The next `size` batches, with the policy as it is now for their reference: it scores each of
    their rows once, batch by batch, in the same cut as in training."""
    batches, scores = list(itertools.islice(stream, size)), {}
    for batch in tqdm(batches, title, unit=" batches", leave=False, disable=not title):
        fresh = [row for row in batch if id(row) not in scores]
        scores |= zip(map(id, fresh), score(model, fresh, args))
    return collections.deque(with_reference(b, [scores[id(row)] for row in b]) for b in batches)


def refill(writer, stretch, step: int, steps: int, args) -> tuple:
    """The window after update `step` and the rest of its stretch; a window never spans two.
    writer: model, tokenizer, reward and prompts, for sampling."""
    size = args.sync_every or args.sample_every
    window = next_window(writer[0], stretch, size, args)
    if not window and args.sample_every and step < steps:
        count = min(args.sample_every, steps - step)
        stretch = iter(sample_batches(*writer, step, count, args))
        window = next_window(writer[0], stretch, size, args)
    return window, stretch


def accumulate_gradient(model, batch: list[Row], args: argparse.Namespace) -> dict[str, float]:
    """Forward and backward of one update, micro-batch by micro-batch; returns its metrics."""
    micros = plan(model, batch, args.micro_tokens)
    labelled = [row for row in batch if row.desirable is not None]
    count = len(labelled)  # every mean is over the whole update, so that the cut changes nothing
    good = sum(row.desirable for row in labelled)
    tokens = sum(len(e.ids) - e.prompt_len for row in labelled for e in row.examples)
    sums = collections.Counter()  # of tensors: a GPU is asked for them once an update
    forwards = []  # the examples of each, for their padding

    def perceived_rows(micro):
        examples = [batch[i].examples[0] for i in micro]
        forwards.append(examples)
        ref_logp = [batch[i].ref_logp[0] for i in micro]
        ref_logp = pad_sequence(ref_logp, batch_first=True)  # (B, T)
        with autocast(args):
            logp, mask = response_logps(model, examples, temperature_of(args))  # (B, T)
        logratio = logp - ref_logp.to(args.device, non_blocking=True)  # (B, T)
        # Humanline clipping: one clamp of every token's log-ratio, before the loss sees it.
        perceived, low, high = perceive(logratio, mask, args.humanline, args.log_eps_P,
                                        args.log_eps_R, args.gamma_P, args.gamma_R)
        return logratio, mask, perceived, low, high

    kl = torch.zeros((), device=args.device)  # ẑ0, before anything is trained: all losses need it
    with torch.no_grad():
        for micro in micros:
            if batch[micro[0]].desirable is None:
                kl += perceived_rows(micro)[2].sum() / (len(batch) - count)
    kl = kl.clamp_min(0)
    for micro in micros:
        if batch[micro[0]].desirable is None:
            continue
        desirable = torch.tensor([batch[i].desirable for i in micro])  # (B,)
        desirable = desirable.to(args.device, non_blocking=True)
        logratio, mask, perceived, low, high = perceived_rows(micro)  # (B, T)
        losses = kto_loss(perceived, mask, desirable, kl, args.beta,
                          args.desirable_weight, args.undesirable_weight)  # (B,)
        (losses.sum() / count).backward()

        reward = args.beta * perceived.detach().sum(-1)  # (B,)
        sums.update({
            "loss": losses.detach().sum() / count,
            "reward_desirable": torch.where(desirable, reward, 0.0).sum() / max(1, good),
            "reward_undesirable": torch.where(desirable, 0.0, reward).sum() / max(1, count - good),
            "unclipped": (mask & ~low & ~high).sum() / tokens,
            "clipped_low": low.sum() / tokens,
            "clipped_high": high.sum() / tokens,
            "abs_logratio": torch.where(mask, logratio.detach(), 0.0).abs().sum() / tokens,
        })
    read = sum(len(e.ids) for row in labelled for e in row.examples)
    metrics = dict(zip([*sums, "kl"], torch.stack([*sums.values(), kl]).tolist()))
    if 0 < good < count:
        metrics["margin"] = metrics["reward_desirable"] - metrics["reward_undesirable"]
    else:  # a mean over no response is no number
        del metrics["reward_undesirable" if good else "reward_desirable"]
    return {"tokens": read, **metrics, "padded": padded_share(model, forwards)}


def wins(margin: Tensor) -> Tensor:
    """1 where the first is ahead, 0 where it is behind, ½ where they are even, as at the start."""
    return (margin.sign() + 1) / 2


# ==================================================================================================
# 7. Saving and evaluation
# ==================================================================================================


def evaluate(model, eval_rows: list[Row], args: argparse.Namespace) -> dict[str, float]:
    """On held-out labels, of the raw log-ratio against the *initial* policy, which scored them, so
    that numbers compare whatever k is: the loss with ẑ0 = 0, the margin between the classes, and
    how often a desirable response is above the median of all (½ for one on it)."""
    now = score(model, eval_rows, args, "evaluating")
    rewards = torch.stack([(x[0] - row.ref_logp[0]).sum() for x, row in zip(now, eval_rows)])
    desirable = torch.tensor([row.desirable for row in eval_rows])
    good, bad = rewards[desirable], rewards[~desirable]
    losses = kto_loss(rewards[:, None], torch.ones_like(rewards[:, None]).bool(), desirable,
                      torch.zeros(()), args.beta, args.desirable_weight, args.undesirable_weight)
    metrics = {"eval_loss": losses.mean().item()}
    if len(good):
        metrics["eval_above_median"] = wins(good - rewards.quantile(0.5)).mean().item()
    if len(good) and len(bad):
        metrics["eval_margin"] = args.beta * (good.mean() - bad.mean()).item()
    return metrics


def evaluate_reward(model, tokenizer, reward, prompts: list[Prompt], step: int, args) -> dict:
    """Mean reward on held-out prompts, greedy and sampled; all responses go to samples.jsonl."""
    metrics = {}
    for mode in ("greedy", "sampled") if prompts else ():
        greedy = mode == "greedy"
        _, texts, rewards = write_and_score(model, tokenizer, reward, prompts, args, greedy)
        metrics[f"eval_reward_{mode}"] = statistics.fmean(rewards)
        with open(Path(args.output_dir) / "samples.jsonl", "a") as file:
            for p, text, value in zip(prompts, texts, rewards):
                line = {"step": step, "mode": mode, "prompt": p.text, "response": text}
                file.write(json.dumps(line | {"reward": value}) + "\n")
    return metrics


def save_checkpoint(folder: Path, step: int, state: dict) -> None:
    """Write step-NNNNNN.pt and keep the last two. It is renamed to that name when it is whole, so a
    kill leaves the others; with a full disk the run stops, with the part of a file gone."""
    path, partial = folder / f"step-{step:06d}.pt", folder / f"writing-step-{step:06d}.pt"
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise Stopped(f"{path}: not written ({error}); those before it are whole: make room, "
                      "then go on with --resume") from error
    for old in sorted(folder.glob("step-*.pt"))[:-2]:
        old.unlink()


def load_checkpoint(folder: Path, run: dict) -> dict | None:
    """The newest whole checkpoint, or None; says which it passes over.

    Raises BadInput where that one is of another run: other arguments, data or script.
    """
    for path in sorted(folder.glob("step-*.pt"), reverse=True):
        try:
            with zipfile.ZipFile(path) as file:  # torch.load does not look at the checksums
                attributes = [name.filename for name in file.infolist() if name.external_attr]
                fault = file.testzip() or ", ".join(attributes)  # torch writes none
            state = None if fault else torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # damage may raise anything; the file is passed over, not hidden
            fault = error
        if fault:
            print(f"{path}: damaged ({fault}), passed over and renamed to damaged-{path.name}")
            path.rename(folder / f"damaged-{path.name}")
            continue
        other = [f"{name} {state['run'].get(name)}, not {value}" for name, value in run.items()
                 if state["run"].get(name) != value]
        if other:
            raise BadInput(f"--resume: {path} was made with {'; with '.join(other)}; give the same "
                           "arguments, or another --output_dir")
        print(f"resuming from {path}")
        return state
    if (folder / "final").exists():
        raise BadInput(f"--resume: no whole checkpoint in {folder}, but a policy in final/; "
                       "add --overwrite instead to replace it, or name another --output_dir")
    print(f"--resume: no whole checkpoint in {folder}, so it starts over")
    return None


def save_final(model, tokenizer, folder: Path) -> None:
    """A Hugging Face folder: float32 safetensors and tokenizer, named `final` when it is whole."""
    partial, final = folder / "writing-final", folder / "final"
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    except Exception as error:  # safetensors has an error of its own for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise Stopped(f"{final}: not written ({error}); the last checkpoint is whole: make room, "
                      "then go on with --resume") from error
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    print(f"the trained policy is in {final}")


SHOWN = {  # what the line on the screen has of metrics.jsonl
    "loss": ".4f", "margin": "+.4f", "kl": ".4f", "unclipped": ".3f", "abs_logratio": ".4f",
    "grad_norm": ".2f", "padded": ".3f", "tokens_per_second": ",.0f",
    "eval_loss": ".4f", "eval_above_median": ".3f", "eval_margin": "+.4f",
    "eval_reward_greedy": "+.3f", "eval_reward_sampled": "+.3f",
}


def log(folder: Path, metrics: dict) -> None:
    """One dict feeds the line on the screen and metrics.jsonl."""
    shown = [f"{name} {metrics[name]:{form}}" for name, form in SHOWN.items() if name in metrics]
    tqdm.write(" | ".join([f"step {metrics['step']:5d}/{metrics['steps']}", *shown]))
    try:
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
    except OSError as error:
        raise Stopped(f"{folder}/metrics.jsonl: not written ({error}); make room, then --resume")


def peak_memory_gib(args: argparse.Namespace) -> float:
    """Of the GPU's tensors on CUDA, of the whole process on a CPU."""
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo / 2**30


# ==================================================================================================
# 8. Main
# ==================================================================================================


def load_tokenizer(args: argparse.Namespace):
    """The tokenizer. Raises BadInput where it is missing or --max_length is beyond the model."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        config = AutoConfig.from_pretrained(args.model).get_text_config()
    except Exception as error:  # whatever a broken folder or the Hub raises, its message says it
        raise BadInput(f"--model {args.model}: {' '.join(str(error).split())}") from error
    context = getattr(config, "max_position_embeddings", None) or -1  # -1: any length
    if 0 < context < args.max_length:
        raise BadInput(f"--max_length {args.max_length}: the context is {context}; lower it")
    if tokenizer.eos_token_id is None:
        raise BadInput(f"--model {args.model}: the tokenizer has no EOS token; set its eos_token")
    if tokenizer.pad_token_id is None:
        print("the tokenizer has no pad token: EOS takes its place")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(tokenizer, example: Example, longest: Example, args: argparse.Namespace):
    """The policy in float32, dropout off. Raises BadInput where its weights are not fit."""
    try:  # the dtype is named since transformers would keep a bf16, which small updates do not move
        model, info = AutoModelForCausalLM.from_pretrained(
            args.model, dtype=torch.float32, output_loading_info=True)
    except Exception as error:
        raise BadInput(f"--model {args.model}: {' '.join(str(error).split())}") from error
    rows = model.get_input_embeddings().weight.shape[0]
    bad = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if info["missing_keys"] or bad:
        names = ", ".join([*info["missing_keys"], *bad][:3])
        raise BadInput(f"--model {args.model}: weights missing or not finite: {names}; mend it")
    if len(tokenizer) > rows:
        raise BadInput(f"--model {args.model}: {len(tokenizer)} tokens in the tokenizer, {rows} "
                       "embeddings; use the model's own tokenizer")
    model.to(args.device).eval()  # for the whole run: there is no dropout in scoring or in training
    check_model(model, example)
    check_sharing(model, longest)
    if args.activation_checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        for module in model.modules():  # works in training mode only; what is inside stays in eval
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True
    return model


def describe(model, tokenizer, rows: list[Row], eval_rows: list[Row], args) -> None:
    """What to look at before a long run."""
    weights = sum(weight.numel() for weight in model.parameters())
    print(f"{weights / 1e6:,.1f}M parameters; weights, gradients, AdamW: {weights / 2**26:.2f} GiB")
    if not rows:
        return
    tokens = sum(len(e.ids) for row in rows for e in row.examples)
    ids, cut = rows[0].examples[0]
    scores = score(model, rows[:256], args, "data quality")
    means = torch.stack([logp.mean() for row in scores for logp in row])
    low, middle, high = means.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    print(f"{len(rows)} rows to train on with {tokens:,} tokens, {len(eval_rows)} rows held out",
          "an example, its trained part in ⟦⟧: "
          f"{tokenizer.decode(ids[:cut])}⟦{tokenizer.decode(ids[cut:])}⟧",
          f"quartiles of responses' mean token log-prob: {low:.2f} {middle:.2f} {high:.2f} nats",
          "  (nearer 0 is closer to what the policy writes itself, and more useful; in the paper",
          "  the worst quarter, [−1.03, −0.36], trained significantly worse)", sep="\n")


def main(args: argparse.Namespace) -> dict:
    """Train; returns the summary: evaluation `before` and `after`, steps, tokens, seconds, memory.

    Raises BadInput before anything is written, Stopped where the run cannot go on.
    """
    check_args(args)
    torch.manual_seed(args.seed)
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    tokenizer = load_tokenizer(args)
    reward = load_reward(args.reward) if args.reward else None
    rows, eval_rows = ([], []) if args.sample_every else load_data(tokenizer, args)
    prompts, eval_prompts = prompt_sets(tokenizer, reward, eval_rows, args) if reward else ([], [])
    n, k = args.sample_every, args.sync_every
    steps, epoch = 0, 0  # all epochs of the run are cut here: one that cannot be says so now
    while rows and (steps < args.steps if args.steps else epoch < args.epochs):
        steps, epoch = steps + len(epoch_batches(rows, epoch, args)), epoch + 1
    if n:
        steps = -(-args.epochs * len(prompts) // groups_needed(1, args))
    steps = args.steps or steps
    first = rows[0].examples[0] if rows else Example(prompts[0].ids * 2, len(prompts[0].ids))
    examples = [example for row in rows + eval_rows for example in row.examples]
    longest = max(examples, key=lambda e: len(e.ids), default=None)
    if n:  # as long as a sample may become
        ids = first.ids[: first.prompt_len]
        longest = Example((ids * args.max_length)[: args.max_length], len(ids))
    model = load_policy(tokenizer, first, longest, args)
    used = {id(row) for batch in epoch_batches(rows, 0, args) for row in batch} if rows else ()
    ragged = sum(id(row) not in used for row in rows)
    if n:
        print(f"{steps} updates on samples to {len(prompts)} prompts, {len(eval_prompts)} held out")
    else:
        print(f"{steps} updates; {ragged} rows of an epoch fill no batch and are left out of it")

    data = [[row.examples for row in rows + eval_rows], [p.ids for p in prompts + eval_prompts]]
    digest = hashlib.sha256(repr(data).encode()).hexdigest()
    run = {"script": Path(__file__).stem, "data with SHA-256": digest, "updates": steps}
    run |= {f"--{name}": value for name, value in vars(args).items()
            if name not in ("resume", "overwrite", "output_dir", "plain")}
    folder = Path(args.output_dir)
    state = load_checkpoint(folder, run) if args.resume else None
    folder.mkdir(parents=True, exist_ok=True)
    for old in ["writing-*"] if state else ["writing-*", "step-*.pt", "final"]:
        for path in folder.glob(old):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for file in (folder / "metrics.jsonl", folder / "samples.jsonl")[: 2 if reward else 1]:
        lines = file.read_text().splitlines(True) if state and file.exists() else []
        lines = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= state["step"]]
        (folder / "writing-lines").write_text("".join(lines))
        os.replace(folder / "writing-lines", file)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    if state:
        model.load_state_dict(state.pop("model"))
        optimizer.load_state_dict(state.pop("optimizer"))
        done, before, after = state["step"], state["before"], state["after"]
        seconds, tokens = state["seconds"], state["tokens"]
        eval_rows = with_reference(eval_rows, state["eval_scores"])
    else:
        describe(model, tokenizer, rows, eval_rows, args)
        done, seconds, tokens = 0, 0.0, 0
        eval_rows = with_reference(eval_rows, score(model, eval_rows, args, "held-out rows"))
        before = evaluate(model, eval_rows, args) if eval_rows else {}
        before |= evaluate_reward(model, tokenizer, reward, eval_prompts, 0, args)
        after = before
        log(folder, {"step": 0, "steps": steps, **before})
    writer = model, tokenizer, reward, prompts
    # A stretch is what is trained on until the policy writes anew: offline the run, else n updates.
    batches = (batch for epoch in itertools.count() for batch in epoch_batches(rows, epoch, args))
    stretch, size = itertools.islice(batches, done, steps), k or n or steps
    if state and n:
        stretch = iter([unpack(batch) for batch in state["stretch"]])
    if state:
        window = collections.deque(with_reference(b, x) for x, b in zip(state["window"], stretch))
        torch.set_rng_state(state["rng"])
        if args.device == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"])
    else:  # k = 0 is one window that spans the run: the reference is the initial policy for ever
        started = time.perf_counter()
        if n:
            stretch = iter(sample_batches(*writer, 0, min(n, steps), args))
        window = next_window(model, stretch, size, args, "scoring for the reference")
        seconds = time.perf_counter() - started

    # SIGINT and SIGTERM: the update is finished and saved first; a second one stops at once.
    signals, stop = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}, []
    for s in signals:
        signal.signal(s, lambda s, _: os._exit(128 + s) if stop else stop.append(s))
    bar = tqdm(total=steps, initial=done, desc="training", unit="update")
    try:
        for step in range(done + 1, steps + 1):
            started, batch = time.perf_counter(), window.popleft()
            metrics = {"step": step, "steps": steps, **accumulate_gradient(model, batch, args)}
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()
            if not math.isfinite(norm + metrics["loss"]):
                raise Stopped(f"update {step}: loss {metrics['loss']}, gradient norm {norm}; it "
                              "was not applied, checkpoints are from before it; try a lower --lr")
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1.0, step / max(1, args.warmup))

            # Humanline syncing. When its k batches are used up, the window is filled anew: the
            # policy as it still is, before this update, (samples and) scores the next k batches and
            # so is their reference, which lags one update. Scored after the update they would meet
            # that same policy: with k = 1 all log-ratios would be 0 and nothing ever clipped.
            if k > 0 and not window:
                window, stretch = refill(writer, stretch, step, steps, args)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if k == 0 and not window:  # the online baseline: n = 1 is exactly on-policy
                window, stretch = refill(writer, stretch, step, steps, args)

            took, last = time.perf_counter() - started, step == steps
            speed = metrics["tokens"] / took
            seconds, tokens = seconds + took, tokens + metrics["tokens"]
            metrics |= {"grad_norm": norm, "lr": optimizer.param_groups[0]["lr"], "tokens": tokens,
                        "tokens_per_second": speed, "seconds": seconds,
                        "peak_memory_gib": peak_memory_gib(args)}
            if last or args.eval_every and step % args.eval_every == 0:
                after = evaluate(model, eval_rows, args) if eval_rows else {}
                after |= evaluate_reward(model, tokenizer, reward, eval_prompts, step, args)
                metrics |= after
            log(folder, metrics)
            bar.update()
            if last or stop or args.save_every and step % args.save_every == 0:
                if not all(weight.isfinite().all() for weight in model.parameters()):
                    raise Stopped(f"update {step}: its weights are not finite; the checkpoints are "
                                  "from before it; try a lower --lr")
                rest = list(stretch) if n else []  # of a stretch that nothing could make again
                stretch = iter(rest) if n else stretch
                save_checkpoint(folder, step, {
                    "run": run, "step": step, "before": before, "after": after,
                    "seconds": seconds, "tokens": tokens, "rng": torch.get_rng_state(),
                    "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                    "cuda_rng": torch.cuda.get_rng_state() if args.device == "cuda" else None,
                    # the weights that scored these are gone
                    "window": [[row.ref_logp for row in batch] for batch in window],
                    "stretch": [pack(batch) for batch in [*window, *rest]] if n else None,
                    "eval_scores": [row.ref_logp for row in eval_rows],
                })
            if stop:
                print(f"stopped by signal {stop[0]} after update {step}; go on with --resume")
                raise SystemExit(128 + stop[0])
    finally:
        bar.close()
        for s, handler in signals.items():
            signal.signal(s, handler)
    save_final(model, tokenizer, folder)
    return {"before": before, "after": after, "steps": steps, "tokens": tokens, "seconds": seconds,
            "tokens_per_second": tokens / max(seconds, 1e-9), "output_dir": str(folder),
            "peak_memory_gib": peak_memory_gib(args)}


if __name__ == "__main__":
    try:
        main(parse_args())
    except (BadInput, Stopped) as error:
        sys.exit(f"error: {error}")
    except torch.cuda.OutOfMemoryError:
        sys.exit("error: out of GPU memory; lower --micro_tokens or add --activation_checkpointing")
    except KeyboardInterrupt:
        sys.exit(130)
