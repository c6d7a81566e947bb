// The C entry points, one per operation and storage type. Plain pointers only: nothing of torch is needed to compile.
#include "prefill.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void set_num_threads(int n) { num_threads = n; }

#define INSTANTIATE(T, SUFFIX)                                                                                           \
    EXPORT void rms_norm_##SUFFIX(const T* x, const T* weight, T* out, int rows, int width, float eps) {             \
        rms_norm(x, weight, out, rows, width, eps);                                                                      \
    }                                                                                                                    \
    EXPORT void add_rms_norm_##SUFFIX(const T* y, const LoraStep* step, int layer, int module, T* residual,          \
                                          const T* weight, T* out, int rows, int width, float eps) {                     \
        add_rms_norm(y, step, layer, module, residual, weight, out, rows, width, eps);                                   \
    }                                                                                                                    \
    EXPORT void swiglu_##SUFFIX(const T* gate_up, const LoraStep* step, int layer, T* out, int rows, int width) {    \
        swiglu(gate_up, step, layer, out, rows, width);                                                                  \
    }                                                                                                                    \
    EXPORT void lora_shrink_##SUFFIX(const LoraStep* step, const T* x, int width, int layer, const int32_t* modules, \
                                         int num_modules) {                                                              \
        lora_shrink(*step, x, width, layer, modules, num_modules);                                                       \
    }                                                                                                                    \
    EXPORT void rope_kv_write_##SUFFIX(T* qkv, const LoraStep* step, int layer, const float* cos, const float* sin,  \
                                           const T* q_norm, const T* k_norm, float eps, int rows, int num_heads,         \
                                           const KVLayer* kv, const int64_t* slots) {                                    \
        rope_kv_write(qkv, step, layer, cos, sin, q_norm, k_norm, eps, rows, num_heads, *kv, slots);                     \
    }                                                                                                                    \
    EXPORT void decode_attention_##SUFFIX(const AttentionStep* step, const T* q, int64_t q_stride,                   \
                                              const KVLayer* kv, int num_heads, float scale, int window, T* out) {       \
        decode_attention(*step, q, q_stride, *kv, num_heads, scale, window, out);                                        \
    }                                                                                                                    \
    EXPORT void prefill_attention_##SUFFIX(const T* q, int64_t q_stride, const int32_t* table, int num_queries, int length, \
                                           int num_heads, int window, float scale, const KVLayer* kv, T* out) {           \
        prefill_attention<T>({q, q_stride, table, num_queries, length, num_heads, window, scale, out}, *kv);             \
    }

INSTANTIATE(float, f32)
INSTANTIATE(bf16, bf16)
