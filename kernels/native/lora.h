// Adapter pages applied in place: shrink (x A^T) and the delta (t B^T) that the fused operations add.
#pragma once
#include "vector.h"

constexpr int PAGE_RANKS = 16, NUM_MODULES = 7;
constexpr int MAX_ROWS = 32;  // rows of a span

// Columns of a delta computed at once: a lone row streams long stretches of B, several rows share the second-level cache.
constexpr int LONE_COLUMNS = 2048, SHARED_COLUMNS = 512, TILE_COLUMNS = 64;
constexpr int BUFFER = MAX_ROWS * SHARED_COLUMNS;  // floats
inline int piece_columns(int rows) { return rows == 1 ? LONE_COLUMNS : SHARED_COLUMNS; }

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
    float* t;         // [modules, t_size]; inside: span, row, entry, rank; see is_paired
    int64_t t_size;
    int32_t num_spans, num_layers;

    // Columns of one item of work: long, but short enough that every thread gets several.
    int item_columns(int width) const {
        int columns = LONE_COLUMNS;
        while (columns > SHARED_COLUMNS && num_spans * ((width + columns - 1) / columns) < 8 * num_threads) columns /= 2;
        return columns;
    }
    int64_t cell(int entry, int layer, int module) const {
        return (int64_t(page_ids[entry]) * num_layers + layer) * NUM_MODULES + module;
    }
};

// True if the t of a span is stored as bf16, for the dot instruction (in the first half of its place); fp32 otherwise.
template <class T> constexpr bool is_paired(int rows) { return sizeof(T) == 2 && HAS_DOT && rows > 1; }

// ---- shrink ---------------------------------------------------------------------------------------------------------

// out[i][j] = x[i] . a[j] for ROWS rows of x and RANKS rows of a.
template <int ROWS, int RANKS, class T>
inline void dots(const T* x, int64_t x_stride, const T* a, int width, float* out, int64_t out_stride, float factor) {
    f32 acc[ROWS][RANKS] = {};
    auto step = [&](auto loader) {
        if constexpr (sizeof(T) == 2) {
            u32 xs[ROWS];
            UNROLL for (int i = 0; i < ROWS; i++) xs[i] = loader(x + i * x_stride);
            UNROLL for (int j = 0; j < RANKS; j++) {
                u32 w = loader(a + int64_t(j) * width);
                UNROLL for (int i = 0; i < ROWS; i++) acc[i][j] = dot(acc[i][j], xs[i], w);
            }
        } else {
            Pair xs[ROWS];
            UNROLL for (int i = 0; i < ROWS; i++) xs[i] = loader(x + i * x_stride);
            UNROLL for (int j = 0; j < RANKS; j++) {
                Pair w = loader(a + int64_t(j) * width);
                UNROLL for (int i = 0; i < ROWS; i++) acc[i][j] += xs[i].a * w.a + xs[i].b * w.b;
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
    UNROLL for (int i = 0; i < ROWS; i++) {
        if constexpr (RANKS == 4) {
            store_vector(out + i * out_stride, sum4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]) * factor);
        } else {
            UNROLL for (int j = 0; j < RANKS; j++) out[i * out_stride + j] = factor * sum(acc[i][j]);
        }
    }
}

// t of ROWS rows and one page, times factor; ranks past the live ones are zero.
template <int ROWS, class T>
inline void shrink_rows(const T* x, const T* a, int width, int live, float factor, float* out, int64_t out_stride, bool paired) {
    float t[ROWS][PAGE_RANKS] = {};
    int j = 0;
    for (; j + 4 <= live; j += 4) dots<ROWS, 4>(x, width, a + int64_t(j) * width, width, &t[0][j], PAGE_RANKS, factor);
    for (; j < live; j++) dots<ROWS, 1>(x, width, a + int64_t(j) * width, width, &t[0][j], PAGE_RANKS, factor);
    for (int i = 0; i < ROWS; i++) {
        if (paired) {
            bf16* to = reinterpret_cast<bf16*>(out) + i * out_stride;
            for (int r = 0; r < PAGE_RANKS; r++) to[r] = bf16(rounded_bits(t[i][r]) >> 16);
        } else {
            memcpy(out + i * out_stride, t[i], sizeof t[i]);
        }
    }
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
        const int live = step.live[cell];
        const float factor = step.weights[span.first_entry + entry] * step.scaling[cell];
        const int64_t stride = int64_t(span.entries) * PAGE_RANKS;
        const bool paired = is_paired<T>(span.rows);
        float* base = step.t + module * step.t_size + span.t_start;
        auto out = [&](int row) {
            const int64_t at = row * stride + entry * PAGE_RANKS;
            return paired ? reinterpret_cast<float*>(reinterpret_cast<bf16*>(base) + at) : base + at;
        };
        const T* rows = x + int64_t(span.row) * width;
        int i = 0;
        for (; i + 4 <= span.rows; i += 4) shrink_rows<4>(rows + int64_t(i) * width, a, width, live, factor, out(i), stride, paired);
        for (; i + 2 <= span.rows; i += 2) shrink_rows<2>(rows + int64_t(i) * width, a, width, live, factor, out(i), stride, paired);
        for (; i < span.rows; i++) shrink_rows<1>(rows + int64_t(i) * width, a, width, live, factor, out(i), stride, paired);
    });
}

// ---- delta ----------------------------------------------------------------------------------------------------------

// The B rows of one module that a span uses, across its pages.
template <class T> struct Ranks {
    static constexpr int MAX = 128, AHEAD = 4;
    const LoraStep& step;
    const Span& span;
    const int layer, module;
    const int64_t width;  // of a B row
    int count = 0, next_entry = 0;
    const T* b[MAX + AHEAD];
    int at[MAX];  // index of the rank in a row's t

    Ranks(const LoraStep& step, const Span& span, int layer, int module, int width)
        : step(step), span(span), layer(layer), module(module), width(width) {}

    const float* t() const { return step.t + module * step.t_size + span.t_start; }
    int64_t t_stride() const { return int64_t(span.entries) * PAGE_RANKS; }

    // Takes up to MAX more ranks; false when none are left. pairs: an even number of every page (the row past the last
    // live one is zero).
    bool more(bool pairs) {
        for (count = 0; next_entry < span.entries && count + PAGE_RANKS <= MAX; next_entry++) {
            const int64_t cell = step.cell(span.first_entry + next_entry, layer, module);
            if (step.offset_b[cell] < 0) continue;
            const T* row = static_cast<const T*>(step.arena) + step.offset_b[cell];
            const int live = pairs ? (step.live[cell] + 1) / 2 * 2 : step.live[cell];
            for (int r = 0; r < live; r++) b[count] = row + r * width, at[count++] = next_entry * PAGE_RANKS + r;
        }
        for (int k = 0; k < AHEAD && count; k++) b[count + k] = b[count - 1];
        return count > 0;
    }
};

// out[i] (+)= sum over SIDE ranks of t * b, for ROWS rows. B is streamed along its rows, since only long sequential reads
// reach the memory's bandwidth; the rows after these are prefetched.
template <int ROWS, int SIDE, class T>
inline void accumulate(const Ranks<T>& ranks, int first, int row, int column, int columns, float* out, int64_t out_stride,
                       bool add) {
    f32 factor[ROWS][SIDE];
    const T* b[SIDE];
    UNROLL for (int k = 0; k < SIDE; k++) {
        b[k] = ranks.b[first + k] + column;
        UNROLL for (int i = 0; i < ROWS; i++)
            factor[i][k] =
                first + k < ranks.count ? splat(ranks.t()[(row + i) * ranks.t_stride() + ranks.at[first + k]]) : f32{};
    }
    const T* const* next = ranks.b + (first + SIDE < ranks.count ? first + SIDE : first);
    int c = 0;
    auto step = [&](auto loader) {
        Pair acc[ROWS];
        UNROLL for (int i = 0; i < ROWS; i++) acc[i] = add ? load(out + i * out_stride + c) : Pair{};
        UNROLL for (int k = 0; k < SIDE; k++) {
            const Pair w = loader(b[k] + c);
            UNROLL for (int i = 0; i < ROWS; i++) {
                acc[i].a += factor[i][k] * w.a;
                acc[i].b += factor[i][k] * w.b;
            }
        }
        UNROLL for (int i = 0; i < ROWS; i++) store(out + i * out_stride + c, acc[i]);
    };
    for (; c + WIDE <= columns; c += WIDE) {
        UNROLL for (int k = 0; k < SIDE; k++) __builtin_prefetch(next[k] + column + c);
        step([](const T* p) { return load(p); });
    }
    if (c < columns) step([&](const T* p) { return load(p, columns - c); });
}

template <int ROWS, class T>
inline void delta_rows(const Ranks<T>& ranks, int row, int column, int columns, float* out, int64_t out_stride, bool add) {
    for (int first = 0; first < ranks.count; first += 4, add = true)
        accumulate<ROWS, 4>(ranks, first, row, column, columns, out + row * out_stride, out_stride, add);
}

// Several rows of bf16: B rows interleaved by pairs once, then the dot instruction with bf16 t.
constexpr int PAIR_VECTORS = 2 * TILE_COLUMNS / WIDE;

template <int ROWS>
inline void paired_block(const u32* b, int pairs, const Ranks<bf16>& ranks, int row, int columns, float* out,
                         int64_t out_stride, bool add) {
    const bf16* t = reinterpret_cast<const bf16*>(ranks.t()) + row * ranks.t_stride();
    const int64_t t_stride = ranks.t_stride();
    f32 acc[ROWS][PAIR_VECTORS] = {};
    for (int k = 0; k < pairs; k++, b += PAIR_VECTORS) {
        const bf16* tk = t + ranks.at[2 * k];
        UNROLL for (int i = 0; i < ROWS; i++) {
            uint32_t word;
            memcpy(&word, tk + i * t_stride, 4);
            const u32 factor = splat_word(word);
            UNROLL for (int v = 0; v < PAIR_VECTORS; v++) acc[i][v] = dot(acc[i][v], factor, b[v]);
        }
    }
    UNROLL for (int i = 0; i < ROWS; i++) {
        UNROLL for (int v = 0; v < PAIR_VECTORS / 2; v++) {
            if (v * WIDE >= columns) break;
            float* to = out + (row + i) * out_stride + v * WIDE;
            Pair x = {acc[i][2 * v], acc[i][2 * v + 1]};
            if (add) {
                const Pair old = load(to);
                x = {x.a + old.a, x.b + old.b};
            }
            store(to, x);
        }
    }
}

// columns <= SHARED_COLUMNS.
inline void delta_paired(const Ranks<bf16>& ranks, int column, int columns, float* out, int64_t out_stride, bool add) {
    constexpr int TILES = SHARED_COLUMNS / TILE_COLUMNS, PAIRS = Ranks<bf16>::MAX / 2;
    u32 b[TILES][PAIRS * PAIR_VECTORS];
    const int pairs = ranks.count / 2, rows = ranks.span.rows;
    for (int k = 0; k < pairs; k++) {
        const bf16 *x = ranks.b[2 * k] + column, *y = ranks.b[2 * k + 1] + column;
        const bf16 *ahead = ranks.b[2 * k + 2] + column, *ahead2 = ranks.b[2 * k + 3] + column;
        for (int c = 0; c < columns; c += WIDE) {
            const int n = columns - c;
            __builtin_prefetch(ahead + c);
            __builtin_prefetch(ahead2 + c);
            const u32 even = load_words(x + c, n), odd = load_words(y + c, n);
            u32* to = &b[c / TILE_COLUMNS][k * PAIR_VECTORS + c % TILE_COLUMNS / WIDE * 2];
            to[0] = (even & 0xffffu) | (odd << 16);
            to[1] = (even >> 16) | (odd & 0xffff0000u);
        }
    }
    for (int c = 0; c < columns; c += TILE_COLUMNS) {
        const u32* tile = b[c / TILE_COLUMNS];
        const int n = columns - c;
        int i = 0;
        for (; i + 6 <= rows; i += 6) paired_block<6>(tile, pairs, ranks, i, n, out + c, out_stride, add);
        for (; i + 4 <= rows; i += 4) paired_block<4>(tile, pairs, ranks, i, n, out + c, out_stride, add);
        for (; i + 2 <= rows; i += 2) paired_block<2>(tile, pairs, ranks, i, n, out + c, out_stride, add);
        for (; i < rows; i++) paired_block<1>(tile, pairs, ranks, i, n, out + c, out_stride, add);
    }
}

// out[i] = the delta of the span's row i in columns [column, column + columns), as Pairs of T; out_stride is a multiple
// of 32. False, and out untouched, if no page of the span adapts the module.
template <class T>
bool delta(const LoraStep& step, const Span& span, int layer, int module, int width, int column, int columns, float* out,
           int64_t out_stride) {
    Ranks<T> ranks{step, span, layer, module, width};
    const bool paired = is_paired<T>(span.rows);
    bool add = false;
    for (; ranks.more(paired); add = true) {
        if constexpr (is_paired<T>(2)) {
            if (paired) {
                for (int c = 0; c < columns; c += SHARED_COLUMNS)
                    delta_paired(ranks, column + c, columns - c < SHARED_COLUMNS ? columns - c : SHARED_COLUMNS, out + c, out_stride,
                                 add);
                continue;
            }
        }
        int i = 0;
        for (; i + 4 <= span.rows; i += 4) delta_rows<4>(ranks, i, column, columns, out, out_stride, add);
        for (; i + 2 <= span.rows; i += 2) delta_rows<2>(ranks, i, column, columns, out, out_stride, add);
        for (; i < span.rows; i++) delta_rows<1>(ranks, i, column, columns, out, out_stride, add);
    }
    return add;
}
