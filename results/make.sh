#!/usr/bin/env bash
# Make every file of results/ but real-text.jsonl, and from them the tables and the figure.
# Three to four hours on two cores.
#   bash results/make.sh            three seeds, one after the other
#   bash results/make.sh 1          one seed
set -euo pipefail
cd "$(dirname "$0")/.."
seeds=${1:-0 1 2}

# keep SOURCE NAME [flags]: copy a metrics file to results/NAME.jsonl without its training steps.
keep() { python results/keep.py "$1" "results/$2.jsonl" "${@:3}"; }

# The default run, PPO without ptx, DPO, and the grades of table (A).
for seed in $seeds; do
  run=out/seed$seed
  flags=(--seed "$seed" --out "$run")
  python ppo.py "${flags[@]}" --no-table
  python ppo.py "${flags[@]}" --no-table --name ppo-no-ptx --ptx 0
  python dpo.py "${flags[@]}"
  python evaluate.py "${flags[@]}" --json --save "results/eval-seed$seed.jsonl" > /dev/null
  for stage in gpt sft reward ppo dpo; do
    keep "$run/$stage.jsonl" "$stage-seed$seed"
  done
  keep "$run/ppo-no-ptx.jsonl" "ppo-no-ptx-seed$seed" --every 5
done

# Figure (C): long runs with and without the KL penalty.
if [ -d out/seed0 ]; then
  flags=(--seed 0 --out out/seed0 --no-table --updates 150)
  python ppo.py "${flags[@]}" --name ppo-beta-0 --beta 0
  python ppo.py "${flags[@]}" --name ppo-long
  keep out/seed0/ppo-beta-0.jsonl ppo-beta-0-seed0
  keep out/seed0/ppo-long.jsonl ppo-long-seed0
fi

# Self-Instruct with the paper's filters and with the likelihood filter; self-rewarding and, on
# run 0, its controls; tools.
for seed in $seeds; do
  run=out/seed$seed
  flags=(--seed "$seed" --out "$run")
  python self_instruct.py "${flags[@]}" --likelihood 0 --steps 0
  keep "$run/self_instruct.jsonl" "self_instruct-paper-seed$seed"
  python self_instruct.py "${flags[@]}"
  keep "$run/self_instruct.jsonl" "self_instruct-seed$seed"
  python self_reward.py "${flags[@]}"
  python self_reward.py "${flags[@]}" --halo 0.05
  if [ "$seed" = 0 ]; then
    python self_reward.py "${flags[@]}" --update sft
    python self_reward.py "${flags[@]}" --pairs gold
    python self_reward.py "${flags[@]}" --pairs random
    python self_reward.py "${flags[@]}" --frozen-judge
    python self_reward.py "${flags[@]}" --replay 0
  fi
  for file in "$run"/self_reward-*.jsonl; do
    keep "$file" "$(basename "$file" .jsonl)-seed$seed"
  done
  python lab/tool_use.py "${flags[@]}"
  keep "$run/tools.jsonl" "tools-seed$seed"
done

# The short experiments on run 0, each with three seeds of its own, and the cleaning.
if [ -d out/seed0 ]; then
  for name in cot icl templates forgetting attention rouge; do
    python "lab/$name.py" --out out/seed0
    keep "out/seed0/lab-$name.jsonl" "lab-$name"
  done
  python lab/cleaning.py --out out/seed0
  keep out/seed0/clean.jsonl clean
fi

# On copies of run 1: sixteen epochs chosen by reward, and the other two losses of the reward model.
if [ -d out/seed1 ]; then
  cp -r out/seed1 out/epochs16
  python sft.py --seed 1 --out out/epochs16 --epochs 16 --select reward
  keep out/epochs16/sft.jsonl sft-epochs16
  for loss in token-margin regression; do
    cp -r out/seed1 "out/$loss"
    python reward.py --seed 1 --out "out/$loss" --loss "$loss"
    keep "out/$loss/reward.jsonl" "reward-$loss-seed1"
  done
fi

python results/figures.py
