// What the verbs of the network (device/vocabulary.py) are with NVSHMEM. One thread calls each of them, never a whole
// warp: NVSHMEM would then take the warp's calls together.
//
// They stay functions of their own, which keep no registers of the kernel's busy while it does something else.

#define __NVSHMEM_NUMBA_SUPPORT__  // all of NVSHMEM's device code from its headers, as nvshmem4py has it for Numba
#include <nvshmem.h>
#include <nvshmemx.h>

namespace {

// Words of `wire` (heap/nvshmem.py). An image is what others have of a rank's control words; some of them are shown
// now and then, the record of an abort never: what is shown may come late.
enum { LAST_NS, OWN, CONTROL_AT, CONTROL_BYTES, IMAGE_AT, SHOWN_AT, SHOWN_BYTES };

using Word = unsigned long long;

__device__ inline void put(const Word *wire, Word source_at, Word target_at, Word num_bytes, Word flag_at, Word word,
                           int peer) {
    char *own = (char *)wire[OWN];
    nvshmem_putmem_signal_nbi(own + target_at, own + source_at, num_bytes, (uint64_t *)(own + flag_at), word,
                              NVSHMEM_SIGNAL_SET, peer);
}

}  // namespace

// Bytes of this rank's segment into that of a peer, and then a word of its flags; offsets are bytes in a segment.
//
// flag_at: below 0, if a later call of this thread, for this peer, has the signal. An abort word takes this rank's
// control words with it: its record is there before.
extern "C" __device__ __noinline__ void flashmoe_put_signal(const Word *wire, int peer, long long source_at,
                                                            long long target_at, long long num_bytes, long long flag_at,
                                                            Word word) {
    char *own = (char *)wire[OWN];
    __threadfence_system();  // what the caller has seen and its block has stored, before the network reads it
    if (flag_at == wire[CONTROL_AT]) {
        put(wire, wire[CONTROL_AT], wire[IMAGE_AT], wire[CONTROL_BYTES], flag_at, word, peer);
    } else if (flag_at < 0) {
        nvshmem_putmem_nbi(own + target_at, own + source_at, num_bytes, peer);
        nvshmem_fence();
    } else if (num_bytes == 0) {
        nvshmemx_signal_op((uint64_t *)(own + flag_at), word, NVSHMEM_SIGNAL_SET, peer);
    } else {
        put(wire, source_at, target_at, num_bytes, flag_at, word, peer);
    }
}

// Acquire a flag of which a poll has seen that it holds at least `word`: what was put before it can be read after.
extern "C" __device__ __noinline__ Word flashmoe_acquire(uint64_t *flag, Word word) {
    return nvshmem_signal_wait_until(flag, NVSHMEM_CMP_GE, word);
}

// How far this rank is to all ranks of other hosts, if the last time is so long ago. Nobody waits for it.
extern "C" __device__ __noinline__ void flashmoe_push_control(Word *wire, const long long *remote,
                                                              long long num_ranks, Word every_ns) {
    char *own = (char *)wire[OWN];
    Word now_ns, before = *(volatile Word *)&wire[LAST_NS];
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now_ns));
    if (now_ns - before < every_ns || atomicCAS(&wire[LAST_NS], before, now_ns) != before) return;
    for (int peer = 0; peer < num_ranks; peer++) {
        if (remote[peer]) {
            nvshmem_putmem_nbi(own + wire[IMAGE_AT] + wire[SHOWN_AT], own + wire[CONTROL_AT] + wire[SHOWN_AT],
                               wire[SHOWN_BYTES], peer);
        }
    }
}
