// The covariance view: similarity of curves, maps of rows by matrices, exact posterior means.
//
// Every sum has a fixed order that the widths alone decide: products are fused and added over k ascending, in the
// order below; the data of a posterior mean come in tiles that are added in order. How many rows a block holds changes
// no bit.
//
// A map reads its rows by the blocks of the noise law: place 4 q + j of a tile holds value q + j Q of the row, Q being
// the blocks of a row. So a block of normals is 16 bytes of shared memory, and drawn rows have the bits of stored ones.
// Matrices come packed: rows and columns in that order, padded with zeros to fours.
//
// Blocks have THREADS threads: eight warps.

#define THREADS 256
#define WARPS (THREADS / FD_WARP)
#define NO_WEIGHT fd_bits_float((int)0xff800000u)  // minus infinity, as an exponent

// exp(x) for x <= 0, and zero below exp(-87): exp(r) = 1 + r + r^2 P(r) for |r| <= ln(2) / 2, P as in mlp.cu.
FD_DEVICE real cov_exp(real x) {
    const real unit = 12582912.0f;  // 1.5 2^23, where floats are whole numbers; what is added is in their last bits
    const real shifted = fmaf(x, 1.442695f, unit), whole = shifted - unit;
    const real r = fmaf(whole, 2.1219444e-4f, fmaf(whole, -0.693359375f, x));
    real p = fmaf(0.0013941218f, r, 0.008363235f);
    p = fmaf(p, r, 0.041666374f);
    p = fmaf(p, r, 0.16666576f);
    p = fmaf(p, r, 0.5f);
    const real y = fmaf(fmaf(p, r, 1.0f), r, 1.0f);
    return x < -87.0f ? 0 : y * fd_bits_float((int)(((uint32)fd_float_bits(shifted) + 127u) << 23));
}

// The sum over a warp, in all its lanes.
template <class T>
FD_DEVICE T warp_sum(T value) {
    for (int mask = 1; mask < FD_WARP; mask *= 2) value += fd_shuffle_xor(value, mask);
    return value;
}

FD_DEVICE int64 cov_round4(int64 n) { return (n + 3) / 4 * 4; }

// Distance of two rows in shared memory: 4 beyond a multiple of 8, so that eight rows lie in different banks.
FD_DEVICE int cov_pitch(int64 n) { return (int)((n + 3) / 8 * 8 + 4); }

// acc += a b, for this lane's rows of a, four apart from `a` on, and the columns b[0 .. 3]; count is a multiple of 4.
template <int R>
FD_DEVICE void cov_multiply(real (&acc)[R][4], const real *a, int a_pitch, const real *b, int64 b_pitch, int count) {
    for (int k = 0; k < count; k += 4, b += 4 * b_pitch) {
        const float4 b0 = fd_load4(b), b1 = fd_load4(b + b_pitch), b2 = fd_load4(b + 2 * b_pitch),
                     b3 = fd_load4(b + 3 * b_pitch);
        FD_UNROLL
        for (int r = 0; r < R; r++) {
            const float4 x = fd_load4(a + 4 * r * a_pitch + k);
            acc[r][0] = fmaf(x.w, b3.x, fmaf(x.z, b2.x, fmaf(x.y, b1.x, fmaf(x.x, b0.x, acc[r][0]))));
            acc[r][1] = fmaf(x.w, b3.y, fmaf(x.z, b2.y, fmaf(x.y, b1.y, fmaf(x.x, b0.y, acc[r][1]))));
            acc[r][2] = fmaf(x.w, b3.z, fmaf(x.z, b2.z, fmaf(x.y, b1.z, fmaf(x.x, b0.z, acc[r][2]))));
            acc[r][3] = fmaf(x.w, b3.w, fmaf(x.z, b2.w, fmaf(x.y, b1.w, fmaf(x.x, b0.w, acc[r][3]))));
        }
    }
}

template <int R>
FD_DEVICE void cov_zero(real (&acc)[R][4]) {
    FD_UNROLL
    for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = acc[r][2] = acc[r][3] = 0;
}

// ------------------------------------------------------------------------------------------- similarity

#define STRIP 32   // rows of the result that a block fills at a time
#define SPAN 1024  // columns of them

// out[row, j] = exp(-(v_i - v_j)^2); the rows of all curves are numbered through, `rows` of them. A strip whose rows
// are whole is one run of memory, which begins at a multiple of 16 bytes if `out` does. `vectors` says that it does,
// and that n is at most SPAN or a multiple of 4.
FD_KERNEL similarity(const real *__restrict__ v_bn, real *__restrict__ out_bnn, int64 rows, int64 n, int vectors) {
    FD_SHARED_ARRAY(real, own, STRIP);                // v_i of every row
    FD_SHARED_ARRAY(int, at, STRIP);                  // where its curve begins in
    FD_SHARED_ARRAY(real, others, STRIP + 2 * SPAN);  // the columns' v_j, curve after curve
    const int64 spans = (n + SPAN - 1) / SPAN, strips = (rows + STRIP - 1) / STRIP;
    for (int64 item = blockIdx.x; item < strips * spans; item += gridDim.x) {
        const int64 begin = item / spans * STRIP, first = item % spans * SPAN, curve = begin / n;
        const int here = (int)min((int64)STRIP, rows - begin), width = (int)min((int64)SPAN, n - first);
        const int count = (int)((begin + here - 1) / n - curve + 1) * width;
        fd_syncthreads();
        for (int i = threadIdx.x; i < here; i += THREADS) {
            own[i] = v_bn[begin + i];
            at[i] = (int)((begin + i) / n - curve) * width;
        }
        for (int i = threadIdx.x; i < count; i += THREADS) {
            others[i] = v_bn[(curve + i / width) * n + first + i % width];
        }
        fd_syncthreads();
        real *const out = out_bnn + begin * n + first;
        const int fours = vectors ? here * width / 4 : 0;
        for (int i = threadIdx.x; i < fours; i += THREADS) {
            int row = 4 * i / width, j = 4 * i - row * width;
            real *const to = out + row * n + j;
            real y[4];
            FD_UNROLL
            for (int c = 0; c < 4; c++) {
                const real difference = own[row] - others[at[row] + j];
                y[c] = cov_exp(-(difference * difference));
                if (++j == width) j = 0, row++;
                if (row == here) row = 0;  // beyond the last value, which is not looked at again
            }
            fd_store4(to, make_float4(y[0], y[1], y[2], y[3]));
        }
        for (int i = 4 * fours + threadIdx.x; i < here * width; i += THREADS) {
            const int row = i / width, j = i % width;
            const real difference = own[row] - others[at[row] + j];
            out[row * n + j] = cov_exp(-(difference * difference));
        }
    }
}

// ------------------------------------------------------------------------------------------- maps of rows

#define LANE_ROWS 8  // of a lane: a warp makes 32 rows times 32 columns

// Block q of a row of x (.., width), or of the normals of that row where x is null. Places beyond the row's end meet
// zeros of the matrix.
FD_DEVICE float4 row_block(const real *x, int64 width, int64 row, int64 q, uint64 first_row, uint32 step,
                           uint32 stream, const RoundKeys &keys) {
    if (!x) return fd_normals(first_row + row, (uint32)q, step, stream, keys);
    const int64 quarter = (width + 3) / 4, left = width - q;
    x += row * width + q;
    return make_float4(x[0], quarter < left ? x[quarter] : 0, 2 * quarter < left ? x[2 * quarter] : 0,
                       3 * quarter < left ? x[3 * quarter] : 0);
}

// Subtracts from a row its mean and divides it by its standard deviation, in place. One warp; sums in float64, so that
// the mean of equal values is their value.
FD_DEVICE void standardise_row(real *y, int64 k) {
    const int lane = threadIdx.x % FD_WARP;
    double sum = 0, squares = 0;
    for (int64 j = lane; j < k; j += FD_WARP) sum += y[j];
    const real mean = (real)(warp_sum(sum) / (double)k);
    for (int64 j = lane; j < k; j += FD_WARP) {
        const real difference = y[j] - mean;
        squares += (double)difference * difference;
    }
    const real deviation = (real)sqrt(warp_sum(squares) / (double)k), divisor = deviation > 0 ? deviation : 1;
    for (int64 j = lane; j < k; j += FD_WARP) y[j] = (y[j] - mean) / divisor;
}

FD_KERNEL standardise_rows(real *__restrict__ y_mk, int64 m, int64 k) {
    const int64 warps = (int64)gridDim.x * WARPS;
    for (int64 row = (int64)blockIdx.x * WARPS + threadIdx.x / FD_WARP; row < m; row += warps) {
        standardise_row(y_mk + row * k, k);
    }
}

// out = x scale + (a left) right + offset, or + a left where rank is 0; each of the four may be null. a (m, p) and
// x (m, k) are usually one array; null stands for normals by the noise law. The packed matrices are left (p, rank) or
// (p, k), and right (rank, k). `rows` is 32, 64, 128 or 256; a's columns are staged `chunk` at a time, a multiple of 4.
//
// A block makes `rows` rows times `width` columns at a time; with a rank all columns, one group after another, from
// a left in shared memory. Shared memory: the tile of a, the result before scale and offset, a left. `standardise` is
// for blocks that make whole rows.
FD_KERNEL map_rows(const real *a_mp, const real *x_mk, real *out_mk, const real *scale, const real *left,
                   const real *right, const real *offset, int64 m, int64 p, int64 rank, int64 k, int rows, int chunk,
                   int standardise, uint64 first_row, uint32 step, uint32 stream, RoundKeys keys) {
    FD_SHARED(real, tile);
    const int thread = threadIdx.x, lane = thread % FD_WARP, warp = thread / FD_WARP, pieces = rows / 32;
    const int width = THREADS / pieces;                         // columns of a group
    const int first = warp % pieces * 32 + lane / 8;            // this lane's rows are first, first + 4, ...
    const int column = warp / pieces * 32 + lane % 8 * 4;       // and its columns, within a group
    const int64 p4 = left ? cov_round4(p) : 0, rank4 = cov_round4(rank), k4 = cov_round4(k), quarter = k4 / 4;
    const int pitch = cov_pitch(chunk), result_pitch = cov_pitch(min((int64)width, k4)), inner_pitch = cov_pitch(rank4);
    real *const result = tile + rows * pitch, *const inner = result + rows * result_pitch;
    const bool held = a_mp == x_mk && left && p4 <= chunk;      // what scale needs stays in the tile
    const int64 groups = (k4 + width - 1) / width, across = rank ? 1 : groups, tiles = (m + rows - 1) / rows;
    for (int64 item = blockIdx.x; item < tiles * across; item += gridDim.x) {
        const int64 begin = item / across * rows;
        const int here = (int)min((int64)rows, m - begin);
        // Groups of columns of a left come first, then those of the result.
        const int64 before = (rank4 + width - 1) / width, turns = before + (rank ? groups : 1);
        for (int64 turn = 0; turn < turns; turn++) {
            const int64 group = turn < before ? turn : rank ? turn - before : item % across;
            const int64 j = group * width + column;
            real acc[LANE_ROWS][4];
            cov_zero(acc);
            if (turn == before && rank) fd_syncthreads();  // all of a left is there
            if (turn < before || !rank) {
                const int64 columns = rank ? rank4 : k4;
                const int64 within = min(j, columns - 4);  // lanes beyond the last column do another's work
                for (int64 c = 0; c < p4; c += chunk) {
                    const int count = (int)min((int64)chunk, p4 - c), blocks = count / 4;
                    if (turn == 0 || p4 > chunk) {
                        fd_syncthreads();
                        for (int i = thread; i < rows * blocks; i += THREADS) {
                            const int row = i / blocks, q = i % blocks;
                            fd_store4(tile + row * pitch + 4 * q,
                                      row < here ? row_block(a_mp, p, begin + row, c / 4 + q, first_row, step, stream,
                                                             keys)
                                                 : make_float4(0, 0, 0, 0));
                        }
                        fd_syncthreads();
                    }
                    cov_multiply(acc, tile + first * pitch, pitch, left + c * columns + within, columns, count);
                }
            } else {
                cov_multiply(acc, inner + first * inner_pitch, inner_pitch, right + min(j, k4 - 4), k4, (int)rank4);
            }
            real *const to = turn < before ? inner + j : result + column;
            const int to_pitch = turn < before ? inner_pitch : result_pitch;
            if (j < (turn < before ? rank4 : k4)) {
                FD_UNROLL
                for (int r = 0; r < LANE_ROWS; r++) {
                    fd_store4(to + (first + 4 * r) * to_pitch, make_float4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]));
                }
            }
            if (turn < before) continue;
            fd_syncthreads();
            const int blocks = (int)min((int64)width, k4 - group * width) / 4;
            for (int i = thread; i < here * blocks; i += THREADS) {
                const int row = i / blocks, place = i % blocks * 4;
                const int64 at = group * width + place, q = at / 4;
                float4 y = fd_load4(result + row * result_pitch + place);
                if (scale) {
                    const float4 s = fd_load4(scale + at);
                    const float4 x = held ? fd_load4(tile + row * pitch + at)
                                          : row_block(x_mk, k, begin + row, q, first_row, step, stream, keys);
                    y = make_float4(x.x * s.x + y.x, x.y * s.y + y.y, x.z * s.z + y.z, x.w * s.w + y.w);
                }
                if (offset) {
                    const float4 o = fd_load4(offset + at);
                    y = make_float4(y.x + o.x, y.y + o.y, y.z + o.z, y.w + o.w);
                }
                real *const out = out_mk + (begin + row) * k + q;
                out[0] = y.x;
                if (q + quarter < k) out[quarter] = y.y;
                if (q + 2 * quarter < k) out[2 * quarter] = y.z;
                if (q + 3 * quarter < k) out[3 * quarter] = y.w;
            }
            fd_syncthreads();
        }
        if (standardise) {
            for (int row = warp; row < here; row += WARPS) standardise_row(out_mk + (begin + row) * k, k);
        }
    }
}

// ------------------------------------------------------------------------------------------- posterior means

#define DATA_TILE 128   // rows of data at a time, 32 for each of four warps
#define DEPTH 64        // columns of them
#define DEPTH_PITCH 68  // cov_pitch(DEPTH)
#define WEIGHT_PITCH 132

// A tile of rows (.., d) from row `begin` and column `c` on; zeros beyond the last row and column.
FD_DEVICE void stage_rows(real *tile, const real *x, int64 begin, int64 end, int rows, int64 d, int64 c) {
    const int depth = (int)min((int64)DEPTH, d - c), depth4 = (int)cov_round4(depth);
    for (int row = threadIdx.x / FD_WARP; row < rows; row += WARPS) {
        const real *const from = x + (begin + row) * d + c;
        for (int j = threadIdx.x % FD_WARP; j < depth4; j += FD_WARP) {
            tile[row * DEPTH_PITCH + j] = begin + row < end && j < depth ? from[j] : 0;
        }
    }
}

// acc += (x - signal y)^2, for this lane's rows of x, four apart, and rows of y, eight apart.
template <int R>
FD_DEVICE void add_distances(real (&acc)[R][4], const real *x, const real *y, const real (&signal)[R], int depth4) {
    for (int k = 0; k < depth4; k += 4) {
        float4 data[4];
        FD_UNROLL
        for (int c = 0; c < 4; c++) data[c] = fd_load4(y + 8 * c * DEPTH_PITCH + k);
        FD_UNROLL
        for (int r = 0; r < R; r++) {
            const float4 v = fd_load4(x + 4 * r * DEPTH_PITCH + k);
            FD_UNROLL
            for (int c = 0; c < 4; c++) {
                const real d0 = fmaf(-signal[r], data[c].x, v.x), d1 = fmaf(-signal[r], data[c].y, v.y);
                const real d2 = fmaf(-signal[r], data[c].z, v.z), d3 = fmaf(-signal[r], data[c].w, v.w);
                acc[r][c] = fmaf(d3, d3, fmaf(d2, d2, fmaf(d1, d1, fmaf(d0, d0, acc[r][c]))));
            }
        }
    }
}

// Tiles of 8 R rows. While the data pass by, out holds the sum of the weighted rows relative to the greatest exponent
// so far; it is divided by the sum of the weights at the end. Each value of out belongs to one thread.
// Shared memory: tiles of x and of the data, the weights, and for each row the greatest exponent, the sum of the
// weights, and what the sums so far are multiplied by.
template <int R>
FD_DEVICE void posterior_tiles(real *shared, const real *x_md, const real *data_nd, const real *levels, int64 count,
                               real *out_md, real *log_sum_m, int64 m, int64 N, int64 d) {
    constexpr int rows = 8 * R;
    const int lane = threadIdx.x % FD_WARP, warp = threadIdx.x / FD_WARP;
    real *const x = shared, *const data = x + rows * DEPTH_PITCH, *const weights = data + DATA_TILE * DEPTH_PITCH;
    real *const tops = weights + rows * WEIGHT_PITCH, *const totals = tops + rows, *const factors = totals + rows;
    const int mine = warp % 2 * 4 * R + lane / 8, other = warp / 2 * 32 + lane % 8;  // of the distances
    for (int64 begin = (int64)blockIdx.x * rows; begin < m; begin += (int64)gridDim.x * rows) {
        real signal[R], precision[R];  // precision: 1 / (2 noise^2)
        FD_UNROLL
        for (int r = 0; r < R; r++) {
            const int64 level = count == 1 ? 0 : min(begin + mine + 4 * r, m - 1);
            signal[r] = levels[level];
            precision[r] = levels[count + level];
        }
        for (int64 first = 0; first < N; first += DATA_TILE) {
            const bool last = first + DATA_TILE >= N;
            const int near4 = (int)cov_round4(min((int64)DATA_TILE, N - first));
            real acc[R][4];
            cov_zero(acc);
            for (int64 c = 0; c < d; c += DEPTH) {
                fd_syncthreads();
                if (first == 0 || d > DEPTH) stage_rows(x, x_md, begin, m, rows, d, c);
                stage_rows(data, data_nd, first, N, DATA_TILE, d, c);
                fd_syncthreads();
                add_distances(acc, x + mine * DEPTH_PITCH, data + other * DEPTH_PITCH, signal,
                              (int)cov_round4(min((int64)DEPTH, d - c)));
            }
            FD_UNROLL
            for (int r = 0; r < R; r++) {
                FD_UNROLL
                for (int c = 0; c < 4; c++) {
                    weights[(mine + 4 * r) * WEIGHT_PITCH + other + 8 * c] =
                        first + other + 8 * c < N ? -precision[r] * acc[r][c] : NO_WEIGHT;
                }
            }
            fd_syncthreads();
            for (int row = warp; row < rows; row += WARPS) {
                float4 e = fd_load4(weights + row * WEIGHT_PITCH + 4 * lane);
                const real before = first == 0 ? NO_WEIGHT : tops[row], sum = first == 0 ? 0 : totals[row];
                real top = fmaxf(fmaxf(e.x, e.y), fmaxf(e.z, e.w));
                for (int mask = 1; mask < FD_WARP; mask *= 2) top = fmaxf(top, fd_shuffle_xor(top, mask));
                top = fmaxf(top, before);
                e = make_float4(cov_exp(e.x - top), cov_exp(e.y - top), cov_exp(e.z - top), cov_exp(e.w - top));
                fd_store4(weights + row * WEIGHT_PITCH + 4 * lane, e);
                const real factor = cov_exp(before - top);
                const real total = sum * factor + warp_sum((e.x + e.y) + (e.z + e.w));
                fd_syncwarp();  // behind all that read these
                if (lane == 0) {
                    tops[row] = top;
                    totals[row] = total;
                    factors[row] = factor;
                    if (last && begin + row < m) log_sum_m[begin + row] = top + logf(total);
                }
            }
            for (int64 c = 0; c < d; c += DEPTH) {
                const int depth = (int)min((int64)DEPTH, d - c), depth4 = (int)cov_round4(depth);
                fd_syncthreads();
                if (d > DEPTH) {
                    stage_rows(data, data_nd, first, N, DATA_TILE, d, c);
                    fd_syncthreads();
                }
                for (int piece = warp; piece < 4 * ((depth + 31) / 32); piece += WARPS) {
                    const int row = piece % 4 * 2 * R + lane / 8, j = piece / 4 * 32 + lane % 8 * 4;
                    real sums[R / 2][4];
                    cov_zero(sums);
                    cov_multiply(sums, weights + row * WEIGHT_PITCH, WEIGHT_PITCH, data + min(j, depth4 - 4),
                                 DEPTH_PITCH, near4);
                    FD_UNROLL
                    for (int r = 0; r < R / 2; r++) {
                        const int64 at = (begin + row + 4 * r) * d + c + j;
                        const real factor = factors[row + 4 * r], total = totals[row + 4 * r];
                        FD_UNROLL
                        for (int i = 0; i < 4; i++) {
                            if (begin + row + 4 * r >= m || j + i >= depth) continue;
                            const real y = first == 0 ? sums[r][i] : out_md[at + i] * factor + sums[r][i];
                            out_md[at + i] = last ? y / total : y;
                        }
                    }
                }
            }
        }
    }
}

// out = E[x0 | x] for x0 among the rows of data (N, d), and the logarithm of the sum of their weights. levels
// (2, count) holds signal and 1 / (2 noise^2), of every row or, where count is 1, of all. `rows` is 64, or 16 where
// there are few.
FD_KERNEL posterior_mean(const real *__restrict__ x_md, const real *__restrict__ data_nd,
                         const real *__restrict__ levels, real *__restrict__ out_md, real *__restrict__ log_sum_m,
                         int64 m, int64 N, int64 d, int64 count, int rows) {
    FD_SHARED(real, shared);
    if (rows == 64)
        posterior_tiles<8>(shared, x_md, data_nd, levels, count, out_md, log_sum_m, m, N, d);
    else
        posterior_tiles<2>(shared, x_md, data_nd, levels, count, out_md, log_sum_m, m, N, d);
}

// One component more in a running average weighted by exp(constant - |residuals|^2 / 2): a warp takes a row.
FD_KERNEL blend(real *__restrict__ out_md, real *__restrict__ state_m2, const real *__restrict__ parts_md,
                const real *__restrict__ residuals_mr, int64 m, int64 d, int64 r, real constant) {
    const int lane = threadIdx.x % FD_WARP;
    const int64 warps = (int64)gridDim.x * WARPS;
    for (int64 row = (int64)blockIdx.x * WARPS + threadIdx.x / FD_WARP; row < m; row += warps) {
        const real before = state_m2[2 * row], sum = state_m2[2 * row + 1];
        real squares = 0;
        for (int64 j = lane; j < r; j += FD_WARP) {
            const real residual = residuals_mr[row * r + j];
            squares = fmaf(residual, residual, squares);
        }
        const real exponent = constant - 0.5f * warp_sum(squares), top = fmaxf(before, exponent);
        const real weight = cov_exp(exponent - top), total = sum * cov_exp(before - top) + weight;
        const real share = weight / total;
        for (int64 j = lane; j < d; j += FD_WARP) {
            const real old = out_md[row * d + j];
            out_md[row * d + j] = old + share * (parts_md[row * d + j] - old);
        }
        fd_syncwarp();  // behind all that read these
        if (lane == 0) {
            state_m2[2 * row] = top;
            state_m2[2 * row + 1] = total;
        }
    }
}
