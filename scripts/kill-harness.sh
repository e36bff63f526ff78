#!/usr/bin/env bash
# Starts real `lokr train` processes, kills them (SIGKILL) at random moments, half of them in the middle of a checkpoint, resumes, and
# compares every file with those of a run that was never interrupted.
# Usage: scripts/kill-harness.sh [KILLS [SEED]]
set -euo pipefail
cd "$(dirname "$0")/.."
LOKR_KILLS="${1:-200}" LOKR_KILL_SEED="${2:-1}" exec cargo test --release -p end-to-end --test cli killed_at_random_moments -- --nocapture
