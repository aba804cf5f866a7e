// The C interface of the CPU kernels. No header of torch: it builds in seconds with whatever compiler the machine has,
// for its own instruction set.

#include "attention.h"
#include "cache.h"
#include "decoder.h"
#include "linear.h"

extern "C" {

int headroom_panel() { return PANEL; }
int headroom_lanes() { return LANES; }

// y [M, outputs] = x [M, inputs] · Wᵀ + bias. x and y: both float32 (activation = 0) or bfloat16 (1), contiguous.
void headroom_linear(const void* x, int activation, int64_t m, int type, const void* panels, const void* parameters,
                     const void* scales, const float* bias, int64_t outputs, int64_t inputs, int64_t group, void* y,
                     int threads) {
    const Weight w = make_weight(type, panels, parameters, scales, bias, outputs, inputs, group);
    if (activation == F32)
        return linear(static_cast<const float*>(x), m, w, static_cast<float*>(y), threads);
    static thread_local std::vector<float> wide;
    const int64_t count = m * inputs;
    if (int64_t(wide.size()) < count) wide.resize(count);
    const uint16_t* from = static_cast<const uint16_t*>(x);
    for (int64_t i = 0; i < count; ++i) wide[i] = widen(from[i]);
    linear(wide.data(), m, w, static_cast<uint16_t*>(y), threads);
}

// out [count, inputs] float32 = rows `index` of a weight: the lookup of an embedding tied to a head.
void headroom_rows(int type, const void* panels, const void* parameters, const void* scales, int64_t outputs,
                   int64_t inputs, int64_t group, const int64_t* index, int64_t count, float* out) {
    const Weight w = make_weight(type, panels, parameters, scales, nullptr, outputs, inputs, group);
    for (int64_t i = 0; i < count; ++i) weight_row(w, index[i], out + i * inputs);
}

// Writes the step's keys and values, float32 or bfloat16, to their slots in a cache of another type (cache.h).
void headroom_kv_quantize(const void* key, const void* value, int dtype, int64_t key_stride, int64_t value_stride,
                          void* keys, void* values, uint16_t* key_scales, uint16_t* value_scales, int cache_type,
                          const int64_t* slots, int64_t tokens, int64_t kv_heads, int64_t dim) {
    std::vector<float> line(static_cast<size_t>(dim));
    const auto write = [&](auto side, const void* rows, int64_t stride) {
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t head = 0; head < kv_heads && slots[t] >= 0; ++head) {
                const int64_t first = t * stride + head * dim;
                for (int64_t d = 0; d < dim; ++d)
                    line[d] = dtype == F32 ? static_cast<const float*>(rows)[first + d]
                                           : widen(static_cast<const uint16_t*>(rows)[first + d]);
                write_row(side, slots[t] * kv_heads + head, dim, line.data());
            }
    };
    with_cache_type(cache_type, [&](auto element) {
        using E = decltype(element);
        write(Side<E>{static_cast<E*>(keys), key_scales}, key, key_stride);
        write(Side<E>{static_cast<E*>(values), value_scales}, value, value_stride);
    });
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

// Causal attention over the paged cache, bottom-right aligned. dtype 0: float32, 1: bfloat16, of query and out; a cache
// that is not quantized has the same.
void headroom_attention(const void* query, void* keys, void* values, uint16_t* key_scales, uint16_t* value_scales,
                        int cache_type, void* out, int dtype, const int32_t* tables, const int32_t* query_start,
                        const int32_t* context_lens, int64_t batch, int64_t table_width, int64_t heads,
                        int64_t kv_heads, int64_t dim, int64_t block, int64_t query_stride, int64_t window, float scale,
                        int threads) {
    auto run = [&](auto of_query, auto of_cache) {
        using Q = decltype(of_query);
        using E = decltype(of_cache);
        if constexpr (QUANTIZED<E> || std::is_same_v<E, Q>)
            attention(Attention<E, Q>{static_cast<const Q*>(query), {static_cast<E*>(keys), key_scales},
                                      {static_cast<E*>(values), value_scales}, static_cast<Q*>(out), tables,
                                      query_start, context_lens, batch, table_width, heads, kv_heads, dim, block,
                                      query_stride, window, scale},
                      threads);
    };
    with_cache_type(cache_type, [&](auto element) {
        if (dtype == F32)
            run(float{}, element);
        else
            run(uint16_t{}, element);
    });
}

// All layers and the final norm over one step; see decoder.h. step->x [tokens, hidden] float32 is read and written.
void headroom_decode_step(const void* model, const void* step, int threads) {
    const Model& m = *static_cast<const Model*>(model);
    const Step& s = *static_cast<const Step*>(step);
    with_cache_type(m.cache_type, [&](auto element) { decode_step<decltype(element)>(m, s, threads); });
}
}
