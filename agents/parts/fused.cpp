// A chain of layers, act(x W^T + c), perhaps with a last float32 layer, and its gradient in bfloat16, for processors
// with AVX512-BF16 or AVX2 (built and called by fused.py).
//
// Everything that surrounds the products (casts, packing, offsets, activations and their derivatives, sums over rows)
// happens where the numbers are in registers or in the cache. Of each layer only z, what its activation takes, is kept
// for the gradient, which computes act(z) again: memory is slower. Products are summed in float32 in a fixed order, so
// results do not depend on the number of threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "vectors.h"

namespace {

enum Kind { KINDS };  // fused.py defines these names, and MOST_LAST

constexpr long WIDTH = 64;              // columns of a panel of the right-hand matrix
constexpr long ROWS = 6;                // rows of a tile: as many sums as fit into registers (AT_ONCE)
constexpr long WORTH_A_TEAM = 1 << 22;  // products of two numbers: a tenth of a millisecond on one core
constexpr float EPSILON = 1e-5f;        // beside the variance of a layer normalisation
constexpr long DEPTH = 1024;            // pairs of rows that are summed at once, so that a panel stays in the cache

// --- Arithmetic on 16 numbers ---------------------------------------------------------------------------------------

// 2^t by a polynomial on [-1/2, 1/2] of relative error 4e-6, far below bfloat16's 4e-3.
INLINED Floats exponential(Floats x) {
  Floats t = x * constant(1.44269504f), whole = nearest(t), f = t - whole;
  Floats p = constant(0.0096181291f);
  for (float c : {0.0555041087f, 0.2402265070f, 0.6931471806f, 1.0f}) p = fma(p, f, constant(c));
  return scaled(p, whole);
}

// With e = exp(z), n = e (e + 2): tanh(softplus(z)) = n / (n + 2), its derivative 4 e (e + 1) / (n + 2)^2.
// Beyond 20 Mish is the identity.
template <Kind kind>
INLINED Floats activated(Floats z) {
  if constexpr (kind == RELU) return larger(zeros(), z);  // in this order a NaN stays
  if constexpr (kind == MISH) {
    Floats e = exponential(smaller(z, constant(20)));
    Floats n = fma(e, e, e + e);
    return z * (n * inverse(n + constant(2)));
  }
  if constexpr (kind == SWISH) {
    Floats e = exponential(zeros() - larger(z, constant(-1e4f)));
    return z * inverse(e + constant(1));
  }
  return z;
}

template <Kind kind>
INLINED Floats slope_of(Floats z) {
  if constexpr (kind == RELU) return above_zero(z);
  if constexpr (kind == MISH) {
    Floats low = smaller(constant(20), z), e = exponential(low);  // in this order a NaN stays
    Floats n = fma(e, e, e + e), part = inverse(n + constant(2));
    Floats d = (fma(e, e, e) * part) * (part * constant(4));
    return fma(low, d, n * part);
  }
  if constexpr (kind == SWISH) {
    Floats e = exponential(zeros() - larger(z, constant(-1e4f)));
    Floats s = inverse(e + constant(1));
    return fma(z * s, constant(1) - s, s);
  }
  return constant(1);
}

bool in_floats = false;  // whether bfloat16 numbers are multiplied as the floats that they are; fused.py says when

// --- Packing: bfloat16 in pairs (k, k + 1), as the processor multiplies them ---------------------------------------

// Numbers of 32 bits in a panel of so many pairs along k. As floats pair q takes two rows, 2 q and 2 q + 1.
long size_of_panel(long pairs) { return pairs * WIDTH * (in_floats ? 2 : 1); }

// 16 pairs of a panel.
void put(int32_t* panel, long q, long column, Pairs pairs) {
  if (!in_floats) return store_pairs(panel + q * WIDTH + column, pairs);
  float* to = reinterpret_cast<float*>(panel) + 2 * q * WIDTH + column;
  store(to, even_of(pairs)), store(to + WIDTH, odd_of(pairs));
}

// w [n, k] with rows `stride` apart, its columns c .. c + 63 of w^T -> a panel [k / 2, 64] of pairs along k.
void panel_of_transposed(const float* w, long stride, long n, long k, long c, int32_t* panel) {
  for (long row = 0; row < WIDTH; row += 16)
    for (long q = 0; q < k; q += 32) {
      Pairs r[16];
      for (int i = 0; i < 16; i++) {
        bool exists = c + row + i < n;
        const float* from = w + (c + row + i) * stride + q;
        Floats low = load(from, first(exists ? k - q : 0)), high = load(from + 16, first(exists ? k - q - 16 : 0));
        r[i] = neighbours(low, high);
      }
      transpose(r);
      long pairs = std::min(16L, (k - q + 1) / 2);
      for (long i = 0; i < pairs; i++) put(panel, q / 2 + i, row, r[i]);
    }
}

// Pairs of rows of act(x) [k, n]: `take(q, i, pairs)` takes those of rows 2 q and 2 q + 1 and of 16 columns from
// c + i on, i below `columns`, zeros beyond n and k. Also their sums over the rows, unless `sums` is null.
template <Kind kind, class T, class Take>
void pairs_of_rows(const T* x, long stride, long k, long n, long c, long columns, float* sums, const Take& take) {
  for (long i = 0; i < columns; i += 16) {
    const Mask mask = first(n - c - i);
    Floats sum = zeros();
    for (long q = 0; q < (k + 1) / 2; q++) {
      const T* from = x + 2 * q * stride + c + i;
      Floats one = activated<kind>(load(from, mask));
      Floats other = 2 * q + 1 < k ? activated<kind>(load(from + stride, mask)) : zeros();
      if (sums) sum = sum + one + other;
      take(q, i, paired(rounded(one), rounded(other)));
    }
    if (sums) store(sums + c + i, mask, sum);
  }
}

// The same as panel number p.
template <Kind kind, class T>
void panel_of_rows(const T* x, long stride, long k, long n, long p, int32_t* panel) {
  pairs_of_rows<kind>(x, stride, k, n, p * WIDTH, WIDTH, nullptr,
                      [=](long q, long i, Pairs pairs) { put(panel, q, i, pairs); });
}

// --- Products -------------------------------------------------------------------------------------------------------

// Pairs of the left-hand matrix: that of row i and pair q stands at data[i * row + q * pair].
struct Left {
  const int32_t* data;
  long row, pair;
};

// sums += R rows of a times V x 16 columns of a panel.
template <int R, int V>
inline void multiply_pairs(Left a, const int32_t* panel, long pairs, Floats (&sums)[R][V]) {
  for (long q = 0; q < pairs; q++) {
    Pairs b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) b[v] = load_pairs(panel + q * WIDTH + 16 * v);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      const Pairs x = repeated_pair(a.data[r * a.row + q * a.pair]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sums[r][v] = plus_products(sums[r][v], x, b[v]);
    }
  }
}

constexpr long CHUNK = 64;  // pairs of a row that are taken apart at once and stay in the nearest cache

// R rows of at most CHUNK pairs as floats. Gives {row, pair}: the even one of row r and pair q then stands at
// floats[r * row + q * pair], the odd one 16 CHUNK further.
template <int R>
std::pair<long, long> taken_apart(Left a, long count, float* floats) {
  auto take = [&](const int32_t* from, Mask mask, float* to) {
    const Pairs pairs = load_pairs(from, mask);
    store(to, even_of(pairs)), store(to + 16 * CHUNK, odd_of(pairs));
  };
  if (a.pair == 1) {
    for (int r = 0; r < R; r++)
      for (long q = 0; q < count; q += 16) take(a.data + r * a.row + q, first(count - q), floats + r * CHUNK + q);
    return {CHUNK, 1};
  }
  for (long q = 0; q < count; q++) take(a.data + q * a.pair, first(R), floats + 16 * q);  // a.row is 1
  return {1, 16};
}

// The same as `multiply_pairs`, in products of floats; as many columns at once as the registers have sums for.
template <int R, int V>
OF_ITS_OWN void multiply_floats(Left a, const int32_t* panel, long pairs, Floats (&sums)[R][V]) {
  constexpr int W = std::min(V, AT_ONCE);
  alignas(64) float floats[2 * 16 * CHUNK];
  for (; pairs > 0; pairs -= CHUNK, a.data += CHUNK * a.pair, panel += size_of_panel(CHUNK)) {
    const long count = std::min(CHUNK, pairs);
    const auto [row, pair] = taken_apart<R>(a, count, floats);
#pragma GCC unroll 4
    for (int start = 0; start < V; start += W) {
      const float* from = reinterpret_cast<const float*>(panel) + 16 * start;
      Floats own[R][W];
#pragma GCC unroll 6
      for (int r = 0; r < R; r++)
        for (int v = 0; v < W; v++) own[r][v] = sums[r][start + v];
      for (long q = 0; q < count; q++)
        for (int odd = 0; odd < 2; odd++) {
          Floats b[W];
#pragma GCC unroll 4
          for (int v = 0; v < W; v++) b[v] = load(from + (2 * q + odd) * WIDTH + 16 * v);
#pragma GCC unroll 6
          for (int r = 0; r < R; r++) {
            const Floats x = constant(floats[odd * 16 * CHUNK + r * row + q * pair]);
#pragma GCC unroll 4
            for (int v = 0; v < W; v++) own[r][v] = fma(x, b[v], own[r][v]);
          }
        }
#pragma GCC unroll 6
      for (int r = 0; r < R; r++)
        for (int v = 0; v < W; v++) sums[r][start + v] = own[r][v];
    }
  }
}

// R rows times V x 16 columns; `finish(r, v, sums)` takes what comes out.
template <int R, int V, class Finish>
inline void tile(Left a, const int32_t* panel, long pairs, const Finish& finish) {
  Floats sums[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sums[r][v] = zeros();
  if (in_floats) multiply_floats<R, V>(a, panel, pairs, sums);
  else multiply_pairs<R, V>(a, panel, pairs, sums);
#pragma GCC unroll 6
  for (int r = 0; r < R; r++) finish(r, sums[r]);
}

template <int R, int V, class Finish>
long tiles(long i, long stop, Left a, const int32_t* panel, long pairs, const Finish& finish) {
  for (; i + R <= stop; i += R) {
    auto finish_row = [&](int r, const Floats(&sums)[V]) __attribute__((always_inline)) { finish(i + r, sums); };
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

// Memory that grows and is kept: fresh pages at every call would cost more than the arithmetic. One for each thread
// that calls; its team shares it.
enum Use { PANELS, LEFT, COPY, HIDDEN, OTHER_HIDDEN, ARGUMENT, USES };

struct Scratch {
  void* data[USES] = {};
  long bytes[USES] = {};
  ~Scratch() {
    for (void* p : data) std::free(p);
  }
};

Scratch& of_this_thread() {
  thread_local Scratch kept;
  return kept;
}

// --- A chain of layers ---------------------------------------------------------------------------------------------

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
  // Of a layer normalisation before the activation, [members, outputs] each; none where `scale` is null.
  const float *scale = nullptr, *shift = nullptr;
  long scale_member = 0, shift_member = 0;  // strides
  float *scale_gradient = nullptr, *shift_gradient = nullptr;
};

struct Chain {
  long members, rows, inputs, count, threads;
  bool head;  // the last layer is float32, without an activation
  Matrices x;
  Scratch* kept;
  std::vector<Layer> layers;
};

// Room for so many numbers, the same for the whole team.
template <class T>
T* scratch(const Chain& c, Use use, long count) {
  Scratch& kept = *c.kept;
#pragma omp single
  {
    const long needed = count * sizeof(T) + 64;
    if (kept.bytes[use] < needed) {
      std::free(kept.data[use]);
      kept.bytes[use] = rounded_up(needed, 1 << 16);
      kept.data[use] = std::aligned_alloc(64, kept.bytes[use]);
      if (!kept.data[use]) std::abort();  // a megabyte
    }
  }
  return static_cast<T*>(kept.data[use]);
}

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

// `work(member, part)` for all members and parts, shared among the team that runs this; it goes on when all is done.
template <class Work>
void everywhere(const Chain& c, long parts, const Work& work) {
#pragma omp for collapse(2) schedule(static)
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
    const Mask masks[4] = {first(here), first(here - 16), first(here - 32), first(here - 48)};
    product(start, stop, here, left(m), panels + (m * across + p) * size + size_of_panel(skipped), pairs,
            [&](long i, const auto& sums) __attribute__((always_inline)) {
              const auto finish_vector = finish(m, i);
#pragma GCC unroll 4
              for (int v = 0; v < int(sizeof(sums) / sizeof(sums[0])); v++)
                finish_vector(p * WIDTH + 16 * v, masks[v], sums[v]);
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
  bf16* copy = scratch<bf16>(c, COPY, c.members * c.rows * 2 * pairs);
  typed(x, [&](auto* data) {
    everywhere(c, c.rows, [&](long m, long i) {
      for (long k = 0; k < 2 * pairs; k += 16) {
        store(copy + (m * c.rows + i) * 2 * pairs + k, first(2 * pairs - k),
              load(data + m * x.member + i * x.row + k, first(inputs - k)));
      }
    });
  });
  return {copy, c.rows * pairs, pairs, 0};
}

// h = act(z), z = x W^T + c, rounded; z is kept unless it is null.
template <Kind kind>
void layer(const Chain& c, const Layer& l, const Matrices& x, long inputs, bf16* z, bf16* h) {
  const long pairs = (inputs + 1) / 2, across = panels_of(l.outputs), size = size_of_panel(pairs);
  const Matrices rows = in_pairs(c, x, inputs);
  int32_t* panels = scratch<int32_t>(c, PANELS, c.members * across * size);
  everywhere(c, across, [&](long m, long p) {
    panel_of_transposed(member<float>(l.weight, m), l.weight.row, l.outputs, inputs, p * WIDTH,
                        panels + (m * across + p) * size);
  });
  products(
      c, c.rows, l.outputs, pairs, panels, 0, size, [&](long m) { return Left{member<int32_t>(rows, m), rows.row, 1}; },
      [&](long m, long i) {
        const long place = (m * c.rows + i) * l.outputs, offset = m * l.offset.member + i * l.offset.row;
        const float* wide = l.offset.is_float ? static_cast<float*>(l.offset.data) + offset : nullptr;
        const bf16* narrow = static_cast<bf16*>(l.offset.data) + offset;
        bf16 *keep = z ? z + place : nullptr, *to = h + place;
        return [=](long column, Mask mask, Floats sums) __attribute__((always_inline)) {
          const Floats added = wide ? load(wide + column, mask) : load(narrow + column, mask);
          const Halves argument = rounded(sums + added);
          if (keep) store(keep + column, mask, argument);
          store(to + column, mask, activated<kind>(widened(argument)));
        };
      });
}

// N outputs of a row of h, from output o on: dot products, since there are few.
template <int N>
void dots(const bf16* h, const float* w, long stride, long inputs, const float* offset, float* out) {
  Floats sums[N];
  for (int n = 0; n < N; n++) sums[n] = zeros();
  for (long k = 0; k < inputs; k += 16) {
    const Mask mask = first(inputs - k);
    const Floats x = load(h + k, mask);
    for (int n = 0; n < N; n++) sums[n] = fma(x, load(w + n * stride + k, mask), sums[n]);
  }
  for (int n = 0; n < N; n++) out[n] = sum_of(sums[n]) + offset[n];
}

// Mean and reciprocal deviation of n numbers.
std::pair<float, float> moments(const bf16* z, long n) {
  Floats sum = zeros(), squares = zeros();
  for (long k = 0; k < n; k += 16) sum = sum + load(z + k, first(n - k));
  const float mean = sum_of(sum) / n;
  for (long k = 0; k < n; k += 16) {
    const Floats d = where(first(n - k), load(z + k, first(n - k)) - constant(mean));
    squares = fma(d, d, squares);
  }
  return {mean, 1 / std::sqrt(sum_of(squares) / n + EPSILON)};
}

// h = act(normalised z * scale + shift), and the same once more in `kept` unless it is null.
template <Kind kind>
void normalise(const Chain& c, const Layer& l, const bf16* z, bf16* kept, bf16* h) {
  const long n = l.outputs;
  everywhere(c, c.rows, [&](long m, long i) {
    const long row = (m * c.rows + i) * n;
    const auto [mean, factor] = moments(z + row, n);
    for (long k = 0; k < n; k += 16) {
      const Mask mask = first(n - k);
      const Floats normal = (load(z + row + k, mask) - constant(mean)) * constant(factor);
      const Floats a =
          fma(normal, load(l.scale + m * l.scale_member + k, mask), load(l.shift + m * l.shift_member + k, mask));
      const Floats out = activated<kind>(a);
      store(h + row + k, mask, out);
      if (kept) store(kept + row + k, mask, out);
    }
  });
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
    bf16* h = ends ? static_cast<bf16*>(out) : scratch<bf16>(c, i % 2 ? HIDDEN : OTHER_HIDDEN, size);
    if (l.scale) {
      bf16 *argument = z ? z : scratch<bf16>(c, ARGUMENT, size), *kept = z ? z + size : nullptr;
      layer<IDENTITY>(c, l, x, inputs, nullptr, argument);
      normalise<kind>(c, l, argument, kept, h);
      if (z) z += size;
    } else {
      layer<kind>(c, l, x, inputs, z, h);
    }
    if (z) z += size;
    x = contiguous(h, c.rows, l.outputs), inputs = l.outputs;
  }
  if (c.head) last_layer(c, c.layers[hidden], static_cast<bf16*>(x.data), inputs, static_cast<float*>(out));
}

// --- Backward -------------------------------------------------------------------------------------------------------

// Gradients by the last layer's weight and offset, and by z of the layer before it: gz [members, rows, width].
template <Kind kind>
void last_gradients(const Chain& c, const Layer& l, const Matrices& g, const bf16* z, long inputs, bf16* gz,
                    long width) {
  float* gw = static_cast<float*>(l.weight_gradient);
  typed(g, [&](auto* slopes) {
    everywhere(c, (width + 15) / 16, [&](long m, long part) {
      const long k = 16 * part;
      const Mask mask = first(inputs - k);
      Floats w[MOST_LAST], sums[MOST_LAST];
      for (long o = 0; o < l.outputs; o++) {
        w[o] = load(member<float>(l.weight, m) + o * l.weight.row + k, mask), sums[o] = zeros();
      }
      for (long i = 0; i < c.rows; i++) {
        const Floats argument = load(z + (m * c.rows + i) * inputs + k, mask), h = activated<kind>(argument);
        Floats gh = zeros();
        for (long o = 0; o < l.outputs; o++) {
          const auto* from = slopes + m * g.member + i * g.row + o;
          const Floats slope =
              sizeof(*from) == 4 ? constant(*(const float*)from) : widened(repeated(*(const bf16*)from));
          gh = fma(slope, w[o], gh);
          if (gw) sums[o] = fma(slope, h, sums[o]);
        }
        store(gz + (m * c.rows + i) * width + k, first(width - k), gh * slope_of<kind>(argument));
      }
      for (long o = 0; gw && o < l.outputs; o++) store(gw + (m * l.outputs + o) * inputs + k, mask, sums[o]);
    });
    if (!l.offset_gradient) return;
    everywhere(c, (l.outputs + 15) / 16, [&](long m, long part) {
      const Mask mask = first(l.outputs - 16 * part);
      Floats sum = zeros();
      for (long i = 0; i < c.rows; i++)
        sum = sum + load(slopes + m * g.member + i * g.row + 16 * part, mask);
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
        const Mask mask = first(l.outputs - k);
        Floats v = load(slopes + m * g.member + i * g.row + k, mask);
        if constexpr (kind != IDENTITY)
          v = v * slope_of<kind>(load(z + (m * c.rows + i) * l.outputs + k, mask));
        store(gz + (m * c.rows + i) * width + k, first(width - k), v);
      }
    });
  });
}

// gz^T act(x) from what is packed of both.
void weight_gradient(const Chain& c, const Layer& l, long inputs, const int32_t* panels, const int32_t* left,
                     long across) {
  const long pairs = (c.rows + 1) / 2;
  float* gw = static_cast<float*>(l.weight_gradient);
  for (long q = 0; q < pairs; q += DEPTH) {
    products(
        c, l.outputs, inputs, std::min(DEPTH, pairs - q), panels, q, size_of_panel(pairs),
        [&](long m) { return Left{left + (m * pairs + q) * across, 1, across}; },
        [&](long m, long i) {
          float* to = gw + (m * l.outputs + i) * inputs;
          return [=](long column, Mask mask, Floats sums) __attribute__((always_inline)) {
            store(to + column, mask, q ? sums + load(to + column, mask) : sums);
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
        for (long k = 0; k < l.outputs; k += 16)
          store(out + row * l.outputs + k, first(l.outputs - k), load(gz + row * width + k, first(l.outputs - k)));
      });
    });
  }
  if (!l.weight_gradient && !(l.offset_gradient && summed)) return;
  const long pairs = (c.rows + 1) / 2, across = rounded_up(l.outputs, 16), size = size_of_panel(pairs);
  int32_t* left = scratch<int32_t>(c, LEFT, c.members * pairs * across);
  float* sums = summed ? static_cast<float*>(l.offset_gradient) : nullptr;
  everywhere(c, across / 16, [&](long m, long part) {
    int32_t* to = left + m * pairs * across + 16 * part;
    pairs_of_rows<IDENTITY>(gz + m * c.rows * width, width, c.rows, l.outputs, 16 * part, 16,
                            sums ? sums + m * l.outputs : nullptr,
                            [=](long q, long, Pairs both) { store_pairs(to + q * across, both); });
  });
  if (!l.weight_gradient) return;
  const long panels_across = panels_of(inputs);
  int32_t* panels = scratch<int32_t>(c, PANELS, c.members * panels_across * size);
  typed(x, [&](auto* data) {
    everywhere(c, panels_across, [&](long m, long p) {
      panel_of_rows<kind>(data + m * x.member, x.row, c.rows, inputs, p, panels + (m * panels_across + p) * size);
    });
  });
  weight_gradient(c, l, inputs, panels, left, across);
}

// gx = gz W, or, where z is given, gx = gz W act'(z): the gradient by z of the layer before.
template <Kind kind, class X>
void input_gradient(const Chain& c, const Layer& l, long inputs, const bf16* gz, long width, const bf16* z, X* gx,
                    long gx_width) {
  const long pairs = width / 2, across = panels_of(inputs), size = size_of_panel(pairs);
  int32_t* panels = scratch<int32_t>(c, PANELS, c.members * across * size);
  everywhere(c, across, [&](long m, long p) {
    panel_of_rows<IDENTITY>(member<float>(l.weight, m), l.weight.row, l.outputs, inputs, p,
                            panels + (m * across + p) * size);
  });
  const int32_t* rows = reinterpret_cast<const int32_t*>(gz);
  products(
      c, c.rows, inputs, pairs, panels, 0, size, [&](long m) { return Left{rows + m * c.rows * pairs, pairs, 1}; },
      [&](long m, long i) {
        const bf16* from = z ? z + (m * c.rows + i) * inputs : nullptr;
        X* to = gx + (m * c.rows + i) * gx_width;
        return [=](long column, Mask mask, Floats sums) __attribute__((always_inline)) {
          if (from) sums = sums * slope_of<kind>(load(from + column, mask));
          store(to + column, mask, sums);
          if (!full(mask) && gx_width > inputs) to[inputs] = 0;
        };
      });
}

// Gradients by the first layer's weight and offset, and by x unless it is null.
void first_gradients(const Chain& c, const bf16* gz, long width, void* gx) {
  const Layer& l = c.layers[0];
  own_gradients<IDENTITY>(c, l, c.x, c.inputs, gz, width);
  if (!gx) return;
  if (c.x.is_float) input_gradient<IDENTITY>(c, l, c.inputs, gz, width, nullptr, static_cast<float*>(gx), c.inputs);
  else input_gradient<IDENTITY>(c, l, c.inputs, gz, width, nullptr, static_cast<bf16*>(gx), c.inputs);
}

// The gradient by h [members, rows, width] becomes, in its place, that by z before the normalisation; and the gradients
// by scale and shift.
template <Kind kind>
void through_normalisation(const Chain& c, const Layer& l, const bf16* z, bf16* g, long width) {
  const long n = l.outputs;
  float* known = scratch<float>(c, ARGUMENT, 2 * c.members * c.rows);  // of each row: mean and reciprocal deviation
  everywhere(c, c.rows, [&](long m, long i) {
    const auto [mean, factor] = moments(z + (m * c.rows + i) * n, n);
    known[2 * (m * c.rows + i)] = mean, known[2 * (m * c.rows + i) + 1] = factor;
  });
  everywhere(c, (n + 15) / 16, [&](long m, long part) {
    const long k = 16 * part;
    const Mask mask = first(n - k);
    const Floats scale = load(l.scale + m * l.scale_member + k, mask),
                 shift = load(l.shift + m * l.shift_member + k, mask);
    Floats by_scale = zeros(), by_shift = zeros();
    for (long row = m * c.rows; row < (m + 1) * c.rows; row++) {
      const Floats normal = (load(z + row * n + k, mask) - constant(known[2 * row])) * constant(known[2 * row + 1]);
      const Floats slope = load(g + row * width + k, mask) * slope_of<kind>(fma(normal, scale, shift));
      by_shift = by_shift + slope, by_scale = fma(slope, normal, by_scale);
      store(g + row * width + k, mask, slope * scale);
    }
    if (l.scale_gradient) store(l.scale_gradient + m * n + k, mask, by_scale);
    if (l.shift_gradient) store(l.shift_gradient + m * n + k, mask, by_shift);
  });
  everywhere(c, c.rows, [&](long m, long i) {
    const long row = m * c.rows + i;
    const Floats mean = constant(known[2 * row]), factor = constant(known[2 * row + 1]);
    Floats sum = zeros(), along = zeros();
    for (long k = 0; k < n; k += 16) {
      const Mask mask = first(n - k);
      const Floats slope = load(g + row * width + k, mask), d = load(z + row * n + k, mask) - mean;
      sum = sum + slope, along = fma(slope, d * factor, along);
    }
    const Floats average = constant(sum_of(sum) / n), part = constant(sum_of(along) / n);
    for (long k = 0; k < n; k += 16) {
      const Mask mask = first(n - k);
      const Floats normal = (load(z + row * n + k, mask) - mean) * factor;
      const Floats across = load(g + row * width + k, mask) - average;
      store(g + row * width + k, mask, fnma(normal, part, across) * factor);
    }
  });
}

// `backward` where layers are normalised: z and h of each stand side by side.
template <Kind kind>
void backward_normalised(const Chain& c, const Matrices& g, const bf16* kept, void* gx) {
  const long hidden = c.count - c.head;
  for (long i = 0; i < hidden; i++) kept += 2 * c.members * c.rows * c.layers[i].outputs;
  long width = rounded_up(c.layers[hidden - 1].outputs, 2);
  const long last = c.members * c.rows * c.layers[hidden - 1].outputs;
  bf16* slopes = scratch<bf16>(c, HIDDEN, c.members * c.rows * width);
  if (c.head)
    last_gradients<IDENTITY>(c, c.layers[hidden], g, kept - last, c.layers[hidden - 1].outputs, slopes, width);
  else through_activation<IDENTITY>(c, c.layers[hidden - 1], g, nullptr, slopes, width);
  for (long i = hidden - 1; i >= 0; i--) {
    const Layer& l = c.layers[i];
    kept -= 2 * c.members * c.rows * l.outputs;
    through_normalisation<kind>(c, l, kept, slopes, width);
    if (i == 0) return first_gradients(c, slopes, width, gx);
    const long inputs = c.layers[i - 1].outputs, next = rounded_up(inputs, 2);
    bf16* h = const_cast<bf16*>(kept) - c.members * c.rows * inputs;
    own_gradients<IDENTITY>(c, l, contiguous(h, c.rows, inputs), inputs, slopes, width);
    bf16* before = scratch<bf16>(c, (hidden - i) % 2 ? OTHER_HIDDEN : HIDDEN, c.members * c.rows * next);
    input_gradient<IDENTITY>(c, l, inputs, slopes, width, nullptr, before, next);
    slopes = before, width = next;
  }
}

template <Kind kind>
void backward(const Chain& c, const Matrices& g, const bf16* z, void* gx) {
  if (c.layers[0].scale) return backward_normalised<kind>(c, g, z, gx);
  const long hidden = c.count - c.head;
  const bf16* argument = z;  // of layer i's activation
  for (long i = 0; i + 1 < hidden; i++) argument += c.members * c.rows * c.layers[i].outputs;
  long width = rounded_up(c.layers[hidden - 1].outputs, 2);
  bf16* gz = scratch<bf16>(c, HIDDEN, c.members * c.rows * width);
  if (c.head) last_gradients<kind>(c, c.layers[hidden], g, argument, c.layers[hidden - 1].outputs, gz, width);
  else through_activation<kind>(c, c.layers[hidden - 1], g, argument, gz, width);
  for (long i = hidden - 1; i >= 0; i--) {
    const Layer& l = c.layers[i];
    if (i == 0) return first_gradients(c, gz, width, gx);
    const long inputs = c.layers[i - 1].outputs, next = rounded_up(inputs, 2);
    argument -= c.members * c.rows * inputs;
    own_gradients<kind>(c, l, contiguous(const_cast<bf16*>(argument), c.rows, inputs), inputs, gz, width);
    bf16* before = scratch<bf16>(c, (hidden - i) % 2 ? OTHER_HIDDEN : HIDDEN, c.members * c.rows * next);
    input_gradient<kind>(c, l, inputs, gz, width, argument, before, next);
    gz = before, width = next;
  }
}

// `run` by each thread of a team, with the kind as a constant. All threads take the same way through it.
template <class Run>
void together(const Chain& c, long kind, const Run& run) {
  auto team = [&](auto constant_kind) {
    if (c.threads == 1) return run(constant_kind);  // a team of one would cost more than a small chain
#pragma omp parallel num_threads(c.threads)
    run(constant_kind);
  };
  switch (kind) {
    case IDENTITY:
      return team(std::integral_constant<Kind, IDENTITY>());
    case RELU:
      return team(std::integral_constant<Kind, RELU>());
    case MISH:
      return team(std::integral_constant<Kind, MISH>());
    case SWISH:
      return team(std::integral_constant<Kind, SWISH>());
  }
  TORCH_CHECK(false, "no kind of layer has the number ", kind);
}

// --- For PyTorch ----------------------------------------------------------------------------------------------------

using at::Tensor;
using Tensors = std::vector<Tensor>;

// Columns side by side.
Tensor rowwise(const Tensor& t) {
  TORCH_CHECK(t.dim() > 1, "layers have no tensor with ", t.dim(), " axes");
  TORCH_CHECK(t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16, "layers are float32 or bfloat16, not ",
              t.dtype());
  return t.stride(-1) == 1 ? t : t.contiguous();
}

Tensors rowwise(at::TensorList given) {
  Tensors all;
  for (const Tensor& t : given) all.push_back(rowwise(t));
  return all;
}

Matrices matrices(const Tensor& t) {
  TORCH_CHECK(t.dim() == 3, "layers have three axes, not ", t.dim());
  return {t.data_ptr(), t.stride(0), t.stride(1), t.scalar_type() == at::kFloat};
}

// parameters: weights, offsets, and perhaps scale and shift of each hidden layer's normalisation. They must outlive it.
Chain described(const Tensor& x, const Tensors& parameters, long count, bool head) {
  const size_t norms = parameters.size() - 2 * count;
  TORCH_CHECK(count > head && (norms == 0 || norms == 2 * size_t(count - head)), "so many parameters do not fit");
  Chain c{x.size(0), x.size(1), x.size(2), count, 1, head, matrices(x), &of_this_thread(), {}};
  long products = 0;
  for (long i = 0; i < count; i++) {
    const Tensor &weight = parameters[i], &offset = parameters[count + i];
    TORCH_CHECK(weight.size(2) == (i ? parameters[i - 1].size(1) : c.inputs), "the weight of layer ", i,
                " does not fit");
    TORCH_CHECK(offset.size(2) == weight.size(1), "the offset of layer ", i, " does not fit");
    TORCH_CHECK(weight.scalar_type() == at::kFloat, "weights are float32, not ", weight.dtype());
    TORCH_CHECK(!head || i + 1 < count || weight.size(1) <= MOST_LAST, "a float32 last layer has at most ", MOST_LAST,
                " outputs");
    products += weight.numel() * c.rows;
    Layer l{weight.size(1), matrices(weight), matrices(offset)};
    if (offset.size(1) == 1) l.offset.row = 0;
    if (norms && i < count - head) {
      const Tensor &scale = parameters[2 * count + 2 * i], &shift = parameters[2 * count + 2 * i + 1];
      l.scale = scale.const_data_ptr<float>(), l.scale_member = scale.stride(0);
      l.shift = shift.const_data_ptr<float>(), l.shift_member = shift.stride(0);
    }
    c.layers.push_back(l);
  }
  if (products > WORTH_A_TEAM) c.threads = at::get_num_threads();
  return c;
}

// What the last layer gives, bfloat16 or with a head float; and, where it is to be kept, what `chain_gradient` needs.
std::tuple<Tensor, Tensor> chain(const Tensor& x_, at::TensorList parameters_, int64_t count, int64_t kind, bool head,
                                 bool keep) {
  const Tensor x = rowwise(x_);
  const Tensors parameters = rowwise(parameters_);
  const Chain c = described(x, parameters, count, head);
  const bool normalised = c.layers[0].scale;
  long kept = 0;
  if (keep && (kind != IDENTITY || count > 1 || normalised))
    for (long i = 0; i < count - head; i++) kept += (1 + normalised) * c.members * c.rows * c.layers[i].outputs;
  Tensor out =
      at::empty({c.members, c.rows, c.layers.back().outputs}, x.options().dtype(head ? at::kFloat : at::kBFloat16));
  Tensor z = at::empty({kept}, x.options().dtype(at::kBFloat16));
  together(c, kind,
           [&](auto k) { forward<k()>(c, kept ? static_cast<bf16*>(z.data_ptr()) : nullptr, out.data_ptr()); });
  return {out, z};
}

// Gradients by x and the parameters, without elements where they are not wanted; g: that by what `chain` gave.
Tensors chain_gradient(const Tensor& g_, const Tensor& z, const Tensor& x_, at::TensorList parameters_, int64_t count,
                       int64_t kind, bool head, at::IntArrayRef wanted) {
  const Tensor x = rowwise(x_), g = rowwise(g_);
  const Tensors parameters = rowwise(parameters_);
  Chain c = described(x, parameters, count, head);
  Tensors found;
  auto room = [&](const Tensor& like) {
    const bool asked = wanted[found.size()];
    found.push_back(asked ? at::empty(like.sizes(), like.options()) : at::empty({0}, like.options()));
    return asked ? found.back().data_ptr() : nullptr;
  };
  void* gx = room(x);
  for (long i = 0; i < count; i++) c.layers[i].weight_gradient = room(parameters[i]);
  for (long i = 0; i < count; i++) c.layers[i].offset_gradient = room(parameters[count + i]);
  for (size_t i = 2 * count; i < parameters.size(); i += 2) {
    Layer& l = c.layers[(i - 2 * count) / 2];
    l.scale_gradient = static_cast<float*>(room(parameters[i]));
    l.shift_gradient = static_cast<float*>(room(parameters[i + 1]));
  }
  together(c, kind, [&](auto k) { backward<k()>(c, matrices(g), static_cast<const bf16*>(z.data_ptr()), gx); });
  return found;
}

#define GIVEN "Tensor x, Tensor[] parameters, int count, int kind, bool head"

TORCH_LIBRARY(diffcps, library) {
  library.def("chain(" GIVEN ", bool keep) -> (Tensor, Tensor)");
  library.def("in_floats(bool whether) -> ()", [](bool whether) { in_floats = whether; });
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
