// Depth-first search over all interleavings of a cluster's producers, consumers and copies in flight, on a model of mbarriers. The actors
// are the kernels' own loops (pipeline.h), run on a machine that records each step.
//
// The model: waits for the parity of a phase; a phase completes when all arrivals and bytes have come; copies and remote arrivals land at
// any time after their issue; a wgmma reads its stage from its issue to the wait that covers it. Errors: a copy into a stage that is being
// read or written, a product of a step other than the expected one, more arrivals than a barrier expects, deadlock, work left at the end.
// A step after a wait that no other actor can observe is taken together with the wait. A warp group is one actor, because its warps take
// the same steps in the same order.
#pragma once

#include <cstring>
#include <string>
#include <unordered_set>
#include <vector>

#include "pipeline.h"

namespace explore {

enum Kind { WAIT_EMPTY, EXPECT, LOAD, WAIT_FULL, MULTIPLY, WAIT_PRODUCTS, RELEASE, AWAIT_TURN, GIVE_TURN };

// Deliberate mistakes in the protocol, which the search must find.
enum Fault { NONE, NO_REMOTE_RELEASE, HALF_THE_ARRIVALS, EARLY_RELEASE, NO_TURNS };

struct Op {
    Kind kind;
    int stage = 0, parity = 0, tag = 0;  // tag: which step of which tile; WAIT_PRODUCTS: products left in flight
};

using Trace = std::vector<Op>;

inline int tag_of(int row_tile, int tile, int step) { return 1 + (row_tile * 64 + tile) * 64 + step; }

struct Recorder {
    Trace trace;
    Fault fault = NONE;
    int row_tile = 0, tile = 0, step = 0;

    void wait_empty(int stage, unsigned parity) { trace.push_back({WAIT_EMPTY, stage, int(parity)}); }
    void expect(int stage) { trace.push_back({EXPECT, stage}); }
    void load(int stage, int row, int column, int at) { trace.push_back({LOAD, stage, 0, tag_of(row, column, at)}); }
    void begin(const eapo::Unit& unit) { row_tile = unit.row_tile; }
    void open(const eapo::Unit&, int number) { tile = number, step = 0; }
    void wait_full(int stage, unsigned parity) { trace.push_back({WAIT_FULL, stage, int(parity)}); }
    void multiply(int stage, bool first) {
        if (first != (step == 0)) trace.push_back({MULTIPLY, stage, 0, -1});
        trace.push_back({MULTIPLY, stage, 0, tag_of(row_tile, tile, step++)});
        if (fault == EARLY_RELEASE) trace.push_back({RELEASE, stage});
    }
    template <int PENDING>
    void wait_products() { trace.push_back({WAIT_PRODUCTS, 0, 0, PENDING}); }
    void release(int stage) {
        if (fault != EARLY_RELEASE) trace.push_back({RELEASE, stage});
    }
    void await_turn() {
        if (fault != NO_TURNS) trace.push_back({AWAIT_TURN});
    }
    void give_turn() {
        if (fault != NO_TURNS) trace.push_back({GIVE_TURN});
    }
    void epilogue(const eapo::Unit&, int) {}
    void end(const eapo::Unit&) {}
};

template <class S>
struct Model {
    static constexpr int C = S::CLUSTER, GROUPS = 2, ACTORS = C * (1 + GROUPS), PARTS = 1 + C;
    static constexpr int WARPS = eapo::WARP_GROUP / eapo::WARP;

    // Plain bytes, so that a state is its own hash key.
    struct Barrier {
        signed char pending, parts, parity;  // parts: copies outstanding; negative before the announcement
    };
    struct State {
        unsigned char pc[ACTORS];
        Barrier full[C][S::STAGES], empty[C][S::STAGES];
        short slot[C][S::STAGES][PARTS];           // tag of the contents: hidden, weight part of each CTA
        unsigned char writing[C][S::STAGES];       // bits: parts being copied
        unsigned char reading[C][S::STAGES];       // bits: group whose wgmma reads it
        unsigned char arriving[C][S::STAGES];      // bits: groups whose remote arrival is in flight
        unsigned char turn[C][GROUPS];
        signed char last[C][GROUPS], before[C][GROUPS];  // stages of the two products in flight, or -1
    };

    Trace traces[ACTORS];
    Fault fault;
    int arrivals;
    std::string error;
    long long states = 0;

    static int actor(int cta, int role) { return cta * (1 + GROUPS) + role; }

    bool fail(const char* what) {
        if (error.empty()) error = what;
        return false;
    }

    static void check_phase(Barrier& b, int arrivals) {
        if (b.pending == 0 && b.parts == 0) b.pending = char(arrivals), b.parity ^= 1;
    }
    bool arrive(Barrier& b, int count, int arrivals) {
        if (b.pending < count) return fail("more arrivals than a barrier expects");
        b.pending = char(b.pending - count);
        check_phase(b, arrivals);
        return true;
    }
    static bool ready(const Barrier& b, int parity) { return b.parity != parity; }

    // Run actor ``a`` up to and including its next step that others can observe. Returns false on an error.
    bool step(State& s, int a, bool& moved) {
        const int cta = a / (1 + GROUPS), role = a % (1 + GROUPS), group = role - 1;
        moved = false;
        while (s.pc[a] < traces[a].size()) {
            const Op& op = traces[a][s.pc[a]];
            switch (op.kind) {
                case WAIT_EMPTY:
                    if (moved || !ready(s.empty[cta][op.stage], op.parity)) return true;
                    break;
                case WAIT_FULL:
                    if (moved || !ready(s.full[cta][op.stage], op.parity)) return true;
                    break;
                case AWAIT_TURN:
                    if (moved || !s.turn[cta][group]) return true;
                    s.turn[cta][group] = 0;
                    break;
                case GIVE_TURN:
                    if (s.turn[cta][1 - group]) return fail("a turn is given twice");
                    s.turn[cta][1 - group] = 1;
                    break;
                case EXPECT:
                    s.full[cta][op.stage].parts = char(s.full[cta][op.stage].parts + PARTS);
                    if (!arrive(s.full[cta][op.stage], 1, 1)) return false;
                    break;
                case LOAD:
                    for (int to = 0; to < C; ++to) {
                        for (int part = 0; part < PARTS; ++part) {
                            if (part == 0 ? to != cta : part - 1 != cta) continue;
                            if (s.reading[to][op.stage]) return fail("a copy into a stage that is being read");
                            if (s.writing[to][op.stage] >> part & 1) return fail("a copy into a stage that is being written");
                            s.writing[to][op.stage] |= 1 << part;
                            s.slot[to][op.stage][part] = short(op.tag);
                        }
                    }
                    break;
                case MULTIPLY:
                    for (int part = 0; part < PARTS; ++part) {
                        if (s.slot[cta][op.stage][part] != op.tag) return fail("a product of the wrong step");
                    }
                    if (s.writing[cta][op.stage]) return fail("a product of a stage that is being written");
                    s.reading[cta][op.stage] |= 1 << group;
                    s.before[cta][group] = s.last[cta][group];
                    s.last[cta][group] = char(op.stage);
                    break;
                case WAIT_PRODUCTS: {
                    signed char *older = &s.before[cta][group], *newer = &s.last[cta][group];
                    if (*older >= 0 && *older != *newer) s.reading[cta][*older] &= ~(1 << group);
                    *older = -1;
                    if (op.tag == 0) s.reading[cta][*newer] &= ~(1 << group), *newer = -1;
                    break;
                }
                case RELEASE:
                    if (!arrive(s.empty[cta][op.stage], WARPS, arrivals)) return false;
                    for (int to = 0; to < C; ++to) {
                        if (to == cta || fault == NO_REMOTE_RELEASE) continue;
                        if (s.arriving[to][op.stage] >> group & 1) return fail("a second release before the first has arrived");
                        s.arriving[to][op.stage] |= 1 << group;
                    }
                    break;
            }
            ++s.pc[a];
            moved = true;
            if (op.kind == LOAD || op.kind == MULTIPLY || op.kind == RELEASE) return true;
        }
        return true;
    }

    bool land(State& s, int cta, int stage, int part) {
        s.writing[cta][stage] &= ~(1 << part);
        Barrier& b = s.full[cta][stage];
        b.parts = char(b.parts - 1);
        check_phase(b, 1);
        return true;
    }

    void run(const eapo::Walk& walk, int steps, Fault broken, int limit) {
        fault = broken;
        arrivals = S::EMPTY_ARRIVALS / (broken == HALF_THE_ARRIVALS ? 2 : 1);
        std::vector<int> done;
        for (int cta = 0; cta < C; ++cta) {
            for (int role = 0; role <= GROUPS; ++role) {
                Recorder recorder;
                recorder.fault = broken;
                if (role == 0) {
                    eapo::produce<S>(recorder, walk, steps, 0, 1);
                } else {
                    eapo::consume<S>(recorder, walk, steps, role - 1, 0, 1);
                }
                traces[actor(cta, role)] = recorder.trace;
                if (recorder.trace.size() > 255) error = "the model counts to 255";
            }
        }
        State start;
        std::memset(&start, 0, sizeof start);
        std::memset(start.last, -1, sizeof start.last);
        std::memset(start.before, -1, sizeof start.before);
        for (int cta = 0; cta < C; ++cta) {
            for (int stage = 0; stage < S::STAGES; ++stage) {
                start.full[cta][stage].pending = 1;
                start.empty[cta][stage].pending = char(arrivals);
            }
        }
        std::unordered_set<std::string> seen;
        std::vector<State> stack = {start};
        const auto visit = [&](const State& s) {
            if (seen.emplace(reinterpret_cast<const char*>(&s), sizeof s).second) stack.push_back(s);
        };
        while (!stack.empty() && error.empty()) {
            const State s = stack.back();
            stack.pop_back();
            if (++states > limit) error = "more states than the limit";
            bool any = false, finished = true;
            for (int a = 0; a < ACTORS; ++a) {
                if (s.pc[a] == traces[a].size()) continue;
                finished = false;
                State next = s;
                bool moved;
                if (!step(next, a, moved)) return;
                if (moved) any = true, visit(next);
            }
            for (int cta = 0; cta < C; ++cta) {
                for (int stage = 0; stage < S::STAGES; ++stage) {
                    for (int part = 0; part < PARTS; ++part) {
                        if (!(s.writing[cta][stage] >> part & 1)) continue;
                        State next = s;
                        land(next, cta, stage, part);
                        any = true, visit(next);
                    }
                    for (int group = 0; group < GROUPS; ++group) {
                        if (!(s.arriving[cta][stage] >> group & 1)) continue;
                        State next = s;
                        next.arriving[cta][stage] &= ~(1 << group);
                        if (!arrive(next.empty[cta][stage], WARPS, arrivals)) return;
                        any = true, visit(next);
                    }
                }
            }
            if (!any && !finished) error = "deadlock";
            if (!any && finished) {
                for (int cta = 0; cta < C; ++cta) {
                    bool left = s.turn[cta][0] || s.turn[cta][1];
                    for (int stage = 0; stage < S::STAGES; ++stage) left |= s.reading[cta][stage] || s.full[cta][stage].parts;
                    if (left) error = "work is left at the end";
                }
            }
        }
    }
};

}  // namespace explore
