"""The scripts share text, not imports, and are short: what does the same is the same to the letter, in the
same place, the method stands first, and nothing grows past its budget."""

import ast
import re
import sys

import pytest

from conftest import ROOT, SCRIPTS

# What makes each method itself; everything else is the same to the letter.
OWN = {"Row", "accumulate_gradient", "encode_row", "make_batches", "rows_of_group", "parse_args", "EVALUATED", "SHOWN"}
OF_ONE = {"dpo": {"dpo_loss", "import torch.nn.functional as F"},
          "kto": {"kto_loss", "policy_logps", "score", "mismatched_pairs"},  # ẑ0 needs pairs of its own
          "grpo": {"k3", "grpo_loss", "group_advantages", "import statistics",
                   "from torch.utils.data import DataLoader"}}  # fmt: skip
LINES = {"humanline_dpo.py": 515, "humanline_kto.py": 545, "humanline_grpo.py": 565, "common.py": 290}


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name):
    """Top-level statements of a script by name, in order, with their lines."""
    source, found = read(name), {}
    for node in ast.parse(source).body[1:]:  # without the docstring
        text = ast.get_source_segment(source, node)
        key = getattr(node, "name", None) or (ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else text)
        decorators = [ast.get_source_segment(source, d) for d in getattr(node, "decorator_list", [])]
        found[key] = "\n".join([*decorators, text])
    return found


@pytest.mark.parametrize("other", ["kto", "grpo"])
def test_shared_blocks_are_the_same_to_the_letter(other):
    first, second = blocks("humanline_dpo.py"), blocks(f"humanline_{other}.py")
    own = OWN | OF_ONE["dpo"] | OF_ONE[other]
    shared = [name for name in first if name not in own]
    assert len(shared) > 35
    assert [name for name in second if name not in own] == shared  # the same ones in the same order
    for name in shared:
        assert second[name] == first[name], name


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_sections_stand_in_order_and_the_method_first(name):
    lines = read(f"humanline_{name}.py").splitlines()
    banners = {int(found[1]): i for i, line in enumerate(lines, 1) if (found := re.match(r"# === (\d)\. ", line))}
    assert list(banners) == [1, 2, 3, 4, 5, 6, 7, 8] and sorted(banners.values()) == list(banners.values())
    assert banners[5] <= 240
    before = "\n".join(lines[: banners[5]])
    for function in ("perceive", f"{name}_loss", "policy_logps", "score", "next_window", "accumulate_gradient"):
        assert f"def {function}(" in before


@pytest.mark.parametrize("name", LINES)
def test_budgets(name):
    """Inside a section one blank line parts functions, two part sections: a screen shows more of the method."""
    lines = read(name).splitlines()
    full = [line for line in lines if line.strip()]
    assert len(lines) <= LINES[name]
    assert max(map(len, lines)) <= 100
    assert sum(map(len, full)) / len(full) <= 66  # more reads as golfed
    tree = ast.parse(read(name))
    assert tree.body[0].end_lineno <= 45  # the docstring
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if "main" in functions:
        assert functions["main"].end_lineno - functions["main"].lineno < 100


def test_the_rewards_are_short():
    lines = read("tests/experiments/rewards.py").splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 120
    used = imports_in(ast.parse("\n".join(lines)))
    assert {*used} - {*sys.stdlib_module_names} == {"common", "math_verify", "latex2sympy2_extended", "transformers"}


@pytest.mark.parametrize("name", LINES)
def test_one_statement_a_line_and_only_the_four_packages(name):
    allowed = {"torch", "transformers", "datasets", "tqdm", "common", *sys.stdlib_module_names}
    tree = ast.parse(read(name))
    statements = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    assert len(statements) == len(set(statements))
    lora = imports_in(tree, "load_policy")  # where it is used, in no other function and not at the top
    assert lora == ([] if name == "common.py" else ["peft"])
    assert sorted(module for module in imports_in(tree) if module not in allowed) == lora
    for branch in (node for node in ast.walk(tree) if isinstance(node, ast.If)):
        if "lora_rank" in ast.unparse(branch.test):
            lora = lora and [module for module in lora if module not in imports_in(branch)]
    assert lora == []  # only with --lora_rank


def imports_in(tree, function=None):
    """Names of the packages that are imported in a tree, or in a function of it."""
    found = []
    for node in ast.walk(tree):
        if function and getattr(node, "name", None) == function:
            return imports_in(node)
        found += [a.name for a in node.names] if isinstance(node, ast.Import) else []
        found += [node.module] if isinstance(node, ast.ImportFrom) else []
    return [] if function else [module.split(".")[0] for module in found]
