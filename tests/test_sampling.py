"""Online: who samples, who scores and when; rewards that fail; resume inside a stretch."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import common
import humanline_dpo
import humanline_grpo
import humanline_kto
from common import BadInput
from conftest import make_rows, metrics_of, write_jsonl

REWARD = '''
import math
seen = []

def length(prompts, completions, **columns):
    seen.append((prompts, completions, columns))
    return [float(len(text) % 7) for text in completions]

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

def usable(prompts, completions, **columns):
    return length(prompts, completions, **columns)

usable.usable = lambda columns: columns["answer"] != "5"
'''


@pytest.fixture
def online(run, tmp_path):
    """online(script, "--lr", 1): a short run on samples."""
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [{"question": row["prompt"], "answer": str(i)} for i, row in enumerate(make_rows("dpo", 24))]
    path = write_jsonl(tmp_path / "prompts.jsonl", rows)

    def start(script, *more, reward="length"):
        return run(script, "--data", path, "--reward", f"{tmp_path / 'reward.py'}:{reward}", "--max_new_tokens", 8,
                   "--group_size", 4, "--sample_every", 1, "--eval_size", 2, *more)  # fmt: skip

    return start


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

    def accumulate_and_tell(model, batch, args):
        weights.append(snapshot(model))  # weights[s - 1] is θ_{s-1}
        trained.append(len(seen))
        return accumulate(model, batch, args)

    def sample_and_tell(model, tokenizer, reward, prompts, step, *more):
        samplers[step] = snapshot(model)
        return sample(model, tokenizer, reward, prompts, step, *more)

    seen = spy(script)
    monkeypatch.setattr(script, "accumulate_gradient", accumulate_and_tell)
    monkeypatch.setattr(script, "sample_batches", sample_and_tell)
    online(script, "--sync_every", k, "--sample_every", n, "--steps", 17, "--lr", 1e-2, "--temperature", 0.7)
    reference = AutoModelForCausalLM.from_pretrained(policy).eval()
    moving = copy.deepcopy(reference)
    for s in range(1, 18):
        reference.load_state_dict(weights[reference_of(s, k, n)])
        moving.load_state_dict(weights[s - 1])
        for examples, logratio, _ in seen[trained[s - 1] : (trained + [len(seen)])[s]]:
            with torch.no_grad():
                exact = common.response_logps(moving, examples, 0.7)[0] - common.response_logps(reference, examples, 0.7)[0]
            torch.testing.assert_close(logratio, exact, rtol=0, atol=1e-5)
    assert sorted(samplers) == list(range(0, 17, n))
    for step, by in samplers.items():
        exact = weights[reference_of(step + 1, k, n)]
        assert all(torch.equal(by[name], exact[name]) for name in by)


def test_on_policy_the_ratio_is_exactly_1(script, online, tmp_path):
    online(script, "--sync_every", 0, "--lr", 1e-2, "--steps", 5)
    assert all(m["abs_logratio"] == 0 for m in metrics_of(tmp_path / "run")[1:])


@pytest.mark.parametrize("more", [(), ("--sync_every", 3), ("--sync_every", 0)], ids=str)
def test_resume_inside_a_stretch_is_bitwise(script, online, tmp_path, more):
    from test_faults import lines, same, state, stop_after

    more = (*more, "--sample_every", 4, "--steps", 10, "--save_every", 100, "--eval_every", 3)
    whole = online(script, *more, "--output_dir", tmp_path / "whole")
    stop_after(script, online, 6, *more)
    summary = online(script, *more, "--resume")
    assert same(state(tmp_path / "run", 10), state(tmp_path / "whole", 10))
    assert lines(tmp_path / "run") == lines(tmp_path / "whole") and summary["after"] == whole["after"]
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("run", "whole")]
    assert samples[0] == samples[1] and samples[0].count("\n") == 5 * 2 * 2  # evaluations, modes, prompts


@pytest.mark.parametrize("reward, words", [
    ("raises", "raised RuntimeError('boom')"), ("none", "None for response 0"), ("nan", "nan for response 0"),
    ("inf", "inf for response 0"), ("few", "1 values, "), ("missing", "no function 'missing'"),
])  # fmt: skip
def test_rewards_that_fail_are_named(script, online, reward, words):
    with pytest.raises(BadInput) as error:
        online(script, reward=reward)
    assert words in str(error.value) and f":{reward}: " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("script", [humanline_dpo, humanline_kto])
def test_equal_rewards_end_with_an_error(script, online):
    with pytest.raises(script.Stopped, match="rewards within groups are equal"):
        online(script, reward="equal")


def test_the_reward_gets_what_trl_gives(online, tmp_path, monkeypatch):
    load, found = humanline_grpo.load_reward, []
    monkeypatch.setattr(humanline_grpo, "load_reward", lambda name: found.append(load(name)) or found[-1])
    online(humanline_grpo, "--steps", 1)
    prompts, completions, columns = found[0].__globals__["seen"][-1]
    assert len(prompts) == len(completions) == len(columns["answer"]) == len(columns["question"])
    assert all(isinstance(x, str) for x in prompts + completions) and columns["question"] == prompts


def test_rows_whose_answer_the_reward_cannot_read_are_counted(online, capsys):
    online(humanline_grpo, "--steps", 1, reward="usable")
    assert "23 prompts kept, 1 dropped (1: the reward can read no answer" in capsys.readouterr().out


def test_rows_of_a_group():
    examples = [common.Example([1, i], 1) for i in range(4)]
    (pair,) = humanline_dpo.rows_of_group(examples, [0.0, 2.0, -1.0, 1.0], 0)
    assert pair.examples == [examples[1], examples[2]]
    assert humanline_dpo.rows_of_group(examples, [0.7] * 4, 0) == []
    labelled = humanline_kto.rows_of_group(examples, [0.0, 2.0, 1.0, 1.0], 0)
    assert [(row.examples[0], row.desirable) for row in labelled] == [(examples[0], False), (examples[1], True)]
    assert humanline_kto.rows_of_group(examples[:3], [0.7] * 3, 0) == []
    scored = humanline_grpo.rows_of_group(examples, [1.0, 0.0, 0.0, 1.0], 5)
    assert [row.group for row in scored] == [5] * 4 and scored[0].advantage > 0 > scored[1].advantage


def test_a_checkpoint_s_generation_config_does_not_change_what_is_sampled(policy):
    """top_k = 1 and a repetition penalty in the checkpoint: the samples are still from π_θ."""
    script, tokenizer = humanline_grpo, AutoTokenizer.from_pretrained(policy)
    args = script.parse_args(["--model", "x", "--data", "x", "--max_new_tokens", "8", "--temperature", "1.0"])
    prompts = [script.Prompt(common.encode_prompt(tokenizer, "abc"), "abc", {})] * 4000
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    model.generation_config = GenerationConfig(top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=9.0, do_sample=True)
    args.gen_batch = 4000
    torch.manual_seed(0)
    examples = script.generate(model, tokenizer, prompts, args)
    first = torch.tensor([e.ids[e.prompt_len] for e in examples])
    with torch.no_grad():
        exact = model(torch.tensor([prompts[0].ids])).logits[0, -1].softmax(-1)
    frequency = torch.bincount(first, minlength=len(exact)) / len(first)
    assert (frequency - exact).abs().max() < 0.03
    ends = [1 in e.ids[e.prompt_len :] for e in examples]  # <|end|> is kept, and nothing after it
    assert all(e.ids[e.prompt_len :].index(1) == len(e.ids) - e.prompt_len - 1 for e, end in zip(examples, ends) if end)
    assert all(len(e.ids) - e.prompt_len == 8 for e, end in zip(examples, ends) if not end)


def test_left_padding_does_not_change_greedy_responses(policy):
    script, tokenizer = humanline_grpo, AutoTokenizer.from_pretrained(policy)
    args = script.parse_args(["--model", "x", "--data", "x", "--max_new_tokens", "8"])
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    prompts = [script.Prompt(common.encode_prompt(tokenizer, "abcdef"[:n]), "", {}) for n in (6, 1, 3)]
    together = script.generate(model, tokenizer, prompts, args, greedy=True)
    alone = [script.generate(model, tokenizer, [p], args, greedy=True)[0] for p in prompts]
    assert together == alone


def test_offline_with_a_reward_evaluates_the_policy(run, tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)
    summary = run(humanline_dpo, "--reward", f"{tmp_path / 'reward.py'}:length", "--max_new_tokens", 8)
    assert {"eval_loss", "eval_reward_greedy", "eval_reward_sampled"} <= set(summary["after"])


def test_sampling_needs_a_reward_and_room(run, script):
    with pytest.raises(BadInput, match="--sample_every: needs --reward"):
        run(script, "--sample_every", 1)
    with pytest.raises(BadInput, match="--max_new_tokens 64: must be below --max_length 64"):
        run(script, "--sample_every", 1, "--reward", "x.py:f", "--max_new_tokens", 64)
    with pytest.raises(BadInput, match="no file 'x.py'"):
        run(script, "--sample_every", 1, "--reward", "x.py:f", "--max_new_tokens", 8)
