// A stand-in for libcudnn: descriptors, the convolution (cross-correlation, NCHW) and its two gradients, with f32 sums.
#include "dry.h"

#include <cstring>
#include <string>
#include <vector>

namespace {
// cudnnDataType_t
Type type_of(int t) {
    switch (t) {
    case 0: return Type::F32;
    case 1: return Type::F64;
    case 2: return Type::F16;
    case 9: return Type::BF16;
    }
    dry_refuse(("cuDNN element type " + std::to_string(t)).c_str());
}

struct Tensor {
    Type type = Type::F32;
    int dims[4] = {}, strides[4] = {};
};
struct Conv {
    int pad[2] = {}, stride[2] = {1, 1}, dilation[2] = {1, 1};
    Type compute = Type::F32;
};
enum { OK = 0, BAD_PARAM = 2000, NOT_SUPPORTED = 3000 };

// cudnnConvolutionFwdAlgoPerf_t of cuDNN 9.
struct Perf {
    int algorithm, status;
    float time;
    size_t memory;
    int determinism, math;
    int reserved[3];
};

void contiguous(Tensor *t) {
    t->strides[3] = 1;
    for (int i = 2; i >= 0; i--) t->strides[i] = t->strides[i + 1] * t->dims[i + 1];
}

// Bytes of workspace that every algorithm asks for here, and overwrites.
const size_t WORKSPACE = 4096;

// The tensors of a convolution y = x * w, whichever of them is the result.
struct Call {
    const Tensor *x, *w, *y;
    const Conv *c;

    Call(const void *x, const void *w, const void *y, const void *c)
        : x(static_cast<const Tensor *>(x)), w(static_cast<const Tensor *>(w)), y(static_cast<const Tensor *>(y)), c(static_cast<const Conv *>(c)) {}

    // cuDNN's checks of sizes and types.
    int check() const {
        for (int i = 0; i < 2; i++) {
            int reach = c->dilation[i] * (w->dims[2 + i] - 1) + 1, room = x->dims[2 + i] + 2 * c->pad[i] - reach;
            if (room < 0 || y->dims[2 + i] != room / c->stride[i] + 1) return BAD_PARAM;
        }
        if (x->dims[1] != w->dims[1] || y->dims[1] != w->dims[0] || y->dims[0] != x->dims[0]) return BAD_PARAM;
        if (x->type != w->type || x->type != y->type) return BAD_PARAM;
        // f16 may be summed in f16 or f32, bf16 and f32 in f32, f64 in f64.
        bool sums = c->compute == x->type ? x->type != Type::BF16 : c->compute == Type::F32 && size_of(x->type) == 2;
        return sums ? OK : NOT_SUPPORTED;
    }

    // What a launch does first: the checks, the count, the use of the workspace.
    int begin(void *workspace, size_t bytes) const {
        if (int status = check()) return status;
        if (x->type == Type::F64) dry_refuse("an f64 convolution");
        if (!workspace || bytes < WORKSPACE) return BAD_PARAM;
        if (dry_computes()) memset(workspace, 0xff, WORKSPACE);
        const char *name = x->type == Type::F16 ? "conv f16" : x->type == Type::BF16 ? "conv bf16" : "conv f32";
        dry_count(name, size_t(2) * x->dims[1] * w->dims[2] * w->dims[3] * y->dims[0] * y->dims[1] * y->dims[2] * y->dims[3]);
        return OK;
    }
};

std::vector<float> read(const Tensor *t, const void *data) {
    const int *d = t->dims, *s = t->strides;
    std::vector<float> out;
    out.reserve(size_t(d[0]) * d[1] * d[2] * d[3]);
    for (int i = 0; i < d[0]; i++)
        for (int j = 0; j < d[1]; j++)
            for (int k = 0; k < d[2]; k++)
                for (int l = 0; l < d[3]; l++) out.push_back(load(data, t->type, size_t(i) * s[0] + size_t(j) * s[1] + size_t(k) * s[2] + size_t(l) * s[3]));
    return out;
}

// data = alpha * values + beta * data; the scalars are f32, as all types here but f64 have them. Data is not read if beta is 0.
void write(const Tensor *t, void *data, const std::vector<float> &values, const void *alpha, const void *beta) {
    float a = load(alpha, Type::F32, 0), b = load(beta, Type::F32, 0);
    const int *d = t->dims, *s = t->strides;
    size_t from = 0;
    for (int i = 0; i < d[0]; i++)
        for (int j = 0; j < d[1]; j++)
            for (int k = 0; k < d[2]; k++)
                for (int l = 0; l < d[3]; l++) {
                    size_t at = size_t(i) * s[0] + size_t(j) * s[1] + size_t(k) * s[2] + size_t(l) * s[3];
                    store(data, t->type, at, a * values[from++] + (b != 0 ? b * load(data, t->type, at) : 0.0f));
                }
}

// Calls `line(x, w, y, from, to)` for each run of products: output pixels from..to of one line, x at its pixel for the output pixel 0
// (which may lie outside), `w` one number of the kernel, all as places in contiguous tensors. The innermost loop is the caller's.
template <class Line> void each_line(const Call &call, Line line) {
    auto [x, w, y, c] = call;
    int step = c->stride[1];
    for (int n = 0; n < y->dims[0]; n++)
        for (int o = 0; o < y->dims[1]; o++)
            for (int ci = 0; ci < x->dims[1]; ci++)
                for (int ky = 0; ky < w->dims[2]; ky++)
                    for (int kx = 0; kx < w->dims[3]; kx++) {
                        size_t tap = ((size_t(o) * x->dims[1] + ci) * w->dims[2] + ky) * w->dims[3] + kx;
                        int first = kx * c->dilation[1] - c->pad[1];
                        int from = first < 0 ? (-first + step - 1) / step : 0;
                        int to = first < x->dims[3] ? (x->dims[3] - 1 - first) / step + 1 : 0;
                        if (to > y->dims[3]) to = y->dims[3];
                        for (int i = 0; i < y->dims[2]; i++) {
                            int row = i * c->stride[0] + ky * c->dilation[0] - c->pad[0];
                            if (row < 0 || row >= x->dims[2]) continue;
                            ptrdiff_t in = ((ptrdiff_t(n) * x->dims[1] + ci) * x->dims[2] + row) * x->dims[3] + first;
                            size_t out = ((size_t(n) * y->dims[1] + o) * y->dims[2] + i) * y->dims[3];
                            line(in, tap, out, from, to);
                        }
                    }
}

size_t count(const Tensor *t) { return size_t(t->dims[0]) * t->dims[1] * t->dims[2] * t->dims[3]; }

int workspace(const Call &call, bool known, size_t *bytes) {
    if (int status = call.check()) return status;
    return known ? (*bytes = WORKSPACE, OK) : NOT_SUPPORTED;
}
} // namespace

extern "C" {
int cudnnCreate(void **handle) { return *handle = new char, OK; }
int cudnnDestroy(void *handle) { return delete static_cast<char *>(handle), OK; }
int cudnnSetStream(void *, void *) { return OK; }
size_t cudnnGetVersion() { return 90000; }
const char *cudnnGetErrorString(int status) { return status == BAD_PARAM ? "CUDNN_STATUS_BAD_PARAM" : "CUDNN_STATUS"; }

int cudnnCreateTensorDescriptor(void **t) { return *t = new Tensor, OK; }
int cudnnDestroyTensorDescriptor(void *t) { return delete static_cast<Tensor *>(t), OK; }
int cudnnCreateFilterDescriptor(void **t) { return *t = new Tensor, OK; }
int cudnnDestroyFilterDescriptor(void *t) { return delete static_cast<Tensor *>(t), OK; }
int cudnnCreateConvolutionDescriptor(void **c) { return *c = new Conv, OK; }
int cudnnDestroyConvolutionDescriptor(void *c) { return delete static_cast<Conv *>(c), OK; }

int cudnnSetTensor4dDescriptor(void *t, int format, int type, int n, int c, int h, int w) {
    if (format != 0 || n <= 0 || c <= 0 || h <= 0 || w <= 0) return BAD_PARAM;
    auto tensor = static_cast<Tensor *>(t);
    *tensor = {type_of(type), {n, c, h, w}, {}};
    contiguous(tensor);
    return OK;
}
int cudnnSetTensor4dDescriptorEx(void *t, int type, int n, int c, int h, int w, int sn, int sc, int sh, int sw) {
    *static_cast<Tensor *>(t) = {type_of(type), {n, c, h, w}, {sn, sc, sh, sw}};
    return n > 0 && c > 0 && h > 0 && w > 0 ? OK : BAD_PARAM;
}
int cudnnSetFilter4dDescriptor(void *t, int type, int format, int k, int c, int h, int w) {
    return cudnnSetTensor4dDescriptor(t, format, type, k, c, h, w);
}
int cudnnSetConvolution2dDescriptor(void *c, int ph, int pw, int sh, int sw, int dh, int dw, int mode, int compute) {
    // 1: cross-correlation.
    if (mode != 1 || ph < 0 || pw < 0 || sh <= 0 || sw <= 0 || dh <= 0 || dw <= 0) return BAD_PARAM;
    *static_cast<Conv *>(c) = {{ph, pw}, {sh, sw}, {dh, dw}, type_of(compute)};
    return OK;
}
// 0 to 3: default, tensor cores, tensor cores with conversion, FMA only.
int cudnnSetConvolutionMathType(void *, int math) { return math >= 0 && math <= 3 ? OK : BAD_PARAM; }
int cudnnSetConvolutionGroupCount(void *, int groups) { return groups == 1 ? OK : NOT_SUPPORTED; }

int cudnnGetConvolutionForwardAlgorithm_v7(void *, void *, void *, void *, void *, int wanted, int *returned, void *results) {
    if (wanted < 1) return BAD_PARAM;
    Perf perf = {};
    perf.algorithm = 1;
    memcpy(results, &perf, sizeof perf);
    *returned = 1;
    return OK;
}
// The algorithms that are known here: forward 0 and 1 (implicit GEMM, with precomputed places), backward 1, the one whose sums repeat.
int cudnnGetConvolutionForwardWorkspaceSize(void *, void *x, void *w, void *c, void *y, int algorithm, size_t *bytes) {
    return workspace({x, w, y, c}, algorithm == 0 || algorithm == 1, bytes);
}
int cudnnGetConvolutionBackwardDataWorkspaceSize(void *, void *w, void *dy, void *c, void *dx, int algorithm, size_t *bytes) {
    return workspace({dx, w, dy, c}, algorithm == 1, bytes);
}
int cudnnGetConvolutionBackwardFilterWorkspaceSize(void *, void *x, void *dy, void *c, void *dw, int algorithm, size_t *bytes) {
    return workspace({x, dw, dy, c}, algorithm == 1, bytes);
}

int cudnnConvolutionForward(void *, const void *alpha, void *xd, const void *x, void *wd, const void *w, void *cd, int algorithm, void *space, size_t bytes, const void *beta, void *yd, void *y) {
    Call call(xd, wd, yd, cd);
    if (algorithm != 0 && algorithm != 1) return NOT_SUPPORTED;
    if (int status = call.begin(space, bytes)) return status;
    if (!dry_computes()) return OK;
    std::vector<float> image = read(call.x, x), kernel = read(call.w, w), out(count(call.y));
    const int step = call.c->stride[1];
    each_line(call, [&](ptrdiff_t in, size_t tap, size_t at, int from, int to) {
        const float k = kernel[tap], *line = image.data();
        float *sum = out.data() + at;
        for (int j = from; j < to; j++) sum[j] += k * line[in + ptrdiff_t(j) * step];
    });
    write(call.y, y, out, alpha, beta);
    return OK;
}

int cudnnConvolutionBackwardData(void *, const void *alpha, void *wd, const void *w, void *dyd, const void *dy, void *cd, int algorithm, void *space, size_t bytes, const void *beta, void *dxd, void *dx) {
    Call call(dxd, wd, dyd, cd);
    if (algorithm != 1) return NOT_SUPPORTED;
    if (int status = call.begin(space, bytes)) return status;
    if (!dry_computes()) return OK;
    std::vector<float> kernel = read(call.w, w), grad = read(call.y, dy), out(count(call.x));
    const int step = call.c->stride[1];
    each_line(call, [&](ptrdiff_t in, size_t tap, size_t at, int from, int to) {
        const float k = kernel[tap], *line = grad.data() + at;
        float *sum = out.data();
        for (int j = from; j < to; j++) sum[in + ptrdiff_t(j) * step] += k * line[j];
    });
    write(call.x, dx, out, alpha, beta);
    return OK;
}

int cudnnConvolutionBackwardFilter(void *, const void *alpha, void *xd, const void *x, void *dyd, const void *dy, void *cd, int algorithm, void *space, size_t bytes, const void *beta, void *dwd, void *dw) {
    Call call(xd, dwd, dyd, cd);
    if (algorithm != 1) return NOT_SUPPORTED;
    if (int status = call.begin(space, bytes)) return status;
    if (!dry_computes()) return OK;
    std::vector<float> image = read(call.x, x), grad = read(call.y, dy), out(count(call.w));
    const int step = call.c->stride[1];
    each_line(call, [&](ptrdiff_t in, size_t tap, size_t at, int from, int to) {
        const float *pixels = image.data(), *line = grad.data() + at;
        float sum = 0;
        for (int j = from; j < to; j++) sum += pixels[in + ptrdiff_t(j) * step] * line[j];
        out[tap] += sum;
    });
    write(call.w, dw, out, alpha, beta);
    return OK;
}
}
