// A stand-in for libcudnn: descriptors and the forward convolution (cross-correlation, NCHW), with f32 sums.
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
int cudnnSetConvolution2dDescriptor(void *c, int ph, int pw, int sh, int sw, int dh, int dw, int mode, int) {
    // 1: cross-correlation.
    if (mode != 1 || ph < 0 || pw < 0 || sh <= 0 || sw <= 0 || dh <= 0 || dw <= 0) return BAD_PARAM;
    *static_cast<Conv *>(c) = {{ph, pw}, {sh, sw}, {dh, dw}};
    return OK;
}
int cudnnSetConvolutionMathType(void *, int) { return OK; }
int cudnnSetConvolutionGroupCount(void *, int groups) { return groups == 1 ? OK : NOT_SUPPORTED; }

int cudnnGetConvolutionForwardAlgorithm_v7(void *, void *, void *, void *, void *, int wanted, int *returned, void *results) {
    if (wanted < 1) return BAD_PARAM;
    Perf perf = {};
    perf.algorithm = 1;
    memcpy(results, &perf, sizeof perf);
    *returned = 1;
    return OK;
}
int cudnnGetConvolutionForwardWorkspaceSize(void *, void *, void *, void *, void *, int, size_t *bytes) { return *bytes = 0, OK; }

int cudnnConvolutionForward(void *, const void *alpha, void *xd, const void *x, void *wd, const void *w, void *cd, int, void *, size_t, const void *beta, void *yd, void *y) {
    auto xt = static_cast<Tensor *>(xd), wt = static_cast<Tensor *>(wd), yt = static_cast<Tensor *>(yd);
    auto c = static_cast<Conv *>(cd);
    for (int i = 0; i < 2; i++) {
        int reach = c->dilation[i] * (wt->dims[2 + i] - 1) + 1;
        if (yt->dims[2 + i] != (xt->dims[2 + i] + 2 * c->pad[i] - reach) / c->stride[i] + 1) return BAD_PARAM;
    }
    if (xt->dims[1] != wt->dims[1] || yt->dims[1] != wt->dims[0] || yt->dims[0] != xt->dims[0]) return BAD_PARAM;
    if (xt->type != wt->type || xt->type != yt->type) return BAD_PARAM;
    // Scalars are f32 but for f64 tensors.
    if (xt->type == Type::F64) dry_refuse("an f64 convolution");
    float a = load(alpha, Type::F32, 0), b = load(beta, Type::F32, 0);
    int n = yt->dims[0], o = yt->dims[1], oh = yt->dims[2], ow = yt->dims[3], ci = xt->dims[1], h = xt->dims[2], wd2 = xt->dims[3], kh = wt->dims[2], kw = wt->dims[3];
    dry_count(xt->type == Type::F16 ? "conv f16" : xt->type == Type::BF16 ? "conv bf16" : "conv f32", size_t(2) * n * o * oh * ow * ci * kh * kw);
    if (!dry_computes()) return OK;
    std::vector<float> input(size_t(ci) * h * wd2), kernel(size_t(o) * ci * kh * kw), plane(size_t(oh) * ow);
    for (size_t i = 0; i < kernel.size(); i++) kernel[i] = load(w, wt->type, i);
    for (int s = 0; s < n; s++) {
        for (int ch = 0; ch < ci; ch++)
            for (int i = 0; i < h; i++)
                for (int j = 0; j < wd2; j++)
                    input[(size_t(ch) * h + i) * wd2 + j] =
                        load(x, xt->type, size_t(s) * xt->strides[0] + size_t(ch) * xt->strides[1] + size_t(i) * xt->strides[2] + size_t(j) * xt->strides[3]);
        for (int f = 0; f < o; f++) {
            std::fill(plane.begin(), plane.end(), 0.0f);
            for (int ch = 0; ch < ci; ch++)
                for (int ky = 0; ky < kh; ky++)
                    for (int kx = 0; kx < kw; kx++) {
                        float k = kernel[((size_t(f) * ci + ch) * kh + ky) * kw + kx];
                        for (int i = 0; i < oh; i++) {
                            int yy = i * c->stride[0] + ky * c->dilation[0] - c->pad[0];
                            if (yy < 0 || yy >= h) continue;
                            const float *line = &input[(size_t(ch) * h + yy) * wd2];
                            for (int j = 0; j < ow; j++) {
                                int xx = j * c->stride[1] + kx * c->dilation[1] - c->pad[1];
                                if (xx >= 0 && xx < wd2) plane[size_t(i) * ow + j] += k * line[xx];
                            }
                        }
                    }
            for (int i = 0; i < oh; i++)
                for (int j = 0; j < ow; j++) {
                    size_t at = size_t(s) * yt->strides[0] + size_t(f) * yt->strides[1] + size_t(i) * yt->strides[2] + size_t(j) * yt->strides[3];
                    store(y, yt->type, at, a * plane[size_t(i) * ow + j] + (b != 0 ? b * load(y, yt->type, at) : 0.0f));
                }
        }
    }
    return OK;
}
}
