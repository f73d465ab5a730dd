// A stand-in for the part of NVSHMEM's device code that build/nvshmem.cu calls, for the PTX machine: the calling thread
// copies by itself, as NVSHMEM does where a peer's memory can be reached. Other threads run in between, at every
// instruction; nothing comes later than the call that puts it, which is for the interpreter (kernel/network.py) to show.
//
// Symmetric memory of rank r begins r * STRIDE behind a multiple of MOST_RANKS * STRIDE (tests/ptx_hosts.py).
#pragma once

typedef unsigned long long uint64_t;

enum { NVSHMEM_SIGNAL_SET, NVSHMEM_CMP_GE };

namespace stand_in {

enum : uint64_t { STRIDE = 1 << 18, MOST_RANKS = 8 };

template <typename T> __device__ inline T *on(T *symmetric, int rank) {
    uint64_t in_a_rank = (uint64_t)symmetric & ~((MOST_RANKS - 1) * STRIDE);
    return (T *)(in_a_rank + rank * STRIDE);
}

__device__ inline void signal(uint64_t *flag, uint64_t word) {
    asm volatile("st.release.sys.b64 [%0], %1;" ::"l"(flag), "l"(word) : "memory");
}

// Words are words for whoever reads them meanwhile, such as how far a rank is.
__device__ inline void copy_words(uint64_t *to, const uint64_t *from, uint64_t num_words) {
#pragma unroll 1
    for (uint64_t i = 0; i < num_words; i++) {
        uint64_t word;
        asm volatile("ld.relaxed.sys.b64 %0, [%1];" : "=l"(word) : "l"(from + i) : "memory");
        asm volatile("st.relaxed.sys.b64 [%0], %1;" ::"l"(to + i), "l"(word) : "memory");
    }
}

__device__ inline void copy(char *to, const char *from, uint64_t num_bytes) {
    if ((((uint64_t)to | (uint64_t)from | num_bytes) & 7) == 0) {
        copy_words((uint64_t *)to, (const uint64_t *)from, num_bytes / 8);
        return;
    }
#pragma unroll 1
    for (uint64_t i = 0; i < num_bytes; i += 2) {
        short part;
        asm volatile("ld.b16 %0, [%1];" : "=h"(part) : "l"(from + i) : "memory");
        asm volatile("st.b16 [%0], %1;" ::"l"(to + i), "h"(part) : "memory");
    }
}

}  // namespace stand_in

__device__ inline void nvshmem_putmem_nbi(void *to, const void *from, uint64_t num_bytes, int rank) {
    stand_in::copy((char *)stand_in::on(to, rank), (const char *)from, num_bytes);
}

__device__ inline void nvshmem_putmem_signal_nbi(void *to, const void *from, uint64_t num_bytes, uint64_t *flag,
                                                 uint64_t word, int operation, int rank) {
    nvshmem_putmem_nbi(to, from, num_bytes, rank);
    stand_in::signal(stand_in::on(flag, rank), word);
}

__device__ inline void nvshmemx_signal_op(uint64_t *flag, uint64_t word, int operation, int rank) {
    stand_in::signal(stand_in::on(flag, rank), word);
}

__device__ inline void nvshmem_fence() {}

__device__ inline uint64_t nvshmem_signal_wait_until(uint64_t *flag, int comparison, uint64_t word) {
    uint64_t found;
    do asm volatile("ld.acquire.sys.b64 %0, [%1];" : "=l"(found) : "l"(flag) : "memory");
    while (found < word);
    return found;
}
