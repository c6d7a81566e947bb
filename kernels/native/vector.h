// Vectors of 32 elements in fp32, whatever the storage type, and the thread pool.
//
// Written with the compiler's generic vectors, so the same source serves AVX-512, AVX2 and NEON. bf16 needs no widening
// shuffles this way: 32 bf16 are loaded as 16 words, the even elements shifted up, the odd ones masked. A Pair therefore
// holds (even, odd) elements for bf16 and (first, second half) for fp32; elementwise code does not care.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

typedef float f32 __attribute__((vector_size(64)));
typedef uint32_t u32 __attribute__((vector_size(64)));
typedef int32_t i32 __attribute__((vector_size(64)));
typedef uint16_t bf16;  // the bits

// Accumulators live in registers only if the loops over them are unrolled completely.
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

constexpr int LANES = 16, WIDE = 32;

struct Pair {
    f32 a, b;
};

inline f32 splat(float x) { return f32{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
inline u32 splat_word(uint32_t x) { return u32{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
inline f32 as_float(u32 x) { return (f32)x; }

#if defined(__clang__)
#define SHUFFLE2(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE2(x, y, ...) __builtin_shuffle(x, y, i32{__VA_ARGS__})
#endif
inline f32 evens(f32 x, f32 y) { return SHUFFLE2(x, y, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30); }
inline f32 odds(f32 x, f32 y) { return SHUFFLE2(x, y, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31); }
inline f32 zip_low(f32 x, f32 y) { return SHUFFLE2(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23); }
inline f32 zip_high(f32 x, f32 y) { return SHUFFLE2(x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31); }

template <class V> inline V load_vector(const void* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
template <class V> inline void store_vector(void* p, V v) { memcpy(p, &v, sizeof v); }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline uint32_t rounded_bits(float x) {  // round to nearest even, result in the upper half
    uint32_t u;
    memcpy(&u, &x, 4);
    return u + 0x7fff + ((u >> 16) & 1);
}
inline u32 rounded_bits(f32 x) {
    u32 u = (u32)x;
    return u + 0x7fff + ((u >> 16) & 1);
}
template <class T> T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bf16 from_float<bf16>(float x) { return bf16(rounded_bits(x) >> 16); }

inline Pair split(u32 words) { return {as_float(words << 16), as_float(words & 0xffff0000u)}; }
inline Pair load(const float* p) { return {load_vector<f32>(p), load_vector<f32>(p + LANES)}; }
inline Pair load(const bf16* p) { return split(load_vector<u32>(p)); }
inline void store(float* p, Pair x) {
    store_vector(p, x.a);
    store_vector(p + LANES, x.b);
}
inline void store(bf16* p, Pair x) {
    store_vector(p, (rounded_bits(x.a) >> 16) | (rounded_bits(x.b) & 0xffff0000u));
}

// The first n elements only: for the tail of a row.
template <class T> inline Pair load(const T* p, int n) {
    if (n >= WIDE) return load(p);
    T buffer[WIDE] = {};
    memcpy(buffer, p, n * sizeof(T));
    return load(buffer);
}
template <class T> inline void store(T* p, Pair x, int n) {
    if (n >= WIDE) return store(p, x);
    T buffer[WIDE];
    store(buffer, x);
    memcpy(p, buffer, n * sizeof(T));
}

inline u32 load_words(const bf16* p, int n) {
    if (n >= WIDE) return load_vector<u32>(p);
    bf16 buffer[WIDE] = {};
    memcpy(buffer, p, n * sizeof(bf16));
    return load_vector<u32>(buffer);
}

// fp32 in natural order, as the Pair of storage type T.
template <class T> inline Pair load_as(const float* p, int n = WIDE) {
    Pair x = load<float>(p, n);
    return sizeof(T) == 2 ? Pair{evens(x.a, x.b), odds(x.a, x.b)} : x;
}
template <class T> inline void store_as(float* p, Pair x, int n = WIDE) {
    store<float>(p, sizeof(T) == 2 ? Pair{zip_low(x.a, x.b), zip_high(x.a, x.b)} : x, n);
}

typedef float f32x4 __attribute__((vector_size(16)));

inline f32x4 sum_quarters(f32 x) {
    typedef float f32x8 __attribute__((vector_size(32)));
    f32x8 half[2];
    memcpy(half, &x, sizeof x);
    half[0] += half[1];
    f32x4 quarter[2];
    memcpy(quarter, half, sizeof quarter);
    return quarter[0] + quarter[1];
}
inline float sum(f32 x) {
    f32x4 q = sum_quarters(x);
    return (q[0] + q[2]) + (q[1] + q[3]);
}
// The four sums at once.
inline f32x4 sum4(f32 a, f32 b, f32 c, f32 d) {
    f32 ab = zip_low(a, b) + zip_high(a, b), cd = zip_low(c, d) + zip_high(c, d);
    return sum_quarters(SHUFFLE2(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                        SHUFFLE2(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
}
inline f32 larger(f32 x, f32 y) { return x > y ? x : y; }
inline float largest(f32 x) {
    float best = x[0];
    for (int i = 1; i < LANES; i++) best = best > x[i] ? best : x[i];
    return best;
}

// exp to about 2 ulp; underflows to 0 below -87.
inline f32 exp(f32 x) {
    x = larger(x, splat(-103.f));
    x = x < splat(88.f) ? x : splat(88.f);
    const f32 magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
    f32 shifted = x * 1.44269504f + magic;
    f32 n = shifted - magic;
    f32 r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    f32 p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.f;
    i32 exponent = (i32)shifted - (i32)magic;
    i32 scale = (exponent + 127) << 23;
    return exponent > -127 ? p * (f32)scale : f32{};
}

// acc[i] += a[2i] * b[2i] + a[2i+1] * b[2i+1] on words of two bf16.
#if defined(__AVX512BF16__)
constexpr bool HAS_DOT = true;
inline f32 dot(f32 acc, u32 a, u32 b) { return (f32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
#else
constexpr bool HAS_DOT = false;
inline f32 dot(f32 acc, u32 a, u32 b) {
    Pair x = split(a), y = split(b);
    return acc + x.a * y.a + x.b * y.b;
}
#endif

// Asks for a block of a matrix that is needed soon: strided rows are beyond the hardware's prefetcher.
template <class T> inline void prefetch_block(const T* p, int rows, int64_t stride, int columns) {
    for (int i = 0; i < rows; i++, p += stride)
        for (int c = 0; c < columns; c += 64 / int(sizeof(T))) __builtin_prefetch(p + c);
}

// The pool is the one torch already runs (GNU OpenMP's entry points, resolved at load time): a second pool would fight
// it for the cores. Calling the entry points directly needs neither -fopenmp nor the library at link time.
extern "C" {
void GOMP_parallel(void (*function)(void*), void* data, unsigned num_threads, unsigned flags);
void GOMP_barrier(void);
int omp_get_thread_num(void);
}

static int num_threads = 1;

// Runs body(thread) on every thread of the pool.
template <class F> void on_every_thread(F&& body) {
    if (num_threads == 1) return body(0);
    GOMP_parallel([](void* data) { (*static_cast<std::remove_reference_t<F>*>(data))(omp_get_thread_num()); }, &body,
                  num_threads, 0);
}

// Runs body(i) for i < n. Uneven work is handed out one by one, even work in contiguous shares.
template <class F> void parallel_for(int n, bool even, F&& body) {
    if (n <= 1 || num_threads == 1) {
        for (int i = 0; i < n; i++) body(i);
        return;
    }
    std::atomic<int> next{0};
    on_every_thread([&](int thread) {
        if (even) {
            int last = int(int64_t(n) * (thread + 1) / num_threads);
            for (int i = int(int64_t(n) * thread / num_threads); i < last; i++) body(i);
        } else {
            for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) body(i);
        }
    });
}
