// Many tensors copied by one launch, under a condition that only the device knows.
//
// Where the tensors lie is part of the launch itself, up to 32 kB of arguments: nothing is sent before it, nothing has
// to outlive it, and a CUDA graph keeps it. Blocks share the bytes out in pieces of one size whatever the tensors' sizes.
#pragma once

#include "visit.h"

namespace mlkernels {

struct TensorCopy {
  char* to;
  const char* from;
  int64_t bytes;
  int64_t end;  // the pieces of this tensor and of those before it
};

// Up to MOST tensors; a launch sends the whole table.
template <int MOST_>
struct CopyTableOf {
  static constexpr int MOST = MOST_;
  static constexpr int64_t PIECE = int64_t(1) << 15;  // bytes
  const bool* flag;                                   // or null: copy
  int64_t count, pieces;                              // of all tensors
  TensorCopy copies[MOST];
};
using CopyTable = CopyTableOf<1000>;
using SmallCopyTable = CopyTableOf<48>;
static_assert(sizeof(CopyTable) <= 32764, "the arguments of a launch");

namespace MLKERNELS_ISA {

struct CopyMany {
  static constexpr int THREADS = 256, BLOCKS = 2;

  template <class Simt, int MOST>
  static MLK_DEVICE void run(const Simt& simt, const CopyTableOf<MOST>& table) {
    if (table.flag && !*table.flag) return;
    for (int64_t piece = simt.block(); piece < table.pieces; piece += simt.blocks()) {
      int low = 0, high = int(table.count) - 1;  // the tensor of this piece
      while (low < high) {
        const int middle = (low + high) / 2;
        if (piece < table.copies[middle].end)
          high = middle;
        else
          low = middle + 1;
      }
      const TensorCopy& one = table.copies[low];
      const int64_t begin = (piece - (low > 0 ? table.copies[low - 1].end : 0)) * CopyTable::PIECE;
      const int64_t left = one.bytes - begin;
      copy(simt, one.to + begin, one.from + begin, left < CopyTable::PIECE ? left : CopyTable::PIECE);
    }
  }

  template <class Simt>
  static MLK_DEVICE void copy(const Simt& simt, char* to, const char* from, int64_t bytes) {
    const uintptr_t apart = reinterpret_cast<uintptr_t>(to) ^ reinterpret_cast<uintptr_t>(from);
    if (apart % 16 == 0)
      by<Vec16>(simt, to, from, bytes);
    else if (apart % 4 == 0)
      by<uint32_t>(simt, to, from, bytes);
    else
      by<unsigned char>(simt, to, from, bytes);
  }

  static MLK_DEVICE Vec16 read(const Vec16* from) { return load_vector(from); }
  static MLK_DEVICE void write(Vec16* to, const Vec16& value) { store_vector(to, value); }
  template <class W>
  static MLK_DEVICE W read(const W* from) {
    return *from;
  }
  template <class W>
  static MLK_DEVICE void write(W* to, const W& value) {
    *to = value;
  }

  // Both ends are equally far from a multiple of W's size.
  template <class W, class Simt>
  static MLK_DEVICE void by(const Simt& simt, char* to, const char* from, int64_t bytes) {
    constexpr int SIZE = int(sizeof(W));
    int64_t head = (SIZE - int(reinterpret_cast<uintptr_t>(to) % SIZE)) % SIZE;
    if (head > bytes) head = bytes;
    const int64_t words = (bytes - head) / SIZE, tail = head + words * SIZE;
    for (int64_t i = simt.thread(); i < head; i += simt.threads()) to[i] = from[i];
    W* const wide_to = reinterpret_cast<W*>(to + head);
    const W* const wide_from = reinterpret_cast<const W*>(from + head);
    // Several readings on their way at once; the compiler may not move one past a writing by itself.
    constexpr int AT_ONCE = 4;
    const int64_t step = simt.threads();
    int64_t at = simt.thread();
    for (; at + (AT_ONCE - 1) * step < words; at += AT_ONCE * step) {
      W words_read[AT_ONCE];
      MLK_UNROLL
      for (int k = 0; k < AT_ONCE; ++k) words_read[k] = read(wide_from + at + k * step);
      MLK_UNROLL
      for (int k = 0; k < AT_ONCE; ++k) write(wide_to + at + k * step, words_read[k]);
    }
    for (; at < words; at += step) write(wide_to + at, read(wide_from + at));
    for (int64_t i = tail + simt.thread(); i < bytes; i += simt.threads()) to[i] = from[i];
  }
};

}  // namespace MLKERNELS_ISA
}  // namespace mlkernels
