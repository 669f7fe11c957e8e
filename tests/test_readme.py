"""What README.md shows works: its commands, rows of data and flags; its sketch and its table are the code's, its
findings those of the results page."""

import json
import re
import shlex

import pytest

import evidence
import humanline_dpo
from conftest import ROOT, SCRIPTS, write_jsonl

TEXT = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    \.venv/bin/python (humanline_(\w+)\.py) (.*?)(?: +#.*)?$", TEXT, re.M)
FINDINGS = re.search(r"^## What it does to a language model\n(.*?)^> \*\*Status", TEXT, re.S | re.M)[1]
ROWS = re.findall(r"^    (DPO, KTO|KTO|GRPO) +(\{.*\})$", TEXT, re.M)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_commands_train(command, flags):
    """On a tiny model and, in place of the Hub's data, a file."""
    file, name, rest = command
    assert (ROOT / file).exists() and SCRIPTS[name].parse_args(shlex.split(rest)).model.startswith("Qwen/")
    args = SCRIPTS[name].parse_args([*shlex.split(rest), *flags(SCRIPTS[name], "--steps", 1)])
    SCRIPTS[name].main(args)


def test_the_baseline_trains(run):
    flags = re.search(r"Add `(--plain --output_dir runs/plain)`", TEXT)[1].split()
    assert run(humanline_dpo, flags[0], "--steps", 1)[1]["unclipped"] == 1


@pytest.mark.parametrize("methods, line", ROWS)
def test_the_rows_of_data_train(methods, line, run, tmp_path):
    """Eight times the row, with other texts; a dialogue's rejected side is left to the reader."""
    rows = []
    for i in range(8):
        text = re.sub('"text"', lambda _: json.dumps("abcdefgh"[i] * 4), line)
        same = "[the same but for the last message]"
        row = json.loads(text.replace(same, "null"))
        if same in text:
            row["rejected"] = [row["chosen"][0], {"role": "assistant", "content": "zz"}]
        rows.append(row | {key: f"{row[key]}z" for key in ("rejected",) if type(row.get(key)) is str})
        if "reward" in row:  # its group
            rows.append(row | {"completion": "z", "reward": 0.0})
        if "label" in row:  # KTO needs both
            rows.append(row | {"completion": "z", "label": False})
    for kind in methods.lower().split(", "):
        run(SCRIPTS[kind], "--data", write_jsonl(tmp_path / "rows.jsonl", rows), "--steps", 1, "--batch_size", 4,
            "--eval_size", 0, "--overwrite")  # fmt: skip


def test_all_flags_are_known():
    known = " ".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/experiments/*.py")])
    for flag in set(re.findall(r"--\w+", TEXT)):
        assert f'"{flag}"' in known, flag
    for command in set(re.findall(r"\./run\.sh (\w+)", TEXT)):
        assert re.search(rf"^  (?:.* )?{command}(?: .*)?\)", (ROOT / "run.sh").read_text(), re.M), command


def test_the_sketch_is_the_scripts_code():
    code, at = re.sub(r"\s+", " ", (ROOT / "humanline_dpo.py").read_text()).replace("( ", "("), 0
    sketch = re.search(r"^```python\n(.*?)^```", TEXT, re.S | re.M)[1]
    for line in sketch.splitlines():
        part = re.split(r"  +#|, \.\.\.|, beta|, \"clip\"", line.strip())[0]
        if part != "...":
            where = code.find(part, at)
            assert where > 0, part
            at = where


@pytest.mark.parametrize("k", [1, 2, 0])
def test_the_table_says_which_reference_an_update_meets(k, run, monkeypatch):
    """Counted in a run: the updates made when a batch was scored."""
    made, references = [0], []
    next_window, accumulate = humanline_dpo.next_window, humanline_dpo.accumulate_gradient

    def window_and_tell(*given):
        window = next_window(*given)
        references.extend([max(0, made[0] - 1)] * len(window))  # the policy as it was before this update
        return window

    def accumulate_and_tell(model, batch, mode, args):
        made[0] += 1
        return accumulate(model, batch, mode, args)

    monkeypatch.setattr(humanline_dpo, "next_window", window_and_tell)
    monkeypatch.setattr(humanline_dpo, "accumulate_gradient", accumulate_and_tell)
    run(humanline_dpo, "--steps", 5, "--sync_every", k, "--eval_size", 0)
    numbers = re.search(rf"^    reference, k = {k}  ((?:\d ? ?)+)", TEXT, re.M)[1].split()
    assert [int(x) for x in numbers] == references
    for name in SCRIPTS:  # and their docstrings say the same
        assert f"    reference, k = {k}  {'  '.join(numbers)}" in (ROOT / f"humanline_{name}.py").read_text()


def rows_of(page):
    """The cells of the tables' lines."""
    return [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]


def unproved(findings, results_page):
    """What the findings say and the tables do not: numbers with decimals, and of a method's difference the verdict."""
    rows = rows_of(results_page)
    numbers = {number for row in rows for cell in row for number in re.findall(r"[+−]?\d+\.\d+", cell)}
    said = set(re.findall(r"[+−]?\b\d+\.\d+", re.sub(r"\(http\S+\)|±0.05", "", findings)))
    verdicts = {(row[2], row[-1], row[3]) for row in rows}  # here, verdict, difference
    bullets = "\n".join(line for line in findings.splitlines() if line.startswith("* "))
    words = re.findall(r"(?:(\w+) )?\*([a-z ]+)\*(?: \(([+−]?[\d.]+)\))?", bullets.replace("**", ""))
    return sorted(said - numbers) + [word for word in words if word not in verdicts]


def test_the_findings_are_those_of_the_results_page():
    page = evidence.PAGES[1].read_text()
    assert unproved(FINDINGS, page) == []
    assert unproved("before 7.77", page) == ["7.77"]
    assert unproved("* DPO *above* (−0.19)", page) == [("DPO", "above", "−0.19")]
    assert unproved("* DPO is *above*", page) == [("is", "above", "")]


def test_the_sentences_are_those_of_the_runs():
    said = {" ".join(text.split()) for result in evidence.finished().values() for text in result["greedy"]}
    rows = rows_of(FINDINGS.partition("| prompt | initial | plain | humanline |\n")[2])[1:]
    assert rows and {sentence for row in rows for sentence in row[1:]} <= said
