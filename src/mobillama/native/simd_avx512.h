// Sixteen lanes of AVX-512 with VNNI.
#pragma once
#include <immintrin.h>

namespace {
using V = __m512;
using I = __m512i;
using Bytes = __m512i;
using FourCodes = int32_t __attribute__((may_alias, aligned(1)));
constexpr int COLUMNS = 16;  // vectors that one pass over a panel serves

inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V a) { _mm512_storeu_ps(p, a); }
inline V set(float a) { return _mm512_set1_ps(a); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V div(V a, V b) { return _mm512_div_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V larger(V a, V b) { return _mm512_max_ps(a, b); }
inline V smaller(V a, V b) { return _mm512_min_ps(a, b); }
inline V magnitude(V a) { return _mm512_abs_ps(a); }
inline V nearest(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V power_of_two(V whole) { return _mm512_scalef_ps(set(1), whole); }
inline float sum(V a) { return _mm512_reduce_add_ps(a); }
inline float largest(V a) { return _mm512_reduce_max_ps(a); }

inline V load_half(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline V load_bfloat(const void* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline void store_half(uint16_t* p, V a) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline int store_codes(int8_t* p, V whole) {  // and returns their sum
    const __m512i a = _mm512_cvtps_epi32(whole);
    _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(a));
    return _mm512_reduce_add_epi32(a);
}

inline I seti(int a) { return _mm512_set1_epi32(a); }
inline V to_float(I a) { return _mm512_cvtepi32_ps(a); }
inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Bytes low(Bytes a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
inline Bytes high(Bytes a) { return low(_mm512_srli_epi16(a, 4)); }
inline I dot(I acc, Bytes w, const int8_t* x) {
    // GCC would broadcast in an instruction of its own, which takes a third of the products' time.
    asm("vpdpbusd %1%{1to16%}, %2, %0" : "+v"(acc) : "m"(*(const FourCodes*)x), "v"(w));
    return acc;
}
// Codes of eight bits are made unsigned by adding 128, which 16 times minus eight sums takes away again.
inline I start_signed(int minus_eight_sums) { return _mm512_slli_epi32(seti(minus_eight_sums), 4); }
inline Bytes make_signed(Bytes w) { return _mm512_xor_si512(w, _mm512_set1_epi8(-128)); }
inline I dot_signed(I acc, Bytes w, const int8_t* x) { return dot(acc, w, x); }
}  // namespace
