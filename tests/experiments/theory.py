"""The prospect theory behind humanline, as numbers and two figures.

    python tests/experiments/theory.py

writes, in about a minute on one CPU core,

    tests/experiments/figures/theorem_4_3.png   sampling becomes clipping as the Betas concentrate on their means
    tests/experiments/figures/perceived.png     how likely outcomes look in online and offline samples, and to a human
    tests/experiments/results/theory.json       the numbers of both

Sources: the humanline paper (arXiv 2509.24207: section 3, theorem 4.3, figure 2) and Tversky
and Kahneman 1992, "Advances in prospect theory" (their median subject: γ = 0.61).
An outcome z is a token's surprisal log π_θ − log π_ref, in nats. Probabilities are float64.
"""

import argparse
import json
import math
import os
import re
import statistics
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny: a second thread only waits for the first
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1])]

import matplotlib  # noqa: E402

matplotlib.use("Agg")  # files, no window
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import toy_world  # noqa: E402
from common import Example, encode, response_logps, sample_responses  # noqa: E402
from humanline_grpo import parse_args, perceive  # noqa: E402
from humanline_grpo import main as train  # noqa: E402

GAMMA = 0.61


# --- prospect theory --------------------------------------------------------------------------------

def capacity(a: Tensor, gamma: float) -> Tensor:
    """Ω⁺(a; γ) = a^γ / (a^γ + (1 − a)^γ)^(1/γ): how probable an event of probability a feels.

    a: any shape, in [0, 1]. γ = 1 changes nothing; below γ ≈ 0.28 it is no longer monotone.
    """
    return a**gamma / (a**gamma + (1 - a) ** gamma) ** (1 / gamma)


# --- theorem 4.3: clipping is the limit of sampling -------------------------------------------------

BETAS = {  # γ_P, γ_R, β_P, β_R at c = 1: bounds among log-ratios of ±1 nat, and how it is drawn
    (1.0, 1.0, 3.0, 3.0): (2, "Beta(c, 3c) on both sides", "#0072B2", "o", "-"),
    (0.5, 0.01, 1.0, 1.0): (1, "Beta(c/2, c), Beta(c/100, c) (paper: c = 1)", "#D55E00", "^", "--"),
}
CONCENTRATIONS = [4**i for i in range(9)]
DENSITY = 0.5  # of random_logratios: share of the tokens in a nat

def random_logratios(responses: int, seed: int) -> tuple[Tensor, Tensor]:
    """Uniform log-ratios in ±1 nat, 16 to 64 tokens a response. Returns (B, T) float64 and their mask."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(16, 65, (responses, 1), generator=generator)
    z = 2 * torch.rand(responses, 64, generator=generator, dtype=torch.float64) - 1
    return z, torch.arange(64) < lengths

def limit_bounds(z: Tensor, gamma_P, gamma_R, beta_P, beta_R) -> tuple[float, float]:
    """log ε_P = log(M_P γ_P/(γ_P+β_P)), log ε_R = −log(M_R γ_R/(γ_R+β_R)) of a response's log-ratios (T,)."""
    log_M_P, log_M_R = z.max().item(), (-z).max().item()  # the largest π_θ/π_ref and π_ref/π_θ
    return log_M_P + math.log(gamma_P / (gamma_P + beta_P)), -log_M_R - math.log(gamma_R / (gamma_R + beta_R))

def with_gradient(logratio: Tensor, mask: Tensor, mode: str, *numbers: float) -> Tensor:
    """(B, T) bool: the tokens that a gradient reaches through the script's own perception."""
    z = logratio.clone().requires_grad_()
    perceive(z, mask, mode, *numbers)[0].sum().backward()
    return z.grad != 0

def kept_by_clipping(logratio: Tensor, mask: Tensor, betas: tuple) -> Tensor:
    """(B, T) bool: with gradient under clipping at the limit's bounds, which each response has its own of."""
    rows = [(z[None], m[None], limit_bounds(z[m], *betas)) for z, m in zip(logratio, mask)]
    return torch.cat([with_gradient(z, m, "clip", *bounds, *betas) for z, m, bounds in rows])

def kept_by_sampling(logratio: Tensor, mask: Tensor, betas: tuple, c: float) -> Tensor:
    """(B, T) bool: with gradient under humanline sampling from Beta(cγ, cβ); torch's generator seeds it."""
    return with_gradient(logratio, mask, "sample", math.nan, math.nan, *(c * x for x in betas))

def disagreements(betas: tuple, responses: int, seed: int) -> list[float]:
    """For each of CONCENTRATIONS, the share of tokens that one of the two keeps and the other does not."""
    z, mask = random_logratios(responses, seed)
    clipped = kept_by_clipping(z, mask, betas)
    torch.manual_seed(seed)
    differ = [(kept_by_sampling(z, mask, betas, c) != clipped)[mask] for c in CONCENTRATIONS]
    return [tokens.double().mean().item() for tokens in differ]

def predicted_disagreement(gamma: float, beta: float, c: float) -> float:
    """The share to first order in c^(−1/2), from one bound within reach.

    Near its mean, log B is normal of deviation s = √(β / (γ (γ + β) c)). A token at a distance d from the
    bound lands on its other side with probability Φ(−d/s), whose integral over both sides is √(2/π) s.
    """
    return DENSITY * math.sqrt(2 / math.pi * beta / (gamma * (gamma + beta) * c))

def slope(shares: list[float]) -> float:
    """Least-squares slope of log share over log c, from c = 64 on, where the first order rules."""
    logs = [(math.log(c), math.log(share)) for c, share in zip(CONCENTRATIONS, shares) if c >= 64]
    return statistics.linear_regression(*zip(*logs)).slope

def save(axes, path: Path, **more) -> None:
    """What both figures share."""
    axes.set(**more)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    axes.figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(axes.figure)

def draw_theorem(responses: int, seed: int, path: Path) -> dict:
    """Measured shares over the concentration, with the predicted lines of slope −1/2; returns the numbers."""
    axes, report = plt.subplots(figsize=(6.4, 4))[1], {"concentration": CONCENTRATIONS}
    for betas, (sides, label, colour, marker, line) in BETAS.items():
        shares = disagreements(betas, responses, seed)
        predicted = [sides * predicted_disagreement(betas[0], betas[2], c) for c in CONCENTRATIONS]
        label += f": slope {slope(shares):.3f}".replace("-", "−")
        axes.loglog(CONCENTRATIONS, shares, marker, color=colour, label=label)
        axes.loglog(CONCENTRATIONS, predicted, line, color=colour, lw=1, label="predicted: slope −1/2")
        report[f"gamma_P, gamma_R, beta_P, beta_R = {betas}"] = {
            "slope": slope(shares), "share": shares, "predicted": predicted}
    save(axes, path, xlabel="concentration c of the Betas (their means stay)", ylim=(2e-4, None),
         ylabel="share of tokens on which\nsampling and clipping disagree")
    return report


# --- the paper's figure 2: whose samples look like what a human perceives? --------------------------

STYLES = {  # Okabe and Ito's colours, told apart by their lines too
    "online": (r"online: other samples of $\pi_\theta$", "#000000", "-", None),
    "offline-worse": ("offline, worse: initial policy", "#D55E00", "--", "v"),
    "offline-slightly-worse": (r"offline, slightly worse: half-trained $\pi_\theta$", "#E69F00", "-.", "s"),
    "offline-better": (r"offline, better: best of 8 of $\pi_\theta$", "#0072B2", ":", "^"),
}
LEVELS = torch.linspace(0, 1, 101, dtype=torch.float64)

def tail_probability(source: Tensor, online: Tensor, levels: Tensor) -> Tensor:
    """Pr_source(Z ≥ z) at the z where Pr_online(Z ≥ z) is each of `levels`. (N,), (M,), (L,) -> (L,)."""
    z = torch.quantile(online, 1 - levels[1:-1])
    below = torch.searchsorted(source.sort().values, z)
    return torch.cat([levels[:1], 1 - below / len(source), levels[-1:]])

def distance(source: Tensor, online: Tensor, gamma: float) -> float:
    """Mean |Pr_source(Z ≥ z) − Ω⁺(Pr_online(Z ≥ z))|: from a source's outcomes (N,) to what a human sees in
    online ones (M,)."""
    return (tail_probability(source, online, LEVELS) - capacity(LEVELS, gamma)).abs().mean().item()

def write(model, tokenizer, prompts: list[str], seed: int) -> tuple[list[Example], list[float]]:
    """One response a prompt at temperature 1, drawn by the scripts' own sampler, and the utility of each."""
    args, longest = parse_args(["--model", "-"]), toy_world.MAX_NEW_TOKENS["letters"]
    ids = [encode(tokenizer, {"prompt": p}, None, args).ids.tolist() for p in prompts]
    torch.manual_seed(seed)
    examples, texts = sample_responses(model, tokenizer, ids, longest, temperature=1.0, batch_size=2048)
    return examples, toy_world.letters_reward(prompts, texts)

def best_of(n: int, examples: list[Example], rewards: list[float]) -> tuple[list[Example], list[float]]:
    """Of every n responses in a row the one with the most utility."""
    best = [max(range(i, i + n), key=rewards.__getitem__) for i in range(0, len(rewards), n)]
    return [examples[i] for i in best], [rewards[i] for i in best]

@torch.no_grad()
def outcomes(policy, reference, examples: list[Example]) -> Tensor:
    """log π_θ − log π_ref of every response token of all examples, (N,) float64, nats."""
    found = []
    for i in range(0, len(examples), 256):
        logp, mask = response_logps(policy, examples[i : i + 256])  # (B, T)
        found.append((logp - response_logps(reference, examples[i : i + 256])[0])[mask])
    return torch.cat(found).double()

def sources(folder: Path, seed: int) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
    """Outcomes of online samples (M,), of each source (N,), and each source's mean utility.

    π_ref is the initial policy, π_θ what 200 updates of humanline GRPO make of it. Outcomes are pooled over
    the tokens of responses to held-out prompts: in online samples each counts as often as π_θ writes it.
    """
    world = toy_world.build(folder / "world", "letters", seed, train=512)
    data = f"--data {world}/groups_train.jsonl --eval_size 0 --eval_every 0 --max_length 64"
    flags = f"--model {world}/policy {data} --sync_every 16 --lr 3e-4 --seed {seed} --save_every 0 --device cpu"
    for name, steps in (("half", 100), ("policy", 200)):  # the first 100 updates are the same
        train(parse_args(f"{flags} --steps {steps} --output_dir {folder}/{name}".split()))
    paths = {"initial": world / "policy", "half": folder / "half/final", "policy": folder / "policy/final"}
    models = {name: AutoModelForCausalLM.from_pretrained(path).eval() for name, path in paths.items()}
    tokenizer = AutoTokenizer.from_pretrained(world / "policy")
    prompts = [json.loads(line)["prompt"] for line in open(world / "prompts_test.jsonl") for _ in range(8)]
    wrote = {
        "axis": write(models["policy"], tokenizer, prompts, seed),
        "online": write(models["policy"], tokenizer, prompts, seed + 1),  # anew: "axis" agrees with itself
        "offline-worse": write(models["initial"], tokenizer, prompts, seed + 2),
        "offline-slightly-worse": write(models["half"], tokenizer, prompts, seed + 3),
        "offline-better": best_of(8, *write(models["policy"], tokenizer, 4 * prompts, seed + 4)),
    }
    z = {name: outcomes(models["policy"], models["initial"], wrote[name][0]) for name in wrote}
    return z.pop("axis"), z, {name: statistics.fmean(wrote[name][1]) for name in z}

def draw_perceived(online: Tensor, found: dict[str, Tensor], path: Path) -> dict:
    """Each source's curve over the online probability, with Ω⁺; returns the numbers."""
    axes, human = plt.subplots(figsize=(6.4, 4))[1], capacity(LEVELS, GAMMA)
    axes.plot(LEVELS, human, color="#009E73", lw=5, alpha=0.5, label=f"human: Ω⁺(a; γ = {GAMMA})")
    report = {"gamma": GAMMA, "online_probability": LEVELS[::10].tolist(), "human": human[::10].tolist()}
    for name, (label, colour, line, marker) in STYLES.items():
        y = tail_probability(found[name], online, LEVELS)
        axes.plot(LEVELS, y, line, color=colour, marker=marker, markevery=10, ms=5, label=label)
        report[name] = {"tokens": len(found[name]), "mean_z_nats": found[name].mean().item(),
                        "probability": y[::10].tolist(), "mean_abs_difference": distance(found[name], online, GAMMA)}
    save(axes, path, xlim=(0, 1), ylim=(0, 1), ylabel="Pr(Z ≥ z) in a source's tokens",
         xlabel=r"a = Pr(Z ≥ z) in $\pi_\theta$'s own tokens, Z = log $\pi_\theta$ − log $\pi_{ref}$")
    return report

def main(seed: int) -> None:
    figures, results = HERE / "figures", HERE / "results"
    for folder in (figures, results):
        folder.mkdir(exist_ok=True)
    report = {"seed": seed, "torch": torch.__version__}
    report["theorem_4_3"] = draw_theorem(16384, seed, figures / "theorem_4_3.png")
    with tempfile.TemporaryDirectory() as folder:  # nothing is left over from another version of the world
        online, found, report["mean_utility"] = sources(Path(folder), seed)
    report["perceived"] = draw_perceived(online, found, figures / "perceived.png")
    report = json.loads(json.dumps(report), parse_float=lambda x: float(f"{float(x):.4g}"))  # four digits
    text = re.sub(r"\[[^]]*\]", lambda m: " ".join(m[0].split()), json.dumps(report, indent=1))
    (results / "theory.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the world, of training and of all draws")
    main(parser.parse_args().seed)
