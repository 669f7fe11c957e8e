"""Rollouts: who samples and when, from what distribution, for which prompts, and what the reward is given."""

import copy
import itertools
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import common
import humanline_dpo as dpo
import humanline_grpo as grpo
import humanline_kto as kto
import toy_world
from common import BadInput
from conftest import make_rows, write_jsonl

REWARD = '''
import json, math
from pathlib import Path

def length(prompts, completions, **columns):
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return tell(prompts, completions, columns, [float(len(text) % 7) for text in texts])

def place(prompts, completions, **columns):
    return tell(prompts, completions, columns, [float(i) for i, _ in enumerate(prompts)])

def half(prompts, completions, answer, **columns):
    """Groups of every other prompt have equal rewards."""
    rewards = [0.7 if int(number) % 2 else float(i) for i, number in enumerate(answer)]
    return tell(prompts, completions, {"answer": answer} | columns, rewards)

def tell(*call):
    with open(Path(__file__).with_name("calls.jsonl"), "a") as file:
        file.write(json.dumps(call) + "\\n")
    return call[-1]

def raises(prompts, completions, **columns):
    raise RuntimeError("boom")

def none(prompts, completions, **columns):
    return [None for _ in completions]

def nan(prompts, completions, **columns):
    return [math.nan for _ in completions]

def inf(prompts, completions, **columns):
    return [math.inf for _ in completions]

def few(prompts, completions, **columns):
    return [1.0]

def equal(prompts, completions, **columns):
    return [0.7 for _ in completions]

def readable(prompts, completions, **columns):
    return length(prompts, completions, **columns)

readable.usable = lambda row: row["answer"] != "5"
'''
PROMPTS = [{"question": row["prompt"], "answer": str(i)} for i, row in enumerate(make_rows("dpo", 24))]


@pytest.fixture
def online(run, tmp_path):
    """online(script, "--lr", 1): the metrics of a short run on samples."""
    (tmp_path / "reward.py").write_text(REWARD)
    path = write_jsonl(tmp_path / "prompts.jsonl", PROMPTS)

    def start(script, *more, reward="length"):
        return run(script, "--data", path, "--reward", f"{tmp_path / 'reward.py'}:{reward}", "--max_new_tokens", 8,
                   "--group_size", 4, "--sample_every", 1, "--eval_size", 2, *more)  # fmt: skip

    return start


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- Who samples, and what the samples meet ---


def reference_of(s, k, n):
    """METHOD, section 1: the update after which the weights score the batch of update s."""
    m = (s - 1) // n
    if k == 0:
        return m * n
    j = (s - m * n - 1) // k
    return max(0, m * n + j * k - 1)


@pytest.mark.parametrize("k, n", [(1, 8), (4, 8), (3, 8), (12, 1), (0, 1), (0, 4)])
def test_the_timeline_of_sampling_and_syncing(script, online, spy, monkeypatch, policy, k, n):
    """Every log-ratio against a second model with the weights that the formula names, and who sampled."""
    weights, trained, samplers = [], [], {}
    accumulate, sample = script.accumulate_gradient, script.sample_batches

    def snapshot(model):
        return {name: weight.clone() for name, weight in model.state_dict().items()}

    def accumulate_and_tell(model, batch, mode, args):
        weights.append(snapshot(model))  # weights[s - 1] is θ_{s-1}
        trained.append(len(seen))
        return accumulate(model, batch, mode, args)

    def sample_and_tell(model, rollouts, count, args):
        samplers[len(weights)] = count, snapshot(model)
        return sample(model, rollouts, count, args)

    seen = spy(script)
    monkeypatch.setattr(script, "accumulate_gradient", accumulate_and_tell)
    monkeypatch.setattr(script, "sample_batches", sample_and_tell)
    online(script, "--sync_every", k, "--sample_every", n, "--steps", 17, "--lr", 1e-2, "--temperature", 0.7)
    moving = AutoModelForCausalLM.from_pretrained(policy).eval()
    moving.row_tokens = 2 * moving.config.hidden_size
    reference = copy.deepcopy(moving)
    for s in range(1, 18):
        reference.load_state_dict(weights[reference_of(s, k, n)])
        moving.load_state_dict(weights[s - 1])
        for examples, logratio, _ in seen[trained[s - 1] : (trained + [len(seen)])[s]]:
            with torch.no_grad():
                new, old = (common.response_logps(net, examples, 0.7)[0] for net in (moving, reference))
            torch.testing.assert_close(logratio, new - old, rtol=0, atol=1e-5)
            assert logratio.abs().max() == 0 or (k, n) != (0, 1)  # exactly on-policy
    assert {start: count for start, (count, _) in samplers.items()} == {s: min(n, 17 - s) for s in range(0, 17, n)}
    for start, (_, by) in samplers.items():
        exact = weights[reference_of(start + 1, k, n)]
        assert all(torch.equal(by[name], exact[name]) for name in by)


def test_prompts_come_in_turn_and_held_out_ones_never(script, online, spy, tmp_path):
    """No prompt again before all have come: in later updates, in later stretches, and where groups of equal
    rewards are replaced. GRPO: groups of 5 with a batch of 64 are 60 responses, and none is left over."""
    seen = spy(script)
    size = {dpo: 6, kto: 24, grpo: 64}[script]
    lines = online(script, "--steps", 5, "--sample_every", 2, "--batch_size", size, "--group_size", 5,
                   "--micro_tokens", 10**6, reward="half")  # fmt: skip
    held_out = {line["prompt"] for line in lines_of(tmp_path / "run" / "samples.jsonl")}
    calls = [call for call in lines_of(tmp_path / "calls.jsonl") if not held_out & set(call[0])]
    drawn = [prompt for prompts, *_ in calls for prompt, _ in itertools.groupby(prompts)]
    everything = {row["question"] for row in PROMPTS}
    assert len(held_out) == 2 and set(drawn) == everything - held_out and len(drawn) > 30
    assert drawn[22:] == drawn[:-22]  # round and round
    counts = [len(examples) for examples, _, _ in seen]
    assert counts == [{dpo: 12, kto: 24, grpo: 60}[script]] * 5
    if script is grpo:
        assert sum(len(rewards) for *_, rewards in calls) == 300
        rewards = [reward for *_, rewards in calls for reward in rewards]
        for i, line in enumerate(lines[1:]):
            part = rewards[60 * i : 60 * i + 60]
            equal = sum(len(set(part[j : j + 5])) == 1 for j in range(0, 60, 5))
            assert line["reward"] == pytest.approx(sum(part) / 60) and line["frac_zero_std"] == equal / 12 > 0


@pytest.mark.parametrize("epochs", [1, 2])
def test_an_epoch_is_every_prompt_once(script, flags, online, tmp_path, epochs, monkeypatch):
    """22 prompts: 8 to an update of DPO's, one to a group of 4 in the others' 8 responses."""
    main = script.main
    monkeypatch.setattr(script, "main", lambda args: (setattr(args, "steps", None), main(args)))
    lines = online(script, "--epochs", epochs, reward="place")
    assert lines[-1]["step"] == math.ceil(22 * epochs / (8 if script is dpo else 2))


# --- From what distribution ---


def prompt_ids(policy, *texts):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    return tokenizer, [common.encode_prompt(tokenizer, text)[0] for text in texts]


def odd_config():
    """Everything that generate would take from a checkpoint."""
    return GenerationConfig(
        top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=9.0, epsilon_cutoff=0.2, do_sample=True,
        suppress_tokens=list(range(5, 15)), bad_words_ids=[[20]], no_repeat_ngram_size=1, min_new_tokens=5,
        exponential_decay_length_penalty=(0, 3.0), eos_token_id=1,
    )  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_checkpoint_s_generation_config_changes_no_sample(policy, temperature):
    tokenizer, prompts = prompt_ids(policy, *["abc", "d"] * 20)
    model, found = AutoModelForCausalLM.from_pretrained(policy).eval(), []
    for config in (model.generation_config, odd_config()):
        model.generation_config = config
        torch.manual_seed(0)
        found.append(common.sample_responses(model, tokenizer, prompts, 8, temperature, 16))
        assert model.generation_config is config  # it is put back
    assert found[0] == found[1]


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_samples_are_drawn_from_the_policy(policy, temperature):
    tokenizer, prompts = prompt_ids(policy, *["abc"] * 4000)
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    torch.manual_seed(0)
    examples, _ = common.sample_responses(model, tokenizer, prompts, 2, temperature, 4000)
    first = torch.tensor([e.ids[e.prompt_len] for e in examples])
    with torch.no_grad():
        exact = (model(torch.tensor([prompts[0]])).logits[0, -1] / temperature).softmax(-1)
    assert (torch.bincount(first, minlength=len(exact)) / 4000 - exact).abs().max() < 0.02
    assert exact.max() > 0.05


def test_the_temperature_is_the_flag_s(script, online, spy, tmp_path):
    """Near 0 all samples are greedy ones, of the evaluation and of the training."""
    seen = spy(script)
    online(script, "--temperature", 1e-4, "--steps", 1, reward="place")
    samples = lines_of(tmp_path / "run" / "samples.jsonl")[:4]
    assert [(line["step"], line["mode"]) for line in samples] == [(0, "greedy")] * 2 + [(0, "sampled")] * 2
    assert [line["response"] for line in samples[:2]] == [line["response"] for line in samples[2:]]
    groups = {}
    for e in (e for examples, _, _ in seen for e in examples):
        groups.setdefault(tuple(e.ids[: e.prompt_len]), []).append(e)
    assert len(groups) == (8 if script is dpo else 2)
    assert all(len(group) > 1 and len(set(map(str, group))) == 1 for group in groups.values())


def test_a_response_ends_at_the_first_of_all_end_tokens(policy):
    """The checkpoint's several, the tokenizer's and the template's end of turn; raw, not the template's."""
    tokenizer, prompts = prompt_ids(policy, *["abc"] * 300)
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    model.generation_config.eos_token_id = [9, 11]
    tokenizer.eos_token = "4"
    four, end = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")
    for raw, stops in ((False, {9, 11, four, end}), (True, {9, 11, four})):
        examples, texts = common.sample_responses(model, tokenizer, prompts, 12, 1.0, 300, raw)
        responses = [e.ids[e.prompt_len :] for e in examples]
        assert stops == {ids[-1] for ids in responses if len(ids) < 12}
        assert not stops & {token for ids in responses for token in ids[:-1]}
        assert all(len(ids) == 12 or ids[-1] in stops for ids in responses)
    assert not any("<|" in text for text in texts)


def test_neither_padding_nor_the_mode_matters(policy):
    """Greedy responses to prompts of several lengths, in parts; the model is back in its mode afterwards."""
    tokenizer, prompts = prompt_ids(policy, "abcdef", "a", "abc")
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    alone = [common.sample_responses(model, tokenizer, [ids], 8, 0.0, 1)[0][0] for ids in prompts]
    for training, batch_size in ((True, 3), (False, 2)):
        model.train(training)
        examples, texts = common.sample_responses(model, tokenizer, prompts, 8, 0.0, batch_size)
        assert examples == alone and model.training == model.base_model.layers[0].training == training
    assert [e.ids[: e.prompt_len] for e in examples] == prompts
    assert texts == [tokenizer.decode(e.ids[e.prompt_len :], skip_special_tokens=True) for e in examples]
    tokenizer.pad_token = None
    assert common.sample_responses(model, tokenizer, prompts, 8, 0.0, 3)[0] == alone


# --- Prompts ---


@pytest.mark.parametrize("system", [None, "be 9"])
def test_every_form_of_a_prompt_is_the_same_tokens(script, policy, system):
    """For sampling and for training alike; the system message comes first."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    args = script.parse_args(["--model", "x", *(["--system_prompt", system] if system else [])])
    user, answer = {"role": "user", "content": "abc"}, {"role": "assistant", "content": "d"}
    other = {"role": "assistant", "content": "e"}
    for row in (
        {"prompt": "abc"}, {"question": "abc"}, {"problem": "abc"}, {"prompt": [user]},
        {"prompt": "abc", "chosen": [answer], "rejected": [other]},
        {"prompt": "abc", "chosen": "d", "rejected": "e"},
        {"prompt": "other", "chosen": [user, answer], "rejected": [user, other]},
    ):  # fmt: skip
        (found,) = script.encode_prompt_row(tokenizer, len, args, row)
        texts = [tokenizer.decode(found.prompt)]
        if "chosen" in row and script is not grpo:
            texts += [tokenizer.decode(r.prompt) for r in script.encode_row(tokenizer, None, args, row)]
        head = f"<|system|>{system}<|end|>" if system else ""
        assert set(texts) == {head + "<|user|>abc<|end|><|assistant|>"}


@pytest.mark.parametrize("sampled", [False, True])
def test_the_system_prompt_is_read_in_a_run(script, run, online, spy, sampled):
    seen = spy(script)
    (online if sampled else run)(script, "--system_prompt", "bad9", "--steps", 1)
    system = toy_world.make_tokenizer()("<|system|>bad9<|end|>", add_special_tokens=False)["input_ids"]
    assert all(e.ids[:6] == system and e.prompt_len > 6 for examples, _, _ in seen for e in examples)


# --- Rewards ---


def test_rows_of_a_group():
    examples = [common.Example([1, i], 1) for i in range(4)]
    (pair,) = dpo.rows_of_group(examples, [0.0, 2.0, -1.0, 1.0])
    assert pair.examples == [examples[1], examples[2]]
    labelled = kto.rows_of_group(examples, [0.0, 2.0, 1.0, 1.0])
    assert [(row.examples[0], row.desirable) for row in labelled] == [(examples[0], False), (examples[1], True)]
    for script in (dpo, kto):
        assert script.rows_of_group(examples[:3], [0.7] * 3) == []


@pytest.mark.parametrize("form", ["texts", "messages"])
def test_the_reward_gets_what_trl_gives(script, online, tmp_path, form):
    """Texts for texts, conversations for conversations, and the other columns as lists."""
    rows = [{"prompt": row["question"], "answer": row["answer"], "completion": "x"} for row in PROMPTS]
    if form == "messages":
        rows = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    online(script, "--data", path, "--steps", 1, reward="place")
    answers = {json.dumps(row["prompt"]): row["answer"] for row in rows}
    calls = lines_of(tmp_path / "calls.jsonl")
    for prompts, completions, columns, _ in calls:
        assert columns == {"answer": [answers[json.dumps(prompt)] for prompt in prompts]}
        assert len(completions) == len(prompts)
        if form == "messages":
            assert all(len(c) == 1 and c[0].keys() == {"role", "content"} for c in completions)
            assert all(c[0]["role"] == "assistant" for c in completions)
            completions = [c[0]["content"] for c in completions]
        assert all(isinstance(text, str) and "<|" not in text for text in completions)
    samples = lines_of(tmp_path / "run" / "samples.jsonl")
    assert [line["prompt"] for line in samples[:2]] == calls[0][0]


def test_evaluation_by_rewards(script, run, policy, tmp_path):
    """Offline with a reward: means over greedy responses, computed here, and over sampled ones."""
    (tmp_path / "reward.py").write_text(REWARD)
    lines = run(script, "--reward", f"{tmp_path / 'reward.py'}:length", "--max_new_tokens", 8, "--eval_every", 2,
                "--lr", 1e-2)  # fmt: skip
    samples = lines_of(tmp_path / "run" / "samples.jsonl")
    assert [(line["step"], line["mode"]) for line in samples] == [
        (step, mode) for step in (0, 2, 4) for mode in ("greedy", "sampled") for _ in range(4)]  # fmt: skip
    for line in (lines[0], lines[2], lines[4]):
        for mode in ("greedy", "sampled"):
            rewards = [s["reward"] for s in samples if (s["step"], s["mode"]) == (line["step"], mode)]
            assert line[f"eval_reward_{mode}"] == pytest.approx(sum(rewards) / 4)
    assert all(s["reward"] == len(s["response"]) % 7 for s in samples)
    for folder, step in ((policy, 0), (tmp_path / "run" / "final", 4)):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        for line in samples:
            if (line["step"], line["mode"]) == (step, "greedy"):
                tokenizer, (ids,) = prompt_ids(policy, line["prompt"])
                start = len(ids)
                while len(ids) < start + 8 and (len(ids) == start or ids[-1] != 1):
                    with torch.no_grad():
                        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
                assert line["response"] == tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("reward, words", [
    ("raises", "boom"), ("none", "8 for 8 responses, not finite: [0, 1, 2"), ("nan", "not finite: [0, 1"),
    ("inf", "not finite: [0, 1"), ("few", "1 for 8 responses"), ("missing", ":missing: 'missing'"),
])  # fmt: skip
def test_rewards_that_fail_are_named(online, reward, words):
    with pytest.raises(BadInput) as error:
        online(grpo, "--eval_size", 0, reward=reward)
    assert words in str(error.value) and f":{reward}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("script", [dpo, kto])
def test_equal_rewards_end_with_an_error(script, online):
    with pytest.raises(BadInput, match="rewards are equal within groups"):
        online(script, reward="equal")


def test_rows_whose_answer_the_reward_cannot_read_are_dropped_and_counted(online, tmp_path, capsys):
    online(grpo, "--steps", 3, reward="readable")
    assert "prompts.jsonl: 23 rows; 1 dropped: too long or nothing to learn" in capsys.readouterr().out
    calls = lines_of(tmp_path / "calls.jsonl")
    assert "5" not in {answer for *_, columns, _ in calls for answer in columns["answer"]}


def test_sampling_needs_a_reward_and_room(run, online, tmp_path):
    for flags, words in ((), "--reward takes FILE.py:FUNCTION, not None"), (("--reward", "x.py:f"), "FUNCTION, not x.py:f"):
        with pytest.raises(BadInput, match=words):
            run(dpo, "--sample_every", 1, *flags)
    with pytest.raises(BadInput, match="0 rows fill no batch"):
        online(dpo, "--max_new_tokens", 60)
    assert not (tmp_path / "run").exists()
