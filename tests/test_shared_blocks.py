"""The scripts share text, not imports: what does the same is the same to the letter, in the same place."""

import ast

import pytest

from conftest import ROOT, SCRIPTS

# what makes each method itself; everything else must be equal
OWN = {"parse_args", "FLAG_CHECKS", "Row", "encode_row", "load_data", "epoch_batches", "mismatched", "dpo_loss",
       "kto_loss", "grpo_loss", "GROUP_COLUMNS", "load_groups", "groups_of", "group_advantages", "cut_batches", "math_reward", "NUMBER", "marked_answer", "final_answer", "gold_answer", "as_number",
       "same_answer", "model_reward", "load_reward_model", "import re", "import functools", "import torch.nn.functional as F", "from fractions import Fraction",
       "from transformers import AutoModelForSequenceClassification", "math_reward.usable", "groups_needed", "rows_of_group", "plan", "accumulate_gradient", "evaluate", "SHOWN"}  # fmt: skip


def blocks(name):
    """Top-level statements of a script by name, in order."""
    source = (ROOT / f"humanline_{name}.py").read_text()
    found = {}
    for node in ast.parse(source).body[1:]:  # without the docstring
        text = ast.get_source_segment(source, node)
        name = getattr(node, "name", None) or (ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else text)
        decorators = [ast.get_source_segment(source, d) for d in getattr(node, "decorator_list", [])]
        found[name] = "\n".join([*decorators, text])
    return found


@pytest.mark.parametrize("other", [name for name in SCRIPTS if name != "dpo"])
def test_shared_blocks_are_the_same_to_the_letter(other):
    first, second = blocks("dpo"), blocks(other)
    shared = [name for name in first if name not in OWN]
    assert len(shared) > 40
    assert [name for name in second if name not in OWN] == shared  # the same ones in the same order
    for name in shared:
        assert second[name] == first[name], name


@pytest.mark.parametrize("name", SCRIPTS)
def test_sections_have_the_same_banners(name):
    def banners(name):
        return [line for line in (ROOT / f"humanline_{name}.py").read_text().splitlines() if line[:3].strip("# 1234567890") == "" and line[2:3].isdigit()]

    assert banners(name) == banners("dpo") and len(banners("dpo")) >= 6


@pytest.mark.parametrize("name", SCRIPTS)
def test_only_the_four_packages_are_imported(name):
    import sys

    allowed = {"torch", "transformers", "datasets", "tqdm", "common", *sys.stdlib_module_names}
    for path in (f"humanline_{name}.py", "common.py"):
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {m.split(".")[0] for m in modules} <= allowed
