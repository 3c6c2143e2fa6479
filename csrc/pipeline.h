// The barrier protocol: the loops of the producer and of the consumers over a ``Machine``. The kernels pass a machine that executes each
// step; the tests pass one that records it and search all interleavings (README.md).
#pragma once

#include "layout.h"

namespace eapo {

// The shape of a kernel: tiles of BLOCK_N rows (per CTA) and BLOCK_V columns, STAGES operand tiles in flight, CLUSTER CTAs (1 or 2) that
// share each weight tile. There are two consumer warp groups. PINGPONG: each group takes every other tile whole. Otherwise each group
// takes half of the rows of every tile; before its last STAGGER steps the second group waits until the first has finished the tile, so
// that the epilogue of one group overlaps the products of the other.
template <int BLOCK_N_, int BLOCK_V_, int STAGES_, int CLUSTER_, bool PINGPONG_, int STAGGER_>
struct Shape {
    static constexpr int BLOCK_N = BLOCK_N_, BLOCK_V = BLOCK_V_, STAGES = STAGES_, CLUSTER = CLUSTER_, STAGGER = STAGGER_;
    static constexpr bool PINGPONG = PINGPONG_;
    static constexpr int CONSUMERS = 2;
    static constexpr int THREADS = (1 + CONSUMERS) * WARP_GROUP;
    static constexpr int GROUP_ROWS = PINGPONG ? BLOCK_N : BLOCK_N / CONSUMERS;   // rows of a tile per group
    static constexpr int M_BLOCKS = GROUP_ROWS / MMA_ROWS;
    static constexpr int FRAGMENT = BLOCK_V / 2;                                  // accumulators of a thread per m64 block
    static constexpr int HIDDEN_BYTES = BLOCK_N * BLOCK_D * ITEM;
    static constexpr int WEIGHT_BYTES = BLOCK_V * BLOCK_D * ITEM;
    static constexpr int WEIGHT_PART = WEIGHT_BYTES / CLUSTER;                    // the part one CTA loads
    static constexpr int STAGE_BYTES = HIDDEN_BYTES + WEIGHT_BYTES;
    // Arrivals that free a stage: one per warp that read it, in every CTA of the cluster, because each CTA's weight part goes to all.
    static constexpr int EMPTY_ARRIVALS = (PINGPONG ? 1 : CONSUMERS) * (WARP_GROUP / WARP) * CLUSTER;

    static_assert(GROUP_ROWS % MMA_ROWS == 0 && M_BLOCKS >= 1, "a warp group multiplies 64 rows at a time");
    static_assert(BLOCK_V % 64 == 0 && BLOCK_V <= 256, "columns of one wgmma, in slices of 64");
    static_assert(CLUSTER == 1 || CLUSTER == 2, "a cluster is one or two CTAs");
    static_assert(STAGGER >= 0 && STAGGER < STAGES, "while it waits the second group holds an unreleased stage");
    static_assert(!PINGPONG || STAGGER == 0, "ping-pong takes turns by whole tiles");
    static_assert(M_BLOCKS * FRAGMENT <= 128, "accumulators beyond 128 leave too few registers for the epilogue");
};

// Step ``p`` of a CTA (counted over all tiles): its stage, and the parity of the phase in which it fills that stage.
template <class S>
EAPO_SHARED int stage_of(unsigned p) { return int(p % S::STAGES); }
template <class S>
EAPO_SHARED unsigned parity_of(unsigned p) { return p / S::STAGES & 1; }

// The producer of one CTA. ``steps``: per tile, D / BLOCK_D rounded up. ``cluster``: index of the cluster among ``clusters``.
template <class S, class Machine>
EAPO_SHARED void produce(Machine& m, const Walk& walk, int steps, int cluster, int clusters) {
    unsigned p = 0;
    const int units = walk.units();
    for (int index = cluster; index < units; index += clusters) {
        const Unit unit = walk.unit(index);
        for (int tile = unit.first; tile < unit.end; ++tile) {
            EAPO_ROLLED
            for (int step = 0; step < steps; ++step, ++p) {
                const int stage = stage_of<S>(p);
                m.wait_empty(stage, parity_of<S>(p) ^ 1);  // a new barrier counts as having completed the previous phase
                m.expect(stage);
                m.load(stage, unit.row_tile, tile, step);
            }
        }
    }
}

// A consumer warp group of one CTA, ``group`` 0 or 1. A stage is released one step late, because wgmma still reads it until then.
//
// Ping-pong: a group starts a tile after a turn from the other group, which has seen the whole previous tile arrive. Correctness needs
// this: a barrier distinguishes phases by parity only, so a group that skips a tile could take a wrong filling of a stage for its own.
// The turn before the last STAGGER steps is for speed: without it the second group is hardly a step behind (docs/log.md, 2026-11-21).
// Tiles of at most STAGES steps have no such turn: the first group could give a second turn before the second group takes the first.
template <class S, class Machine>
EAPO_SHARED void consume(Machine& m, const Walk& walk, int steps, int group, int cluster, int clusters) {
    unsigned p = 0;
    int number = 0;
    const bool staggered = S::STAGGER > 0 && steps > S::STAGES;
    const int units = walk.units();
    for (int index = cluster; index < units; index += clusters) {
        const Unit unit = walk.unit(index);
        m.begin(unit);
        for (int tile = unit.first; tile < unit.end; ++tile, ++number) {
            if (S::PINGPONG && number % 2 != group) {
                p += steps;
                continue;
            }
            if (S::PINGPONG && number > 0) m.await_turn();
            m.open(unit, tile);
            EAPO_ROLLED
            for (int step = 0; step < steps; ++step, ++p) {
                if (staggered && group == 1 && step == steps - S::STAGGER) m.await_turn();
                m.wait_full(stage_of<S>(p), parity_of<S>(p));
                m.multiply(stage_of<S>(p), step == 0);
                if (step > 0) {
                    m.template wait_products<1>();
                    m.release(stage_of<S>(p - 1));
                }
            }
            if (S::PINGPONG) m.give_turn();
            m.template wait_products<0>();
            m.release(stage_of<S>(p - 1));
            if (staggered && group == 0) m.give_turn();
            m.epilogue(unit, tile);
        }
        m.end(unit);
    }
    if (S::PINGPONG && number > 0 && (number - 1) % 2 != group) m.await_turn();  // take the last turn, so that none is pending at the end
}

}  // namespace eapo
