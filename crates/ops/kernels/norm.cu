// Group norm (with SiLU behind it, if asked) and layer norm, forward and backward, with f32 statistics whatever the type of the data.
// Sums are formed in an order that the shape alone decides. Launched by src/gpu/norm.rs.
#include "common.h"

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Mean, and sum of squared distances from it, of `count` values; the same on all threads of the block.
template <class T> __device__ inline void moments_of(const T *x, int count, float *room, float &mean, float &squares) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < count; i += blockDim.x) sum += wide(x[i]);
    mean = block_sum(sum, room) / count;
    float far = 0.0f;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        float d = wide(x[i]) - mean;
        far += d * d;
    }
    squares = block_sum(far, room);
}

// Mean and reciprocal deviation of a group from those of its `per` channels (Chan et al. 1979, for parts of equal size).
__device__ inline void group_moments(const float *moments, int per, int plane, float eps, float &mean, float &rstd) {
    mean = 0.0f;
    for (int c = 0; c < per; c++) mean += moments[2 * c];
    mean /= per;
    float squares = 0.0f;
    for (int c = 0; c < per; c++) {
        float d = moments[2 * c] - mean;
        squares += moments[2 * c + 1] + d * d * plane;
    }
    rstd = 1.0f / sqrtf(squares / (float(per) * plane) + eps);
}

// A block for each channel of each item, here and below; `moments` is (n, c, 2).
template <class T> __device__ void group_norm_moments(int plane, const T *x, float *moments) {
    __shared__ float room[WARP];
    float mean, squares;
    moments_of(x + (long long)blockIdx.x * plane, plane, room, mean, squares);
    if (threadIdx.x == 0) {
        moments[2 * blockIdx.x] = mean;
        moments[2 * blockIdx.x + 1] = squares;
    }
}

// `stats` is (n, groups, 2): mean and reciprocal deviation.
template <class T>
__device__ void group_norm(int c, int per, int plane, float eps, int silu, const T *x, const float *moments, const float *w, const float *b, T *y, float *stats) {
    int channel = blockIdx.x % c, group = blockIdx.x / per;
    float mean, rstd;
    group_moments(moments + 2LL * group * per, per, plane, eps, mean, rstd);
    if (threadIdx.x == 0 && channel % per == 0) {
        stats[2 * group] = mean;
        stats[2 * group + 1] = rstd;
    }
    float scale = w[channel] * rstd, shift = b[channel] - mean * scale;
    long long at = (long long)blockIdx.x * plane;
    for (int i = threadIdx.x; i < plane; i += blockDim.x) {
        float z = wide(x[at + i]) * scale + shift;
        y[at + i] = narrow<T>(silu ? z * sigmoid(z) : z);
    }
}

__device__ inline float silu_grad(float z) {
    float s = sigmoid(z);
    return s * (1.0f + z * (1.0f - s));
}

// For each channel the sums of dz and of dz * xhat: `dbias` and `dweight`, both (n, c).
template <class T>
__device__ void group_norm_sums(
    int c, int per, int plane, int silu, const T *x, const T *dy, const float *stats, const float *w, const float *b, float *dbias, float *dweight) {
    __shared__ float room[WARP];
    int channel = blockIdx.x % c, group = blockIdx.x / per;
    float mean = stats[2 * group], rstd = stats[2 * group + 1], weight = w[channel], bias = b[channel], sum = 0.0f, with_x = 0.0f;
    long long at = (long long)blockIdx.x * plane;
    for (int i = threadIdx.x; i < plane; i += blockDim.x) {
        float xhat = (wide(x[at + i]) - mean) * rstd, dz = wide(dy[at + i]);
        if (silu) dz *= silu_grad(xhat * weight + bias);
        sum += dz;
        with_x += dz * xhat;
    }
    sum = block_sum(sum, room);
    with_x = block_sum(with_x, room);
    if (threadIdx.x == 0) {
        dbias[blockIdx.x] = sum;
        dweight[blockIdx.x] = with_x;
    }
}

template <class T>
__device__ void group_norm_grad(int c, int per, int plane, int silu, const T *x, const T *dy, const float *stats, const float *w, const float *b,
                                const float *dbias, const float *dweight, T *dx) {
    int channel = blockIdx.x % c, group = blockIdx.x / per;
    float mean = stats[2 * group], rstd = stats[2 * group + 1], weight = w[channel], bias = b[channel], m1 = 0.0f, m2 = 0.0f;
    for (int k = 0; k < per; k++) {
        float weight_k = w[channel / per * per + k];
        m1 += weight_k * dbias[(long long)group * per + k];
        m2 += weight_k * dweight[(long long)group * per + k];
    }
    m1 /= float(per) * plane;
    m2 /= float(per) * plane;
    long long at = (long long)blockIdx.x * plane;
    for (int i = threadIdx.x; i < plane; i += blockDim.x) {
        float xhat = (wide(x[at + i]) - mean) * rstd, dz = wide(dy[at + i]);
        if (silu) dz *= silu_grad(xhat * weight + bias);
        dx[at + i] = narrow<T>(rstd * (dz * weight - m1 - xhat * m2));
    }
}

// A warp for each row of `d` values; `stats` is (rows, 2).
template <class T> __device__ void layer_norm(long long rows, int d, float eps, const T *x, const float *w, const float *b, T *y, float *stats) {
    long long row = (long long)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (row >= rows) return;
    int lane = threadIdx.x % WARP;
    const T *from = x + row * d;
    float sum = 0.0f, far = 0.0f;
    for (int i = lane; i < d; i += WARP) sum += wide(from[i]);
    float mean = warp_sum(sum) / d;
    for (int i = lane; i < d; i += WARP) {
        float distance = wide(from[i]) - mean;
        far += distance * distance;
    }
    float rstd = 1.0f / sqrtf(warp_sum(far) / d + eps);
    if (lane == 0) {
        stats[2 * row] = mean;
        stats[2 * row + 1] = rstd;
    }
    for (int i = lane; i < d; i += WARP) y[row * d + i] = narrow<T>((wide(from[i]) - mean) * rstd * w[i] + b[i]);
}

template <class T> __device__ void layer_norm_grad(long long rows, int d, const T *x, const T *dy, const float *stats, const float *w, T *dx) {
    long long row = (long long)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (row >= rows) return;
    int lane = threadIdx.x % WARP;
    long long at = row * d;
    float mean = stats[2 * row], rstd = stats[2 * row + 1], m1 = 0.0f, m2 = 0.0f;
    for (int i = lane; i < d; i += WARP) {
        float g = wide(dy[at + i]) * w[i];
        m1 += g;
        m2 += g * ((wide(x[at + i]) - mean) * rstd);
    }
    m1 = warp_sum(m1) / d;
    m2 = warp_sum(m2) / d;
    for (int i = lane; i < d; i += WARP) {
        float xhat = (wide(x[at + i]) - mean) * rstd;
        dx[at + i] = narrow<T>(rstd * (wide(dy[at + i]) * w[i] - m1 - xhat * m2));
    }
}

// Sums over rows: grid (d / 32, pieces), 32 columns by 8 rows of threads; `dweight` and `dbias` are (pieces, d).
template <class T>
__device__ void layer_norm_sums(long long rows, int d, const T *x, const T *dy, const float *stats, float *dweight, float *dbias) {
    __shared__ float with_x[8][WARP], plain[8][WARP];
    int lane = threadIdx.x % WARP, line = threadIdx.x / WARP, column = blockIdx.x * WARP + lane;
    long long per = (rows + gridDim.y - 1) / gridDim.y, end = min((long long)rows, (blockIdx.y + 1) * per);
    float w = 0.0f, b = 0.0f;
    if (column < d)
        for (long long row = blockIdx.y * per + line; row < end; row += 8) {
            float g = wide(dy[row * d + column]);
            w += g * ((wide(x[row * d + column]) - stats[2 * row]) * stats[2 * row + 1]);
            b += g;
        }
    with_x[line][lane] = w;
    plain[line][lane] = b;
    __syncthreads();
    if (line != 0 || column >= d) return;
    for (int i = 1; i < 8; i++) {
        w += with_x[i][lane];
        b += plain[i][lane];
    }
    dweight[(long long)blockIdx.y * d + column] = w;
    dbias[(long long)blockIdx.y * d + column] = b;
}

#define KERNELS(T, NAME)                                                                                                                                  \
    extern "C" __global__ void group_norm_moments_##NAME(int plane, const T *x, float *moments) { group_norm_moments(plane, x, moments); }                \
    extern "C" __global__ void group_norm_##NAME(                                                                                                         \
        int c, int per, int plane, float eps, int silu, const T *x, const float *moments, const float *w, const float *b, T *y, float *stats) {           \
        group_norm(c, per, plane, eps, silu, x, moments, w, b, y, stats);                                                                                 \
    }                                                                                                                                                     \
    extern "C" __global__ void group_norm_sums_##NAME(                                                                                                    \
        int c, int per, int plane, int silu, const T *x, const T *dy, const float *stats, const float *w, const float *b, float *dbias, float *dweight) { \
        group_norm_sums(c, per, plane, silu, x, dy, stats, w, b, dbias, dweight);                                                                         \
    }                                                                                                                                                     \
    extern "C" __global__ void group_norm_grad_##NAME(int c, int per, int plane, int silu, const T *x, const T *dy, const float *stats, const float *w,   \
                                                      const float *b, const float *dbias, const float *dweight, T *dx) {                                  \
        group_norm_grad(c, per, plane, silu, x, dy, stats, w, b, dbias, dweight, dx);                                                                     \
    }                                                                                                                                                     \
    extern "C" __global__ void layer_norm_##NAME(                                                                                                         \
        long long rows, int d, float eps, const T *x, const float *w, const float *b, T *y, float *stats) {                                               \
        layer_norm(rows, d, eps, x, w, b, y, stats);                                                                                                      \
    }                                                                                                                                                     \
    extern "C" __global__ void layer_norm_grad_##NAME(                                                                                                    \
        long long rows, int d, const T *x, const T *dy, const float *stats, const float *w, T *dx) {                                                      \
        layer_norm_grad(rows, d, x, dy, stats, w, dx);                                                                                                    \
    }                                                                                                                                                     \
    extern "C" __global__ void layer_norm_sums_##NAME(                                                                                                    \
        long long rows, int d, const T *x, const T *dy, const float *stats, float *dweight, float *dbias) {                                               \
        layer_norm_sums(rows, d, x, dy, stats, dweight, dbias);                                                                                           \
    }
KERNELS(float, f32)
KERNELS(f16, f16)
KERNELS(bf16, bf16)
