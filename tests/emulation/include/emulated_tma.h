// tile/tma.cuh on the CPU.
#pragma once

#include <cuda.h>

namespace jax_qgemm::ptx {

inline void prefetch_map(const CUtensorMap*) {}

// To block `rank` of the cluster. Until some thread there waits on the barrier there is garbage.
inline void load_box_to(int rank, SharedAddress to, const CUtensorMap* map, int column, int row, uint64_t* barrier) {
  const uint32_t first = shared_offset(to);
  if (first % 128 != 0 || reinterpret_cast<uintptr_t>(map) % 64 != 0) __builtin_trap();
  auto* shared = static_cast<unsigned char*>(emulation::shared_of(emulation::dynamic_shared, rank));
  barrier = static_cast<uint64_t*>(emulation::shared_of(barrier, rank));
  if (!reinterpret_cast<Barrier*>(barrier)->initialized()) __builtin_trap();
  const int size = map->element_bytes, row_bytes = map->box_columns * size, bytes = map->box_rows * row_bytes;
  if (first + static_cast<uint32_t>(bytes) > emulation::last_launch.shared_bytes) __builtin_trap();
  memset(shared + first, 0xff, static_cast<size_t>(bytes));
  emulation::enqueue(barrier, [=, map = *map] {
    for (int i = 0; i < bytes; i += size) {
      const int64_t from_row = row + i / row_bytes, from_column = column + i % row_bytes / size;
      const bool inside = from_row >= 0 && from_row < map.rows && from_column >= 0 && from_column < map.columns;
      uint64_t element = 0;
      if (inside) memcpy(&element, map.base + from_row * map.row_bytes + from_column * size, static_cast<size_t>(size));
      const uint32_t at = first + static_cast<uint32_t>(i);
      memcpy(shared + (map.swizzled ? swizzled(at) : at), &element, static_cast<size_t>(size));
    }
    auto* b = reinterpret_cast<Barrier*>(barrier);
    b->bytes -= bytes;
    b->update();
  });
}

inline void load_box(SharedAddress to, const CUtensorMap* map, int column, int row, uint64_t* barrier) {
  load_box_to(cluster_rank(), to, map, column, row, barrier);
}
inline void load_box(SharedAddress to, const CUtensorMap* map, int column, int row, SharedAddress barrier) {
  load_box(to, map, column, row, barrier_at(barrier));
}
inline void load_box_for_both(SharedAddress to, const CUtensorMap* map, int column, int row, uint64_t* barrier) {
  for (int rank = 0; rank < 2; ++rank) load_box_to(rank, to, map, column, row, barrier);
}

}  // namespace jax_qgemm::ptx
