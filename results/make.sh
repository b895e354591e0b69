#!/usr/bin/env bash
# Make every file of results/ that make.py lists, and from them the tables and the figure.
#   bash results/make.sh            two hours on two cores; start it again to go on
set -euo pipefail
cd "$(dirname "$0")/.."
python results/make.py "$@"
python results/figures.py
