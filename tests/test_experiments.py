"""The experiments' own arithmetic, and their code on a tiny policy: evidence, demo, plots, bench."""

import json
import shlex
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bench
import common
import demo
import evidence
import humanline_dpo
import humanline_kto
import plot
import real_model
from conftest import ROOT, SCRIPTS, write_jsonl
from evidence import CHOICE, SEEDS, START, Page, Run, real

CELLS = [cell for part in evidence.PARTS.values() for cell in part]


# --- evidence: which runs there are -------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: " ".join(cell[:6]))
def test_every_run_is_a_command_that_its_script_takes(cell, tmp_path):
    """Only flags, and those of the cell: n and k, perception, decay, the seed, the rate."""
    args = SCRIPTS[cell.method].parse_args(cell._replace(lr="3e-4", seed=2).argv("cpu", tmp_path))
    assert args.sample_every == {"offline": 0, "online": 1, "every 16": 16, "every 64": 64}[cell.source]
    perception = {"plain": "off", "synced only": "off", "humanline sampling": "sample"}.get(cell.variant, "clip")
    assert (args.humanline, args.sync_every) == (perception, int(cell.k or 0))
    assert (args.seed, args.lr, args.beta, args.lr_decay) == (2, 3e-4, float(cell.beta), True)
    assert args.lora_rank == (16 if cell.task in ("sentiment", "sums") else 0)
    assert f"/{cell.task}-2/" in args.data and ("prompts" in args.data) == (args.sample_every > 0)
    assert cell.task in args.reward or "math_reward" in args.reward


def test_no_seed_that_chose_is_reported():
    assert CHOICE not in SEEDS and len(SEEDS) >= 3
    assert not {CHOICE, *SEEDS} & {10, 11, 12}  # the toys' flags were found on these


def scores(cell: Run, of: dict) -> dict:
    """Results of a cell's runs on the seed that chooses."""
    return {cell._replace(lr=lr, seed=CHOICE): {"score": x, "kl": 1.0} for lr, x in of.items()}


def test_a_rate_is_known_when_its_neighbours_are_worse():
    cell = real("dpo")
    assert evidence.untried(evidence.tried(cell, {})) == list(START) and evidence.runs_of(cell, {}) == []
    rising = scores(cell, {"5e-4": 0.1, "1e-3": 0.2, "2e-3": 0.3})
    assert evidence.untried(evidence.tried(cell, rising)) == ["5e-3"]
    peak = rising | scores(cell, {"5e-3": 0.25})
    assert evidence.untried(evidence.tried(cell, peak)) == []
    assert evidence.runs_of(cell, peak) == [cell._replace(lr="2e-3", seed=seed) for seed in SEEDS]
    falling = scores(cell, {"5e-4": 0.3, "1e-3": 0.2, "2e-3": 0.1})
    assert evidence.untried(evidence.tried(cell, falling)) == ["2e-4"]


def test_a_rate_that_ends_in_gibberish_is_not_chosen():
    runs = evidence.tried(real("dpo"), scores(real("dpo"), {"5e-4": 0.1, "1e-3": 0.3, "2e-3": 0.2, "5e-3": 0.9}))
    assert evidence.best_rate(runs) == "5e-3" and evidence.untried(runs) == ["1e-2"]
    runs["5e-3"]["kl"] = evidence.LIMIT + 1
    assert evidence.best_rate(runs) == "1e-3" and evidence.untried(runs) == []


def test_whose_rate_a_cell_has():
    """Plain has its own at each β; all else that of humanline at β = 1 and its k."""
    best = real("dpo", variant="humanline")
    for cell in [real("dpo", variant=v) for v in evidence.VARIANTS if v != "plain"] + [
            real("dpo", variant="humanline", beta="0.03"), real("dpo", variant="humanline", k="16")]:
        assert evidence.tuned(cell) == best
    assert evidence.tuned(real("dpo", beta="0.1")) == real("dpo", beta="0.1") != real("dpo")
    assert evidence.tuned(real("grpo", variant="humanline", k="16")) == real("grpo", variant="humanline")


def test_what_is_wanted_next():
    """The initial policy, the rates, then the seeds; the toys have their flags; nothing twice, nothing done."""
    cell, k = real("dpo", variant="humanline"), real("dpo", variant="humanline", k="4")
    first = evidence.wanted(["k"], {})
    assert first[0].method == "initial" and first[1:4] == list(scores(cell, dict.fromkeys(START, 0)))
    assert len(first) == len(set(first)) == 7  # DPO's and GRPO's rates, which all k share
    known = scores(cell, {"5e-4": 0.1, "1e-3": 0.2, "2e-3": 0.1})
    then = evidence.wanted(["k"], known)
    assert [run for run in then if run[:6] == k[:6]] == [k._replace(lr="1e-3", seed=seed) for seed in SEEDS]
    assert not set(then) & set(known)
    toys = evidence.wanted(["toy"], {})
    assert len(toys) == len(evidence.TOY) * len(SEEDS) and all(run.lr and run.seed in SEEDS for run in toys)


def test_a_broken_line_is_done_again(monkeypatch, tmp_path):
    run = real("dpo")._replace(lr="1e-3", seed=1)
    path = write_jsonl(tmp_path / "evidence.jsonl", [{"run": run, "score": 0.5}])
    path.write_text(path.read_text() + '{"run": ["senti')
    monkeypatch.setattr(evidence, "STORE", path)
    assert evidence.finished() == {run: {"run": list(run), "score": 0.5}}


# --- evidence: numbers --------------------------------------------------------------------------------


def test_intervals_and_verdicts():
    # mean 1, standard error 1 / √3 = 0.5774; t = 4.303
    assert evidence.interval([0.0, 1.0, 2.0]) == pytest.approx((1, -1.484, 3.484), abs=1e-3)
    found = [evidence.verdict(x) for x in ((1, 0.1, 2), (-1, -2, -0.1), (1, -0.1, 2))]
    assert found == ["above 0", "below 0", "includes 0"]


def test_no_rounding_hides_a_sign():
    assert [evidence.number(x, sign=True) for x in (-0.004, 0.125, 0.0003, 0.0)] == ["−0.004", "+0.12", "+0.0003", "0.00"]
    assert evidence.number(0.5) == "0.50"


def test_win_rate_by_hand():
    """Two prompts, two samples: prompt 0 has 1, 3 against 2, 2; prompt 1 has 5, 5 against 5, 0."""
    assert evidence.win_rate([1, 5, 3, 5], [2, 5, 2, 0], samples=2) == (2 / 4 + 3 / 4) / 2


def many(cell: Run, lr: str, of: list[tuple[float, float]]) -> dict:
    """Results over SEEDS: (score, kl) each."""
    return {cell._replace(lr=lr, seed=seed): {"score": x, "kl": kl, "greedy": ["a"] * 5} for seed, (x, kl) in zip(SEEDS, of)}


@pytest.fixture
def page():
    """DPO with all that its row needs: plain at β = 1 has a KL of 1, at β = 0.1, which seed 0 prefers, of 3."""
    results = {evidence.INITIAL["sentiment"]: {"score": 0.0, "kl": 0.0, "greedy": ["b"] * 5}}
    results |= many(real("dpo", beta="0.03"), "1e-3", [(0.4, 4.0), (0.4, 4.0), (0.4, 4.0)])
    for cell, x in ((real("dpo"), 0.2), (real("dpo", beta="0.1"), 0.4), (real("dpo", beta="0.03"), 0.3),
                    (real("dpo", variant="humanline"), 0.9)):
        results |= scores(cell, {"5e-4": 0.0, "1e-3": x, "2e-3": 0.0})
    results |= many(real("dpo"), "1e-3", [(0.2, 1.0), (0.3, 1.0), (0.2, 1.0)])
    results |= many(real("dpo", beta="0.1"), "1e-3", [(0.4, 3.0), (0.5, 3.0), (0.4, 3.0)])
    results |= many(real("dpo", variant="humanline"), "1e-3", [(0.5, 2.0), (0.6, 2.0), (0.5, 9.0)])
    return Page(results)


def test_the_best_beta_of_plain_is_chosen_on_the_seed_that_is_not_reported(page):
    assert page.plain("dpo")[0] == real("dpo", beta="0.1") and page.plain("kto") == []


def test_differences_are_paired(page):
    """0.3 in each seed but for rounding: no spread."""
    assert page.difference(real("dpo", variant="humanline"), real("dpo")) == "+0.30 [+0.30, +0.30]: above 0"
    assert page.difference(real("kto"), real("dpo")) == "not run" == page.cell(real("kto"))
    assert page.cell(real("dpo")).endswith("(1.0)") and page.cell(evidence.INITIAL["sentiment"]) == "0.00"


def test_the_frontier_by_hand(page):
    """Seeds 1 and 2: plain has 0.3 and 0.4 at a KL of 2; seed 3 lies beyond plain's last point, 0.4 at 4."""
    gaps = evidence.interval([0.5 - 0.3, 0.6 - 0.4, 0.5 - 0.4])
    found = page.frontier("dpo")
    assert found.startswith(f"DPO {evidence.bounds(gaps, True)}: {evidence.verdict(gaps)}") and "1 of 3 seeds" in found


def test_the_pages_have_the_numbers_of_the_results():
    found, seen = evidence.tables(Page(evidence.finished())), set()
    for path, limit in zip(evidence.PAGES, (200, 150)):
        text = path.read_text()
        assert evidence.fill(text, found) == text  # else: ./run.sh reproduce --pages
        assert len(text.splitlines()) <= limit
        seen |= {name for name in found if f"<!-- {name} -->" in text}
    assert seen == set(found)


def test_a_table_takes_the_place_of_the_one_before():
    text = "words <!-- a -->\n\nold\nlines\n\n<!-- b -->\nold\n\nmore\n"
    assert evidence.fill(text, {"a": "new", "b": ""}) == "words <!-- a -->\n\nnew\n\n<!-- b -->\nnot run\n\nmore\n"


# --- evidence and demo on a tiny policy; the real model -----------------------------------------------


@pytest.fixture
def tiny(policy, monkeypatch, tmp_path):
    """The tiny policy in the place of SmolLM2, three updates, short responses."""
    for module in (real_model, demo):
        monkeypatch.setattr(module, "MODEL", policy)
    monkeypatch.setattr(demo, "OUT", tmp_path / "demo")
    monkeypatch.setattr(demo, "UPDATES", 2)
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(evidence, "WORK", tmp_path / "work")
    monkeypatch.setattr(real_model, "TOKENS", 4)
    monkeypatch.setitem(evidence.UPDATES, "sentiment", 2)
    monkeypatch.setitem(evidence.UPDATES, "sums", 2)
    monkeypatch.setitem(evidence.FLAGS, "sentiment", f"{evidence.REAL} --max_new_tokens 4 --max_length 256")
    monkeypatch.setitem(evidence.FLAGS, "sums", f"{evidence.REAL} --max_new_tokens 4 --max_length 256")


@pytest.mark.parametrize("cell", [real("dpo", variant="humanline"), real("kto"), real("grpo", "online"),
                                  real("grpo", "every 16", "humanline", task="sums")], ids=lambda cell: " ".join(cell[:4]))
def test_a_run_leaves_its_numbers(tiny, cell):
    run = cell._replace(lr="1e-3", seed=1)
    evidence.build(run)
    found = evidence.work(run, "cpu", 0)
    assert {"run", "score", "kl", "greedy", "loss", "unclipped", "seconds", "wall", "machine", "torch"} <= set(found)
    assert len(found["greedy"]) == 5 and abs(found["kl"]) < 5
    assert (found["kl"] != 0) == (cell.method != "grpo")  # letters have no sentiment: all advantages are 0
    json.dumps(found)


@pytest.mark.parametrize("run", [Run("letters", "dpo", "online", "plain", "3", "", "1e-3", 1),
                                 real("dpo", "online")._replace(lr="1e-3", seed=1)], ids=lambda run: run.task)
def test_a_run_whose_responses_are_all_alike_ends_with_its_last_update(tiny, run, policy, monkeypatch, tmp_path):
    if run.task == "letters":
        shutil.copytree(policy, run.folder() / "policy")
    weights = {}

    def main(args):
        model, *_ = humanline_dpo.load_policy(args)
        weights.update({name: w + 1 for name, w in model.named_parameters() if w.requires_grad})
        lines = [{"step": 0, "seconds": 1}, {"step": 1, "seconds": 1, "loss": 0.5, "unclipped": 1}]
        write_jsonl(tmp_path / "metrics.jsonl", lines)
        torch.save({"model": weights}, tmp_path / "checkpoint.pt")
        raise common.BadInput("equal within all groups")

    monkeypatch.setattr(humanline_dpo, "main", main)
    assert evidence.train(run, "cpu", tmp_path)["updates"] == 1
    final = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "final").named_parameters())
    assert weights and all(torch.equal(final[name], w) for name, w in weights.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "final")


def test_the_initial_policy_has_no_kl(tiny):
    assert evidence.work(evidence.INITIAL["sentiment"], "cpu", 0)["kl"] == 0


def test_the_demo_says_what_its_runs_found(tiny, monkeypatch, capsys):
    monkeypatch.setattr(real_model, "make_model", lambda: None)
    demo.main()
    text = capsys.readouterr().out
    for name in ("initial policy", "plain", "humanline"):
        assert text.count(f"    {name} ") == demo.SHOWN and f"\n  {name} " in text
    assert "Humanline" not in text or "seed" in text
    assert (demo.OUT / "reward.png").exists()


def test_the_committed_data_are_whole():
    groups, held_out = (real_model.read(real_model.DATA / f"{name}.jsonl") for name in ("groups", "held_out"))
    assert len(groups) == 200 and len(held_out) == 100
    assert not {row["prompt"] for row in groups} & {row["prompt"] for row in held_out}
    assert all(len(row["completions"]) == len(row["rewards"]) == real_model.SAMPLES for row in groups)
    assert groups[0]["rewards"] == real_model.sentiment(groups[0]["completions"])
    assert sum(path.stat().st_size for path in real_model.DATA.iterdir()) < 500_000


@pytest.mark.skipif(not (ROOT / "runs/smollm2/model.safetensors").exists(), reason="no runs/smollm2; ./run.sh makes it")
def test_the_real_model_answers_and_trains(tmp_path):
    folder = ROOT / "runs/smollm2"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert "Paris" in real_model.answers(model, tokenizer, ["What is the capital of France?"], 0.0, system=None)[1][0]
    rows = [{"prompt": "Say yes or no.", "chosen": f"Yes, {i}.", "rejected": f"No, {i}."} for i in range(2)]
    flags = f"--model {folder} --data {write_jsonl(tmp_path / 'rows.jsonl', rows)} --output_dir {tmp_path / 'run'}"
    flags += " --steps 4 --batch_size 2 --warmup 0 --lr 1e-5 --eval_size 0 --save_every 0 --device cpu"
    humanline_dpo.main(humanline_dpo.parse_args(shlex.split(flags)))
    lines = real_model.read(tmp_path / "run/metrics.jsonl")
    assert lines[1]["loss"] == pytest.approx(0.6931, abs=1e-4) and lines[-1]["loss"] < 0.69


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
