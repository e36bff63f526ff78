// A stand-in for libcudnn: descriptors, the convolution (cross-correlation, NCHW) and its two gradients, with f32 sums.
#include "dry.h"
#include "gemm.h"

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

// A place of an image or of a kernel: its channel or image as an offset into the data, and its row and column.
struct Place {
    size_t offset;
    int row, column;
};

// All places of `outer` pieces of rows x columns, each row and column times `step`, less `pad`; pieces lie `apart` in the data.
std::vector<Place> places(int outer, size_t apart, int rows, int columns, const int *step, const int *pad) {
    std::vector<Place> all;
    all.reserve(size_t(outer) * rows * columns);
    for (int o = 0; o < outer; o++)
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < columns; j++) all.push_back({o * apart, i * step[0] - pad[0], j * step[1] - pad[1]});
    return all;
}

const int ONE[] = {1, 1}, NONE[] = {0, 0};

// The convolution as a product: its rows are the output's pixels, its sums run over the places of the kernel.
struct Product {
    const Call &call;
    std::vector<Place> taps, pixels;
    int height, width;

    explicit Product(const Call &call)
        : call(call), taps(places(call.w->dims[1], size_t(call.x->dims[2]) * call.x->dims[3], call.w->dims[2], call.w->dims[3], call.c->dilation, NONE)),
          pixels(places(call.y->dims[0], size_t(call.x->dims[1]) * call.x->dims[2] * call.x->dims[3], call.y->dims[2], call.y->dims[3], call.c->stride, call.c->pad)),
          height(call.x->dims[2]), width(call.x->dims[3]) {}

    // The number of the image that meets a place of the kernel at an output pixel; 0 outside.
    float under(const std::vector<float> &image, const Place &tap, const Place &pixel) const {
        int row = pixel.row + tap.row, column = pixel.column + tap.column;
        bool in = row >= 0 && row < height && column >= 0 && column < width;
        return in ? image[pixel.offset + tap.offset + size_t(row) * width + column] : 0;
    }

    // Where output channel `o` has output pixel `p`.
    size_t out(size_t o, size_t p) const {
        size_t size = size_t(call.y->dims[2]) * call.y->dims[3];
        return (p / size * call.y->dims[1] + o) * size + p % size;
    }
};

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
    Product p(call);
    const size_t taps = p.taps.size();
    gemm<float>(
        p.pixels.size(), call.y->dims[1], taps, [&](size_t i, size_t t) { return p.under(image, p.taps[t], p.pixels[i]); },
        [&](size_t t, size_t o) { return kernel[o * taps + t]; }, [&](size_t i, size_t o, float sum) { out[p.out(o, i)] = sum; });
    write(call.y, y, out, alpha, beta);
    return OK;
}

int cudnnConvolutionBackwardData(void *, const void *alpha, void *wd, const void *w, void *dyd, const void *dy, void *cd, int algorithm, void *space, size_t bytes, const void *beta, void *dxd, void *dx) {
    Call call(dxd, wd, dyd, cd);
    if (algorithm != 1) return NOT_SUPPORTED;
    if (int status = call.begin(space, bytes)) return status;
    if (!dry_computes()) return OK;
    std::vector<float> kernel = read(call.w, w), grad = read(call.y, dy), out(count(call.x));
    // The rows are the input's pixels; what meets them is found backwards, where the stride comes out even.
    const Conv *c = call.c;
    const int channels = call.x->dims[1], height = call.y->dims[2], width = call.y->dims[3];
    const size_t kernels = size_t(call.w->dims[2]) * call.w->dims[3], pixels = size_t(call.x->dims[2]) * call.x->dims[3];
    auto rows = places(call.x->dims[0], size_t(call.y->dims[1]) * height * width, call.x->dims[2], call.x->dims[3], ONE, NONE);
    auto taps = places(call.y->dims[1], size_t(height) * width, call.w->dims[2], call.w->dims[3], c->dilation, c->pad);
    auto met = [&](size_t i, size_t t) {
        int row = rows[i].row - taps[t].row, column = rows[i].column - taps[t].column;
        if (row < 0 || column < 0 || row % c->stride[0] || column % c->stride[1]) return 0.0f;
        row /= c->stride[0], column /= c->stride[1];
        return row < height && column < width ? grad[rows[i].offset + taps[t].offset + size_t(row) * width + column] : 0.0f;
    };
    gemm<float>(
        rows.size(), channels, taps.size(), met,
        [&](size_t t, size_t ci) { return kernel[(t / kernels * channels + ci) * kernels + t % kernels]; },
        [&](size_t i, size_t ci, float sum) { out[(i / pixels * channels + ci) * pixels + i % pixels] = sum; });
    write(call.x, dx, out, alpha, beta);
    return OK;
}

int cudnnConvolutionBackwardFilter(void *, const void *alpha, void *xd, const void *x, void *dyd, const void *dy, void *cd, int algorithm, void *space, size_t bytes, const void *beta, void *dwd, void *dw) {
    Call call(xd, dwd, dyd, cd);
    if (algorithm != 1) return NOT_SUPPORTED;
    if (int status = call.begin(space, bytes)) return status;
    if (!dry_computes()) return OK;
    std::vector<float> image = read(call.x, x), grad = read(call.y, dy), out(count(call.w));
    Product p(call);
    const size_t taps = p.taps.size();
    gemm<float>(
        taps, call.y->dims[1], p.pixels.size(), [&](size_t t, size_t i) { return p.under(image, p.taps[t], p.pixels[i]); },
        [&](size_t i, size_t o) { return grad[p.out(o, i)]; }, [&](size_t t, size_t o, float sum) { out[o * taps + t] = sum; });
    write(call.w, dw, out, alpha, beta);
    return OK;
}
}
