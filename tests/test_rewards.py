"""The two rewards of humanline_grpo.py: answers by hand, and a tiny classifier."""

import importlib.util
import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

import alpaca_eval
import common
import humanline_grpo as grpo
from conftest import ROOT, SHARED, write_jsonl

needs_math_verify = pytest.mark.skipif(not importlib.util.find_spec("math_verify"), reason="no math-verify")

HARD = [  # (completion, the row's answer, right), boxed too
    ("2", "2\\pi", False),
    ("2x", "2y", False),
    ("6 or 7", "6", False),
    ("12", "1,2", False),
    ("1\\frac{1}{2}", "3/2", True),
    ("\\frac12", "1/2", True),
    ("\\frac12", "0.5", True),
    ("120^\\circ", "120", True),
    ("x=5", "5", True),
    ("9" * 5000, "5", False),
    ("5", "9" * 5000, False),
]
ANSWERS = [
    ("A: 18", "reasoning\n#### 18", True),
    ("so 18 dollars", "#### 18", True),
    ("so $18.", "#### 18", True),
    ("18.0", "18", True),
    ("18", "so we get \\boxed{18}", True),
    ("18", "so we get \\boxed{19}", False),
    ("18", 18, True),
    ("It is 17 and not 18, no: 19", "18", False),
    ("$1,000", "1000", True),
    ("1000", "#### 1,000", True),
    ("3/4", "0.75", True),
    ("\\frac{3}{4}", "3/4", True),
    ("\\boxed{\\frac{3}{4}}", "0.75", True),
    ("\\boxed{\\dfrac{3}{4}}", "\\frac{3}{4}", True),
    ("3/4", "4/3", False),
    ("50%", "50\\%", True),
    ("50%", "50", True),
    ("50%", "0.5", True),
    ("0.5", "50%", True),
    ("5%", "50%", False),
    ("-7", "-7", True),
    ("7", "-7", False),
    ("\\boxed{-7}", "#### -7", True),
    ("\\boxed{-\\frac{1}{2}}", "-0.5", True),
    ("\\boxed{12 \\text{ cm}}", "12", True),
    ("\\boxed{12\\text{ cm}}", "12 inches", True),
    ("7 apples", "7", True),
    ("\\boxed{1} then \\boxed{2}", "2", True),
    ("\\boxed{1} then \\boxed{2}", "1", False),
    ("\\boxed{2} of the 5", "2", True),
    ("\\boxed{\\sqrt{\\frac{x}{2}}}", "\\sqrt{\\frac{x}{2}}", True),
    ("\\boxed{ \\left( 3, \\frac{\\pi}{2} \\right) }", "(3,\\frac{\\pi}{2})", True),
    ("\\boxed{x^{2}+1}", "x^{2} + 1", True),
    ("\\boxed{x^{2}+1}", "x^{2} - 1", False),
    ("\\boxed{\\text{Evelyn}}", "evelyn", True),
    ("#### 5\nand 7 more words", "5", True),
    ("no number at all", "5", False),
    ("", "5", False),
    ("\\boxed{", "5", False),
    ("\\boxed{}", "5", False),
    (".5", "1/2", True),
    ("1/0", "0", False),
    ("12,345,678", "12345678", True),
    ("1e999", "5", False),
    *HARD,
    *((f"so \\boxed{{{completion}}}", gold, right) for completion, gold, right in HARD),
]


@needs_math_verify
@pytest.mark.parametrize("completion, gold, right", ANSWERS, ids=lambda x: str(x)[:30])
def test_math_reward(completion, gold, right):
    message = [{"role": "assistant", "content": completion}]
    assert grpo.math_reward(["q"] * 2, [completion, message], answer=[gold] * 2) == [float(right)] * 2
    assert grpo.math_reward.usable({"answer": gold})


@needs_math_verify
@pytest.mark.parametrize("gold", [None, "", "  ", "####", "\\boxed{}"])
def test_a_gold_answer_that_cannot_be_read_is_no_reward(gold):
    assert not grpo.math_reward.usable({"answer": gold}) and not grpo.math_reward.usable({})
    assert grpo.math_reward(["q"] * 3, ["5", "", "None"], answer=[gold] * 3) == [0.0] * 3


@needs_math_verify
def test_a_gold_answer_may_be_the_number_0():
    assert grpo.math_reward.usable({"answer": 0}) and grpo.math_reward(["q"], ["0"], answer=[0]) == [1.0]


@needs_math_verify
def test_an_online_run_on_gsm8k(run, spy, policy, tmp_path, capsys):
    """Real questions and the real reward, named as a user names it. A response is one character of a random
    model, so half of the answers are one digit."""
    if not (SHARED / "gsm8k_train.jsonl").exists():
        pytest.skip("no gsm8k_train.jsonl")
    rows = [json.loads(line) for line in open(SHARED / "gsm8k_train.jsonl")]
    rows = [row for row in rows if len(row["question"]) < 200][:30]
    rows = [row | {"answer": row["answer"] if i % 2 else f"so\n#### {i % 10}"} for i, row in enumerate(rows)]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, {"question": "what", "answer": "####"}])
    seen, tokenizer = spy(grpo), AutoTokenizer.from_pretrained(policy)
    lines = run(grpo, "--data", path, "--reward", f"{ROOT / 'humanline_grpo.py'}:math_reward", "--max_length", 256,
                "--max_new_tokens", 1, "--temperature", 1.0, "--steps", 4, "--sample_every", 2, "--group_size", 8,
                "--batch_size", 64, "--micro_tokens", 10**6)  # fmt: skip
    assert "rows.jsonl: 30 rows; 1 dropped" in capsys.readouterr().out
    golds = {tuple(common.encode_prompt(tokenizer, row["question"])[0]): row["answer"].split()[-1] for row in rows}
    wins = []
    for line, (examples, _, _) in zip(lines[1:], seen):
        won = [tokenizer.decode(e.ids[e.prompt_len]) == golds[tuple(e.ids[: e.prompt_len])] for e in examples]
        equal = sum(len(set(won[i : i + 8])) == 1 for i in range(0, 64, 8))
        assert line["reward"] == sum(won) / 64 and line["frac_zero_std"] == equal / 8
        wins += won
    assert len(wins) == 256 and sum(wins) > 1
    samples = [json.loads(line) for line in open(tmp_path / "run" / "samples.jsonl")]
    greedy = [line["reward"] for line in samples if line["step"] == 4 and line["mode"] == "greedy"]
    assert len(greedy) == 4 and lines[-1]["eval_reward_greedy"] == sum(greedy) / 4


@pytest.mark.parametrize("pad", [True, False])
def test_a_tiny_classifier_is_a_reward(policy, tmp_path, monkeypatch, pad):
    """The score at the last token of prompt and response, whatever stands beside it in the batch."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(policy, num_labels=1)
    if not pad:
        tokenizer.pad_token = config.pad_token_id = None
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    monkeypatch.setenv("REWARD_MODEL", str(tmp_path / "judge"))
    prompts, completions = ["abc", "d"] * 9, ["efgh", "ij"] * 9
    rewards = grpo.model_reward(prompts, completions)
    for prompt, completion, reward in zip(prompts, completions, rewards):
        text = f"<|user|>{prompt}<|end|><|assistant|>{completion}<|end|>"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        assert reward == pytest.approx(model.score(hidden).item(), abs=1e-5)
    messages = [[[{"role": role, "content": text}] for text in texts]
                for role, texts in (("user", prompts), ("assistant", completions))]  # fmt: skip
    assert grpo.model_reward(*messages) == rewards


def test_alpaca_eval_file(policy, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "abc"}, {"instruction": "d"}])
    alpaca_eval.main([str(policy), str(path), str(tmp_path / "out.json"), "--max_new_tokens", "5", "--generator", "g"])
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["instruction"] for row in rows] == ["abc", "d"]
    assert all(set(row) == {"instruction", "output", "generator"} and row["generator"] == "g" for row in rows)
