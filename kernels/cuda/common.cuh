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
//     A block that shuffles has whole warps.
//   - Threads and grids have one dimension: threadIdx.x, blockIdx.x, blockDim.x, gridDim.x.
//   - Indices are int64; every loop has its tail.

typedef int int32;
typedef unsigned int uint32;
typedef long long int64;
typedef unsigned long long uint64;

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
#define FD_UNROLL _Pragma("unroll")

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
// Integers only: the sum of floats would depend on the order.
#define fd_atomic_add(address, value) atomicAdd(address, value)

#define fd_float_bits(x) __float_as_int(x)
#define fd_bits_float(i) __int_as_float(i)

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

// 16 bytes at once, from and to 16-byte aligned addresses.
FD_DEVICE float4 fd_load4(const float *p) { return *reinterpret_cast<const float4 *>(p); }
FD_DEVICE void fd_store4(float *p, float4 v) { *reinterpret_cast<float4 *>(p) = v; }
