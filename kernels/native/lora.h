// Adapter pages applied in place: shrink (x A^T) and the delta (t B^T) that the fused operations add.
#pragma once
#include "vector.h"

constexpr int PAGE_RANKS = 16, NUM_MODULES = 7;
constexpr int MAX_ROWS = 64;    // rows of a span
constexpr int FEW_ROWS = 8;     // up to here weights are streamed once per span, above they are tiled like a GEMM
constexpr int CHUNK = 256;      // columns of one item of work
constexpr int MANY_COLUMNS = 64;  // columns at a time when there are many rows

// Some rows that share their pages. entries = 0: no adapters.
struct Span {
    int32_t row, rows, first_entry, entries, t_start;
};

// One step. Laid out as `LoraStep` in native_ops.py.
struct LoraStep {
    const void* arena;
    const int64_t *offset_a, *offset_b;  // [pages, layers, modules]
    const int32_t* live;
    const float* scaling;
    const Span* spans;
    const int32_t* page_ids;
    const float* weights;
    float* t;         // [modules, t_size]; inside: span, row, entry, rank
    int64_t t_size;
    int32_t num_spans, num_layers;

    int64_t cell(int entry, int layer, int module) const {
        return (int64_t(page_ids[entry]) * num_layers + layer) * NUM_MODULES + module;
    }
};

// ---- shrink ---------------------------------------------------------------------------------------------------------

// out[i][j] = x[i] . a[j] for ROWS rows of x and RANKS rows of a.
template <int ROWS, int RANKS, class T>
inline void dots(const T* x, int64_t x_stride, const T* a, int width, float* out, int64_t out_stride, float factor) {
    f32 acc[ROWS][RANKS] = {};
    auto step = [&](auto loader) {
        if constexpr (sizeof(T) == 2) {
            u32 xs[ROWS];
            for (int i = 0; i < ROWS; i++) xs[i] = loader(x + i * x_stride);
            for (int j = 0; j < RANKS; j++) {
                u32 w = loader(a + int64_t(j) * width);
                for (int i = 0; i < ROWS; i++) acc[i][j] = dot(acc[i][j], xs[i], w);
            }
        } else {
            Pair xs[ROWS];
            for (int i = 0; i < ROWS; i++) xs[i] = loader(x + i * x_stride);
            for (int j = 0; j < RANKS; j++) {
                Pair w = loader(a + int64_t(j) * width);
                for (int i = 0; i < ROWS; i++) acc[i][j] += xs[i].a * w.a + xs[i].b * w.b;
            }
        }
    };
    int c = 0;
    for (; c + WIDE <= width; c += WIDE) {
        step([&](const T* p) {
            if constexpr (sizeof(T) == 2) return load_vector<u32>(p + c);
            else return load(p + c);
        });
    }
    if (c < width) {
        step([&](const T* p) {
            if constexpr (sizeof(T) == 2) {
                T buffer[WIDE] = {};
                memcpy(buffer, p + c, (width - c) * sizeof(T));
                return load_vector<u32>(buffer);
            } else return load(p + c, width - c);
        });
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < RANKS; j++) out[i * out_stride + j] = factor * sum(acc[i][j]);
}

template <int ROWS, class T>
inline void shrink_rows(const T* x, int64_t x_stride, const T* a, int width, int ranks, float* out, int64_t out_stride,
                        float factor) {
    constexpr int GROUP = ROWS == 4 ? 4 : 8;
    int j = 0;
    for (; j + GROUP <= ranks; j += GROUP)
        dots<ROWS, GROUP>(x, x_stride, a + int64_t(j) * width, width, out + j, out_stride, factor);
    for (; j < ranks; j++) dots<ROWS, 1>(x, x_stride, a + int64_t(j) * width, width, out + j, out_stride, factor);
}

template <class T>
void lora_shrink(const LoraStep& step, const T* x, int width, int layer, const int32_t* modules, int num_modules) {
    // Items: every page entry of every span, for each module. A span's entries are consecutive, so item -> (span, entry)
    // is a walk; it is short (spans) and done once per item.
    int total = 0;
    for (int s = 0; s < step.num_spans; s++) total += step.spans[s].entries;
    parallel_for(total * num_modules, false, [&](int item) {
        int module_index = item / total, entry = item % total, s = 0;
        while (entry >= step.spans[s].entries) entry -= step.spans[s++].entries;
        const Span& span = step.spans[s];
        int module = modules[module_index];
        int64_t cell = step.cell(span.first_entry + entry, layer, module);
        if (step.offset_a[cell] < 0) return;
        const T* a = static_cast<const T*>(step.arena) + step.offset_a[cell];
        const int ranks = step.live[cell];
        const float factor = step.weights[span.first_entry + entry] * step.scaling[cell];
        const int64_t stride = int64_t(span.entries) * PAGE_RANKS;
        float* out = step.t + module * step.t_size + span.t_start + entry * PAGE_RANKS;
        const T* rows = x + int64_t(span.row) * width;
        int i = 0;
        for (; i + 4 <= span.rows; i += 4)
            shrink_rows<4>(rows + int64_t(i) * width, width, a, width, ranks, out + i * stride, stride, factor);
        for (; i + 2 <= span.rows; i += 2)
            shrink_rows<2>(rows + int64_t(i) * width, width, a, width, ranks, out + i * stride, stride, factor);
        for (; i < span.rows; i++)
            shrink_rows<1>(rows + int64_t(i) * width, width, a, width, ranks, out + i * stride, stride, factor);
    });
}

// ---- delta ----------------------------------------------------------------------------------------------------------

// A span's pages that adapt one module, resolved once per item of work.
template <class T> struct Pages {
    const LoraStep& step;
    const Span& span;
    int layer, module, width;  // width: columns of a B row

    bool any() const {
        for (int e = 0; e < span.entries; e++)
            if (step.offset_b[step.cell(span.first_entry + e, layer, module)] >= 0) return true;
        return false;
    }
    // f(B rows, live ranks, t of the span's first row)
    template <class F> void each(F&& f) const {
        for (int e = 0; e < span.entries; e++) {
            int64_t cell = step.cell(span.first_entry + e, layer, module);
            if (step.offset_b[cell] < 0) continue;
            f(static_cast<const T*>(step.arena) + step.offset_b[cell], step.live[cell],
              step.t + module * step.t_size + span.t_start + e * PAGE_RANKS);
        }
    }
    int64_t t_stride() const { return int64_t(span.entries) * PAGE_RANKS; }
};

// ROWS rows from `row` by VECTORS * 32 columns from `column`, with fp32 t.
template <int ROWS, int VECTORS, class T>
inline void delta_block(const Pages<T>& pages, int row, int column, int columns, float* out, int64_t out_stride) {
    Pair acc[ROWS][VECTORS] = {};
    const int64_t t_stride = pages.t_stride();
    const bool whole = columns >= VECTORS * WIDE;
    pages.each([&](const T* b, int ranks, const float* t) {
        t += row * t_stride;
        b += column;
        for (int r = 0; r < ranks; r++, b += pages.width) {
            f32 factor[ROWS];
            for (int i = 0; i < ROWS; i++) factor[i] = splat(t[i * t_stride + r]);
            for (int v = 0; v < VECTORS; v++) {
                Pair w;
                if (whole) w = load(b + v * WIDE);
                else if (v * WIDE < columns) w = load(b + v * WIDE, columns - v * WIDE);
                else break;
                for (int i = 0; i < ROWS; i++) {
                    acc[i][v].a += factor[i] * w.a;
                    acc[i][v].b += factor[i] * w.b;
                }
            }
        }
    });
    for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < VECTORS && v * WIDE < columns; v++)
            store_as<T>(out + i * out_stride + v * WIDE, acc[i][v], columns - v * WIDE);
}

template <int ROWS, class T>
inline void delta_rows(const Pages<T>& pages, int row, int column, int columns, float* out, int64_t out_stride) {
    constexpr int VECTORS = ROWS == 1 ? 8 : ROWS == 2 ? 4 : 2;
    for (int c = 0; c < columns; c += VECTORS * WIDE)
        delta_block<ROWS, VECTORS>(pages, row, column + c, columns - c, out + c, out_stride);
}

// Many rows of bf16: t rounded to bf16 pairs, B rows interleaved by pairs once, then the dot instruction.
struct PairedRanks {
    static constexpr int MAX_PAIRS = 64;  // pairs of ranks at a time
    u32 b[MAX_PAIRS][2 * MANY_COLUMNS / WIDE];
    uint32_t t[MAX_ROWS][MAX_PAIRS];
    int pairs = 0;
};

template <int ROWS>
inline void paired_block(const PairedRanks& p, int row, float* out, int64_t out_stride, int columns, bool add) {
    constexpr int N = 2 * MANY_COLUMNS / WIDE;
    f32 acc[ROWS][N] = {};
    for (int k = 0; k < p.pairs; k++)
        for (int i = 0; i < ROWS; i++) {
            u32 t = splat_word(p.t[row + i][k]);
            for (int v = 0; v < N; v++) acc[i][v] = dot(acc[i][v], t, p.b[k][v]);
        }
    for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < N / 2 && v * WIDE < columns; v++) {
            float* to = out + (row + i) * out_stride + v * WIDE;
            Pair x = {acc[i][2 * v], acc[i][2 * v + 1]};
            if (add) {
                Pair old = load_as<bf16>(to, columns - v * WIDE);
                x = {x.a + old.a, x.b + old.b};
            }
            store_as<bf16>(to, x, columns - v * WIDE);
        }
}

inline void delta_many(const Pages<bf16>& pages, int column, int columns, float* out, int64_t out_stride) {
    PairedRanks p;
    bool add = false;
    const int rows = pages.span.rows;
    auto flush = [&] {
        int i = 0;
        for (; i + 4 <= rows; i += 4) paired_block<4>(p, i, out, out_stride, columns, add);
        for (; i < rows; i++) paired_block<1>(p, i, out, out_stride, columns, add);
        add = true;
        p.pairs = 0;
    };
    pages.each([&](const bf16* b, int ranks, const float* t) {
        if (p.pairs + PAGE_RANKS / 2 > PairedRanks::MAX_PAIRS) flush();
        for (int r = 0; r < ranks; r += 2, p.pairs++) {
            const bf16* first = b + int64_t(r) * pages.width + column;
            const bool two = r + 1 < ranks;
            for (int v = 0; v < MANY_COLUMNS / WIDE; v++) {
                u32 x = {}, y = {};
                if (v * WIDE < columns) {
                    bf16 buffer[WIDE] = {};
                    auto take = [&](const bf16* from) {
                        if (columns - v * WIDE >= WIDE) return load_vector<u32>(from + v * WIDE);
                        memcpy(buffer, from + v * WIDE, (columns - v * WIDE) * sizeof(bf16));
                        return load_vector<u32>(buffer);
                    };
                    x = take(first);
                    if (two) y = take(first + pages.width);
                }
                p.b[p.pairs][2 * v] = (x & 0xffffu) | (y << 16);
                p.b[p.pairs][2 * v + 1] = (x >> 16) | (y & 0xffff0000u);
            }
            for (int i = 0; i < rows; i++) {
                const float* ti = t + i * pages.t_stride() + r;
                p.t[i][p.pairs] = (rounded_bits(ti[0]) >> 16) | (two ? rounded_bits(ti[1]) & 0xffff0000u : 0);
            }
        }
    });
    flush();
}

// out[row][0..columns) = the delta of a span's rows in columns [column, column + columns).
template <class T> void delta(const Pages<T>& pages, int column, int columns, float* out, int64_t out_stride) {
    const int rows = pages.span.rows;
    if constexpr (sizeof(T) == 2 && HAS_DOT) {
        if (rows > FEW_ROWS) {
            for (int c = 0; c < columns; c += MANY_COLUMNS)
                delta_many(pages, column + c, columns - c < MANY_COLUMNS ? columns - c : MANY_COLUMNS, out + c, out_stride);
            return;
        }
    }
    int i = 0;
    for (; i + 4 <= rows; i += 4) delta_rows<4>(pages, i, column, columns, out + i * out_stride, out_stride);
    for (; i + 2 <= rows; i += 2) delta_rows<2>(pages, i, column, columns, out + i * out_stride, out_stride);
    for (; i < rows; i++) delta_rows<1>(pages, i, column, columns, out + i * out_stride, out_stride);
}
