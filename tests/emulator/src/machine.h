// Warps, programs and clusters, and asynchronous work: copies, tensor-core products, barriers.
//
// One cluster runs at a time. From a seed a scheduler picks either a warp that can run, for a few instructions, or a pending asynchronous
// operation. A kernel that relies on an order that is not guaranteed fails for some seed.
#pragma once

#include <array>
#include <deque>
#include <functional>
#include <memory>
#include <random>

#include "memory.h"
#include "program.h"
#include "tensor.h"

namespace ptx {

struct Launch {
    const Program* program;
    std::vector<u8> parameters;
    std::array<int, 3> grid, block;
    int cluster = 1;
    u32 shared_base = 1024, shared_bytes = 0;
    u64 seed = 0;
    double lateness = 0.5;  // 0: asynchronous operations finish at once; near 1: as late as allowed
};

struct Product {
    const Instruction* instruction;
    u64 a, b;
    bool accumulate;
    int group;   // number of the committed group it belongs to
    u64 fenced;  // see Shared::read_fenced
};

struct Copy {  // cp.async of a thread
    u32 to;
    u64 from;
    u32 bytes, valid;
    int thread, group;
};

struct Cta;

struct Warp {
    Cta* cta;
    int index;
    u32 live = 0;  // lanes that have not returned
    std::array<i32, LANES> pc{};
    std::vector<std::array<u64, LANES>> registers;
    std::vector<u32> predicates;
    u64 blocked_since = 0;  // event count of the machine when all lanes were blocked
    bool blocked = false;

    // Barriers this warp is waiting at, by their generation when it arrived.
    int named = -1;
    u64 named_generation = 0;
    std::array<u64, LANES> cluster_generation{};

    // Tensor cores.
    std::deque<Product> products;
    int product_group = 0, finished_groups = 0;
    u64 product_number = 0;  // of products issued
    std::vector<u8> in_flight;        // by register
    std::vector<u64> written;         // by register: the warp's clock at its last write
    u64 clock = 0, product_fence = 0;

    std::vector<std::deque<Copy>> copies;  // by lane
    std::array<int, LANES> copy_group{};
    std::array<int, LANES> store_group{};  // TMA stores: the open group
    std::array<u64, LANES> proxy_fence{};  // epoch of shared memory at the last fence.proxy.async
    int registers_held = 0;  // of a thread: setmaxnreg
    int thread(int lane) const { return index * LANES + lane; }
};

struct Barrier {  // mbarrier
    i64 expected = 0, pending = 0, bytes = 0;
    u64 phase = 0;
    u64 made_in = 0;       // the cluster barrier's generation
    int unfenced_by = -1;  // the thread that initialised it, until it executes fence.mbarrier_init; -1: none
};

// A product that all four warps of a warp group must issue.
struct Issued {
    const Instruction* instruction;
    u64 a, b;
    bool accumulate;
    u32 warps;  // of the four, bits
};

// A product into tensor memory, or in the same queue the arrival that follows all products before it.
struct TensorProduct {
    bool commits, accumulate;
    u32 to, shape, barrier;
    u64 a, b;
    u64 fenced;  // see Shared::read_fenced
};

struct NamedBarrier {
    int arrived = 0, expected = 0;
    bool synchronizes = true;  // all threads so far wait (bar.sync)
    u64 generation = 0;
};

struct Cta {
    int rank;
    std::array<int, 3> position;
    Shared shared;
    std::vector<std::unique_ptr<Warp>> warps;
    std::map<u32, Barrier> barriers;
    std::array<NamedBarrier, 16> named;
    std::vector<u32> tensor_memory;  // [128, 512]
    std::deque<TensorProduct> tensor_products;
    int tensor_columns = 0;  // allotted
    std::map<std::pair<int, u64>, Issued> issued;  // by warp group and number: products that not all four warps have issued yet
    int free_registers = 0;                        // given up by setmaxnreg
    bool exited() const {
        for (const auto& warp : warps)
            if (warp->live) return false;
        return true;
    }
};

// An asynchronous operation.
struct Asynchronous {
    std::function<void()> run;
    Warp* warp = nullptr;  // of a TMA store: the warp, lane and group that wait for it
    int lane = 0, group = 0;
};

enum class Step { NEXT, STAY, JUMPED };

class Machine {
  public:
    Machine(const Launch& launch, const Global& global) : launch_(launch), global_(global), random_(launch.seed) {}
    void run();
    std::string where;  // the last instruction, for messages

    using Handler = Step (Machine::*)(Warp&, const Instruction&, u32);
    static int handler_of(const std::string& name);  // -1: not emulated

  private:
    const Launch& launch_;
    const Global& global_;
    std::mt19937_64 random_;
    std::vector<std::unique_ptr<Cta>> ctas_;
    std::vector<Asynchronous> pending_;
    u64 events_ = 1, instructions_ = 0;
    struct {
        int arrived = 0;
        u64 generation = 1;
    } cluster_barrier_;

    static const std::vector<std::pair<const char*, Handler>>& handlers();

    void run_cluster(int first);
    bool finish_one_asynchronous();
    Step execute(Warp& warp, const Instruction& in, u32 lanes);
    bool advance(Warp& warp);
    bool step_group(Warp& warp, i32 pc);
    [[noreturn]] void deadlock();
    void check_the_end();
    int threads() const { return launch_.block[0] * launch_.block[1] * launch_.block[2]; }

    // Registers.
    const u64* read(Warp& warp, const Operand& operand, u64* scratch);
    u64 read_one(Warp& warp, const Operand& operand, int lane);
    u64* write(Warp& warp, const Operand& operand);
    u64 special(const Warp& warp, Special which, int lane) const;
    u32 predicate(const Warp& warp, const Operand& operand) const;
    void set_predicate(Warp& warp, const Operand& operand, u32 bits, u32 lanes);
    void touch(Warp& warp, int index) const;

    // Shared memory by the addresses of the shared::cluster window.
    std::pair<Cta*, u32> locate(Warp& warp, u32 address);
    u32 own(Warp& warp, const Instruction& in, u32 address);
    Barrier& known_to_others(Barrier& barrier) const;
    u8* generic(Warp& warp, const Instruction& in, u64 address, u32 size, bool write, int lane);
    Barrier& barrier(Cta& cta, u32 address);
    void arrive(Cta& cta, u32 address, i64 arrivals, i64 bytes);
    void complete(Cta& cta, u32 address, i64 bytes);
    void update_phase(Barrier& barrier);

    void multiply(Warp& warp, const Product& product);
    void issue_together(Warp& warp, const Product& product);
    void finish_product(Warp& warp);
    void finish_copy(Warp& warp, int lane);
    void finish_tensor_product(Cta& cta);
    void later(Asynchronous operation);
    const TensorMap& descriptor(u64 address) const;
    void load_box(Cta* cta, u32 to, const TensorMap& map, std::array<i64, 5> origin, u32 barrier);

    template <class T, class F>
    Step unary(Warp&, const Instruction&, u32, F);
    template <class T, class F>
    Step binary(Warp&, const Instruction&, u32, F);
    template <class T, class F>
    Step ternary(Warp&, const Instruction&, u32, F);
    template <class T>
    Step compare(Warp&, const Instruction&, u32);
    template <class F>
    Step by_type(const Instruction&, F);
    template <class F>
    Step by_integer(const Instruction&, F);

    Step do_add(Warp&, const Instruction&, u32);
    Step do_sub(Warp&, const Instruction&, u32);
    Step do_mul(Warp&, const Instruction&, u32);
    Step do_mad(Warp&, const Instruction&, u32);
    Step do_fma(Warp&, const Instruction&, u32);
    Step do_div(Warp&, const Instruction&, u32);
    Step do_rem(Warp&, const Instruction&, u32);
    Step do_neg(Warp&, const Instruction&, u32);
    Step do_abs(Warp&, const Instruction&, u32);
    Step do_min_max(Warp&, const Instruction&, u32);
    Step do_and(Warp&, const Instruction&, u32);
    Step do_or(Warp&, const Instruction&, u32);
    Step do_xor(Warp&, const Instruction&, u32);
    Step do_not(Warp&, const Instruction&, u32);
    Step do_lop3(Warp&, const Instruction&, u32);
    Step do_shl(Warp&, const Instruction&, u32);
    Step do_shr(Warp&, const Instruction&, u32);
    Step do_shf(Warp&, const Instruction&, u32);
    Step do_bfe(Warp&, const Instruction&, u32);
    Step do_bfi(Warp&, const Instruction&, u32);
    Step do_prmt(Warp&, const Instruction&, u32);
    Step do_popc(Warp&, const Instruction&, u32);
    Step do_clz(Warp&, const Instruction&, u32);
    Step do_ex2(Warp&, const Instruction&, u32);
    Step do_lg2(Warp&, const Instruction&, u32);
    Step do_rcp(Warp&, const Instruction&, u32);
    Step do_sqrt(Warp&, const Instruction&, u32);
    Step do_copysign(Warp&, const Instruction&, u32);
    Step do_selp(Warp&, const Instruction&, u32);
    Step do_setp(Warp&, const Instruction&, u32);
    Step do_mov(Warp&, const Instruction&, u32);
    Step do_cvt(Warp&, const Instruction&, u32);
    Step do_cvta(Warp&, const Instruction&, u32);
    Step do_ld(Warp&, const Instruction&, u32);
    Step do_st(Warp&, const Instruction&, u32);
    Step do_atom(Warp&, const Instruction&, u32);
    Step do_red(Warp&, const Instruction&, u32);
    Step do_bra(Warp&, const Instruction&, u32);
    Step do_ret(Warp&, const Instruction&, u32);
    Step do_trap(Warp&, const Instruction&, u32);
    Step do_nothing(Warp&, const Instruction&, u32);
    Step do_shfl(Warp&, const Instruction&, u32);
    Step do_vote(Warp&, const Instruction&, u32);
    Step do_elect(Warp&, const Instruction&, u32);
    Step do_redux(Warp&, const Instruction&, u32);
    Step do_bar(Warp&, const Instruction&, u32);
    Step do_barrier(Warp&, const Instruction&, u32);
    Step do_mbarrier(Warp&, const Instruction&, u32);
    Step do_mapa(Warp&, const Instruction&, u32);
    Step do_fence(Warp&, const Instruction&, u32);
    Step do_cp(Warp&, const Instruction&, u32);
    Step do_wgmma(Warp&, const Instruction&, u32);
    Step do_mma(Warp&, const Instruction&, u32);
    Step do_tcgen05(Warp&, const Instruction&, u32);
    Step do_stmatrix(Warp&, const Instruction&, u32);
    Step do_ldmatrix(Warp&, const Instruction&, u32);
    Step do_setmaxnreg(Warp&, const Instruction&, u32);
};

}  // namespace ptx
