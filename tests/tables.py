"""The README's tables, written from tests/results: `python tests/tables.py` puts them between its markers.

A test compares, so that no number in them can differ from the files that the commands leave.
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "tests/results"


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def number(x: float, sign: bool = False) -> str:
    return f"{x:+.2f}" if sign and round(x, 2) else f"{abs(x) if round(x, 2) == 0 else x:.2f}"


def score(row: dict, key: str = "score") -> str:
    """Mean [95% interval]."""
    mean, low, high = row[key]
    return f"{number(mean)} [{number(low)}, {number(high)}]"


def difference(table: dict, name: str) -> str:
    mean, low, high = table["differences"][name]
    return f"{number(mean, True)} [{number(low, True)}, {number(high, True)}]".replace("-", "−")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def first() -> str:
    """The first screen."""
    table, rows = load("main")["rows"], []
    papers = {"dpo": "DPO (Rafailov et al. 2023)", "kto": "KTO (Ethayarajh et al. 2024)",
              "grpo": "GRPO (Shao et al. 2024)"}
    for method, paper in papers.items():
        cells = [table[f"{method} {source} {variant}"] for source, variant in (
            ("offline", "plain"), ("offline", "humanline"), ("online", "plain"))]
        rows.append([f"`humanline_{method}.py`", paper, f"`./run.sh {method}`",
                     *(f"{number(c['score'][0])} ({c['seconds']:.0f} s)" for c in cells)])
    return markdown(["script", "method", "recipe for one 80 GB GPU", "toy: offline, plain", "offline, humanline",
                     "online, plain"], rows)


def main() -> str:
    tables = {"letters": load("main"), "addition": load("verifiable")}
    rows = []
    for world, methods in (("letters", ("dpo", "kto", "grpo")), ("addition", ("grpo",))):
        for method in methods:
            cells = [tables[world]["rows"][f"{method} {source} {variant}"]
                     for source in ("offline", "online") for variant in ("plain", "humanline")]
            rows.append([f"{method.upper()}, {world}", *(score(cell) for cell in cells)])
    return markdown(["", "offline", "offline + humanline", "online", "online + humanline"], rows)


def bench() -> str:
    table, rows = load("bench_cpu"), []
    for method in ("dpo", "kto", "grpo"):
        found = table[method]
        ours, trl, usual = found["ours"], found["trl"], found["usual"]
        rows.append([method.upper(), f"{ours['tokens_per_second']:,.0f}", f"{ours['memory']:.2f} GiB",
                     f"{found['speed over trl']:.1f}×", f"{found['memory over trl']:.2f}×",
                     f"{found['speed over usual']:.1f}×", f"{found['memory over usual']:.2f}×",
                     f"{ours['share']:.2f}", f"{ours['padded']:.1%}".replace("%", " %")])
    return markdown(["", "tokens/s", "peak memory", "TRL: speed", "memory", "usual way: speed", "memory",
                     "share of the floor", "padding"], rows)


TABLES = {"first": first, "main": main, "bench": bench}


def fill(text: str) -> str:
    for name, make in TABLES.items():
        start, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = before + start + make() + end + after
    return text


if __name__ == "__main__":
    README.write_text(fill(README.read_text()))
