"""Two rewards, for any of the scripts: --reward tests/experiments/rewards.py:math_reward, or …:model_reward."""

import functools
import os
import re

from common import BadInput


def math_reward(prompts, completions, answer, **columns) -> list[float]:
    """1.0 where math-verify finds a completion's final answer equal to the row's `answer`."""
    from math_verify import verify
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [float(verify(final_answer(g, True), final_answer(x))) for g, x in zip(answer, texts)]

def final_answer(text, gold=False) -> list:
    """As math-verify reads it: the last \\boxed{}, what follows the last ####, else the text, after
    any thought. A word or a date stays one: as mathematics, "on" is o times n, so it is "no"."""
    from math_verify import parse
    text = ("" if text is None else str(text)).rpartition("</think>")[2]
    text = "" if "<think>" in text else text  # a thought without an end
    answer = f"\\boxed{{{text.strip()}}}" if gold or " " not in text.strip() else text
    if "\\boxed" in text:
        answer = text[text.rindex("\\boxed") :]
    elif "####" in text:  # or "#### **Final Answer**" and 18 below, "#### 18 dollars in all"
        rest = re.sub(r"(?i)\*|(the )?(final )?answer( is)?:?", "", text.rpartition("####")[2])
        line = rest.strip().partition("\n")[0]
        answer = line if re.search(r"\d.*\s[A-Za-z]{2}", line) else f"\\boxed{{{line}}}"
    plain = re.sub(r"\\(?:text|math)\w*\{([^{}]*)\}", r"\1", answer)
    word = re.match(r"\\boxed\{[ (*]*([A-Za-z]{2}[A-Za-z ]*|\d{4}-\d\d-\d\d)[ .)*]*\}", plain)
    return [word[1].strip().lower()] if word else parse(answer)

def usable(row: dict) -> bool:
    """Whether a row's answer can be read; others are dropped. "proof" means that there is none."""
    if "answer" not in row:
        raise BadInput("math_reward reads the column answer, and there is none")
    return final_answer(row["answer"], True)[:1] not in ([], ["proof"], ["notfound"], ["none"])

math_reward.usable = usable


def model_reward(prompts, completions, **columns) -> list[float]:
    """The score that a classifier, named by the variable REWARD_MODEL (such as Skywork/Skywork-Reward-V2-Qwen3-0.6B),
    gives each prompt with its completion, in its own chat template."""
    judge, batch_size = load_judge(os.environ["REWARD_MODEL"])
    texts = []
    for prompt, answer in zip(prompts, completions):
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        answer = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        texts.append(judge.tokenizer.apply_chat_template([*prompt, *answer], tokenize=False))
    scores = judge(texts, batch_size=batch_size, function_to_apply="none",
                   add_special_tokens=False, return_token_type_ids=False)  # fmt: skip
    return [score["score"] for score in scores]

@functools.lru_cache(maxsize=1)
def load_judge(name: str) -> tuple:
    """The classifier and how many texts it takes at once: one where no token of its own pads."""
    from transformers import pipeline
    judge = pipeline("text-classification", name, num_labels=1)
    pad, end = judge.tokenizer.pad_token_id, judge.tokenizer.eos_token_id
    # A padding token that is the EOS too would hide the EOS at the end, which is to be scored.
    judge.model.config.get_text_config().pad_token_id = None if pad == end else pad
    return judge, 1 if pad in (None, end) else 16
