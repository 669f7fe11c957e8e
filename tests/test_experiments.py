"""The experiments' own arithmetic, and their code on a tiny policy: evidence, pages, demo, plots, bench."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bench
import common
import demo
import evidence
import humanline_dpo
import humanline_kto
import pages
import plot
import real_model
from conftest import SCRIPTS, write_jsonl
from evidence import CHOICE, INITIAL, SEEDS, Cell, Run, cell_of

DPO = cell_of("dpo", "main", "plain")


def tried(cell: Cell, k: str, scores: dict, kl: float = 1.0) -> dict:
    """Results on the seed that chooses, by rate."""
    return {Run(cell.method, cell.way, cell.beta, k, lr, CHOICE): {"score": x, "kl": kl} for lr, x in scores.items()}


PEAK = {"5e-4": 0.1, "1e-3": 0.3, "2e-3": 0.2}


def test_every_run_is_a_command_that_its_script_takes(tmp_path):
    """Only flags, and those of the cell; no seed that chose is reported."""
    for cell in [cell for cell in evidence.CELLS if cell.part != "initial"]:
        run = evidence.ladders(cell)[0][0]._replace(lr="3e-4", seed=2)
        args = SCRIPTS[cell.method].parse_args(evidence.argv(run, tmp_path / "a folder", "cpu"))
        assert args.sample_every == (1 if cell.way == "online" else 8 if "every 8" in cell.way else 0)
        off = cell.way in ("plain", "online", "plain, every 8", "synced only")
        assert args.humanline == ("off" if off else "sample" if "sampling" in cell.way else "clip")
        assert (args.sync_every, args.beta) == (int(run.k), float(run.beta))
        assert (args.seed, args.lr, args.lr_decay, args.lora_rank) == (2, 3e-4, True, 16)
        assert ("prompts" in args.data) == (args.sample_every > 0) and CHOICE not in cell.seeds


def test_a_rate_is_chosen_when_its_neighbours_are_worse_and_it_writes_sentences():
    def asks_for(results):
        return [run.lr for run in evidence.choice(DPO, results)[1]]

    assert asks_for({}) == [*PEAK] and evidence.runs_of(DPO, {}) == []
    assert asks_for(tried(DPO, "0", PEAK | {"2e-3": 0.4})) == ["5e-3"]
    assert asks_for(tried(DPO, "0", PEAK | {"5e-4": 0.4})) == ["2e-4"]
    gibberish = tried(DPO, "0", {"5e-3": 0.9}, kl=evidence.LIMIT + 1)
    runs = evidence.runs_of(DPO, tried(DPO, "0", PEAK) | gibberish)
    assert [(run.lr, run.seed) for run in runs] == [("1e-3", seed) for seed in SEEDS]


def test_k_is_chosen_with_its_rate_and_not_before_all_have_been_tried():
    cell = cell_of("grpo", "main", "humanline")
    some = tried(cell, "1", PEAK) | tried(cell, "4", PEAK | {"1e-3": 0.5})
    setting, missing = evidence.choice(cell, some)
    assert setting is None and {run.k for run in missing} == {"16"}
    setting, _ = evidence.choice(cell, some | tried(cell, "16", PEAK))
    assert (setting.k, setting.lr) == ("4", "1e-3")


def test_all_is_run_once_the_choice_first(monkeypatch, tmp_path):
    """With threads that train nothing; what is done is not done again, and the runs alone wait for the choice."""
    def work(run, device, threads):
        return {"run": run, "score": {**PEAK, "2e-3": 0.4}.get(run.lr, 0.0), "kl": 1.0, "wall": 0}

    monkeypatch.setattr(evidence, "CELLS", [DPO])
    monkeypatch.setattr(evidence, "MAIN", [DPO])
    monkeypatch.setattr(evidence, "STORE", tmp_path / "evidence.jsonl")
    monkeypatch.setattr(evidence, "ProcessPoolExecutor", lambda jobs, context: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(evidence, "work", work)
    assert evidence.wanted(["cost"], {}) == [INITIAL]
    for _ in range(2):
        evidence.run_all(["main"], "cpu", jobs=2)
        runs = [tuple(line["run"]) for line in real_model.read(evidence.STORE)]
        assert runs[0] == INITIAL and {run[4] for run in runs[1:4]} == {*PEAK} and runs[4][4] == "5e-3"
        assert {run[4:6] for run in runs[5:]} == {("2e-3", seed) for seed in SEEDS} and len(runs) == 10
    evidence.run_all(["cost"], "cpu", jobs=1)
    assert [run for run in evidence.finished() if run.alone] == [Run(*runs[5])._replace(seed=1, alone=True)]


def test_the_given_rates_are_those_of_humanline():
    setting, missing = evidence.choice(cell_of("dpo", "main", "humanline"), evidence.finished())
    given = {cell.lr for cell in evidence.CELLS if cell.part in ("beta", "parts") and cell.lr}
    assert not missing and given == {setting.lr}


def test_a_broken_line_is_done_again(monkeypatch, tmp_path):
    path = write_jsonl(tmp_path / "evidence.jsonl", [{"run": INITIAL, "score": 0.5}])
    path.write_text(path.read_text() + '{"run": ["dpo')
    monkeypatch.setattr(evidence, "STORE", path)
    assert evidence.finished() == {INITIAL: {"run": list(INITIAL), "score": 0.5}}


def test_intervals_and_verdicts_by_hand():
    # mean 1, standard error 1 / √3 = 0.5774; t = 4.303
    assert pages.interval([0.0, 1.0, 2.0]) == pytest.approx((-1.484, 3.484), abs=1e-3)
    around = {0.0: "no difference", 0.2: "above", -0.2: "below"}  # ± 0.04: in this order
    assert {x: pages.verdict([x - 0.0161, x, x + 0.0161]) for x in around} == around
    assert pages.verdict([0.01, 0.03, 0.05]) == "not decided" == pages.verdict([-0.01, 0.03, 0.03])
    assert pages.verdict([0.01, 0.03, 0.05], as_good=True) == "not worse"
    assert pages.verdict([]) == "not run" and pages.verdict([1.0]) == "not decided"
    assert [pages.text_of(x, sign=True) for x in (-0.124, 0.1, -0.004)] == ["−0.12", "+0.10", "0.00"]


def test_plains_line_by_hand():
    """From 0 at a KL of 0 by 0.2 at 1 and 0.3 at 2.5 to 0.4 at 3; humanline's are 0.5, 2 and, beyond the last, 9."""
    results, kls = {INITIAL: {"score": 0.0}}, {"1": 1.0, "0.1": 3.0, "0.03": 2.5}
    scores = {"1": 0.2, "0.1": 0.4, "0.03": 0.3}
    for cell in [cell for cell in evidence.CELLS if cell.method == "dpo" and cell.part in ("main", "beta")]:
        results |= tried(cell, cell.k, PEAK)
        for run, kl in zip(evidence.runs_of(cell, results), (0.5, 2.0, 9.0)):
            plain = {"score": scores[cell.beta], "kl": kls[cell.beta]}
            results[run] = plain if cell.way == "plain" else {"score": 0.5, "kl": kl}
    line = {1: 0.1, 2: 0.2 + 0.1 / 1.5, 3: 0.4}
    assert evidence.plains_line("dpo", results) == pytest.approx(line)
    assert evidence.differences(evidence.EQUAL_KL, "dpo", results) == pytest.approx([0.5 - x for x in line.values()])
    assert evidence.differences(evidence.ABOVE_PLAIN, "dpo", results) == pytest.approx([0.3] * 3)


def test_the_pages_have_the_numbers_of_the_results():
    found, seen = evidence.tables(evidence.finished()), set()
    for path, limit in zip(evidence.PAGES, (200, 135)):
        text = path.read_text()
        assert pages.fill(text, found) == text  # else: ./run.sh reproduce --pages
        assert len(text.splitlines()) <= limit
        seen |= {name for name in found if f"<!-- {name} -->" in text}
    assert seen == set(found)


@pytest.fixture
def tiny(policy, monkeypatch, tmp_path):
    """The tiny policy in the place of SmolLM2, two updates, short responses."""
    for module in (real_model, demo):
        monkeypatch.setattr(module, "MODEL", policy)
    monkeypatch.setattr(real_model, "TOKENS", 4)
    monkeypatch.setattr(evidence, "FLAGS", f"{evidence.FLAGS} --steps 2 --max_new_tokens 4 --max_length 256")
    monkeypatch.setattr(evidence, "WORK", tmp_path / "work")
    monkeypatch.setattr(evidence, "STORE", tmp_path / "evidence.jsonl")


def test_runs_leave_their_numbers(tiny):
    """Synced only clips nothing, and counts what a clip would have met: as many as with it at these small rates."""
    runs = [INITIAL, *(Run("dpo", way, "1", "1", "0.3", 1) for way in ("humanline", "synced only")),
            Run("grpo", "online", "0", "0", "1e-3", 1)]
    initial, clipped, synced, online = (evidence.work(run, "cpu", 1) for run in runs)
    assert initial["kl"] == 0 and clipped["kl"] != synced["kl"] != 0
    assert clipped["beyond"] > 0.1 and synced["beyond"] > 0.1 and "beyond" not in online
    assert online["updates"] == 2 and len(online["greedy"]) == 5
    real_model.write(evidence.STORE, [initial, online])
    assert evidence.finished().keys() == {INITIAL, runs[3]}


def test_a_run_whose_responses_are_all_alike_ends_with_its_last_update(tiny, monkeypatch, tmp_path):
    weights = {}

    def main(args):
        model, *_ = humanline_dpo.load_policy(args)
        weights.update({name: w + 1 for name, w in model.named_parameters() if w.requires_grad})
        (tmp_path / "run").mkdir()
        write_jsonl(tmp_path / "run/metrics.jsonl", [{"step": 0, "seconds": 1}, {"step": 1, "seconds": 1}])
        torch.save({"model": weights}, tmp_path / "run/checkpoint.pt")
        raise common.BadInput("equal within all groups")

    monkeypatch.setattr(humanline_dpo, "main", main)
    assert evidence.train(Run("dpo", "online", "1", "0", "1e-3", 1), tmp_path, "cpu")["updates"] == 1
    final = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "run/final").named_parameters())
    assert weights and all(torch.equal(final[name], w) for name, w in weights.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "run/final")


def test_the_demo_says_what_its_runs_found(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(evidence, "STORE", evidence.RESULTS / "evidence.jsonl")
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "OUT", tmp_path / "demo")
    monkeypatch.setattr(demo, "UPDATES", 2)
    monkeypatch.setattr(real_model, "make_model", lambda: None)
    demo.main()
    text = capsys.readouterr().out
    for name in demo.LINES.values():
        assert text.count(f"    {name} ") == demo.SHOWN and f"\n  {name} " in text
    row = next(line for line in evidence.PAGES[1].read_text().splitlines() if "at the same β" in line)
    _, _, name, difference, interval, _, verdict = row.strip("| ").split(" | ")
    assert name == "DPO" and f"it is {difference} ({interval}): {verdict}." in text
    assert (demo.OUT / "reward.png").exists()


def test_the_data_of_a_seed_are_those_of_the_committed_groups(tmp_path):
    groups, held_out = (real_model.read(real_model.DATA / f"{name}.jsonl") for name in ("groups", "held_out"))
    assert not {row["prompt"] for row in groups} & {row["prompt"] for row in held_out}
    assert groups[0]["rewards"] == real_model.sentiment(groups[0]["completions"])
    real_model.write_data(tmp_path, seed=1)
    drawn = {row["prompt"]: dict(zip(row["completions"], row["rewards"]))
             for row in real_model.read(tmp_path / "groups.jsonl")}
    assert len(drawn) == 200 and {len(rewards) for rewards in drawn.values()} == {4}
    for pair in real_model.read(tmp_path / "pairs.jsonl"):
        rewards = drawn[pair["prompt"]]
        assert rewards[pair["chosen"]] == max(rewards.values()) > min(rewards.values()) == rewards[pair["rejected"]]
    for row in real_model.read(tmp_path / "labels.jsonl"):
        rewards = drawn[row["prompt"]]
        assert row["label"] == (rewards[row["completion"]] > sum(rewards.values()) / 4)


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
