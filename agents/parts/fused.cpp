// A chain of layers, act(x W^T + c), perhaps with a last float32 layer, and its gradient in bfloat16, for processors with
// AVX512-BF16 (built and called by fused.py).
//
// Everything that surrounds the products (casts, packing, offsets, activations and their derivatives, sums over rows)
// happens where the numbers are in registers or in the cache. Of each layer only z, what its activation takes, is kept
// for the gradient, which computes act(z) again: memory is slower. Products are summed in float32 in a fixed order, so
// results do not depend on the number of threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <tuple>
#include <type_traits>
#include <vector>

namespace {

using bf16 = uint16_t;
enum Kind { IDENTITY, RELU, MISH, SWISH };

constexpr long WIDTH = 64;    // columns of a panel of the right-hand matrix: four registers
constexpr long ROWS = 6;      // rows of a tile: 6 x 4 sums fill 24 of the 32 registers
constexpr long MOST_LAST = 64;  // outputs of a float32 last layer
constexpr long DEPTH = 1024;  // pairs of rows that are summed at once, so that a panel stays in the cache

// --- Arithmetic on 16 numbers ---------------------------------------------------------------------------------------

__m512 constant(float x) { return _mm512_set1_ps(x); }

__m512 widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

// Numbers in memory, float or bfloat16, as floats and back; the mask says which of the 16 exist.
__m512 load(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
__m512 load(const bf16* p, __mmask16 mask) {
  return widened(_mm256_maskz_loadu_epi16(mask, p));
}
__m256i rounded(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
// Most masks are full, and a masked store is slow.
void store(float* p, __mmask16 mask, __m512 x) {
  if (mask == 0xffff) _mm512_storeu_ps(p, x);
  else _mm512_mask_storeu_ps(p, mask, x);
}
void store(bf16* p, __mmask16 mask, __m256i x) {
  if (mask == 0xffff) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
  else _mm256_mask_storeu_epi16(p, mask, x);
}
void store(bf16* p, __mmask16 mask, __m512 x) { store(p, mask, rounded(x)); }

__mmask16 first(long count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

// 2^t by a polynomial on [-1/2, 1/2] of relative error 4e-6, far below bfloat16's 4e-3.
__m512 exponential(__m512 x) {
  __m512 t = _mm512_mul_ps(x, constant(1.44269504f)), whole = _mm512_roundscale_ps(t, 0), f = _mm512_sub_ps(t, whole);
  __m512 p = constant(0.0096181291f);
  for (float c : {0.0555041087f, 0.2402265070f, 0.6931471806f, 1.0f}) p = _mm512_fmadd_ps(p, f, constant(c));
  return _mm512_scalef_ps(p, whole);
}

// With e = exp(z), n = e (e + 2): tanh(softplus(z)) = n / (n + 2), its derivative 4 e (e + 1) / (n + 2)^2.
// The reciprocal has 14 bits, bfloat16 has 8. Beyond 20 Mish is the identity.
template <Kind kind>
__m512 activated(__m512 z) {
  if constexpr (kind == RELU) return _mm512_max_ps(_mm512_setzero_ps(), z);  // in this order a NaN stays
  if constexpr (kind == MISH) {
    __m512 e = exponential(_mm512_min_ps(z, constant(20)));
    __m512 n = _mm512_fmadd_ps(e, e, _mm512_add_ps(e, e));
    return _mm512_mul_ps(z, _mm512_mul_ps(n, _mm512_rcp14_ps(_mm512_add_ps(n, constant(2)))));
  }
  if constexpr (kind == SWISH) {
    __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_max_ps(z, constant(-80))));
    return _mm512_mul_ps(z, _mm512_rcp14_ps(_mm512_add_ps(e, constant(1))));
  }
  return z;
}

template <Kind kind>
__m512 slope_of(__m512 z) {
  if constexpr (kind == RELU) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_NLE_UQ), constant(1));
  }
  if constexpr (kind == MISH) {
    __m512 e = exponential(_mm512_min_ps(z, constant(20)));
    __m512 n = _mm512_fmadd_ps(e, e, _mm512_add_ps(e, e)), inverse = _mm512_rcp14_ps(_mm512_add_ps(n, constant(2)));
    __m512 d = _mm512_mul_ps(_mm512_mul_ps(constant(4), z), _mm512_mul_ps(_mm512_fmadd_ps(e, e, e), inverse));
    return _mm512_mul_ps(_mm512_add_ps(n, d), inverse);
  }
  if constexpr (kind == SWISH) {
    __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_max_ps(z, constant(-80))));
    __m512 s = _mm512_rcp14_ps(_mm512_add_ps(e, constant(1)));
    return _mm512_fmadd_ps(_mm512_mul_ps(z, s), _mm512_sub_ps(constant(1), s), s);
  }
  return constant(1);
}

// --- Packing: bfloat16 in pairs (k, k + 1), as the processor multiplies them ---------------------------------------------

void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// w [n, k] with rows `stride` apart, its columns c .. c + 63 of w^T -> a panel [k / 2, 64] of pairs along k.
void panel_of_transposed(const float* w, long stride, long n, long k, long c, int32_t* panel) {
  for (long row = 0; row < WIDTH; row += 16)
    for (long q = 0; q < k; q += 32) {
      __m512i r[16];
      for (int i = 0; i < 16; i++) {
        bool exists = c + row + i < n;
        const float* from = w + (c + row + i) * stride + q;
        __m512 low = load(from, exists ? first(k - q) : 0), high = load(from + 16, exists ? first(k - q - 16) : 0);
        r[i] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
      }
      transpose(r);
      long pairs = std::min(16L, (k - q + 1) / 2);
      for (long i = 0; i < pairs; i++) _mm512_storeu_si512(panel + (q / 2 + i) * WIDTH + row, r[i]);
    }
}

// Pairs of rows of act(x) [k, n]: columns c .. c + columns - 1 -> [k / 2, width], zeros beyond n and k. Also their sums
// over the rows, unless `sums` is null.
template <Kind kind, class T>
void pairs_of_rows(const T* x, long stride, long k, long n, long c, long columns, int32_t* out, long width, float* sums = nullptr) {
  for (long i = 0; i < columns; i += 16) {
    const __mmask16 mask = first(n - c - i);
    __m512 sum = _mm512_setzero_ps();
    for (long q = 0; q < (k + 1) / 2; q++) {
      const T* from = x + 2 * q * stride + c + i;
      __m512 one = activated<kind>(load(from, mask));
      __m512 other = 2 * q + 1 < k ? activated<kind>(load(from + stride, mask)) : _mm512_setzero_ps();
      if (sums) sum = _mm512_add_ps(_mm512_add_ps(sum, one), other);
      __m512i low = _mm512_cvtepu16_epi32(rounded(one)), high = _mm512_cvtepu16_epi32(rounded(other));
      _mm512_storeu_si512(out + q * width + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
    if (sums) store(sums + c + i, mask, sum);
  }
}

// --- Products -------------------------------------------------------------------------------------------------------

// Pairs of the left-hand matrix: that of row i and pair q stands at data[i * row + q * pair].
struct Left {
  const int32_t* data;
  long row, pair;
};

// R rows times V x 16 columns; `finish(r, v, sums)` takes what comes out.
template <int R, int V, class Finish>
inline void tile(Left a, const int32_t* panel, long pairs, const Finish& finish) {
  __m512 sums[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sums[r][v] = _mm512_setzero_ps();
  for (long q = 0; q < pairs; q++) {
    __m512bh b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) b[v] = (__m512bh)_mm512_loadu_si512(panel + q * WIDTH + 16 * v);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      __m512bh x = (__m512bh)_mm512_set1_epi32(a.data[r * a.row + q * a.pair]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], x, b[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++) finish(r, sums[r]);
}

template <int R, int V, class Finish>
long tiles(long i, long stop, Left a, const int32_t* panel, long pairs, const Finish& finish) {
  for (; i + R <= stop; i += R) {
    auto finish_row = [&](int r, const __m512(&sums)[V]) __attribute__((always_inline)) { finish(i + r, sums); };
    tile<R, V>(Left{a.data + i * a.row, a.row, a.pair}, panel, pairs, finish_row);
  }
  return i;
}

// Rows start .. stop - 1 times the first `columns` of a panel; `finish(row, vector, sums)`.
template <class Finish>
void product(long start, long stop, long columns, Left a, const int32_t* panel, long pairs, const Finish& finish) {
  if (columns > 16) {
    start = tiles<ROWS, 4>(start, stop, a, panel, pairs, finish);
    start = tiles<2, 4>(start, stop, a, panel, pairs, finish);
    tiles<1, 4>(start, stop, a, panel, pairs, finish);
  } else {
    start = tiles<ROWS, 1>(start, stop, a, panel, pairs, finish);
    tiles<1, 1>(start, stop, a, panel, pairs, finish);
  }
}

long rounded_up(long x, long to) { return (x + to - 1) / to * to; }

// Memory of the calling thread that grows and is kept: fresh pages at every call would cost more than the arithmetic.
enum Use { PANELS, LEFT, COPY, HIDDEN, OTHER_HIDDEN, USES };

struct Scratch {
  void* data[USES] = {};
  long bytes[USES] = {};
  ~Scratch() {
    for (void* p : data) std::free(p);
  }
};

template <class T>
T* scratch(Use use, long count) {
  thread_local Scratch kept;
  const long needed = count * sizeof(T) + 64;
  if (kept.bytes[use] < needed) {
    std::free(kept.data[use]);
    kept.bytes[use] = rounded_up(needed, 1 << 16);
    kept.data[use] = std::aligned_alloc(64, kept.bytes[use]);
    if (!kept.data[use]) throw std::bad_alloc();
  }
  return static_cast<T*>(kept.data[use]);
}

// --- A chain of layers ------------------------------------------------------------------------------------------------

// [members, rows, columns] with adjacent columns, float or bfloat16; strides in elements.
struct Matrices {
  void* data;
  long member, row;
  bool is_float;
};

struct Layer {
  long outputs;
  Matrices weight;                  // [members, outputs, inputs] float
  Matrices offset;                  // [members, rows or 1, outputs]; one row: stride 0
  void* weight_gradient = nullptr;  // contiguous like the weight, or null where it is not wanted
  void* offset_gradient = nullptr;  // contiguous like the offset, in its type, or null
};

struct Chain {
  long members, rows, inputs, count, threads;
  bool head;  // the last layer is float32, without an activation
  Matrices x;
  std::vector<Layer> layers;
};

template <class T>
T* member(const Matrices& t, long m) {
  return static_cast<T*>(t.data) + m * t.member;
}

// The numbers of a contiguous [members, rows, columns].
template <class T>
Matrices contiguous(T* data, long rows, long columns) {
  return {data, rows * columns, columns, sizeof(T) == sizeof(float)};
}

// Runs `work(pointer to member 0's numbers)` with the pointer's type.
template <class Work>
void typed(const Matrices& t, const Work& work) {
  if (t.is_float) work(static_cast<float*>(t.data));
  else work(static_cast<bf16*>(t.data));
}

// `work(member, part)` for all members and parts.
template <class Work>
void everywhere(const Chain& c, long parts, const Work& work) {
  if (c.threads == 1) {  // not even a team of one
    for (long m = 0; m < c.members; m++)
      for (long part = 0; part < parts; part++) work(m, part);
    return;
  }
#pragma omp parallel for collapse(2) num_threads(c.threads)
  for (long m = 0; m < c.members; m++)
    for (long part = 0; part < parts; part++) work(m, part);
}

long panels_of(long columns) { return (columns + WIDTH - 1) / WIDTH; }

// [members][panels][pairs, WIDTH] times the rows of `left(member)`: `finish(member, row, column, mask, sums)`.
template <class LeftOf, class Finish>
void products(const Chain& c, long rows, long columns, long pairs, const int32_t* panels, long skipped, long size,
              const LeftOf& left, const Finish& finish) {
  const long across = panels_of(columns), all = c.members * across;
  const long chunks = all >= c.threads ? 1 : (c.threads + all - 1) / all;  // of the rows, so that no thread waits
  everywhere(c, across * chunks, [&](long m, long part) {
    const long p = part / chunks, chunk = part % chunks, here = std::min(WIDTH, columns - p * WIDTH);
    const long start = std::min(rows, rounded_up(rows * chunk / chunks, ROWS));
    const long stop = chunk + 1 == chunks ? rows : std::min(rows, rounded_up(rows * (chunk + 1) / chunks, ROWS));
    const __mmask16 masks[4] = {first(here), first(here - 16), first(here - 32), first(here - 48)};
    product(start, stop, here, left(m), panels + (m * across + p) * size + skipped * WIDTH, pairs,
            [&](long i, const auto& sums) __attribute__((always_inline)) {
      const auto finish_vector = finish(m, i);
#pragma GCC unroll 4
      for (int v = 0; v < int(sizeof(sums) / sizeof(sums[0])); v++) finish_vector(p * WIDTH + 16 * v, masks[v], sums[v]);
    });
  });
}

// --- Forward --------------------------------------------------------------------------------------------------------

// The rows of x in bfloat16 pairs: as they are, where that is what they are, else copied.
Matrices in_pairs(const Chain& c, const Matrices& x, long inputs) {
  const bool as_it_is = !x.is_float && inputs % 2 == 0 && x.row % 2 == 0 && x.member % 2 == 0 &&
                        reinterpret_cast<uintptr_t>(x.data) % 4 == 0;
  if (as_it_is) return {x.data, x.member / 2, x.row / 2, 0};
  const long pairs = (inputs + 1) / 2;
  bf16* copy = scratch<bf16>(COPY, c.members * c.rows * 2 * pairs);
  typed(x, [&](auto* data) {
    everywhere(c, c.rows, [&](long m, long i) {
      for (long k = 0; k < 2 * pairs; k += 16) {
        store(copy + (m * c.rows + i) * 2 * pairs + k, first(2 * pairs - k), load(data + m * x.member + i * x.row + k, first(inputs - k)));
      }
    });
  });
  return {copy, c.rows * pairs, pairs, 0};
}

// h = act(z), z = x W^T + c, rounded; z is kept unless it is null.
template <Kind kind>
void layer(const Chain& c, const Layer& l, const Matrices& x, long inputs, bf16* z, bf16* h) {
  const long pairs = (inputs + 1) / 2, across = panels_of(l.outputs), size = pairs * WIDTH;
  const Matrices rows = in_pairs(c, x, inputs);
  int32_t* panels = scratch<int32_t>(PANELS, c.members * across * size);
  everywhere(c, across, [&](long m, long p) {
    panel_of_transposed(member<float>(l.weight, m), l.weight.row, l.outputs, inputs, p * WIDTH, panels + (m * across + p) * size);
  });
  products(c, c.rows, l.outputs, pairs, panels, 0, size, [&](long m) { return Left{member<int32_t>(rows, m), rows.row, 1}; },
           [&](long m, long i) {
             const long place = (m * c.rows + i) * l.outputs, offset = m * l.offset.member + i * l.offset.row;
             const float* wide = l.offset.is_float ? static_cast<float*>(l.offset.data) + offset : nullptr;
             const bf16* narrow = static_cast<bf16*>(l.offset.data) + offset;
             bf16 *keep = z ? z + place : nullptr, *to = h + place;
             return [=](long column, __mmask16 mask, __m512 sums) __attribute__((always_inline)) {
               const __m512 added = wide ? load(wide + column, mask) : load(narrow + column, mask);
               const __m256i argument = rounded(_mm512_add_ps(sums, added));
               if (keep) store(keep + column, mask, argument);
               store(to + column, mask, activated<kind>(widened(argument)));
             };
           });
}

// N outputs of a row of h, from output o on: dot products, since there are few.
template <int N>
void dots(const bf16* h, const float* w, long stride, long inputs, const float* offset, float* out) {
  __m512 sums[N];
  for (int n = 0; n < N; n++) sums[n] = _mm512_setzero_ps();
  for (long k = 0; k < inputs; k += 16) {
    const __mmask16 mask = first(inputs - k);
    const __m512 x = load(h + k, mask);
    for (int n = 0; n < N; n++) sums[n] = _mm512_fmadd_ps(x, load(w + n * stride + k, mask), sums[n]);
  }
  for (int n = 0; n < N; n++) out[n] = _mm512_reduce_add_ps(sums[n]) + offset[n];
}

// out = h W^T + c in float32.
void last_layer(const Chain& c, const Layer& l, const bf16* h, long inputs, float* out) {
  everywhere(c, c.rows, [&](long m, long i) {
    const bf16* row = h + (m * c.rows + i) * inputs;
    const float *w = member<float>(l.weight, m), *offset = member<float>(l.offset, m) + i * l.offset.row;
    float* to = out + (m * c.rows + i) * l.outputs;
    long o = 0;
    for (; o + 3 <= l.outputs; o += 3) dots<3>(row, w + o * l.weight.row, l.weight.row, inputs, offset + o, to + o);
    for (; o < l.outputs; o++) dots<1>(row, w + o * l.weight.row, l.weight.row, inputs, offset + o, to + o);
  });
}

template <Kind kind>
void forward(const Chain& c, bf16* z, void* out) {
  Matrices x = c.x;
  long inputs = c.inputs;
  const long hidden = c.count - c.head;
  for (long i = 0; i < hidden; i++) {
    const Layer& l = c.layers[i];
    const long size = c.members * c.rows * l.outputs;
    const bool ends = i + 1 == c.count;
    bf16* h = ends ? static_cast<bf16*>(out) : scratch<bf16>(i % 2 ? HIDDEN : OTHER_HIDDEN, size);
    layer<kind>(c, l, x, inputs, z, h);
    if (z) z += size;
    x = contiguous(h, c.rows, l.outputs), inputs = l.outputs;
  }
  if (c.head) last_layer(c, c.layers[hidden], static_cast<bf16*>(x.data), inputs, static_cast<float*>(out));
}

// --- Backward -------------------------------------------------------------------------------------------------------

// Gradients by the last layer's weight and offset, and by z of the layer before it: gz [members, rows, width].
template <Kind kind>
void last_gradients(const Chain& c, const Layer& l, const Matrices& g, const bf16* z, long inputs, bf16* gz, long width) {
  float* gw = static_cast<float*>(l.weight_gradient);
  typed(g, [&](auto* slopes) {
    everywhere(c, (width + 15) / 16, [&](long m, long part) {
      const long k = 16 * part;
      const __mmask16 mask = first(inputs - k);
      __m512 w[MOST_LAST], sums[MOST_LAST];
      for (long o = 0; o < l.outputs; o++) {
        w[o] = load(member<float>(l.weight, m) + o * l.weight.row + k, mask), sums[o] = _mm512_setzero_ps();
      }
      for (long i = 0; i < c.rows; i++) {
        const __m512 argument = load(z + (m * c.rows + i) * inputs + k, mask), h = activated<kind>(argument);
        __m512 gh = _mm512_setzero_ps();
        for (long o = 0; o < l.outputs; o++) {
          const auto* from = slopes + m * g.member + i * g.row + o;
          const __m512 slope = sizeof(*from) == 4 ? constant(*(const float*)from) : widened(_mm256_set1_epi16(*(const bf16*)from));
          gh = _mm512_fmadd_ps(slope, w[o], gh);
          if (gw) sums[o] = _mm512_fmadd_ps(slope, h, sums[o]);
        }
        store(gz + (m * c.rows + i) * width + k, first(width - k), _mm512_mul_ps(gh, slope_of<kind>(argument)));
      }
      for (long o = 0; gw && o < l.outputs; o++) store(gw + (m * l.outputs + o) * inputs + k, mask, sums[o]);
    });
    if (!l.offset_gradient) return;
    everywhere(c, (l.outputs + 15) / 16, [&](long m, long part) {
      const __mmask16 mask = first(l.outputs - 16 * part);
      __m512 sum = _mm512_setzero_ps();
      for (long i = 0; i < c.rows; i++) sum = _mm512_add_ps(sum, load(slopes + m * g.member + i * g.row + 16 * part, mask));
      store(static_cast<float*>(l.offset_gradient) + m * l.outputs + 16 * part, mask, sum);
    });
  });
}

// gz = g act'(z) [members, rows, width].
template <Kind kind>
void through_activation(const Chain& c, const Layer& l, const Matrices& g, const bf16* z, bf16* gz, long width) {
  typed(g, [&](auto* slopes) {
    everywhere(c, c.rows, [&](long m, long i) {
      for (long k = 0; k < width; k += 16) {
        const __mmask16 mask = first(l.outputs - k);
        __m512 v = load(slopes + m * g.member + i * g.row + k, mask);
        if constexpr (kind != IDENTITY) v = _mm512_mul_ps(v, slope_of<kind>(load(z + (m * c.rows + i) * l.outputs + k, mask)));
        store(gz + (m * c.rows + i) * width + k, first(width - k), v);
      }
    });
  });
}

// gz^T act(x) from what is packed of both.
void weight_gradient(const Chain& c, const Layer& l, long inputs, const int32_t* panels, const int32_t* left, long across) {
  const long pairs = (c.rows + 1) / 2;
  float* gw = static_cast<float*>(l.weight_gradient);
  for (long q = 0; q < pairs; q += DEPTH) {
    products(c, l.outputs, inputs, std::min(DEPTH, pairs - q), panels, q, pairs * WIDTH,
             [&](long m) { return Left{left + (m * pairs + q) * across, 1, across}; },
             [&](long m, long i) {
               float* to = gw + (m * l.outputs + i) * inputs;
               return [=](long column, __mmask16 mask, __m512 sums) __attribute__((always_inline)) {
                 store(to + column, mask, q ? _mm512_add_ps(sums, load(to + column, mask)) : sums);
               };
             });
  }
}

// Gradients by a layer's weight, from gz and its inputs act(x), and by its offset.
template <Kind kind>
void own_gradients(const Chain& c, const Layer& l, const Matrices& x, long inputs, const bf16* gz, long width) {
  const bool summed = l.offset.row == 0;
  if (l.offset_gradient && !summed) {
    typed({l.offset_gradient, 0, 0, l.offset.is_float}, [&](auto* out) {
      everywhere(c, c.rows, [&](long m, long i) {
        const long row = m * c.rows + i;
        for (long k = 0; k < l.outputs; k += 16) store(out + row * l.outputs + k, first(l.outputs - k), load(gz + row * width + k, first(l.outputs - k)));
      });
    });
  }
  if (!l.weight_gradient && !(l.offset_gradient && summed)) return;
  const long pairs = (c.rows + 1) / 2, across = rounded_up(l.outputs, 16), size = pairs * WIDTH;
  int32_t* left = scratch<int32_t>(LEFT, c.members * pairs * across);
  float* sums = summed ? static_cast<float*>(l.offset_gradient) : nullptr;
  everywhere(c, across / 16, [&](long m, long part) {
    pairs_of_rows<IDENTITY>(gz + m * c.rows * width, width, c.rows, l.outputs, 16 * part, 16, left + m * pairs * across + 16 * part,
                            across, sums ? sums + m * l.outputs : nullptr);
  });
  if (!l.weight_gradient) return;
  const long panels_across = panels_of(inputs);
  int32_t* panels = scratch<int32_t>(PANELS, c.members * panels_across * size);
  typed(x, [&](auto* data) {
    everywhere(c, panels_across, [&](long m, long p) {
      pairs_of_rows<kind>(data + m * x.member, x.row, c.rows, inputs, p * WIDTH, WIDTH, panels + (m * panels_across + p) * size, WIDTH);
    });
  });
  weight_gradient(c, l, inputs, panels, left, across);
}

// gx = gz W, or, where z is given, gx = gz W act'(z): the gradient by z of the layer before.
template <Kind kind, class X>
void input_gradient(const Chain& c, const Layer& l, long inputs, const bf16* gz, long width, const bf16* z, X* gx, long gx_width) {
  const long pairs = width / 2, across = panels_of(inputs), size = pairs * WIDTH;
  int32_t* panels = scratch<int32_t>(PANELS, c.members * across * size);
  everywhere(c, across, [&](long m, long p) {
    pairs_of_rows<IDENTITY>(member<float>(l.weight, m), l.weight.row, l.outputs, inputs, p * WIDTH, WIDTH, panels + (m * across + p) * size, WIDTH);
  });
  const int32_t* rows = reinterpret_cast<const int32_t*>(gz);
  products(c, c.rows, inputs, pairs, panels, 0, size, [&](long m) { return Left{rows + m * c.rows * pairs, pairs, 1}; },
           [&](long m, long i) {
             const bf16* from = z ? z + (m * c.rows + i) * inputs : nullptr;
             X* to = gx + (m * c.rows + i) * gx_width;
             return [=](long column, __mmask16 mask, __m512 sums) __attribute__((always_inline)) {
               if (from) sums = _mm512_mul_ps(sums, slope_of<kind>(load(from + column, mask)));
               store(to + column, mask, sums);
               if (mask != 0xffff && gx_width > inputs) to[inputs] = 0;
             };
           });
}

template <Kind kind>
void backward(const Chain& c, const Matrices& g, const bf16* z, void* gx) {
  const long hidden = c.count - c.head;
  const bf16* argument = z;  // of layer i's activation
  for (long i = 0; i + 1 < hidden; i++) argument += c.members * c.rows * c.layers[i].outputs;
  long width = rounded_up(c.layers[hidden - 1].outputs, 2);
  bf16* gz = scratch<bf16>(HIDDEN, c.members * c.rows * width);
  if (c.head) last_gradients<kind>(c, c.layers[hidden], g, argument, c.layers[hidden - 1].outputs, gz, width);
  else through_activation<kind>(c, c.layers[hidden - 1], g, argument, gz, width);
  for (long i = hidden - 1; i >= 0; i--) {
    const Layer& l = c.layers[i];
    if (i == 0) {
      own_gradients<IDENTITY>(c, l, c.x, c.inputs, gz, width);
      if (gx && c.x.is_float) input_gradient<kind>(c, l, c.inputs, gz, width, nullptr, static_cast<float*>(gx), c.inputs);
      if (gx && !c.x.is_float) input_gradient<kind>(c, l, c.inputs, gz, width, nullptr, static_cast<bf16*>(gx), c.inputs);
      return;
    }
    const long inputs = c.layers[i - 1].outputs, next = rounded_up(inputs, 2);
    argument -= c.members * c.rows * inputs;
    own_gradients<kind>(c, l, contiguous(const_cast<bf16*>(argument), c.rows, inputs), inputs, gz, width);
    bf16* before = scratch<bf16>((hidden - i) % 2 ? OTHER_HIDDEN : HIDDEN, c.members * c.rows * next);
    input_gradient<kind>(c, l, inputs, gz, width, argument, before, next);
    gz = before, width = next;
  }
}

template <class Run>
void of_kind(long kind, const Run& run) {
  switch (kind) {
    case IDENTITY: return run(std::integral_constant<Kind, IDENTITY>());
    case RELU: return run(std::integral_constant<Kind, RELU>());
    case MISH: return run(std::integral_constant<Kind, MISH>());
    case SWISH: return run(std::integral_constant<Kind, SWISH>());
  }
  TORCH_CHECK(false, "no kind of layer has the number ", kind);
}

// --- For PyTorch ----------------------------------------------------------------------------------------------------

using at::Tensor;
using Tensors = std::vector<Tensor>;

// Columns side by side.
Tensor rowwise(const Tensor& t) {
  TORCH_CHECK(t.dim() == 3, "layers have three axes, not ", t.dim());
  TORCH_CHECK(t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16, "layers are float32 or bfloat16, not ", t.dtype());
  return t.stride(2) == 1 ? t : t.contiguous();
}

Tensors rowwise(at::TensorList given) {
  Tensors all;
  for (const Tensor& t : given) all.push_back(rowwise(t));
  return all;
}

Matrices matrices(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.scalar_type() == at::kFloat}; }

// The tensors must outlive it.
Chain described(const Tensor& x, const Tensors& weights, const Tensors& offsets, bool head) {
  Chain c{x.size(0), x.size(1), x.size(2), long(weights.size()), at::get_num_threads(), head, matrices(x), {}};
  for (size_t i = 0; i < weights.size(); i++) {
    const long inputs = i ? weights[i - 1].size(1) : c.inputs;
    TORCH_CHECK(weights[i].size(2) == inputs && offsets[i].size(2) == weights[i].size(1), "layer ", i, " does not fit");
    Layer l{weights[i].size(1), matrices(weights[i]), matrices(offsets[i])};
    if (offsets[i].size(1) == 1) l.offset.row = 0;
    c.layers.push_back(l);
  }
  return c;
}

// What the last layer gives, bfloat16 or with a head float; and, if it is to be kept, what all activations take.
std::tuple<Tensor, Tensor> chain(const Tensor& x_, at::TensorList weights_, at::TensorList offsets_, int64_t kind, bool head, bool keep) {
  const Tensor x = rowwise(x_);
  const Tensors weights = rowwise(weights_), offsets = rowwise(offsets_);
  const Chain c = described(x, weights, offsets, head);
  long kept = 0;
  if (keep && (kind != IDENTITY || c.count > 1))
    for (long i = 0; i < c.count - head; i++) kept += c.members * c.rows * c.layers[i].outputs;
  Tensor out = at::empty({c.members, c.rows, c.layers.back().outputs}, x.options().dtype(head ? at::kFloat : at::kBFloat16));
  Tensor z = at::empty({kept}, x.options().dtype(at::kBFloat16));
  of_kind(kind, [&](auto k) { forward<k()>(c, kept ? static_cast<bf16*>(z.data_ptr()) : nullptr, out.data_ptr()); });
  return {out, z};
}

// Gradients by x, the weights and the offsets; without elements where they are not wanted. g: the gradient by `chain`'s.
Tensors chain_gradient(const Tensor& g_, const Tensor& z, const Tensor& x_, at::TensorList weights_, at::TensorList offsets_,
                       int64_t kind, bool head, at::IntArrayRef wanted) {
  const Tensor x = rowwise(x_), g = rowwise(g_);
  const Tensors weights = rowwise(weights_), offsets = rowwise(offsets_);
  Chain c = described(x, weights, offsets, head);
  Tensors found;
  auto room = [&](const Tensor& like) {
    const bool asked = wanted[found.size()];
    found.push_back(asked ? at::empty(like.sizes(), like.options()) : at::empty({0}, like.options()));
    return asked ? found.back().data_ptr() : nullptr;
  };
  void* gx = room(x);
  for (long i = 0; i < c.count; i++) c.layers[i].weight_gradient = room(weights[i]);
  for (long i = 0; i < c.count; i++) c.layers[i].offset_gradient = room(offsets[i]);
  of_kind(kind, [&](auto k) { backward<k()>(c, matrices(g), static_cast<const bf16*>(z.data_ptr()), gx); });
  return found;
}

#define GIVEN "Tensor x, Tensor[] weights, Tensor[] offsets, int kind, bool head"

TORCH_LIBRARY(diffcps, library) {
  library.def("chain(" GIVEN ", bool keep) -> (Tensor, Tensor)");
  library.def("chain_gradient(Tensor g, Tensor z, " GIVEN ", int[] wanted) -> Tensor[]");
}
TORCH_LIBRARY_IMPL(diffcps, CPU, library) {
  library.impl("chain", chain);
  library.impl("chain_gradient", chain_gradient);
}
// fused.py says how it is differentiated.
TORCH_LIBRARY_IMPL(diffcps, Autograd, library) {
  library.impl("chain", torch::CppFunction::makeFallthrough());
  library.impl("chain_gradient", torch::CppFunction::makeFallthrough());
}

}  // namespace
