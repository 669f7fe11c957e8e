"""A reward that is a model: a sequence classifier with one output, named by the variable REWARD_MODEL.

    REWARD_MODEL=Skywork/Skywork-Reward-V2-Qwen3-0.6B .venv/bin/python humanline_grpo.py --model … --sample_every 16 \\
        --reward tests/experiments/model_reward.py:model_reward
"""

import functools
import os

from transformers import pipeline


def model_reward(prompts, completions, **columns) -> list[float]:
    """The classifier's score of each prompt with its completion, in the classifier's own chat template."""
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
    judge = pipeline("text-classification", name, num_labels=1)
    pad, end = judge.tokenizer.pad_token_id, judge.tokenizer.eos_token_id
    # A padding token that is the EOS too would hide the EOS at the end, which is to be scored.
    judge.model.config.get_text_config().pad_token_id = None if pad == end else pad
    return judge, 1 if pad in (None, end) else 16
