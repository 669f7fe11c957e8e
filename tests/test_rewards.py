"""The two rewards of humanline_grpo.py: answers by hand, and a tiny classifier."""

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

import humanline_grpo as grpo
from conftest import SHARED, metrics_of

ANSWERS = [  # (completion, the row's answer, right)
    ("A: 18", "reasoning\n#### 18", True),
    ("so 18 dollars", "#### 18", True),
    ("so $18.", "#### 18", True),
    ("18.0", "18", True),
    ("It is 17 and not 18, no: 19", "18", False),
    ("$1,000", "1000", True),
    ("1000", "#### 1,000", True),
    ("1e3", "1000", True),
    ("1.5e-1", "0.15", True),
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
]


@pytest.mark.parametrize("completion, gold, right", ANSWERS)
def test_math_reward(completion, gold, right):
    assert grpo.math_reward(["q"], [completion], answer=[gold]) == [float(right)]
    message = [{"role": "assistant", "content": completion}]
    assert grpo.math_reward(["q"], [message], answer=[gold]) == [float(right)]


@pytest.mark.parametrize("gold", [None, "", "  ", "####"])
def test_a_gold_answer_that_cannot_be_read_is_no_reward(gold):
    assert not grpo.math_reward.usable({"answer": gold}) or gold == "####"
    assert grpo.math_reward(["q"], ["5"], answer=[gold]) == [0.0]


def test_a_tiny_classifier_is_a_reward(policy, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(policy, num_labels=1)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    prompts, completions = ["abc", "d"] * 9, ["efgh", "ij"] * 9
    rewards = grpo.model_reward(prompts, completions, reward_model=[str(tmp_path / "judge")] * 18)
    for prompt, completion, reward in zip(prompts, completions, rewards):
        ids = tokenizer(f"<|user|>{prompt}<|end|><|assistant|>{completion}<|end|>", add_special_tokens=False)["input_ids"]
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        assert reward == pytest.approx(model.score(hidden).item(), abs=1e-5)
    monkeypatch.setenv("REWARD_MODEL", str(tmp_path / "judge"))
    assert grpo.model_reward(prompts, completions) == rewards


def test_an_online_run_on_gsm8k(run, tmp_path):
    """Real questions, the real reward named as a user names it, a tiny random model: it runs, learns nothing."""
    path = SHARED / "gsm8k_train.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    from conftest import ROOT

    summary = run(grpo, "--data", path, "--max_rows", 40, "--reward", f"{ROOT / 'humanline_grpo.py'}:math_reward",
                  "--max_length", 256, "--max_new_tokens", 16, "--sample_every", 2, "--group_size", 4, "--steps", 3,
                  "--system_prompt", "Answer with a number.", "--batch_size", 8)  # fmt: skip
    assert summary["steps"] == 3 and summary["after"]["eval_reward_greedy"] <= 1
    assert all(m["frac_zero_std"] <= 1 for m in metrics_of(tmp_path / "run")[1:])


def test_alpaca_eval_file(policy, tmp_path):
    import json

    import alpaca_eval
    from conftest import write_jsonl

    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "abc"}, {"instruction": "d"}])
    alpaca_eval.main([str(policy), str(path), str(tmp_path / "out.json"), "--max_new_tokens", "5", "--generator", "g"])
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["instruction"] for row in rows] == ["abc", "d"]
    assert all(set(row) == {"instruction", "output", "generator"} and row["generator"] == "g" for row in rows)
