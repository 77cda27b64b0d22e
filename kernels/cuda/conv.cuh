// Geometry of convolutions: which pixels meet. For conv.cu (float32) and conv_mma.cu (tensor cores).
//
// Contract. Images are NHWC. Along an axis, output o and tap s meet input q where 0 <= o stride + s - pad - q up < up
// (conv_meets), so a convolution and its input gradient have one form, a gather without atomics: a *target* pixel is
// the sum over its taps of a *source* pixel times a matrix of weights (C, K), transposed for the gradient. Forward,
// the target is the output and the source the input; ADJOINT, the other way round.
//
// Target positions fall into phases, position = index * period + phase, and those of one phase see the source through
// the same taps: source position = index * step + low + i, i = 0 .. taps - 1; what lies outside the source counts as
// zero. Strides make phases of the gradient, upsampling makes phases of the output: nothing is multiplied by a zero
// that is not padding, and a value that is repeated is read once.
//
//   ConvSizes          all sizes, by value, from the backend's conv.py; [0] is along rows, [1] along columns
//   conv_phase<A>      one phase of an axis; conv_phases<A> says how many it has
//   conv_pixel         target pixel m of a phase as (image, index along rows, index along columns); row-major
//   conv_advance       the same, further by a fixed number of pixels, without a division
//   conv_target<A>     the number of that pixel in the target, to be multiplied by the channels
//   conv_sum_image     the sums over an image of a gradient
//   conv_weight<A>     number of the matrix (C, K) that belongs to tap (i, j) of a phase
//
// Weights: without upsampling (sizes.fold = 0) matrix (r, s) of w itself. With it, taps that meet one input value are
// one tap: the matrices are those of *folded* weights, in which every phase has fold[0] x fold[1] places, laid out like
// a kernel of (period fold[0]) x (period fold[1]); conv_meets says which taps of w a place adds up.
//
// Positions and taps have 32 bits; pixel numbers and offsets 64. Sums over taps run with i outermost, then j, then
// channels ascending, so that an output's bits depend on no tile and no batch.

FD_DEVICE int conv_floor(int a, int b) { return a / b - (a % b < 0); }  // for b > 0

struct ConvPhase {
    int phase, period;        // target position = index * period + phase
    int step, low, taps;      // source position = index * step + low + i
    int count;                // indices
    int weight, weight_step;  // place of tap i along this axis = weight + i * weight_step
};

template <bool ADJOINT>
FD_DEVICE ConvPhase conv_phase(const ConvSizes &sizes, int axis, int phase) {
    const int kernel = sizes.kernel[axis], stride = sizes.stride[axis], pad = sizes.pad[axis], up = sizes.up[axis];
    const int up_period = sizes.up_period[axis], stride_period = sizes.stride_period[axis];
    const int size = ADJOINT ? sizes.input[axis] : sizes.output[axis];
    ConvPhase p;
    int high;
    if (ADJOINT) {
        p.period = stride_period, p.step = up_period;
        const int at = phase * up + pad;
        p.low = conv_floor(at - kernel + stride, stride), high = conv_floor(at + up - 1, stride);
        p.weight = phase + pad - p.low * stride, p.weight_step = -stride;
    } else {
        p.period = up_period, p.step = stride_period;
        const int at = phase * stride - pad;
        p.low = conv_floor(at, up), high = conv_floor(at + kernel - 1, up);
        p.weight = 0, p.weight_step = 1;
    }
    p.phase = phase;
    p.taps = max(0, high - p.low + 1);
    p.count = phase < size ? (size - phase - 1) / p.period + 1 : 0;
    if (sizes.fold[axis]) p.weight = phase * sizes.fold[axis], p.weight_step = 1;
    return p;
}

// Pair number n of phases is row phase n / conv_phases(1) and column phase n % conv_phases(1).
template <bool ADJOINT>
FD_DEVICE int conv_phases(const ConvSizes &sizes, int axis) {
    return ADJOINT ? sizes.stride_period[axis] : sizes.up_period[axis];
}

FD_DEVICE bool conv_meets(const ConvSizes &sizes, int axis, int output, int tap, int input) {
    const int within = output * sizes.stride[axis] + tap - sizes.pad[axis] - input * sizes.up[axis];
    return within >= 0 && within < sizes.up[axis];
}

// Places of the weights along an axis: the kernel's taps, or those of the folded one.
template <bool ADJOINT>
FD_DEVICE int conv_places(const ConvSizes &sizes, int axis) {
    return sizes.fold[axis] ? conv_phases<ADJOINT>(sizes, axis) * sizes.fold[axis] : sizes.kernel[axis];
}

template <bool ADJOINT>
FD_DEVICE int conv_weight(const ConvSizes &sizes, const ConvPhase &rows, const ConvPhase &columns, int i, int j) {
    return (rows.weight + i * rows.weight_step) * conv_places<ADJOINT>(sizes, 1) + columns.weight +
           j * columns.weight_step;
}

struct ConvPixel {
    int image, row, column;  // row and column are indices within the phase
};

FD_DEVICE int64 conv_divide(int64 a, int b) {
    return a >> 32 ? a / b : (int64)((uint32)a / (uint32)b);  // a 64-bit division is a call
}

FD_DEVICE ConvPixel conv_pixel(int64 m, const ConvPhase &rows, const ConvPhase &columns) {
    const int64 line = conv_divide(m, columns.count), image = conv_divide(line, rows.count);
    return {(int)image, (int)(line - image * rows.count), (int)(m - line * columns.count)};
}

// Further by conv_pixel(distance).
FD_DEVICE void conv_advance(ConvPixel &pixel, const ConvPixel &distance, const ConvPhase &rows,
                            const ConvPhase &columns) {
    pixel.column += distance.column;
    const int line = pixel.column >= columns.count;
    pixel.column -= line ? columns.count : 0;
    pixel.row += distance.row + line;
    const int image = pixel.row >= rows.count;
    pixel.row -= image ? rows.count : 0;
    pixel.image += distance.image + image;
}

template <bool ADJOINT>
FD_DEVICE int64 conv_target(const ConvSizes &sizes, const ConvPixel &pixel, const ConvPhase &rows,
                            const ConvPhase &columns) {
    const int *const size = ADJOINT ? sizes.input : sizes.output;
    return ((int64)pixel.image * size[0] + pixel.row * rows.period + rows.phase) * size[1] +
           pixel.column * columns.period + columns.phase;
}

// dshift (images, K): the sums over the pixels of every image of dy (images, pixels, K). Item by item a block takes 32
// channels of an image: every eighth pixel, and then the eight sums in order. `parts` holds 256 values.
FD_DEVICE void conv_sum_image(const real *dy, real *dshift, int64 item, int64 pixels, int K, real *parts) {
    const int lane = threadIdx.x % FD_WARP, warps = blockDim.x / FD_WARP, across = (K + FD_WARP - 1) / FD_WARP;
    const int64 image = item / across;
    const int k = (int)(item % across) * FD_WARP + lane;
    for (int part = threadIdx.x / FD_WARP; part < 8; part += warps) {
        real sum = 0;
        for (int64 pixel = part; k < K && pixel < pixels; pixel += 8) sum = sum + dy[(image * pixels + pixel) * K + k];
        parts[part * FD_WARP + lane] = sum;
    }
    fd_syncthreads();
    if (threadIdx.x < FD_WARP && k < K) {
        real sum = parts[lane];
        for (int part = 1; part < 8; part++) sum = sum + parts[part * FD_WARP + lane];
        dshift[image * K + k] = sum;
    }
    fd_syncthreads();
}
