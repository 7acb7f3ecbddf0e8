// The instructions of NVIDIA's GPUs that kernels call, each beside a twin in plain loops.
//
// Device code gets the instruction. Where no device compiler is at work the twin takes its place,
// and with it a program that plays the threads of a warp executes the very same kernels on a CPU:
// it defines stvm_lane(), the number of a thread in its warp, and stvm_gather(mine, all, bytes),
// which collects as many bytes of all 32 threads.
//
// A warp multiplies A, 16 x k, by B, k x 8, and adds to D, 16 x 8. Thread l has, with g = l / 4 and
// t = l % 4: of D rows g and g + 8, columns 2t and 2t + 1; of A the same rows, of every eight
// columns 2t and 2t + 1; of B column g, of every eight rows 2t and 2t + 1.

#pragma once

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define STVM_FUNCTION __device__ __forceinline__
#else
#define STVM_FUNCTION inline
#endif

// GELU within 3e-5, for what is stored in 16 bits: the normal distribution's integral as a logistic
// function of a polynomial. An epilogue is bound by its instructions.
STVM_FUNCTION float stvm_gelu(float x) {
  float square = fminf(x * x, 16.0f);
  float power = x * (-2.30112140f + square * (-0.106775725f + square * 0.00101426302f));
#ifdef __CUDACC__
  float share;  // of an infinity it is 0: no care is needed for large numbers, as a division takes
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(power));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(share) : "f"(1.0f + power));
  return x * share;
#else
  return x / (1.0f + exp2f(power));
#endif
}

// The error function within 2e-7 (Abramowitz and Stegun, 7.1.26), in half of the instructions of
// NVIDIA's.
STVM_FUNCTION float stvm_erf(float x) {
  float t = 1.0f / (1.0f + 0.3275911f * fabsf(x));
  float p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f
            + t * 1.061405429f))));
  return copysignf(1.0f - p * expf(-x * x), x);
}

// Wait until all kernels before are done, then let the next one start where it finds room. A
// kernel that is launched before that must do so before it reads or writes what others do.
STVM_FUNCTION void stvm_await_previous() {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait; griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

typedef unsigned int stvm_word;  // two float16 or bfloat16, the first in the lower half

// Copy 16 bytes to shared memory, to be there after a wait; zeros unless `valid`.
STVM_FUNCTION void stvm_copy16(void* shared, const void* global, int valid) {
#ifdef __CUDACC__
  stvm_word address = (stvm_word)__cvta_generic_to_shared(shared);
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(address), "l"(global), "r"(bytes) : "memory");
#else
  for (int i = 0; i < 16; ++i)
    ((char*)shared)[i] = valid ? ((const char*)global)[i] : 0;
#endif
}

// End a group of copies.
STVM_FUNCTION void stvm_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until all but so many of the last groups are there.
#ifdef __CUDACC__
#define STVM_WAIT(n) \
  STVM_FUNCTION void stvm_wait_##n() { asm volatile("cp.async.wait_group " #n ";" ::: "memory"); }
#else
#define STVM_WAIT(n) \
  STVM_FUNCTION void stvm_wait_##n() {}
#endif
STVM_WAIT(0)
STVM_WAIT(1)
STVM_WAIT(2)

// Four 8 x 8 matrices of float16; thread 8 i + j points at row j of matrix i. Thread l gets of each
// matrix columns 2 (l % 4) and the next one of row l / 4.
STVM_FUNCTION void stvm_load_matrices(stvm_word* r, const void* row) {
#ifdef __CUDACC__
  stvm_word address = (stvm_word)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
#else
  const stvm_word* rows[32];
  stvm_gather(&row, rows, sizeof(row));
  for (int i = 0; i < 4; ++i)
    r[i] = rows[8 * i + stvm_lane() / 4][stvm_lane() % 4];
#endif
}

// Four 8 x 8 matrices of float16, each transposed: thread l gets of each matrix rows 2 (l % 4) and the
// next one of column l / 4.
STVM_FUNCTION void stvm_load_transposed(stvm_word* r, const void* row) {
#ifdef __CUDACC__
  stvm_word address = (stvm_word)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
#else
  const unsigned short* rows[32];
  stvm_gather(&row, rows, sizeof(row));
  int column = stvm_lane() / 4, first = stvm_lane() % 4 * 2;
  for (int i = 0; i < 4; ++i)
    r[i] = rows[8 * i + first][column] | (stvm_word)rows[8 * i + first + 1][column] << 16;
#endif
}

// Two float32 as a word of float16, or of bfloat16, the first in its lower half.
STVM_FUNCTION stvm_word stvm_pack(float first, float second) {
#ifdef __CUDACC__
  stvm_word word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
#else
  _Float16 halves[2] = {(_Float16)first, (_Float16)second};
  stvm_word word;
  __builtin_memcpy(&word, halves, sizeof(word));
  return word;
#endif
}
STVM_FUNCTION stvm_word stvm_pack_bfloat16(float first, float second) {
#ifdef __CUDACC__
  stvm_word word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
#else
  stvm_word words[2];
  __builtin_memcpy(words, &first, sizeof(first));
  __builtin_memcpy(words + 1, &second, sizeof(second));
  for (stvm_word& word : words) word = (word + 0x7fff + (word >> 16 & 1)) >> 16;
  return words[0] | words[1] << 16;
#endif
}

// A power of two, to two units in the last place; what is below the normal numbers is 0.
STVM_FUNCTION float stvm_exp2(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// The largest, and the sum, of what four neighbouring threads have, and the sum of a whole warp's.
#ifdef __CUDACC__
#define STVM_SHUFFLED(name, first, last, combined) \
  STVM_FUNCTION float stvm_##name(float a) { \
    for (int by = first; by <= last; by *= 2) { \
      float b = __shfl_xor_sync(~0u, a, by); \
      a = combined; \
    } \
    return a; \
  }
#else
#define STVM_SHUFFLED(name, first, last, combined) \
  inline float stvm_##name(float a) { \
    for (int by = first; by <= last; by *= 2) { \
      float all[32]; \
      stvm_gather(&a, all, sizeof(a)); \
      float b = all[stvm_lane() ^ by]; \
      a = combined; \
    } \
    return a; \
  }
#endif
STVM_SHUFFLED(quad_max, 1, 2, a > b ? a : b)
STVM_SHUFFLED(quad_sum, 1, 2, a + b)
STVM_SHUFFLED(warp_sum, 1, 16, a + b)

// What a half of a word stands for: the lower one for columns 0, 2, ...
STVM_FUNCTION float stvm_unpack(stvm_word word, int column) {
  unsigned short bits = (unsigned short)(word >> (16 * (column % 2)));
  return __half2float(*(const half*)&bits);
}
STVM_FUNCTION float stvm_unpack_bfloat16(stvm_word word, int column) {
  stvm_word bits = column % 2 ? word & 0xffff0000u : word << 16;
  return *(const float*)&bits;
}

// What rounding to float16 leaves, times 2048, as the upper half of a float16: a sign, five bits of
// exponent and two of mantissa. Together they have 14 bits where float16 has 11. Remainders of four
// numbers are a word, the first in its lowest byte.
STVM_FUNCTION stvm_word stvm_pack_remainders(float a, float b, float c, float d) {
  const float numbers[4] = {a, b, c, d};
  stvm_word word = 0;
  for (int i = 0; i < 4; i += 2) {
    stvm_word kept = stvm_pack(numbers[i], numbers[i + 1]);
    float first = numbers[i] - stvm_unpack(kept, 0), second = numbers[i + 1] - stvm_unpack(kept, 1);
    stvm_word rest = stvm_pack(first * 2048.0f, second * 2048.0f) + 0x00800080u;  // rounds
    word |= (rest >> 8 & 0xff | rest >> 16 & 0xff00) << 8 * i;
  }
  return word;
}
STVM_FUNCTION float stvm_unpack_remainder(stvm_word word, int which) {
  return stvm_unpack(word >> 8 * which << 8 & 0xff00, 0) * (1.0f / 2048.0f);
}

#ifndef __CUDACC__
// Element (m, k) of an A of 16 columns, of four words a thread.
template <class Value> inline float stvm_a_of(Value value, const stvm_word (*a)[4], int m, int k) {
  return value(a[m % 8 * 4 + k % 8 / 2][m / 8 + k / 8 * 2], k);
}
#endif

// D += A B with 16 columns of A.
#ifdef __CUDACC__
#define STVM_MULTIPLY(name, type, value) \
  STVM_FUNCTION void name(float* d, const stvm_word* a, const stvm_word* b) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, " \
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])); \
  }
#else
#define STVM_MULTIPLY(name, type, value) \
  STVM_FUNCTION void name(float* d, const stvm_word* a, const stvm_word* b) { \
    stvm_word as[32][4], bs[32][2]; \
    stvm_gather(a, as, sizeof(as[0])); \
    stvm_gather(b, bs, sizeof(bs[0])); \
    for (int i = 0; i < 4; ++i) { \
      int m = stvm_lane() / 4 + i / 2 * 8, n = stvm_lane() % 4 * 2 + i % 2; \
      for (int k = 0; k < 16; ++k) \
        d[i] += stvm_a_of(value, as, m, k) * value(bs[n * 4 + k % 8 / 2][k / 8], k); \
    } \
  }
#endif
STVM_MULTIPLY(stvm_multiply, "f16", stvm_unpack)
STVM_MULTIPLY(stvm_multiply_bfloat16, "bf16", stvm_unpack_bfloat16)

// D += A B with 32 columns of A, of every four of which two are stored: `a` is the A of 16 columns
// that are left, and `places` tells which they were. Of each four threads the first two give it,
// for the first and the last 16 columns: two bits for each element that is stored, of row g in the
// lower half, of row g + 8 in the upper.
#ifdef __CUDACC__
#define STVM_MULTIPLY_2_OF_4(name, type, value) \
  STVM_FUNCTION void name(float* d, const stvm_word* a, const stvm_word* b, stvm_word places) { \
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." type "." type \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, " \
                 "{%0, %1, %2, %3}, %12, 0x0;" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), \
                   "r"(b[3]), "r"(places)); \
  }
#else
#define STVM_MULTIPLY_2_OF_4(name, type, value) \
  STVM_FUNCTION void name(float* d, const stvm_word* a, const stvm_word* b, stvm_word places) { \
    stvm_word as[32][4], bs[32][4], all[32]; \
    stvm_gather(a, as, sizeof(as[0])); \
    stvm_gather(b, bs, sizeof(bs[0])); \
    stvm_gather(&places, all, sizeof(places)); \
    for (int i = 0; i < 4; ++i) { \
      int m = stvm_lane() / 4 + i / 2 * 8, n = stvm_lane() % 4 * 2 + i % 2; \
      for (int stored = 0; stored < 16; ++stored) { \
        stvm_word word = all[m % 8 * 4 + stored / 8]; \
        int place = word >> (m / 8 * 16 + stored % 8 * 2) & 3, k = stored / 2 * 4 + place; \
        float b = value(bs[n * 4 + k % 8 / 2][k / 8], k); \
        d[i] += stvm_a_of(value, as, m, stored) * b; \
      } \
    } \
  }
#endif
STVM_MULTIPLY_2_OF_4(stvm_multiply_2_of_4, "f16", stvm_unpack)
STVM_MULTIPLY_2_OF_4(stvm_multiply_2_of_4_bfloat16, "bf16", stvm_unpack_bfloat16)

// sums[i] += value x[i] for so many 16-bit floats at x, which lies in shared memory; the value is
// the lower half of a pair. What is multiplied is exact in float32.
#define STVM_MULTIPLY_ADD(name, n, vector, value) \
  STVM_FUNCTION void name##_##n(float* sums, const void* x, stvm_word pair) { \
    vector all = *(const vector*)x; \
    const stvm_word* words = (const stvm_word*)&all; \
    for (int i = 0; i < n; ++i) sums[i] += value(pair, 0) * value(words[i / 2], i); \
  }
STVM_MULTIPLY_ADD(stvm_multiply_add, 2, stvm_word, stvm_unpack)
STVM_MULTIPLY_ADD(stvm_multiply_add, 4, uint2, stvm_unpack)
STVM_MULTIPLY_ADD(stvm_multiply_add, 8, uint4, stvm_unpack)
STVM_MULTIPLY_ADD(stvm_multiply_add_bfloat16, 2, stvm_word, stvm_unpack_bfloat16)
STVM_MULTIPLY_ADD(stvm_multiply_add_bfloat16, 4, uint2, stvm_unpack_bfloat16)
STVM_MULTIPLY_ADD(stvm_multiply_add_bfloat16, 8, uint4, stvm_unpack_bfloat16)

// Add to a value what the thread has whose number differs in one bit.
STVM_FUNCTION void stvm_add_lanes(float* value, int bit) {
#ifdef __CUDACC__
  *value += __shfl_xor_sync(0xffffffffu, *value, bit);
#else
  float all[32];
  stvm_gather(value, all, sizeof(float));
  *value += all[stvm_lane() ^ bit];
#endif
}
