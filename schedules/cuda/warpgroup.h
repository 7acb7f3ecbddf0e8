// The instructions of Hopper's GPUs that kernels call, each beside a twin in plain loops: copies of
// whole tiles that a barrier in shared memory waits for, and products of four warps at a time whose
// factors lie in shared memory.
//
// Who plays the threads of a block defines, besides what instructions.h asks for, stvm_thread(), the
// number of a thread in its block, stvm_yield(), which lets others run, and stvm_progress(), which
// tells that something happened that others may wait for.
//
// A tile in shared memory is rows of 64 or 128 bytes, the first at a multiple of 1024. Chunks of 16
// bytes of eight rows are swizzled: of an address, bits 4 to 6 are XORed with bits 7 to 9, or with
// rows of 64 bytes bits 4 to 5 with bits 7 to 8.

// Begin counting arrivals; a phase ends when so many came, and all bytes that were announced.
STVM_FUNCTION void stvm_barrier_init(void* barrier, int arrivals);
// Arrive, and announce so many bytes.
STVM_FUNCTION void stvm_barrier_expect(void* barrier, int bytes);
STVM_FUNCTION void stvm_barrier_arrive(void* barrier);
// Wait until a phase of this parity has ended. Before the first, one of parity 1 has.
STVM_FUNCTION void stvm_barrier_wait(void* barrier, int parity);
// Make barriers visible to copies.
STVM_FUNCTION void stvm_fence_barriers();
// Make what this thread wrote to shared memory visible to copies.
STVM_FUNCTION void stvm_fence_shared();
// Copy so many bytes to shared memory; the barrier gets them.
STVM_FUNCTION void stvm_copy_bytes(void* shared, const void* global, int bytes, void* barrier);
// Copy the map's box that begins at this column and row; what is outside of the matrix is 0.
STVM_FUNCTION void stvm_copy_box(void* shared, unsigned long long map, int column, int row,
                                 void* barrier);
// Copy a box, as above, from shared memory to the matrix; what is outside of it stays unwritten. The
// thread that asked for it can wait until its last copies have read shared memory.
STVM_FUNCTION void stvm_store_box(unsigned long long map, int column, int row, const void* shared);
STVM_FUNCTION void stvm_stores_commit();
STVM_FUNCTION void stvm_stores_wait();
// Fetch a map before the first copy of one of its boxes.
STVM_FUNCTION void stvm_prefetch_map(unsigned long long map);
// Wait for so many threads at the block's barrier of this number.
STVM_FUNCTION void stvm_sync_threads(int number, int threads);
// Leave registers to other warpgroups, or take them: so many a thread, a multiple of eight.
#ifdef __CUDACC__
#define STVM_REGISTERS(name, n) \
  STVM_FUNCTION void stvm_##name##_##n() { asm volatile("setmaxnreg." #name ".sync.aligned.u32 " #n ";"); }
#else
#define STVM_REGISTERS(name, n) STVM_FUNCTION void stvm_##name##_##n() {}
#endif
STVM_REGISTERS(dec, 24)
STVM_REGISTERS(inc, 240)
// Before the first of some products, after the last, and until all but so many are done.
STVM_FUNCTION void stvm_products_begin();
STVM_FUNCTION void stvm_products_commit();
STVM_FUNCTION void stvm_products_wait_0();
STVM_FUNCTION void stvm_products_wait_1();
// Two floats as float16, beyond whose range they become its largest.
STVM_FUNCTION stvm_word stvm_pack_finite(float low, float high);
// The sums of two pairs of float16, added in float32.
STVM_FUNCTION stvm_word stvm_add_pairs(stvm_word a, stvm_word b);
// Store four 8 x 8 matrices of float16; thread 8 i + j points at row j of matrix i. Thread l has of
// each matrix rows 2 (l % 4) and the next one of column l / 4.
STVM_FUNCTION void stvm_store_matrices(void* row, stvm_word a, stvm_word b, stvm_word c,
                                       stvm_word d);

#ifdef __CUDACC__

struct alignas(64) CUtensorMap { unsigned long long opaque[16]; };  // as <cuda.h> has it

STVM_FUNCTION stvm_word stvm_shared(const void* p) { return (stvm_word)__cvta_generic_to_shared(p); }

STVM_FUNCTION void stvm_barrier_init(void* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(stvm_shared(barrier)), "r"(arrivals));
}

STVM_FUNCTION void stvm_barrier_expect(void* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :: "r"(stvm_shared(barrier)), "r"(bytes) : "memory");
}

STVM_FUNCTION void stvm_barrier_arrive(void* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(stvm_shared(barrier)) : "memory");
}

STVM_FUNCTION void stvm_barrier_wait(void* barrier, int parity) {
  asm volatile("{ .reg .pred done; again: "
               "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again; }"
               :: "r"(stvm_shared(barrier)), "r"(parity) : "memory");
}

STVM_FUNCTION void stvm_fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
}

STVM_FUNCTION void stvm_fence_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

STVM_FUNCTION void stvm_copy_bytes(void* shared, const void* global, int bytes, void* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1], %2, [%3];"
               :: "r"(stvm_shared(shared)), "l"(global), "r"(bytes), "r"(stvm_shared(barrier))
               : "memory");
}

STVM_FUNCTION void stvm_copy_box(void* shared, unsigned long long map, int column, int row,
                                 void* barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%2, %3}], [%4];"
               :: "r"(stvm_shared(shared)), "l"(map), "r"(column), "r"(row),
                  "r"(stvm_shared(barrier)) : "memory");
}

STVM_FUNCTION void stvm_store_box(unsigned long long map, int column, int row, const void* shared) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
               :: "l"(map), "r"(column), "r"(row), "r"(stvm_shared(shared)) : "memory");
}

STVM_FUNCTION void stvm_stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

STVM_FUNCTION void stvm_stores_wait() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

STVM_FUNCTION void stvm_prefetch_map(unsigned long long map) {
  asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory");
}

STVM_FUNCTION void stvm_sync_threads(int number, int threads) {
  asm volatile("bar.sync %0, %1;" :: "r"(number), "r"(threads) : "memory");
}

STVM_FUNCTION void stvm_products_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

STVM_FUNCTION void stvm_products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

STVM_FUNCTION void stvm_products_wait_0() {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

STVM_FUNCTION void stvm_products_wait_1() {
  asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
}

STVM_FUNCTION stvm_word stvm_pack_finite(float low, float high) {
  stvm_word result;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

STVM_FUNCTION stvm_word stvm_add_pairs(stvm_word a, stvm_word b) {
  float2 x = __half22float2(*(__half2*)&a), y = __half22float2(*(__half2*)&b);
  return stvm_pack_finite(x.x + y.x, x.y + y.y);
}

STVM_FUNCTION void stvm_store_matrices(void* row, stvm_word a, stvm_word b, stvm_word c,
                                       stvm_word d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               :: "r"(stvm_shared(row)), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// Where a tile with rows of so many bytes begins, as products take it.
template <int Bytes> STVM_FUNCTION unsigned long long stvm_tile(const void* first) {
  const unsigned long long swizzle = Bytes == 128 ? 1 : 2;
  return ((stvm_shared(first) & 0x3FFFF) >> 4) | 1ull << 16
         | (unsigned long long)(Bytes * 8 / 16) << 32 | swizzle << 62;
}

#else

struct stvm_counts { int bytes; short waiting; unsigned short arrivals : 15, parity : 1; };

inline void stvm_settle(stvm_counts* b) {
  if (b->waiting || b->bytes) return;
  b->parity ^= 1;
  b->waiting = b->arrivals;
  stvm_progress();
}

inline void stvm_barrier_init(void* barrier, int arrivals) {
  stvm_counts* b = (stvm_counts*)barrier;
  b->bytes = 0;
  b->waiting = b->arrivals = arrivals;
  b->parity = 0;
}

inline void stvm_barrier_expect(void* barrier, int bytes) {
  stvm_counts* b = (stvm_counts*)barrier;
  b->bytes += bytes;
  --b->waiting;
  stvm_settle(b);
}

inline void stvm_barrier_arrive(void* barrier) { stvm_barrier_expect(barrier, 0); }

inline void stvm_barrier_wait(void* barrier, int parity) {
  while (((volatile stvm_counts*)barrier)->parity == parity) stvm_yield();
}

inline void stvm_fence_barriers() {}
inline void stvm_fence_shared() {}

inline void stvm_received(void* barrier, int bytes) {
  ((stvm_counts*)barrier)->bytes -= bytes;
  stvm_settle((stvm_counts*)barrier);
}

inline void stvm_copy_bytes(void* shared, const void* global, int bytes, void* barrier) {
  if ((uintptr_t)shared % 16 || (uintptr_t)global % 16 || bytes % 16) abort();
  memcpy(shared, global, bytes);
  stvm_received(barrier, bytes);
}

// An address of a tile with rows of so many bytes, swizzled.
inline char* stvm_swizzled(const char* address, int row_bytes) {
  uintptr_t at = (uintptr_t)address;
  return (char*)(at ^ (at >> 7 & (row_bytes / 16 - 1)) << 4);
}

inline void stvm_copy_box(void* shared, unsigned long long address, int column, int row,
                          void* barrier) {
  const CUtensorMap* map = (const CUtensorMap*)address;
  const int bytes = map->box[0] * 2;
  if ((uintptr_t)shared % 1024) abort();
  for (int r = 0; r < map->box[1]; ++r)
    for (int c = 0; c < map->box[0]; ++c) {
      bool inside = row + r < map->sizes[1] && column + c < map->sizes[0];
      const char* from = map->data + (row + r) * map->stride + (column + c) * 2;
      short value = 0;
      if (inside) memcpy(&value, from, 2);
      memcpy(stvm_swizzled((char*)shared + r * bytes + c * 2, bytes), &value, 2);
    }
  stvm_received(barrier, bytes * map->box[1]);
}

inline void stvm_store_box(unsigned long long address, int column, int row, const void* shared) {
  const CUtensorMap* map = (const CUtensorMap*)address;
  const int bytes = map->box[0] * 2;
  if ((uintptr_t)shared % 1024) abort();
  for (int r = 0; r < map->box[1] && row + r < map->sizes[1]; ++r)
    for (int c = 0; c < map->box[0] && column + c < map->sizes[0]; ++c) {
      const char* from = stvm_swizzled((const char*)shared + r * bytes + c * 2, bytes);
      memcpy((char*)map->data + (row + r) * map->stride + (column + c) * 2, from, 2);
    }
}

inline void stvm_stores_commit() {}
inline void stvm_stores_wait() {}
inline void stvm_prefetch_map(unsigned long long) {}
inline void stvm_products_begin() {}
inline void stvm_products_commit() {}
// The four warps multiply together: none is done before all are.
inline void stvm_products_wait_0() { stvm_sync_threads(8 + stvm_thread() / 128, 128); }
inline void stvm_products_wait_1() { stvm_products_wait_0(); }

inline stvm_word stvm_pack_finite(float low, float high) {
  float values[2] = {low, high};
  unsigned short bits[2];
  for (int i = 0; i < 2; ++i) {
    float kept = values[i] > 65504 ? 65504 : values[i] < -65504 ? -65504 : values[i];
    _Float16 half = (_Float16)kept;
    memcpy(&bits[i], &half, 2);
  }
  return bits[0] | (stvm_word)bits[1] << 16;
}

inline stvm_word stvm_add_pairs(stvm_word a, stvm_word b) {
  return stvm_pack_finite(stvm_unpack(a, 0) + stvm_unpack(b, 0), stvm_unpack(a, 1) + stvm_unpack(b, 1));
}

inline void stvm_store_matrices(void* row, stvm_word a, stvm_word b, stvm_word c, stvm_word d) {
  char* rows[32];
  stvm_gather(&row, rows, sizeof(row));
  const stvm_word words[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j) {
      unsigned short half = words[i] >> 16 * j;
      memcpy(rows[8 * i + stvm_lane() % 4 * 2 + j] + stvm_lane() / 4 * 2, &half, 2);
    }
}

inline float stvm_element(const void* tile, int row, int column, int row_bytes) {
  _Float16 value;
  memcpy(&value, stvm_swizzled((const char*)tile + row * row_bytes + column * 2, row_bytes), 2);
  return (float)value;
}

// Which row and column of a product an element of a thread's sums is.
inline int stvm_row(int i) { return stvm_thread() / 32 % 4 * 16 + stvm_lane() / 4 + i % 4 / 2 * 8; }
inline int stvm_column(int i) { return i / 4 * 8 + stvm_lane() % 4 * 2 + i % 2; }

template <int Columns>
inline void stvm_products(float* d, const void* a, const void* b, int keep) {
  for (int i = 0; i < Columns / 2; ++i) {
    float sum = keep ? d[i] : 0;
    for (int k = 0; k < 16; ++k)
      sum += stvm_element(a, stvm_row(i), k, 128) * stvm_element(b, stvm_column(i), k, 128);
    d[i] = sum;
  }
}

template <int Columns>
inline void stvm_products_2_of_4(float* d, const void* a, const void* b, stvm_word places,
                                 int keep) {
  stvm_word all[32];
  stvm_gather(&places, all, sizeof(places));
  for (int i = 0; i < Columns / 2; ++i) {
    float sum = keep ? d[i] : 0;
    int row = stvm_row(i) % 16;
    for (int stored = 0; stored < 16; ++stored) {
      stvm_word word = all[row % 8 * 4 + stored / 8];
      int k = stored / 2 * 4 + (word >> (row / 8 * 16 + stored % 8 * 2) & 3);
      sum += stvm_element(a, stvm_row(i), stored, 64) * stvm_element(b, stvm_column(i), k, 128);
    }
    d[i] = sum;
  }
}

#endif
