// Advice to the system about large buffers.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dqo::cpu {

// A fresh buffer costs a page fault every 4 KiB at its first touch: for what is as large as logits, more time than a kernel itself.
// Huge pages make that one every 2 MiB. Only advice: where the system knows no huge pages nothing changes. Buffers from 32 MiB
// (glibc's largest mmap threshold) are mapped for their one owner, so advice about them concerns nobody else; smaller ones are
// left alone.
inline void advise_huge_pages(void* data, std::int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::int64_t kOwnMapping = 32 << 20;
    constexpr std::uintptr_t kHuge = 2 << 20;
    if (bytes < kOwnMapping) return;
    const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
    const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / kHuge * kHuge;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

}  // namespace dqo::cpu
