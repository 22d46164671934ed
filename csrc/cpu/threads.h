// Splits a range over threads: torch's own OpenMP pool when Python has handed it over, else threads that live for one call.
#pragma once

#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace dqo::cpu {

// GOMP_parallel(function, data, threads, flags): runs function(data) on every thread of a team. GCC's runtime defines it and
// LLVM's and Intel's export it too.
using OpenMpParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// A pool of our own would sit beside torch's, whose workers spin for milliseconds after each operation and keep the cores; so
// its pool is borrowed. 0 gives it back. A forked child does not use it: OpenMP's threads do not survive a fork.
void use_openmp(std::uintptr_t gomp_parallel);
OpenMpParallel openmp();  // nullptr when there is none, or in a forked child

// Calls f(begin, end) on disjoint pieces that cover [0, count). `cost` is a rough number of elements one item touches: a thread
// is worth waking from some ten thousand, and starting (some 20 us) from half a million. f must not depend on how the range is cut.
template <class F>
void parallel_for(std::int64_t count, std::int64_t cost, int threads, const F& f) {
    constexpr std::int64_t kPiecesPerThread = 8;
    const OpenMpParallel parallel = openmp();
    const std::int64_t worth_a_thread = parallel ? 1 << 14 : 1 << 19;
    const std::int64_t worth = 1 + count * (cost > 0 ? cost : 1) / worth_a_thread;
    std::int64_t workers = threads < worth ? threads : worth;
    if (workers > count) workers = count;
    if (workers <= 1) {
        if (count > 0) f(std::int64_t{0}, count);
        return;
    }
    // Small pieces taken in turn: rows that are masked out cost nothing, and cores are not equally free.
    const std::int64_t piece = 1 + (count - 1) / (workers * kPiecesPerThread);
    std::atomic<std::int64_t> next{0};
    auto work = [&] {
        for (std::int64_t begin; (begin = next.fetch_add(piece)) < count;)
            f(begin, begin + piece < count ? begin + piece : count);
    };
    if (parallel) {
        parallel([](void* data) { (*static_cast<decltype(work)*>(data))(); }, &work, static_cast<unsigned>(workers), 0);
        return;
    }
    std::vector<std::thread> others;
    others.reserve(workers - 1);
    try {
        for (std::int64_t i = 1; i < workers; ++i) others.emplace_back(work);
    } catch (const std::system_error&) {  // no more threads to be had: those there are do the work
    }
    work();
    for (std::thread& thread : others) thread.join();
}

}  // namespace dqo::cpu
