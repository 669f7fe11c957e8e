"""Nothing is lost: resume is bitwise, and kills, damaged files and NaNs leave a whole checkpoint."""

import copy
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import common
import humanline_dpo
import humanline_kto
from common import BadInput
from conftest import ROOT, metrics_of

TIMES = ("seconds", "tokens_per_second", "peak_memory_gib")


def same(a, b):
    """Bitwise equality of nested lists and dicts of tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def state(script, folder):
    torch.serialization.add_safe_globals([script.Row, common.Example])
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def without_times(folder):
    return [{key: value for key, value in line.items() if key not in TIMES} for line in metrics_of(folder)]


REWARD = """
def length(prompts, completions, **columns):
    return [float(len(text) % 7) for text in completions]
"""
SAMPLED = ("--sample_every", 4, "--steps", 10, "--save_every", 6, "--group_size", 4)  # the second stretch is 5 to 8
KILLED_IN = {
    "every update is a sync": ("--sync_every", 1),
    "between two syncs": ("--sync_every", 3),
    "plain": ("--plain",),
    "humanline sampling": ("--humanline", "sample"),
    "inside a stretch": (*SAMPLED, "--sync_every", 1),
    "inside a stretch, between two syncs": (*SAMPLED, "--sync_every", 3),
    "inside a stretch, no sync": (*SAMPLED, "--sync_every", 0),
}

KILLED = """
import os, torch
import {name} as script
save, saves = torch.save, []
def save_or_die(state, path):
    saves.append(path)
    if len(saves) == 2:
        path.write_bytes(b"half of it")
        os.kill(os.getpid(), 9)
    save(state, path)
torch.save = save_or_die
runs = [script.parse_args(argv) for argv in {runs!r}]
model = script.load_policy(runs[0])[0]  # imports, once, what all of them need
torch.optim.AdamW(model.parameters())
for args in runs:
    if os.fork() == 0:
        script.main(args)
        os._exit(0)
    assert os.wait()[1] == 9
"""


def test_a_run_killed_in_the_middle_of_a_save_goes_on_bitwise(script, run, flags, tmp_path):
    """kill -9 at the second save, of update 4 of 6 (sampled: 10 of 10): it goes on from the first, of 2 (6)."""
    (tmp_path / "reward.py").write_text(REWARD)
    for_all = ("--steps", 6, "--save_every", 2, "--eval_every", 3, "--max_new_tokens", 8)
    reward = ("--reward", f"{tmp_path / 'reward.py'}:length")
    runs = {name: (*for_all, *more, *(reward if name.startswith("inside") else ())) for name, more in KILLED_IN.items()}
    argvs = [flags(script, *more, "--output_dir", tmp_path / name) for name, more in runs.items()]
    code = KILLED.format(name=script.__name__, runs=argvs)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    for name, more in runs.items():
        broken, whole = tmp_path / name, tmp_path / f"{name}, whole"
        assert (broken / "checkpoint.tmp").read_bytes() == b"half of it" and not (broken / "final").exists()
        saved, stretch = state(script, broken), name.startswith("inside")
        assert (metrics_of(broken)[-1]["step"], saved["step"]) == ((10, 6) if stretch else (4, 2))
        assert "between" not in name or len(saved["window"]) == 1  # of 3
        with open(broken / "metrics.jsonl", "a") as file:
            file.write('{"step": 7, "lo')  # a line that the kill cut in two
        run(script, *more, "--output_dir", broken, "--resume")
        run(script, *more, "--output_dir", whole)
        resumed, uninterrupted = state(script, broken), state(script, whole)
        for folder, found in ((broken, resumed), (whole, uninterrupted)):  # seconds have more or fewer digits
            assert found.pop("log_bytes") == (folder / "metrics.jsonl").stat().st_size
        assert same(resumed, uninterrupted), name
        assert without_times(broken) == without_times(whole), name
        weights = [(folder / "final" / "model.safetensors").read_bytes() for folder in (broken, whole)]
        assert weights[0] == weights[1]
        samples = [line[mode] for line in without_times(broken) for mode in line if mode.startswith("samples")]
        assert [len(some) for some in samples] == ([4] * 5 * 2 if stretch else [])  # of evaluations and modes; prompts
    assert state(script, whole)["optimizer"]["state"]  # AdamW's moments are compared too


def test_resume_of_a_finished_run_changes_nothing(script, run, tmp_path):
    run(script)
    files = [tmp_path / "run" / name for name in ("final/model.safetensors", "metrics.jsonl")]
    before = [file.read_bytes() for file in files]
    run(script, "--resume")
    assert [file.read_bytes() for file in files] == before


def refused(run, script, *more):
    with pytest.raises(BadInput) as error:
        run(script, "--resume", *more)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def broken_after_2(run, monkeypatch, tmp_path):
    """broken_after_2(script, "--lr", 1): a run that ends with an error in update 3 and leaves the checkpoint of 2."""

    def train(script, *more):
        accumulate, calls = script.accumulate_gradient, []

        def accumulate_or_die(*what):
            calls.append(torch.is_grad_enabled())
            if sum(calls) == 3:
                raise torch.cuda.OutOfMemoryError
            return accumulate(*what)

        with monkeypatch.context() as patch:
            patch.setattr(script, "accumulate_gradient", accumulate_or_die)
            with pytest.raises(torch.cuda.OutOfMemoryError):
                run(script, "--save_every", 2, "--max_new_tokens", 8, *more)
        assert state(script, tmp_path / "run")["step"] == 2

    return train


FREE = {"--micro_tokens": 40, "--gen_batch": 3, "--activation_checkpointing": None, "--save_every": 3, "--eval_every": 1}


@pytest.mark.parametrize("sampled", [False, True])
def test_what_only_cuts_saves_or_shows_may_differ(script, run, broken_after_2, tmp_path, sampled):
    """Out of memory, resume with smaller micro-batches: it goes on as if nothing had been, from another folder too."""
    (tmp_path / "reward.py").write_text(REWARD)
    more = ("--sample_every", 4, "--group_size", 4, "--reward", f"{tmp_path / 'reward.py'}:length") if sampled else ()
    whole = run(script, *more, "--output_dir", tmp_path / "whole", "--max_new_tokens", 8)
    broken_after_2(script, *more)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    free = [x for flag, value in FREE.items() for x in (flag, value) if x is not None]
    lines = run(script, *more, "--max_new_tokens", 8, *free, "--output_dir", tmp_path / "elsewhere", "--resume")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    for ours, theirs in zip(lines, whole):
        names = {name for name in theirs if "sample" not in name} - {*TIMES}  # --gen_batch draws others
        assert {x: ours[x] for x in names} == pytest.approx({x: theirs[x] for x in names}, rel=1e-4, abs=1e-5)
    assert sum("eval_loss" in line or "eval_gain" in line or "eval_reward_greedy" in line for line in lines) == 3  # 0, 3, 4


def test_all_other_flags_may_not_differ(script, flags):
    """Each flag in turn: it is in what a checkpoint says of its run, or it may differ."""
    args = script.parse_args(flags(script))
    run = script.identity(args, updates=4, rows=9, data_crc32=1)
    for name in vars(args):
        other = copy.copy(args)
        setattr(other, name, "another")
        free = name in {*(flag[2:] for flag in FREE), "device", "output_dir", "resume", "overwrite"}
        assert (script.identity(other, updates=4, rows=9, data_crc32=1) == run) == free, name
    assert {"steps", "epochs", "lr", "data", "lora_rank", "updates", "rows", "data_crc32", "script"} <= run.keys()


def test_resume_of_another_run_is_refused(run, data, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data["dpo"].read_bytes())
    run(humanline_dpo, "--data", path)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for more, difference in [
        (("--lr", 0.5), "it ran with {'lr': 0.001}; take the same, or begin with --overwrite"),
        (("--seed", 1), "it ran with {'seed': 0"),
        (("--plain",), "'sync_every': 1"),
        (("--steps", 9), "it ran with {'steps': 4, 'updates': 4}"),
        (("--epochs", 2), "it ran with {'epochs': 1}"),
        (("--log_eps_P=-1.0",), "it ran with {'log_eps_P': -1.5}"),
    ]:
        assert difference in refused(run, humanline_dpo, "--data", path, *more)
    assert "humanline_dpo.py" in refused(run, humanline_kto, "--data", data["kto"])  # another script
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("change", ["a letter", "a label", "a row less", "another order"])
def test_resume_with_other_data_is_refused(script, run, data, tmp_path, change):
    """In the same file; a checksum of token ids, labels and rewards finds it, at the same number of rows too."""
    path = tmp_path / "rows.jsonl"
    rows = data[script.__name__.removeprefix("humanline_")].read_text().splitlines(keepends=True)
    path.write_text("".join(rows))
    run(script, "--data", path, "--eval_size", 0)
    if change == "a letter":
        at = rows[20].index('"prompt": "') + 11
        rows[20] = rows[20][:at] + ("a" if rows[20][at] != "a" else "b") + rows[20][at + 1 :]
    if change == "a label":
        row = json.loads(rows[20])
        if script is humanline_dpo:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
        elif script is humanline_kto:
            row["label"] = not row["label"]
        else:
            row["rewards"][1] += 1e-6
        rows[20] = json.dumps(row) + "\n"
    path.write_text("".join(rows[:-1] if change == "a row less" else rows[::-1] if change == "another order" else rows))
    assert "'data_crc32': " in refused(run, script, "--data", path, "--eval_size", 0)


def test_a_template_that_writes_the_date_is_resumed_on_the_next_day(script, run, policy, tmp_path):
    """Llama 3's and others: the checksum is that of rows as they were read, not of their tokens."""
    shutil.copytree(policy, tmp_path / "model")
    template = (policy / "chat_template.jinja").read_text()
    for day in "ab":
        (tmp_path / "model/chat_template.jinja").write_text(day + template)
        run(script, "--model", tmp_path / "model", "--save_every", 2, *["--resume"] * (day == "b"))


def test_two_runs_into_one_folder(run, tmp_path, monkeypatch):
    """The one that is later at step 0 ends there, and the other's lines stay."""
    evaluate = humanline_dpo.evaluate

    def slow(*given):
        monkeypatch.setattr(humanline_dpo, "evaluate", evaluate)
        run(humanline_dpo)  # begun meanwhile
        return evaluate(*given)

    monkeypatch.setattr(humanline_dpo, "evaluate", slow)
    with pytest.raises(BadInput, match="--output_dir .*run: .Errno 17. File exists"):
        run(humanline_dpo)
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [0, 1, 2, 3, 4]


def test_a_checkpoint_that_lacks_a_flag_names_it(script, run, tmp_path):
    """As one of an older version does."""
    run(script)
    saved = state(script, tmp_path / "run")
    del saved["run"]["lora_rank"]
    torch.save(saved, tmp_path / "run" / "checkpoint.pt")
    assert "it ran with {'lora_rank': None}" in refused(run, script)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut short", "not a zip"])
def test_a_checkpoint_that_does_not_load_is_named(script, run, tmp_path, damage):
    run(script)
    path = tmp_path / "run" / "checkpoint.pt"
    content = path.read_bytes()
    path.write_bytes({"cut short": content[: len(content) // 2], "not a zip": b"x" * 999}.get(damage, b""))
    if damage == "missing":
        path.unlink()
    assert f"--resume: {path}: " in refused(run, script)


def test_resume_without_a_run_is_refused(script, run, tmp_path):
    assert "--resume: " + str(tmp_path / "run" / "checkpoint.pt") in refused(run, script)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_nothing_of_a_non_finite_update_is_kept(script, run, spy, tmp_path, monkeypatch, fault):
    """At update 3 the loss is NaN, or it is finite and its gradient is not."""
    seen = spy(script)
    run(script, "--save_every", 1, "--steps", 2, "--output_dir", tmp_path / "good")
    seen.clear()
    perceive = script.perceive

    def perceive_badly(logratio, mask, *more):
        z, low, high = perceive(logratio, mask, *more)
        if len(seen) == 3 and logratio.requires_grad:
            z = z * float("nan") if fault == "loss" else z + (z - z.detach()).abs().sqrt()
        return z, low, high

    monkeypatch.setattr(script, "perceive", perceive_badly)
    with pytest.raises(BadInput, match="update 3: .*nan.*not applied; begin anew with a lower --lr, --resume would"):
        run(script, "--save_every", 1)
    saved, good = state(script, tmp_path / "run"), state(script, tmp_path / "good")
    assert saved["step"] == 2 and same(saved["model"], good["model"])
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [0, 1, 2]
    assert not (tmp_path / "run" / "final").exists()


def test_a_disk_that_is_full_leaves_the_checkpoint_before(script, run, tmp_path, monkeypatch):
    save = torch.save

    def save_half(content, path):
        save(content, path)
        if content["step"] == 4:
            path.write_bytes(path.read_bytes()[:1000])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(BadInput, match=r"^cannot save in --output_dir .*run \(is the disk full\?\): .* No space left"):
        run(script, "--save_every", 3)
    monkeypatch.undo()
    assert state(script, tmp_path / "run")["step"] == 3


SMALLER = "^lower --micro_tokens, or add --activation_checkpointing or --lora_rank: CUDA out of memory. Tried"
SHORTAGES = {  # what runs out of memory: the module, its attribute, the words
    "loading": (AutoModelForCausalLM, "from_pretrained", "^--model .*: it is too large: CUDA out of memory"),
    "the check": (humanline_dpo, "check_model", "^--model .*: it is too large: CUDA out of memory"),
    "sampling": (LlamaForCausalLM, "generate", "^lower --gen_batch: CUDA out of memory"),
    "scoring": (humanline_dpo, "policy_logps", SMALLER),
    "backward": (torch.Tensor, "backward", SMALLER),
    "the first step": (torch.optim.AdamW, "step", SMALLER),
}


@pytest.mark.parametrize("name", SHORTAGES)
def test_out_of_memory_names_what_helps(name, run, monkeypatch):
    module, attribute, words = SHORTAGES[name]

    def run_out(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(module, attribute, run_out)
    with pytest.raises(BadInput, match=words):
        run(humanline_dpo, "--reward", f"{ROOT}/tests/experiments/gpu.py:chance", "--max_new_tokens", 4)


def test_overwrite_starts_anew(script, run, tmp_path):
    run(script, "--save_every", 1)
    lines = run(script, "--overwrite", "--steps", 2)
    assert state(script, tmp_path / "run")["step"] == 2 and [line["step"] for line in lines] == [0, 1, 2]


def test_overwrite_leaves_nothing_of_the_run_before(script, run, tmp_path, monkeypatch):
    """One that fails at once has no weights, no checkpoint and no metrics of another; one whose input is bad has
    touched nothing."""
    run(script)
    with pytest.raises(BadInput):
        run(script, "--overwrite", "--data", "nowhere.jsonl")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint.pt", "metrics.jsonl", "final"}
    monkeypatch.setattr(script, "evaluate", lambda *what: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(script, "--overwrite")
    assert list((tmp_path / "run").iterdir()) == []


def test_an_output_folder_that_is_empty_is_taken(script, run, tmp_path):
    (tmp_path / "run").mkdir()
    assert len(run(script, "--steps", 1)) == 2
    with pytest.raises(BadInput, match="--output_dir .*run is no empty folder; add --resume or --overwrite"):
        run(script, "--steps", 1)


def test_from_the_shell(flags, tmp_path):
    """A bad input is one line and exit 1; Ctrl-C too, and its line holds the command that goes on."""
    path = ROOT / "humanline_dpo.py"  # this part is the same in all three
    long = flags(humanline_dpo, "--steps", 100, "--save_every", 1, "--system_prompt", "be9")

    def start(*argv):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, *argv], **pipes, cwd=ROOT)

    missing = start(path, *flags(humanline_dpo, "--data", "nowhere.jsonl", "--output_dir", tmp_path / "bad"))
    interrupted = start(path.name, *long)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.time() + 60
    while time.time() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.02)
    interrupted.send_signal(signal.SIGINT)
    error = missing.communicate()[1].splitlines()
    assert missing.returncode == 1 and error[-1].startswith("error: nowhere.jsonl: ") and "Traceback" not in str(error)
    error = interrupted.communicate(timeout=60)[1].splitlines()
    assert interrupted.returncode == 1 and "Traceback" not in str(error)
    told, _, command = error[-1].partition(": ")
    assert told.endswith("stopped; go on from any checkpoint") and len(metrics_of(tmp_path / "run")) < 101
    on = start(*shlex.split(command)[1:])
    assert on.wait(60) == 0, on.communicate()
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == list(range(101))
    assert json.loads((tmp_path / "run" / "final" / "config.json").read_text())["model_type"] == "llama"
