// Global and shared memory with their rules. Global memory is the process's, restricted to the given tensors.
#pragma once

#include <map>
#include <unordered_map>
#include <vector>

#include "values.h"

namespace ptx {

class Global {
  public:
    void allow(u64 start, u64 size, bool writable) { ranges_[start] = {start + size, writable}; }
    void* at(u64 address, u64 size, bool write) const {
        auto next = ranges_.upper_bound(address);
        if (next == ranges_.begin()) throw outside(address, size, write);
        const auto& [start, range] = *std::prev(next);
        if (address + size > range.end || (write && !range.writable)) throw outside(address, size, write);
        return reinterpret_cast<void*>(address);
    }

  private:
    struct Range {
        u64 end;
        bool writable;
    };
    std::map<u64, Range> ranges_;
    Fault outside(u64 address, u64 size, bool write) const {
        std::string text = std::string("global memory: expected a tensor that may be ") + (write ? "written" : "read") +
                           ", got " + std::to_string(size) + " bytes at " + std::to_string(address);
        for (const auto& [start, range] : ranges_) {
            const i64 behind = i64(address - range.end), before = i64(start - address);
            if (behind >= 0 && behind < 4096) text += ", " + std::to_string(behind) + " bytes behind a tensor's end";
            if (before > 0 && before < 4096) text += ", " + std::to_string(before) + " bytes before a tensor";
        }
        return Fault(text);
    }
};

constexpr u32 GRANULE = 16;  // bytes of one unit of state

// One program's shared memory. Three things are watched per granule: whether it has been written; the thread that wrote it through the
// generic proxy and has not executed fence.proxy.async since; and the number of pending asynchronous reads, during which a write is an
// error. TMA and wgmma may read a thread's write if a proxy fence lies on the causality path from it (PTX ISA, "Causality order"): the
// writer's own fence, or one by the reader's thread after a barrier of all threads that followed the write.
class Shared {
  public:
    Shared(u32 base, u32 size)
        : base_(base), bytes_(size, 0xFF), written_(size / GRANULE + 1), unfenced_(size / GRANULE + 1), readers_(size / GRANULE + 1),
          written_in_(size / GRANULE + 1) {}

    u64 epoch = 1;  // 1 + completed barriers of all threads

    u8* read(u32 address, u32 size) { return read_fenced(address, size, ~u64(0)); }
    // An asynchronous read. ``fenced``: the epoch of the last fence.proxy.async of the thread that issued it, 0 without one.
    u8* read_fenced(u32 address, u32 size, u64 fenced) {
        check(address, size, "read");
        for (u32 g = first(address); g <= last(address, size); ++g) {
            if (!written_[g]) throw Fault("shared memory: expected written bytes, got a read of unwritten ones at " + hex(address));
            if (unfenced_[g] && written_in_[g] >= fenced)
                throw Fault("shared memory: expected fence.proxy.async between a thread's store and an asynchronous read, got none at " +
                            hex(address) + ", written by thread " + std::to_string(unfenced_[g] - 1));
        }
        return &bytes_[address - base_];
    }
    // ``thread``: the writer, or -1 for an asynchronous write.
    u8* write(u32 address, u32 size, int thread) {
        check(address, size, "write");
        for (u32 g = first(address); g <= last(address, size); ++g) {
            if (readers_[g] > 0)
                throw Fault("shared memory: expected all asynchronous reads of " + hex(address) +
                            " to be finished before it is written again, got " + std::to_string(readers_[g]) + " to come");
            written_[g] = true;
            unfenced_[g] = u16(thread + 1);
            written_in_[g] = epoch;
            if (thread >= 0) by_thread_[thread].push_back(g);
        }
        return &bytes_[address - base_];
    }
    void reserve(u32 address, u32 size, int readers) {
        check(address, size, "read");
        for (u32 g = first(address); g <= last(address, size); ++g) readers_[g] = u16(readers_[g] + readers);
    }
    void fence(int thread) {
        auto found = by_thread_.find(thread);
        if (found == by_thread_.end()) return;
        for (u32 g : found->second)
            if (unfenced_[g] == thread + 1) unfenced_[g] = 0;
        by_thread_.erase(found);
    }

  private:
    u32 base_;
    std::vector<u8> bytes_;
    std::vector<u8> written_;
    std::vector<u16> unfenced_, readers_;
    std::vector<u64> written_in_;  // epoch
    std::unordered_map<int, std::vector<u32>> by_thread_;

    u32 first(u32 address) const { return (address - base_) / GRANULE; }
    u32 last(u32 address, u32 size) const { return (address - base_ + size - 1) / GRANULE; }
    static std::string hex(u32 address) {
        char text[16];
        std::snprintf(text, sizeof text, "0x%x", address);
        return text;
    }
    void check(u32 address, u32 size, const char* what) const {
        if (address < base_ || address + size > base_ + bytes_.size())
            throw Fault(std::string("shared memory: expected a ") + what + " within " + std::to_string(bytes_.size()) + " bytes, got " +
                        std::to_string(size) + " at " + std::to_string(i64(address) - base_));
    }
};

}  // namespace ptx
