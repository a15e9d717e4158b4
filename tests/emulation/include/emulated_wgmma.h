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

// What the elements of a and b are, and the sums: how a word of them is taken apart, and where the columns of b go.
template <bool IsBF16>
struct HalfProduct {
  using Sum = float;
  using Row = emulation::Operands;
  static Row* columns(emulation::WarpExchange& exchange) { return exchange.columns; }
  static void set_word(Row& row, int i, uint32_t word) {
    for (int j = 0; j < 2; ++j) row.set(2 * i + j, emulation::operand(word >> (16 * j), IsBF16));
  }
};
struct Fp8Product {
  using Sum = float;
  using Row = emulation::Fp8Operands;
  static Row* columns(emulation::WarpExchange& exchange) { return exchange.fp8_columns; }
  static void set_word(Row& row, int i, uint32_t word) {
    for (int j = 0; j < 4; ++j) row.set(4 * i + j, emulation::fp8_operand(static_cast<uint8_t>(word >> (8 * j))));
  }
};
struct Int8Product {
  using Sum = int;
  using Row = emulation::Int8Operands;
  static Row* columns(emulation::WarpExchange& exchange) { return exchange.int8_columns; }
  static void set_word(Row& row, int i, uint32_t word) {
    for (int j = 0; j < 4; ++j) row.values[4 * i + j] = static_cast<int8_t>(word >> (8 * j));
  }
};

// Row n of the 32 bytes of k that a descriptor names: bits 0-13 are the start, 32-45 the distance of 8 rows, both in
// units of 16 bytes, 49-51 an offset of the pattern, 62-63 the swizzle, of which 1 is that of 128 bytes.
template <class P>
void operand_row(uint64_t descriptor, int n, typename P::Row& row) {
  const uint32_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) __builtin_trap();
  for (int i = 0; i < 8; ++i) {
    uint32_t word;
    const uint32_t offset = start + static_cast<uint32_t>(n / 8) * stride + static_cast<uint32_t>(n % 8 * 128 + 4 * i);
    memcpy(&word, emulation::dynamic_shared + swizzled(offset), 4);
    P::set_word(row, i, word);
  }
}

// Registers of a: word l % 4 of row l / 4, of row l / 4 + 8, and words 4 + l % 4 of both.
template <class P>
void multiply(const emulation::Wgmma& op) {
  auto& exchange = emulation::warp_exchange();
  auto* columns = P::columns(exchange);
  const int lane = emulation::current->lane();
  for (int n = lane; n < op.columns; n += 32) operand_row<P>(op.b, n, columns[n]);
  exchange.pointers[lane] = op.a;
  emulation::sync_warp();
  typename P::Row rows[2];  // lane / 4 and 8 more
  for (int i = 0; i < 8; ++i) {
    const auto* a = static_cast<const uint32_t*>(exchange.pointers[lane / 4 * 4 + i % 4]);
    for (int half = 0; half < 2; ++half) P::set_word(rows[half], i, a[i / 4 * 2 + half]);
  }
  auto* sums = static_cast<typename P::Sum*>(op.sums);
  for (int i = 0; i < op.columns / 2; ++i) {
    const auto& column = columns[i / 4 * 8 + lane % 4 * 2 + i % 2];
    sums[i] = emulation::fused_sum(op.adds ? sums[i] : typename P::Sum{}, rows[i / 2 % 2], column);
  }
  emulation::sync_warp();
}

template <class P, bool kAdd, int Sums>
void enqueue_wgmma(typename P::Sum (&c)[Sums], const uint32_t (&a)[4], uint64_t b) {
  static_assert(Sums % 4 == 0 && Sums <= 128);
  emulation::current->wgmmas.push_back({multiply<P>, c, 2 * Sums, a, b, kAdd});
}
template <bool kAdd, int Sums>
void wgmma_f16(float (&c)[Sums], const uint32_t (&a)[4], uint64_t b) {
  enqueue_wgmma<HalfProduct<false>, kAdd>(c, a, b);
}
template <bool kAdd, int Sums>
void wgmma_bf16(float (&c)[Sums], const uint32_t (&a)[4], uint64_t b) {
  enqueue_wgmma<HalfProduct<true>, kAdd>(c, a, b);
}
template <bool kAdd, int Sums>
void wgmma_e4m3(float (&c)[Sums], const uint32_t (&a)[4], uint64_t b) {
  enqueue_wgmma<Fp8Product, kAdd>(c, a, b);
}
template <bool kAdd, int Sums>
void wgmma_s8(int (&c)[Sums], const uint32_t (&a)[4], uint64_t b) {
  static_assert(Sums <= 16 || Sums % 8 == 0);  // of integers, fewer sizes
  enqueue_wgmma<Int8Product, kAdd>(c, a, b);
}

template <int kPending>
void wgmma_wait_but() {
  auto& thread = *emulation::current;
  auto& groups = thread.wgmma_groups;
  if (groups.size() <= kPending) return;
  const size_t done = groups[groups.size() - 1 - kPending];
  for (size_t i = 0; i < done; ++i) thread.wgmmas[i].multiply(thread.wgmmas[i]);
  thread.wgmmas.erase(thread.wgmmas.begin(), thread.wgmmas.begin() + static_cast<std::ptrdiff_t>(done));
  groups.erase(groups.begin(), groups.end() - kPending);
  for (size_t& end : groups) end -= done;
}
template <class Sum, int Sums>
void wgmma_wait(Sum (&)[Sums]) {
  wgmma_wait_but<0>();
}

}  // namespace jax_qgemm::ptx
