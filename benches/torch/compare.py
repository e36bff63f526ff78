"""Times our program and the PyTorch one alternately and prints the medians of both and their ratio.

    python compare.py step|ops|loader --ours PROGRAM [--rounds 7] [--against bypass,default] [arguments of both programs]

All programs stay in memory and time one thing at a time on request. Other work on the machine would spoil that (PyTorch's
threads wait for each other by spinning, and suffer more), so each request waits until the machine is idle, and one during
which others took more than a tenth of a core is made again; what could not be had in time is said."""
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
    """Processor seconds that all processes together have used, those that a hypervisor took included."""
    with open("/proc/stat") as f:
        user, nice, system, _idle, _iowait, irq, soft, steal = (int(v) for v in f.readline().split()[1:9])
    return (user + nice + system + irq + soft + steal) / TICK


def used(pid):
    """Processor seconds of a process and of those that it started, which live as long as it does."""
    with open(f"/proc/{pid}/stat") as f:
        fields = f.read().rsplit(")", 1)[1].split()
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        children = f.read().split()
    return (int(fields[11]) + int(fields[12])) / TICK + sum(used(child) for child in children)


class Program:
    def __init__(self, name, command, threads):
        self.name = name
        self.process = subprocess.Popen(command + ["--on-request"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env=dict(os.environ, OMP_NUM_THREADS=str(threads)))
        self.cases = self.read()["ready"]

    def read(self):
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        sys.exit(f"{self.name}: the program ended")

    def own(self):
        return used(self.process.pid)

    def time(self, case):
        """The reply, and how many cores' worth of other work there was meanwhile."""
        before, own, start = busy(), self.own(), time.monotonic()
        self.process.stdin.write(case + "\n")
        self.process.stdin.flush()
        reply = self.read()
        seconds = time.monotonic() - start
        return reply, max(0.0, busy() - before - (self.own() - own)) / seconds

    def end(self):
        """What the program says at its end."""
        self.process.stdin.close()
        rest = [json.loads(line) for line in self.process.stdout if line.startswith("{")]
        self.process.wait()
        return rest[-1] if rest else {}


def wait_for_idle(limit, until):
    while time.monotonic() < until:
        before = busy()
        time.sleep(0.3)
        if (busy() - before) / 0.3 <= limit:
            return


def measure(program, case, a, until):
    while True:
        wait_for_idle(a.foreign, until)
        reply, foreign = program.time(case)
        # A tick is ten milliseconds: over a short time a single one would look like much.
        if foreign <= max(a.foreign, 0.02 / max(reply["seconds"], 1e-3)) or time.monotonic() > until:
            return reply, foreign


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "ops", "loader"])
    parser.add_argument("--ours", required=True, help="our program, built")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--foreign", type=float, default=0.1, help="cores' worth of other work that a measurement may see")
    parser.add_argument("--patience", type=float, default=1800, help="seconds after which disturbed measurements are taken too")
    parser.add_argument("--against", default="bypass", help="step: comma-separated of default, bypass, bf16, bf16-bypass")
    parser.add_argument("--compute", choices=["f32", "bf16"], default="f32", help="step: number format of our products")
    a, rest = parser.parse_known_args()
    common = ["--threads", str(a.threads), *rest]
    theirs = [sys.executable, os.path.join(HERE, f"{a.what}.py"), *common]
    compute = ["--dtype", a.compute] if a.what == "step" else []
    programs = [Program("lokr", [a.ours, *common, *compute], a.threads)]
    if a.what == "step":
        flags = {"default": [], "bypass": ["--bypass"], "bf16": ["--dtype", "bf16"], "bf16-bypass": ["--bypass", "--dtype", "bf16"]}
        programs += [Program(f"torch {name}", theirs + flags[name], a.threads) for name in a.against.split(",")]
    else:
        programs.append(Program("torch", theirs, a.threads))
    until = time.monotonic() + a.patience
    disturbed = []
    scale, unit = (1000, "ms") if a.what == "ops" else (1, "s")
    for case in programs[0].cases:
        sides = [p for p in programs if case in p.cases]
        times = {p.name: [] for p in sides}
        for i in range(a.rounds):
            for p in sides:
                reply, foreign = measure(p, case, a, until)
                times[p.name].append(reply["seconds"] * scale)
                disturbed += [foreign] if foreign > a.foreign and reply["seconds"] > 0.3 else []
                if a.what != "ops":
                    print(f"round {i + 1}  {p.name:18} {reply['seconds']:8.3f} s   others {foreign:.2f}", flush=True)
                if p is sides[0]:
                    known = [("gflops", "GFLOP/s"), ("gbytes_per_s", "GB/s"), ("pictures_per_s", "pictures/s")]
                    work = [(reply[k] * reply["seconds"] * scale, label) for k, label in known if k in reply]
        middle = {name: statistics.median(values) for name, values in times.items()}
        rates = [f"{amount / middle['lokr']:7.1f} {label}" for amount, label in work]
        mine = middle.pop("lokr")
        # For the loader as people say it: how many times as fast.
        ratio = lambda s: f"{s / mine:.2f} times the throughput" if a.what == "loader" else f"ratio {mine / s:.2f}"
        others = "".join(f"   {n} {s:8.4g} {unit}  {ratio(s)}" for n, s in middle.items())
        print(f"{case:34} lokr {mine:8.4g} {unit} {' '.join(rates)}{others}", flush=True)
    for p in programs:
        end = p.end()
        if "peak_rss_mib" in end:
            more = f", {end['step_peak_rss_mib']} MiB after loading" if "step_peak_rss_mib" in end else ""
            print(f"{p.name}: {end['base_parameters']} frozen and {end['lokr_parameters']} trained parameters, peak {end['peak_rss_mib']} MiB{more}")
    if disturbed:
        print(f"{len(disturbed)} measurements were taken beside other work of {min(disturbed):.1f} to {max(disturbed):.1f} cores")


if __name__ == "__main__":
    main()
