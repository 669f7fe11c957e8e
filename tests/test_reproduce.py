"""The reproduction's own arithmetic, and the plots: no training here but one tiny run."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import bench
import common
import humanline_dpo
import humanline_kto
import plot
import reproduce
import tables
from conftest import ROOT, SCRIPTS, write_jsonl


def test_every_run_is_a_command_that_its_script_takes(monkeypatch, tmp_path):
    """Only flags, and those of the cell: n and k, perception, the chosen learning rate."""
    flags = (("lr", "1e-4"), ("beta", "0.1"), ("sync_every", "4"), ("max_grad_norm", "1.0"))
    for cell in reproduce.CELLS:
        run = reproduce.Run(*cell, 3, flags if cell[3] == "humanline" else flags[:2])
        args = SCRIPTS[run.method].parse_args(run.argv(tmp_path))
        assert args.sample_every == {"offline": 0, "online": 1, "every 64": 64}[run.source]
        assert (args.humanline, args.sync_every) == (("clip", 4) if run.variant == "humanline" else ("off", 0))
        assert (args.lr, args.seed, args.steps) == (1e-4, 3, 120 if run.world == "letters" else 256)
        assert f"/{run.world}-3/" in args.data and f"{run.world}_reward" in args.reward
    synced = reproduce.Run("letters", "grpo", "offline", "synced only", 0, flags)
    args = SCRIPTS["grpo"].parse_args(synced.argv(tmp_path))
    assert (args.humanline, args.sync_every) == ("off", 4)
    clipped = reproduce.Run("letters", "grpo", "offline", "clipped only", 0, flags[:2])
    args = SCRIPTS["grpo"].parse_args(clipped.argv(tmp_path))
    assert (args.humanline, args.sync_every) == ("clip", 0)


def test_no_seed_of_the_grid_is_reported():
    assert not set(reproduce.SEEDS) & {s for seeds in reproduce.GRID_SEEDS.values() for s in seeds}
    assert len(reproduce.SEEDS) == 5


def test_win_rate_by_hand():
    """Two prompts, two samples: prompt 0 has 1, 3 against 2, 2; prompt 1 has 5, 5 against 5, 0."""
    assert reproduce.win_rate([1, 5, 3, 5], [2, 5, 2, 0], samples=2) == (2 / 4 + 3 / 4) / 2
    same = [0.1, 0.2, 0.3, 0.4]
    assert reproduce.win_rate(same, same, samples=1) == 0.5


def test_intervals():
    assert reproduce.interval([0.3] * 5) == [0.3, 0.3, 0.3]
    mean, low, high = reproduce.interval([0.0, 1.0, 2.0, 3.0, 4.0])
    assert mean == 2 and 0.6 <= low <= 1.0 and 3.0 <= high <= 3.4  # ± 1.96 · √(2 / 5) is 1.24
    assert reproduce.interval([0.7]) == [0.7, 0.7, 0.7]


def test_candidates_vary_one_stage_and_no_k_where_there_is_none():
    humanline, plain = ("letters", "dpo", "offline", "humanline"), ("letters", "dpo", "offline", "plain")
    online = ("letters", "grpo", "online", "humanline")
    start = reproduce.start_of(humanline)
    assert len(reproduce.candidates(humanline, start, ("lr", "beta"))) == 6
    assert [c["sync_every"] for c in reproduce.candidates(humanline, start, ("sync_every",))] == ["1", "4", "16"]
    assert reproduce.candidates(plain, reproduce.start_of(plain), ("sync_every",)) == [reproduce.start_of(plain)]
    assert reproduce.candidates(online, reproduce.start_of(online), ("sync_every",)) == [reproduce.start_of(online)]
    assert "sync_every" not in reproduce.start_of(plain) and "beta" not in reproduce.start_of(online)


def test_a_broken_reproduction_goes_on_where_it_stopped(monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    runs = [reproduce.Run("letters", "dpo", "offline", "plain", seed, ()) for seed in range(2)]
    store = tmp_path / "runs/reproduce/runs.jsonl"
    store.parent.mkdir(parents=True)
    store.write_text("".join(json.dumps({"run": run, "score": run.seed}) + "\n" for run in runs) + '{"run": ["let')
    results = reproduce.do(runs, jobs=1)  # nothing is left to do: no process starts
    assert [results[run.key]["score"] for run in runs] == [0, 1]
    assert len(store.read_text().splitlines()) == 2  # the next line does not start inside the broken one


def test_the_tables_hold_values_intervals_and_paired_differences():
    runs = {label: [reproduce.Run("addition", "grpo", "every 64", label, s, (("lr", "1"),)) for s in (0, 1)]
            for label in ("every 64 plain", "every 64 humanline", "online plain")}
    scores = {"every 64 plain": (0.2, 0.4), "every 64 humanline": (0.3, 0.5), "online plain": (0.5, 0.3)}
    results = {run.key: {"score": scores[label][run.seed], "seconds": 1.0, "curve": [[0, 0.1, 0.1], [32, 0.2, 0.1]]}
               for label, some in runs.items() for run in some}
    table = reproduce.summarize("every_64", runs, results, "a command")
    assert table["rows"]["every 64 plain"]["score"][0] == 0.3 and table["seeds"] == [0, 1]
    assert table["differences"]["every 64 humanline − every 64 plain"] == [0.1, 0.1, 0.1]  # paired: no spread
    assert table["rows"]["online plain"]["curve"]["updates"] == [0, 32]


def test_a_run_whose_samples_are_all_alike_is_graded(policy, monkeypatch, tmp_path):
    """A random policy writes no valid string: all rewards are −2 and it stops before any update."""
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    online = reproduce.Run("letters", "dpo", "online", "plain", 0, ())
    online.folder().mkdir(parents=True)
    shutil.copytree(policy, online.folder() / "policy")
    for split in ("train", "test"):
        write_jsonl(online.folder() / f"prompts_{split}.jsonl", [{"prompt": split}])
    (online.folder() / "initial.json").write_text("[-2, -2, -2, -2]")
    result = reproduce.train(online)
    assert "equal within groups" in result["stopped"]
    assert (result["score"], result["utility"], result["curve"]) == (0.5, -2, [[0, -2, -2]])
    (online.folder() / "prompts_train.jsonl").write_text("")  # other errors are no result
    with pytest.raises(common.BadInput, match="prompts_train"):
        reproduce.train(online)


def test_the_last_checkpoint_is_the_policy_as_it_was(run, policy, monkeypatch, tmp_path):
    run(humanline_dpo, "--steps", 2, "--save_every", 1)
    monkeypatch.setattr(reproduce, "folder_of", lambda world, seed: tmp_path)
    shutil.copytree(policy, tmp_path / "policy")
    trained = reproduce.last_checkpoint(reproduce.Run("letters", "dpo", "online", "plain", 0, ()), tmp_path / "run")
    final = load_file(tmp_path / "run/final/model.safetensors")
    assert all(torch.equal(trained.state_dict()[name], weight) for name, weight in final.items())
    assert not torch.equal(final["model.norm.weight"], load_file(policy / "model.safetensors")["model.norm.weight"])


# --- plots --------------------------------------------------------------------------------------------


def test_plot_draws_any_run(run, tmp_path, capsys):
    run(humanline_dpo, "--steps", 2)
    plot.main([str(tmp_path / "run"), "--out", str(tmp_path / "plots" / "a.png")])
    assert (tmp_path / "plots" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "plots/a.png" in capsys.readouterr().out


@pytest.mark.parametrize("more, words", [([], "no such file"), (["--keys", "lossy"], "in none of the runs; they have")])
def test_plot_names_what_is_wrong(run, tmp_path, more, words):
    folder = tmp_path / "run"
    if more:
        run(humanline_dpo, "--steps", 1)
    with pytest.raises(SystemExit) as error:
        plot.main([str(folder), "--out", str(tmp_path / "a.png"), *more])
    assert words in str(error.value)


# --- the benchmark's floor ----------------------------------------------------------------------------


def test_the_floor_by_hand():
    """One layer, H = 4, inner 8, V = 10, a response of 2 tokens after a prompt of 3."""

    class Config:
        hidden_size, num_hidden_layers, intermediate_size, vocab_size = 4, 1, 8, 10
        num_attention_heads = num_key_value_heads = 2
        tie_word_embeddings = False

    row = humanline_dpo.Row([common.Example([1] * 5, 3)])
    body = 4 * 4 * 4 + 3 * 4 * 8  # q, k, v, o; gate, up, down
    forward = 2 * body * 5 + 2 * 4 * 10 * 2 + 2 * 5**2 * 4
    weights = body + 2 * 4 * 10
    assert bench.floor([row], Config, rate=1.0, bandwidth=1e30) == pytest.approx(4 * forward)
    assert bench.floor([row], Config, rate=1e30, bandwidth=2.0) == pytest.approx(14 * weights)


def test_padding_by_hand():
    """Two rows of 10 and 6 tokens in one forward; KTO's mismatched pair of 9 tokens in one of its own."""

    class Model:
        row_tokens, device = 0, torch.device("cpu")

    labelled = [humanline_kto.Row([common.Example([1] * n, 3)], True) for n in (6, 10)]
    assert bench.padded_share(Model, labelled, 100) == pytest.approx(4 / 20)
    mismatched = humanline_kto.Row([common.Example([2] * 9, 3)])
    assert bench.padded_share(Model, [*labelled, mismatched], 100) == pytest.approx(4 / 29)
    assert bench.padded_share(Model, labelled, 10) == 0


# --- the README ---------------------------------------------------------------------------------------


def test_the_readme_has_the_numbers_of_the_results():
    text = tables.README.read_text()
    assert all(f"<!-- {name} -->" in text for name in tables.TABLES)
    assert tables.fill(text) == text  # else: python tests/experiments/tables.py
    assert tables.number(-0.004, sign=True) == "0.00" and tables.number(0.125, sign=True) == "+0.12"
