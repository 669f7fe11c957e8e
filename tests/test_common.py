"""common.py: tokenization on every text chat template of TRL, log-probabilities on all kinds of families."""

import importlib.util
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import common
from common import BadInput, Example, check_model, micro_batches, prompt_in, response_logps
from conftest import SHARED

# --- Tokenization ---------------------------------------------------------------------------------

QUESTION, ANSWER = "What is two plus two?", "It is four,\nof course."
USER = [{"role": "user", "content": QUESTION}]
LONG = 10**6  # a max_length that cuts nothing


def encode(tokenizer, prompt, response, max_length=LONG, system=None, row=None, **kwargs):
    """Of a row with these columns: token ids as lists, and the length of the prompt."""
    args = SimpleNamespace(max_length=max_length, system_prompt=system, chat_template_kwargs=kwargs)
    found = common.encode(tokenizer, {"prompt": prompt, "chosen": response, **(row or {})}, "chosen", args)
    return found and (found.ids.tolist(), found.prompt_len)


def encode_prompt(tokenizer, prompt, system=None, **kwargs):
    args = SimpleNamespace(max_length=LONG, system_prompt=system, chat_template_kwargs=kwargs)
    found = common.encode(tokenizer, {"prompt": prompt}, None, args)
    assert found.prompt_len == len(found.ids) and found.response == []
    return list(found.prompt)

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


def texts(tokenizer, encoded):
    """Prompt and response, decoded."""
    ids, cut = encoded
    return tokenizer.decode(ids[:cut]), tokenizer.decode(ids[cut:])


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
    opened = "</think>\n\n" if before.endswith("<think>\n") else ""  # closed once before the answer
    expected = (upto[len(before) :] if upto.startswith(before) else opened + ANSWER) + end

    example = encode(tokenizer, QUESTION, ANSWER, LONG)
    assert texts(tokenizer, example) == (before, expected)
    assert expected.count(ANSWER) == 1
    assert encode_prompt(tokenizer, QUESTION) == example[0][: example[1]]
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
    with pytest.raises(Exception, match="leaves out the user message|no attribute"):
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
    "deepseek_r1_distill": ("<｜Assistant｜><think>\n", "</think>\n\nFour.<｜end▁of▁sentence｜>"),
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
    for prompt, response in ((QUESTION, ANSWER), (QUESTION, message), (None, USER + message), (QUESTION, USER + message)):
        assert encode(tokenizer, prompt, response, LONG) == expected
    tokenizer = make_tokenizer()
    assert encode(tokenizer, QUESTION, message, LONG) == encode(tokenizer, QUESTION, ANSWER, LONG)


def test_system_message_stands_first():
    tokenizer, system = make_tokenizer(CHATML), [{"role": "system", "content": "Be brief."}]
    for prompt in (QUESTION, USER):
        expected = encode(tokenizer, system + USER, ANSWER, LONG)
        assert encode(tokenizer, prompt, ANSWER, system="Be brief.") == expected
        assert encode_prompt(tokenizer, prompt, system="Be brief.") == encode_prompt(tokenizer, system + USER)
    assert len(USER) == 1  # the caller's list is not changed


def test_the_prompt_in_a_row():
    assert prompt_in({"prompt": USER, "chosen": "y"}) == USER
    assert prompt_in({"prompt": "x", "chosen": "y"}) == prompt_in({"problem": "x"}) == "x"
    assert prompt_in({"prompt": None, "question": "x"}) == "x"
    assert prompt_in({"completion": "y"}) is None


@pytest.mark.parametrize("adds_eos", [False, True])
@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("brings_bos", [False, True])
def test_raw_text(brings_bos, adds_bos, adds_eos):
    """No template: one BOS where the tokenizer adds one, or the text has one; no EOS but at the end."""
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    if adds_eos:
        specials = [("<bos>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>" if adds_bos else "$A <eos>", special_tokens=specials)  # fmt: skip
    text = "<bos>" + QUESTION if brings_bos else QUESTION
    before, adds_bos = ("<bos>" + QUESTION, True) if adds_bos or brings_bos else (QUESTION, False)
    assert encode(tokenizer, text, " Four.") == encode(tokenizer, before, " Four.")
    example = encode(tokenizer, text, " Four.")
    assert texts(tokenizer, example) == (before, " Four.<eos>")
    assert encode_prompt(tokenizer, text) == example[0][: example[1]]
    assert example[0].count(tokenizer.bos_token_id) == int(adds_bos)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_raw_text_has_the_ids_of_a_sentencepiece_tokenizer(adds_bos):
    """It puts a ▁ before the first word of a text: a BOS written as text would take that from it."""
    words = Tokenizer(models.WordLevel(dict(zip(["?", "▁two", "two", "▁plus"], range(4))), "?"))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = make_tokenizer(adds_bos=adds_bos, backend=words)
    bos = [tokenizer.bos_token_id] * adds_bos
    assert encode_prompt(tokenizer, "two plus") == [*bos, 1, 3]
    assert encode(tokenizer, "two plus", " two") == ([*bos, 1, 3, 1, tokenizer.eos_token_id], len(bos) + 2)


def test_token_across_the_boundary():
    """Generation starts after the prompt's own tokens, even where the whole merges differently."""
    tokenizer = make_tokenizer()
    before = encode_prompt(tokenizer, "two plus tw")
    assert encode_prompt(tokenizer, "two plus two?")[: len(before)] != before
    example = encode(tokenizer, "two plus tw", "o?", LONG)
    assert example[0][: example[1]] == before
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


# As Meta first published it: the assistant's header is always written.
LLAMA3 = ("{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
          "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
          "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
          "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}")
ROLES = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
OPENERS = ROLES + "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
PLAIN_END = "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"


@pytest.mark.parametrize("template, end", [
    (LLAMA3, "<|eot_id|>"), (TEMPLATES.get("qwen2_5"), "<|im_end|>"), (TEMPLATES.get("phi3"), "<|end|>"),
    (TEMPLATES.get("cohere2"), "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    (OPENERS, "<|end|>"), (OPENERS + "{{ '<|user|>' }}", "<|end|>"), (PLAIN_END, "<eos>"),
])  # fmt: skip
def test_a_turn_ends_before_what_opens_the_next(template, end):
    """Also with the default system message of Qwen2.5, which opens as all messages do."""
    if template is None:
        pytest.skip("trl is not installed")
    tokenizer = make_tokenizer(template)
    tokenizer.add_tokens(["<|user|>", "<|assistant|>", "<|end|>"], special_tokens=True)
    assert tokenizer.decode(common.end_of_turn(tokenizer)[1]) == end
    assert texts(tokenizer, encode(tokenizer, "Two?", "One,\ntwo."))[1].endswith("One,\ntwo." + end)


def test_an_added_token_that_is_not_called_special_ends_a_turn():
    """Not the tokenizer's EOS, which the template never writes."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=BPE, eos_token="<eos>", chat_template=CHATML)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "\n"])
    assert texts(tokenizer, encode(tokenizer, "Two?", "One,\ntwo."))[1] == "One,\ntwo.<|im_end|>"
    tokenizer.chat_template = PLAIN_END  # white space ends no turn
    assert texts(tokenizer, encode(tokenizer, "Two?", "One,\ntwo."))[1] == "One,\ntwo.<eos>"


@pytest.mark.parametrize("text, cut", [("Four.", False), ("Four.<eos>", False), ("<s>Four</s> of <eos> five.", True)])
def test_an_end_inside_an_answer_counts_as_cut(text, cut):
    args = SimpleNamespace(max_length=LONG, system_prompt=None, chat_template_kwargs={})
    assert common.encode(make_tokenizer(CHATML), {"prompt": "Two?", "chosen": text}, "chosen", args).cut is cut


def test_end_of_turn_follows_the_template():
    """A new template must not get the old one's."""
    tokenizer = make_tokenizer(CHATML)
    tokenizer.add_tokens(["<|eot|>"], special_tokens=True)
    assert texts(tokenizer, encode(tokenizer, "Two?", "Four.", LONG))[1] == "Four.<|im_end|>"
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|eot|>")
    assert texts(tokenizer, encode(tokenizer, "Two?", "Four.", LONG))[1] == "Four.<|eot|>"


# --- Whatever a row carries is trained or refused --------------------------------------------------


def A(text, **more):
    return {"role": "assistant", "content": text, **more}


def U(text):
    return {"role": "user", "content": text}


def S(text):
    return {"role": "system", "content": text}


def chatml(*turns):
    """Their text in CHATML, and the beginning of an answer."""
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"


def test_messages_without_a_template_are_refused():
    """--raw: neither messages nor a system prompt."""
    for prompt, system in ((USER, None), (QUESTION, "Be brief.")):
        with pytest.raises(BadInput, match="need a chat template"):
            encode(make_tokenizer(), prompt, ANSWER, system=system)


def test_what_the_template_refuses_is_an_error():
    with pytest.raises(Exception, match="roles must alternate"):
        encode(make_tokenizer("{{ raise_exception('roles must alternate') }}"), USER, ANSWER)


CALLS = CHATML.replace("m.content +", "m.content + ('' if not m.tool_calls else m.tool_calls | tojson) +")
THOUGHTS = CHATML.replace("m.content +", "('<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '') + m.content +")


def test_the_keys_of_a_message_go_to_the_template():
    call = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    answer = [{"role": "assistant", "content": None, "tool_calls": call, "name": None}]
    assert '"name": "add"' in texts(make_tokenizer(CALLS), encode(make_tokenizer(CALLS), "1?", answer))[1]
    response = texts(make_tokenizer(THOUGHTS), encode(make_tokenizer(THOUGHTS), "1?", [A("2", reasoning_content="one more")]))[1]
    assert response == "<think>one more</think>2<|im_end|>"


@pytest.mark.parametrize("key, value", [("tool_calls", [{"function": {"name": "add", "arguments": {}}}]), ("reasoning_content", "hm")])
def test_an_answers_keys_that_the_template_leaves_out_are_refused(key, value):
    with pytest.raises(BadInput, match="the chat template leaves out the assistant"):
        encode(make_tokenizer(CHATML), "1?", [A("2", **{key: value})])


@pytest.mark.parametrize("role", ["system", "developer", "user"])
def test_a_text_that_does_not_arrive_is_refused(role):
    template = CHATML.replace("{{ '<|im_start|>'", "{{ '' if m.role == '" + role + "' else '<|im_start|>'")
    prompt = [{"role": role, "content": "Be brief."}, *([] if role == "user" else USER)]
    with pytest.raises(BadInput, match=f"the chat template leaves out the {role} message"):
        encode(make_tokenizer(template), prompt, ANSWER)


CALL = [{"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}]
RESULT = {"role": "tool", "content": '{"temp": 20}', "name": "get_weather", "tool_call_id": "abcdefghi"}


@pytest.mark.skipif(not TEMPLATES, reason="trl is not installed")
@pytest.mark.parametrize("name, prompt, words", [
    ("llama3_1", [U("Weather?"), A(None, tool_calls=CALL), RESULT], None),  # written as JSON
    ("gptoss", [U("Weather?"), A(None, tool_calls=CALL), RESULT], None),
    ("qwen2_5", [{"role": "human", "content": "Weather?"}], "the human message's content"),
    ("qwen2_5", [U("Weather?"), A(None, tool_calls=CALL), U("And now?")], None),
    ("phi3", [U("Weather?"), A("Wait.", tool_calls=CALL), U("And now?")], "the assistant message's tool_calls"),
    ("phi3", [U("Weather?"), A("Wait."), RESULT, U("And now?")], "the tool message's content"),
    ("qwen3", [U("One?"), A("<think>hm</think>\n\nTwo."), U("Three?")], None),  # an earlier thought may go
])  # fmt: skip
def test_every_message_of_a_prompt_arrives_or_is_refused(name, prompt, words):
    tokenizer = make_tokenizer(TEMPLATES[name])
    if words:
        with pytest.raises(BadInput, match=f"the chat template leaves out {words}"):
            encode(tokenizer, prompt, "Four.")
    else:
        assert texts(tokenizer, encode(tokenizer, prompt, "Four."))[1].count("Four.") == 1


@pytest.mark.skipif(not TEMPLATES, reason="trl is not installed")
@pytest.mark.parametrize("key", ["thinking", "reasoning_content"])
def test_the_thought_of_an_answer_arrives_or_is_refused(key):
    tokenizer, answer = make_tokenizer(TEMPLATES["gptoss"]), [A("Four.", **{key: "Two and two."})]
    assert texts(tokenizer, encode(tokenizer, "Two?", answer))[1] == (
        "<|channel|>analysis<|message|>Two and two.<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>")
    with pytest.raises(BadInput, match=f"the chat template leaves out the assistant's {key}"):
        encode(make_tokenizer(TEMPLATES["qwen2_5"]), "Two?", answer)


def test_the_switches_of_a_system_message_may_go():
    """SmolLM3's template takes /think and /no_think out of it, and nothing else may be missing."""
    template = CHATML.replace("m.content", "(m.content | replace('/no_think', '') | replace('/think', '')).strip()")
    tokenizer = make_tokenizer(template)
    for system in ("/no_think Be brief.", "Be brief. /think", "/no_think"):
        before, _ = texts(tokenizer, encode(tokenizer, [S(system), U("Two?")], "Four."))
        assert before == chatml(("system", system.replace("/no_think", "").replace("/think", "").strip()), ("user", "Two?"))
    with pytest.raises(BadInput, match="leaves out the system message's content"):
        encode(make_tokenizer(template.replace(").strip()", " | replace('brief', ''))")), [S("Be brief. /think"), U("2?")], "4.")


def test_a_template_may_trim():
    tokenizer = make_tokenizer(CHATML.replace("m.content", "m.content.strip()"))
    assert texts(tokenizer, encode(tokenizer, " Two?\n", "Four. "))[1] == "Four.<|im_end|>"


@pytest.mark.parametrize("column", ["tools", "image", "images", "history", "system_prompt", "input"])
def test_a_column_that_would_change_the_prompt_is_refused(column):
    tokenizer = make_tokenizer(CHATML)
    with pytest.raises(BadInput, match=f"the column {column} is left out of the prompt"):
        encode(tokenizer, "1?", "2", row={column: ["x"]})
    for empty in ([], "", None):
        assert encode(tokenizer, "1?", "2", row={column: empty}) == encode(tokenizer, "1?", "2")
    if column == "input":  # beside a whole dialogue it is not a part of the prompt
        assert encode(tokenizer, None, [U("1?"), A("2")], row={column: "x"}) == encode(tokenizer, "1?", "2")


def test_half_a_character_is_named():
    with pytest.raises(BadInput, match="half a character .a lone surrogate."):
        encode(make_tokenizer(CHATML), "1?", "2 \ud83d")


DIALOGUES = {  # prompt, chosen: what is read before the last answer
    "a completion of several messages": ([U("Name a fruit")], [A("Apple"), U("Another?"), A("Pear")],
                                         [("user", "Name a fruit"), ("assistant", "Apple"), ("user", "Another?")]),
    "the dialogue brings the end of the prompt": ([S("Be brief."), U("A fruit?")], [U("A fruit?"), A("Pear")],
                                                  [("system", "Be brief."), ("user", "A fruit?")]),
    "the dialogue brings all of the prompt": ("A fruit?", [S("Be brief."), U("A fruit?"), A("Pear")],
                                              [("system", "Be brief."), ("user", "A fruit?")]),
    "no prompt": (None, [U("A fruit?"), A("Pear")], [("user", "A fruit?")]),
}


@pytest.mark.parametrize("name", DIALOGUES)
def test_the_prompt_comes_first_unless_the_dialogue_brings_it(name):
    prompt, chosen, turns = DIALOGUES[name]
    tokenizer = make_tokenizer(CHATML)
    assert texts(tokenizer, encode(tokenizer, prompt, chosen)) == (chatml(*turns), "Pear<|im_end|>")


@pytest.mark.parametrize("prompt, chosen", [
    ("A fruit?", [U("A tree?"), A("Pear")]),
    ([S("Be brief."), U("A fruit?")], [S("Be long."), U("A fruit?"), A("Pear")]),
])  # fmt: skip
def test_beginnings_that_disagree_are_refused(prompt, chosen):
    with pytest.raises(BadInput, match="begin differently"):
        encode(make_tokenizer(CHATML), prompt, chosen)


def test_a_row_without_a_prompt_names_the_forms():
    for row in ({"chosen": "\n\nHuman: hi\n\nAssistant: ho"}, {"chosen": [A("ho")]}):
        with pytest.raises(BadInput, match="no prompt; give a column prompt, or whole dialogues as messages"):
            encode(make_tokenizer(CHATML), None, row["chosen"])


def test_a_system_column_is_the_system_message():
    """Orca's; --system_prompt serves rows that have none, and nobody gets two."""
    tokenizer = make_tokenizer(CHATML)
    for row, own, system in (({"system": "Orca."}, "Orca.", None), ({"system": "Orca."}, "Orca.", "Mine."),
                             ({"system": ""}, "Mine.", "Mine."), ({}, "Mine.", "Mine.")):  # fmt: skip
        found = encode(tokenizer, "Two?", "Four.", system=system, row=row)
        assert texts(tokenizer, found)[0] == chatml(("system", own), ("user", "Two?"))
    found = encode(tokenizer, [S("Own."), U("Two?")], "Four.", system="Mine.")
    assert texts(tokenizer, found)[0] == chatml(("system", "Own."), ("user", "Two?"))


R1 = CHATML.replace("m.content +", "m.content.split('</think>')[-1] +").replace("assistant\n' }}", "assistant\n<think>\n' }}")


@pytest.mark.parametrize("answer, response", [
    ("Four.", "</think>\n\nFour."),
    ("<think>\nTwo and two.\n</think>\n\nFour.", "Two and two.\n</think>\n\nFour."),
    ("Two and two.</think>Four.", "Two and two.</think>\n\nFour."),
])
def test_a_thought_that_the_prompt_opens_is_closed_once(answer, response):
    tokenizer = make_tokenizer(R1)
    before, found = texts(tokenizer, encode(tokenizer, "Two?", answer))
    assert before.endswith("assistant\n<think>\n") and found == response + "<|im_end|>"


@pytest.mark.skipif("qwen3" not in TEMPLATES, reason="trl is not installed")
def test_options_of_the_chat_template():
    """Qwen 3 writes an empty thought into the prompt, instead of the response, if it is not to think."""
    tokenizer = make_tokenizer(TEMPLATES["qwen3"])
    before, response = texts(tokenizer, encode(tokenizer, "Two?", "Four.", enable_thinking=False))
    assert before.endswith("assistant\n<think>\n\n</think>\n\n") and response == "Four.<|im_end|>"
    before, response = texts(tokenizer, encode(tokenizer, "Two?", "<think>\nhm\n</think>\n\nFour."))
    assert before.endswith("assistant\n") and response == "<think>\nhm\n</think>\n\nFour.<|im_end|>"


def test_a_cut_response_is_marked():
    tokenizer, row = make_tokenizer(CHATML), {"prompt": QUESTION, "chosen": ANSWER}
    size = len(encode(tokenizer, QUESTION, ANSWER)[0])
    for max_length, cut in ((size, False), (size - 1, True)):
        args = SimpleNamespace(max_length=max_length, system_prompt=None, chat_template_kwargs={})
        assert common.encode(tokenizer, row, "chosen", args).cut is cut


@pytest.mark.parametrize("value, words", [
    (None, "chosen is no text"), (5, "chosen is no text"), ([{"role": "user"}], "chosen is no text"), ([], "chosen is empty"),
    (" ", "chosen is empty"), ([A("x"), U("y")], "ends with a message of role user"),
])  # fmt: skip
def test_what_is_no_answer_is_refused(value, words):
    with pytest.raises(BadInput, match=words):
        encode(make_tokenizer(CHATML), QUESTION, value)


def test_token_ids_take_four_bytes():
    args = SimpleNamespace(max_length=LONG, system_prompt=None, chat_template_kwargs={})
    assert common.encode(make_tokenizer(CHATML), {"prompt": "x", "chosen": "y"}, "chosen", args).ids.dtype == torch.int32


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
    "gemma3_text": dict(sliding_window=4, query_pre_attn_scalar=8),
    "gpt2": {},
    "phi3": dict(sliding_window=4),
    "granite": dict(logits_scaling=3.0, embedding_multiplier=2.0, residual_multiplier=0.5),
    "cohere2": dict(sliding_window=4, logit_scale=0.25),
    "starcoder2": dict(sliding_window=4),
    "olmo3": dict(sliding_window=4),
    "gpt_oss": dict(sliding_window=4, num_local_experts=4, num_experts_per_tok=2),  # attention sinks
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "smollm3": dict(no_rope_layers=[1, 0]),  # a layer without positions
    "bloom": dict(n_head=4, n_layer=2),  # ALiBi
    "opt": dict(ffn_dim=40, word_embed_proj_dim=H, dropout=0.0, init_std=0.2),  # positions from a mask
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "mamba": dict(state_size=4),  # no attention, and no use for a mask
    "qwen3_next": dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"]),
}


def make_model(family="llama", **options):
    """Random weights, eval mode; the same ones for the same arguments."""
    torch.manual_seed(0)
    base = GPT if family == "gpt2" else SMALL
    config = AutoConfig.for_model(family, **{**base, **FAMILIES.get(family, {}), **options})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
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
    return [Example(ids.int(), p) for ids, (p, _) in zip(draw, lengths)]


EXAMPLES = make_examples((3, 7), (9, 1), (1, 4), (6, 12), (4, 9))  # N = 33, T = 12


def own_logps(model, example, temperature=1.0):
    """The same from the model's own logits: one row, no padding, no chunks. (r,)"""
    logits = model(example.ids[None]).logits[0] / temperature
    logp = logits.log_softmax(-1)[:-1].gather(-1, example.ids[1:, None].long())[:, 0]
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


def test_a_cap_on_logits_is_refused():
    """Gemma 2's."""
    model = make_model("gemma2", sliding_window=4, final_logit_softcapping=3.0, query_pre_attn_scalar=8)
    with pytest.raises(BadInput, match="does not rebuild the logits of gemma2"):
        check_model(model, Words(), 32)


@pytest.mark.parametrize("family", ["llama", "cohere2", "granite"])
def test_temperature(family, small_blocks):
    """Divides the logits after the scale, and the gradient."""
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
        logp = common.TokenLogps.apply(hidden, weight, torch.tensor([5]))
    logp.sum().backward()
    assert hidden.grad[0, 0].item() == pytest.approx(1 - logp.exp().item(), rel=0.005)  # 0.0192


def unit_of(*lengths):
    """A unit of examples of these lengths in tokens: DPO's pair is one of two."""
    return [Example(torch.ones(length, dtype=torch.int32), 1) for length in lengths]


def padding_of(units):
    """Tokens of the forward of these units, padding included; of them those that units on their own would not have."""
    lengths = [[len(example.ids) for example in unit] for unit in units]
    padded = sum(map(len, lengths)) * max(map(max, lengths))
    return padded, padded - sum(len(unit) * max(unit) for unit in lengths)


def test_micro_batches_by_hand(monkeypatch):
    units = [unit_of(length) for length in (10, 50, 20, 30, 90)]
    assert micro_batches(units, 120, "cpu") == [[4], [1, 3], [0, 2]]  # 90; 50 + 30, 20 too many; 20 + 10
    assert micro_batches(units, 10, "cpu") == [[4], [1], [3], [2], [0]]
    monkeypatch.setitem(common.MAX_PADDING, "cpu", 60)
    assert micro_batches(units, 10**6, "cpu") == [[1, 4], [0, 2, 3]]
    monkeypatch.setitem(common.MAX_PADDING, "cuda", 10**6)  # each device has its own
    assert micro_batches(units, 10**6, "cuda") == [[0, 1, 2, 3, 4]]
    pairs = [unit_of(10, 30), unit_of(20, 15), unit_of(5, 40)]  # by the longer one: 2, 0, 1
    for limit, cut in ((20, [[0, 2], [1]]), (19, [[2], [0], [1]])):  # 4 × 40 tokens for 80 + 60; 4 × 30 for 60 + 40
        monkeypatch.setitem(common.MAX_PADDING, "cpu", limit)
        assert micro_batches(pairs, 160, "cpu") == cut
    assert micro_batches([], 100, "cpu") == []  # KTO has no mismatched pairs when it evaluates


def random_units(seed):
    rng = random.Random(seed)
    return [unit_of(*(rng.randint(2, 60) for _ in range(rng.randint(1, 4)))) for _ in range(30)]


@pytest.mark.parametrize("micro_tokens", [1, 100, 300, 10**6])
@pytest.mark.parametrize("seed", range(5))
def test_micro_batches_keep_to_tokens_and_padding(seed, micro_tokens):
    """Every unit once and whole; in the limits or alone; full: the next unit would break a limit."""
    units, limit = random_units(seed), common.MAX_PADDING["cpu"]
    micros = micro_batches(units, micro_tokens, "cpu")
    assert sorted(i for micro in micros for i in micro) == list(range(30))
    assert micros and all(micros) and all(micro == sorted(micro) for micro in micros)

    def fits(members):
        padded, padding = padding_of([units[i] for i in members])
        return padded <= micro_tokens and padding <= limit

    def longest(i):
        return max(len(example.ids) for example in units[i])

    assert all(fits(micro) or len(micro) == 1 for micro in micros)
    for micro, following in zip(micros, micros[1:]):
        assert min(map(longest, micro)) >= max(map(longest, following))  # longest first
        first = max(following, key=lambda i: (longest(i), -i))
        assert not fits([*micro, first])
    assert max(map(len, micros)) == 1 if micro_tokens == 1 else max(map(len, micros)) > 1


def test_ragged_pairs_fill_larger_micro_batches():
    """Padding inside a pair, which no cut can avoid, does not end a micro-batch: twice the tokens, half as many."""
    rng = random.Random(0)
    pairs = [unit_of(*(rng.randint(100, 1000) for _ in range(2))) for _ in range(32)]
    assert [len(micro_batches(pairs, size, "cuda")) for size in (4096, 8192)] == [14, 8]


def test_micro_batches_depend_on_lengths_alone():
    """Scoring and training must cut alike, whatever the tokens and the state of the generators."""
    cuts = []
    for seed in (0, 1):
        random.seed(seed)
        torch.manual_seed(seed)
        units = [[Example(torch.randint(V, (len(e.ids),)), 1) for e in unit] for unit in random_units(7)]
        cuts += [micro_batches(units, 200, "cpu"), micro_batches(units, 200, "cpu")]
    assert all(cut == cuts[0] for cut in cuts)
    assert micro_batches([unit_of(9) for _ in range(6)], 20, "cpu") == [[0, 1], [2, 3], [4, 5]]  # ties keep their order


def test_shapes_and_mask():
    """(B, T), T the longest response; mask from lengths; 0 on padding; t = 0 the first token."""
    model = make_model()
    examples = [EXAMPLES[1], EXAMPLES[0], Example(torch.tensor([5, 6, 0, 0]), 2)]  # id 0, the padding's, may be a token too
    logp, mask = response_logps(model, examples)
    assert (logp.shape, logp.dtype) == ((3, 7), torch.float32)
    assert (mask.shape, mask.dtype) == ((3, 7), torch.bool)
    assert mask.tolist() == [[True] * n + [False] * (7 - n) for n in (1, 7, 2)]
    assert (logp[~mask] == 0).all() and (logp[mask] < 0).all()
    for row, example in zip(logp, examples):
        truth = own_logps(model, example)
        torch.testing.assert_close(row[: len(truth)], truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_invariance(family):
    """An example alone equals the same one beside longer ones, in any order: without a mask, recurrences too."""
    model = make_model(family)
    for examples in (EXAMPLES, EXAMPLES[::-1]):
        together, _ = response_logps(model, examples)
        for logp, example in zip(together, examples):
            alone, mask = response_logps(model, [example])
            assert mask.all()
            torch.testing.assert_close(logp[: alone.shape[1]], alone[0], atol=1e-5, rtol=0)


def test_responses_to_one_prompt_do_not_see_one_another():
    (first, other, third) = make_examples((5, 7), (2, 9), (2, 4))
    beside = [Example(torch.cat([first.ids[:5], e.ids]), 5) for e in (other, third)]
    assert_matches_own_logits(make_model(), [first, *beside])


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
    for value in (torch.nan, -torch.inf):
        model.model.norm.weight.data[0] = value
        with pytest.raises(BadInput, match="or they are not finite"):
            check_model(model, Words(), 32)


@pytest.mark.parametrize("max_length, size", [(3, 3), (40, 40), (1024, 1024), (1030, 1024)])
def test_check_model_looks_at_long_examples(max_length, size, monkeypatch):
    """As long as can occur, so that a window is full, but at most 1,024 tokens: its cost grows with the square. Both
    forwards read the same input."""
    model, seen = make_model(max_position_embeddings=2048), []
    for module in (model, model.base_model):
        forward = module.forward

        def told(input_ids=None, forward=forward, **options):
            seen.append(input_ids.tolist())
            return forward(input_ids, **options)

        monkeypatch.setattr(module, "forward", told)
    check_model(model, Words(), max_length)
    assert len(seen) == 3 and seen[0] == seen[1] == seen[2] and len(seen[0][0]) == size - 1  # two are the same forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_come_from_a_copy_with_weights_of_the_sampling_dtype(dtype, monkeypatch):
    """As on CUDA: bf16 weights, keys and values; the policy itself is as it was. Weights of that dtype are shared."""
    model, tokenizer, seen = make_model(tie_word_embeddings=True, vocab_size=400).train(), make_tokenizer(), []
    weights, kept = {name: w.clone() for name, w in model.named_parameters()}, model.generation_config
    generate = type(model).generate

    def generate_and_tell(self, **inputs):
        out = generate(self, **inputs, return_dict_in_generate=True)
        layer = out.past_key_values.layers[0]
        seen.append((layer.keys.dtype, layer.values.dtype, next(self.parameters()).dtype))
        assert self is not model and not self.training
        assert self.lm_head.weight is self.model.embed_tokens.weight
        assert (self.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()) == (dtype == torch.float32)
        return out.sequences

    monkeypatch.setattr(type(model), "generate", generate_and_tell)
    monkeypatch.setitem(common.SAMPLING_DTYPE, "cpu", dtype)
    examples, texts = common.sample_responses(model, tokenizer, [[5, 6, 7], [8]], 4, 1.0, 2)
    assert seen == [(dtype,) * 3] and [e.prompt_len for e in examples] == [3, 1] and len(texts) == 2
    assert model.training and model.generation_config is kept
    assert all(torch.equal(weights[name], w) and w.dtype == torch.float32 for name, w in model.named_parameters())


def greedy(model, prompt, most, stops):
    """By definition: a whole forward pass for each token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + most and (len(ids) == len(prompt) or ids[-1] not in stops):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_samples_of_every_family(family, monkeypatch):
    """Left padding, the cache, prompts that are read in parts, and rounds change nothing."""
    monkeypatch.setattr(common, "ROUND", 2)
    model, tokenizer = make_model(family, vocab_size=400), make_tokenizer()
    prompts = [[5, 6, 7, 8, 9, 10, 11], [8], [9, 30, 31, 32], [40] * 6]
    examples, _ = common.sample_responses(model, tokenizer, prompts, 5, 0.0, 2)
    stops = {tokenizer.eos_token_id, model.generation_config.eos_token_id}
    assert [e.ids.tolist() for e in examples] == [greedy(model, prompt, 5, stops) for prompt in prompts]


def test_what_has_not_ended_after_a_round_waits_at_the_end_of_the_queue(monkeypatch):
    """Rounds of 3 tokens, 3 responses at once, of a model that counts and ends at 20. One ends at once, one at the end of
    a round, one in its middle; three are cut at 7 tokens, one of them in a round in which others go on."""
    monkeypatch.setattr(common, "ROUND", 3)
    model, calls = make_model(vocab_size=400, hidden_size=400), []
    for layer in model.model.layers:  # they add nothing to the embeddings
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    model.model.norm.weight.data.fill_(1)
    model.model.embed_tokens.weight.data.copy_(torch.eye(400))
    model.lm_head.weight.data.copy_(torch.eye(400).roll(1, 0))  # after n comes n + 1
    model.generation_config.eos_token_id = 20
    generate = type(model).generate

    def generate_and_tell(self, input_ids, **more):
        calls.append((len(input_ids), self.generation_config.max_new_tokens))
        return generate(self, input_ids=input_ids, **more)

    monkeypatch.setattr(type(model), "generate", generate_and_tell)
    prompts, lengths = [[7, 19], [2], [4, 1, 14], [3, 4], [15], [5, 6, 7, 8]], [1, 7, 6, 7, 5, 7]
    examples, _ = common.sample_responses(model, make_tokenizer(), prompts, 7, 0.0, 3)
    assert [e.ids.tolist() for e in examples] == [
        [*prompt, *range(prompt[-1] + 1, prompt[-1] + 1 + n)] for prompt, n in zip(prompts, lengths)]  # fmt: skip
    assert calls == [(3, 3), (3, 3), (3, 3), (3, 3), (2, 1)]


def test_every_token_may_be_sampled():
    """Of 400 that are nearly alike: no top_k, no top_p."""
    model = make_model(vocab_size=400)
    model.lm_head.weight.data.mul_(1e-3)
    torch.manual_seed(0)
    examples, _ = common.sample_responses(model, make_tokenizer(), [[5]] * 2000, 1, 1.0, 2000)
    assert len({e.response[0] for e in examples}) > 390


@pytest.mark.parametrize("kind, size", [("pairs", 32), ("labels", 64), ("groups", 64)])
@pytest.mark.parametrize("micro_tokens", [4096, 640])
def test_padding_on_gsm8k_stays_under_8_percent(kind, size, micro_tokens):
    """Lengths of about four characters a token, in batches drawn at random. Padding inside a pair does not count."""
    path = SHARED / f"gsm8k_{kind}.jsonl"
    if not path.exists():
        pytest.skip(f"no {path.name}")
    columns = {"pairs": ("chosen", "rejected"), "labels": ("completion",)}
    units = []
    for row in map(json.loads, path.open()):
        texts = row["completions"] if kind == "groups" else [row[name] for name in columns[kind]]
        of_one = [Example(torch.empty((len(row["prompt"]) + len(text)) // 4 + 40), 1) for text in texts]
        units += [of_one] if kind == "pairs" else [[example] for example in of_one]
    rng, tokens, all_tokens = random.Random(0), 0, 0
    for _ in range(20):
        batch = rng.sample(units, size)
        for micro in micro_batches(batch, micro_tokens, "cpu"):
            padded, added = padding_of([batch[i] for i in micro])
            tokens, all_tokens = tokens + padded - added, all_tokens + padded
    assert 1 - tokens / all_tokens < 0.08


def test_products_in_float32_are_not_rounded_to_tf32(script, run):
    """Neither in check_model nor later: outside of autocast there are few."""
    torch.set_float32_matmul_precision("highest")
    run(script, "--steps", 1)
    assert torch.get_float32_matmul_precision() == "highest"
