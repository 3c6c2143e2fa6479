// The barrier protocol, once for the kernels and once for the tests: both instantiate these loops, the kernels with a machine
// that executes each step and the tests with one that records it, to explore every interleaving (README.md).
#pragma once

#include "layout.h"

namespace eapo {

// The shape of a kernel. BLOCK_V columns a tile and BLOCK_N rows a CTA; STAGES tiles of operands in flight; CLUSTER CTAs (1 or 2)
// share each weight tile. Two consumer warp groups:
// PINGPONG: each takes every other tile whole. Otherwise each takes half of the rows of every tile, and the second stops before
// its last STAGGER steps until the first has finished the tile, so that one's epilogue falls into the other's products.
template <int BLOCK_N_, int BLOCK_V_, int STAGES_, int CLUSTER_, bool PINGPONG_, int STAGGER_>
struct Shape {
    static constexpr int BLOCK_N = BLOCK_N_, BLOCK_V = BLOCK_V_, STAGES = STAGES_, CLUSTER = CLUSTER_, STAGGER = STAGGER_;
    static constexpr bool PINGPONG = PINGPONG_;
    static constexpr int CONSUMERS = 2;
    static constexpr int THREADS = (1 + CONSUMERS) * WARP_GROUP;
    static constexpr int GROUP_ROWS = PINGPONG ? BLOCK_N : BLOCK_N / CONSUMERS;   // rows of a tile that one group multiplies
    static constexpr int M_BLOCKS = GROUP_ROWS / MMA_ROWS;
    static constexpr int FRAGMENT = BLOCK_V / 2;                                  // accumulators of a thread and an m64 block
    static constexpr int HIDDEN_BYTES = BLOCK_N * BLOCK_D * ITEM;
    static constexpr int WEIGHT_BYTES = BLOCK_V * BLOCK_D * ITEM;
    static constexpr int WEIGHT_PART = WEIGHT_BYTES / CLUSTER;                    // what one CTA loads, for all
    static constexpr int STAGE_BYTES = HIDDEN_BYTES + WEIGHT_BYTES;
    // Arrivals that free a stage: every warp that read it, in every CTA of the cluster, because a CTA's weight part goes to all.
    static constexpr int EMPTY_ARRIVALS = (PINGPONG ? 1 : CONSUMERS) * (WARP_GROUP / WARP) * CLUSTER;

    static_assert(GROUP_ROWS % MMA_ROWS == 0 && M_BLOCKS >= 1, "a warp group multiplies 64 rows at a time");
    static_assert(BLOCK_V % 64 == 0 && BLOCK_V <= 256, "columns of one wgmma, in slices of 64");
    static_assert(CLUSTER == 1 || CLUSTER == 2, "a cluster is one or two CTAs");
    static_assert(STAGGER >= 0 && STAGGER < STAGES, "the second group stops with a stage that it has not released yet");
    static_assert(!PINGPONG || STAGGER == 0, "in ping-pong the turns are those of whole tiles");
    static_assert(M_BLOCKS * FRAGMENT <= 128, "accumulators beyond 128 leave too few registers for the epilogue");
};

// Position ``p`` of the endless sequence of steps: its stage, and the parity of the stage's fillings.
template <class S>
EAPO_SHARED int stage_of(unsigned p) { return int(p % S::STAGES); }
template <class S>
EAPO_SHARED unsigned parity_of(unsigned p) { return p / S::STAGES & 1; }

// The producer of one CTA. ``steps``: of a tile, D / BLOCK_D rounded up. ``cluster`` of ``clusters`` walks the units.
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
                m.wait_empty(stage, parity_of<S>(p) ^ 1);  // a fresh barrier counts as having completed the phase before
                m.expect(stage);
                m.load(stage, unit.row_tile, tile, step);
            }
        }
    }
}

// A consumer warp group of one CTA, ``group`` 0 or 1. A stage is released one step late: until then wgmma still reads it.
//
// In ping-pong a tile starts with a turn from the group that has seen the whole tile before arrive. That is for correctness: a
// barrier tells phases apart by parity only, and a group that skips a tile would take a stage's filling for a later one.
// The turn before the last STAGGER steps is for speed: without it the ring lets the second group be hardly a step late (README).
// Tiles no longer than the ring have none: the first group could then give a second turn before the second has taken the first.
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
                    m.template settle<1>();
                    m.release(stage_of<S>(p - 1));
                }
            }
            if (S::PINGPONG) m.give_turn();
            m.template settle<0>();
            m.release(stage_of<S>(p - 1));
            if (staggered && group == 0) m.give_turn();
            m.epilogue(unit, tile);
        }
        m.end(unit);
    }
    if (S::PINGPONG && number > 0 && (number - 1) % 2 != group) m.await_turn();  // the last one given, so that none is left over
}

}  // namespace eapo
