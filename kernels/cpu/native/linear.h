// Weight-only linear layers.
//
// Layout of a weight [N, K], "panels": PANEL outputs lie side by side for each k, so that one load feeds many sums.
//
//     float32, bfloat16:  row k of a panel: w[0, k] w[1, k] … w[PANEL-1, k]
//     INT8:  row of two columns k, k + 1:   w[0, k] w[0, k+1] w[1, k] w[1, k+1] …
//     INT4:  row of four columns, in 16-bit words: word 2j + i (i = 0, 1; j < PANEL/2) holds, from its low bits up,
//            w[j, k+i]  w[j + PANEL/2, k+i]  w[j, k+2+i]  w[j + PANEL/2, k+2+i]
//
//     W4A8:  as INT4; read as bytes, output j's four columns come in the order k, k + 2, k + 1, k + 3
//
// Floats are multiplied as floats. Integers are multiplied as integers: x is rounded to 16 bits in groups of columns
// (by 1.5e-5 of the group's largest value, a 250th of what bfloat16 rounds), and pairs of products are summed in 32
// bits, exactly; so the result of a row has the same bits whatever other rows come with it. W4A8 rounds x to 8 bits in
// groups of 32 columns (by a 254th of the group's largest value), which takes half the operations.
//
// Few rows of x (up to ROWS): weights are decoded in registers and used at once; the cost is reading them. More rows: a
// piece of a panel is decoded into the first-level cache and used for all rows; the cost is the multiplications.
#pragma once

#include <omp.h>

#include <type_traits>

#include "simd.h"

namespace {

constexpr int K_PIECE = 256;  // columns of a panel that are decoded at a time: PANEL · 256 · 4 bytes stay in L1
constexpr int WORD_ROWS = LANES == 8 ? 5 : ROWS;  // of integers: 10 of 16 registers are sums
constexpr int BYTE_ROWS = LANES == 8 ? 6 : ROWS;
constexpr int BYTE_GROUP = 4 * MOST_BYTE_PRODUCTS;  // columns, of weights and activations
constexpr int MOST_GROUP = 128;  // columns: 127 · 32767 · 128 fits into 32 bits, and K_PIECE holds whole groups

struct Weight {
    Type type;
    const uint8_t* panels;           // [panels, K, PANEL]
    const uint16_t* parameters;      // INT4, W4A8: bfloat16 [panels, K / group, 2, PANEL]: scales, then zero points
    const uint16_t* scales;          // INT8: bfloat16 [outputs], applied to the sums
    const float* bias;               // [outputs] or null
    int64_t outputs, inputs, group;  // outputs: a multiple of PANEL; group: of integer types, divides inputs

    bool integers() const { return type == INT8 || type == INT4 || type == W4A8; }
    int64_t num_panels() const { return outputs / PANEL; }
    int64_t num_groups() const { return integers() ? inputs / group : 0; }
    const uint8_t* panel(int64_t index) const {
        const int64_t bits = type == F32 ? 32 : type == BF16 ? 16 : type == INT8 ? 8 : 4;
        return panels + index * inputs * PANEL * bits / 8;
    }
};

inline Weight make_weight(int64_t type, const void* panels, const void* parameters, const void* scales,
                          const float* bias, int64_t outputs, int64_t inputs, int64_t group) {
    return {Type(type),
            static_cast<const uint8_t*>(panels),
            static_cast<const uint16_t*>(parameters),
            static_cast<const uint16_t*>(scales),
            bias,
            outputs,
            inputs,
            group};
}

// Rows of x as a product reads them: floats, or 16-bit integers with a scale for each row and group of columns.
struct Input {
    int64_t rows, inputs;
    const float* x;        // [rows, inputs]
    const int16_t* words;  // [rows, inputs]
    const int8_t* bytes;   // [rows, inputs], of W4A8 in place of words: each four as the weight has them
    const float* scales;   // [rows, groups]
    const float* sums;     // [rows, groups]: of the rounded x
};

// ---- floats ---------------------------------------------------------------------------------------------------------

template <Type T>
inline Pair decode(const uint8_t* row) {
    if constexpr (T == F32) return {load<Vec>(row), load<Vec>(row + LANES * 4)};
    const uint16_t* values = reinterpret_cast<const uint16_t*>(row);
    return {load_widened(values), load_widened(values + LANES)};
}

// sums[r] += x[r, 0:count] · panel rows, the panel being decoded on the way. UNROLL sums run side by side where R is
// small, since one chain of dependent multiply-adds is several cycles a link.
template <Type T, int R>
inline void multiply(const float* x, int64_t ldx, const uint8_t* panel, int64_t count, Pair* sums) {
    constexpr int UNROLL = R == 1 ? 4 : R == 2 ? 2 : 1, ROW_BYTES = PANEL * (T == F32 ? 4 : 2);
    Pair part[UNROLL][R];
    for (int u = 0; u < UNROLL; ++u)
        for (int r = 0; r < R; ++r) part[u][r] = u == 0 ? sums[r] : Pair{Vec{}, Vec{}};
    auto step = [&](int64_t k, int u) __attribute__((always_inline)) {
        const Pair w = decode<T>(panel + k * ROW_BYTES);
        for (int r = 0; r < R; ++r) {
            const Vec value = splat(x[r * ldx + k]);
            part[u][r].low += value * w.low;
            part[u][r].high += value * w.high;
        }
    };
    int64_t k = 0;
    for (; k + UNROLL <= count; k += UNROLL)
        for (int u = 0; u < UNROLL; ++u) step(k + u, u);
    for (; k < count; ++k) step(k, 0);
    for (int r = 0; r < R; ++r) {
        sums[r] = part[0][r];
        for (int u = 1; u < UNROLL; ++u) sums[r] = {sums[r].low + part[u][r].low, sums[r].high + part[u][r].high};
    }
}

// run(std::integral_constant<int, R>) with R = rows, which is known only now.
template <class Run>
inline void with_rows(int64_t rows, Run run) {
    switch (rows) {
#define HEADROOM_CASE(R) \
    case R: return run(std::integral_constant<int, R>{});
        HEADROOM_CASE(1) HEADROOM_CASE(2) HEADROOM_CASE(3) HEADROOM_CASE(4) HEADROOM_CASE(5) HEADROOM_CASE(6)
#if defined(HEADROOM_AVX512)
        HEADROOM_CASE(7) HEADROOM_CASE(8) HEADROOM_CASE(9) HEADROOM_CASE(10) HEADROOM_CASE(11) HEADROOM_CASE(12)
#endif
#undef HEADROOM_CASE
        default: __builtin_unreachable();
    }
}

template <Type T>
inline void multiply_rows(int64_t rows, const float* x, int64_t ldx, const uint8_t* panel, int64_t count, Pair* sums) {
    with_rows(rows, [&](auto r) { multiply<T, decltype(r)::value>(x, ldx, panel, count, sums); });
}

// share(first row, end) over shares of equal size, at most `most` each: 7 rows as 3 + 4, not as 6 + 1.
template <class Share>
inline void in_shares(int64_t rows, int64_t most, Share share) {
    const int64_t shares = (rows + most - 1) / most;
    for (int64_t i = 0; i < shares; ++i) share(rows * i / shares, rows * (i + 1) / shares);
}

// The sums of one panel for all rows of x, into sums [rows].
template <Type T>
void sum_floats(const Weight& w, int64_t index, const Input& in, Pair* sums, float* buffer) {
    std::fill(sums, sums + in.rows, Pair{Vec{}, Vec{}});
    const uint8_t* panel = w.panel(index);
    if (in.rows <= ROWS) return multiply_rows<T>(in.rows, in.x, w.inputs, panel, w.inputs, sums);
    constexpr int ROW_BYTES = PANEL * (T == F32 ? 4 : 2);
    for (int64_t begin = 0; begin < w.inputs; begin += K_PIECE) {
        const int64_t count = std::min<int64_t>(K_PIECE, w.inputs - begin);
        const uint8_t* piece = panel + begin * ROW_BYTES;
        if constexpr (T != F32) {
            for (int64_t k = 0; k < count; ++k) {
                const Pair column = decode<T>(piece + k * ROW_BYTES);
                store(buffer + k * PANEL, column.low);
                store(buffer + k * PANEL + LANES, column.high);
            }
            piece = reinterpret_cast<const uint8_t*>(buffer);
        }
        in_shares(in.rows, ROWS, [&](int64_t row, int64_t end) {
            multiply_rows<F32>(end - row, in.x + row * w.inputs + begin, w.inputs, piece, count, sums + row);
        });
    }
}

// ---- integers -------------------------------------------------------------------------------------------------------

// Two columns of a panel (the first pair of four, or the second) as words: of the outputs of its lower and of its upper
// half; `packed` is where the four lie.
template <Type T>
inline void decode_pair(const uint8_t* packed, int pair, WordVec& low, WordVec& high) {
    if constexpr (T == INT8) {
        const int8_t* bytes = reinterpret_cast<const int8_t*>(packed) + pair * 2 * PANEL;
        low = load_words(bytes), high = load_words(bytes + PANEL);
    } else {
        const UnsignedWordVec words = load<UnsignedWordVec>(packed) >> (pair == 0 ? 0 : 8);
        low = same_bits<WordVec>(words & 15);
        high = same_bits<WordVec>(pair == 0 ? (words >> 4) & 15 : words >> 4);
    }
}

// What a group of columns of a panel is scaled with: w = q · scale + offset, of INT4 offset = zero - 8 · scale.
struct Grid {
    Pair scale, offset;
    explicit Grid(const uint16_t* parameters) {
        scale = {load_widened(parameters), load_widened(parameters + LANES)};
        offset = {load_widened(parameters + PANEL), load_widened(parameters + PANEL + LANES)};
        offset.low -= scale.low * 8.0f;
        offset.high -= scale.high * 8.0f;
    }
};

// sums[r] += x[r, columns of the groups first … last - 1] · those columns; columns(quad, pair, low, high) gives two of
// them, the quads counted from the first group's.
template <Type T, int R, class Columns>
inline void multiply_words(const Weight& w, const Input& in, int64_t row, int64_t first, int64_t last,
                           const uint16_t* parameters, Columns columns, Pair* sums) {
    const int64_t groups = w.num_groups(), quads = w.group / 4, ldx = w.inputs;
    const int16_t* x = in.words + row * ldx + first * w.group;
    size_t quad = 0;
    for (int64_t group = first; group < last; ++group) {
        IntVec low[R] = {}, high[R] = {};
        for (const size_t end = quad + size_t(quads); quad < end; ++quad, x += 4)
            for (int pair = 0; pair < 2; ++pair) {
                WordVec two_low, two_high;
                columns(quad, pair, two_low, two_high);
                for (int r = 0; r < R; ++r) {
                    const WordVec value = splat_pair(x + r * ldx + 2 * pair);
                    low[r] = add_products(low[r], two_low, value);
                    high[r] = add_products(high[r], two_high, value);
                }
            }
        for (int r = 0; r < R; ++r) {
            const float scale = in.scales[(row + r) * groups + group];
            Pair part{__builtin_convertvector(low[r], Vec) * scale, __builtin_convertvector(high[r], Vec) * scale};
            if constexpr (T == INT4) {
                const Grid grid(parameters + group * 2 * PANEL);
                const Vec sum = splat(in.sums[(row + r) * groups + group]);
                part = {part.low * grid.scale.low + sum * grid.offset.low,
                        part.high * grid.scale.high + sum * grid.offset.high};
            }
            sums[r] = {sums[r].low + part.low, sums[r].high + part.high};
        }
    }
}

template <Type T>
void sum_integers(const Weight& w, int64_t index, const Input& in, Pair* sums, float* buffer) {
    std::fill(sums, sums + in.rows, Pair{Vec{}, Vec{}});
    constexpr int PACKED = T == INT8 ? PANEL * 4 : PANEL * 2;  // bytes of four columns
    const uint8_t* panel = w.panel(index);
    const uint16_t* parameters = T == INT4 ? w.parameters + index * w.num_groups() * 2 * PANEL : nullptr;
    if (in.rows <= WORD_ROWS) {
        const auto columns = [panel](size_t quad, int pair, WordVec& low, WordVec& high)
                                 __attribute__((always_inline)) {
            decode_pair<T>(panel + quad * PACKED, pair, low, high);
        };
        return with_rows(in.rows, [&](auto r) {
            multiply_words<T, decltype(r)::value>(w, in, 0, 0, w.num_groups(), parameters, columns, sums);
        });
    }
    WordVec* decoded = reinterpret_cast<WordVec*>(buffer);
    const auto columns = [decoded](size_t quad, int pair, WordVec& low, WordVec& high) __attribute__((always_inline)) {
        low = decoded[4 * quad + 2 * size_t(pair)], high = decoded[4 * quad + 2 * size_t(pair) + 1];
    };
    const int64_t groups = K_PIECE / w.group;  // of a piece
    for (int64_t first = 0; first < w.num_groups(); first += groups) {
        const int64_t last = std::min(w.num_groups(), first + groups);
        const uint8_t* packed = panel + first * w.group / 4 * PACKED;
        for (int64_t pair = 0; pair < (last - first) * w.group / 2; ++pair)
            decode_pair<T>(packed + pair / 2 * PACKED, int(pair % 2), decoded[2 * pair], decoded[2 * pair + 1]);
        in_shares(in.rows, WORD_ROWS, [&](int64_t row, int64_t end) {
            with_rows(end - row, [&](auto r) {
                multiply_words<T, decltype(r)::value>(w, in, row, first, last, parameters, columns, sums + row);
            });
        });
    }
}

// What a group of columns of a panel is scaled with, kept where it is read for many rows.
inline void keep_grid(const uint16_t* parameters, float* to) {
    const Grid grid(parameters);
    store(to, grid.scale.low), store(to + LANES, grid.scale.high);
    store(to + PANEL, grid.offset.low), store(to + PANEL + LANES, grid.offset.high);
}

// Four columns of a panel as bytes: of the outputs of its lower and of its upper half.
inline void decode_quad(const uint8_t* packed, ByteVec& low, ByteVec& high) {
    const UnsignedWordVec words = load<UnsignedWordVec>(packed);
    low = same_bits<ByteVec>(words & 0x0f0f), high = same_bits<ByteVec>((words >> 4) & 0x0f0f);
}

// As multiply_words, of bytes; grids: [last - first, 2, PANEL], see keep_grid.
template <int R, class Columns>
inline void multiply_bytes(const Input& in, int64_t row, int64_t first, int64_t last, const float* grids,
                           Columns columns, Pair* sums) {
    const int64_t groups = in.inputs / BYTE_GROUP, ldx = in.inputs;
    const int8_t* x = in.bytes + row * ldx + first * BYTE_GROUP;
    size_t quad = 0;
    for (int64_t group = first; group < last; ++group, grids += 2 * PANEL) {
        ByteSums low[R] = {}, high[R] = {};
        // Not unrolled: the compiler would reorder the sums of all quads, and keep the products in memory.
#pragma GCC unroll 1
        for (int i = 0; i < MOST_BYTE_PRODUCTS; ++i, ++quad, x += 4) {
            ByteVec four_low, four_high;
            columns(quad, four_low, four_high);
            for (int r = 0; r < R; ++r) {
                const ByteVec value = splat_quad(x + r * ldx);
                low[r] = add_byte_products(low[r], four_low, value);
                high[r] = add_byte_products(high[r], four_high, value);
            }
        }
        const Pair scale{load<Vec>(grids), load<Vec>(grids + LANES)};
        const Pair offset{load<Vec>(grids + PANEL), load<Vec>(grids + PANEL + LANES)};
        for (int r = 0; r < R; ++r) {
            const float factor = in.scales[(row + r) * groups + group];
            const Vec sum = splat(in.sums[(row + r) * groups + group]);
            sums[r].low += __builtin_convertvector(whole(low[r]), Vec) * (scale.low * factor) + sum * offset.low;
            sums[r].high += __builtin_convertvector(whole(high[r]), Vec) * (scale.high * factor) + sum * offset.high;
        }
    }
}

inline void sum_bytes(const Weight& w, int64_t index, const Input& in, Pair* sums, float* buffer) {
    std::fill(sums, sums + in.rows, Pair{Vec{}, Vec{}});
    constexpr int PACKED = PANEL * 2, PIECE_GROUPS = K_PIECE / BYTE_GROUP;
    const uint8_t* panel = w.panel(index);
    const uint16_t* parameters = w.parameters + index * w.num_groups() * 2 * PANEL;
    float* grids = buffer;  // of a piece
    ByteVec* decoded = reinterpret_cast<ByteVec*>(buffer + PIECE_GROUPS * 2 * PANEL);
    const bool few = in.rows <= BYTE_ROWS;
    for (int64_t first = 0; first < w.num_groups(); first += PIECE_GROUPS) {
        const int64_t last = std::min(w.num_groups(), first + PIECE_GROUPS), quads = (last - first) * BYTE_GROUP / 4;
        const uint8_t* packed = panel + first * BYTE_GROUP / 4 * PACKED;
        for (int64_t group = first; group < last; ++group)
            keep_grid(parameters + group * 2 * PANEL, grids + (group - first) * 2 * PANEL);
        if (few) {
            const auto columns = [packed](size_t quad, ByteVec& low, ByteVec& high) __attribute__((always_inline)) {
                decode_quad(packed + quad * PACKED, low, high);
            };
            with_rows(in.rows, [&](auto r) {
                multiply_bytes<decltype(r)::value>(in, 0, first, last, grids, columns, sums);
            });
            continue;
        }
        for (int64_t quad = 0; quad < quads; ++quad)
            decode_quad(packed + quad * PACKED, decoded[2 * quad], decoded[2 * quad + 1]);
        const auto columns = [decoded](size_t quad, ByteVec& low, ByteVec& high) __attribute__((always_inline)) {
            low = decoded[2 * quad], high = decoded[2 * quad + 1];
        };
        in_shares(in.rows, BYTE_ROWS, [&](int64_t row, int64_t end) {
            with_rows(end - row, [&](auto r) {
                multiply_bytes<decltype(r)::value>(in, row, first, last, grids, columns, sums + row);
            });
        });
    }
}

constexpr float MAGIC = 12582912.0f;  // 1.5 · 2²³: what is added to it is rounded to an integer in its low bits
constexpr int32_t MAGIC_BITS = 0x4b400000;

// The largest absolute value; not_finite: 0, or NaN if one is infinite or NaN.
inline float largest_size(const float* x, int64_t count, float* not_finite) {
    const int64_t whole = count / LANES * LANES;
    Vec most{}, nothing{};
    for (int64_t k = 0; k < whole; k += LANES) {
        const Vec value = load<Vec>(x + k), size = value < Vec{} ? -value : value;
        most = size > most ? size : most;
        nothing += value * 0.0f;
    }
    float largest = 0;
    *not_finite = sum_lanes(nothing);
    for (int i = 0; i < LANES; ++i) largest = std::max(largest, most[i]);
    for (int64_t k = whole; k < count; ++k) largest = std::max(largest, std::fabs(x[k])), *not_finite += x[k] * 0.0f;
    return largest;
}

// One group of a row: x ≈ words · scale. Values that are not finite make the scale, and so the outputs, NaN.
inline void round_group(const float* x, int64_t count, int16_t* words, float* scale, float* sum) {
    const int64_t whole = count / LANES * LANES;
    float not_finite;
    const float largest = largest_size(x, count, &not_finite);
    const float factor = largest > 0 ? 32767.0f / largest : 0.0f;
    using HalfVec = int16_t __attribute__((vector_size(LANES * 2)));
    IntVec total{};
    for (int64_t k = 0; k < whole; k += LANES) {
        const IntVec rounded = same_bits<IntVec>(load<Vec>(x + k) * factor + MAGIC) - MAGIC_BITS;
        store(words + k, __builtin_convertvector(rounded, HalfVec));
        total += rounded;
    }
    int32_t words_sum = 0;
    for (int i = 0; i < LANES; ++i) words_sum += total[i];
    for (int64_t k = whole; k < count; ++k) {
        const int32_t rounded = same_bits<int32_t>(x[k] * factor + MAGIC) - MAGIC_BITS;
        words[k] = int16_t(rounded);
        words_sum += rounded;
    }
    *scale = largest / 32767.0f + not_finite;
    *sum = float(words_sum) * *scale;
}

// The same to bytes, the columns of each four in the order of the weight's.
inline void round_group_to_bytes(const float* x, int8_t* bytes, float* scale, float* sum) {
    float not_finite;
    const float largest = largest_size(x, BYTE_GROUP, &not_finite), factor = largest > 0 ? 127.0f / largest : 0.0f;
    int32_t total = 0;
    for (int64_t k = 0; k < BYTE_GROUP; k += LANES) {
        const IntVec rounded = same_bits<IntVec>(load<Vec>(x + k) * factor + MAGIC) - MAGIC_BITS;
        for (int i = 0; i < LANES; ++i) {
            const int place = (i & ~3) | (i & 1) << 1 | (i & 2) >> 1;
            bytes[k + place] = int8_t(rounded[i]);
            total += rounded[i];
        }
    }
    *scale = largest / 127.0f + not_finite;
    *sum = float(total) * *scale;
}

// ---- the product ----------------------------------------------------------------------------------------------------

inline Pair scaled_and_biased(const Weight& w, int64_t panel, Pair sum) {
    const int64_t first = panel * PANEL;
    if (w.type == INT8) {
        sum.low *= load_widened(w.scales + first);
        sum.high *= load_widened(w.scales + first + LANES);
    }
    if (w.bias) {
        sum.low += load<Vec>(w.bias + first);
        sum.high += load<Vec>(w.bias + first + LANES);
    }
    return sum;
}

// Outputs [rows, PANEL] of one panel, scales and bias applied.
inline void panel_outputs(const Weight& w, int64_t index, const Input& in, Pair* out, float* buffer) {
    switch (w.type) {
        case F32: sum_floats<F32>(w, index, in, out, buffer); break;
        case BF16: sum_floats<BF16>(w, index, in, out, buffer); break;
        case INT8: sum_integers<INT8>(w, index, in, out, buffer); break;
        case INT4: sum_integers<INT4>(w, index, in, out, buffer); break;
        case W4A8: sum_bytes(w, index, in, out, buffer); break;
        case FP8: __builtin_unreachable();
    }
    if (w.type == INT8 || w.bias)
        for (int64_t r = 0; r < in.rows; ++r) out[r] = scaled_and_biased(w, index, out[r]);
}

// Rows of x are rounded by every thread for itself where that is less than waiting for each other.
constexpr int64_t ROUNDED_ALONE = 16384;  // elements of x

// Floats of scratch for a product of so many rows and inputs: of each thread, and of the team.
constexpr int64_t BUFFER = K_PIECE * PANEL;
inline int64_t product_scratch(int64_t rows) { return BUFFER + 2 * rows * PANEL + ROUNDED_ALONE; }
inline int64_t team_scratch(int64_t rows, int64_t inputs) { return rows * inputs; }

// x as the weight wants it, rounded by this thread or by the team, into `own` or `team`.
inline Input rounded(const Weight& w, const float* x, int64_t rows, float* own, float* team) {
    const int64_t count = rows * w.num_groups(), size = omp_get_num_threads(), me = omp_get_thread_num();
    const bool alone = rows * w.inputs <= ROUNDED_ALONE;
    float *scales = alone ? own : team, *sums = scales + count;
    int16_t* words = reinterpret_cast<int16_t*>(sums + count);
    int8_t* bytes = reinterpret_cast<int8_t*>(words);
    for (int64_t i = alone ? 0 : count * me / size; i < (alone ? count : count * (me + 1) / size); ++i)
        if (w.type == W4A8) round_group_to_bytes(x + i * w.group, bytes + i * w.group, scales + i, sums + i);
        else round_group(x + i * w.group, w.group, words + i * w.group, scales + i, sums + i);
    if (!alone && count) {
#pragma omp barrier
    }
    return {rows, w.inputs, x, words, bytes, scales, sums};
}

// Every thread of a team computes its share of the panels: finish(panel, outputs [rows] of pairs).
// With `paired`, panel p and p + half the panels come together: finish(p, outputs of p, outputs of its partner).
// All must have left the product before that used the same scratch of the team: a barrier lies between the two.
template <bool paired, class Finish>
void multiply_panels(const Weight& w, const float* x, int64_t rows, float* memory, float* team, Finish finish) {
    const int64_t size = omp_get_num_threads(), me = omp_get_thread_num();
    float* buffer = memory;
    Pair* outputs = reinterpret_cast<Pair*>(memory + BUFFER);
    const Input in = rounded(w, x, rows, memory + BUFFER + 2 * rows * PANEL, team);
    const int64_t panels = paired ? w.num_panels() / 2 : w.num_panels();
    for (int64_t panel = panels * me / size; panel < panels * (me + 1) / size; ++panel) {
        panel_outputs(w, panel, in, outputs, buffer);
        if constexpr (paired) {
            panel_outputs(w, panel + panels, in, outputs + rows, buffer);
            finish(panel, outputs, outputs + rows);
        } else {
            finish(panel, outputs);
        }
    }
}

inline void put_pair(float* to, Pair value) {
    store(to, value.low);
    store(to + LANES, value.high);
}
inline void put_pair(uint16_t* to, Pair value) {
    for (int i = 0; i < LANES; ++i) to[i] = narrow(value.low[i]), to[LANES + i] = narrow(value.high[i]);
}

// Row `output` of the weight as floats, [inputs].
inline void weight_row(const Weight& w, int64_t output, float* out) {
    const int64_t lane = output % PANEL, half = PANEL / 2;
    const uint8_t* panel = w.panel(output / PANEL);
    const float scale = w.type == INT8 ? widen(w.scales[output]) : 1.0f;
    const bool gridded = w.type == INT4 || w.type == W4A8;
    const uint16_t* grids = gridded ? w.parameters + output / PANEL * w.num_groups() * 2 * PANEL + lane : nullptr;
    for (int64_t k = 0; k < w.inputs; ++k) switch (w.type) {
            case F32: out[k] = reinterpret_cast<const float*>(panel)[k * PANEL + lane]; break;
            case BF16: out[k] = widen(reinterpret_cast<const uint16_t*>(panel)[k * PANEL + lane]); break;
            case INT8: {
                const int8_t* row = reinterpret_cast<const int8_t*>(panel) + k / 2 * 2 * PANEL;
                out[k] = float(row[2 * lane + k % 2]) * scale;
                break;
            }
            case INT4:
            case W4A8: {
                const uint8_t byte = panel[k / 4 * 2 * PANEL + 2 * (2 * (lane % half) + k % 2) + k % 4 / 2];
                const uint16_t* grid = grids + k / w.group * 2 * PANEL;
                out[k] = float((lane < half ? byte & 15 : byte >> 4) - 8) * widen(grid[0]) + widen(grid[PANEL]);
                break;
            }
            case FP8: __builtin_unreachable();
        }
}

// y [rows, outputs] = x [rows, inputs] · Wᵀ + bias.
template <class Out>
void linear(const float* x, int64_t rows, const Weight& w, Out* y, int threads) {
    static thread_local std::vector<float> storage;  // of the calling thread
    const size_t wanted = size_t(w.integers() ? team_scratch(rows, w.inputs) : 0);
    if (storage.size() < wanted) storage.resize(wanted);
    float* team = storage.data();  // taken here: in the other threads `storage` is theirs
#pragma omp parallel num_threads(threads) if (threads > 1)
    multiply_panels<false>(w, x, rows, scratch(product_scratch(rows)), team, [&](int64_t panel, const Pair* outputs) {
        for (int64_t r = 0; r < rows; ++r) put_pair(y + r * w.outputs + panel * PANEL, outputs[r]);
    });
}

}  // namespace
