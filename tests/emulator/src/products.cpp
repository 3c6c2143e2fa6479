// Tensor cores up to Hopper; ldmatrix and stmatrix.
#include "lanes.h"

namespace ptx {

namespace {

int columns_of(const Instruction& in) {
    for (const auto& word : in.order)
        if (word.rfind("m64n", 0) == 0) {
            if (word.substr(word.find('k')) != "k16") throw Fault("not emulated: " + in.mnemonic());
            return std::stoi(word.substr(4));
        }
    throw Fault("expected a shape in " + in.mnemonic());
}

float operand_number(const Type& type, u16 bits) { return type.letter == 'h' ? from_fp16(bits) : from_bf16(bits); }

// c + a . b over 16 numbers, as published tests describe Hopper's tensor cores (Khattak and Mikaitis, arXiv 2512.07004): all terms are
// aligned to the largest, truncated two bits below its last place, summed exactly, and truncated to fp32. Sums of one sign come out too
// small: a logit of 40 by about 2e-4 over 4096 numbers.
float accumulated(float c, const float* a, const float* b) {
    constexpr int EXTRA = 2, PLACES = 23;
    double products[17], top = std::fabs(c);
    for (int k = 0; k < 16; ++k) {
        products[k] = double(a[k]) * b[k];
        top = std::max(top, std::fabs(products[k]));
    }
    products[16] = c;
    double plain = c;
    for (int k = 0; k < 16; ++k) plain += products[k];
    // Zeros, values near the ends of the range, infinity and NaN.
    if (!(top > 1e-30 && top < 1e37) || !(std::fabs(plain) < 1e38)) return float(plain);
    const double unit = as<double>((bits_of(top) & 0x7FF0000000000000ull) - (u64(PLACES + EXTRA) << 52)), inverse = 1.0 / unit;
    i32 sum = 0;
    for (int k = 0; k < 17; ++k) sum += i32(products[k] * inverse);  // 17 numbers below 2^26
    const int digits = sum ? 32 - __builtin_clz(u32(std::abs(sum))) : 0, behind = std::max(0, digits - (PLACES + 1));
    const i32 kept = std::abs(sum) >> behind << behind;
    return float((sum < 0 ? -kept : kept) * unit);
}

template <class Visit>
void operand_pieces(const SharedOperand& operand, int first_row, int rows, Visit visit) {
    for (int row = 0; row < rows; ++row)
        for (int half = 0; half < 2; ++half) visit(row, half, operand.address(first_row + row, 16 * half));
}

}  // namespace

// The four warps of a warp group must issue the same products in the same order, at any time.
void Machine::issue_together(Warp& warp, const Product& product) {
    const std::pair<int, u64> key{warp.index / 4, warp.product_number++};
    const u32 all = 15, self = 1u << warp.index % 4;
    auto [found, first] = warp.cta->issued.try_emplace(key, Issued{product.instruction, product.a, product.b, product.accumulate, 0});
    Issued& one = found->second;
    if (one.instruction != product.instruction || one.a != product.a || one.b != product.b || one.accumulate != product.accumulate)
        throw Fault("wgmma: expected the same product in all four warps of the warp group");
    one.warps |= self;
    if (one.warps == all) warp.cta->issued.erase(found);
}

Step Machine::do_wgmma(Warp& warp, const Instruction& in, u32 lanes) {
    if (lanes != ALL) throw Fault("wgmma: expected whole warps");
    if (in.has("fence")) {
        warp.product_fence = warp.clock;
        return Step::NEXT;
    }
    if (in.has("commit_group")) {
        ++warp.product_group;
        return Step::NEXT;
    }
    if (in.has("wait_group")) {
        const int kept = int(read_one(warp, in.at(0), 0));
        while (!warp.products.empty() && warp.products.front().group < warp.product_group - kept) finish_product(warp);
        return Step::NEXT;
    }
    const int n = columns_of(in), rest = int(in.operands.size()) - n / 2;
    if (in.type(0).letter != 'f' || in.type(1).bits != 16) throw Fault("not emulated: " + in.mnemonic());
    if (rest != 7) throw Fault("wgmma: operands in registers are not emulated");
    const size_t at = n / 2;
    for (size_t i = at + 3; i < in.operands.size(); ++i)
        if (in.at(i).value != (i < at + 5 ? 1 : 0)) throw Fault("wgmma: signs and transposed operands are not emulated");
    const Product product{&in, read_one(warp, in.at(at), 0), read_one(warp, in.at(at + 1), 0),
                          (predicate(warp, in.at(at + 2)) & 1) != 0, warp.product_group,
                          *std::min_element(warp.proxy_fence.begin(), warp.proxy_fence.end())};
    for (int lane = 1; lane < LANES; ++lane)
        if (read_one(warp, in.at(at), lane) != product.a || read_one(warp, in.at(at + 1), lane) != product.b)
            throw Fault("wgmma: expected one descriptor in all threads");
    if (const u32 every = predicate(warp, in.at(at + 2)); every != 0 && every != ALL)
        throw Fault("wgmma: expected all threads to accumulate, or none");
    issue_together(warp, product);
    for (int i = 0; i < n / 2; ++i)
        if (warp.written[in.at(i).index] > warp.product_fence)
            throw Fault("wgmma: expected wgmma.fence after accumulators are written by other instructions");
    Shared& shared = warp.cta->shared;
    operand_pieces(SharedOperand(product.a), warp.index % 4 * 16, 16, [&](int, int, u32 address) { shared.reserve(address, 16, 1); });
    operand_pieces(SharedOperand(product.b), 0, n, [&](int, int, u32 address) { shared.reserve(address, 16, 1); });
    for (int i = 0; i < n / 2; ++i) ++warp.in_flight[in.at(i).index];
    warp.products.push_back(product);
    return Step::NEXT;
}

void Machine::finish_product(Warp& warp) {
    const Product product = warp.products.front();
    warp.products.pop_front();
    multiply(warp, product);
}

void Machine::multiply(Warp& warp, const Product& product) {
    const Instruction& in = *product.instruction;
    const int n = columns_of(in);
    Shared& shared = warp.cta->shared;
    std::vector<float> a(256), b(n * 16);
    const auto fetch = [&](const SharedOperand& operand, int first_row, int rows, std::vector<float>& to) {
        operand_pieces(operand, first_row, rows, [&](int row, int half, u32 address) {
            const u8* piece = shared.read_fenced(address, 16, product.fenced);
            for (int i = 0; i < 8; ++i) {
                u16 bits;
                std::memcpy(&bits, piece + 2 * i, 2);
                to[row * 16 + 8 * half + i] = operand_number(in.type(1), bits);
            }
            shared.reserve(address, 16, -1);
        });
    };
    fetch(SharedOperand(product.a), warp.index % 4 * 16, 16, a);
    fetch(SharedOperand(product.b), 0, n, b);
    for (int i = 0; i < n / 2; ++i) {
        const int index = in.at(i).index;
        --warp.in_flight[index];
        for (int lane = 0; lane < LANES; ++lane) {
            const int row = lane / 4 + 8 * (i / 2 % 2), column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            const float before = product.accumulate ? as<float>(warp.registers[index][lane]) : 0.0f;
            warp.registers[index][lane] = bits_of(accumulated(before, &a[row * 16], &b[column * 16]));
        }
    }
}

// The product of one warp, m16n8k16, all operands in registers.
Step Machine::do_mma(Warp& warp, const Instruction& in, u32) {
    if (!in.has("m16n8k16") || in.types.size() != 4 || in.type(0).letter != 'f' || in.type(1).bits != 16)
        throw Fault("not emulated: " + in.mnemonic());
    float a[16][16], b[16][8];
    for (int lane = 0; lane < LANES; ++lane) {
        const int group = lane / 4, pair = lane % 4 * 2;
        for (int c = 0; c < 2; ++c) {
            for (int i = 0; i < 4; ++i)
                a[group + 8 * (i & 1)][pair + c + 8 * (i >> 1)] =
                    operand_number(in.type(1), u16(read_one(warp, in.at(4 + i), lane) >> (16 * c)));
            for (int i = 0; i < 2; ++i)
                b[pair + c + 8 * i][group] = operand_number(in.type(1), u16(read_one(warp, in.at(8 + i), lane) >> (16 * c)));
        }
    }
    std::array<std::array<u64, LANES>, 4> out;
    for (int lane = 0; lane < LANES; ++lane)
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
            double total = as<float>(read_one(warp, in.at(10 + i), lane));
            for (int k = 0; k < 16; ++k) total += double(a[row][k]) * b[k][column];
            out[i][lane] = bits_of(float(total));
        }
    for (int i = 0; i < 4; ++i) std::copy(out[i].begin(), out[i].end(), write(warp, in.at(i)));
    return Step::NEXT;
}

Step Machine::do_stmatrix(Warp& warp, const Instruction& in, u32) {
    if (in.has("trans")) throw Fault("not emulated: " + in.mnemonic());
    const int matrices = in.has("x4") ? 4 : in.has("x2") ? 2 : 1;
    for (int m = 0; m < matrices; ++m)
        for (int row = 0; row < 8; ++row) {
            const u32 address = own(warp, in, u32(read_one(warp, in.at(0), 8 * m + row)));
            if (address % 16) throw Fault("stmatrix: expected rows at multiples of 16 bytes");
            for (int pair = 0; pair < 4; ++pair) {
                const int lane = row * 4 + pair;
                auto [cta, offset] = locate(warp, address + 4 * pair);
                const u32 value = u32(read_one(warp, in.at(1 + m), lane));
                std::memcpy(cta->shared.write(offset, 4, warp.thread(lane)), &value, 4);
            }
        }
    return Step::NEXT;
}

Step Machine::do_ldmatrix(Warp& warp, const Instruction& in, u32) {
    if (in.has("trans")) throw Fault("not emulated: " + in.mnemonic());
    const int matrices = in.has("x4") ? 4 : in.has("x2") ? 2 : 1;
    std::array<std::array<u64, LANES>, 4> values;
    for (int m = 0; m < matrices; ++m)
        for (int lane = 0; lane < LANES; ++lane) {
            const u32 address = u32(read_one(warp, in.at(matrices), 8 * m + lane / 4));
            auto [cta, offset] = locate(warp, address + 4 * (lane % 4));
            u32 value;
            std::memcpy(&value, cta->shared.read(offset, 4), 4);
            values[m][lane] = value;
        }
    for (int m = 0; m < matrices; ++m) std::copy(values[m].begin(), values[m].end(), write(warp, in.at(m)));
    return Step::NEXT;
}

// Warps take registers from those that other warps have released; at first there are none.
Step Machine::do_setmaxnreg(Warp& warp, const Instruction& in, u32) {
    const int registers = int(in.at(0).value), gained = (registers - warp.registers_held) * LANES;
    if (registers < 24 || registers > 256 || registers % 8) throw Fault("setmaxnreg: expected a multiple of 8 from 24 to 256");
    if (in.has("inc") ? gained < 0 : gained > 0)
        throw Fault("setmaxnreg: expected to go " + std::string(in.has("inc") ? "up" : "down") + " from " +
                    std::to_string(warp.registers_held) + ", got " + std::to_string(registers));
    if (gained > warp.cta->free_registers) return Step::STAY;
    warp.cta->free_registers -= gained;
    warp.registers_held = registers;
    ++events_;
    return Step::NEXT;
}

}  // namespace ptx
