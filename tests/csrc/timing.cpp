// The kernels' loops (pipeline.h) against a clock: when one program finishes its tiles, on a machine of a few numbers.
//
// The producer and the consumer groups run the traces that the loops leave on a recording machine (explore.h), clock by clock.
// Shared are the tensor cores, one wgmma at a time, and the four sub-cores' slots, which two epilogues at once share. The programs
// of a cluster are alike, so one is modelled; what comes from the peer takes its time. Not in the model: the clock itself, power,
// HBM, conflicts in shared memory, other programs, starts and ends of units.
#include <algorithm>
#include <functional>
#include <memory>
#include <queue>
#include <random>

#include "explore.h"

namespace {

using namespace explore;

constexpr int COMPUTE = GIVE_TURN + 1, STORE = GIVE_TURN + 2;  // what an epilogue consists of

// In clocks, and bytes a clock. test_overlap.py has the same, with what is assumed.
struct Numbers {
    double latency, bandwidth, jitter;  // TMA: of a load, of a multiprocessor from L2; part of the latency that varies
    double barrier, remote;             // from an arrival to the waiter's next instruction; to one in the peer
    double start, drain;                // from a wgmma's issue to its first clock; from its last to the end of a wait for it
    double produce;                     // the producer's instructions a step
    double alone, together;             // the epilogue of a group and tile; those of both groups at once
    double store, read;                 // stmatrix and barriers of a pass; until TMA has read what it wrote
    double pause;                       // disturbance: group ``paused`` stops for so long in tile ``at``
    int passes;                         // in which the epilogue's result leaves, 128 columns each; 0: none does
    int arbiter;                        // tensor cores: 0 groups in turn, 1 in order of issue, 2 stay with a group while they can
    int paused, at;
};

struct Timed : Recorder {
    int passes = 0;
    void epilogue(const eapo::Unit&, int number) {
        for (int pass = 0; pass < std::max(passes, 1); ++pass) {
            trace.push_back({Kind(COMPUTE), pass, 0, number});
            if (passes > 0) trace.push_back({Kind(STORE)});
        }
    }
};

template <class S>
struct Program {
    static constexpr int STEP = eapo::BLOCK_D / eapo::MMA_DEPTH * S::M_BLOCKS;  // wgmma of a group and step
    static constexpr int RELEASES = S::PINGPONG ? 1 : 2;
    static constexpr double WGMMA = S::BLOCK_V / 2;
    enum { FULL = 0, EMPTY = 100, DONE = 200 };  // events: plus a stage or a group

    struct Barrier {
        int arrivals, pending, phase;
        void arrive() {
            if (--pending == 0) pending = arrivals, ++phase;
        }
        bool ready(int parity) const { return (phase & 1) != parity; }
    };
    struct Group {
        std::queue<double> issued;                // times of wgmma that have not begun
        std::vector<double> finish;               // of tiles
        double read = 0;                          // of the last pass, by TMA
        int committed = 0, done = 0, steps = 0;   // wgmma; steps that were released
        double work = 0;                          // clocks of the epilogue's part that are left; -1: it has ended
        bool turn = false;
    };

    const Numbers n;
    Trace traces[3];
    std::size_t pc[3] = {};
    double free[3] = {};
    Barrier full[S::STAGES], empty[S::STAGES];
    Group groups[2];
    std::vector<int> lag;  // steps by which group 1 is behind when group 0 begins an epilogue
    double now = 0, tensor = 0, from_l2 = 0, to_l2 = 0;
    int last = 1;
    std::priority_queue<std::pair<double, int>, std::vector<std::pair<double, int>>, std::greater<>> events;
    std::mt19937 random{1};

    Program(const Numbers& numbers, int tiles, int steps) : n(numbers) {
        for (int a = 0; a < 3; ++a) {
            Timed recorder;
            recorder.passes = n.passes;
            const eapo::Walk walk = {1, tiles, tiles, 1};
            if (a == 0) {
                eapo::produce<S>(recorder, walk, steps, 0, 1);
            } else {
                eapo::consume<S>(recorder, walk, steps, a - 1, 0, 1);
            }
            traces[a] = recorder.trace;
        }
        for (Barrier& b : full) b = {1, 1, 0};
        for (Barrier& b : empty) b = {RELEASES, RELEASES, 0};
    }

    void run(double limit) {
        for (; now < limit; ++now) {
            for (; !events.empty() && events.top().first <= now; events.pop()) {
                const int what = events.top().second;
                if (what >= DONE) {
                    ++groups[what - DONE].done;
                } else {
                    (what >= EMPTY ? empty[what - EMPTY] : full[what]).arrive();
                }
            }
            for (int a = 0; a < 3; ++a) {
                while (pc[a] < traces[a].size() && free[a] <= now && step(a, traces[a][pc[a]])) ++pc[a];
            }
            multiply();
            compute();
            if (pc[1] == traces[1].size() && pc[2] == traces[2].size()) return;
        }
    }

    // An actor's next operation; false: it has to wait.
    bool step(int a, const Op& op) {
        Group& g = groups[a == 2];
        switch (int(op.kind)) {
            case WAIT_EMPTY: return empty[op.stage].ready(op.parity);
            case WAIT_FULL: return full[op.stage].ready(op.parity);
            case LOAD: {
                const double late = std::uniform_real_distribution<double>(-n.jitter, n.jitter)(random);
                from_l2 = std::max(from_l2, now) + (S::HIDDEN_BYTES + S::WEIGHT_PART) / n.bandwidth;
                events.push({from_l2 + n.latency * (1 + late) + n.barrier, FULL + op.stage});
                free[a] = now + n.produce;
                return true;
            }
            case MULTIPLY:
                for (int i = 0; i < STEP; ++i, ++g.committed) g.issued.push(now + n.start);
                return true;
            case SETTLE: return g.done >= g.committed - op.tag * STEP;
            case RELEASE:
                ++g.steps;
                events.push({now + (S::CLUSTER > 1 ? n.remote : n.barrier), EMPTY + op.stage});
                return true;
            case AWAIT_TURN:
                if (!g.turn) return false;
                g.turn = false;
                free[a] = now + n.barrier;
                return true;
            case GIVE_TURN: return groups[a == 1].turn = true;
            case COMPUTE:
                if (g.work == 0) {
                    g.work = n.alone / std::max(n.passes, 1);
                    if (op.stage == 0 && a == 1) lag.push_back(groups[0].steps - groups[1].steps);
                    if (op.stage == 0 && op.tag == n.at && a == 1 + n.paused) free[a] = now + n.pause;
                    return false;
                }
                if (g.work > 0) return false;
                g.work = 0;
                if (op.stage == std::max(n.passes, 1) - 1) g.finish.push_back(now);
                return true;
            case STORE: {
                if (g.read > now) return false;
                free[a] = now + n.store;
                to_l2 = std::max(to_l2, free[a]) + eapo::MMA_ROWS * 128 * eapo::ITEM / n.bandwidth;
                g.read = to_l2 + n.read;
                return true;
            }
        }
        return true;
    }

    // The tensor cores take the next wgmma.
    void multiply() {
        if (now < tensor) return;
        int chosen = -1;
        for (int group : {n.arbiter == 0 ? 1 - last : last, n.arbiter == 0 ? last : 1 - last}) {
            const std::queue<double>& q = groups[group].issued;
            if (q.empty() || q.front() > now) continue;
            if (chosen < 0 || (n.arbiter == 1 && q.front() < groups[chosen].issued.front())) chosen = group;
        }
        if (chosen < 0) return;
        groups[last = chosen].issued.pop();
        tensor = now + WGMMA;
        events.push({tensor + n.drain, DONE + chosen});
    }

    // A clock of the epilogues.
    void compute() {
        const auto on = [&](int group) { return groups[group].work > 0 && free[1 + group] <= now; };
        const double rate = on(0) && on(1) ? n.alone / n.together : 1;
        for (int group : {0, 1}) {
            if (on(group) && (groups[group].work -= rate) <= 0) groups[group].work = -1;
        }
    }
};

// When each tile is finished, in order, and the lag. The number of tiles that were.
template <class S>
int measure(const Numbers& numbers, int tiles, int steps, double* finish, int* lag) {
    auto program = std::make_unique<Program<S>>(numbers, tiles, steps);
    program->run(100.0 * tiles * (steps + 8) * 1024);
    std::vector<double> all = program->groups[0].finish, &other = program->groups[1].finish;
    if (S::PINGPONG) all.insert(all.end(), other.begin(), other.end()), std::sort(all.begin(), all.end());
    for (std::size_t i = 0; !S::PINGPONG && i < std::min(all.size(), other.size()); ++i) all[i] = std::max(all[i], other[i]);
    std::copy(all.begin(), all.end(), finish);
    std::copy(program->lag.begin(), program->lag.end(), lag);
    return int(S::PINGPONG ? all.size() : std::min(all.size(), other.size()));
}

}  // namespace

extern "C" int time_tiles(int shape, const Numbers* n, int tiles, int steps, double* finish, int* lag) {
    switch (shape) {  // (block_n, block_v, stages, cluster, pingpong, stagger)
        case 0: return measure<eapo::Shape<128, 256, 4, 2, false, 0>>(*n, tiles, steps, finish, lag);
        case 1: return measure<eapo::Shape<128, 256, 4, 2, false, 1>>(*n, tiles, steps, finish, lag);
        case 2: return measure<eapo::Shape<128, 256, 4, 2, false, 2>>(*n, tiles, steps, finish, lag);
        case 3: return measure<eapo::Shape<128, 256, 4, 2, false, 3>>(*n, tiles, steps, finish, lag);
        case 4: return measure<eapo::Shape<128, 256, 3, 2, false, 2>>(*n, tiles, steps, finish, lag);
        case 5: return measure<eapo::Shape<128, 256, 5, 2, false, 3>>(*n, tiles, steps, finish, lag);
        case 6: return measure<eapo::Shape<128, 256, 4, 1, false, 2>>(*n, tiles, steps, finish, lag);
        case 7: return measure<eapo::Shape<128, 256, 4, 1, false, 3>>(*n, tiles, steps, finish, lag);
        case 8: return measure<eapo::Shape<128, 128, 6, 2, true, 0>>(*n, tiles, steps, finish, lag);
    }
    return -1;
}
