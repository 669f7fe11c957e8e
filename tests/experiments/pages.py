"""How evidence.py and demo.py show their numbers: intervals, verdicts, tables, pictures."""

import json
import math
import re
import statistics
from collections.abc import Collection
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files, no window
import matplotlib.pyplot as plt  # noqa: E402

MISSING = "not run"
MARGIN = 0.05  # a smaller difference is none
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t for so many values
COLOURS = {"plain": "#D55E00", "humanline": "#0072B2", "online": "#009E73"}  # Okabe and Ito's
GREY = "#555555"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "axes.titlesize": 11})


# --- numbers -----------------------------------------------------------------------------------------
def interval(values: Collection[float]) -> tuple[float, float]:
    """The 95 % t-interval of their mean; of a single value it has no bounds."""
    if len(values) == 1:
        return -math.inf, math.inf
    mean, half = statistics.fmean(values), T_975[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return mean - half, mean + half

def verdict(differences: list[float], as_good: bool = False) -> str:
    """The one rule for all tables: where the interval of a difference lies. as_good: what is claimed is no more."""
    if not differences:
        return MISSING
    low, high = interval(differences)
    if -MARGIN <= low and high <= MARGIN:
        return "no difference"
    if low > 0:
        return "above"
    if high < 0:
        return "below"
    if as_good and low > -MARGIN:
        return "not worse"
    return "not decided"

def text_of(x: float, sign: bool = False, digits: int = 2) -> str:
    text = f"{x:+.{digits}f}" if sign else f"{x:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.lstrip("+-")

def number(values: Collection[float], sign: bool = False, digits: int = 2) -> str:
    """Their mean."""
    return text_of(statistics.fmean(values), sign, digits) if values else MISSING

def span(values: Collection[float], sign: bool = False) -> str:
    """The interval of their mean."""
    return " to ".join(text_of(x, sign) for x in interval(values)) if len(values) > 1 else "–"


# --- tables ------------------------------------------------------------------------------------------
def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table, without the columns that have nothing but a dash."""
    columns = [i for i in range(len(head)) if any(row[i] != "–" for row in rows)]
    lines = [[line[i] for i in columns] for line in [head, ["---"] * len(head), *rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

def bench_table(path: Path) -> str:
    table, rows = json.loads(path.read_text()), []
    for method in ("dpo", "kto", "grpo"):
        found = table[method]
        ours, fastest, lightest = found["ours"], str(found["fastest"]), str(found["lightest"])
        rows.append([method.upper(), f"{ours['tokens_per_second']:,.0f}", f"{ours['memory']:.2f} GiB",
                     f"({fastest}) {found['trl'][fastest]['tokens_per_second']:,.0f}",
                     f"{found['speed over trl']:.1f}×",
                     f"({lightest}) {found['trl'][lightest]['memory']:.2f} GiB", f"{found['memory over trl']:.2f}×",
                     f"{ours['share']:.2f}", f"{100 * ours['padded']:.1f} %"])
    return markdown(["", "tokens/s", "peak memory", "TRL's fastest (per-device batch): tokens/s", "ours over it",
                     "TRL's lightest (batch)", "ours over it", "share of the floor", "padding"], rows)

def fill(text: str, tables: dict[str, str]) -> str:
    """A page with the table of each marker after it, in place of the one that stands there."""
    return re.sub(r"(<!-- (\w+) -->\n\n)(?:\|.*\n)*", lambda found: f"{found[1]}{tables[found[2]]}\n", text)


# --- pictures ----------------------------------------------------------------------------------------
def draw_clip(axes) -> None:
    for side in ((-4, -1.5), (1.5, 4)):
        axes.axvspan(*side, color=COLOURS["plain"], alpha=0.12, linewidth=0)
    axes.plot([-4, 4], [-4, 4], "--", color=GREY)
    axes.plot([-4, -1.5, 1.5, 4], [-1.5, -1.5, 1.5, 1.5], color=COLOURS["humanline"], linewidth=3)
    axes.text(-2.75, 3.7, "no\ngradient", ha="center", va="top", color=COLOURS["plain"])
    axes.text(2.75, -3.7, "no\ngradient", ha="center", va="bottom", color=COLOURS["plain"])
    axes.text(3.9, -0.2, "as perceived", ha="right", color=COLOURS["humanline"])
    axes.text(2.4, 3.2, "as it is", ha="right", color=GREY)
    axes.set(title="1. Clipping: beyond ±1.5\na token has no gradient", xlim=(-4, 4), ylim=(-4, 4),
             xlabel="log π_θ − log π_ref of a token", ylabel="what the loss sees",
             xticks=[-4, -1.5, 0, 1.5, 4], yticks=[-1.5, 0, 1.5])

def draw_sync(axes) -> None:
    """Which weights, named by the updates made, policy and reference have at each update s."""
    updates = range(1, 13)
    lines = {"policy": ("black", [s - 1 for s in updates])}
    for k, colour in ((1, COLOURS["humanline"]), (4, "#56B4E9")):
        lines[f"reference, k = {k}"] = colour, [max(0, (s - 1) // k * k - 1) for s in updates]
    lines["reference, plain"] = COLOURS["plain"], [0] * len(updates)
    for name, (colour, weights) in lines.items():
        axes.step(updates, weights, where="mid", color=colour, linewidth=2, label=name)
    axes.legend(frameon=False, loc="upper left", handlelength=1.2, borderaxespad=0)
    axes.set(title="2. Syncing: the reference\nfollows, one update behind", ylim=(-0.4, 17),
             xlabel="update", ylabel="weights after … updates", xticks=[1, 4, 8, 12], yticks=[0, 4, 8])

def draw_scores(axes, scores: dict, verdicts: dict, initial: float) -> None:
    """scores: by method and way, of each seed; verdicts: by method, of humanline minus plain."""
    for i, method in enumerate(scores):
        for j, (way, colour) in enumerate(COLOURS.items()):
            x, values = i + 0.28 * (j - 1), scores[method][way]
            if values:
                axes.bar(x, statistics.fmean(values), 0.25, color=colour, alpha=0.4)
                axes.plot([x] * len(values), values, "o", color=colour, markersize=4)
            else:
                axes.text(x, initial + 0.03, MISSING, rotation=90, ha="center", va="bottom", color=GREY)
    axes.axhline(initial, color="black", linestyle=":", linewidth=1.2)
    axes.text(len(scores) - 0.55, initial + 0.01, "initial\npolicy", va="bottom")
    words = [word for word in verdicts.values() if word != MISSING]
    above = f"in {words.count('above')} of {len(words)} methods (a dot: a seed)"
    axes.set(title=f"3. Result: humanline is above plain\n{above}", ylabel="sentiment of new sentences",
             xlim=(-0.5, len(scores) - 0.1), ylim=(0, 1.2), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.set_xticks(range(len(scores)), [f"{method.upper()}\n{word}" for method, word in verdicts.items()])
    bars = [matplotlib.patches.Patch(color=colour, alpha=0.4, label=way) for way, colour in COLOURS.items()]
    axes.legend(handles=bars, frameon=False, ncols=3, loc="upper center", columnspacing=1, handlelength=1)

def draw_method(scores: dict, verdicts: dict, initial: float, path: Path) -> None:
    """What the two additions are, and what comes of them."""
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.7), width_ratios=(1, 1, 1.5))
    draw_clip(panels[0])
    draw_sync(panels[1])
    draw_scores(panels[2], scores, verdicts, initial)
    figure.tight_layout(w_pad=1.5)
    figure.savefig(path, dpi=160)
    plt.close(figure)

def draw_beta(runs: dict, best_beta: str, equal_kl: str, initial: float, path: Path) -> None:
    """runs: by way and β, the (KL, sentiment) of each seed. Verdicts on humanline at β = 1: best_beta, minus plain at
    its best β; equal_kl, minus plain's line."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    left.axhline(initial, color="black", linestyle=":", linewidth=1.2)
    left.text(0.03, initial + 0.01, "initial policy", va="bottom")
    right.plot(0, initial, "*", color="black", markersize=12)
    right.text(1.2, initial, "initial policy", va="center")
    for (way, by_beta), marker, shift in zip(runs.items(), "so^", (0.95, 1.05, 1.0)):
        look, means = {"color": COLOURS[way], "markersize": 5, "alpha": 0.6}, []
        for beta in sorted((beta for beta in by_beta if by_beta[beta]), key=float, reverse=True):
            kls, sentiments = zip(*by_beta[beta])
            left.plot([float(beta) * shift] * len(kls), sentiments, marker, **look)
            right.plot(kls, sentiments, marker, **look)
            means.append((float(beta), statistics.fmean(kls), statistics.fmean(sentiments)))
        left.plot([beta for beta, _, _ in means], [y for _, _, y in means], color=COLOURS[way])
        right.plot([], [], marker, color=COLOURS[way], label=way)
        if way == "plain":
            right.plot([0, *(kl for _, kl, _ in means)], [initial, *(y for _, _, y in means)], color=COLOURS[way])
            for beta, kl, y in means:
                right.annotate(f"β = {beta:g}", (kl, y), (10, -16), textcoords="offset points", color=COLOURS[way],
                               bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1})
    left.set(title=f"Humanline at β = 1 against\nplain at its best β: {best_beta}", xlabel="β of DPO", xscale="log",
             ylabel="sentiment of new sentences", xlim=(0.025, 1.3), ylim=(0, 1.03))
    left.set_xticks([0.03, 0.1, 1], ["0.03", "0.1", "1"])
    left.minorticks_off()
    right.set(title=f"Humanline at β = 1 against\nplain at the same KL: {equal_kl}", xlim=(-1.5, None),
              xlabel="KL to the initial policy, nats a sentence")
    right.legend(frameon=False, loc="lower right")
    figure.tight_layout(w_pad=2)
    figure.savefig(path, dpi=160)
    plt.close(figure)

def draw_demo(scores: dict[str, tuple[float, float]], path: Path) -> None:
    """A line for each policy: its mean and half of its interval."""
    figure, axes = plt.subplots(figsize=(8, 2.6))
    for i, (mean, half) in enumerate(scores.values()):
        axes.errorbar(mean, i, xerr=half, fmt="o", color=["black", *COLOURS.values()][i], capsize=4)
        axes.text(mean, i - 0.15, text_of(mean), ha="center", va="bottom")
    axes.set(title="How cheerful are the sentences for prompts that none was trained on?",
             xlabel="sentiment, from −1 to 1, with the 95 % interval over prompts", ylim=(len(scores) - 0.5, -0.7))
    axes.set_yticks(range(len(scores)), scores)
    figure.tight_layout()
    figure.savefig(path, dpi=160)
    plt.close(figure)
