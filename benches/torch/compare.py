"""Runs our program and the PyTorch one alternately and prints the medians of both and their ratio.

    python compare.py step|ops --ours PROGRAM [--rounds 3] [--bypass|--default] [arguments of both programs]

Other work on the machine spoils a comparison (PyTorch's threads wait for each other by spinning, and suffer more), so each
run waits until the machine is idle, and the processor time that went to others during it is printed beside it; a run in
which that was more than a tenth of a core is done again, a few times, and then kept with a mark."""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
TICK = os.sysconf("SC_CLK_TCK")


def busy():
    """Processor seconds that all processes together have used."""
    with open("/proc/stat") as f:
        fields = [int(v) for v in f.readline().split()[1:9]]
    user, nice, system, _idle, _iowait, irq, soft, _steal = fields
    return (user + nice + system + irq + soft) / TICK


def stolen():
    with open("/proc/stat") as f:
        return int(f.readline().split()[8]) / TICK


def wait_for_idle(limit, patience):
    began = time.monotonic()
    while time.monotonic() - began < patience:
        before = busy()
        time.sleep(2)
        if (busy() - before) / 2 < limit:
            return


def run(command, a):
    for attempt in range(a.attempts):
        wait_for_idle(a.foreign, a.patience)
        before, start, used, steal = busy(), time.monotonic(), os.times(), stolen()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=dict(os.environ, OMP_NUM_THREADS=str(a.threads)))
        seconds, now = time.monotonic() - start, os.times()
        own = now.children_user - used.children_user + now.children_system - used.children_system
        foreign = max(0.0, (busy() - before - own) / seconds)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if foreign < a.foreign:
            break
        print(f"  (attempt {attempt + 1}: {foreign:.2f} cores' worth of other work)", file=sys.stderr)
    return lines, foreign, (stolen() - steal) / seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "ops"])
    parser.add_argument("--ours", required=True, help="our program, built")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--foreign", type=float, default=0.1, help="cores' worth of other work that a run may see")
    parser.add_argument("--attempts", type=int, default=3, help="how often a disturbed run is tried")
    parser.add_argument("--patience", type=float, default=600, help="seconds to wait for an idle machine")
    parser.add_argument("--against", default="bypass", help="step: comma-separated of default, bypass, bf16, bf16-bypass")
    a, rest = parser.parse_known_args()
    threads = ["--threads", str(a.threads)]
    theirs = [sys.executable, os.path.join(HERE, f"{a.what}.py"), *threads, *rest]
    ours = {"lokr": [a.ours, *threads, *rest]}
    if a.what == "step":
        flags = {"default": [], "bypass": ["--bypass"], "bf16": ["--dtype", "bf16"], "bf16-bypass": ["--bypass", "--dtype", "bf16"]}
        others = {f"torch {name}": theirs + flags[name] for name in a.against.split(",")}
    else:
        others = {"torch": theirs}
    results = {}
    for i in range(a.rounds):
        for name, command in {**ours, **others}.items():
            lines, foreign, steal = run(command, a)
            mark = " disturbed" if foreign >= a.foreign else ""
            for line in lines:
                results.setdefault(line.get("op", "step"), {}).setdefault(name, []).append(line)
                if a.what == "step":
                    memory = f"{line['peak_rss_mib']} MiB"
                    print(f"round {i + 1}  {name:18}  {line['median_s']:8.4f} s  {memory:>9}  others {foreign:.2f}  stolen {steal:.2f}{mark}", flush=True)
            if a.what == "ops":
                print(f"round {i + 1}  {name:18}  others {foreign:.2f}  stolen {steal:.2f}{mark}", flush=True)
    key, unit = ("median_s", "s") if a.what == "step" else ("median_ms", "ms")
    print()
    for op, by_program in results.items():
        middle = {name: statistics.median(line[key] for line in lines) for name, lines in by_program.items()}
        mine = middle.pop("lokr", None)
        if mine is None:
            continue
        rest = by_program["lokr"][-1]
        rate = next((f"  {rest[k]:8.1f} {label}" for k, label in [("gflops", "GFLOP/s"), ("gbytes_per_s", "GB/s")] if k in rest), "")
        print(f"{op:34} lokr {mine:9.4g} {unit}{rate}" + "".join(f"   {n} {s:9.4g} {unit}  ratio {mine / s:.2f}" for n, s in middle.items()))


if __name__ == "__main__":
    main()
