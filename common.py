"""Tokenization and log-probabilities: all that the three scripts import.

Shapes: B responses, T tokens of the longest, N tokens of all of them, L tokens of a padded prompt
and response, H hidden size, V vocabulary. Log-probabilities are in nats.
"""

import contextlib
import copy
import itertools
import json
import re
from collections import deque
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
# Weights of generate. Under autocast keys are float32, and so is the cache: twice as large.
SAMPLING_DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
ROUND = 256  # tokens that a batch samples before its finished responses leave it
TOO_LARGE = "lower --micro_tokens, or add --activation_checkpointing or --lora_rank"
SYSTEM = ("system", "developer")
UNREAD = ("tools", "image", "images", "history", "system_prompt", "input")  # parts of a prompt
THOUGHTS = ("reasoning_content", "thinking")  # keys of a message

class BadInput(ValueError):
    """An input that cannot be used: one line that says where, what, and what to do about it."""

@contextlib.contextmanager
def errors_in(where: str, kind: type = Exception):
    """Whatever of this kind is raised inside becomes one line, BadInput, that says where."""
    try:
        yield
    except kind as error:
        unclear = isinstance(error, LookupError) or not str(error)  # KeyError: 'solution'
        words = f"{type(error).__name__}: {error}" if unclear else str(error)
        raise BadInput(f"{where}: {' '.join(words.split())}") from error

class Example(NamedTuple):
    """A tokenized prompt, which is read, and response, which is trained."""

    ids: Tensor  # (length,) int32, of both
    prompt_len: int
    cut: bool = False  # the response, at --max_length

    @property
    def prompt(self) -> tuple[int, ...]:
        return tuple(self.ids[: self.prompt_len].tolist())

    @property
    def response(self) -> list[int]:
        return self.ids[self.prompt_len :].tolist()


# === Tokenization: a response is what generation would have produced after the prompt ===
def as_messages(value: str | list[dict], role: str, name: str) -> list[dict]:
    """A text, or messages, as messages with all their keys that are not null."""
    messages = []
    for m in value if isinstance(value, list) else [{"role": role, "content": value}]:
        m = {key: x for key, x in m.items() if x is not None} if isinstance(m, dict) else {}
        m.setdefault("content", "" if m.get("tool_calls") else None)
        if not isinstance(m.get("role"), str) or not isinstance(m["content"], str):
            raise BadInput(f"{name} is no text, nor messages with a role and a text: {value!r:.60}")
        messages.append(m)
    if not messages or not (messages[-1]["content"].strip() or messages[-1].get("tool_calls")):
        raise BadInput(f"{name} is empty; give it a text or drop the row")
    return messages

def prompt_in(row: dict) -> str | list[dict] | None:
    """A data row's prompt: of the first column that has one."""
    return next((row[name] for name in ("prompt", "question", "problem") if row.get(name)), None)

def dialogue_in(row: dict, name: str | None, system: str | None) -> list[dict]:
    """A data row's messages: the system message (the row's own, else `system`), the prompt, and
    those of column `name`, which may bring the prompt, or the end of it, once more."""
    messages = as_messages(prompt_in(row), "user", "the prompt") if prompt_in(row) else []
    more = as_messages(row.get(name), "assistant", name) if name else []
    if messages and more and more[0]["role"] != "assistant":
        brought = messages[-1] in more
        messages = [m for m in messages if m not in more]
        if not brought or messages and more[0]["role"] in SYSTEM:
            raise BadInput(f"the prompt and {name} begin differently; drop one beginning")
    messages += more
    if len(messages) < (2 if more else 1):
        raise BadInput("there is no prompt; give a column prompt, or whole dialogues as messages")
    system = row.get("system") or system
    if system and messages[0]["role"] not in SYSTEM:
        messages.insert(0, {"role": "system", "content": system})
    if (messages[-1]["role"] == "assistant") != bool(name):
        raise BadInput(f"{name or 'the prompt'} ends with a message of role {messages[-1]['role']}")
    return messages

def end_of_turn(tokenizer) -> tuple[str, list[int]]:
    """What the chat template puts after an answer: the text, and the tokens that end a response:
    the leading special tokens (two in Cohere 2) up to one that opens a message (the first Llama 3
    always writes the next header); else an added token that is not called special; else EOS."""
    eos, added = [tokenizer.eos_token_id], tokenizer.added_tokens_decoder
    if not tokenizer.chat_template:
        return "", eos
    dialogue = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "An answer."}]
    whole = tokenizer.apply_chat_template(dialogue, tokenize=False)
    tail = whole.rpartition("An answer.")[2]  # often with "\n", which sampling never produces
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    opener = next(i for i in ids if i != tokenizer.bos_token_id)
    ids = tokenizer(tail.strip(), add_special_tokens=False)["input_ids"]
    end = [*itertools.takewhile(lambda i: i in added and added[i].special and i != opener, ids)]
    return tail, end or [i for i in ids[:1] if i in added] or eos

def encode(tokenizer, row: dict, name: str | None, args) -> Example | None:
    """The prompt of a data row and the response in column `name` (None: no response) as tokens.

    The response is what the chat template puts after the prompt, up to the end of turn; without a
    template (--raw) both are texts. args: max_length, system_prompt, chat_template_kwargs. None if
    the prompt leaves no room. Raises BadInput for what is no text, is empty, or is left out."""
    messages, raw = dialogue_in(row, name, args.system_prompt), not tokenizer.chat_template
    answer = messages.pop() if name else {"content": ""}
    for column in UNREAD:
        if row.get(column) and (column != "input" or prompt_in(row)):
            raise BadInput(f"the column {column} is left out of the prompt; drop it, or the row")
    if raw and (len(messages) > 1 or isinstance(prompt_in(row), list)):
        raise BadInput("messages need a chat template, and there is none (--raw: it is not used)")
    before, text = messages[0]["content"], answer["content"]
    tail, end = end_of_turn(tokenizer)
    if not raw:
        options = {"tokenize": False, **args.chat_template_kwargs}
        before = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
        for m in messages:
            if missing := left_out(m, before, earlier=True):
                raise BadInput(f"the chat template leaves out the {m['role']} message's {missing}")
        if name:
            whole = tokenizer.apply_chat_template([*messages, answer], **options)
            text = response_text(before, whole.removesuffix(tail), answer)
    if re.search("[\ud800-\udfff]", before + text):
        raise BadInput("a text has half a character (a lone surrogate); mend it or drop the row")
    prompt = tokenizer(before, add_special_tokens=False)["input_ids"]
    both = tokenizer(before + text, add_special_tokens=False)["input_ids"]
    ids = both[len(prompt) :]
    if prompt + ids != both:  # a token straddles the boundary, where generation starts
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos, stops = tokenizer.bos_token_id, {tokenizer.eos_token_id, *end}
    if raw and prompt[0] != bos and bos in tokenizer("")["input_ids"]:
        prompt.insert(0, bos)
    response = [*itertools.takewhile(lambda token: token not in stops, ids)]
    cut = any(token not in stops for token in ids[len(response) :])  # at an end inside the answer
    ids = prompt + response + end if name else prompt
    if len(prompt) >= args.max_length:
        return None
    kept = torch.tensor(ids[: args.max_length], dtype=torch.int32)
    return Example(kept, len(prompt), cut or len(ids) > len(kept))

def left_out(message: dict, render: str, earlier: bool) -> str | None:
    """A key of a message that the chat template's render has not: a text as it is, as JSON (tool
    results in Llama 3.1), or without the switches that SmolLM3 takes out; a tool call's name."""
    parts = [("content", text) for text in re.split("</?think>", message["content"])]
    if earlier and message["role"] == "assistant":
        parts = parts[-1:]  # templates drop the thoughts of earlier turns
    parts += [("tool_calls", x.get("function", x)["name"]) for x in message.get("tool_calls", [])]
    parts += [(key, message[key]) for key in THOUGHTS if key in message and not earlier]
    for key, text in parts:
        as_json = json.dumps(text.strip(), ensure_ascii=False)[1:-1]
        no_switch = text.replace("/no_think", "").replace("/think", "").strip()
        if not any(form in render for form in (text.strip(), as_json, no_switch)):
            return key
    return None

def response_text(before: str, whole: str, answer: dict) -> str:
    """What the template puts after the prompt. Where it drops some of the answer, or does not go on
    from the prompt (as templates of reasoning models do), the answer's own text."""
    text, keys = whole[len(before) :], [key for key in (*THOUGHTS, "tool_calls") if answer.get(key)]
    if whole.startswith(before) and not left_out(answer, text, earlier=False):
        return text
    if keys:
        raise BadInput(f"the chat template leaves out the assistant's {' or '.join(keys)}")
    if not before.rstrip().endswith("<think>"):
        return answer["content"]
    thought, _, text = answer["content"].rpartition("</think>")  # the prompt opens the thought
    return thought.replace("<think>", "", 1).lstrip() + "</think>\n\n" + text.lstrip()

@torch.no_grad()
@errors_in("lower --gen_batch", torch.OutOfMemoryError)
def sample_responses(model, tokenizer, prompts: list[list[int]], max_new_tokens: int,
                     temperature: float, batch_size: int) -> tuple[list[Example], list[str]]:
    """One response a prompt (token ids) from π_θ at a temperature (0: greedy): as Examples, with an
    end of turn unless cut off, and as texts. torch's global generator draws. What has not ended
    after a round goes to the end of a queue: no response waits for the longest."""
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    eos = model.generation_config.eos_token_id  # none, one or several
    stops = {tokenizer.eos_token_id, *end_of_turn(tokenizer)[1][-1:]}
    stops.update(eos if isinstance(eos, list) else {eos} - {None})
    dtype = SAMPLING_DTYPE[model.device.type]
    weights = {id(w): torch.nn.Parameter(w.to(dtype), False) for w in model.parameters()}
    sampler = copy.deepcopy(model, weights).eval()  # deepcopy takes these weights, copies the rest
    config = sampler.generation_config = GenerationConfig(  # the checkpoint's may have a top_k
        do_sample=temperature > 0, temperature=temperature or 1.0, top_k=0, top_p=1.0,
        eos_token_id=sorted(stops), pad_token_id=tokenizer.pad_token_id,
        prefill_chunk_size=None if model._is_stateful else ROUND)  # less memory; Mamba has no cache
    ids = [list(prompt) for prompt in prompts]  # and what has been sampled after them
    most = [len(prompt) + max_new_tokens for prompt in prompts]
    queue = deque(range(len(prompts)))
    bar = tqdm(total=len(prompts), desc="sampling", leave=False, delay=2)
    while queue:
        batch = [queue.popleft() for _ in range(min(batch_size, len(queue)))]
        inputs = {"input_ids": [ids[i] for i in batch]}  # padded on the left: all end alike
        inputs = tokenizer.pad(inputs, padding_side="left", return_tensors="pt").to(model.device)
        config.max_new_tokens = min(ROUND, max(most[i] - len(ids[i]) for i in batch))
        out = sampler.generate(**inputs)
        for i, new in zip(batch, out[:, inputs["input_ids"].shape[1] :].tolist()):
            end = next((t + 1 for t, token in enumerate(new) if token in stops), len(new))
            ids[i] = (ids[i] + new[:end])[: most[i]]
        queue += [i for i in batch if len(ids[i]) < most[i] and ids[i][-1] not in stops]
        bar.update(len(prompts) - len(queue) - bar.n)
    bar.close()
    examples = [Example(torch.tensor(x, dtype=torch.int32), len(p)) for x, p in zip(ids, prompts)]
    texts = tokenizer.batch_decode([e.response for e in examples], skip_special_tokens=True)
    return examples, texts


# === Log-probabilities of response tokens, without ever holding tokens × vocabulary ===
class TokenLogps(torch.autograd.Function):
    """log softmax(head(hidden))[target], one block of the vocabulary at a time. The backward
    makes its logits again. Products run in the compute dtype (bf16 in autocast), else float32."""

    @staticmethod
    def forward(ctx, hidden, weight, target):
        on, lse = hidden.device.type, []
        ctx.dtype = torch.get_autocast_dtype(on) if torch.is_autocast_enabled(on) else weight.dtype
        ctx.size = BLOCK_BYTES[on] // (4 * len(target)) // 64 * 64 + 64  # aligned, so faster
        h = hidden.to(ctx.dtype)
        for w in weight.split(ctx.size):
            lse.append(head_logits(h, w.to(ctx.dtype)).logsumexp(1))
        lse = torch.stack(lse).logsumexp(0)  # (N,)
        chosen = (h.float() * weight[target].to(ctx.dtype)).sum(-1)  # (N,) the target's logit
        ctx.save_for_backward(hidden, weight, target, lse)
        return chosen - lse  # (N,) float32

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, target, lse = ctx.saved_tensors
        h, scaled = hidden.to(ctx.dtype), (hidden * -grad[:, None]).to(ctx.dtype)  # (N, H)
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for i in range(0, len(weight), ctx.size):
            w = weight[i : i + ctx.size].to(ctx.dtype)  # (size, H)
            # d logp / d logits = onehot(target) − softmax(logits). d is its negative; a
            # token's factor, −grad, is applied where that costs H and not V multiplications.
            d, at = head_logits(h, w).sub_(lse[:, None]).exp_(), target - i  # (N, size), (N,)
            inside = (at >= 0) & (at < len(w))
            d.scatter_add_(1, at.clamp(0, len(w) - 1)[:, None], -inside[:, None].float())
            d = d.to(ctx.dtype)
            grad_hidden += d @ w
            if grad_weight is not None:  # not a frozen one, as with LoRA
                grad_weight[i : i + ctx.size] = d.T @ scaled
        return grad_hidden * -grad[:, None], grad_weight, None

def head_logits(hidden, weight):
    """(N, H), (size, H) -> (N, size): aligned rows. float32 that on CUDA was never bf16."""
    options = {"out_dtype": torch.float32} if hidden.is_cuda and hidden.dtype.itemsize < 4 else {}
    return torch.mm(hidden, weight.T, **options).float()

def micro_batches(units: list[list[Example]], micro_tokens: int, device: str) -> list[list[int]]:
    """Cut units (indices) into micro-batches of at most micro_tokens tokens, padding included. The
    longest come first, so that a micro-batch holds about one length; it also ends where joining a
    unit adds more padding than another forward costs. No unit is cut; a large one runs alone."""
    micros, lengths, apart = [], [], 0  # of the last one: lengths, and tokens were its units alone
    for i in sorted(range(len(units)), key=lambda i: -max(len(e.ids) for e in units[i])):
        own = [len(example.ids) for example in units[i]]
        lengths, apart = lengths + own, apart + len(own) * max(own)
        joined = len(lengths) * max(lengths)
        if not micros or joined > micro_tokens or joined - apart > MAX_PADDING[device]:
            micros.append([])
            lengths, apart = own, len(own) * max(own)
        micros[-1].append(i)
    return [sorted(micro) for micro in micros]

def response_logps(model, examples: list[Example], temperature=1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of every response token, in nats: logp (B, T) float32, 0 on padding, and mask
    (B, T) bool, true on response tokens (from lengths); t = 0 is the first response token.
    Padding is on the right, where a causal model never looks: no attention mask is needed."""
    ids = pad_sequence([e.ids for e in examples], batch_first=True).long()  # (B, L)
    start = torch.tensor([[e.prompt_len] for e in examples])  # (B, 1)
    end = torch.tensor([[len(e.ids)] for e in examples])  # (B, 1)
    place = torch.arange(ids.shape[1])  # (L,)
    in_response = (start <= place) & (place < end)  # (B, L)
    target, lengths = ids[in_response], in_response.sum(1)  # (N,), (B,)
    mask = torch.arange(lengths.max()) < lengths[:, None]  # (B, T)
    # The one shift: a token is predicted from the state before it. Found on the CPU: no waiting.
    states = in_response[:, 1:].flatten().nonzero().squeeze(1)  # (N,)
    inputs, states, target, mask = (
        x.to(model.device, non_blocking=True) for x in (ids[:, :-1], states, target, mask))

    hidden = model.base_model(inputs, use_cache=False).last_hidden_state  # (B, L - 1, H)
    hidden = hidden.flatten(0, 1).index_select(0, states).float()  # (N, H): not of prompt tokens
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1  # Cohere
    scale = scale / (getattr(config, "logits_scaling", None) or 1) / temperature  # Granite
    logp = TokenLogps.apply(hidden * scale, model.get_output_embeddings().weight, target)  # (N,)
    return pad_sequence(logp.split(lengths.tolist()), batch_first=True), mask

@torch.no_grad()
def check_model(model, tokenizer, max_length: int) -> None:
    """Refuse a model that these helpers cannot serve."""
    config, size = model.config.get_text_config(), len(model.get_input_embeddings().weight)
    if tokenizer.eos_token_id is None:
        raise BadInput("the tokenizer has no EOS token; set its eos_token")
    if len(tokenizer) > size:
        raise BadInput(f"{len(tokenizer)} tokens in the tokenizer, but {size} embeddings")
    if max_length > (getattr(config, "max_position_embeddings", None) or max_length):
        raise BadInput(f"--max_length: the context is {config.max_position_embeddings}; lower it")
    ids = torch.randint(size, (min(max_length, 1024),))  # float32 logits and attention are large
    example = Example(ids, max(1, len(ids) - 32))
    logp, _ = response_logps(model, [example])  # (1, T)
    logits = model(ids[None, :-1].to(model.device), logits_to_keep=logp.shape[1]).logits[0]
    truth = logits.float().log_softmax(-1)[range(logp.shape[1]), example.response]  # (T,)
    rounding = logits.abs().max() * torch.finfo(logits.dtype).eps  # ours are not rounded to bf16
    if not (logp[0] - truth).abs().max() < 1e-3 + rounding:
        raise BadInput(f"common.py does not rebuild the logits of {model.config.model_type}, or "
                       "they are not finite")
