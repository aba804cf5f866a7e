// Vectors of whatever width the machine has, and the numbers kept in them.
//
// Floats are added up in float32, integers exactly. Every sum has a fixed order, whatever the number of threads; only
// attention over long contexts is cut into as many parts as keep them busy.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define HEADROOM_AVX512
constexpr int LANES = 16, ROWS = 12;  // 24 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 6;  // 12 accumulators of 16 registers
#else
constexpr int LANES = 4, ROWS = 6;  // NEON, SSE: 12 of 32 or 16 registers
#endif
constexpr int PANEL = 2 * LANES;

using Vec = float __attribute__((vector_size(LANES * 4)));
using IntVec = int32_t __attribute__((vector_size(LANES * 4)));
using ShortVec = uint16_t __attribute__((vector_size(LANES * 2)));
using WordVec = int16_t __attribute__((vector_size(LANES * 4)));  // 2 · LANES of them
using UnsignedWordVec = uint16_t __attribute__((vector_size(LANES * 4)));
using ByteVec = uint8_t __attribute__((vector_size(LANES * 4)));  // 4 · LANES of them

enum Type : int { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3, FP8 = 4, W4A8 = 5 };  // FP8 of the cache, W4A8 of weights only

template <class V, class T>
inline V load(const T* from) {
    V value;
    std::memcpy(&value, from, sizeof(V));
    return value;
}
template <class V>
inline void store(void* to, V value) {
    std::memcpy(to, &value, sizeof(V));
}
inline Vec splat(float x) { return x - Vec{}; }
template <class To, class From>
inline To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

inline float widen(uint16_t bits) {  // bfloat16 is the upper half of float32
    return same_bits<float>(uint32_t(bits) << 16);
}
inline uint16_t narrow(float value) {  // round to nearest, ties to even
    const uint32_t bits = same_bits<uint32_t>(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16) | 0x40;  // NaN stays NaN
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// 2 · LANES signed bytes as 16-bit integers. Spelled out where compilers turn the conversion into a loop over elements.
inline WordVec load_words(const int8_t* from) {
#if defined(HEADROOM_AVX512)
    return same_bits<WordVec>(_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__AVX2__)
    return same_bits<WordVec>(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    using Bytes = int8_t __attribute__((vector_size(LANES * 2)));
    return __builtin_convertvector(load<Bytes>(from), WordVec);
#endif
}

// sum + a · b, the products of each two neighbours added up: lane i gets words 2i and 2i + 1.
inline IntVec add_products(IntVec sum, WordVec a, WordVec b) {
#if defined(HEADROOM_AVX512) && defined(__AVX512VNNI__)
    return same_bits<IntVec>(
        _mm512_dpwssd_epi32(same_bits<__m512i>(sum), same_bits<__m512i>(a), same_bits<__m512i>(b)));
#elif defined(HEADROOM_AVX512)
    return sum + same_bits<IntVec>(_mm512_madd_epi16(same_bits<__m512i>(a), same_bits<__m512i>(b)));
#elif defined(__AVX2__)
    return sum + same_bits<IntVec>(_mm256_madd_epi16(same_bits<__m256i>(a), same_bits<__m256i>(b)));
#elif defined(__SSE2__)
    return sum + same_bits<IntVec>(_mm_madd_epi16(same_bits<__m128i>(a), same_bits<__m128i>(b)));
#else
    const IntVec x = same_bits<IntVec>(a), y = same_bits<IntVec>(b);
    return sum + (x >> 16) * (y >> 16) + ((x << 16) >> 16) * ((y << 16) >> 16);
#endif
}

// Two neighbouring words in every pair of lanes.
inline WordVec splat_pair(const int16_t* from) {
    int32_t pair;
    std::memcpy(&pair, from, sizeof(pair));
    return same_bits<WordVec>(pair - IntVec{});
}

// Sums of products of unsigned bytes a and signed bytes b, each four neighbours in lane i. Without instructions that add
// four products, two are added in 16 bits, where MOST_BYTE_PRODUCTS of them fit as long as a ≤ 15.
constexpr int MOST_BYTE_PRODUCTS = 8;  // 8 · 2 · 15 · 127 < 2¹⁵
#if (defined(HEADROOM_AVX512) && defined(__AVX512VNNI__)) || (defined(__AVX2__) && defined(__AVXVNNI__))
#define HEADROOM_BYTE_PRODUCTS
using ByteSums = IntVec;
#else
using ByteSums = WordVec;
#endif
inline ByteSums add_byte_products(ByteSums sum, ByteVec a, ByteVec b) {
#if defined(HEADROOM_BYTE_PRODUCTS) && defined(HEADROOM_AVX512)
    return same_bits<IntVec>(
        _mm512_dpbusd_epi32(same_bits<__m512i>(sum), same_bits<__m512i>(a), same_bits<__m512i>(b)));
#elif defined(HEADROOM_BYTE_PRODUCTS)
    return same_bits<IntVec>(
        _mm256_dpbusd_avx_epi32(same_bits<__m256i>(sum), same_bits<__m256i>(a), same_bits<__m256i>(b)));
#elif defined(HEADROOM_AVX512)
    return sum + same_bits<WordVec>(_mm512_maddubs_epi16(same_bits<__m512i>(a), same_bits<__m512i>(b)));
#elif defined(__AVX2__)
    return sum + same_bits<WordVec>(_mm256_maddubs_epi16(same_bits<__m256i>(a), same_bits<__m256i>(b)));
#elif defined(__SSSE3__)
    return sum + same_bits<WordVec>(_mm_maddubs_epi16(same_bits<__m128i>(a), same_bits<__m128i>(b)));
#else
    const UnsignedWordVec unsigned_pairs = same_bits<UnsignedWordVec>(a);
    const WordVec signed_pairs = same_bits<WordVec>(b);
    return sum + same_bits<WordVec>(unsigned_pairs & 255) * ((signed_pairs << 8) >> 8) +
           same_bits<WordVec>(unsigned_pairs >> 8) * (signed_pairs >> 8);
#endif
}
inline IntVec whole(ByteSums sums) {
#if defined(HEADROOM_BYTE_PRODUCTS)
    return sums;
#else
    return add_products(IntVec{}, sums, WordVec{} + int16_t(1));
#endif
}

// Four neighbouring bytes in every lane.
inline ByteVec splat_quad(const int8_t* from) {
    int32_t quad;
    std::memcpy(&quad, from, sizeof(quad));
    return same_bits<ByteVec>(quad - IntVec{});
}

// LANES bfloat16 values as floats.
inline Vec load_widened(const uint16_t* from) {
#if defined(HEADROOM_AVX512)
    return same_bits<Vec>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(same_bits<__m256i>(load<ShortVec>(from))), 16));
#elif defined(__AVX2__)
    return same_bits<Vec>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(same_bits<__m128i>(load<ShortVec>(from))), 16));
#else
    return same_bits<Vec>(__builtin_convertvector(load<ShortVec>(from), IntVec) << 16);
#endif
}

inline Vec load_as_float(const float* from) { return load<Vec>(from); }
inline Vec load_as_float(const uint16_t* from) { return load_widened(from); }
inline void put(float* to, float value) { *to = value; }
inline void put(uint16_t* to, float value) { *to = narrow(value); }

struct Pair {
    Vec low, high;
};

inline Vec exp_vec(Vec x) {  // Cody-Waite reduction and a polynomial of degree 6; relative error below 2e-7
    x = x < splat(-87.0f) ? splat(-87.0f) : x > splat(88.0f) ? splat(88.0f) : x;  // or the exponent overflows
    IntVec n = __builtin_convertvector(x * 1.44269504f + (x < splat(0.0f) ? splat(-0.5f) : splat(0.5f)), IntVec);
    Vec steps = __builtin_convertvector(n, Vec);
    Vec r = x - steps * 0.693359375f + steps * 2.12194440e-4f;
    Vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * same_bits<Vec>((n + 127) << 23);
}
inline float sum_lanes(Vec v) {
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += v[i];
    return total;
}
// Lane i: the sum of the lanes of v[i].
inline Vec sum_each(const Vec* v) {
#if defined(__AVX2__) && !defined(HEADROOM_AVX512)
    const auto pairs = [](Vec a, Vec b) { return same_bits<Vec>(_mm256_hadd_ps(same_bits<__m256>(a), same_bits<__m256>(b))); };
    const __m256 low = same_bits<__m256>(pairs(pairs(v[0], v[1]), pairs(v[2], v[3])));
    const __m256 high = same_bits<__m256>(pairs(pairs(v[4], v[5]), pairs(v[6], v[7])));
    return same_bits<Vec>(_mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)));
#else
    Vec sums;
    for (int i = 0; i < LANES; ++i) sums[i] = sum_lanes(v[i]);
    return sums;
#endif
}

// Floats of a thread's own that only grow: pages are touched once, not in every call. One user at a time.
inline float* scratch(int64_t count) {
    static thread_local std::vector<float> storage;
    const size_t wanted = size_t(count) + 16;
    if (storage.size() < wanted) storage.resize(wanted);
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(storage.data()) + 63) & ~uintptr_t(63));
}

}  // namespace
