// The scheduler: fibers of resident clusters, one running at a time, the next one drawn at random.
#include "cuda_emulation.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulation {
namespace {

constexpr std::size_t kStackBytes = 128 * 1024, kLargestExchange = 128;
constexpr std::uint64_t kPatience = 200000;  // times that fibers in a row give way before it is called a deadlock

struct Fiber;

struct Meeting {  // of all fibers of a group; the last one wakes the others
    int expected = 0;
    std::vector<Fiber*> here;
};

struct Warp {
    Meeting meeting;
    unsigned char slots[2][kWarp][kLargestExchange];  // by turns: nobody writes to one that another still reads
    std::size_t sizes[2][kWarp];
};

struct Cluster;

struct Block {
    Cluster* cluster;
    Meeting meeting;
    std::vector<Warp> warps;
    std::vector<Fiber*> fibers;
    std::unique_ptr<unsigned char[]> memory;
    std::size_t bytes;
    unsigned char* shared;
};

struct Cluster {
    Meeting meeting;
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<Fiber*> fibers;
    int alive = 0;
};

struct Store {
    Fiber* by;
    void* address;
    std::size_t size;
    unsigned char value[8];
};

struct Copy {
    void* to;
    const void* from;
    std::size_t size;
};

struct Fiber {
    std::vector<Copy> copies;  // that it has not waited for
    Place place;
    Block* block;
    ucontext_t start;
    jmp_buf context;
    bool started = false;
    int turn = 0;
    void* stack;
};

struct Scheduler {
    const std::function<void()>* kernel = nullptr;
    jmp_buf context;
    Fiber* current = nullptr;
    std::vector<Fiber*> runnable;
    std::vector<Block*> later;  // blocks that have not begun
    std::vector<Store> stores;
    std::uint64_t idle = 0;
};

Scheduler* scheduler = nullptr;
std::uint64_t random_state = 1;
int most_resident = 2;
std::vector<std::uintptr_t> array_ends;
bool trespassed = false;

std::uint64_t draw(std::uint64_t below) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state % below;
}

std::vector<void*>& spare_stacks() {
    static std::vector<void*> stacks;
    return stacks;
}

void* take_stack() {
    if (!spare_stacks().empty()) {
        void* const stack = spare_stacks().back();
        spare_stacks().pop_back();
        return stack;
    }
    void* const stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) throw std::runtime_error("emulation: no memory for another thread's stack");
    return stack;
}

void apply(std::size_t i) {
    auto& stores = scheduler->stores;
    std::memcpy(stores[i].address, stores[i].value, stores[i].size);
    stores[i] = stores.back();
    stores.pop_back();
}

void leave() {  // back to the scheduler; goes on when it is chosen again
    if (_setjmp(scheduler->current->context) == 0) _longjmp(scheduler->context, 1);
}

void meet(Meeting& meeting) {
    Fiber* const self = scheduler->current;
    progress();
    meeting.here.push_back(self);
    if (int(meeting.here.size()) == meeting.expected) {
        for (Fiber* fiber : meeting.here) scheduler->runnable.push_back(fiber);
        meeting.here.clear();
    }
    leave();
}

void body() {
    (*scheduler->kernel)();
    Fiber* const self = scheduler->current;
    release_stores();
    progress();
    --self->block->cluster->alive;
    _longjmp(scheduler->context, 1);
}

std::unique_ptr<Cluster> make_cluster(std::int64_t index, int blocks, int threads, std::size_t shared_bytes) {
    auto cluster = std::make_unique<Cluster>();
    cluster->meeting.expected = cluster->alive = blocks * threads;
    for (int rank = 0; rank < blocks; ++rank) {
        auto block = std::make_unique<Block>();
        block->cluster = cluster.get();
        block->meeting.expected = threads;
        block->warps.resize(threads / kWarp);
        for (Warp& warp : block->warps) warp.meeting.expected = kWarp;
        block->bytes = shared_bytes + 128;
        block->memory = std::make_unique<unsigned char[]>(block->bytes);
        block->shared = reinterpret_cast<unsigned char*>((reinterpret_cast<std::uintptr_t>(block->memory.get()) + 127) / 128 * 128);
        for (int thread = 0; thread < threads; ++thread) {
            auto* const fiber = new Fiber;
            fiber->place = {thread, threads, index * blocks + rank, rank, blocks, block->shared};
            fiber->block = block.get();
            fiber->stack = take_stack();
            cluster->fibers.push_back(fiber);
            block->fibers.push_back(fiber);
        }
        scheduler->later.push_back(block.get());
        cluster->blocks.push_back(std::move(block));
    }
    return cluster;
}

void forget(Cluster& cluster) {
    for (Fiber* fiber : cluster.fibers) {
        spare_stacks().push_back(fiber->stack);
        delete fiber;
    }
    cluster.fibers.clear();
}

void begin_block() {
    std::swap(scheduler->later[draw(scheduler->later.size())], scheduler->later.back());
    Block* const block = scheduler->later.back();
    scheduler->later.pop_back();
    // What another block of the cluster has written into it before is lost.
    std::memset(block->memory.get(), 0xff, block->bytes);
    scheduler->runnable.insert(scheduler->runnable.end(), block->fibers.begin(), block->fibers.end());
    progress();
}

void step() {
    auto& runnable = scheduler->runnable;
    if (!scheduler->later.empty() && (runnable.empty() || draw(1000) == 0)) begin_block();
    const std::size_t i = draw(runnable.size());
    scheduler->current = runnable[i];
    runnable[i] = runnable.back();
    runnable.pop_back();
    if (!scheduler->stores.empty() && draw(4) == 0) apply(draw(scheduler->stores.size()));
    if (_setjmp(scheduler->context) != 0) return;
    Fiber* const fiber = scheduler->current;
    if (fiber->started) _longjmp(fiber->context, 1);
    fiber->started = true;
    getcontext(&fiber->start);
    fiber->start.uc_stack.ss_sp = fiber->stack;
    fiber->start.uc_stack.ss_size = kStackBytes;
    fiber->start.uc_link = nullptr;
    makecontext(&fiber->start, body, 0);
    setcontext(&fiber->start);
}

}  // namespace

const Place& place() { return scheduler->current->place; }
void meet_block() { meet(scheduler->current->block->meeting); }
void meet_cluster() {
    release_stores();
    meet(scheduler->current->block->cluster->meeting);
}
void progress() { scheduler->idle = 0; }
unsigned char* shared_of(int rank) { return scheduler->current->block->cluster->blocks[rank]->shared; }

void give_way() {
    ++scheduler->idle;
    scheduler->runnable.push_back(scheduler->current);
    leave();
}

void exchange(const void* mine, void* other, std::size_t size, int lane) {
    Fiber* const self = scheduler->current;
    Warp& warp = self->block->warps[self->place.thread / kWarp];
    const int turn = self->turn++ % 2, own = self->place.thread % kWarp;
    if (size > kLargestExchange) throw std::logic_error("emulation: an exchange of more bytes than there is room for");
    std::memcpy(warp.slots[turn][own], mine, size);
    warp.sizes[turn][own] = size;
    meet(warp.meeting);
    std::memcpy(other, warp.slots[turn][lane], size);
}

void store_later(void* address, const void* value, std::size_t size) {
    Store store{scheduler->current, address, size, {}};
    std::memcpy(store.value, value, size);
    scheduler->stores.push_back(store);
}

void release_stores() {
    auto& stores = scheduler->stores;
    for (std::size_t i = stores.size(); i-- > 0;)
        if (stores[i].by == scheduler->current) apply(i);
}

void copy_later(void* to, const void* from, std::size_t size) {
    if (draw(2))
        std::memcpy(to, from, size);
    else
        scheduler->current->copies.push_back({to, from, size});
}

void finish_copies() {
    for (const Copy& copy : scheduler->current->copies) std::memcpy(copy.to, copy.from, copy.size);
    scheduler->current->copies.clear();
}

void end_arrays(const std::vector<std::uintptr_t>& addresses) { array_ends = addresses; }

void look_at_word(const void* address) {
    const auto first = reinterpret_cast<std::uintptr_t>(address);
    for (const std::uintptr_t end : array_ends) trespassed = trespassed || (first < end && end < first + 16);
}

void configure(std::uint64_t seed, int resident) {
    random_state = seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du;
    most_resident = resident;
}

void run(std::int64_t blocks, int threads, std::size_t shared_bytes, int cluster, const std::function<void()>& kernel) {
    if (threads % kWarp != 0 || threads > 1024 || blocks % cluster != 0 || cluster > 8 || shared_bytes > 227 * 1024)
        throw std::runtime_error("emulation: a launch that no GPU would take");
    Scheduler own;
    own.kernel = &kernel;
    scheduler = &own;
    trespassed = false;
    std::vector<std::unique_ptr<Cluster>> resident;
    std::string trouble;
    std::vector<std::int64_t> waiting(blocks / cluster);
    std::iota(waiting.begin(), waiting.end(), 0);
    while (trouble.empty()) {
        while (int(resident.size()) < most_resident && !waiting.empty()) {
            // Not in their order: nothing promises it.
            std::swap(waiting[draw(waiting.size())], waiting.back());
            resident.push_back(make_cluster(waiting.back(), cluster, threads, shared_bytes));
            waiting.pop_back();
        }
        if (resident.empty()) break;
        if (own.runnable.empty() && own.later.empty()) {
            trouble = "emulation: threads of a block wait at different barriers";
        } else if (own.idle > kPatience) {
            trouble = "emulation: deadlock, every thread waits for another";
        } else {
            step();
            for (std::size_t i = 0; i < resident.size(); ++i)
                if (resident[i]->alive == 0) {
                    forget(*resident[i]);
                    resident[i] = std::move(resident.back());
                    resident.pop_back();
                    break;
                }
        }
    }
    for (auto& left : resident) forget(*left);
    scheduler = nullptr;
    if (trouble.empty() && trespassed) trouble = "emulation: 16 bytes were touched that lie across the end of an array";
    if (!trouble.empty()) throw std::runtime_error(trouble);
}

}  // namespace emulation
