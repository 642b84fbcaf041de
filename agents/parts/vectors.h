// Sixteen numbers at a time: a register of AVX-512, or two of AVX2.
//
// Floats are 16 floats, Halves 16 bfloat16, Pairs 16 pairs of neighbouring bfloat16, the first in the lower half. A
// Mask says which of the 16 exist: the first so many. What does not exist is 0 when it is loaded, and no store touches
// it in memory.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

// On AVX2 a call would send two registers through memory, and the sums of a product fit into registers only where
// nothing else is inlined beside them. On AVX-512 the compiler chooses well by itself.
#ifdef __AVX512BF16__
#define INLINED
#define OF_ITS_OWN inline
#else
#define INLINED [[gnu::always_inline]] inline
#define OF_ITS_OWN [[gnu::noinline]]
#endif

namespace {

using bf16 = uint16_t;
using Halves = __m256i;

INLINED Halves repeated(bf16 x) { return _mm256_set1_epi16(x); }

#ifdef __AVX512BF16__

using Floats = __m512;
using Pairs = __m512i;
using Mask = __mmask16;

constexpr int AT_ONCE = 4;  // Floats by which six rows are multiplied at once: 24 sums, of 32 registers

INLINED Mask first(long count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }
INLINED bool full(Mask mask) { return mask == 0xffff; }

INLINED Floats zeros() { return _mm512_setzero_ps(); }
INLINED Floats constant(float x) { return _mm512_set1_ps(x); }
INLINED Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }  // a b + c
INLINED Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
// As the processor has them: where one of the two is no number, the second.
INLINED Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
INLINED Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
INLINED Floats nearest(Floats x) { return _mm512_roundscale_ps(x, 0); }  // whole number
INLINED Floats scaled(Floats x, Floats exponent) { return _mm512_scalef_ps(x, exponent); }  // x 2^exponent, a whole one
INLINED Floats inverse(Floats x) { return _mm512_rcp14_ps(x); }  // to 14 bits, bfloat16 has 8
INLINED Floats above_zero(Floats x) {  // 1 where x is above 0 or no number, else 0
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, zeros(), _CMP_NLE_UQ), constant(1));
}
INLINED Floats where(Mask mask, Floats x) { return _mm512_maskz_mov_ps(mask, x); }
INLINED float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }

INLINED Floats widened(Halves x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
INLINED Halves rounded(Floats x) { return (__m256i)_mm512_cvtneps_pbh(x); }

INLINED Floats load(const float* p) { return _mm512_loadu_ps(p); }
INLINED Floats load(const float* p, Mask mask) { return _mm512_maskz_loadu_ps(mask, p); }
INLINED Floats load(const bf16* p, Mask mask) { return widened(_mm256_maskz_loadu_epi16(mask, p)); }
INLINED void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
// Most masks are full, and a masked store is slow.
INLINED void store(float* p, Mask mask, Floats x) {
  if (full(mask)) _mm512_storeu_ps(p, x);
  else _mm512_mask_storeu_ps(p, mask, x);
}
INLINED void store(bf16* p, Mask mask, Halves x) {
  if (full(mask)) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
  else _mm256_mask_storeu_epi16(p, mask, x);
}

INLINED Pairs load_pairs(const int32_t* p) { return _mm512_loadu_si512(p); }
INLINED Pairs load_pairs(const int32_t* p, Mask mask) { return _mm512_maskz_loadu_epi32(mask, p); }
INLINED void store_pairs(int32_t* p, Pairs x) { _mm512_storeu_si512(p, x); }
INLINED Pairs repeated_pair(int32_t x) { return _mm512_set1_epi32(x); }
// The numbers of each pair as floats: a bfloat16 is the upper half of one.
INLINED Floats even_of(Pairs x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
INLINED Floats odd_of(Pairs x) { return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(0xffff0000))); }
INLINED Pairs paired(Halves even, Halves odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}
INLINED Pairs neighbours(Floats low, Floats high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }  // of 32 in a row
// sum + both products of each pair
INLINED Floats plus_products(Floats sum, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// Of each lane of four pairs: the first two or last two of a and b in turn, one by one or two by two.
INLINED Pairs low_ones(Pairs a, Pairs b) { return _mm512_unpacklo_epi32(a, b); }
INLINED Pairs high_ones(Pairs a, Pairs b) { return _mm512_unpackhi_epi32(a, b); }
INLINED Pairs low_twos(Pairs a, Pairs b) { return _mm512_unpacklo_epi64(a, b); }
INLINED Pairs high_twos(Pairs a, Pairs b) { return _mm512_unpackhi_epi64(a, b); }
// The first and third, or the second and fourth lane of a, then of b.
INLINED Pairs even_lanes(Pairs a, Pairs b) { return _mm512_shuffle_i32x4(a, b, 0x88); }
INLINED Pairs odd_lanes(Pairs a, Pairs b) { return _mm512_shuffle_i32x4(a, b, 0xdd); }

#else

struct Floats {
  __m256 low, high;
};
struct Pairs {
  __m256i low, high;
};
struct Mask {
  int count;
};

constexpr int AT_ONCE = 1;  // 6 sums of two registers each, of 16

INLINED Mask first(long count) { return {count >= 16 ? 16 : count <= 0 ? 0 : int(count)}; }
INLINED bool full(Mask mask) { return mask.count == 16; }
INLINED __m256i low_of(Mask mask) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(mask.count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINED __m256i high_of(Mask mask) { return low_of({mask.count - 8}); }

INLINED Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
INLINED Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
INLINED Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }

INLINED Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINED Floats constant(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINED Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
INLINED Floats fnma(Floats a, Floats b, Floats c) {
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
INLINED Floats smaller(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
INLINED Floats larger(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
INLINED Floats nearest(Floats x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.low, mode), _mm256_round_ps(x.high, mode)};
}
// 2^-127 is taken for 0, 2^128 is infinite: so their exponents' bits say.
INLINED __m256 power(__m256 exponent) {
  exponent = _mm256_min_ps(_mm256_max_ps(exponent, _mm256_set1_ps(-127)), _mm256_set1_ps(128));
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(exponent), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
INLINED Floats scaled(Floats x, Floats exponent) { return x * Floats{power(exponent.low), power(exponent.high)}; }
INLINED Floats inverse(Floats x) {
  return {_mm256_div_ps(_mm256_set1_ps(1), x.low), _mm256_div_ps(_mm256_set1_ps(1), x.high)};
}
INLINED __m256 above_zero(__m256 x) {
  return _mm256_and_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NLE_UQ), _mm256_set1_ps(1));
}
INLINED Floats above_zero(Floats x) { return {above_zero(x.low), above_zero(x.high)}; }
INLINED Floats where(Mask mask, Floats x) {
  return {_mm256_and_ps(x.low, _mm256_castsi256_ps(low_of(mask))),
          _mm256_and_ps(x.high, _mm256_castsi256_ps(high_of(mask)))};
}
INLINED float sum_of(Floats x) {
  const __m256 eight = _mm256_add_ps(x.low, x.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

INLINED __m256i wide(__m128i halves) { return _mm256_cvtepu16_epi32(halves); }
INLINED __m256i upper(__m256i x) { return _mm256_slli_epi32(x, 16); }
INLINED __m128i low_of(Halves x) { return _mm256_castsi256_si128(x); }
INLINED __m128i high_of(Halves x) { return _mm256_extracti128_si256(x, 1); }

INLINED Floats widened(Halves x) {
  return {_mm256_castsi256_ps(upper(wide(low_of(x)))), _mm256_castsi256_ps(upper(wide(high_of(x))))};
}
// To the nearest, halfway to the even one: in the lower half of each 32 bits. What is no number stays none.
INLINED __m256i rounded(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256 none = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(none));
}
INLINED Halves rounded(Floats x) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded(x.low), rounded(x.high)), 0xd8);
}

INLINED Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINED Floats load(const float* p, Mask mask) {
  if (full(mask)) return load(p);
  return {_mm256_maskload_ps(p, low_of(mask)), _mm256_maskload_ps(p + 8, high_of(mask))};
}
INLINED Floats load(const bf16* p, Mask mask) {
  if (full(mask)) return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  bf16 some[16] = {};
  std::memcpy(some, p, mask.count * sizeof(bf16));
  return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(some)));
}
INLINED void store(float* p, Floats x) { _mm256_storeu_ps(p, x.low), _mm256_storeu_ps(p + 8, x.high); }
INLINED void store(float* p, Mask mask, Floats x) {
  if (full(mask)) return store(p, x);
  _mm256_maskstore_ps(p, low_of(mask), x.low), _mm256_maskstore_ps(p + 8, high_of(mask), x.high);
}
INLINED void store(bf16* p, Mask mask, Halves x) {
  if (full(mask)) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
  std::memcpy(p, &x, mask.count * sizeof(bf16));
}

INLINED __m256i load_eight(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
INLINED Pairs load_pairs(const int32_t* p) { return {load_eight(p), load_eight(p + 8)}; }
INLINED Pairs load_pairs(const int32_t* p, Mask mask) {
  if (full(mask)) return load_pairs(p);
  return {_mm256_maskload_epi32(p, low_of(mask)), _mm256_maskload_epi32(p + 8, high_of(mask))};
}
INLINED void store_pairs(int32_t* p, Pairs x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.high);
}
INLINED Pairs repeated_pair(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINED Floats even_of(Pairs x) { return {_mm256_castsi256_ps(upper(x.low)), _mm256_castsi256_ps(upper(x.high))}; }
INLINED Floats odd_of(Pairs x) {
  const __m256i mask = _mm256_set1_epi32(0xffff0000);
  return {_mm256_castsi256_ps(_mm256_and_si256(x.low, mask)), _mm256_castsi256_ps(_mm256_and_si256(x.high, mask))};
}
INLINED Pairs paired(Halves even, Halves odd) {
  return {_mm256_or_si256(wide(low_of(even)), upper(wide(low_of(odd)))),
          _mm256_or_si256(wide(high_of(even)), upper(wide(high_of(odd))))};
}
INLINED Pairs neighbours(Floats low, Floats high) { return {rounded(low), rounded(high)}; }
// AVX2 has no such product: fused.py asks for products of floats, and only tests for these.
INLINED Floats plus_products(Floats sum, Pairs a, Pairs b) {
  return fma(odd_of(a), odd_of(b), fma(even_of(a), even_of(b), sum));
}

INLINED Pairs low_ones(Pairs a, Pairs b) {
  return {_mm256_unpacklo_epi32(a.low, b.low), _mm256_unpacklo_epi32(a.high, b.high)};
}
INLINED Pairs high_ones(Pairs a, Pairs b) {
  return {_mm256_unpackhi_epi32(a.low, b.low), _mm256_unpackhi_epi32(a.high, b.high)};
}
INLINED Pairs low_twos(Pairs a, Pairs b) {
  return {_mm256_unpacklo_epi64(a.low, b.low), _mm256_unpacklo_epi64(a.high, b.high)};
}
INLINED Pairs high_twos(Pairs a, Pairs b) {
  return {_mm256_unpackhi_epi64(a.low, b.low), _mm256_unpackhi_epi64(a.high, b.high)};
}
INLINED Pairs even_lanes(Pairs a, Pairs b) {
  return {_mm256_permute2x128_si256(a.low, a.high, 0x20), _mm256_permute2x128_si256(b.low, b.high, 0x20)};
}
INLINED Pairs odd_lanes(Pairs a, Pairs b) {
  return {_mm256_permute2x128_si256(a.low, a.high, 0x31), _mm256_permute2x128_si256(b.low, b.high, 0x31)};
}

#endif

INLINED void store(bf16* p, Mask mask, Floats x) { store(p, mask, rounded(x)); }

INLINED void transpose(Pairs r[16]) {
  Pairs t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = low_ones(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = high_ones(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = low_twos(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = high_twos(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = low_twos(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = high_twos(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = even_lanes(r[i], r[i + 4]);
    t[i + 4] = odd_lanes(r[i], r[i + 4]);
    t[i + 8] = even_lanes(r[i + 8], r[i + 12]);
    t[i + 12] = odd_lanes(r[i + 8], r[i + 12]);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = even_lanes(t[i], t[i + 8]);
    r[i + 8] = odd_lanes(t[i], t[i + 8]);
    r[i + 4] = even_lanes(t[i + 4], t[i + 12]);
    r[i + 12] = odd_lanes(t[i + 4], t[i + 12]);
  }
}

}  // namespace
