// Kernels with one mistake each, for test_simt.py: the host must find them all, and find nothing in those without.
#define MLKERNELS_ISA host_simt
#include "simt/simt.h"

#include <cstdio>

using namespace mlkernels;

namespace {

float memory[1024];

template <class Kernel>
void run(const char* name, int blocks, int warps, int cluster, Kernel kernel) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    simt::Machine::get().seed = seed;
    std::string error = "none";
    try {
      simt::Machine::get().run(blocks, warps, cluster, 4096, [&] { kernel(Simt()); });
    } catch (const std::exception& found) {
      error = found.what();
    }
    std::printf("%s|%d|%s\n", name, int(seed), error.c_str());
  }
}

// Two barriers at 0, data from 64.
void fill(const Simt& s, int barrier, int to, int vectors) { s.copy_async(barrier, to, memory, vectors); }
void begin(const Simt& s) {
  if (s.lane() == 0 && s.warp() == 0) {
    s.barrier_init(0);
    s.barrier_init(8);
  }
  s.block_sync();
}

}  // namespace

int main() {
  for (int i = 0; i < 1024; ++i) memory[i] = float(i);

  const auto neighbours = [](bool barrier, bool again) {
    return [=](const Simt& s) {
      const int other = (s.thread() + 33) % s.threads();
      for (int round = 0; round < 3; ++round) {
        s.store(4 * s.thread(), float(s.thread() + round));
        if (barrier) s.block_sync();
        if (s.load<float>(4 * other) != float(other + round)) throw std::runtime_error("wrong value");
        if (again) s.block_sync();
      }
    };
  };
  run("right: block", 2, 2, 1, neighbours(true, true));
  run("a barrier before reading is missing", 1, 2, 1, neighbours(false, true));
  run("a barrier before writing is missing", 1, 2, 1, neighbours(true, false));
  run("a warp's barrier is missing", 1, 1, 1, [](const Simt& s) {
    s.store(4 * s.lane(), 1.0f);
    s.load<float>(4 * (s.lane() ^ 1));
  });
  run("right: warp", 1, 4, 1, [](const Simt& s) {
    s.store(4 * s.thread(), 1.0f);
    s.warp_sync();
    s.load<float>(4 * (s.thread() ^ 1));
  });
  run("a warp's barrier between warps", 1, 2, 1, [](const Simt& s) {
    s.store(4 * s.thread(), 1.0f);
    s.warp_sync();
    s.load<float>(4 * (s.thread() ^ 32));
  });
  run("an exchange is no barrier", 1, 1, 1, [](const Simt& s) {
    s.store(4 * s.lane(), 1.0f);
    s.exchange(1, 0);
    s.load<float>(4 * (s.lane() ^ 1));
  });
  run("nobody wrote", 1, 1, 1, [](const Simt& s) { s.load<float>(4 * s.lane()); });
  run("beyond the end", 1, 1, 1, [](const Simt& s) { s.store(4096 - 4 + 4 * s.lane(), 1.0f); });
  run("misaligned", 1, 1, 1, [](const Simt& s) { s.store(4 * s.lane(), Vec16()); });
  run("not all threads at a barrier", 1, 2, 1, [](const Simt& s) {
    if (s.thread() != 5) s.block_sync();
  });
  run("not all lanes at an exchange", 1, 1, 1, [](const Simt& s) {
    if (s.lane() < 31) s.butterfly(1, 1);
  });
  run("lanes at different collectives", 1, 1, 1, [](const Simt& s) {
    if (s.lane() < 16)
      s.butterfly(1, 1);
    else
      s.warp_sync();
  });

  const auto copies = [](bool waits, bool syncs, bool fences = true) {
    return [=](const Simt& s) {
      begin(s);
      for (int round = 0; round < 6; ++round) {
        const int slot = round % 2, at = 64 + 512 * slot;
        if (fences) s.before_copy();
        if (round >= 2 && syncs) s.warp_sync();
        fill(s, 8 * slot, at, 32);
        if (waits) s.copy_wait(8 * slot, round / 2 % 2);
        if (s.load<float>(at + 4 * s.lane() * 4) != float(4 * s.lane())) throw std::runtime_error("wrong value");
        s.load<float>(at + 4 * (31 - s.lane()));
      }
    };
  };
  run("right: copies", 1, 1, 1, copies(true, true));
  run("a copy is not waited for", 1, 1, 1, copies(false, true));
  run("a copy into what is being read", 1, 1, 1, copies(true, false));
  run("a copy without its fence", 1, 1, 1, copies(true, true, false));
  run("the wrong parity", 1, 1, 1, [](const Simt& s) {
    begin(s);
    fill(s, 0, 64, 8);
    s.copy_wait(0, 1);
    s.load<float>(64 + 4 * s.lane());
  });
  run("the wrong barrier", 1, 1, 1, [](const Simt& s) {
    begin(s);
    fill(s, 0, 64, 8);
    fill(s, 8, 1024, 8);
    s.copy_wait(8, 0);
    s.load<float>(64 + 4 * s.lane());
  });
  run("a barrier that is still busy", 1, 1, 1, [](const Simt& s) {
    begin(s);
    fill(s, 0, 64, 8);
    fill(s, 0, 1024, 8);
  });
  run("another warp's copy", 1, 2, 1, [](const Simt& s) {
    begin(s);
    if (s.warp() == 0) {
      fill(s, 0, 64, 8);
      s.copy_wait(0, 0);
    }
    s.warp_sync();
    s.load<float>(64 + 4 * s.lane());
  });

  const auto remote = [](bool first, bool between, bool last) {
    return [=](const Simt& s) {
      if (first) s.cluster_sync();
      if (s.lane() == 0) s.store_remote((s.rank() + 1) % s.ranks(), 8 * s.warp(), double(s.rank()));
      if (between) s.cluster_sync();
      if (s.load<double>(8 * s.warp()) != double((s.rank() + s.ranks() - 1) % s.ranks())) throw std::runtime_error("wrong value");
      if (last) s.cluster_sync();
    };
  };
  run("right: cluster", 8, 2, 4, remote(true, true, true));
  run("a cluster's first barrier is missing", 4, 1, 4, remote(false, true, true));
  run("a cluster's barrier before reading is missing", 4, 1, 4, remote(true, false, true));
  run("a block's barrier in place of a cluster's", 2, 1, 2, [](const Simt& s) {
    s.cluster_sync();
    if (s.lane() == 0) s.store_remote(1 - s.rank(), 0, 1.0);
    s.block_sync();
    s.load<double>(0);
  });
  const auto posted = [](bool waits, int places, int expected, bool syncs = true) {
    return [=](const Simt& s) {
      if (s.thread() == 0)
        for (int i = 0; i < 2; ++i) s.barrier_init(8 * i);
      s.cluster_sync();
      for (int round = 0; round < 9; ++round) {
        const int half = round % places, at = 64 + 256 * half;
        if (s.thread() == 0) s.expect(8 * half, expected);
        if (syncs) s.warp_sync();  // all of this warp have read what came before
        if (s.lane() < s.ranks()) s.store_async(s.lane(), at + 8 * (s.rank() * s.warps() + s.warp()), float(round), 8 * half);
        if (waits) s.copy_wait(8 * half, round / places % 2);
        for (int i = 0; i < s.ranks() * s.warps(); ++i)
          if (s.load<float>(at + 8 * i) != float(round)) throw std::runtime_error("wrong value");
      }
    };
  };
  run("right: posted", 8, 2, 4, posted(true, 2, 32));
  run("what is posted is not waited for", 4, 2, 4, posted(false, 2, 32));
  run("a number too few is expected", 4, 2, 4, posted(true, 2, 28));
  run("a number too many is expected", 4, 2, 4, posted(true, 2, 36));
  run("one place for all that is posted", 4, 2, 4, posted(true, 1, 32));
  run("a block that has ended", 2, 1, 2, [](const Simt& s) {
    s.cluster_sync();
    if (s.rank() == 1) return;
    for (int i = 0; i < 400; ++i) s.warp_sync();
    if (s.lane() == 0) s.store_remote(1, 0, 1.0);
  });
  return 0;
}
