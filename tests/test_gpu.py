"""gpu.py without a GPU: every step's code on the smallest shapes, and what it says of faults, of errors and of time."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench
import common
import gpu
import humanline_dpo
import real_model
from conftest import ROOT

TINY = SimpleNamespace(device="cpu", tiny=True, seconds=30.0)


def rows_of(folder, *checks, args=TINY) -> list[dict]:
    """What these checks record, in this process."""
    rows = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(gpu, "record", lambda name, **found: rows.append({"name": name} | found))
        for check in checks:
            gpu.attempt(args, *check)
    return rows


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> dict[str, list]:
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for step in gpu.LIMITS:
            folder = tmp_path_factory.mktemp(step)
            patch.chdir(folder)  # checks() writes rows there
            found[step] = [row for check in gpu.checks(step, True) for row in rows_of(folder, check)]
    return found


LEAST = {"right": 16, "scripts": 7, "memory": 4, "speed": 4, "variants": 9, "sampling": 2, "real": 1}


@pytest.mark.parametrize("step, least", LEAST.items())
def test_all_steps_run_and_find_nothing_wrong(table, step, least):
    assert len(table[step]) >= least and [row for row in table[step] if row.get("ok") is False or "error" in row] == []


def test_what_is_measured_is_there(table):
    assert all(x <= limit for row in table["right"] if "limits" in row for x, limit in zip(row["found"], row["limits"]))
    assert len([row for row in table["right"] if "limits" in row]) == 9
    for step in ("scripts", "speed", "variants", "sampling"):
        assert all(row["tokens/s"] > 0 for row in table[step])
    for kind in ("dpo", "grpo"):  # 3 updates of 16 responses, each with its prompt and 4 tokens more; TRL's are ours
        ours, trl = (row["tokens"] for row in table["speed"] if kind in row["name"])
        assert ours == trl and 0.8 < ours / (3 * 16 * (128 + 20 + 4)) < 1.2
    assert all(row["share"] > 0 and row["TFLOP/s"] > 0 for row in table["speed"] if "ours" in row["name"])
    assert table["real"][0]["left out"] in ("it is not tiny", "not there")


def test_lengths_are_ragged_but_where_a_variant_has_equal_ones(monkeypatch, tmp_path):
    """Of prompts and responses; and in sampling of prompts, while responses end at any token."""
    monkeypatch.chdir(tmp_path)
    for name, *_ in (check for step in ("speed", "variants") for check in gpu.checks(step, True)):
        texts = [[row["prompt"], *row.get("completions", [row.get("chosen")])] for row in bench.read(Path("rows.jsonl"))]
        prompts, responses = {len(x[0]) for x in texts}, {len(text) for _, *some in texts for text in some}
        assert len(prompts) == len(responses) == 1 if "equal" in name else len(prompts) > 20 < len(responses)
    seen, right = [], common.sample_responses

    def sample_responses(model, tokenizer, prompts, new, *given):
        examples, texts = right(model, tokenizer, prompts, new, *given)
        seen.append((prompts, [len(example.response) for example in examples], new))
        return examples, texts

    monkeypatch.setattr(common, "sample_responses", sample_responses)
    rows_of(tmp_path, ("sample", gpu.sample, 2))
    prompts, lengths, new = seen[1]
    assert len({*map(len, prompts)}) > 2 and 1 < len({*lengths}) and max(lengths) <= new


def test_cudnns_attention_is_off_but_in_two_variants(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    on = [name for name, *_ in gpu.checks("variants", True) if torch.backends.cuda.cudnn_sdp_enabled()]
    assert on == ["equal lengths, cuDNN's attention on", "ragged lengths, cuDNN's attention on"]
    torch.backends.cuda.enable_cudnn_sdp(True)
    gpu.main(["--step", "real", "--device", "cpu", "--tiny"])
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_wrong_head_is_found(monkeypatch, tmp_path):
    """Its logits are 3 % too large."""
    right = common.head_logits
    monkeypatch.setattr(common, "head_logits", lambda *given: right(*given) * 1.03)
    rows = rows_of(tmp_path, ("Llama", gpu.check_family, "Llama"), ("head", gpu.check_head))
    assert [row.get("ok") for row in rows] == [False, True, True, None, False]


def test_a_policy_that_scores_otherwise_than_it_trains_is_found(monkeypatch, tmp_path):
    right = humanline_dpo.response_logps

    def wrong(model, examples, temperature):
        logp, mask = right(model, examples, temperature)
        return logp + 1e-3 * (not logp.requires_grad), mask

    monkeypatch.setattr(humanline_dpo, "response_logps", wrong)
    (row,) = rows_of(tmp_path, ("dpo", gpu.check_training, "dpo"))
    assert not row["ok"] and row["first"][0] == pytest.approx(1e-3, rel=0.01) and row["found"] == 0


def test_a_resume_that_forgets_the_optimizer_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda *_: None)
    (row,) = rows_of(tmp_path, ("dpo", gpu.check_training, "dpo"))
    assert not row["ok"] and row["first"] == [0, 1] and row["found"] > 0


def test_a_peak_far_from_the_predicted_one_is_found(monkeypatch, tmp_path, table):
    predicted = table["memory"][0]["predicted"]
    for factor, ok in ((1.2, False), (0.85, False), (1.05, True)):
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: factor * predicted * 2**30)
        (row,) = rows_of(tmp_path, ("0.5B", gpu.check_memory, "Qwen2.5-0.5B", "plain", 2))
        assert row["ok"] is ok and row["ratio"] == pytest.approx(factor)


def test_an_update_of_the_memory_step_is_what_is_traced(monkeypatch, tmp_path):
    """Two micro-batches of 2 responses with 8 tokens of a prompt and 64 more each."""
    seen, right = [], humanline_dpo.response_logps

    def response_logps(model, examples, temperature):
        seen.append([(e.prompt_len, len(e.ids)) for e in examples])
        return right(model, examples, temperature)

    monkeypatch.setattr(humanline_dpo, "response_logps", response_logps)
    rows_of(tmp_path, ("0.5B", gpu.check_memory, "Qwen2.5-0.5B", "plain", 2))
    assert seen and all(examples == [(8, 72)] * 2 for examples in seen)


def test_a_far_too_large_flag_must_end_in_the_line_that_names_it_and_no_other_run_may(monkeypatch, tmp_path):
    right, tiny_model = humanline_dpo.response_logps, gpu.random_model

    def response_logps(model, *given):
        if torch.is_grad_enabled():
            raise torch.cuda.OutOfMemoryError("out of memory")
        return right(model, *given)

    monkeypatch.setattr(humanline_dpo, "response_logps", response_logps)
    monkeypatch.setattr(gpu, "random_model", lambda name, args: tiny_model(name, TINY))
    args = SimpleNamespace(device="cpu", tiny=False)
    flags = "--batch_size 2 --micro_tokens 10000000"
    rows = rows_of(tmp_path, ("", gpu.whole_run, "dpo", flags), ("", gpu.whole_run, "dpo", "--batch_size 2"), args=args)
    assert [row["ok"] for row in rows] == [True, False] and "out of memory" in rows[0]["end"]
    monkeypatch.setattr(humanline_dpo, "response_logps", right)
    (row,) = rows_of(tmp_path, ("", gpu.whole_run, "dpo", flags), args=args)
    assert not row["ok"] and row["tokens/s"] > 0


def test_lora_without_peft_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    (row,) = rows_of(tmp_path, ("", gpu.whole_run, "dpo", "--lora_rank 4"))
    assert row["ok"] and "--lora_rank needs `pip install peft`" in row["end"]


def test_the_time_without_kernels_and_the_largest_ones():
    def event(key, device, seconds, annotation=False):
        return SimpleNamespace(key=key, device_type=SimpleNamespace(name=device), self_device_time_total=seconds * 1e6,
                               is_user_annotation=annotation)

    events = [event(f"kernel {i}", "CUDA", i / 100) for i in range(12)]
    events += [event("aten::mm", "CPU", 9.0), event("step", "CUDA", 9.0, True)]
    found = gpu.kernels(SimpleNamespace(key_averages=lambda: events), 2.0)
    assert found["idle"] == pytest.approx(1 - 0.66 / 2)
    assert [*found["kernels"]] == [f"kernel {i}" for i in range(11, 1, -1)]
    assert found["kernels"]["kernel 11"] == pytest.approx(0.055)


def test_an_error_ends_a_check_and_not_its_step(tmp_path):
    def out_of_memory(args):
        raise torch.OutOfMemoryError

    def told_by_a_script(args):
        raise common.BadInput("out of memory") from torch.OutOfMemoryError()

    def a_wrong_input(args):
        raise common.BadInput("no such file") from OSError()

    def not_there(args):
        import no_such_package  # noqa: F401

    rows = rows_of(tmp_path, ("no number", lambda args: {"a": 1 / 0}), ("too large", out_of_memory), ("TRL", not_there),
                   ("too large too", told_by_a_script), ("input", a_wrong_input),
                   ("exit", lambda args: sys.exit("error: a line")), ("a number", lambda args: {"a": 1}))
    assert [row.get("ok") for row in rows] == [False, True, True, True, False, False, None]
    assert "division by zero" in rows[0]["error"] and "a line" in rows[5]["error"]


@pytest.mark.skipif(not shutil.which("timeout"), reason="stops the steps")
def test_a_step_that_hangs_or_dies_costs_only_itself(monkeypatch, tmp_path, capsys):
    """What it started is killed with it, and does not keep us waiting."""
    program = tmp_path / "program.py"
    program.write_text("""import os, subprocess, sys, time
print('{"name": "before", "number": 0.5}', flush=True)
print("/lib/site-packages/a.py:1: UserWarning: beware", flush=True)
step = sys.argv[sys.argv.index("--step") + 1]
if step == "memory":
    os.write(1, b"\\xe2\\x96")
    subprocess.run(["sleep", "600"])
sys.exit(7 if step == "sampling" else 0)
""")
    monkeypatch.setattr(gpu, "__file__", str(program))
    started, out = time.time(), tmp_path / "gpu.json"
    with pytest.raises(SystemExit, match="failed: memory, sampling"):
        gpu.main(["--device", "cpu", "--out", str(out), "--only", "memory", "sampling", "real", "--seconds", "5"])
    assert time.time() - started < 20
    steps = json.loads(out.read_text())["steps"]
    assert [len(step["failed"]) for step in steps.values()] == [1, 1, 0]
    assert "ended with -9 after 2 s of 2" in steps["memory"]["failed"][0]
    assert "ended with 7" in steps["sampling"]["failed"][0]
    for step in steps.values():
        assert step["found"] == [{"name": "before", "number": 0.5}]
        assert step["warnings"] == {"a.py:1: UserWarning: beware": 1}
    assert "number 0.5" in capsys.readouterr().out


@pytest.mark.skipif(not shutil.which("timeout"), reason="stops the steps")
def test_results_of_a_cpu_are_no_results_and_a_step_takes_the_flags_that_it_is_given(monkeypatch, tmp_path, capsys):
    program = tmp_path / "program.py"
    program.write_text("import json, os, sys\nprint(json.dumps({'name': os.getcwd(), 'argv': sys.argv[1:]}))\n")
    monkeypatch.setattr(gpu, "__file__", str(program))
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    found, run_step = [], gpu.run_step
    monkeypatch.setattr(gpu, "run_step", lambda *given: found.append(run_step(*given)) or found[-1])
    with pytest.raises(SystemExit, match="0"):
        gpu.main(["--device", "cpu", "--tiny", "--only", "real", "--seconds", "9"])
    (row,) = found[0]["found"]
    assert not (tmp_path / "gpu.json").exists() and not Path(row["name"]).exists()  # a folder of its own
    capsys.readouterr()
    gpu.main(row["argv"])
    assert json.loads(capsys.readouterr().out)["name"] == "real model" and "--tiny" in row["argv"]


def test_without_a_gpu_there_is_a_line_that_says_so():
    with pytest.raises(SystemExit, match="error: no CUDA GPU is here"):
        gpu.main([])


def test_the_real_step_makes_runs_of_the_evidence_and_counts_them(monkeypatch, tmp_path):
    commands, parts, store = [], tmp_path / "a.gguf", tmp_path / "evidence.jsonl"
    store.write_text('{"run": 1}\n')

    def run(command):
        commands.append(command)
        store.write_text(store.read_text() * 3)
        return SimpleNamespace(returncode=-9)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(real_model, "MODEL", tmp_path / "none")
    monkeypatch.setattr(real_model, "PARTS", parts)
    args = SimpleNamespace(device="cpu", tiny=False, seconds=40)
    assert rows_of(tmp_path, ("real", gpu.real), args=args) == [{"name": "real", "left out": "not there", "GiB": 0}]
    parts.touch()
    rows = rows_of(tmp_path, ("real", gpu.real), args=args)
    assert rows == [{"name": "real", "runs": 2, "ended": -9, "ok": True, "GiB": 0}]  # as many as fit
    assert commands[0][:4] == ["timeout", "-s", "KILL", "35"] and commands[0][5:] == [
        str(real_model.HERE / "evidence.py"), "--device", "cpu", "--jobs", "4"]


def test_wheels_are_the_versions_that_we_pin(monkeypatch):
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command: commands.append(command) or SimpleNamespace(returncode=0))
    with pytest.raises(SystemExit, match="0"):
        gpu.main(["--wheels", "folder"])
    pins = ((ROOT / "requirements.txt").read_text() + (ROOT / "tests/requirements.txt").read_text()).splitlines()
    wheels = [x for x in commands[0] if "==" in x]
    assert {x for x in pins if x.split("==")[0] in " ".join(wheels)} <= {*wheels} and len(wheels) == 12
    assert commands[0][-2:] == ["--dest", "folder"]


def test_parts_of_a_model_are_put_together_and_read(monkeypatch, tmp_path):
    whole = bytes(range(256)) * 50
    (tmp_path / "model").write_bytes(whole)
    subprocess.run(["split", "-b", "5000", "model", "part."], cwd=tmp_path, check=True)
    parts, again = sorted(tmp_path.glob("part.*")), tmp_path / "runs" / real_model.GGUF
    gpu.main(["--model-parts", *map(str, parts), str(again)])
    assert len(parts) == 3 and again.read_bytes() == whole
    read = []
    monkeypatch.setattr(real_model, "PARTS", again)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(real_model.AutoTokenizer, "from_pretrained", lambda path, **_: read.append(path) or sys.exit())
    with pytest.raises(SystemExit):
        real_model.make_model(tmp_path / "smollm2")
    assert read == [tmp_path / "runs"]
