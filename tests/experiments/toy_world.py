"""Tiny real worlds for the tests and three tables: a tokenizer with a chat template, a small Llama taught by
SFT on a task that a script can grade, and data sampled from that policy. Under a minute on two CPU cores.

    addition   "37+45" -> "82", two-digit numbers; reward 1 where the answer is right (verifiable)
    letters    four letters -> a string of 8 to 16 letters; reward a hidden utility (graded)

build(FOLDER, "letters") leaves FOLDER/policy (the initial policy, a Hugging Face folder), prompts_test.jsonl {prompt,
answer} and, for other prompts: prompts_train.jsonl, groups_train.jsonl {prompt, answer, completions, rewards},
pairs_train.jsonl {prompt, chosen, rejected} (best and worst of a group) and labels_train.jsonl {prompt, completion,
label} (above or below the group's mean).
"""

import json
import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LETTERS = "abcdefghijkl"
SHORTEST, LONGEST = 8, 16  # letters of an answer
WORLDS = ("addition", "letters")

def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, and the four special tokens of the template."""
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    vocab = {token: i for i, token in enumerate(special + list("0123456789+= " + LETTERS) + ["?"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", unk_token="?")
    fast.add_special_tokens({"additional_special_tokens": special[2:]})
    fast.chat_template = TEMPLATE
    return fast

def make_model(vocab_size: int, seed: int) -> LlamaForCausalLM:
    """280k parameters."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab_size, hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=2048, pad_token_id=0, bos_token_id=None, eos_token_id=1))


# --- the two tasks: prompts, texts to imitate, rewards ----------------------------------------------

def make_prompts(world: str, train: int, test: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Prompts without repetition, split into train and test."""
    rng = random.Random(seed)
    if world == "addition":
        pairs = rng.sample([(a, b) for a in range(10, 100) for b in range(10, 100)], train + test)
        rows = [{"prompt": f"{a}+{b}", "answer": str(a + b)} for a, b in pairs]
    else:
        seen = dict.fromkeys("".join(rng.choices(LETTERS, k=4)) for _ in range(4 * (train + test)))
        rows = [{"prompt": prompt} for prompt in list(seen)[: train + test]]
    return rows[:train], rows[train:]

def _table(name: str, width: float) -> list[list[float]]:
    rng = random.Random(name)  # the world's hidden law: the same whatever the seed of the data
    return [[rng.gauss(0, width) for _ in LETTERS] for _ in LETTERS]


HABIT = _table("what the policy is taught to write", 1.0)
BIGRAM = _table("which letter likes which neighbour", 1.0)
ECHO = _table("which letter of the prompt likes which letter", 1.0)

def imitate(world: str, row: dict, rng: random.Random) -> str:
    """A text to teach the initial policy: the sum, or a string from a fixed Markov chain."""
    if world == "addition":
        return row["answer"]
    text = [rng.randrange(len(LETTERS))]
    for _ in range(rng.randint(SHORTEST, LONGEST) - 1):
        weights = [2.718281828 ** HABIT[text[-1]][j] for j in range(len(LETTERS))]
        text.append(rng.choices(range(len(LETTERS)), weights)[0])
    return "".join(LETTERS[i] for i in text)

def addition_reward(prompts, completions, answer, **columns) -> list[float]:
    """1.0 where the completion is the sum."""
    return [float(text_of(c).strip() == a) for c, a in zip(completions, answer)]

def letters_reward(prompts, completions, **columns) -> list[float]:
    """The hidden utility: how well letters go with their neighbours and with the prompt's letters, a
    mean over the string, so that its length does not matter; one outside 8..16 letters gets −2."""
    rewards = []
    for prompt, completion in zip(prompts, completions):
        given = [LETTERS.find(c) for c in text_of(prompt)]
        text = [LETTERS.find(c) for c in text_of(completion)]
        if not SHORTEST <= len(text) <= LONGEST or -1 in text or -1 in given:
            rewards.append(-2.0)
            continue
        bigrams = sum(BIGRAM[a][b] for a, b in zip(text, text[1:])) / (len(text) - 1)
        echoes = sum(ECHO[given[t % len(given)]][y] for t, y in enumerate(text)) / len(text)
        rewards.append(bigrams + echoes)
    return rewards


REWARDS = {"addition": addition_reward, "letters": letters_reward}
MAX_NEW_TOKENS = {"addition": 6, "letters": LONGEST + 4}

def text_of(value) -> str:
    return value if isinstance(value, str) else value[-1]["content"]


# --- teaching and sampling --------------------------------------------------------------------------

@torch.no_grad()
def sample(model, tokenizer, prompts: list[str], max_new_tokens: int, temperature=1.0, title="") -> list[str]:
    """One completion a prompt from the plain policy; temperature 0 is greedy."""
    tokenizer.padding_side = "left"
    options = dict(do_sample=temperature > 0, max_new_tokens=max_new_tokens, pad_token_id=0)
    if temperature > 0:
        options |= dict(temperature=temperature, top_p=1.0, top_k=0, repetition_penalty=1.0)
    texts = []
    for i in tqdm(range(0, len(prompts), 1024), title, leave=False, disable=not title):
        chats = [[{"role": "user", "content": p}] for p in prompts[i : i + 1024]]
        inputs = tokenizer.apply_chat_template(chats, add_generation_prompt=True, padding=True, return_tensors="pt",
                                               return_dict=True)
        out = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(out, skip_special_tokens=True)
    return texts

def teach(model, tokenizer, world: str, rows: list[dict], seed: int) -> None:
    """SFT: addition until 18% of greedy answers are right, letters for 250 steps."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    tokenizer.padding_side = "right"
    limit = 3000 if world == "addition" else 250
    for step in tqdm(range(1, limit + 1), f"teaching {world}", leave=False):
        batch = [rows[rng.randrange(len(rows))] for _ in range(64)]
        whole = [f"<|user|>{r['prompt']}<|end|><|assistant|>{imitate(world, r, rng)}<|end|>" for r in batch]
        ids = tokenizer(whole, add_special_tokens=False, padding=True, return_tensors="pt")["input_ids"]
        answer = (ids == tokenizer.convert_tokens_to_ids("<|assistant|>")).cumsum(-1).bool()
        labels = ids.masked_fill(~answer | (ids == tokenizer.pad_token_id), -100)
        labels[ids == tokenizer.convert_tokens_to_ids("<|assistant|>")] = -100
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if world == "addition" and step % 25 == 0:
            some = rows[:512]
            greedy = sample(model, tokenizer, [r["prompt"] for r in some], 6, temperature=0)
            tokenizer.padding_side = "right"
            right = addition_reward(None, greedy, [r["answer"] for r in some])
            if sum(right) / len(right) >= 0.18:
                break

def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

def write_data(folder: Path, rows: list[dict], groups: list[dict]) -> None:
    """Prompts, and the same groups as groups, as pairs (best against worst) and as labels (against the mean)."""
    pairs, labels = [], []
    for group in groups:
        scored = sorted(zip(group["rewards"], group["completions"]))
        mean = sum(group["rewards"]) / len(scored)
        if scored[0][0] == scored[-1][0]:
            continue
        pairs.append({"prompt": group["prompt"], "chosen": scored[-1][1], "rejected": scored[0][1]})
        labels += [{"prompt": group["prompt"], "completion": text, "label": reward > mean}
                   for reward, text in zip(group["rewards"], group["completions"]) if reward != mean]
    for name, data in (("prompts", rows), ("groups", groups), ("pairs", pairs), ("labels", labels)):
        write_jsonl(folder / f"{name}_train.jsonl", data)

def build(folder: str | Path, world: str, seed: int = 0, train: int = 1536, test: int = 256, group: int = 8):
    """Make the world in `folder` unless it is there already."""
    folder = Path(folder)
    if (folder / "done").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    train_rows, test_rows = make_prompts(world, train, test, seed)
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer), seed)
    teach(model, tokenizer, world, train_rows, seed)
    model.eval()
    prompts = [row["prompt"] for row in train_rows for _ in range(group)]
    texts = sample(model, tokenizer, prompts, MAX_NEW_TOKENS[world], title="sampling data")
    columns = {key: [row[key] for row in train_rows for _ in range(group)] for key in train_rows[0] if key != "prompt"}
    rewards, groups = REWARDS[world](prompts, texts, **columns), []
    for i, row in enumerate(train_rows):
        # an empty completion is the policy's mistake, and no text to learn from
        keep = [j for j in range(i * group, (i + 1) * group) if texts[j].strip()]
        if len(keep) > 1:
            groups.append(row | {"completions": [texts[j] for j in keep], "rewards": [rewards[j] for j in keep]})
    write_data(folder, train_rows, groups)
    write_jsonl(folder / "prompts_test.jsonl", test_rows)
    model.save_pretrained(folder / "policy")
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(folder / "policy")
    (folder / "done").touch()
    return folder

def grade(policy: str | Path, world_folder: Path, world: str, seed: int = 0) -> list[float]:
    """Reward of one sampled response for each held-out prompt (4 samples each), temperature 1."""
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    tokenizer = AutoTokenizer.from_pretrained(policy)
    rows = [json.loads(line) for line in open(world_folder / "prompts_test.jsonl")] * 4
    torch.manual_seed(seed)
    prompts = [row["prompt"] for row in rows]
    texts = sample(model, tokenizer, prompts, MAX_NEW_TOKENS[world], title="grading")
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
    return REWARDS[world](prompts, texts, **columns)
