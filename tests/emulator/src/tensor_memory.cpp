// Blackwell's tensor cores: products of shared memory into tensor memory, issued by one thread, completed in order.
#include "machine.h"

namespace ptx {

namespace {

constexpr int ROWS = 128, COLUMNS = 512;  // tensor memory of a multiprocessor, 32 bits each

struct Place {
    int lane, column;
    explicit Place(u32 address) : lane(int(address >> 16)), column(int(address & 0xFFFF)) {}
};

// Instruction descriptor of kind::f16: dense, K-major operands, fp32 accumulators.
struct Shape {
    Type a, b;
    int n, m;
    explicit Shape(u32 descriptor) {
        if ((descriptor >> 4 & 3) != 1 || descriptor & 7 || descriptor >> 13 & 15 || descriptor >> 29)
            throw Fault("tcgen05.mma: the instruction descriptor asks for what is not emulated");
        a = b = {'h', 16, 1};
        if (descriptor >> 7 & 7) a.letter = 'g';
        if (descriptor >> 10 & 7) b.letter = 'g';
        n = int(descriptor >> 17 & 63) << 3;
        m = int(descriptor >> 24 & 31) << 4;
        if (m != 64 && m != 128) throw Fault("tcgen05.mma: expected 64 or 128 rows, got " + std::to_string(m));
    }
    // Lane of a row, counted from the accumulator's first.
    int lane(int row) const { return m == 128 ? row : row / 16 * 32 + row % 16; }
};

SharedOperand operand(u64 descriptor) {
    // The fields of wgmma's descriptor but for the swizzle, which has three bits here: 0, 2, 4 and 6 are none, 128, 64 and 32 bytes.
    const u64 kinds[] = {0, 9, 1, 9, 2, 9, 3, 9}, kind = kinds[descriptor >> 61];
    if (kind == 9) throw Fault("tcgen05.mma: this swizzle is not emulated");
    return SharedOperand((descriptor & ((1ull << 46) - 1)) | kind << 62);
}

float widen(const Type& type, u16 bits) { return type.letter == 'h' ? from_fp16(bits) : from_bf16(bits); }

template <class Visit>
void pieces(const TensorProduct& product, Visit visit) {
    const Shape shape(product.shape);
    for (int which = 0; which < 2; ++which) {
        const SharedOperand source = operand(which ? product.b : product.a);
        for (int row = 0; row < (which ? shape.n : shape.m); ++row)
            for (int half = 0; half < 2; ++half) visit(which, row, half, source.address(row, 16 * half));
    }
}

}  // namespace

void Machine::finish_tensor_product(Cta& cta) {
    const TensorProduct product = cta.tensor_products.front();
    cta.tensor_products.pop_front();
    if (product.commits) {
        arrive(cta, product.barrier, 1, 0);
        return;
    }
    const Shape shape(product.shape);
    std::vector<float> operands[2] = {std::vector<float>(shape.m * 16), std::vector<float>(shape.n * 16)};
    pieces(product, [&](int which, int row, int half, u32 address) {
        const u8* piece = cta.shared.read_fenced(address, 16, product.fenced);
        for (int i = 0; i < 8; ++i) {
            u16 bits;
            std::memcpy(&bits, piece + 2 * i, 2);
            operands[which][row * 16 + 8 * half + i] = widen(which ? shape.b : shape.a, bits);
        }
        cta.shared.reserve(address, 16, -1);
    });
    const Place to(product.to);
    for (int row = 0; row < shape.m; ++row)
        for (int column = 0; column < shape.n; ++column) {
            u32& at = cta.tensor_memory.at((to.lane + shape.lane(row)) * COLUMNS + to.column + column);
            double total = product.accumulate ? double(as<float>(at)) : 0.0;
            for (int k = 0; k < 16; ++k) total += double(operands[0][row * 16 + k]) * operands[1][column * 16 + k];
            at = u32(bits_of(float(total)));
        }
    ++events_;
}

Step Machine::do_tcgen05(Warp& warp, const Instruction& in, u32 lanes) {
    Cta& cta = *warp.cta;
    const std::string& what = in.order.at(0);
    const int first = __builtin_ctz(lanes);
    if (what == "relinquish_alloc_permit" || what == "wait::ld" || what == "wait::st" || what == "fence::before_thread_sync" ||
        what == "fence::after_thread_sync") {
        return Step::NEXT;
    }
    if (what == "alloc" || what == "dealloc") {
        const int columns = int(read_one(warp, in.at(1), first));
        if (columns < 32 || columns > COLUMNS || columns & (columns - 1)) throw Fault("tcgen05: expected 32, 64, ... or 512 columns");
        if (what == "dealloc") {
            cta.tensor_columns -= columns;
            return Step::NEXT;
        }
        if (cta.tensor_memory.empty()) cta.tensor_memory.assign(ROWS * COLUMNS, 0xFFFFFFFFu);  // not a number
        const u32 address = u32(cta.tensor_columns);
        cta.tensor_columns += columns;
        if (cta.tensor_columns > COLUMNS) throw Fault("tcgen05.alloc: expected at most 512 columns in all");
        auto [owner, to] = locate(warp, u32(read_one(warp, in.at(0), first)));
        std::memcpy(owner->shared.write(to, 4, warp.thread(first)), &address, 4);
        return Step::NEXT;
    }
    if (what == "mma" || what == "commit") {
        if (lanes & (lanes - 1)) throw Fault("tcgen05: expected one thread to issue " + in.mnemonic());
        TensorProduct product{};
        if (what == "commit") {
            product.commits = true;
            product.barrier = locate(warp, u32(read_one(warp, in.at(0), first))).second;
        } else {
            if (!in.has("kind::f16") || in.operands.size() != 5) throw Fault("not emulated: " + in.mnemonic());
            product.to = u32(read_one(warp, in.at(0), first));
            product.a = read_one(warp, in.at(1), first);
            product.b = read_one(warp, in.at(2), first);
            product.shape = u32(read_one(warp, in.at(3), first));
            product.accumulate = read_one(warp, in.at(4), first) != 0;
            product.fenced = warp.proxy_fence[first];
            pieces(product, [&](int, int, int, u32 address) { cta.shared.reserve(address, 16, 1); });
        }
        cta.tensor_products.push_back(product);
        return Step::NEXT;
    }
    if (what != "ld" && what != "st") throw Fault("not emulated: " + in.mnemonic());
    const bool load = what == "ld", split = in.has("16x32bx2");
    if (!split && !in.has("32x32b")) throw Fault("not emulated: " + in.mnemonic());
    int n = 0;
    for (const auto& word : in.order)
        if (word[0] == 'x') n = std::stoi(word.substr(1));
    const size_t at = load ? n : 0, from = load ? 0 : in.operands.size() - n;
    const Place place(u32(read_one(warp, in.at(at), first)));
    const int second = split ? int(read_one(warp, in.at(at + 1), first)) : 0;
    if (place.lane / 32 != warp.index % 4) throw Fault("tcgen05: expected a warp to stay in its quarter of tensor memory");
    for (const auto& product : cta.tensor_products) {
        if (product.commits) continue;
        const int begin = Place(product.to).column, end = begin + Shape(product.shape).n;
        const int low = place.column, high = place.column + second + n;
        if (low < end && begin < high) throw Fault("tcgen05: expected products to be committed and waited for before their result is touched");
    }
    for (int i = 0; i < n; ++i) {
        u64* d = load ? write(warp, in.at(from + i)) : nullptr;
        for (int lane = 0; lane < LANES; ++lane) {
            if (!(lanes >> lane & 1)) continue;
            const int row = place.lane + (split ? lane % 16 : lane), column = place.column + i + (split && lane >= 16 ? second : 0);
            u32& cell = cta.tensor_memory.at(row * COLUMNS + column);
            if (load) d[lane] = cell;
            else cell = u32(read_one(warp, in.at(from + i), lane));
        }
    }
    return Step::NEXT;
}

}  // namespace ptx
