// What every kernel source is written in. This text and laws.cuh go in front of each source, after the constants that
// runtime.py makes from fastdiff.noise. The same text compiles with NVRTC, with nvcc, and, under FD_HOST, with g++.
//
// Rules, so that all three agree:
//   - An entry is FD_KERNEL name(parameters) { ... }, or FD_KERNEL FD_BOUNDS(threads, blocks) name(parameters) where
//     the compiler must leave room for so many blocks of so many threads on a multiprocessor. Parameters are numbers
//     of the types below (or int, float, double), pointers to them, or a structure that runtime.py declares;
//     runtime.py reads the types from here.
//   - Shared memory comes through FD_SHARED and FD_SHARED_ARRAY and holds garbage at first. Both give a plain pointer
//     to one dimension, 16-byte aligned.
//   - Barriers and shuffles come through the fd_ functions: all threads of the block, all lanes of the warp take part.
//     A block that shuffles has whole warps. So do matrix products: fd_ldmatrix_x4, fd_mma_m16n8k16.
//   - What fd_cp_async16 copies is there for its thread after fd_cp_async_wait, for others after a barrier behind that.
//   - Threads and grids have one dimension: threadIdx.x, blockIdx.x, blockDim.x, gridDim.x.
//   - Indices are int64; every loop has its tail.

typedef int int32;
typedef unsigned int uint32;
typedef long long int64;
typedef unsigned long long uint64;
typedef unsigned short bf16;  // the upper half of a float; two of them in a uint32, the first one low

#ifndef FD_REAL
#define FD_REAL float
#endif
typedef FD_REAL real;

#ifdef FD_HOST
#include "shim.hpp"
#else

#define FD_KERNEL extern "C" __global__ void
#define FD_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define FD_DEVICE static __device__ __forceinline__
#define FD_MEMBER __device__ __forceinline__  // of a structure
#define FD_UNROLL _Pragma("unroll")
#define FD_ROLL _Pragma("unroll 1")  // one at a time, where registers are short

// FD_SHARED(real, tile): the dynamic shared memory of the launch. Once per kernel.
#define FD_SHARED(type, name)                                     \
    extern __shared__ __align__(16) unsigned char fd_dynamic[];   \
    type *const name = reinterpret_cast<type *>(fd_dynamic)
// FD_SHARED_ARRAY(real, sums, 32): static shared memory; count is a constant.
#define FD_SHARED_ARRAY(type, name, count) __shared__ __align__(16) type name[count]

#define fd_syncthreads() __syncthreads()
#define fd_syncwarp() __syncwarp()
#define fd_shuffle(value, lane) __shfl_sync(0xffffffffu, value, lane)
#define fd_shuffle_down(value, delta) __shfl_down_sync(0xffffffffu, value, delta)
#define fd_shuffle_xor(value, mask) __shfl_xor_sync(0xffffffffu, value, mask)
// Bit l: whether it holds in lane l.
#define fd_ballot(condition) __ballot_sync(0xffffffffu, condition)
#define fd_count_bits(bits) __popc(bits)
// Integers only: the sum of floats would depend on the order.
#define fd_atomic_add(address, value) atomicAdd(address, value)

#define fd_product(a, b) __fmul_rn(a, b)  // rounded by itself, never a part of a fused multiply-add

// About 1 / sqrt(x), within 2^-22.9 of it; of a zero the infinity of its sign.
FD_DEVICE float fd_rsqrt(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// About 2^x, within 2^-22 of it, and about 1 / x, within 2^-23; what is below 2^-126 is 0.
FD_DEVICE float fd_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
FD_DEVICE float fd_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// The lesser and the greater of two numbers; of two zeros any, and a NaN where one is there.
FD_DEVICE float fd_least(float a, float b) {
    float c;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}
FD_DEVICE float fd_most(float a, float b) {
    float c;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}

// The whole product, of which compilers know that it is one instruction's.
FD_DEVICE uint64 fd_wide_product(uint32 a, uint32 b) {
    uint64 product;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
    return product;
}
// A quarter turn where bits is not 0: (x, y) becomes (-y, x).
FD_DEVICE void fd_turn_if(uint32 bits, float &x, float &y) {
    const float first = x, second = y;
    asm("{ .reg .pred p; .reg .f32 n; setp.ne.u32 p, %4, 0; neg.f32 n, %3; selp.f32 %0, n, %2, p; "
        "selp.f32 %1, %2, %3, p; }"
        : "=f"(x), "=f"(y)
        : "f"(first), "f"(second), "r"(bits));
}
// A number of which compilers compute nothing ahead of a loop: p[n] is then one 64-bit product and sum.
FD_DEVICE uint32 fd_fresh(uint32 n) {
    asm volatile("" : "+r"(n));
    return n;
}
// A number that compilers do not compute again in every turn of a loop.
FD_DEVICE uint32 fd_kept(uint32 n) {
    asm volatile("mov.b32 %0, %0;" : "+r"(n));
    return n;
}
FD_DEVICE int64 fd_kept(int64 n) {
    asm volatile("mov.b64 %0, %0;" : "+l"(n));
    return n;
}

#define fd_float_bits(x) __float_as_int(x)
#define fd_bits_float(i) __int_as_float(i)

// 16 bytes from global to shared memory while the thread goes on: the first `bytes` of them are read, the others zero.
// Both addresses are multiples of 16, `from` also where bytes is 0. Copies since the last commit are a group.
#define fd_cp_async16(to, from, bytes)                                                                 \
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(fd_shared_address(to)),         \
                 "l"(static_cast<const void *>(from)), "r"(bytes)                                      \
                 : "memory")
#define fd_cp_async_commit() asm volatile("cp.async.commit_group;" ::: "memory")
// Until all but the last n groups of this thread are there; n is a constant.
#define fd_cp_async_wait(n) asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory")

FD_DEVICE uint32 fd_shared_address(const void *p) { return (uint32)__cvta_generic_to_shared(p); }

// Four 8 x 8 matrices of bf16 from shared memory: lane 8 i + j names row j of matrix i, 16 bytes. r[i] becomes the
// values (l / 4, l % 4 * 2) and the one after it in that row of matrix i, l being the lane; or, transposed, the values
// (l % 4 * 2, l / 4) and the one below it.
FD_DEVICE void fd_ldmatrix_x4(uint32 (&r)[4], const bf16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(fd_shared_address(row))
                 : "memory");
}
FD_DEVICE void fd_ldmatrix_x4_trans(uint32 (&r)[4], const bf16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(fd_shared_address(row))
                 : "memory");
}

// d += a b for a (16, 16) and b (16, 8) in bf16, d (16, 8) in float32. In lane l, with g = l / 4 and p = l % 4 * 2:
// a[0] holds (g, p) and (g, p + 1), a[1] the same 8 rows below, a[2] and a[3] both 8 columns on; b0 (p, g) and
// (p + 1, g), b1 8 rows below; d[0] and d[1] (g, p) and (g, p + 1), d[2] and d[3] 8 rows below.
FD_DEVICE void fd_mma_m16n8k16(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats rounded to bf16, to nearest even.
FD_DEVICE uint32 fd_bf16x2(float first, float second) {
    uint32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

#endif

#define FD_WARP 32

// for (int64 i = this thread; i < n; i += all threads)
#define FD_GRID_STRIDE(i, n)                                                                        \
    for (int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x; i < (n); i += (int64)gridDim.x * blockDim.x)

// A grid-stride loop over n rows of `per_row` items that knows the row and the item within it; they are carried along,
// because a 64-bit division an item would cost as much as the noise.
//     for (Walk walk = fd_walk(per_row); walk.row < n; fd_walk_on(walk, per_row))
struct Walk {
    int64 row, item, rows, items;  // where it is, and how far a stride goes
};

FD_DEVICE Walk fd_walk(int64 per_row) {
    const int64 first = (int64)blockIdx.x * blockDim.x + threadIdx.x, stride = (int64)gridDim.x * blockDim.x;
    const int64 row = first / per_row, rows = stride / per_row;
    return {row, first - row * per_row, rows, stride - rows * per_row};
}

FD_DEVICE void fd_walk_on(Walk &walk, int64 per_row) {
    walk.row += walk.rows;
    walk.item += walk.items;
    if (walk.item >= per_row) {
        walk.item -= per_row;
        walk.row++;
    }
}

// What a block works on, where a launch has several tasks, each for some blocks: *mine, in shared memory, becomes its
// task, and its number among the blocks of that is returned.
template <class Tasks, class Task>
FD_DEVICE int fd_find_task(const Tasks &tasks, Task *mine) {
    if (threadIdx.x == 0) {
        int t = 0;
        while (t + 1 < (int)(sizeof(tasks.task) / sizeof(Task)) && tasks.task[t + 1].first <= (int)blockIdx.x) t++;
        *mine = tasks.task[t];
    }
    fd_syncthreads();
    return (int)blockIdx.x - mine->first;
}

// 16 bytes at once, from and to 16-byte aligned addresses.
FD_DEVICE float4 fd_load4(const float *p) { return *reinterpret_cast<const float4 *>(p); }
FD_DEVICE void fd_store4(float *p, float4 v) { *reinterpret_cast<float4 *>(p) = v; }

// Where three values of a Philox block stand: so many values behind the first of them; 0 where the row has ended before.
struct Places {
    uint32 second, third, fourth;
};

// body(row, block, places, arrays ..) for a block of every so many rows; arrays go on by `stride` values from row to row.
template <class Body, class... Array>
FD_DEVICE void fd_each_row(uint64 row, uint64 end, int64 rows, uint32 block, const Places &places, int64 stride,
                           Body body, Array *...arrays) {
    FD_ROLL
    for (; row < end; row += rows) {
        const Places fresh = {fd_fresh(places.second), fd_fresh(places.third), fd_fresh(places.fourth)};
        body(row, block, fresh, arrays...);
        ((arrays += stride), ...);
    }
}

// body(row, block, places, arrays ..) for every block of the n rows from `begin` on, of `width` values, fewer than 2^31;
// what it gets of the arrays begins with the block's first value. A thread keeps to one block, as long as a row has no
// more of them than the grid has threads, and takes it of every so many rows: what depends on the block is computed
// once, and neighbours take neighbours.
template <class Body, class... Array>
FD_DEVICE void fd_each_block(uint64 begin, int64 n, int64 width, Body body, Array *...arrays) {
    const int64 quarter = (width + 3) / 4, thread = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    const int64 threads = (int64)gridDim.x * blockDim.x, first = thread / quarter;
    const int64 rows = threads < quarter ? 1 : threads / quarter, stride = fd_kept(rows * width);
    for (int64 block = thread - first * quarter; first < rows && block < quarter; block += threads) {
        const uint32 step = (uint32)quarter, left = (uint32)(width - block);
        const Places places = {fd_kept(step < left ? step : 0), fd_kept(2 * step < left ? 2 * step : 0),
                               fd_kept(3 * step < left ? 3 * step : 0)};
        fd_each_row(begin + first, begin + n, rows, (uint32)block, places, stride, body,
                    arrays + (first * width + block)...);
    }
}

// body(row, block, quarter, arrays ..) for every four neighbours of n rows of `width` values, a multiple of 16: the
// blocks from `block` on. What it gets of the arrays begins with their first values; the others stand every `quarter`.
template <class Body, class... Array>
FD_DEVICE void fd_each_group(int64 n, int64 width, Body body, Array *...arrays) {
    const Walk walk = fd_walk(width / 16);
    const uint32 groups = (uint32)(width / 16), quarter = (uint32)(width / 4);
    const int64 stride = fd_kept(walk.rows * width + 4 * walk.items), around = fd_kept(stride + width - quarter);
    uint32 item = (uint32)walk.item;
    ((arrays += walk.row * width + 4 * walk.item), ...);
    FD_ROLL
    for (int64 row = walk.row; row < n;) {
        body(row, 4 * item, fd_fresh(quarter), arrays...);
        item += (uint32)walk.items;
        const bool wraps = item >= groups;  // into the next row, as in fd_walk_on
        const int64 on = wraps ? around : stride;
        item -= wraps ? groups : 0;
        row += walk.rows + wraps;
        ((arrays += on), ...);
    }
}

// The four values of a block, the first again for those that are not there.
FD_DEVICE float4 fd_gather(const real *first, const Places &places) {
    return make_float4(first[0], first[places.second], first[places.third], first[places.fourth]);
}

// Stores them. The first one comes last, so that it stays where others that are not there were stored.
FD_DEVICE void fd_scatter(real *first, const Places &places, const float4 &v) {
    first[places.fourth] = v.w;
    first[places.third] = v.z;
    first[places.second] = v.y;
    first[0] = v.x;
}
