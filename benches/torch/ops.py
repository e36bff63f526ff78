"""Times single ops in PyTorch on the CPU and prints one JSON line for each, under the names that our own program gives its
cases (`cargo run --release -p benches --bin ops`). Weights are frozen: only inputs get gradients."""
import argparse
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F


def cases():
    x, w = torch.randn(1024, 2048), torch.randn(2048, 2048)
    yield "matmul_1024x2048x2048", lambda: F.linear(x, w)

    def pair(name, f, *shapes):
        inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
        dy = torch.randn_like(f(*inputs))

        def forward():
            with torch.no_grad():
                f(*inputs)

        def both():
            torch.autograd.grad(f(*inputs), inputs, dy)

        yield f"{name}_forward", forward
        yield f"{name}_both", both

    for c, side in [(320, 64), (320, 16), (640, 8)]:
        kernel, picture, dy = torch.randn(c, c, 3, 3), torch.randn(1, c, side, side), torch.randn(1, c, side, side)
        yield from pair(f"conv3x3_{c}_{side}", lambda x, kernel=kernel: F.conv2d(x, kernel, padding=1), (1, c, side, side))
        backward = torch.ops.aten.convolution_backward
        sizes = [[1, 1], [1, 1], [1, 1], False, [0, 0], 1]
        yield f"conv3x3_{c}_{side}_input_grad", lambda x=picture, dy=dy, kernel=kernel: backward(dy, x, kernel, None, *sizes, [True, False, False])

    def attention(q, k, v):
        q, k, v = (t.view(1, -1, 10, 64).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    yield from pair("attention_10x1024x64", attention, *[(1, 1024, 640)] * 3)
    yield from pair("attention_10x1024x77x64", attention, (1, 1024, 640), (1, 77, 640), (1, 77, 640))
    one, zero = torch.ones(320), torch.zeros(320)
    yield from pair("group_norm_silu_320_64", lambda x: F.silu(F.group_norm(x, 32, one, zero)), (1, 320, 64, 64))
    one2, zero2 = torch.ones(640), torch.zeros(640)
    yield from pair("layer_norm_1024x640", lambda x: F.layer_norm(x, (640,), one2, zero2), (1, 1024, 640))

    def geglu(x):
        value, gate = x.chunk(2, -1)
        return value * F.gelu(gate)

    yield from pair("geglu_1024x5120", geglu, (1, 1024, 5120))
    source, target = torch.randn(1 << 27), torch.empty(1 << 27)
    yield "copy_512mib", lambda: target.copy_(source)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="")
    parser.add_argument("--on-request", action="store_true", help="time one op for each line of standard input, which names it")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    known = {name: run for name, run in cases() if a.only in name}

    def timed(name):
        times = []
        # Two runs, and as many as take 30 milliseconds, go before, as on our side.
        begin, before = time.perf_counter(), 0
        while before < 2 or time.perf_counter() - begin < 0.03:
            known[name]()
            before += 1
        for _ in range(a.runs):
            start = time.perf_counter()
            known[name]()
            times.append(time.perf_counter() - start)
        return json.dumps({"program": "torch", "op": name, "threads": a.threads, "seconds": statistics.median(times)})

    if a.on_request:
        print(json.dumps({"ready": list(known)}), flush=True)
        for line in sys.stdin:
            print(timed(line.strip()), flush=True)
    else:
        for name in known:
            print(timed(name))


if __name__ == "__main__":
    main()
