"""The memory table: its traces against real tensors, and the defaults and recipes against the cards they are for."""

import json
import re
import shlex

import pytest
import torch
from transformers import AutoConfig

import common
import memory
from conftest import ROOT, SCRIPTS

TINY = ("qwen2", 512, 128, 344, 6, 4, 2, True)
RECIPES = {"dpo": 2 * 2048, "kto": 2048, "grpo": 3072}  # tokens that no cut parts: a pair, a response
BLOCK = 2**18  # several blocks of the vocabulary here too


@pytest.fixture(scope="module")
def traced():
    """What is traced of a tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(memory.SHAPES, "tiny", TINY)
        patch.setitem(common.BLOCK_BYTES, "cuda", BLOCK)
        for name, value in {"ROWS": (1, 4, 8), "PROMPT": 24, "RESPONSE": 40}.items():
            patch.setattr(memory, name, value)
        return memory.measure(memory.config_of("tiny"))


@pytest.fixture
def tiny(monkeypatch):
    """Its config, for a model with data."""
    monkeypatch.setitem(memory.SHAPES, "tiny", TINY)
    monkeypatch.setitem(common.BLOCK_BYTES, "cpu", BLOCK)
    return memory.config_of("tiny")


@pytest.mark.parametrize("mode", memory.MODES)
def test_traces_without_data_see_what_real_tensors_take(tiny, traced, mode):
    """All six layers with data, against two and three layers without."""
    model = memory.make_model(tiny, memory.MODES[mode])
    assert traced["parameters"] == sum(weight.numel() for weight in model.parameters())
    for rows, (tokens, size) in zip((1, 4, 8), traced[mode]):
        real = max(memory.update_bytes(model, rows, 2 * TINY[2]))
        assert tokens == rows * 2 * TINY[2]
        assert size - 16 * traced["parameters"] == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize("mode", memory.MODES)
def test_lora_without_data_takes_what_real_tensors_take(tiny, mode, monkeypatch):
    """Frozen weights in bf16, adapters in float32; the fixed part by hand."""
    monkeypatch.setitem(common.BLOCK_BYTES, "cuda", BLOCK)
    monkeypatch.setattr(memory, "ROWS", (4,))
    monkeypatch.setattr(memory, "BATCHES", (16,))
    found, model = memory.measure(tiny, rank=8), memory.make_model(tiny, memory.MODES[mode], rank=8)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in trained} == {torch.float32}
    assert {weight.dtype for weight in model.parameters() if not weight.requires_grad} == {torch.bfloat16}
    assert found["trained"] == sum(weight.numel() for weight in trained) < found["parameters"] / 4
    fixed = 16 * found["trained"] + 2 * (found["parameters"] - found["trained"])
    real = max(memory.update_bytes(model, 4, 2 * TINY[2]))
    assert found[mode][0][1] - fixed == pytest.approx(real, rel=0.01)


def test_the_8b_recipe_with_lora_fits_80_gb_with_a_pair_of_2048_tokens():
    """./run.sh dpo --lora_rank 16 --model meta-llama/Meta-Llama-3-8B-Instruct; with checkpointing it fits 24 GB."""
    args, models = recipe("dpo"), rows()
    assert memory.between(models["Llama-3-8B, LoRA 16"]["plain"], max(args.micro_tokens, RECIPES["dpo"])) <= 0.9 * 80e9
    assert memory.between(models["Llama-3-8B, LoRA 16"]["checkpointed"], RECIPES["dpo"]) <= 0.9 * 24e9


def test_sampling_without_data_takes_what_real_tensors_take(tiny, traced):
    model = memory.make_model(tiny)
    peaks = memory.sampling_bytes(model, 16, 24, 40)
    assert traced["sampling"][0] == [16, pytest.approx(16 * traced["parameters"] + max(peaks), rel=0.01)]
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}  # its own again


def test_sampling_has_bf16_copies_of_the_weights_and_a_bf16_cache(tiny, traced):
    """By hand: two bytes a parameter; per token of a layer a key and a value of 2 heads of 32 numbers of two bytes."""
    model = memory.make_model(tiny)
    short, long = (memory.sampling_bytes(model, 8, 24, response)[1] for response in (100, 300))
    # Besides, the layer that grows holds its old keys, and transformers 5.17 repeats its keys and values for each head.
    assert long - short == pytest.approx(8 * 200 * 6 * 2 * 2 * 32 * 2, rel=0.4)  # float32 would take twice that
    assert min(memory.sampling_bytes(model, 1, 2, 2)) >= 2 * traced["parameters"]


def test_what_autograd_saves_on_one_layer_is_most_of_a_tokens_bytes(tiny, traced):
    """The other way to count: one layer with data, the distinct storages that it saves for its backward pass."""
    model, sizes = memory.make_model(tiny), {}
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    for tokens in (320, 640):
        x, position, saved = torch.randn(1, tokens, TINY[2]), torch.arange(tokens)[None], {}

        def save(tensor):
            if tensor.untyped_storage()._cdata not in weights:
                saved[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16):
                embeddings = model.model.rotary_emb(x, position)
                model.model.layers[0](x, position_embeddings=embeddings, attention_mask=None)
        sizes[tokens] = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    one_layer = (sizes[640] - sizes[320]) / 320  # the weights' bf16 copies drop out
    (x0, y0), (x1, y1) = traced["plain"][-2:]
    # Beyond the layers: final norm, head's input and the last layer's gradients, twelve float32 states at most.
    beyond = (y1 - y0) / (x1 - x0) - 6 * one_layer
    assert 0 <= beyond <= 12 * 4 * TINY[2]


def test_a_model_whose_layers_differ_is_refused():
    config = AutoConfig.for_model("gemma2", num_hidden_layers=4)
    with pytest.raises(SystemExit, match="not alike: .'full_attention', 'sliding_attention'"):
        memory.all_layers(config, None)


# --- the committed numbers ----------------------------------------------------------------------------


def rows():
    return json.loads(memory.RESULT.read_text())["models"]


def recipe(name: str):
    """The arguments of `./run.sh name`."""
    text = (ROOT / "run.sh").read_text().replace("\\\n", " ")
    command = re.search(rf"run \.venv/bin/python humanline_{name}\.py (.*?) \"\$@\"", text)[1]
    return SCRIPTS[name].parse_args(shlex.split(command))


def test_bytes_are_linear_in_tokens_without_checkpointing_and_convex_with_it():
    for row in rows().values():
        for mode in memory.MODES:
            slopes = [(b - a) / (y - x) for (x, a), (y, b) in zip(row[mode], row[mode][1:])]
            alike = slopes == pytest.approx(slopes[-1:] * len(slopes), rel=0.02)
            assert alike or mode == "checkpointed" and slopes == sorted(slopes)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_recipe_fits_80_gb_with_a_tenth_to_spare(name):
    args, row = recipe(name), rows()["Qwen2.5-1.5B"]
    assert args.model == "Qwen/Qwen2.5-1.5B-Instruct"
    assert args.max_length == (3072 if name == "grpo" else 2048)
    mode = "checkpointed" if args.activation_checkpointing else "plain"
    assert memory.between(row[mode], max(args.micro_tokens, RECIPES[name])) <= 0.9 * 80e9
    if args.sample_every:
        assert (args.max_new_tokens, args.max_length - args.max_new_tokens) == (memory.RESPONSE, memory.PROMPT)
        assert memory.between(row["sampling"], args.gen_batch) <= 0.9 * 80e9


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_default_fits_the_smaller_model_on_24_gb(name):
    """… and the larger on 80 GB, with a longest row of --max_length, or a pair of them."""
    args = SCRIPTS[name].parse_args(["--model", "any"])
    tokens = max(args.micro_tokens, args.max_length * (2 if name == "dpo" else 1))
    assert memory.between(rows()["Qwen2.5-0.5B"]["plain"], tokens) <= 0.9 * 24e9
    assert memory.between(rows()["Qwen2.5-1.5B"]["plain"], tokens) <= 0.9 * 80e9


def test_the_largest_that_fits_by_hand():
    assert memory.largest([[0, 1e9], [1000, 2e9]], 24e9, 1024) == "20,480"  # 20,600 fit
    assert memory.largest([[0, 22e9], [1000, 23e9]], 24e9, 1024) == "–"
    assert memory.between([[0, 1.0], [10, 2.0], [20, 4.0]], 5) == 1.5
    assert memory.between([[0, 1.0], [10, 2.0], [20, 4.0]], 30) == 6.0
