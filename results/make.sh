#!/usr/bin/env bash
# Every number and figure of README: three default runs, and the variants of table (A) and figure (C). Three to four hours on two cores; (C) and the controls are made for seed 0 alone.
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
  python dpo.py --seed "$seed" --out "$run"
  python eval.py --seed "$seed" --out "$run" --json --save "results/eval-seed$seed.jsonl" > /dev/null
  for stage in gpt sft reward ppo ppo-no-ptx dpo $([ "$seed" != 0 ] || echo ppo-beta-0 ppo-long); do
    cp "$run/$stage.jsonl" "results/$stage-seed$seed.jsonl"
  done
done
# With fewer humans: Self-Instruct with and without the likelihood filter, self-rewarding and (seed 0) its controls, tools.
for seed in ${1:-0 1 2}; do
  run=out/seed$seed
  python self_instruct.py --seed "$seed" --out "$run" --likelihood 0 --steps 0
  cp "$run/self_instruct.jsonl" "results/self_instruct-paper-seed$seed.jsonl"
  python self_instruct.py --seed "$seed" --out "$run"
  cp "$run/self_instruct.jsonl" "results/self_instruct-seed$seed.jsonl"
  python self_reward.py --seed "$seed" --out "$run"
  python self_reward.py --seed "$seed" --out "$run" --halo 0.05
  if [ "$seed" = 0 ]; then
    for flags in "--update sft" "--pairs gold" "--pairs random" "--frozen-judge" "--replay 0"; do python self_reward.py --seed 0 --out "$run" $flags; done
  fi
  for file in "$run"/self_reward-*.jsonl; do grep '"stage"' "$file" > "results/$(basename "$file" .jsonl)-seed$seed.jsonl"; done
  python lab/tool_use.py --seed "$seed" --out "$run"
  grep -v '"step"' "$run/tools.jsonl" > "results/tools-seed$seed.jsonl"
done
# The short experiments on run 0, each over three seeds of its own.
for name in cot icl templates forgetting attention rouge; do
  [ -d out/seed0 ] || break
  python "lab/$name.py" --out out/seed0
  cp "out/seed0/lab-$name.jsonl" results/
done
[ ! -d out/seed0 ] || { python data/clean.py --out out/seed0 > /dev/null; cp out/seed0/clean.jsonl results/; }
# On copies of run 1: sixteen epochs of sft chosen by reward, and the other two losses of the reward model.
for variant in epochs16 token-margin regression; do
  [ -d out/seed1 ] || break
  cp -r out/seed1 "out/$variant"
done
[ ! -d out/epochs16 ] || { python sft.py --seed 1 --out out/epochs16 --epochs 16 --select reward; cp out/epochs16/sft.jsonl results/sft-epochs16.jsonl; }
for loss in token-margin regression; do
  [ ! -d "out/$loss" ] || { python reward.py --seed 1 --out "out/$loss" --loss "$loss"; cp "out/$loss/reward.jsonl" "results/reward-$loss-seed1.jsonl"; }
done
python results/figures.py
