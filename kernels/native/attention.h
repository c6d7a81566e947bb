// Decode attention: one query of each sequence, on pages in place.
#pragma once
#include "fused.h"

constexpr int TILES = 16;       // tiles of 16 tokens whose scores are held at once
constexpr int MAX_HEADS = 128;  // query heads of one item
constexpr int MAX_PARTS = 64;

// One step's decodes. Laid out as `AttentionStep` in native_ops.py.
struct AttentionStep {
    const int32_t* block_tables;  // [sequences, max_blocks]
    const int32_t* lengths;       // [sequences]
    const int32_t* order;         // [decodes], longest first
    float* scratch;               // [decodes, Hk, parts, Hq / Hk, D + 2]
    int32_t num_decodes, max_blocks;
    int32_t parts;  // each sequence is cut into so many, for when threads would idle
};

// Running softmax of some query heads that share one key head.
struct Running {
    float best, total;
};

template <class T> struct Query;
template <> struct Query<bf16> {
    static u32 word(const bf16* q, int d) {
        uint32_t w;
        memcpy(&w, q + 2 * d, 4);
        return splat_word(w);
    }
    static f32 step(f32 acc, u32 q, const bf16* k) { return dot(acc, q, load_vector<u32>(k)); }
};
template <> struct Query<float> {
    static f32 word(const float* q, int d) { return splat(q[d]); }
    static f32 step(f32 acc, f32 q, const float* k) { return acc + q * load_vector<f32>(k); }
};

// Scores of 16 tokens for HEADS query heads. k: [D / P, 16, P].
template <int HEADS, class T> inline void tile_scores(const T* q, int dim, const T* k, f32* scores) {
    constexpr int STEPS = HEADS >= 4 ? 1 : HEADS == 1 ? 4 : 2;  // hides the latency of the dot instruction
    f32 acc[HEADS][STEPS] = {};
    const int words = dim / WORD<T>;
    int d = 0;
    for (; d + STEPS <= words; d += STEPS)
        UNROLL for (int u = 0; u < STEPS; u++)
            UNROLL for (int h = 0; h < HEADS; h++)
                acc[h][u] = Query<T>::step(acc[h][u], Query<T>::word(q + h * dim, d + u), k + (d + u) * LANES * WORD<T>);
    for (; d < words; d++)
        UNROLL for (int h = 0; h < HEADS; h++)
            acc[h][0] = Query<T>::step(acc[h][0], Query<T>::word(q + h * dim, d), k + d * LANES * WORD<T>);
    UNROLL for (int h = 0; h < HEADS; h++) {
        f32 total = acc[h][0];
        UNROLL for (int u = 1; u < STEPS; u++) total += acc[h][u];
        scores[h * TILES] = total;
    }
}

// out[h] += sum over tokens of p[h][token] * v[token], VECTORS * 32 columns. v: [16, D]
template <int HEADS, int VECTORS, class T>
inline void tile_values(const float* p, const T* v, int dim, int first, int last, float* out) {
    Pair acc[HEADS][VECTORS];
    UNROLL for (int h = 0; h < HEADS; h++)
        UNROLL for (int c = 0; c < VECTORS; c++) acc[h][c] = load(out + h * dim + c * WIDE);  // kept in T's order
    for (int token = first; token < last; token++) {
        Pair w[VECTORS];
        UNROLL for (int c = 0; c < VECTORS; c++) w[c] = load(v + token * dim + c * WIDE);
        UNROLL for (int h = 0; h < HEADS; h++) {
            f32 x = splat(p[h * TILES * LANES + token]);
            UNROLL for (int c = 0; c < VECTORS; c++) {
                acc[h][c].a += x * w[c].a;
                acc[h][c].b += x * w[c].b;
            }
        }
    }
    UNROLL for (int h = 0; h < HEADS; h++)
        UNROLL for (int c = 0; c < VECTORS; c++) store(out + h * dim + c * WIDE, acc[h][c]);
}

template <int HEADS, class T>
inline void tile_values_all(const float* p, const T* v, int dim, int first, int last, float* out) {
    int d = 0;
    for (; d + 2 * WIDE <= dim; d += 2 * WIDE) tile_values<HEADS, 2>(p, v + d, dim, first, last, out + d);
    for (; d + WIDE <= dim; d += WIDE) tile_values<HEADS, 1>(p, v + d, dim, first, last, out + d);
    for (; d < dim; d++)
        UNROLL for (int h = 0; h < HEADS; h++)
            for (int token = first; token < last; token++)
                out[h * dim + d] += p[h * TILES * LANES + token] * to_float(v[token * dim + d]);
}

// Calls run(heads, first) with compile-time head counts until `group` heads are covered.
template <class F> inline void in_groups(int group, F&& run) {
    int g = 0;
    for (; group - g >= 4; g += 4) run(std::integral_constant<int, 4>(), g);
    if (group - g == 3) run(std::integral_constant<int, 3>(), g);
    if (group - g == 2) run(std::integral_constant<int, 2>(), g);
    if (group - g == 1) run(std::integral_constant<int, 1>(), g);
}

// One item of work: some key heads of one sequence over tokens [from, to).
struct Part {
    int first_head, heads, group;  // key heads, query heads per key head
    const int32_t* table;
    int from, to;
};

// Walks tile by tile and inside a tile head by head: the order of the memory, which alone reaches its bandwidth.
// q: [heads * group, D] of the part. out: [heads * group, D], in T's order per 32; running: its softmax.
template <class T>
void attend_part(const Part& part, const T* q, const KVLayer& kv, float scale, float* out, Running* running) {
    alignas(64) f32 scores[MAX_HEADS][TILES];
    const int dim = kv.head_dim, tiles_per_block = kv.block_size / LANES, from = part.from, to = part.to;
    const int group = part.group, num_heads = part.heads * group, last_tile = (to + LANES - 1) / LANES;
    auto place = [&](const void* base, int head, int tile) {
        const int64_t block = part.table[tile / tiles_per_block];
        return static_cast<const T*>(base) +
               ((block * kv.num_kv_heads + part.first_head + head) * tiles_per_block + tile % tiles_per_block) * LANES * dim;
    };
    for (int h = 0; h < num_heads; h++) running[h] = {-INFINITY, 0.f};
    memset(out, 0, int64_t(num_heads) * dim * sizeof(float));
    if (from >= to) return;
    const i32 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int start = from / LANES; start < last_tile; start += TILES) {
        const int end = start + TILES < last_tile ? start + TILES : last_tile;
        for (int tile = start; tile < end; tile++) {
            for (int head = 0; head < part.heads; head++) {
                in_groups(group, [&](auto count, int g) {
                    const int h = head * group + g;
                    tile_scores<decltype(count)::value>(q + h * dim, dim, place(kv.k, head, tile), &scores[h][tile - start]);
                });
            }
            const i32 position = lane + tile * LANES;
            const bool edge = tile * LANES < from || tile * LANES + LANES > to;
            for (int h = 0; h < num_heads; h++) {
                const f32 x = scores[h][tile - start] * scale;
                scores[h][tile - start] = !edge || ((position >= from) & (position < to)) ? x : splat(-INFINITY);
            }
        }
        for (int h = 0; h < num_heads; h++) {
            f32 best = scores[h][0];
            for (int i = 1; i < end - start; i++) best = larger(best, scores[h][i]);
            const float top = largest(best), high = top > running[h].best ? top : running[h].best;
            if (running[h].total > 0 && high > running[h].best) {
                const float shrink = expf(running[h].best - high);
                running[h].total *= shrink;
                for (int d = 0; d < dim; d++) out[h * dim + d] *= shrink;
            }
            running[h].best = high;
            f32 total = {};
            for (int i = 0; i < end - start; i++) {
                scores[h][i] = exp(scores[h][i] - high);
                total += scores[h][i];
            }
            running[h].total += sum(total);
        }
        for (int tile = start; tile < end; tile++) {
            const int first = from > tile * LANES ? from - tile * LANES : 0;
            const int last = to - tile * LANES < LANES ? to - tile * LANES : LANES;
            for (int head = 0; head < part.heads; head++) {
                in_groups(group, [&](auto count, int g) {
                    const int h = head * group + g;
                    tile_values_all<decltype(count)::value>(reinterpret_cast<const float*>(&scores[h][tile - start]),
                                                            place(kv.v, head, tile), dim, first, last, out + h * dim);
                });
            }
        }
    }
}

// The parts of one query head merged into its output. sums: of the first part, `size` floats to the next one.
template <class T>
void merge_parts(const float* sums, const Running* const* running, int parts, int64_t size, int dim, T* out) {
    float best = -INFINITY, total = 0, weights[MAX_PARTS];
    for (int p = 0; p < parts; p++) best = fmaxf(best, running[p]->best);
    for (int p = 0; p < parts; p++) {
        weights[p] = running[p]->total > 0 ? expf(running[p]->best - best) : 0.f;
        total += weights[p] * running[p]->total;
    }
    for (int d = 0; d < dim; d += WIDE) {
        const int n = dim - d < WIDE ? dim - d : WIDE;
        Pair x = {};
        for (int p = 0; p < parts; p++) {
            const Pair y = load<float>(sums + p * size + d, n);
            const float by = weights[p] / total;
            x = {x.a + y.a * by, x.b + y.b * by};
        }
        if (n == WIDE) {
            store(out + d, x);  // the sums are in T's order
        } else {
            float tail[WIDE];
            store(tail, x);
            for (int i = 0; i < n; i++) out[d + i] = from_float<T>(tail[i]);
        }
    }
}

// q: [rows, q_stride] of the decodes, out: [rows, Hq * D].
template <class T>
void decode_attention(const AttentionStep& step, const T* q, int64_t q_stride, const KVLayer& kv, int num_heads, float scale,
                      int window, T* out) {
    const int dim = kv.head_dim, num_kv = kv.num_kv_heads, group = num_heads / num_kv, parts = step.parts;
    const int64_t size = int64_t(num_heads) * (dim + 2);  // sums of all heads, then their softmax
    auto sums = [&](int sequence, int part) { return step.scratch + (int64_t(sequence) * parts + part) * size; };
    auto running = [&](int sequence, int part) {
        return reinterpret_cast<Running*>(sums(sequence, part) + int64_t(num_heads) * dim);
    };
    auto finish = [&](int sequence, int first, int last) {
        for (int h = first; h < last; h++) {
            const Running* each[MAX_PARTS];
            for (int p = 0; p < parts; p++) each[p] = running(sequence, p) + h;
            merge_parts(sums(sequence, 0) + h * dim, each, parts, size, dim, out + (int64_t(sequence) * num_heads + h) * dim);
        }
    };
    // Whole sequences if there are enough, fewer heads at a time if not.
    int heads = num_kv;
    while (heads > 1 && heads % 2 == 0 && (step.num_decodes * (num_kv / heads) * parts < 4 * num_threads || heads * group > MAX_HEADS))
        heads /= 2;
    const int shares = num_kv / heads;
    parallel_for(step.num_decodes * shares * parts, false, [&](int item) {
        const int p = item % parts, sequence = step.order[item / parts / shares], first = item / parts % shares * heads;
        const int length = step.lengths[sequence];
        const int start = window > 0 && length > window ? length - window : 0;
        const int tiles = (length - start + LANES - 1) / LANES;
        const Part part = {first, heads, group, step.block_tables + int64_t(sequence) * step.max_blocks,
                           start + tiles * p / parts * LANES,
                           p + 1 == parts ? length : start + tiles * (p + 1) / parts * LANES};
        attend_part(part, q + sequence * q_stride + int64_t(first) * group * dim, kv, scale,
                    sums(sequence, p) + int64_t(first) * group * dim, running(sequence, p) + first * group);
        if (parts == 1) finish(sequence, first * group, (first + heads) * group);
    });
    if (parts > 1)
        for (int sequence = 0; sequence < step.num_decodes; sequence++) finish(sequence, 0, num_heads);
}
