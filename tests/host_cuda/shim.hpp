// CUDA C++ on the CPU: what common.cuh asks for, for g++. A block's threads are fibers that run until they wait or
// end; blocks run one after another. It reports what a GPU would leave undefined: a barrier or a shuffle that not all
// reach, threads at different barriers, shuffles of a broken warp. Data races races.cpp finds; the order of threads
// changes what they do.
#pragma once

#include <sys/mman.h>

#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include "races.hpp"

#if defined(__x86_64__) && !defined(FD_HOST_UCONTEXT)
#define FD_HOST_SWITCH 1
#else
#define FD_HOST_SWITCH 0
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Hidden: a kernel called like a function of the C library is not taken for it.
#define FD_KERNEL extern "C" __attribute__((visibility("hidden"))) void
#define FD_BOUNDS(threads, blocks)
#define FD_DEVICE static inline __attribute__((unused))
#define FD_MEMBER
#define FD_UNROLL
#define FD_ROLL

#define FD_SHARED(type, name) type *const name = reinterpret_cast<type *>(fd_host::dynamic_shared())
#define FD_SHARED_ARRAY(type, name, count)  \
    static char name##_site;                \
    type *const name = reinterpret_cast<type *>(fd_host::static_shared(&name##_site, sizeof(type) * (count)))

#define fd_syncthreads() fd_host::wait(fd_host::State::barrier, __FILE__, __LINE__)
#define fd_syncwarp() fd_host::sync_warp(__FILE__, __LINE__)
#define fd_shuffle(value, lane) fd_host::exchange(value, lane, __FILE__, __LINE__)
#define fd_shuffle_down(value, delta) \
    fd_host::exchange(value, fd_host::down(fd_host::lane(), delta), __FILE__, __LINE__)
#define fd_shuffle_xor(value, mask) fd_host::exchange(value, fd_host::lane() ^ (mask), __FILE__, __LINE__)
#define fd_ballot(condition) fd_host::ballot(condition, __FILE__, __LINE__)
#define fd_count_bits(bits) __builtin_popcount(bits)
#define fd_cp_async16(to, from, bytes) fd_host::begin_copy(to, from, bytes)
#define fd_cp_async_commit() fd_host::commit_copies()
#define fd_cp_async_wait(n) fd_host::wait_for_copies(n)
#define fd_ldmatrix_x4(r, row) fd_host::load_matrices(r, row, false, __FILE__, __LINE__)
#define fd_ldmatrix_x4_trans(r, row) fd_host::load_matrices(r, row, true, __FILE__, __LINE__)
#define fd_mma_m16n8k16(d, a, b0, b1) fd_host::multiply_matrices(d, a, b0, b1, __FILE__, __LINE__)

struct dim3 {
    unsigned x, y, z;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) double2 {
    double x, y;
};
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline double2 make_double2(double x, double y) { return {x, y}; }

static dim3 threadIdx, blockIdx, blockDim, gridDim;

#define fd_product(a, b) ((a) * (b))

static inline int fd_float_bits(float x) {
    int i;
    memcpy(&i, &x, 4);
    return i;
}
static inline float fd_bits_float(int i) {
    float x;
    memcpy(&x, &i, 4);
    return x;
}
static inline float fd_rsqrt(float x) { return (float)(1.0 / std::sqrt((double)x)); }
// As far from the true value as a GPU may be, below it or above by the last bit of x; nothing below 2^-126.
static inline float fd_about(double y, float x, double error) {
    const float near = (float)(y * (1 + (fd_float_bits(x) & 1 ? error : -error)));
    return near < 0x1p-126f && near > -0x1p-126f ? 0.0f : near;
}
static inline float fd_exp2(float x) { return fd_about(std::exp2((double)x), x, 0x1p-22); }
static inline float fd_reciprocal(float x) { return fd_about(1.0 / x, x, 0x1p-23); }
static inline float fd_least(float a, float b) { return b < a || b != b ? b : a; }
static inline float fd_most(float a, float b) { return b > a || b != b ? b : a; }
static inline unsigned long long fd_wide_product(uint32_t a, uint32_t b) { return (unsigned long long)a * b; }
static inline void fd_turn_if(uint32_t bits, float &x, float &y) {
    const float first = x, second = y;
    if (bits) x = -second, y = first;
}
static inline long long fd_kept(long long n) { return n; }
static inline uint32_t fd_kept(uint32_t n) { return n; }
static inline uint32_t fd_fresh(uint32_t n) { return n; }
static inline uint32_t fd_bf16x2(float first, float second) {
    uint32_t halves[2];
    const float values[2] = {first, second};
    for (int i = 0; i < 2; i++) {
        const uint32_t bits = (uint32_t)fd_float_bits(values[i]);
        halves[i] = values[i] != values[i] ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
    return halves[0] | halves[1] << 16;
}
template <class T>
FD_UNSEEN static inline T fd_atomic_add(T *address, T value) {
    fd_races::atomic(address, sizeof(T));
    T old = *address;
    *address = old + value;
    return old;
}
using std::isfinite;
using std::max;
using std::min;

namespace fd_host {

constexpr int warp_size = 32, max_threads = 1024;
constexpr size_t page = 4096;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t stack_size = 64 * page;  // instrumented frames are larger
#else
constexpr size_t stack_size = 16 * page;
#endif
constexpr unsigned char poison = 0xff;  // as float or double: NaN

enum class State { fresh, ready, barrier, warp, done };

struct Fiber {
    State state;
    char *stack;
    const char *file;  // where it waits
    int line;
    int round;   // shuffles so far: which of the two slots is next
    int groups;  // of copies that were committed
    bool fence;  // whether what the warp did before is there for all of it: not behind a shuffle
#if FD_HOST_SWITCH
    void *context;
#else
    ucontext_t context;
#endif
    void *fake_stack;
};

// What a lane shows to the others of its warp.
struct alignas(16) Slot {
    unsigned char bytes[32];
};

struct Copy {
    void *to;
    const void *from;
    int bytes, group;
};

struct Shared {
    const void *site;
    unsigned char *memory;
    size_t size;
};

static std::vector<Fiber> fibers(max_threads);
static std::vector<char *> free_stacks;
static std::vector<Shared> shared;
static unsigned char *dynamic_memory;
static size_t static_size;  // of the last launch's shared arrays
static Slot slots[2][max_threads];
static std::vector<std::vector<Copy>> copies(max_threads);  // that have not arrived, thread by thread
static unsigned current;  // thread that runs
static char error[400];
static void (*body)(void **);
static void **arguments;
#if FD_HOST_SWITCH
static void *scheduler;
#else
static ucontext_t scheduler;
#endif
[[maybe_unused]] static void *scheduler_fake_stack;
[[maybe_unused]] static const void *scheduler_bottom;
[[maybe_unused]] static size_t scheduler_size;

#if FD_HOST_SWITCH
// Saves what the calling convention keeps, changes stacks, and returns on the other one.
__attribute__((naked, noinline, used)) static void switch_stacks(void ** /*save*/, void * /*load*/) {
    asm volatile(
        "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

static inline char *take_stack() {
    if (free_stacks.empty()) {
        void *memory = mmap(nullptr, page + stack_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
            perror("host_cuda: stack");
            abort();
        }
        free_stacks.push_back(static_cast<char *>(memory) + page);
    }
    char *stack = free_stacks.back();
    free_stacks.pop_back();
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(stack, stack_size);
#endif
    return stack;
}

// Back to the scheduler, until it lets this fiber go on.
__attribute__((noinline)) static void leave(bool for_good) {
    Fiber &self = fibers[current];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &self.fake_stack, scheduler_bottom, scheduler_size);
#else
    (void)for_good;
#endif
#if FD_HOST_SWITCH
    switch_stacks(&self.context, scheduler);
#else
    swapcontext(&self.context, &scheduler);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
#endif
}

static void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
    body(arguments);
    fibers[current].state = State::done;
    leave(true);
    abort();
}

static void resume(unsigned thread) {
    Fiber &fiber = fibers[thread];
    current = thread;
    threadIdx = {thread, 0, 0};
    fd_races::resume(thread);
    if (fiber.state == State::fresh) {
        fiber.stack = take_stack();
        fiber.fake_stack = nullptr;
#if FD_HOST_SWITCH
        // As if run_thread had been called, which leaves the stack 8 bytes off a multiple of 16, and six registers saved.
        void **top = reinterpret_cast<void **>(fiber.stack + stack_size) - 1;
        *top-- = nullptr;
        *top = reinterpret_cast<void *>(run_thread);
        fiber.context = top - 6;
#else
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack;
        fiber.context.uc_stack.ss_size = stack_size;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_thread, 0);
#endif
    }
    fiber.state = State::ready;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack, stack_size);
#endif
#if FD_HOST_SWITCH
    switch_stacks(&scheduler, fiber.context);
#else
    swapcontext(&scheduler, &fiber.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
    if (fiber.state == State::done) {
        free_stacks.push_back(fiber.stack);
        fiber.stack = nullptr;
    }
}

static inline void wait(State state, const char *file, int line) {
    Fiber &self = fibers[current];
    self.state = state;
    self.file = file;
    self.line = line;
    leave(false);
}

static inline void sync_warp(const char *file, int line) {
    fibers[current].fence = true;
    wait(State::warp, file, line);
    fibers[current].fence = false;
}

static inline unsigned lane() { return threadIdx.x % warp_size; }
static inline unsigned down(unsigned lane, unsigned delta) { return lane + delta < warp_size ? lane + delta : lane; }

// All lanes put a value down, and see those of their warp. Two rounds of slots: a lane can be one ahead, not two.
template <class T>
static inline const Slot *show(const T &value, const char *file, int line) {
    static_assert(sizeof(T) <= sizeof(Slot), "more than a slot holds");
    const unsigned thread = current;
    const int round = fibers[thread].round ^= 1;
    memcpy(&slots[round][thread], &value, sizeof(T));
    wait(State::warp, file, line);
    return &slots[round][thread / warp_size * warp_size];
}

template <class T>
static inline T exchange(T value, unsigned from, const char *file, int line) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    memcpy(&value, &show(value, file, line)[from % warp_size], sizeof(T));
    return value;
}

static inline unsigned ballot(bool condition, const char *file, int line) {
    const Slot *const lanes = show(condition, file, line);
    unsigned bits = 0;
    for (unsigned i = 0; i < warp_size; i++) bits |= unsigned(lanes[i].bytes[0]) << i;
    return bits;
}

// A copy arrives as late as it may, when its thread waits for it; before that there is garbage. Through float4, so that
// UndefinedBehaviorSanitizer sees a wrong alignment.
static inline void begin_copy(void *to, const void *from, int bytes) {
    float4 garbage;
    memset(&garbage, poison, sizeof garbage);
    *static_cast<float4 *>(to) = garbage;
    fd_races::forget(to, sizeof garbage);
    copies[current].push_back({to, from, bytes, fibers[current].groups});
}

static inline void commit_copies() { fibers[current].groups++; }

static inline void wait_for_copies(int n) {
    std::vector<Copy> &waiting = copies[current];
    size_t done = 0;
    for (; done < waiting.size() && waiting[done].group < fibers[current].groups - n; done++) {
        const Copy &copy = waiting[done];
        float4 value = {0, 0, 0, 0};
        if (copy.bytes == 16)
            value = *static_cast<const float4 *>(copy.from);
        else
            memcpy(&value, copy.from, size_t(copy.bytes));
        *static_cast<float4 *>(copy.to) = value;
    }
    waiting.erase(waiting.begin(), waiting.begin() + long(done));
}

// The tensor-core functions by the fragment layouts of the PTX manual ("Warp-level matrix instructions").
template <class T>
static inline void load_matrices(unsigned (&r)[4], const T *row, bool transposed, const char *file, int line) {
    static_assert(sizeof(T) == 2, "matrices of bf16");
    const Slot *const rows = show(*reinterpret_cast<const float4 *>(row), file, line);
    const unsigned across = lane() / 4, along = lane() % 4 * 2;
    for (unsigned i = 0; i < 4; i++) {
        uint16_t pair[2];
        for (unsigned k = 0; k < 2; k++) {
            const unsigned at = transposed ? along + k : across, column = transposed ? across : along + k;
            memcpy(&pair[k], rows[8 * i + at].bytes + 2 * column, 2);
        }
        r[i] = pair[0] | unsigned(pair[1]) << 16;
    }
}

struct Operands {
    unsigned a[4], b[2];
};

static inline float half_of(unsigned pair, unsigned which) {
    return fd_bits_float(int(which ? pair & 0xffff0000u : pair << 16));
}

static bool cut_sums;  // whether matrix products round as tensor cores do

// The sum of products and what they are added to, cut toward zero and not rounded: every term where the last bit of a
// float as large as the largest one is, and then the sum. Hardware keeps as many bits of the terms, or more (Fasi et
// al. 2021, "Numerical behavior of NVIDIA tensor cores").
template <unsigned N>
static inline float cut_sum(const double (&terms)[N]) {
    int top = INT_MIN;
    double sum = 0;
    for (double term : terms) {
        if (!std::isfinite(term)) return float(std::accumulate(terms, terms + N, 0.0));
        if (term != 0) top = std::max(top, std::ilogb(term));
    }
    if (top == INT_MIN) return 0;
    for (double term : terms) sum += std::trunc(std::ldexp(term, 23 - top));
    sum = std::ldexp(sum, top - 23);
    const float nearest = float(sum);
    return std::abs(double(nearest)) > std::abs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}

static inline void multiply_matrices(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                                     const char *file, int line) {
    const Slot *const lanes = show(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}}, file, line);
    for (unsigned i = 0; i < 4; i++) {
        const unsigned row = lane() / 4, column = lane() % 4 * 2 + i % 2;
        double terms[17] = {d[i]};
        for (unsigned k = 0; k < 16; k++) {
            Operands of_a, of_b;
            memcpy(&of_a, &lanes[row * 4 + k % 8 / 2], sizeof of_a);
            memcpy(&of_b, &lanes[column * 4 + k % 8 / 2], sizeof of_b);
            const float a_k = half_of(of_a.a[i / 2 + k / 8 * 2], k % 2), b_k = half_of(of_b.b[k / 8], k % 2);
            if (cut_sums)
                terms[k + 1] = double(a_k) * b_k;
            else
                d[i] += a_k * b_k;
        }
        if (cut_sums) d[i] = cut_sum(terms);
    }
}

static inline unsigned char *dynamic_shared() { return dynamic_memory; }

static inline unsigned char *allocate(size_t size) {
    // Of the exact size, so that AddressSanitizer sees the end.
    void *memory = nullptr;
    if (posix_memalign(&memory, 16, size ? size : 1) != 0) abort();
    memset(memory, poison, size);
    return static_cast<unsigned char *>(memory);
}

static inline unsigned char *static_shared(const void *site, size_t size) {
    for (const Shared &array : shared)
        if (array.site == site) return array.memory;
    shared.push_back({site, allocate(size), size});
    fd_races::watch_shared(shared.back().memory, size);
    return shared.back().memory;
}

static unsigned long long shuffle_state;

static void arrange(std::vector<unsigned> &indices, int order) {
    std::iota(indices.begin(), indices.end(), 0u);
    const size_t n = indices.size();
    if (order == 1)
        for (size_t i = 0; i < n / 2; i++) std::swap(indices[i], indices[n - 1 - i]);
    if (order == 2)
        for (size_t i = n; i > 1; i--) {
            shuffle_state = shuffle_state * 6364136223846793005ull + 1442695040888963407ull;
            std::swap(indices[i - 1], indices[(shuffle_state >> 33) % i]);
        }
}

// Lets the threads first .. last - 1 go on if all of them wait for one another. False: an error was written.
static bool release(State state, unsigned first, unsigned last, const char *group, const char *what) {
    unsigned waiting = 0, other = last;
    const Fiber *where = nullptr;
    for (unsigned i = first; i < last; i++) {
        const Fiber &fiber = fibers[i];
        if (fiber.state != state) {
            other = i;
            continue;
        }
        waiting++;
        if (where && (where->line != fiber.line || strcmp(where->file, fiber.file) != 0)) {
            snprintf(error, sizeof error, "block %u: threads of one %s wait at different %ss: %s:%d and %s:%d",
                     blockIdx.x, group, what, where->file, where->line, fiber.file, fiber.line);
            return false;
        }
        where = &fiber;
    }
    if (waiting == 0) return true;
    if (waiting != last - first || (state == State::warp && waiting != warp_size)) {
        snprintf(error, sizeof error, "block %u: not all threads reached the %s at %s:%d: %u of %u did, thread %u %s",
                 blockIdx.x, what, where->file, where->line, waiting,
                 state == State::warp ? unsigned(warp_size) : last - first, other,
                 other == last ? "does not exist" : fibers[other].state == State::done ? "ended" : "waits elsewhere");
        return false;
    }
    if (state == State::barrier)
        fd_races::barrier();
    else if (where->fence)
        fd_races::warp_barrier(first / warp_size);
    for (unsigned i = first; i < last; i++) fibers[i].state = State::ready;
    return true;
}

static bool run_block(std::vector<unsigned> &threads, int order) {
    const unsigned count = blockDim.x;
    for (const Shared &array : shared) memset(array.memory, poison, array.size);
    fd_races::begin_block(blockIdx.x);
    for (unsigned i = 0; i < count; i++) {
        fibers[i].state = State::fresh, fibers[i].round = fibers[i].groups = 0, fibers[i].fence = false;
        copies[i].clear();
    }
    for (;;) {
        arrange(threads, order);
        for (unsigned i : threads)
            if (fibers[i].state == State::fresh || fibers[i].state == State::ready) resume(i);
        // Every thread now waits or has ended. Warps go first: their lanes may be on the way to the barrier.
        bool any_warp = false, all_done = true, all_at_barrier = true;
        for (unsigned i = 0; i < count; i++) {
            any_warp |= fibers[i].state == State::warp;
            all_done &= fibers[i].state == State::done;
            all_at_barrier &= fibers[i].state == State::barrier;
        }
        if (all_done) return true;
        if (any_warp) {
            // In order 1 one warp goes on alone, up to a barrier: as far ahead of the others as a GPU may let it run.
            const unsigned warps = (count + warp_size - 1) / warp_size;
            bool alone = false;
            for (unsigned k = 0; k < warps && !alone; k++) {
                const unsigned first = (order == 1 ? warps - 1 - k : k) * warp_size;
                const unsigned last = first + warp_size < count ? first + warp_size : count;
                for (unsigned i = first; order == 1 && i < last; i++) alone |= fibers[i].state == State::warp;
                if (!release(State::warp, first, last, "warp", "shuffle")) return false;
            }
        } else if (!release(State::barrier, 0, count, "block", "barrier")) {
            return false;
        }
    }
}

// Runs a kernel; returns nullptr or what went wrong.
static const char *launch(void (*kernel)(void **), void **args, unsigned grid, unsigned block, size_t shared_bytes,
                          int order, unsigned seed) {
    if (grid < 1 || block < 1 || block > max_threads) {
        snprintf(error, sizeof error, "a launch of %u blocks of %u threads", grid, block);
        return error;
    }
    body = kernel;
    arguments = args;
    gridDim = {grid, 1, 1};
    blockDim = {block, 1, 1};
    shuffle_state = seed;
    error[0] = 0;
    dynamic_memory = allocate(shared_bytes);
    fd_races::begin_launch();
    fd_races::watch_shared(dynamic_memory, shared_bytes);
    std::vector<unsigned> blocks(grid), threads(block);
    arrange(blocks, order);
    bool good = true;
    for (unsigned b : blocks) {
        blockIdx = {b, 0, 0};
        memset(dynamic_memory, poison, shared_bytes);
        if (!(good = run_block(threads, order))) break;
    }
    for (Fiber &fiber : fibers)  // abandoned by an error
        if (fiber.stack) free_stacks.push_back(fiber.stack), fiber.stack = nullptr;
    static_size = 0;
    for (const Shared &array : shared) {
        static_size += (array.size + 15) / 16 * 16;
        free(array.memory);
    }
    shared.clear();
    free(dynamic_memory);
    const char *const race = fd_races::end_launch();
    if (good && race) snprintf(error, sizeof error, "%s", race), good = false;
    return good ? nullptr : error;
}

}  // namespace fd_host

extern "C" __attribute__((used)) size_t fd_static_shared() { return fd_host::static_size; }
extern "C" __attribute__((used)) void fd_cut_sums(int on) { fd_host::cut_sums = on; }
