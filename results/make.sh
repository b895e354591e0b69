#!/usr/bin/env bash
# Every number and figure of README: three default runs, and the variants of table (A) and figure (C). About an hour and a half on two cores; (C) is made for seed 0 alone.
#   bash results/make.sh            all seeds, one after the other
#   bash results/make.sh 1          one seed
set -euo pipefail
cd "$(dirname "$0")/.."
for seed in ${1:-0 1 2}; do
  run=out/seed$seed
  python ppo.py --seed "$seed" --out "$run" --no-table
  python ppo.py --seed "$seed" --out "$run" --no-table --name ppo-no-ptx --ptx 0
  [ "$seed" != 0 ] || python ppo.py --seed "$seed" --out "$run" --no-table --name ppo-beta-0 --beta 0 --updates 150
  [ "$seed" != 0 ] || python ppo.py --seed "$seed" --out "$run" --no-table --name ppo-long --updates 150
  python eval.py --seed "$seed" --out "$run" --json --save "results/eval-seed$seed.jsonl" > /dev/null
  for stage in gpt sft reward ppo ppo-no-ptx $([ "$seed" != 0 ] || echo ppo-beta-0 ppo-long); do
    cp "$run/$stage.jsonl" "results/$stage-seed$seed.jsonl"
  done
done
python results/figures.py
