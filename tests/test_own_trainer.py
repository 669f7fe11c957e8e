"""The blocks of "Put it into your own trainer" are taken out of the text and run: they make the updates of
humanline_dpo.py and humanline_grpo.py; each of the mistakes that the section warns of does not."""

import copy
import functools
import importlib.util
import itertools
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import humanline_dpo as dpo
import humanline_grpo as grpo
from conftest import ROOT, metrics_of

README = ROOT / "README.md"
TRL = importlib.util.find_spec("trl") is not None
needs_trl = pytest.mark.skipif(not TRL, reason="trl is not installed")
RANKS = [0, pytest.param(4, marks=pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="no peft"), id="lora")]
BLOCKS = ("own-loop", "trl")  # in the text's order
LOG_EPS, BETA, LR, UPDATES = (-0.2, 0.3), 0.5, 1e-2, 6


def block(name, *edits):
    """A block's code; edits, (old, new), make a mutant of it."""
    section = README.read_text().partition("## Put it into your own trainer")[2]
    code = re.findall(r"^```python\n(.*?)^```", section, re.S | re.M)[BLOCKS.index(name)]
    for old, new in edits:
        assert old in code, old
        code = code.replace(old, new)
    return code


@pytest.fixture(scope="module")
def made(policy, data, tmp_path_factory):
    """made(script, k): the batches of a run of the script, the losses of its updates, its metrics; with a rank also
    made.adapters, those that the run began with."""

    @functools.cache
    def make(script, k, rank=0):
        folder, batches, accumulate = tmp_path_factory.mktemp("run") / "run", [], script.accumulate_gradient
        load_policy = script.load_policy

        def load_and_tell(args):
            loaded = load_policy(args)
            weights = loaded[0].named_parameters()
            adapters[script, k, rank] = {name: w.detach().clone() for name, w in weights if "lora_" in name}
            return loaded

        def accumulate_and_tell(model, batch, mode, args):
            if torch.is_grad_enabled():
                batches.append(batch)
            return accumulate(model, batch, mode, args)

        argv = ["--model", policy, "--data", data[script.__name__[10:]], "--output_dir", folder, "--eval_size", 0,
                "--max_length", 64, "--batch_size", 8, "--steps", UPDATES, "--beta", BETA, "--lr", LR, "--warmup", 0,
                "--max_grad_norm", 1, "--log_eps_P", LOG_EPS[0], "--log_eps_R", LOG_EPS[1], "--sync_every", k,
                "--device", "cpu", "--lora_rank", rank]  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "accumulate_gradient", accumulate_and_tell)
            patch.setattr(script, "load_policy", load_and_tell)
            script.main(script.parse_args([str(x) for x in argv]))
        lines = metrics_of(folder)[1:]
        return batches, [line["loss"] for line in lines], lines

    adapters = make.adapters = {}
    return make


def difference(ours, theirs):
    assert len(ours) == len(theirs) == UPDATES
    return max(abs(a - b) for a, b in zip(ours, theirs))


def test_the_runs_tell_mistakes_apart(made):
    """In the runs that the blocks are held against, tokens are clipped, and k matters from update 3 on."""
    (_, one, lines), (_, three, others) = made(dpo, 1), made(dpo, 3)
    assert one[:2] == three[:2] and one[0] == pytest.approx(0.693147, abs=1e-6)
    assert min(abs(a - b) for a, b in zip(one[2:4], three[2:4])) > 1e-3
    assert all(line["unclipped"] < 0.9 for line in (*lines[1:], *others[1:]))


# --- (a) and (b): any loop ---


def load(policy):
    return AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()


def run_loop(code, model, batches, k, clamp_sums=False):
    """The losses of a block's updates, each of two micro-batches with padding."""
    ref_model, losses = copy.deepcopy(model), []
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)

    def bound(*_):
        torch.nn.utils.clip_grad_norm_(trained, 1.0)

    optimizer.register_step_pre_hook(bound)

    def logps(net, micro):
        logp, mask = common.response_logps(net, [example for row in micro for example in row.examples])
        assert not mask.all()
        return logp.masked_fill(~mask, 1e4 if net is ref_model else -1e4), mask  # what is on padding must not matter

    def loss_of(z, mask):
        reward = z.sum(-1).clamp(*LOG_EPS) if clamp_sums else z.sum(-1)
        losses.append(-F.logsigmoid(BETA * (reward[0::2] - reward[1::2])).mean())
        return losses[-1]

    updates = [[batch[:4], batch[4:]] for batch in batches]
    space = {"torch": torch, "itertools": itertools, "model": model, "ref_model": ref_model, "k": k, "logps": logps,
              "loss_of": loss_of, "optimizer": optimizer, "updates": updates, "log_eps_P": LOG_EPS[0],
              "log_eps_R": LOG_EPS[1]}  # fmt: skip
    exec(code, space)
    return [(a.item() + b.item()) / 2 for a, b in zip(losses[0::2], losses[1::2])]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", ["own-loop"])
def test_the_loops_make_the_scripts_updates(name, k, made, policy):
    batches, losses, _ = made(dpo, k)
    assert difference(losses, run_loop(block(name), load(policy), batches, k)) <= 1e-5


LATE = {
    "own-loop": [("ref_model.load_state_dict(model.state_dict())", "late = True"),
                 ("    optimizer.step()\n", "    optimizer.step()\n    if step % k == 0:\n"
                  "        ref_model.load_state_dict(model.state_dict())\n")],
}  # fmt: skip
CLAMP = ".clamp(log_eps_P, log_eps_R)"


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", LATE)
def test_the_loops_mutants_differ(name, k, made, policy):
    batches, losses, _ = made(dpo, k)
    late = run_loop(block(name, *LATE[name]), load(policy), batches, k)
    assert difference(losses, late) > 1e-3
    if k == 1:  # silently off
        assert late == pytest.approx([0.693147] * UPDATES, abs=1e-6)
    assert difference(losses, run_loop(block(name, (CLAMP, "")), load(policy), batches, k)) > 1e-3
    assert difference(losses, run_loop(block(name, (CLAMP, "")), load(policy), batches, k, clamp_sums=True)) > 1e-3


# --- (c): TRL ---


def rows_of(script, batches, tokenizer):
    """The batches as rows of TRL, in order."""

    def text(example):  # without the template's tokens
        prompt, answer = example.ids[: example.prompt_len], example.ids[example.prompt_len :]
        return tokenizer.decode(prompt, skip_special_tokens=True), tokenizer.decode(answer, skip_special_tokens=True)

    def message(role, content):
        return [{"role": role, "content": content}]

    rows = [row for batch in batches for row in batch]
    if script is grpo:  # both of a group stand together
        groups = {}
        for i, batch in enumerate(batches):
            for row in batch:
                groups.setdefault((i, row.examples[0].prompt), []).append(row)
        pairs = [(row, advantage) for group in groups.values()
                 for row, advantage in zip(group, grpo.group_advantages([row.reward for row in group]))]  # fmt: skip
        return [{"prompt": message("user", text(row.examples[0])[0]), "ids": row.examples[0].ids.tolist(),
                 "prompt_len": row.examples[0].prompt_len, "advantage": advantage} for row, advantage in pairs]  # fmt: skip
    return [{"prompt": message("user", text(row.examples[0])[0])}
            | {side: message("assistant", text(example)[1]) for side, example in zip(("chosen", "rejected"), row.examples)}
            for row in rows]  # fmt: skip


def train_with_trl(code, kind, policy, rows, k, folder, prepare=lambda: None, adapters=None, **more):
    """A trainer of the block after its six updates, and their losses. prepare() runs before it is made; adapters,
    if any, are trained in place of the weights."""
    from datasets import Dataset
    from trl import DPOConfig, GRPOConfig

    space, tokenizer = {}, AutoTokenizer.from_pretrained(policy)
    exec(code, space)
    every = dict(output_dir=str(folder), max_steps=UPDATES, learning_rate=LR, lr_scheduler_type="constant",
                 max_grad_norm=1.0, beta=BETA, ref_model_sync_steps=k, per_device_train_batch_size=4,
                 gradient_accumulation_steps=2, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
                 logging_steps=1, disable_tqdm=True, gradient_checkpointing=False) | more  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    if adapters:
        import peft

        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        assert not model.load_state_dict(adapters, strict=False).unexpected_keys
        model = wrapped
    if kind == "dpo":
        args = DPOConfig(max_length=64, train_sampling_strategy="sequential", **every)
        data, options = Dataset.from_list(rows), {}
    else:
        args = GRPOConfig(num_generations=2, max_completion_length=64, shuffle_dataset=False, scale_rewards="none",
                          use_bias_correction_kl=False, **every)  # fmt: skip
        data = Dataset.from_list([{"prompt": row["prompt"]} for row in rows[::2]])  # pairs of one prompt
        queue = iter(rows)

        def rollout(prompts, trainer):
            taken = [next(queue) for _ in prompts]
            assert [row["prompt"] for row in taken] == prompts
            return {"prompt_ids": [row["ids"][: row["prompt_len"]] for row in taken], "logprobs": None,
                    "completion_ids": [row["ids"][row["prompt_len"] :] for row in taken],
                    "advantage": [row["advantage"] for row in taken]}  # fmt: skip

        options = {"rollout_func": rollout, "reward_funcs": lambda advantage, **_: advantage}
    prepare()
    trainer = space[f"Humanline{kind.upper()}Trainer"](
        model=model, args=args, train_dataset=data, processing_class=tokenizer, **options)  # fmt: skip
    trainer.log_eps_P, trainer.log_eps_R = LOG_EPS
    trainer.train()
    return trainer, [line["loss"] for line in trainer.state.log_history if "loss" in line]


@needs_trl
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("script", [dpo, grpo])
def test_trl_makes_the_scripts_updates(script, k, rank, made, policy, tmp_path):
    batches, losses, lines = made(script, k, rank)
    rows, adapters = rows_of(script, batches, AutoTokenizer.from_pretrained(policy)), made.adapters[script, k, rank]
    assert bool(adapters) == bool(rank) and min(line["unclipped"] for line in lines) < 0.95
    more = dict(policy=policy, rows=rows, k=k, folder=tmp_path, adapters=adapters)
    trainer, theirs = train_with_trl(block("trl"), script.__name__[10:], **more)
    assert difference(losses, theirs) <= 1e-5
    if rank:  # there is no second model, and with the copy after the step, or none, it is another run
        assert trainer.ref_model is None and [*trainer.model.peft_config] == ["default", "ref"]
        copy = 'policy.get_parameter(name.replace(".default.", ".ref.")).data.copy_(weight)'
        _, mutant = train_with_trl(block("trl", (copy, "pass")), script.__name__[10:], **more)
        assert difference(losses, mutant) > 1e-3


@needs_trl
def test_the_trl_mutants_differ(made, policy, tmp_path):
    """Among them TRL's own sync, which comes after the step."""
    batches, losses, _ = made(dpo, 1)
    rows = rows_of(dpo, batches, AutoTokenizer.from_pretrained(policy))
    sync = "SyncRefModelCallback.sync_target_model(policy, self.ref_model, 1.0)"
    clamp = "z.clamp(self.log_eps_P, self.log_eps_R)"
    total = "z.sum(1, keepdim=True)"
    summed = f"z + ({total}.clamp(self.log_eps_P, self.log_eps_R) - {total}) / z.shape[1]"
    mutants = {"no clamp": [(clamp, "z")], "clamp of the sum": [(clamp, summed)], "no copy": [(sync, "pass")]}
    for name, edits in mutants.items():
        _, theirs = train_with_trl(block("trl", *edits), "dpo", policy, rows, 1, tmp_path)
        assert difference(losses, theirs) > 1e-3, name
    own = {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0}
    _, theirs = train_with_trl(block("trl", (sync, "pass")), "dpo", policy, rows, 1, tmp_path, **own)
    assert theirs == pytest.approx([0.693147] * UPDATES, abs=1e-6)


FSDP = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}, "ddp_backend": "gloo",
        "gradient_accumulation_steps": 1}  # fmt: skip


def worker(spec):
    """One process of the run below; the first leaves the losses."""
    from accelerate import DistributedType, PartialState

    def pretend():  # on CPUs accelerate 1.15 takes no heed of FSDP, and quietly runs DDP
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    trainer, losses = train_with_trl(block("trl"), "dpo", spec["policy"], spec["rows"], 1, spec["folder"], pretend,
                                     **FSDP)  # fmt: skip
    models = trainer.accelerator.unwrap_model(trainer.model), trainer.ref_model
    kinds = sorted({type(weight).__name__ for model in models for weight in model.parameters()})
    if os.environ["RANK"] == "0":
        found = {"losses": losses, "kind": trainer.accelerator.distributed_type, "weights": kinds}
        (Path(spec["folder"]) / "found.json").write_text(json.dumps(found))


@needs_trl
def test_trl_with_fsdp2_makes_the_same_updates(made, policy, tmp_path):
    """Two processes that shard policy and reference. A CPU will do, through gloo, if accelerate is told that it
    is a GPU."""
    batches, losses, _ = made(dpo, 1)
    rows = rows_of(dpo, batches, AutoTokenizer.from_pretrained(policy))
    spec = {"policy": str(policy), "rows": rows, "folder": str(tmp_path)}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in "01":
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2",
                 "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # fmt: skip
        command = [sys.executable, __file__, str(tmp_path / "spec.json")]
        processes.append(subprocess.Popen(command, env=os.environ | where, stdout=subprocess.PIPE,
                                          stderr=subprocess.STDOUT, text=True))  # fmt: skip
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), said[0][-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["kind"] == "FSDP" and found["weights"] == ["DTensor"]
    assert difference(losses, found["losses"]) <= 1e-5


if __name__ == "__main__":
    worker(json.loads(Path(sys.argv[1]).read_text()))
