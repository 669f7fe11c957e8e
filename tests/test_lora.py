"""--lora_rank: the same method, with nothing trained, saved or copied but adapters, and no second adapter."""

import copy
import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import humanline_dpo as dpo
from common import BadInput, Example, TokenLogps, check_model, response_logps, sample_responses
from conftest import ROOT, metrics_of

peft = pytest.importorskip("peft")

TIMES = ("seconds", "tokens_per_second", "peak_memory_gib")
CLIPPED = ("--lora_rank", 4, "--lr", 3e-2, "--warmup", 0, "--log_eps_P=-0.2", "--log_eps_R=0.3", "--micro_tokens", 10**6)
MERGE = """
base = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-1.5B-Instruct")
PeftModel.from_pretrained(base, "runs/dpo/final").merge_and_unload().save_pretrained("runs/dpo/merged")
""".strip()


@pytest.fixture
def watched(monkeypatch):
    """watched(script) -> what a run loads, and a copy of its adapters then; the batch of every update."""
    monkeypatch.setitem(common.MAX_PADDING, "cpu", 10**6)  # --micro_tokens alone cuts

    def install(script):
        found = {"batches": []}
        load_policy, accumulate = script.load_policy, script.accumulate_gradient

        def load_and_tell(args):
            found["model"], tokenizer, found["saved"] = load_policy(args)
            found["adapters"] = copy.deepcopy(adapters_of(found["model"]))
            return found["model"], tokenizer, found["saved"]

        def accumulate_and_tell(model, batch, mode, args):
            if torch.is_grad_enabled():
                found["batches"].append(batch)
            return accumulate(model, batch, mode, args)

        monkeypatch.setattr(script, "load_policy", load_and_tell)
        monkeypatch.setattr(script, "accumulate_gradient", accumulate_and_tell)
        return found

    return install


def adapters_of(model):
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def with_adapters(policy, adapters, rank=4, dtype=torch.float32):
    """The policy's weights, frozen, and these adapters."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=dtype).eval()
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    peft.get_peft_model(model, config)
    assert not model.load_state_dict(adapters, strict=False).unexpected_keys
    return model


def logits_of(model):
    return model(torch.arange(4, 30)[None]).logits


# --- The method ---


@pytest.mark.parametrize("more", [(), ("--activation_checkpointing",), ("--micro_tokens", 60)])
def test_the_first_update_is_its_own_reference(script, run, policy, tmp_path, watched, more):
    """Exactly, and without dropout, the model's or LoRA's, also where the model is in training mode."""
    model = AutoModelForCausalLM.from_pretrained(policy)
    model.config.attention_dropout = 0.1
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(policy).save_pretrained(tmp_path / "model")
    found = watched(script)
    _, first, second, *_ = run(script, "--model", tmp_path / "model", *CLIPPED, *more)
    assert first["abs_logratio"] == 0 and first["unclipped"] == 1.0 and first["grad_norm"] > 0
    assert second["abs_logratio"] > 0
    dropouts = [module.p for module in found["model"].modules() if isinstance(module, torch.nn.Dropout)]
    assert not any(dropouts) and found["saved"].peft_config["default"].lora_dropout == 0


def with_second_model(script, policy, found, args, k, late=False):
    """The definition: a reference with adapters of its own, into which the policy's are copied every k updates
    before the step (late, the mutant: after it). Returns the updates' metrics and the adapters at the end."""
    model = with_adapters(policy, found["adapters"])
    reference, lines = copy.deepcopy(model), []
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0, fused=True)
    for step, batch in enumerate(found["batches"][: args.steps], 1):  # this function adds to them
        scored = []
        with torch.no_grad():
            for rows, logp, mask in script.policy_logps(reference, batch, args):
                by_example = iter([line[real] for line, real in zip(logp, mask)])
                scored += [row._replace(ref_logp=[next(by_example) for _ in row.examples]) for row in rows]
        lines.append(script.accumulate_gradient(model, scored, "clip", args))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        if step % k == 0 and not late:
            reference.load_state_dict(adapters_of(model), strict=False)
        optimizer.step()
        optimizer.zero_grad()
        if step % k == 0 and late:
            reference.load_state_dict(adapters_of(model), strict=False)
    return lines, adapters_of(model)


@pytest.mark.parametrize("k", [1, 3])
def test_scoring_before_the_step_is_a_copy_of_the_adapters_before_it(script, run, flags, policy, watched, k):
    found, more = watched(script), (*CLIPPED, "--steps", 8, "--sync_every", k)
    ours = run(script, *more)[1:]
    mine, args = adapters_of(found["model"]), script.parse_args(flags(script, *more))
    exact, adapters = with_second_model(script, policy, found, args, k)

    def difference(lines):
        assert len(ours) == len(lines) == 8
        return max(abs(a[name] - b[name]) for a, b in zip(ours, lines) for name in ("loss", "abs_logratio", "unclipped"))

    assert difference(exact) <= 1e-5
    assert all((mine[name] - weight).abs().max() <= 1e-5 for name, weight in adapters.items())
    assert max(line["abs_logratio"] for line in ours) > 0.1 and min(line["unclipped"] for line in ours) < 0.9
    late, _ = with_second_model(script, policy, found, args, k, late=True)
    assert difference(late) > 1e-2
    assert k > 1 or all(line["abs_logratio"] == 0 for line in late)  # silently off


def test_activation_checkpointing_gives_the_same_gradients(script, run, tmp_path, watched):
    runs = []
    for more in ((), ("--activation_checkpointing",)):
        found = watched(script)
        runs.append(run(script, *CLIPPED, *more, "--output_dir", tmp_path / f"{len(runs)}"))
        assert found["model"].base_model.layers[0].training == bool(more) and not found["model"].training
    for ours, theirs in zip(*runs, strict=True):
        assert {n: x for n, x in ours.items() if n not in TIMES} == pytest.approx(
            {n: x for n, x in theirs.items() if n not in TIMES}, abs=1e-6)  # fmt: skip
    assert all(line["grad_norm"] > 0.01 for line in runs[0][1:])


def test_the_policy_writes_with_its_adapters(script, run, tmp_path, watched):
    (tmp_path / "lengths.py").write_text("def f(completion_ids, **columns):\n    return [len(x) for x in completion_ids]\n")
    watched(script)
    lines = run(script, *CLIPPED, "--sample_every", 2, "--group_size", 4, "--reward", tmp_path / "lengths.py:f",
                "--max_new_tokens", 8)  # fmt: skip
    assert lines[1]["abs_logratio"] == 0 and lines[2]["abs_logratio"] > 0
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    args = script.parse_args(["--model", "x", "--max_length", "64"])
    prompts, texts, _ = zip(*lines[-1]["samples_greedy"])
    ids = [list(common.encode(tokenizer, {"prompt": prompt}, None, args).prompt) for prompt in prompts]
    assert sample_responses(trained, tokenizer, ids, 8, 0.0, 9)[1] == [*texts]
    assert [text for _, text, _ in lines[0]["samples_greedy"]] != [*texts]


def test_adapters_make_no_float32_copies_of_their_inputs(script, flags):
    """As on CUDA, frozen weights are bf16: peft would cast their outputs to float32, and autocast cast them back."""
    model, _, _ = script.load_policy(script.parse_args(flags(script, "--lora_rank", 4)))
    seen = []
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    for weight in model.parameters():
        weight.data = weight.data if weight.requires_grad else weight.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logp, _ = response_logps(model, [Example(torch.arange(4, 30), 5)])
    assert len(seen) == 14 and set(seen) == {torch.bfloat16} and logp.dtype == torch.float32


# --- What is trained and what is kept ---


def test_only_adapters_move_and_only_they_are_kept(script, run, policy, tmp_path, watched):
    found = watched(script)
    run(script, *CLIPPED)
    folder, before = tmp_path / "run", AutoModelForCausalLM.from_pretrained(policy).state_dict()
    frozen = {name.replace(".base_layer", ""): weight for name, weight in found["model"].state_dict().items()
              if "lora_" not in name}  # fmt: skip
    assert frozen.keys() == before.keys() and all(torch.equal(frozen[name], before[name]) for name in before)
    assert all(weight.grad is None for weight in found["model"].parameters() if not weight.requires_grad)
    adapters = adapters_of(found["model"])
    assert len(adapters) == 2 * 7 * 2 and all("lora_" in name for name in adapters)  # A and B, 7 matrices, 2 layers
    assert all(not torch.equal(weight, found["adapters"][name]) for name, weight in adapters.items())
    torch.serialization.add_safe_globals([script.Row, Example])
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["model"].keys() == adapters.keys()
    assert all(torch.equal(weight, adapters[name]) for name, weight in state["model"].items())
    moments = state["optimizer"]["state"].values()
    assert sum(m["exp_avg"].numel() for m in moments) == sum(weight.numel() for weight in adapters.values())


def test_final_is_an_adapter_that_loads_like_a_model(script, run, policy, tmp_path, watched, monkeypatch):
    found = watched(script)
    run(script, *CLIPPED)
    final, trained = tmp_path / "run" / "final", logits_of(found["model"])
    config = json.loads((final / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(policy) and config["r"] == 4
    assert not [*final.glob("model*")] and len(load_file(final / "adapter_model.safetensors")) == 28
    assert not torch.allclose(trained, logits_of(AutoModelForCausalLM.from_pretrained(policy)), atol=1e-2)
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(final)), trained, rtol=0, atol=1e-6)
    assert AutoTokenizer.from_pretrained(final).chat_template
    # The two lines that merge, as the README has them.
    assert MERGE in (ROOT / "README.md").read_text()
    merge = MERGE.replace("Qwen/Qwen2.5-1.5B-Instruct", str(policy)).replace("runs/dpo", str(tmp_path / "run"))
    exec(merge, {"AutoModelForCausalLM": AutoModelForCausalLM, "PeftModel": peft.PeftModel})
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    assert (tmp_path / "run" / "merged" / "model.safetensors").exists()
    torch.testing.assert_close(logits_of(merged), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("more", [("--sync_every", 3), ("--sync_every", 1, "--activation_checkpointing")])
def test_resume_is_bitwise(script, run, tmp_path, monkeypatch, more):
    """Stopped at update 5 of 8, it goes on from 4: between two syncs where k = 3."""
    log, more = script.log, (*CLIPPED, "--steps", 8, "--save_every", 2, *more)

    def log_or_stop(metrics, args):
        if metrics["step"] == 5:
            raise KeyboardInterrupt
        log(metrics, args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, "log", log_or_stop)
        run(script, *more, "--output_dir", tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "final").exists()
    runs = []
    for name, resume in (("stopped", ["--resume"]), ("whole", [])):
        lines = run(script, *more, "--output_dir", tmp_path / name, *resume)
        lines = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
        runs.append((lines, (tmp_path / name / "final" / "adapter_model.safetensors").read_bytes()))
    assert runs[0] == runs[1] and len(runs[0][0]) == 9


def test_another_rank_is_refused(run, tmp_path):
    run(dpo, *CLIPPED)
    with pytest.raises(BadInput, match="it ran with {'lora_rank': 4}"):
        run(dpo, *CLIPPED, "--lora_rank", 0, "--resume")
    assert len(metrics_of(tmp_path / "run")) == 5


def test_without_peft_one_line_says_what_to_install(script, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BadInput, match="^--lora_rank needs `pip install peft`: [^\n]*$"):
        run(script, *CLIPPED)
    assert not (tmp_path / "run").exists()
    run(script, "--steps", 1)  # and nothing else needs it


# --- common.py ---


def test_a_frozen_head_gets_no_gradient_and_no_room_for_one(monkeypatch):
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8), torch.randn(200, 8)
    target, given = torch.randint(200, (6,)), torch.randn(6)
    monkeypatch.setitem(common.BLOCK_BYTES, "cpu", 1000)  # several blocks
    grads = []
    for trained in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        if not trained:
            monkeypatch.setattr(torch, "empty_like", None)
        TokenLogps.apply(h, w, target).backward(given)
        assert (w.grad is not None) == trained
        grads.append(h.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("size", [1, 8])  # of the head's weights: logits of up to 4 and 30
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_model_takes_a_bf16_model_and_no_wrong_scale(policy, dtype, size, monkeypatch):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy, dtype=dtype).eval(), AutoTokenizer.from_pretrained(policy)
    with torch.no_grad():
        model.lm_head.weight.mul_(size)
    for seed in range(20):
        torch.manual_seed(seed)
        check_model(model, tokenizer, 256)
    forward = type(model).forward
    for scale in (0.8, 1.25):
        def altered(self, *args, scale=scale, **kwargs):
            output = forward(self, *args, **kwargs)
            output.logits *= scale
            return output

        monkeypatch.setattr(type(model), "forward", altered)
        with pytest.raises(BadInput, match="does not rebuild the logits of llama"):
            check_model(model, tokenizer, 256)


def test_frozen_bf16_weights_have_float32_adapters(policy):
    """As on CUDA, under autocast: the same forward twice is the same to the bit, gradients are float32."""
    torch.manual_seed(0)
    model = with_adapters(policy, {}, dtype=torch.bfloat16)
    examples = [Example(torch.arange(4, 30, dtype=torch.int32), 5), Example(torch.arange(9, 20, dtype=torch.int32), 3)]
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            before, _ = response_logps(model, examples)
        logp, _ = response_logps(model, examples)
    logp.sum().backward()
    assert torch.equal(before, logp) and logp.dtype == torch.float32
    grads = [weight.grad for name, weight in model.named_parameters() if "lora_B" in name]
    assert all(grad.dtype == torch.float32 and grad.abs().max() > 0 for grad in grads)
    assert {weight.dtype for weight in model.parameters() if not weight.requires_grad} == {torch.bfloat16}
