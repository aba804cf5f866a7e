// Causal attention of a ragged batch over the paged cache, read in place.
#pragma once

#include <omp.h>

#include "cache.h"
#include "linear.h"

namespace {

constexpr int KV_TILE = 128;           // positions whose scores are held at a time
constexpr int FEW_ROWS = 8;            // up to this many query rows, scores are plain dot products
constexpr int64_t MANY_ROWS = 96;      // query rows of one tile of a prompt
constexpr int64_t MOST_DIM = 512;      // of a head
constexpr float NEGATIVE = -1e30f;     // stands for minus infinity without its NaNs

// E: of the cache; Q: of queries and outputs.
template <class E, class Q>
struct Attention {
    using Cached = E;
    const Q* query;
    Side<E> keys, values;
    Q* out;
    const int32_t *tables, *query_start, *context_lens;
    int64_t batch, table_width, heads, kv_heads, dim, block, query_stride, window;
    float scale;

    int64_t width() const { return (dim + PANEL - 1) / PANEL * PANEL; }  // of a row of outputs while they are summed

    int64_t row(int64_t sequence, int64_t kv_head, int64_t position) const {  // of the cache
        const int64_t index = tables[sequence * table_width + position / block];
        return (index * block + position % block) * kv_heads + kv_head;
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
template <class A>
void visible(const A& a, const Rows& rows, int64_t* begin, int64_t* end) {
    const int64_t length = a.query_start[rows.sequence + 1] - a.query_start[rows.sequence];
    const int64_t first = a.context_lens[rows.sequence] - length + rows.first_query;
    *end = first + rows.queries;
    *begin = a.window > 0 ? std::max<int64_t>(0, first + 1 - a.window) : 0;
}

// Mask, online softmax (Milakov & Gimelshein 2018): scores [R, KV_TILE] become weights, the state is rescaled.
template <class A>
void soften(const A& a, const Rows& rows, int64_t begin, int64_t count, float* scores, State s) {
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

// scores[r, 0:count] = query rows · keys, LANES positions at a time.
template <class E, int R>
inline void score_few(const float* query, const E* const* keys, int64_t count, int64_t dim, float* scores) {
    for (int64_t t = 0; t < count; t += LANES) {
        const E* rows[LANES];
        for (int i = 0; i < LANES; ++i) rows[i] = keys[std::min<int64_t>(t + i, count - 1)];  // what is beyond is masked
        for (int r = 0; r < R; ++r) {
            Vec sums[LANES] = {};
            for (int64_t d = 0; d < dim; d += LANES) {
                const Vec q = load<Vec>(query + r * dim + d);
                for (int i = 0; i < LANES; ++i) sums[i] += q * load_as_float(rows[i] + d);
            }
            store(scores + r * KV_TILE + t, sum_each(sums));
        }
    }
}

// output[r, d : d + D · LANES] += scores[r, 0:count] · values.
template <class E, int R, int D>
inline void add_values(const float* scores, const E* const* values, int64_t count, int64_t d, float* output,
                       int64_t width) {
    Vec sums[R][D];
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < D; ++i) sums[r][i] = load<Vec>(output + r * width + d + i * LANES);
    for (int64_t t = 0; t < count; ++t)
        for (int i = 0; i < D; ++i) {
            const Vec v = load_as_float(values[t] + d + i * LANES);
            for (int r = 0; r < R; ++r) sums[r][i] += v * scores[r * KV_TILE + t];
        }
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < D; ++i) store(output + r * width + d + i * LANES, sums[r][i]);
}

// A row of the cache where it lies or, if it is quantized, decoded into `line`.
template <class E>
inline auto readable(const Side<E>& side, int64_t index, int64_t dim, float* line) {
    if constexpr (QUANTIZED<E>) {
        read_row(side, index, dim, line);
        return static_cast<const float*>(line);
    } else {
        return static_cast<const E*>(side.row(index, dim));
    }
}

// Few rows (decode, verification): dot products with the cache's own rows. Quantized ones are decoded a tile at a time,
// once for the query heads that share them, into key_lines and value_lines [KV_TILE, dim].
template <class A, int R>
void attend_few(const A& a, const Rows& rows, int64_t begin, int64_t end, const float* query, float* scores,
                float* key_lines, float* value_lines, State s) {
    using E = std::conditional_t<QUANTIZED<typename A::Cached>, float, typename A::Cached>;
    constexpr int D = R <= 2 ? 4 : R <= 4 ? 2 : 1;  // sums that run side by side
    const E *keys[KV_TILE], *values[KV_TILE];
    for (int64_t tile = begin; tile < end; tile += KV_TILE) {
        const int64_t count = std::min<int64_t>(KV_TILE, end - tile);
        for (int64_t t = 0; t < count; ++t) {
            const int64_t row = a.row(rows.sequence, rows.kv_head, tile + t);
            keys[t] = readable(a.keys, row, a.dim, key_lines + t * a.dim);
            values[t] = readable(a.values, row, a.dim, value_lines + t * a.dim);
        }
        score_few<E, R>(query, keys, count, a.dim, scores);
        soften(a, rows, tile, count, scores, s);
        int64_t d = 0;
        for (; d + D * LANES <= a.dim; d += D * LANES)
            add_values<E, R, D>(scores, values, count, d, s.output, a.width());
        for (; d < a.dim; d += LANES) add_values<E, R, 1>(scores, values, count, d, s.output, a.width());
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
            multiply_rows<F32>(m, x + row * ldx, ldx, reinterpret_cast<const uint8_t*>(panels + first * count), count,
                               sums);
            for (int64_t r = 0; r < m; ++r) {
                float* target = out + (row + r) * ldo + first;
                store(target, sums[r].low);
                store(target + LANES, sums[r].high);
            }
        }
}

// Many rows (a prompt): a tile of keys and values is laid out as panels once and used for all rows.
template <class A>
void attend_many(const A& a, const Rows& rows, int64_t begin, int64_t end, const float* query, float* scores,
                 float* key_panels, float* value_panels, State s) {
    for (int64_t tile = begin; tile < end; tile += KV_TILE) {
        const int64_t count = std::min<int64_t>(KV_TILE, end - tile);
        const int64_t padded = (count + PANEL - 1) / PANEL * PANEL;
        for (int64_t t = 0; t < padded; ++t) {
            float* column = key_panels + t / PANEL * PANEL * a.dim + t % PANEL;
            float line[MOST_DIM];
            if (t < count) {
                const int64_t row = a.row(rows.sequence, rows.kv_head, tile + t);
                const auto* value = readable(a.values, row, a.dim, line);
                for (int64_t d = 0; d < a.dim; d += LANES)
                    store(value_panels + d / PANEL * PANEL * count + t * PANEL + d % PANEL, load_as_float(value + d));
                read_row(a.keys, row, a.dim, line);
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

template <class A>
void attend_rows(const A& a, const Rows& rows, int64_t begin, int64_t end, float* work, State s) {
    const int64_t count = rows.count();
    float *query = work, *scores = query + count * a.dim;
    float *key_panels = scores + count * KV_TILE, *value_panels = key_panels + KV_TILE * a.dim;
    for (int64_t r = 0; r < count; ++r) {
        const int64_t token = a.query_start[rows.sequence] + rows.first_query + r / rows.group;
        const auto* from = a.query + token * a.query_stride + (rows.kv_head * rows.group + r % rows.group) * a.dim;
        for (int64_t d = 0; d < a.dim; d += LANES) store(query + r * a.dim + d, load_as_float(from + d) * a.scale);
    }
    std::fill(s.largest, s.largest + count, NEGATIVE);
    std::fill(s.sum, s.sum + count, 0.0f);
    std::fill(s.output, s.output + count * a.width(), 0.0f);
    switch (count) {
        case 1: return attend_few<A, 1>(a, rows, begin, end, query, scores, key_panels, value_panels, s);
        case 2: return attend_few<A, 2>(a, rows, begin, end, query, scores, key_panels, value_panels, s);
        case 3: return attend_few<A, 3>(a, rows, begin, end, query, scores, key_panels, value_panels, s);
        case 4: return attend_few<A, 4>(a, rows, begin, end, query, scores, key_panels, value_panels, s);
        case 5: return attend_few<A, 5>(a, rows, begin, end, query, scores, key_panels, value_panels, s);
        case 6: return attend_few<A, 6>(a, rows, begin, end, query, scores, key_panels, value_panels, s);
        case 7: return attend_few<A, 7>(a, rows, begin, end, query, scores, key_panels, value_panels, s);
        case 8: return attend_few<A, 8>(a, rows, begin, end, query, scores, key_panels, value_panels, s);
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

template <class A>
std::vector<Task> make_tasks(const A& a, int threads, int64_t* workspace) {
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

template <class A>
void write_rows(const A& a, const Rows& rows, State s) {
    for (int64_t r = 0; r < rows.count(); ++r) {
        const int64_t token = a.query_start[rows.sequence] + rows.first_query + r / rows.group;
        auto* to = a.out + (token * a.heads + rows.kv_head * rows.group + r % rows.group) * a.dim;
        const float factor = 1.0f / s.sum[r];
        for (int64_t d = 0; d < a.dim; ++d) put(to + d, s.output[r * a.width() + d] * factor);
    }
}

State state_at(float* memory, int64_t rows) { return {memory, memory + rows, memory + 2 * rows}; }

// Log-sum-exp merge of the parts of one task (Dao et al. 2023, flash-decoding), in their order; the first holds the sum.
template <class A>
void merge(const A& a, const std::vector<Task>& tasks, size_t first, float* workspace) {
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

// Work of one step's attention, the same in every layer with the same window.
struct Plan {
    int64_t shared = 0;  // floats of workspace for tasks that are cut into parts
    std::vector<Task> tasks;
    int64_t most;    // query rows of a task
    bool parts;

    template <class A>
    Plan(const A& a, int threads) : tasks(make_tasks(a, threads, &shared)) {
        most = std::max<int64_t>({FEW_ROWS, MANY_ROWS, a.heads / a.kv_heads});
        parts = shared > 0;
    }
    template <class A>
    int64_t scratch(const A& a) const {  // floats for each thread
        return most * (a.width() + 2 + a.dim + KV_TILE) + KV_TILE * (a.dim + a.width());
    }
};

// Called by every thread of a team; returns when all is written. memory: its own; shared: [plan.shared].
template <class A>
void attend(const A& a, const Plan& plan, float* memory, float* shared) {
    const std::vector<Task>& tasks = plan.tasks;
#pragma omp for schedule(dynamic, 1)
    for (size_t index = 0; index < tasks.size(); ++index) {
        const Task& task = tasks[index];
        const int64_t count = task.rows.count();
        State s = task.parts > 1 ? state_at(shared + task.state, count) : state_at(memory, count);
        attend_rows(a, task.rows, task.begin, task.end, memory + plan.most * (a.width() + 2), s);
        if (task.parts == 1) write_rows(a, task.rows, s);
    }
    if (!plan.parts) return;
#pragma omp for schedule(static)
    for (size_t index = 0; index < tasks.size(); ++index)
        if (tasks[index].parts > 1 && tasks[index].part == 0) merge(a, tasks, index, shared);
}

template <class A>
void attention(const A& a, int threads) {
    const Plan plan(a, threads);
    std::vector<float> shared(static_cast<size_t>(plan.shared));
#pragma omp parallel num_threads(threads) if (threads > 1 && plan.tasks.size() > 1)
    attend(a, plan, scratch(plan.scratch(a)), shared.data());
}

}  // namespace
