// A kernel's decoded instructions. ptx_syntax.py parses the text; here a mnemonic is split at its dots.
#pragma once

#include <set>
#include <sstream>
#include <vector>

#include "values.h"

namespace ptx {

enum class Kind : i32 { REGISTER, PREDICATE, NOT_PREDICATE, IMMEDIATE, SPECIAL, LABEL, ADDRESS, PARAMETER, SINK };

struct Operand {
    Kind kind;
    i32 index;  // register, predicate or special register; of an address the base register, or -1
    i64 value;  // immediate bits, a label's instruction, an address's offset, a parameter's place
};

enum class Special : i32 {
    TID_X, TID_Y, TID_Z, NTID_X, NTID_Y, NTID_Z, CTAID_X, CTAID_Y, CTAID_Z, NCTAID_X, NCTAID_Y, NCTAID_Z, LANEID, WARPID,
    CLUSTER_CTARANK, CLUSTER_NCTARANK, CLUSTERID_X, NCLUSTERID_X, CLOCK
};

struct Type {
    char letter = 'b';  // b, u, s, f; h for half precision, g for bfloat16, p for predicates
    int bits = 0;
    int packed = 1;  // numbers in a register
    int bytes() const { return bits * packed / 8; }
};

inline bool parse_type(const std::string& word, Type& type) {
    static const std::set<std::string> known = {"b1", "b8", "b16", "b32", "b64", "b128", "u8", "u16", "u32", "u64",
                                                "s8", "s16", "s32", "s64", "f32", "f64"};
    if (word == "pred") return type = {'p', 1, 1}, true;
    if (word == "f16") return type = {'h', 16, 1}, true;
    if (word == "bf16") return type = {'g', 16, 1}, true;
    if (word == "f32x2") return type = {'f', 32, 2}, true;
    if (word == "f16x2") return type = {'h', 16, 2}, true;
    if (word == "bf16x2") return type = {'g', 16, 2}, true;
    if (!known.count(word)) return false;
    type = {word[0], std::stoi(word.substr(1)), 1};
    return true;
}

struct Instruction {
    std::string name;                // the first word of the mnemonic
    std::set<std::string> words;     // the others, without types
    std::vector<std::string> order;  // the same in their order
    std::vector<Type> types;
    std::vector<Operand> operands;
    int guard = -1;
    bool guard_negated = false;
    int line = 0;
    int code = -1;    // an index into the machine's table of handlers
    int vector = 1;   // .v2, .v4, .v8
    bool converged = false;  // .aligned: all threads of the warp must be here

    bool has(const char* word) const { return words.count(word) > 0; }
    const Type& type(size_t index = 0) const {
        if (index >= types.size()) throw Fault("expected " + std::to_string(index + 1) + " types in " + mnemonic());
        return types[index];
    }
    const Operand& at(size_t index) const {
        if (index >= operands.size()) throw Fault("expected more operands in " + mnemonic());
        return operands[index];
    }
    std::string mnemonic() const {
        std::string text = name;
        for (const auto& word : order) text += "." + word;
        return text;
    }
};

inline Instruction decode(const std::string& mnemonic) {
    Instruction in;
    std::stringstream stream(mnemonic);
    std::getline(stream, in.name, '.');
    for (std::string word; std::getline(stream, word, '.');) {
        if (word.empty()) continue;
        in.order.push_back(word);
        Type type;
        if (parse_type(word, type)) {
            in.types.push_back(type);
        } else {
            in.words.insert(word);
            if (word.size() == 2 && word[0] == 'v') in.vector = word[1] - '0';
        }
    }
    return in;
}

struct Program {
    std::vector<Instruction> instructions;
    int registers = 0, predicates = 0;
};

}  // namespace ptx
