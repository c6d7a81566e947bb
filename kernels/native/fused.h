// Operations every decoder layer needs, with the LoRA delta folded in: rope + KV write, SwiGLU, add + RMSNorm.
#pragma once
#include "lora.h"

// Cache of one layer. K: [block, head, block_size / 16, D / P, 16, P], V: [block, head, block_size, D], P elements of a
// word side by side (2 for bf16), so that one load of K serves 16 tokens. Laid out as `KVLayer` in native_ops.py.
struct KVLayer {
    void *k, *v;
    int32_t num_kv_heads, head_dim, block_size;
};
template <class T> constexpr int WORD = 4 / sizeof(T);

constexpr int GATE = 4, UP = 5;

template <class T> inline float row_scale(const T* x, int width, float eps) {
    f32 total = {};
    for (int c = 0; c < width; c += WIDE) {
        Pair v = load(x + c, width - c);
        total += v.a * v.a + v.b * v.b;
    }
    return 1.f / sqrtf(sum(total) / float(width) + eps);
}

template <class T> inline void norm_row(const T* x, const T* weight, T* out, int width, float eps) {
    const float scale = row_scale(x, width, eps);
    for (int c = 0; c < width; c += WIDE) {
        Pair v = load(x + c, width - c), w = load(weight + c, width - c);
        store(out + c, {v.a * scale * w.a, v.b * scale * w.b}, width - c);
    }
}

template <class T> void rms_norm(const T* x, const T* weight, T* out, int rows, int width, float eps) {
    parallel_for(rows, true, [&](int i) { norm_row(x + int64_t(i) * width, weight, out + int64_t(i) * width, width, eps); });
}

// residual += y + delta; out = RMSNorm(residual) * weight.
template <class T>
void add_rms_norm(const T* y, const LoraStep* step, int layer, int module, T* residual, const T* weight, T* out, int rows,
                  int width, float eps) {
    auto add = [&](int row, int column, int columns, const float* delta) {
        T* r = residual + int64_t(row) * width + column;
        const T* v = y + int64_t(row) * width + column;
        for (int c = 0; c < columns; c += WIDE) {
            Pair p = load(r + c, columns - c), q = load(v + c, columns - c);
            p = {p.a + q.a, p.b + q.b};
            if (delta) {
                Pair d = load(delta + c);
                p = {p.a + d.a, p.b + d.b};
            }
            store(r + c, p, columns - c);
        }
    };
    if (!step) {
        parallel_for(rows, true, [&](int i) {
            add(i, 0, width, nullptr);
            norm_row(residual + int64_t(i) * width, weight, out + int64_t(i) * width, width, eps);
        });
        return;
    }
    const int chunk = step->item_columns(width), chunks = (width + chunk - 1) / chunk, items = step->num_spans * chunks;
    std::atomic<int> next{0};
    on_every_thread([&](int thread) {
        float buffer[BUFFER];
        for (int item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) {
            const Span& span = step->spans[item / chunks];
            const int first = item % chunks * chunk, last = first + chunk < width ? first + chunk : width;
            const int piece = piece_columns(span.rows);
            for (int c = first; c < last; c += piece) {
                const int columns = last - c < piece ? last - c : piece;
                if (span.rows > 1) {
                    prefetch_block(y + int64_t(span.row) * width + c, span.rows, width, columns);
                    prefetch_block(residual + int64_t(span.row) * width + c, span.rows, width, columns);
                }
                const bool any = delta<T>(*step, span, layer, module, width, c, columns, buffer, piece);
                for (int i = 0; i < span.rows; i++) add(span.row + i, c, columns, any ? buffer + i * piece : nullptr);
            }
        }
        if (num_threads > 1) GOMP_barrier();
        for (int i = int(int64_t(rows) * thread / num_threads); i < int(int64_t(rows) * (thread + 1) / num_threads); i++)
            norm_row(residual + int64_t(i) * width, weight, out + int64_t(i) * width, width, eps);
    });
}

inline f32 silu(f32 x) { return x / (1.f + exp(-x)); }

// out = silu(gate + dg) * (up + du), gate_up: [rows, 2 * width].
template <class T> void swiglu(const T* gate_up, const LoraStep* step, int layer, T* out, int rows, int width) {
    auto finish = [&](int row, int column, int columns, const float* dg, const float* du) {
        const T* gate = gate_up + int64_t(row) * 2 * width + column;
        T* to = out + int64_t(row) * width + column;
        for (int c = 0; c < columns; c += WIDE) {
            Pair g = load(gate + c, columns - c), u = load(gate + width + c, columns - c);
            if (dg) {
                Pair d = load(dg + c);
                g = {g.a + d.a, g.b + d.b};
            }
            if (du) {
                Pair d = load(du + c);
                u = {u.a + d.a, u.b + d.b};
            }
            store(to + c, {silu(g.a) * u.a, silu(g.b) * u.b}, columns - c);
        }
    };
    if (!step) {
        const int chunk = SHARED_COLUMNS, chunks = (width + chunk - 1) / chunk;
        parallel_for(rows * chunks, true, [&](int item) {
            const int c = item % chunks * chunk;
            finish(item / chunks, c, width - c < chunk ? width - c : chunk, nullptr, nullptr);
        });
        return;
    }
    const int chunk = step->item_columns(width), chunks = (width + chunk - 1) / chunk;
    parallel_for(step->num_spans * chunks, false, [&](int item) {
        float buffer[2][BUFFER];
        const Span& span = step->spans[item / chunks];
        const int first = item % chunks * chunk, last = first + chunk < width ? first + chunk : width;
        const int piece = piece_columns(span.rows);
        for (int c = first; c < last; c += piece) {
            const int columns = last - c < piece ? last - c : piece;
            if (span.rows > 1) {
                const T* rows = gate_up + int64_t(span.row) * 2 * width + c;
                prefetch_block(rows, span.rows, 2 * width, columns);
                prefetch_block(rows + width, span.rows, 2 * width, columns);
            }
            const bool any_gate = delta<T>(*step, span, layer, GATE, width, c, columns, buffer[0], piece);
            const bool any_up = delta<T>(*step, span, layer, UP, width, c, columns, buffer[1], piece);
            for (int i = 0; i < span.rows; i++)
                finish(span.row + i, c, columns, any_gate ? buffer[0] + i * piece : nullptr,
                       any_up ? buffer[1] + i * piece : nullptr);
        }
    });
}

constexpr int MAX_HEAD_DIM = 512;

// Adds the delta, normalises and rotates one head in place, through fp32.
template <class T>
inline void finish_head(T* x, const float* delta, const T* norm, float eps, const float* cos, const float* sin, int dim) {
    float h[MAX_HEAD_DIM];
    f32 squares = {};
    for (int d = 0; d < dim; d += WIDE) {
        Pair v = load(x + d, dim - d);
        if (delta) {
            Pair e = load(delta + d);
            v = {v.a + e.a, v.b + e.b};
        }
        squares += v.a * v.a + v.b * v.b;
        store_as<T>(h + d, v, dim - d);
    }
    if (norm) {
        const float scale = 1.f / sqrtf(sum(squares) / float(dim) + eps);
        for (int d = 0; d < dim; d += WIDE) {
            Pair v = load_as<T>(h + d, dim - d), w = load(norm + d, dim - d);
            store_as<T>(h + d, {v.a * scale * w.a, v.b * scale * w.b}, dim - d);
        }
    }
    const int half = dim / 2;
    for (int d = 0; d < half; d += WIDE) {
        const int n = half - d;
        Pair u = load_as<T>(h + d, n), v = load_as<T>(h + half + d, n);
        Pair cu = load_as<T>(cos + d, n), su = load_as<T>(sin + d, n);
        Pair cv = load_as<T>(cos + half + d, n), sv = load_as<T>(sin + half + d, n);
        store(x + d, {u.a * cu.a - v.a * su.a, u.b * cu.b - v.b * su.b}, n);
        store(x + half + d, {v.a * cv.a + u.a * sv.a, v.b * cv.b + u.b * sv.b}, n);
    }
}

template <class T> inline void write_key(const KVLayer& kv, int64_t slot, int head, const T* x) {
    const int64_t block = slot / kv.block_size, offset = slot % kv.block_size;
    T* to = static_cast<T*>(kv.k) + (block * kv.num_kv_heads + head) * kv.block_size * kv.head_dim;
    uint32_t* words = reinterpret_cast<uint32_t*>(to + offset / LANES * LANES * kv.head_dim) + offset % LANES;
    for (int d = 0; d < kv.head_dim / WORD<T>; d++) memcpy(words + d * LANES, x + d * WORD<T>, 4);
}

template <class T> inline T* value_row(const KVLayer& kv, int64_t slot, int head) {
    const int64_t block = slot / kv.block_size, offset = slot % kv.block_size;
    return static_cast<T*>(kv.v) + ((block * kv.num_kv_heads + head) * kv.block_size + offset) * kv.head_dim;
}

// q and k deltas, per-head norm, rope in place; v delta in place; K and V written to the cache.
template <class T>
void rope_kv_write(T* qkv, const LoraStep* step, int layer, const float* cos, const float* sin, const T* q_norm,
                   const T* k_norm, float eps, int rows, int num_heads, const KVLayer& kv, const int64_t* slots) {
    const int dim = kv.head_dim, num_kv = kv.num_kv_heads, heads = num_heads + 2 * num_kv;
    const int64_t stride = int64_t(heads) * dim;
    auto finish = [&](int row, int head, const float* delta) {
        T* x = qkv + row * stride + int64_t(head) * dim;
        if (head < num_heads + num_kv) {
            const T* norm = head < num_heads ? q_norm : k_norm;
            finish_head(x, delta, norm, eps, cos + int64_t(row) * dim, sin + int64_t(row) * dim, dim);
            if (head >= num_heads) write_key(kv, slots[row], head - num_heads, x);
            return;
        }
        if (delta)
            for (int d = 0; d < dim; d += WIDE) {
                Pair v = load(x + d, dim - d), e = load(delta + d);
                store(x + d, {v.a + e.a, v.b + e.b}, dim - d);
            }
        memcpy(value_row<T>(kv, slots[row], head - num_heads - num_kv), x, dim * sizeof(T));
    };
    if (!step) {
        const int group = 4, groups = (heads + group - 1) / group;
        parallel_for(rows * groups, true, [&](int item) {
            for (int h = item % groups * group; h < heads && h < item % groups * group + group; h++)
                finish(item / groups, h, nullptr);
        });
        return;
    }
    // Items: some heads of one module. A head's delta starts at a multiple of 32 columns in the buffer.
    const int padded = (dim + WIDE - 1) / WIDE * WIDE;
    const int fit = step->item_columns(num_heads * dim) / dim, group = dim == padded && fit > 0 ? fit : 1;
    const int q_groups = (num_heads + group - 1) / group, kv_groups = (num_kv + group - 1) / group;
    const int groups = q_groups + 2 * kv_groups;
    parallel_for(step->num_spans * groups, false, [&](int item) {
        float buffer[BUFFER];
        const Span& span = step->spans[item / groups];
        int g = item % groups, module = 0, in_module = num_heads, base = 0;
        if (g >= q_groups) {
            g -= q_groups, module = 1, in_module = num_kv, base = num_heads;
            if (g >= kv_groups) g -= kv_groups, module = 2, base += num_kv;
        }
        const int last = (g + 1) * group < in_module ? (g + 1) * group : in_module;
        const int most = piece_columns(span.rows) / padded, piece = most < 1 ? 1 : most < group ? most : group;
        for (int h = g * group; h < last; h += piece) {
            const int n = last - h < piece ? last - h : piece;
            if (span.rows > 1)
                prefetch_block(qkv + span.row * stride + int64_t(base + h) * dim, span.rows, stride, n * dim);
            const bool any = delta<T>(*step, span, layer, module, in_module * dim, h * dim, n * dim, buffer, n * padded);
            for (int i = 0; i < span.rows; i++)
                for (int j = 0; j < n; j++)
                    finish(span.row + i, base + h + j, any ? buffer + (int64_t(i) * n + j) * padded : nullptr);
        }
    });
}
