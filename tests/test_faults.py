"""Nothing is lost: resume is bitwise, and kills, full disks, damaged files and NaNs leave whole files."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

import common
import humanline_dpo
from common import BadInput
from conftest import ROOT, metrics_of

TIMES = ("seconds", "tokens_per_second", "peak_memory_gib")


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("step-*"))


def same(a, b):
    """Bitwise equality of nested lists and dicts of tensors, but for the clock."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key not in TIMES)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def state(folder, step):
    return torch.load(folder / f"step-{step:06d}.pt", weights_only=True)


def lines(folder):
    return [{key: value for key, value in line.items() if key not in TIMES} for line in metrics_of(folder)]


@pytest.mark.parametrize("more", [("--sync_every", 1), ("--sync_every", 3), ("--plain",), ("--humanline", "sample")],
                         ids=lambda more: "".join(map(str, more)))  # fmt: skip
def test_resume_goes_on_bitwise(script, run, tmp_path, more):
    """Stopped at update 4 of 7 (between two syncs for k = 3), and as if it never had been."""
    more = (*more, "--steps", 7, "--save_every", 2, "--eval_every", 3)
    whole = run(script, *more, "--output_dir", tmp_path / "whole")
    assert checkpoints(tmp_path / "whole") == ["step-000006.pt", "step-000007.pt"]  # the last two
    broken = tmp_path / "broken"
    stop_after(script, run, 4, *more, "--output_dir", broken)
    assert checkpoints(broken) == ["step-000002.pt", "step-000004.pt"]
    summary = run(script, *more, "--output_dir", broken, "--resume")
    assert same(state(broken, 7), state(tmp_path / "whole", 7))
    assert lines(broken) == lines(tmp_path / "whole")
    assert summary["after"] == whole["after"] and summary["before"] == whole["before"]
    assert summary["tokens"] == whole["tokens"]
    weights = [(folder / "final" / "model.safetensors").read_bytes() for folder in (broken, tmp_path / "whole")]
    assert weights[0] == weights[1]
    assert state(broken, 7)["optimizer"]["state"]  # AdamW's moments came along


def stop_after(script, run, step, *more, how=signal.SIGINT):
    """Send ourselves a signal in the middle of an update."""
    accumulate, count = script.accumulate_gradient, [0]

    def accumulate_and_signal(model, batch, args):
        count[0] += 1
        if count[0] == step:
            signal.raise_signal(how)
        return accumulate(model, batch, args)

    script.accumulate_gradient = accumulate_and_signal
    try:
        with pytest.raises(SystemExit) as stopped:
            run(script, *more)
    finally:
        script.accumulate_gradient = accumulate
    return stopped.value.code


@pytest.mark.parametrize("how, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_update_and_saves(script, run, tmp_path, how, code):
    handler = signal.getsignal(how)
    assert stop_after(script, run, 2, how=how) == code
    assert checkpoints(tmp_path / "run") == ["step-000002.pt"] and len(lines(tmp_path / "run")) == 3
    assert signal.getsignal(how) is handler  # the caller's handler is back


def test_a_second_signal_stops_at_once(script, run, tmp_path, monkeypatch):
    class Gone(BaseException):
        pass

    def leave(code):
        raise Gone(code)

    monkeypatch.setattr(os, "_exit", leave)
    accumulate = script.accumulate_gradient
    monkeypatch.setattr(
        script,
        "accumulate_gradient",
        lambda *a: (signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGINT), accumulate(*a)),
    )
    with pytest.raises(Gone, match="130"):
        run(script)


@pytest.mark.parametrize("damage", ["cut short", "a bit flipped", "directory flipped", "not a zip"])
def test_a_damaged_checkpoint_is_passed_over(script, run, tmp_path, capsys, damage):
    more = ("--steps", 6, "--save_every", 2, "--sync_every", 3)
    run(script, *more)
    expected = state(tmp_path / "run", 6)
    newest = tmp_path / "run" / "step-000006.pt"
    content = bytearray(newest.read_bytes())
    if damage == "a bit flipped":
        content[len(content) // 2] ^= 1
    if damage == "directory flipped":  # the version that is needed to extract the first entry
        content[content.rindex(b"PK\x01\x02", 0, content.index(b"PK\x01\x02") + 4) + 6] ^= 128
    newest.write_bytes(content[: len(content) // 2] if damage == "cut short" else
                       b"x" if damage == "not a zip" else content)  # fmt: skip
    run(script, *more, "--resume")
    out = capsys.readouterr().out
    assert "step-000006.pt: damaged" in out and "resuming from" in out and "step-000004.pt" in out
    assert same(state(tmp_path / "run", 6), expected)


def test_resume_without_a_checkpoint_starts_over_and_says_so(script, run, tmp_path, capsys):
    run(script, "--resume")
    assert "no whole checkpoint" in capsys.readouterr().out
    assert checkpoints(tmp_path / "run") == ["step-000004.pt"]


def test_resume_of_a_finished_run_only_writes_final_again(script, run, tmp_path):
    first = run(script)
    before = (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    again = run(script, "--resume")
    assert again["after"] == first["after"] and again["before"] == first["before"]
    assert (tmp_path / "run" / "final" / "model.safetensors").read_bytes() == before
    assert len(lines(tmp_path / "run")) == 5


@pytest.mark.parametrize("more, difference", [
    (("--lr", 0.5), "--lr 0.001, not 0.5"),
    (("--seed", 1), "--seed 0, not 1"),
    (("--plain",), r"--sync_every \d+, not 0"),
    (("--steps", 9), "--steps 4, not 9"),
    (("--max_rows", 40), "data with SHA-256"),
], ids=lambda x: x[0] if isinstance(x, tuple) else "")  # fmt: skip
def test_resume_with_other_arguments_is_refused(script, run, more, difference):
    run(script)
    with pytest.raises(BadInput, match=difference):
        run(script, "--resume", *more)


def test_resume_of_another_script_is_refused(script, run, tmp_path):
    run(script)
    path = tmp_path / "run" / "step-000004.pt"
    content = torch.load(path, weights_only=True)
    content["run"]["script"] = "another"
    torch.save(content, path)
    with pytest.raises(BadInput, match="script another"):
        run(script, "--resume")


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_nothing_of_a_non_finite_update_is_kept(script, run, tmp_path, monkeypatch, fault):
    """At update 3 the loss is NaN, or it is finite and its gradient is not."""
    monkeypatch.setitem(common.MAX_PADDING, "cpu", 10**6)  # one micro-batch an update, so that they can be counted
    run(script, "--save_every", 1, "--steps", 2, "--output_dir", tmp_path / "good")
    perceive, count = script.perceive, [0]

    def perceive_badly(logratio, mask, *more):
        count[0] += logratio.requires_grad  # KTO's reference point is perceived too, without
        z, low, high = perceive(logratio, mask, *more)
        if count[0] == 3 and logratio.requires_grad:
            z = z * float("nan") if fault == "loss" else z + (z - z.detach()).abs().sqrt()
        return z, low, high

    monkeypatch.setattr(script, "perceive", perceive_badly)
    with pytest.raises(script.Stopped, match="update 3: .*nan.*not applied"):
        run(script, "--save_every", 1)
    folder = tmp_path / "run"
    assert checkpoints(folder) == ["step-000001.pt", "step-000002.pt"]
    assert same(state(folder, 2)["model"], state(tmp_path / "good", 2)["model"])
    assert not (folder / "final").exists()


def test_a_full_disk_leaves_the_checkpoint_before(script, run, tmp_path, monkeypatch):
    """A real limit on the size of files, from update 3 on."""
    log, limits = script.log, resource.getrlimit(resource.RLIMIT_FSIZE)

    def log_and_fill(folder, metrics):
        log(folder, metrics)
        if metrics["step"] == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    monkeypatch.setattr(script, "log", log_and_fill)
    try:
        with pytest.raises(script.Stopped, match="step-000004.pt: not written"):
            run(script, "--save_every", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["metrics.jsonl", "step-000002.pt"]
    monkeypatch.setattr(script, "log", log)
    run(script, "--save_every", 2, "--resume")


def test_a_full_disk_at_the_end_keeps_the_checkpoint(script, run, tmp_path, monkeypatch):
    save, limits = script.save_final, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_full_disk(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        save(*args)

    monkeypatch.setattr(script, "save_final", save_on_a_full_disk)
    try:
        with pytest.raises(script.Stopped, match="final: not written"):
            run(script)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["metrics.jsonl", "step-000004.pt"]
    monkeypatch.setattr(script, "save_final", save)
    run(script, "--resume")
    assert (tmp_path / "run" / "final").exists()


def test_a_line_of_metrics_cut_by_a_kill_is_dropped(script, run, tmp_path):
    more = ("--steps", 5, "--save_every", 2)
    stop_after(script, run, 3, *more)
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "lo')
    run(script, *more, "--resume")
    assert [line["step"] for line in lines(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]


def test_weights_that_overflow_are_not_saved(script, run, tmp_path):
    """Finite loss and gradient, but an update so large that the weights are not finite."""
    with pytest.raises(script.Stopped, match="weights are not finite"):
        run(script, "--lr", 3e38, "--warmup", 0, "--steps", 1, "--eval_size", 0)
    assert not (tmp_path / "run" / "final").exists() and checkpoints(tmp_path / "run") == []


def test_resume_does_not_replace_a_trained_policy(script, run, tmp_path):
    run(script)
    for path in (tmp_path / "run").glob("step-*"):
        path.write_bytes(b"")
    with pytest.raises(BadInput, match="a policy in final/"):
        run(script, "--resume")


KILLED = """
import os, sys, torch
sys.path.insert(0, {root!r})
import {name} as script
save = torch.save
def save_or_die(state, file):
    if state["step"] < 4:
        return save(state, file)
    file.write(b"half of it")
    file.flush()
    os.kill(os.getpid(), 9)
torch.save = save_or_die
script.main(script.parse_args({argv!r}))
"""


def test_kill_9_in_the_middle_of_a_save(script, run, flags, tmp_path):
    more = ("--steps", 6, "--save_every", 2, "--sync_every", 3)
    run(script, *more, "--output_dir", tmp_path / "whole")
    code = KILLED.format(root=str(ROOT), name=script.__name__, argv=flags(script, *more))
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == -9, process.stderr
    folder = tmp_path / "run"
    assert checkpoints(folder) == ["step-000002.pt"] and list(folder.glob("writing-*"))
    run(script, *more, "--resume")
    assert same(state(folder, 6), state(tmp_path / "whole", 6))
    assert lines(folder) == lines(tmp_path / "whole") and not list(folder.glob("writing-*"))


def test_from_the_shell(flags, tmp_path):
    """The process itself: a bad input is one line and exit 1, --help works, SIGTERM exits 143."""
    script, path = humanline_dpo, ROOT / "humanline_dpo.py"  # this part is the same in all three
    start = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    bad = subprocess.Popen([sys.executable, path, *flags(script, "--lr", "-1")], **start)
    usage = subprocess.Popen([sys.executable, path, "--help"], **start)
    long = subprocess.Popen([sys.executable, path, *flags(script, "--steps", 10**4)], **start)
    error = bad.communicate()[1]
    assert bad.returncode == 1 and error == "error: --lr -1.0: must be positive and finite\n"
    out = usage.communicate()[0]
    assert usage.returncode == 0 and "--sync_every" in out
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.time() + 60
    while time.time() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        time.sleep(0.1)
    long.send_signal(signal.SIGTERM)
    out, error = long.communicate(timeout=60)
    assert long.returncode == 143 and "go on with --resume" in out and "Traceback" not in error
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert checkpoints(tmp_path / "run")[-1] == f"step-{last:06d}.pt"


def test_overwrite_starts_anew(script, run, tmp_path):
    run(script, "--save_every", 1)
    run(script, "--overwrite", "--steps", 2)
    assert checkpoints(tmp_path / "run") == ["step-000002.pt"] and len(lines(tmp_path / "run")) == 3
