"""The memory table: its traces against real tensors, and the defaults and recipes against the cards they are for."""

import json
import re
import shlex

import pytest
import torch
from transformers import AutoConfig

import common
import memory
import toy_world
from conftest import ROOT, SCRIPTS

TINY = ("qwen2", 512, 128, 344, 6, 4, 2, True)
RECIPES = {"dpo": 2 * 2048, "kto": 2048, "grpo": 3072}  # tokens that no cut parts: a pair, a response
BLOCK = 2**18  # several blocks of the vocabulary here too
ROUND = 16


@pytest.fixture(scope="module")
def traced():
    """What is traced of a tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(memory.SHAPES, "tiny", TINY)
        patch.setitem(common.BLOCK_BYTES, "cuda", BLOCK)
        patch.setattr(common, "ROUND", ROUND)
        for name, value in {"ROWS": (1, 4, 8), "PROMPT": 24, "RESPONSE": 40}.items():
            patch.setattr(memory, name, value)
        return memory.measure(memory.config_of("tiny"))


@pytest.fixture
def tiny(monkeypatch):
    """Its config, for a model with data."""
    monkeypatch.setitem(memory.SHAPES, "tiny", TINY)
    monkeypatch.setitem(common.BLOCK_BYTES, "cpu", BLOCK)
    monkeypatch.setattr(common, "ROUND", ROUND)
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
    """Frozen weights in bf16, adapters in float32, which cast no inputs; the fixed part by hand."""
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
    assert not any(getattr(module, "cast_input_dtype_enabled", False) for module in model.modules())


def test_checkpointing_saves_little_and_only_what_checkpoints_is_in_training_mode(tiny):
    """The log-probs are those of eval mode, to the bit."""
    model, examples = memory.make_model(tiny), [common.Example(torch.arange(n, dtype=torch.int32), 8) for n in (90, 100)]
    plain, _ = common.response_logps(model, examples)
    peak = memory.update_bytes(model, 2, 100)[0]
    memory.checkpoint(model)
    again, _ = common.response_logps(model, examples)
    assert torch.equal(again, plain) and memory.update_bytes(model, 2, 100)[0] < peak / 3
    inside = {id(module) for layer in model.model.layers for module in [*layer.modules()][1:]}
    assert not model.training and all(layer.training for layer in model.model.layers)
    assert not any(module.training for module in model.modules() if id(module) in inside)


def test_sampling_without_data_takes_what_real_tensors_take(tiny, traced):
    model = memory.make_model(tiny)
    peaks = memory.sampling_bytes(model, 16, 24, 40)
    assert traced["sampling"][0] == [16, pytest.approx(16 * traced["parameters"] + max(peaks), rel=0.01)]
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}  # its own again


def test_sampling_takes_what_is_traced(tiny, monkeypatch):
    """sample_responses itself, on real tensors in bf16: prompts of 24 and 23 tokens, responses of 40 that nothing ends."""
    tokenizer, model = toy_world.make_tokenizer(), memory.make_model(tiny)
    monkeypatch.setattr(type(tokenizer), "eos_token_id", TINY[1], raising=False)
    monkeypatch.setattr(common, "end_of_turn", lambda tokenizer: ("", []))
    monkeypatch.setitem(common.SAMPLING_DTYPE, "cpu", torch.bfloat16)
    monkeypatch.setattr(toy_world.PreTrainedTokenizerFast, "batch_decode", lambda *_, **__: [])
    with memory.Live(model) as live:
        examples, _ = common.sample_responses(model, tokenizer, [[5] * 24, [5] * 23] * 8, 40, 0.7, 16)
    assert {len(example.response) for example in examples} == {40}
    assert max(memory.sampling_bytes(model, 16, 24, 40)) == pytest.approx(live.peak, rel=0.03)


def test_sampling_has_bf16_copies_of_the_weights_and_a_bf16_cache(tiny, traced):
    """By hand: two bytes a parameter; per token of a layer a key and a value of 2 heads of 32 numbers of two bytes."""
    model = memory.make_model(tiny)
    short, long = (memory.sampling_bytes(model, 8, 24, response)[1] for response in (100, 300))
    # Besides, the layer that grows holds its old keys, and transformers 5.17 repeats its keys and values for each head.
    assert long - short == pytest.approx(8 * 200 * 6 * 2 * 2 * 32 * 2, rel=0.4)  # float32 would take twice that
    assert min(memory.sampling_bytes(model, 1, 16, 32)) >= 2 * traced["parameters"]


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


@pytest.mark.parametrize("rank", memory.RANKS)
def test_the_committed_bytes_are_the_codes(monkeypatch, rank):
    """Its smallest numbers, measured again; other versions of transformers may sample with 2 % more."""
    monkeypatch.setattr(memory, "ROWS", memory.ROWS[:1])
    monkeypatch.setattr(memory, "BATCHES", memory.BATCHES[:1])
    committed = rows()["Qwen2.5-0.5B" + (f", LoRA {rank}" if rank else "")]
    for name, value in memory.measure(memory.config_of("Qwen2.5-0.5B"), rank).items():
        expected = committed[name][0][1] if type(value) is list else committed[name]
        assert (value[0][1] if type(value) is list else value) == pytest.approx(expected, rel=0.02)
    assert memory.PROMPT % common.ROUND == memory.RESPONSE % common.ROUND == 0  # so traced are whole chunks


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
        assert args.gen_batch == int(memory.largest(row["sampling"], 80e9, 8))


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_default_fits_the_smaller_model_on_24_gb(name):
    """… and the larger on 80 GB, with a longest row of --max_length, or a pair of them."""
    args = SCRIPTS[name].parse_args(["--model", "any"])
    tokens = max(args.micro_tokens, args.max_length * (2 if name == "dpo" else 1))
    assert memory.between(rows()["Qwen2.5-0.5B"]["plain"], tokens) <= 0.9 * 24e9
    assert memory.between(rows()["Qwen2.5-1.5B"]["plain"], tokens) <= 0.9 * 80e9


@pytest.mark.parametrize("card, mode, lora, size", [
    ("80 GB", "plain", "", "1.5B"), ("80 GB", "checkpointed", "", "3B"), ("80 GB", "plain", ", LoRA 16", "8B"),
    ("24 GB", "plain", "", "0.5B"), ("24 GB", "plain", ", LoRA 16", "1.5B"), ("24 GB", "checkpointed", ", LoRA 16", "8B")])
def test_the_readme_names_the_largest_model_that_the_defaults_train(card, mode, lora, size):
    """A pair of two longest responses is the most that they need at once. The 8B recipe has the defaults too."""
    args, command = SCRIPTS["dpo"].parse_args(["--model", "any"]), recipe("dpo")
    assert (command.micro_tokens, command.max_length) == (args.micro_tokens, args.max_length)
    tokens = max(args.micro_tokens, 2 * args.max_length)
    fits = [name for name in memory.SHAPES
            if memory.between(rows()[name + lora][mode], tokens) <= 0.9 * memory.CARDS[card]]
    assert fits[-1].endswith(size)
    text = (ROOT / "README.md").read_text()
    assert ("train all weights up to 1.5B on 80 GB, with `--activation_checkpointing` 3B, and with LoRA 8B; "
            "on 24 GB 0.5B, with LoRA 1.5B, and with both 8B.") in text


def test_the_largest_that_fits_by_hand():
    assert memory.largest([[0, 1e9], [1000, 2e9]], 24e9, 1024) == "20,480"  # 20,600 fit
    assert memory.largest([[0, 22e9], [1000, 23e9]], 24e9, 1024) == "–"
    assert memory.between([[0, 1.0], [10, 2.0], [20, 4.0]], 5) == 1.5
    assert memory.between([[0, 1.0], [10, 2.0], [20, 4.0]], 30) == 6.0
