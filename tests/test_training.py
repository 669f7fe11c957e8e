"""What is trained, against what reference, and that the cut into micro-batches changes nothing."""

import copy
import functools
import math
import random
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM
from transformers.models.opt.modeling_opt import OPTAttention

import common
import humanline_dpo as dpo
import humanline_grpo as grpo
import humanline_kto as kto
from conftest import SHARED, example, make_rows, write_jsonl

TIMES = {"seconds", "tokens_per_second", "peak_memory_gib"}
ONE_MICRO = ("--micro_tokens", 10**6)


def kind_of(script):
    return script.__name__.removeprefix("humanline_")


def load(policy):
    return AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()


def adamw(model, lr):
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)


def update(model, optimizer, loss, step, lr, warmup, sync=lambda: None):
    """One update as the scripts make it, with room for a sync between the gradient and the step."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.param_groups[0]["lr"] = lr * min(1.0, step / warmup)
    sync()
    optimizer.step()
    optimizer.zero_grad()


def read(script, policy, args):
    """All rows of --data as tokens."""
    return script.load_rows(args.data, args.max_rows, AutoTokenizer.from_pretrained(policy), None, args)[0]


def labelled(batch):
    """Without KTO's mismatched pairs."""
    return [row for row in batch if getattr(row, "desirable", True) is not None]


def advantages_of(rows):
    """Of GRPO's rows of whole groups, by hand."""
    groups = {}
    for row in rows:
        groups.setdefault(row.examples[0].prompt, []).append(row.reward)
    turn = {prompt: iter(grpo.group_advantages(rewards)) for prompt, rewards in groups.items()}
    return torch.tensor([next(turn[row.examples[0].prompt]) for row in rows])


@pytest.fixture
def trained(monkeypatch):
    """trained(script) -> list: the batch of every update."""

    def install(script):
        batches, accumulate = [], script.accumulate_gradient

        def accumulate_and_tell(model, batch, mode, args):
            if torch.is_grad_enabled():
                batches.append(batch)
            return accumulate(model, batch, mode, args)

        monkeypatch.setattr(script, "accumulate_gradient", accumulate_and_tell)
        return batches

    return install


# --- The reference ---

CLIPPED = ("--lr", 1e-2, "--log_eps_P=-0.2", "--log_eps_R=0.3", "--steps", 8, *ONE_MICRO)
OWN = {dpo: (), kto: ("--desirable_weight", 1.3, "--undesirable_weight", 0.8), grpo: ("--epsilon", 0.05)}


def with_second_model(script, policy, batches, args, k, late=False):
    """The definition: a reference model, whose weights are copied every k updates before the step (late,
    the mutant: after it). Returns each update's log-ratios of the trained responses, and KTO's ẑ0."""
    model, log_ratios, points = load(policy), [], []
    reference, optimizer = copy.deepcopy(model), adamw(model, 1e-2)
    for step, batch in enumerate(batches, 1):
        with torch.no_grad():
            ref_logps = [logp for _, logp, _ in script.policy_logps(reference, batch, args)]
        for (rows, logp, mask), ref_logp in zip(script.policy_logps(model, batch, args), ref_logps):
            z = logp - ref_logp
            perceived = torch.where(mask, z, 0.0).clamp(-0.2, 0.3)
            if script is dpo:
                loss = dpo.dpo_loss(perceived, mask, 0.5).mean()
            elif script is grpo:
                advantage = advantages_of(rows)
                loss = grpo.grpo_loss(z, perceived, mask, advantage, 0.05, 0.5).sum() / mask.sum()
            elif not labelled(rows):  # they come first
                points.append(max(0.0, perceived.detach().sum().item() / 8))
                continue
            else:
                good, point = torch.tensor([row.desirable for row in rows]), torch.tensor(points[-1])
                loss = kto.kto_loss(perceived, mask, good, point, 0.5, 1.3, 0.8).mean()
            log_ratios.append(z.detach())

        def sync():
            if k and step % k == 0:
                reference.load_state_dict(model.state_dict())

        update(model, optimizer, loss, step, 1e-2, 2, sync=lambda: late or sync())
        if late:
            sync()
    return log_ratios, points


@pytest.mark.parametrize("k", [1, 3, 7, 100, 0])
def test_the_cache_is_a_second_model_copied_before_the_update(script, run, spy, trained, flags, policy, k):
    seen, batches = spy(script), trained(script)
    more = ("--sync_every", k, *CLIPPED, *OWN[script])
    lines, args = run(script, *more), script.parse_args(flags(script, *more))
    exact, points = with_second_model(script, policy, batches, args, k)
    assert len(seen) == len(exact) == 8

    def difference(ratios):
        return max((ours - theirs).abs().max().item() for (_, ours, _), theirs in zip(seen, ratios))

    assert difference(exact) <= 1e-6
    assert max(z.abs().max() for z in exact) > 0.3  # the policy moved, and tokens were clipped
    if script is kto:
        assert [line["kl"] for line in lines[1:]] == pytest.approx(points, abs=1e-6) and max(points) > 0.01
    if 0 < k < 8:  # the mutant
        late, _ = with_second_model(script, policy, batches, args, k, late=True)
        assert difference(late) > 1e-3
        assert k > 1 or all(z.abs().max() == 0 for z in late)  # why it matters: nothing is ever clipped


def test_without_sync_and_clip_it_is_textbook_dpo(run, spy, policy):
    """20 updates against a DPO written with the model's own logits, row by row."""
    seen = spy(dpo)
    run(dpo, "--plain", "--steps", 20, *ONE_MICRO)
    model, reference = load(policy), load(policy)
    optimizer = adamw(model, 1e-3)

    def sequence_logp(net, example):
        ids = example.ids[None].long()
        logp = net(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        return logp[example.prompt_len - 1 :].sum()

    for step, (examples, logratio, _) in enumerate(seen, 1):
        with torch.no_grad():
            ref = torch.stack([sequence_logp(reference, example) for example in examples])
        z = torch.stack([sequence_logp(model, example) for example in examples]) - ref
        torch.testing.assert_close(logratio.sum(-1), z.detach(), rtol=1e-3, atol=2e-4)
        loss = -torch.log(torch.sigmoid(0.5 * (z[0::2] - z[1::2]))).mean()
        update(model, optimizer, loss, step, 1e-3, 2)
    assert step == 20 and z.abs().max() > 0.1


@pytest.mark.parametrize("micro_tokens", [10**6, 200, 60])
def test_the_first_update_is_its_own_reference(script, run, tmp_path, micro_tokens):
    """Exactly, with several rows of one prompt in a batch too."""
    rows = [row | {"prompt": f"abc{i % 12}"} for i, row in enumerate(make_rows(kind_of(script), 48))]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    first = run(script, "--data", path, "--steps", 1, "--micro_tokens", micro_tokens)[1]
    assert first["abs_logratio"] == 0 and first["unclipped"] == 1.0
    assert first["clipped_low"] == first["clipped_high"] == 0
    if script is not grpo:
        assert first["loss"] == pytest.approx({dpo: math.log(2), kto: 0.5}[script], abs=1e-7)
    assert first["accuracy"] == 0.5 if script is dpo else first["kl"] == 0


# --- One update ---


@pytest.mark.parametrize("mode", ["clip", "off"])
def test_the_cut_into_micro_batches_changes_nothing(script, run, spy, monkeypatch, tmp_path, mode):
    """8 rows at once, 4 + 4, 3 + 3 + 2 (through GRPO's groups), or as --micro_tokens cuts: losses, gradients, all
    metrics and the trained weights, of updates with a moved policy."""
    seen, runs, weights = spy(script), [], []
    for size in (8, 4, 3, None):
        if size:
            monkeypatch.setattr(script, "micro_batches", functools.partial(cut_evenly, size))
        else:
            monkeypatch.setattr(script, "micro_batches", common.micro_batches)
        seen.clear()
        runs.append(run(script, "--overwrite", "--steps", 3, "--lr", 1e-2, "--humanline", mode, "--micro_tokens", 40))
        weights.append(load(tmp_path / "run" / "final").state_dict())
        counts = [len(mask) // (2 if script is dpo else 1) for *_, mask in seen]
        assert counts == {8: [8], 4: [4, 4], 3: [3, 3, 2]}[size] * 3 if size else max(counts) < 3
    for ours, theirs in ((a, b) for other in runs[1:] for a, b in zip(runs[0], other)):
        for name in ours.keys() - TIMES:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
    for other in weights[1:]:
        assert max((weights[0][name] - w).abs().max() for name, w in other.items()) < 1e-4
    if script is kto:  # which would be invisible at ẑ0 = 0
        assert max(line["kl"] for line in runs[0][1:]) > 0.01


def cut_evenly(size, units, *more):
    return [list(range(len(units)))[i : i + size] for i in range(0, len(units), size)]


def test_what_is_trained_and_every_metric(script, run, spy, trained, tmp_path):
    """By hand from the log-ratios of the last update: the whole response with its end, the prompt never."""
    rows = make_rows(kind_of(script), 48)
    if script is grpo:  # some groups of equal rewards
        rows = [row | {"rewards": [0.5, 0.5]} if i % 2 else row for i, row in enumerate(rows)]
    seen, batches = spy(script), trained(script)
    last = run(script, "--data", write_jsonl(tmp_path / "rows.jsonl", rows), "--lr", 1e-2, "--sync_every", 0,
               "--log_eps_P=-0.2", "--log_eps_R=0.3", *OWN[script], *ONE_MICRO)[-1]  # fmt: skip
    for examples, _, mask in seen:
        assert mask.sum(-1).tolist() == [len(e.ids) - e.prompt_len for e in examples]
        assert all(e.response[-1] == 1 and e.prompt[-1] == 3 for e in examples)  # <|end|>, <|assistant|>
    (examples, logratio, mask), rows = seen[-1], labelled(batches[-1])
    z = logratio[mask]
    perceived = 0.5 * torch.where(mask, logratio, 0.0).clamp(-0.2, 0.3).sum(-1)
    expected = {
        "tokens": sum(len(e.ids) for e in examples), "abs_logratio": z.abs().mean(),
        "clipped_low": (z < -0.2).float().mean(), "clipped_high": (z > 0.3).float().mean(),
        "unclipped": ((z >= -0.2) & (z <= 0.3)).float().mean(),
    }  # fmt: skip
    if script is dpo:
        chosen, rejected = perceived[0::2], perceived[1::2]
        expected |= {
            "loss": -(chosen - rejected).sigmoid().log().mean(), "accuracy": (chosen > rejected).float().mean(),
            "reward_chosen": chosen.mean(), "reward_rejected": rejected.mean(),
            "margin": (chosen - rejected).mean(),
        }  # fmt: skip
    elif script is kto:
        good = torch.tensor([row.desirable for row in rows])
        gain = perceived - 0.5 * last["kl"]  # which the second model above has by hand
        losses = torch.where(good, 1.3 * (1 - gain.sigmoid()), 0.8 * (1 - (-gain).sigmoid()))
        means = perceived[good].mean(), perceived[~good].mean()
        expected |= {"kl": last["kl"], "loss": losses.mean(), "margin": means[0] - means[1],
                             "reward_desirable": means[0], "reward_undesirable": means[1]}  # fmt: skip
    else:
        rewards = torch.tensor([row.reward for row in rows])
        ratio = logratio.clamp(-0.2, 0.3).exp()
        advantage = advantages_of(rows)[:, None].expand_as(ratio)
        beyond = (ratio > 1.05) & (advantage > 0) | (ratio < 0.95) & (advantage < 0)
        surrogate = torch.min(ratio * advantage, ratio.clamp(0.95, 1.05) * advantage)[mask].mean()
        kl = ((-z).exp() - 1 + z).mean()
        differ = rewards[0::2] != rewards[1::2]
        expected |= {
            "loss": 0.5 * kl - surrogate, "kl": kl, "ppo_clipped": beyond[mask].float().mean(),
            "reward": rewards.mean(), "reward_std": rewards.std(correction=0),
            "frac_zero_std": 1 - differ.float().mean(), "gain": (advantage[mask] * z).mean(),
            "response_length": mask.sum() / 8,
        }  # fmt: skip
        assert 0 < expected["frac_zero_std"] < 1 and expected["ppo_clipped"] > 0.05 and expected["gain"].abs() > 0.01
    assert expected["clipped_low"] > 0 and expected["clipped_high"] > 0
    others = {"step", "lr", "grad_norm"} | TIMES
    found = {name: x for name, x in last.items() if name not in others and not name.startswith("eval")}
    assert found == pytest.approx({name: float(x) for name, x in expected.items()}, rel=1e-4, abs=1e-5)
    assert last["tokens_per_second"] == pytest.approx(last["tokens"] / last["seconds"])


def test_humanline_sampling_and_its_two_sides(script, run, monkeypatch):
    """γ_P rejects on the low side alone, γ_R on the high side: draws near 1 reject, draws near 0 do not."""
    perceive, found = script.perceive, []
    for gammas in ({"gamma_P": 1000, "gamma_R": 1e-6}, {"gamma_P": 1e-6, "gamma_R": 1000}, {}):
        monkeypatch.setattr(script, "perceive", functools.partial(perceive, **gammas))
        found.append(run(script, "--humanline", "sample", "--lr", 1e-2, "--overwrite")[-1])
    low, high, usual = found
    assert low["clipped_low"] > 0.5 and low["clipped_high"] == 0
    assert high["clipped_high"] > 0.5 and high["clipped_low"] == 0
    assert 0.01 < usual["clipped_low"] < 0.99  # by B_P ~ Beta(½, 1) of the authors


def test_small_updates_of_a_bf16_checkpoint_are_not_lost(run, policy, tmp_path):
    """bf16 weights would stand still: 20 updates with lr 1e-6 must move all that get a gradient."""
    load(policy).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(policy).save_pretrained(tmp_path / "half")
    run(dpo, "--model", tmp_path / "half", "--steps", 20, "--lr", 1e-6, "--plain")
    before = load(tmp_path / "half").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    torch.serialization.add_safe_globals([dpo.Row, common.Example])
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["optimizer"]["state"]
    moved = total = 0
    for i, (name, weight) in enumerate(after.named_parameters()):
        assert weight.dtype == torch.float32
        touched = state[i]["exp_avg_sq"] > 0
        moved += (before[name] != weight)[touched].sum().item()
        total += touched.sum().item()
    assert moved >= 0.99 * total > 10_000


def test_dropout_is_off_and_checkpointing_is_on(run, policy, tmp_path, monkeypatch):
    """OPT's layers ask self.training, which activation checkpointing needs: still as without dropout."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    calls, losses, counts, forward = [], [], [], OPTAttention.forward
    monkeypatch.setattr(OPTAttention, "forward", lambda *a, **more: (calls.append(1), forward(*a, **more))[1])
    for dropout, more in ((0.0, ()), (0.5, ("--activation_checkpointing",))):
        config = OPTConfig(vocab_size=len(tokenizer), hidden_size=32, ffn_dim=64, num_hidden_layers=2,
                           num_attention_heads=2, max_position_embeddings=256, word_embed_proj_dim=32,
                           init_std=0.1, pad_token_id=0, bos_token_id=1, eos_token_id=1, dropout=dropout,
                           attention_dropout=dropout, activation_dropout=dropout, layerdrop=dropout)  # fmt: skip
        torch.manual_seed(0)
        OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
        tokenizer.save_pretrained(tmp_path / "opt")
        calls.clear()
        lines = run(dpo, "--model", tmp_path / "opt", "--steps", 3, "--eval_size", 0, "--overwrite", *more)
        losses.append([line["loss"] for line in lines[1:]])
        counts.append(len(calls))
        assert lines[1]["abs_logratio"] == 0 < lines[2]["abs_logratio"]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert counts[1] > counts[0]  # layers ran again in the backward pass


def test_the_learning_rate(script, run):
    """A rise from the first update, then constant, or with --lr_decay down to 0 after the last update, which
    trains too."""
    constant = run(script, "--steps", 6, "--warmup", 4, "--lr", 0.008)
    assert [x["lr"] for x in constant[1:]] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.008, 0.008])
    decayed = run(script, "--steps", 6, "--warmup", 2, "--lr", 0.008, "--lr_decay", "--overwrite")
    assert [x["lr"] for x in decayed[1:]] == pytest.approx([0.004, 0.008, 0.0064, 0.0048, 0.0032, 0.0016])


# --- Data and evaluation ---


def test_a_ragged_batch_is_left_out_and_epochs_differ(script, flags, policy):
    args = script.parse_args(flags(script, "--batch_size", 11, "--epochs", 2))
    args.steps = None
    rows, size = read(script, policy, args), 10 if script is grpo else 11  # groups of two are whole
    batches = script.make_batches(rows, None, args)
    count = len(rows) // size
    assert [len(batch) for batch in batches] == [size] * 2 * count
    first, second = (list(map(str, sum(half, []))) for half in (batches[:count], batches[count:]))
    assert len(set(first)) == len(first) and first != second and first != list(map(str, rows))[: len(first)]
    args.steps = count + 1  # of as many epochs as it takes
    assert str(script.make_batches(rows, None, args)) == str(batches[: count + 1])


def test_held_out_prompts_are_never_trained_on(script, flags, policy, run, spy, tmp_path):
    """min(128, 5%) of the prompts, or those of --eval_data."""
    rows = make_rows(kind_of(script), 48)
    many = write_jsonl(tmp_path / "many.jsonl", rows + rows)  # every prompt twice
    other = write_jsonl(tmp_path / "other.jsonl", rows[:5])
    args = script.parse_args(flags(script, "--data", many))
    args.eval_size, found = None, read(script, policy, args)
    others = read(script, policy, script.parse_args(flags(script, "--data", other)))
    for given, size in (([], 2), (others, 5)):
        args.eval_data = other if given else None
        train, held_out = script.hold_out(found, given, args)
        prompts, rest = prompts_of(held_out), prompts_of(train)
        assert len(prompts) == size and not prompts & rest and prompts | rest == prompts_of(found)
    seen = spy(script)
    run(script, "--data", many, "--eval_data", other, "--eval_size", 5, "--steps", 24)
    trained = {e.prompt for examples, _, _ in seen for e in examples}
    assert 40 < len(trained) <= 43 and not trained & prompts_of(others)


def prompts_of(rows):
    return {row.examples[0].prompt for row in rows}


def test_evaluation_is_against_the_initial_policy(script, run, flags, policy, tmp_path):
    """Whatever k: computed here with two models from the saved files. KTO's loss is that of training: with a ẑ0 of
    mismatched pairs, of raw log-ratios, and the weights of the classes. GRPO: Σ A·log-ratio / tokens."""
    more = ("--sync_every", 2, "--lr", 1e-2, "--eval_size", 12, *OWN[script])
    lines, args = run(script, *more), script.parse_args(flags(script, *more))
    _, eval_rows = script.hold_out(read(script, policy, args), [], args)
    models = load(tmp_path / "run" / "final"), load(policy)

    def log_ratio(examples):
        with torch.no_grad():
            new, old = (common.response_logps(net, examples)[0].sum(-1) for net in models)
        return new - old

    z = torch.stack([log_ratio(row.examples) for row in eval_rows])  # (rows, 1), DPO's (rows, 2)
    if script is dpo:
        margin = 0.5 * (z[:, 0] - z[:, 1])
        before = {"eval_loss": math.log(2), "eval_accuracy": 0.5, "eval_margin": 0.0}
        after = {"eval_loss": -margin.sigmoid().log().mean(), "eval_accuracy": (margin > 0).float().mean(),
                 "eval_margin": margin.mean()}  # fmt: skip
    elif script is kto:
        ids = [(row.examples[0].prompt, row.examples[0].response) for row in eval_rows]  # prompts all differ
        crossed = [example([*a, *y], len(a)) for (a, _), (_, y) in zip(ids, ids[1:] + ids[:1])]
        point = max(0.0, sum(log_ratio([e]).item() for e in crossed) / 12)
        good, reward = torch.tensor([row.desirable for row in eval_rows]), z[:, 0]
        losses = torch.where(good, 1.3 * (1 - (0.5 * (reward - point)).sigmoid()),
                             0.8 * (1 - (0.5 * (point - reward)).sigmoid()))  # fmt: skip
        before = {"eval_loss": (1.3 * good.sum().item() + 0.8 * (~good).sum().item()) / 24, "eval_margin": 0.0}
        after = {"eval_loss": losses.mean(), "eval_margin": 0.5 * (reward[good].mean() - reward[~good].mean())}
        assert point > 0.05 and 0 < good.sum() < 12
    else:
        tokens = sum(len(row.examples[0].response) for row in eval_rows)
        before, after = {"eval_gain": 0.0}, {"eval_gain": (advantages_of(eval_rows) * z[:, 0]).sum() / tokens}
    first = {name: value for name, value in lines[0].items() if name != "seconds"}
    assert first == pytest.approx({"step": 0} | before)
    found = {name: value for name, value in lines[-1].items() if name.startswith("eval")}
    assert found == pytest.approx({name: float(value) for name, value in after.items()}, abs=1e-4)
    assert z.abs().max() > 0.1


def test_an_evaluation_of_one_class_has_no_margin(run, tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", make_rows("kto", 24))
    other = write_jsonl(tmp_path / "other.jsonl", [row | {"label": True} for row in make_rows("kto", 6, seed=1)])
    lines = run(kto, "--data", train, "--eval_data", other)
    assert [name for name in lines[-1] if name.startswith("eval")] == ["eval_loss"]


def test_seconds_hold_all_scoring(script, run, monkeypatch):
    """Of a plain run it is all before the first update: in the line of step 0."""
    score = script.score
    monkeypatch.setattr(script, "score", lambda *what: time.sleep(0.3) or score(*what))
    for flag, slow in (("--plain", [True] + 4 * [False]), ("--sync_every=1", 4 * [True] + [False]),
                       ("--sync_every=2", [True, False, True, False, False])):  # fmt: skip
        seconds = [line["seconds"] for line in run(script, flag, "--eval_size", 0, "--overwrite")]
        assert [x > 0.3 for x in seconds] == slow, seconds
    assert seconds[0] > 0.6  # two batches


def test_peak_memory_is_of_the_update(script, run, monkeypatch):
    """On CUDA, for which a CPU stands in here, the peak is forgotten where an update begins. On a CPU it is 0."""
    peak = []

    def on_the_cpu(function):
        def call(model, batch, *more):
            peak.append(2**30)  # what it allocates
            more[-1].device = "cpu"
            found = function(model, batch, *more)
            more[-1].device = device
            return found

        return call

    load_policy = script.load_policy
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: peak.clear())
    monkeypatch.setattr(script, "load_policy", lambda args: (load_policy(args), setattr(args, "device", device))[0])
    for name in ("score", "accumulate_gradient"):
        monkeypatch.setattr(script, name, on_the_cpu(getattr(script, name)))
    for device in ("cpu", "cuda"):
        if device == "cuda":
            monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: sum(peak))
        peaks = [line["peak_memory_gib"] for line in run(script, "--plain", "--overwrite")[1:]]
        assert peaks == ([1, 1, 1, 1] if device == "cuda" else [0, 0, 0, 0])  # scoring came before


@pytest.mark.parametrize("family, more", [
    ("mixtral", {"router_jitter_noise": 0.1, "num_local_experts": 4}),
    ("phimoe", {"input_jitter_noise": 0.1, "router_jitter_noise": 0.01, "num_local_experts": 4}),
])  # fmt: skip
def test_router_noise_is_off_with_activation_checkpointing(run, policy, tmp_path, family, more):
    """Of the modules only those that checkpoint are in training mode, and they do."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                                  num_attention_heads=2, num_key_value_heads=2, num_experts_per_tok=2, **more)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    runs = [run(dpo, "--model", tmp_path / "model", "--steps", 2, "--overwrite", *flags)
            for flags in ((), ("--activation_checkpointing",))]  # fmt: skip
    assert [lines[1]["abs_logratio"] for lines in runs] == [0, 0]
    assert runs[0][2]["loss"] == pytest.approx(runs[1][2]["loss"], abs=1e-6)


def test_activation_checkpointing_computes_layers_again(script, flags):
    calls = []
    for more in ((), ("--activation_checkpointing",)):
        model, _, _ = script.load_policy(script.parse_args(flags(script, *more)))
        calls.append(0)

        def count(*_):
            calls[-1] += 1

        for layer in model.base_model.layers:
            layer.mlp.register_forward_pre_hook(count)
        logp, _ = common.response_logps(model, [example([*range(4, 20)], 3)])
        logp.sum().backward()
        training = {type(module).__name__ for module in model.modules() if module.training}
        assert training == ({"LlamaDecoderLayer"} if more else set())
    assert calls == [2, 4]  # two layers


def test_raw_keeps_the_chat_template_in_final(script, run, policy, tmp_path):
    run(script, "--raw", "--steps", 1)
    template = AutoTokenizer.from_pretrained(tmp_path / "run/final").chat_template
    assert template and template == AutoTokenizer.from_pretrained(policy).chat_template


def test_cudnn_attention_is_off(script, flags):
    """It plans anew for every shape."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    script.load_policy(script.parse_args(flags(script)))
    assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()


def gsm8k(script):
    path = SHARED / f"gsm8k_{ {dpo: 'pairs', kto: 'labels', grpo: 'groups'}[script] }.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


def test_a_run_over_gsm8k_learns_its_rows(script, run):
    """Real text, a tokenizer that knows few of its characters, and a tiny model."""
    lines = run(script, "--data", gsm8k(script), "--max_rows", 16, "--max_length", 256, "--steps", 24,
                "--eval_size", 0, "--sync_every", 0, "--lr", 1e-2, "--micro_tokens", 2048)  # fmt: skip
    assert len(lines) == 25 and sum(line["tokens"] for line in lines[1:]) > 20_000
    name, least = {dpo: ("accuracy", 0.8), kto: ("margin", 1.0), grpo: ("gain", 0.005)}[script]
    last = [line[name] for line in lines[-6:] if line.get("frac_zero_std", 0) < 1]
    assert sum(last) / len(last) > least


def test_little_padding_on_gsm8k(script, policy, monkeypatch):
    """Under 8% at the default batch sizes, where the lengths of real answers differ; DPO: under 4% beside what a
    pair's own two lengths cost, which is 8% already."""
    args = script.parse_args(["--model", "-", "--data", str(gsm8k(script)), "--max_rows", "400", "--device", "cpu"])
    rows, lengths = read(script, policy, args), []
    assert len(rows) >= 400

    def watch(model, examples, temperature):
        lengths.append([len(e.ids) for e in examples])
        return torch.zeros(len(examples), 1), None

    # The toy tokenizer makes a token of a character; real ones make one of about four.
    for i, row in enumerate(rows):
        short = [example([*e.prompt[::4], *e.response[::4]], -(-e.prompt_len // 4)) for e in row.examples]
        rows[i] = row._replace(examples=short)
    monkeypatch.setattr(script, "response_logps", watch)
    for batch in script.make_batches(rows, None, args)[:4]:
        assert len(list(script.policy_logps(None, batch, args))) < len(batch)
    alone = [[[len(e.ids) for e in row.examples] for row in batch] for batch in script.make_batches(rows, None, args)[:4]]
    own = padding(sum(alone, [])) if script is dpo else 0.065
    assert own < 0.085 and padding(lengths) < own + 0.04


def padding(lengths):
    """Share of the tokens, of micro-batches' lengths."""
    return 1 - sum(map(sum, lengths)) / sum(len(micro) * max(micro) for micro in lengths)


# --- GRPO's groups ---


def test_advantages_by_hand():
    assert grpo.group_advantages([0.7] * 7) == [0.0] * 7  # exactly
    assert grpo.group_advantages([1, 0, 0, 1]) == pytest.approx([1, -1, -1, 1], abs=3e-4)
    assert grpo.group_advantages([3.0, 1.0]) == pytest.approx([1 / 1.0001, -1 / 1.0001])


def test_groups_of_equal_rewards_alone_are_refused(run, tmp_path):
    """One that differs suffices, and an update without it has no gradient."""
    rows = [dict(row, rewards=[0.7, 0.7]) for row in make_rows("grpo", 48)]
    with pytest.raises(common.BadInput, match="rewards are equal within every group: there is nothing to learn"):
        run(grpo, "--data", write_jsonl(tmp_path / "rows.jsonl", rows))
    assert not (tmp_path / "run").exists()
    rows[7]["rewards"] = [0.7, 0.8]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    lines = run(grpo, "--data", path, "--beta", 0, "--steps", 12, "--eval_size", 0)[1:]
    assert sorted(line["frac_zero_std"] for line in lines) == [0.75] + [1] * 11
    assert all((line["grad_norm"] == 0) == (line["frac_zero_std"] == 1) for line in lines)


def test_the_screen_shows_groups_of_equal_rewards(run, capsys):
    run(grpo)
    assert capsys.readouterr().out.count("| frac_zero_std 0 |") == 4


def test_groups_of_any_size_and_form(policy, tmp_path):
    """Rows of one prompt are a group wherever they stand; batches are whole groups, as many as fit, and each
    response has its advantage within its group."""
    rows = [{"prompt": f"a{i % 5}", "completion": f"{i}", "reward": i**2} for i in range(17)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    args = grpo.parse_args(["--model", "x", "--data", str(path), "--batch_size", "8", "--epochs", "3", "--device", "cpu"])
    model = load(policy)
    for batch in grpo.make_batches(read(grpo, policy, args), None, args):
        groups = {prompt: [row for row in batch if row.examples[0].prompt == prompt] for prompt in prompts_of(batch)}
        assert sorted(map(len, groups.values())) in ([3, 3], [3, 4], [4, 4])
        found = grpo.accumulate_gradient(model, grpo.score(model, batch, args), "clip", args)
        tokens = sum(len(row.examples[0].response) for row in batch)
        weighed = (advantages_of(batch) * torch.tensor([len(row.examples[0].response) for row in batch])).sum()
        assert found["loss"] == pytest.approx(-weighed.item() / tokens, abs=1e-6)  # at ratio 1
    armorm = {"prompt": "q", "all_generated_responses": ["a", "b", "c"], "all_rm_scores": [0.1, 0.2, 0.3],
              "chosen": [], "rejected": []}  # fmt: skip
    responses = grpo.encode_row(AutoTokenizer.from_pretrained(policy), None, args, armorm)
    assert [row.reward for row in responses] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("form", ["rows", "lists"])
def test_a_group_of_one_is_dropped_and_counted(policy, tmp_path, capsys, form):
    """It teaches nothing. A larger group than a batch is refused by its prompt (test_inputs)."""
    rows = [{"prompt": f"a{g}", "completion": str(i), "reward": i} for g, n in enumerate([1, 2, 3]) for i in range(n)]
    if form == "lists":
        rows = [{"prompt": f"a{n}", "completions": ["b", "c", "d"][:n], "rewards": [0, 1, 2][:n]} for n in (1, 2, 3)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    args = grpo.parse_args(["--model", "x", "--data", str(path), "--batch_size", "5"])
    assert [len(batch) for batch in grpo.make_batches(read(grpo, policy, args), None, args)] == [5]
    out = capsys.readouterr().out
    assert ("1 of no use" if form == "lists" else "1 responses dropped: alone, they teach nothing") in out


# --- KTO's classes and mismatched pairs ---


def test_kto_by_hand():
    """σ(ln 3) = 3/4: the losses of rewards ln 3 and −ln 3 about ẑ0 = 0, by class and weight."""
    z = torch.tensor([[math.log(3)], [math.log(3)], [-math.log(3)], [-math.log(3)]])
    mask, desirable = torch.ones(4, 1).bool(), torch.tensor([True, False, True, False])
    losses = kto.kto_loss(z, mask, desirable, torch.tensor(0.0), 1.0, 2.0, 3.0)
    torch.testing.assert_close(losses, torch.tensor([0.5, 2.25, 1.5, 0.75]))
    shifted = kto.kto_loss(z, mask, desirable, torch.tensor(math.log(3)), 1.0, 1.0, 1.0)
    torch.testing.assert_close(shifted[:2], torch.tensor([0.5, 0.5]))


def test_the_reference_point_gets_no_gradient(run, monkeypatch):
    points, loss = [], kto.kto_loss
    monkeypatch.setattr(kto, "kto_loss", lambda z, m, d, kl, *more: points.append(kl) or loss(z, m, d, kl, *more))
    run(kto, "--lr", 1e-2, "--eval_size", 0)
    assert max(points) > 0 and not any(point.requires_grad for point in points)


def test_mismatched_pairs():
    """The next response to *another* prompt; of groups the i-th with the i-th, so that no pair comes twice."""
    def row(prompt, response):
        return kto.Row([example([prompt, response], 1)], True)

    def pairs(batch, longest=64):
        found = kto.mismatched_pairs(batch, SimpleNamespace(max_length=longest))
        assert all(row.desirable is None for row in found)
        return [tuple(row.examples[0].ids.tolist()) for row in found]

    assert pairs([row(1, 10), row(2, 20), row(3, 30)]) == [(1, 20), (2, 30), (3, 10)]  # rotated by one
    batch = [row(1, 10), row(1, 11), row(2, 20), row(2, 21), row(3, 30)]
    assert pairs(batch) == [(1, 20), (1, 21), (2, 30), (2, 30), (3, 10)]
    groups = [row(prompt, 10 * prompt + i) for prompt in range(1, 9) for i in range(8)]
    for batch in (groups, random.Random(0).sample(groups, 64)):
        found = pairs(batch)
        assert len(set(found)) == 64 and all(prompt != response // 10 for prompt, response in found)
    assert pairs([row(1, 10), row(1, 11)]) == []
    long = kto.Row([example([7] * 9 + [8], 9)], False)
    assert pairs([long, row(1, 2)], 10) == [(7,) * 9 + (2,), (1, 8)]
    assert [len(ids) for ids in pairs([long, kto.Row([example([1, 2, 3], 1)], True)], 10)] == [10, 2]


def test_mismatched_pairs_have_no_graph(run, monkeypatch):
    """Their forward keeps no activations; an evaluation keeps none at all."""
    found, policy_logps = [], kto.policy_logps

    def watch(model, batch, args):
        for rows, logp, mask in policy_logps(model, batch, args):
            found.append((rows[0].desirable is None, torch.is_grad_enabled(), logp.requires_grad))
            yield rows, logp, mask

    monkeypatch.setattr(kto, "policy_logps", watch)
    run(kto, "--steps", 2, "--eval_every", 2)
    assert {(pair, grad) for pair, enabled, grad in found if enabled} == {(True, False), (False, True)}
    assert {(pair, grad) for pair, enabled, grad in found if not enabled} == {(True, False), (False, False)}


def test_a_batch_of_one_class_in_mixed_data(run, tmp_path):
    """No reward is logged of the class that is not there, and no margin made of it."""
    rows = [row | {"label": i > 0} for i, row in enumerate(make_rows("kto", 16))]
    lines = run(kto, "--data", write_jsonl(tmp_path / "rows.jsonl", rows), "--eval_size", 0, "--steps", 2)
    both = {"reward_desirable", "reward_undesirable", "margin"}
    assert sorted(len(both & line.keys()) for line in lines[1:]) == [1, 3]
    assert all("reward_desirable" in line and math.isfinite(line["loss"]) for line in lines[1:])
    rows = [row | {"label": i < 1} for i, row in enumerate(rows)]
    lines = run(kto, "--data", write_jsonl(tmp_path / "rows.jsonl", rows), "--eval_size", 0, "--overwrite")
    assert {"reward_undesirable"} in [both & line.keys() for line in lines[1:]]


def test_pairs_are_taken_apart(policy):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    args = kto.parse_args(["--model", "x"])
    user, a = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    b = [{"role": "assistant", "content": "c"}]
    for row in ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"chosen": user + a, "rejected": user + b}):
        rows = kto.encode_row(tokenizer, None, args, row)
        texts = [(tokenizer.decode(r.examples[0].ids), r.desirable) for r in rows]
        head = "<|user|>a<|end|><|assistant|>"
        assert texts == [(head + "b<|end|>", True), (head + "c<|end|>", False)]
    (row,) = kto.encode_row(tokenizer, None, args, {"prompt": user, "completion": a, "label": 1})
    assert row.desirable is True
