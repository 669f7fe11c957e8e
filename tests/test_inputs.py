"""Every bad input is one line that says where, what, and how to mend it, before anything is written."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import humanline_dpo as dpo
import humanline_grpo as grpo
import humanline_kto as kto
from common import BadInput
from conftest import make_rows, metrics_of, write_jsonl


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


BAD_FLAGS = [
    ("--lr 0", "--lr 0.0: must be positive and finite"),
    ("--lr nan", "--lr nan"),
    ("--lr inf", "--lr inf"),
    ("--beta 0", "--beta 0.0"),
    ("--max_grad_norm -1", "--max_grad_norm -1.0"),
    ("--sync_every -1", "--sync_every -1: must be 0 or more"),
    ("--log_eps_P=0", "--log_eps_P 0.0: must be below 0"),
    ("--log_eps_P nan", "--log_eps_P nan"),
    ("--log_eps_R=-0.1", "--log_eps_R -0.1: must be above 0"),
    ("--gamma_P 0", "--gamma_P 0.0"),
    ("--batch_size 0", "--batch_size 0: must be at least"),
    ("--steps 0", "--steps 0"),
    ("--epochs 0", "--epochs 0"),
    ("--seed -1", "--seed -1: must be 0 or more"),
    ("--warmup -1", "--warmup -1"),
    ("--micro_tokens 0", "--micro_tokens 0"),
    ("--max_length 1", "--max_length 1: must be at least 2"),
    ("--max_length 100000", "the context is 256; lower it"),
    ("--batch_size 1000", "rows to train on fill no batch of 1000; lower --batch_size"),
    ("--eval_size 1000", "0 rows to train on fill no batch"),
    ("--data nowhere.jsonl", "nowhere.jsonl: no such"),
    ("--data ./nowhere", "./nowhere: no such"),
    ("--data nobody/nothing", "nobody/nothing: "),
    ("--model ./nowhere", "--model ./nowhere: must be an existing folder or a Hub id"),
    ("--model runs/dpo/final", "must be an existing folder"),
    ("--model nobody/nothing", "--model nobody/nothing: "),
    ("--max_length 3", "no row is left: the prompt leaves no room for a response; raise --max_length"),
]


@pytest.mark.parametrize("argv, words", BAD_FLAGS, ids=lambda x: x if x.startswith("--") else "")
def test_bad_flags(script, refused, argv, words):
    if script is grpo and argv == "--beta 0":
        pytest.skip("GRPO without a KL term is fine")
    refused(script, words, *argv.split())


BAD_LINES = [  # the second line of the file, and what is said about it
    (b"{", "bad.jsonl:2: not JSON"),
    (b"9" * 5000, "bad.jsonl:2: not JSON"),
    (b"[" * 100_000, "bad.jsonl:2: not JSON"),
    (b"[1, 2]", "bad.jsonl:2: no object but b'[1, 2]'"),
    (b'{"prompt": "\xff"}', "bad.jsonl:2: not UTF-8"),
]


@pytest.mark.parametrize("line, words", BAD_LINES, ids=["cut", "digits", "deep", "list", "bytes"])
def test_bad_lines(script, refused, data, tmp_path, line, words):
    first = data[script.__name__.removeprefix("humanline_")].read_bytes().split(b"\n")[0]
    (tmp_path / "bad.jsonl").write_bytes(first + b"\n" + line + b"\n")
    refused(script, words, "--data", tmp_path / "bad.jsonl")


@pytest.mark.parametrize("name, content", [("bad.jsonl", "\n"), ("bad.json", ""), ("bad.parquet", "")])
def test_an_empty_file(script, refused, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    refused(script, "empty; it needs a row", "--data", tmp_path / name)


USER, BOT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
BAD_ROWS = [  # changes to the 18th row of pairs (None: the column is gone), and what is said
    ({"chosen": ""}, "bad.jsonl:18: field 'chosen': empty; give it a text or drop the row"),
    ({"chosen": " "}, "field 'chosen': empty"),
    ({"chosen": 7}, "field 'chosen': neither text nor messages"),
    ({"rejected": []}, "field 'rejected': no message"),
    ({"rejected": ["b"]}, "a message that is no object"),
    ({"rejected": [{"role": "robot", "content": "b"}]}, "a message with a bad role"),
    ({"rejected": [{"role": "assistant"}]}, "a message whose content is no text"),
    ({"rejected": [{"role": "assistant", "content": " "}]}, "its last message is empty"),
    ({"rejected": [USER]}, "ends with no assistant message"),
    ({"prompt": ""}, "bad.jsonl:18: field 'prompt': empty"),
    ({"prompt": "\ud800"}, "field 'prompt': a lone surrogate"),
    ({"prompt": [USER, BOT]}, "field 'prompt': it ends with an assistant message"),
    ({"chosen": None, "chose": "a"}, "no field 'chosen' among prompt, rejected, chose; did you mean 'chose'?"),
    ({"prompt": None}, "field 'chosen': text without a field 'prompt'"),
    ({"chosen": [USER, BOT], "rejected": [BOT, USER, BOT]}, "differ before their last message"),
]


@pytest.mark.parametrize("change, words", BAD_ROWS, ids=lambda x: str(x)[:40])
def test_bad_pairs(refused, tmp_path, change, words):
    rows = make_rows("dpo", 48)
    rows[17] = {key: value for key, value in (rows[17] | change).items() if value is not None}
    refused(dpo, words, "--data", write_jsonl(tmp_path / "bad.jsonl", rows))


def test_a_null_is_named(refused, tmp_path):
    rows = make_rows("dpo", 48)
    rows[17]["chosen"] = None
    refused(dpo, "bad.jsonl:18: field 'chosen': null", "--data", write_jsonl(tmp_path / "bad.jsonl", rows))


BAD_LABELS = [
    ({"label": 0.9}, "bad.jsonl:18: field 'label': 0.9; it must be true, false, 1 or 0"),
    ({"label": -1}, "field 'label': -1; it must be"),
    ({"label": "yes"}, "field 'label': 'yes'; it must be"),
    ({"label": None, "lable": 1}, "no field 'label' among prompt, completion, lable; did you mean 'lable'?"),
    ({"completion": ""}, "field 'completion': empty"),
    ({"completion": None, "answer": "a"}, "no field 'completion'"),
]


@pytest.mark.parametrize("change, words", BAD_LABELS, ids=lambda x: str(x)[:40])
def test_bad_labels(refused, tmp_path, change, words):
    rows = make_rows("kto", 48)
    rows[17] = {key: value for key, value in (rows[17] | change).items() if value is not None}
    refused(kto, words, "--data", write_jsonl(tmp_path / "bad.jsonl", rows))


def test_a_null_label_is_named(refused, tmp_path):
    rows = make_rows("kto", 48)
    rows[17]["label"] = None
    refused(kto, "field 'label': None", "--data", write_jsonl(tmp_path / "bad.jsonl", rows))


def test_one_class_needs_to_be_allowed(run, refused, tmp_path, capsys):
    rows = [dict(row, label=1) for row in make_rows("kto", 48)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    refused(kto, "rows of one class only; add the other, or --allow_one_class", "--data", path)
    run(kto, "--data", path, "--allow_one_class")
    assert "44 desirable and 0 undesirable rows" in capsys.readouterr().out


def test_kto_needs_two_prompts_in_a_batch(refused, tmp_path):
    refused(kto, "--batch_size 1: must be at least 2", "--batch_size", 1)
    rows = [dict(row, prompt="abc" if i else "abd") for i, row in enumerate(make_rows("kto", 48))]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    refused(kto, "a batch holds responses to one prompt only", "--data", path, "--eval_size", 0, "--steps", 20)


BAD_GROUPS = [
    ({"rewards": [1.0]}, "bad.jsonl:18: fields 'completions', 'rewards': not two lists of one length"),
    ({"rewards": 1.0}, "not two lists of one length"),
    ({"completions": ["a"], "rewards": [1.0]}, "field 'completions': 1 completion; a group needs two"),
    ({"rewards": [1.0, float("nan")]}, "field 'rewards': nan; it must be a finite number"),
    ({"rewards": [1.0, float("inf")]}, "field 'rewards': inf"),
    ({"rewards": [1.0, "1"]}, "field 'rewards': '1'"),
    ({"rewards": [1.0, True]}, "field 'rewards': True"),
    ({"rewards": None, "reward": [1, 2]}, "no field 'rewards' among prompt, completions, reward; did you mean 'reward'?"),
    ({"completions": ["a", ""]}, "field 'completions': empty"),
    ({"completions": ["a"] * 9, "rewards": [1.0] * 9}, "9 responses, more than --batch_size 8; raise it"),
    ({"prompt": None}, "no field 'prompt' among completions, rewards"),
]


@pytest.mark.parametrize("change, words", BAD_GROUPS, ids=lambda x: str(x)[:40])
def test_bad_groups(refused, tmp_path, change, words):
    rows = make_rows("grpo", 48)
    rows[17] = {key: value for key, value in (rows[17] | change).items() if value is not None}
    refused(grpo, words, "--data", write_jsonl(tmp_path / "bad.jsonl", rows))


def test_a_lone_response_is_no_group(refused, tmp_path):
    rows = [{"prompt": f"a{i // 2}", "completion": f"b{i}", "reward": i} for i in range(47)]
    refused(grpo, "one response; a group needs two", "--data", write_jsonl(tmp_path / "bad.jsonl", rows))


def test_equal_responses_are_dropped_and_counted(run, refused, tmp_path, capsys):
    rows = make_rows("dpo", 48)
    rows[3]["chosen"] = rows[3]["rejected"]
    run(dpo, "--data", write_jsonl(tmp_path / "rows.jsonl", rows), "--steps", 1)
    assert "47 rows kept, 1 dropped (1: chosen and rejected are the same" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run")
    rows = [dict(row, chosen=row["rejected"]) for row in rows]
    refused(dpo, "no row is left: chosen and rejected are the same", "--data", write_jsonl(tmp_path / "b.jsonl", rows))


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
    return folder


@pytest.mark.parametrize("how, words", [
    ("nan", "weights missing or not finite: lm_head.weight"),
    ("missing tensor", "weights missing or not finite: model.layers.1"),
    ("no weights", "model.safetensors"),
    ("cut weights", "--model"),
    ("no config", "--model"),
    ("no tokenizer", "--model"),
    ("large tokenizer", "embeddings; use the model's own tokenizer"),
    ("no eos", "the tokenizer has no EOS token"),
])  # fmt: skip
def test_bad_models(script, refused, policy, tmp_path, how, words):
    refused(script, words, "--model", broken_model(policy, tmp_path / "model", how))


def test_messages_need_a_template_and_strings_do_not(script, run, refused, policy, data, tmp_path):
    model = broken_model(policy, tmp_path / "model", "no template")
    kind = script.__name__.removeprefix("humanline_")
    rows = [json.loads(line) for line in data[kind].open()]
    for row in rows:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    messages = write_jsonl(tmp_path / "messages.jsonl", rows)
    refused(script, "messages.jsonl:1: messages, but the tokenizer has no chat template", "--model", model,
            "--data", messages)  # fmt: skip
    run(script, "--model", model, "--steps", 1)


def test_output_folders(script, run, tmp_path):
    run(script, "--steps", 1)
    with pytest.raises(BadInput, match="not empty; add --resume or --overwrite"):
        run(script, "--steps", 1)
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(BadInput, match="is no folder to write in"):
            run(script, "--output_dir", path)


def test_no_pad_token_is_said_once(script, run, policy, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.pad_token = None
    shutil.copytree(policy, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run(script, "--model", tmp_path / "model", "--steps", 1)
    assert capsys.readouterr().out.count("no pad token") == 1


def test_a_family_that_cannot_be_rebuilt_is_named(script, refused, policy, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "get_output_embeddings", lambda self: None)
    refused(script, "--model: llama computes its logits in a way that common.py does not rebuild")


def test_max_rows_leaves_eval_data_whole(script, flags, policy, data, capsys):
    kind = script.__name__.removeprefix("humanline_")
    argv = flags(script, "--max_rows", 30, "--eval_data", data[kind], "--eval_size", 10)
    rows, eval_rows = script.load_data(AutoTokenizer.from_pretrained(policy), script.parse_args(argv))
    assert len({script.prompt_of(row) for row in eval_rows}) == 10
    out = capsys.readouterr().out
    assert "30 rows kept" in out and "48 rows kept" in out and "10 prompts are held out, with them" in out


# --- the formats that are accepted -------------------------------------------------------------------


def encoded(tokenizer, row):
    args = dpo.parse_args(["--model", "x", "--data", "x", "--max_length", "64"])
    (found,) = dpo.encode_row(tokenizer, row, "here:1", args)
    return [tokenizer.decode(e.ids) for e in found.examples]


def test_all_forms_of_a_pair_are_the_same_tokens(policy):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    user = [{"role": "user", "content": "abc"}]
    a, b = ([{"role": "assistant", "content": text}] for text in ("dd", "ee"))
    expected = ["<|user|>abc<|end|><|assistant|>dd<|end|>", "<|user|>abc<|end|><|assistant|>ee<|end|>"]
    forms = [
        {"prompt": "abc", "chosen": "dd", "rejected": "ee"},
        {"prompt": user, "chosen": a, "rejected": b},
        {"prompt": "abc", "chosen": user + a, "rejected": user + b},  # princeton-nlp/llama3-ultrafeedback-armorm
        {"chosen": user + a, "rejected": user + b, "score_chosen": 1.0},  # trl-lib/ultrafeedback_binarized
        {"prompt": "something else", "chosen": user + a, "rejected": user + b},  # the whole dialogue wins
    ]
    for form in forms:
        assert encoded(tokenizer, form) == expected


def test_dialogues_of_several_turns_share_all_but_the_last(policy):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    row = {"chosen": [*before, {"role": "assistant", "content": "d"}],
           "rejected": [*before, {"role": "assistant", "content": "e"}]}  # fmt: skip
    head = "<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"
    assert encoded(tokenizer, row) == [head + "d<|end|>", head + "e<|end|>"]


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_json_and_parquet(script, run, data, tmp_path, form):
    import datasets

    kind = script.__name__.removeprefix("humanline_")
    rows = datasets.Dataset.from_list([json.loads(line) for line in data[kind].open()])
    path = tmp_path / f"rows.{form}"
    rows.to_json(path, lines=False) if form == "json" else rows.to_parquet(path)
    lines = []
    for source in (path, data[kind]):
        run(script, "--data", source, "--steps", 2, "--output_dir", tmp_path / f"{len(lines)}")
        lines.append([line["loss"] for line in metrics_of(tmp_path / f"{len(lines)}")[1:]])
    assert lines[0] == lines[1]


@pytest.mark.parametrize("source, expected", [
    ("a/b", dict(path="a/b", name=None, split="train")),
    ("a/b:main", dict(path="a/b", name="main", split="train")),
    ("a/b:main:test", dict(path="a/b", name="main", split="test")),
    ("a/b::train_prefs", dict(path="a/b", name=None, split="train_prefs")),
])  # fmt: skip
def test_hub_names(script, monkeypatch, source, expected):
    seen = []
    monkeypatch.setattr(script.datasets, "load_dataset", lambda **options: seen.append(options) or [{"x": 1}])
    assert script.read_rows(source) == [(f"{source}[0]", {"x": 1})] and seen == [expected]


def test_raw_strings_are_left_alone(policy):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    args = dpo.parse_args(["--model", "x", "--data", "x", "--raw"])
    (row,) = dpo.encode_row(tokenizer, {"prompt": "ab", "chosen": "c", "rejected": "d"}, "here:1", args)
    assert [tokenizer.decode(e.ids) for e in row.examples] == ["abc<|end|>", "abd<|end|>"]
