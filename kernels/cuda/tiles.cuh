// Rows that are no multiple of 16 values, in arrays that are 16-byte aligned: a block takes whole rows, a tile, which
// begins at a multiple of 16 bytes. Its threads take the tile's Philox blocks, whose normals go to shared memory, and
// behind a barrier its lines of four neighbours, so that memory is read and written 16 bytes at once whatever the
// width. What a thread takes stands at the same place in every tile. A warp takes blocks that follow each other, and
// all threads of a warp draw, or none.

// N times four values.
template <int N>
struct Fours {
    float4 v[N];
};

enum { TILE_THREADS = 192, TILE_LINES = 4, TILE_ROOM = 4 * TILE_LINES * TILE_THREADS };
// Shared memory of a tile, TILE_BYTES of device.py: its values, and one for each thread that nobody reads.
enum { TILE_FLOATS = TILE_ROOM + TILE_THREADS };

// What a thread takes of every tile.
struct Tiles {
    uint32 row[TILE_LINES], block[TILE_LINES];  // of its Philox blocks
    uint32 at[TILE_LINES][4];                   // places of their values; the first again for one beyond the row
    uint32 line;                                // place of its line 0
    uint32 in_full, in_last;  // of other tiles and the last one: twice the whole lines, and 1 where its warp draws
    uint32 last, rows_on;  // the last tile, and how far it is to the block's next one
    int64 values_on;
};

// Places in a tile are addresses, which compilers would compute anew in every turn from those of pointers.
#ifdef FD_HOST
FD_DEVICE uint32 tile_place(const real *, uint32 value) { return value; }
FD_DEVICE void tile_set(real *tile, uint32 place, real value) { tile[place] = value; }
FD_DEVICE float4 tile_line(const real *tile, uint32 place, int beyond) { return fd_load4(tile + place + beyond); }
#else
FD_DEVICE uint32 tile_place(const real *tile, uint32 value) { return fd_kept(fd_shared_address(tile) + 4 * value); }
FD_DEVICE void tile_set(real *, uint32 place, real value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(place), "f"(value) : "memory");
}
FD_DEVICE float4 tile_line(const real *, uint32 place, int beyond) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(place + 4 * beyond)
                 : "memory");
    return v;
}
#endif

FD_DEVICE void tile_scatter(real *tile, const uint32 (&at)[4], const float4 &v) {
    tile_set(tile, at[3], v.w);
    tile_set(tile, at[2], v.z);
    tile_set(tile, at[1], v.y);
    tile_set(tile, at[0], v.x);  // last: see fd_scatter
}

// A number with the upper half of the first one.
FD_DEVICE uint64 fd_same_half(uint64 upper, uint32 lower) { return (upper & 0xffffffff00000000u) | lower; }

// Where the thread's line k stands in a tile, behind its line 0.
#define TILE_LINE(k) (4 * TILE_THREADS * (k))
#define TILE_EACH \
    FD_UNROLL     \
    for (uint32 k = 0; k < TILE_LINES; k++)

FD_DEVICE void tile_take(float4 *v, const real *p, const bool *whole) {
    TILE_EACH if (whole[k]) v[k] = fd_take4(p + TILE_LINE(k));
}

FD_DEVICE void tile_put(real *p, const float4 *v, const bool *whole) {
    TILE_EACH if (whole[k]) fd_put4(p + TILE_LINE(k), v[k]);
}

// n rows in tiles of so many.
FD_DEVICE Tiles fd_tiles(const real *tile, int64 n, int64 width, int rows) {
    const uint32 t = threadIdx.x, wide = (uint32)width, quarter = (wide + 3) / 4, full = (uint32)rows * quarter;
    const uint32 begin = t / FD_WARP * FD_WARP * TILE_LINES, count = (uint32)((n + rows - 1) / rows);
    const uint32 last = (uint32)(n - (int64)(count - 1) * rows);  // rows of the last tile
    Tiles my;
    my.line = tile_place(tile, 4 * t);
    uint32 in_full = begin < full, in_last = begin < last * quarter;
    TILE_EACH {
        const uint32 item = begin + k * FD_WARP + t % FD_WARP, row = item / quarter, block = item - row * quarter;
        const uint32 first = row * wide + block, left = wide - block, end = 4 * t + TILE_LINE(k) + 4;
        my.row[k] = fd_kept(row), my.block[k] = fd_kept(block);
        FD_UNROLL
        for (uint32 j = 0; j < 4; j++) {
            const uint32 place = first + (j * quarter < left ? j * quarter : 0);
            my.at[k][j] = tile_place(tile, item < full ? place : TILE_ROOM + t);
        }
        in_full += end <= (uint32)rows * wide ? 2 : 0;
        in_last += end <= last * wide ? 2 : 0;
    }
    my.in_full = fd_kept(in_full), my.in_last = fd_kept(in_last), my.last = fd_kept(count - 1);
    my.rows_on = gridDim.x * (uint32)rows, my.values_on = fd_kept((int64)my.rows_on * wide);
    return my;
}

// For every tile of a block: take(row, my, whole, arrays ..) at first, of which lines k where whole[k] may be touched;
// draw(row, block) for Philox blocks, where it DRAWS; put(z, whole, arrays ..) with their normals. `arrays` go on to
// the thread's first line of each tile, `row` to the tile's first row, from the block's first tile on. It has the lower
// half of a row's number: the launcher sees to it that all rows have the same upper half.
template <bool DRAWS, class Take, class Draw, class Put, class... Array>
FD_DEVICE void fd_each_tile(uint32 row, const Tiles &my, real *tile, const Take &take, const Draw &draw, const Put &put,
                            Array *...arrays) {
    if (DRAWS) {  // what nobody writes, of lines that are not whole, is read too
        TILE_EACH fd_store4(tile + 4 * threadIdx.x + TILE_LINE(k), make_float4(0, 0, 0, 0));
        fd_syncthreads();
    }
    FD_ROLL
    for (uint32 i = blockIdx.x; i <= my.last; i += gridDim.x) {
        const uint32 in = i == my.last ? my.in_last : my.in_full;
        bool whole[TILE_LINES];
        TILE_EACH whole[k] = in >= 2 * k + 2;
        take(row, my, whole, arrays...);
        Fours<TILE_LINES> z = {};
        if (DRAWS) {
            if (in & 1) {
                float4 drawn[TILE_LINES];
                TILE_EACH drawn[k] = draw(row + my.row[k], my.block[k]);
                TILE_EACH tile_scatter(tile, my.at[k], drawn[k]);
            }
            fd_syncthreads();
            TILE_EACH z.v[k] = tile_line(tile, my.line, TILE_LINE(k));
        }
        put(z, whole, arrays...);
        if (DRAWS) fd_syncthreads();
        row += my.rows_on;
        ((arrays += my.values_on), ...);
    }
}

// Where the thread's value behind the last whole line stands in an array, -1 where it has none: in the last tile, which
// is still there for the block that took it.
FD_DEVICE int64 fd_tile_rest(const Tiles &my, int64 n, int64 width) {
    const int64 size = n * width, at = size / 4 * 4 + threadIdx.x;
    return my.last % gridDim.x == blockIdx.x && at < size ? at : -1;
}
