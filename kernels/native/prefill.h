// Causal attention of many queries of one sequence, on pages in place. The keys' layout is already the one the dot
// instruction wants; values are interleaved once per block of keys. Online softmax as in FlashAttention (2205.14135).
#pragma once
#include "attention.h"

constexpr int QUERY_ROWS = 64;          // (query, head) rows of one item, more only if one key head has more
constexpr int KEY_TILES = 8;            // tiles of 16 keys at a time
constexpr int KEYS = KEY_TILES * LANES;

// One prefill chunk: the last num_queries positions of a sequence of `length` tokens.
template <class T> struct Chunk {
    const T* q;  // first query's row
    int64_t q_stride;
    const int32_t* table;
    int num_queries, length, num_heads, window;
    float scale;
    T* out;  // [num_queries, Hq * D]
};

// s[i][0..32) = q[i] . k for ROWS rows and two tiles of keys.
template <int ROWS, class T> inline void score_block(const T* const* q, int dim, const T* k0, const T* k1, float* s) {
    f32 acc[ROWS][2] = {};
    for (int d = 0; d < dim / WORD<T>; d++) {
        const int at = d * LANES * WORD<T>;
        UNROLL for (int i = 0; i < ROWS; i++) {
            const auto word = Query<T>::word(q[i], d);
            acc[i][0] = Query<T>::step(acc[i][0], word, k0 + at);
            acc[i][1] = Query<T>::step(acc[i][1], word, k1 + at);
        }
    }
    UNROLL for (int i = 0; i < ROWS; i++) {
        store_vector(s + i * KEYS, acc[i][0]);
        store_vector(s + i * KEYS + LANES, acc[i][1]);
    }
}

// Values of one block of keys: for bf16 interleaved by pairs of tokens, for fp32 as they are. Zero past the context.
template <class T> struct Values;

template <> struct Values<bf16> {
    typedef uint32_t Weight;  // probabilities of two tokens
    u32 v[MAX_HEAD_DIM / WIDE][KEYS / 2][2];

    void pack(int token, const bf16* x, const bf16* y, int dim) {
        for (int d = 0; d < dim; d += WIDE) {
            const u32 even = x ? load_words(x + d, dim - d) : u32{}, odd = y ? load_words(y + d, dim - d) : u32{};
            v[d / WIDE][token / 2][0] = (even & 0xffffu) | (odd << 16);
            v[d / WIDE][token / 2][1] = (even >> 16) | (odd & 0xffff0000u);
        }
    }
    static void weigh(Weight* p, f32 x, f32 y) { store(reinterpret_cast<bf16*>(p), Pair{evens(x, y), odds(x, y)}); }
    static constexpr int PER_WEIGHT = 2;

    // out[i][d..d+32) += p[i] v
    template <int ROWS> void add(const Weight* p, int keys, int d, float* out, int64_t stride) const {
        f32 acc[ROWS][2];
        UNROLL for (int i = 0; i < ROWS; i++) {
            const Pair old = load(out + i * stride + d);
            acc[i][0] = old.a, acc[i][1] = old.b;
        }
        const u32(*from)[2] = v[d / WIDE];
        for (int k = 0; k < keys / 2; k++) {
            UNROLL for (int i = 0; i < ROWS; i++) {
                const u32 weight = splat_word(p[i * KEYS + k]);
                acc[i][0] = dot(acc[i][0], weight, from[k][0]);
                acc[i][1] = dot(acc[i][1], weight, from[k][1]);
            }
        }
        UNROLL for (int i = 0; i < ROWS; i++) store(out + i * stride + d, Pair{acc[i][0], acc[i][1]});
    }
};

template <> struct Values<float> {
    typedef float Weight;
    Pair v[MAX_HEAD_DIM / WIDE][KEYS];

    void pack(int token, const float* x, const float* y, int dim) {
        for (int d = 0; d < dim; d += WIDE) {
            v[d / WIDE][token] = x ? load(x + d, dim - d) : Pair{};
            v[d / WIDE][token + 1] = y ? load(y + d, dim - d) : Pair{};
        }
    }
    static void weigh(Weight* p, f32 x, f32 y) { store(p, Pair{x, y}); }
    static constexpr int PER_WEIGHT = 1;

    template <int ROWS> void add(const Weight* p, int keys, int d, float* out, int64_t stride) const {
        Pair acc[ROWS];
        UNROLL for (int i = 0; i < ROWS; i++) acc[i] = load(out + i * stride + d);
        for (int k = 0; k < keys; k++) {
            const Pair w = v[d / WIDE][k];
            UNROLL for (int i = 0; i < ROWS; i++) {
                const f32 weight = splat(p[i * KEYS + k]);
                acc[i].a += weight * w.a;
                acc[i].b += weight * w.b;
            }
        }
        UNROLL for (int i = 0; i < ROWS; i++) store(out + i * stride + d, acc[i]);
    }
};

// Calls run(rows, first) with compile-time row counts until n rows are covered.
template <class F> inline void in_rows(int n, F&& run) {
    int i = 0;
    for (; i + 8 <= n; i += 8) run(std::integral_constant<int, 8>(), i);
    for (; i + 2 <= n; i += 2) run(std::integral_constant<int, 2>(), i);
    for (; i < n; i++) run(std::integral_constant<int, 1>(), i);
}

template <class T> struct PrefillScratch {
    alignas(64) float scores[MAX_HEADS * KEYS];
    float sums[MAX_HEADS * MAX_HEAD_DIM];
    Values<T> values;
    const T* q[MAX_HEADS];
    int position[MAX_HEADS];
    Running running[MAX_HEADS];
};

// Queries [first, last) of the chunk with one key head.
template <class T>
void prefill_rows(const Chunk<T>& chunk, const KVLayer& kv, int head, int group, int first, int last, PrefillScratch<T>& s) {
    const int dim = kv.head_dim, padded = (dim + WIDE - 1) / WIDE * WIDE, rows = (last - first) * group;
    const int tiles_per_block = kv.block_size / LANES, before = chunk.length - chunk.num_queries;
    auto place = [&](const void* base, int tile) {
        const int64_t block = chunk.table[tile / tiles_per_block];
        return static_cast<const T*>(base) +
               ((block * kv.num_kv_heads + head) * tiles_per_block + tile % tiles_per_block) * LANES * dim;
    };
    for (int i = 0; i < rows; i++) {
        s.q[i] = chunk.q + (first + i / group) * chunk.q_stride + int64_t(head * group + i % group) * dim;
        s.position[i] = before + first + i / group;
        s.running[i] = {-INFINITY, 0.f};
    }
    memset(s.sums, 0, int64_t(rows) * padded * sizeof(float));
    const int low = chunk.window > 0 ? before + first - chunk.window + 1 : 0;  // first key that any row sees
    const int end = before + last, last_tile = (end + LANES - 1) / LANES;
    const i32 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int tile = (low > 0 ? low : 0) / LANES; tile < last_tile; tile += KEY_TILES) {
        const int tiles = last_tile - tile < KEY_TILES ? last_tile - tile : KEY_TILES, keys = (tiles + 1) / 2 * WIDE;
        for (int k = 0; k < tiles; k += 2) {
            const T *k0 = place(kv.k, tile + k), *k1 = k + 1 < tiles ? place(kv.k, tile + k + 1) : k0;
            in_rows(rows, [&](auto count, int i) {
                score_block<decltype(count)::value>(s.q + i, dim, k0, k1, s.scores + i * KEYS + k * LANES);
            });
        }
        for (int k = 0; k < keys; k += 2) {
            const T* page = (tile * LANES + k) < end ? place(kv.v, tile + k / LANES) + k % LANES * dim : nullptr;
            s.values.pack(k, page, tile * LANES + k + 1 < end ? page + dim : nullptr, dim);
        }
        for (int i = 0; i < rows; i++) {
            float* x = s.scores + i * KEYS;
            const int position = s.position[i], from = chunk.window > 0 ? position - chunk.window + 1 : 0;
            const bool edge = tile * LANES + keys > position + 1 || tile * LANES < from;
            f32 best = splat(-INFINITY);
            for (int k = 0; k < keys; k += LANES) {
                f32 v = load_vector<f32>(x + k) * chunk.scale;
                if (edge) {
                    const i32 key = lane + (tile * LANES + k);
                    v = ((key <= position) & (key >= from)) ? v : splat(-INFINITY);
                }
                store_vector(x + k, v);
                best = larger(best, v);
            }
            Running& running = s.running[i];
            const float top = largest(best), high = top > running.best ? top : running.best;
            if (high == -INFINITY) {  // this row sees none of these keys
                memset(x, 0, keys * sizeof(float));
                continue;
            }
            if (running.total > 0 && high > running.best) {
                const float shrink = expf(running.best - high);
                running.total *= shrink;
                float* sums = s.sums + int64_t(i) * padded;
                for (int d = 0; d < padded; d++) sums[d] *= shrink;
            }
            running.best = high;
            f32 total = {};
            auto* weights = reinterpret_cast<typename Values<T>::Weight*>(x);
            for (int k = 0; k < keys; k += WIDE) {
                const f32 a = exp(load_vector<f32>(x + k) - high), b = exp(load_vector<f32>(x + k + LANES) - high);
                total += a + b;
                Values<T>::weigh(weights + k / Values<T>::PER_WEIGHT, a, b);
            }
            running.total += sum(total);
        }
        in_rows(rows, [&](auto count, int i) {
            const auto* weights = reinterpret_cast<const typename Values<T>::Weight*>(s.scores + i * KEYS);
            for (int d = 0; d < dim; d += WIDE)
                s.values.template add<decltype(count)::value>(weights, keys, d, s.sums + int64_t(i) * padded, padded);
        });
    }
    for (int i = 0; i < rows; i++) {
        const float by = 1.f / s.running[i].total;
        T* to = chunk.out + (int64_t(first + i / group) * chunk.num_heads + head * group + i % group) * dim;
        for (int d = 0; d < dim; d += WIDE) {
            const Pair x = load(s.sums + int64_t(i) * padded + d);
            store(to + d, Pair{x.a * by, x.b * by}, dim - d);
        }
    }
}

template <class T> void prefill_attention(const Chunk<T>& chunk, const KVLayer& kv) {
    const int group = chunk.num_heads / kv.num_kv_heads;
    // Heads that share keys share an item, unless they are too many for its scratch.
    const int most = QUERY_ROWS / group > 0 ? QUERY_ROWS / group : 1;
    const int blocks = (chunk.num_queries + most - 1) / most;
    parallel_for(kv.num_kv_heads * blocks, false, [&](int item) {
        PrefillScratch<T> scratch;
        const int block = blocks - 1 - item / kv.num_kv_heads;  // the last queries see most: they come first
        prefill_rows(chunk, kv, item % kv.num_kv_heads, group, int(int64_t(chunk.num_queries) * block / blocks),
                     int(int64_t(chunk.num_queries) * (block + 1) / blocks), scratch);
    });
}
