"""The reproduction's own arithmetic, and the plots: no training here but one tiny run."""

import json
import shutil
from types import SimpleNamespace

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
from conftest import SCRIPTS, write_jsonl


def test_every_run_is_a_command_that_its_script_takes(tmp_path):
    """Only flags, and those of the cell: n and k, perception, decay, the chosen learning rate."""
    for cell in [*reproduce.CELLS, *reproduce.SWEPT]:
        run = reproduce.Run(*cell[:4], 3, tuple(reproduce.start_of(cell).items()))
        args = SCRIPTS[run.method].parse_args(run.argv(tmp_path))
        k = {"offline": 16, "every 64": 16, "online": 1}[run.source]
        assert args.sample_every == {"offline": 0, "online": 1, "every 64": 64}[run.source]
        assert (args.humanline, args.sync_every) == (("clip", k) if run.variant == "humanline" else ("off", 0))
        assert (args.seed, args.steps) == (3, 120 if run.world == "letters" else 192)
        assert args.lr_decay and args.beta == float(cell[4])
        assert args.save_every == (run.source == "online" and run.method != "grpo")  # those that may stop are graded there
        assert f"/{run.world}-3/" in args.data and f"{run.world}_reward" in args.reward
    flags = tuple(reproduce.start_of(("letters", "grpo", "offline", "humanline", "0")).items())
    args = SCRIPTS["grpo"].parse_args(reproduce.Run("letters", "grpo", "offline", "synced only", 0, flags).argv(tmp_path))
    assert (args.humanline, args.sync_every) == ("off", 16)
    clipped = reproduce.Run("letters", "grpo", "offline", "clipped only", 0, flags[:3])
    args = SCRIPTS["grpo"].parse_args(clipped.argv(tmp_path))
    assert (args.humanline, args.sync_every) == ("clip", 0)


def test_no_seed_of_the_grid_is_reported():
    assert not set(reproduce.SEEDS) & {*reproduce.GRID_SEEDS, 0, 1, 2, 3, 4}  # 0 to 4 shaped the grid's rule
    assert len(reproduce.SEEDS) == 5 and len(reproduce.GRID_SEEDS) >= 3


def test_offline_runs_make_one_pass():
    """Rows that are read cover the updates once, and not twice."""
    for method, size in (("dpo", 16), ("kto", 32), ("grpo", 8)):  # pairs, responses, groups
        assert 120 * size <= int(reproduce.ROWS[method]) < 2 * 120 * size
        assert f"--batch_size {size * 8 if method == 'grpo' else size}" in reproduce.METHODS[method][1]["letters"]
    assert 192 * 128 // 8 <= reproduce.PROMPTS["addition"]["train"]
    assert 96 * 8 <= reproduce.PROMPTS["letters"]["train"] // 4  # a quartile, 96 updates


def test_win_rate_by_hand():
    """Two prompts, two samples: prompt 0 has 1, 3 against 2, 2; prompt 1 has 5, 5 against 5, 0."""
    assert reproduce.win_rate([1, 5, 3, 5], [2, 5, 2, 0], samples=2) == (2 / 4 + 3 / 4) / 2
    same = [0.1, 0.2, 0.3, 0.4]
    assert reproduce.win_rate(same, same, samples=1) == 0.5


def test_intervals_and_verdicts():
    assert reproduce.interval([0.3] * 5) == [0.3, 0.3, 0.3]
    # mean 2, standard error √2.5 / √5 = 0.7071; t = 2.776
    assert reproduce.interval([0.0, 1.0, 2.0, 3.0, 4.0]) == [2, pytest.approx(0.037, abs=1e-3), pytest.approx(3.963, abs=1e-3)]
    assert reproduce.interval([0.7]) == [0.7, 0.7, 0.7]
    assert [reproduce.verdict(x) for x in ([1, 0.1, 2], [-1, -2, -0.1], [1, -0.1, 2])] == ["above 0", "below 0", "holds 0"]


def test_neighbours_vary_one_flag_and_no_k_where_there_is_none():
    humanline, plain = ("letters", "dpo", "offline", "humanline", "3"), ("letters", "dpo", "offline", "plain", "3")
    online = ("letters", "grpo", "online", "humanline", "0")
    start = reproduce.start_of(humanline)
    assert [c["sync_every"] for c in reproduce.neighbours(humanline, start, "sync_every")] == ["8", "16", "32"]
    assert [c["lr"] for c in reproduce.neighbours(humanline, start | {"lr": "3e-5"}, "lr")] == ["3e-5", "1e-4"]
    for cell in (plain, online):
        assert reproduce.neighbours(cell, reproduce.start_of(cell), "sync_every") == [reproduce.start_of(cell)]
    assert "sync_every" not in reproduce.start_of(plain) and reproduce.start_of(online)["sync_every"] == "1"
    assert reproduce.ends({"lr": "3e-5", "sync_every": "1", "max_grad_norm": "1"}) == ["lr"]


def test_the_grid_climbs_to_a_peak_inside_and_prefers_the_steady(monkeypatch):
    """The score peaks at lr 4e-3 and k = 4; lr 8e-3 is as good on average, but not on each seed."""
    calls = []

    def do(runs, jobs):
        calls.extend(runs)
        scores = {}
        for run in runs:
            flags = dict(run.flags)
            ladder = reproduce.LADDERS["lr"]
            score = -abs(ladder.index(flags["lr"]) - ladder.index("4e-3")) - abs(int(flags["sync_every"]) - 4)
            if flags["lr"] == "8e-3":
                score += 1 + 5 * (run.seed - 11)
            scores[run.key] = {"run": run, "score": score}
        return scores

    monkeypatch.setattr(reproduce, "do", do)
    cell = ("letters", "dpo", "offline", "humanline", "3")
    (entry,) = reproduce.climb({cell: reproduce.start_of(cell)}, reproduce.STAGES, 1)
    assert (entry["chosen"]["lr"], entry["chosen"]["sync_every"]) == ("4e-3", "4")
    assert entry["at the ladder's end"] == [] and {run.seed for run in calls} == set(reproduce.GRID_SEEDS)
    assert any(x["lr"] == "8e-3" for x in entry["tried"])


def test_the_grid_climbs_the_rate_again_after_the_norm(monkeypatch):
    """A norm of 0.1 is better than 1, and under it twice the rate."""
    scores = {("1e-3", "1"): 0.6, ("1e-3", "0.1"): 0.7, ("2e-3", "0.1"): 0.8}
    monkeypatch.setattr(reproduce, "do", lambda runs, jobs: {
        run.key: {"run": run, "score": scores.get((dict(run.flags)["lr"], dict(run.flags)["max_grad_norm"]), 0.5)}
        for run in runs})
    cell = ("letters", "dpo", "offline", "plain", "3")
    (entry,) = reproduce.climb({cell: reproduce.start_of(cell)}, reproduce.STAGES, 1)
    assert entry["chosen"] == {"lr": "2e-3", "max_grad_norm": "0.1", "beta": "3"}


def test_the_grid_counts_what_training_gained():
    """Addition on three seeds that begin at 0.1, 0.3, 0.5 and all gain 0.1: no spread."""
    done = [{"run": ["addition"], "score": x + 0.1, "curve": [[0, x], [32, x + 0.1]]} for x in (0.1, 0.3, 0.5)]
    assert reproduce.steady(done) == pytest.approx(0.1)
    wins = [{"run": ["letters"], "score": x} for x in (0.7, 0.8, 0.9)]
    assert reproduce.steady(wins) == pytest.approx(0.8 - 0.1)


@pytest.mark.parametrize("scores, lr", [
    ({"3e-4": 0.8, "6e-4": 0.8, "1e-3": 0.4}, "3e-4"),  # a seed is lost one rung up: one rung down
    ({"3e-4": 0.8, "6e-4": 0.8, "1e-3": 0.5}, "3e-4"),  # as good as the initial policy is lost
    ({"3e-4": 0.8, "6e-4": 0.4, "1e-3": 0.6}, "3e-4"),  # one is lost at the rate itself
    ({"3e-4": 0.8, "6e-4": 0.8, "1e-3": 0.6}, "6e-4"),  # none is lost: it stays
    ({"3e-4": 0.5, "6e-4": 0.8, "1e-3": 0.4}, "6e-4"),  # one is lost on both sides: it stays
])
def test_a_rate_keeps_a_rung_from_those_that_lose_a_seed(monkeypatch, scores, lr):
    monkeypatch.setattr(reproduce, "do", lambda runs, jobs: {
        run.key: {"score": scores[dict(run.flags)["lr"]] if run.seed == 11 else 0.9} for run in runs})
    entry = {"cell": ("letters", "dpo", "offline", "plain", "3"), "chosen": {"lr": "6e-4", "beta": "3"},
             "tried": [{"lr": "6e-4", "beta": "3", "scores": [0.9, scores["6e-4"], 0.9]}]}
    reproduce.step_back([entry], 1)
    assert entry["chosen"] == {"lr": lr, "beta": "3"} and entry["lr of the best"] == "6e-4"
    assert [x["lr"] for x in entry["tried"]] == ["6e-4", "3e-4", "1e-3"]
    assert entry["tried"][2]["scores"] == [0.9, scores["1e-3"], 0.9]


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
    results = {run.key: {"score": scores[label][run.seed], "seconds": 1.0, "unclipped": 1.0,
                          "stopped": None if run.seed else 7, "curve": [[0, 0.1], [32, 0.2]]}
               for label, some in runs.items() for run in some}
    table = reproduce.summarize("every_64", runs, results, "a command")
    assert table["rows"]["every 64 plain"]["score"][0] == 0.3 and table["seeds"] == [0, 1]
    assert table["differences"]["every 64 humanline − every 64 plain"] == {
        "difference": [0.1, 0.1, 0.1], "verdict": "above 0"}  # paired: no spread
    assert table["rows"]["online plain"]["stopped"] == {0: 7}
    assert table["rows"]["online plain"]["curve"]["updates"] == [0, 32]


def test_the_demo_takes_the_seed_nearest_to_the_means(monkeypatch, tmp_path):
    """Not the best, 6: in the first table 7 is nearest, in the second 5, and in both together 5."""
    for name, row in (("main", {"values": [0.4, 0.9, 0.5], "score": [0.6, 0, 1]}), ("every_64", {}),
                      ("k_sweep", {"values": [0.25, 0.9, 0.1], "score": [0.3, 0, 1]})):
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": {"a cell": row, "not in the demo": {}}}))
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path)
    monkeypatch.setattr(reproduce, "SEEDS", (5, 6, 7))
    for names, seed in ((["main"], 7), (["k_sweep"], 5), (["main", "k_sweep"], 5)):
        monkeypatch.setattr(reproduce, "demo_rows", lambda seeds: dict.fromkeys(names, ["a cell"]))
        assert reproduce.typical_seed() == seed


def test_the_demo_says_what_its_runs_found(monkeypatch, tmp_path, capsys):
    """Humanline adds 0.25 to DPO and takes as much from KTO; the committed runs lost one seed of KTO's online training."""
    shutil.copy(reproduce.RESULTS / "grid.json", tmp_path)
    scores = {("dpo", "humanline"): 0.75, ("kto", "humanline"): 0.25}
    monkeypatch.setattr(reproduce, "do", lambda runs, jobs: {run.key: {
        "score": scores.get((run.method, run.variant), 0.5), "seconds": 1.0, "unclipped": 1.0, "stopped": None,
        "curve": [[0, 0.1], [192, 0.2]]} for run in runs})
    found = {f"{m} offline humanline − {m} offline plain": {"verdict": word}
             for m, word in (("dpo", "above 0"), ("kto", "holds 0"), ("grpo", "below 0"))}
    online = {f"{m} online plain": {"values": [0.9, 0.5 if m == "kto" else 0.9]} for m in reproduce.METHODS}
    (tmp_path / "main.json").write_text(json.dumps({"rows": online, "differences": found}))
    (tmp_path / "k_sweep.json").write_text(json.dumps({"differences": {"k = 16 − k = 1": {"verdict": "above 0"}}}))
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "typical_seed", lambda: 8)
    reproduce.demo(1)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line[:1] in (["DPO"], ["KTO"], ["GRPO"])] == [
        ["DPO", "0.50", "0.75", "0.50"], ["KTO", "0.50", "0.25", "0.50"], ["GRPO", "0.50", "0.50", "0.50"]]
    assert ["every", "64", "updates,", "humanline", "0.50"] in lines and "k = 1 k = 4 k = 16 k = 64".split() in lines
    end = "\n".join(map(" ".join, lines[-5:]))
    assert "This is seed 8," in end and "the win rate: DPO by +0.25, KTO by -0.25, GRPO by +0.00." in end
    assert "this change is: DPO above 0, KTO holds 0, GRPO below 0; of k = 16 less k = 1: above 0." in end
    assert "online training loses: DPO 0, KTO 1, GRPO 0." in end and (tmp_path / "runs/quick/main.png").exists()


def test_texts_are_encoded_once_for_each_tokenizer(monkeypatch):
    calls, one, two = [], SimpleNamespace(name_or_path="one"), SimpleNamespace(name_or_path="two")
    monkeypatch.setattr(reproduce, "EXAMPLES", {})
    monkeypatch.setattr(common, "encode", lambda *what: calls.append(what) or common.Example([len(calls)], 1))
    found = [reproduce.encode_once(*what).ids for what in (
        (one, "a", "b", 8), (one, "a", "b", 8), (two, "a", "b", 8), (one, "a", "c", 8), (one, "a", "b", 9))]
    assert found == [[1], [1], [2], [3], [4]]


def test_a_run_whose_samples_are_all_alike_is_graded(policy, monkeypatch, tmp_path):
    """A random policy writes no valid string: all rewards are −2 and it stops before any update."""
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    online = reproduce.Run("letters", "dpo", "online", "plain", 0, ())
    online.folder().mkdir(parents=True)
    shutil.copytree(policy, online.folder() / "policy")
    for split in ("train", "test"):
        write_jsonl(online.folder() / f"prompts_{split}.jsonl", [{"prompt": split}])
    (online.folder() / "initial.json").write_text("[-2, -2, -2, -2]")
    result = reproduce.train(online, tmp_path / "out")
    assert result["stopped"] == 0
    assert (result["score"], result["utility"], result["curve"]) == (0.5, -2, [])
    (online.folder() / "prompts_train.jsonl").write_text("")  # other errors are no result
    with pytest.raises(common.BadInput, match="prompts_train"):
        reproduce.train(online, tmp_path / "out")


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


# --- the benchmark -------------------------------------------------------------------------------------


def test_the_floor_by_hand():
    """One layer, H = 4, inner 8, V = 10, a response of 2 tokens after a prompt of 3."""

    class Config:
        hidden_size, num_hidden_layers, intermediate_size, vocab_size = 4, 1, 8, 10
        num_attention_heads = num_key_value_heads = 2

    example = common.Example(torch.ones(5), 3)
    body = 4 * 4 * 4 + 3 * 4 * 8  # q, k, v, o; gate, up, down
    forward = 2 * body * 5 + 2 * 4 * 10 * 2 + 2 * 5**2 * 4
    assert bench.floor([humanline_dpo.Row([example] * 2)], Config, rate=2.0) == 2 * 4 * forward / 2
    labelled, mismatched = humanline_kto.Row([example], True), humanline_kto.Row([example])
    assert bench.floor([labelled, mismatched], Config, rate=1.0) == (4 + 2) * forward


def test_padding_by_hand():
    """Two rows of 10 and 6 tokens in one forward; KTO's mismatched pair of 9 tokens in one of its own."""
    labelled = [humanline_kto.Row([common.Example(torch.ones(n), 3)], True) for n in (6, 10)]
    assert bench.padded_share(labelled, 100) == pytest.approx(4 / 20)
    mismatched = humanline_kto.Row([common.Example(torch.ones(9), 3)])
    assert bench.padded_share([*labelled, mismatched], 100) == pytest.approx(4 / 29)
    assert bench.padded_share(labelled, 10) == 0


def test_ours_is_compared_with_the_fastest_and_the_lightest_of_trl_by_hand():
    def found(speed, memory):
        return {"tokens_per_second": speed, "memory": memory}

    screened = {1: found(100, 1.0), 4: found(200, 3.0), 16: found(50, 9.0)}
    assert bench.fastest_and_lightest(screened) == (4, 1)
    table = bench.table_of([found(800, 2.0), found(900, 2.0), found(0, 2.0)], screened,
                           {4: [found(160, 3.0)], 1: [found(90, 4.0), found(110, 4.0), found(95, 0.5)]})
    assert (table["fastest"], table["lightest"]) == (4, 4)  # of the final runs, not of the single ones before
    assert [x["tokens_per_second"] for x in table["trl"].values()] == [95, 160, 50]
    assert table["speed over trl"] == 5 and table["memory over trl"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("method", bench.KINDS)
def test_a_benchmark_on_a_tiny_model(method, tmp_path, monkeypatch):
    """Both sides count the tokens of one batch, and ours ends without a checkpoint."""
    monkeypatch.setattr(bench, "WORK", tmp_path)
    monkeypatch.setattr(bench, "DATA_DIR", tmp_path)  # no GSM8K there
    bench.make_model(bench.SMOLLM2 | {"vocab_size": 300, "hidden_size": 18, "num_hidden_layers": 1}, tmp_path / "model")
    spec = {"method": method, "model": tmp_path / "model", "batch": bench.BATCH[method], "updates": 2}
    spec |= {"data": bench.data_for(method, 0), "per_device": 2}
    ours, trl = bench.measure_ours(spec), bench.measure_trl(spec)
    assert ours["tokens"] == trl["tokens"] > 100 * bench.BATCH[method]
    assert not (tmp_path / "ours/final").exists()


def test_the_benchmark_reads_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "WORK", tmp_path)
    monkeypatch.setattr(bench, "DATA_DIR", tmp_path)
    bench.make_model(bench.SMOLLM2 | {"vocab_size": 300, "hidden_size": 18, "num_hidden_layers": 1}, tmp_path / "model")
    spec = {"method": "dpo", "model": tmp_path / "model", "batch": 4, "data": bench.write("a.jsonl", bench.long_pairs(20))}
    assert bench.measure_data(spec)["rows"] == 20


# --- the README ---------------------------------------------------------------------------------------


def test_the_pages_have_the_numbers_of_the_results():
    text = tables.README.read_text()
    assert all(f"<!-- {name} -->" in text for name in tables.TABLES)
    assert tables.fill(text) == text  # else: python tests/experiments/tables.py
    assert tables.results() == (tables.RESULTS / "README.md").read_text()
    assert len(text.splitlines()) <= 180


def test_findings_that_are_no_difference_of_two_cells():
    """Sampling loses seed 0 in all four blocks and seed 1 in two, clipping seed 1 in one: shares 1, ¼ and 0."""
    rows = {}
    for i, name in enumerate(tables.LOSING):
        rows[f"{name}: humanline sampling"] = {"values": [0.5, 0.4 if i < 2 else 0.9, 0.9]}
        rows[f"{name}: humanline"] = {"values": [0.9, 0.4 if i < 1 else 0.9, 0.9]}
    assert len(tables.LOSING) == 4
    assert tables.difference({"rows": rows}, "lost: humanline sampling − humanline") == reproduce.interval([1, 0.25, 0])
    collapsed = {"k = 1": {"values": [0.1, 0.2], "curve": {"greedy": [[0.5, 0.4], [0.1, 0.2]]}}}
    assert tables.difference({"rows": collapsed}, "k = 1") == reproduce.interval([-0.4, -0.2])
    words = [tables.wall_clock(*x) for x in ((7, 6.5, 8), (3, 2, 4), (5, 4, 7), (1.2, 0.9, 1.5), (0.5, 0.4, 0.6))]
    assert words == ["holds", "faster, but less", "not shown", "not shown", "**the reverse**"]


def test_the_sentences_say_what_the_verdicts_say(monkeypatch):
    """DPO is above plain at β = 3 and below at 0.1; KTO shows nothing. One comparison of twelve is above 0, one exactly 0."""
    def found(x):
        return {"difference": [x, x, x], "verdict": reproduce.verdict([x, x, x])}

    sweep = {f"{m} β = {b} humanline − {m} β = {b} plain": found(0) for m in ("dpo", "kto") for b in reproduce.BETAS}
    sweep |= {f"{m} β = 3 humanline − {m} β = 0.1 plain": found(-0.25) for m in ("dpo", "kto")}
    sweep |= {"dpo β = 3 humanline − dpo β = 3 plain": found(1), "dpo β = 0.1 humanline − dpo β = 0.1 plain": found(-1)}
    rows = {f"{name}: {variant}": {"values": [0.4, 0.9] if variant == "clipped only" else [0.9, 0.9]}
            for name in reproduce.BLOCKS for variant in reproduce.VARIANTS}
    parts = {f"{name}: humanline − {name}: synced only": found(0.5 if i == 0 else -0.5) for i, name in enumerate(reproduce.BLOCKS)}
    more = {f"{m}, {x}: humanline − {m}, {x}: synced only": found(-0.5) for m in ("dpo", "kto") for x in reproduce.SETTINGS}
    more["kto, k = 64: humanline − kto, k = 64: synced only"] = found(0)
    monkeypatch.setattr(tables, "load", lambda name: {"rows": rows, "differences": {
        "beta_sweep": sweep, "ablation": parts, "clipping": more}[name]})
    assert tables.beta_sentences().startswith(
        "In the toy's β sweep humanline's win rate is above plain's at β = 3 (DPO); below plain's at β = 0.1 (DPO); "
        "not shown to differ from plain's at β = 0.3, 1 (DPO) and 0.1, 0.3, 1, 3 (KTO). Humanline at β = 3 less plain at "
        "β = 0.1: DPO −0.25 [−0.25, −0.25]: below 0, KTO −0.25")
    words = tables.clipping_sentence()
    assert "syncing alone 12 times" in words and "raised the win rate once and lowered it 10 times;" in words
    assert "the other 1 intervals hold 0, once with a difference of exactly 0." in words
    assert words.endswith("8 runs of DPO and KTO: plain 0, humanline 0, synced only 0, clipped only 4, humanline sampling 0.")


def test_a_k_that_is_no_shorter_than_the_run_is_named(monkeypatch):
    rows = {name: {"flags": flags} for name, flags in (
        ("a", {"sync_every": "128"}), ("b", {"sync_every": "120"}), ("c", {"sync_every": "64"}), ("d", {}))}
    monkeypatch.setattr(tables, "load", lambda name: {"rows": rows})
    assert tables.never_synced().splitlines() == [
        f"At the k of *{name}*, {k}, a run of 120 updates is never synced: it is clipped only." for name, k in (("a", 128), ("b", 120))]


@pytest.mark.parametrize("slope, online, words", [
    (-0.47, 0.1, ["slope −0.47", "holds", "place 1 of 3; the first at γ = 0.9", "holds"]),
    (-0.44, 0.25, ["slope −0.44", "**not here**", "place 2 of 3; the first at γ = 0.9", "**not at this γ**"]),
])
def test_the_rows_of_the_theory(monkeypatch, slope, online, words):
    perceived = {name: {"mean_abs_difference": x} for name, x in (("online", online), ("better", 0.2), ("worse", 0.3))}
    perceived |= {"gamma": 0.6, "nearest at 0.8": {"mean_abs_difference": "better"},
                  "nearest at 0.9": {"mean_abs_difference": "online"}}
    monkeypatch.setattr(tables, "load", lambda name: {
        "theorem_4_3": {tables.DEFAULT_BETAS: {"slope": slope}}, "perceived": perceived,
        "mean_utility": dict.fromkeys(("online", "better", "worse"), 0)})
    assert [text for row in tables.theory_rows() for text in row[3:]] == words


def test_no_rounding_hides_a_sign():
    assert [tables.number(x, sign=True) for x in (-0.004, 0.125, 0.0003, 0.0)] == ["−0.004", "+0.12", "+0.0003", "0.00"]
    assert tables.number(0.5) == "0.50"
