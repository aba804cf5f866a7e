// Weight-only linear layers.
//
// Layout of a weight [N, K], "panels": PANEL outputs lie side by side for each k, so that one load feeds PANEL sums.
//
//     panel p:   k = 0   | w[p·PANEL + 0, 0]  w[p·PANEL + 1, 0] … w[p·PANEL + PANEL-1, 0] |
//                k = 1   | w[p·PANEL + 0, 1]  …
//     INT4: byte j of a row holds output j in its low and output j + PANEL/2 in its high half.
//
// Few rows of x (up to ROWS): weights are decoded in registers and used at once; the cost is reading them. More rows: a
// piece of a panel is decoded into the first-level cache and used for all rows; the cost is the multiplications.
#pragma once

#include <omp.h>

#include "simd.h"

namespace {

constexpr int K_PIECE = 256;  // columns of a panel that are decoded at a time: PANEL · 256 · 4 bytes stay in L1

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
    const float* row_sums;  // of x, by group: [rows, ld_sums]; for few rows only
    int64_t ld_sums;
    Grid of(int64_t k) const { return Grid(parameters + k / group * 2 * PANEL); }
};

// sums[r] += x[r, 0:count] · panel rows, the panel being decoded on the way. UNROLL sums run side by side where R is
// small, since one chain of dependent multiply-adds is several cycles a link. INT4 sums q · x over a group and applies
// the grid to the sum: Σ (q · scale + offset) · x = scale · Σ q · x + offset · Σ x.
template <Type T, int R>
inline void multiply(const float* x, int64_t ldx, const uint8_t* panel, int64_t count, Grids grids, Pair* sums) {
    constexpr int UNROLL = R == 1 ? 4 : R == 2 ? 2 : 1;
    const int64_t span = T == INT4 ? grids.group : count;
    for (int64_t begin = 0; begin < count; begin += span) {
        Pair part[UNROLL][R];
        for (int u = 0; u < UNROLL; ++u)
            for (int r = 0; r < R; ++r) part[u][r] = Pair{Vec{}, Vec{}};
        auto step = [&](int64_t k, int u) __attribute__((always_inline)) {
            const Pair w = decode<T>(panel + k * row_bytes<T>());
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
        for (int r = 0; r < R; ++r) {
            Pair total = part[0][r];
            for (int u = 1; u < UNROLL; ++u) total = {total.low + part[u][r].low, total.high + part[u][r].high};
            if constexpr (T == INT4) {
                const Grid grid = grids.of(begin);
                const Vec x_sum = splat(grids.row_sums[r * grids.ld_sums + begin / grids.group]);
                total = {total.low * grid.scale.low + x_sum * grid.offset.low,
                         total.high * grid.scale.high + x_sum * grid.offset.high};
            }
            sums[r] = {sums[r].low + total.low, sums[r].high + total.high};
        }
    }
}

// multiply() with the number of rows known only now.
template <Type T>
inline void multiply_rows(int64_t rows, const float* x, int64_t ldx, const uint8_t* panel, int64_t count, Grids grids,
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

struct Weight {
    Type type;
    const uint8_t* panels;         // [panels, K, row_bytes]
    const uint16_t* parameters;    // INT4: bfloat16 [panels, K / group, 2, PANEL]: scales, then zero points
    const uint16_t* scales;        // INT8: bfloat16 [outputs], applied to the sums
    const float* bias;             // [outputs] or null
    int64_t outputs, inputs, group;  // outputs: a multiple of PANEL

    int64_t num_panels() const { return outputs / PANEL; }
    int64_t num_groups() const { return type == INT4 ? inputs / group : 0; }
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

// Rows of x as one product reads them, and what a thread needs to multiply them.
struct Input {
    const float* x;         // [rows, inputs]
    int64_t rows, inputs;
    const float* row_sums;  // [rows, groups] of an INT4 weight if rows ≤ ROWS, else unused
};

// The sums of one panel for all rows of x, into sums [rows].
template <Type T>
void panel_sums(const Weight& w, int64_t index, const Input& in, Pair* sums, float* buffer) {
    std::fill(sums, sums + in.rows, Pair{Vec{}, Vec{}});
    const uint8_t* panel = w.panels + index * w.inputs * row_bytes<T>();
    const uint16_t* parameters = T == INT4 ? w.parameters + index * w.num_groups() * 2 * PANEL : nullptr;
    const Grids grids{parameters, w.group, in.row_sums, w.num_groups()};
    if (in.rows <= ROWS) return multiply_rows<T>(in.rows, in.x, w.inputs, panel, w.inputs, grids, sums);
    const int64_t shares = (in.rows + ROWS - 1) / ROWS;  // of equal size: 7 rows as 4 + 3, not as 6 + 1
    for (int64_t k = 0; k < w.inputs; k += K_PIECE) {
        const int64_t count = std::min<int64_t>(K_PIECE, w.inputs - k);
        const uint8_t* piece = panel + k * row_bytes<T>();
        if constexpr (T != F32) {
            decode_piece<T>(panel, k, count, grids, buffer);
            piece = reinterpret_cast<const uint8_t*>(buffer);
        }
        for (int64_t share = 0; share < shares; ++share) {
            const int64_t row = in.rows * share / shares, end = in.rows * (share + 1) / shares;
            multiply_rows<F32>(end - row, in.x + row * w.inputs + k, w.inputs, piece, count, {}, sums + row);
        }
    }
}

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
        case F32: panel_sums<F32>(w, index, in, out, buffer); break;
        case BF16: panel_sums<BF16>(w, index, in, out, buffer); break;
        case INT8: panel_sums<INT8>(w, index, in, out, buffer); break;
        case INT4: panel_sums<INT4>(w, index, in, out, buffer); break;
    }
    if (w.type == INT8 || w.bias)
        for (int64_t r = 0; r < in.rows; ++r) out[r] = scaled_and_biased(w, index, out[r]);
}

// Floats of scratch that a thread needs for products of so many rows and inputs; see multiply_panels.
constexpr int64_t BUFFER = K_PIECE * PANEL;
inline int64_t product_scratch(int64_t rows, int64_t inputs) { return BUFFER + 2 * rows * PANEL + ROWS * inputs; }

// Every thread of a team computes its share of the panels: finish(panel, outputs [rows] of pairs).
// With `paired`, panel p and p + half the panels come together: finish(p, outputs of p, outputs of its partner).
template <bool paired, class Finish>
void multiply_panels(const Weight& w, const float* x, int64_t rows, float* memory, Finish finish) {
    const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    float* buffer = memory;
    Pair* outputs = reinterpret_cast<Pair*>(memory + BUFFER);
    float* row_sums = memory + BUFFER + 2 * rows * PANEL;
    if (w.type == INT4 && rows <= ROWS)
        for (int64_t i = 0; i < rows * w.num_groups(); ++i) {
            Vec sum{};
            float rest = 0;
            const float* from = x + i * w.group;
            int64_t k = 0;
            for (; k + LANES <= w.group; k += LANES) sum += load<Vec>(from + k);
            for (; k < w.group; ++k) rest += from[k];
            row_sums[i] = sum_lanes(sum) + rest;
        }
    const Input in{x, rows, w.inputs, row_sums};
    const int64_t panels = paired ? w.num_panels() / 2 : w.num_panels();
    for (int64_t panel = panels * me / team; panel < panels * (me + 1) / team; ++panel) {
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
    const int64_t panel = output / PANEL, lane = output % PANEL, half = PANEL / 2;
    const float scale = w.type == INT8 ? widen(w.scales[output]) : 1.0f;
    const uint16_t* grids = w.type == INT4 ? w.parameters + panel * w.num_groups() * 2 * PANEL + lane : nullptr;
    for (int64_t k = 0; k < w.inputs; ++k) {
        const int64_t row = panel * w.inputs + k;
        switch (w.type) {
            case F32: out[k] = reinterpret_cast<const float*>(w.panels)[row * PANEL + lane]; break;
            case BF16: out[k] = widen(reinterpret_cast<const uint16_t*>(w.panels)[row * PANEL + lane]); break;
            case INT8: out[k] = float(reinterpret_cast<const int8_t*>(w.panels)[row * PANEL + lane]) * scale; break;
            case INT4: {
                const uint8_t byte = w.panels[row * half + lane % half];
                const uint16_t* grid = grids + k / w.group * 2 * PANEL;
                out[k] = float((lane < half ? byte & 15 : byte >> 4) - 8) * widen(grid[0]) + widen(grid[PANEL]);
            }
        }
    }
}

// y [rows, outputs] = x [rows, inputs] · Wᵀ + bias.
template <class Out>
void linear(const float* x, int64_t rows, const Weight& w, Out* y, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* memory = scratch(product_scratch(rows, w.inputs));
        multiply_panels<false>(w, x, rows, memory, [&](int64_t panel, const Pair* outputs) {
            for (int64_t r = 0; r < rows; ++r) put_pair(y + r * w.outputs + panel * PANEL, outputs[r]);
        });
    }
}

}  // namespace
