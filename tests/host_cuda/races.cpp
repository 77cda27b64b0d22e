// Finds data races in the host run: two accesses to the same memory, one of them a write, that nothing puts in order.
//
// A source compiled with -fsanitize=thread calls the __tsan_ functions below at every access, and with
// -fsanitize=alignment the __ubsan_ one at a wrong address; no sanitizer's library is linked. Every two bytes of watched
// memory, which is shared memory and all arrays that the runtime knows, passed to the launch or not, remember who wrote
// them last and who has read them since. What orders two accesses: one thread made both, or a barrier of their block
// lies between, or fd_syncwarp of their warp. Shuffles do not, nor does anything order two blocks. Atomic additions are
// at odds with plain accesses only. What a launch has touched of the arrays is told, for those who compare launches.
#include "races.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace fd_races {
namespace {

constexpr unsigned warp_size = 32, max_warps = 32;

enum class Kind { read, write, atomic };
enum class Readers : uint8_t { one, warp, block };

struct Access {
    const void *place;  // where in the code; null: there was none
    unsigned block, thread, barriers, warp_barriers;
};

// Two bytes.
struct Cell {
    Access write, read;       // the last ones
    unsigned block;           // of shared memory: whose it is, plus one
    Readers readers;          // who has read since the last write and the last barrier, of the block or the only warp
    bool others;              // whether blocks before the last reader's have, too
    bool added;               // whether the last write was atomic
    bool known;               // whether it was written at all
    bool was_read, written;   // in this launch
};

struct Region {
    uintptr_t begin, end;
    bool shared;
    Cell *cells;
};

std::vector<Region> shared_regions, arrays;  // the arrays in order, apart from each other
Region *last_array;
Access now;  // the thread that runs
unsigned warp_barriers[max_warps];
bool running;
long long accesses;  // of watched memory, in this launch
std::vector<uintptr_t> touched;  // of the arrays, in the last launch: begin, end, and whether it was written, ...
char found[600];

bool inside(const Region &region, uintptr_t address) { return address >= region.begin && address < region.end; }

Region *region_of(uintptr_t address) {
    for (Region &region : shared_regions)
        if (inside(region, address)) return &region;
    if (last_array && inside(*last_array, address)) return last_array;
    const auto behind = std::upper_bound(arrays.begin(), arrays.end(), address,
                                         [](uintptr_t a, const Region &region) { return a < region.begin; });
    if (behind == arrays.begin() || !inside(behind[-1], address)) return nullptr;
    return last_array = &behind[-1];
}

// +0x... is a place in the library, which its user makes a line of it.
unsigned long offset(const void *place) {
    Dl_info info = {};
    dladdr(place, &info);
    return static_cast<unsigned long>(static_cast<const char *>(place) - static_cast<const char *>(info.dli_fbase)) - 1;
}

void report(const char *what, const Region &region, const Access &earlier) {
    const char *where = region.shared ? "shared memory" : "an array";
    const int n = snprintf(found, sizeof found, "block %u, thread %u %s of %s at +%#lx", now.block, now.thread, what, where,
                           offset(now.place));
    if (earlier.place)
        snprintf(found + n, sizeof found - size_t(n), ", which nothing puts behind block %u, thread %u at +%#lx",
                 earlier.block, earlier.thread, offset(earlier.place));
}

bool same_warp(const Access &a) { return a.thread / warp_size == now.thread / warp_size; }

bool ordered(const Access &earlier) {
    if (!earlier.place) return true;
    if (earlier.block != now.block) return false;
    return earlier.thread == now.thread || earlier.barriers != now.barriers ||
           (same_warp(earlier) && earlier.warp_barriers != now.warp_barriers);
}

bool reads_ordered(const Cell &cell) {
    if (cell.others) return false;
    if (!cell.read.place || cell.readers == Readers::one) return ordered(cell.read);
    if (cell.read.block != now.block) return false;
    if (cell.read.barriers != now.barriers) return true;
    return cell.readers == Readers::warp && same_warp(cell.read) && cell.read.warp_barriers != now.warp_barriers;
}

void read(Cell &cell, const Region &region) {
    if (region.shared && !cell.known) return report("reads what was never written", region, {});
    if (!ordered(cell.write)) return report("reads what was written", region, cell.write);
    const Access &last = cell.read;
    const bool own = last.place && last.block == now.block && last.barriers == now.barriers;
    if (!own || (cell.readers != Readers::block && same_warp(last) && last.warp_barriers != now.warp_barriers)) {
        cell.others |= last.place && last.block != now.block;
        cell.readers = Readers::one;
    } else if (last.thread != now.thread) {
        cell.readers = same_warp(last) && cell.readers != Readers::block ? Readers::warp : Readers::block;
    }
    cell.read = now;
}

void write(Cell &cell, const Region &region, bool atomic) {
    if (!ordered(cell.write) && !(atomic && cell.added)) return report("writes what was written", region, cell.write);
    if (!reads_ordered(cell)) return report("writes what was read", region, cell.read);
    cell.write = now;
    cell.read.place = nullptr;
    cell.readers = Readers::one;
    cell.others = false;
    cell.added = atomic;
    cell.known = true;
}

Cell &cell_of(Region &region, uintptr_t address) {
    if (!region.cells) {  // of most arrays nothing is touched
        const size_t cells = (region.end - region.begin + 1) / 2 + 1;
        region.cells = static_cast<Cell *>(calloc(cells, sizeof(Cell)));
        if (!region.cells) abort();
    }
    Cell &cell = region.cells[address / 2 - region.begin / 2];
    if (region.shared && cell.block != now.block + 1) {  // that of another block was other memory
        cell = {};
        cell.block = now.block + 1;
    }
    return cell;
}

void access(const void *at, size_t size, Kind kind, const void *place) {
    if (!running || found[0]) return;
    const uintptr_t address = reinterpret_cast<uintptr_t>(at);
    Region *const region = region_of(address);
    if (!region) return;
    now.place = place;
    accesses++;
    for (uintptr_t a = address / 2 * 2; a < address + size && a < region->end && !found[0]; a += 2) {
        Cell &cell = cell_of(*region, a);
        (kind == Kind::read ? cell.was_read : cell.written) = true;
        if (kind == Kind::read)
            read(cell, *region);
        else
            write(cell, *region, kind == Kind::atomic);
    }
}

}  // namespace

void begin_launch() {
    running = true;
    found[0] = 0;
    accesses = 0;
    last_array = nullptr;
    now = {};
}

void watch_shared(const void *memory, size_t size) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
    shared_regions.push_back({begin, begin + size, true, nullptr});
}

void begin_block(unsigned block) {
    now.block = block;
    barrier();
}

void resume(unsigned thread) {
    now.thread = thread;
    now.warp_barriers = warp_barriers[thread / warp_size];
}

void barrier() { now.barriers++; }

void warp_barrier(unsigned warp) { warp_barriers[warp]++; }

void atomic(const void *address, size_t size) { access(address, size, Kind::atomic, __builtin_return_address(0)); }

// What lies there now is garbage.
void forget(const void *address, size_t size) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
    Region *const region = region_of(begin);
    for (uintptr_t a = begin / 2 * 2; region && a < begin + size && a < region->end; a += 2)
        cell_of(*region, a).known = false;
}

void list_touched() {
    touched.clear();
    for (const Region &region : arrays) {
        if (!region.cells) continue;
        bool before = false;  // whether the cell before was touched as this one
        for (uintptr_t a = region.begin / 2; a < (region.end + 1) / 2; a++) {
            const Cell &cell = region.cells[a - region.begin / 2];
            if (!cell.was_read && !cell.written) {
                before = false;
            } else if (before && touched.back() == cell.written) {
                touched[touched.size() - 2] = 2 * a + 2;
            } else {
                touched.insert(touched.end(), {2 * a, 2 * a + 2, cell.written});
                before = true;
            }
        }
    }
}

const char *end_launch() {
    running = false;
    list_touched();
    for (std::vector<Region> *const regions : {&shared_regions, &arrays}) {
        for (const Region &region : *regions) free(region.cells);
        regions->clear();
    }
    return found[0] ? found : nullptr;
}

}  // namespace fd_races

using fd_races::Kind;

#define SEEN extern "C" __attribute__((visibility("hidden"))) void

// Arrays that the next launch may touch: where each begins and ends, in order, none in another.
extern "C" void fd_races_watch(const uintptr_t *ends, size_t count) {
    fd_races::arrays.clear();
    for (size_t i = 0; i < count; i++) fd_races::arrays.push_back({ends[2 * i], ends[2 * i + 1], false, nullptr});
}

// How often the last launch touched what is watched.
extern "C" long long fd_races_accesses() { return fd_races::accesses; }

// What it touched: a pointer to (begin, end, whether it was written), ..., and how many numbers these are.
extern "C" const uintptr_t *fd_races_touched(size_t *count) {
    *count = fd_races::touched.size();
    return fd_races::touched.data();
}

struct Misaligned {
    const char *file;
    uint32_t line, column;
};

SEEN __ubsan_handle_type_mismatch_v1(const Misaligned *data, const void *address) {
    if (fd_races::running && !fd_races::found[0])
        snprintf(fd_races::found, sizeof fd_races::found, "block %u, thread %u: misaligned address ...%03x at %s:%u",
                 fd_races::now.block, fd_races::now.thread, unsigned(reinterpret_cast<uintptr_t>(address) % 4096),
                 data->file, data->line);
}

#define SEEN_OF(prefix, size)                                                                     \
    SEEN prefix##read##size(void *a) { fd_races::access(a, size, Kind::read, __builtin_return_address(0)); } \
    SEEN prefix##write##size(void *a) { fd_races::access(a, size, Kind::write, __builtin_return_address(0)); }
SEEN_OF(__tsan_, 1)
SEEN_OF(__tsan_, 2)
SEEN_OF(__tsan_, 4)
SEEN_OF(__tsan_, 8)
SEEN_OF(__tsan_, 16)
SEEN_OF(__tsan_unaligned_, 2)
SEEN_OF(__tsan_unaligned_, 4)
SEEN_OF(__tsan_unaligned_, 8)
SEEN_OF(__tsan_unaligned_, 16)
SEEN __tsan_read_range(void *a, unsigned long n) { fd_races::access(a, n, Kind::read, __builtin_return_address(0)); }
SEEN __tsan_write_range(void *a, unsigned long n) { fd_races::access(a, n, Kind::write, __builtin_return_address(0)); }
SEEN __tsan_init() {}
SEEN __tsan_func_entry(void *) {}
SEEN __tsan_func_exit(void *) {}
SEEN __tsan_vptr_update(void *, void *) {}
SEEN __tsan_vptr_read(void *) {}
