// The kernels' arithmetic on the host, for tests/kernels.rs: reads a case from its input, writes the results to its output. Both
// are the bytes of: what to do (u32), n (u32), the rule (7 f32), the map (256 f32), p (n f32), g (n f32), then for "lion8bit" codes
// (n u8) and absmax (f32 for each block), for "lion" m (n f32), for "codes" nothing. Written are p and the momentum, or the codes of p.
#include "lion8bit.h"

#include <algorithm>
#include <cstdio>
#include <vector>

template <class T> std::vector<T> take(size_t n) {
    std::vector<T> out(n);
    if (fread(out.data(), sizeof(T), n, stdin) != n) _Exit(1);
    return out;
}
template <class T> void give(const std::vector<T> &v) { fwrite(v.data(), sizeof(T), v.size(), stdout); }

int main() {
    auto head = take<unsigned>(2);
    size_t n = head[1];
    auto rule = take<LionRule>(1)[0];
    auto values = take<float>(256), p = take<float>(n), g = take<float>(n);
    if (head[0] == 0) {
        auto codes = take<unsigned char>(n);
        auto absmax = take<float>((n + LION_BLOCK - 1) / LION_BLOCK);
        for (size_t b = 0; b < absmax.size(); b++) {
            size_t start = b * LION_BLOCK, end = std::min(n, start + LION_BLOCK);
            float m[LION_BLOCK], after = lion_padding(rule, values.data(), int(end - start), absmax[b]);
            for (size_t i = start; i < end; i++) {
                m[i - start] = values[codes[i]] * absmax[b];
                lion_element(rule, p[i], lion_gradient(rule, g[i]), m[i - start]);
                after = std::max(after, fabsf(m[i - start]));
            }
            for (size_t i = start; i < end; i++) codes[i] = after == 0.0f ? 0 : dynamic_code(values.data(), m[i - start] / after);
            absmax[b] = after;
        }
        give(p), give(codes), give(absmax);
    } else if (head[0] == 1) {
        auto m = take<float>(n);
        for (size_t i = 0; i < n; i++) lion_element(rule, p[i], lion_gradient(rule, g[i]), m[i]);
        give(p), give(m);
    } else {
        std::vector<unsigned char> codes(n);
        for (size_t i = 0; i < n; i++) codes[i] = dynamic_code(values.data(), p[i]);
        give(codes);
    }
}
