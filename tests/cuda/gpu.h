// Plays the threads of a GPU on one core: what CUDA C++ needs to compile and run as C++.
//
// A block's threads are coroutines that take turns at barriers and at instructions of a whole warp.
// Blocks follow one another. A barrier or an instruction that some threads never reach is an error,
// not an endless wait. In which order threads run is STVM_BACKWARDS's to say: a kernel that lacks a
// barrier gives another result backwards.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define alignas(n) __attribute__((aligned(n)))
#define __grid_constant__

typedef _Float16 half;
typedef unsigned int uint;
#define VECTORS(name, element) \
  struct alignas(2 * sizeof(element)) name##2 { element x, y; }; \
  struct alignas(4 * sizeof(element)) name##4 { element x, y, z, w; }; \
  inline name##2 make_##name##2(element x, element y) { return {x, y}; } \
  inline name##4 make_##name##4(element x, element y, element z, element w) { return {x, y, z, w}; }
VECTORS(uint, unsigned)
VECTORS(int, int)
VECTORS(float, float)
VECTORS(longlong, long long)
VECTORS(ulonglong, unsigned long long)
VECTORS(double, double)
VECTORS(half, half)
// Sixteen bits of a float32, rounded to the nearest.
struct nv_bfloat16 {
  unsigned short bits;
  nv_bfloat16() = default;
  nv_bfloat16(float value) {
    unsigned word;
    memcpy(&word, &value, 4);
    bits = value == value ? (word + 0x7fff + (word >> 16 & 1)) >> 16 : word >> 16 | 0x40;
  }
  operator float() const {
    unsigned word = (unsigned)bits << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
  }
};
VECTORS(nv_bfloat16, nv_bfloat16)
struct dim { int x, y, z; };
struct alignas(64) CUtensorMap { const char* data; int64_t sizes[2], stride, box[2], rest[10]; };

namespace gpu {

struct Thread {
  dim index;
  int number;
  bool done = false;
  void* stack_pointer = nullptr;
};

struct Warp {
  int present = 0, arrived = 0;
  long generation = 0;
  char slots[2][32][64];
};

const size_t kStack = 256 << 10;

inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline std::vector<std::unique_ptr<char[]>> stacks;
inline std::vector<char> dynamic;
inline Thread* current;
inline dim block, block_dim, grid_dim;
inline void* scheduler;
inline int waiting, alive;
inline long barriers, progress, turns;
inline void (*body)(void*);
inline void* argument;

extern "C" void stvm_switch(void** from, void* to);
asm(R"(
.text
.globl stvm_switch
.hidden stvm_switch
stvm_switch:
  push %rbx
  push %rbp
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbp
  pop %rbx
  ret
)");

inline long arrived[16];  // at the barriers of some threads, in all

inline void yield() { stvm_switch(&current->stack_pointer, scheduler); }

inline void release() {
  if (alive && waiting == alive) { waiting = 0; ++barriers; ++progress; }
}

inline void barrier() {
  long mine = barriers;
  ++waiting;
  release();
  while (barriers == mine) yield();
}

inline void complete(Warp& warp) {
  if (warp.present && warp.arrived == warp.present) { warp.arrived = 0; ++warp.generation; ++progress; }
}

// Collect as many bytes from all threads of a warp that are there.
inline void gather(const void* mine, void* all, size_t bytes) {
  Warp& warp = warps[current->number / 32];
  long generation = warp.generation;
  memcpy(warp.slots[generation % 2][current->number % 32], mine, bytes);
  ++warp.arrived;
  complete(warp);
  while (warp.generation == generation) yield();
  for (int i = 0; i < 32; ++i)
    memcpy((char*)all + i * bytes, warp.slots[generation % 2][i], bytes);
}

inline void start() {
  body(argument);
  current->done = true;
  --alive;
  --warps[current->number / 32].present;
  ++progress;
  release();
  complete(warps[current->number / 32]);
  yield();
  abort();
}

inline void run_block() {
  size_t count = threads.size();
  warps.assign((count + 31) / 32, Warp());
  alive = count;
  memset(arrived, 0, sizeof(arrived));
  waiting = 0;
  while (stacks.size() < count) stacks.emplace_back(new char[kStack]);
  for (size_t i = 0; i < count; ++i) {
    Thread& t = threads[i];
    t.done = false;
    ++warps[i / 32].present;
    void** top = (void**)(((uintptr_t)stacks[i].get() + kStack) & ~(uintptr_t)15) - 2;
    *top = (void*)start;
    t.stack_pointer = top - 6;
  }
  const bool backwards = getenv("STVM_BACKWARDS") != nullptr;
  long seen = progress;
  for (int idle = 0; alive;) {
    for (size_t i = 0; i < count; ++i) {
      current = &threads[backwards ? count - 1 - i : i];
      if (!current->done) stvm_switch(&scheduler, current->stack_pointer);
    }
    idle = progress == seen ? idle + 1 : 0;
    seen = progress;
    if (idle > 4) { fprintf(stderr, "threads wait for ever\n"); abort(); }
  }
}

inline void launch(void (*function)(void*), void* arguments, dim grid, dim size, size_t bytes) {
  body = function;
  argument = arguments;
  grid_dim = grid;
  block_dim = size;
  dynamic.assign(bytes + 1024, (char)0x7f);  // not what a kernel may rely on
  threads.resize(size.x * size.y * size.z);
  for (int i = 0; i < (int)threads.size(); ++i)
    threads[i] = Thread{{i % size.x, i / size.x % size.y, i / size.x / size.y}, i};
  for (block.z = 0; block.z < grid.z; ++block.z)
    for (block.y = 0; block.y < grid.y; ++block.y)
      for (block.x = 0; block.x < grid.x; ++block.x) run_block();
}

template <class T> T* dynamic_shared() {
  return (T*)(((uintptr_t)dynamic.data() + 1023) & ~(uintptr_t)1023);
}

template <class T> T from_lane(T value, int lane) {
  T all[32];
  gather(&value, all, sizeof(T));
  return all[lane];
}

}  // namespace gpu

#define threadIdx (gpu::current->index)
#define blockIdx (gpu::block)
#define blockDim (gpu::block_dim)
#define gridDim (gpu::grid_dim)

inline int stvm_thread() { return gpu::current->number; }
inline void stvm_yield() { gpu::yield(); }
inline void stvm_progress() { ++gpu::progress; }
inline int stvm_lane() { return gpu::current->number % 32; }
inline void stvm_gather(const void* mine, void* all, size_t bytes) { gpu::gather(mine, all, bytes); }
inline void stvm_sync_threads(int number, int threads) {
  long mine = ++gpu::arrived[number];
  ++gpu::progress;
  while (gpu::arrived[number] < (mine + threads - 1) / threads * threads) gpu::yield();
}
inline void __syncthreads() { gpu::barrier(); }
inline void __syncwarp(unsigned = 0) { int none = 0, all[32]; gpu::gather(&none, all, 4); }
inline unsigned __activemask() { return ~0u; }

template <class T> T __shfl_sync(unsigned, T v, int lane, int width = 32) {
  return gpu::from_lane(v, stvm_lane() / width * width + lane % width);
}
template <class T> T __shfl_down_sync(unsigned, T v, int by, int width = 32) {
  int to = stvm_lane() % width + by;
  return gpu::from_lane(v, to < width ? stvm_lane() + by : stvm_lane());
}
template <class T> T __shfl_up_sync(unsigned, T v, int by, int width = 32) {
  int to = stvm_lane() % width - by;
  return gpu::from_lane(v, to >= 0 ? stvm_lane() - by : stvm_lane());
}
template <class T> T __shfl_xor_sync(unsigned, T v, int mask, int = 32) {
  return gpu::from_lane(v, stvm_lane() ^ mask);
}

template <class A, class B> auto max(A a, B b) { return a > b ? a : b; }
template <class A, class B> auto min(A a, B b) { return a < b ? a : b; }
#define CUDART_INF_F INFINITY
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __tanhf(float x) { return tanhf(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float exp10f(float x) { return powf(10, x); }
inline half __float2half_rn(float x) { return (half)x; }
inline float __half2float(half x) { return (float)x; }
inline nv_bfloat16 __float2bfloat16_rn(float x) { return nv_bfloat16(x); }
inline float __bfloat162float(nv_bfloat16 x) { return (float)x; }
