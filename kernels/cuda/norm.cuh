// What GroupNorm and LayerNorm share: vectors of V neighbouring channels, a block's threads on them, and sums of these.

#define AT_ONCE 2  // as `fours`: all arrays are 16-byte aligned

// A block's threads on a bundle: `columns` of them side by side on `count` vectors of a pixel, `rows` pixels at once.
// The first `members` of them, then the next, belong to one group; a bundle wider than the block is a single group.
struct Lanes {
    int count, columns, rows, members, column, row, member;
    bool active;
};

FD_DEVICE Lanes lanes_of(int count, int members) {
    Lanes lanes;
    const int threads = blockDim.x, thread = threadIdx.x;
    lanes.count = count;
    lanes.columns = min(count, threads);
    lanes.rows = threads / lanes.columns;
    lanes.members = min(members, lanes.columns);
    lanes.column = thread % lanes.columns;
    lanes.row = thread / lanes.columns;
    lanes.member = lanes.column % lanes.members;
    lanes.active = lanes.row < lanes.rows;
    return lanes;
}

template <int V>
FD_DEVICE void take(real (&values)[V], const real *from, bool at_once = true) {
    if (V == 4 && at_once) {
        const float4 four = fd_load4(from);
        values[0] = four.x, values[V / 4] = four.y, values[V / 2] = four.z, values[V - 1] = four.w;
    } else {
        FD_UNROLL
        for (int j = 0; j < V; j++) values[j] = from[j];
    }
}

// The same of K pixels that lie `stride` values apart: all of them are on their way before one is needed.
template <int V, int K>
FD_DEVICE void take_pixels(real (&values)[K][V], const real *from, int64 stride, bool at_once) {
    FD_UNROLL
    for (int k = 0; k < K; k++) take<V>(values[k], from + k * stride, at_once);
}

template <int V>
FD_DEVICE void put(real *to, const real (&values)[V], bool at_once = true) {
    if (V == 4 && at_once) {
        fd_store4(to, make_float4(values[0], values[V / 4], values[V / 2], values[V - 1]));
    } else {
        FD_UNROLL
        for (int j = 0; j < V; j++) to[j] = values[j];
    }
}

template <int V>
FD_DEVICE real total(const real (&values)[V]) {
    return V == 4 ? (values[0] + values[V / 4]) + (values[V / 2] + values[V - 1]) : values[0];
}

// The sums of K values over the rows of lanes, in the lanes of the first row. `sums` holds K values a thread.
template <int K>
FD_DEVICE void sum_rows(real (&values)[K], const Lanes &lanes, real *sums) {
    const int thread = threadIdx.x, threads = blockDim.x;
    FD_UNROLL
    for (int k = 0; k < K; k++) sums[k * threads + thread] = values[k];
    for (int n = lanes.rows; n > 1;) {
        const int half = (n + 1) / 2;
        fd_syncthreads();
        if (lanes.row + half < n) {
            FD_UNROLL
            for (int k = 0; k < K; k++) sums[k * threads + thread] += sums[k * threads + thread + half * lanes.columns];
        }
        n = half;
    }
    FD_UNROLL
    for (int k = 0; k < K; k++) values[k] = sums[k * threads + thread];
    fd_syncthreads();
}

// dh and dhh: the means of dh and dh h. With `add`, what lies at `before`, which may be dx, is added.
template <int V>
FD_DEVICE void put_dx(real *dx, const real *before, const real (&h)[V], const real (&dv)[V], const real (&factor)[V],
                      real scale, real dh, real dhh, int add, bool at_once) {
    real values[V] = {};
    if (add) take<V>(values, before, at_once);
    FD_UNROLL
    for (int j = 0; j < V; j++) values[j] += scale * ((factor[j] * dv[j] - dh) - h[j] * dhh);
    put<V>(dx, values, at_once);
}
