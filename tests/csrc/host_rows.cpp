// The kernels over rows on the host: their own maths, in their own order, over what their arguments point to.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "arguments.h"
#include "finish.h"
#include "surrogate.h"

using namespace eapo;

namespace {

constexpr int ROWS = 32, PARTS = 32;

// rows.h: a part a thread, four parts a warp.
template <class State>
State merge_parts(std::vector<State> parts) {
    State whole = State::none();
    for (int warp = 0; warp < PARTS; warp += 4) {
        parts[warp].merge(parts[warp + 1]);
        parts[warp + 2].merge(parts[warp + 3]);
        parts[warp].merge(parts[warp + 2]);
        whole.merge(parts[warp]);
    }
    return whole;
}

// rows.h: the sum of a warp's numbers by exchanges.
float warp_sum(std::vector<float> lanes) {
    for (int distance = 1; distance < ROWS; distance *= 2) {
        const std::vector<float> old = lanes;
        for (int lane = 0; lane < ROWS; ++lane) lanes[lane] += old[lane ^ distance];
    }
    return lanes[0];
}

// rows.h: the coefficients of all rows, the totals of each program. ``entropy``: null where there is none.
void surrogates(const SurrogateArguments& a, int n_rows, const float* logp, const float* entropy) {
    if (!a.coefficient) return;
    for (int program = 0; program < ceil_div(n_rows, ROWS); ++program) {
        std::vector<std::vector<float>> totals(TOTALS, std::vector<float>(ROWS, 0.0f));
        for (int lane = 0; lane < ROWS && program * ROWS + lane < n_rows; ++lane) {
            const int row = program * ROWS + lane;
            const RowTerms terms = row_terms(a, row, logp[row], entropy ? entropy[row] : 0.0f);
            a.coefficient[row] = terms.d_logp;
            for (int i = 0; i < TOTALS; ++i) totals[i][lane] = terms.totals[i];
        }
        for (int i = 0; i < TOTALS; ++i) a.totals[program * TOTALS + i] = warp_sum(totals[i]);
    }
}

float widen(std::uint16_t bits, bool fp16) {
    if (!fp16) {
        const std::uint32_t wide = std::uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &wide, 4);
        return value;
    }
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent == 31 ? (fraction ? not_a_number() : infinite())
                                      : ldexpf(float(exponent ? 1024 + fraction : fraction), (exponent ? exponent : 1) - 25);
    return bits >> 15 ? -size : size;
}

}  // namespace

extern "C" {

void finalize_rows(const FinalizeArguments* a) {
    for (int row = 0; row < a->n_rows; ++row) {
        std::vector<RangeSums> parts(PARTS, RangeSums::none());
        for (int split = 0; split < a->splits; ++split) {
            float v[7] = {};
            for (int i = 0; i < a->fields; ++i) v[i] = a->sums[(std::size_t(i) * a->splits + split) * a->n_rows + row];
            parts[split % PARTS].merge({v[0], v[1], v[2], v[3], v[4], v[5], v[6]});
        }
        const RowStatistics s = finish(merge_parts(parts));
        const float values[9] = {s.logp, s.lse, s.row_max, s.log_sum, s.entropy, s.mean_shifted, s.p2, s.p2_logp, s.varentropy};
        const int n = a->fields == 7 ? 9 : a->fields == 4 ? 6 : 4;
        for (int i = 0; i < n; ++i) a->out[std::size_t(i) * a->n_rows + row] = values[i];
    }
    surrogates(a->surrogate, a->n_rows, a->out, a->fields > 3 ? a->out + std::size_t(4) * a->n_rows : nullptr);
}

void scaled_exp_finalize_rows(const ExpFinalizeArguments* a) {
    for (int row = 0; row < a->n_rows; ++row) {
        std::vector<ScaledExpSums> parts(PARTS, ScaledExpSums::none());
        for (int tile = 0; tile < a->tiles; ++tile) {
            parts[tile % PARTS].rest.add(a->sums[std::size_t(tile) * a->n_rows + row]);
            if (a->fields == 2) parts[tile % PARTS].x_exp.add(a->sums[std::size_t(a->tiles + tile) * a->n_rows + row]);
        }
        const float scale = a->row_inv_temperature ? a->scale * a->row_inv_temperature[row] : a->scale;
        const ExpStatistics s = exp_finish(merge_parts(parts), a->offsets[row], a->offsets[a->n_rows + row], scale);
        const float values[8] = {s.logp, s.lse, s.offset, s.log_sum, s.factor, s.target, s.entropy, s.mean_shifted};
        for (int i = 0; i < (a->fields == 2 ? 8 : 6); ++i) a->out[std::size_t(i) * a->n_rows + row] = values[i];
    }
    surrogates(a->surrogate, a->n_rows, a->out, a->fields == 2 ? a->out + std::size_t(6) * a->n_rows : nullptr);
}

void offset_rows(const OffsetArguments* a, int fp16) {
    *a->n_rescue = 0;
    const auto number = [&](const void* from, long long at) { return widen(static_cast<const std::uint16_t*>(from)[at], fp16); };
    for (int row = 0; row < a->n_rows; ++row) {
        const bool outside = a->targets[row] < 0 || a->targets[row] >= a->n_columns;
        const long long column = outside ? 0 : a->targets[row];
        std::vector<float> lanes(WARP);
        for (int lane = 0; lane < WARP; ++lane) {  // row_offsets.cu: eight numbers at once, a sum for each
            float sums[8] = {};
            for (int d = 0; d < a->dim; ++d) {
                const bool whole = d < a->dim / 8 * 8;
                if ((whole ? d / 8 : d % 8) % WARP != lane) continue;
                float& sum = sums[whole ? d % 8 : 0];
                const float h = number(a->hidden, row * a->hidden_stride + d);
                sum = fma_exact(h, number(a->weight, column * a->weight_stride + d), sum);
            }
            lanes[lane] = (sums[0] + sums[4] + (sums[2] + sums[6])) + (sums[1] + sums[5] + (sums[3] + sums[7]));
        }
        float y = warp_sum(lanes);
        if (a->bias) y = at_least_lowest(y + number(a->bias, column * a->bias_stride));
        if (outside) y = not_a_number();
        const float scale = a->row_inv_temperature ? a->scale * a->row_inv_temperature[row] : a->scale;
        a->offsets[row] = exp_offset(y, scale, a->logp_guess ? a->logp_guess[row] : not_a_number(), a->with_guess, a->without_guess);
        a->offsets[a->n_rows + row] = y;
    }
}

// [n] each: loss, d loss / d logp, ratio, KL estimate, clipped.
void coefficients(int n, const float* logp, const float* old_logp, const float* advantage, const float* weight, float low,
                  float high, float dual, float* out) {
    for (int i = 0; i < n; ++i) {
        const Coefficient c = coefficient(logp[i], old_logp[i], advantage[i], weight[i], {low, high, dual});
        const float values[5] = {c.loss, c.d_logp, c.ratio, c.old_kl, c.clipped ? 1.0f : 0.0f};
        for (int field = 0; field < 5; ++field) out[field * n + i] = values[field];
    }
}

// Of the structures of arguments.h that rows.py mirrors: where field ``field`` lies, then the size.
int row_arguments_layout(int structure, int field) {
    const std::vector<std::size_t> at[] = {
        {offsetof(SurrogateArguments, coefficient), offsetof(SurrogateArguments, totals),
         offsetof(SurrogateArguments, sequence_ids), offsetof(SurrogateArguments, valid),
         offsetof(SurrogateArguments, old_logp), offsetof(SurrogateArguments, scale),
         offsetof(SurrogateArguments, advantages), offsetof(SurrogateArguments, rewards),
         offsetof(SurrogateArguments, thresholds), offsetof(SurrogateArguments, positive_weight),
         offsetof(SurrogateArguments, negative_weight), offsetof(SurrogateArguments, ratio_low),
         offsetof(SurrogateArguments, ratio_high), offsetof(SurrogateArguments, dual_clip), sizeof(SurrogateArguments)},
        {offsetof(FinalizeArguments, out), offsetof(FinalizeArguments, sums), offsetof(FinalizeArguments, n_rows),
         offsetof(FinalizeArguments, splits), offsetof(FinalizeArguments, fields), offsetof(FinalizeArguments, surrogate),
         sizeof(FinalizeArguments)},
        {offsetof(ExpFinalizeArguments, out), offsetof(ExpFinalizeArguments, sums), offsetof(ExpFinalizeArguments, offsets),
         offsetof(ExpFinalizeArguments, row_inv_temperature), offsetof(ExpFinalizeArguments, scale),
         offsetof(ExpFinalizeArguments, n_rows), offsetof(ExpFinalizeArguments, tiles),
         offsetof(ExpFinalizeArguments, fields), offsetof(ExpFinalizeArguments, surrogate), sizeof(ExpFinalizeArguments)},
        {offsetof(OffsetArguments, offsets), offsetof(OffsetArguments, n_rescue), offsetof(OffsetArguments, logp_guess),
         offsetof(OffsetArguments, hidden), offsetof(OffsetArguments, weight), offsetof(OffsetArguments, bias),
         offsetof(OffsetArguments, targets), offsetof(OffsetArguments, row_inv_temperature),
         offsetof(OffsetArguments, hidden_stride), offsetof(OffsetArguments, weight_stride),
         offsetof(OffsetArguments, bias_stride), offsetof(OffsetArguments, scale), offsetof(OffsetArguments, with_guess),
         offsetof(OffsetArguments, without_guess), offsetof(OffsetArguments, n_rows), offsetof(OffsetArguments, n_columns),
         offsetof(OffsetArguments, dim), sizeof(OffsetArguments)}};
    return int(at[structure][field]);
}
}
