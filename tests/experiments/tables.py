"""The README's tables, written from tests/experiments/results: `python tests/experiments/tables.py` puts them between its markers.

A test compares, so that no number in them can differ from the files that the commands leave.
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README, RESULTS = ROOT / "README.md", ROOT / "tests/experiments/results"


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


def first_screen() -> str:
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


def main_table() -> str:
    tables = {"letters": load("main"), "addition": load("verifiable")}
    rows = []
    for world, methods in (("letters", ("dpo", "kto", "grpo")), ("addition", ("grpo",))):
        for method in methods:
            cells = [tables[world]["rows"][f"{method} {source} {variant}"]
                     for source in ("offline", "online") for variant in ("plain", "humanline")]
            rows.append([f"{method.upper()}, {world}", *(score(cell) for cell in cells)])
    return markdown(["", "offline", "offline + humanline", "online", "online + humanline"], rows)


def stopped() -> str:
    """Which cells of the main table have runs that ended early."""
    cells = [f"{label.replace('humanline', '+ humanline').replace(' plain', '').replace('grpo', 'GRPO').replace('dpo', 'DPO').replace('kto', 'KTO')} {row['stopped early']}"
             for name in ("main", "verifiable") for label, row in load(name)["rows"].items() if row["stopped early"]]
    return ("A run stops where all samples to a prompt are alike, and is graded at its last checkpoint (of every 30 updates). "
            f"Of five runs each: {', '.join(cells)}; most of them had converged.")


def bench_table() -> str:
    table, rows = load("bench_cpu"), []
    for method in ("dpo", "kto", "grpo"):
        found = table[method]
        ours = found["ours"]
        without = found.get("speed over trl without sync")
        without = f" (without sync {without:.1f}×)" if without else ""
        usual = [f"{found[f'{what} over usual']:.{n}f}×" if "usual" in found else "–" for what, n in (("speed", 1), ("memory", 2))]
        rows.append([method.upper(), f"{ours['tokens_per_second']:,.0f}", f"{ours['memory']:.2f} GiB",
                     f"{found['speed over trl']:.1f}×{without}", f"{found['memory over trl']:.2f}×",
                     *usual,
                     f"{ours['share']:.2f}", f"{ours['padded']:.1%}".replace("%", " %")])
    return markdown(["", "tokens/s", "peak memory", "TRL: speed", "memory", "usual way: speed", "memory",
                     "share of the floor", "padding"], rows)


def findings_table() -> str:
    """Each claim: the paper's figure, ours, and whether it holds here."""
    main, exact, often = load("main"), load("verifiable"), load("every_64")
    sweep, ablation, quality, clock = load("k_sweep"), load("ablation"), load("data_quality"), load("time")

    def three(a: str, b: str) -> str:
        return "; ".join(f"{m.upper()} {difference(main, f'{m} {a} − {m} {b}')}" for m in ("dpo", "kto", "grpo"))

    def grpo(a: str, b: str) -> str:
        return f"addition GRPO {difference(exact, f'grpo {a} − grpo {b}')}"

    def two(a: str, b: str) -> str:
        return "; ".join(f"{world} {difference(ablation, f'{world} {a} − {world} {b}')}" for world in ("letters", "addition"))

    ratio = "; ".join(f"{world} {low[0]:.1f}× [{low[1]:.1f}, {low[2]:.1f}]"
                      for world, low in clock["online / offline + humanline"].items())
    rows = [
        ["online beats offline", "win rate 1.4× (DPO), 1.3× (KTO), 1.6× (GRPO)",
         f"{three('online plain', 'offline plain')}; {grpo('online plain', 'offline plain')}"],
        ["offline + humanline beats offline", "all three, p < 0.05",
         f"{three('offline humanline', 'offline plain')}; {grpo('offline humanline', 'offline plain')}"],
        ["offline + humanline is as good as online", "the gap is closed for all three",
         f"{three('offline humanline', 'online plain')}; {grpo('offline humanline', 'online plain')}"],
        ["online + humanline adds little to online", "little",
         f"{three('online humanline', 'online plain')}; {grpo('online humanline', 'online plain')}"],
        ["sampling 64× less often costs plain GRPO", "significantly worse",
         f"addition {difference(often, 'every 64 plain − online plain')}"],
        ["… and humanline GRPO nothing", "as good as online (Pass@1 0.593 ± 0.019)",
         f"addition {difference(often, 'every 64 humanline − online plain')}; over plain every 64 "
         f"{difference(often, 'every 64 humanline − every 64 plain')}"],
        ["k = 1 collapses", "reward collapse",
         f"accuracy {score(sweep['rows']['k = 1'])}, k = 2 {score(sweep['rows']['k = 2'])}"],
        ["a middle k is best", "12 ≤ k ≤ 24",
         ", ".join(f"k = {k} {score(sweep['rows'][f'k = {k}'])}" for k in (4, 8, 16, 32, 64))],
        ["syncing alone is not enough", "not enough", f"both − synced only: {two('humanline', 'synced only')}"],
        ["without syncing it is plain", "falls back to offline", f"clipped only − plain: {two('clipped only', 'plain')}"],
        ["sampling ≈ clipping", "as good", f"sampling − clipping: {two('humanline sampling', 'humanline')}"],
        ["data near the policy are better", "bottom quartile, [−1.03, −0.36] nats, significantly worse",
         f"win rate bottom − top quartile {difference(quality, 'quartile 1 − quartile 4')}"],
        ["faster than online in wall-clock", "over 6×", f"seconds, online / offline + humanline: {ratio}"],
    ]
    return markdown(["finding", "the paper's figure", "here: difference or value [95% interval]", "holds here?"],
                    [[*row, VERDICTS[row[0]]] for row in rows])


VERDICTS = {  # ours, from the intervals
    "online beats offline": "**yes**",
    "offline + humanline beats offline": "**yes** for GRPO, on both worlds; **no** for DPO and KTO",
    "offline + humanline is as good as online": "**no**; GRPO closes most of the gap on letters, under half of it on addition",
    "online + humanline adds little to online": "**yes** for KTO and GRPO on letters; DPO fails on one seed of five; on addition it helps",
    "sampling 64× less often costs plain GRPO": "not shown: the interval holds 0",
    "… and humanline GRPO nothing": "**no** at the k chosen on the other seed; at k = 32 (below) it comes nearest",
    "k = 1 collapses": "**yes**",
    "a middle k is best": "k must be 16 or more; between 16, 32 and 64 no difference is shown",
    "syncing alone is not enough": "**no**: on letters syncing alone does as well",
    "without syncing it is plain": "**yes** on letters (a little worse even); on addition none of the variants differ",
    "sampling ≈ clipping": "**yes**: no difference is shown",
    "data near the policy are better": "**no**, the reverse; all data are the policy's own here, the quartiles lie close",
    "faster than online in wall-clock": "faster, but samples are short here and cheap",
}
TABLES = {"first": first_screen, "main": main_table, "stopped": stopped, "findings": findings_table,
          "bench": bench_table}


def fill(text: str) -> str:
    for name, make in TABLES.items():
        start, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = before + start + make() + end + after
    return text


if __name__ == "__main__":
    README.write_text(fill(README.read_text()))
