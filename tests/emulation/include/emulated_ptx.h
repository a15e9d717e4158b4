// tile/ptx.cuh on the CPU, from the fragment tables of the PTX ISA.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#define __cluster_dims__(...)

namespace jax_qgemm::ptx {

inline void* dynamic_shared() { return emulation::dynamic_shared; }

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selectors) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t selector = selectors >> (4 * i) & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (selector & 7)) & 255);
    if (selector & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << (8 * i);
  }
  return r;
}

template <uint32_t kMask>
uint32_t and_or(uint32_t value, uint32_t bits) {
  return (value & kMask) | bits;
}
template <uint32_t kMask>
uint32_t and_xor(uint32_t value, uint32_t bits) {
  return (value & kMask) ^ bits;
}

template <bool IsBF16>
uint32_t twice_saturated(float value) {
  const float largest = IsBF16 ? 0x1.fep127f : 65504.0f;
  if (!std::isnan(value)) value = std::min(std::max(value, -largest), largest);
  return (IsBF16 ? __float2bfloat16_rn(value).bits : __float2half_rn(value).bits) * 0x00010001u;
}

inline int uniform(int value) { return value; }
inline bool elect_one() { return emulation::current->lane() == 0; }

inline uint4 load_once(const uint4* p) { return __ldg(p); }

using SharedAddress = const char*;
inline SharedAddress shared_address(const void* p) { return static_cast<const char*>(p); }

inline SharedAddress toggle(SharedAddress address, int bits) {
  return reinterpret_cast<SharedAddress>(reinterpret_cast<uintptr_t>(address) ^ static_cast<uintptr_t>(bits));
}

inline uint32_t shared_offset(SharedAddress p) {
  return static_cast<uint32_t>(reinterpret_cast<const unsigned char*>(p) - emulation::dynamic_shared);
}

inline void sync_named(int barrier, int threads) { emulation::sync_named(barrier, threads); }
inline void arrive_named(int barrier, int threads) { emulation::arrive_named(barrier, threads); }

inline void pin(int&) {}
inline void pin(float&) {}
inline void pin(uint32_t (&)[4]) {}
inline int opaque(int value) { return value; }
inline SharedAddress opaque(SharedAddress address) { return address; }

template <int kWords>
void load_shared(uint32_t* out, SharedAddress from) {
  if (reinterpret_cast<uintptr_t>(from) % (4 * kWords) != 0) __builtin_trap();
  memcpy(out, from, 4 * kWords);
}
inline void store_shared(SharedAddress to, uint32_t value) { memcpy(const_cast<char*>(to), &value, 4); }
inline uint32_t load_shared_half(SharedAddress from) {
  uint16_t r;
  if (reinterpret_cast<uintptr_t>(from) % 2 != 0) __builtin_trap();
  memcpy(&r, from, 2);
  return r;
}

template <int kBytes>
void copy_async(SharedAddress to, const void* from, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if (reinterpret_cast<uintptr_t>(to) % kBytes != 0 || reinterpret_cast<uintptr_t>(from) % kBytes != 0) {
    __builtin_trap();
  }
  // Until the copy is done there is garbage.
  memset(const_cast<char*>(to), 0xff, kBytes);
  emulation::current->open.push_back({const_cast<char*>(to), valid ? from : nullptr, kBytes});
}
inline void copy_async_commit() {
  emulation::current->committed.push_back(std::move(emulation::current->open));
  emulation::current->open.clear();
}
template <int kPending>
void copy_async_wait() {
  auto& committed = emulation::current->committed;
  for (; committed.size() > kPending; committed.pop_front()) {
    for (const emulation::Copy& copy : committed.front()) {
      if (copy.from) {
        memcpy(copy.to, copy.from, copy.bytes);
      } else {
        memset(copy.to, 0, copy.bytes);
      }
    }
  }
}

inline int cluster_rank() { return emulation::current->rank; }
inline void cluster_arrive() { ++emulation::current->cluster_arrivals; }
inline void cluster_wait() { emulation::wait_for_cluster(); }
inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
inline void store_shared(float4* to, float4 v, int rank) { *static_cast<float4*>(emulation::shared_of(to, rank)) = v; }

// What a barrier's 64 bits hold here: the phase ends when as many have arrived as were set and no bytes are missing.
struct Barrier {
  int32_t bytes;
  uint8_t arrivals, pending;
  uint16_t phase;

  bool initialized() const { return arrivals != 0xff; }  // which memory is filled with
  void update() {
    if (bytes >= 1 << 20 || bytes <= -(1 << 20)) __builtin_trap();  // more than a barrier counts
    if (pending != 0 || bytes != 0) return;
    pending = arrivals;
    ++phase;
  }
};
static_assert(sizeof(Barrier) == 8);

inline void barrier_init(uint64_t* barrier, int arrivals) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0) __builtin_trap();
  const auto count = static_cast<uint8_t>(arrivals);
  *reinterpret_cast<Barrier*>(barrier) = {0, count, count, 0};
}
inline void barrier_init_fence() {}
inline void barrier_expect(uint64_t* barrier, int bytes) {
  auto* b = reinterpret_cast<Barrier*>(barrier);
  if (!b->initialized() || b->pending == 0) __builtin_trap();  // else more arrivals than the phase has
  b->bytes += bytes;
  --b->pending;
  b->update();
}
inline void barrier_arrive(uint64_t* barrier) { barrier_expect(barrier, 0); }
inline void barrier_arrive(uint64_t* barrier, int rank) {
  barrier_expect(static_cast<uint64_t*>(emulation::shared_of(barrier, rank)), 0);
}
struct ClusterAddress {
  void* own;
  int rank;
};
inline ClusterAddress cluster_address(void* p, int rank) { return {p, rank}; }
inline void barrier_arrive_if(bool on, ClusterAddress barriers, int index) {
  if (on) barrier_arrive(static_cast<uint64_t*>(barriers.own) + index, barriers.rank);
}
inline uint64_t* barrier_at(SharedAddress address) { return reinterpret_cast<uint64_t*>(const_cast<char*>(address)); }
inline void barrier_expect(SharedAddress barrier, int bytes) { barrier_expect(barrier_at(barrier), bytes); }
inline void barrier_arrive_if(bool on, SharedAddress barrier) {
  if (on) barrier_arrive(barrier_at(barrier));
}
inline void barrier_wait(uint64_t* barrier, int parity) {
  while (reinterpret_cast<Barrier*>(barrier)->phase % 2 == parity) {
    emulation::complete_copies(barrier);
    if (reinterpret_cast<Barrier*>(barrier)->phase % 2 == parity) emulation::poll();
  }
}
inline void barrier_wait(SharedAddress barrier, int parity) { barrier_wait(barrier_at(barrier), parity); }
inline void barrier_wait_cluster(uint64_t* barrier, int parity) { barrier_wait(barrier, parity); }
template <class V>
void store_async(V* to, V value, uint64_t* barrier, int rank) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(V) != 0) __builtin_trap();
  *static_cast<V*>(emulation::shared_of(to, rank)) = value;
  auto* b = static_cast<Barrier*>(emulation::shared_of(barrier, rank));
  b->bytes -= static_cast<int32_t>(sizeof(V));
  b->update();
}

// The 128-byte swizzle: bits 4 to 6 of an address in shared memory are changed by bits 7 to 9.
inline uint32_t swizzled(uint32_t offset) { return offset ^ (offset >> 3 & 0x70); }

// Register i of lane l is elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of matrix i.
inline void ldmatrix_x4(uint32_t (&r)[4], SharedAddress shared_row) {
  auto& exchange = emulation::warp_exchange();
  const int lane = emulation::current->lane();
  if (reinterpret_cast<uintptr_t>(shared_row) % 16 != 0) __builtin_trap();
  exchange.pointers[lane] = shared_row;
  emulation::sync_warp();
  for (int i = 0; i < 4; ++i) {
    memcpy(&r[i], static_cast<const char*>(exchange.pointers[8 * i + lane / 4]) + lane % 4 * 4, 4);
  }
  emulation::sync_warp();
}
// The address of the lane's element i of matrix j, transposed: element l / 4 of row 2 (l % 4) + i.
inline char* transposed_element(int j, int i) {
  const int lane = emulation::current->lane();
  const void* row = emulation::warp_exchange().pointers[8 * j + lane % 4 * 2 + i];
  return static_cast<char*>(const_cast<void*>(row)) + lane / 4 * 2;
}
inline void exchange_rows(SharedAddress shared_row) {
  if (reinterpret_cast<uintptr_t>(shared_row) % 16 != 0) __builtin_trap();
  emulation::warp_exchange().pointers[emulation::current->lane()] = shared_row;
  emulation::sync_warp();
}

inline void ldmatrix_x4_transposed(uint32_t (&r)[4], SharedAddress shared_row) {
  exchange_rows(shared_row);
  for (int j = 0; j < 4; ++j) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) memcpy(&pair[i], transposed_element(j, i), 2);
    memcpy(&r[j], pair, 4);
  }
  emulation::sync_warp();
}
inline void stmatrix_x4_transposed(SharedAddress shared_row, const uint32_t (&r)[4]) {
  exchange_rows(shared_row);
  for (int j = 0; j < 4; ++j) {
    for (int i = 0; i < 2; ++i) {
      const auto element = static_cast<uint16_t>(r[j] >> (16 * i));
      memcpy(transposed_element(j, i), &element, 2);
    }
  }
  emulation::sync_warp();
}

// a: registers 0..3 are (row l/4, k 2(l%4)), (row +8, same k), (row, k + 8), (row + 8, k + 8), two elements each;
// b: registers 0, 1 are (k 2(l%4), column l/4), (k + 8, same column); c: (row l/4, column 2(l%4)), (same row, column +
// 1), (row + 8, column), (row + 8, column + 1).
inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool is_bf16) {
  auto& exchange = emulation::warp_exchange();
  const int lane = emulation::current->lane();
  const uint32_t registers[6] = {a[0], a[1], a[2], a[3], b0, b1};
  for (int i = 0; i < 6; ++i) {
    for (int half = 0; half < 2; ++half) {
      exchange.values[lane][i][half] = emulation::operand(registers[i] >> (16 * half), is_bf16);
    }
  }
  emulation::sync_warp();
  emulation::Operands rows[2], columns[2];  // of the lane's results
  for (int i = 0; i < 2; ++i) {
    for (int k = 0; k < 16; ++k) {
      rows[i].set(k, exchange.values[lane / 4 * 4 + k % 8 / 2][i + k / 8 * 2][k % 2]);
      columns[i].set(k, exchange.values[(lane % 4 * 2 + i) * 4 + k % 8 / 2][4 + k / 8][k % 2]);
    }
  }
  for (int i = 0; i < 4; ++i) c[i] = emulation::fused_sum(c[i], rows[i / 2], columns[i % 2]);
  emulation::sync_warp();
}

inline void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_m16n8k16(c, a, b0, b1, false);
}

inline void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_m16n8k16(c, a, b0, b1, true);
}

}  // namespace jax_qgemm::ptx
