"""Two rewards, for any of the scripts: --reward tests/experiments/rewards.py:math_reward, or …:model_reward."""

import functools
import os
import re

from common import BadInput

# Words that are mathematics or change a number; signs of a sentence; units behind a number; a choice and its rest.
MATH = (r"\b(?:or|and|to|out|plus|minus|times|over|than|point|per ?cent|dozen|hundreds?|thousands?|\w+illions?|half"
        r"|halves|thirds?|quarters?|(?!month)\w+[fxndh]ths|squared|cubed|factorial|root|sqrt|sin|cos|tan|cot|exp|log"
        r"|mod|base|choose|remainder|inf|infinity|alpha|beta|theta|lambda|abc|xyz)\b")  # fmt: skip
PROSE = rf"\n|=.*=|[≈→⇒]|: |.{{200}}|(?<![\\{{])(?!{MATH})\b(?:[A-Za-z]{{3,}}|[Ii]s|[Ii]t|[Ss]o|[Ww]e)\b"
UNIT = (rf"(?:\s+(?!{MATH})(?:[A-Za-z]{{3,}}|[mgshLNJWV]$)|\s*(?:[mcdk]m|mi|ft|in|yd|mg|kg|lb|oz|m[lL]|hr|ms|k[JW]"
        r"|Pa|Hz|kr|sq|cu|[GM]B|st|nd|rd|th|[mgLJNWV](?=/|\\cdot )))")
CHOICE = r"(?i:option |choice )?\(?([A-Z])(?:[).:]+|$)(?!\s*(?:(?:or|and|is)\b|,)|.*(?:\n|\b[A-Z][).:]))\s*(.*)"
CLEAN = (  # what stands around an answer: \text{}, spaces, marks of mathematics and money, words, stops, degrees, units
    (r" ?\\(?:text|math(?!bb)|mbox)\w*\s*\{([^{}]*)\}", r" \1"),
    (r"(?:[^\S\n]|~|(?<!\\)\\(?:[,;: ]|q?quad))+", " "),
    (r"(?<!\\)\\[()\[\]]|\\?[$£¥¢₠-₿]|\\(?:pounds|euro|yen)(?![a-z])", ""),
    (r"(?i)^\W*(?:the )?(?:final )?answer(?: is|:)*(?!\w)|^\s*(?:US|USD|EUR|GBP|Rs\.?)\s*(?=\d)", ""),
    (r"[\s.,;]+$|^\s+", ""),
    (r"(?:[°º]|\^\{?\\circ\}?)\s*[CFK]?$", ""),
    (r"(?<![\w.])(\d*\.?\d+)[eE]([-+]?\d+)$", r"\1 \\cdot 10^{\2}"),
    (rf"((?:[\d}}]|\\pi)[a-z]{{0,2}}?){UNIT}(?:[\s/·,²³-]|\^\{{?-?\d\}}?|\\cdot"
     rf"|(?<![A-Za-z])(?!{MATH})(?:[A-Za-z]{{2,}}|[amgshLNJWV]))*$", r"\1"),
)


def math_reward(prompts, completions, answer, **columns) -> list[float]:
    r"""1.0 where a completion's last <answer>, else its last \boxed{}, else what follows its last ####, else all of
    it, after any thought, is the row's `answer`; what both have of letter and value must agree, as in (B) \frac12.
    Limits. math-verify reads sentences: the last number counts, whatever stands around it. To it 50% is 0.5 and 50,
    1:2 is 0.5, R is r, x = 2, y = 3 is (3, 2), and a tiny number within a list or an equation is 0. Units, currencies
    and other words behind a number are dropped, not compared, unless MATH has them. Only capitals are choices."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [float(agree(read(gold, True), read(text))) for gold, text in zip(answer, texts)]

def usable(row: dict) -> bool:
    """Whether a row's answer can be read; others are dropped. "proof" means that there is none."""
    if "answer" not in row:
        raise BadInput(f"math_reward reads the column answer; there are {', '.join(row)}")
    letter, value = read(row["answer"], True)
    return bool(letter) or value[:1] not in ([], ["proof"], ["notfound"], ["none"])

math_reward.usable = usable

def agree(gold: tuple, found: tuple) -> bool:
    """Whether there is a letter or a value that both have, and all such are equal: tiny numbers relatively."""
    from math_verify import verify
    shared = [both for both in zip(gold, found) if all(both)]
    if not shared or not all(verify(*both) for both in shared):
        return False
    a, b = (x[0] for x in shared[-1])
    if a == b or not all(getattr(x, "is_comparable", False) for x in (a, b)):  # not two real numbers
        return True
    size = max(abs(a.evalf()), abs(b.evalf()))
    return not 0 < size < 1e-4 or verify(a / size, b / size)

def read(text, gold=False) -> tuple:
    """The letter and the value of a final answer, each as a list for verify, [] where there is none."""
    from latex2sympy2_extended.math_normalization import NormalizationConfig, extract_boxed_content
    from math_verify import LatexExtractionConfig, parse
    text = ", ".join(map(str, text)) if isinstance(text, list) else "" if text is None else str(text)
    text = re.sub(r"""^\s*\[(\s*["'].*)\]\s*$""", r"\1", text)  # a list that became a text
    text = re.sub(r"(?i)<\s*(/?)\s*(think|answer)(?:ing)?\s*>", lambda tag: f"<{tag[1]}{tag[2].lower()}>", text)
    text = text.rpartition("</think>")[2]
    text = "" if "<think>" in text else text  # a thought without an end
    text = text.rpartition("<answer>")[2].partition("</answer>")[0].replace("`", " ")
    text = re.sub(r"(?<![^\s{])(\*{1,3}|__?)(?=\S)(.+?)\1", r"\2", text).strip()  # **18**
    text = re.sub(r"(?<=\d)(?<!\d{4})(?:,?\\[,;:! ]|~|[^\S\n])(?=\d{3}(?!\d))", "", text)  # 10\,000
    exact = gold or "\\boxed" in text
    if "\\boxed" in text:
        text = extract_boxed_content(text[text.rindex("\\boxed") :])
        text = text if text.count("{") == text.count("}") else ""  # cut off
    elif "####" in text:
        text = next(filter(clean, text.rpartition("####")[2].splitlines()), "")
    said = re.findall(r"(?im)\b(?:answer|option|choice)(?: is|:)+\s*(.+?)(?:\.\s|\.?\s*$)", text)
    if said and re.match(CHOICE, clean(said[-1])):
        text = said[-1]
    choice = re.match(CHOICE, clean(text))
    letter, span = ([choice[1]], clean(choice[2])) if choice else ([], clean(text))
    word = re.fullmatch(r"[ (*]*([A-Za-z]{2}[A-Za-z ]*|\d{4}-\d\d-\d\d)[ .)*]*", span)
    if word:  # as mathematics "on" is o times n, so it is "no"
        return letter, [" ".join(word[1].lower().split())]
    config = NormalizationConfig(malformed_operators=True, boxed="last")  # no units: 2t is not 2
    formula = exact or not re.search(PROSE, span)
    found = parse(f"\\boxed{{{span}}}", [LatexExtractionConfig(normalization_config=config)]) if formula else []
    if not exact and len(found) < 2:
        found = parse(text)
    return letter, [*found, span] if span else []

def clean(span: str) -> str:
    for pattern, mark in CLEAN:
        span = re.sub(pattern, mark, span)
    return span


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
