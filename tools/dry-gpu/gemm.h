// The matrix product of the stand-ins for cuBLAS and cuDNN. Each sum runs over k in order, so that the same product gives the same bits
// whatever stands beside it.
#pragma once
#include <cstddef>
#include <vector>

// out(i, j, sum over x of a(i, x) * b(x, j)) for all of m x n. A tile of sums stays in registers; `a` is called once for each of its
// places, `b` once for each tile's width.
template <class T, class A, class B, class Out> void gemm(size_t m, size_t n, size_t k, A a, B b, Out out) {
    constexpr size_t ROWS = 256 / sizeof(T), COLUMNS = 4;
    size_t blocks = (n + COLUMNS - 1) / COLUMNS;
    std::vector<T> left(k * ROWS), right(blocks * k * COLUMNS);
    for (size_t j = 0; j < n; j++)
        for (size_t x = 0; x < k; x++) right[(j / COLUMNS * k + x) * COLUMNS + j % COLUMNS] = b(x, j);
    for (size_t top = 0; top < m; top += ROWS) {
        size_t rows = m - top < ROWS ? m - top : ROWS;
        for (size_t x = 0; x < k; x++)
            for (size_t r = 0; r < rows; r++) left[x * ROWS + r] = a(top + r, x);
        for (size_t block = 0; block < blocks; block++) {
            T sums[COLUMNS][ROWS] = {};
            const T *row = left.data(), *factors = &right[block * k * COLUMNS];
            for (size_t x = 0; x < k; x++, row += ROWS, factors += COLUMNS)
                for (size_t c = 0; c < COLUMNS; c++)
                    for (size_t r = 0; r < ROWS; r++) sums[c][r] += factors[c] * row[r];
            for (size_t c = 0; c < COLUMNS && block * COLUMNS + c < n; c++)
                for (size_t r = 0; r < rows; r++) out(top + r, block * COLUMNS + c, sums[c][r]);
        }
    }
}
