"""The two rewards of experiments/rewards.py, answers by hand, a tiny classifier; how one's own are loaded and called."""

import importlib.util
import json
import re
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

import alpaca_eval
import humanline_grpo as grpo
import rewards
from common import BadInput, encode
from conftest import ROOT, SHARED, make_rows, write_jsonl
from rewards import math_reward

TRL = importlib.util.find_spec("trl") is not None
needs_trl = pytest.mark.skipif(not TRL, reason="trl is not installed")
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
    # Words, phrases and dates are not products and differences of their letters and numbers.
    ("\\boxed{no}", "on", False),
    ("The answer is \\boxed{on}. I am sure.", "no", False),
    ("The answer is \\boxed{no}. I am sure.", "no", True),
    ("\\boxed{\\textbf{No}}", "no", True),
    ("**Yes**", "Yes", True),
    ("#### Yes", "yes", True),
    ("\\boxed{\\text{Yes.}}", "(yes)", True),
    ("\\boxed{\\text{No solution}}", "no solution", True),
    ("\\boxed{on solution}", "no solution", False),
    ("\\boxed{\\text{even} + 1}", "\\text{even}", False),
    ("2024-05-01", "2024-05-01", True),
    ("2018", "2024-05-01", False),
    ("it was \\boxed{\\text{2024-01-05}}", "2024-05-01", False),
    # But what has a sign, bars or a backslash is mathematics.
    ("\\boxed{\\pi}", "-\\pi", False),
    ("\\boxed{-\\pi}", "\\pi", False),
    ("\\boxed{-\\infty}", "\\infty", False),
    ("\\boxed{\\frac{2\\pi}{2}}", "\\pi", True),
    ("\\boxed{xy}", "-xy", False),
    # Thoughts: what follows the last one is judged; one without an end is worth nothing.
    ("<think>17, no: 18</think> It is 17.", "18", False),
    ("<think>17</think> It is 18.", "18", True),
    ("17</think> It is \\boxed{18}", "18", True),
    ("<think>It is \\boxed{18}", "18", False),
    ("<think>\\boxed{18}</think>", "18", False),
    ("<think>a</think> 18 <think>b", "18", False),
    # Marks.
    ("so\n#### **18**", "18", True),
    ("so\n#### Final Answer\n18", "18", True),
    ("so\n#### **Final Answer**\n\n$18", "18", True),
    ("so\n#### 18 dollars in all", "18", True),
    ("so\n#### The final answer is: 18", "18", True),
    ("so\n#### 18 dollars in all", "17", False),
    *((f"so \\boxed{{{completion}}}", gold, right) for completion, gold, right in HARD),
    # Wrong twins of some of these.
    ("A: 81", "reasoning\n#### 18", False),
    ("so $81.", "#### 18", False),
    ("#### 5\nand 7 more words", "7", False),
    ("\\boxed{2} of the 5", "5", False),
    ("12,345,679", "12345678", False),
    ("\\boxed{21 \\text{ cm}}", "12", False),
    ("\\boxed{\\dfrac{3}{4}}", "\\frac{4}{3}", False),
    ("\\boxed{ \\left( 3, \\frac{\\pi}{3} \\right) }", "(3,\\frac{\\pi}{2})", False),
    ("\\boxed{\\text{Carla}}", "evelyn", False),
    ("so\n#### Final Answer\n17", "18", False),
    # The last <answer> is the answer where there is one, in any case, and never one in a thought.
    ("<reasoning>2 + 16 is 18</reasoning><answer>17</answer>", "17", True),
    ("<reasoning>2 + 16 is 18</reasoning><answer>17</answer>", "18", False),
    ("<answer>18</answer>", "18", True),
    ("<answer>81</answer>", "18", False),
    ("<answer>(3, 4)</answer>", "(3,4)", True),
    ("<answer>(4, 3)</answer>", "(3,4)", False),
    ("<answer>3/4</answer>", "3/4", True),
    ("<answer>4/3</answer>", "3/4", False),
    ("< Answer >\n18\n</ANSWER >", "18", True),
    ("< Answer >\n17\n</ANSWER > 18", "18", False),
    ("<answer>17</answer>, no: <answer>18</answer>", "18", True),
    ("<answer>18</answer>, no: <answer>17</answer>", "18", False),
    ("<answer>18", "18", True),
    ("<answer></answer> 18", "18", False),
    ("<answer>17<answer>18</answer>", "18", True),
    ("<think><answer>18</answer></think> It is 17.", "18", False),
    ("<think><answer>17</answer></think><answer>18</answer>", "18", True),
    ("<think><answer>18</answer>", "18", False),
    ("17 </ Thinking > 18", "18", True),
    ("<THINKING>18</thinking> 17", "18", False),
    ("<answer>18</answer> so \\boxed{17}", "18", True),
    ("<answer>17</answer> so \\boxed{18}", "18", False),
    ("<answer>So \\boxed{18} it is.</answer>", "18", True),
    ("<answer>18 or 17</answer>", "18", False),
    ("<answer>The answer is 18.</answer>", "18", True),
    ("<answer>18 or 17</answer>", "17", False),
    ("<answer>17 plus 1 makes 18.</answer>", "18", True),
    ("<answer>18 + x</answer>", "18", False),
    ("<answer>\\(18\\)</answer>", "18", True),
    ("<answer>\\begin{pmatrix}1\\\\ 3\\end{pmatrix}</answer>", "\\begin{pmatrix}1\\\\ 2\\end{pmatrix}", False),
    ("<answer>\\begin{pmatrix}1\\\\ 2\\end{pmatrix}</answer>", "\\begin{pmatrix} 1 \\\\2 \\end{pmatrix}", True),
    ("17 <thinking> 18", "18", False),
    ("9 + 9\n18", "18", True),
    ("9 + 9\n18", "9", False),
    ("9 * 2 = 18, 18 / 2 = 9", "9", True),
    ("9 * 2 = 18, 18 / 2 = 9", "18", False),
    ("so\n#### 17\n#### 18", "18", True),
    ("so\n#### 17\n#### 18", "17", False),
    ("1. 9 * 2 = 18", "18", True),
    ("9 * 2 ≈ 17", "18", False),
    ("9 * 2: 18", "18", True),
    ("9 * 2: 17", "18", False),
    # A stop at the end.
    ("so\n#### 18.", "18", True),
    ("so\n#### 17.", "18", False),
    ("so\n#### $18.", "18", True),
    ("so\n#### $18.5.", "18", False),
    ("so\n#### 1,234.", "1234", True),
    ("so\n#### 1.234", "1234", False),
    ("\\boxed{18.}", "18", True),
    ("\\boxed{1.8}", "18", False),
    ("18.", "18", True),
    ("81.", "18", False),
    ("\\boxed{$18.$}", "#### 18.", True),
    ("so\n#### 1,235.", "#### 1,234.", False),
    # Markdown.
    ("**18**", "18", True),
    ("**17**", "18", False),
    ("`18`", "18", True),
    ("`17`", "18", False),
    ("*18*", "18", True),
    ("*18*0", "18", False),
    ("So it is 2 * 9 * 1", "18", True),
    ("So it is 2 * 9 * 1", "1", False),
    ("***18.***", "18", True),
    ("2*3*4", "234", False),
    ("_18_", "18", True),
    ("2**3", "23", False),
    ("**Answer:** 18", "18", True),
    ("The answer is `17`.", "18", False),
    ("The answer is *18*.", "18", True),
    ("\\boxed{*17*}", "18", False),
    ("\\boxed{**18**}", "18", True),
    ("so\n#### `17`", "18", False),
    ("so\n#### `18`", "18", True),
    # Currencies.
    ("so\n#### €18", "18", True),
    ("so\n#### €17", "18", False),
    ("\\boxed{£18}", "18", True),
    ("\\boxed{£81}", "18", False),
    ("\\boxed{18 €}", "18", True),
    ("so\n#### -€18", "18", False),
    ("so\n#### -€18", "-18", True),
    ("\\boxed{£18 + £17}", "18", False),
    ("\\boxed{\\text{¥}1,800}", "1800", True),
    ("\\boxed{¥1,800}", "18", False),
    ("\\boxed{\\pounds18}", "£18", True),
    ("\\boxed{18, €17}", "18", False),
    ("\\boxed{US\\$18}", "18", True),
    ("\\boxed{EUR 17}", "18", False),
    ("\\boxed{18 USD}", "18", True),
    # Units: but what makes another number of it is none.
    ("\\boxed{18 km/h}", "18", True),
    ("\\boxed{17 km/h}", "18", False),
    ("\\boxed{18km/h}", "18 \\text{ km/h}", True),
    ("\\boxed{18 x/y}", "18", False),
    ("\\boxed{18 m/s^2}", "18", True),
    ("\\boxed{18 m/n}", "18", False),
    ("\\boxed{18 g/cm³}", "18", True),
    ("\\boxed{18 xy}", "18", False),
    ("\\boxed{18\\,\\mathrm{m}\\cdot\\mathrm{s}^{-1}}", "18", True),
    ("\\boxed{18\\mathrm{i}}", "18", False),
    ("\\boxed{18 miles per hour}", "18", True),
    ("\\boxed{18 miles 5}", "18", False),
    ("\\boxed{18 people}", "18", True),
    ("\\boxed{18 million people}", "18", False),
    ("\\boxed{18 million}", "18 \\text{ million}", True),
    ("\\boxed{18\\text{ million}}", "18", False),
    ("\\boxed{\\frac{1}{2} km}", "0.5", True),
    ("\\boxed{2\\text{ hours }30\\text{ minutes}}", "2", False),
    ("\\boxed{12\\pi\\text{ cm}^2}", "12\\pi", True),
    ("\\boxed{12\\text{ or }13\\text{ cm}}", "12", False),
    ("\\boxed{12\\text{ or }13\\text{ cm}}", "12, 13", True),
    ("\\boxed{12\\text{ and }13}", "12", False),
    ("18 m", "18", True),
    ("\\boxed{2t}", "2", False),
    ("\\boxed{12x\\text{ cm}}", "12x", True),
    ("\\boxed{12y\\text{ cm}}", "12x", False),
    ("\\boxed{.5 kg}", "0.5", True),
    ("\\boxed{2m}", "2", False),
    ("\\boxed{18 sec}", "18", True),
    ("\\boxed{18 sec x}", "18", False),
    ("\\boxed{18 dollars}", "18", True),
    ("\\boxed{18 dollars and fifty cents}", "18", False),
    ("\\boxed{18 eggs a day}", "18", True),
    ("\\boxed{18 and a half}", "18", False),
    ("so\n#### 18th", "18", True),
    ("so\n#### 18 dozen", "18", False),
    ("\\boxed{90°}", "90", True),
    ("\\boxed{9°}", "90", False),
    ("\\boxed{90^\\circ\\text{C}}", "90", True),
    ("\\boxed{90°20'}", "90", False),
    ("90", "90°", True),
    ("x \\text{ is odd}", "x \\text{ is even}", False),
    ("<answer>\\text{June 20}</answer>", "\\text{June 20}", True),
    ("\\boxed{20}", "\\text{June 20}", False),
    ("\\boxed{(-\\infty,\\infty)}", "\\mathbb{R}", True),
    ("\\boxed{(0,\\infty)}", "\\mathbb{R}", False),
    # Letters, beside values or alone; whatever both have must agree.
    ("the answer is B", "B", True),
    ("the answer is B", "C", False),
    ("The answer is (B).", "B", True),
    ("The answer is (B).", "\\text{(A)}", False),
    ("\\boxed{\\textbf{(C)}\\ 12}", "C", True),
    ("\\boxed{\\textbf{(C)}\\ 12}", "B", False),
    ("\\boxed{\\textbf{(C)}\\ 12}", "12", True),
    ("\\boxed{\\textbf{(C)}\\ 12}", "13", False),
    ("\\boxed{B}", "\\textbf{(B)} \\frac12", True),
    ("\\boxed{C}", "\\textbf{(B)} \\frac12", False),
    ("\\boxed{\\frac12}", "\\textbf{(B)} \\frac12", True),
    ("\\boxed{\\frac13}", "\\textbf{(B)} \\frac12", False),
    ("\\boxed{\\mathrm{(B)}\\ 0.5}", "\\textbf{(B)} \\frac12", True),
    ("\\boxed{\\textbf{(B)}\\ \\frac13}", "\\textbf{(B)} \\frac12", False),
    ("**B**", "B", True),
    ("\\boxed{\\textbf{(C)}\\ \\frac12}", "\\textbf{(B)} \\frac12", False),
    ("\\boxed{\\text{E}}", "\\textbf{(E)}\\ \\text{none}", True),
    ("the answer is A good idea", "A", False),
    ("<answer>B. Paris</answer>", "B", True),
    ("<answer>B. Paris</answer>", "A", False),
    ("(B) Paris", "\\textbf{(B)}\\ \\text{Paris}", True),
    ("\\boxed{(B) London}", "\\textbf{(B)}\\ \\text{Paris}", False),
    ("I think that A is wrong, so the answer is C.", "C", True),
    ("I think that A is wrong, so the answer is C.", "A", False),
    ("The correct option is (B). I checked A.", "B", True),
    ("The answer is not B.", "B", False),
    ("5 and 7, so the answer is $\\textbf{(B)}$.", "\\textbf{(B)} \\frac12", True),
    ("The answer is A or B.", "A", False),
    ("so\n#### D", "D", True),
    ("The answer is (A) or (B).", "B", False),
    ("A: She has 18.", "18", True),
    ("the answer is A, B and C", "A", False),
    ("Answer: (C) 12", "\\textbf{(C)}\\ 12", True),
    ("(A) gives 5, (B) gives 6, so (B)", "A", False),
    ("A. Let x be 5.\nThe answer is B.", "B", True),
    ("A. Let x be 5.\nThen x is 5.", "A", False),
    ("\\boxed{A, B}", "A", False),
    ("The answer is option B.", "B", True),
    ("(A) is wrong.", "A", False),
    ("The answer is \\(B\\).", "B", True),
    ("The answer is (A) or B.", "A", False),
    ("The answer is B. I checked (A).", "B", True),
    ("The answer is (A) and B.", "A", False),
    ("So 5.\nAnswer: B", "B", True),
    ("The answer is (A), B.", "A", False),
    ("The answer is A. No, the answer is B.", "B", True),
    ("The answer is A. No, the answer is B.", "A", False),
    ("The answer is clear. It is 18.", "18", True),
    ("\\boxed{X}", "x", False),
    ("\\boxed{e}", "e^1", True),
    ("A", "5", False),
    # Thousands.
    ("10000", "10\\,000", True),
    ("1000", "10\\,000", False),
    ("\\boxed{10,000}", "10 000", True),
    ("0", "10 000", False),
    ("It is 10,000.", "10~000", True),
    ("10", "10~000", False),
    ("It is $10\\,000$.", "10{,}000", True),
    ("\\boxed{10\\,001}", "10000", False),
    ("\\boxed{1\\ 234\\;567}", "1234567", True),
    ("12\\,34", "1234", False),
    ("10\u202f000", "10,\\!000", True),
    ("\\boxed{3, 400}", "3400", False),
    ("\\boxed{2024\\,100}", "2024100", False),
    ("I bought 2\n100 in all", "100", True),
    ("I bought 2\n100 in all", "2100", False),
    # Lists: all of it, in any order.
    ("\\boxed{3,4}", ["3", "4"], True),
    ("\\boxed{3}", ["3", "4"], False),
    ("\\boxed{4 \\text{ and } 3}", ["3", "4"], True),
    ("\\boxed{[3,4]}", ["3", "4"], False),
    ("3 and 4", '["3", "4"]', True),
    ("\\boxed{3,5}", '["3","4"]', False),
    ("\\boxed{3,4}", "['3', '4']", True),
    ("\\boxed{3,4,5}", [3, 4], False),
    ("\\boxed{3,4}", [3, 4], True),
    ("\\boxed{\\frac12, 3}", ["\\frac{1}{2}", "3"], True),
    ("\\boxed{17}", ["18"], False),
    ("\\boxed{18}", ["18"], True),
    ("\\boxed{3,4}", "[3,4]", False),
    ("\\boxed{[3,4]}", "[3,4]", True),
    # Tiny numbers.
    ("\\boxed{\\frac{1}{2^{99}}}", "\\frac{1}{2^{99}}", True),
    ("\\boxed{\\frac{1}{2^{98}}}", "\\frac{1}{2^{99}}", False),
    ("\\boxed{2^{-99}}", "\\frac{1}{2^{99}}", True),
    ("\\boxed{-10^{-9}}", "10^{-9}", False),
    ("\\boxed{10^{-7}}", 1e-7, True),
    ("\\boxed{1e-8}", "10^{-7}", False),
    ("\\boxed{0.0000002}", "10^{-7}", False),
    ("\\boxed{16 \\times 10^{-20}}", "1.6\\cdot10^{-19}", True),
    ("\\boxed{1.7 \\times 10^{-19}}", "1.6\\cdot10^{-19}", False),
    ("\\boxed{0.000333}", "\\frac{1}{3000}", True),
    ("0", "10^{-9}", False),
    ("\\boxed{10^{10^{10^{10}}}}", "10^{10^{10^{10}}}", True),
    ("\\boxed{10^{-9}}", "0", False),
    ("\\boxed{0.0}", "0", True),
    # A box without an end may have been cut off.
    ("\\boxed{\\frac{1}{2}", "\\frac12", False),
    ("\\boxed{\\{1, 2\\}}", "\\{2, 1\\}", True),
    ("\\boxed{18", "18", False),
]


def test_the_table_has_as_many_wrong_answers_as_right_ones():
    right = sum(right for _, _, right in ANSWERS)
    assert len(ANSWERS) > 280 and abs(2 * right - len(ANSWERS)) <= 10


@needs_math_verify
@pytest.mark.parametrize("completion, gold, right", ANSWERS, ids=lambda x: str(x)[:30])
def test_math_reward(completion, gold, right):
    message = [{"role": "assistant", "content": completion}]
    assert math_reward(["q"] * 2, [completion, message], answer=[gold] * 2) == [float(right)] * 2
    assert math_reward.usable({"answer": gold})


@needs_math_verify
@pytest.mark.parametrize("response", ["(" * 8000, "1 " * 4000, "**1" * 3000, "18 kg " * 1500, "=" * 8000, "\n#### " * 1000])
def test_a_response_without_sense_costs_no_time(response):
    """math-verify gives up a formula after 5 seconds; a model that repeats itself writes such ones by the batch."""
    start = time.perf_counter()
    assert math_reward(["q"], [response], answer=["5"]) == [0.0]
    assert time.perf_counter() - start < 3


@needs_math_verify
@pytest.mark.parametrize("gold", [None, "", "  ", "####", "\\boxed{}"])
def test_a_gold_answer_that_cannot_be_read_is_no_reward(gold):
    assert not math_reward.usable({"answer": gold})
    assert math_reward(["q"] * 3, ["5", "", "None"], answer=[gold] * 3) == [0.0] * 3


@needs_math_verify
@pytest.mark.parametrize("gold", ["proof", "Proof.", "notfound", "\\text{proof}", "None"])
def test_a_gold_answer_that_says_that_there_is_none_is_not_usable(gold):
    """NuminaMath's. Letters were multiplied, so that "forop" was paid."""
    assert not math_reward.usable({"answer": gold})
    assert math_reward(["q"], ["\\boxed{forop}"], answer=[gold]) == [0.0]


@needs_math_verify
def test_a_gold_answer_may_be_the_number_0():
    assert math_reward.usable({"answer": 0}) and math_reward(["q"], ["0"], answer=[0]) == [1.0]


@needs_math_verify
def test_an_online_run_on_gsm8k(run, policy, tmp_path, capsys, monkeypatch):
    """Real questions and the real reward, named as a user names it. A response is one character of a random
    model, so half of the answers are one digit."""
    if not (SHARED / "gsm8k_train.jsonl").exists():
        pytest.skip("no gsm8k_train.jsonl")
    rows = [json.loads(line) for line in open(SHARED / "gsm8k_train.jsonl")]
    rows = [row for row in rows if len(row["question"]) < 200][:30]
    rows = [row | {"answer": row["answer"] if i % 2 else f"so\n#### {i % 10}"} for i, row in enumerate(rows)]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, {"question": "what", "answer": "####"}])
    batches, accumulate = [], grpo.accumulate_gradient

    def accumulate_and_tell(model, batch, mode, args):
        batches.append(batch)
        return accumulate(model, batch, mode, args)

    monkeypatch.setattr(grpo, "accumulate_gradient", accumulate_and_tell)
    argv = ["--data", path, "--reward", f"{rewards.__file__}:math_reward", "--max_length", 256,
            "--max_new_tokens", 1, "--temperature", 1.0, "--steps", 4, "--sample_every", 2, "--group_size", 8,
            "--batch_size", 64, "--micro_tokens", 10**6, "--seed", 3]  # fmt: skip
    lines = run(grpo, *argv)
    out, tokenizer = capsys.readouterr().out, AutoTokenizer.from_pretrained(policy)
    assert "rows.jsonl: 30 rows, 0 responses cut; dropped: 0 too long, 1 of no use" in out
    shown = out.partition("the first example:\n")[2].partition("<|assistant|>")[0]
    assert shown.startswith("<|user|>") and len(shown) > 30 and "nan" not in out  # the prompt, no quartiles
    args = grpo.parse_args(["--model", "x", "--max_length", "256"])
    golds = {encode(tokenizer, row, None, args).prompt: row["answer"].split()[-1] for row in rows}
    wins = []
    for line, batch in zip(lines[1:], batches, strict=True):
        won = [tokenizer.decode(row.examples[0].response[:1]) == golds[row.examples[0].prompt] for row in batch]
        assert won == [row.reward for row in batch]
        groups = {row.examples[0].prompt: set() for row in batch}
        for row in batch:
            groups[row.examples[0].prompt].add(row.reward)
        equal = sum(len(group) == 1 for group in groups.values())
        assert line["reward"] == sum(won) / 64 and line["frac_zero_std"] == equal / 8
        wins += won
    assert len(wins) == 256 and sum(wins) > 1
    greedy = [reward for _, _, reward in lines[-1]["samples_greedy"]]
    assert len(greedy) == 4 and lines[-1]["eval_reward_greedy"] == sum(greedy) / 4


# --- How a reward is loaded and called: --reward FILE.py:FUNCTION ---

SAMPLED = ("--sample_every", 2, "--group_size", 2, "--max_new_tokens", 6, "--temperature", 1.0)


@pytest.fixture
def a_module(tmp_path, monkeypatch):
    """a_module(name, code): FILE.py of a folder of its own; forgotten after the test."""
    made = []
    monkeypatch.setattr(sys, "path", sys.path[:])

    def make(name, code):
        (tmp_path / "rewards").mkdir(exist_ok=True)
        (tmp_path / "rewards" / f"{name}.py").write_text(code)
        made.append(name)
        return tmp_path / "rewards" / f"{name}.py"

    yield make
    for name in made:
        sys.modules.pop(name, None)


POOL = """
from concurrent.futures import ProcessPoolExecutor
import multiprocessing
from neighbour import worth

class Answer(str):  # pickled by the name of its module
    pass

def in_a_process(completions, **columns):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        rewards = list(pool.map(worth, map(Answer, completions)))
    assert rewards == [len(text) % 7 for text in completions]
    print("the pool has answered", len(rewards))
    return rewards
"""


def test_a_reward_may_import_its_neighbour_and_use_processes(a_module, policy, tmp_path):
    """From the shell, as a user runs it: a process that is spawned imports the script and the reward anew."""
    a_module("neighbour", "def worth(answer):\n    assert type(answer).__module__ == 'pooled', type(answer)\n"
             "    return len(answer) % 7\n")  # fmt: skip
    path = a_module("pooled", POOL)
    data = write_jsonl(tmp_path / "rows.jsonl", make_rows("dpo", 8))
    argv = [sys.executable, "humanline_grpo.py", "--model", policy, "--data", data, "--output_dir", tmp_path / "run",
            "--reward", f"{path}:in_a_process", "--steps", 1, "--batch_size", 4, "--max_length", 64, "--device", "cpu",
            "--eval_size", 0, *SAMPLED]  # fmt: skip
    done = subprocess.run([str(x) for x in argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the pool has answered 4" in done.stdout


@needs_trl
@pytest.mark.parametrize("how", ["messages", "texts"])
def test_rewards_of_trl(script, run, a_module, tmp_path, how):
    """think_format_reward reads completions as messages, get_repetition_penalty_reward completion_ids."""
    path = a_module("of_trl", """
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment, think_format_reward
called = []
penalty, punishment = get_repetition_penalty_reward(2, -1.0), get_soft_overlong_punishment(7, 5)
def reward(**columns):
    both = zip(penalty(**columns), punishment(**columns))
    thought = think_format_reward(**columns) if type(columns["completions"][0]) == list else []
    rewards = [a + b for a, b in both]
    called.append((columns, rewards, thought))
    return rewards
""")  # fmt: skip
    rows = [row | {"hint": i} for i, row in enumerate(make_rows("dpo", 12))]
    if how == "messages":
        rows = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    run(script, "--data", write_jsonl(tmp_path / "rows.jsonl", rows), "--reward", f"{path}:reward", *SAMPLED)
    called = sys.modules["of_trl"].called
    assert len(called) > 3
    for columns, rewards, thought in called:
        assert columns["prompts"] == [rows[i]["prompt"] for i in columns["hint"]]
        assert thought == ([0.0] * len(rewards) if how == "messages" else [])
        for ids, reward in zip(columns["completion_ids"], rewards, strict=True):
            pairs = [*zip(ids, ids[1:])]
            repeated = len(set(pairs)) / len(pairs) - 1 if pairs else 0
            assert all(type(token) is int for token in ids)
            assert reward == pytest.approx(repeated + (2 - len(ids) if len(ids) > 2 else 0) / 5)
    assert len({reward for _, rewards, _ in called for reward in rewards}) > 2


BAD = {
    "none": ("return None", "'NoneType' object is not iterable"),
    "a none": ("return [None] * len(completions)", "NoneType"),
    "nan": ("return [float('nan')] * len(completions)", "rewards for .* responses, or not all finite"),
    "infinite": ("return [1e999] * len(completions)", "not all finite"),
    "too few": ("return [1.0]", "1 rewards for [0-9]+ responses"),
    "equal": ("return [0.7] * len(completions)", "equal within all groups; take other prompts"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_reward_that_fails_is_one_line_and_leaves_no_folder(script, run, a_module, tmp_path, what):
    code, words = BAD[what]
    if what == "equal" and script is grpo:
        pytest.skip("it goes on, with a gradient of 0, which frac_zero_std says on the screen")
    name = "bad_" + what.replace(" ", "_")
    path = a_module(name, f"def f(completions, **columns):\n    {code}\n")
    with pytest.raises(BadInput) as error:
        run(script, "--reward", f"{path}:f", *SAMPLED, "--eval_size", 1)
    message = str(error.value)
    assert "\n" not in message and re.match(f"--reward {re.escape(str(path))}:f: .*{words}", message), message
    assert not (tmp_path / "run").exists()


@needs_math_verify
def test_the_column_that_math_reward_misses_is_named(script, run, tmp_path):
    """DAPO-Math has the answer in reward_model.ground_truth."""
    row = {"data_source": "math_dapo", "prompt": [{"role": "user", "content": "Solve"}], "ability": "MATH",
           "reward_model": {"ground_truth": "34", "style": "rule"}, "extra_info": {"index": "9a"}}  # fmt: skip
    path = write_jsonl(tmp_path / "rows.jsonl", [row] * 9)
    with pytest.raises(BadInput) as error:
        run(script, "--data", path, "--reward", f"{rewards.__file__}:math_reward", *SAMPLED)
    assert str(error.value) == ("math_reward reads the column answer; there are "
                                "data_source, prompt, ability, reward_model, extra_info")  # fmt: skip
    assert not (tmp_path / "run").exists()


# --- A classifier ---


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
    scores = rewards.model_reward(prompts, completions)
    for prompt, completion, reward in zip(prompts, completions, scores):
        text = f"<|user|>{prompt}<|end|><|assistant|>{completion}<|end|>"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        assert reward == pytest.approx(model.score(hidden).item(), abs=1e-5)
    messages = [[[{"role": role, "content": text}] for text in texts]
                for role, texts in (("user", prompts), ("assistant", completions))]  # fmt: skip
    assert rewards.model_reward(*messages) == scores


def test_alpaca_eval_file(policy, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "abc"}, {"instruction": "d"}])
    alpaca_eval.main([str(policy), str(path), str(tmp_path / "out.json"), "--max_new_tokens", "5", "--generator", "g"])
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["instruction"] for row in rows] == ["abc", "d"]
    assert all(set(row) == {"instruction", "output", "generator"} and row["generator"] == "g" for row in rows)
