"""GPU memory of an update and of sampling, computed from a model's shape, without a GPU or its weights.

    ./run.sh memory                                          four models, minutes on a CPU: the results page's table
    .venv/bin/python tests/experiments/memory.py --model ID  another one, by its folder or Hub id

The real code runs, common.py's response_logps and its backward pass under bf16 autocast, on tensors that have
a shape and no data (FakeTensorMode). A storage counts from its birth until Python and autograd have let go of it, and
we keep the peak. To it come 16 bytes for each parameter that is trained (float32 weights, gradients and AdamW's two
averages) and 2 for each that LoRA freezes. The bf16 copies of float32 weights and what the head makes are in the peak.

The layers of these models are alike, so we trace two and three of them and go on in a straight line, each phase for
itself; a test does the same with real tensors and all layers. An update is traced at three sizes; between them we
interpolate, which never says too little, and beyond the largest the line goes on. Sampling is traced at the end of the
longest responses, in their last round: while it reads its last tokens, and while it writes the last one.

On CUDA the logits take half a block less. Not seen are a reward model, the allocator's rounding and fragmentation,
kernels' work space and the CUDA context: leave a tenth of the card free. `./run.sh gpu` compares with a GPU.
"""

import argparse
import copy
import itertools
import json
import os
import platform
import sys
import weakref
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "tests/experiments/results/memory.json"
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache  # noqa: E402
from transformers.modeling_layers import GradientCheckpointingLayer  # noqa: E402

import common  # noqa: E402

SHAPES = {  # family, vocabulary, hidden, inner, layers, heads, key-value heads, tied
    "Qwen2.5-0.5B": ("qwen2", 151_936, 896, 4864, 24, 14, 2, True),
    "Qwen2.5-1.5B": ("qwen2", 151_936, 1536, 8960, 28, 12, 2, True),
    "Qwen2.5-3B": ("qwen2", 151_936, 2048, 11_008, 36, 16, 2, True),
    "Llama-3-8B": ("llama", 128_256, 4096, 14_336, 32, 32, 8, False),
}
CARDS = {"24 GB": 24e9, "80 GB": 80e9}
SPARE = 0.9  # of a card that may be filled
RANKS = (0, 16)  # --lora_rank; 0: all weights are trained
MODES = {"plain": False, "checkpointed": True}  # --activation_checkpointing
ROWS = (1, 8, 16)  # of 2 H tokens, in a traced micro-batch
BATCHES = (16, 128, 1024)  # responses that a traced step samples
PROMPT, RESPONSE = 1024, 2048  # longest of the GRPO recipe: --max_length 3072 --max_new_tokens 2048

def config_of(name: str, shapes: dict = SHAPES):
    if name not in shapes:
        return AutoConfig.from_pretrained(name)
    family, vocabulary, hidden, inner, layers, heads, kv, tied = shapes[name]
    return AutoConfig.for_model(
        family, vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=tied, max_position_embeddings=2**17)

class Live(TorchDispatchMode):
    """Bytes of all storages that operations have made and nobody has dropped, but for the model's weights and gradients,
    which `states` counts."""

    def __init__(self, model):
        super().__init__()
        self.now, self.peak, self.peaks = 0, 0, []
        known = [x for weight in model.parameters() for x in (weight, weight.grad) if x is not None]
        self.seen = {x.untyped_storage()._cdata for x in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            if storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())
        return out

    def end_phase(self, *_) -> None:
        """The next peak is another's."""
        self.peaks.append(self.peak)
        self.peak = self.now

    def drop(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size

def checkpoint(model) -> None:  # as --activation_checkpointing does
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    for module in model.modules():
        module.training = isinstance(module, GradientCheckpointingLayer)

def make_model(config, checkpointed: bool = False, rank: int = 0):
    """A random policy with gradients, as load_policy makes it on CUDA; under FakeTensorMode without data."""
    dtype = torch.bfloat16 if rank else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    if rank:
        from peft import LoraConfig, get_peft_model

        with mock.patch.object(torch.nn.Module, "to", lambda module, *_, **__: module):  # there is no data to move
            get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
        for module in model.modules():
            module.cast_input_dtype_enabled = False
    if checkpointed:
        checkpoint(model)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    return model

def update_bytes(model, rows: int, length: int) -> list[int]:
    """Peaks of a micro-batch's forward pass, backward pass and embedding's gradient."""
    ids = torch.ones(8 + length, dtype=torch.int32)  # a prompt of 8 tokens, then the response
    examples = [common.Example(ids, 8)] * rows
    with Live(model) as live:
        def embedded(module, inputs, out):
            if out.requires_grad:  # LoRA trains no embedding
                out.register_hook(live.end_phase)

        hook = model.get_input_embeddings().register_forward_hook(embedded)
        with torch.autocast("cpu", torch.bfloat16):
            logp, _ = common.response_logps(model, examples)
        live.end_phase()
        logp.sum().backward()
        live.end_phase()
    hook.remove()
    return live.peaks

@torch.no_grad()
def sampling_bytes(model, batch: int, prompt: int, response: int) -> list[int]:
    """Peaks of the last round's last chunk of prefill, and of its last token."""
    def logits(past, length):
        mask = torch.ones(batch, past + length, dtype=torch.long)
        mask[0, 0] = 0  # a shorter prompt, so that all need the mask
        return sampler(torch.ones(batch, length, dtype=torch.long), attention_mask=mask, past_key_values=cache,
                       use_cache=True, logits_to_keep=1).logits

    peaks, end = [], prompt + response
    # Bytes that generate still has of each logit: the chunk before's in bf16; the token before's, scores and chances.
    for past, length, size in ((end - 2 * common.ROUND, common.ROUND, 2), (end - 1, 1, 12)):
        cache = DynamicCache(config=model.config)
        with Live(model) as live:
            memo = {id(buffer): buffer for buffer in model.buffers()}  # of tensors without data there is no deepcopy
            memo |= {id(w): torch.nn.Parameter(w.to(torch.bfloat16), False) for w in model.parameters()}
            sampler = copy.deepcopy(model, memo)  # as sample_responses does
            held = torch.zeros(size, *logits(0, past).shape, dtype=torch.uint8)  # this fills the cache, and
            live.peak = live.now  # does not count
            torch.multinomial(logits(past, length)[:, -1].float().div(0.7).softmax(-1), 1)
        peaks.append(live.peak)
    return peaks

def all_layers(config, trace, *how) -> list[int]:
    """What trace(config, …) gives for all layers, from two and three of them. All must be of one kind."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or []
    if len(set(kinds)) > 1:
        sys.exit(f"error: the layers of this model are not alike: {sorted(set(kinds))}")
    found = []
    for few in (2, 3):
        smaller = copy.deepcopy(config)
        smaller.get_text_config().update({"num_hidden_layers": few, "layer_types": kinds[:few] or None})
        with mock.patch.dict(common.BLOCK_BYTES, cpu=common.BLOCK_BYTES["cuda"]):
            found.append(trace(smaller, *how))
    return [two + (text.num_hidden_layers - 2) * (three - two) for two, three in zip(*found)]

def trace_update(config, checkpointed: bool, rows: int, length: int, rank: int = 0) -> list[int]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = make_model(config, checkpointed, rank)
    return update_bytes(model, rows, length)  # token ids have data: common.py asks where responses are

def trace_sampling(config, batch: int, prompt: int, response: int, rank: int = 0) -> list[int]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return sampling_bytes(make_model(config, rank=rank), batch, prompt, response)

def measure(config, rank: int = 0) -> dict:
    """Bytes of a model's updates and of its sampling."""
    with FakeTensorMode():
        weights = list(make_model(config, rank=rank).parameters())
    parameters, trained = (sum(w.numel() for w in weights if least <= w.requires_grad) for least in (False, True))
    states, length = 16 * trained + 2 * (parameters - trained), 2 * config.get_text_config().hidden_size
    row = {"parameters": parameters, "trained": trained, "sampling": []} | {mode: [] for mode in MODES}
    for mode, rows in itertools.product(MODES, ROWS):
        phases = all_layers(config, trace_update, MODES[mode], rows, length, rank)
        row[mode].append([rows * length, states + max(phases)])
    for batch in BATCHES:
        phases = all_layers(config, trace_sampling, batch, PROMPT, RESPONSE, rank)
        row["sampling"].append([batch, states + max(phases)])
    return row

def between(points: list, x: float) -> float:
    """Linear interpolation, or extrapolation from the nearest two points."""
    i = next((i for i in range(1, len(points)) if x <= points[i][0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[i - 1 : i + 1]
    return y0 + (x - x0) * (y1 - y0) / (x1 - x0)

def largest(points: list, card: float, step: int) -> str:
    """The largest multiple of step that leaves a tenth of the card free."""
    fits = 0
    while between(points, fits + step) <= SPARE * card:
        fits += step
    return f"{fits:,}" if fits else "–"

def memory_table(table: dict | None = None) -> str:
    """The table of the results page."""
    flags = [f"{card}: `--{flag}`" for flag in ("micro_tokens", "gen_batch") for card in CARDS]
    lines = [["", "fixed", "MiB a token", *flags], ["---"] * 7]
    for name, row in (table or json.loads(RESULT.read_text()))["models"].items():
        plain, checkpointed = ((between(row[mode], 2e6) - between(row[mode], 1e6)) / 1e6 / 2**20 for mode in MODES)
        fixed = 18 * row["trained"] + 2 * (row["parameters"] - row["trained"])
        line = [name, f"{fixed / 2**30:.1f} GiB", f"{plain:.2f} ({checkpointed:.2f})"]
        for card in CARDS.values():
            plain, checkpointed = (largest(row[mode], card, 1024) for mode in MODES)
            line.append("–" if checkpointed == "–" else f"{plain} ({checkpointed})")
        line += [largest(row["sampling"], card, 8) for card in CARDS.values()]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="*", default=[], help="folders or Hub ids; none: the four of the results page")
    args = parser.parse_args(argv)
    both = list(itertools.product(args.model or SHAPES, RANKS))
    models = {name + (f", LoRA {rank}" if rank else ""): measure(config_of(name), rank)
              for name, rank in tqdm(both, "models", leave=False)}
    table = {"command": "./run.sh memory", "models": models,
             "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"}
    if not args.model:
        RESULT.write_text(json.dumps(table, indent=1) + "\n")
    print(memory_table(table))


if __name__ == "__main__":
    main()
