// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Vectors of the instruction set a file is compiled for. Only routine sources include this file:
// it and they are compiled once per instruction set, into the namespace ks::KS_ISA, and use nothing
// of the standard library that could leak into the process as an inline function compiled with
// instructions the CPU lacks.

#ifndef KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_VECTOR_H_
#define KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_VECTOR_H_

#include <stdint.h>
#include <string.h>

#if !defined(KS_ISA) || !defined(KS_VECTOR_BYTES)
#error "Define KS_ISA (avx512, avx2 or baseline) and KS_VECTOR_BYTES (64, 32 or 16)."
#endif
#if KS_VECTOR_BYTES == 64 && !defined(__AVX512F__)
#error "64-byte vectors need -mavx512f: without it they are emulated, far slower than scalars."
#endif
#if KS_VECTOR_BYTES == 32 && !(defined(__AVX2__) && defined(__FMA__))
#error "32-byte vectors need -mavx2 -mfma: without them they are emulated."
#endif

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define KS_ALWAYS_INLINE inline __attribute__((always_inline))
#define KS_INLINE static KS_ALWAYS_INLINE
// For loops with a constant trip count whose body keeps arrays of vectors in registers.
#ifdef __clang__
#define KS_UNROLL _Pragma("unroll")
#else
#define KS_UNROLL _Pragma("GCC unroll 32")
#endif

namespace ks {
namespace KS_ISA {

constexpr int kLanes = KS_VECTOR_BYTES / 4;
constexpr int kLineFloats = 16;  // Of a cache line.
#if KS_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

typedef float Vec __attribute__((vector_size(KS_VECTOR_BYTES)));
typedef float UnalignedVec __attribute__((vector_size(KS_VECTOR_BYTES), aligned(4), may_alias));

KS_INLINE Vec Load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
KS_INLINE void Store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }

// Keeps a loaded vector in a register: the compiler would rather load it again for each product.
// With 16 registers that is what it should do.
KS_INLINE Vec InRegister(Vec v) {
#if KS_VECTOR_BYTES == 64
  asm("" : "+v"(v));
#endif
  return v;
}

// Fetches what memory holds into the second-level cache. The first-level one waits for few lines at
// a time: fetches into it would hold up loads that the second-level one can serve.
KS_INLINE void FetchFar(const void* p) { __builtin_prefetch(p, 0, 2); }
KS_INLINE void FetchFar(intptr_t p) { FetchFar(reinterpret_cast<const void*>(p)); }

// Bytes of a result that its reader will not find in a near cache.
constexpr int64_t kStreamFrom = 8 << 20;

// Stores past the caches, which spares the read of what is overwritten: for results too large to be
// found there later. `p` is aligned to a vector. Other threads see the values after StreamEnd().
KS_INLINE void Stream(float* p, Vec v) {
#if defined(__SSE2__) && KS_VECTOR_BYTES == 64
  _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
#elif defined(__SSE2__) && KS_VECTOR_BYTES == 32
  _mm256_stream_ps(p, reinterpret_cast<__m256>(v));
#elif defined(__SSE2__)
  _mm_stream_ps(p, reinterpret_cast<__m128>(v));
#else
  Store(p, v);
#endif
}
KS_INLINE void StreamEnd() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

KS_INLINE Vec Splat(float x) { return x - Vec{}; }  // x - 0 is x, -0 included: one broadcast.

// The first `count` lanes, zeros in the others.
#if defined(__SSE2__) && KS_VECTOR_BYTES == 64
KS_INLINE void StoreFirst(float* p, Vec v, int64_t count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), reinterpret_cast<__m512>(v));
}
KS_INLINE Vec LoadFirst(const float* p, int64_t count) {
  return reinterpret_cast<Vec>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p));
}
#else
KS_INLINE void StoreFirst(float* p, Vec v, int64_t count) {
  float lanes[kLanes];
  Store(lanes, v);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}
KS_INLINE Vec LoadFirst(const float* p, int64_t count) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return Load(lanes);
}
#endif

// Lanes at places that are known when it runs only, where an instruction does that.
#if defined(__SSE2__) && KS_VECTOR_BYTES == 64
#define KS_HAVE_PERMUTE 1
typedef __m512i Places;
KS_INLINE Places LoadPlaces(const int32_t* p) { return _mm512_loadu_si512(p); }
KS_INLINE Vec Permute(Vec v, Places places) {
  // With a mask of all lanes, which changes no code: GCC 12 warns of _mm512_permutexvar_ps().
  return reinterpret_cast<Vec>(
      _mm512_maskz_permutexvar_ps(0xffff, places, reinterpret_cast<__m512>(v)));
}
#endif

template <int... kIndex>
struct Lanes {};
#if KS_VECTOR_BYTES == 64
typedef Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15> AllLanes;
#elif KS_VECTOR_BYTES == 32
typedef Lanes<0, 1, 2, 3, 4, 5, 6, 7> AllLanes;
#else
typedef Lanes<0, 1, 2, 3> AllLanes;
#endif

template <int... kIndex>
KS_INLINE Vec Shuffle(Vec a, Vec b, Lanes<kIndex...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, kIndex...);
#else
  typedef int32_t Mask __attribute__((vector_size(KS_VECTOR_BYTES)));
  return __builtin_shuffle(a, b, Mask{kIndex...});
#endif
}

// Shuffles of two vectors in blocks of four lanes, which cost half of what a free choice of lanes
// costs: the low and high halves of blocks in turn, single lanes (kWidth 1) or pairs (2) of `a` and
// `b`; or even and odd blocks, those of `a` first (4).
template <int kWidth, int kHigh, int... kIndex>
KS_INLINE Vec Merge(Vec a, Vec b, Lanes<kIndex...>) {
  if (kWidth == 1) {
    return Shuffle(a, b,
                   Lanes<(kIndex % 2 * kLanes + (kIndex & ~3) + kIndex % 4 / 2 + 2 * kHigh)...>());
  }
  if (kWidth == 2) {
    return Shuffle(a, b,
                   Lanes<(kIndex % 4 / 2 * kLanes + (kIndex & ~3) + kIndex % 2 + 2 * kHigh)...>());
  }
  constexpr int kHalf = kLanes / 8 > 0 ? kLanes / 8 : 1;  // Blocks of the result that are of `a`.
  return Shuffle(a, b,
                 Lanes<(kIndex / 4 / kHalf % 2 * kLanes + kIndex / 4 % kHalf * 8 +
                        (kLanes > 4 ? 4 * kHigh : 0) + kIndex % 4)...>());
}
template <int kWidth>
KS_INLINE void MergeBoth(Vec& a, Vec& b) {
  const Vec low = Merge<kWidth, 0>(a, b, AllLanes());
  b = Merge<kWidth, 1>(a, b, AllLanes());
  a = low;
}

// Transposes kLanes x kLanes values in registers.
KS_INLINE void Transpose(Vec (&rows)[kLanes]) {
  KS_UNROLL
  for (int r = 0; r < kLanes; r += 2) MergeBoth<1>(rows[r], rows[r + 1]);
  KS_UNROLL
  for (int r = 0; r < kLanes; r += 4) {
    MergeBoth<2>(rows[r], rows[r + 2]);
    MergeBoth<2>(rows[r + 1], rows[r + 3]);
    const Vec third = rows[r + 1];
    rows[r + 1] = rows[r + 2];
    rows[r + 2] = third;
  }
  // What is left is to transpose blocks of four lanes.
#if KS_VECTOR_BYTES >= 32
  KS_UNROLL
  for (int r = 0; r < kLanes; r += 8) {
    KS_UNROLL
    for (int i = 0; i < 4; ++i) MergeBoth<4>(rows[r + i], rows[r + 4 + i]);
  }
#endif
#if KS_VECTOR_BYTES >= 64
  KS_UNROLL
  for (int i = 0; i < 8; ++i) MergeBoth<4>(rows[i], rows[8 + i]);
#endif
}

// Stores the columns of kLanes x kLanes values, `stride` floats apart.
KS_INLINE void StoreColumns(Vec (&rows)[kLanes], float* target, int64_t stride) {
  Transpose(rows);
  KS_UNROLL
  for (int r = 0; r < kLanes; ++r) Store(target + r * stride, rows[r]);
}

// Adds the lanes kDistance away.
template <int kDistance, int... kIndex>
KS_INLINE Vec AddLanes(Vec v, Lanes<kIndex...>) {
  return v + Shuffle(v, v, Lanes<(kIndex ^ kDistance)...>());
}

// The sum of all lanes, in a fixed order.
KS_INLINE float Sum(Vec v) {
#if KS_VECTOR_BYTES >= 64
  v = AddLanes<8>(v, AllLanes());
#endif
#if KS_VECTOR_BYTES >= 32
  v = AddLanes<4>(v, AllLanes());
#endif
  v = AddLanes<2>(v, AllLanes());
  return v[0] + v[1];
}

// --- Integers ------------------------------------------------------------------------------------

KS_INLINE int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
KS_INLINE int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }
KS_INLINE int64_t FloorDiv(int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }  // b > 0
KS_INLINE int64_t CeilDiv(int64_t a, int64_t b) { return -FloorDiv(-a, b); }              // b > 0
KS_INLINE int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

// Floats, rounded up to an odd number of cache lines: what lies that far apart does not fall into
// the same cache sets.
KS_INLINE int64_t OddLines(int64_t floats) {
  return (CeilDiv(floats, kLineFloats) | 1) * kLineFloats;
}

// Part `i` of `parts` nearly equal ones of [0, size).
KS_INLINE int64_t PartBegin(int64_t size, int64_t parts, int64_t i) {
  return size / parts * i + Min(i, size % parts);
}

}  // namespace KS_ISA
}  // namespace ks

#endif  // KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_VECTOR_H_
