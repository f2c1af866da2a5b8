// What the compiled kernels execute, counted while they run on the simulator (count.py): instructions of a warp, the
// passes its accesses to shared memory take, the 32-byte sectors its accesses to global memory touch.
#pragma once

#include <array>
#include <map>
#include <set>

#include "cuda_sim.h"

namespace ptx {

// Of one access of one warp: the n-th time each lane came past it belongs together. Lanes that skipped one shift, so
// where lanes part ways this is an estimate.
struct Site {
  std::array<std::vector<uint64_t>, cuda_sim::kMaxThreads> addresses;
  int size = 0;
  bool shared = false;
};

struct Counts {
  std::map<int, std::array<uint32_t, cuda_sim::kMaxThreads>> entered;  // of a basic block, by thread
  std::map<int, Site> sites;
  std::map<int, int64_t> warp_entries;  // of a basic block: of a warp, the lane that came most often
  std::map<int, std::array<int64_t, 3>>
      transactions;  // of a site: requests of a warp, passes or sectors, the fewest possible
};

inline Counts& counts() {
  static Counts* instance = new Counts;
  return *instance;
}

inline void count_block(int block) {
  ++counts().entered[block][cuda_sim::machine().current];  // an array that is made here starts with zeros
}

template <typename Byte>
inline Byte* count_access(int site, Byte* at, int size, bool shared) {
  Site& s = counts().sites[site];
  s.size = size;
  s.shared = shared;
  const auto base = shared ? reinterpret_cast<uint64_t>(cuda_sim::machine().shared.get()) : 0;
  s.addresses[cuda_sim::machine().current].push_back(reinterpret_cast<uint64_t>(at) - base);
  return at;
}

// Passes through the 32 banks of four bytes: 8-byte accesses go by half warps, 16-byte ones by quarters; lanes that
// read the same word share it.
inline int passes(const std::vector<uint64_t>& addresses, int size) {
  std::array<std::set<uint64_t>, 32> words;
  for (uint64_t a : addresses)
    for (int b = 0; b < size; b += 4) words[(a + b) / 4 % 32].insert((a + b) / 4);
  size_t most = 0;
  for (const auto& bank : words) most = std::max(most, bank.size());
  return static_cast<int>(most);
}

// Adds up the launch that has just ended.
inline void fold_counts() {
  Counts& c = counts();
  for (const auto& [block, by_thread] : c.entered)
    for (int warp = 0; warp < cuda_sim::kMaxThreads; warp += 32)
      c.warp_entries[block] += *std::max_element(&by_thread[warp], &by_thread[warp] + 32);
  for (const auto& [number, site] : c.sites) {
    auto& total = c.transactions[number];
    for (int warp = 0; warp < cuda_sim::kMaxThreads; warp += 32) {
      size_t times = 0;
      for (int lane = 0; lane < 32; ++lane) times = std::max(times, site.addresses[warp + lane].size());
      const int group = site.shared ? (site.size <= 4 ? 32 : 128 / site.size) : 32;
      for (size_t n = 0; n < times; ++n) {
        ++total[0];
        for (int first = 0; first < 32; first += group) {
          std::vector<uint64_t> present;
          for (int lane = first; lane < first + group; ++lane)
            if (n < site.addresses[warp + lane].size()) present.push_back(site.addresses[warp + lane][n]);
          if (present.empty()) continue;
          if (site.shared) {
            total[1] += passes(present, site.size);
            total[2] += 1;
          } else {
            std::set<uint64_t> sectors, pieces;
            for (uint64_t a : present) sectors.insert(a / 32), pieces.insert(a / site.size);
            total[1] += static_cast<int64_t>(sectors.size());
            total[2] += (static_cast<int64_t>(pieces.size()) * site.size + 31) / 32;
          }
        }
      }
    }
  }
  c.entered.clear();
  c.sites.clear();
}

// Since the last call: how often warps entered each basic block, and of each instruction its requests, passes (or
// sectors) and the fewest possible.
inline void take_counts(int64_t* blocks, int64_t (*instructions)[3]) {
  for (const auto& [block, times] : counts().warp_entries) blocks[block] = times;
  for (const auto& [site, totals] : counts().transactions) std::copy(totals.begin(), totals.end(), instructions[site]);
  counts() = {};
}

}  // namespace ptx
