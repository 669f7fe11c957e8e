"""Write AlpacaEval's JSON from a trained folder: [{"instruction", "output", "generator"}, ...].

    python tests/experiments/alpaca_eval.py runs/dpo/final instructions.jsonl outputs.json

instructions.jsonl has a column `instruction` (as AlpacaEval's own data set has) or `prompt`. Responses are
greedy; judge them with `alpaca_eval --model_outputs outputs.json`, which needs a key of the judge's.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from common import BadInput, encode, errors_in, sample_responses  # noqa: E402
from humanline_dpo import read_file  # noqa: E402


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("model", help="a trained folder, such as runs/dpo/final")
    parser.add_argument("data", help="instructions: .jsonl, .json, .parquet or Hub id[:config[:split]]")
    parser.add_argument("output", help="the JSON file to write")
    parser.add_argument("--max_new_tokens", type=int, default=2048)
    parser.add_argument("--gen_batch", type=int, default=64)
    parser.add_argument("--generator", help="the name in the table (default: the folder)")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device).eval()
    args.max_length, args.system_prompt, args.chat_template_kwargs = 10**9, None, {}
    prompts, ids = [], []
    with errors_in(args.data):
        for number, row in read_file(args.data):
            with errors_in(f"row {number} (columns {', '.join(row)})"):
                prompts.append(row.get("instruction") or row.get("prompt"))
                ids.append(list(encode(tokenizer, {"prompt": prompts[-1]}, None, args).prompt))
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        _, texts = sample_responses(model, tokenizer, ids, args.max_new_tokens, 0.0, args.gen_batch)
    name = args.generator or str(args.model)
    rows = [{"instruction": p, "output": text, "generator": name} for p, text in zip(prompts, texts)]
    Path(args.output).write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    return rows


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"error: {error}")
