// wgmma on the CPU, from the descriptors and fragment tables of the PTX ISA. It happens at the wait, so operands that
// are overwritten and sums that are read before it show.
#pragma once

namespace jax_qgemm::ptx {

template <int Count>
void raise_registers() {
  static_assert(Count % 8 == 0 && Count >= 24 && Count <= 256);
}
template <int Count>
void lower_registers() {
  raise_registers<Count>();
}

inline void wgmma_fence() {}
inline void wgmma_commit() { emulation::current->wgmma_groups.push_back(emulation::current->wgmmas.size()); }

template <bool kAdd, int Sums>
void wgmma_f16(float (&c)[Sums], const uint32_t (&a)[4], uint64_t b) {
  emulation::current->wgmmas.push_back({c, 2 * Sums, a, b, false, kAdd});
}
template <bool kAdd, int Sums>
void wgmma_bf16(float (&c)[Sums], const uint32_t (&a)[4], uint64_t b) {
  emulation::current->wgmmas.push_back({c, 2 * Sums, a, b, true, kAdd});
}

// Row n of the 16 k that a descriptor names: bits 0-13 are the start, 32-45 the distance of 8 rows, both in units of 16
// bytes, 49-51 an offset of the pattern, 62-63 the swizzle, of which 1 is that of 128 bytes.
inline void operand_row(uint64_t descriptor, int n, bool is_bf16, emulation::Operands& row) {
  const uint32_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) __builtin_trap();
  for (uint32_t k = 0; k < 16; ++k) {
    uint16_t element;
    const uint32_t offset = start + static_cast<uint32_t>(n / 8) * stride + static_cast<uint32_t>(n % 8) * 128 + k * 2;
    memcpy(&element, emulation::dynamic_shared + swizzled(offset), 2);
    row.set(static_cast<int>(k), emulation::operand(element, is_bf16));
  }
}

inline void multiply(const emulation::Wgmma& op) {
  auto& exchange = emulation::warp_exchange();
  const int lane = emulation::current->lane();
  for (int n = lane; n < op.columns; n += 32) operand_row(op.b, n, op.is_bf16, exchange.columns[n]);
  exchange.pointers[lane] = op.a;
  emulation::sync_warp();
  emulation::Operands rows[2];  // lane / 4 and 8 more
  for (int i = 0; i < 32; ++i) {
    const int k = i % 16, half = i / 16;
    const auto* a = static_cast<const uint32_t*>(exchange.pointers[lane / 4 * 4 + k % 8 / 2]);
    rows[half].set(k, emulation::operand(a[k / 8 * 2 + half] >> (k % 2 * 16), op.is_bf16));
  }
  for (int i = 0; i < op.columns / 2; ++i) {
    const auto& column = exchange.columns[i / 4 * 8 + lane % 4 * 2 + i % 2];
    op.sums[i] = emulation::fused_sum(op.adds ? op.sums[i] : 0.0f, rows[i / 2 % 2], column);
  }
  emulation::sync_warp();
}

template <int kPending>
void wgmma_wait_but() {
  auto& thread = *emulation::current;
  auto& groups = thread.wgmma_groups;
  if (groups.size() <= kPending) return;
  const size_t done = groups[groups.size() - 1 - kPending];
  for (size_t i = 0; i < done; ++i) multiply(thread.wgmmas[i]);
  thread.wgmmas.erase(thread.wgmmas.begin(), thread.wgmmas.begin() + static_cast<std::ptrdiff_t>(done));
  groups.erase(groups.begin(), groups.end() - kPending);
  for (size_t& end : groups) end -= done;
}
template <int Sums>
void wgmma_wait(float (&)[Sums]) {
  wgmma_wait_but<0>();
}

}  // namespace jax_qgemm::ptx
