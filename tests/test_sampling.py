"""Rollouts: who samples and when, from what distribution, for which prompts, and what the reward is given."""

import copy
import itertools
import json
import math
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import common
import humanline_dpo as dpo
import humanline_grpo as grpo
import humanline_kto as kto
import toy_world
from common import BadInput
from conftest import example, make_rows, plain, write_jsonl

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
    return columns["solution"]

def shortage(prompts, completions, **columns):
    raise __import__("torch").OutOfMemoryError

def unreadable(prompts, completions, **columns):
    pass

unreadable.usable = lambda row: row["solution"]

def from_the_fourth(prompts, completions, answer, **columns):
    """Rewards of the prompts 0, 1, 2 and 3 are equal."""
    return tell(prompts, completions, {"answer": answer}, [i * (int(a) > 3) for i, a in enumerate(answer)])

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
    sys.modules.pop("reward", None)  # of another test's folder

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

    def sample_and_tell(model, rollouts, updates, args):
        samplers[len(weights)] = updates, snapshot(model)
        return sample(model, rollouts, updates, args)

    seen = spy(script)
    monkeypatch.setattr(script, "accumulate_gradient", accumulate_and_tell)
    monkeypatch.setattr(script, "sample_batches", sample_and_tell)
    online(script, "--sync_every", k, "--sample_every", n, "--steps", 17, "--lr", 1e-2, "--temperature", 0.7, reward="place")
    moving = AutoModelForCausalLM.from_pretrained(policy).eval()
    reference = copy.deepcopy(moving)
    for s in range(1, 18):
        reference.load_state_dict(weights[reference_of(s, k, n)])
        moving.load_state_dict(weights[s - 1])
        for examples, logratio, _ in seen[trained[s - 1] : (trained + [len(seen)])[s]]:
            with torch.no_grad():
                new, old = (common.response_logps(net, examples, 0.7)[0] for net in (moving, reference))
            torch.testing.assert_close(logratio, new - old, rtol=0, atol=1e-5)
            assert logratio.abs().max() == 0 or (k, n) != (0, 1)  # exactly on-policy
    drawn = {start: updates for start, (updates, _) in samplers.items()}
    assert drawn == {s: range(s, min(s + n, 17)) for s in range(0, 17, n)}
    for start, (_, by) in samplers.items():
        exact = weights[reference_of(start + 1, k, n)]
        assert all(torch.equal(by[name], exact[name]) for name in by)


def test_prompts_come_in_turn_and_held_out_ones_never(script, online, spy, tmp_path):
    """Update u takes its share of the prompts by number, whatever the rewards: no prompt again before all have come.
    Groups of equal rewards give DPO and KTO no row, and the others are dealt evenly to the updates of a stretch.
    GRPO: groups of 5 with a batch of 44 are 40 responses."""
    seen = spy(script)
    size = {dpo: 6, kto: 24, grpo: 44}[script]
    lines = online(script, "--steps", 5, "--sample_every", 2, "--batch_size", size, "--group_size", 5,
                   "--micro_tokens", 10**6, reward="half")  # fmt: skip
    held_out = {prompt for prompt, *_ in lines[0]["samples_greedy"]}
    calls = [call for call in lines_of(tmp_path / "calls.jsonl") if not held_out & set(call[0])]
    drawn = [prompt for prompts, *_ in calls for prompt, _ in itertools.groupby(prompts)]
    everything = {row["question"] for row in PROMPTS}
    share = {dpo: 6, kto: 5, grpo: 8}[script]
    assert len(held_out) == 2 and len(drawn) == 5 * share and [len(call[0]) for call in calls] == [10 * share] * 2 + [
        5 * share]  # fmt: skip
    assert set(drawn) == everything - held_out and drawn[22:] == drawn[:-22]  # round and round
    numbers = {row["question"]: int(row["answer"]) for row in PROMPTS}
    counts = [len(examples) for examples, _, _ in seen]
    expected = []
    for prompts, _, _, rewards in calls:  # one a stretch
        groups = [rewards[i : i + 5] for i in range(0, len(rewards), 5)]
        assert [len(set(group)) == 1 for group in groups] == [numbers[prompt] % 2 == 1 for prompt in prompts[::5]]
        rows = [{dpo: 2, kto: 4, grpo: 5}[script] for group in groups if script is grpo or len(set(group)) > 1]
        updates = len(groups) // share
        expected += [sum(rows[i::updates]) for i in range(updates)]
    assert counts == expected and len(counts) == 5 and min(counts) > 0
    if script is grpo:
        assert counts == [40] * 5
        rewards = [reward for *_, rewards in calls for reward in rewards]
        groups = [rewards[i : i + 5] for i in range(0, len(rewards), 5)]
        batches = [groups[0:16:2], groups[1:16:2], groups[16:32:2], groups[17:32:2], groups[32:]]
        for batch, line in zip(batches, lines[1:]):
            assert line["reward"] == pytest.approx(sum(map(sum, batch)) / 40)
            assert line["frac_zero_std"] == sum(len(set(group)) == 1 for group in batch) / 8


@pytest.mark.parametrize("script", [dpo, kto])
def test_no_update_is_empty(script, online, spy, tmp_path):
    """Of 24 prompts for 24 updates half give rows; an update without any takes the first group's. KTO: one prompt
    alone has no mismatched pairs, so that ẑ0 is 0."""
    seen = spy(script)
    more = ("--sample_every", 24, "--steps", 24, "--batch_size", 4 if script is kto else 1, "--eval_size", 0)
    lines = online(script, *more, "--lr", 1e-2, reward="half")
    ((prompts, _, columns, _),) = lines_of(tmp_path / "calls.jsonl")
    drawn = [prompt for prompt, number in zip(prompts[::4], columns["answer"][::4]) if int(number) % 2 == 0]
    tokenizer = toy_world.make_tokenizer()
    trained = [tokenizer.decode(examples[0].prompt[1:-2]) for examples, _, _ in seen]
    assert len(drawn) == 12 and trained == drawn + drawn[:1] * 12
    assert script is dpo or all(line["kl"] == 0 for line in lines[1:])


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
    args = dpo.parse_args(["--model", "-"])
    return tokenizer, [list(common.encode(tokenizer, {"prompt": text}, None, args).prompt) for text in texts]


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
        examples, texts = common.sample_responses(model, tokenizer, prompts, 8, temperature, 16)
        found.append((plain(examples), texts))
        assert model.generation_config is config  # its own
    assert found[0] == found[1]


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_samples_are_drawn_from_the_policy(policy, temperature):
    tokenizer, prompts = prompt_ids(policy, *["abc"] * 4000)
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    torch.manual_seed(0)
    examples, _ = common.sample_responses(model, tokenizer, prompts, 2, temperature, 4000)
    first = torch.tensor([e.response[0] for e in examples])
    with torch.no_grad():
        exact = (model(torch.tensor([prompts[0]])).logits[0, -1] / temperature).softmax(-1)
    assert (torch.bincount(first, minlength=len(exact)) / 4000 - exact).abs().max() < 0.02
    assert exact.max() > 0.05


def test_the_temperature_is_the_flag_s(script, online, spy, tmp_path):
    """Near 0 all samples are greedy ones, of the evaluation and of the training."""
    seen = spy(script)
    first = online(script, "--temperature", 1e-4, "--steps", 1, reward="place")[0]
    assert first["samples_greedy"] == first["samples_sampled"] and len(first["samples_greedy"]) == 2
    groups = {}
    for e in (e for examples, _, _ in seen for e in examples):
        groups.setdefault(e.prompt, []).append(e.response)
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
        if raw:
            tokenizer.chat_template = None
        examples, texts = common.sample_responses(model, tokenizer, prompts, 12, 1.0, 300)
        responses = [e.response for e in examples]
        assert stops == {ids[-1] for ids in responses if len(ids) < 12}
        assert not stops & {token for ids in responses for token in ids[:-1]}
        assert all(len(ids) == 12 or ids[-1] in stops for ids in responses)
    assert not any("<|" in text for text in texts)


def test_neither_padding_nor_the_mode_matters(policy):
    """Greedy responses to prompts of several lengths, in parts; the model stays in its mode, with its weights."""
    tokenizer, prompts = prompt_ids(policy, "abcdef", "a", "abc")
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    alone = [plain(common.sample_responses(model, tokenizer, [ids], 8, 0.0, 1)[0])[0] for ids in prompts]
    for training, batch_size in ((True, 3), (False, 2)):
        model.train(training)
        examples, texts = common.sample_responses(model, tokenizer, prompts, 8, 0.0, batch_size)
        assert plain(examples) == alone and model.training == model.base_model.layers[0].training == training
        assert all(weight.requires_grad and weight.dtype == torch.float32 for weight in model.parameters())
    assert [list(e.prompt) for e in examples] == prompts
    assert texts == [tokenizer.decode(e.response, skip_special_tokens=True) for e in examples]
    tokenizer.pad_token = None
    assert plain(common.sample_responses(model, tokenizer, prompts, 8, 0.0, 3)[0]) == alone


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
        {"prompt": "abc", "chosen": [user, answer], "rejected": [user, other]},
    ):  # fmt: skip
        (found,) = script.encode_prompt_row(tokenizer, len, args, row)
        texts = [tokenizer.decode(found.examples[0].prompt)]
        if "chosen" in row and script is not grpo:
            texts += [tokenizer.decode(r.examples[0].prompt) for r in script.encode_row(tokenizer, None, args, row)]
        head = f"<|system|>{system}<|end|>" if system else ""
        assert set(texts) == {head + "<|user|>abc<|end|><|assistant|>"}


@pytest.mark.parametrize("sampled", [False, True])
def test_the_system_prompt_is_read_in_a_run(script, run, online, spy, sampled):
    seen = spy(script)
    (online if sampled else run)(script, "--system_prompt", "bad9", "--steps", 1)
    system = toy_world.make_tokenizer()("<|system|>bad9<|end|>", add_special_tokens=False)["input_ids"]
    assert all(e.ids[:6].tolist() == system and e.prompt_len > 6 for examples, _, _ in seen for e in examples)


# --- Rewards ---


def test_rows_of_a_group():
    examples = [example([1, i], 1) for i in range(4)]
    (pair,) = dpo.rows_of_group(examples, [0.0, 2.0, -1.0, 1.0])
    assert plain(pair.examples) == plain([examples[1], examples[2]])
    labelled = kto.rows_of_group(examples, [0.0, 2.0, 1.0, 1.0])
    assert [(row.examples[0].response, row.desirable) for row in labelled] == [([0], False), ([1], True)]
    assert [(row.examples[0].response, row.reward) for row in grpo.rows_of_group(examples, [0.7] * 4)] == [
        ([i], 0.7) for i in range(4)]  # fmt: skip
    for script in (dpo, kto):
        assert script.rows_of_group(examples[:3], [0.7] * 3) == []


@pytest.mark.parametrize("form", ["texts", "messages"])
def test_the_reward_gets_what_trl_gives(script, online, tmp_path, form):
    """Texts for texts, conversations for conversations, and the other columns as lists."""
    rows = [{"prompt": row["question"], "answer": row["answer"], "completion": "x"} for row in PROMPTS]
    if form == "messages":
        rows = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    lines = online(script, "--data", path, "--steps", 1, reward="place")
    answers = {json.dumps(row["prompt"]): row["answer"] for row in rows}
    calls = lines_of(tmp_path / "calls.jsonl")
    for prompts, completions, columns, _ in calls:
        ids = columns.pop("completion_ids")
        assert columns == {"answer": [answers[json.dumps(prompt)] for prompt in prompts], "completion": ["x"] * len(ids),
                           "prompt": prompts}  # fmt: skip
        assert len(completions) == len(prompts) == len(ids)
        if form == "messages":
            assert all(len(c) == 1 and c[0].keys() == {"role", "content"} for c in completions)
            assert all(c[0]["role"] == "assistant" for c in completions)
            completions = [c[0]["content"] for c in completions]
        assert all(isinstance(text, str) and "<|" not in text for text in completions)
        assert completions == toy_world.make_tokenizer().batch_decode(ids, skip_special_tokens=True)
    assert [prompt for prompt, *_ in lines[0]["samples_greedy"]] == calls[0][0]


def test_evaluation_by_rewards(script, run, policy, tmp_path):
    """Offline with a reward: means over greedy responses, computed here, and over sampled ones."""
    (tmp_path / "reward.py").write_text(REWARD)
    sys.modules.pop("reward", None)
    lines = run(script, "--reward", f"{tmp_path / 'reward.py'}:length", "--max_new_tokens", 8, "--eval_every", 2,
                "--lr", 1e-2)  # fmt: skip
    names = {"samples_greedy", "samples_sampled", "eval_reward_greedy", "eval_reward_sampled"}
    assert [len(names & line.keys()) for line in lines] == [4, 0, 4, 0, 4]
    for line in lines[::2]:
        for mode in ("greedy", "sampled"):
            samples = line[f"samples_{mode}"]
            assert len(samples) == 4 and all(reward == len(text) % 7 for _, text, reward in samples)
            assert line[f"eval_reward_{mode}"] == pytest.approx(sum(reward for *_, reward in samples) / 4)
    for folder, line in ((policy, lines[0]), (tmp_path / "run" / "final", lines[4])):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        for prompt, text, _ in line["samples_greedy"]:
            tokenizer, (ids,) = prompt_ids(policy, prompt)
            start = len(ids)
            while len(ids) < start + 8 and (len(ids) == start or ids[-1] != 1):
                with torch.no_grad():
                    ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
            assert text == tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_the_screen_shows_no_samples(script, online, capsys):
    assert "samples_greedy" in online(script, "--steps", 1)[1]
    assert "samples" not in capsys.readouterr().out


@pytest.mark.parametrize("reward, words", [
    ("none", "not 'NoneType'"), ("nan", "8 rewards for 8 responses, or not all finite"),
    ("inf", "or not all finite"), ("few", "1 rewards for 8 responses"), ("missing", "no attribute 'missing'"),
])  # fmt: skip
def test_what_a_reward_returns_is_checked(online, reward, words):
    with pytest.raises(BadInput) as error:
        online(grpo, "--eval_size", 0, reward=reward)
    assert words in str(error.value) and f":{reward}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("reward, error", [("raises", KeyError), ("shortage", torch.OutOfMemoryError), ("unreadable", KeyError)])
def test_what_a_reward_raises_is_its_own(online, reward, error):
    """The traceback with its kind and line is what its author needs."""
    with pytest.raises(error) as raised:
        online(dpo, reward=reward)
    assert raised.traceback[-1].path.name == "reward.py"


def test_what_a_reward_s_file_raises_is_its_own(run, tmp_path):
    (tmp_path / "broken.py").write_text("import nowhere\n")
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        run(dpo, "--sample_every", 1, "--reward", f"{tmp_path}/broken.py:f")


@pytest.mark.parametrize("name", ["math.py", "common.py", "re.py", "reward.v2.py"])
def test_a_reward_s_file_that_python_would_mistake_is_refused(run, tmp_path, name):
    """Under a name of its own a process that is spawned would not find it."""
    (tmp_path / name).write_text("def f(completions, **columns):\n    return [0.0] * len(completions)\n")
    with pytest.raises(BadInput, match=f"another module has that name; rename {name}"):
        run(dpo, "--sample_every", 1, "--reward", f"{tmp_path / name}:f")


@pytest.mark.parametrize("script", [dpo, kto])
def test_where_all_rewards_are_equal_the_next_prompts_are_drawn(script, online, capsys, tmp_path):
    """22 prompts in the order of drawing, three updates of one: what no group of an update teaches is passed by, with
    one line each; only when all prompts have been drawn in vain does the run end."""
    more = ("--batch_size", 1 if script is dpo else 4, "--steps", 3, "--eval_size", 0)
    lines = online(script, *more, reward="from_the_fourth")
    drawn = [int(columns["answer"][0]) for _, _, columns, _ in lines_of(tmp_path / "calls.jsonl")]
    assert len(lines) == 4 and sum(number > 3 for number in drawn) == 3  # each update has its prompt
    said = capsys.readouterr().out.count("rewards are equal within all 1 groups; the next prompts are drawn")
    assert said == len(drawn) - 3
    with pytest.raises(BadInput, match="--reward .*:equal: equal within all groups; take other prompts"):
        online(script, *more, "--overwrite", reward="equal")
    assert capsys.readouterr().out.count("the next prompts are drawn") == 24


def test_held_out_prompts_without_room_are_not_sampled(script, run, data, tmp_path):
    """Offline too: max_new_tokens more would leave the context."""
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [row | {"prompt": row["prompt"] + "a" * (30 * (i % 2))} for i, row in enumerate(lines_of(data[script.__name__[10:]]))]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    first = run(script, "--data", path, "--reward", f"{tmp_path / 'reward.py'}:length", "--max_new_tokens", 40,
                "--eval_size", 8, "--steps", 1)[0]  # fmt: skip
    sampled = {prompt for prompt, *_ in first["samples_greedy"]}
    assert 0 < len(sampled) < 8 and all(len(prompt) < 30 for prompt in sampled)


def test_rows_whose_answer_the_reward_cannot_read_are_dropped_and_counted(online, tmp_path, capsys):
    online(grpo, "--steps", 3, reward="readable")
    assert "prompts.jsonl: 23 rows, 0 responses cut; dropped: 0 too long, 1 of no use" in capsys.readouterr().out
    calls = lines_of(tmp_path / "calls.jsonl")
    assert "5" not in {answer for *_, columns, _ in calls for answer in columns["answer"]}


def test_sampling_needs_a_reward_and_room(run, online, tmp_path):
    for flags, words in ((), "FILE.py:FUNCTION of a file .* not None"), (("--reward", "x.py:f"), "FUNCTION .* not x.py:f"):
        with pytest.raises(BadInput, match=words):
            run(dpo, "--sample_every", 1, *flags)
    with pytest.raises(BadInput, match="0 rows fill no batch; .* 24 were too long: raise --max_length or lower --max_new_tok"):
        online(dpo, "--max_new_tokens", 60)
    assert not (tmp_path / "run").exists()
