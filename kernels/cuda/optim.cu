// The optimiser: the norm of the gradient, then AdamW with clipping and a moving average in one pass.
//
// The norm is a sum in float64 in two stages, and its order is fixed: a block adds a chunk, one block adds the chunks.
// It stays on the device: state[0] is the norm, state[1] what the gradient is scaled by. Loss and norm of a training step
// go to a row of `results`, which the host reads after many steps.

#define CHUNK 4096
#define SUM_THREADS 256

// The sum over the block, in thread 0. sums holds SUM_THREADS values.
FD_DEVICE double block_sum(double value, double *sums) {
    sums[threadIdx.x] = value;
    for (int half = SUM_THREADS / 2; half > 0; half /= 2) {
        fd_syncthreads();
        if ((int)threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) value = sums[0];
    fd_syncthreads();  // before the next sum uses the memory
    return value;
}

FD_KERNEL square_sums(const real *__restrict__ grads, int64 size, double *__restrict__ sums_chunks) {
    FD_SHARED_ARRAY(double, sums, SUM_THREADS);
    const int64 chunks = (size + CHUNK - 1) / CHUNK;
    for (int64 chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        const int64 end = size < (chunk + 1) * CHUNK ? size : (chunk + 1) * CHUNK;
        double sum = 0;
        for (int64 i = chunk * CHUNK + threadIdx.x; i < end; i += SUM_THREADS) sum += (double)grads[i] * grads[i];
        sum = block_sum(sum, sums);
        if (threadIdx.x == 0) sums_chunks[chunk] = sum;
    }
}

// One block. Row step % rows of results (rows, 2) takes loss and norm; a loss that is not finite makes the norm NaN, and
// so does the norm of the row before: after a step that went wrong the others do nothing. `loss` and `results` may be
// null; where `step_at` is not, it holds the step.
FD_KERNEL finish_norm(const double *__restrict__ sums_chunks, int64 chunks, double clip_norm,
                      const double *__restrict__ loss, double *__restrict__ state, double *__restrict__ results,
                      int64 rows, uint32 step, const uint32 *__restrict__ step_at) {
    FD_SHARED_ARRAY(double, sums, SUM_THREADS);
    double sum = 0;
    for (int64 i = threadIdx.x; i < chunks; i += SUM_THREADS) sum += sums_chunks[i];
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0) {
        const double value = loss ? *loss : 0, scale = clip_norm / (sqrt(sum) + 1e-6);
        double norm = isfinite(value) ? sqrt(sum) : nan("");
        if (results) {
            const int64 row = (step_at ? *step_at : step) % rows;
            if (!isfinite(results[2 * ((row + rows - 1) % rows) + 1])) norm = nan("");
            results[2 * row] = value;
            results[2 * row + 1] = norm;
        }
        state[0] = norm;
        state[1] = scale < 1 ? scale : 1;
    }
}

// One thread. What differs from one repetition of a training step to the next, where its graph reads it.
FD_KERNEL set_step(uint32 step, AdamWScalars o, uint32 *__restrict__ step_at, AdamWScalars *__restrict__ o_at) {
    *step_at = step;
    *o_at = o;
}

// A gradient whose norm is not finite changes nothing. `o_at` may be null; else it holds the scalars.
FD_KERNEL adamw(real *__restrict__ params, const real *__restrict__ grads, real *__restrict__ m, real *__restrict__ v,
                real *__restrict__ average, int64 size, AdamWScalars o, const AdamWScalars *__restrict__ o_at,
                const double *__restrict__ state) {
    if (!isfinite(state[0])) return;
    if (o_at) o = *o_at;
    const real scale = (real)state[1];
    FD_GRID_STRIDE(i, size) {
        const real g = grads[i] * scale;
        const real first = m[i] + o.one_beta1 * (g - m[i]);
        const real second = v[i] + o.one_beta2 * (g * g - v[i]);
        const real p = params[i] * o.keep - o.rate * (first / (sqrtf(second) * o.root + o.eps));
        m[i] = first;
        v[i] = second;
        params[i] = p;
        average[i] = average[i] + o.one_ema * (p - average[i]);
    }
}
