"""Fixtures that all tests share. No network, no GPU needed, files under pytest's temporary folder."""

import json
import os
import random
import sys
import tempfile
from pathlib import Path

CACHE = tempfile.TemporaryDirectory()  # what datasets makes of the files, gone with the tests
os.environ["HF_DATASETS_CACHE"] = CACHE.name
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny: a second thread only waits for the first
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/experiments")]

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

import common  # noqa: E402
import humanline_dpo  # noqa: E402
import humanline_grpo  # noqa: E402
import humanline_kto  # noqa: E402
import toy_world  # noqa: E402

SCRIPTS = {"dpo": humanline_dpo, "kto": humanline_kto, "grpo": humanline_grpo}
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each of the scripts in turn."""
    return SCRIPTS[request.param]


@pytest.fixture(autouse=True)
def forget_rewards(tmp_path):
    """A reward's file is a module, whose name the next test may want."""
    path = [*sys.path]
    yield
    sys.path[:] = path
    for name, module in [*sys.modules.items()]:
        if (getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture(scope="session")
def policy(tmp_path_factory) -> Path:
    """A tiny random Llama with the toy world's tokenizer."""
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = toy_world.make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1,
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(kind: str, count: int, seed: int = 0) -> list[dict]:
    """Random rows of letters in the format of a script."""
    rng = random.Random(seed)

    def text():
        return "".join(rng.choices(toy_world.LETTERS, k=rng.randint(3, 24)))

    prompts = [text()[: rng.randint(3, 9)] + str(i) for i in range(count)]
    if kind == "kto":
        return [{"prompt": p, "completion": text(), "label": rng.random() < 0.5} for p in prompts]
    if kind == "grpo":
        rewards = ([rng.random(), rng.random()] for _ in prompts)
        return [{"prompt": p, "completions": [text(), text()], "rewards": r} for p, r in zip(prompts, rewards)]
    return [{"prompt": p, "chosen": text(), "rejected": text()} for p in prompts]


def example(ids: list[int], prompt_len: int) -> common.Example:
    return common.Example(torch.tensor(ids, dtype=torch.int32), prompt_len)


def plain(examples: list[common.Example]) -> list[tuple[list[int], int]]:
    """Token ids and prompt lengths, to compare: tensors have no truth value."""
    return [(e.ids.tolist(), e.prompt_len) for e in examples]


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> dict[str, Path]:
    """For each script a file of 48 rows."""
    folder = tmp_path_factory.mktemp("data")
    return {kind: write_jsonl(folder / f"{kind}.jsonl", make_rows(kind, 48)) for kind in SCRIPTS}


@pytest.fixture
def flags(policy, data, tmp_path):
    """flags(script, "--lr", 1): the arguments of a short run; the last of a repeated flag counts."""

    def make(script, *more):
        kind = script.__name__.removeprefix("humanline_")
        argv = ["--model", policy, "--data", data[kind], "--output_dir", tmp_path / "run", "--max_length", 64]
        argv += ["--batch_size", 8, "--steps", 4, "--lr", 1e-3, "--warmup", 2, "--eval_size", 4, "--beta", 0.5]
        return [str(x) for x in [*argv, "--device", "cpu", *more]]

    return make


def metrics_of(folder) -> list[dict]:
    return [json.loads(line) for line in open(Path(folder) / "metrics.jsonl")]


@pytest.fixture
def run(flags):
    """run(script, "--lr", 1): the lines of metrics.jsonl of a short run; the first is step 0."""

    def train(script, *more):
        args = script.parse_args(flags(script, *more))
        script.main(args)
        return metrics_of(args.output_dir)

    return train


@pytest.fixture
def spy(monkeypatch):
    """spy(script) -> list: of every trained micro-batch its examples, log-ratios and mask."""
    monkeypatch.setitem(common.MAX_PADDING, "cpu", 10**6)  # --micro_tokens alone cuts

    def install(script):
        seen, current = [], []
        policy_logps, perceive = script.policy_logps, script.perceive

        def policy_logps_and_tell(model, batch, args):
            for rows, logp, mask in policy_logps(model, batch, args):
                current[:] = rows
                yield rows, logp, mask

        def perceive_and_tell(logratio, mask, *args, **kwargs):
            if logratio.requires_grad:  # trained, not KTO's reference point
                examples = [example for row in current for example in row.examples]
                seen.append((examples, logratio.detach().clone(), mask.clone()))
            return perceive(logratio, mask, *args, **kwargs)

        monkeypatch.setattr(script, "policy_logps", policy_logps_and_tell)
        monkeypatch.setattr(script, "perceive", perceive_and_tell)
        return seen

    return install
