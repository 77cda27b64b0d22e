// What cuDNN wants otherwise than the rest of us, and what it leaves to us; see the backend's cudnn.py.

// out (columns, rows) = x (rows, columns); with `halves` in bf16, two to a float.
FD_KERNEL cudnn_turn(const real *x, real *out, int rows, int columns, int halves) {
    for (Walk walk = fd_walk(rows); walk.row < columns; fd_walk_on(walk, rows)) {
        const real value = x[walk.item * columns + walk.row];
        const int64 at = walk.row * rows + walk.item;
        if (halves) {
            reinterpret_cast<bf16 *>(out)[at] = (bf16)fd_bf16x2(value, 0);
        } else {
            out[at] = value;
        }
    }
}

// out = x in bf16, two to a float; both are 16-byte aligned.
FD_KERNEL cudnn_halves(const real *x, real *out, int64 size) {
    uint32 *const pairs = reinterpret_cast<uint32 *>(out);
    FD_GRID_STRIDE(i, (size + 3) / 4) {
        if (4 * i + 4 <= size) {
            const float4 v = fd_load4(x + 4 * i);
            pairs[2 * i] = fd_bf16x2(v.x, v.y);
            pairs[2 * i + 1] = fd_bf16x2(v.z, v.w);
            continue;
        }
        for (int64 j = 4 * i; j < size; j++) reinterpret_cast<bf16 *>(out)[j] = (bf16)fd_bf16x2(x[j], 0);
    }
}

FD_DEVICE void finish_add(real &sum, const real *from) { sum = sum + *from; }
FD_DEVICE void finish_add(float4 &sum, const float4 *from) {
    sum = make_float4(sum.x + from->x, sum.y + from->y, sum.z + from->z, sum.w + from->w);
}

template <class T>
FD_DEVICE void finish(const T *y, const T *bias, const T *shift, const T *residual, T *out, int64 rows, int64 pixels,
                      int columns) {
    for (Walk walk = fd_walk(columns); walk.row < rows; fd_walk_on(walk, columns)) {
        const int64 at = walk.row * columns + walk.item;
        T sum = y[at];
        if (bias) finish_add(sum, bias + walk.item);
        if (shift) finish_add(sum, shift + walk.row / pixels * columns + walk.item);
        if (residual) finish_add(sum, residual + at);
        out[at] = sum;
    }
}

// out (rows, K) = y + bias (K) + shift (rows / pixels, K) + residual, in this order and without those that are null; it
// may be y or the residual. `fours`: K is a multiple of four, and all are 16-byte aligned.
FD_KERNEL cudnn_finish(const real *y, const real *bias, const real *shift, const real *residual, real *out, int64 rows,
                       int64 pixels, int K, int fours) {
    if (fours) {
        const auto in_fours = [](const real *from) { return reinterpret_cast<const float4 *>(from); };
        finish(in_fours(y), in_fours(bias), in_fours(shift), in_fours(residual), reinterpret_cast<float4 *>(out), rows,
               pixels, K / 4);
    } else {
        finish(y, bias, shift, residual, out, rows, pixels, K);
    }
}
