"""Theorem 4.3 of the humanline paper (arXiv 2509.24207) as a figure: humanline sampling becomes clipping.

    python tests/experiments/theory.py

writes, in under a minute on one CPU core, figures/theorem_4_3.png and its numbers, results/theory.json. An outcome z
is a token's surprisal log π_θ − log π_ref, in nats. The capacity function is that of Tversky and Kahneman 1992,
"Advances in prospect theory" (their median subject: γ = 0.61). Probabilities are float64.
"""

import argparse
import json
import math
import re
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1])]

import matplotlib  # noqa: E402

matplotlib.use("Agg")  # files, no window
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from humanline_grpo import perceive  # noqa: E402


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
    axes.set(title="Sampling becomes clipping as its Betas concentrate", ylim=(2e-4, None),
             xlabel="concentration c of the Betas (their means stay)",
             ylabel="share of tokens on which\nsampling and clipping disagree")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    axes.figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(axes.figure)
    return report


def main(seed: int) -> None:
    """The figure, and its numbers to four digits."""
    report = {"seed": seed, "torch": torch.__version__}
    report["theorem_4_3"] = draw_theorem(16384, seed, HERE / "figures/theorem_4_3.png")
    report = json.loads(json.dumps(report), parse_float=lambda x: float(f"{float(x):.4g}"))
    text = re.sub(r"\[[^]]*\]", lambda found: " ".join(found[0].split()), json.dumps(report, indent=1))
    (HERE / "results/theory.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of all draws")
    main(parser.parse_args().seed)
