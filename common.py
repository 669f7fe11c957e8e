"""Tokenization and log-probabilities: the two things that the three scripts import.

Shapes: B responses, T tokens of the longest, N tokens of all responses, L length of a padded row (a
prompt and one response, or several), H the hidden size, V the vocabulary. Log-probabilities are in
nats.
"""

import collections
import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# Bytes of float32 logits that exist at once. On a CPU a chunk should fit the cache, on a GPU it
# should fill the multiprocessors; the result does not depend on it.
CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**28}
# Tokens of padding that are cheaper than the start of one more micro-batch. Both of CUDA's numbers
# are guesses, not measured.
MAX_PADDING = {"cpu": 64, "cuda": 512}


class BadInput(ValueError):
    """An input that cannot be used: one line that says where, what, and how to mend it."""


class Example(NamedTuple):
    """A tokenized prompt and response: ids[:prompt_len] is read, ids[prompt_len:] is trained."""

    ids: list[int]
    prompt_len: int


# -------------------------------------------------------------------------------------------------
# Tokenization: a response is the tokens that generation would have produced after the prompt
# -------------------------------------------------------------------------------------------------


def render(tokenizer, messages: list[dict], **options) -> str:
    """The chat template's text. Raises BadInput where there is none or it refuses the messages."""
    if not tokenizer.chat_template:
        raise BadInput("messages, but the tokenizer has no chat template; use strings")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is its author's program and may raise anything
        raise BadInput(f"the chat template refuses these messages: {error}") from error


def tokenize(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # templates own the specials


def prompt_text(tokenizer, prompt: str | list[dict], raw: bool = False) -> tuple:
    """A prompt as text, and as messages where the chat template is used: not for raw strings."""
    if isinstance(prompt, str) and (raw or not tokenizer.chat_template):
        adds_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        twice = adds_bos and prompt.startswith(tokenizer.bos_token)
        return (tokenizer.bos_token if adds_bos and not twice else "") + prompt, None
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    end_of_turn(tokenizer)  # refuses a template that would leave out strings
    return render(tokenizer, messages, add_generation_prompt=True), messages


def encode_prompt(tokenizer, prompt: str | list[dict], raw: bool = False) -> list[int]:
    """Token ids of a prompt, ready for generation.

    prompt: a string (a user message where there is a chat template, unless raw) or messages.
    Raises BadInput for messages without a template or that the template refuses.
    """
    return tokenize(tokenizer, prompt_text(tokenizer, prompt, raw)[0])


@functools.lru_cache(maxsize=8)
def _end_of_turn(tokenizer, template: str) -> tuple[str, list[int]]:
    answer = "An answer."
    user, assistant = {"role": "user", "content": "Q?"}, {"role": "assistant", "content": answer}
    text = render(tokenizer, [user, assistant])
    if answer not in text:
        raise BadInput("the chat template leaves out text that is a string; use a text template")
    tail = text.rpartition(answer)[2]
    end, special = [], set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for token in tokenize(tokenizer, tail):
        if token not in special:  # Qwen and Gemma put "\n" here, which sampling never produces
            break
        end.append(token)
    return tail, end


def end_of_turn(tokenizer, raw: bool = False) -> tuple[str, list[int]]:
    """What the chat template puts after an answer: the text, and the tokens that end a response.

    The tokens are the leading run of special tokens (two in Cohere 2), else the tokenizer's EOS.
    """
    tail, end = "", []
    if tokenizer.chat_template and not raw:
        tail, end = _end_of_turn(tokenizer, str(tokenizer.chat_template))
    if not end and tokenizer.eos_token_id is None:
        raise BadInput("the tokenizer has no EOS token, so no response ends; set its eos_token")
    return tail, end or [tokenizer.eos_token_id]


def encode(
    tokenizer, prompt: str | list[dict], response: str | list[dict],
    max_length: int, raw: bool = False,
) -> Example | None:
    """Token ids of a prompt and a response, at most max_length; None if the prompt leaves no room.

    response: a string or a list of one assistant message. It becomes what the template puts after
    the prompt up to its end of turn; where the whole does not start with the prompt's rendering
    (reasoning templates), the tokens of the text, then the end of turn. Cut at max_length it has no
    end.
    """
    text = response if isinstance(response, str) else response[0]["content"]
    before, messages = prompt_text(tokenizer, prompt, raw)
    tail, end = end_of_turn(tokenizer, raw=messages is None)
    if messages is not None:
        whole = render(tokenizer, messages + [{"role": "assistant", "content": text}])
        if whole.startswith(before) and whole.endswith(tail):
            text = whole[len(before) : len(whole) - len(tail)]
    prompt_ids, ids = tokenize(tokenizer, before), tokenize(tokenizer, before + text)
    if ids[: len(prompt_ids)] == prompt_ids:
        ids = ids[len(prompt_ids) :]
    else:  # a token straddles the boundary; generation starts after the prompt's own tokens
        ids = tokenize(tokenizer, text)
    stops = {tokenizer.eos_token_id, *end}
    ids = ids[: next((i for i, token in enumerate(ids) if token in stops), len(ids))] + end
    if not 0 < len(prompt_ids) < max_length:
        return None
    return Example((prompt_ids + ids)[:max_length], len(prompt_ids))


# -------------------------------------------------------------------------------------------------
# Log-probabilities of response tokens, without ever holding tokens × vocabulary
# -------------------------------------------------------------------------------------------------


class _TokenLogps(torch.autograd.Function):
    """log softmax(head(hidden))[target] in chunks of rows, all in one buffer; backward makes a
    chunk's logits again and, with the kept log-sum-exp, their softmax. Matrix products run in the
    compute dtype (bf16 under autocast), the log-softmax and its gradient in float32."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, scale, cap, temperature):
        kind = hidden.device.type
        autocast = torch.is_autocast_enabled(kind)
        ctx.dtype = torch.get_autocast_dtype(kind) if autocast else weight.dtype
        ctx.constants = scale, cap, temperature
        ctx.rows = max(1, CHUNK_BYTES.get(kind, 2**26) // (4 * weight.shape[0]))
        w, b = weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype)
        buffer = w.new_empty(min(ctx.rows, len(target)), len(w))  # fresh memory is slow on a CPU
        logp, lse = [], []
        for h, y in zip(hidden.split(ctx.rows), target.split(ctx.rows)):
            logits = _logits(h.to(ctx.dtype), w, b, scale, cap, temperature, buffer)  # (rows, V)
            chosen, top = logits.gather(-1, y[:, None]), logits.amax(-1, keepdim=True)  # (rows, 1)
            lse.append(logits.sub_(top).exp_().sum(-1, keepdim=True).log_().add_(top))
            logp.append(chosen - lse[-1])
        ctx.save_for_backward(hidden, weight, bias, target, torch.cat(lse))
        return torch.cat(logp).squeeze(-1)  # (N,) float32

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, bias, target, lse = ctx.saved_tensors
        scale, cap, temperature = ctx.constants
        w, b = weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype)
        buffer = w.new_empty(min(ctx.rows, len(target)), len(w))
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        for i in range(0, len(target), ctx.rows):
            part = slice(i, i + ctx.rows)
            h = hidden[part].to(ctx.dtype)
            logits = _logits(h, w, b, scale, cap, temperature, buffer)  # (rows, V)
            slope = 1 - (logits * (temperature / cap)) ** 2 if cap else None  # of the soft cap
            # d logp / d logits = onehot(target) − softmax(logits). d is its negative; the sign and
            # all factors of a row are in g, so that they cost H and not V multiplications a row.
            g = grad[part, None] * (-scale / temperature)  # (rows, 1)
            d = logits.sub_(lse[part]).exp_()
            d.scatter_add_(-1, target[part, None], torch.full_like(g, -1.0))
            d = (d.mul_(slope) if cap else d).to(ctx.dtype)
            grad_hidden[part] = (d @ w) * g
            h = (h * g).to(ctx.dtype)
            if d.dtype == grad_weight.dtype:
                grad_weight.addmm_(d.T, h)
            else:
                grad_weight += d.T @ h
            if bias is not None:
                grad_bias += (d.T @ g.to(ctx.dtype)).squeeze(-1)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _logits(hidden, weight, bias, scale, cap, temperature, buffer):
    """(N, H) -> (N, V) float32: the head, then Cohere's and Granite's scale, Gemma's soft cap."""
    logits = torch.mm(hidden, weight.T, out=buffer[: len(hidden)])
    logits = (logits if bias is None else logits.add_(bias)).float()
    if scale != 1:
        logits *= scale
    if cap:
        logits = logits.div_(cap).tanh_().mul_(cap)
    return logits.div_(temperature) if temperature != 1 else logits


def layout(model, examples: list[Example]) -> tuple[list[list[int]], list[int]]:
    """The examples (indices) of each row [prompt | response | …], and the rows' lengths in tokens.

    Examples of one prompt share rows, even ones of about model.row_tokens at most, where
    check_sharing has found that the model keeps them apart; else each has its own.
    """
    prompts, rows = collections.defaultdict(list), collections.defaultdict(list)
    for i, e in enumerate(examples):
        prompts[tuple(e.ids[: e.prompt_len])].append(i)
    for prompt, members in prompts.items():
        sizes = [len(examples[i].ids) - len(prompt) for i in members]
        total, room = sum(sizes), getattr(model, "row_tokens", 0) - len(prompt)
        count = -(-total // room) if room > max(sizes) else total  # as many as tokens: each alone
        for i, size, end in zip(members, sizes, itertools.accumulate(sizes)):
            middle = end - size / 2  # of the response; it goes to the even part where that lies
            rows[prompt, int(middle * count / total)].append(i)
    lengths = [len(prompt) + sum(len(examples[i].ids) - len(prompt) for i in members)
               for (prompt, _), members in rows.items()]
    return list(rows.values()), lengths


def micro_batches(model, units: list[list[Example]], micro_tokens: int) -> list[list[int]]:
    """Cut units, longest first, into micro-batches of at most micro_tokens padded tokens (indices).

    The examples of a unit stay together, units that share a row too where they fit; what is larger
    runs alone. A micro-batch also ends where its padding would cost more than a new one.
    """
    # Units with a row in common make a block: apart, they would run its prompt twice.
    unit_of = [u for u, unit in enumerate(units) for _ in unit]
    blocks, block_of = [], {}
    for row in layout(model, [e for unit in units for e in unit])[0]:
        members = dict.fromkeys(unit_of[i] for i in row)
        block = next((block_of[u] for u in members if u in block_of), None)
        if block is None:
            block = []
            blocks.append(block)
        block += [u for u in members if u not in block_of]
        block_of |= {u: block for u in members if u not in block_of}

    def with_lengths(block):
        return block, layout(model, [e for u in block for e in units[u]])[1]

    sized = []
    for block, lengths in map(with_lengths, blocks):
        fits = len(lengths) * max(lengths) <= micro_tokens
        sized += [(block, lengths)] if fits else [with_lengths([u]) for u in block]
    micros, width, room, padding = [], 0, 0, 0
    for block, lengths in sorted(sized, key=lambda x: -max(x[1])):
        padding += len(lengths) * width - sum(lengths)
        full = len(lengths) * width > room or padding > MAX_PADDING[model.device.type]
        if not micros or full:
            micros.append([])
            width, room = max(lengths), micro_tokens
            padding = len(lengths) * width - sum(lengths)
        micros[-1] += block
        room -= len(lengths) * width
    return micros


def padded_share(model, micros: list[list[Example]]) -> float:
    """Share of padding among the tokens that the micro-batches' forwards take."""
    lengths = [layout(model, examples)[1] for examples in micros]
    return 1 - sum(map(sum, lengths)) / sum(len(rows) * max(rows) for rows in lengths)


def response_logps(
    model, examples: list[Example], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of every response token, in nats.

    Returns logp (B, T) float32, 0 on padding, and mask (B, T) bool, true on response tokens (from
    lengths), both on the model's device; t = 0 is the first response token.
    Rows are padded on the right. A causal model never looks there, so no attention mask is needed
    but where responses share a row: there they see the prompt and themselves, not one another.
    """
    config, device = model.config.get_text_config(), model.device
    head = model.get_output_embeddings()
    # A row of prompt x and responses a, b:   ids  x x x | a a | b b b   (without their last tokens)
    #                                    position  0 1 2 | 3 4 | 3 4 5
    #                                       owner  0 0 0 | 1 1 | 2 2 2
    rows, packed = layout(model, examples)[0], []
    row_of, start = torch.zeros(2, len(examples), dtype=torch.long)  # (B,): where a response is
    for r, members in enumerate(rows):
        prompt = examples[members[0]].ids[: examples[members[0]].prompt_len]
        ids, position, owner = [*prompt], [*range(len(prompt))], [0] * len(prompt)
        for number, i in enumerate(members, 1):
            row_of[i], start[i] = r, len(ids)
            inputs = examples[i].ids[len(prompt) : -1]  # nothing is predicted from the last token
            ids += inputs
            position += range(len(prompt), len(prompt) + len(inputs))
            owner += [number] * len(inputs)
        packed.append(torch.tensor([ids, position, owner]).T)  # (length, 3)
    packed = pad_sequence(packed, batch_first=True).to(device, non_blocking=True)  # (rows, L, 3)
    ids, position, owner = packed.unbind(-1)  # (rows, L)
    options = {}
    if len(rows) < len(examples):
        seen = (owner[:, None] == 0) | (owner[:, None] == owner[:, :, None])  # (rows, L, L)
        options = {"attention_mask": seen.tril()[:, None], "position_ids": position}
    hidden = model.base_model(ids, use_cache=False, **options).last_hidden_state  # (rows, L, H)

    prompt_len = torch.tensor([e.prompt_len for e in examples])  # (B,)
    lengths = torch.tensor([len(e.ids) for e in examples]) - prompt_len
    mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, T)
    i, t = mask.nonzero(as_tuple=True)  # (N,): made on the CPU, so that a GPU never waits
    target = torch.tensor([token for e in examples for token in e.ids[e.prompt_len :]])  # (N,)
    # The one shift: a token is predicted from the state before it, a response's first token from
    # the prompt's last one, wherever in the row the response stands.
    before = row_of[i] * ids.shape[1] + torch.where(t == 0, prompt_len[i], start[i] + t) - 1  # (N,)
    target, before = (x.to(device, non_blocking=True) for x in (target, before))
    hidden = hidden.flatten(0, 1).index_select(0, before)  # (N, H): no head on prompt tokens
    scale = getattr(config, "logit_scale", None) or 1  # Cohere
    scale = scale / (getattr(config, "logits_scaling", None) or 1)  # Granite
    cap = getattr(config, "final_logit_softcapping", None)
    flat = _TokenLogps.apply(
        hidden, head.weight, getattr(head, "bias", None), target, scale, cap, temperature
    )
    slot = (i * mask.shape[1] + t).to(device, non_blocking=True)
    logp = flat.new_zeros(mask.numel()).index_copy(0, slot, flat).view(mask.shape)  # (B, T)
    return logp, mask.to(device, non_blocking=True)


@torch.no_grad()
def check_model(model, example: Example) -> None:
    """Refuse by name a family whose logits response_logps does not rebuild, on a short example."""
    cut = max(0, example.prompt_len - 32)
    example = Example(example.ids[cut : example.prompt_len + 32], example.prompt_len - cut)
    ids = torch.tensor([example.ids], device=model.device)
    try:
        logits = model(ids, use_cache=False).logits[0, example.prompt_len - 1 : -1].float()
        truth = logits.log_softmax(-1).gather(-1, ids[0, example.prompt_len :, None]).squeeze(-1)
        error = (response_logps(model, [example])[0][0] - truth).abs().max().item()
        fault = "" if error < 5e-3 else f"off by {error:.2g} nats"
    except Exception as error:  # a family of another build may raise anything
        fault = " ".join(f"{type(error).__name__} {error}".split())
    if fault:
        raise BadInput(f"--model: {model.config.model_type} computes its logits in a way that "
                       f"common.py does not rebuild ({fault}); use another family")


@torch.no_grad()
def check_sharing(model, example: Example) -> None:
    """Set model.row_tokens, the length up to which examples of one prompt share a row: 2 H, or 0 if
    the model does not keep them apart on the longest example. Some families take a mask and then
    forget their window, others have no use for one."""
    ids, cut = example
    other = Example(ids[:cut] + ids[cut:][::-1], cut)  # another response to the same prompt
    pair, model.row_tokens = [other, example], 0
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 would blur the comparison
    apart, _ = response_logps(model, pair)
    try:
        model.row_tokens = 4 * len(ids)  # room for both
        error = (response_logps(model, pair)[0] - apart).abs().max().item()
    except Exception:  # a family of another build may raise anything
        error = 1.0
    torch.set_float32_matmul_precision(precision)
    # Under a mask attention is not cut at the diagonal: in a row of 2 H tokens it costs a third of
    # the products with the weights, in longer ones it would eat what sharing saves.
    hidden_size = model.config.get_text_config().hidden_size
    model.row_tokens = 2 * hidden_size if error < 5e-3 else 0
