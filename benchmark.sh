#!/usr/bin/env bash
# Paired baseline-versus-ACPG sweeps, resumable, with a report at the end: `bash benchmark.sh --help`, docs/benchmark.md.
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-$here/.venv/bin/python}"
[ -x "$(command -v "$python")" ] || python=python3
exec "$python" "$here/benchmark/sweep.py" "$@"
