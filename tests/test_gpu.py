"""gpu.py without a GPU: every step's code on the smallest shapes, and what it says of faults, of errors and of time."""

import json
import os
import subprocess
import time
from types import SimpleNamespace

import pytest

import common
import gpu
import gpu_checks
from conftest import ROOT, SCRIPTS


def run(out, *argv) -> dict:
    gpu.main(["--device", "cpu", "--tiny", "--out", str(out), *argv])
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return run(tmp_path_factory.mktemp("gpu") / "gpu.json")


def test_all_steps_run_and_find_nothing_wrong(table):
    assert list(table["steps"]) == list(gpu.LIMITS) == list(gpu.STEPS)
    assert [step["failed"] for step in table["steps"].values()] == [[]] * len(gpu.LIMITS)


@pytest.mark.parametrize("name, least", [("right", 30), ("scripts", 5), ("memory", 5), ("speed", 4), ("variants", 4)])
def test_steps_leave_their_numbers(table, name, least):
    assert len(table["steps"][name]["found"]) >= least


def test_the_checks_have_limits_and_the_timings_numbers(table):
    checks = [row for row in table["steps"]["right"]["found"] if "limit" in row]
    assert len(checks) >= 28 and all(row["ok"] and row["found"] <= row["limit"] for row in checks)
    assert all(row["predicted"] > 0 for row in table["steps"]["memory"]["found"] if "ratio" in row)
    for name in ("variants", "sampling"):
        assert all(row["tokens/s"] > 0 for row in table["steps"][name]["found"])


def failed(monkeypatch, out, step) -> str:
    """What fails when this is the step "right"."""
    monkeypatch.setitem(gpu.STEPS, "right", step)
    with pytest.raises(SystemExit, match="failed: right"):
        run(out, "--only", "right")
    return " ".join(json.loads(out.read_text())["steps"]["right"]["failed"])


def test_a_wrong_head_is_found(monkeypatch, tmp_path):
    """Its logits are 3 % too large."""
    right = common.head_logits
    monkeypatch.setattr(common, "head_logits", lambda *given: right(*given) * 1.03)
    found = failed(monkeypatch, tmp_path / "gpu.json", lambda args: gpu_checks.check_family(args, "llama", 48))
    assert "llama, float32 less float64: largest" in found and "llama, float32 less float64: gradient" in found


def test_a_policy_that_scores_otherwise_than_it_trains_is_found(monkeypatch, tmp_path):
    script, right = SCRIPTS["dpo"], common.response_logps

    def wrong(model, examples, temperature):
        logp, mask = right(model, examples, temperature)
        return logp + 1e-3 * (not logp.requires_grad), mask

    def step(args):
        folder = gpu_checks.save(args, gpu_checks.shape_of("", args))
        data = gpu_checks.write_rows(args, "dpo", 8, 5, 9, 20)
        argv = gpu_checks.flags_for(args, folder, data, 1, batch_size=8, max_length=64)
        gpu_checks.attempt(args, "dpo: update 1", gpu_checks.first_update, "dpo", argv)

    monkeypatch.setattr(script, "response_logps", wrong)
    assert "dpo: update 1" in failed(monkeypatch, tmp_path / "gpu.json", step)


def test_a_step_that_hangs_or_dies_costs_only_itself(monkeypatch, tmp_path, capsys):
    def hangs(args):
        gpu_checks.record(args, "before it hangs", number=1)
        time.sleep(600)

    def dies(args):
        print("UserWarning: about to die")
        os._exit(7)

    for name, step in {"memory": hangs, "sampling": dies}.items():
        monkeypatch.setitem(gpu.STEPS, name, step)
    started = time.time()
    with pytest.raises(SystemExit, match="failed: memory, sampling"):
        run(tmp_path / "gpu.json", "--only", "memory", "sampling", "real", "--seconds", "5")
    assert time.time() - started < 20
    steps = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert steps["memory"]["found"] == [{"name": "before it hangs", "number": 1}]
    assert steps["memory"]["failed"] == ["stopped at its limit of 2 s"]
    assert steps["sampling"]["failed"] == ["ended with 7: UserWarning: about to die"]
    assert steps["sampling"]["warnings"] == {"UserWarning: about to die": 1}
    assert steps["real"]["failed"] == []
    assert "FAILED stopped at its limit of 2 s" in capsys.readouterr().out


def test_an_error_ends_a_measurement_and_not_its_step(tmp_path):
    args = SimpleNamespace(folder=tmp_path, device="cpu")
    gpu_checks.attempt(args, "no number", lambda: {"a": 1 / 0})
    gpu_checks.attempt(args, "a number", lambda: gpu_checks.within(2.0, 1.0))
    gpu_checks.attempt(args, "not a number", lambda: gpu_checks.within(float("nan"), 1.0))
    rows = [json.loads(line) for line in open(tmp_path / "records.jsonl")]
    assert [row["ok"] for row in rows] == [False, False, False] and "division by zero" in str(rows[0]["error"])


def test_on_cuda_a_process_is_a_fresh_one(tmp_path):
    """It sees nothing of this one's variables, and ends as the script does."""
    (tmp_path / "script.py").write_text("import sys\nsys.exit(f'error: {len(sys.argv)} {\"pytest\" in sys.modules}')\n")
    process = gpu_checks.start(SimpleNamespace(device="cuda", folder=tmp_path), gpu_checks.script_process,
                               str(tmp_path / "script.py"), ["a"], tmp_path / "log")
    process.join()
    assert process.exitcode == 1 and (tmp_path / "log").read_text().splitlines()[-1] == "error: 2 False"


def test_results_of_a_cpu_are_no_results(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu, "RESULT", tmp_path / "gpu.json")
    gpu.main(["--device", "cpu", "--tiny", "--only", "real"])
    assert not gpu.RESULT.exists()
    assert "there not yet" in capsys.readouterr().out


def test_wheels_stop_at_their_limit(monkeypatch, tmp_path, capsys):
    """Of 12 wheels of which one is large, all others are there, and what is there already is not fetched."""
    asked = []

    def download(command, check):
        name = command[-1]
        asked.append(name)
        size = 900 if name.startswith("trl") else 10
        (gpu.Path(command[command.index("--dest") + 1]) / f"{name}.whl").write_bytes(b"x" * size)

    monkeypatch.setattr(subprocess, "run", download)
    monkeypatch.setattr(gpu, "BYTES", 800)
    gpu.main(["--wheels", str(tmp_path), "pyarrow", "peft"])
    assert asked == [x for x in gpu.WHEELS if not x.startswith(("pyarrow", "peft"))]
    files = list(tmp_path.iterdir())
    assert len(files) == len(asked) - 1 and sum(file.stat().st_size for file in files) <= 800
    assert "left out" in capsys.readouterr().out and not (tmp_path / "trl==1.16.0.whl").exists()


def test_wheels_are_the_versions_that_we_pin():
    pins = (ROOT / "requirements.txt").read_text() + (ROOT / "tests/requirements.txt").read_text()
    for wheel in ("datasets", "trl", "math-verify"):
        assert next(x for x in gpu.WHEELS if x.startswith(wheel)) in pins.splitlines()


def test_parts_of_a_model_are_put_together(tmp_path):
    whole = bytes(range(256)) * 50
    (tmp_path / "model").write_bytes(whole)
    subprocess.run(["split", "-b", "5000", "model", "part."], cwd=tmp_path, check=True)
    parts = sorted(tmp_path.glob("part.*"))
    gpu.main(["--model-parts", *map(str, parts), str(tmp_path / "again")])
    assert len(parts) == 3 and (tmp_path / "again").read_bytes() == whole
