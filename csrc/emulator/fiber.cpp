// One fiber for each CUDA thread: a stack, and a switch that saves what a call must preserve.
#include <sys/mman.h>

#include <cstdlib>

#include "machine.h"

#if defined(__SANITIZE_ADDRESS__)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake, const void** bottom, size_t* size);
}
#define MOLE_ASAN(x) x
#else
#define MOLE_ASAN(x)
#endif

#if !defined(__x86_64__) || defined(MOLE_EMU_UCONTEXT)
#define MOLE_EMU_CONTEXTS
#include <ucontext.h>
#endif

namespace emu {
namespace {

#if !defined(MOLE_EMU_CONTEXTS)
// push what the ABI says a callee keeps, swap stacks, pop
asm(R"(
.text
.p2align 4
mole_emu_switch:
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
)");
extern "C" void mole_emu_switch(void** save, void* load) asm("mole_emu_switch");

void swap(void** save, void* load) { mole_emu_switch(save, load); }
#else
// elsewhere: the C library's contexts, slower (a system call each)
void swap(void** save, void* load) {
  ucontext_t here;
  *save = &here;
  swapcontext(&here, static_cast<ucontext_t*>(load));
}
#endif

std::vector<unsigned char*> spare;

const void* main_bottom = nullptr;
size_t main_size = 0;

void body() {
  MOLE_ASAN(__sanitizer_finish_switch_fiber(nullptr, &main_bottom, &main_size);)
  machine->inside = false;
  machine->call(machine->kernel);
  machine->inside = true;
  thread_exits(me());
  switch_back();
  abort();
}

unsigned char* new_stack() {
  if (!spare.empty()) {
    unsigned char* s = spare.back();
    spare.pop_back();
    return s;
  }
  constexpr size_t page = 4096;
  void* p = mmap(nullptr, kStack + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                 -1, 0);
  if (p == MAP_FAILED) fail("host", "no memory for the stack of a thread");
  mprotect(p, page, PROT_NONE);
  return static_cast<unsigned char*>(p) + page;
}

}  // namespace

void start_fiber(Thread& t) {
  if (!t.stack) t.stack = new_stack();
#if !defined(MOLE_EMU_CONTEXTS)
  auto* top = reinterpret_cast<void**>(t.stack + kStack);
  *--top = nullptr;  // so that body sees a stack aligned as after a call
  *--top = reinterpret_cast<void*>(&body);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  t.stack_pointer = top;
#else
  auto* c = reinterpret_cast<ucontext_t*>(t.stack);  // the stack's far end
  getcontext(c);
  c->uc_stack.ss_sp = t.stack + sizeof(ucontext_t);
  c->uc_stack.ss_size = kStack - sizeof(ucontext_t);
  c->uc_link = nullptr;
  makecontext(c, &body, 0);
  t.stack_pointer = c;
#endif
}

void switch_to(Thread& t) {
  machine->current = &t;
  threadIdx = t.id;
  blockIdx = t.cta->id;
  MOLE_ASAN(void* fake; __sanitizer_start_switch_fiber(&fake, t.stack, kStack);)
  swap(&machine->stack_pointer, t.stack_pointer);
  MOLE_ASAN(__sanitizer_finish_switch_fiber(fake, nullptr, nullptr);)
  machine->current = nullptr;
}

void switch_back() {
  Thread& t = me();
  MOLE_ASAN(
      __sanitizer_start_switch_fiber(t.wait == Wait::Done ? nullptr : &t.fake_stack, main_bottom, main_size);)
  swap(&t.stack_pointer, machine->stack_pointer);
  MOLE_ASAN(__sanitizer_finish_switch_fiber(t.fake_stack, &main_bottom, &main_size);)
}

void free_stacks() {
  for (auto& t : machine->threads)
    if (t->stack) spare.push_back(t->stack);
}

}  // namespace emu
