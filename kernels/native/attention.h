// Decode attention on pages in place, and the gather of a context for prefill.
#pragma once
#include "fused.h"

constexpr int TILE_TOKENS = 512;  // scores of one tile stay in the first-level cache
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
    constexpr int UNROLL = HEADS >= 4 ? 1 : HEADS == 1 ? 4 : 2;  // hides the latency of the dot instruction
    f32 acc[HEADS][UNROLL] = {};
    const int words = dim / WORD<T>;
    int d = 0;
    for (; d + UNROLL <= words; d += UNROLL)
        for (int u = 0; u < UNROLL; u++)
            for (int h = 0; h < HEADS; h++)
                acc[h][u] = Query<T>::step(acc[h][u], Query<T>::word(q + h * dim, d + u), k + (d + u) * LANES * WORD<T>);
    for (; d < words; d++)
        for (int h = 0; h < HEADS; h++)
            acc[h][0] = Query<T>::step(acc[h][0], Query<T>::word(q + h * dim, d), k + d * LANES * WORD<T>);
    for (int h = 0; h < HEADS; h++) {
        f32 total = acc[h][0];
        for (int u = 1; u < UNROLL; u++) total += acc[h][u];
        scores[h * (TILE_TOKENS / LANES)] = total;
    }
}

// out[h] += sum over tokens of p[h][token] * v[token], VECTORS * 32 columns. v: [16, D]
template <int HEADS, int VECTORS, class T>
inline void tile_values(const float* p, const T* v, int dim, int first, int last, float* out) {
    Pair acc[HEADS][VECTORS];
    for (int h = 0; h < HEADS; h++)
        for (int c = 0; c < VECTORS; c++) acc[h][c] = load(out + h * dim + c * WIDE);  // kept in T's order
    for (int token = first; token < last; token++) {
        Pair w[VECTORS];
        for (int c = 0; c < VECTORS; c++) w[c] = load(v + token * dim + c * WIDE);
        for (int h = 0; h < HEADS; h++) {
            f32 x = splat(p[h * TILE_TOKENS + token]);
            for (int c = 0; c < VECTORS; c++) {
                acc[h][c].a += x * w[c].a;
                acc[h][c].b += x * w[c].b;
            }
        }
    }
    for (int h = 0; h < HEADS; h++)
        for (int c = 0; c < VECTORS; c++) store(out + h * dim + c * WIDE, acc[h][c]);
}

template <int HEADS, class T>
inline void tile_values_all(const float* p, const T* v, int dim, int first, int last, float* out) {
    int d = 0;
    for (; d + 2 * WIDE <= dim; d += 2 * WIDE) tile_values<HEADS, 2>(p, v + d, dim, first, last, out + d);
    for (; d + WIDE <= dim; d += WIDE) tile_values<HEADS, 1>(p, v + d, dim, first, last, out + d);
    for (; d < dim; d++)
        for (int h = 0; h < HEADS; h++)
            for (int token = first; token < last; token++)
                out[h * dim + d] += p[h * TILE_TOKENS + token] * to_float(v[token * dim + d]);
}

// HEADS query heads of one sequence over tokens [from, to) of one key head. out: [HEADS, D], in T's order per 32.
template <int HEADS, class T>
void attend_heads(const T* q, const KVLayer& kv, int head, const int32_t* table, int from, int to, float scale, float* out,
                  Running* running) {
    alignas(64) f32 scores[HEADS][TILE_TOKENS / LANES];
    const int dim = kv.head_dim, tiles_per_block = kv.block_size / LANES;
    auto place = [&](const void* base, int tile) {
        int64_t block = table[tile / tiles_per_block];
        return static_cast<const T*>(base) +
               ((block * kv.num_kv_heads + head) * tiles_per_block + tile % tiles_per_block) * LANES * dim;
    };
    auto prefetch = [&](const T* p) {
        for (int i = 0; i < LANES * dim * int(sizeof(T)); i += 64) __builtin_prefetch(reinterpret_cast<const char*>(p) + i);
    };
    for (int h = 0; h < HEADS; h++) running[h] = {-INFINITY, 0.f};
    memset(out, 0, HEADS * dim * sizeof(float));
    if (from >= to) return;
    i32 lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    const int last_tile = (to + LANES - 1) / LANES;
    for (int start = from / LANES; start < last_tile; start += TILE_TOKENS / LANES) {
        const int end = start + TILE_TOKENS / LANES < last_tile ? start + TILE_TOKENS / LANES : last_tile;
        for (int tile = start; tile < end; tile++) {
            prefetch(tile + 1 < end ? place(kv.k, tile + 1) : place(kv.v, start));
            f32* s = &scores[0][tile - start];
            tile_scores<HEADS>(q, dim, place(kv.k, tile), s);
            i32 position = lane + tile * LANES;
            for (int h = 0; h < HEADS; h++) {
                f32& x = s[h * (TILE_TOKENS / LANES)];
                x = x * scale;
                if (tile * LANES < from || tile * LANES + LANES > to)
                    x = ((position >= from) & (position < to)) ? x : splat(-INFINITY);
            }
        }
        for (int h = 0; h < HEADS; h++) {
            f32 best = scores[h][0];
            for (int i = 1; i < end - start; i++) best = larger(best, scores[h][i]);
            const float top = largest(best), high = top > running[h].best ? top : running[h].best;
            if (high > running[h].best && running[h].total > 0) {
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
            if (tile + 1 < end) prefetch(place(kv.v, tile + 1));
            const int first = from > tile * LANES ? from - tile * LANES : 0;
            const int last = to - tile * LANES < LANES ? to - tile * LANES : LANES;
            const float* p = reinterpret_cast<const float*>(&scores[0][tile - start]);
            tile_values_all<HEADS>(p, place(kv.v, tile), dim, first, last, out);
        }
    }
}

template <class T>
void attend_group(int group, const T* q, const KVLayer& kv, int head, const int32_t* table, int from, int to, float scale,
                  float* out, Running* running) {
    int g = 0;
    const int dim = kv.head_dim;
    for (; g + 4 <= group; g += 4)
        attend_heads<4>(q + g * dim, kv, head, table, from, to, scale, out + g * dim, running + g);
    if (group - g == 3) attend_heads<3>(q + g * dim, kv, head, table, from, to, scale, out + g * dim, running + g);
    if (group - g == 2) attend_heads<2>(q + g * dim, kv, head, table, from, to, scale, out + g * dim, running + g);
    if (group - g == 1) attend_heads<1>(q + g * dim, kv, head, table, from, to, scale, out + g * dim, running + g);
}

// q: [rows, q_stride] of the decodes, out: [rows, Hq * D].
template <class T>
void decode_attention(const AttentionStep& step, const T* q, int64_t q_stride, const KVLayer& kv, int num_heads, float scale,
                      int window, T* out) {
    const int dim = kv.head_dim, num_kv = kv.num_kv_heads, group = num_heads / num_kv;
    const int pairs = step.num_decodes * num_kv;
    const int parts = step.parts;
    const int64_t size = int64_t(group) * (dim + 2);  // sums, then (best, total) of each head
    float* partial = step.scratch;

    // The parts of one sequence and key head merged into the first.
    auto finish = [&](int sequence, int head, float* mine) {
        for (int g = 0; g < group; g++) {
            float best = -INFINITY, total = 0;
            for (int p = 0; p < parts; p++) best = fmaxf(best, mine[p * size + group * dim + 2 * g]);
            float weights[MAX_PARTS];
            for (int p = 0; p < parts; p++) {
                const float* running = mine + p * size + group * dim + 2 * g;
                weights[p] = running[1] > 0 ? expf(running[0] - best) : 0.f;
                total += weights[p] * running[1];
            }
            T* to = out + (int64_t(sequence) * num_heads + head * group + g) * dim;
            for (int d = 0; d < dim; d += WIDE) {
                Pair x = {};
                const int n = dim - d < WIDE ? dim - d : WIDE;
                for (int p = 0; p < parts; p++) {
                    Pair y = load<float>(mine + p * size + g * dim + d, n);
                    const float by = weights[p] / total;
                    x = {x.a + y.a * by, x.b + y.b * by};
                }
                if (n == WIDE) {
                    store(to + d, x);  // the sums are in T's order
                } else {
                    float tail[WIDE];
                    store(tail, x);
                    for (int i = 0; i < n; i++) to[d + i] = from_float<T>(tail[i]);
                }
            }
        }
    };
    parallel_for(pairs * parts, false, [&](int item) {
        const int pair = item / parts, part = item % parts;
        const int sequence = step.order[pair / num_kv], head = pair % num_kv;
        const int length = step.lengths[sequence];
        const int start = window > 0 && length > window ? length - window : 0;
        const int tiles = (length - start + LANES - 1) / LANES;
        const int from = start + tiles * part / parts * LANES;
        const int to = part + 1 == parts ? length : start + tiles * (part + 1) / parts * LANES;
        float* mine = partial + int64_t(item) * size;
        attend_group(group, q + sequence * q_stride + int64_t(head) * group * dim, kv, head,
                     step.block_tables + int64_t(sequence) * step.max_blocks, from, to, scale, mine,
                     reinterpret_cast<Running*>(mine + group * dim));
        if (parts == 1) finish(sequence, head, mine);
    });
    if (parts > 1)
        for (int pair = 0; pair < pairs; pair++)
            finish(step.order[pair / num_kv], pair % num_kv, partial + int64_t(pair) * parts * size);
}

// The first `length` tokens of a sequence, contiguous: k, v [Hk, length, D].
template <class T> void gather_context(const KVLayer& kv, const int32_t* table, int length, T* k, T* v) {
    const int dim = kv.head_dim, tiles = (length + LANES - 1) / LANES, per_block = kv.block_size / LANES;
    parallel_for(kv.num_kv_heads * tiles, true, [&](int item) {
        const int head = item / tiles, tile = item % tiles;
        const int64_t from =
            ((int64_t(table[tile / per_block]) * kv.num_kv_heads + head) * per_block + tile % per_block) * LANES * dim;
        const int n = length - tile * LANES < LANES ? length - tile * LANES : LANES;
        const int64_t to = (int64_t(head) * length + tile * LANES) * dim;
        memcpy(v + to, static_cast<const T*>(kv.v) + from, int64_t(n) * dim * sizeof(T));
        const uint32_t* words = reinterpret_cast<const uint32_t*>(static_cast<const T*>(kv.k) + from);
        for (int token = 0; token < n; token++)
            for (int d = 0; d < dim / WORD<T>; d++)
                memcpy(k + to + token * dim + d * WORD<T>, words + d * LANES + token, 4);
    });
}
