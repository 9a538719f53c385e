// Runs the threads of a block in turns; see emulation.hpp.
#include "emulation.hpp"
#include <cstdlib>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {
extern "C" {
Thread* emulated_thread = nullptr;
const char* emulated_reason = nullptr;                                  // of the last failure
}

static const size_t STACK = (64 << 10) + 7 * 64;                      // not a power of two: stacks would share the lines of a cache
enum State { READY, AT_BLOCK_BARRIER, AT_WARP_BARRIER, DONE };

#if defined(__x86_64__)
// A context is a stack pointer; what the caller keeps in registers lies on its stack. The ABI says which registers these are.
struct Context {
    void* top = nullptr;
};
extern "C" void emulated_switch(void** from, void* to);
asm(R"(
.text
.globl emulated_switch
.type emulated_switch, @function
emulated_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    popq %rcx
    jmp *%rcx
.size emulated_switch, .-emulated_switch
)");
static void change(Context& from, Context& to) { emulated_switch(&from.top, to.top); }
static void begin(Context& context, unsigned char* stack, void (*function)()) {
    void** top = reinterpret_cast<void**>(stack + STACK - 64);          // aligned as after a call
    top[0] = reinterpret_cast<void*>(function);
    top[1] = nullptr;
    context.top = top - 6;
}
#else
struct Context {
    ucontext_t saved;
};
static void change(Context& from, Context& to) { swapcontext(&from.saved, &to.saved); }
static void begin(Context& context, unsigned char* stack, void (*function)()) {
    getcontext(&context.saved);
    context.saved.uc_stack.ss_sp = stack;
    context.saved.uc_stack.ss_size = STACK;
    makecontext(&context.saved, function, 0);
}
#endif

struct Copy {                                                           // of 16 bytes, or of zeros if `from` is null
    void* to;
    const void* from;
    unsigned group;
};

struct Fiber {
    Context context;
    State state;
    Thread seen;
    std::vector<Copy> copies;                                           // that it has asked for and that are not done
    unsigned group;                                                     // that those asked for now belong to
};

static std::vector<Fiber> fibers;
static std::vector<unsigned char> stacks;
static unsigned char slots[1024][2][64];
static Context scheduler;
static void (*body)(void*);
static void* argument;

static unsigned alive[32], waiting[32];                                 // threads of a warp that are not done; at its barrier
static unsigned block_alive, block_waiting;
static std::vector<unsigned> ready;                                     // threads in the order in which they run; one after the other,
static size_t next_ready;                                               // from here on
static unsigned current;

static void go_on(Context& from) {                                      // with the next thread, or, after the last, with the scheduler
    if (next_ready == ready.size() || emulated_reason) return change(from, scheduler);
    current = ready[next_ready++];
    emulated_thread = &fibers[current].seen;
    change(from, fibers[current].context);
}

static void stop(State state) {
    Fiber& fiber = fibers[current];
    fiber.state = state;
    go_on(fiber.context);
}

static void run_fiber() {
    body(argument);
    alive[current / 32]--;
    block_alive--;
    stop(DONE);
}

extern "C" void emulated_block_barrier() {
    block_waiting++;
    stop(AT_BLOCK_BARRIER);
}
extern "C" void emulated_warp_barrier() {
    waiting[current / 32]++;
    stop(AT_WARP_BARRIER);
}
extern "C" void emulated_fail(const char* reason) {
    emulated_reason = reason;
    stop(DONE);
}

static uint64_t random_state;
static uint64_t random_word() {                                         // xorshift64*
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return random_state * 2685821657736338717ull;
}
static unsigned drawn(unsigned below) { return unsigned((random_word() >> 32) * below >> 32); }

static void copy(const Copy& each) {
    each.from ? (void)memcpy(each.to, each.from, 16) : (void)memset(each.to, 0, 16);
}
extern "C" void emulated_copy(void* to, const void* from) {             // done at once or as late as may be: which is drawn
    Fiber& fiber = fibers[current];
    const Copy asked{to, from, fiber.group};
    drawn(2) ? copy(asked) : fiber.copies.push_back(asked);
}
extern "C" void emulated_commit() { fibers[current].group++; }
extern "C" void emulated_wait(unsigned later) {
    Fiber& fiber = fibers[current];
    std::vector<Copy> left;
    for (const Copy& each : fiber.copies)
        if (each.group + later < fiber.group) copy(each);
        else left.push_back(each);
    fiber.copies.swap(left);
}

static void shuffle(std::vector<unsigned>& order) {                     // of at most 1024; a word is enough for three draws
    uint64_t word = 0;
    for (unsigned i = unsigned(order.size()); i > 1; i--) {
        word = i % 3 && word ? word << 21 : random_word();
        std::swap(order[i - 1], order[(word >> 43) * i >> 21]);
    }
}

// Those of [first, last) that wait are ready again.
static void release(unsigned first, unsigned last, State state) {
    for (unsigned i = first; i < last; i++)
        if (fibers[i].state == state) {
            fibers[i].state = READY;
            ready.push_back(i);
        }
}

static bool run_block(unsigned threads) {
    ready.resize(threads);
    for (unsigned i = 0; i < threads; i++) ready[i] = i;
    block_alive = threads, block_waiting = 0;
    for (unsigned warp = 0; warp < (threads + 31) / 32; warp++) alive[warp] = min(32u, threads - 32 * warp), waiting[warp] = 0;
    while (!ready.empty()) {
        shuffle(ready);
        next_ready = 0;
        go_on(scheduler);
        if (emulated_reason) return false;
        ready.clear();
        for (unsigned warp = 0; warp < (threads + 31) / 32; warp++)
            if (waiting[warp] && waiting[warp] == alive[warp]) {        // all that are not done wait for the same
                release(32 * warp, min(threads, 32 * warp + 32), AT_WARP_BARRIER);
                waiting[warp] = 0;
            }
        if (ready.empty() && block_waiting == block_alive) {
            release(0, threads, AT_BLOCK_BARRIER);
            block_waiting = 0;
        }
    }
    if (block_alive) emulated_reason = "some threads wait at a barrier that others do not reach";
    return !block_alive;
}

extern "C" int emulated_run(void (*function)(void*), void* with, unsigned blocks, unsigned threads, unsigned bytes, unsigned seed) {
    body = function;
    argument = with;
    random_state = 0x9e3779b97f4a7c15ull * (seed + 1);
    emulated_reason = nullptr;
    if (fibers.size() < threads) {
        fibers.resize(threads);
        stacks.resize(threads * STACK + 64);
    }
    unsigned char* aligned = stacks.data() + (64 - reinterpret_cast<size_t>(stacks.data()) % 64) % 64;
    const unsigned first = drawn(blocks);
    for (unsigned turn = 0; turn < blocks; turn++) {
        const unsigned block = (first + turn) % blocks;
        void* memory = nullptr;                                         // anew for each block, and no longer, so that its bounds are known
        if (posix_memalign(&memory, 64, bytes ? bytes : 1)) return 1;
        unsigned char* start = static_cast<unsigned char*>(memory);
        memset(start, 0xff, bytes);                                     // NaN
        for (unsigned i = 0; i < threads; i++) {
            fibers[i].state = READY;
            fibers[i].seen = Thread{{i, 0, 0}, {block, 0, 0}, {threads, 1, 1}, {blocks, 1, 1}, start, &slots[i / 32 * 32], 0};
            fibers[i].copies.clear();
            fibers[i].group = 0;
            begin(fibers[i].context, aligned + i * STACK, run_fiber);
        }
        const bool done = run_block(threads);
        free(memory);
        if (!done) return 1;
    }
    return 0;
}
}
