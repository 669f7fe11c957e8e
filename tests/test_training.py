"""What is trained, against what reference, and that the cut into micro-batches changes nothing."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import humanline_dpo as dpo
import humanline_grpo as grpo
import humanline_kto as kto
from conftest import SHARED, make_rows, metrics_of, write_jsonl

ONE_MICRO = ("--micro_tokens", 10**6)


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


def load_as_scripts_do(policy):
    model = load(policy)
    model.row_tokens = 2 * model.config.hidden_size  # examples of one prompt share a row
    return model


def run_with_second_model(script, policy, batches, k, copy_after=False):
    """The definition: a reference model whose weights are copied every k updates, before the step.
    Returns each update's log-ratios of the trained responses, and KTO's ẑ0."""
    model, log_ratios, points = load_as_scripts_do(policy), [], []
    reference, optimizer = copy.deepcopy(model), adamw(model, 1e-2)

    def perceived(examples):
        logp, mask = common.response_logps(model, examples)
        with torch.no_grad():
            ref_logp, _ = common.response_logps(reference, examples)
        return logp - ref_logp, mask, torch.where(mask, logp - ref_logp, 0.0).clamp(-0.2, 0.3)

    for step, (rows, in_order) in enumerate(zip(*batches), 1):

        def sync(step=step):
            if k and step % k == 0:
                reference.load_state_dict(model.state_dict())

        if script is dpo:
            logratio, mask, z = perceived([row.examples[side] for side in (0, 1) for row in rows])
            loss = dpo.dpo_loss(z, mask, 0.5).mean()
        elif script is grpo:
            logratio, mask, z = perceived([row.examples[0] for row in rows])
            advantage = torch.tensor([row.advantage for row in rows])
            loss = grpo.grpo_loss(logratio, z, mask, advantage, 0.2, 0.5).sum() / mask.sum()
        else:
            with torch.no_grad():
                pairs = sorted(mismatch(in_order[:8]), key=lambda e: -len(e.ids))
                point = perceived(pairs)[2].sum().div(8).clamp_min(0)
            logratio, mask, z = perceived([row.examples[0] for row in rows])
            good = torch.tensor([row.desirable for row in rows])
            loss = kto.kto_loss(z, mask, good, point, 0.5, 1.0, 1.0).sum() / 8
            points.append(point.item())
        log_ratios.append(logratio.detach())
        update(model, optimizer, loss, step, 1e-2, 2, sync if not copy_after else lambda: None)
        if copy_after:
            sync()
    return log_ratios, points


def mismatch(rows):
    """KTO's mismatched pairs, written down: the prompts of these tests all differ."""
    examples = [row.examples[0] for row in rows]
    pairs = zip(examples, examples[1:] + examples[:1])
    return [common.Example(a.ids[: a.prompt_len] + b.ids[b.prompt_len :], a.prompt_len) for a, b in pairs]


def batches_of(script, flags, policy, seen):
    """The batches of the run, in the order in which its rows ran (one micro-batch an update)."""
    args = script.parse_args(flags(script))
    rows, _ = script.load_data(AutoTokenizer.from_pretrained(policy), args)
    batches = [batch for epoch in range(2) for batch in script.epoch_batches(rows, epoch, args)][: len(seen)]
    model = load_as_scripts_do(policy)
    return [[batch[i] for i in script.plan(model, batch, 10**6)[0]] for batch in batches], batches


CLIPPED = ("--lr", 1e-2, "--log_eps_P=-0.2", "--log_eps_R=0.3", *ONE_MICRO)


@pytest.mark.parametrize("k", [1, 3, 7, 100, 0])
def test_the_cache_is_a_second_model_copied_before_the_update(script, run, spy, flags, policy, tmp_path, k):
    seen = spy(script)
    run(script, "--sync_every", k, "--steps", 8, *CLIPPED)
    batches = batches_of(script, flags, policy, seen)
    assert len(seen) == len(batches[0]) == 8
    exact, points = run_with_second_model(script, policy, batches, k)

    def difference(ratios):
        return max((ours - theirs).abs().max().item() for (_, ours, _), theirs in zip(seen, ratios))

    # k = 7: a row of two epochs in one window is scored once, so in another micro-batch
    assert difference(exact) <= (2e-6 if k == 7 else 1e-6)
    assert max(z.abs().max() for z in exact) > 0.2  # the policy moved, and tokens were clipped
    if script is kto:
        ours = [m["kl"] for m in metrics_of(tmp_path / "run")[1:]]
        assert ours == pytest.approx(points, abs=1e-6) and max(points) > 0.01
    if 0 < k < 8:  # the mutant: copied after the update
        assert difference(run_with_second_model(script, policy, batches, k, copy_after=True)[0]) > 1e-3


def test_copied_after_the_update_nothing_is_ever_clipped(policy, run, spy, flags):
    """Why it matters: with k = 1 the mutant's log-ratios are all 0."""
    seen = spy(dpo)
    run(dpo, *CLIPPED)
    batches = batches_of(dpo, flags, policy, seen)
    late, _ = run_with_second_model(dpo, policy, batches, 1, copy_after=True)
    assert all(z.abs().max() == 0 for z in late)


def test_without_sync_and_clip_it_is_textbook_dpo(run, spy, policy):
    """20 updates against a DPO written with the model's own logits, row by row."""
    seen = spy(dpo)
    run(dpo, "--plain", "--steps", 20, *ONE_MICRO)
    model, reference = load(policy), load(policy)
    optimizer = adamw(model, 1e-3)

    def sequence_logp(net, example):
        ids = torch.tensor([example.ids])
        logp = net(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        return logp[example.prompt_len - 1 :].sum()

    for step, (examples, logratio, mask) in enumerate(seen, 1):
        z = []
        for example in examples:
            with torch.no_grad():
                ref = sequence_logp(reference, example)
            z.append(sequence_logp(model, example) - ref)
        z = torch.stack(z)
        torch.testing.assert_close(logratio.sum(-1), z.detach(), rtol=1e-3, atol=2e-4)
        chosen, rejected = z.chunk(2)
        loss = -torch.log(torch.sigmoid(0.5 * (chosen - rejected))).mean()
        update(model, optimizer, loss, step, 1e-3, 2)
    assert z.abs().max() > 0.1


def test_the_first_update_is_its_own_reference(script, run, tmp_path):
    run(script, "--steps", 1)
    first = metrics_of(tmp_path / "run")[1]
    assert first["abs_logratio"] == 0 and first["unclipped"] == 1.0
    assert first["clipped_low"] == first["clipped_high"] == 0
    if script is not grpo:
        assert first["loss"] == pytest.approx({dpo: math.log(2), kto: 0.5}[script], abs=1e-7)
    assert first["accuracy"] == 0.5 if script is dpo else first["kl"] == 0


def gradient(script, run, flags, tmp_path, *more):
    """The gradient norm and metrics of updates with a moved policy, for a given cut."""
    run(script, "--overwrite", "--steps", 3, "--lr", 1e-2, *more)
    return metrics_of(tmp_path / "run")[1:]


@pytest.mark.parametrize("mode", ["clip", "off"])
def test_the_cut_into_micro_batches_changes_nothing(script, run, flags, tmp_path, monkeypatch, mode):
    """8 = 4 + 4 = 3 + 3 + 2, losses, gradients and all metrics."""
    runs = []
    for cut in ([8], [4, 4], [3, 3, 2]):

        def plan(model, rows, micro_tokens, cut=cut):
            ends = [sum(cut[: i + 1]) for i in range(len(cut))]
            trained = [i for i, row in enumerate(rows) if getattr(row, "desirable", 0) is not None]
            others = [i for i in range(len(rows)) if i not in trained]  # KTO's mismatched pairs
            if len(trained) != 8:
                return [trained]  # held-out rows
            return [part[a:b] for part in (trained, others) for a, b in zip([0, *ends], ends) if part]

        monkeypatch.setattr(script, "plan", plan)
        runs.append(gradient(script, run, flags, tmp_path, "--humanline", mode))
    for other in runs[1:]:
        for ours, theirs in zip(runs[0], other):
            for name in set(ours) - {"seconds", "tokens_per_second", "peak_memory_gib", "padded"}:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
    if script is kto:  # which would be invisible at ẑ0 = 0
        assert max(m["kl"] for m in runs[0]) > 0.01


ON_CPU = SimpleNamespace(device=torch.device("cpu"))  # all that a plan asks of a model without sharing


def rows_of(script, lengths):
    """Rows whose longest example has the given length."""
    if script is kto:
        return [kto.Row([common.Example([1] * n, 1)], True) for n in lengths]
    if script is grpo:
        return [grpo.Row([common.Example([1] * n, 1)], i, 0.0) for i, n in enumerate(lengths)]
    return [script.Row([common.Example([1] * (n - i), 1) for i in range(2)]) for n in lengths]


def test_the_plan_keeps_to_micro_tokens_and_loses_no_row(script):
    rows = rows_of(script, [10, 50, 20, 30, 20, 90])
    micros = script.plan(ON_CPU, rows, 120)
    assert sorted(i for micro in micros for i in micro) == list(range(6))
    for micro in micros:
        examples = [e for i in micro for e in rows[i].examples]
        assert max(len(e.ids) for e in examples) * len(examples) <= 120 or len(micro) == 1  # a longer row runs alone
    assert micros == script.plan(ON_CPU, rows, 120) and micros[0] == [5]  # deterministic, longest first
    padded = script.plan(ON_CPU, rows_of(script, [1000] * 3 + [10] * 3), 10**6)  # no short row beside a long one
    assert padded == [[0, 1, 2], [3, 4, 5]]


def test_the_end_of_turn_is_trained_and_the_prompt_never(script, run, spy):
    seen = spy(script)
    run(script, "--steps", 1)
    for examples, logratio, mask in seen:
        assert mask.sum(-1).tolist() == [len(e.ids) - e.prompt_len for e in examples]
        assert all(e.ids[-1] == 1 and e.ids[e.prompt_len - 1] == 3 for e in examples)  # <|end|>, <|assistant|>


def test_a_small_lr_moves_the_weights(run, policy, tmp_path):
    """bf16 weights would stand still: 50 updates with lr 1e-6 must move all that get a gradient."""
    run(dpo, "--steps", 50, "--lr", 1e-6, "--plain")
    before, after = load(policy).state_dict(), load(tmp_path / "run" / "final").state_dict()
    state = torch.load(tmp_path / "run" / "step-000050.pt", weights_only=True)["optimizer"]["state"]
    names = [name for name, _ in load(policy).named_parameters()]
    moved = total = 0
    for i, name in enumerate(names):
        touched = state[i]["exp_avg_sq"] > 0
        moved += (before[name] != after[name])[touched].sum().item()
        total += touched.sum().item()
    assert moved >= 0.99 * total > 10_000


def test_the_weights_are_float32_whatever_the_checkpoint_is(run, policy, tmp_path):
    load(policy).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(policy).save_pretrained(tmp_path / "half")
    run(dpo, "--model", tmp_path / "half", "--steps", 1)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert {weight.dtype for weight in final.parameters()} == {torch.float32}


def test_dropout_is_off_and_checkpointing_is_on(run, policy, tmp_path, monkeypatch):
    """A model with dropout trains as without; activation checkpointing really recomputes, same result."""
    model = load(policy)
    model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path / "dropout")
    AutoTokenizer.from_pretrained(policy).save_pretrained(tmp_path / "dropout")
    calls = []
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: (calls.append(1), forward(self, x))[1])
    results, counts = [], []
    for i, more in enumerate([(), ("--model", tmp_path / "dropout", "--activation_checkpointing")]):
        calls.clear()
        run(dpo, "--steps", 3, "--output_dir", tmp_path / f"{i}", "--eval_size", 0, *more)
        results.append([m["loss"] for m in metrics_of(tmp_path / f"{i}")[1:]])
        counts.append(len(calls))
    assert results[0] == pytest.approx(results[1], abs=1e-6)
    assert counts[1] > counts[0]


def test_evaluation_is_against_the_initial_policy(run, policy, data, tmp_path):
    """The same whatever k, and computed here with two models from the saved files."""
    summary = run(dpo, "--steps", 4, "--sync_every", 2, "--lr", 1e-2)
    assert summary["before"] == {"eval_loss": pytest.approx(math.log(2)), "eval_accuracy": 0.5, "eval_margin": 0.0}
    args = dpo.parse_args(["--model", str(policy), "--data", str(data["dpo"]), "--eval_size", "4",
                           "--max_length", "64", "--batch_size", "8"])  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(policy)
    _, eval_rows = dpo.load_data(tokenizer, args)
    margins = []
    for row in eval_rows:
        sums = []
        for net in (load(tmp_path / "run" / "final"), load(policy)):
            with torch.no_grad():
                logp, mask = common.response_logps(net, row.examples)
            sums.append((logp * mask).sum(-1))
        margins.append(0.5 * ((sums[0] - sums[1])[0] - (sums[0] - sums[1])[1]))
    margins = torch.stack(margins)
    assert summary["after"]["eval_margin"] == pytest.approx(margins.mean().item(), abs=1e-4)
    assert summary["after"]["eval_accuracy"] == (margins > 0).float().mean().item()


def test_humanline_sampling_trains(script, run, tmp_path):
    run(script, "--humanline", "sample", "--lr", 1e-2)
    last = metrics_of(tmp_path / "run")[-1]
    assert 0 < last["unclipped"] < 1 and math.isfinite(last["loss"])


def test_warmup_rises_from_the_first_update_and_then_stays(script, run, tmp_path):
    run(script, "--steps", 5, "--warmup", 4, "--lr", 0.008)
    assert [m["lr"] for m in metrics_of(tmp_path / "run")[1:]] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.008])


def test_a_ragged_batch_is_left_out_and_epochs_differ(script, flags, policy, capsys):
    args = script.parse_args(flags(script, "--batch_size", 7))
    rows, _ = script.load_data(AutoTokenizer.from_pretrained(policy), args)
    first, second = (script.epoch_batches(rows, epoch, args) for epoch in (0, 1))
    sizes = [sum(getattr(row, "desirable", 0) is not None for row in batch) for batch in first]
    full = 6 if script is grpo else 7  # GRPO's groups of two are whole
    assert sizes == [full] * (len(rows) // full)
    assert first != second and first == script.epoch_batches(rows, 0, args)


def test_a_run_over_gsm8k_pairs_learns_them(run, policy, tmp_path):
    """Real text, a tokenizer that knows few of its characters, and a tiny model."""
    from conftest import SHARED

    path = SHARED / "gsm8k_pairs.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    summary = run(dpo, "--data", path, "--max_rows", 64, "--max_length", 256, "--steps", 12, "--eval_size", 8,
                  "--micro_tokens", 2048)  # fmt: skip
    lines = metrics_of(tmp_path / "run")
    assert summary["steps"] == 12 and summary["tokens"] > 10_000
    assert sum(m["accuracy"] for m in lines[-4:]) / 4 > 0.5


def test_a_run_over_gsm8k_labels(run, tmp_path):
    from conftest import SHARED

    path = SHARED / "gsm8k_labels.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    summary = run(kto, "--data", path, "--max_rows", 64, "--max_length", 256, "--steps", 8, "--eval_size", 4,
                  "--micro_tokens", 2048)  # fmt: skip
    assert summary["steps"] == 8 and set(summary["after"]) >= {"eval_loss", "eval_above_median"}


@pytest.mark.parametrize("k", [0, 100])
def test_a_window_scores_each_row_once(script, run, monkeypatch, k):
    """Two epochs in one window: the policy has not changed, so a row's scores have not."""
    scored = []
    score = script.score
    monkeypatch.setattr(script, "score", lambda model, rows, *more: scored.extend(rows) or score(model, rows, *more))
    monkeypatch.setattr(script, "describe", lambda *args: None)
    run(script, "--sync_every", k, "--steps", 20, "--eval_size", 0)
    trained = [row for row in scored if getattr(row, "desirable", 0) is not None]
    assert len(trained) == len(set(map(id, trained))) == (96 if script is grpo else 48)


def test_advantages_by_hand():
    assert grpo.group_advantages([0.7] * 7) == [0.0] * 7  # exactly
    assert grpo.group_advantages([1, 0, 0, 1]) == pytest.approx([1, -1, -1, 1], abs=3e-4)
    advantages = grpo.group_advantages([3.0, 1.0])
    assert advantages == pytest.approx([1 / 1.0001, -1 / 1.0001])


def test_equal_rewards_make_no_update(run, policy, tmp_path):
    rows = [dict(row, rewards=[0.7, 0.7]) for row in make_rows("grpo", 48)]
    run(grpo, "--data", write_jsonl(tmp_path / "rows.jsonl", rows), "--beta", 0)
    before, after = load(policy).state_dict(), load(tmp_path / "run" / "final").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(m["frac_zero_std"] == 1 and m["grad_norm"] == 0 for m in metrics_of(tmp_path / "run")[1:])


def test_rows_of_one_prompt_run_together_as_far_as_micro_tokens_allow(script):
    """Where they share a row; a row's own examples always."""
    sharing = SimpleNamespace(device=torch.device("cpu"), row_tokens=100)

    def row(prompt, *lengths):
        examples = [common.Example([prompt] * 5 + [9] * n, 5) for n in lengths]
        return script.Row(examples, *({dpo: (), kto: (True,), grpo: (prompt, 0.0)}[script]))

    lengths = [(1, 20), (2, 30), (1, 10), (2, 20), (1, 30)]  # prompt 1: a row of 65 tokens, 2: of 55
    rows = [row(prompt, n) for prompt, n in lengths]
    assert script.plan(sharing, rows, 10**6) == [[0, 2, 4, 1, 3]]
    assert script.plan(sharing, rows, 100) == [[0, 2, 4], [1, 3]]
    assert script.plan(sharing, rows, 60) == [[1, 3], [4], [0, 2]]  # 65 are too many
    apart = script.plan(ON_CPU, rows, 70)
    assert apart == [[4, 1], [0, 3], [2]]
    if script is dpo:  # pairs stay whole where a row is too short for both
        pairs = [row(1, 60, 70), row(2, 20, 20)]
        assert script.plan(sharing, pairs, 10**6) == [[0, 1]] and script.plan(sharing, pairs, 50) == [[0], [1]]


def test_groups_of_any_size_and_form(run, policy, tmp_path, capsys):
    """Rows of one prompt are a group; batches are whole groups filled to --batch_size."""
    rows = [{"prompt": f"a{i % 5}", "completion": f"{i}", "reward": i} for i in range(17)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    args = grpo.parse_args(["--model", str(policy), "--data", str(path), "--batch_size", "7", "--eval_size", "0"])
    found, _ = grpo.load_data(AutoTokenizer.from_pretrained(policy), args)
    assert [len(group) for group in grpo.groups_of(found)] == [4, 4, 3, 3, 3]
    for group in grpo.groups_of(found):
        assert [r.advantage for r in group] == grpo.group_advantages([r.reward for r in group])
    for batch in grpo.epoch_batches(found, 0, args):
        assert len(batch) <= 7
        assert all(len([r for r in batch if r.group == g]) in (3, 4) for g in {r.group for r in batch})
    armorm = {"prompt": "q", "all_generated_responses": ["a", "b", "c"], "all_rm_scores": [0.1, 0.2, 0.3],
              "chosen": [], "rejected": []}  # fmt: skip
    responses = grpo.encode_row(AutoTokenizer.from_pretrained(policy), armorm, "here:1", args)
    assert [r.reward for r in responses] == [0.1, 0.2, 0.3]


def test_a_run_over_gsm8k_groups(run, tmp_path):
    from conftest import SHARED

    path = SHARED / "gsm8k_groups.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    summary = run(grpo, "--data", path, "--max_rows", 32, "--max_length", 256, "--steps", 6, "--eval_size", 4,
                  "--micro_tokens", 2048)  # fmt: skip
    assert summary["steps"] == 6 and 0 <= summary["after"]["eval_agreement"] <= 1


def test_kto_by_hand():
    """σ(ln 3) = 3/4: the losses of rewards ln 3 and −ln 3 about ẑ0 = 0, by class and weight."""
    z = torch.tensor([[math.log(3)], [math.log(3)], [-math.log(3)], [-math.log(3)]])
    mask, desirable = torch.ones(4, 1).bool(), torch.tensor([True, False, True, False])
    losses = kto.kto_loss(z, mask, desirable, torch.tensor(0.0), 1.0, 2.0, 3.0)
    torch.testing.assert_close(losses, torch.tensor([0.5, 2.25, 1.5, 0.75]))
    shifted = kto.kto_loss(z, mask, desirable, torch.tensor(math.log(3)), 1.0, 1.0, 1.0)
    torch.testing.assert_close(shifted[:2], torch.tensor([0.5, 0.5]))


def test_the_reference_point_gets_no_gradient(run, policy, spy, monkeypatch):
    """The gradient of the trained rows alone, with ẑ0 a number."""
    points = []
    loss = kto.kto_loss
    monkeypatch.setattr(kto, "kto_loss", lambda z, m, d, kl, *more: points.append(kl) or loss(z, m, d, kl, *more))
    run(kto, "--lr", 1e-2)
    assert points and not any(point.requires_grad for point in points)


def test_mismatched_pairs_skip_the_own_prompt():
    """Pairs taken apart stand side by side: the next response to *another* prompt is taken."""
    def row(prompt, response):
        return kto.Row([common.Example([prompt, response], 1)], True)

    batch = [row(1, 10), row(1, 11), row(2, 20), row(3, 30), row(1, 12)]
    found = [tuple(r.examples[0].ids) for r in kto.mismatched(batch, 64)]
    assert found == [(1, 20), (1, 20), (2, 30), (3, 12), (1, 20)]
    assert all(r.desirable is None for r in kto.mismatched(batch, 64))
    long = kto.Row([common.Example([7] * 9 + [8], 9)], False)
    assert [len(r.examples[0].ids) for r in kto.mismatched([long, row(1, 2)], 10)] == [10, 2]


def test_a_batch_of_one_class_in_mixed_data(run, data, tmp_path, monkeypatch):
    batches = kto.epoch_batches

    def sorted_batches(rows, epoch, args):
        rows = sorted(rows, key=lambda row: row.desirable)
        monkeypatch.setattr(kto.random.Random, "sample", lambda self, items, n: list(items))
        return batches(rows, epoch, args)

    monkeypatch.setattr(kto, "epoch_batches", sorted_batches)
    run(kto, "--eval_size", 0)
    first = metrics_of(tmp_path / "run")[1]
    assert "reward_undesirable" in first and "reward_desirable" not in first and "margin" not in first


def test_pairs_are_taken_apart(policy):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    args = kto.parse_args(["--model", "x", "--data", "x"])
    user, a = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    b = [{"role": "assistant", "content": "c"}]
    for row in ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"chosen": user + a, "rejected": user + b}):
        rows = kto.encode_row(tokenizer, row, "here:1", args)
        texts = [(tokenizer.decode(r.examples[0].ids), r.desirable) for r in rows]
        head = "<|user|>a<|end|><|assistant|>"
        assert texts == [(head + "b<|end|>", True), (head + "c<|end|>", False)]
    (row,) = kto.encode_row(tokenizer, {"prompt": user, "completion": a, "label": 1}, "here:1", args)
    assert row.desirable is True


def test_sizes_and_splits(script, flags, policy, data, tmp_path):
    """min(128, 5%) of the prompts are held out, and none of them is trained on, eval_data's neither."""
    kind = script.__name__.removeprefix("humanline_")
    tokenizer = AutoTokenizer.from_pretrained(policy)
    rows = make_rows(kind, 48)
    many = write_jsonl(tmp_path / "many.jsonl", rows + rows)  # every prompt twice
    argv = flags(script, "--data", many)
    del argv[argv.index("--eval_size") : argv.index("--eval_size") + 2]
    train, held_out = script.load_data(tokenizer, script.parse_args(argv))
    prompts = {script.prompt_of(row) for row in held_out}
    assert len(prompts) == 2 and not prompts & {script.prompt_of(row) for row in train}
    other = write_jsonl(tmp_path / "other.jsonl", rows[:5])
    train, held_out = script.load_data(tokenizer, script.parse_args([*argv, "--eval_data", str(other)]))
    prompts = {script.prompt_of(row) for row in held_out}
    assert len(prompts) == 5 and not prompts & {script.prompt_of(row) for row in train}


def test_examples_of_one_prompt_share_rows_in_a_run(script, run, monkeypatch):
    seen, logps = [], script.response_logps

    def watch(model, examples, *args):
        seen.append((model.row_tokens, len(examples), len(common.layout(model, examples)[0])))
        return logps(model, examples, *args)

    monkeypatch.setattr(script, "response_logps", watch)
    run(script, "--steps", 1)
    assert {tokens for tokens, _, _ in seen} == {64}  # 2 H
    assert any(rows < examples for _, examples, rows in seen) == (script is not kto)  # its prompts all differ


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data")
def test_little_padding_on_gsm8k(script, policy):
    """Under 8% at the default batch sizes, where the lengths of real answers differ."""
    file = SHARED / f"gsm8k_{ {dpo: 'pairs', kto: 'labels', grpo: 'groups'}[script] }.jsonl"
    args = script.parse_args(["--model", "-", "--data", str(file), "--eval_size", "0", "--max_rows", "400"])
    tokenizer = AutoTokenizer.from_pretrained(policy)
    rows, _ = script.load_data(tokenizer, args)
    assert len(rows) >= 400
    # The toy tokenizer makes a token of a character; real ones make one of about four.
    shorter = [common.Example([*e.ids[: e.prompt_len : 4], *e.ids[e.prompt_len :: 4]], -(-e.prompt_len // 4))
               for row in rows for e in row.examples]
    shorter = iter(shorter)
    rows = [row._replace(examples=[next(shorter) for _ in row.examples]) for row in rows]
    model = SimpleNamespace(device=torch.device("cpu"), row_tokens=512)
    for batch in script.epoch_batches(rows, 0, args)[:4]:
        micros = [[e for i in micro for e in batch[i].examples] for micro in script.plan(model, batch, 16384)]
        assert common.padded_share(model, micros) < 0.08
