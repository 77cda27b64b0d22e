// Outputs of a network that are moved towards observations by tmpd: the operations tmpd_... of
// fastdiff/backends/protocol.py, whose formulas are in fastdiff/backends/numpy/tmpd.py.
//
// A warp takes a state. Of m values each belongs to a lane, j to lane j % 32, and so do those of a sample: what lanes
// have of others comes behind a barrier of the warp. What is solved with is float64. Every sum has a fixed order that
// depends on the sizes alone.

enum { P, Q, GAIN, TO_OUTPUT, LEAST2, FARTHEST, NUMBERS };  // of TmpdPlan.numbers, for each timestep
enum { TMPD_WARPS = 4 };                                    // of a block
#define EQUATIONS (FD_KRYLOV + 1)

// A of all observations: the rows of `matrix` (N, m, d), or where that is null places. `chosen` (N, 2 m + d) holds for
// each observation the places of its m rows, d where they say nothing; then for each row the next one of the same
// place, and for each place its first row, in rising order, -1 where there is none.
struct Rows {
    const int *chosen;
    const real *matrix;
    int64 m, d;
};

FD_DEVICE double tmpd_sum(double value) {
    FD_UNROLL
    for (int mask = FD_WARP / 2; mask > 0; mask /= 2) value += fd_shuffle_xor(value, mask);
    return value;
}

// Lane j % 32 gives `to` j and value j of A x, for the observation `of`; x(e) is value e of x.
template <class Value, class To>
FD_DEVICE void tmpd_times(const Rows &A, int64 of, int lane, const Value &x, const To &to) {
    if (A.matrix) {
        const real *row = A.matrix + of * A.m * A.d;
        for (int64 j = 0; j < A.m; j++, row += A.d) {
            double sum = 0;
            for (int64 e = lane; e < A.d; e += FD_WARP) sum += (double)row[e] * x(e);
            sum = tmpd_sum(sum);
            if (lane == j % FD_WARP) to(j, sum);
        }
        return;
    }
    const int *places = A.chosen + of * (2 * A.m + A.d);
    for (int64 j = lane; j < A.m; j += FD_WARP) to(j, places[j] < A.d ? (double)x(places[j]) : 0.0);
}

// Value e of A^T w.
FD_DEVICE double tmpd_transposed(const Rows &A, int64 of, int64 e, const double *w) {
    double sum = 0;
    if (A.matrix) {
        for (int64 j = 0; j < A.m; j++) sum += (double)A.matrix[(of * A.m + j) * A.d + e] * w[j];
    } else {
        const int *const next = A.chosen + of * (2 * A.m + A.d) + A.m, *const first = next + A.m;
        for (int j = first[e]; j >= 0; j = next[j]) sum += w[j];
    }
    return sum;
}

FD_DEVICE real tmpd_entry(const Rows &A, int64 of, int64 k, int64 e) {
    if (A.matrix) return A.matrix[(of * A.m + k) * A.d + e];
    return A.chosen[of * (2 * A.m + A.d) + k] == e ? 1.0f : 0.0f;
}

// for (int64 i = this warp; i < n; i += all warps)
#define TMPD_STATES(i, n)                                                             \
    for (int64 i = ((int64)blockIdx.x * blockDim.x + threadIdx.x) / FD_WARP; i < (n); \
         i += (int64)gridDim.x * blockDim.x / FD_WARP)

// out (m, n, d): the rows of A of every state.
FD_KERNEL tmpd_rows(real *__restrict__ out, const int *__restrict__ chosen, const real *__restrict__ matrix,
                    const int64 *__restrict__ which, int64 n, int64 m, int64 d) {
    const Rows A = {chosen, matrix, m, d};
    for (Walk walk = fd_walk(d); walk.row < m * n; fd_walk_on(walk, d)) {
        out[walk.row * d + walk.item] = tmpd_entry(A, which[walk.row % n], walk.row / n, walk.item);
    }
}

// seen (N, 2, m) holds y and the variance of its noise. Outputs: back (m, n, d), H (n, m, m), rest (n, m).
FD_KERNEL tmpd_direct(const real *__restrict__ x, const real *__restrict__ out, const real *__restrict__ products,
                      real *back, double *__restrict__ H, double *__restrict__ rest, const int *__restrict__ chosen,
                      const real *__restrict__ matrix, const double *__restrict__ seen,
                      const double *__restrict__ numbers, const int64 *__restrict__ which,
                      const int64 *__restrict__ t, int64 n, int64 m, int64 d) {
    const int lane = threadIdx.x % FD_WARP;
    const Rows A = {chosen, matrix, m, d};
    TMPD_STATES(i, n) {
        const int64 of = which[i];
        const double *const c = numbers + t[i] * NUMBERS, *const y = seen + 2 * of * m, *const variance = y + m;
        const double p = c[P], q = c[Q], gain = c[GAIN];
        for (int64 k = 0; k < m; k++) {
            for (int64 e = lane; e < d; e += FD_WARP) {
                const int64 at = (k * n + i) * d + e;
                back[at] = (real)(p * tmpd_entry(A, of, k, e) + q * products[at]);
            }
        }
        fd_syncwarp();
        tmpd_times(
            A, of, lane, [&](int64 e) { return p * x[i * d + e] + q * out[i * d + e]; },
            [&](int64 j, double value) { rest[i * m + j] = y[j] - value; });
        for (int64 k = 0; k < m; k++) {
            tmpd_times(
                A, of, lane, [&](int64 e) { return (double)back[(k * n + i) * d + e]; },
                [&](int64 j, double value) { H[(i * m + j) * m + k] = gain * value + (j == k ? variance[j] : 0.0); });
        }
    }
}

// Norm of m values, each of which belongs to a lane.
FD_DEVICE double tmpd_norm(const double *values, int64 m, int lane) {
    double sum = 0;
    for (int64 j = lane; j < m; j += FD_WARP) sum += values[j] * values[j];
    return sqrt(tmpd_sum(sum));
}

// Outputs: vector 0 of basis (n, K + 1, m), rest (n, K + 1), cotangent (n, d).
FD_KERNEL tmpd_begin(const real *__restrict__ x, const real *__restrict__ out, double *basis,
                     double *__restrict__ rest, real *__restrict__ cotangent, const int *__restrict__ chosen,
                     const real *__restrict__ matrix, const double *__restrict__ seen,
                     const double *__restrict__ numbers, const int64 *__restrict__ which,
                     const int64 *__restrict__ t, int64 n, int64 m, int64 d, int K) {
    const int lane = threadIdx.x % FD_WARP;
    const Rows A = {chosen, matrix, m, d};
    TMPD_STATES(i, n) {
        const int64 of = which[i];
        const double *const c = numbers + t[i] * NUMBERS, *const y = seen + 2 * of * m;
        const double p = c[P], q = c[Q];
        double *const vector = basis + i * (K + 1) * m;
        tmpd_times(
            A, of, lane, [&](int64 e) { return p * x[i * d + e] + q * out[i * d + e]; },
            [&](int64 j, double value) { vector[j] = y[j] - value; });
        const double size = tmpd_norm(vector, m, lane), by = fmax(size, FD_TINY);
        for (int64 j = lane; j < m; j += FD_WARP) vector[j] /= by;
        if (lane <= K) rest[i * (K + 1) + lane] = lane == 0 ? size : 0.0;
        fd_syncwarp();
        for (int64 e = lane; e < d; e += FD_WARP) cotangent[i * d + e] = (real)tmpd_transposed(A, of, e, vector);
    }
}

// Outputs: back[k] (n, d), column k of H (n, K + 1, K), vector k + 1 of the basis, and what the cotangent becomes.
FD_KERNEL tmpd_arnoldi(int k, const real *__restrict__ product, real *__restrict__ cotangent, real *back,
                       double *basis, double *H, const int *__restrict__ chosen, const real *__restrict__ matrix,
                       const double *__restrict__ seen, const double *__restrict__ numbers,
                       const int64 *__restrict__ which, const int64 *__restrict__ t, int64 n, int64 m, int64 d,
                       int K) {
    FD_SHARED_ARRAY(double, all_parts, TMPD_WARPS * FD_KRYLOV);
    const int lane = threadIdx.x % FD_WARP;
    double *const parts = all_parts + threadIdx.x / FD_WARP * FD_KRYLOV;
    const Rows A = {chosen, matrix, m, d};
    TMPD_STATES(i, n) {
        const int64 of = which[i];
        const double *const c = numbers + t[i] * NUMBERS, *const variance = seen + (2 * of + 1) * m;
        const double p = c[P], q = c[Q], gain = c[GAIN];
        real *const pulled = back + (k * n + i) * d;
        for (int64 e = lane; e < d; e += FD_WARP) {
            pulled[e] = (real)(p * cotangent[i * d + e] + q * product[i * d + e]);
        }
        fd_syncwarp();
        const double *const first = basis + i * (K + 1) * m, *const vector = first + k * m;
        double *const image = basis + (i * (K + 1) + k + 1) * m;
        tmpd_times(
            A, of, lane, [&](int64 e) { return (double)pulled[e]; },
            [&](int64 j, double value) { image[j] = gain * value + variance[j] * vector[j]; });
        const double whole = tmpd_norm(image, m, lane);
        double *const column = H + i * (K + 1) * K + k;
        for (int again = 0; again < 2; again++) {  // once is not enough in finite precision
            for (int l = 0; l <= k; l++) {
                double part = 0;
                for (int64 j = lane; j < m; j += FD_WARP) part += first[l * m + j] * image[j];
                part = tmpd_sum(part);
                if (lane == 0) {
                    parts[l] = part;
                    column[l * K] = again ? column[l * K] + part : part;
                }
            }
            fd_syncwarp();
            for (int64 j = lane; j < m; j += FD_WARP) {
                double value = image[j];
                for (int l = 0; l <= k; l++) value -= parts[l] * first[l * m + j];
                image[j] = value;
            }
            fd_syncwarp();  // behind all that read parts
        }
        const double left = tmpd_norm(image, m, lane);
        if (lane > k && lane <= K) column[lane * K] = lane == k + 1 ? left : 0.0;
        // Where nothing is left the answer is found: vectors of 0 add nothing to it.
        const double by = left > FD_KRYLOV_LEAST * whole ? 1.0 / fmax(left, FD_TINY) : 0.0;
        for (int64 j = lane; j < m; j += FD_WARP) image[j] *= by;
        fd_syncwarp();
        for (int64 e = lane; e < d; e += FD_WARP) cotangent[i * d + e] = (real)tmpd_transposed(A, of, e, image);
    }
}

// out (n, d) += what moves it, for H (n, equations, K), rest (n, equations) and back (K, n, d), whose first K-th is
// overwritten. reach (N,).
FD_KERNEL tmpd_move(const double *__restrict__ H, const double *__restrict__ rest, real *__restrict__ back,
                    real *__restrict__ out, const double *__restrict__ reach, const double *__restrict__ numbers,
                    const int64 *__restrict__ which, const int64 *__restrict__ t, int64 n, int64 d, int equations,
                    int K) {
    FD_SHARED_ARRAY(double, shared, TMPD_WARPS * (EQUATIONS + FD_KRYLOV + 1) * FD_KRYLOV);
    const int lane = threadIdx.x % FD_WARP, warp = threadIdx.x / FD_WARP;
    double *const h = shared + warp * (EQUATIONS + FD_KRYLOV + 1) * FD_KRYLOV;
    double *const normal = h + EQUATIONS * FD_KRYLOV, *const weights = normal + FD_KRYLOV * FD_KRYLOV;
    const bool mine = lane < K;
    TMPD_STATES(i, n) {
        const double *const c = numbers + t[i] * NUMBERS;
        const double least2 = c[LEAST2];
        for (int at = lane; at < equations * K; at += FD_WARP) h[at] = H[i * equations * K + at];
        fd_syncwarp();
        for (int at = lane; at < K * K; at += FD_WARP) {
            const int row = at / K, column = at % K;
            double sum = row == column ? least2 : 0.0;
            for (int l = 0; l < equations; l++) sum += h[l * K + row] * h[l * K + column];
            if (column <= row) normal[row * FD_KRYLOV + column] = sum;
        }
        double v = 0, w = 0;  // of this lane's row
        for (int l = 0; mine && l < equations; l++) v += h[l * K + lane] * rest[i * equations + l];
        fd_syncwarp();
        double *const row = normal + lane * FD_KRYLOV;
        const double pivot = mine ? FD_PIVOT * row[lane] : 0.0;
        for (int j = 0; j < K; j++) {  // Cholesky's factor, with the inverse of its diagonal
            const double *const top = normal + j * FD_KRYLOV;
            double value = 0;
            if (mine && lane >= j) {
                value = row[j];
                for (int l = 0; l < j; l++) value -= row[l] * top[l];
            }
            const double diagonal = 1.0 / sqrt(fmax(fd_shuffle(value, j), fd_shuffle(pivot, j)));
            if (mine && lane >= j) row[j] = lane == j ? diagonal : value * diagonal;
            fd_syncwarp();
        }
        for (int term = 0; term < FD_DAMPED; term++) {
            for (int j = 0; j < K; j++) {
                const double solved = fd_shuffle(v, j) * normal[j * FD_KRYLOV + j];
                if (lane == j) v = solved;
                if (mine && lane > j) v -= row[j] * solved;
            }
            for (int j = K - 1; j >= 0; j--) {
                const double solved = fd_shuffle(v, j) * normal[j * FD_KRYLOV + j];
                if (lane == j) v = solved;
                if (lane < j) v -= normal[j * FD_KRYLOV + lane] * solved;
            }
            w += v;
            v *= least2;
        }
        if (mine) weights[lane] = w;
        fd_syncwarp();
        double size = 0;
        for (int64 e = lane; e < d; e += FD_WARP) {
            double slope = 0;
            for (int k = 0; k < K; k++) slope += weights[k] * back[(k * n + i) * d + e];
            back[i * d + e] = (real)slope;
            size += slope * slope;
        }
        size = sqrt(tmpd_sum(size));
        const double bound = fmin(c[FARTHEST] * reach[which[i]] / fmax(size, FD_TINY), 1.0);
        for (int64 e = lane; e < d; e += FD_WARP) {
            out[i * d + e] += (real)(c[TO_OUTPUT] * bound * back[i * d + e]);
        }
        fd_syncwarp();  // behind all that read weights
    }
}
