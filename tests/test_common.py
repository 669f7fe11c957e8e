"""common.py: tokenization on every text chat template of TRL, log-probabilities on ten families."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import common
from common import BadInput, Example, check_model, encode, encode_prompt, layout
from common import micro_batches, prompt_in, response_logps

# --- Tokenization ---------------------------------------------------------------------------------

QUESTION, ANSWER = "What is two plus two?", "It is four,\nof course."
USER = [{"role": "user", "content": QUESTION}]
LONG = 10**6  # a max_length that cuts nothing

# What ends a turn, read off the templates by hand; the first key that starts a name counts.
ENDS = {
    "cohere2": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "diffusion_gemma": "<turn|>",
    "gemma4": "<turn|>",
    "gemma": "<end_of_turn>",
    "glm4moe_training": "<|user|>",
    "glm4moe": "<eos>",  # nothing after the answer: the tokenizer's EOS
    "gptoss": "<|return|>",
    "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "muse_glimmer": "<|eot|>",
    "nemotron": "<|im_end|>",
    "phi3": "<|end|>",  # not the "\n<eos>" after it
    "qwen": "<|im_end|>",  # not the "\n" after it
}

# TRL is only read, for its templates: importing it would take seconds.
TRL = importlib.util.find_spec("trl")
FILES = sorted(Path(TRL.origin).parent.glob("chat_templates/*.jinja")) if TRL else []
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in FILES}
MULTIMODAL = [name for name in TEMPLATES if name.startswith(("idefics3", "llava_next", "smolvlm"))]
TEXT = [name for name in TEMPLATES if name not in MULTIMODAL]
SPECIAL = re.compile(r"<\|\w+\|>|<\|\w+>|<\w+\|>|<｜[^｜\s]+｜>|<\w+_of_\w+>|\[gMASK\]|<sop>")


def train_bpe():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    # "\n\n" becomes a token, but is two before a word: Llama 3's prompt ends in it
    bpe.train_from_iterator([QUESTION, ANSWER, "one\n\n", "two\n\n"] * 3, trainer)
    return bpe


BPE = train_bpe()


def make_tokenizer(template=None, adds_bos=False, backend=BPE):
    """A fresh tokenizer, with the special tokens that the template's source names."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", chat_template=template)  # fmt: skip
    tokenizer.add_tokens(sorted(set(SPECIAL.findall(template or ""))), special_tokens=True)
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])  # fmt: skip
    return tokenizer


def texts(tokenizer, example):
    """Prompt and response, decoded."""
    prompt, response = example.ids[: example.prompt_len], example.ids[example.prompt_len :]
    return tokenizer.decode(prompt), tokenizer.decode(response)


def test_templates_are_found():
    """Otherwise the parametrized tests below would be empty, and pass."""
    if TRL is None:
        pytest.skip("trl is not installed")
    assert len(TEXT) >= 66 and len(MULTIMODAL) >= 6


@pytest.mark.parametrize("name", TEXT)
def test_template(name):
    """A response is what the template puts after the prompt, up to its end of turn."""
    tokenizer = make_tokenizer(TEMPLATES[name])
    end = next(ENDS[family] for family in ENDS if name.startswith(family))
    before = tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    whole = USER + [{"role": "assistant", "content": ANSWER}]
    whole = tokenizer.apply_chat_template(whole, tokenize=False)
    upto = whole[: whole.rindex(ANSWER) + len(ANSWER)]
    expected = (upto[len(before) :] if upto.startswith(before) else ANSWER) + end

    example = encode(tokenizer, QUESTION, ANSWER, LONG)
    assert texts(tokenizer, example) == (before, expected)
    assert expected.count(ANSWER) == 1
    assert encode_prompt(tokenizer, QUESTION) == (example.ids[: example.prompt_len], before, USER)
    n_end = len(tokenizer(end, add_special_tokens=False)["input_ids"])
    assert n_end == end.count("<")  # each special token is one id, or the test would not see it

    # max_length: all fits, the end does not, one response token does, none does
    ids, p = example
    for n in (len(ids), len(ids) - n_end, p + 1):
        assert encode(tokenizer, QUESTION, ANSWER, n) == (ids[:n], p)
    assert encode(tokenizer, QUESTION, ANSWER, p) is None


@pytest.mark.parametrize("name", MULTIMODAL)
def test_multimodal_template_is_refused(name):
    """They drop a string's text, or raise: training on it would train on nothing."""
    with pytest.raises(BadInput, match="template"):
        encode(make_tokenizer(TEMPLATES[name]), QUESTION, ANSWER, LONG)


TURN, TURN_END = "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"
PINNED = {  # the end of the prompt, the response: read off the templates by hand
    "qwen2_5": ("<|im_start|>assistant\n", "Four.<|im_end|>"),
    "qwen3": ("<|im_start|>assistant\n", "<think>\n\n</think>\n\nFour.<|im_end|>"),
    "qwen3_5_think": ("assistant\n<think>\n", "\n</think>\n\nFour.<|im_end|>"),
    "gemma": ("Two?<end_of_turn>\n<start_of_turn>model\n", "Four.<end_of_turn>"),
    "llama3": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "Four.<|eot_id|>"),
    "cohere2": (f"{TURN}<|CHATBOT_TOKEN|><|START_RESPONSE|>", f"Four.<|END_RESPONSE|>{TURN_END}"),
    "phi3": ("<|user|>\nTwo?<|end|>\n<|assistant|>\n", "Four.<|end|>"),
    "deepseek_r1_distill": ("<｜Assistant｜><think>\n", "Four.<｜end▁of▁sentence｜>"),
    "gptoss": ("<|start|>assistant", "<|channel|>final<|message|>Four.<|return|>"),
    "glm4moe": ("\nTwo?<|assistant|>", "\n<think></think>\nFour.<eos>"),
}


@pytest.mark.skipif(not TEMPLATES, reason="trl is not installed")
@pytest.mark.parametrize("name", PINNED)
def test_pinned_template(name):
    tokenizer = make_tokenizer(TEMPLATES[name])
    before, response = texts(tokenizer, encode(tokenizer, "Two?", "Four.", LONG))
    assert before.endswith(PINNED[name][0])
    assert response == PINNED[name][1]


# A small ChatML template of our own, so that what follows needs no TRL
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_messages_with_system_and_earlier_turns():
    turns = [("system", "Be brief."), ("user", "One?"), ("assistant", "Two."), ("user", "Two?")]
    prompt = [{"role": role, "content": text} for role, text in turns]
    before, response = texts(make_tokenizer(CHATML), encode(make_tokenizer(CHATML), prompt, "Four.", LONG))
    assert before == "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"
    assert response == "Four.<|im_end|>"
    assert prompt[-1] == {"role": "user", "content": "Two?"}  # the caller's list is not changed


def test_all_forms_of_prompt_and_response_are_the_same_tokens():
    """A string is a user message, and a whole dialogue brings its prompt."""
    message, tokenizer = [{"role": "assistant", "content": ANSWER}], make_tokenizer(CHATML)
    expected = encode(tokenizer, USER, ANSWER, LONG)
    for prompt, response in ((QUESTION, ANSWER), (QUESTION, message), (None, USER + message), ("?", USER + message)):
        assert encode(tokenizer, prompt, response, LONG) == expected
    tokenizer = make_tokenizer()
    assert encode(tokenizer, QUESTION, message, LONG) == encode(tokenizer, QUESTION, ANSWER, LONG)


def test_system_message_stands_first():
    tokenizer, system = make_tokenizer(CHATML), [{"role": "system", "content": "Be brief."}]
    for prompt in (QUESTION, USER):
        expected = encode(tokenizer, system + USER, ANSWER, LONG)
        assert encode(tokenizer, prompt, ANSWER, LONG, system="Be brief.") == expected
        assert encode_prompt(tokenizer, prompt, system="Be brief.") == encode_prompt(tokenizer, system + USER)
    assert len(USER) == 1  # the caller's list is not changed


def test_the_prompt_in_a_row():
    """What stands before the last message of a dialogue; a single message has no prompt in it."""
    answer = {"role": "assistant", "content": ANSWER}
    assert prompt_in({"prompt": "x", "chosen": [*USER, answer]}) == USER
    assert prompt_in({"prompt": "x", "chosen": [answer]}) == "x"
    assert prompt_in({"prompt": "x", "chosen": "y"}) == prompt_in({"problem": "x"}) == "x"
    assert prompt_in({"prompt": None, "question": "x"}) == "x"
    assert prompt_in({"completion": "y"}) is None


@pytest.mark.parametrize("template, raw", [(None, False), (None, True), (CHATML, True)])
@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("prompt", [QUESTION, "<bos>" + QUESTION])
def test_raw_text(template, raw, adds_bos, prompt):
    """No template; one BOS where the tokenizer adds one, no second if the text has it; an EOS."""
    tokenizer = make_tokenizer(template, adds_bos=adds_bos)
    before = "<bos>" + QUESTION if adds_bos else prompt
    example = encode(tokenizer, prompt, " Four.", LONG, raw=raw)
    assert texts(tokenizer, example) == (before, " Four.<eos>")
    ids = example.ids[: example.prompt_len]
    assert encode_prompt(tokenizer, prompt, raw=raw) == (ids, prompt, None)
    assert example.ids.count(tokenizer.bos_token_id) == before.count("<bos>")


@pytest.mark.parametrize("adds_bos", [False, True])
def test_raw_text_has_the_ids_of_a_sentencepiece_tokenizer(adds_bos):
    """It puts a ▁ before the first word of a text: a BOS written as text would take that from it."""
    words = Tokenizer(models.WordLevel(dict(zip(["?", "▁two", "two", "▁plus"], range(4))), "?"))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = make_tokenizer(adds_bos=adds_bos, backend=words)
    bos = [tokenizer.bos_token_id] * adds_bos
    assert tokenizer("two plus")["input_ids"] == [*bos, 1, 3]
    assert encode_prompt(tokenizer, "two plus")[0] == [*bos, 1, 3]
    example = encode(tokenizer, "two plus", " two", LONG)
    assert example == ([*bos, 1, 3, 1, tokenizer.eos_token_id], len(bos) + 2)


def test_token_across_the_boundary():
    """Generation starts after the prompt's own tokens, even where the whole merges differently."""
    tokenizer = make_tokenizer()
    before, *_ = encode_prompt(tokenizer, "two plus tw")
    assert encode_prompt(tokenizer, "two plus two?")[0][: len(before)] != before
    example = encode(tokenizer, "two plus tw", "o?", LONG)
    assert example.ids[: example.prompt_len] == before
    assert texts(tokenizer, example) == ("two plus tw", "o?<eos>")


TWO_ENDS = CHATML.replace("<|im_end|>", "<|end|><|im_end|>")  # as Cohere 2 has
CASES = [(CHATML, "<|im_end|>"), (TWO_ENDS, "<|end|><|im_end|>"), (None, "<eos>")]


@pytest.mark.parametrize("template, end", CASES)
@pytest.mark.parametrize("inside", ["{end}", "{end} And more.", "{end}{end}", "<eos> And more."])
def test_response_is_cut_at_its_first_end(template, end, inside):
    """Generation would have stopped there: one end, nothing after it."""
    tokenizer = make_tokenizer(template)
    example = encode(tokenizer, QUESTION, "Four." + inside.format(end=end), LONG)
    assert texts(tokenizer, example)[1] == "Four." + end


def test_end_of_turn_follows_the_template():
    """The end of turn is cached per tokenizer; a new template must not get the old one's."""
    tokenizer = make_tokenizer(CHATML)
    tokenizer.add_tokens(["<|eot|>"], special_tokens=True)
    assert texts(tokenizer, encode(tokenizer, "Two?", "Four.", LONG))[1] == "Four.<|im_end|>"
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|eot|>")
    assert texts(tokenizer, encode(tokenizer, "Two?", "Four.", LONG))[1] == "Four.<|eot|>"


@pytest.mark.parametrize("template, words", [
    (None, "chat_template is not set"),
    ("{{ raise_exception('roles must alternate') }}", "does not take these messages: roles must alternate"),
])  # fmt: skip
def test_messages_that_no_template_takes_are_refused(template, words):
    with pytest.raises(BadInput, match=words):
        encode_prompt(make_tokenizer(template), USER)
    with pytest.raises(BadInput, match=words):
        encode(make_tokenizer(template), USER, ANSWER, LONG)


# --- Log-probabilities ----------------------------------------------------------------------------

V, H = 97, 32  # vocabulary, hidden size
SMALL = dict(
    vocab_size=V, hidden_size=H, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0,
    initializer_range=0.2,  # ten times the usual: logits that differ visibly
)  # fmt: skip
GPT = dict(vocab_size=V, n_embd=H, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
# Values far from 1, so that forgetting one of them would be seen
FAMILIES = {
    "llama": {},
    "qwen2": dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "mistral": dict(sliding_window=4),
    "gemma2": dict(sliding_window=4, final_logit_softcapping=3.0, query_pre_attn_scalar=8),
    "gemma3_text": dict(sliding_window=4, final_logit_softcapping=3.0, query_pre_attn_scalar=8),
    "gpt2": {},
    "phi3": dict(sliding_window=4),
    "granite": dict(logits_scaling=3.0, embedding_multiplier=2.0, residual_multiplier=0.5),
    "cohere2": dict(sliding_window=4, logit_scale=0.25),
}


def make_model(family="llama", **options):
    """Random weights, eval mode; the same ones for the same arguments."""
    torch.manual_seed(0)
    base = GPT if family == "gpt2" else SMALL
    config = AutoConfig.for_model(family, **{**base, **FAMILIES.get(family, {}), **options})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.row_tokens = 0  # until check_model allows more
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # norms and biases start at 0 or 1, which would hide a mistake
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return model


class Words:
    """All that check_model looks at in a tokenizer."""

    eos_token_id = 1

    def __len__(self):
        return V


def make_examples(*lengths, vocabulary=V):
    """Examples with the given (prompt, response) lengths."""
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randint(1, vocabulary, (p + r,), generator=generator) for p, r in lengths]
    return [Example(ids.tolist(), p) for ids, (p, _) in zip(draw, lengths)]


EXAMPLES = make_examples((3, 7), (9, 1), (1, 4), (6, 12), (4, 9))  # N = 33, T = 12


def own_logps(model, example, temperature=1.0):
    """The same from the model's own logits: one row, no padding, no chunks. (r,)"""
    logits = model(torch.tensor([example.ids])).logits[0] / temperature
    logp = logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(example.ids)[1:, None])[:, 0]
    return logp[example.prompt_len - 1 :]


def gradients(model, flat):
    """Gradients of a weighted mean of log-probabilities, so that no two tokens can trade places."""
    weights = torch.linspace(-1, 2, len(flat))
    model.zero_grad()
    ((flat * weights).sum() / len(flat)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_matches_own_logits(model, examples, temperature=1.0):
    truth = torch.cat([own_logps(model, e, temperature) for e in examples])
    expected = gradients(model, truth)
    logp, mask = response_logps(model, examples, temperature)
    assert truth.std() > 0.1  # logits that differ, or the comparison would be worth nothing
    torch.testing.assert_close(logp[mask], truth, atol=1e-5, rtol=0)
    for name, gradient in gradients(model, logp[mask]).items():
        assert expected[name].abs().max() > 0, name
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.fixture
def small_blocks(monkeypatch):
    """The vocabulary's 97 in a block of 64 and a ragged last one."""
    monkeypatch.setitem(common.BLOCK_BYTES, "cpu", 1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, tied, small_blocks):
    """Value, and gradient of every parameter, are those of the model's own logits."""
    model = make_model(family, tie_word_embeddings=tied)
    head = model.get_output_embeddings()
    assert (head.weight is model.get_input_embeddings().weight) == tied
    assert_matches_own_logits(model, EXAMPLES)
    check_model(model, Words(), 32)  # and is not refused


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere2", "granite"])
def test_temperature(family, small_blocks):
    """Divides the logits after the scale and the soft cap, and the gradient."""
    assert_matches_own_logits(make_model(family), EXAMPLES, temperature=0.7)


def test_blocks_do_not_change_the_result(monkeypatch):
    model, results = make_model(vocab_size=300), []
    for size in (64, 128, 320):
        monkeypatch.setitem(common.BLOCK_BYTES, "cpu", 4 * 33 * (size - 64))  # 33 tokens
        logp, mask = response_logps(model, EXAMPLES)
        results.append([logp.detach(), *gradients(model, logp[mask]).values()])
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(results[0], results[2], atol=1e-6, rtol=1e-5)


def test_gradient_where_a_token_is_nearly_sure():
    """In bf16, softmax − 1 of such a token is rounded as a small number and not as the difference of two ones."""
    hidden = torch.zeros(1, H)
    hidden[0, 0], weight = 8.5, torch.zeros(V, H)
    weight[5, 0] = 1.0  # logits: 8.5 and 96 zeros
    hidden.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logp = common.TokenLogps.apply(hidden, weight, torch.tensor([5]), 0)
    logp.sum().backward()
    assert hidden.grad[0, 0].item() == pytest.approx(1 - logp.exp().item(), rel=0.005)  # 0.0192


def make_groups(*groups):
    """Examples of groups with one prompt each: (prompt length, response lengths)."""
    examples = []
    for seed, (prompt, responses) in enumerate(groups):
        generator = torch.Generator().manual_seed(seed)
        start, *rest = [torch.randint(1, V, (n,), generator=generator).tolist() for n in (prompt, *responses)]
        examples += [Example(start + response, prompt) for response in rest]
    return examples


GROUPS = make_groups((5, (7, 3, 1, 12)), (9, (4,)), (1, (3, 3, 2)))
WINDOWED = ("mistral", "gemma2", "gemma3_text", "phi3", "cohere2", "qwen2", "qwen3")


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_share_a_prompt_equal_separate_rows(family, small_blocks):
    """Values and gradients; a family that forgets its window of 4 under a mask is left alone."""
    model = make_model(family)
    check_model(model, Words(), 32)
    assert model.row_tokens == (0 if family in WINDOWED else 2 * H)
    assert len(layout(model, GROUPS)[0]) == (len(GROUPS) if family in WINDOWED else 3)
    assert_matches_own_logits(model, GROUPS, temperature=0.7)


@pytest.mark.parametrize("max_length, shares", [(20, True), (32, False)])
def test_sharing_is_checked_on_the_longest_row_that_can_occur(max_length, shares):
    """Mistral forgets its window of 20 under a mask, which shorter rows do not show."""
    model = make_model("mistral", sliding_window=20)
    check_model(model, Words(), max_length)
    assert model.row_tokens == (2 * H if shares else 0)
    pair = make_groups((10, (max_length - 10, max_length - 12)))
    assert len(layout(model, pair)[0]) == (1 if shares else 2)
    assert_matches_own_logits(model, pair)


def test_a_model_that_refuses_a_mask_keeps_separate_rows(monkeypatch):
    model = make_model()
    forward = model.base_model.forward

    def without_mask(input_ids, attention_mask=None, **options):
        assert attention_mask is None
        return forward(input_ids, **options)

    monkeypatch.setattr(model.base_model, "forward", without_mask)
    check_model(model, Words(), 32)
    assert model.row_tokens == 0
    assert_matches_own_logits(model, GROUPS)


def test_layout_fills_rows_with_neighbours():
    model, group = make_model(), make_groups((10, [10] * 8))
    for room, lengths in ((0, [20] * 8), (90, [90]), (89, [80, 20]), (50, [50, 50]), (49, [40, 40, 30])):
        model.row_tokens = room
        rows, found = layout(model, group)
        assert found == lengths, room
        assert [i for row in rows for i in row] == list(range(8))
    model.row_tokens = 90
    (a, b), (c,) = make_groups((10, (5, 5))), make_groups((11, (5,)))
    assert layout(model, [a, c, b]) == ([[0], [1], [2]], [15, 16, 15])


def test_micro_batches_keep_to_tokens_and_padding(monkeypatch):
    model, units = make_model(), [[e] for e in make_examples((2, 8), (2, 48), (2, 18), (2, 28), (2, 88))]
    assert micro_batches(model, units, 120) == [[4], [1, 3], [0, 2]]
    assert micro_batches(model, units, 10) == [[4], [1], [3], [2], [0]]
    monkeypatch.setitem(common.MAX_PADDING, "cpu", 60)
    assert micro_batches(model, units, 10**6) == [[1, 4], [0, 2, 3]]


def test_micro_batches_keep_units_and_shared_rows_together():
    model = make_model()
    model.row_tokens = 2 * H
    units = [make_groups((30, (2, 2))), make_groups((20, (2, 2, 2)))]  # rows of 34 and 26 tokens
    assert micro_batches(model, units, 68) == [[0, 1]] and micro_batches(model, units, 67) == [[0], [1]]
    units = [[e] for e in make_groups((20, (2, 4)), (20, (2,)), (20, (2, 2)))]  # rows of 26, 22, 24
    assert micro_batches(model, units, 30) == [[0, 1], [3, 4], [2]]
    assert micro_batches(model, units, 52) == [[0, 1, 3, 4], [2]]
    model.row_tokens = 0
    assert micro_batches(model, units, 30) == [[1], [0], [2], [3], [4]]


def test_what_stands_between_two_that_could_share_a_row_is_counted():
    """Examples 0 and 2 share a row only as long as 1 is not with them: three rows of 26 are 78."""
    model = make_model()
    model.row_tokens = 2 * H
    (a, b), (c,) = make_groups((20, (6, 4))), make_groups((21, (1,)))
    assert layout(model, [a, b]) == ([[0, 1]], [30])
    assert micro_batches(model, [[a], [c], [b]], 77) == [[0, 2], [1]]
    assert micro_batches(model, [[a], [c], [b]], 78) == [[0, 1, 2]]


def test_shapes_and_mask():
    """(B, T), T the longest response; mask from lengths; 0 on padding; t = 0 the first token."""
    model = make_model()
    examples = [EXAMPLES[1], EXAMPLES[0], Example([5, 6, 0, 0], 2)]  # id 0 may be a token too
    logp, mask = response_logps(model, examples)
    assert (logp.shape, logp.dtype) == ((3, 7), torch.float32)
    assert (mask.shape, mask.dtype) == ((3, 7), torch.bool)
    assert mask.tolist() == [[True] * n + [False] * (7 - n) for n in (1, 7, 2)]
    assert (logp[~mask] == 0).all() and (logp[mask] < 0).all()
    for row, example in zip(logp, examples):
        truth = own_logps(model, example)
        torch.testing.assert_close(row[: len(truth)], truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_padding_invariance(family):
    """A row alone equals the same row beside longer ones, whatever its place."""
    model = make_model(family)
    together, _ = response_logps(model, EXAMPLES)
    for row, example in zip(together, EXAMPLES):
        alone, mask = response_logps(model, [example])
        assert mask.all()
        torch.testing.assert_close(row[: alone.shape[1]], alone[0], atol=1e-5, rtol=0)


def kept_logits(forward, vocabulary):
    """How many elements with the vocabulary as last dimension autograd keeps for backward."""
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel() if tensor.shape[-1:] == (vocabulary,) else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(sizes)


def test_logits_are_not_kept(small_blocks):
    """Tokens × vocabulary is the memory that this function is there to save."""
    model = make_model()
    assert kept_logits(lambda: response_logps(model, EXAMPLES), V) == 0
    plain = kept_logits(lambda: [own_logps(model, e) for e in EXAMPLES], V)
    assert plain >= 33 * V  # the plain way keeps them: the check can fail


def test_bf16_autocast(small_blocks):
    """Products in bf16, log-softmax in float32: near the float32 result, and float32 gradients."""
    model = make_model(tie_word_embeddings=False)
    exact, mask = response_logps(model, EXAMPLES)
    expected = gradients(model, exact[mask])
    with torch.autocast("cpu", torch.bfloat16):
        logp, mask = response_logps(model, EXAMPLES)
    assert logp.dtype == torch.float32
    assert 1e-4 < (logp - exact).abs().max() < 0.1  # bf16 was used, and costs little
    assert (logp.bfloat16() != logp)[mask].float().mean() > 0.5  # but not for the log-softmax
    for name, gradient in gradients(model, logp[mask]).items():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all(), name
        cosine = torch.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.99, name


def test_bf16_head_in_backward_too(monkeypatch, small_blocks):
    """Autocast is off while backward runs: a float32 head there would be slow on a GPU."""
    seen, mm = [], torch.mm

    def recorded(hidden, weight, **options):
        seen.append((hidden.dtype, weight.dtype))
        return mm(hidden, weight, **options)

    monkeypatch.setattr(torch, "mm", recorded)
    model = make_model()
    with torch.autocast("cpu", torch.bfloat16):
        logp, mask = response_logps(model, EXAMPLES)
    gradients(model, logp[mask])
    assert seen == [(torch.bfloat16, torch.bfloat16)] * 4  # two blocks, forward and backward


@pytest.mark.parametrize("alter", [lambda x: 1.5 * x, lambda x: 20 * torch.tanh(x / 20)])
def test_check_model_refuses_altered_logits(alter, monkeypatch):
    """A family that does something to its logits that common.py does not know, refused by name."""
    model = make_model()
    forward = model.forward

    def altered(*args, **kwargs):
        output = forward(*args, **kwargs)
        return SimpleNamespace(logits=alter(output.logits))

    monkeypatch.setattr(model, "forward", altered)
    with pytest.raises(BadInput, match="does not rebuild the logits of llama"):
        check_model(model, Words(), 32)


def test_check_model_refuses_a_head_with_a_bias():
    """Phi's, which is 0 in a fresh model only."""
    with pytest.raises(BadInput, match="does not rebuild the logits of phi"):
        check_model(make_model("phi"), Words(), 32)


def test_check_model_refuses_what_cannot_be_trained(monkeypatch):
    model = make_model()
    with pytest.raises(BadInput, match="the context is 64; lower it"):
        check_model(model, Words(), 65)
    check_model(model, Words(), 64)
    with monkeypatch.context() as patch, pytest.raises(BadInput, match="has no EOS token"):
        patch.setattr(Words, "eos_token_id", None)
        check_model(model, Words(), 32)
    with monkeypatch.context() as patch, pytest.raises(BadInput, match="98 tokens .* 97 embeddings"):
        patch.setattr(Words, "__len__", lambda self: V + 1)
        check_model(model, Words(), 32)
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(BadInput, match="weights are not finite: model.norm.weight"):
        check_model(model, Words(), 32)


def test_products_in_float32_are_not_rounded_to_tf32(script, run):
    """Neither in check_model nor later: outside of autocast there are few."""
    torch.set_float32_matmul_precision("highest")
    run(script, "--steps", 1)
    assert torch.get_float32_matmul_precision() == "highest"
