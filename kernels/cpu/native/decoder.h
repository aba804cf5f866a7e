// All layers of a dense decoder over one step's tokens, in one parallel region: no operation is launched from outside,
// so that a step of one token costs hardly more than reading the weights.
//
//     x += norm?(output · attention(rotate(norm?(qkv · norm?(x)))))
//     x += norm?(down · (act(gate · norm?(x)) * (up · norm?(x))))
#pragma once

#include "attention.h"

namespace {

enum Activation : int64_t { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };

// The structures of this file mirror those of kernels/cpu/decoder.py, field by field.
struct Affine {
    int64_t type;
    const void *panels, *parameters, *scales;
    const float* bias;
    int64_t outputs, inputs, group;

    Weight weight() const {
        return make_weight(type, panels, parameters, scales, bias, outputs, inputs, group);
    }
};

struct Layer {
    const float *input_norm, *attention_output_norm, *mlp_norm, *mlp_output_norm, *query_norm, *key_norm;  // or null
    Affine qkv, output, gate_up, down;
    void *keys, *values;                  // [blocks, block, kv_heads, dim]; see cache.h
    uint16_t *key_scales, *value_scales;  // of a quantized cache, else null
    int64_t rotary, window;
    double scale;
};

struct Rotary {
    const float* frequencies;  // [pairs]: radians a position
    int64_t pairs;             // a head's leading 2 · pairs dimensions turn
    double factor;             // on cos and sin
};

struct Model {
    const Layer* layers;
    const Rotary* rotaries;
    const float* final_norm;
    int64_t num_layers, num_rotaries, hidden, heads, kv_heads, dim, block, activation, cache_type;
    double eps;
};

// What changes from step to step.
struct Step {
    float* x;  // [tokens, hidden], in and out
    const int64_t *positions, *slots;
    const int32_t *tables, *query_start, *context_lens;
    int64_t tokens, batch, table_width;
};

inline Vec divide_by_one_plus_exp(Vec numerator, Vec exponent) { return numerator / (exp_vec(exponent) + 1.0f); }

inline Vec activate(Activation kind, Vec x) {
    switch (kind) {
        case SILU: return divide_by_one_plus_exp(x, -x);
        case GELU_TANH: {  // x · (1 + tanh u) / 2 = x / (1 + exp(-2u))
            const Vec u = 0.7978845608f * (x + 0.044715f * x * x * x);
            return divide_by_one_plus_exp(x, -2.0f * u);
        }
        case RELU: return x > splat(0.0f) ? x : splat(0.0f);
        case GELU:
            for (int i = 0; i < LANES; ++i) x[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.7071067812f));
            return x;
    }
    __builtin_unreachable();
}

// out = x / sqrt(mean(x²) + eps) · weight of one row; `add` puts it on top of what is there. size: multiple of LANES.
template <bool add>
inline void norm_row(const float* x, const float* weight, float eps, int64_t size, float* out) {
    Vec squares{};
    for (int64_t i = 0; i < size; i += LANES) squares += load<Vec>(x + i) * load<Vec>(x + i);
    const float factor = 1.0f / std::sqrt(sum_lanes(squares) / float(size) + eps);
    for (int64_t i = 0; i < size; i += LANES) {
        const Vec y = load<Vec>(x + i) * factor * load<Vec>(weight + i);
        store(out + i, add ? load<Vec>(out + i) + y : y);
    }
}

// One head by its token's angles, in place: (a, b) → (a · cos - b · sin, b · cos + a · sin), a and b its halves.
inline void rotate(float* head, const float* cos, const float* sin, int64_t pairs) {
    for (int64_t i = 0; i < pairs; ++i) {
        const float a = head[i], b = head[i + pairs];
        head[i] = a * cos[i] - b * sin[i];
        head[i + pairs] = b * cos[i] + a * sin[i];
    }
}

constexpr int64_t ALONE = 4;  // up to so many tokens every thread normalizes for itself: dearer to wait than to repeat

// One thread's view of a step. All threads of the team call the same functions in the same order.
template <class E>
class Walk {
   public:
    Walk(const Model& model, const Step& step, float* shared, float* own)
        : m(model), s(step), team(omp_get_num_threads()), me(omp_get_thread_num()) {
        const int64_t heads = m.heads + 2 * m.kv_heads, width = m.layers[0].down.inputs;
        normed = shared;
        qkv = normed + s.tokens * m.hidden;
        attended = qkv + s.tokens * heads * m.dim;
        gated = attended + s.tokens * m.heads * m.dim;
        angles = gated + s.tokens * width;
        rounded = angles + s.tokens * angle_floats(m);
        partial = rounded + team_scratch(s.tokens, widest(m));
        own_normed = own;
        memory = own + ALONE * m.hidden;
    }

    static int64_t shared_floats(const Model& m, const Step& s) {  // without the parts of attention
        const int64_t of_token = (2 * m.heads + 2 * m.kv_heads) * m.dim + m.layers[0].down.inputs + angle_floats(m);
        return s.tokens * (m.hidden + of_token) + team_scratch(s.tokens, widest(m));
    }
    static int64_t own_floats(const Model& m, const Step& s, int64_t attention) {
        return ALONE * m.hidden + std::max(attention, product_scratch(s.tokens));
    }

    // cos and sin of every token's angles, [rotaries][tokens, 2, pairs].
    void turn() {
        float* out = angles;
        for (int64_t index = 0; index < m.num_rotaries; ++index) {
            const Rotary& rotary = m.rotaries[index];
            for (int64_t t = begin(s.tokens); t < end(s.tokens); ++t)
                for (int64_t i = 0; i < rotary.pairs; ++i) {
                    const float angle = float(s.positions[t]) * rotary.frequencies[i];
                    out[(2 * t) * rotary.pairs + i] = std::cos(angle) * float(rotary.factor);
                    out[(2 * t + 1) * rotary.pairs + i] = std::sin(angle) * float(rotary.factor);
                }
            out += s.tokens * 2 * rotary.pairs;
        }
        wait();
    }

    void layer(const Layer& layer, const Attention<E, float>& attention, const Plan& plan) {
        multiply(layer.qkv, normalized(layer.input_norm), qkv);
        rotate_and_cache(layer);
        attend(attention, plan, memory, partial);
        add(layer.output, attended, layer.attention_output_norm);
        gate(layer, normalized(layer.mlp_norm));
        add(layer.down, gated, layer.mlp_output_norm);
    }

    void finish() {
        for (int64_t t = begin(s.tokens); t < end(s.tokens); ++t) {
            float* row = s.x + t * m.hidden;
            norm_row<false>(row, m.final_norm, float(m.eps), m.hidden, row);
        }
    }

    Attention<E, float> attention(const Layer& layer) const {
        return {qkv, keys(layer), values(layer), attended, s.tables, s.query_start, s.context_lens, s.batch,
                s.table_width, m.heads, m.kv_heads, m.dim, m.block, (m.heads + 2 * m.kv_heads) * m.dim, layer.window,
                float(layer.scale)};
    }

   private:
    static Side<E> keys(const Layer& layer) { return {static_cast<E*>(layer.keys), layer.key_scales}; }
    static Side<E> values(const Layer& layer) { return {static_cast<E*>(layer.values), layer.value_scales}; }

    const Model& m;
    const Step& s;
    const int64_t team, me;
    float *normed, *qkv, *attended, *gated, *angles, *rounded, *partial;  // of the team
    float *own_normed, *memory;                                           // of this thread

    static int64_t widest(const Model& m) {  // rows that a product reads
        return std::max({m.hidden, m.heads * m.dim, m.layers[0].down.inputs});
    }
    static int64_t angle_floats(const Model& m) {  // of one token
        int64_t floats = 0;
        for (int64_t index = 0; index < m.num_rotaries; ++index) floats += 2 * m.rotaries[index].pairs;
        return floats;
    }
    int64_t begin(int64_t count) const { return count * me / team; }
    int64_t end(int64_t count) const { return count * (me + 1) / team; }
    static void wait() {
#pragma omp barrier
    }

    const float* normalized(const float* weight) {
        if (!weight) return s.x;
        const bool alone = s.tokens <= ALONE;
        float* out = alone ? own_normed : normed;
        for (int64_t t = alone ? 0 : begin(s.tokens); t < (alone ? s.tokens : end(s.tokens)); ++t)
            norm_row<false>(s.x + t * m.hidden, weight, float(m.eps), m.hidden, out + t * m.hidden);
        if (!alone) wait();
        return out;
    }

    void multiply(const Affine& affine, const float* x, float* out) {
        const Weight w = affine.weight();
        multiply_panels<false>(w, x, s.tokens, memory, rounded, [&](int64_t panel, const Pair* outputs) {
            for (int64_t t = 0; t < s.tokens; ++t) put_pair(out + t * w.outputs + panel * PANEL, outputs[t]);
        });
        wait();
    }

    void rotate_and_cache(const Layer& layer) {
        const float* turned = angles;
        for (int64_t index = 0; index < layer.rotary; ++index) turned += s.tokens * 2 * m.rotaries[index].pairs;
        const int64_t pairs = m.rotaries[layer.rotary].pairs, heads = m.heads + 2 * m.kv_heads;
        for (int64_t i = begin(s.tokens * heads); i < end(s.tokens * heads); ++i) {
            const int64_t token = i / heads, head = i % heads;
            float* values = qkv + i * m.dim;
            const bool is_query = head < m.heads, is_value = head >= m.heads + m.kv_heads;
            const float* norm = is_query ? layer.query_norm : is_value ? nullptr : layer.key_norm;
            if (norm) norm_row<false>(values, norm, float(m.eps), m.dim, values);
            if (!is_value) rotate(values, turned + 2 * token * pairs, turned + (2 * token + 1) * pairs, pairs);
            if (is_query || s.slots[token] < 0) continue;
            const int64_t kv_head = (head - m.heads) % m.kv_heads;
            const Side<E> side = is_value ? Walk::values(layer) : Walk::keys(layer);
            write_row(side, s.slots[token] * m.kv_heads + kv_head, m.dim, values);
        }
        wait();
    }

    // x += norm?(affine · input)
    void add(const Affine& affine, const float* input, const float* norm) {
        const Weight w = affine.weight();
        multiply_panels<false>(w, input, s.tokens, memory, rounded, [&](int64_t panel, const Pair* outputs) {
            for (int64_t t = 0; t < s.tokens; ++t) {
                const int64_t at = t * m.hidden + panel * PANEL;
                const float* before = s.x + at;
                if (norm) put_pair(normed + at, outputs[t]);
                else put_pair(s.x + at, {load<Vec>(before) + outputs[t].low,
                                         load<Vec>(before + LANES) + outputs[t].high});
            }
        });
        wait();
        if (!norm) return;
        for (int64_t t = begin(s.tokens); t < end(s.tokens); ++t)
            norm_row<true>(normed + t * m.hidden, norm, float(m.eps), m.hidden, s.x + t * m.hidden);
        wait();
    }

    void gate(const Layer& layer, const float* x) {
        const Weight w = layer.gate_up.weight();
        const int64_t width = w.outputs / 2;
        const Activation kind = Activation(m.activation);
        multiply_panels<true>(w, x, s.tokens, memory, rounded, [&](int64_t panel, const Pair* gates, const Pair* ups) {
            for (int64_t t = 0; t < s.tokens; ++t)
                put_pair(gated + t * width + panel * PANEL,
                         {activate(kind, gates[t].low) * ups[t].low, activate(kind, gates[t].high) * ups[t].high});
        });
        wait();
    }
};

template <class E>
void decode_step(const Model& m, const Step& s, int threads) {
    static thread_local std::vector<float> shared;  // of the calling thread; it only grows, to the largest step's size
    const int64_t base = Walk<E>::shared_floats(m, s);
    std::vector<Plan> plans;  // one for each window, with the layer that showed it
    std::vector<int64_t> windows, plan_of;
    const Walk<E> outside(m, s, nullptr, nullptr);
    int64_t parts = 0, own = 0;
    for (int64_t index = 0; index < m.num_layers; ++index) {
        const auto known = std::find(windows.begin(), windows.end(), m.layers[index].window);
        plan_of.push_back(known - windows.begin());
        if (known != windows.end()) continue;
        windows.push_back(m.layers[index].window);
        const auto attention = outside.attention(m.layers[index]);
        plans.emplace_back(attention, threads);
        parts = std::max(parts, plans.back().shared);
        own = std::max(own, plans.back().scratch(attention));
    }
    if (int64_t(shared.size()) < base + parts) shared.resize(size_t(base + parts));
    float* memory = shared.data();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Walk<E> walk(m, s, memory, scratch(Walk<E>::own_floats(m, s, own)));
        walk.turn();
        for (int64_t index = 0; index < m.num_layers; ++index) {
            const Layer& layer = m.layers[index];
            walk.layer(layer, walk.attention(layer), plans[size_t(plan_of[size_t(index)])]);
        }
        walk.finish();
    }
}

}  // namespace
