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

static const size_t STACK = 64 << 10;
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
    ret
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

struct Fiber {
    Context context;
    State state;
    Thread seen;
};

static std::vector<Fiber> fibers;
static std::vector<unsigned char> stacks;
static unsigned char slots[1024][64];
static Context scheduler;
static unsigned current;
static void (*body)(void*);
static void* argument;

static void stop(State state) {
    Fiber& fiber = fibers[current];
    fiber.state = state;
    change(fiber.context, scheduler);
}

static void run_fiber() {
    body(argument);
    stop(DONE);
}

extern "C" void emulated_block_barrier() { stop(AT_BLOCK_BARRIER); }
extern "C" void emulated_warp_barrier() { stop(AT_WARP_BARRIER); }
extern "C" void emulated_fail(const char* reason) {
    emulated_reason = reason;
    stop(DONE);
}

static uint64_t random_state;
static unsigned drawn(unsigned below) {                                 // xorshift64*
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return unsigned((random_state * 2685821657736338717ull >> 32) * below >> 32);
}

// Those that wait are ready again where all of [first, last) that are not done wait for the same.
static bool release(unsigned first, unsigned last, State waiting) {
    bool any = false;
    for (unsigned i = first; i < last; i++) {
        if (fibers[i].state != waiting && fibers[i].state != DONE) return false;
        any |= fibers[i].state == waiting;
    }
    for (unsigned i = first; i < last; i++)
        if (fibers[i].state == waiting) fibers[i].state = READY;
    return any;
}

static bool run_block(unsigned threads) {
    static std::vector<unsigned> order;
    order.resize(threads);
    for (unsigned i = 0; i < threads; i++) order[i] = i;
    for (;;) {
        for (unsigned i = threads - 1; i > 0; i--) std::swap(order[i], order[drawn(i + 1)]);
        bool ran = false;
        for (unsigned i : order) {
            if (fibers[i].state != READY) continue;
            current = i;
            emulated_thread = &fibers[i].seen;
            change(scheduler, fibers[i].context);
            ran = true;
            if (emulated_reason) return false;
        }
        bool freed = false;
        for (unsigned first = 0; first < threads; first += 32)
            freed |= release(first, first + 32 < threads ? first + 32 : threads, AT_WARP_BARRIER);
        if (freed || release(0, threads, AT_BLOCK_BARRIER) || ran) continue;
        for (unsigned i = 0; i < threads; i++)
            if (fibers[i].state != DONE) {
                emulated_reason = "some threads wait at a barrier that others do not reach";
                return false;
            }
        return true;
    }
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
            fibers[i].seen = Thread{{i, 0, 0}, {block, 0, 0}, {threads, 1, 1}, {blocks, 1, 1}, start, &slots[i / 32 * 32]};
            begin(fibers[i].context, aligned + i * STACK, run_fiber);
        }
        const bool done = run_block(threads);
        free(memory);
        if (!done) return 1;
    }
    return 0;
}
}
