"""Every bad input is one line that says where, what, and how to mend it, before anything is written."""

import json
import re
import runpy
import shlex
import shutil
import sys

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import humanline_dpo as dpo
import humanline_grpo as grpo
import humanline_kto as kto
from common import BadInput, encode
from conftest import make_rows, metrics_of, write_jsonl


def kind_of(script):
    return script.__name__.removeprefix("humanline_")


@pytest.fixture
def refused(run, tmp_path):
    """refused(script, words, flags...): the run ends in one line with these words, and leaves no folder."""

    def check(script, words, *more):
        with pytest.raises(BadInput) as error:
            run(script, *more)
        message = str(error.value)
        assert "\n" not in message and words in message, message
        assert not (tmp_path / "run").exists()

    return check


# --- flags -----------------------------------------------------------------------------------------

ANY = """
    --lr 0 | --lr nan | --lr 1 | --lr 1e400 | --lr x | --beta nan | --beta=-0.1 | --max_grad_norm 0
    --sync_every=-1 | --sync_every 1.5 | --log_eps_P 0 | --log_eps_P nan | --log_eps_P=-inf
    --log_eps_R 0 | --log_eps_R inf | --humanline clamp | --lora_rank=-1 | --chat_template_kwargs x
    --batch_size 0 | --steps 0 | --epochs 0 | --seed=-1 | --warmup=-1 | --micro_tokens 0
    --max_length 1 | --max_rows 0 | --eval_size=-1 | --save_every=-1 | --eval_every=-1
    --sample_every=-1 | --group_size 1 | --temperature 0 | --max_new_tokens 0 | --gen_batch 0
"""
BAD_FLAGS = [(script, argv) for script in (dpo, kto, grpo) for argv in re.split(r"\s*[|\n]\s*", ANY.strip())]
BAD_FLAGS += [(dpo, "--beta 0"), (kto, "--beta 0"), (kto, "--batch_size 1"), (kto, "--desirable_weight 0"),
              (kto, "--undesirable_weight inf"), (grpo, "--epsilon 0")]  # fmt: skip


@pytest.mark.parametrize("script, argv", BAD_FLAGS, ids=lambda x: x if type(x) is str else kind_of(x))
def test_bad_flags(script, flags, capsys, argv):
    with pytest.raises(SystemExit) as error:
        script.parse_args(flags(script, *argv.split()))
    flag, value = re.split("[ =]", argv)
    last = capsys.readouterr().err.splitlines()[-1]
    assert error.value.code == 2 and f"error: argument {flag}: " in last, last
    assert re.search(f"{value} is not between .* and |invalid .*'{value}'", last), last


def test_what_a_flag_may_be(flags):
    assert grpo.parse_args(flags(grpo, "--beta", 0)).beta == 0
    assert dpo.parse_args(flags(dpo, "--batch_size", 1, "--sync_every", 0, "--log_eps_P", -1.5)).sync_every == 0


@pytest.mark.parametrize("argv, words", [
    ("--max_length 100000", "the context is 256; lower it"),
    ("--max_length 3", "0 rows fill no batch"),  # the prompt leaves no room for a response
    ("--batch_size 1000", "rows fill no batch; lower --batch_size"),
    ("--eval_size 1000", "0 rows fill no batch; lower --batch_size or --eval_size"),
    ("--data nowhere.jsonl", "nowhere.jsonl: [Errno 2] No such file"),
    ("--data ./nowhere", "./nowhere: Couldn't reach"),
    ("--data requirements.txt", "requirements.txt: it ends with none of .jsonl, .json (a row a line) and .parquet"),
    ("--data nobody/nothing:main:test", "nobody/nothing:main:test: Couldn't reach"),
    ("--eval_data nowhere.jsonl", "nowhere.jsonl: [Errno 2] No such file"),
    ("--model ./nowhere", "--model ./nowhere: there is no such folder"),
    ("--model tests/nowhere", "--model tests/nowhere: there is no such folder"),
    ("--model tests/experiments/nowhere", "--model tests/experiments/nowhere: there is no such folder"),
    ("--model nowhere/dpo/final", "--model nowhere/dpo/final: there is no such folder"),
    ("--model runs/dpo/final", "--model runs/dpo/final: "),
    ("--model nobody/nothing", "--model nobody/nothing: "),
    ("--reward nowhere.py:f", "--reward takes FILE.py:FUNCTION of a file that is there, not nowhere.py:f"),
    ("--sample_every 1", "--reward takes FILE.py:FUNCTION of a file that is there, not None"),
    ("--resume", "checkpoint.pt: "),
])  # fmt: skip
def test_what_is_not_there_or_does_not_fit(script, refused, argv, words):
    refused(script, words, *argv.split())


# --- files and rows --------------------------------------------------------------------------------

BAD_LINES = {  # after 48 good ones
    "cut": (b'{"prompt": "a', "line 49 is no JSON object: Invalid control character at: line 1 column 14"),
    "number": (b"9" * 5000, "line 49 is no JSON object: "),
    "deep": (b"[" * 10**5, "line 49 is no JSON object: "),
    "list": (b"[1, 2]", "line 49 is no JSON object: "),
    "a list that could be a row": (b'[{"prompt": "a", "chosen": "b"}]', "line 49 is no JSON object: "),
    "null": (b"null", "line 49 is no JSON object: "),
    "text": (b'"abc"', "line 49 is no JSON object: "),
    "blank": (b"", "line 49 is no JSON object: "),
    "bytes": (b'{"prompt": "\xff"}', "line 49 is no JSON object: 'utf-8' codec can't decode byte 0xff"),
    "surrogate": (rb'{"prompt": "\ud800", "chosen": "a", "rejected": "b"}',
                  "row 49 (columns prompt, chosen, rejected): a text has half a character"),
    "call": (rb'{"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "tool_calls": [{}]}]}',
             "row 49 (columns prompt, chosen, rejected): KeyError: 'name'"),
}


@pytest.mark.parametrize("name", ["bad.jsonl", "bad.json"])
@pytest.mark.parametrize("line", BAD_LINES)
def test_a_broken_line_is_named_by_its_number(refused, data, tmp_path, name, line):
    text, words = BAD_LINES[line]
    (tmp_path / name).write_bytes(data["dpo"].read_bytes() + text + b"\n")
    refused(dpo, f"{name}: {words}", "--data", tmp_path / name)


def test_the_first_line_may_be_the_broken_one(script, refused, data, tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b"null\n" + data[kind_of(script)].read_bytes())
    refused(script, "bad.jsonl: line 1 is no JSON object: ", "--data", tmp_path / "bad.jsonl")


@pytest.mark.parametrize("name, content, words", [
    ("bad.jsonl", "\n", "bad.jsonl: line 1 is no JSON object"), ("bad.json", "[]", "bad.json: line 1 is no JSON object"),
    ("bad.parquet", "", "bad.parquet: "), ("bad.jsonl", "", "0 rows fill no batch"),
])  # fmt: skip
def test_an_empty_file(script, refused, tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    refused(script, words, "--data", tmp_path / name)


def test_text_stays_text(script, run, tmp_path):
    """A date is no datetime: not as a response, and not where a reward reads it."""
    (tmp_path / "dates.py").write_text(
        "from rewards import math_reward\nasked = []\ndef right(answer, unread, **columns):\n"
        "    assert set(answer) <= {'2024-05-01', '2024-05-02'}, answer\n    asked.extend(unread)\n"
        "    says = [day if i % 2 else '2018' for i, day in enumerate(answer)]  # not 2024 - 5 - 1\n"
        "    paid = math_reward(says, says, answer)\n"
        "    assert paid == [i % 2 for i in range(len(answer))], paid\n    return paid\n")  # fmt: skip
    rows = [row | {"answer": f"2024-05-0{i % 2 + 1}", "unread": None} for i, row in enumerate(make_rows("dpo", 12))]
    rows[-1]["unread"] = 1.5  # after nulls
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    run(script, "--data", path, "--sample_every", 1, "--reward", tmp_path / "dates.py:right", "--group_size", 2,
        "--max_new_tokens", 4, "--steps", 3, "--eval_size", 0)  # fmt: skip
    assert set(sys.modules["dates"].asked) == {None, 1.5}
    del sys.modules["dates"]


@pytest.mark.parametrize("flags", [(), ("--max_rows", 12)])
def test_a_response_may_be_a_date_and_an_unread_column_null(policy, tmp_path, flags):
    rows = make_rows("dpo", 12)
    rows = [row | {"chosen": f"2024-05-{i:02}", "unread": None if i < 12 else 1.5} for i, row in enumerate(rows, 1)]
    args = dpo.parse_args(["--model", "x", "--max_length", "64", *map(str, flags)])
    path, tokenizer = write_jsonl(tmp_path / "rows.jsonl", rows), AutoTokenizer.from_pretrained(policy)
    found, _, _ = dpo.load_rows(str(path), args.max_rows, tokenizer, print, args)  # with a reward rows keep their source
    for row, encoded in zip(rows, found, strict=True):
        assert encoded.examples[0].response == tokenizer(row["chosen"] + "<|end|>", add_special_tokens=False)["input_ids"]
    assert [row.source for row in found] == rows


USER, BOT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
HH = "\n\nHuman: Name a fruit.\n\nAssistant: An apple."  # of HH-RLHF
BAD_ROWS = [  # changes to the 18th row, and what is said
    (dpo, {"chosen": ""}, "chosen is empty; give it a text or drop the row"),
    (dpo, {"chosen": " "}, "chosen is empty"),
    (dpo, {"chosen": None}, "chosen is no text, nor messages with a role and a text: None"),
    (dpo, {"chosen": 7}, "chosen is no"),
    (dpo, {"rejected": []}, "rejected is empty"),
    (dpo, {"rejected": ["b"]}, "rejected is no"),
    (dpo, {"rejected": [{"role": None, "content": "b"}]}, "rejected is no"),
    (dpo, {"rejected": [{"role": "robot", "content": "b"}]}, "the prompt and rejected begin differently"),
    (dpo, {"rejected": [{"role": "assistant"}]}, "rejected is no"),
    (dpo, {"rejected": [{"role": "assistant", "content": " "}]}, "rejected is empty"),
    (dpo, {"rejected": [USER]}, "the prompt and rejected begin differently"),
    (dpo, {"rejected": [BOT, USER]}, "rejected ends with a message of role user"),
    (dpo, {"prompt": " "}, "the prompt is empty"),
    (dpo, {"prompt": None}, "there is no prompt; give a column prompt, or whole dialogues"),
    (dpo, {"prompt": 7}, "the prompt is no text"),
    (dpo, {"prompt": []}, "there is no prompt"),
    (dpo, {"chosen": [BOT, USER, BOT]}, "chosen and rejected have different prompts"),
    (dpo, {"prompt": None, "chosen": HH, "rejected": HH}, "there is no prompt; give a column prompt, or whole dialogues"),
    (kto, {"prompt": None, "completion": HH}, "there is no prompt; give a column prompt, or whole dialogues"),
    (kto, {"label": 0.9}, "label is 0.9; write true or false"),
    (kto, {"label": -1}, "label is -1"),
    (kto, {"label": 2}, "label is 2"),
    (kto, {"label": "yes"}, "label is 'yes'"),
    (kto, {"label": None}, "label is None"),
    (kto, {"completion": ""}, "completion is empty"),
    (grpo, {"rewards": [1.0]}, "completions and rewards are not two lists of one length"),
    (grpo, {"rewards": 1.0}, "completions and rewards are not two lists of one length"),
    (grpo, {"rewards": [1.0, float("nan")]}, "rewards must be finite numbers, not [1.0, nan]"),
    (grpo, {"rewards": [1.0, float("inf")]}, "rewards must be finite numbers"),
    (grpo, {"rewards": [1.0, None]}, "rewards must be finite numbers"),
    (grpo, {"rewards": [1.0, True]}, "rewards must be finite numbers"),
    (grpo, {"rewards": [1.0, "x"]}, "rewards must be finite numbers"),
    (grpo, {"completions": ["a", ""]}, "completions is empty"),
    (grpo, {"completions": ["a", None]}, "completions is no text"),
    (grpo, {"completions": [], "rewards": []}, "completions and rewards are not two lists of one length"),
]


@pytest.mark.parametrize("script, change, words", BAD_ROWS, ids=lambda x: str(x)[:40] if type(x) is dict else "")
def test_bad_rows(script, refused, tmp_path, change, words):
    rows = make_rows(kind_of(script), 48)
    columns = ", ".join(rows[0])
    rows[17] |= change
    path = write_jsonl(tmp_path / "bad.jsonl", rows)
    refused(script, f"bad.jsonl: row 18 (columns {columns}): {words}", "--data", path)


@pytest.mark.parametrize("script, name, words", [
    (dpo, "chosen", "row 1 (columns prompt, new, rejected): chosen is no text"),
    (dpo, "prompt", "row 1 (columns new, chosen, rejected): there is no prompt"),
    (kto, "completion", "row 1 (columns prompt, new, label): completion is no text"),
    (kto, "label", "row 1 (columns prompt, completion, new): label is None"),
    (grpo, "completions", "row 1 (columns prompt, new, rewards): "),
    (grpo, "rewards", "row 1 (columns prompt, completions, new): completions and rewards are not"),
])  # fmt: skip
def test_a_misspelt_column(script, refused, tmp_path, name, words):
    rows = [{"new" if key == name else key: value for key, value in row.items()}
            for row in make_rows(kind_of(script), 48)]  # fmt: skip
    refused(script, words, "--data", write_jsonl(tmp_path / "rows.jsonl", rows))


@pytest.mark.parametrize("row, words", [
    ({"prompt": "a\ud800"}, ""), ({"prompt": None}, "there is no prompt"), ({"prompt": 7}, "the prompt is no text"),
    ({"prompt": []}, "there is no prompt"), ({"prompt": {"a": 1}}, "the prompt is no text"), ({}, "there is no prompt"),
])  # fmt: skip
def test_bad_prompts_for_rollouts(script, refused, tmp_path, row, words):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a"}, row | {"n": 1}])
    (tmp_path / "zero.py").write_text("def f(completions, **columns):\n    return [0.0] * len(completions)\n")
    refused(script, f"rows.jsonl: row 2 (columns {', '.join([*row, 'n'])}): {words}", "--data", path,
            "--sample_every", 1, "--reward", tmp_path / "zero.py:f", "--max_new_tokens", 8)  # fmt: skip


def test_kto_needs_both_classes(refused, tmp_path):
    rows = [dict(row, label=1) for row in make_rows("kto", 48)]
    refused(kto, "all rows have one label", "--data", write_jsonl(tmp_path / "rows.jsonl", rows))


@pytest.mark.parametrize("rows, words", [
    (make_rows("grpo", 47) + [{"prompt": "a", "completions": [], "rewards": []}], "row 48 (columns prompt, completions"),
    (make_rows("grpo", 47) + [{"prompt": "a", "completions": ["b"] * 9, "rewards": [1.0] * 9}],
     "a group of 9 is larger than --batch_size: '<|user|>a<|end|><|assistant|>'"),
    ([{"prompt": f"a{i}", "completion": f"b{i}", "reward": i} for i in range(47)], "0 responses in groups fill no batch"),
], ids=["none", "nine", "alone"])  # fmt: skip
def test_groups_have_two_responses_and_fit_a_batch(refused, tmp_path, rows, words):
    path = write_jsonl(tmp_path / "bad.jsonl", rows)
    refused(grpo, words, "--data", path, "--eval_size", 0, "--batch_size", 8)


def test_equal_responses_are_dropped_and_counted(run, refused, tmp_path, capsys):
    """Also those that are equal as far as --max_length goes."""
    rows = make_rows("dpo", 48)
    rows[3]["chosen"] = rows[3]["rejected"]
    rows[4] |= {"chosen": "a" * 70 + "b", "rejected": "a" * 70 + "c"}
    run(dpo, "--data", write_jsonl(tmp_path / "rows.jsonl", rows), "--steps", 1)
    assert "rows.jsonl: 46 rows, 0 responses cut; dropped: 0 too long, 2 of no use" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run")
    rows = [dict(row, chosen=row["rejected"]) for row in rows]
    refused(dpo, "0 rows fill no batch", "--data", write_jsonl(tmp_path / "b.jsonl", rows))


def test_rows_without_room_are_dropped_and_counted(script, run, tmp_path, capsys):
    rows = make_rows(kind_of(script), 48)
    for row in rows[:5]:
        row["prompt"] = "a" * 64
    run(script, "--data", write_jsonl(tmp_path / "rows.jsonl", rows), "--steps", 1)
    assert f"{86 if script is grpo else 43} rows, 0 responses cut; dropped: 5 too long, 0 of no use" in capsys.readouterr().out


# --- models and folders ----------------------------------------------------------------------------


def broken_model(policy, folder, how):
    """A copy of the policy with one thing wrong."""
    shutil.copytree(policy, folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    if how == "nan":
        with torch.no_grad():
            model.lm_head.weight[0, 0] = float("nan")
        model.save_pretrained(folder)
    elif how == "missing tensor":
        weights = {name: w for name, w in model.state_dict().items() if "layers.1" not in name}
        model.save_pretrained(folder, state_dict=weights)
    elif how == "no weights":
        (folder / "model.safetensors").unlink()
    elif how == "cut weights":
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    elif how == "large tokenizer":
        tokenizer.add_tokens([f"new{i}" for i in range(9)])
        tokenizer.save_pretrained(folder)
    elif how == "no eos":
        tokenizer.eos_token = None
        tokenizer.save_pretrained(folder)
    elif how == "no template":
        (folder / "chat_template.jinja").unlink()
    elif how == "adapters":
        (folder / "adapter_config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("how, words", [
    ("nan", "does not rebuild the logits of llama, or they are not finite"),
    ("missing tensor", "weights are missing: model.layers.1"),
    ("no weights", "model.safetensors"),
    ("cut weights", "--model"),
    ("no config", "--model"),
    ("no tokenizer", "--model"),
    ("large tokenizer", "tokens in the tokenizer, but"),
    ("no eos", "the tokenizer has no EOS token"),
    ("adapters", "these are LoRA adapters; merge them into their base with peft: PeftModel.from_pretrained(base, folder)"),
])  # fmt: skip
def test_bad_models(script, refused, policy, tmp_path, how, words):
    refused(script, words, "--model", broken_model(policy, tmp_path / "model", how))


def test_messages_need_a_template_and_strings_do_not(script, run, refused, policy, data, tmp_path):
    model = broken_model(policy, tmp_path / "model", "no template")
    rows = [json.loads(line) for line in data[kind_of(script)].open()]
    for row in rows:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    messages = write_jsonl(tmp_path / "messages.jsonl", rows)
    for more in (["--data", messages], ["--system_prompt", "a"]):
        for where in (["--model", model], ["--raw"]):
            refused(script, "row 1 (columns prompt, ", *where, *more)
            refused(script, "messages need a chat template, and there is none (--raw: it is not used)", *where, *more)
    run(script, "--model", model, "--steps", 1)


def test_no_pad_token_is_needed(script, run, policy, tmp_path):
    """Prompts that samples are drawn from are padded, with EOS then."""
    shutil.copytree(policy, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "counting.py").write_text("def f(completions, **columns):\n    return range(len(completions))\n")
    sampling = ["--sample_every", 1, "--reward", tmp_path / "counting.py:f", "--max_new_tokens", 8, "--group_size", 2]
    assert len(run(script, "--model", tmp_path / "model", "--steps", 1, *sampling)) == 2


def test_a_family_that_cannot_be_rebuilt_is_named(script, refused, policy, monkeypatch):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def altered(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits *= 2
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", altered)
    refused(script, f"--model {policy}: common.py does not rebuild the logits of llama")


def test_an_output_folder_that_exists_needs_a_word(script, run, tmp_path):
    (tmp_path / "run").mkdir()  # an empty one does not
    run(script, "--steps", 1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(BadInput, match="run is no empty folder; add --resume or --overwrite"):
        run(script, "--steps", 1)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    assert len(run(script, "--steps", 2, "--overwrite")) == 3  # and nothing of the first run


@pytest.mark.parametrize("name", ["file", "file/below"])
@pytest.mark.parametrize("more", [(), ("--overwrite",), ("--resume",)])
def test_an_output_folder_that_cannot_be(script, run, tmp_path, name, more):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="^--output_dir .*file|--resume: .*file/below/checkpoint.pt: ") as error:
        run(script, "--output_dir", tmp_path / name, *more)
    assert "\n" not in str(error.value) and (tmp_path / "file").read_bytes() == b""


# --- what is accepted ------------------------------------------------------------------------------


def test_max_rows_leaves_eval_data_whole(script, run, data, capsys):
    """And no held-out prompt is trained on."""
    run(script, "--max_rows", 30, "--eval_data", data[kind_of(script)], "--eval_size", 10, "--steps", 1)
    out, rows = capsys.readouterr().out, 2 if script is grpo else 1
    assert all(f"{count * rows} rows, 0 responses cut; dropped: 0 too long, 0 of" in out for count in (48, 30))
    kept = int(re.search(r"(\d+) rows to train on, 10 prompts held out", out).group(1))
    assert 20 * rows <= kept < 30 * rows


def encoded(script, tokenizer, row, *flags):
    """The row's examples as text, with what else the script keeps of each."""
    args = script.parse_args(["--model", "x", "--max_length", "64", *flags])
    kept = [name for name in ("desirable", "reward") if name in script.Row._fields]
    return [(*[tokenizer.decode(e.ids) for e in found.examples], *[getattr(found, name) for name in kept])
            for found in script.encode_row(tokenizer, None, args, row)]  # fmt: skip


def test_all_forms_of_a_pair_are_the_same_tokens(policy):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    user = [{"role": "user", "content": "abc"}]
    a, b = ([{"role": "assistant", "content": text}] for text in ("dd", "ee"))
    first, second = ("<|user|>abc<|end|><|assistant|>dd<|end|>", "<|user|>abc<|end|><|assistant|>ee<|end|>")
    forms = [
        {"prompt": "abc", "chosen": "dd", "rejected": "ee"},
        {"prompt": user, "chosen": a, "rejected": b},
        {"prompt": "abc", "chosen": a, "rejected": b},
        {"prompt": "abc", "chosen": user + a, "rejected": user + b},  # princeton-nlp/llama3-ultrafeedback-armorm
        {"chosen": user + a, "rejected": user + b, "score_chosen": 1.0},  # trl-lib/ultrafeedback_binarized
    ]
    for form in forms:
        assert encoded(dpo, tokenizer, form) == [(first, second)]
        assert encoded(kto, tokenizer, form) == [(first, True), (second, False)]
    for prompt, completion, label in (("abc", "dd", True), (user, a, 1), ("abc", user + a, True)):
        row = {"prompt": prompt, "completion": completion, "label": label}
        assert encoded(kto, tokenizer, row) == [(first, True)]


def test_all_forms_of_a_group_are_the_same_tokens(policy):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    user = [{"role": "user", "content": "abc"}]
    a, b = ([{"role": "assistant", "content": text}] for text in ("dd", "ee"))
    head, texts = "<|user|>abc<|end|><|assistant|>", ["dd", "ee"]
    expected = [(head + "dd<|end|>", 1.0), (head + "ee<|end|>", 2.0)]
    forms = [
        {"prompt": "abc", "completions": texts, "rewards": [1, 2]},
        {"prompt": user, "completions": [a, b], "rewards": [1.0, 2.0]},
        {"prompt": "abc", "all_generated_responses": texts, "all_rm_scores": [1.0, 2.0],
         "chosen": user + b, "rejected": user + a},  # princeton-nlp/llama3-ultrafeedback-armorm
    ]  # fmt: skip
    for form in forms:
        assert encoded(grpo, tokenizer, form) == expected
    rows = [{"prompt": "abc", "completion": text, "reward": x} for text, x in zip(texts, (1, 2))]
    assert [*encoded(grpo, tokenizer, rows[0]), *encoded(grpo, tokenizer, rows[1])] == expected


def test_dialogues_of_several_turns_share_all_but_the_last(policy):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    row = {"chosen": [*before, {"role": "assistant", "content": "d"}],
           "rejected": [*before, {"role": "assistant", "content": "e"}]}  # fmt: skip
    head = "<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"
    assert encoded(dpo, tokenizer, row) == [(head + "d<|end|>", head + "e<|end|>")]


def test_raw_strings_are_left_alone_and_system_prompts_stand_first(policy):
    tokenizer, row = AutoTokenizer.from_pretrained(policy), {"prompt": "ab", "chosen": "c", "rejected": "d"}
    head = "<|system|>la<|end|><|user|>ab<|end|><|assistant|>"
    assert encoded(dpo, tokenizer, row, "--system_prompt", "la") == [(head + "c<|end|>", head + "d<|end|>")]
    tokenizer.chat_template = None  # as --raw does
    assert encoded(dpo, tokenizer, row) == [("abc<|end|>", "abd<|end|>")]


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_json_and_parquet(script, run, data, tmp_path, form):
    rows = datasets.Dataset.from_list([json.loads(line) for line in data[kind_of(script)].open()])
    path = tmp_path / f"rows.{form}"
    rows.to_json(path) if form == "json" else rows.to_parquet(path)
    losses = []
    for source in (path, data[kind_of(script)]):
        run(script, "--data", source, "--steps", 2, "--output_dir", tmp_path / f"{len(losses)}")
        losses.append([line["loss"] for line in metrics_of(tmp_path / f"{len(losses)}")[1:]])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("source, name, split", [
    ("a/b", None, "train"),
    ("a/b:main", "main", "train"),
    ("a/b:main:test", "main", "test"),
    ("a/b::train_prefs", None, "train_prefs"),
    ("a/b:main:train[:5%]", "main", "train[:5%]"),
    ("a/b::train[10:20]+test[:5%]", None, "train[10:20]+test[:5%]"),
])  # fmt: skip
def test_hub_names(script, monkeypatch, source, name, split):
    seen = []

    def load_dataset(*names, **options):
        seen.append((names, options))
        return datasets.Dataset.from_list([{"x": 1}, {"x": 2}])

    monkeypatch.setattr(script, "load_dataset", load_dataset)
    assert [*script.read_file(source)] == [(1, {"x": 1}), (2, {"x": 2})]
    assert seen == [(("a/b", name), {"split": split})]


def test_help_says_what_needs_rollouts(script, capsys):
    """--group_size does nothing without --sample_every, and --reward something else."""
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    rollouts = text.partition("rollouts")[2].partition("training:")[0]
    assert rollouts.startswith(": none without --sample_every")
    assert "--data: prompts" in rollouts.partition("--sample_every SAMPLE_EVERY")[2].partition("--reward")[0]
    assert "without --sample_every it scores the evaluation only" in rollouts.partition("--reward REWARD")[2]


def test_the_command_that_ctrl_c_prints_is_quoted(script, monkeypatch):
    import argparse

    def stop(*_):
        raise KeyboardInterrupt

    argv = [script.__file__, "--model", "a b", "--system_prompt", "it's $HOME"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script.__file__, run_name="__main__")
    command = end.value.code.partition("go on from any checkpoint: ")[2]
    assert shlex.split(command) == ["python", *argv, "--resume"]
