"""Tokenization and log-probabilities: all that the three scripts import.

Shapes: B responses, T tokens of the longest, N tokens of all of them, L tokens of a padded row (a
prompt and one response, or several), H hidden size, V vocabulary. Log-probabilities are in nats.
"""

import contextlib
import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import GenerationConfig

# Bytes of float32 logits that exist at once: on a CPU they should fit the cache, on a GPU fill it;
# and tokens of padding that are cheaper than one more micro-batch. CUDA's numbers are guesses.
BLOCK_BYTES = {"cpu": 2**22, "cuda": 2**28}
MAX_PADDING = {"cpu": 64, "cuda": 512}
ROLES = ("system", "developer", "user", "assistant", "tool")


class BadInput(ValueError):
    """An input that cannot be used: one line that says where, what, and what to do about it."""


@contextlib.contextmanager
def errors_in(where: str):
    """Whatever is raised inside becomes one line, BadInput, that says where."""
    try:
        yield
    except Exception as error:
        words = (str(error.__cause__ or error) or repr(error)).split()
        raise BadInput(f"{where}: {' '.join(words)}") from error


class Example(NamedTuple):
    """A tokenized prompt and response: ids[:prompt_len] is read, ids[prompt_len:] is trained."""

    ids: list[int]
    prompt_len: int


# --- Tokenization: a response is what generation would have produced after the prompt ------------


def as_messages(value: str | list[dict], role: str, name: str) -> list[dict]:
    """A text or messages as messages of role and content. Raises BadInput for anything else."""
    if value is None:
        raise BadInput(f"{name} is null or missing; give it a text or drop the row")
    messages = value if isinstance(value, list) else [{"role": role, "content": value}]
    for m in messages:
        if not isinstance(m, dict) or m.get("role") not in ROLES or type(m.get("content")) != str:
            raise BadInput(f"{name} is no text, nor messages with a role and a text: {m!r:.60}")
        if m["content"] != m["content"].encode(errors="ignore").decode():
            raise BadInput(f"{name} has a lone surrogate, no character; write the file as UTF-8")
    if not messages or not messages[-1]["content"].strip():
        raise BadInput(f"{name} is empty; give it a text or drop the row")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def prompt_in(row: dict) -> str | list[dict] | None:
    """A data row's prompt: what stands before the last message of a dialogue, else a column."""
    if isinstance(row.get("chosen"), list) and len(row["chosen"]) > 1:
        return row["chosen"][:-1]
    return next((row[name] for name in ("prompt", "question", "problem") if row.get(name)), None)


def render(tokenizer, messages: list[dict], **options) -> str:
    with errors_in("the chat template does not take these messages"):
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def tokenize(tokenizer, text: str, raw=False) -> list[int]:
    """Templates write their special tokens themselves; raw text gets the tokenizer's BOS, once."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    wanted = raw and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id != ids[0]
    return [tokenizer.bos_token_id, *ids] if wanted else ids


@functools.lru_cache(maxsize=8)
def end_of_turn(tokenizer, template: str) -> tuple[str, list[int]]:
    """What the chat template puts after an answer: the text, and the tokens that end a response:
    the leading run of special tokens (two in Cohere 2), else the tokenizer's EOS."""
    if not template:
        return "", [tokenizer.eos_token_id]
    user, answer = {"role": "user", "content": "Q?"}, "An answer."
    text = render(tokenizer, [user, {"role": "assistant", "content": answer}])
    if answer not in text:
        raise BadInput("the chat template leaves out a string's text; use a text template")
    tail = text.rpartition(answer)[2]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    # Qwen and Gemma put "\n" after the special token, which sampling never produces.
    end = itertools.takewhile(special.__contains__, tokenize(tokenizer, tail))
    return tail, list(end) or [tokenizer.eos_token_id]


def encode_prompt(tokenizer, prompt: str | list[dict], raw=False, system=None) -> tuple:
    """A prompt, ready for generation: token ids, text, messages (None: without the chat template).

    prompt: messages, or a string, which is a user message where there is a template, unless raw.
    system: a system message to put before. Raises BadInput for an empty prompt, what is no text or
    message, messages without a template, and what the template refuses."""
    messages = as_messages(prompt, "user", "the prompt")
    if messages[-1]["role"] == "assistant":
        raise BadInput("the prompt ends with an assistant message; drop that")
    if system:
        messages.insert(0, {"role": "system", "content": system})
    elif isinstance(prompt, str) and (raw or not tokenizer.chat_template):
        return tokenize(tokenizer, prompt, raw=True), prompt, None
    text = render(tokenizer, messages, add_generation_prompt=True)
    return tokenize(tokenizer, text), text, messages


def encode(tokenizer, prompt: str | list[dict] | None, response: str | list[dict], max_length: int,
           raw=False, system=None, name="the response") -> Example | None:
    """Token ids of a prompt and a response, at most max_length; None if the prompt leaves no room.

    response: a string, an assistant message in a list, or a whole dialogue that brings its prompt.
    It becomes what the template puts after the prompt, up to the end of turn; where that does not
    start as the prompt does (reasoning templates), its text and the end of turn; cut, it has no
    end. Raises BadInput as encode_prompt does, about what `name` names."""
    *dialogue, answer = as_messages(response, "assistant", name)
    if answer["role"] != "assistant":
        raise BadInput(f"{name} ends with no assistant message; drop what follows it")
    prompt_ids, before, messages = encode_prompt(tokenizer, dialogue or prompt, raw, system)
    text, raw = answer["content"], messages is None
    tail, end = end_of_turn(tokenizer, "" if raw else str(tokenizer.chat_template))
    if not raw:
        whole = render(tokenizer, [*messages, answer])
        if whole.startswith(before) and whole.endswith(tail):
            text = whole[len(before) : len(whole) - len(tail)]
    ids = tokenize(tokenizer, before + text, raw)
    if ids[: len(prompt_ids)] == prompt_ids:
        ids = ids[len(prompt_ids) :]
    else:  # a token straddles the boundary; generation starts after the prompt's own tokens
        ids = tokenize(tokenizer, text)
    stops = {tokenizer.eos_token_id, *end}
    ids = [*itertools.takewhile(lambda token: token not in stops, ids), *end]
    example = Example((prompt_ids + ids)[:max_length], len(prompt_ids))
    return example if len(prompt_ids) < max_length else None


@contextlib.contextmanager
def weights_as(model, dtype):
    """The model with weights of another dtype; afterwards with its own. Takes the memory of both."""
    weights = {weight: weight.data for weight in model.parameters()}
    for weight in weights:
        weight.data = weight.data.to(dtype)
    yield
    for weight, data in weights.items():
        weight.data = data


@torch.no_grad()
def sample_responses(model, tokenizer, prompts: list[list[int]], max_new_tokens: int,
                     temperature: float, batch_size: int, raw=False) -> tuple[list, list[str]]:
    """One response a prompt (token ids) from π_θ at a temperature (0: greedy): as Examples, with an
    end of turn unless cut off, and as texts. torch's global generator draws."""
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    eos = model.generation_config.eos_token_id  # none, one or several
    _, end = end_of_turn(tokenizer, "" if raw else str(tokenizer.chat_template or ""))
    stops = {tokenizer.eos_token_id, end[-1], *(eos if isinstance(eos, list) else [eos])} - {None}
    draws = dict(do_sample=True, temperature=temperature, top_p=1.0, top_k=0) if temperature else {}
    config = GenerationConfig(max_new_tokens=max_new_tokens, repetition_penalty=1.0, **draws,
                              eos_token_id=sorted(stops), pad_token_id=tokenizer.pad_token_id)
    # On CUDA in bf16. Under autocast keys are float32, and so is the cache: twice as large.
    dtype = torch.bfloat16 if model.device.type == "cuda" else model.dtype
    kept, training, examples = model.generation_config, model.training, []
    model.generation_config = config  # generate fills what is unset from there: not from π_θ
    model.eval()  # activation checkpointing, which works in training, turns the KV cache off
    for start in tqdm(range(0, len(prompts), batch_size), "sampling", leave=False, delay=2):
        part = prompts[start : start + batch_size]  # padded on the left: all end alike
        inputs = tokenizer.pad({"input_ids": part}, padding_side="left", return_tensors="pt")
        with weights_as(model, dtype):
            out = model.generate(**inputs.to(model.device), generation_config=config)
        for prompt, ids in zip(part, out[:, inputs["input_ids"].shape[1] :].tolist()):
            end = next((t + 1 for t, token in enumerate(ids) if token in stops), len(ids))
            examples.append(Example(prompt + ids[:end], len(prompt)))
    model.generation_config = kept
    model.train(training)
    responses = [e.ids[e.prompt_len :] for e in examples]
    return examples, tokenizer.batch_decode(responses, skip_special_tokens=True)


# --- Log-probabilities of response tokens, without ever holding tokens × vocabulary ---------------


class TokenLogps(torch.autograd.Function):
    """log softmax(head(hidden))[target], one block of the vocabulary at a time. The backward
    makes its logits again. Products run in the compute dtype (bf16 in autocast), else float32."""

    @staticmethod
    def forward(ctx, hidden, weight, target, cap):
        on, ctx.cap, lse = hidden.device.type, cap, []
        ctx.dtype = torch.get_autocast_dtype(on) if torch.is_autocast_enabled(on) else weight.dtype
        ctx.size = BLOCK_BYTES[on] // (4 * len(target)) // 64 * 64 + 64  # aligned, so faster
        h = hidden.to(ctx.dtype)
        for w in weight.split(ctx.size):
            logits = head_logits(w.to(ctx.dtype), h, cap)  # (size, N)
            top = logits.amax(0)  # (N,)
            lse.append(logits.sub_(top).exp_().sum(0).log_().add_(top))
        lse = torch.stack(lse).logsumexp(0)  # (N,)
        chosen = (h.float() * weight[target].to(ctx.dtype)).sum(-1)  # (N,) the target's logit
        ctx.save_for_backward(hidden, weight, target, lse)
        return soft_cap(chosen, cap) - lse  # (N,) float32

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, target, lse = ctx.saved_tensors
        h, scaled = hidden.to(ctx.dtype), (hidden * -grad[:, None]).to(ctx.dtype)  # (N, H)
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.empty_like(weight)
        for i in range(0, len(weight), ctx.size):
            w = weight[i : i + ctx.size].to(ctx.dtype)  # (size, H)
            logits = head_logits(w, h, ctx.cap)  # (size, N)
            slope = 1 - (logits / ctx.cap) ** 2 if ctx.cap else None
            # d logp / d logits = onehot(target) − softmax(logits). d is its negative; a
            # token's factor, −grad, is applied where that costs H and not V multiplications.
            d, at = logits.sub_(lse).exp_(), target - i
            inside = (at >= 0) & (at < len(w))
            d.scatter_add_(0, at.clamp(0, len(w) - 1)[None], -inside[None].float())
            d = (d.mul_(slope) if ctx.cap else d).to(ctx.dtype)
            grad_hidden += d.T @ w
            grad_weight[i : i + ctx.size] = d @ scaled
        return grad_hidden * -grad[:, None], grad_weight, None, None


def head_logits(weight, hidden, cap):
    """(size, H), (N, H) -> (size, N), capped; float32 that on CUDA was never bf16."""
    options = {"out_dtype": torch.float32} if hidden.is_cuda and hidden.dtype.itemsize < 4 else {}
    return soft_cap(torch.mm(weight, hidden.T, **options).float(), cap)


def soft_cap(logits, cap):  # Gemma's, in place
    return logits.div_(cap).tanh_().mul_(cap) if cap else logits


def micro_batches(units: list[list[Example]], micro_tokens: int, device: str) -> list[list[int]]:
    """Cut units (indices) into micro-batches of at most micro_tokens tokens, padding included.

    The longest units come first, so that a micro-batch holds examples of about one length. The
    examples of a unit stay together; a unit that is too large runs alone. A micro-batch also ends
    where its padding would cost more than another forward (MAX_PADDING)."""
    micros, lengths = [[]], []  # lengths: of the examples in the last micro-batch
    for i in sorted(range(len(units)), key=lambda i: -max(len(e.ids) for e in units[i])):
        own = [len(example.ids) for example in units[i]]
        lengths += own
        padded = len(lengths) * max(lengths)
        full = padded > micro_tokens or padded - sum(lengths) > MAX_PADDING[device]
        if full and micros[-1]:
            micros.append([])
            lengths = own
        micros[-1].append(i)
    return [sorted(micro) for micro in micros if micro]


def response_logps(model, examples: list[Example], temperature=1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of every response token, in nats: logp (B, T) float32, 0 on padding, and mask
    (B, T) bool, true on response tokens (from lengths), both on the model's device; t = 0 is the
    first response token. Sequences are padded on the right: a causal model never looks there, so
    no attention mask is needed, and the fastest attention kernels serve."""
    ids = pad_sequence([torch.tensor(e.ids) for e in examples], batch_first=True)  # (B, L)
    first, end = torch.tensor([[e.prompt_len, len(e.ids)] for e in examples]).T[..., None]  # (B, 1)
    place = torch.arange(ids.shape[1])  # (L,)
    trained = (first <= place) & (place < end)  # (B, L) response tokens
    target, sizes = ids[trained], trained.sum(1)  # (N,), (B,)
    mask = torch.arange(sizes.max()) < sizes[:, None]  # (B, T)
    # The one shift: a token is predicted from the state before it. Found on the CPU: no waiting.
    states = trained[:, 1:].flatten().nonzero().squeeze(1)  # (N,)
    inputs, states, target, mask = (
        x.to(model.device, non_blocking=True) for x in (ids[:, :-1], states, target, mask))

    hidden = model.base_model(inputs, use_cache=False).last_hidden_state  # (B, L, H)
    hidden = hidden.flatten(0, 1).index_select(0, states).float()  # (N, H): not of prompt tokens
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1  # Cohere
    scale = scale / (getattr(config, "logits_scaling", None) or 1) / temperature  # Granite
    cap = (getattr(config, "final_logit_softcapping", None) or 0) / temperature  # Gemma
    head = model.get_output_embeddings().weight  # (V, H)
    logp = TokenLogps.apply(hidden * scale, head, target, cap)  # (N,)
    return pad_sequence(logp.split(sizes.tolist()), batch_first=True), mask


@torch.no_grad()
def check_model(model, tokenizer, max_length: int) -> None:
    """Refuse a model that these helpers cannot serve."""
    config, size = model.config.get_text_config(), len(model.get_input_embeddings().weight)
    broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if tokenizer.eos_token_id is None:
        raise BadInput("the tokenizer has no EOS token; set its eos_token")
    if broken:
        raise BadInput(f"weights are not finite: {', '.join(broken[:3])}")
    if len(tokenizer) > size:
        raise BadInput(f"{len(tokenizer)} tokens in the tokenizer, but {size} embeddings")
    if max_length > (getattr(config, "max_position_embeddings", None) or max_length):
        raise BadInput(f"--max_length: the context is {config.max_position_embeddings}; lower it")
    ids = torch.randint(size, (max_length,)).tolist()  # the longest example that can occur
    example = Example(ids, max(1, max_length - 32))
    target = ids[example.prompt_len :]
    logp, _ = response_logps(model, [example])  # (1, T)
    inputs = torch.tensor([ids], device=model.device)
    logits = model(inputs, logits_to_keep=len(target) + 1).logits[0, :-1]  # (T, V)
    truth = logits.log_softmax(-1)[range(len(target)), target]
    if not (logp[0] - truth).abs().max() < 5e-3:
        raise BadInput(f"common.py does not rebuild the logits of {model.config.model_type}")
