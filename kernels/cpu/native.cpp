// The CPU kernels of the engine: weight-only linear layers and attention over the paged cache, for any vector width.
//
// Plain C interface, no header of torch: it builds in seconds with whatever compiler the machine has, for its own
// instruction set. All arithmetic is in float32, accumulation included; every sum has a fixed order, so results do not
// depend on the number of threads.
//
// Layout of a weight [N, K], "panels": PANEL outputs lie side by side for each k, so that one load feeds PANEL sums.
//
//     panel p:   k = 0   | w[p·PANEL + 0, 0]  w[p·PANEL + 1, 0] … w[p·PANEL + PANEL-1, 0] |
//                k = 1   | w[p·PANEL + 0, 1]  …
//     INT4: byte j of a row holds output j in its low and output j + PANEL/2 in its high half.
//
// Few rows of x (up to ROWS): weights are decoded in registers and used at once; the cost is reading them. More rows: a
// piece of a panel is decoded into the first-level cache and used for all rows; the cost is the multiplications.

#include <omp.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12;  // 24 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 6;  // 12 accumulators of 16 registers
#else
constexpr int LANES = 4, ROWS = 6;  // NEON, SSE: 12 of 32 or 16 registers
#endif
constexpr int PANEL = 2 * LANES;
constexpr int K_PIECE = 256;  // columns of a panel that are decoded at a time: PANEL · 256 · 4 bytes stay in L1

using Vec = float __attribute__((vector_size(LANES * 4)));
using IntVec = int32_t __attribute__((vector_size(LANES * 4)));
using ShortVec = uint16_t __attribute__((vector_size(LANES * 2)));

enum Type : int { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };

template <class V, class T>
inline V load(const T* from) {
    V value;
    std::memcpy(&value, from, sizeof(V));
    return value;
}
template <class V>
inline void store(void* to, V value) {
    std::memcpy(to, &value, sizeof(V));
}
inline Vec splat(float x) { return x - Vec{}; }
template <class To, class From>
inline To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

inline float widen(uint16_t bits) {  // bfloat16 is the upper half of float32
    return same_bits<float>(uint32_t(bits) << 16);
}
inline uint16_t narrow(float value) {  // round to nearest, ties to even
    const uint32_t bits = same_bits<uint32_t>(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16) | 0x40;  // NaN stays NaN
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// LANES bytes as integers. Spelled out where compilers turn the conversion into a loop over elements.
template <class Byte>
inline IntVec load_bytes(const Byte* from) {
    constexpr bool is_signed = Byte(-1) < Byte(0);
#if defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return same_bits<IntVec>(is_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#elif defined(__AVX2__)
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return same_bits<IntVec>(is_signed ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#else
    using Bytes = Byte __attribute__((vector_size(LANES)));
    return __builtin_convertvector(load<Bytes>(from), IntVec);
#endif
}

// LANES bfloat16 values as floats.
inline Vec load_widened(const uint16_t* from) {
#if defined(__AVX512F__)
    return same_bits<Vec>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(same_bits<__m256i>(load<ShortVec>(from))), 16));
#elif defined(__AVX2__)
    return same_bits<Vec>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(same_bits<__m128i>(load<ShortVec>(from))), 16));
#else
    return same_bits<Vec>(__builtin_convertvector(load<ShortVec>(from), IntVec) << 16);
#endif
}

inline Vec load_as_float(const float* from) { return load<Vec>(from); }
inline Vec load_as_float(const uint16_t* from) { return load_widened(from); }
inline void put(float* to, float value) { *to = value; }
inline void put(uint16_t* to, float value) { *to = narrow(value); }

struct Pair {
    Vec low, high;
};

// ---- linear ---------------------------------------------------------------------------------------------------------

template <Type T>
constexpr int row_bytes() {
    return T == F32 ? PANEL * 4 : T == BF16 ? PANEL * 2 : T == INT8 ? PANEL : PANEL / 2;
}

template <Type T>
inline Pair decode(const uint8_t* row) {
    if constexpr (T == F32) return {load<Vec>(row), load<Vec>(row + LANES * 4)};
    if constexpr (T == BF16) {
        const uint16_t* values = reinterpret_cast<const uint16_t*>(row);
        return {load_widened(values), load_widened(values + LANES)};
    }
    if constexpr (T == INT8) {
        const int8_t* values = reinterpret_cast<const int8_t*>(row);
        return {__builtin_convertvector(load_bytes(values), Vec),
                __builtin_convertvector(load_bytes(values + LANES), Vec)};
    }
    const IntVec both = load_bytes(row);
    return {__builtin_convertvector(both & 15, Vec), __builtin_convertvector(both >> 4, Vec)};
}

// Scale and zero point of a panel's group; w = q · scale + offset with offset = zero - 8 · scale.
struct Grid {
    Pair scale, offset;
    explicit Grid(const uint16_t* parameters) {
        scale = {load_widened(parameters), load_widened(parameters + LANES)};
        offset = {load_widened(parameters + PANEL), load_widened(parameters + PANEL + LANES)};
        offset.low -= scale.low * 8.0f;
        offset.high -= scale.high * 8.0f;
    }
};

// The grids of a panel's groups: bfloat16 [count / group, 2, PANEL]. Only INT4 has them.
struct Grids {
    const uint16_t* parameters;
    int64_t group;
    Grid of(int64_t k) const { return Grid(parameters + k / group * 2 * PANEL); }
};

// sums[r] += x[r, 0:count] · panel rows, the panel being decoded on the way. UNROLL sums run side by side where R is
// small, since one chain of dependent multiply-adds is several cycles a link.
template <Type T, int R>
inline void multiply(const float* x, int64_t ldx, const uint8_t* panel, int64_t count, Grids grids, Pair* sums) {
    constexpr int UNROLL = R == 1 ? 4 : R == 2 ? 2 : 1;
    Pair part[UNROLL][R];
    for (int u = 0; u < UNROLL; ++u)
        for (int r = 0; r < R; ++r) part[u][r] = u == 0 ? sums[r] : Pair{Vec{}, Vec{}};
    const int64_t span = T == INT4 ? grids.group : count;
    for (int64_t begin = 0; begin < count; begin += span) {
        Pair scale, offset;
        if constexpr (T == INT4) {
            const Grid grid = grids.of(begin);
            scale = grid.scale, offset = grid.offset;
        }
        auto step = [&](int64_t k, int u) __attribute__((always_inline)) {
            Pair w = decode<T>(panel + k * row_bytes<T>());
            if constexpr (T == INT4) w = {w.low * scale.low + offset.low, w.high * scale.high + offset.high};
            for (int r = 0; r < R; ++r) {
                const Vec value = splat(x[r * ldx + k]);
                part[u][r].low += value * w.low;
                part[u][r].high += value * w.high;
            }
        };
        int64_t k = begin;
        for (; k + UNROLL <= begin + span; k += UNROLL)
            for (int u = 0; u < UNROLL; ++u) step(k + u, u);
        for (; k < begin + span; ++k) step(k, 0);
    }
    for (int r = 0; r < R; ++r) {
        sums[r] = part[0][r];
        for (int u = 1; u < UNROLL; ++u) sums[r] = {sums[r].low + part[u][r].low, sums[r].high + part[u][r].high};
    }
}

// multiply() with the number of rows known only now.
template <Type T>
inline void multiply_rows(int rows, const float* x, int64_t ldx, const uint8_t* panel, int64_t count, Grids grids,
                          Pair* sums) {
    switch (rows) {
        case 1: return multiply<T, 1>(x, ldx, panel, count, grids, sums);
        case 2: return multiply<T, 2>(x, ldx, panel, count, grids, sums);
        case 3: return multiply<T, 3>(x, ldx, panel, count, grids, sums);
        case 4: return multiply<T, 4>(x, ldx, panel, count, grids, sums);
        case 5: return multiply<T, 5>(x, ldx, panel, count, grids, sums);
        case 6: return multiply<T, 6>(x, ldx, panel, count, grids, sums);
#if defined(__AVX512F__)
        case 7: return multiply<T, 7>(x, ldx, panel, count, grids, sums);
        case 8: return multiply<T, 8>(x, ldx, panel, count, grids, sums);
        case 9: return multiply<T, 9>(x, ldx, panel, count, grids, sums);
        case 10: return multiply<T, 10>(x, ldx, panel, count, grids, sums);
        case 11: return multiply<T, 11>(x, ldx, panel, count, grids, sums);
        case 12: return multiply<T, 12>(x, ldx, panel, count, grids, sums);
#endif
        default: __builtin_unreachable();
    }
}

// Rows at a time, at most ROWS, so that m of them fall into equal shares: 7 as 4 + 3, not as 6 + 1.
inline int64_t even_rows(int64_t m) {
    const int64_t shares = (m + ROWS - 1) / ROWS;
    return (m + shares - 1) / shares;
}

struct Weight {
    Type type;
    const uint8_t* panels;         // [panels, K, row_bytes]
    const uint16_t* parameters;    // INT4: bfloat16 [panels, K / group, 2, PANEL]: scales, then zero points
    const uint16_t* scales;        // INT8: bfloat16 [panels · PANEL], applied to the sums
    int64_t outputs, inputs, group;
};

// Columns begin … begin + count of a panel as floats, [count, PANEL].
template <Type T>
void decode_piece(const uint8_t* panel, int64_t begin, int64_t count, Grids grids, float* out) {
    for (int64_t k = begin, end = begin + count; k < end;) {
        const int64_t stop = T == INT4 ? std::min(end, k / grids.group * grids.group + grids.group) : end;
        Pair scale, offset;
        if constexpr (T == INT4) {
            const Grid grid = grids.of(k);
            scale = grid.scale, offset = grid.offset;
        }
        for (; k < stop; ++k, out += PANEL) {
            Pair w = decode<T>(panel + k * row_bytes<T>());
            if constexpr (T == INT4) w = {w.low * scale.low + offset.low, w.high * scale.high + offset.high};
            store(out, w.low);
            store(out + LANES, w.high);
        }
    }
}

// The sums of one panel for all rows of x, into sums [M] pairs.
template <Type T>
void panel_sums(const Weight& w, int64_t index, const float* x, int64_t m, Pair* sums, float* buffer) {
    std::fill(sums, sums + m, Pair{Vec{}, Vec{}});
    const uint8_t* panel = w.panels + index * w.inputs * row_bytes<T>();
    const Grids grids{T == INT4 ? w.parameters + index * (w.inputs / w.group) * 2 * PANEL : nullptr, w.group};
    if (m <= ROWS) return multiply_rows<T>(int(m), x, w.inputs, panel, w.inputs, grids, sums);
    const int64_t rows = even_rows(m);
    for (int64_t k = 0; k < w.inputs; k += K_PIECE) {
        const int64_t count = std::min<int64_t>(K_PIECE, w.inputs - k);
        const uint8_t* piece = panel + k * row_bytes<T>();
        if constexpr (T != F32) {
            decode_piece<T>(panel, k, count, grids, buffer);
            piece = reinterpret_cast<const uint8_t*>(buffer);
        }
        for (int64_t row = 0; row < m; row += rows)
            multiply_rows<F32>(int(std::min(rows, m - row)), x + row * w.inputs + k, w.inputs, piece, count, {},
                               sums + row);
    }
}

template <class Out>
void finish_panel(const Weight& w, int64_t panel, const Pair* sums, int64_t m, const float* bias, Out* y) {
    const int64_t first = panel * PANEL, valid = std::min<int64_t>(PANEL, w.outputs - first);
    float row[PANEL];
    for (int64_t r = 0; r < m; ++r) {
        store(row, sums[r].low);
        store(row + LANES, sums[r].high);
        if (w.type == INT8)
            for (int64_t n = 0; n < valid; ++n) row[n] *= widen(w.scales[first + n]);
        if (bias)
            for (int64_t n = 0; n < valid; ++n) row[n] += bias[first + n];
        for (int64_t n = 0; n < valid; ++n) put(y + r * w.outputs + first + n, row[n]);
    }
}

// Scratch of a thread that only grows: pages are touched once, not in every call.
template <class T>
T* scratch(int64_t count) {
    static thread_local std::vector<char> storage;
    const size_t bytes = size_t(count) * sizeof(T) + 64;
    if (storage.size() < bytes) storage.resize(bytes);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(storage.data()) + 63) & ~uintptr_t(63));
}

template <class Out>
void linear(const float* x, int64_t m, const Weight& w, const float* bias, Out* y, int threads) {
    const int64_t panels = (w.outputs + PANEL - 1) / PANEL;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
        const int64_t buffer_pairs = K_PIECE * PANEL * 4 / sizeof(Pair);
        Pair* sums = scratch<Pair>(m + buffer_pairs);
        float* buffer = reinterpret_cast<float*>(sums + m);
        for (int64_t panel = panels * me / team; panel < panels * (me + 1) / team; ++panel) {
            switch (w.type) {
                case F32: panel_sums<F32>(w, panel, x, m, sums, buffer); break;
                case BF16: panel_sums<BF16>(w, panel, x, m, sums, buffer); break;
                case INT8: panel_sums<INT8>(w, panel, x, m, sums, buffer); break;
                case INT4: panel_sums<INT4>(w, panel, x, m, sums, buffer); break;
            }
            finish_panel(w, panel, sums, m, bias, y);
        }
    }
}

// ---- attention ------------------------------------------------------------------------------------------------------

constexpr int KV_TILE = 128;           // positions whose scores are held at a time
constexpr int FEW_ROWS = 8;            // up to this many query rows, scores are plain dot products
constexpr int64_t MANY_ROWS = 96;      // query rows of one tile of a prompt
constexpr int64_t MOST_DIM = 512;      // of a head
constexpr float NEGATIVE = -1e30f;     // stands for minus infinity without its NaNs

inline Vec exp_vec(Vec x) {  // Cody-Waite reduction and a polynomial of degree 6; relative error below 2e-7
    x = x < splat(-87.0f) ? splat(-87.0f) : x;
    IntVec n = __builtin_convertvector(x * 1.44269504f + (x < splat(0.0f) ? splat(-0.5f) : splat(0.5f)), IntVec);
    Vec steps = __builtin_convertvector(n, Vec);
    Vec r = x - steps * 0.693359375f + steps * 2.12194440e-4f;
    Vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * same_bits<Vec>((n + 127) << 23);
}
inline float sum_lanes(Vec v) {
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += v[i];
    return total;
}

template <class E>
struct Attention {
    const E *query, *keys, *values;
    E* out;
    const int32_t *tables, *query_start, *context_lens;
    int64_t batch, table_width, heads, kv_heads, dim, block, query_stride, window;
    float scale;

    int64_t width() const { return (dim + PANEL - 1) / PANEL * PANEL; }  // of a row of outputs while they are summed

    const E* row(const E* cache, int64_t sequence, int64_t kv_head, int64_t position) const {
        const int64_t index = tables[sequence * table_width + position / block];
        return cache + ((index * block + position % block) * kv_heads + kv_head) * dim;
    }
};

// The part of a softmax that one tile of query rows has seen so far: outputs not yet divided by their sums.
struct State {
    float *largest, *sum, *output;  // [R], [R], [R, width]
};

struct Rows {  // query rows (query, head of the group) of a task
    int64_t sequence, kv_head, first_query, queries, group;
    int64_t count() const { return queries * group; }
};

// Positions of the cache that any of the rows can see: [begin, end).
template <class E>
void visible(const Attention<E>& a, const Rows& rows, int64_t* begin, int64_t* end) {
    const int64_t length = a.query_start[rows.sequence + 1] - a.query_start[rows.sequence];
    const int64_t first = a.context_lens[rows.sequence] - length + rows.first_query;
    *end = first + rows.queries;
    *begin = a.window > 0 ? std::max<int64_t>(0, first + 1 - a.window) : 0;
}

// Mask, online softmax (Milakov & Gimelshein 2018): scores [R, KV_TILE] become weights, the state is rescaled.
template <class E>
void soften(const Attention<E>& a, const Rows& rows, int64_t begin, int64_t count, float* scores, State s) {
    const int64_t length = a.query_start[rows.sequence + 1] - a.query_start[rows.sequence];
    const int64_t past = a.context_lens[rows.sequence] - length;
    const int64_t padded = (count + LANES - 1) / LANES * LANES;
    for (int64_t r = 0; r < rows.count(); ++r) {
        float* line = scores + r * KV_TILE;
        const int64_t position = past + rows.first_query + r / rows.group;
        const int64_t last = std::min(count, position + 1 - begin);
        const int64_t first = a.window > 0 ? std::max<int64_t>(0, position + 1 - a.window - begin) : 0;
        for (int64_t t = 0; t < std::min(first, padded); ++t) line[t] = NEGATIVE;
        for (int64_t t = std::max<int64_t>(last, 0); t < padded; ++t) line[t] = NEGATIVE;
        float largest = s.largest[r];
        for (int64_t t = first; t < last; ++t) largest = std::max(largest, line[t]);
        if (largest <= NEGATIVE) {  // nothing seen yet
            std::fill(line, line + padded, 0.0f);
            continue;
        }
        Vec total{};
        for (int64_t t = 0; t < padded; t += LANES) {
            Vec v = load<Vec>(line + t);
            Vec e = exp_vec(v - splat(largest));
            e = v > splat(NEGATIVE) ? e : Vec{};
            total += e;
            store(line + t, e);
        }
        const float keep = s.largest[r] <= NEGATIVE ? 0.0f : std::exp(s.largest[r] - largest);
        s.sum[r] = s.sum[r] * keep + sum_lanes(total);
        s.largest[r] = largest;
        if (keep != 1.0f)
            for (int64_t d = 0; d < a.dim; ++d) s.output[r * a.width() + d] *= keep;
    }
}

// Few rows (decode, verification): dot products with the cache's own rows, each read once.
template <class E, int R>
void attend_few(const Attention<E>& a, const Rows& rows, int64_t begin, int64_t end, const float* query, float* scores,
                State s) {
    const E *keys[KV_TILE], *values[KV_TILE];
    for (int64_t tile = begin; tile < end; tile += KV_TILE) {
        const int64_t count = std::min<int64_t>(KV_TILE, end - tile);
        for (int64_t t = 0; t < count; ++t) {
            keys[t] = a.row(a.keys, rows.sequence, rows.kv_head, tile + t);
            values[t] = a.row(a.values, rows.sequence, rows.kv_head, tile + t);
        }
        for (int64_t t = 0; t < count; ++t) {
            Vec sums[R] = {};
            for (int64_t d = 0; d < a.dim; d += LANES) {
                Vec k = load_as_float(keys[t] + d);
                for (int r = 0; r < R; ++r) sums[r] += k * load<Vec>(query + r * a.dim + d);
            }
            for (int r = 0; r < R; ++r) scores[r * KV_TILE + t] = sum_lanes(sums[r]);
        }
        soften(a, rows, tile, count, scores, s);
        for (int64_t d = 0; d < a.dim; d += LANES) {
            Vec sums[R];
            for (int r = 0; r < R; ++r) sums[r] = load<Vec>(s.output + r * a.width() + d);
            for (int64_t t = 0; t < count; ++t) {
                Vec v = load_as_float(values[t] + d);
                for (int r = 0; r < R; ++r) sums[r] += v * scores[r * KV_TILE + t];
            }
            for (int r = 0; r < R; ++r) store(s.output + r * a.width() + d, sums[r]);
        }
    }
}

// out[r, 0:n] (+)= x[r, 0:count] · panels, by the same inner product as the linear layers. n is a multiple of PANEL.
void product(const float* x, int64_t ldx, int64_t rows, const float* panels, int64_t count, int64_t n, float* out,
             int64_t ldo, bool add) {
    Pair sums[ROWS];
    for (int64_t first = 0; first < n; first += PANEL)
        for (int64_t row = 0; row < rows; row += ROWS) {
            const int64_t m = std::min<int64_t>(ROWS, rows - row);
            for (int64_t r = 0; r < m; ++r) {
                float* target = out + (row + r) * ldo + first;
                sums[r] = add ? Pair{load<Vec>(target), load<Vec>(target + LANES)} : Pair{Vec{}, Vec{}};
            }
            multiply_rows<F32>(int(m), x + row * ldx, ldx, reinterpret_cast<const uint8_t*>(panels + first * count),
                               count, {}, sums);
            for (int64_t r = 0; r < m; ++r) {
                float* target = out + (row + r) * ldo + first;
                store(target, sums[r].low);
                store(target + LANES, sums[r].high);
            }
        }
}

// Many rows (a prompt): a tile of keys and values is laid out as panels once and used for all rows.
template <class E>
void attend_many(const Attention<E>& a, const Rows& rows, int64_t begin, int64_t end, const float* query, float* scores,
                 float* key_panels, float* value_panels, State s) {
    for (int64_t tile = begin; tile < end; tile += KV_TILE) {
        const int64_t count = std::min<int64_t>(KV_TILE, end - tile);
        const int64_t padded = (count + PANEL - 1) / PANEL * PANEL;
        for (int64_t t = 0; t < padded; ++t) {
            float* column = key_panels + t / PANEL * PANEL * a.dim + t % PANEL;
            float line[MOST_DIM];
            if (t < count) {
                const E* key = a.row(a.keys, rows.sequence, rows.kv_head, tile + t);
                const E* value = a.row(a.values, rows.sequence, rows.kv_head, tile + t);
                for (int64_t d = 0; d < a.dim; d += LANES) store(line + d, load_as_float(key + d));
                for (int64_t d = 0; d < a.dim; d += LANES)
                    store(value_panels + d / PANEL * PANEL * count + t * PANEL + d % PANEL, load_as_float(value + d));
            } else {
                std::fill(line, line + a.dim, 0.0f);
            }
            for (int64_t d = 0; d < a.dim; ++d) column[d * PANEL] = line[d];
        }
        product(query, a.dim, rows.count(), key_panels, a.dim, padded, scores, KV_TILE, false);
        soften(a, rows, tile, count, scores, s);
        product(scores, KV_TILE, rows.count(), value_panels, count, a.width(), s.output, a.width(), true);
    }
}

template <class E>
void attend_rows(const Attention<E>& a, const Rows& rows, int64_t begin, int64_t end, float* work, State s) {
    const int64_t count = rows.count();
    float *query = work, *scores = query + count * a.dim;
    float *key_panels = scores + count * KV_TILE, *value_panels = key_panels + KV_TILE * a.dim;
    for (int64_t r = 0; r < count; ++r) {
        const int64_t token = a.query_start[rows.sequence] + rows.first_query + r / rows.group;
        const E* from = a.query + token * a.query_stride + (rows.kv_head * rows.group + r % rows.group) * a.dim;
        for (int64_t d = 0; d < a.dim; d += LANES) store(query + r * a.dim + d, load_as_float(from + d) * a.scale);
    }
    std::fill(s.largest, s.largest + count, NEGATIVE);
    std::fill(s.sum, s.sum + count, 0.0f);
    std::fill(s.output, s.output + count * a.width(), 0.0f);
    switch (count) {
        case 1: return attend_few<E, 1>(a, rows, begin, end, query, scores, s);
        case 2: return attend_few<E, 2>(a, rows, begin, end, query, scores, s);
        case 3: return attend_few<E, 3>(a, rows, begin, end, query, scores, s);
        case 4: return attend_few<E, 4>(a, rows, begin, end, query, scores, s);
        case 5: return attend_few<E, 5>(a, rows, begin, end, query, scores, s);
        case 6: return attend_few<E, 6>(a, rows, begin, end, query, scores, s);
        case 7: return attend_few<E, 7>(a, rows, begin, end, query, scores, s);
        case 8: return attend_few<E, 8>(a, rows, begin, end, query, scores, s);
        default: return attend_many(a, rows, begin, end, query, scores, key_panels, value_panels, s);
    }
}

// One piece of work: query rows over a span of the cache. Long spans of a small batch are cut into parts.
struct Task {
    Rows rows;
    int64_t begin, end;
    int64_t part, parts;  // of the same rows
    int64_t state;        // offset of the part's state in the shared workspace, if parts > 1
};

template <class E>
std::vector<Task> make_tasks(const Attention<E>& a, int threads, int64_t* workspace) {
    const int64_t group = a.heads / a.kv_heads;
    std::vector<Task> tasks;
    for (int64_t sequence = 0; sequence < a.batch; ++sequence) {
        const int64_t length = a.query_start[sequence + 1] - a.query_start[sequence];
        const int64_t tile = length * group <= FEW_ROWS ? length : std::max<int64_t>(1, MANY_ROWS / group);
        for (int64_t first = 0; first < length; first += tile)
            for (int64_t kv_head = 0; kv_head < a.kv_heads; ++kv_head) {
                Task task{{sequence, kv_head, first, std::min(tile, length - first), group}, 0, 0, 0, 1, 0};
                visible(a, task.rows, &task.begin, &task.end);
                tasks.push_back(task);
            }
    }
    *workspace = 0;
    if (threads == 1 || int64_t(tasks.size()) >= 4 * threads) return tasks;
    std::vector<Task> split;
    const int64_t wanted = (4 * threads + int64_t(tasks.size()) - 1) / int64_t(tasks.size());
    for (const Task& whole : tasks) {
        const int64_t span = whole.end - whole.begin;
        const int64_t parts = std::max<int64_t>(1, std::min(wanted, span / (2 * KV_TILE)));
        const int64_t each = (span + parts - 1) / parts;
        for (int64_t part = 0; part < parts; ++part) {
            Task task = whole;
            task.begin = whole.begin + part * each;
            task.end = std::min(whole.end, task.begin + each);
            task.part = part, task.parts = parts, task.state = *workspace;
            if (parts > 1) *workspace += whole.rows.count() * (a.width() + 2);
            split.push_back(task);
        }
    }
    return split;
}

template <class E>
void write_rows(const Attention<E>& a, const Rows& rows, State s) {
    for (int64_t r = 0; r < rows.count(); ++r) {
        const int64_t token = a.query_start[rows.sequence] + rows.first_query + r / rows.group;
        E* to = a.out + (token * a.heads + rows.kv_head * rows.group + r % rows.group) * a.dim;
        const float factor = 1.0f / s.sum[r];
        for (int64_t d = 0; d < a.dim; ++d) put(to + d, s.output[r * a.width() + d] * factor);
    }
}

State state_at(float* memory, int64_t rows) { return {memory, memory + rows, memory + 2 * rows}; }

// Log-sum-exp merge of the parts of one task (Dao et al. 2023, flash-decoding), in their order; the first holds the sum.
template <class E>
void merge(const Attention<E>& a, const std::vector<Task>& tasks, size_t first, float* workspace) {
    const Rows& rows = tasks[first].rows;
    State into = state_at(workspace + tasks[first].state, rows.count());
    for (int64_t part = 1; part < tasks[first].parts; ++part) {
        State from = state_at(workspace + tasks[first + part].state, rows.count());
        for (int64_t r = 0; r < rows.count(); ++r) {
            const float largest = std::max(into.largest[r], from.largest[r]);
            const float keep = std::exp(into.largest[r] - largest), take = std::exp(from.largest[r] - largest);
            into.sum[r] = into.sum[r] * keep + from.sum[r] * take;
            float *to = into.output + r * a.width(), *add = from.output + r * a.width();
            for (int64_t d = 0; d < a.dim; ++d) to[d] = to[d] * keep + add[d] * take;
            into.largest[r] = largest;
        }
    }
    write_rows(a, rows, into);
}

template <class E>
void attention(const Attention<E>& a, int threads) {
    int64_t shared = 0;
    const std::vector<Task> tasks = make_tasks(a, threads, &shared);
    std::vector<float> workspace(static_cast<size_t>(shared));
    const int64_t group = a.heads / a.kv_heads;
    const int64_t most = std::max<int64_t>({FEW_ROWS, MANY_ROWS, group});
    const int64_t work = most * (a.width() + 2 + a.dim + KV_TILE) + KV_TILE * (a.dim + a.width());
#pragma omp parallel num_threads(threads) if (threads > 1 && tasks.size() > 1)
    {
        float* memory = scratch<float>(work);
#pragma omp for schedule(dynamic, 1)
        for (size_t index = 0; index < tasks.size(); ++index) {
            const Task& task = tasks[index];
            const int64_t count = task.rows.count();
            State s = task.parts > 1 ? state_at(workspace.data() + task.state, count) : state_at(memory, count);
            attend_rows(a, task.rows, task.begin, task.end, memory + most * (a.width() + 2), s);
            if (task.parts == 1) write_rows(a, task.rows, s);
        }
    }
    for (size_t index = 0; index < tasks.size(); ++index)
        if (tasks[index].parts > 1 && tasks[index].part == 0) merge(a, tasks, index, workspace.data());
}

}  // namespace

extern "C" {

int headroom_panel() { return PANEL; }
int headroom_lanes() { return LANES; }

// y [M, outputs] = x [M, inputs] · Wᵀ + bias. x and y: both float32 (activation = 0) or bfloat16 (1), contiguous.
void headroom_linear(const void* x, int activation, int64_t m, int type, const void* panels, const void* parameters,
                     const void* scales, const float* bias, int64_t outputs, int64_t inputs, int64_t group, void* y,
                     int threads) {
    const Weight w{Type(type),
                   static_cast<const uint8_t*>(panels),
                   static_cast<const uint16_t*>(parameters),
                   static_cast<const uint16_t*>(scales),
                   outputs,
                   inputs,
                   group};
    if (activation == F32)
        return linear(static_cast<const float*>(x), m, w, bias, static_cast<float*>(y), threads);
    static thread_local std::vector<float> wide;
    const int64_t count = m * inputs;
    if (int64_t(wide.size()) < count) wide.resize(count);
    const uint16_t* from = static_cast<const uint16_t*>(x);
    for (int64_t i = 0; i < count; ++i) wide[i] = widen(from[i]);
    linear(wide.data(), m, w, bias, static_cast<uint16_t*>(y), threads);
}

// Copies the step's keys and values to their slots (block · block_size + offset; negative: nowhere).
void headroom_kv_write(const void* key, const void* value, int64_t key_stride, int64_t value_stride, void* keys,
                       void* values, const int64_t* slots, int64_t tokens, int64_t row_bytes) {
    for (int64_t t = 0; t < tokens; ++t) {
        if (slots[t] < 0) continue;
        std::memcpy(static_cast<char*>(keys) + slots[t] * row_bytes,
                    static_cast<const char*>(key) + t * key_stride, size_t(row_bytes));
        std::memcpy(static_cast<char*>(values) + slots[t] * row_bytes,
                    static_cast<const char*>(value) + t * value_stride, size_t(row_bytes));
    }
}

// Causal attention over the paged cache, bottom-right aligned. dtype 0: float32, 1: bfloat16, for query, cache and out.
void headroom_attention(const void* query, const void* keys, const void* values, void* out, int dtype,
                        const int32_t* tables, const int32_t* query_start, const int32_t* context_lens, int64_t batch,
                        int64_t table_width, int64_t heads, int64_t kv_heads, int64_t dim, int64_t block,
                        int64_t query_stride, int64_t window, float scale, int threads) {
    auto run = [&](auto element) {
        using E = decltype(element);
        attention(Attention<E>{static_cast<const E*>(query), static_cast<const E*>(keys),
                               static_cast<const E*>(values), static_cast<E*>(out), tables, query_start, context_lens,
                               batch, table_width, heads, kv_heads, dim, block, query_stride, window, scale},
                  threads);
    };
    if (dtype == F32)
        run(float{});
    else
        run(uint16_t{});
}
}
