// What the host run tells its race checker, races.cpp. Without FD_RACES there is none.
#pragma once

#include <cstddef>

namespace fd_races {

#ifdef FD_RACES
#define FD_UNSEEN __attribute__((no_sanitize_thread, noinline))  // accesses of this function are not seen

void begin_launch();
void watch_shared(const void *memory, size_t size);
void begin_block(unsigned block);
void resume(unsigned thread);
void barrier();
void warp_barrier(unsigned warp);
void atomic(const void *address, size_t size);
void forget(const void *address, size_t size);
const char *end_launch();
#else
#define FD_UNSEEN

static inline void begin_launch() {}
static inline void watch_shared(const void *, size_t) {}
static inline void begin_block(unsigned) {}
static inline void resume(unsigned) {}
static inline void barrier() {}
static inline void warp_barrier(unsigned) {}
static inline void atomic(const void *, size_t) {}
static inline void forget(const void *, size_t) {}
static inline const char *end_launch() { return nullptr; }
#endif

}  // namespace fd_races
